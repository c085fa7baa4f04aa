/* mlak_pool.h - a fixed set of compute threads that run numbered work items; shared by the cpu and reference backends.
 * The pool is its creator's. mlak_pool_run is called from one thread at a time; it waits, or does the work itself where
 * that is as good (one item, or a pool of one). */
#ifndef MLAK_POOL_H
#define MLAK_POOL_H

#include <stdint.h>

struct mlak_pool;

/* Start `threads` threads (0: one per processor this process may run on; 1: none). NULL if none could be started. */
struct mlak_pool *mlak_pool_new(uint32_t threads);
void mlak_pool_free(struct mlak_pool *pool);
uint32_t mlak_pool_threads(const struct mlak_pool *pool);

/* Call work(context, item, thread) once for each item 0..count-1, thread being 0..threads-1, and return when all
 * have returned. Items start in order. Does not allocate. */
void mlak_pool_run(struct mlak_pool *pool, uint32_t count, void (*work)(void *context, uint32_t item, uint32_t thread),
                   void *context);

#endif
