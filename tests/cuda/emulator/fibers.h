/* fibers.h - what the two halves of the emulator share: the block that runs (emulator.cpp), of which Hopper's
 * instructions (hopper.cpp) are a part of their own. */
#ifndef FIBERS_H
#define FIBERS_H

#include "emulated_ptx.h"
#include "mlak_cuda.h"

#include <deque>
#include <map>
#include <mutex>
#include <set>
#include <ucontext.h>
#include <vector>

enum { MAX_THREADS = 1024, WARP = 32, WARPGROUP = 128, NAMED_BARRIERS = 16, STACK_BYTES = 128 << 10 };

typedef void kernel_function(const struct mlak_cuda_job job);

/* Those that must all arrive before any goes on; also, an mbarrier. */
struct meeting {
    uint32_t size, arrived;
    uint64_t held;
    void *arguments[WARP];
    int64_t bytes;    /* of an mbarrier: expected and not yet there */
    uint32_t joined;  /* of an mbarrier: arrivals beyond its size that are still to come */
    bool there;       /* of an mbarrier: the block's threads have met since it was made (barriers_meet) */
    const char *name; /* for whoever reads of a deadlock: what it is, and which; of an mbarrier, its address */
    uint32_t number;
};

struct copy {
    void *to;
    const void *from;
    bool valid;
    uint32_t group;
};

/* A product of a warpgroup, as one of its threads issued it. */
struct group_product {
    uint32_t a, b, columns;
    bool add, fp16;
    float *c;
    const uint32_t *own; /* a's registers; NULL: a lies in shared memory */
    uint32_t registers[4]; /* what they held when the product set off */
    uint32_t group;
};

/* Accumulators that products are at work on; the thread's own are NaN meanwhile. */
struct accumulators {
    float *c;
    uint32_t count;
    float values[128];
};

struct fiber {
    void *stack_pointer;
    ucontext_t context; /* where the switch is not written in assembly */
    unsigned char *stack;
    struct meeting *waits; /* NULL: it can run */
    uint64_t waits_for;    /* until waits->held passes it */
    uint32_t naps;         /* turns for which it gives way */
    bool done;
    std::vector<copy> copies;
    uint32_t groups; /* of copies, committed */
    bool begun;      /* products may touch its accumulators */
    std::vector<group_product> products;
    std::vector<accumulators> at_work;
    uint32_t product_groups; /* committed */
    std::set<const void *> acquired; /* maps */
};

struct thread_block {
    uint32_t index;
    fiber fibers[MAX_THREADS];
    meeting warps[MAX_THREADS / WARP], groups[MAX_THREADS / WARPGROUP], named[NAMED_BARRIERS], whole;
    meeting late;  /* of those who go on when nobody else can */
    uint32_t done; /* threads at their end */
    uint32_t slow[MAX_THREADS / WARPGROUP], turns; /* in disorder: eighths of their turns that warpgroups sit out */
    unsigned char *shared;
    std::map<uint32_t, meeting> barriers; /* by address */
};

/* Copies that land together, and what they tell their barrier then. */
struct flight {
    std::vector<copy> copies;
    meeting *barrier;
    uint32_t joined;
    int64_t bytes;
    const fiber *thread; /* whose copies land in their order; NULL: the copy engine's */
};

struct emulated_gpu {
    std::mutex one_at_a_time;
    thread_block block;         /* that runs */
    std::deque<flight> flights; /* in the order in which they set off */
    fiber scheduler;
    uint32_t current, threads, grid; /* thread that runs; of a block; blocks */
    size_t shared_size;              /* of a block */
    uint64_t disorder;               /* where random numbers come from; 0: there are none */
    kernel_function *kernel;
    const struct mlak_cuda_job *job;
};
extern emulated_gpu gpu;

/* A sentence on stderr, and the end. */
[[noreturn]] void fault(const char *what);

/* Run `grid` blocks of `threads` threads, one after the other, to their end. */
void emulate(kernel_function *kernel, uint32_t grid, uint32_t threads, size_t shared_bytes,
             const struct mlak_cuda_job *job);

/* The thread that runs. */
fiber *self();

/* In disorder a number below `n`, 1 or more; else 0. */
uint32_t draw(uint32_t n);

/* In disorder the current thread now and then gives way for some turns. */
void perturb();

/* Its warp, and its place there. */
meeting *warp();
uint32_t lane();

/* The current thread gives way until the meeting is held once more. */
void await_meeting(meeting *meeting);

/* Arrive; true for the last one, who must do the work and then call leave. */
bool meet(meeting *meeting, uint32_t place, void *argument);
void leave(meeting *meeting);

/* The same address, which has to be that of 16 bytes of the block's shared memory, aligned. */
const unsigned char *in_shared(const void *pointer);

/* What a copy does once it lands. */
void copy_land(const copy *copy);

/* ---- hopper.cpp ---- */

/* Let what is on its way land until a barrier has been passed. False: not one has. */
bool flights_land();

/* In disorder: let one of them land that may be the next, or none. */
void flights_perturb();

/* All threads of the block are at their end; nothing may be on its way to it any more. */
void block_ended();

#endif
