/* mlak_ptx.cuh - the machine's instructions under the names that the kernels use. Nothing else in kernels/cuda is
 * inline assembly, so that tests/cuda can put an emulator underneath: there the same kernels run on a processor.
 *
 * Fragments, per PTX ISA "Matrix multiply-accumulate, m16n8k16" (lane = 4 g + i, g 0..7, i 0..3):
 *     A 16x16  a[0] (g, 2i..)  a[1] (g+8, 2i..)  a[2] (g, 2i+8..)  a[3] (g+8, 2i+8..)   two 16-bit values each
 *     B 16x8   b[0] (k 2i.., n g)  b[1] (k 2i+8.., n g)
 *     C 16x8   c[0] (g, 2i) c[1] (g, 2i+1) c[2] (g+8, 2i) c[3] (g+8, 2i+1)   fp32 */
#ifndef MLAK_PTX_CUH
#define MLAK_PTX_CUH

#include <stdint.h>

#ifdef MLAK_EMULATE
#include "emulated_ptx.h"
#else

#define MLAK_KERNEL(name, threads, parameter)                                                                          \
    extern "C" __global__ __launch_bounds__(threads, 1) void name(const __grid_constant__ parameter)

/* A function that is there once, however often it is called: code that nobody has run lately takes longer to come than
 * to run. Not for kernels with wgmma, whose products a call puts one after the other. */
#define MLAK_CALLED __device__ __noinline__ static

/* A kernel's first words, which tests give a meaning to. */
__device__ static inline void kernel_begins(void) {}

extern __shared__ __align__(128) unsigned char mlak_shared[];

__device__ static inline uint32_t shared_bytes(void)
{
    uint32_t bytes;
    asm("mov.u32 %0, %%dynamic_smem_size;" : "=r"(bytes));
    return bytes;
}

__device__ static inline uint32_t shared_address(const void *pointer)
{
    return (uint32_t)__cvta_generic_to_shared(pointer);
}

/* 16 bytes from global to shared memory, in the background; zeros where `valid` is false (then `from` is not read). */
__device__ static inline void copy_async(void *to, const void *from, bool valid)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(valid ? 16 : 0)
                 : "memory");
}

__device__ static inline void copy_commit(void)
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}
/* Until at most `PENDING` of this thread's groups are on their way. */
template <int PENDING> __device__ static inline void copy_wait(void)
{
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

/* Four (or two) 8x8 matrices of 16-bit values; lane 8 m + r names row r of matrix m, 16 bytes. Lane 4 g + i gets
 * elements (g, 2i), (g, 2i+1) of each; transposed, (2i, g), (2i+1, g). */
__device__ static inline void load_matrices(uint32_t r[4], const void *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

__device__ static inline void load_matrices_transposed(uint32_t r[4], const void *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

/* c += a b. */
__device__ static inline void multiply_bf16(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1)
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ static inline void multiply_fp16(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1)
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* Two floats to two 16-bit values, to nearest even, the first one in the low half. */
__device__ static inline uint32_t pack_bf16(float low, float high)
{
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

__device__ static inline uint32_t pack_fp16(float low, float high)
{
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

/* Both bf16 of a pair times 2^120, exact (a result beyond the largest is infinite); subnormals are numbers. */
__device__ static inline uint32_t lift_bf16(uint32_t pair)
{
    uint32_t lifted; /* times 0x7b80, minus nothing: sm_80 has the product only with a sum */
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(lifted) : "r"(pair), "r"(0x7b807b80u), "r"(0x80008000u));
    return lifted;
}

/* Byte i of the result is byte (selector >> 4 i & 7) of the eight of low, high. */
__device__ static inline uint32_t pick_bytes(uint32_t low, uint32_t high, uint32_t selector)
{
    return __byte_perm(low, high, selector);
}

__device__ static inline float power_of_two(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ static inline uint32_t float_bits(float x)
{
    return __float_as_uint(x);
}
__device__ static inline float bits_float(uint32_t bits)
{
    return __uint_as_float(bits);
}

/* Before the kernel looks at anything that the kernel before it in the stream wrote, or writes anything itself; no wait
 * if it was not launched early. All threads. */
__device__ static inline void await_kernel_before(void)
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/* The next kernel may start, as soon as all blocks have said so or ended. */
__device__ static inline void let_next_kernel_start(void)
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/* Values that another process or the host may change at any moment: read once, from memory. */
template <typename T> __device__ static inline T read_once(const T *pointer)
{
    return *(const volatile T *)pointer;
}

__device__ static inline void publish(uint64_t *pointer, uint64_t value)
{
    asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(pointer), "l"(value) : "memory");
}

/* A value that the host looks at now and then, in no order with anything else. */
__device__ static inline void write_for_host(uint64_t *pointer, uint64_t value)
{
    asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(pointer), "l"(value) : "memory");
}

#endif
#endif
