/* perturbed.cu - the kernels of the cuda backend for Hopper, out of step: each warp sleeps for a while that nobody can
 * foresee before it waits, arrives or sets off a copy, some roles far longer than others; shared memory holds NaN when
 * a kernel begins; and a wait at an mbarrier that lasts too long is told to the host (perturbed.h) and ends in a trap.
 * Results have the bits of the plain kernels'. Nothing changes in the kernels' sources: the words that they use have
 * another meaning here. */
#include "mlak_ptx_sm90.cuh"
#include "perturbed.h"

/* ---- out of step ---- */

__device__ static inline uint32_t perturbed_ns(void)
{
    uint32_t ns;
    asm volatile("mov.u32 %0, %%globaltimer_lo;" : "=r"(ns));
    return ns;
}

#define PERTURBED_MIX(x)                                                                                               \
    "shr.u32 other, " x ", 16;\nxor.b32 " x ", " x ", other;\nmul.lo.u32 " x ", " x ", 0x7feb352d;\n"                 \
    "shr.u32 other, " x ", 15;\nxor.b32 " x ", " x ", other;\nmul.lo.u32 " x ", " x ", 0x846ca68b;\n"                 \
    "shr.u32 other, " x ", 16;\nxor.b32 " x ", " x ", other;\n"

/* Up to 4 us, mostly far less; one in four groups of four warps sleeps eight times as long as the others, for a
 * millisecond or so. A warp's threads agree on it as far as they run together, and there is no branch: what follows may
 * be an instruction of the whole warp. Assembly, of which the compiler moves nothing in among products. */
__device__ static inline void perturb(void)
{
    asm volatile("{\n.reg .pred fast;\n.reg .b32 clock, warp, slow, other;\n"
                 "mov.u32 clock, %%clock;\n"
                 "mov.u32 warp, %%tid.x;\n"
                 "shr.u32 warp, warp, %0;\n"
                 "mov.u32 slow, %%ctaid.x;\n"
                 "mad.lo.u32 warp, slow, 32, warp;\n"
                 "shr.u32 slow, warp, 2;\n"
                 "shr.u32 other, clock, 21;\n"
                 "mad.lo.u32 slow, slow, 0x9e3779b9, other;\n" PERTURBED_MIX("slow")
                 "and.b32 slow, slow, 3;\n"
                 "mad.lo.u32 warp, warp, 0x85ebca6b, clock;\n" PERTURBED_MIX("warp")
                 "shr.u32 other, warp, 28;\n"
                 "bfe.u32 warp, warp, 4, 12;\n"
                 "shr.u32 warp, warp, other;\n"
                 "setp.ne.u32 fast, slow, 0;\n"
                 "@fast shr.u32 warp, warp, 3;\n"
                 "nanosleep.u32 warp;\n}" ::"n"(5)
                 : "memory");
}

/* ---- what a kernel begins with ---- */

__device__ static inline void perturbed_begin(void)
{
    for (uint32_t i = threadIdx.x; i < shared_bytes() / 4; i += blockDim.x)
        ((uint32_t *)(void *)mlak_shared)[i] = 0xffffffff;
    shared_to_products(); /* and to copies */
    __syncthreads();
    perturb();
}

/* ---- waits that end ---- */

/* Where the host wants to hear of it, or NULL; and the block, counted from 1, that tells. */
extern "C" {
__device__ struct perturbed_report *perturbed_report_at;
__device__ uint32_t perturbed_teller;
}
static_assert(sizeof(struct perturbed_wait) == 8 && offsetof(struct perturbed_report, waits) == 8 &&
                  PERTURBED_WARPS == 12 && PERTURBED_MOST_NS == 2000000000,
              "numbers below");

/* All warps of the first block where one waits for too long tell what they wait for; half a second later it is over.
 * One piece of assembly: between products, the compiler would keep apart what it sees of branches. */
__device__ static inline void perturbed_wait(uint64_t *barrier, uint32_t parity)
{
    perturb();
    asm volatile("{\n"
                 ".reg .pred yes;\n"
                 ".reg .b32 begin, now, block, warp, word;\n"
                 ".reg .b64 report, at;\n"
                 "mov.u32 begin, %%globaltimer_lo;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.shared.b64 yes, [%0], %1;\n"
                 "@yes bra over;\n"
                 "mov.u32 now, %%globaltimer_lo;\n"
                 "sub.u32 now, now, begin;\n"
                 "setp.lt.u32 yes, now, 2000000000;\n"
                 "@yes bra again;\n"

                 "ld.global.u64 report, [perturbed_report_at];\n"
                 "setp.eq.u64 yes, report, 0;\n"
                 "@yes bra told;\n"
                 "mov.u32 block, %%ctaid.x;\n"
                 "add.u32 block, block, 1;\n"
                 "atom.global.cas.b32 word, [perturbed_teller], 0, block;\n"
                 "setp.ne.u32 yes, word, 0;\n"
                 "setp.ne.and.u32 yes, word, block, yes;\n"
                 "@yes bra told;\n"
                 "mov.u32 warp, %%tid.x;\n"
                 "shr.u32 warp, warp, 5;\n"
                 "mad.wide.u32 at, warp, 8, report;\n"
                 "mov.u32 word, mlak_shared;\n"
                 "sub.u32 word, %0, word;\n"
                 "or.b32 now, %1, 0x10000;\n"
                 "st.volatile.global.v2.u32 [at + 8], {word, now};\n"
                 "st.volatile.global.u32 [report], block;\n"
                 "membar.sys;\n"
                 "told:\n"
                 "mov.u32 begin, %%globaltimer_lo;\n"
                 "linger:\n"
                 "nanosleep.u32 100000;\n"
                 "mov.u32 now, %%globaltimer_lo;\n"
                 "sub.u32 now, now, begin;\n"
                 "setp.lt.u32 yes, now, 500000000;\n"
                 "@yes bra linger;\n"
                 "trap;\n"
                 "over:\n"
                 "}" ::"r"(shared_address(barrier)),
                 "r"(parity)
                 : "memory");
}

/* ---- the kernels' words ---- */

/* Those who compute sleep here and at fences instead of before the arrivals that follow: among branches of a warp's
 * lanes, the compiler would compute products one after the other (C7520). */
template <int PENDING> __device__ static inline void perturbed_products_wait(void)
{
    products_wait<PENDING>();
    perturb();
}

#define kernel_begins() perturbed_begin()
#define barrier_wait(barrier, parity) perturbed_wait(barrier, parity)
#define barrier_arrive_many(barrier, arrivals) (perturb(), barrier_arrive_many(barrier, arrivals))
#define barrier_arrive_expecting(barrier, bytes) (perturb(), barrier_arrive_expecting(barrier, bytes))
#define products_wait perturbed_products_wait
#define shared_to_products() (perturb(), shared_to_products())
#define barrier_join_after_copies(barrier) (perturb(), barrier_join_after_copies(barrier))
#define barrier_meet(id, threads) (perturb(), barrier_meet(id, threads))
#define copy_box(...) (perturb(), copy_box(__VA_ARGS__))
#define barriers_meet() (perturb(), barriers_meet())
#define warp_meet() (perturb(), warp_meet())
#define warp_speaker() (perturb(), warp_speaker())
#define await_kernel_before() (perturb(), await_kernel_before())
#define let_next_kernel_start() (perturb(), let_next_kernel_start())
#define __syncthreads() (perturb(), __syncthreads())

#include "mlak_cuda.cu"

/* ---- beside them ---- */

/* Nothing, on a processor's shared memory: blocks of other kernels have to wait for it to end. */
extern "C" __global__ void perturbed_hog(uint32_t ns)
{
    for (uint32_t begin = perturbed_ns(); perturbed_ns() - begin < ns;)
        __nanosleep(1000);
}
