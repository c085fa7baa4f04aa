/* load_client.c - one tenant of a GPU: it decodes for a while when it is told to, together with others, and says how
 * often and how fast. What suite/tenants.py measures with.
 *
 * usage: load-client KIND BATCH HEADS Q_LEN KEYS COLD_BYTES DEPTH, with MLAD_DEVICE, on whose GPU the keys lie,
 * STREAM_GPU, where all else does (absent: the same), LOAD_MEETING, a file that all tenants share. KINDs:
 *
 *     daemon  by libmla in host order, DEPTH decodes in flight
 *     stream  by libmla in stream order: graphs of DEPTH layers, one at a time; from the host where there is none
 *     ours    this build's kernels in a stream of this process, each decode waited for: no daemon
 *     peer    the same of LOAD_PEER, a library to tests/bench/kernels/peer.h
 *
 * A tenant decodes copies of its batch in turn that differ in their KV, more than COLD_BYTES (0: four times the L2) of
 * it; all tenants have the same contents. It says how it works, then answers each line it reads by one of JSON:
 *
 *     run TURN COUNT SECONDS   meet COUNT - 1 others, start with them, count what completes in these SECONDS
 *     out FILE                 decode the first copy into memory full of NaN, and write its `out`
 *
 * It leaves when its input ends. */
#include "../require.h"
#include "contender.h"
#include "mla.h"

#include <fcntl.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

enum { MOST_DEPTH = 256, MOST_SAMPLES = 1 << 20, TURNS = 4096, MEET_SECONDS = 60, WARM = 3 };
static const double START_NS = 2e6; /* from the last one's arrival, so that all have woken */

#define CU(call, ...)                                                                                                  \
    do {                                                                                                               \
        CUresult result_ = home.cu->call(__VA_ARGS__);                                                                 \
        mlak_driver_fail(&fault, MLAK_OK, "", #call, result_);                                                         \
        REQUIRE(result_ == CUDA_SUCCESS, fault.message);                                                               \
    } while (0)
#define MLAK(call) REQUIRE((call) == MLAK_OK, fault.message)
#define MLA(call) REQUIRE((call) == MLA_OK, error.message)

/* Where tenants meet: zeros to begin with. */
struct turn { _Atomic uint32_t arrived, unused; _Atomic uint64_t start_ns; };
_Static_assert(sizeof(struct turn) == 16, "suite/tenants.py makes the file");

/* How a kind decodes: begin one of the copies; finish the one that was begun first. */
struct kind { void (*begin)(uint32_t copy), (*finish)(uint32_t copy); };

static struct mlak_fault fault;
static mla_error error;
static struct gpu home, away; /* where q and outputs are; where the keys are, if that is another */
static const struct mlak_backend *backend;
static struct mlak_device *device, *keys; /* home's, and the keys' */
static struct pool pool;
static struct shape shape;
static struct work work;
static uint32_t depth, in_flight, layers = 1; /* layers: what begin begins */
static struct turn *turns;

static mla_client *client;
static mla_plan **plans; /* [copies], or of stream order [depth] */
static uint8_t *results; /* home's: of each copy out, then lse, so that no decode depends on another */
static mla_ticket tickets[MOST_DEPTH];
static uint32_t oldest;
static uint64_t kernel_ns;
static mla_step *step;
static CUgraphExec exec;
static struct ours ours;
static struct peer peer;
static struct contender *contender;

/* ---- by libmla ---- */

static void daemon_begin(uint32_t copy)
{
    MLA(mla_submit(client, plans[copy], &tickets[(oldest + in_flight) % depth], &error));
}

static void daemon_finish(uint32_t copy)
{
    mla_result result;
    (void)copy;
    MLA(mla_wait(client, tickets[oldest], MLA_FOREVER, &result, &error));
    oldest = (oldest + 1) % depth;
    kernel_ns = result.kernel_ns;
}

static void stream_begin(uint32_t copy)
{
    (void)copy;
    if (step) {
        MLA(mla_step_launch(step, home.stream, &error));
        CU(graph_launch, exec, home.stream);
    }
    for (uint32_t i = 0; !step && i < depth; i++)
        MLA(mla_submit_stream(plans[i], home.stream, &error));
}

static void stream_finish(uint32_t copy)
{
    CUresult state;
    (void)copy;
    while ((state = home.cu->stream_query(home.stream)) == CUDA_ERROR_NOT_READY)
        ;
    REQUIRE(state == CUDA_SUCCESS, "cuStreamQuery");
    if (step)
        MLA(mla_step_status(step, &error));
}

static mla_tensor import(const struct gpu *gpu, void *at, uint64_t bytes)
{
    mla_buffer *buffer;
    CU(context_set, gpu->context);
    MLA(mla_buffer_import_device(client, at, bytes, MLA_READWRITE, &buffer, &error));
    return (mla_tensor){buffer, 0};
}

static uint64_t align(uint64_t bytes) { return (bytes + 255) & ~(uint64_t)255; }

static void connect_client(void)
{
    const struct mlak_batch *from = work.batches;
    const uint64_t out_bytes = align(mlak_extent(from, MLAK_T_OUT)), lse_bytes = align(mlak_extent(from, MLAK_T_LSE));
    REQUIRE(results = backend->memory_new(device, work.copies * (out_bytes + lse_bytes), &fault), fault.message);
    CU(context_set, home.context);
    MLA(mla_connect(&client, NULL, &error));
    mla_batch batch;
    mla_batch_init(&batch);
    batch.batch = from->batch;
    batch.heads = from->heads;
    batch.q_rows = from->q_rows;
    batch.pages = from->pages;
    batch.page_size = from->page_size;
    batch.max_pages = from->max_pages;
    batch.softmax_scale = from->softmax_scale;
    batch.kv = import(away.cu ? &away : &home, pool.memory, pool.bytes);
    batch.q = import(&home, work.q, mlak_extent(from, MLAK_T_Q));
    batch.block_table = import(&home, work.table, mlak_extent(from, MLAK_T_BLOCK_TABLE));
    batch.seqlens = import(&home, work.seqlens, mlak_extent(from, MLAK_T_SEQLENS));
    batch.out = batch.lse = import(&home, results, work.copies * (out_bytes + lse_bytes));
    CU(context_set, home.context);
    const uint32_t count = work.copies > depth ? work.copies : depth; /* either kind finds its own */
    plans = calloc(count, sizeof *plans);
    REQUIRE(plans, "no memory");
    for (uint32_t i = 0; i < count; i++) {
        const void *kv = work.batches[i % work.copies].kv;
        batch.kv.offset = (uint64_t)((const uint8_t *)kv - (const uint8_t *)pool.memory);
        batch.out.offset = (i % work.copies) * (out_bytes + lse_bytes);
        batch.lse.offset = batch.out.offset + out_bytes;
        MLA(mla_plan_create(client, &batch, &plans[i], &error));
    }
}

/* The layers as a graph, where that can be. */
static void capture_layers(void)
{
    CUgraph graph;
    layers = depth;
    if (mla_client_order(client, NULL) != MLA_ORDER_STREAM)
        return;
    MLA(mla_step_create(client, plans, depth, &step, &error));
    CU(capture_begin, home.stream, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL);
    for (uint32_t i = 0; i < depth; i++)
        MLA(mla_submit_stream(plans[i], home.stream, &error));
    CU(capture_end, home.stream, &graph);
    CU(graph_instantiate, &exec, graph, 0);
    CU(graph_free, graph);
}

/* ---- kernels of this process ---- */

static void direct_begin(uint32_t copy) { (void)copy; }

static void direct_finish(uint32_t copy)
{
    double ns;
    MLAK(contender->alone(contender, copy, &ns, &fault));
}

static void open_direct(const char *library)
{
    ours_init(&ours, &home, backend, device);
    contender = &ours.contender;
    if (library) {
        MLAK(peer_init(&peer, &home, library, &fault));
        contender = &peer.contender;
    }
    MLAK(contender->begin(contender, &work, work.copies, &fault));
    CU(context_set, home.context);
}

static const struct kind by_daemon = {daemon_begin, daemon_finish}, in_order = {stream_begin, stream_finish},
                         direct = {direct_begin, direct_finish};

/* ---- the work ---- */

static void open_gpus(const char *keys_at, const char *rest_at)
{
    const bool apart = strcmp(keys_at, rest_at) != 0;
    MLAK(gpu_open(&home, rest_at, 1, &fault));
    backend = mlak_backend(rest_at);
    REQUIRE(backend && backend->memory_new, "MLAD_DEVICE names no GPU");
    REQUIRE(device = backend->open(&(struct mlak_options){.device = rest_at}, &fault), fault.message);
    if (apart)
        MLAK(gpu_open(&away, keys_at, 1, &fault));
}

static void make_work(const char *keys_at, uint64_t cold_bytes)
{
    keys = device;
    cold_bytes = cold_bytes ? cold_bytes : 4 * (away.cu ? away.l2_bytes : home.l2_bytes);
    if (away.cu)
        REQUIRE(keys = backend->open(&(struct mlak_options){.device = keys_at}, &fault), fault.message);
    MLAK(pool_init(&pool, backend, keys, shape_kv_bytes(&shape) * shape_copies(&shape, cold_bytes), &fault));
    pool.device = device; /* all that work adds goes there */
    MLAK(work_init(&work, &pool, &shape, cold_bytes, &fault));
    CU(context_set, home.context);
}

static const struct kind *open_kind(const char *name)
{
    const char *library = getenv("LOAD_PEER");
    if (strcmp(name, "ours") == 0 || strcmp(name, "peer") == 0) {
        REQUIRE(name[0] == 'o' || library, "LOAD_PEER names the peer's library");
        depth = 1;
        open_direct(name[0] == 'o' ? NULL : library);
        return &direct;
    }
    REQUIRE(strcmp(name, "daemon") == 0 || strcmp(name, "stream") == 0, "KIND is daemon, stream, ours or peer");
    connect_client();
    if (name[0] == 'd')
        return &by_daemon;
    capture_layers();
    return &in_order;
}

/* ---- turns ---- */

static double now_ns(void) { return gpu_now(); }

static void open_meeting(void)
{
    const char *path = getenv("LOAD_MEETING");
    int file = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    REQUIRE(file >= 0, "LOAD_MEETING names no file that can be written");
    turns = mmap(NULL, TURNS * sizeof *turns, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    REQUIRE(turns != MAP_FAILED, "the meeting's file cannot be mapped");
    close(file);
}

/* Wait for the others; when all begin, in nanoseconds of the clock that they share. */
static double meet(struct turn *turn, uint32_t count)
{
    const double give_up = now_ns() + MEET_SECONDS * 1e9;
    uint64_t start;
    if (atomic_fetch_add(&turn->arrived, 1) + 1 == count)
        atomic_store(&turn->start_ns, (uint64_t)(now_ns() + START_NS));
    while ((start = atomic_load(&turn->start_ns)) == 0) {
        REQUIRE(now_ns() < give_up, "the others do not come");
        nanosleep(&(struct timespec){.tv_nsec = 20000}, NULL);
    }
    while (now_ns() < (double)start)
        ;
    return (double)start;
}

static int compare(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

/* Of `values`, microseconds, sorted here. */
static void print_percentiles(const char *name, float *values, uint32_t count)
{
    static const struct { const char *name; double share; } all[] = {{"p50", 0.5}, {"p99", 0.99}, {"most", 1}};
    qsort(values, count, sizeof *values, compare);
    for (unsigned i = 0; i < sizeof all / sizeof *all && count; i++)
        printf(", \"%s%s_us\": %.3f", name, all[i].name, (double)values[(uint32_t)((count - 1) * all[i].share)]);
}

static void run(const struct kind *kind, uint32_t turn, uint32_t count, double seconds)
{
    static float samples[MOST_SAMPLES], kernels[MOST_SAMPLES];
    static double begun[MOST_DEPTH];
    const uint32_t most = kind == &by_daemon ? depth : 1;
    const double start = meet(&turns[turn], count), late = now_ns() - start, end = start + seconds * 1e9;
    uint64_t completed = 0, first = 0, next = 0;
    uint32_t n_samples = 0;
    for (double now = start;;) {
        for (; in_flight < most && now <= end; in_flight++, next++) {
            begun[next % most] = now_ns();
            kind->begin((uint32_t)(next % work.copies));
        }
        if (in_flight == 0)
            break;
        kind->finish((uint32_t)(first % work.copies));
        now = now_ns();
        if (now <= end && n_samples < MOST_SAMPLES) {
            samples[n_samples] = (float)((now - begun[first % most]) / 1e3);
            kernels[n_samples++] = (float)kernel_ns / 1e3f;
        }
        completed += now <= end;
        in_flight--;
        first++;
    }
    printf("{\"decodes\": %llu, \"per_s\": %.2f, \"late_us\": %.1f", (unsigned long long)(completed * layers),
           (double)(completed * layers) / seconds, late / 1e3);
    print_percentiles("", samples, n_samples);
    if (kind == &by_daemon)
        print_percentiles("kernel_", kernels, n_samples);
    puts("}");
}

static void write_out(const struct kind *kind, const char *path)
{
    const uint64_t bytes = mlak_extent(work.batches, MLAK_T_OUT);
    void *host = malloc(bytes), *out = client ? results : work.out[contender == &peer.contender];
    FILE *file = fopen(path, "wb");
    REQUIRE(host && file, path);
    memset(host, 0xff, bytes);
    MLAK(backend->memory_copy(device, out, host, bytes));
    CU(context_set, home.context);
    kind->begin(0);
    in_flight++;
    kind->finish(0);
    in_flight--;
    MLAK(backend->memory_copy(device, host, out, bytes));
    CU(context_set, home.context);
    REQUIRE(fwrite(host, 1, bytes, file) == bytes && fclose(file) == 0, path);
    free(host);
    puts("{}");
}

static void tell_ready(void)
{
    char why[MLA_WHY] = "";
    printf("{\"copies\": %u", work.copies);
    if (client) {
        static const char *const placements[] = {"shared_mps", "own_gpu", "shared_timesliced", "host"};
        const bool stream = mla_client_order(client, why) == MLA_ORDER_STREAM;
        printf(", \"order\": \"%s\", \"placement\": \"%s\", \"why\": \"%s\"", stream ? "stream" : "host",
               placements[mla_client_placement(client, NULL)], why);
    }
    if (contender == &peer.contender && contender)
        printf(", \"peer\": \"%s\"", peer.library->name);
    puts("}");
}

int main(int argc, char **argv)
{
    const char *keys_at = getenv("MLAD_DEVICE"), *rest_at = getenv("STREAM_GPU");
    char line[4096], path[4096], text[128];
    unsigned turn, count;
    double seconds;
    REQUIRE(argc == 8 && keys_at, "usage: load-client KIND BATCH HEADS Q_LEN KEYS COLD_BYTES DEPTH");
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    setvbuf(stdout, NULL, _IOLBF, 0);
    snprintf(text, sizeof text, "%s %s %s %s", argv[2], argv[3], argv[4], argv[5]);
    MLAK(shape_parse(&shape, text, &fault));
    depth = (uint32_t)atoi(argv[7]);
    REQUIRE(depth >= 1 && depth <= MOST_DEPTH, "DEPTH is 1 to 256");
    open_meeting();
    open_gpus(keys_at, rest_at ? rest_at : keys_at);
    make_work(keys_at, strtoull(argv[6], NULL, 10));
    const struct kind *kind = open_kind(argv[1]);
    for (uint32_t i = 0; i < WARM; i++) {
        kind->begin(i % work.copies);
        in_flight++;
        kind->finish(i % work.copies);
        in_flight--;
    }
    tell_ready();
    while (fgets(line, sizeof line, stdin)) {
        if (sscanf(line, "run %u %u %lf", &turn, &count, &seconds) == 3 && turn < TURNS)
            run(kind, turn, count, seconds);
        else if (sscanf(line, "out %4095s", path) == 1)
            write_out(kind, path);
        else
            REQUIRE(!"a line that is known", line);
    }
    mla_step_destroy(step);
    mla_close(client);
    if (results)
        backend->memory_free(device, results);
    if (contender)
        contender->end(contender);
    work_deinit(&work);
    pool.device = keys;
    pool_deinit(&pool);
    if (keys != device)
        backend->close(keys);
    backend->close(device);
    gpu_close(&away);
    gpu_close(&home);
    return 0;
}
