/* mlak_cuda.cu - the kernels of the cuda backend, one translation unit: read them in the order of a launch. */
#include "mlak_prepare.cuh"
#include "mlak_split.cuh"
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(MLAK_EMULATE)
#include "mlak_wgmma.cuh" /* instead of split, on Hopper */
#endif
#include "mlak_combine.cuh"
