/* ordered.h - steps: plans that run in the order of a client's CUDA stream, without a word between hosts.
 *
 * A session that makes a step gets a lane of the device, in which all its rounds run in the order they were armed, each
 * layer once its flag in the client's memory says so. Lanes are few (MLAD_LANES), since each may hold a hardware queue
 * and a processor while it waits. A round whose flags do not come within MLAD_ORDER_WAIT_MS is answered with TIMEOUT,
 * and so are those behind it, so that the client arms them again in order; nothing waits longer for a client that died.
 *
 * A session embeds one mlad_ordered. Its end abandons the lane: what waits gives up at once, and the session drains
 * until the device has told so. Loop thread only; completions are looked for every MLAD_ORDER_POLL_MS and with each
 * round that is armed. */
#ifndef MLAD_ORDERED_H
#define MLAD_ORDERED_H

#include "plan.h"
#include "scheduler.h"

#include <sys/queue.h>

enum { MLAD_LANES = 8, MLAD_ORDER_WAIT_MS = 2000, MLAD_ORDER_POLL_MS = 1 };

struct mlad_session;
struct mlad_step;

struct mlad_round {
    STAILQ_ENTRY(mlad_round) next;
    struct mlad_step *step;
    uint32_t sequence, number;
    uint64_t received, queued, launched; /* nanoseconds, monotonic; launched 0: not yet */
};

/* All zero, with the lists empty (mlad_ordered_init), is a session without steps. */
struct mlad_ordered {
    struct mlak_lane *lane;             /* NULL until the first step */
    struct mlad_idmap steps;
    STAILQ_HEAD(, mlad_round) launched; /* in the order of the lane */
    STAILQ_HEAD(, mlad_round) waiting;  /* for room on the device, or for the lane's restart */
    bool stopped;                       /* the lane: until all that was launched has been told */
    bool abandoned;
    uv_timer_t timer;
    bool timing;
};

void mlad_ordered_init(struct mlad_session *session);

/* The messages; a fault is the caller's to answer. */
enum mlap_code mlad_ordered_step(struct mlad_session *session, const struct mlap_step *request,
                                 struct mlap_fault *fault);
enum mlap_code mlad_ordered_drop(struct mlad_session *session, uint32_t id, struct mlap_fault *fault);
/* Answered by itself once accepted. */
enum mlap_code mlad_ordered_arm(struct mlad_session *session, const struct mlap_arm *request, uint32_t sequence,
                                uint64_t received, struct mlap_fault *fault);

/* Does a step name the buffer, as flags? */
bool mlad_ordered_names(const struct mlad_session *session, const struct mlad_buffer *buffer);

/* The session has ended. */
void mlad_ordered_end(struct mlad_session *session);
/* Has it nothing left on the device, and no handle on the loop? */
bool mlad_ordered_idle(const struct mlad_session *session);

#endif
