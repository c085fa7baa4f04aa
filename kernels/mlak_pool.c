/* mlak_pool.c - compute threads that run numbered work items.
 *
 * A job is published in `cursor`: its upper half is the job's generation, its lower half the next item. A thread takes
 * an item by compare-and-swap of the whole word, so a thread that overslept a job can neither take items of the next
 * one nor run them with the old function. The runner returns when every item is done, not when every thread has looked
 * in: threads that were still asleep cost nothing.
 *
 * Threads with nothing to do spin for a few tens of microseconds, the distance between two launches under load, then
 * sleep on a futex. The pool owns its threads; they block all signals. */
#include "mlak_pool.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { SPINS = 1000 };                  /* pauses of about 15..50 ns each */
#define CLOSED UINT32_MAX               /* no item: the job's other members are being written */

struct worker { struct mlak_pool *pool; pthread_t thread; uint32_t index; };

/* All members from `cursor` on are shared and atomic. The three groups are written by different threads. */
struct mlak_pool {
    uint32_t threads;
    struct worker *workers;             /* [threads - 1] */
    _Alignas(64) uint64_t cursor;
    uint32_t count;
    void (*work)(void *context, uint32_t item, uint32_t thread);
    void *context;
    _Alignas(64) uint32_t generation;   /* futex: workers sleep on it */
    uint32_t sleepers;
    bool stopping;
    _Alignas(64) uint32_t remaining;    /* futex: the runner sleeps on it; items not done */
    bool runner_sleeps;
};

static inline void relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void futex_wait(uint32_t *word, uint32_t value)
{
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}

static void futex_wake(uint32_t *word, uint32_t waiters)
{
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, waiters, NULL, NULL, 0);
}

/* Run items of the current job until none is left. */
static void take_items(struct mlak_pool *pool, uint32_t thread)
{
    uint64_t cursor = __atomic_load_n(&pool->cursor, __ATOMIC_ACQUIRE);
    for (;;) {
        /* Acquired: a value of the next job's would bring the closed cursor with it, and the exchange below fails. */
        uint32_t count = __atomic_load_n(&pool->count, __ATOMIC_ACQUIRE);
        void (*work)(void *, uint32_t, uint32_t) = __atomic_load_n(&pool->work, __ATOMIC_ACQUIRE);
        void *context = __atomic_load_n(&pool->context, __ATOMIC_ACQUIRE);
        uint32_t item = (uint32_t)cursor;
        if (item >= count)
            return;
        if (!__atomic_compare_exchange_n(&pool->cursor, &cursor, cursor + 1, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE))
            continue;
        work(context, item, thread);
        if (__atomic_sub_fetch(&pool->remaining, 1, __ATOMIC_SEQ_CST) == 0 &&
            __atomic_load_n(&pool->runner_sleeps, __ATOMIC_SEQ_CST))
            futex_wake(&pool->remaining, 1);
        cursor = __atomic_load_n(&pool->cursor, __ATOMIC_ACQUIRE);
    }
}

/* Return the generation once it differs from `seen`. */
static uint32_t await_generation(struct mlak_pool *pool, uint32_t seen)
{
    uint32_t generation;
    for (int i = 0; i < SPINS; i++) {
        generation = __atomic_load_n(&pool->generation, __ATOMIC_ACQUIRE);
        if (generation != seen)
            return generation;
        relax();
    }
    __atomic_add_fetch(&pool->sleepers, 1, __ATOMIC_SEQ_CST);
    while ((generation = __atomic_load_n(&pool->generation, __ATOMIC_SEQ_CST)) == seen)
        futex_wait(&pool->generation, seen);
    __atomic_sub_fetch(&pool->sleepers, 1, __ATOMIC_SEQ_CST);
    return generation;
}

static void *worker_main(void *argument)
{
    const struct worker *worker = argument;
    struct mlak_pool *pool = worker->pool;
    uint32_t seen = 0;
    for (;;) {
        seen = await_generation(pool, seen);
        if (__atomic_load_n(&pool->stopping, __ATOMIC_ACQUIRE))
            return NULL;
        take_items(pool, worker->index);
    }
}

/* A new generation; wakes up to `wanted` sleepers. */
static void announce(struct mlak_pool *pool, uint32_t wanted)
{
    __atomic_add_fetch(&pool->generation, 1, __ATOMIC_SEQ_CST);
    if (wanted > 0 && __atomic_load_n(&pool->sleepers, __ATOMIC_SEQ_CST) > 0)
        futex_wake(&pool->generation, wanted);
}

void mlak_pool_run(struct mlak_pool *pool, uint32_t count, void (*work)(void *context, uint32_t item, uint32_t thread),
                   void *context)
{
    if (pool->threads == 1 || count <= 1) {
        for (uint32_t item = 0; item < count; item++)
            work(context, item, 0);
        return;
    }
    uint64_t job = ((__atomic_load_n(&pool->cursor, __ATOMIC_RELAXED) >> 32) + 1) << 32;
    __atomic_store_n(&pool->cursor, job | CLOSED, __ATOMIC_SEQ_CST);
    __atomic_store_n(&pool->count, count, __ATOMIC_RELEASE);
    __atomic_store_n(&pool->work, work, __ATOMIC_RELEASE);
    __atomic_store_n(&pool->context, context, __ATOMIC_RELEASE);
    __atomic_store_n(&pool->remaining, count, __ATOMIC_RELEASE);
    __atomic_store_n(&pool->cursor, job, __ATOMIC_SEQ_CST);
    announce(pool, count - 1 < pool->threads - 1 ? count - 1 : pool->threads - 1);

    take_items(pool, 0);
    for (int i = 0; i < SPINS; i++) {
        if (__atomic_load_n(&pool->remaining, __ATOMIC_ACQUIRE) == 0)
            return;
        relax();
    }
    __atomic_store_n(&pool->runner_sleeps, true, __ATOMIC_SEQ_CST);
    uint32_t left;
    while ((left = __atomic_load_n(&pool->remaining, __ATOMIC_SEQ_CST)) > 0)
        futex_wait(&pool->remaining, left);
    __atomic_store_n(&pool->runner_sleeps, false, __ATOMIC_SEQ_CST);
}

static uint32_t usable_processors(void)
{
    for (int limit = 1024; limit <= 1 << 20; limit *= 4) {
        cpu_set_t *set = CPU_ALLOC((size_t)limit);
        if (set == NULL)
            break;
        size_t size = CPU_ALLOC_SIZE((size_t)limit);
        int count = sched_getaffinity(0, size, set) == 0 ? CPU_COUNT_S(size, set) : 0;
        CPU_FREE(set);
        if (count > 0)
            return (uint32_t)count;
    }
    return 1;
}

struct mlak_pool *mlak_pool_new(uint32_t threads)
{
    uint32_t wanted = threads > 0 ? threads : usable_processors();
    struct mlak_pool *pool = aligned_alloc(64, sizeof *pool);
    struct worker *workers = calloc(wanted, sizeof *workers);
    if (pool == NULL || workers == NULL) {
        free(pool);
        free(workers);
        return NULL;
    }
    *pool = (struct mlak_pool){.threads = 1, .workers = workers, .cursor = CLOSED};

    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (pool->threads < wanted) {
        struct worker *worker = &workers[pool->threads - 1];
        *worker = (struct worker){.pool = pool, .index = pool->threads};
        if (pthread_create(&worker->thread, NULL, worker_main, worker) != 0)
            break;
        pthread_setname_np(worker->thread, "mlak-compute");
        pool->threads++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (wanted > 1 && pool->threads == 1) {
        mlak_pool_free(pool);
        return NULL;
    }
    return pool;
}

void mlak_pool_free(struct mlak_pool *pool)
{
    if (pool == NULL)
        return;
    __atomic_store_n(&pool->stopping, true, __ATOMIC_RELEASE);
    announce(pool, pool->threads - 1);
    for (uint32_t i = 0; i + 1 < pool->threads; i++)
        pthread_join(pool->workers[i].thread, NULL);
    free(pool->workers);
    free(pool);
}

uint32_t mlak_pool_threads(const struct mlak_pool *pool)
{
    return pool->threads;
}
