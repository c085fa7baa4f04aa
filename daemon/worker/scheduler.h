/* scheduler.h - which decode runs next, and running it.
 *
 * Each session has a queue; a queue's decodes run in the order they came. Queues take turns (round robin), one slice
 * each: at most MLAD_SLICE_REQUESTS requests and, by the backend's estimate, at most about MLAD_SLICE_NS, so a session
 * that floods or sends huge batches delays each other one by a slice at most. One slice runs at a time, on the launch
 * thread; one that is expected to take less than MLAD_INLINE_NS runs at once on the loop thread, which spares two
 * wake-ups. A device that prepares batches itself (a GPU) gets slices of requests instead of rows, always on the launch
 * thread.
 *
 * The worker owns the scheduler, a session its queue; decodes are the scheduler's. Everything here belongs to the loop
 * thread but the rows of a slice while the launch thread has it. Submitting allocates only until the highest number of
 * decodes in flight has been seen once. */
#ifndef MLAD_SCHEDULER_H
#define MLAD_SCHEDULER_H

#include "launcher.h"
#include "plan.h"
#include "stats.h"

#include <sys/queue.h>

enum { MLAD_SLICE_REQUESTS = 1024, MLAD_SLICE_NS = 100000000, MLAD_INLINE_NS = 50000 };

struct mlad_queue;

struct mlad_decode {
    STAILQ_ENTRY(mlad_decode) next;
    struct mlad_queue *queue;
    struct mlad_plan *plan;
    uint32_t sequence;
    uint32_t done;  /* requests that have run */
    uint32_t width; /* requests to try in the next slice */
    bool cancelled; /* its session has gone while a slice was running */
    int32_t *cu_q;  /* a copy that lasts from slice to slice; NULL: one slice, or no cu_q */
    uint64_t received, queued, launched, completed; /* nanoseconds, monotonic; 0: not yet */
    uint64_t kv_tokens;                             /* of requests that completed */
    uint32_t failed;                                /* requests */
    uint32_t n_failures;
    struct mlap_failure *failures; /* [MLAP_MAX_FAILURES_LISTED], NULL while nothing failed */
};

struct mlad_queue {
    TAILQ_ENTRY(mlad_queue) turn;
    STAILQ_HEAD(, mlad_decode) decodes;
    struct mlad_user *user;
    uint32_t in_flight; /* decodes queued or running */
    /* A decode has ended, well or with `fault`. Called with it already uncounted; must not submit or cancel. Not called
     * with a fault for cancelled decodes: then `decode` is NULL, and only in_flight has changed. */
    void (*ended)(struct mlad_queue *queue, const struct mlad_decode *decode, const struct mlap_fault *fault);
};

struct mlad_scheduler {
    const struct mlak_backend *backend;
    struct mlak_device *device;
    struct mlad_stats *stats;
    struct mlad_launcher launcher;
    uint32_t queue_limit;           /* decodes that may wait */
    bool draining;                  /* refuse new decodes */
    uint32_t queued, running;       /* decodes not yet started; started and not complete */
    uint32_t ordered;               /* rounds in stream order, see ordered.h */
    TAILQ_HEAD(, mlad_queue) turns; /* queues with a decode to run, the next one first */
    STAILQ_HEAD(, mlad_decode) spare;
    struct mlak_row *rows; /* [MLAD_SLICE_REQUESTS] */
    int32_t *cu_q;         /* [MLAK_MAX_BATCH + 1], of the slice being run */
    struct mlad_decode *launching;
    uint32_t slice;                                 /* requests of it in `rows` */
    uint64_t ended;                                 /* nanoseconds, monotonic: when a decode last did */
    void (*idle)(struct mlad_scheduler *scheduler); /* nothing is queued or running any more */
    void (*lost)(struct mlad_scheduler *scheduler, const char *why); /* the device is: does not return */
};

/* False: no memory or no thread. The device stays the caller's, and the scheduler lives until the process ends. */
bool mlad_scheduler_start(struct mlad_scheduler *scheduler, uv_loop_t *loop, const struct mlak_backend *backend,
                          struct mlak_device *device, struct mlad_stats *stats,
                          void (*idle)(struct mlad_scheduler *scheduler),
                          void (*lost)(struct mlad_scheduler *scheduler, const char *why));

void mlad_queue_init(struct mlad_queue *queue, struct mlad_user *user,
                     void (*ended)(struct mlad_queue *, const struct mlad_decode *, const struct mlap_fault *));

/* Queue a decode of `plan` (a reference is taken), whose message was read at `received`. It may have ended on return.
 * MLAP_code_DRAINING, BUSY or MEMORY: nothing was queued. */
enum mlap_code mlad_scheduler_submit(struct mlad_scheduler *scheduler, struct mlad_queue *queue, struct mlad_plan *plan,
                                     uint32_t sequence, uint64_t received, struct mlap_fault *fault);

/* Whether a decode has just ended and nothing runs: the next one is likely to come at once. */
bool mlad_scheduler_lingers(const struct mlad_scheduler *scheduler);

/* So many rounds in stream order more, or less. */
void mlad_scheduler_ordered(struct mlad_scheduler *scheduler, int more);

/* Drop all decodes of the queue; one that is running stays in flight until its slice has ended. */
void mlad_scheduler_cancel(struct mlad_scheduler *scheduler, struct mlad_queue *queue);

#endif
