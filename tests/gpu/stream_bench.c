/* stream_bench.c - what stream order and host order cost over the same kernels in one process: figures for
 * suite/streams.py, one JSON object on stdout.
 *
 * usage: stream-bench LAYERS BATCH HEADS Q_LEN KV_LEN WORK_NS ROUNDS, with MLAD_SOCKET, MLAD_DEVICE, on whose GPU the
 * keys lie, STREAM_GPU, where all else does (absent: the same)
 *
 *     local    the kernels of this build in one stream of this process, on the keys' GPU: a layer is `work`, decode
 *     stream   work, mla_submit_stream of a plan; as graphs of LAYERS layers, both
 *     host     work, sync, decode, sync, work, sync: locally, and by mla_decode
 * Replays one behind the other (`us_per_layer`) and one at a time (`alone`). The results of both are compared. */
#include "../require.h"
#include "cuda_device.h"
#include "mla.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

extern const unsigned char stream_bench_image[];
__asm__(".section .rodata\n.globl stream_bench_image\n.hidden stream_bench_image\n.balign 64\nstream_bench_image:\n"
        ".incbin \"stream_bench.fatbin\"\n.text\n");

enum { PAGE = 64, WARM = 5, BLOCKS = 132 };

static struct {
    uint32_t layers, batch, heads, q_len, kv_len, rounds;
    unsigned long long work_ns;
} given;

static const struct mlak_driver *cu;
static struct mlak_fault fault;
static mla_client *client;
static mla_error error;
static CUcontext here, there;

#define CU(call, ...)                                                                                                  \
    do {                                                                                                               \
        CUresult result_ = cu->call(__VA_ARGS__);                                                                      \
        mlak_driver_fail(&fault, MLAK_OK, "", #call, result_);                                                         \
        REQUIRE(result_ == CUDA_SUCCESS, fault.message);                                                               \
    } while (0)
#define MLA(call) REQUIRE((call) == MLA_OK, error.message)

/* One side's tensors, stream and graph. */
struct side {
    CUcontext context;
    CUstream stream;
    CUmodule module;
    CUfunction work;
    CUdeviceptr q, table, lengths, out;
    CUgraphExec exec;
};
static CUdeviceptr keys;

static uint64_t q_bytes(void)
{
    return (uint64_t)given.batch * given.q_len * given.heads * 1152;
}
static uint64_t out_bytes(void)
{
    return (uint64_t)given.batch * given.q_len * given.heads * 1024;
}
static uint32_t columns(void)
{
    return (given.kv_len + PAGE - 1) / PAGE;
}
static uint64_t key_bytes(void)
{
    return (uint64_t)given.batch * columns() * PAGE * 1152;
}

static double now_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e6 + (double)t.tv_nsec * 1e-3;
}

static CUcontext context_of(const char *name)
{
    int count;
    CU(device_count, &count);
    for (int i = 0; i < count; i++) {
        CUuuid uuid;
        CUcontext context;
        char text[MLAK_UUID_TEXT];
        CU(device_uuid, &uuid, i);
        mlak_uuid_text(&uuid, text);
        if (strcmp(text, name) != 0)
            continue;
        CU(context_retain, &context, i);
        return context;
    }
    REQUIRE(!"a GPU of that name", name);
    return NULL;
}

static uint16_t *draw(uint64_t bytes)
{
    uint16_t *values = malloc(bytes);
    uint32_t state = 7;
    for (uint64_t i = 0; i < bytes / 2; i++) {
        state = state * 1664525 + 1013904223;
        float value = (float)(state >> 8) / (1 << 23) - 1;
        uint32_t bits;
        memcpy(&bits, &value, sizeof bits);
        values[i] = (uint16_t)(bits >> 16);
    }
    return values;
}

static CUdeviceptr put(const void *from, uint64_t bytes)
{
    CUdeviceptr at;
    CU(alloc, &at, bytes);
    if (from)
        CU(copy, at, (CUdeviceptr)from, bytes);
    CU(context_drain);
    return at;
}

static void open_side(struct side *side, CUcontext context)
{
    side->context = context;
    CU(context_set, context);
    CU(stream_new, &side->stream, CU_STREAM_NON_BLOCKING);
    CU(module_load, &side->module, stream_bench_image);
    CU(module_function, &side->work, side->module, "stream_bench_work");
    uint16_t *q = draw(q_bytes());
    int32_t *table = malloc((uint64_t)given.batch * columns() * 4), *lengths = malloc(given.batch * 4);
    for (uint32_t i = 0; i < given.batch * columns(); i++)
        table[i] = (int32_t)i;
    for (uint32_t i = 0; i < given.batch; i++)
        lengths[i] = (int32_t)given.kv_len;
    side->q = put(q, q_bytes());
    side->table = put(table, (uint64_t)given.batch * columns() * 4);
    side->lengths = put(lengths, given.batch * 4);
    side->out = put(NULL, out_bytes());
    free(q);
    free(table);
    free(lengths);
}

static void work(struct side *side)
{
    void *parameters[] = {&given.work_ns};
    CU(launch, side->work, BLOCKS, 1, 1, 256, 1, 1, 0, side->stream, parameters, NULL);
}

static void sync(struct side *side)
{
    CUresult state;
    while ((state = cu->stream_query(side->stream)) == CUDA_ERROR_NOT_READY)
        ;
    REQUIRE(state == CUDA_SUCCESS, "cuStreamQuery");
}

static void instantiate(struct side *side)
{
    CUgraph graph;
    CU(capture_end, side->stream, &graph);
    CU(graph_instantiate, &side->exec, graph, 0);
    CU(graph_free, graph);
}

/* ---- the same kernels in this process ---- */

static struct mlak_batch batch_of(const struct side *side)
{
    struct mlak_batch batch = {.batch = given.batch, .heads = given.heads,
                               .q_rows = (uint64_t)given.batch * given.q_len, .pages = given.batch * columns(),
                               .page_size = PAGE, .max_pages = columns(), .softmax_scale = 1 / sqrt(192)};
    mlak_batch_defaults(&batch);
    batch.q = (void *)side->q;
    batch.kv = (void *)keys;
    batch.block_table = (void *)side->table;
    batch.seqlens = (void *)side->lengths;
    batch.out = (void *)side->out;
    return batch;
}

static void local_decode(struct mlak_device *device, struct side *side, const struct mlak_batch *batch)
{
    const struct cuda_slice whole = {.batch = batch, .count = batch->batch};
    struct cuda_room *room = &device->rooms[0];
    struct mlak_cuda_job job = cuda_job(device, room, cuda_gates(device), &whole, 1);
    REQUIRE(cuda_launch(device, room, &job, false, side->stream) == CUDA_SUCCESS, "the kernels");
}

/* ---- figures ---- */

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double percentile(double *values, uint32_t count, double p)
{
    qsort(values, count, sizeof *values, compare);
    return values[(uint32_t)((count - 1) * p)];
}

static void begin_replay(struct side *side, mla_step *step)
{
    if (step)
        MLA(mla_step_launch(step, side->stream, &error));
    CU(graph_launch, side->exec, side->stream);
}

/* Microseconds a layer: of replays one behind the other, and the median of those alone. */
static void time_graph(struct side *side, mla_step *step, double *behind, double *alone)
{
    double *each = malloc(given.rounds * sizeof *each);
    CU(context_set, side->context);
    for (int i = 0; i < WARM; i++)
        begin_replay(side, step);
    sync(side);
    double start = now_us();
    for (uint32_t i = 0; i < given.rounds; i++)
        begin_replay(side, step);
    sync(side);
    *behind = (now_us() - start) / given.rounds / given.layers;
    for (uint32_t i = 0; i < given.rounds; i++) {
        start = now_us();
        begin_replay(side, step);
        sync(side);
        each[i] = (now_us() - start) / given.layers;
    }
    *alone = percentile(each, given.rounds, 0.5);
    free(each);
}

/* Work, decode, work, each waited for. */
static void time_host(struct side *side, struct mlak_device *device, const struct mlak_batch *batch, mla_plan *plan,
                      double *p50, double *p99)
{
    const uint32_t rounds = given.rounds * 20;
    double *each = malloc(rounds * sizeof *each);
    CU(context_set, side->context);
    for (uint32_t i = 0; i < rounds + WARM; i++) {
        double start = now_us();
        work(side);
        sync(side);
        if (plan) {
            MLA(mla_decode(client, plan, MLA_FOREVER, NULL, &error));
        } else {
            local_decode(device, side, batch);
            sync(side);
        }
        work(side);
        sync(side);
        if (i >= WARM)
            each[i - WARM] = now_us() - start;
    }
    *p50 = percentile(each, rounds, 0.5);
    *p99 = percentile(each, rounds, 0.99);
    free(each);
}

static mla_buffer *import(CUdeviceptr at, uint64_t bytes)
{
    mla_buffer *buffer;
    MLA(mla_buffer_import_device(client, (void *)at, bytes, MLA_READWRITE, &buffer, &error));
    return buffer;
}

static void describe(const struct side *side, mla_batch *batch)
{
    mla_batch_init(batch);
    batch->batch = given.batch;
    batch->heads = given.heads;
    batch->q_rows = (uint64_t)given.batch * given.q_len;
    batch->pages = given.batch * columns();
    batch->page_size = PAGE;
    batch->max_pages = columns();
    batch->softmax_scale = 1 / sqrt(192);
    CU(context_set, there);
    batch->kv = (mla_tensor){import(keys, key_bytes()), 0};
    CU(context_set, here);
    batch->q = (mla_tensor){import(side->q, q_bytes()), 0};
    batch->block_table = (mla_tensor){import(side->table, (uint64_t)given.batch * columns() * 4), 0};
    batch->seqlens = (mla_tensor){import(side->lengths, given.batch * 4), 0};
    batch->out = (mla_tensor){import(side->out, out_bytes()), 0};
}

static bool same_outputs(const struct side *a, const struct side *b)
{
    uint16_t *x = malloc(out_bytes()), *y = malloc(out_bytes());
    double worst = 0;
    CU(context_set, a->context);
    CU(copy, (CUdeviceptr)x, a->out, out_bytes());
    CU(context_set, b->context);
    CU(copy, (CUdeviceptr)y, b->out, out_bytes());
    for (uint64_t i = 0; i < out_bytes() / 2; i++) {
        uint32_t bits[2] = {(uint32_t)x[i] << 16, (uint32_t)y[i] << 16};
        float values[2];
        memcpy(values, bits, sizeof bits);
        double apart = fabs((double)values[0] - (double)values[1]);
        worst = !(apart <= worst) ? apart : worst; /* NaN too */
    }
    free(x);
    free(y);
    return worst < 0.01;
}

int main(int argc, char **argv)
{
    const char *name = getenv("MLAD_DEVICE"), *gpu = getenv("STREAM_GPU");
    REQUIRE(argc == 8 && name, "usage: stream-bench LAYERS BATCH HEADS Q_LEN KV_LEN WORK_NS ROUNDS");
    uint32_t *const words[] = {&given.layers, &given.batch, &given.heads, &given.q_len, &given.kv_len};
    for (int i = 0; i < 5; i++)
        *words[i] = (uint32_t)atoi(argv[i + 1]);
    given.work_ns = (unsigned long long)atoi(argv[6]);
    given.rounds = (uint32_t)atoi(argv[7]);
    REQUIRE((cu = mlak_driver(&fault)) != NULL, fault.message);
    there = context_of(name);
    here = context_of(gpu ? gpu : name);
    CU(context_set, there);
    uint16_t *values = draw(key_bytes());
    keys = put(values, key_bytes());
    free(values);

    struct side local = {0}, remote = {0};
    open_side(&local, there);
    const struct mlak_backend *backend = mlak_backend(name);
    struct mlak_device *device = backend->open(&(struct mlak_options){.device = name}, &fault);
    REQUIRE(device, fault.message);
    struct mlak_batch batch = batch_of(&local);
    CU(context_set, there);
    CU(capture_begin, local.stream, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL);
    for (uint32_t i = 0; i < given.layers; i++) {
        work(&local);
        local_decode(device, &local, &batch);
    }
    instantiate(&local);
    double local_behind, local_alone, local_p50, local_p99;
    time_graph(&local, NULL, &local_behind, &local_alone);
    time_host(&local, device, &batch, NULL, &local_p50, &local_p99);

    open_side(&remote, here);
    MLA(mla_connect(&client, NULL, &error));
    mla_batch described;
    describe(&remote, &described);
    mla_plan **plans = calloc(given.layers, sizeof *plans);
    for (uint32_t i = 0; i < given.layers; i++)
        MLA(mla_plan_create(client, &described, &plans[i], &error));
    char why[MLA_WHY];
    mla_order order = mla_client_order(client, why);
    double behind = 0, alone = 0, p50, p99, before, before_alone;
    time_host(&remote, NULL, NULL, plans[0], &p50, &p99);
    bool right = same_outputs(&local, &remote);
    if (order == MLA_ORDER_STREAM) {
        mla_step *step;
        MLA(mla_step_create(client, plans, given.layers, &step, &error));
        CU(capture_begin, remote.stream, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL);
        for (uint32_t i = 0; i < given.layers; i++) {
            work(&remote);
            MLA(mla_submit_stream(plans[i], remote.stream, &error));
        }
        instantiate(&remote);
        CU(context_set, here);
        CU(set_words_async, remote.out, 0, out_bytes() / 4, remote.stream);
        time_graph(&remote, step, &behind, &alone);
        MLA(mla_step_status(step, &error));
        right = right && same_outputs(&local, &remote);
        time_graph(&local, NULL, &before, &before_alone); /* again: the clocks may have changed */
        local_behind = before < local_behind ? before : local_behind;
        local_alone = before_alone < local_alone ? before_alone : local_alone;
    }
    printf("{\"order\": \"%s\", \"why\": \"%s\", \"right\": %s, \"layers\": %u, \"batch\": %u, \"heads\": %u, "
           "\"q_len\": %u, \"kv_len\": %u, \"work_us\": %.1f, \"local_us_per_layer\": %.3f, "
           "\"stream_us_per_layer\": %.3f, \"overhead_us_per_layer\": %.3f, "
           "\"local_alone_us_per_layer\": %.3f, \"stream_alone_us_per_layer\": %.3f, "
           "\"overhead_alone_us_per_layer\": %.3f, \"host_local_p50_us\": %.2f, \"host_local_p99_us\": %.2f, "
           "\"host_p50_us\": %.2f, \"host_p99_us\": %.2f, \"host_ratio_p50\": %.3f, \"host_ratio_p99\": %.3f}\n",
           order == MLA_ORDER_STREAM ? "stream" : "host", why, right ? "true" : "false", given.layers, given.batch,
           given.heads, given.q_len, given.kv_len, (double)given.work_ns / 1e3, local_behind, behind,
           behind - local_behind, local_alone, alone, alone - local_alone, local_p50, local_p99, p50, p99,
           p50 / local_p50, p99 / local_p99);
    fflush(stdout);
    mla_close(client);
    return right ? 0 : 1;
}
