/* soak_client.c - a client that compares every result with the bits that it has to have; suite/soak.py starts many, and
 * kills them.
 *
 * usage: soak-client expect VARIANT FILE               decode once, and write the result
 *        soak-client loop VARIANT FILE SLOTS SLOT [all] decode until SIGTERM, then leave; an account of it in the file
 *                                                      SLOTS, entry SLOT
 * with MLAD_SOCKET and MLAD_DEVICE. The keys of a GPU's client lie on it, with "all" everything else too; the rest in
 * memory of the host. Each output is full of NaN before its decode is submitted. Two decodes are in flight. */
#include "gpu.h"
#include "mla.h"

#include <fcntl.h>
#include <math.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>

enum { PAGE = 64, DEPTH = 2, LOST_MS = 60000, RECONNECT_MS = 60000, SLOTS = 16384 };

/* Of `keys` each request has some fewer than the one before it. Deterministic: the bits are the same in any company. */
static const struct variant { uint32_t batch, heads, q_len, keys; } variants[] = {
    {1, 16, 4, 700}, {4, 16, 1, 517}, {2, 8, 2, 1025}, {6, 16, 3, 130}};
enum { VARIANTS = sizeof variants / sizeof *variants };

/* What suite/soak.py reads while we are there and after we were killed. */
enum { STATE_NONE, STATE_READY, STATE_LEFT };
struct slot {
    _Atomic uint64_t state, decodes, wrong, errors, lost, busy, replays;
    char text[200]; /* of the first error */
};
_Static_assert(sizeof(struct slot) == 256, "suite/soak.py reads it");

static volatile sig_atomic_t leave;
static struct slot *slot, nobody;
static mla_client *client;
static mla_error error;

static void on_term(int signal)
{
    (void)signal;
    leave = 1;
}

/* End, with the reason where it is looked for. */
static _Noreturn void stop(const char *what, const char *why)
{
    fprintf(stderr, "%s: %s\n", what, why);
    if (slot->errors == 0)
        snprintf(slot->text, sizeof slot->text, "%.60s: %.130s", what, why);
    atomic_fetch_add(&slot->errors, 1);
    exit(1);
}

#define MLA(call)                                                                                                      \
    do {                                                                                                               \
        if ((call) != MLA_OK)                                                                                          \
            stop(#call, error.message);                                                                                \
    } while (0)
#define GPU(call)                                                                                                      \
    do {                                                                                                               \
        if ((call) != 0)                                                                                               \
            stop(#call, error.message);                                                                                \
    } while (0)

static void *room(size_t bytes)
{
    void *memory = calloc(1, bytes);
    if (!memory)
        stop("memory", "there is none");
    return memory;
}

/* ---- memory that the daemon sees ---- */

struct memory { mla_buffer *buffer; void *host, *gpu; size_t bytes; }; /* host: its own, or of a GPU's a copy */

static struct memory memory_new(size_t bytes, bool on_gpu)
{
    struct memory memory = {.bytes = bytes};
    if (!on_gpu) {
        MLA(mla_buffer_alloc(client, bytes, &memory.buffer, &error));
        memory.host = mla_buffer_data(memory.buffer);
        return memory;
    }
    memory.host = room(bytes);
    memory.gpu = gpu_alloc(mla_device(client), bytes, &error);
    if (!memory.gpu)
        stop("gpu_alloc", error.message);
    MLA(mla_buffer_import_device(client, memory.gpu, bytes, MLA_READWRITE, &memory.buffer, &error));
    return memory;
}

static void upload(const struct memory *memory)
{
    if (!memory->gpu)
        return;
    GPU(gpu_upload(memory->gpu, memory->host, memory->bytes, &error));
    MLA(mla_stream_drain(NULL, LOST_MS, &error)); /* a copy from such memory may return before it has arrived */
}

/* ---- the batch ---- */

struct job { mla_plan *plan; struct memory out; mla_ticket ticket; };

static uint32_t next_random(uint32_t *state) { return *state = *state * 1664525 + 1013904223; }

/* bf16 of magnitude 0.5 to 2 and either sign. */
static void draw(uint16_t *values, size_t count, uint32_t *state)
{
    for (size_t i = 0; i < count; i++)
        values[i] = (uint16_t)((next_random(state) >> 8 & 0x80ff) | 0x3f00);
}

static void fill_table(int32_t *table, uint32_t pages, uint32_t *state)
{
    for (uint32_t i = 0; i < pages; i++) {
        uint32_t other = (next_random(state) >> 8) % (i + 1);
        table[i] = table[other];
        table[other] = (int32_t)i;
    }
}

static void make_jobs(unsigned index, bool all, struct job *jobs, unsigned count)
{
    const struct variant *v = &variants[index];
    const bool gpu = gpu_named(mla_device(client));
    const uint32_t columns = (v->keys + PAGE - 1) / PAGE, pages = v->batch * columns;
    const size_t q_bytes = (size_t)v->batch * v->q_len * v->heads * 1152, table_bytes = pages * sizeof(int32_t);
    const size_t table_at = (q_bytes + 63) / 64 * 64, lengths_at = (table_at + table_bytes + 63) / 64 * 64;
    uint32_t state = 7 + index;
    mla_batch batch;
    struct memory keys = memory_new((size_t)pages * PAGE * 1152, gpu);
    struct memory rest = memory_new(lengths_at + v->batch * sizeof(int32_t), gpu && all);
    draw(keys.host, keys.bytes / 2, &state);
    draw(rest.host, q_bytes / 2, &state);
    fill_table((int32_t *)(void *)((uint8_t *)rest.host + table_at), pages, &state);
    for (uint32_t b = 0; b < v->batch; b++)
        ((int32_t *)(void *)((uint8_t *)rest.host + lengths_at))[b] = (int32_t)(v->keys - 17 * b);
    upload(&keys);
    upload(&rest);
    mla_batch_init(&batch);
    batch.batch = v->batch;
    batch.heads = v->heads;
    batch.q_rows = (uint64_t)v->batch * v->q_len;
    batch.pages = pages;
    batch.page_size = PAGE;
    batch.max_pages = columns;
    batch.softmax_scale = 1 / 24.0;
    batch.deterministic = 1;
    batch.kv = (mla_tensor){keys.buffer, 0};
    batch.q = (mla_tensor){rest.buffer, 0};
    batch.block_table = (mla_tensor){rest.buffer, table_at};
    batch.seqlens = (mla_tensor){rest.buffer, lengths_at};
    for (unsigned i = 0; i < count; i++) {
        jobs[i].out = memory_new((size_t)v->batch * v->q_len * v->heads * 1024, gpu && all);
        batch.out = (mla_tensor){jobs[i].out.buffer, 0};
        MLA(mla_plan_create(client, &batch, &jobs[i].plan, &error));
    }
}

static void submit(struct job *job)
{
    memset(job->out.host, 0xff, job->out.bytes);
    upload(&job->out);
    MLA(mla_submit(client, job->plan, &job->ticket, &error));
}

/* False: it was not taken, and is to be submitted again. */
static bool collect(struct job *job)
{
    mla_result result;
    mla_status status = mla_wait(client, job->ticket, LOST_MS, &result, &error);
    if (status == MLA_BUSY) {
        atomic_fetch_add(&slot->busy, 1);
        return false;
    }
    if (status == MLA_TIMEOUT)
        atomic_fetch_add(&slot->lost, 1);
    if (status != MLA_OK)
        stop("mla_wait", error.message);
    atomic_fetch_add(&slot->replays, result.replays);
    if (job->out.gpu)
        GPU(gpu_download(job->out.host, job->out.gpu, job->out.bytes, &error));
    return true;
}

/* ---- the two uses ---- */

static void expect(unsigned index, const char *path)
{
    struct job job;
    make_jobs(index, false, &job, 1);
    do
        submit(&job);
    while (!collect(&job));
    FILE *file = fopen(path, "wb");
    if (!file || fwrite(job.out.host, 1, job.out.bytes, file) != job.out.bytes || fclose(file) != 0)
        stop(path, "cannot be written");
}

static uint8_t *read_expected(const char *path, size_t bytes)
{
    uint8_t *expected = room(bytes + 1);
    FILE *file = fopen(path, "rb");
    if (!file || fread(expected, 1, bytes + 1, file) != bytes)
        stop(path, "is not the result of this variant");
    fclose(file);
    return expected;
}

static void loop(unsigned index, const char *path, bool all)
{
    struct job jobs[DEPTH];
    bool in_flight[DEPTH] = {false};
    make_jobs(index, all, jobs, DEPTH);
    uint8_t *expected = read_expected(path, jobs[0].out.bytes);
    atomic_store(&slot->state, STATE_READY);
    for (unsigned i = 0, flying = 0; !leave || flying; i = (i + 1) % DEPTH) {
        flying -= in_flight[i];
        if (in_flight[i] && collect(&jobs[i])) {
            atomic_fetch_add(&slot->wrong, memcmp(jobs[i].out.host, expected, jobs[i].out.bytes) != 0);
            atomic_fetch_add(&slot->decodes, 1);
        }
        in_flight[i] = !leave;
        flying += in_flight[i];
        if (in_flight[i])
            submit(&jobs[i]);
    }
    free(expected);
}

static void open_slot(const char *path, unsigned index)
{
    int file = open(path, O_RDWR | O_CLOEXEC);
    if (file < 0 || index >= SLOTS)
        stop(path, "has no such slot");
    struct slot *slots = mmap(NULL, SLOTS * sizeof *slots, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (slots == MAP_FAILED)
        stop(path, "cannot be mapped");
    slot = &slots[index];
}

int main(int argc, char **argv)
{
    slot = &nobody;
    const unsigned index = argc > 2 ? (unsigned)atoi(argv[2]) : VARIANTS;
    const bool looping = argc >= 6 && strcmp(argv[1], "loop") == 0;
    if (index >= VARIANTS || (!looping && (argc != 4 || strcmp(argv[1], "expect") != 0)))
        stop("usage", "soak-client expect VARIANT FILE | loop VARIANT FILE SLOTS SLOT [all]");
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    signal(SIGTERM, on_term);
    if (looping)
        open_slot(argv[4], (unsigned)atoi(argv[5]));
    mla_options options;
    mla_options_init(&options);
    options.name = "soak";
    options.reconnect_ms = RECONNECT_MS;
    MLA(mla_connect(&client, &options, &error));
    if (looping)
        loop(index, argv[3], argc > 6);
    else
        expect(index, argv[3]);
    mla_close(client);
    atomic_store(&slot->state, STATE_LEFT);
    return 0;
}
