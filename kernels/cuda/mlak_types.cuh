/* mlak_types.cuh - the element types of the split kernels: fp8 widened to bf16, and mma by type. */
#ifndef MLAK_TYPES_CUH
#define MLAK_TYPES_CUH

#include "mlak_cuda.h"
#include "mlak_ptx.cuh"

/* Two e4m3 codes, in the upper bytes of the halves of `codes`, to two bf16: exact, since bf16 has more of both exponent
 * and mantissa. Shifted into place, their exponents are 120 too small (bf16's bias is 127, e4m3's 7), which also holds
 * for subnormals. e4m3 has no infinity, and its one NaN would come out as 480. */
__device__ static inline uint32_t widen_two(uint32_t codes)
{
    uint32_t wide = lift_bf16((codes & 0x80008000) | (codes & 0x7f007f00) >> 4);
    wide = (codes & 0x7f00) == 0x7f00 ? wide | 0x7fff : wide;
    return (codes & 0x7f000000) == 0x7f000000 ? wide | 0x7fff0000 : wide;
}

/* 8 codes to 8 bf16. */
__device__ static inline uint4 widen_eight(uint32_t low, uint32_t high)
{
    return make_uint4(widen_two(pick_bytes(low, 0, 0x1404)), widen_two(pick_bytes(low, 0, 0x3424)),
                      widen_two(pick_bytes(high, 0, 0x1404)), widen_two(pick_bytes(high, 0, 0x3424)));
}

template <enum mlak_cuda_types TYPES>
__device__ static inline void multiply(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1)
{
    if (TYPES == MLAK_CUDA_FP16)
        multiply_fp16(c, a, b0, b1);
    else
        multiply_bf16(c, a, b0, b1);
}

template <enum mlak_cuda_types TYPES> __device__ static inline uint32_t pack(float low, float high)
{
    return TYPES == MLAK_CUDA_FP16 ? pack_fp16(low, high) : pack_bf16(low, high);
}

#endif
