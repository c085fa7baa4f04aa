/* streams.h - stream order inside libmla: what its rooms share.
 *
 *   stream.c     the public way in, rounds: what is armed, and what is put on the caller's stream
 *      |
 *   step.c       steps: plans with slots in the mailbox, made and given up
 *      |
 *   streams.c    what a client has of it: mailbox, kernels, and the thread that looks after rounds
 *
 * Locks: `ordering` makes rounds and the stream's kernels come in one order; it is held over launches, which may wait
 * for room on a stream, and taken before client->lock, which never is. */
#ifndef MLAC_STREAMS_H
#define MLAC_STREAMS_H

#include "driver.h"
#include "mlac.h"
#include "mlac_gates.h"

enum {
    MLAC_UNITS = 4096,     /* of the mailbox, 128 bytes each */
    MLAC_MARGIN_MS = 5000  /* what a gate waits beyond reconnect_ms: libmla should be the one to give up */
};

/* The fatbin, gates_image.c; absent without nvcc. */
extern const unsigned char mlac_gates_image[] __attribute__((weak));

struct mlac_streams {
    void *context, *module, *arm, *signal, *gate;
    void *side;                 /* a stream for words that overtake the caller's */
    uint64_t mailbox, notes_here;
    mla_buffer *buffer;         /* the mailbox, registered */
    struct mlac_notes *notes;   /* pinned, [MLAC_UNITS]: a step's is that of its head */
    bool used[MLAC_UNITS];
    pthread_mutex_t ordering;
    uint64_t capture;           /* the last one that was added to, and its last host node */
    void *capture_node;
    pthread_t watcher;
    pthread_cond_t work;        /* with client->lock */
    bool watching, stop;
};

/* Call the driver in a function that returns a status and has an `error`. */
#define MLAC_TRY(call, ...)                                                                                            \
    do {                                                                                                               \
        int code_ = mlac_driver.call(__VA_ARGS__);                                                                     \
        if (code_ != 0)                                                                                                \
            return mlac_driver_fail(error, "stream", #call, code_);                                                    \
    } while (0)

/* ---- streams.c ---- */

/* The driver, in a mode that leaves captures alone, and in `context` unless that is NULL. */
struct mlac_relaxed { int mode; bool pushed; };
struct mlac_relaxed mlac_relax(void *context);
void mlac_unrelax(struct mlac_relaxed before);

/* The client's streams, made at the first call: in the context that is current. Not locked. */
mla_status mlac_need_streams(struct mla_client *client, mla_error *error);

/* ---- step.c ---- */

/* Where stream order is of no use, or cannot be, MLA_UNSUPPORTED says why; `plan` may be NULL. Not locked. */
mla_status mlac_check_order(struct mla_client *client, const mla_plan *plan, mla_error *error);
/* A step of plans[0..count), which it keeps. Locked; waits for the daemon's word. */
mla_status mlac_step_new(struct mla_client *client, mla_plan *const *plans, uint32_t count, struct mla_step **out,
                         mla_error *error);

#endif
