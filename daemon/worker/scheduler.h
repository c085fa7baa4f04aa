/* scheduler.h - which decodes run next, and running them.
 *
 * Each session has a queue; a queue's decodes run in the order they came, or together where none writes what another
 * reads or writes. Whatever comes while a launch runs waits, and the next launch takes of it what can run together,
 * from all queues: no decode waits for company. A launch that is expected to take less than MLAD_INLINE_NS runs at once
 * on the loop thread, which spares two wake-ups; any other on a launch thread, as do all of a device that prepares
 * batches itself (a GPU).
 *
 * A device may run two launches at once: then the way of one from its end through the clients to the next is hidden
 * behind the other. The second begins as soon as as many decodes wait as run in the first: so tenants that submit anew
 * when they are answered settle in two halves, not in ever smaller launches, and one that is beside a single large
 * decode does not wait for its end.
 *
 * Who goes first, when not all fit: deficit round robin on KV tokens. A queue pays for the keys of its decodes and may
 * go while it is not in debt; when nobody else can go, all are given quanta of MLAD_QUANTUM, and so is a queue that a
 * launch left out. So a launch is never kept small for fairness, a tenant with short decodes goes before one with long
 * ones, and a queue in debt waits for no more launches than it owes quanta. Queues of high priority go before normal
 * ones; but once MLAD_PATIENCE launches in a row took nothing of the normal queue that has waited longest, normal ones
 * go first.
 *
 * How much fits: MLAD_SLICE_REQUESTS requests of MLAD_PARTS decodes, with MLAD_LAUNCH_TOKENS keys (a GPU's; as many
 * keys a request as the session's last slice had) or MLAD_LAUNCH_NS by the backend's estimate (others'). A decode that
 * is larger runs alone, so that no short one has to wait for its end, and never beside another such; one with more
 * requests, or an estimate above MLAD_SLICE_NS, in slices of several launches.
 *
 * The worker owns the scheduler, a session its queue; decodes are the scheduler's. Everything here belongs to the loop
 * thread but the rows and parts of a launch while its launch thread has it. Submitting allocates only until the highest
 * number of decodes in flight has been seen once. */
#ifndef MLAD_SCHEDULER_H
#define MLAD_SCHEDULER_H

#include "launcher.h"
#include "plan.h"
#include "stats.h"

#include <sys/queue.h>

enum {
    MLAD_SLICE_REQUESTS = 1024,
    MLAD_PARTS = 64,
    MLAD_LAUNCHES = 2, /* at once */
    MLAD_SLICE_NS = 100000000,
    MLAD_LAUNCH_NS = 2000000,
    MLAD_INLINE_NS = 50000,
    MLAD_QUANTUM = 1 << 16,       /* KV tokens */
    MLAD_LAUNCH_TOKENS = 1 << 18, /* KV tokens: about 0.1 ms of an H100 */
    MLAD_PATIENCE = 7             /* launches */
};
enum mlad_priority { MLAD_NORMAL, MLAD_HIGH, MLAD_PRIORITIES };

struct mlad_queue;

struct mlad_decode {
    STAILQ_ENTRY(mlad_decode) next;
    struct mlad_queue *queue;
    struct mlad_plan *plan;
    uint32_t sequence;
    uint32_t done;  /* requests that have run */
    uint32_t width; /* requests to try in the next slice */
    bool running;   /* a slice of it does */
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
    struct mlad_decode *next; /* the first that is not, or not whole, in a launch; NULL: none, and no turn */
    struct mlad_user *user;
    enum mlad_priority priority;
    int64_t balance;      /* KV tokens; a debt if negative */
    uint64_t per_request; /* KV tokens, in its last slice: what the next one will take, as far as one knows; 0: none */
    uint64_t period;      /* of the scheduler's, to which the balance belongs */
    uint64_t launch, left_out; /* the last ones, by number, that took anything of it; that had no place for it */
    uint32_t running;     /* slices in launches */
    uint32_t in_flight;   /* decodes queued or running */
    /* A decode has ended, well or with `fault`. Called with it already uncounted; must not submit or cancel. Not called
     * with a fault for cancelled decodes: then `decode` is NULL, and only in_flight has changed. */
    void (*ended)(struct mlad_queue *queue, const struct mlad_decode *decode, const struct mlap_fault *fault);
};

/* A decode's part of a launch. */
struct mlad_slice {
    struct mlad_decode *decode;
    uint64_t cost; /* KV tokens charged */
};

struct mlad_launch {
    struct mlad_scheduler *scheduler;
    struct mlad_launcher launcher;
    bool running;              /* or being put together; if not, it has no slices */
    uint32_t n_slices, n_rows;
    uint64_t tokens, estimate; /* KV tokens, nanoseconds: of all slices, as far as one knows */
    struct mlad_slice slices[MLAD_PARTS];
    struct mlak_part *parts;   /* [MLAD_PARTS]: of each slice; their rows follow one another */
    struct mlak_row *rows;     /* [MLAD_SLICE_REQUESTS] */
};

TAILQ_HEAD(mlad_turns, mlad_queue);

struct mlad_scheduler {
    const struct mlak_backend *backend;
    struct mlak_device *device;
    struct mlad_stats *stats;
    uint32_t queue_limit;           /* decodes that may wait */
    bool draining;                  /* refuse new decodes */
    uint32_t queued, running;       /* decodes not yet started; started and not complete */
    uint32_t ordered;               /* rounds in stream order, see ordered.h */
    struct mlad_turns turns[MLAD_PRIORITIES]; /* queues with a decode to run, the next one first */
    uint32_t passed_over; /* launches in a row that took nothing of the normal queue that had waited longest */
    uint64_t launches;                        /* so far, and attempts at one */
    uint64_t period; /* of work without a pause: debts are forgotten in a pause */
    STAILQ_HEAD(, mlad_decode) spare;
    int32_t *cu_q; /* [MLAK_MAX_BATCH + 1], of the slice being prepared */
    uint32_t n_launches, in_flight; /* launches at once: as many as the device runs; those that run */
    bool changed; /* something was queued, or has ended, since it was last seen whether another launch is due */
    struct mlad_launch launch[MLAD_LAUNCHES];
    uint64_t ended;                                 /* nanoseconds, monotonic: when a decode last did */
    void (*idle)(struct mlad_scheduler *scheduler); /* nothing is queued or running any more */
    void (*lost)(struct mlad_scheduler *scheduler, const char *why); /* the device is: does not return */
};

/* False: no memory or no thread. The device stays the caller's, and the scheduler lives until the process ends. */
bool mlad_scheduler_start(struct mlad_scheduler *scheduler, uv_loop_t *loop, const struct mlak_backend *backend,
                          struct mlak_device *device, struct mlad_stats *stats,
                          void (*idle)(struct mlad_scheduler *scheduler),
                          void (*lost)(struct mlad_scheduler *scheduler, const char *why));

void mlad_queue_init(struct mlad_queue *queue, struct mlad_user *user, enum mlad_priority priority,
                     void (*ended)(struct mlad_queue *, const struct mlad_decode *, const struct mlap_fault *));

/* Queue a decode of `plan` (a reference is taken), whose message was read at `received`; mlad_scheduler_run is due once
 * all that came with it is queued. MLAP_code_DRAINING, BUSY or MEMORY: nothing was queued. */
enum mlap_code mlad_scheduler_submit(struct mlad_scheduler *scheduler, struct mlad_queue *queue, struct mlad_plan *plan,
                                     uint32_t sequence, uint64_t received, struct mlap_fault *fault);

/* Launch what waits, if another launch is due: after whatever submitted, and after launches have ended, which the loop
 * tells. Small launches may have ended on return. */
void mlad_scheduler_run(struct mlad_scheduler *scheduler);

/* Whether a decode has just ended and nothing runs: the next one is likely to come at once. */
bool mlad_scheduler_lingers(const struct mlad_scheduler *scheduler);

/* So many rounds in stream order more, or less. */
void mlad_scheduler_ordered(struct mlad_scheduler *scheduler, int more);

/* Drop all decodes of the queue; one that is running stays in flight until its slice has ended. */
void mlad_scheduler_cancel(struct mlad_scheduler *scheduler, struct mlad_queue *queue);

#endif
