/* emulated_ptx.h - mlak_ptx.cuh's functions and the CUDA words that the kernels use, for the emulator. The fragment
 * layouts are written down a second time in emulator.cpp, from the PTX ISA. */
#ifndef EMULATED_PTX_H
#define EMULATED_PTX_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#define __device__
#define __host__
#define MLAK_CALLED static
#define MLAK_KERNEL(name, threads, parameter) extern "C" void name(const parameter)

struct uint2 {
    uint32_t x, y;
};
struct float2 {
    float x, y;
};
struct uint4 {
    uint32_t x, y, z, w;
};
struct float4 {
    float x, y, z, w;
};
static inline float2 make_float2(float x, float y)
{
    return float2{x, y};
}
static inline float4 make_float4(float x, float y, float z, float w)
{
    return float4{x, y, z, w};
}
static inline uint2 make_uint2(uint32_t x, uint32_t y)
{
    return uint2{x, y};
}
static inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w)
{
    return uint4{x, y, z, w};
}

/* ---- emulator.cpp ---- */

struct emulated_index {
    uint32_t x;
};
emulated_index emulated_thread(), emulated_block(), emulated_grid();
unsigned char *emulated_shared();
uint32_t shared_bytes();
void __syncthreads();
float __shfl_xor_sync(uint32_t mask, float value, int lanes);
float __shfl_sync(uint32_t mask, float value, int from);
void copy_async(void *to, const void *from, bool valid);
void copy_commit();
void emulated_copy_wait(int pending);
void load_matrices(uint32_t r[4], const void *row);
void load_matrices_transposed(uint32_t r[4], const void *row);
void multiply_bf16(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1);
void multiply_fp16(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1);
uint32_t pack_bf16(float low, float high);
uint32_t pack_fp16(float low, float high);

#define threadIdx emulated_thread()
#define blockIdx emulated_block()
#define gridDim emulated_grid()
#define mlak_shared emulated_shared()

/* ---- what needs no other thread ---- */

template <int PENDING> static inline void copy_wait()
{
    emulated_copy_wait(PENDING);
}
static inline float power_of_two(float x)
{
    return exp2f(x);
}
static inline uint32_t float_bits(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
static inline float bits_float(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
static inline uint32_t lift_bf16(uint32_t pair)
{
    uint32_t low = float_bits(bits_float(pair << 16) * 0x1p120f) >> 16;
    return low | (float_bits(bits_float(pair & 0xffff0000) * 0x1p120f) & 0xffff0000);
}
static inline uint32_t pick_bytes(uint32_t low, uint32_t high, uint32_t selector)
{
    uint64_t all = (uint64_t)high << 32 | low;
    uint32_t picked = 0;
    for (int i = 0; i < 4; i++)
        picked |= (uint32_t)(all >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
    return picked;
}
static inline uint32_t __shfl_xor_sync(uint32_t mask, uint32_t value, int lanes)
{
    return float_bits(__shfl_xor_sync(mask, bits_float(value), lanes));
}
static inline uint32_t __shfl_sync(uint32_t mask, uint32_t value, int from)
{
    return float_bits(__shfl_sync(mask, bits_float(value), from));
}
template <typename T> static inline T read_once(const T *pointer)
{
    return *(const volatile T *)pointer;
}
/* alone.cpp: the sanitizers see it, and so know that all before it is over for who has seen the word. */
void publish(uint64_t *pointer, uint64_t value);
static inline void write_for_host(uint64_t *pointer, uint64_t value)
{
    __atomic_store_n(pointer, value, __ATOMIC_RELAXED);
}
static inline void kernel_begins() {}
static inline void await_kernel_before() {}
static inline void let_next_kernel_start() {}
static inline void __threadfence() {}
static inline void __threadfence_system() {}
template <typename T> static inline T atomicAdd(T *pointer, T value)
{
    T old = *pointer;
    *pointer += value;
    return old;
}
template <typename T> static inline T atomicMin(T *pointer, T value)
{
    T old = *pointer;
    *pointer = value < old ? value : old;
    return old;
}
static inline unsigned long long atomicCAS(unsigned long long *pointer, unsigned long long expected,
                                           unsigned long long value)
{
    unsigned long long old = *pointer;
    if (old == expected)
        *pointer = value;
    return old;
}

#endif
