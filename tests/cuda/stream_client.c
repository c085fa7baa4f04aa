/* stream_client.c - a client whose decodes run in the order of a CUDA stream; one case a run, for
 * tests/daemon/test_streams.py. Memory is touched by the driver's copies only, so it runs on a real GPU too.
 *
 * usage: stream-client CASE, with MLAD_SOCKET, MLAD_DEVICE, on which the keys lie, STREAM_GPU, where all else does and
 * the streams are (absent: the same), and a libcuda.so.1 */
#include "gpu_client.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum {
    LAYERS = 3, ROUNDS = 4,
    Q_BYTES = ROWS * HEADS * 576 * 2, OUT_BYTES = ROWS * HEADS * 512 * 2, LSE_BYTES = ROWS * HEADS * 4,
    KV_BYTES = PAGES * PAGE * 1152,
    Q_AT = 0, TABLE_AT = 1 << 16, LENS_AT = TABLE_AT + 4096, OUT_AT = LENS_AT + 4096, LSE_AT = OUT_AT + OUT_BYTES,
    BYTES = LSE_AT + 4096
};

/* A layer's tensors, all but the keys in one allocation, and the bits that it should give in each round. */
struct layer {
    CUdeviceptr memory, keys;
    mla_buffer *buffer, *kv;
    mla_plan *plan;
    uint8_t q[Q_BYTES];             /* as the stream copies it to the GPU */
    uint8_t out[OUT_BYTES], lse[LSE_BYTES]; /* as it copies them back */
    uint8_t rounds[ROUNDS][Q_BYTES], wanted[ROUNDS][OUT_BYTES], wanted_lse[ROUNDS][LSE_BYTES];
};

static struct layer layers[LAYERS];
static mla_client *client;
static mla_error error;
static CUstream stream;
static CUcontext here, there; /* of the streams, of the keys */

/* What libmla sends over the socket, by the type of the message; it comes here instead of to the C library. */
static atomic_uint sent[256];

__attribute__((visibility("default"))) ssize_t sendmsg(int fd, const struct msghdr *message, int flags)
{
    ssize_t bytes = syscall(SYS_sendmsg, fd, message, flags);
    if (bytes > 3) /* an array of 4, the version, the type */
        atomic_fetch_add(&sent[((const uint8_t *)message->msg_iov->iov_base)[2]], 1);
    return bytes;
}

static void copy_in(CUdeviceptr to, const void *from, size_t bytes)
{
    CU(cuMemcpyHtoDAsync_v2, (CUdeviceptr, const void *, size_t, CUstream), to, from, bytes, stream);
}
static void copy_out(void *to, CUdeviceptr from, size_t bytes)
{
    CU(cuMemcpyDtoHAsync_v2, (void *, CUdeviceptr, size_t, CUstream), to, from, bytes, stream);
}
static void drain(void)
{
    REQUIRE(mla_stream_drain(stream, 120000, &error) == MLA_OK, error.message);
}

static void describe(const struct layer *layer, mla_batch *batch)
{
    shape_batch(batch);
    batch->q = (mla_tensor){layer->buffer, Q_AT};
    batch->kv = (mla_tensor){layer->kv, 0};
    batch->block_table = (mla_tensor){layer->buffer, TABLE_AT};
    batch->seqlens = (mla_tensor){layer->buffer, LENS_AT};
    batch->out = (mla_tensor){layer->buffer, OUT_AT};
    batch->lse = (mla_tensor){layer->buffer, LSE_AT};
    batch->deterministic = 1;
}

static void import(CUdeviceptr memory, size_t bytes, mla_buffer **buffer)
{
    REQUIRE(mla_buffer_import_device(client, (void *)(uintptr_t)memory, bytes, MLA_READWRITE, buffer, &error) == MLA_OK,
            error.message);
}

static void make_layer(struct layer *layer, uint32_t seed)
{
    static uint16_t kv[KV_BYTES / 2];
    const int32_t table[2][COLUMNS] = {{7, 2, 5, 0}, {1, 6, 3, 4}}, lens[2] = {200, 131};
    mla_batch batch;
    draw(kv, KV_BYTES / 2, &seed);
    for (int round = 0; round < ROUNDS; round++)
        draw((uint16_t *)(void *)layer->rounds[round], Q_BYTES / 2, &seed);
    CU(cuCtxSetCurrent, (CUcontext), there);
    CU(cuMemAlloc_v2, (CUdeviceptr *, size_t), &layer->keys, KV_BYTES);
    CU(cuMemcpyHtoD_v2, (CUdeviceptr, const void *, size_t), layer->keys, kv, KV_BYTES);
    CU(cuCtxSynchronize, (void));
    import(layer->keys, KV_BYTES, &layer->kv);
    CU(cuCtxSetCurrent, (CUcontext), here);
    CU(cuMemAlloc_v2, (CUdeviceptr *, size_t), &layer->memory, BYTES);
    copy_in(layer->memory + TABLE_AT, table, sizeof table);
    copy_in(layer->memory + LENS_AT, lens, sizeof lens);
    drain();
    import(layer->memory, BYTES, &layer->buffer);
    describe(layer, &batch);
    REQUIRE(mla_plan_create(client, &batch, &layer->plan, &error) == MLA_OK, error.message);
    for (int round = 0; round < ROUNDS; round++) { /* what it should be, in host order */
        copy_in(layer->memory + Q_AT, layer->rounds[round], Q_BYTES);
        drain();
        REQUIRE(mla_decode(client, layer->plan, MLA_FOREVER, NULL, &error) == MLA_OK, error.message);
        copy_out(layer->wanted[round], layer->memory + OUT_AT, OUT_BYTES);
        copy_out(layer->wanted_lse[round], layer->memory + LSE_AT, LSE_BYTES);
        drain();
        REQUIRE(round == 0 || memcmp(layer->wanted[round], layer->wanted[round - 1], OUT_BYTES) != 0, "rounds differ");
    }
}

/* The primary context of the GPU of that name. */
static CUcontext context_of(const char *name)
{
    int count = 0;
    CU(cuDeviceGetCount, (int *), &count);
    for (int i = 0; i < count; i++) {
        CUuuid uuid;
        CUcontext context;
        char text[48] = "GPU-", *end = text + 4;
        CU(cuDeviceGetUuid_v2, (CUuuid *, int), &uuid, i);
        for (int k = 0; k < 16; k++)
            end += sprintf(end, "%s%02x", k == 4 || k == 6 || k == 8 || k == 10 ? "-" : "", (uint8_t)uuid.bytes[k]);
        if (strcmp(text, name) != 0)
            continue;
        CU(cuDevicePrimaryCtxRetain, (CUcontext *, int), &context, i);
        return context;
    }
    REQUIRE(!"a GPU of that name", name);
    return NULL;
}

static void setup(int reconnect_ms)
{
    mla_options options;
    const char *device = getenv("MLAD_DEVICE"), *gpu = getenv("STREAM_GPU");
    REQUIRE(device, "MLAD_DEVICE");
    CU(cuInit, (unsigned), 0);
    there = context_of(device);
    here = context_of(gpu ? gpu : device);
    CU(cuCtxSetCurrent, (CUcontext), here);
    CU(cuMemHostRegister_v2, (void *, size_t, unsigned), layers, sizeof layers, 0); /* copies do not wait for it */
    CU(cuStreamCreate, (CUstream *, unsigned), &stream, 1);
    mla_options_init(&options);
    options.reconnect_ms = reconnect_ms;
    REQUIRE(mla_connect(&client, &options, &error) == MLA_OK, error.message);
    for (uint32_t i = 0; i < LAYERS; i++)
        make_layer(&layers[i], i + 1);
}

/* A layer as a model has it: something writes q on the stream, the decode, something reads its outputs. */
static mla_status run_layer(struct layer *layer)
{
    copy_in(layer->memory + Q_AT, layer->q, Q_BYTES);
    mla_status status = mla_submit_stream(layer->plan, stream, &error);
    copy_out(layer->out, layer->memory + OUT_AT, OUT_BYTES);
    copy_out(layer->lse, layer->memory + LSE_AT, LSE_BYTES);
    return status;
}

static void set_round(int round)
{
    for (int i = 0; i < LAYERS; i++) {
        memcpy(layers[i].q, layers[i].rounds[round], Q_BYTES);
        memset(layers[i].out, 0, OUT_BYTES);
        memset(layers[i].lse, 0, LSE_BYTES);
    }
}

static void require_round(int round)
{
    for (int i = 0; i < LAYERS; i++) {
        REQUIRE(memcmp(layers[i].out, layers[i].wanted[round], OUT_BYTES) == 0, "the output is another");
        REQUIRE(memcmp(layers[i].lse, layers[i].wanted_lse[round], LSE_BYTES) == 0, "the log-sum-exp is another");
    }
}

static void require_nan(const struct layer *layer)
{
    for (int i = 0; i < OUT_BYTES; i++)
        REQUIRE(layer->out[i] == 0xff, "the output is not NaN");
    for (int i = 0; i < LSE_BYTES; i++)
        REQUIRE(layer->lse[i] == 0xff, "the log-sum-exp is not NaN");
}

static void say(const char *line)
{
    puts(line);
    fflush(stdout);
}

static void await_line(const char *ready)
{
    char line[8];
    say(ready);
    REQUIRE(fgets(line, sizeof line, stdin), "no line");
}

/* The status of a plan or step once it has one. */
static mla_status await_status(mla_plan *plan, mla_step *step)
{
    mla_status status = MLA_OK;
    for (int i = 0; i < 5000 && status == MLA_OK; i++) {
        status = step ? mla_step_status(step, &error) : mla_plan_status(plan, &error);
        usleep(1000);
    }
    return status;
}

/* ---- graphs ---- */

static void *capture(void)
{
    void *graph, *exec;
    CU(cuStreamBeginCapture_v2, (CUstream, int), stream, 1);
    for (int i = 0; i < LAYERS; i++)
        REQUIRE(run_layer(&layers[i]) == MLA_OK, error.message);
    CU(cuStreamEndCapture, (CUstream, void **), stream, &graph);
    CU(cuGraphInstantiateWithFlags, (void **, void *, unsigned long long), &exec, graph, 0);
    CU(cuGraphDestroy, (void *), graph);
    return exec;
}

static void replay(void *exec)
{
    CU(cuGraphLaunch, (void *, CUstream), exec, stream);
}

static mla_step *make_step(void)
{
    mla_step *step;
    mla_plan *plans[LAYERS];
    for (int i = 0; i < LAYERS; i++)
        plans[i] = layers[i].plan;
    REQUIRE(mla_step_create(client, plans, LAYERS, &step, &error) == MLA_OK, error.message);
    return step;
}

static void arm(mla_step *step)
{
    REQUIRE(mla_step_launch(step, stream, &error) == MLA_OK, error.message);
}

/* ---- the cases ---- */

static void run_eager(void)
{
    setup(30000);
    for (int round = 0; round < ROUNDS; round++) {
        set_round(round);
        for (int i = 0; i < LAYERS; i++)
            REQUIRE(run_layer(&layers[i]) == MLA_OK, error.message);
        drain();
        require_round(round);
    }
    REQUIRE(mla_plan_status(layers[0].plan, &error) == MLA_OK, error.message);
    mla_plan_destroy(layers[0].plan);
    mla_close(client);
}

/* Many rounds queued before the first has run. */
static void run_ahead(void)
{
    enum { AHEAD = 100 }; /* more decodes than a user may have in flight */
    setup(30000);
    set_round(2);
    for (int n = 0; n < AHEAD; n++)
        for (int i = 0; i < LAYERS; i++)
            REQUIRE(run_layer(&layers[i]) == MLA_OK, error.message);
    drain();
    require_round(2);
    mla_close(client);
}

static void run_step(void)
{
    setup(30000);
    mla_step *step = make_step(), *other;
    mla_plan *twice[] = {layers[0].plan, layers[0].plan};
    REQUIRE(mla_step_create(client, twice, 2, &other, &error) == MLA_IN_USE, error.message);
    void *exec = capture();
    for (int round = 0; round < ROUNDS; round++) {
        set_round(round);
        arm(step);
        replay(exec);
        drain();
        require_round(round);
    }
    set_round(1);
    for (int n = 0; n < 7; n++) { /* ahead of the stream */
        arm(step);
        replay(exec);
    }
    drain();
    require_round(1);
    REQUIRE(mla_step_status(step, &error) == MLA_OK, error.message);
    replay(exec); /* that nobody armed */
    drain();
    for (int i = 0; i < LAYERS; i++)
        require_nan(&layers[i]);
    REQUIRE(await_status(NULL, step) == MLA_STATE, error.message);
    arm(step);
    replay(exec);
    drain();
    require_round(1);
    CU(cuGraphExecDestroy, (void *), exec);
    mla_step_destroy(step);
    mla_close(client);
}

/* Armed by the graph itself, as single plans and as a step. */
static void run_graph(void)
{
    setup(30000);
    void *exec = capture();
    for (int round = 0; round < ROUNDS; round++) {
        set_round(round);
        replay(exec);
        drain();
        require_round(round);
    }
    CU(cuGraphExecDestroy, (void *), exec);
    mla_step *step = make_step();
    void *graph;
    CU(cuStreamBeginCapture_v2, (CUstream, int), stream, 1);
    arm(step);
    for (int i = 0; i < LAYERS; i++)
        REQUIRE(run_layer(&layers[i]) == MLA_OK, error.message);
    CU(cuStreamEndCapture, (CUstream, void **), stream, &graph);
    CU(cuGraphInstantiateWithFlags, (void **, void *, unsigned long long), &exec, graph, 0);
    CU(cuGraphDestroy, (void *), graph);
    for (int round = 0; round < ROUNDS; round++) {
        set_round(round);
        replay(exec);
        replay(exec);
        drain();
        require_round(round);
    }
    REQUIRE(mla_step_status(step, &error) == MLA_OK, error.message);
    CU(cuGraphExecDestroy, (void *), exec);
    mla_close(client);
}

/* The worker dies while the stream waits for it. */
static void run_killed(void)
{
    setup(30000);
    set_round(1);
    mla_step *step = make_step();
    void *exec = capture();
    await_line("ready"); /* the worker's next launches hang */
    arm(step);
    replay(exec);
    say("waiting");
    drain();
    require_round(1);
    say("right");
    set_round(2); /* and what comes after is as ever */
    arm(step);
    replay(exec);
    drain();
    require_round(2);
    REQUIRE(mla_step_status(step, &error) == MLA_OK, error.message);
    CU(cuGraphExecDestroy, (void *), exec);
    mla_close(client);
}

/* Replay for a while: workers die meanwhile. */
static void run_loop(void)
{
    unsigned rounds = 0;
    setup(60000);
    mla_step *step = make_step();
    void *exec = capture();
    const time_t end = time(NULL) + 10;
    say("ready");
    for (; time(NULL) < end; rounds++) {
        set_round((int)rounds % ROUNDS);
        arm(step);
        replay(exec);
        drain();
        require_round((int)rounds % ROUNDS);
    }
    REQUIRE(mla_step_status(step, &error) == MLA_OK, error.message);
    printf("%u rounds\n", rounds);
    CU(cuGraphExecDestroy, (void *), exec);
    mla_close(client);
}

/* Killed with a round armed that its stream never comes to. */
static void run_armed(void)
{
    setup(30000);
    arm(make_step());
    drain();
    await_line("armed");
}

static void dawdle(void *unused)
{
    (void)unused;
    sleep(3);
}

static void pause_a_little(void *unused)
{
    (void)unused;
    usleep(500000);
}

/* Each round is armed half a second before its stream comes to it. */
static void run_paced(void)
{
    setup(30000);
    mla_step *step = make_step();
    void *exec = capture();
    for (int round = 0; round < ROUNDS; round++) {
        set_round(round);
        CU(cuLaunchHostFunc, (CUstream, void (*)(void *), void *), stream, pause_a_little, NULL);
        arm(step);
        replay(exec);
        drain();
        require_round(round);
    }
    CU(cuGraphExecDestroy, (void *), exec);
    mla_close(client);
}

/* The stream comes later than the worker waits: rounds of a step and of single plans stop, and are armed again. */
static void run_late(void)
{
    setup(30000);
    mla_step *step = make_step();
    void *exec = capture();
    set_round(3);
    CU(cuLaunchHostFunc, (CUstream, void (*)(void *), void *), stream, dawdle, NULL);
    arm(step);
    replay(exec);
    for (int i = 0; i < LAYERS; i++)
        REQUIRE(run_layer(&layers[i]) == MLA_OK, error.message);
    for (int n = 0; n < 6; n++) {
        arm(step);
        replay(exec);
    }
    drain();
    require_round(3);
    REQUIRE(mla_step_status(step, &error) == MLA_OK, error.message);
    for (int i = 0; i < LAYERS; i++)
        REQUIRE(mla_plan_status(layers[i].plan, &error) == MLA_OK, error.message);
    CU(cuGraphExecDestroy, (void *), exec);
    mla_close(client);
}

static bool let_go;

static void hold(void *unused)
{
    (void)unused;
    while (!__atomic_load_n(&let_go, __ATOMIC_ACQUIRE))
        usleep(1000);
}

/* A round is armed and its stream does not come; decodes of the same client in host order pass it by. */
static void run_beside(void)
{
    enum { EACH = 8, LAST = ROUNDS - 1 };
    static const uint8_t nothing[OUT_BYTES];
    static uint8_t got[OUT_BYTES];
    mla_ticket tickets[EACH][LAYERS];
    CUstream held;
    setup(30000);
    printf("%s\n", mla_transport_used(client) == MLA_TRANSPORT_RINGS ? "rings" : "socket");
    set_round(1);
    CU(cuLaunchHostFunc, (CUstream, void (*)(void *), void *), stream, hold, NULL);
    REQUIRE(run_layer(&layers[0]) == MLA_OK, error.message);
    held = stream;
    CU(cuStreamCreate, (CUstream *, unsigned), &stream, 1);
    for (int i = 1; i < LAYERS; i++)
        copy_in(layers[i].memory + OUT_AT, nothing, OUT_BYTES);
    drain();
    for (int n = 0; n < EACH; n++)
        for (int i = 1; i < LAYERS; i++)
            REQUIRE(mla_submit(client, layers[i].plan, &tickets[n][i], &error) == MLA_OK, error.message);
    for (int n = 0; n < EACH; n++)
        for (int i = 1; i < LAYERS; i++)
            REQUIRE(mla_wait(client, tickets[n][i], 120000, NULL, &error) == MLA_OK, error.message);
    for (int i = 1; i < LAYERS; i++) { /* q is still the last round's of make_layer */
        copy_out(got, layers[i].memory + OUT_AT, OUT_BYTES);
        drain();
        REQUIRE(memcmp(got, layers[i].wanted[LAST], OUT_BYTES) == 0, "the output in host order is another");
    }
    REQUIRE(memcmp(layers[0].out, nothing, OUT_BYTES) == 0, "the stream has passed what holds it");
    __atomic_store_n(&let_go, true, __ATOMIC_RELEASE);
    stream = held;
    drain();
    REQUIRE(memcmp(layers[0].out, layers[0].wanted[1], OUT_BYTES) == 0, "the output in stream order is another");
    REQUIRE(mla_plan_status(layers[0].plan, &error) == MLA_OK, error.message);
    mla_close(client);
}

/* Memory on the GPU for as long as this runs: its handle, and where in the allocation it begins. */
static void run_memory(void)
{
    CUdeviceptr memory, base;
    size_t size;
    uint8_t handle[64];
    CU(cuInit, (unsigned), 0);
    CU(cuCtxSetCurrent, (CUcontext), context_of(getenv("MLAD_DEVICE")));
    CU(cuMemAlloc_v2, (CUdeviceptr *, size_t), &memory, 1 << 20);
    CU(cuMemGetAddressRange_v2, (CUdeviceptr *, size_t *, CUdeviceptr), &base, &size, memory);
    CU(cuIpcGetMemHandle, (void *, CUdeviceptr), handle, memory);
    for (size_t i = 0; i < sizeof handle; i++)
        printf("%02x", handle[i]);
    printf(" %llu ", (unsigned long long)(memory - base));
    await_line("bytes");
    CU(cuMemFree_v2, (CUdeviceptr), memory);
}

/* The daemon goes for longer than the client waits. */
static void run_gone(void)
{
    setup(1500);
    set_round(0);
    REQUIRE(run_layer(&layers[0]) == MLA_OK, error.message); /* the first one waits for the daemon's word on the plan */
    drain();
    set_round(1);
    await_line("ready"); /* the worker's next launches hang */
    REQUIRE(run_layer(&layers[0]) == MLA_OK, error.message);
    say("waiting");
    drain();
    require_nan(&layers[0]);
    REQUIRE(await_status(layers[0].plan, NULL) == MLA_NOT_CONNECTED, error.message);
    mla_close(client);
}

/* A request that fails leaves NaN in its own rows, a batch that is refused in all. */
static void run_failures(void)
{
    static const int32_t bad[] = {-1};
    setup(30000);
    set_round(0);
    copy_in(layers[1].memory + LENS_AT + 4, bad, sizeof bad);
    for (int i = 0; i < LAYERS; i++)
        REQUIRE(run_layer(&layers[i]) == MLA_OK, error.message);
    drain();
    const size_t half = OUT_BYTES / 2;
    REQUIRE(memcmp(layers[1].out, layers[1].wanted[0], half) == 0, "the other request's rows");
    for (size_t i = half; i < OUT_BYTES; i++)
        REQUIRE(layers[1].out[i] == 0xff, "not NaN");
    REQUIRE(memcmp(layers[2].out, layers[2].wanted[0], OUT_BYTES) == 0, "the layer behind it");
    REQUIRE(await_status(layers[1].plan, NULL) == MLA_REQUESTS, error.message);
    REQUIRE(strstr(error.message, "requests"), error.message); /* how many, once the daemon has said so */
    REQUIRE(mla_plan_status(layers[2].plan, &error) == MLA_OK, error.message);
    mla_close(client);
}

/* Where stream order is not to be had: the same result from the host, and no capture. */
static void run_host(void)
{
    char why[MLA_WHY];
    void *graph;
    setup(30000);
    REQUIRE(mla_client_order(client, why) == MLA_ORDER_HOST, why);
    set_round(2);
    for (int i = 0; i < LAYERS; i++)
        REQUIRE(run_layer(&layers[i]) == MLA_OK, error.message);
    drain();
    require_round(2);
    CU(cuStreamBeginCapture_v2, (CUstream, int), stream, 1);
    REQUIRE(run_layer(&layers[0]) == MLA_UNSUPPORTED, error.message);
    CU(cuStreamEndCapture, (CUstream, void **), stream, &graph);
    CU(cuGraphDestroy, (void *), graph);
    say(why);
    mla_close(client);
}

int main(int argc, char **argv)
{
    const struct {
        const char *name;
        void (*run)(void);
    } cases[] = {{"eager", run_eager}, {"ahead", run_ahead}, {"step", run_step},         {"graph", run_graph},
                 {"killed", run_killed}, {"armed", run_armed}, {"late", run_late},         {"gone", run_gone},
                 {"paced", run_paced},
                 {"host", run_host},   {"failures", run_failures}, {"loop", run_loop},
                 {"beside", run_beside}, {"memory", run_memory}};
    for (size_t i = 0; argc > 1 && i < sizeof cases / sizeof cases[0]; i++) {
        if (strcmp(argv[1], cases[i].name) != 0)
            continue;
        cases[i].run();
        printf("by the socket: SUBMIT %u, ARM %u\n", sent[10], sent[29]);
        say("done");
        return 0;
    }
    fprintf(stderr, "usage: stream-client CASE\n");
    return 2;
}
