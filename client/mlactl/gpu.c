/* gpu.c - see gpu.h. The few driver functions that are needed, declared here with the driver's ABI, so that mlactl
 * builds without the CUDA Toolkit and runs without a driver. */
#include "gpu.h"

#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

struct gpu_uuid {
    uint8_t bytes[16];
};

/* D(member, symbol, parameters); every one returns a CUresult, 0 for success. */
#define DRIVER(D)                                                                                                      \
    D(init, cuInit, (unsigned flags))                                                                                  \
    D(error_text, cuGetErrorString, (int code, const char **text))                                                     \
    D(count, cuDeviceGetCount, (int *count))                                                                           \
    D(get, cuDeviceGet, (int *device, int ordinal))                                                                    \
    D(uuid, cuDeviceGetUuid_v2, (struct gpu_uuid * uuid, int device))                                                  \
    D(retain, cuDevicePrimaryCtxRetain, (void **context, int device))                                                  \
    D(set_current, cuCtxSetCurrent, (void *context))                                                                   \
    D(alloc, cuMemAlloc_v2, (uint64_t * pointer, size_t bytes))                                                        \
    D(free, cuMemFree_v2, (uint64_t pointer))                                                                          \
    D(upload, cuMemcpyHtoD_v2, (uint64_t to, const void *from, size_t bytes))                                          \
    D(download, cuMemcpyDtoH_v2, (void *to, uint64_t from, size_t bytes))                                              \
    D(stream_new, cuStreamCreate, (void **stream, unsigned flags))                                                     \
    D(stream_free, cuStreamDestroy_v2, (void *stream))                                                                 \
    D(capture_begin, cuStreamBeginCapture_v2, (void *stream, int mode))                                                \
    D(capture_end, cuStreamEndCapture, (void *stream, void **graph))                                                   \
    D(graph_free, cuGraphDestroy, (void *graph))                                                                       \
    D(graph_new, cuGraphInstantiateWithFlags, (void **exec, void *graph, unsigned long long flags))                    \
    D(graph_launch, cuGraphLaunch, (void *exec, void *stream))                                                         \
    D(graph_exec_free, cuGraphExecDestroy, (void *exec))

static struct {
    bool open;
    void *context; /* of the GPU in use, retained until the process ends */
#define MEMBER(member, symbol, parameters) int(*member) parameters;
    DRIVER(MEMBER)
#undef MEMBER
} driver;

static int fail(mla_error *error, const char *call, int code)
{
    const char *text = "unknown error";
    if (driver.error_text)
        driver.error_text(code, &text);
    *error = (mla_error){.code = code == 2 ? MLA_MEMORY : MLA_DEVICE_LOST}; /* 2: out of memory */
    snprintf(error->message, sizeof error->message, "%s: %s (%d)", call, text, code);
    return -1;
}

/* From here on `code` is what `call` returned. */
#define CHECK(call, code)                                                                                              \
    do {                                                                                                               \
        int code_ = (code);                                                                                            \
        if (code_)                                                                                                     \
            return fail(error, call, code_);                                                                           \
    } while (0)

static int open_driver(mla_error *error)
{
    if (driver.open)
        return 0;
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
    if (!library) {
        *error = (mla_error){.code = MLA_NO_DEVICE};
        snprintf(error->message, sizeof error->message, "this process finds no NVIDIA driver: %.400s", dlerror());
        return -1;
    }
    const char *missing = NULL;
#define FIND(member, symbol, parameters)                                                                               \
    *(void **)(void *)&driver.member = dlsym(library, #symbol);                                                        \
    if (!driver.member)                                                                                                \
        missing = #symbol;
    DRIVER(FIND)
#undef FIND
    if (missing) {
        *error = (mla_error){.code = MLA_NO_DEVICE};
        snprintf(error->message, sizeof error->message, "the NVIDIA driver lacks %s; install a newer one", missing);
        return -1;
    }
    CHECK("cuInit", driver.init(0));
    driver.open = true;
    return 0;
}

static void uuid_text(const struct gpu_uuid *uuid, char text[48])
{
    const uint8_t *b = uuid->bytes;
    snprintf(text, 48, "GPU-%02x%02x%02x%02x-%02x%02x-%02x%02x-%02x%02x-%02x%02x%02x%02x%02x%02x", b[0], b[1], b[2],
             b[3], b[4], b[5], b[6], b[7], b[8], b[9], b[10], b[11], b[12], b[13], b[14], b[15]);
}

/* Make the GPU's primary context current in this thread. */
static int use(const char *name, mla_error *error)
{
    int count = 0;
    if (open_driver(error))
        return -1;
    CHECK("cuDeviceGetCount", driver.count(&count));
    for (int i = 0; i < count && !driver.context; i++) {
        int device;
        struct gpu_uuid uuid;
        char text[48];
        CHECK("cuDeviceGet", driver.get(&device, i));
        CHECK("cuDeviceGetUuid", driver.uuid(&uuid, device));
        uuid_text(&uuid, text);
        if (strcmp(text, name) == 0)
            CHECK("cuDevicePrimaryCtxRetain", driver.retain(&driver.context, device));
    }
    if (!driver.context) {
        *error = (mla_error){.code = MLA_NO_DEVICE};
        snprintf(error->message, sizeof error->message,
                 "this process sees %d GPUs, and none is %.64s; is CUDA_VISIBLE_DEVICES set?", count, name);
        return -1;
    }
    CHECK("cuCtxSetCurrent", driver.set_current(driver.context));
    return 0;
}

bool gpu_named(const char *device)
{
    return strncmp(device, "GPU-", 4) == 0;
}

static int alloc(const char *device, size_t bytes, uint64_t *pointer, mla_error *error)
{
    if (use(device, error))
        return -1;
    CHECK("cuMemAlloc", driver.alloc(pointer, bytes));
    return 0;
}

void *gpu_alloc(const char *device, size_t bytes, mla_error *error)
{
    uint64_t pointer = 0;
    return alloc(device, bytes, &pointer, error) ? NULL : (void *)(uintptr_t)pointer;
}

void gpu_free(void *pointer)
{
    if (pointer)
        driver.free((uintptr_t)pointer);
}

int gpu_upload(void *to, const void *from, size_t bytes, mla_error *error)
{
    CHECK("cuMemcpyHtoD", driver.upload((uintptr_t)to, from, bytes));
    return 0;
}

int gpu_download(void *to, const void *from, size_t bytes, mla_error *error)
{
    CHECK("cuMemcpyDtoH", driver.download(to, (uintptr_t)from, bytes));
    return 0;
}

/* ---- streams ---- */

enum { NON_BLOCKING = 1, THREAD_LOCAL = 1 }; /* of a stream; of a capture */

static int new_stream(const char *device, void **stream, mla_error *error)
{
    if (use(device, error))
        return -1;
    CHECK("cuStreamCreate", driver.stream_new(stream, NON_BLOCKING));
    return 0;
}

void *gpu_stream_new(const char *device, mla_error *error)
{
    void *stream = NULL;
    return new_stream(device, &stream, error) ? NULL : stream;
}

void gpu_stream_free(void *stream)
{
    if (stream)
        driver.stream_free(stream);
}

int gpu_capture_begin(void *stream, mla_error *error)
{
    CHECK("cuStreamBeginCapture", driver.capture_begin(stream, THREAD_LOCAL));
    return 0;
}

int gpu_capture_end(void *stream, void **graph, mla_error *error)
{
    void *captured = NULL;
    *graph = NULL;
    CHECK("cuStreamEndCapture", driver.capture_end(stream, &captured));
    int code = driver.graph_new(graph, captured, 0);
    driver.graph_free(captured);
    CHECK("cuGraphInstantiateWithFlags", code);
    return 0;
}

int gpu_graph_launch(void *graph, void *stream, mla_error *error)
{
    CHECK("cuGraphLaunch", driver.graph_launch(graph, stream));
    return 0;
}

void gpu_graph_free(void *graph)
{
    if (graph)
        driver.graph_exec_free(graph);
}
