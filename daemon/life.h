/* life.h - one page shared by the supervisor and one worker: the worker's signs of life.
 *
 * The supervisor creates it as a memfd, one per worker process, and passes it as a descriptor. The worker writes, the
 * supervisor only reads, so a worker that crashes or hangs leaves it as it was. Every member is accessed with relaxed
 * atomics. */
#ifndef MLAD_LIFE_H
#define MLAD_LIFE_H

#include <stdint.h>

struct mlad_life {
    uint64_t beat;      /* grows every 100 ms while the worker's loop turns */
    uint64_t progress;  /* work items done by the backend; grows while anything runs */
    uint64_t running;   /* decodes running now */
    uint64_t decodes;   /* decodes completed in this life */
};
_Static_assert(sizeof(struct mlad_life) == 32, "shared between processes");

#endif
