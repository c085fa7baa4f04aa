/* ceilings.c - see ceilings.h. */
#include "ceilings.h"

#include "ceilings_shared.h"

#include <stdlib.h>

enum { SAMPLES = 15, MATMUL_ROUNDS = 2000 /* of 16: some 5 ms */ };

extern const uint8_t ceilings_image[]; /* the fatbin, ceilings_image.c */

#define TRY(call, ...)                                                                                                 \
    do {                                                                                                               \
        CUresult result_ = (call)(__VA_ARGS__);                                                                        \
        if (result_ != CUDA_SUCCESS)                                                                                   \
            return mlak_driver_fail(fault, MLAK_LOST, "ceilings", #call, result_);                                     \
    } while (0)

struct kernel { struct gpu *gpu; CUfunction function; unsigned threads, shared; void **parameters; };

static enum mlak_code enqueue(void *self, uint32_t index, CUstream stream, struct mlak_fault *fault)
{
    const struct kernel *kernel = self;
    (void)index;
    TRY(kernel->gpu->cu->launch, kernel->function, (unsigned)kernel->gpu->processors, 1, 1, kernel->threads, 1, 1,
        kernel->shared, stream, kernel->parameters, NULL);
    return MLAK_OK;
}

static int by_value(const void *a, const void *b)
{
    const double *x = a, *y = b;
    return (*x > *y) - (*x < *y);
}

/* The median time of a launch. */
static enum mlak_code time_kernel(struct kernel *kernel, CUmodule module, const char *name, double *ns,
                                  struct mlak_fault *fault)
{
    struct gpu_calls calls;
    double times[SAMPLES];
    TRY(kernel->gpu->cu->module_function, &kernel->function, module, name);
    TRY(kernel->gpu->cu->function_attribute, kernel->function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
        (int)kernel->shared);
    enum mlak_code code = gpu_calls_init(&calls, kernel->gpu, enqueue, kernel, 1, 1, fault);
    if (code != MLAK_OK)
        return code;
    for (int i = 0; i < SAMPLES && code == MLAK_OK; i++)
        code = gpu_calls_time(&calls, 1, &times[i], fault);
    gpu_calls_deinit(&calls);
    qsort(times, SAMPLES, sizeof times[0], by_value);
    *ns = times[SAMPLES / 2];
    return code;
}

static enum mlak_code measure(struct gpu_ceilings *ceilings, struct gpu *gpu, CUmodule module, const void *memory,
                              uint64_t bytes, struct mlak_fault *fault)
{
    uint64_t tiles = bytes / CEILING_TILE;
    uint32_t rounds = MATMUL_ROUNDS;
    CUdeviceptr sink = gpu->flushed;
    double ns = 0;
    struct kernel read = {gpu, NULL, 32, CEILING_READ_SHARED, (void *[]){&memory, &tiles}};
    enum mlak_code code = time_kernel(&read, module, "ceiling_read", &ns, fault);
    if (code != MLAK_OK)
        return code;
    ceilings->read_gbps = (double)(tiles * CEILING_TILE) / ns;
    struct kernel matmul = {gpu, NULL, CEILING_MATMUL_THREADS, CEILING_MATMUL_SHARED, (void *[]){&rounds, &sink}};
    code = time_kernel(&matmul, module, "ceiling_matmul", &ns, fault);
    if (code != MLAK_OK)
        return code;
    const double flop = 2.0 * 64 * 256 * 16 * CEILING_MATMULS * (CEILING_MATMUL_THREADS / 128) * MATMUL_ROUNDS;
    ceilings->tflops = flop * gpu->processors / ns / 1e3;
    return MLAK_OK;
}

enum mlak_code gpu_ceilings_measure(struct gpu_ceilings *ceilings, struct gpu *gpu, const void *memory, uint64_t bytes,
                                    struct mlak_fault *fault)
{
    CUmodule module;
    if (gpu->major != 9 || gpu->minor != 0)
        return mlak_fail(fault, MLAK_UNSUPPORTED, "ceilings",
                         "they are measured on sm_90 only, and this is sm_%d%d; give them by --ceilings", gpu->major,
                         gpu->minor);
    TRY(gpu->cu->context_set, gpu->context);
    TRY(gpu->cu->module_load, &module, ceilings_image);
    enum mlak_code code = measure(ceilings, gpu, module, memory, bytes, fault);
    gpu->cu->module_unload(module);
    return code;
}
