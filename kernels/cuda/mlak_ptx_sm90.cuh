/* mlak_ptx_sm90.cuh - instructions of sm_90a alone, under the names that mlak_wgmma.cuh uses: barriers that count
 * arrivals (mbarrier), products of a whole warpgroup out of shared memory (wgmma), and registers that change hands.
 *
 * A warpgroup is four warps; its products are 64 rows high, 16 of them a warp. Accumulators, of lane 4 g + i in warp w
 * and of columns 8 n..8 n + 7 (PTX ISA, "wgmma.mma_async, register fragment D"):
 *     c[4 n] (16 w + g, 8 n + 2 i)  c[4 n + 1] (.., + 1)  c[4 n + 2] (16 w + g + 8, ..)  c[4 n + 3] (.., + 1)
 *
 * Operands lie in chunks of 64 columns, [rows][64] 16-bit values, 128 bytes a row, of which 16-byte piece j of row r is
 * at piece j ^ (r % 8) ("128B swizzle"); a chunk begins at a multiple of 1,024 bytes. */
#ifndef MLAK_PTX_SM90_CUH
#define MLAK_PTX_SM90_CUH

#include "mlak_cuda.h"
#include "mlak_ptx.cuh"

/* How long what is fetched stays in the L2 cache, as createpolicy ("fractional", 1.0) encodes it. What comes once
 * should not push out what comes again: code, rows, parts. */
#define MLAK_COMES_ONCE 0x12f0000000000000ull  /* evict_first */
#define MLAK_COMES_AGAIN 0x1000000000000000ull /* evict_normal */

#ifdef MLAK_EMULATE
#include "emulated_ptx_sm90.h"
#else

/* ---- barriers ---- */

__device__ static inline void barrier_new(uint64_t *barrier, uint32_t arrivals)
{
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

/* All threads of the block, and the copy engine, see the barriers that one of them has made. */
__device__ static inline void barriers_meet(void)
{
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    __syncthreads();
}

__device__ static inline void barrier_arrive(uint64_t *barrier)
{
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

__device__ static inline void barrier_arrive_many(uint64_t *barrier, uint32_t arrivals)
{
    asm volatile("mbarrier.arrive.shared.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

/* As copy_async, of mlak_ptx.cuh, to a shared address. */
__device__ static inline void copy_async_to(uint32_t to, const void *from, bool valid)
{
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0)
                 : "memory");
}

/* A box of a tensor, by the copy engine: `map` is as the driver encodes it, and names the tensor's address and shape;
 * coordinates beyond it are zeros. Its bytes are told to `barrier`, where one thread arrives expecting them. */
__device__ static inline void copy_box(uint32_t to, const struct mlak_cuda_map *map, int32_t element, int32_t row,
                                       int32_t chunk, int32_t page, uint64_t *barrier, uint64_t stays)
{
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0], [%1, {%2, %3, %4, %5}], [%6], %7;" ::"r"(to),
                 "l"(map), "r"(element), "r"(row), "r"(chunk), "r"(page), "r"(shared_address(barrier)),
                 "l"(stays)
                 : "memory");
}

/* A box is wanted soon: it comes to the L2 cache. */
__device__ static inline void expect_box(const struct mlak_cuda_map *map, int32_t element, int32_t row, int32_t chunk,
                                         int32_t page, uint64_t stays)
{
    asm volatile("cp.async.bulk.prefetch.tensor.4d.L2.global.tile.L2::cache_hint "
                 "[%0, {%1, %2, %3, %4}], %5;" ::"l"(map),
                 "r"(element), "r"(row), "r"(chunk), "r"(page), "l"(stays)
                 : "memory");
}

/* The map is wanted soon. */
__device__ static inline void map_expect(const struct mlak_cuda_map *map)
{
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

/* This thread may have the copy engine use a map that was written where there may have been another before. */
__device__ static inline void map_acquire(const struct mlak_cuda_map *map)
{
    asm volatile("fence.proxy.tensormap::generic.acquire.sys [%0], 128;" ::"l"(map) : "memory");
}

__device__ static inline void barrier_arrive_expecting(uint64_t *barrier, uint32_t bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

/* One arrival more than the barrier's own number, once all copies of this thread so far have landed. */
__device__ static inline void barrier_join_after_copies(uint64_t *barrier)
{
    asm volatile("cp.async.mbarrier.arrive.shared.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

/* Until the barrier's phase of this parity has ended: 0 is that of the first, and 1 of the one before it, which has. */
__device__ static inline void barrier_wait(uint64_t *barrier, uint32_t parity)
{
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
                 "@done bra over;\n"
                 "bra again;\n"
                 "over:\n"
                 "}" ::"r"(shared_address(barrier)),
                 "r"(parity)
                 : "memory");
}

/* Named barrier `id`, 1..15, of `threads` threads, whole warps: none goes on before all have arrived. */
__device__ static inline void barrier_meet(uint32_t id, uint32_t threads)
{
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

/* What was written to shared memory by ordinary stores and copies and is seen by this thread is seen by the products
 * that follow. */
__device__ static inline void shared_to_products(void)
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/* As load_matrices of mlak_ptx.cuh, the other way: lane 8 m + r names where row r of matrix m goes. */
__device__ static inline void store_matrices(void *row, const uint32_t r[4])
{
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
                 "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
}

/* A value that is the same for a whole warp, and that the compiler takes for it. */
__device__ static inline uint32_t warp_uniform(uint32_t value)
{
    return __shfl_sync(0xffffffff, value, 0);
}

/* True for one lane of a warp whose lanes are all here: the same one each time. */
__device__ static inline bool warp_speaker(void)
{
    uint32_t speaks;
    asm volatile("{\n.reg .pred speaks;\n"
                 "elect.sync _|speaks, 0xffffffff;\n"
                 "selp.b32 %0, 1, 0, speaks;\n}" : "=r"(speaks));
    return speaks;
}

/* None of the warp goes on before all are here. */
__device__ static inline void warp_meet(void)
{
    __syncwarp();
}

/* Lane `lane`'s value. */
__device__ static inline int64_t shuffle(int64_t value, uint32_t lane)
{
    return __shfl_sync(0xffffffff, value, (int)lane);
}

/* ---- registers of a thread ---- */

template <int REGISTERS> __device__ static inline void registers_give(void)
{
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS> __device__ static inline void registers_take(void)
{
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

/* ---- products ---- */

/* Accumulators are touched by the products that follow. */
__device__ static inline void products_begin(void)
{
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ static inline void products_commit(void)
{
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int PENDING> __device__ static inline void products_wait(void)
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

/* Accumulators that products have written and that have been waited for: no use of them is moved before the wait. */
template <int COUNT> __device__ static inline void products_there(float c[COUNT])
{
#pragma unroll
    for (int i = 0; i < COUNT; i++)
        asm volatile("" : "+f"(c[i])::"memory");
}

/* Operands are named by the lower half of the instruction's descriptor: address / 16 and, 16 bits above, the distance
 * of neighbouring chunks / 16. The upper half is the same for all: 8 rows are 1,024 bytes apart, 128B swizzle. */
#define MLAK_OPERAND(name, half) "mov.b64 " name ", {" half ", 0x40000040};\n"

/* What the product sums over lies along a row (K-major); 16 columns are 32 bytes. */
__device__ static inline uint32_t operand_rows(const void *chunk)
{
    return (shared_address(chunk) & 0x3ffff) >> 4 | 1u << 16;
}

/* What it sums over runs down the columns (MN-major), the next 64 columns are the next chunk of `chunk_bytes`; 16 rows
 * are 2,048 bytes. */
__device__ static inline uint32_t operand_columns(const void *chunk, uint32_t chunk_bytes)
{
    return (shared_address(chunk) & 0x3ffff) >> 4 | chunk_bytes >> 4 << 16;
}

__device__ static inline uint32_t operand_move(uint32_t operand, uint32_t bytes)
{
    return operand + (bytes >> 4);
}

/* The same operand, but the compiler does not see that: so it adds to it where that is needed, and does not keep all
 * sums in registers. */
__device__ static inline uint32_t operand_here(uint32_t operand)
{
    asm volatile("" : "+r"(operand));
    return operand;
}

#define MLAK_8(c, i)                                                                                                   \
    "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]),        \
        "+f"(c[i + 7])

#define MLAK_REGISTERS_32 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
    "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
/* c = a b, or c += a b: 64 rows x 64 columns, 16 summed over; both operands' rows are summed over. */
#define MLAK_SCORES(name, type)                                                                                        \
    __device__ static inline void name(float c[32], uint32_t a, uint32_t b, bool add)                                  \
    {                                                                                                                  \
        asm volatile("{\n.reg .pred add;\n.reg .b64 a, b;\nsetp.ne.b32 add, %34, 0;\n"                                 \
                     MLAK_OPERAND("a", "%32") MLAK_OPERAND("b", "%33")                                                 \
                     "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {" MLAK_REGISTERS_32                \
                     "}, a, b, add, 1, 1, 0, 0;\n}"                                                                    \
                     : MLAK_8(c, 0), MLAK_8(c, 8), MLAK_8(c, 16), MLAK_8(c, 24)                                        \
                     : "r"(a), "r"(b), "r"((int)add));                                                                 \
    }
MLAK_SCORES(product_64x64_bf16, "bf16")
MLAK_SCORES(product_64x64_fp16, "f16")

#define MLAK_REGISTERS_128 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, " \
    "%23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, " \
    "%44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, " \
    "%65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, " \
    "%86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, " \
    "%106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, " \
    "%123, %124, %125, %126, %127"
#define MLAK_64(c, i)                                                                                                  \
    MLAK_8(c, i), MLAK_8(c, i + 8), MLAK_8(c, i + 16), MLAK_8(c, i + 24), MLAK_8(c, i + 32), MLAK_8(c, i + 40),        \
        MLAK_8(c, i + 48), MLAK_8(c, i + 56)

/* The same, 64 rows x 256 columns, and the sum runs down b's columns. With `own`, a is a thread's four registers of it:
 * of its warp's 16 rows x 16, as those of mma.m16n8k16. */
#define MLAK_VALUES(name, type)                                                                                        \
    __device__ static inline void name(float c[128], uint32_t a, uint32_t b, bool add)                                 \
    {                                                                                                                  \
        asm volatile("{\n.reg .pred add;\n.reg .b64 a, b;\nsetp.ne.b32 add, %130, 0;\n"                               \
                     MLAK_OPERAND("a", "%128") MLAK_OPERAND("b", "%129")                                               \
                     "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type " {" MLAK_REGISTERS_128              \
                     "}, a, b, add, 1, 1, 0, 1;\n}"                                                                    \
                     : MLAK_64(c, 0), MLAK_64(c, 64)                                                                   \
                     : "r"(a), "r"(b), "r"((int)add));                                                                 \
    }                                                                                                                  \
    __device__ static inline void name##_own(float c[128], const uint32_t a[4], uint32_t b, bool add)                  \
    {                                                                                                                  \
        asm volatile("{\n.reg .pred add;\n.reg .b64 b;\nsetp.ne.b32 add, %133, 0;\n"                                  \
                     MLAK_OPERAND("b", "%132")                                                                         \
                     "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type " {" MLAK_REGISTERS_128              \
                     "}, {%128, %129, %130, %131}, b, add, 1, 1, 1;\n}"                                                \
                     : MLAK_64(c, 0), MLAK_64(c, 64)                                                                   \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"((int)add));                             \
    }
MLAK_VALUES(product_64x256_bf16, "bf16")
MLAK_VALUES(product_64x256_fp16, "f16")

#endif
#endif
