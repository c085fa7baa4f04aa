/* gpu.c - see gpu.h. */
#include "gpu.h"

#include <dlfcn.h>
#include <string.h>
#include <time.h>

#define TRY(call, ...)                                                                                                 \
    do {                                                                                                               \
        CUresult result_ = (call)(__VA_ARGS__);                                                                        \
        if (result_ != CUDA_SUCCESS)                                                                                   \
            return mlak_driver_fail(fault, result_ == CUDA_ERROR_OUT_OF_MEMORY ? MLAK_MEMORY : MLAK_LOST, "device",    \
                                    #call, result_);                                                                   \
    } while (0)

static enum mlak_code find_functions(struct gpu *gpu, struct mlak_fault *fault)
{
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    const char *missing = NULL;
#define FIND(table, member, symbol)                                                                                    \
    *(void **)(void *)&gpu->table.member = dlsym(library, #symbol);                                                    \
    if (!gpu->table.member)                                                                                            \
        missing = #symbol;
#define FIND_MORE(member, symbol, parameters) FIND(more, member, symbol)
#define FIND_GRAPHS(member, symbol, parameters) FIND(graphs, member, symbol)
#define FIND_JOINS(member, symbol, parameters) FIND(joins, member, symbol)
    GPU_JOINS(FIND_JOINS)
    gpu->has_joins = !missing;
    missing = NULL;
    GPU_GRAPHS(FIND_GRAPHS)
    gpu->has_graphs = !missing;
    missing = NULL;
    GPU_STREAMS(FIND_MORE)
#undef FIND_MORE
#undef FIND_GRAPHS
#undef FIND_JOINS
#undef FIND
    if (missing)
        return mlak_fail(fault, MLAK_UNSUPPORTED, "device", "the NVIDIA driver lacks %s; install a newer one", missing);
    return MLAK_OK;
}

static enum mlak_code find_device(struct gpu *gpu, const char *uuid, struct mlak_fault *fault)
{
    int count = 0;
    TRY(gpu->cu->device_count, &count);
    for (int i = 0; i < count; i++) {
        CUuuid id;
        char text[MLAK_UUID_TEXT];
        TRY(gpu->cu->device_get, &gpu->device, i);
        TRY(gpu->cu->device_uuid, &id, gpu->device);
        mlak_uuid_text(&id, text);
        if (strcmp(text, uuid) == 0)
            return MLAK_OK;
    }
    return mlak_fail(fault, MLAK_UNSUPPORTED, "device", "the driver sees no GPU %.48s", uuid);
}

static void find_clock(struct gpu *gpu, const char *uuid)
{
    int (*init)(void), (*by_uuid)(const char *, void **);
    gpu->nvml = dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!gpu->nvml)
        return;
    *(void **)(void *)&init = dlsym(gpu->nvml, "nvmlInit_v2");
    *(void **)(void *)&by_uuid = dlsym(gpu->nvml, "nvmlDeviceGetHandleByUUID");
    *(void **)(void *)&gpu->nvml_clock = dlsym(gpu->nvml, "nvmlDeviceGetClockInfo");
    if (!init || !by_uuid || !gpu->nvml_clock || init() != 0 || by_uuid(uuid, &gpu->nvml_device) != 0)
        gpu->nvml_device = NULL;
}

unsigned gpu_sm_mhz(const struct gpu *gpu)
{
    enum { NVML_CLOCK_SM = 1 };
    unsigned mhz = 0;
    return gpu->nvml_device && gpu->nvml_clock(gpu->nvml_device, NVML_CLOCK_SM, &mhz) == 0 ? mhz : 0;
}

enum mlak_code gpu_open(struct gpu *gpu, const char *uuid, uint64_t flush_bytes, struct mlak_fault *fault)
{
    *gpu = (struct gpu){.cu = mlak_driver(fault)};
    enum mlak_code code = gpu->cu ? find_functions(gpu, fault) : MLAK_UNSUPPORTED;
    if (code == MLAK_OK)
        code = find_device(gpu, uuid, fault);
    if (code != MLAK_OK)
        return code;
    int l2 = 0;
    TRY(gpu->cu->device_attribute, &l2, CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE, gpu->device);
    TRY(gpu->cu->device_attribute, &gpu->processors, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, gpu->device);
    TRY(gpu->cu->device_attribute, &gpu->major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, gpu->device);
    TRY(gpu->cu->device_attribute, &gpu->minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, gpu->device);
    TRY(gpu->cu->device_name, gpu->model, sizeof gpu->model, gpu->device);
    gpu->l2_bytes = (uint64_t)l2;
    gpu->flush_bytes = flush_bytes ? flush_bytes : 4 * gpu->l2_bytes;
    TRY(gpu->cu->context_retain, &gpu->context, gpu->device);
    TRY(gpu->cu->context_set, gpu->context);
    TRY(gpu->cu->stream_new, &gpu->stream, CU_STREAM_NON_BLOCKING);
    TRY(gpu->cu->event_new, &gpu->events[0], CU_EVENT_DEFAULT);
    TRY(gpu->cu->event_new, &gpu->events[1], CU_EVENT_DEFAULT);
    TRY(gpu->cu->alloc, &gpu->flushed, gpu->flush_bytes);
    find_clock(gpu, uuid);
    return MLAK_OK;
}

void gpu_close(struct gpu *gpu)
{
    if (!gpu->context)
        return;
    gpu->cu->context_set(gpu->context);
    if (gpu->flushed)
        gpu->cu->free(gpu->flushed);
    for (unsigned i = 0; i < 2; i++)
        if (gpu->events[i])
            gpu->cu->event_free(gpu->events[i]);
    if (gpu->stream)
        gpu->cu->stream_free(gpu->stream);
    gpu->cu->context_release(gpu->device);
    *gpu = (struct gpu){0};
}

enum mlak_code gpu_wait(struct gpu *gpu, struct mlak_fault *fault)
{
    TRY(gpu->more.wait, gpu->stream);
    return MLAK_OK;
}

enum mlak_code gpu_flush(struct gpu *gpu, struct mlak_fault *fault)
{
    TRY(gpu->more.set_bytes, gpu->flushed, 0, gpu->flush_bytes, gpu->stream);
    return gpu_wait(gpu, fault);
}

double gpu_now(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e9 + (double)now.tv_nsec;
}

/* ---- calls ---- */

/* A programmatic edge from the last call's kernel to the next call's would let them overlap: an empty node between them
 * is waited for in full. */
static enum mlak_code join(struct gpu *gpu, struct mlak_fault *fault)
{
    CUstreamCaptureStatus status;
    cuuint64_t id;
    CUgraph graph;
    const CUgraphNode *before;
    const CUgraphEdgeData *edges;
    size_t count;
    CUgraphNode empty;
    TRY(gpu->joins.capture_info, gpu->stream, &status, &id, &graph, &before, &edges, &count);
    TRY(gpu->joins.empty_node, &empty, graph, before, count);
    TRY(gpu->joins.capture_depend, gpu->stream, &empty, NULL, 1, CU_STREAM_SET_CAPTURE_DEPENDENCIES);
    return MLAK_OK;
}

static enum mlak_code enqueue_all(struct gpu_calls *calls, bool joined, struct mlak_fault *fault)
{
    enum mlak_code code = MLAK_OK;
    for (uint32_t i = 0; i < calls->count && code == MLAK_OK; i++) {
        if (i > 0 && joined)
            code = join(calls->gpu, fault);
        if (code == MLAK_OK)
            code = calls->enqueue(calls->self, i % calls->modulus, calls->gpu->stream, fault);
    }
    return code;
}

enum mlak_code gpu_calls_init(struct gpu_calls *calls, struct gpu *gpu, gpu_enqueue *enqueue, void *self,
                              uint32_t count, uint32_t modulus, struct mlak_fault *fault)
{
    CUgraph graph = NULL;
    *calls = (struct gpu_calls){.gpu = gpu, .enqueue = enqueue, .self = self, .count = count, .modulus = modulus};
    TRY(gpu->cu->context_set, gpu->context);
    if (!gpu->has_graphs)
        return MLAK_OK;
    TRY(gpu->graphs.capture, gpu->stream, CU_STREAM_CAPTURE_MODE_RELAXED);
    enum mlak_code code = enqueue_all(calls, gpu->has_joins, fault);
    CUresult result = gpu->graphs.capture_end(gpu->stream, &graph);
    if (code == MLAK_OK && result != CUDA_SUCCESS)
        code = mlak_driver_fail(fault, MLAK_LOST, "device", "cuStreamEndCapture", result);
    if (code == MLAK_OK && (result = gpu->graphs.instantiate(&calls->exec, graph, 0)) != CUDA_SUCCESS)
        code = mlak_driver_fail(fault, MLAK_MEMORY, "device", "cuGraphInstantiate", result);
    if (graph)
        gpu->graphs.graph_free(graph);
    if (code != MLAK_OK)
        gpu_calls_deinit(calls);
    return code;
}

void gpu_calls_deinit(struct gpu_calls *calls)
{
    if (calls->exec)
        calls->gpu->graphs.exec_free(calls->exec);
    calls->exec = NULL;
}

static enum mlak_code launch(struct gpu_calls *calls, struct mlak_fault *fault)
{
    if (!calls->exec)
        return enqueue_all(calls, false, fault);
    TRY(calls->gpu->graphs.launch, calls->exec, calls->gpu->stream);
    return MLAK_OK;
}

enum mlak_code gpu_calls_time(struct gpu_calls *calls, uint32_t rounds, double *ns, struct mlak_fault *fault)
{
    struct gpu *gpu = calls->gpu;
    float milliseconds = 0;
    TRY(gpu->cu->context_set, gpu->context);
    enum mlak_code code = launch(calls, fault);
    TRY(gpu->cu->event_record, gpu->events[0], gpu->stream);
    for (uint32_t i = 0; i < rounds && code == MLAK_OK; i++)
        code = launch(calls, fault);
    TRY(gpu->cu->event_record, gpu->events[1], gpu->stream);
    enum mlak_code end = gpu_wait(gpu, code == MLAK_OK ? fault : NULL);
    if (code != MLAK_OK || end != MLAK_OK)
        return code != MLAK_OK ? code : end;
    TRY(gpu->cu->event_elapsed, &milliseconds, gpu->events[0], gpu->events[1]);
    *ns = (double)milliseconds * 1e6;
    return MLAK_OK;
}

enum mlak_code gpu_call_alone(struct gpu *gpu, gpu_enqueue *enqueue, void *self, uint32_t index, double *ns,
                              struct mlak_fault *fault)
{
    CUresult result;
    TRY(gpu->cu->context_set, gpu->context);
    double begin = gpu_now();
    enum mlak_code code = enqueue(self, index, gpu->stream, fault);
    while ((result = gpu->cu->stream_query(gpu->stream)) == CUDA_ERROR_NOT_READY)
        continue;
    *ns = gpu_now() - begin;
    if (code == MLAK_OK && result != CUDA_SUCCESS)
        code = mlak_driver_fail(fault, MLAK_LOST, "device", "cuStreamQuery", result);
    return code;
}
