/* mlak_order_ptx.cuh - the instructions and words of CUDA that mlak_order.cuh uses. Under the emulator a block is one
 * thread of the processor, so that a gate may wait while other kernels are emulated. */
#ifndef MLAK_ORDER_PTX_CUH
#define MLAK_ORDER_PTX_CUH

#include "mlak_ptx.cuh"

#ifdef MLAK_EMULATE
#include <sched.h>
#include <time.h>

#define ORDER_KERNEL(name, threads, parameter) extern "C" void name(const parameter)
#define ORDER_SHARED
#define ORDER_THREAD 0u
#define ORDER_THREADS 1u

static inline void order_barrier() {}
static inline bool order_any(bool own)
{
    return own;
}
static inline void order_pause()
{
    sched_yield();
}
static inline uint32_t order_acquire(const uint32_t *pointer)
{
    return __atomic_load_n(pointer, __ATOMIC_ACQUIRE);
}
static inline void order_release(uint32_t *pointer, uint32_t value)
{
    __atomic_store_n(pointer, value, __ATOMIC_RELEASE);
}
static inline uint32_t order_look(const uint32_t *pointer)
{
    return __atomic_load_n(pointer, __ATOMIC_RELAXED);
}
static inline uint64_t order_now_ns()
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}
template <typename T> static inline void order_add(T *sum, T value)
{
    *sum += value;
}
static inline void order_least(uint32_t *least, uint32_t value)
{
    *least = value < *least ? value : *least;
}

#else

#define ORDER_KERNEL(name, threads, parameter)                                                                         \
    extern "C" __global__ __launch_bounds__(threads) void name(const __grid_constant__ parameter)
#define ORDER_SHARED __shared__
#define ORDER_THREAD threadIdx.x
#define ORDER_THREADS blockDim.x

__device__ static inline void order_barrier()
{
    __syncthreads();
}
/* A barrier; whether any thread of the block says so. */
__device__ static inline bool order_any(bool own)
{
    return __syncthreads_or(own);
}
__device__ static inline void order_pause() {}
__device__ static inline uint32_t order_acquire(const uint32_t *pointer)
{
    uint32_t value;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(pointer) : "memory");
    return value;
}
__device__ static inline void order_release(uint32_t *pointer, uint32_t value)
{
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(pointer), "r"(value) : "memory");
}
/* What the host writes now and then, in no order with anything else. */
__device__ static inline uint32_t order_look(const uint32_t *pointer)
{
    uint32_t value;
    asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(pointer) : "memory");
    return value;
}
__device__ static inline uint64_t order_now_ns()
{
    uint64_t now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    return now;
}
template <typename T> __device__ static inline void order_add(T *sum, T value)
{
    atomicAdd(sum, value);
}
__device__ static inline void order_least(uint32_t *least, uint32_t value)
{
    atomicMin(least, value);
}

#endif
#endif
