/* cuda_absent.c - what a build without a CUDA compiler says of GPUs. */
#include "mlak_backends.h"

static const char reason[] = "this build has no GPU kernels; build it where there is a CUDA compiler (nvcc)";

static struct mlak_device *absent_open(const struct mlak_options *options, struct mlak_fault *fault)
{
    (void)options;
    mlak_fail(fault, MLAK_UNSUPPORTED, "device", "%s", reason);
    return NULL;
}

const struct mlak_backend mlak_cuda_backend = {.name = "cuda", .open = absent_open};

uint32_t mlak_gpus(struct mlak_gpu *gpus, uint32_t most, struct mlak_fault *why)
{
    (void)gpus;
    (void)most;
    mlak_fail(why, MLAK_UNSUPPORTED, "device", "%s", reason);
    return 0;
}
