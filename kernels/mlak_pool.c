/* mlak_pool.c - compute threads that run numbered work items.
 *
 * A job is published in `cursor`: its upper half is the job's generation, its lower half the next item. A thread takes
 * an item by compare-and-swap of the whole word, so a thread that overslept a job can neither take items of the next
 * one nor run them with the old function. The runner returns when every item is done, not when every thread has looked
 * in: threads that were still asleep cost nothing.
 *
 * The runner itself only waits, unless there is nothing to share. A pool with a thread for each processor binds each
 * thread to its own: left alone, a scheduler may wake two on one processor and leave the other idle, for milliseconds,
 * above all in a virtual machine, where an idle processor looks like one that the host has taken away.
 *
 * Threads with nothing to do look out for more for about 100 microseconds, the distance between two launches under
 * load, giving way to whoever else can run; then they sleep on a futex. The pool owns its threads; they block all
 * signals. */
#include "mlak_pool.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { PAUSES = 100, PATIENCE_NS = 100000 };
#define CLOSED UINT32_MAX               /* no item: the job's other members are being written */

struct worker { struct mlak_pool *pool; pthread_t thread; uint32_t index; };

/* All members from `cursor` on are shared and atomic. The three groups are written by different threads. */
struct mlak_pool {
    uint32_t threads;                   /* that run items: the workers, or the runner alone */
    uint32_t started;                   /* workers */
    struct worker *workers;
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

/* How long a thread has looked out for something; starts at zero. */
struct patience { uint32_t looks; uint64_t ends; };

/* Pause before looking again; false once it is time to sleep instead. */
static bool look_again(struct patience *patience)
{
    if (patience->looks++ < PAUSES) {
        relax();
        return true;
    }
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    uint64_t now = (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
    if (patience->ends == 0)
        patience->ends = now + PATIENCE_NS;
    sched_yield();
    return now < patience->ends;
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
    struct patience patience = {0};
    do {
        generation = __atomic_load_n(&pool->generation, __ATOMIC_ACQUIRE);
        if (generation != seen)
            return generation;
    } while (look_again(&patience));
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
    announce(pool, count < pool->threads ? count : pool->threads);

    struct patience patience = {0};
    do {
        if (__atomic_load_n(&pool->remaining, __ATOMIC_ACQUIRE) == 0)
            return;
    } while (look_again(&patience));
    __atomic_store_n(&pool->runner_sleeps, true, __ATOMIC_SEQ_CST);
    uint32_t left;
    while ((left = __atomic_load_n(&pool->remaining, __ATOMIC_SEQ_CST)) > 0)
        futex_wait(&pool->remaining, left);
    __atomic_store_n(&pool->runner_sleeps, false, __ATOMIC_SEQ_CST);
}

/* Processors that this process may run on. */
struct processors { cpu_set_t *set; size_t size; int limit; uint32_t count; };

static struct processors usable_processors(void)
{
    for (int limit = 1024; limit <= 1 << 20; limit *= 4) {
        struct processors usable = {
            .set = CPU_ALLOC((size_t)limit), .size = CPU_ALLOC_SIZE((size_t)limit), .limit = limit};
        if (usable.set == NULL)
            break;
        if (sched_getaffinity(0, usable.size, usable.set) == 0) {
            usable.count = (uint32_t)CPU_COUNT_S(usable.size, usable.set);
            return usable;
        }
        CPU_FREE(usable.set);
    }
    return (struct processors){.count = 1};
}

/* Bind the n-th thread to the n-th usable processor. Refused in some containers; then it runs unbound. */
static void bind_to(pthread_t thread, const struct processors *usable, uint32_t n)
{
    cpu_set_t *one = CPU_ALLOC((size_t)usable->limit);
    for (int processor = 0; one != NULL && processor < usable->limit; processor++) {
        if (!CPU_ISSET_S((size_t)processor, usable->size, usable->set) || n-- > 0)
            continue;
        CPU_ZERO_S(usable->size, one);
        CPU_SET_S((size_t)processor, usable->size, one);
        pthread_setaffinity_np(thread, usable->size, one);
        break;
    }
    CPU_FREE(one);
}

/* Start up to `wanted` threads; how many did. */
static uint32_t start_workers(struct mlak_pool *pool, uint32_t wanted, const struct processors *usable)
{
    sigset_t all, before;
    uint32_t started = 0;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (; started < wanted; started++) {
        struct worker *worker = &pool->workers[started];
        *worker = (struct worker){.pool = pool, .index = started};
        if (pthread_create(&worker->thread, NULL, worker_main, worker) != 0)
            break;
        pthread_setname_np(worker->thread, "mlak-compute");
        if (wanted == usable->count)
            bind_to(worker->thread, usable, started);
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return started;
}

struct mlak_pool *mlak_pool_new(uint32_t threads)
{
    struct processors usable = usable_processors();
    uint32_t wanted = threads > 0 ? threads : usable.count;
    struct mlak_pool *pool = aligned_alloc(64, sizeof *pool);
    struct worker *workers = calloc(wanted, sizeof *workers);
    if (pool == NULL || workers == NULL) {
        free(pool);
        free(workers);
        pool = NULL;
    } else {
        *pool = (struct mlak_pool){.threads = 1, .workers = workers, .cursor = CLOSED};
        if (wanted > 1)
            pool->started = start_workers(pool, wanted, &usable);
        if (pool->started > 1)
            pool->threads = pool->started;
    }
    CPU_FREE(usable.set);
    if (pool != NULL && wanted > 1 && pool->started == 0) {
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
    announce(pool, pool->started);
    for (uint32_t i = 0; i < pool->started; i++)
        pthread_join(pool->workers[i].thread, NULL);
    free(pool->workers);
    free(pool);
}

uint32_t mlak_pool_threads(const struct mlak_pool *pool)
{
    return pool->threads;
}
