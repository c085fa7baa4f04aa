/* mlak_cuda.cu - the kernels of the cuda backend, one translation unit: read them in the order of a launch. */
#include "mlak_prepare.cuh"
#include "mlak_split.cuh"
#include "mlak_combine.cuh"
