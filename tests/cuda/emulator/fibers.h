/* fibers.h - what the two halves of the emulator share: the block that runs (emulator.cpp), of which Hopper's
 * instructions (hopper.cpp) are a part of their own. */
#ifndef FIBERS_H
#define FIBERS_H

#include "emulated_ptx.h"
#include "mlak_cuda.h"

#include <mutex>
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
    bool done;
    std::vector<copy> copies;
    uint32_t groups; /* of copies, committed */
    bool begun;      /* products may touch its accumulators */
    std::vector<group_product> products;
    std::vector<accumulators> at_work;
    uint32_t product_groups; /* committed */
};

struct emulated_gpu {
    std::mutex one_at_a_time;
    fiber fibers[MAX_THREADS];
    meeting warps[MAX_THREADS / WARP], groups[MAX_THREADS / WARPGROUP], named[NAMED_BARRIERS], block;
    meeting late; /* of those who go on when nobody else can */
    fiber scheduler;
    uint32_t current, threads, block_index, grid;
    unsigned char *shared;
    size_t shared_size;
    kernel_function *kernel;
    const struct mlak_cuda_job *job;
};
extern emulated_gpu gpu;

/* A sentence on stderr, and the end. */
[[noreturn]] void fault(const char *what);

/* The thread's own warp, and its place there. */
meeting *warp();
uint32_t lane();

/* The current thread gives way until the meeting is held once more. */
void await_meeting(meeting *meeting);

/* Arrive; true for the last one, who must do the work and then call leave. */
bool meet(meeting *meeting, uint32_t place, void *argument);
void leave(meeting *meeting);

/* The same address, which has to be that of 16 bytes of shared memory, aligned. */
const unsigned char *in_shared(const void *pointer);

/* What a copy does once it lands. */
void copy_land(const copy *copy);

/* ---- hopper.cpp ---- */

/* A block begins; it ends, with nothing on its way any more. */
void hopper_begin();
void hopper_end();

/* Nobody can go on: let what is on its way land until a barrier has been passed; else, let go on who gave way. False:
 * nothing is on its way, and nobody gave way. */
bool hopper_go_on();

#endif
