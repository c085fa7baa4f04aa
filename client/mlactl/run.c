/* run.c - binds captures to libmla. Two buffers: inputs, each tensor at a multiple of 64 bytes; outputs, with a guard
 * of known bytes before, between and after them. On a GPU both lie in its memory, as an engine's would, and are filled
 * and read here through a copy. */
#include "run.h"
#include "admin.h"
#include "gpu.h"
#include "progress.h"

#include <stdio.h>
#include <string.h>

enum { ALIGN = 64, GUARD = 4096, GUARD_BYTE = 0x5a };

static uint64_t align_up(uint64_t bytes) { return (bytes + ALIGN - 1) & ~(uint64_t)(ALIGN - 1); }

int run_exit_code(mla_status status)
{
    switch (status) {
    case MLA_OK: return CTL_OK;
    case MLA_REQUESTS: return CTL_PARTLY;
    case MLA_NOT_CONNECTED: return CTL_NOT_RUNNING;
    case MLA_TIMEOUT: return CTL_TIMED_OUT;
    default: return CTL_FAILED;
    }
}

int run_connect(const struct ctl *ctl, const char *device, mla_client **client)
{
    return run_connect_by(ctl, device, MLA_TRANSPORT_AUTO, client);
}

int run_connect_by(const struct ctl *ctl, const char *device, mla_transport transport, mla_client **client)
{
    admin_auto struct admin *admin = NULL;
    struct ctl_fault fault;
    progress("connecting to %.100s", ctl->socket);
    int code = admin_new(ctl, &admin, &fault); /* says at once, and better, what libmla would find out by retrying */
    if (code)
        return ctl_error(ctl, code, "%s", fault.text);
    mla_options options;
    mla_options_init(&options);
    options.socket = ctl->socket;
    options.device = device;
    options.name = "mlactl";
    options.reconnect_ms = ctl->timeout_ms;
    options.transport = transport;
    mla_error error;
    mla_status status = mla_connect(client, &options, &error);
    return status == MLA_OK ? CTL_OK : ctl_error(ctl, run_exit_code(status), "%s", error.message);
}

/* ---- memory ---- */

/* `access` is the daemon's to GPU memory. */
static int memory_new(struct run *run, size_t bytes, mla_access access, struct run_memory *memory, mla_error *error)
{
    const char *device = mla_device(run->client);
    memory->bytes = bytes;
    if (!gpu_named(device)) {
        if (mla_buffer_alloc(run->client, bytes, &memory->buffer, error) != MLA_OK)
            return -1;
        memory->host = mla_buffer_data(memory->buffer);
        return 0;
    }
    memory->host = calloc(bytes, 1);
    if (!memory->host) {
        *error = (mla_error){.code = MLA_MEMORY, .message = "out of memory"};
        return -1;
    }
    memory->gpu = gpu_alloc(device, bytes, error);
    if (!memory->gpu)
        return -1;
    return -(mla_buffer_import_device(run->client, memory->gpu, bytes, access, &memory->buffer, error) != MLA_OK);
}

static int memory_upload(const struct run_memory *memory, mla_error *error)
{
    return memory->gpu ? gpu_upload(memory->gpu, memory->host, memory->bytes, error) : 0;
}

static void memory_free(struct run_memory *memory)
{
    if (memory->buffer)
        mla_buffer_free(memory->buffer, NULL);
    if (memory->gpu)
        gpu_free(memory->gpu);
    if (memory->gpu || !memory->buffer)
        free(memory->host);
}

/* ---- inputs and outputs ---- */

static uint64_t kv_span(const mla_batch *batch)
{
    return batch->pages ? batch->pages * batch->page_stride : 0;
}

/* Place packed rows at the batch's strides; `packed` and `to` may not overlap. Gaps hold NaN of any type. */
static void spread_kv(const mla_batch *batch, const uint8_t *packed, uint8_t *to)
{
    unsigned row = capture_row_bytes(batch);
    memset(to, 0xff, kv_span(batch));
    for (uint64_t page = 0; page < batch->pages; page++)
        for (uint64_t i = 0; i < batch->page_size; i++, packed += row)
            memcpy(to + page * batch->page_stride + i * batch->row_stride, packed, row);
}

static int load(const struct capture *capture, enum capture_tensor tensor, void *to, mla_error *error)
{
    struct ctl_fault fault;
    if (capture_load(capture, tensor, to, &fault) == 0)
        return 0;
    *error = (mla_error){.code = MLA_INVALID};
    snprintf(error->field, sizeof error->field, "%s", capture_name(tensor));
    snprintf(error->message, sizeof error->message, "cannot read tensor %s: %.400s", capture_name(tensor), fault.text);
    return -1;
}

static int bind_kv(struct run *run, const struct capture *capture, uint64_t offset, mla_error *error)
{
    uint8_t *to = run->inputs.host + offset;
    run->batch.kv = (mla_tensor){run->inputs.buffer, offset};
    if (kv_span(&run->batch) == capture->data[CAPTURE_KV].bytes)
        return load(capture, CAPTURE_KV, to, error);
    ctl_autofree uint8_t *packed = malloc(capture->data[CAPTURE_KV].bytes + 1);
    if (!packed) {
        *error = (mla_error){.code = MLA_MEMORY, .message = "out of memory"};
        return -1;
    }
    if (load(capture, CAPTURE_KV, packed, error))
        return -1;
    spread_kv(&run->batch, packed, to);
    return 0;
}

static int bind_inputs(struct run *run, const struct capture *capture, bool host_scales, mla_error *error)
{
    mla_batch *batch = &run->batch;
    mla_tensor *const tensors[] = {
        [CAPTURE_Q] = &batch->q, [CAPTURE_BLOCK_TABLE] = &batch->block_table, [CAPTURE_SEQLENS] = &batch->seqlens,
        [CAPTURE_CU_Q] = &batch->cu_q, [CAPTURE_TREE_MASK] = &batch->tree_mask, [CAPTURE_SINK] = &batch->sink,
        [CAPTURE_Q_SCALE] = &batch->q_scale.tensor, [CAPTURE_K_SCALE] = &batch->k_scale.tensor,
        [CAPTURE_V_SCALE] = &batch->v_scale.tensor};
    mla_scale *const scales[] = {[CAPTURE_Q_SCALE] = &batch->q_scale, [CAPTURE_K_SCALE] = &batch->k_scale,
                                 [CAPTURE_V_SCALE] = &batch->v_scale};
    uint64_t bytes = ALIGN, at = 0;
    for (unsigned i = 0; i < CAPTURE_TENSORS; i++)
        bytes += align_up(i == CAPTURE_KV ? kv_span(batch) : capture->data[i].bytes);
    if (memory_new(run, bytes, MLA_READ, &run->inputs, error))
        return -1;
    for (unsigned i = 0; i < CAPTURE_TENSORS; i++) {
        if (!capture->data[i].present)
            continue;
        if (i == CAPTURE_KV) {
            if (bind_kv(run, capture, at, error))
                return -1;
            at += align_up(kv_span(batch));
            continue;
        }
        void *to = run->inputs.host + at;
        if (load(capture, (enum capture_tensor)i, to, error))
            return -1;
        if (i == CAPTURE_SEQLENS)
            run->seqlens = to;
        bool scale = i >= CAPTURE_Q_SCALE;
        if (scale && host_scales)
            *scales[i] = (mla_scale){.kind = MLA_SCALE_VALUE, .value = *(float *)to};
        else
            *tensors[i] = (mla_tensor){run->inputs.buffer, at};
        if (scale && !host_scales)
            scales[i]->kind = MLA_SCALE_TENSOR;
        at += align_up(capture->data[i].bytes);
    }
    return memory_upload(&run->inputs, error);
}

static int bind_outputs(struct run *run, mla_error *error)
{
    mla_batch *batch = &run->batch;
    run->out_bytes = batch->q_rows * batch->heads * 512 * 2;
    run->lse_bytes = batch->q_rows * batch->heads * 4;
    uint64_t lse_at = align_up(GUARD + run->out_bytes + GUARD);
    if (memory_new(run, lse_at + run->lse_bytes + GUARD, MLA_READWRITE, &run->outputs, error))
        return -1;
    uint8_t *base = run->outputs.host;
    memset(base, GUARD_BYTE, run->outputs.bytes);
    run->out = base + GUARD;
    run->lse = (float *)(void *)(base + lse_at);
    batch->out = (mla_tensor){run->outputs.buffer, GUARD};
    batch->lse = (mla_tensor){run->outputs.buffer, lse_at};
    run_poison_outputs(run);
    return memory_upload(&run->outputs, error);
}

int run_new(mla_client *client, const struct capture *capture, const struct run_layout *layout, struct run **out,
            mla_error *error)
{
    run_auto struct run *run = calloc(1, sizeof *run);
    if (!run) {
        *error = (mla_error){.code = MLA_MEMORY, .message = "out of memory"};
        return -1;
    }
    run->client = client;
    run->batch = capture->batch;
    run->batch.row_stride = capture_row_bytes(&run->batch) + layout->row_gap;
    run->batch.page_stride = run->batch.row_stride * run->batch.page_size + layout->page_gap;
    if (bind_inputs(run, capture, layout->host_scales, error) || bind_outputs(run, error) ||
        mla_plan_create(client, &run->batch, &run->plan, error) != MLA_OK)
        return -1;
    *out = run;
    run = NULL;
    return 0;
}

mla_status run_decode(struct run *run, int timeout_ms, mla_result *result, mla_error *error)
{
    mla_status status = mla_decode(run->client, run->plan, timeout_ms, result, error);
    const struct run_memory *outputs = &run->outputs;
    if ((status == MLA_OK || status == MLA_REQUESTS) && outputs->gpu &&
        gpu_download(outputs->host, outputs->gpu, outputs->bytes, error))
        return error->code;
    return status;
}

void run_poison_outputs(struct run *run)
{
    memset(run->out, 0xff, run->out_bytes);
    memset(run->lse, 0xff, run->lse_bytes);
}

bool run_surroundings_intact(const struct run *run)
{
    const uint8_t *base = run->outputs.host, *end = base + run->outputs.bytes;
    const uint8_t *out = run->out, *lse = (const uint8_t *)run->lse;
    for (const uint8_t *at = base; at < end; at++) {
        if (at == out)
            at += run->out_bytes;
        if (at == lse)
            at += run->lse_bytes;
        if (*at != GUARD_BYTE)
            return false;
    }
    return true;
}

void run_free(struct run *run)
{
    if (!run)
        return;
    mla_plan_destroy(run->plan);
    memory_free(&run->inputs);
    memory_free(&run->outputs);
    free(run);
}
