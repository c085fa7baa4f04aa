/* perturbed.h - what the perturbed kernels (perturbed.cu) tell the host when one of them waits for too long. */
#ifndef PERTURBED_H
#define PERTURBED_H

#include <stdint.h>

enum {
    PERTURBED_MOST_NS = 2000000000, /* a wait at a barrier in shared memory; less than 4 s, the clock's 32 bits */
    PERTURBED_WARPS = 12
};

/* Pinned host memory. `block`: that is told of, and 1 more; 0: nobody waited for too long. Of a warp 0, or
 * the barrier it waits for: its place in shared memory, in bytes; the parity of the phase; and 1. */
struct perturbed_wait {
    uint32_t barrier;
    uint16_t parity, there;
};
struct perturbed_report {
    uint32_t block, reserved;
    struct perturbed_wait waits[PERTURBED_WARPS];
};

#endif
