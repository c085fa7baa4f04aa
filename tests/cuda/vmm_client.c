/* vmm_client.c - a client whose tensors lie in memory from cuMemCreate, as with PyTorch's expandable segments; one case
 * a run, for tests/daemon/test_gpu.py. Memory is touched by the driver's copies only, so it runs on a real GPU too.
 *
 * usage: vmm-client CASE [WORDS], with MLAD_SOCKET, MLAD_DEVICE (GPU 0's) and a libcuda.so.1 */
#include "gpu_client.h"

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { MIB = 1 << 20, PIECE = 2 * MIB, PIECES = 3 };

/* ---- the driver ---- */

static uint64_t reserve(size_t bytes)
{
    CUdeviceptr start;
    CU(cuMemAddressReserve, (CUdeviceptr *, size_t, size_t, CUdeviceptr, unsigned long long), &start, bytes, 0, 0, 0);
    return start;
}

/* Map a new allocation at `at`; the mapping keeps it. */
static void add(uint64_t at, size_t bytes, int handle_types)
{
    const CUmemAllocationProp properties = {.type = 1, .handles = handle_types, .location = {1, 0}};
    const CUmemAccessDesc access = {{1, 0}, 3};
    CUhandle object;
    CU(cuMemCreate, (CUhandle *, size_t, const CUmemAllocationProp *, unsigned long long), &object, bytes, &properties,
       0);
    CU(cuMemMap, (CUdeviceptr, size_t, size_t, CUhandle, unsigned long long), at, bytes, 0, object, 0);
    CU(cuMemSetAccess, (CUdeviceptr, size_t, const CUmemAccessDesc *, size_t), at, bytes, &access, 1);
    CU(cuMemRelease, (CUhandle), object);
}

static uint64_t pieces(unsigned count)
{
    uint64_t start = reserve((size_t)count * PIECE);
    for (unsigned i = 0; i < count; i++)
        add(start + (uint64_t)i * PIECE, PIECE, 1);
    return start;
}

/* ---- a batch ---- */

/* Where the tensors lie: kv and out over the border of two allocations. */
enum {
    Q_AT = 0,
    KV_AT = PIECE - 256 * 1024,
    TABLE_AT = PIECE + MIB / 2,
    LENS_AT = TABLE_AT + 4096,
    INPUTS = 3 * MIB, /* inputs below, registered read-only; outputs above */
    OUT_AT = 2 * PIECE - 8192,
    OUT_BYTES = ROWS * HEADS * 512 * 2
};

static unsigned open_descriptors(void)
{
    unsigned count = 0;
    DIR *folder = opendir("/proc/self/fd");
    while (readdir(folder))
        count++;
    closedir(folder);
    return count;
}

static void fill(uint8_t *memory)
{
    uint32_t state = 1;
    draw((uint16_t *)(void *)memory, INPUTS / 2, &state);
    const int32_t table[2][COLUMNS] = {{7, 2, 5, 0}, {1, 6, 3, 4}}, lens[2] = {200, 131};
    memcpy(memory + TABLE_AT, table, sizeof table);
    memcpy(memory + LENS_AT, lens, sizeof lens);
}

static void lay_out(mla_batch *batch, mla_buffer *inputs, mla_buffer *outputs, uint64_t outputs_at)
{
    shape_batch(batch);
    batch->q = (mla_tensor){inputs, Q_AT};
    batch->kv = (mla_tensor){inputs, KV_AT};
    batch->block_table = (mla_tensor){inputs, TABLE_AT};
    batch->seqlens = (mla_tensor){inputs, LENS_AT};
    batch->out = (mla_tensor){outputs, OUT_AT - outputs_at};
}

static mla_client *connect_client(void)
{
    mla_client *client;
    mla_error error;
    REQUIRE(mla_connect(&client, NULL, &error) == MLA_OK, error.message);
    return client;
}

static void import(mla_client *client, uint64_t at, size_t bytes, mla_access access, mla_buffer **buffer)
{
    mla_error error;
    REQUIRE(mla_buffer_import_device(client, (void *)(uintptr_t)at, bytes, access, buffer, &error) == MLA_OK,
            error.message);
}

static void decode(mla_client *client, const mla_batch *batch)
{
    mla_error error;
    mla_plan *plan;
    REQUIRE(mla_plan_create(client, batch, &plan, &error) == MLA_OK, error.message);
    REQUIRE(mla_decode(client, plan, MLA_FOREVER, NULL, &error) == MLA_OK, error.message);
    mla_plan_destroy(plan);
}

/* The inputs, and what the same batch gives in memory from cuMemAlloc, which mlactl verify tests. */
static void expected(mla_client *client, uint8_t inputs[INPUTS], uint8_t out[OUT_BYTES])
{
    CUdeviceptr memory;
    mla_buffer *buffer;
    mla_batch batch;
    mla_error error;
    fill(inputs);
    CU(cuMemAlloc_v2, (CUdeviceptr *, size_t), &memory, (size_t)PIECES * PIECE);
    CU(cuMemcpyHtoD_v2, (CUdeviceptr, const void *, size_t), memory, inputs, INPUTS);
    import(client, memory, (size_t)PIECES * PIECE, MLA_READWRITE, &buffer);
    lay_out(&batch, buffer, buffer, 0);
    decode(client, &batch);
    CU(cuMemcpyDtoH_v2, (void *, CUdeviceptr, size_t), out, memory + OUT_AT, OUT_BYTES);
    REQUIRE(mla_buffer_free(buffer, &error) == MLA_OK, error.message);
    CU(cuMemFree_v2, (CUdeviceptr), memory);
}

struct gpu_batch {
    uint64_t memory;
    mla_buffer *inputs, *outputs;
    mla_batch batch;
};

static void decode_and_compare(mla_client *client, const struct gpu_batch *gpu, const uint8_t want[OUT_BYTES])
{
    uint8_t got[OUT_BYTES];
    CU(cuMemsetD8_v2, (CUdeviceptr, unsigned char, size_t), gpu->memory + OUT_AT, 0xff, OUT_BYTES);
    CU(cuCtxSynchronize, (void));
    decode(client, &gpu->batch);
    CU(cuMemcpyDtoH_v2, (void *, CUdeviceptr, size_t), got, gpu->memory + OUT_AT, OUT_BYTES);
    REQUIRE(memcmp(got, want, OUT_BYTES) == 0, "the output is another than in memory from cuMemAlloc");
}

/* ---- the cases ---- */

/* Say that it is `ready`, and wait for an answer. */
static void await_line(const char *ready)
{
    char line[8];
    puts(ready);
    fflush(stdout);
    REQUIRE(fgets(line, sizeof line, stdin), "no line");
}

/* Decode; with `pause` again, after a line on stdin: another worker may have come meanwhile. */
static void run_decode(bool pause)
{
    static uint8_t inputs[INPUTS], want[OUT_BYTES], zeros[OUT_BYTES];
    mla_client *client = connect_client();
    struct gpu_batch gpu = {.memory = pieces(PIECES)};
    mla_error error;
    expected(client, inputs, want);
    REQUIRE(memcmp(want, zeros, OUT_BYTES) != 0, "the output is nothing");
    CU(cuMemcpyHtoD_v2, (CUdeviceptr, const void *, size_t), gpu.memory, inputs, INPUTS);
    unsigned before = open_descriptors();
    import(client, gpu.memory, INPUTS, MLA_READ, &gpu.inputs);
    import(client, gpu.memory + INPUTS, (size_t)PIECES * PIECE - INPUTS, MLA_READWRITE, &gpu.outputs);
    REQUIRE(open_descriptors() == before, "descriptors were kept");
    lay_out(&gpu.batch, gpu.inputs, gpu.outputs, INPUTS);
    decode_and_compare(client, &gpu, want);
    if (pause) {
        await_line("ready");
        decode_and_compare(client, &gpu, want);
    }
    REQUIRE(open_descriptors() == before, "descriptors were kept");
    REQUIRE(mla_buffer_free(gpu.inputs, &error) == MLA_OK, error.message);
    REQUIRE(mla_buffer_free(gpu.outputs, &error) == MLA_OK, error.message);
    mla_close(client);
}

/* Outputs that lie in inputs are refused, whichever registration they are named by. */
static void run_overlap(void)
{
    mla_client *client = connect_client();
    struct gpu_batch gpu = {.memory = pieces(PIECES)};
    mla_buffer *apart;
    mla_error error;
    mla_plan *plan;
    uint64_t at = PIECE - MIB; /* in another allocation than the first byte of kv's buffer */
    import(client, gpu.memory, INPUTS, MLA_READ, &gpu.inputs);
    import(client, gpu.memory + at, 2 * MIB, MLA_READWRITE, &gpu.outputs);
    import(client, gpu.memory + INPUTS, MIB, MLA_READWRITE, &apart);
    lay_out(&gpu.batch, gpu.inputs, gpu.outputs, INPUTS);
    gpu.batch.out.offset = KV_AT + 4096 - at;
    REQUIRE(mla_plan_create(client, &gpu.batch, &plan, &error) == MLA_OVERLAP, error.message);
    gpu.batch.out = (mla_tensor){apart, 0};
    REQUIRE(mla_plan_create(client, &gpu.batch, &plan, &error) == MLA_OK, error.message);
    mla_close(client);
}

/* KV on another GPU than the device's, or in host memory, is refused with the names of both and what to do. */
static void run_elsewhere(void)
{
    mla_client *client = connect_client();
    struct gpu_batch gpu;
    mla_error error;
    mla_plan *plan;
    CUcontext context;
    char there[64];
    CU(cuDevicePrimaryCtxRetain, (CUcontext *, int), &context, 1);
    CU(cuCtxSetCurrent, (CUcontext), context);
    CU(cuMemAlloc_v2, (CUdeviceptr *, size_t), (CUdeviceptr *)&gpu.memory, (size_t)PIECES * PIECE);
    import(client, gpu.memory, INPUTS, MLA_READ, &gpu.inputs);
    import(client, gpu.memory + INPUTS, (size_t)PIECES * PIECE - INPUTS, MLA_READWRITE, &gpu.outputs);
    lay_out(&gpu.batch, gpu.inputs, gpu.outputs, INPUTS);
    snprintf(there, sizeof there, "lies on %.*s1,", (int)strlen(mla_device(client)) - 1, mla_device(client));
    for (int host = 0; host <= 1; host++) {
        if (host)
            REQUIRE(mla_buffer_alloc(client, INPUTS, &gpu.batch.kv.buffer, &error) == MLA_OK, error.message);
        REQUIRE(mla_plan_create(client, &gpu.batch, &plan, &error) == MLA_UNSUPPORTED, error.message);
        REQUIRE(strcmp(error.field, "batch.kv.buffer") == 0, error.field);
        REQUIRE(strstr(error.message, host ? "lies in host memory," : there), error.message);
        const char *remedy = strstr(error.message, "allocate it on ");
        REQUIRE(remedy && strstr(remedy, mla_device(client)), error.message);
    }
    mla_close(client);
}

static void refused(mla_client *client, uint64_t at, size_t bytes, const char *field, const char *const words[3])
{
    mla_buffer *buffer;
    mla_error error;
    unsigned before = open_descriptors();
    mla_status status =
        mla_buffer_import_device(client, (void *)(uintptr_t)at, bytes, MLA_READWRITE, &buffer, &error);
    REQUIRE(status == MLA_BUFFER, status == MLA_OK ? "it was not refused" : error.message);
    REQUIRE(strcmp(error.field, field) == 0, error.field);
    for (unsigned i = 0; i < 3; i++)
        REQUIRE(strstr(error.message, words[i]), error.message);
    REQUIRE(open_descriptors() == before, "descriptors were kept");
    printf("%s: %s\n", error.field, error.message);
}

/* What no way leads to says whose memory it is and what to change. */
static void run_refusals(void)
{
    mla_client *client = connect_client();
    CUdeviceptr pool, managed;
    int local = 0;
    CU(cuMemAllocAsync, (CUdeviceptr *, size_t, CUstream), &pool, PIECE, NULL);
    CU(cuCtxSynchronize, (void));
    CU(cuMemAllocManaged, (CUdeviceptr *, size_t, unsigned), &managed, PIECE, 1);
    refused(client, pool, 64, "pointer", (const char *[]){"cudaMallocAsync", "use cudaMalloc,", "backend:native"});
    refused(client, managed, 64, "pointer", (const char *[]){"cudaMallocManaged", "use cudaMalloc", ""});
    refused(client, (uintptr_t)&local, 4, "pointer", (const char *[]){"no GPU memory", "mla_buffer_alloc", ""});

    uint64_t mixed = reserve(8 * PIECE); /* two pieces, one that cannot be exported, a hole; a piece and a larger one */
    add(mixed, PIECE, 1);
    add(mixed + PIECE, PIECE, 1);
    add(mixed + 2 * PIECE, PIECE, 0);
    add(mixed + 4 * PIECE, PIECE, 1);
    add(mixed + 5 * PIECE, 2 * PIECE, 1);
    const char *const types[] = {"requestedHandleTypes 0", "CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR",
                                 "expandable_segments:False"};
    refused(client, mixed + 2 * PIECE, 64, "pointer", types);
    refused(client, mixed + PIECE, 2 * PIECE, "pointer", types);
    refused(client, mixed + 100, 3 * PIECE, "bytes", (const char *[]){"pass the end", "6291356 from there on", ""});
    refused(client, mixed + 4 * PIECE, 3 * PIECE, "bytes",
            (const char *[]){"different sizes, 2097152 and 4194304", "register the 2097152 bytes", ""});
    refused(client, mixed + 2 * PIECE, UINT64_C(1) << 62, "pointer", types);
    refused(client, mixed, UINT64_C(1) << 62, "bytes",
            (const char *[]){"at most 252", "register parts", "cuMemCreate"});
    CU(cuCtxSetCurrent, (CUcontext), NULL);
    refused(client, mixed, 64, "pointer", (const char *[]){"cuMemGetAddressRange", "context", "cudaSetDevice"});
    mla_close(client);
}

/* As many allocations as one buffer takes, and one more. */
static void run_many(void)
{
    enum { MOST = 252 };
    mla_client *client = connect_client();
    uint64_t start = pieces(MOST + 1);
    mla_buffer *buffer;
    mla_error error;
    import(client, start, (size_t)MOST * PIECE, MLA_READWRITE, &buffer);
    refused(client, start + PIECE - 1, (size_t)(MOST - 1) * PIECE + 2, "bytes",
            (const char *[]){"span 253 allocations of 2097152 bytes", "at most 252",
                             "register parts of at most 526385153 bytes"});
    REQUIRE(mla_buffer_free(buffer, &error) == MLA_OK, error.message);
    mla_close(client);
}

/* A registration that fails somewhere must say where (`word`), keep nothing, and work the next time. */
static void run_failing(const char *word)
{
    mla_client *client = connect_client();
    uint64_t start = pieces(PIECES);
    mla_buffer *buffer;
    mla_error error;
    unsigned before = open_descriptors();
    mla_status status = mla_buffer_import_device(client, (void *)(uintptr_t)start, (size_t)PIECES * PIECE,
                                                 MLA_READWRITE, &buffer, &error);
    REQUIRE(status == MLA_BUFFER && strstr(error.message, word), status == MLA_OK ? "it worked" : error.message);
    REQUIRE(open_descriptors() == before, "descriptors were kept");
    import(client, start, (size_t)PIECES * PIECE, MLA_READWRITE, &buffer);
    REQUIRE(mla_buffer_free(buffer, &error) == MLA_OK, error.message);
    mla_close(client);
}

/* A stream with a launch on it that the fake driver lets hang or fail. */
static CUstream launch(void)
{
    static char job[1 << 16];
    void *parameters[] = {job};
    CUstream stream;
    CUmodule module;
    CUfunction kernel;
    mla_error error;
    CU(cuStreamCreate, (CUstream *, unsigned), &stream, 1);
    CU(cuModuleLoadData, (CUmodule *, const void *), &module, "x");
    CU(cuModuleGetFunction, (CUfunction *, CUmodule, const char *), &kernel, module, "mlak_x");
    REQUIRE(mla_stream_drain(stream, 0, &error) == MLA_OK, error.message);
    CU(cuLaunchKernel,
       (CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CUstream, void **, void **),
       kernel, 1, 1, 1, 32, 1, 1, 0, stream, parameters, NULL);
    return stream;
}

/* Lose the context, by a launch that fails. */
static void lose_context(void)
{
    mla_error error;
    mla_status status = mla_stream_drain(launch(), MLA_FOREVER, &error);
    REQUIRE(status == MLA_DEVICE_LOST && strstr(error.message, "start the process again"),
            status == MLA_OK ? "it worked" : error.message);
}

static void require_code(mla_status status, const char *wanted, const mla_error *error)
{
    bool lost = strcmp(wanted, "device_lost") == 0;
    REQUIRE(strcmp(mla_status_text(status), wanted) == 0, status == MLA_OK ? "it worked" : error->message);
    REQUIRE(!lost || strstr(error->message, "this process's own CUDA context is lost"), error->message);
}

/* The worker dies with decodes in flight, after a line "ready", an answer, and a line "in flight", all at the hand of
 * test_gpu.py. What they and all that comes later must end with is `code`; with device_lost our context is lost as
 * well, as is everybody's after a fault under MPS. */
static void run_death(const char *memory, const char *code)
{
    enum { FLIGHT = 4 };
    static uint8_t inputs[INPUTS], want[OUT_BYTES];
    struct gpu_batch gpu = {.memory = pieces(PIECES)};
    bool fine = strcmp(code, "ok") == 0;
    mla_client *client = connect_client();
    mla_error error;
    mla_plan *plan, *other;
    mla_ticket tickets[FLIGHT];
    expected(client, inputs, want);
    if (strcmp(memory, "legacy") == 0)
        CU(cuMemAlloc_v2, (CUdeviceptr *, size_t), (CUdeviceptr *)&gpu.memory, (size_t)PIECES * PIECE);
    CU(cuMemcpyHtoD_v2, (CUdeviceptr, const void *, size_t), gpu.memory, inputs, INPUTS);
    import(client, gpu.memory, INPUTS, MLA_READ, &gpu.inputs);
    import(client, gpu.memory + INPUTS, (size_t)PIECES * PIECE - INPUTS, MLA_READWRITE, &gpu.outputs);
    lay_out(&gpu.batch, gpu.inputs, gpu.outputs, INPUTS);
    REQUIRE(mla_plan_create(client, &gpu.batch, &plan, &error) == MLA_OK, error.message);
    await_line("ready");
    for (unsigned i = 0; i < FLIGHT; i++)
        REQUIRE(mla_submit(client, plan, &tickets[i], &error) == MLA_OK, error.message);
    if (strcmp(code, "device_lost") == 0)
        lose_context();
    await_line("in flight");
    for (unsigned i = 0; i < FLIGHT; i++)
        require_code(mla_wait(client, tickets[i], MLA_FOREVER, NULL, &error), code, &error);
    require_code(mla_decode(client, plan, MLA_FOREVER, NULL, &error), code, &error);
    require_code(mla_plan_create(client, &gpu.batch, &other, &error), code, &error);
    if (fine)
        decode_and_compare(client, &gpu, want);
    else
        require_code(mla_buffer_import_device(client, (void *)(uintptr_t)gpu.memory, INPUTS, MLA_READ, &gpu.inputs,
                                              &error), code, &error);
    printf("%s\n", fine ? "as before" : error.message);
    mla_close(client);
}

/* A launch hangs, and a drain of its stream ends in time all the same, again and again until the launch is over. */
static void run_stuck(void)
{
    mla_error error;
    char name[32];
    CUstream stream = launch();
    snprintf(name, sizeof name, "%p", (void *)stream);
    REQUIRE(mla_stream_drain(stream, -2, &error) == MLA_INVALID && strcmp(error.field, "timeout_ms") == 0,
            error.message);
    for (int timeout_ms = 0; timeout_ms <= 100; timeout_ms += 50) {
        struct timespec from, to;
        clock_gettime(CLOCK_MONOTONIC, &from);
        mla_status status = mla_stream_drain(stream, timeout_ms, &error);
        clock_gettime(CLOCK_MONOTONIC, &to);
        long took_ms = (to.tv_sec - from.tv_sec) * 1000 + (to.tv_nsec - from.tv_nsec) / 1000000;
        REQUIRE(status == MLA_TIMEOUT && strcmp(error.field, "stream") == 0 && strstr(error.message, name),
                status == MLA_OK ? "it worked" : error.message);
        REQUIRE(took_ms >= timeout_ms && took_ms < timeout_ms + 5000, "it took another time");
    }
    puts("stuck");
    fflush(stdout);
    mla_status status = mla_stream_drain(stream, MLA_FOREVER, &error);
    REQUIRE(status == MLA_DEVICE_LOST, status == MLA_OK ? "it worked" : error.message);
}

int main(int argc, char **argv)
{
    const char *name = argc > 1 ? argv[1] : "";
    use_gpu(0);
    if (strcmp(name, "decode") == 0)
        run_decode(false);
    else if (strcmp(name, "replay") == 0)
        run_decode(true);
    else if (strcmp(name, "overlap") == 0)
        run_overlap();
    else if (strcmp(name, "refusals") == 0)
        run_refusals();
    else if (strcmp(name, "elsewhere") == 0)
        run_elsewhere();
    else if (strcmp(name, "many") == 0)
        run_many();
    else if (strcmp(name, "lost") == 0)
        lose_context();
    else if (strcmp(name, "stuck") == 0)
        run_stuck();
    else if (strcmp(name, "death") == 0 && argc > 3)
        run_death(argv[2], argv[3]);
    else if (strcmp(name, "failing") == 0 && argc > 2)
        run_failing(argv[2]);
    else
        REQUIRE(!"usage", "vmm-client decode | replay | overlap | refusals | elsewhere | many | lost | stuck | "
                          "death MEMORY CODE | failing WORD");
    return 0;
}
