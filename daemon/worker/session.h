/* session.h - one client's session, and the table of all sessions on this device.
 *
 * A session owns its link, its rings, the ids of its buffers and plans, and its queue at the scheduler; request.c
 * answers its messages. When it ends (end of file, a broken message, eviction) it takes nothing new at once: its queued
 * work is dropped, its ids are given up, its peer sees end of file. It drains while a slice of its is still running,
 * whose plan keeps its buffers mapped, and until they are unmapped. Then it is freed. Nobody else waits for any of
 * this.
 *
 * The worker owns the table. Loop thread only. */
#ifndef MLAD_SESSION_H
#define MLAD_SESSION_H

#include "link.h"
#include "mlap_placement.h"
#include "ordered.h"
#include "rings.h"
#include "scheduler.h"

struct mlad_sessions {
    uv_loop_t *loop;
    const char *device;
    struct mlad_scheduler *scheduler;
    struct mlad_quota *quota;
    struct mlad_stats *stats;
    struct mlad_capabilities capabilities;
    struct mlap_place place; /* the worker's own */
    TAILQ_HEAD(mlad_session_list, mlad_session) all; /* by ascending id */
    uint64_t heard; /* nanoseconds, monotonic: when an entry was last taken from a ring */
};

struct mlad_session {
    struct mlad_link link; /* first: the link's callbacks find the session by it */
    TAILQ_ENTRY(mlad_session) entry;
    struct mlad_sessions *sessions;
    uint64_t id;
    uint32_t uid, pid;
    char client[sizeof((struct mlap_hello *)0)->client];
    struct mlap_place place; /* the client's, by its HELLO and its memory */
    enum mlap_order order;
    uint64_t opened; /* nanoseconds, monotonic */
    struct mlad_holder holder;
    struct mlad_idmap buffers, plans;
    struct mlad_queue queue;
    struct mlad_rings rings;
    struct mlad_ordered ordered;
    uint64_t decodes, kv_tokens;
    bool draining; /* ended; freed once nothing of it runs */
};

/* Open a session on the connection `fd` and send WELCOME; `fd` is taken over, also on failure: then the peer was sent
 * the error. */
void mlad_session_open(struct mlad_sessions *sessions, const struct mlap_attach *attach, int fd);

/* NULL: no open session has that id. */
struct mlad_session *mlad_session_find(struct mlad_sessions *sessions, uint64_t id);

/* End it; `why` is for the log. */
void mlad_session_end(struct mlad_session *session, const char *why);

/* End it for a break of the protocol, of which the peer was told. */
void mlad_session_drop(struct mlad_session *session, const struct mlap_fault *fault);

/* Close a session that has ended, once nothing of it runs or is mapped. Something of it has just ended. */
void mlad_session_settle(struct mlad_session *session);

/* Read nothing more from any of them: the daemon ends, and what they send next is the next daemon's to answer. */
void mlad_sessions_deafen(struct mlad_sessions *sessions);

/* Before the process exits: each peer sees its end of file behind all that was sent to it. */
void mlad_sessions_hang_up(struct mlad_sessions *sessions);

/* One page of the list, sessions with an id above `after`. */
void mlad_sessions_list(const struct mlad_sessions *sessions, uint64_t after, struct mlap_sessions_reply *reply);

/* Fill the sessions' part of a report. */
void mlad_sessions_report(const struct mlad_sessions *sessions, struct mlap_device *device);

/* Answer with an ERROR; sequence 0: the session is about to be ended. */
void mlad_session_refuse(struct mlad_session *session, uint32_t sequence, const struct mlap_fault *fault);

/* request.c: answer one message of the client. May end the session. */
void mlad_session_receive(struct mlad_session *session, struct mlad_message *message);
/* request.c: queue a decode of the plan of that id, for a message or an entry that was read at `received`. */
enum mlap_code mlad_session_submit(struct mlad_session *session, uint32_t sequence, uint32_t plan, uint64_t received,
                                   struct mlap_fault *fault);
/* request.c: tell of a decode, or a round, that is complete: by the ring if there is no more to say, else by DONE. */
void mlad_session_complete(struct mlad_session *session, const struct mlap_completion *completion,
                           const struct mlap_failure *failures, uint32_t n_failures);
/* request.c: a decode has ended; send its completion, DONE or ERROR. */
void mlad_session_answer(struct mlad_session *session, const struct mlad_decode *decode,
                         const struct mlap_fault *fault);

#endif
