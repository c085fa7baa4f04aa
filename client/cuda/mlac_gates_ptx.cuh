/* mlac_gates_ptx.cuh - the instructions and words of CUDA that mlac_gates.cu uses. Under the emulator (MLAC_EMULATE) a
 * block is one thread of the processor. */
#ifndef MLAC_GATES_PTX_CUH
#define MLAC_GATES_PTX_CUH

#include <stdint.h>

#ifdef MLAC_EMULATE
#include <sched.h>
#include <time.h>

#define __device__
#define GATE_KERNEL(name, threads, parameter) extern "C" void name(const parameter)
#define GATE_SHARED
#define GATE_THREAD 0u
#define GATE_THREADS 1u

static inline void gate_barrier() {}
static inline void gate_pause()
{
    sched_yield();
}
static inline uint32_t gate_acquire(const uint32_t *pointer)
{
    return __atomic_load_n(pointer, __ATOMIC_ACQUIRE);
}
static inline uint64_t gate_acquire_64(const uint64_t *pointer)
{
    return __atomic_load_n(pointer, __ATOMIC_ACQUIRE);
}
static inline void gate_release(uint32_t *pointer, uint32_t value)
{
    __atomic_store_n(pointer, value, __ATOMIC_RELEASE);
}
static inline uint64_t gate_now_ns()
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

#else

#define GATE_KERNEL(name, threads, parameter)                                                                          \
    extern "C" __global__ __launch_bounds__(threads) void name(const __grid_constant__ parameter)
#define GATE_SHARED __shared__
#define GATE_THREAD threadIdx.x
#define GATE_THREADS blockDim.x

__device__ static inline void gate_barrier()
{
    __syncthreads();
}
__device__ static inline void gate_pause() {}
__device__ static inline uint32_t gate_acquire(const uint32_t *pointer)
{
    uint32_t value;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(pointer) : "memory");
    return value;
}
__device__ static inline uint64_t gate_acquire_64(const uint64_t *pointer)
{
    uint64_t value;
    asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(pointer) : "memory");
    return value;
}
__device__ static inline void gate_release(uint32_t *pointer, uint32_t value)
{
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(pointer), "r"(value) : "memory");
}
__device__ static inline uint64_t gate_now_ns()
{
    uint64_t now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    return now;
}

#endif
#endif
