/* perturbed_driver.c - the driver as the cuda backend sees it in the test programs of the perturbed kernels, linked
 * with --wrap=mlak_driver. Before each launch, scratch that the launch fills holds NaN; every other launch has a kernel
 * beside it that takes a few processors away for a while; and what waited for too long is told on stderr. */
#include "cuda_driver.h"
#include "mlak_cuda.h"
#include "perturbed.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

enum { HOG_BLOCKS = 24, HOG_BYTES = 200 << 10, HOG_NS = 300000 };

const struct mlak_driver *__real_mlak_driver(struct mlak_fault *fault);
const struct mlak_driver *__wrap_mlak_driver(struct mlak_fault *fault);

static const struct mlak_driver *real;
static struct mlak_driver perturbed;
static struct {
    CUfunction prepare, combine, hog;
    CUstream beside; /* the hog's */
    volatile struct perturbed_report *report;
    bool told, capturing;
    unsigned launches;
} own;

/* ---- what waits for too long ---- */

static const char *role_of(unsigned warp)
{
    return warp < 4 ? "computes, first warpgroup" : warp < 8 ? "computes, second warpgroup" : "loads";
}

static void tell(void)
{
    if (own.told || !own.report || own.report->block == 0)
        return;
    own.told = true;
    for (unsigned warp = 0; warp < PERTURBED_WARPS; warp++) {
        volatile struct perturbed_wait *wait = &own.report->waits[warp];
        if (wait->there)
            fprintf(stderr, "block %u, warp %u (%s) waits for the barrier at byte %u of shared memory, parity %u\n",
                    own.report->block - 1, warp, role_of(warp), wait->barrier, wait->parity);
    }
}

static CUresult stream_query(CUstream stream)
{
    CUresult result = real->stream_query(stream);
    if (result != CUDA_SUCCESS && result != CUDA_ERROR_NOT_READY)
        tell();
    return result;
}

/* ---- kernels ---- */

/* Of an image with perturbed kernels: who hears of waits, and the hog. A driver without such kernels has neither. */
static CUresult module_load(CUmodule *module, const void *image)
{
    CUresult result = real->module_load(module, image);
    CUresult (*find)(CUdeviceptr *, size_t *, CUmodule, const char *) = NULL;
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL), *report;
    CUdeviceptr at, seen;
    size_t bytes;
    if (library)
        *(void **)(void *)&find = dlsym(library, "cuModuleGetGlobal_v2");
    if (result != CUDA_SUCCESS || !find || find(&at, &bytes, *module, "perturbed_report_at") != CUDA_SUCCESS)
        return result;
    result = real->host_alloc(&report, sizeof *own.report, CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP);
    if (result != CUDA_SUCCESS)
        return result;
    memset(report, 0, sizeof *own.report);
    own.report = report;
    if ((result = real->host_pointer(&seen, report, 0)) == CUDA_SUCCESS)
        result = real->copy(at, (CUdeviceptr)&seen, sizeof seen);
    if (result == CUDA_SUCCESS)
        result = real->module_function(&own.hog, *module, "perturbed_hog");
    if (result == CUDA_SUCCESS)
        result = real->function_attribute(own.hog, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, HOG_BYTES);
    if (result == CUDA_SUCCESS)
        result = real->stream_new(&own.beside, CU_STREAM_NON_BLOCKING);
    return result == CUDA_SUCCESS ? real->context_drain() : result;
}

static CUresult module_function(CUfunction *function, CUmodule module, const char *name)
{
    CUresult result = real->module_function(function, module, name);
    if (strcmp(name, "mlak_cuda_prepare") == 0)
        own.prepare = *function;
    if (strcmp(name, "mlak_cuda_combine") == 0)
        own.combine = *function;
    return result;
}

/* Every other time, unless it still is at it. */
static CUresult hog(void)
{
    unsigned ns = HOG_NS;
    void *parameters[] = {&ns};
    if (!own.hog || own.capturing || own.launches++ % 2 || real->stream_query(own.beside) != CUDA_SUCCESS)
        return CUDA_SUCCESS;
    return real->launch(own.hog, HOG_BLOCKS, 1, 1, 32, 1, 1, HOG_BYTES, own.beside, parameters, NULL);
}

static CUresult poison(const void *at, size_t bytes, CUstream stream)
{
    return bytes ? real->set_words_async((CUdeviceptr)at, 0xffffffff, bytes / 4, stream) : CUDA_SUCCESS;
}

/* What the launch's kernels fill: all of it before prepare; of one that uses what another has prepared, the parts. */
static CUresult poison_scratch(const struct mlak_cuda_job *job, bool prepared, CUstream stream)
{
    uint32_t slots = job->source.batch.deterministic ? job->max_slots : 2 * job->grid;
    const struct { const void *at; size_t bytes; } scratch[] = {
        {job->parts, (size_t)slots * MLAK_CUDA_PART_FLOATS * sizeof(float)},
        {job->rows, job->count * sizeof(struct mlak_row)},
        {job->requests, job->count * sizeof(struct mlak_cuda_request)},
        {job->starts, job->grid * sizeof(struct mlak_cuda_start)},
        {job->merges, mlak_cuda_most_merges(job->max_slots, job->count) * sizeof(struct mlak_cuda_merge)},
    };
    CUresult result = CUDA_SUCCESS;
    for (unsigned i = 0; i < (prepared ? 1 : sizeof scratch / sizeof scratch[0]) && result == CUDA_SUCCESS; i++)
        result = poison(scratch[i].at, scratch[i].bytes, stream);
    return result;
}

/* A kernel that starts early is not a launch's first one, and nothing may come between it and the one before it. */
static CUresult launch_as(const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra)
{
    bool early = false;
    for (unsigned i = 0; i < config->numAttrs; i++)
        early |= config->attrs[i].id == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
    bool prepare = function == own.prepare;
    CUresult result = CUDA_SUCCESS;
    if (!early && function != own.combine)
        result = poison_scratch(parameters[0], !prepare, config->hStream);
    if (result == CUDA_SUCCESS && prepare)
        result = hog();
    return result == CUDA_SUCCESS ? real->launch_as(config, function, parameters, extra) : result;
}

static CUresult capture_begin(CUstream stream, CUstreamCaptureMode mode)
{
    own.capturing = true;
    return real->capture_begin(stream, mode);
}

static CUresult capture_end(CUstream stream, CUgraph *graph)
{
    own.capturing = false;
    return real->capture_end(stream, graph);
}

static CUresult graph_launch(CUgraphExec graph, CUstream stream)
{
    CUresult result = hog();
    return result == CUDA_SUCCESS ? real->graph_launch(graph, stream) : result;
}

static void wrap(void)
{
    perturbed = *real;
    perturbed.stream_query = stream_query;
    perturbed.module_load = module_load;
    perturbed.module_function = module_function;
    perturbed.launch_as = launch_as;
    perturbed.capture_begin = capture_begin;
    perturbed.capture_end = capture_end;
    perturbed.graph_launch = graph_launch;
}

const struct mlak_driver *__wrap_mlak_driver(struct mlak_fault *fault)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    real = __real_mlak_driver(fault);
    if (!real)
        return NULL;
    pthread_once(&once, wrap);
    return &perturbed;
}
