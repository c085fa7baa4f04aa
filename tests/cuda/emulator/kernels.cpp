/* kernels.cpp - the kernels of kernels/cuda, compiled for the emulator. */
#include <cstddef>

#define MLAK_EMULATE
#include "mlak_cuda.cu"
