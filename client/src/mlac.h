/* mlac.h - the inside of libmla: one client, its link to the daemon, and its calls.
 *
 * A *call* is anything that the daemon will answer: a registration, a plan, a decode. Calls live in one list, in the
 * order in which they were first sent, and that list is all there is to recovery: a registration or plan stays in it as
 * long as the buffer or plan exists, a decode until it has been answered, so sending the whole list again, in order,
 * restores a session that a dead worker took with it.
 *
 * There are no threads of our own. A thread that waits either leads, which is to sit in recvmsg for everybody, or
 * sleeps until the leader has its answer or leaves (wait.c). One mutex guards all of it; it is not held in recvmsg.
 *
 *   public functions: client.c placement.c buffer.c batch.c plan.c ticket.c step.c stream.c fd.c error.c
 *            |
 *         wait.c        leader and followers
 *            |
 *         call.c        the list: send, answer, replay
 *            |
 *       transport.c     connect, greet, receive, reconnect
 *            |
 *         rings.c       shared memory, beside the socket
 *
 * Names: mla_ is public, mlac_ is private to the library. "Locked" says that the caller holds client->lock. */
#ifndef MLAC_H
#define MLAC_H

#include "cuda.h"
#include "mla.h"
#include "mlap.h"
#include "mlap_placement.h"
#include "mlap_ring.h"

#include <pthread.h>
#include <stdbool.h>
#include <sys/queue.h>
#include <sys/socket.h>
#include <sys/un.h>

enum {
    MLAC_MAX_TENSORS = 12,
    MLAC_BUCKETS = 1024,
    MLAC_MAX_DEATHS = 3,
    MLAC_TAKE = 16,
    MLAC_MOST_ARMS = 64
};

/* Times are CLOCK_MONOTONIC nanoseconds. */
#define MLAC_NEVER INT64_MAX
#define MLAC_MS INT64_C(1000000)
int64_t mlac_now(void);
/* When a wait of timeout_ms (MLA_FOREVER, or 0 and up) ends; 0 for one that must not block. */
int64_t mlac_deadline(int timeout_ms);

/* ---- error.c ---- */

/* Fill `error` (may be NULL) and return `code`. */
mla_status mlac_fail(mla_error *error, mla_status code, const char *field, const char *format, ...)
    __attribute__((format(printf, 4, 5)));
/* The same with a ready error; MLA_OK leaves *error alone. */
mla_status mlac_report(mla_error *error, const mla_error *what);

/* ---- calls ---- */

enum mlac_state {
    MLAC_UNSENT,    /* waits for the link, or for room in the socket */
    MLAC_SENT,      /* the daemon has it and owes an answer */
    MLAC_KEPT,      /* a registration or plan that was accepted: sent again after a death */
    MLAC_COMPLETE   /* answered or failed; waits for its owner to collect it */
};

struct mlac_call {
    TAILQ_ENTRY(mlac_call) order;       /* client->calls */
    TAILQ_ENTRY(mlac_call) out;         /* client->outbox, while `queued` */
    struct mlac_call *in_bucket;
    uint64_t id; /* the ticket; its low 32 bits are the sequence, and a buffer's or plan's wire id */
    enum mlap_type type;
    enum mlac_state state;
    bool queued;
    bool listed;        /* in client->calls and the table */
    bool loose;         /* a ticket of mla_submit: mla_fd speaks for it */
    bool detached;      /* nobody waits: freed when answered, forgotten when the session dies */
    bool established;   /* was accepted once: a refusal now means that the session cannot be restored */
    bool posted;        /* a decode or round, sent over the socket: counted in client->posted */
    bool replaying;     /* established, and sent again on this connection: counted in client->replaying */
    uint32_t deaths;    /* sessions that died with this call in flight */
    uint32_t replays;
    int64_t retry_until;    /* until when to try again what is refused for the moment only; 0: not refused yet */
    struct mla_buffer *buffer;          /* REGISTER, IMPORT, IMPORT_VMM, UNREGISTER */
    struct mla_plan *plan;              /* PLAN, SUBMIT */
    struct mla_step *step;              /* STEP, ARM */
    uint32_t round;                     /* ARM */
    bool held;                          /* ARM: to be sent once others are answered */
    struct mla_buffer *uses[MLAC_MAX_TENSORS];  /* PLAN, DECODE: each counted in buffer->uses */
    uint32_t n_uses;
    mla_error error;                    /* code MLA_OK: none */
    struct {
        uint32_t failed, listed;
        mla_failure *failures;          /* [listed], ours */
        uint64_t kv_tokens, receive_ns, queue_ns, kernel_ns;
    } result;
    size_t length;
    uint8_t bytes[];                    /* the datagram */
};
TAILQ_HEAD(mlac_calls, mlac_call);

struct mla_buffer {
    struct mla_client *client;
    struct mlac_call *call;     /* its REGISTER, IMPORT or IMPORT_VMM */
    int memfd;                  /* -1: GPU memory */
    void *data;                 /* mapped here, or NULL: an import that was not asked for yet */
    uint64_t pointer;           /* GPU memory: where it is in this process */
    struct mlac_vmm vmm;        /* GPU memory that goes by descriptors, made anew for each sending */
    uint64_t offset;            /* in the memfd */
    size_t size;
    mla_access access;
    uint32_t uses;              /* by plans and by decodes that are not complete */
};

struct mla_plan {
    struct mla_client *client;
    struct mlac_call *call;     /* its PLAN, which holds the buffers */
    struct mlac_call *drop;     /* its DROP, made in advance so that destroying cannot fail */
    uint32_t in_flight;         /* decodes that are not complete, and steps that have it */
    bool destroyed;             /* by its owner; kept for decodes in flight, which may have to be sent again */
    uint64_t out, lse;          /* on the GPU here; 0: not there */
    uint64_t out_bytes, lse_bytes;
    struct mla_step *step;      /* that has it as a layer, or NULL */
    struct mla_step *alone;     /* its own, of one layer, or NULL: not needed yet */
};

struct mla_step {
    struct mla_client *client;
    struct mlac_call *call;     /* its STEP */
    struct mlac_call *drop;     /* its STEP_DROP, made in advance */
    uint32_t first, layers;     /* its head is unit `first` of the mailbox, its slots those behind */
    struct mla_plan **plans;    /* [layers] */
    uint32_t round;             /* armed last */
    uint32_t in_flight;         /* rounds that are not complete */
    bool destroyed;             /* by its owner; kept for rounds in flight */
    uint32_t noted;             /* notes of its stream that mla_step_status has told */
    mla_error failure;          /* what the daemon said of a round since it was last told; code MLA_OK: nothing */
};

/* ---- the client ---- */

enum mlac_link {
    MLAC_AWAY,          /* no connection; the next attempt is due at retry_at */
    MLAC_GREETING,      /* HELLO sent */
    MLAC_ASKING,        /* HELLO without a device, answered; STATUS sent, to learn which devices there are */
    MLAC_UP,            /* in session */
    MLAC_DEAD           /* for good, with `failure` */
};

struct mlac_sleeper {
    TAILQ_ENTRY(mlac_sleeper) entry;
    uint64_t id;                /* the call it waits for */
    pthread_cond_t woken;
};

struct mla_client {
    struct sockaddr_un address;
    char name[64];
    char device[64];            /* empty until chosen; then never changed */
    int64_t reconnect_ns;
    bool socket_only;           /* no rings are asked for */
    bool high_priority;

    pthread_mutex_t lock;       /* guards all that follows */
    enum mlac_link link;
    int socket;                 /* -1 while away; closed only while nobody leads */
    bool broken;                /* a send found the peer gone; what it said last is still to be read */
    bool leading;               /* a thread sits in recvmsg, and owns inbox, body, taken and the completion ring */
    bool trying;                /* an effort to restore the session is going on, since give_up_at - reconnect_ns */
    int64_t give_up_at, retry_at, greet_until, delay_ns;
    uint64_t random;            /* jitter */
    bool met;                   /* a session was open at least once */
    struct mlap_place here, there;  /* where this process works, and the worker of the last session */
    mla_error failure;          /* why the client is dead */

    uint64_t last_id;
    struct mlac_calls calls;    /* by first sending */
    struct mlac_calls outbox;   /* unsent ones */
    struct mlac_call *bucket[MLAC_BUCKETS];
    int64_t paused_until;       /* nothing is sent before */
    uint32_t unanswered;        /* sent on this connection */
    uint32_t posted;            /* of these, decodes and rounds that went over the socket */
    struct mlac_rings *rings;   /* of this connection; NULL: none */
    struct mlac_rings *retired; /* closed while a thread leads: still mapped for it */
    uint32_t replaying;         /* established calls not yet accepted again on this connection */
    uint32_t loose, ready;      /* tickets that mla_fd speaks for, and those of them that are complete */
    TAILQ_HEAD(, mlac_sleeper) sleepers;

    uint32_t arms;              /* calls of type ARM that are not collected yet */
    uint32_t arms_sent;         /* of them sent and not answered, or in the outbox */
    bool arms_held;             /* others are held back */
    bool arms_stopped;          /* because the daemon let go of rounds: until it has let go of all */
    int64_t arms_progress;      /* when one was done last, or the first of them armed */
    struct mlac_streams *streams;   /* streams.c's; NULL until stream order is asked for */

    int epoll, timer;           /* mla_fd; -1 until first asked for */
    int watched;                /* the socket in the epoll set, or -1 */
    int64_t alarm;              /* what the timer is set to */

    union mlap_body body;
    int ring_memory;            /* that came with the message in `body`, or -1 */
    struct mlap_completion taken[MLAC_TAKE];
    struct mlap_done done;      /* a completion in words that the socket has too */
    uint8_t inbox[MLAP_MAX_MESSAGE];
};

void mlac_lock(struct mla_client *client);
void mlac_unlock(struct mla_client *client);    /* also brings mla_fd up to date */

/* ---- call.c, all locked ---- */

uint64_t mlac_next_id(struct mla_client *client);
/* A call that encodes `body`, not yet in the list. NULL: out of memory, or (a bug of ours) a body out of bounds. */
struct mlac_call *mlac_call_new(uint64_t id, enum mlap_type type, const void *body, mla_error *error);
/* Does it register a buffer? */
bool mlac_registers(const struct mlac_call *call);
/* Put it into the list and send it as soon as may be. */
void mlac_call_start(struct mla_client *client, struct mlac_call *call);
/* The same of one that establishes something, and wait for the answer. If that is no, `error` says why and it is
 * freed. */
mla_status mlac_call_establish(struct mla_client *client, struct mlac_call *call, mla_error *error);
struct mlac_call *mlac_call_find(struct mla_client *client, uint64_t id);
/* Take it out of the list and free it. Not for one that is owed an answer: see mlac_call_detach. */
void mlac_call_free(struct mla_client *client, struct mlac_call *call);
/* Nobody waits for it any more: free it now, or once it is answered. */
void mlac_call_detach(struct mla_client *client, struct mlac_call *call);
/* Complete it, with `error` unless NULL. */
void mlac_call_complete(struct mla_client *client, struct mlac_call *call, const mla_error *error);

/* Send what waits, as far as the socket takes it. */
void mlac_flush(struct mla_client *client, int64_t now);
/* An answer came. False: it answers nothing that was asked. */
bool mlac_answer(struct mla_client *client, const struct mlap_header *header, const union mlap_body *body, int64_t now);
/* A decode is complete. False: none of that sequence is owed an answer. */
bool mlac_done(struct mla_client *client, uint32_t sequence, const struct mlap_done *done);
/* The session is over, and the link not up any more. Without `error` it died: calls wait for the next session, except
 * those that have seen too many deaths. With `error`, all calls fail with it; buffers and plans stay, for a later
 * effort. */
void mlac_calls_end(struct mla_client *client, const mla_error *error);
/* Does the context of the GPU memory that is registered still live? If not, the client is dead, and that was why. */
bool mlac_calls_check(struct mla_client *client);
/* A new session is open: queue every call that needs sending. */
void mlac_calls_replay(struct mla_client *client);

/* ---- transport.c, all locked ---- */

/* The HELLO of this client. */
void mlac_hello(const struct mla_client *client, struct mlap_hello *hello);
/* Do what is due: connect, give up, send. */
void mlac_recover(struct mla_client *client, int64_t now);
/* When mlac_recover next has something to do without news from the socket. */
int64_t mlac_timer(const struct mla_client *client);
/* Receive one datagram and act on it, waiting for it until `until` (0: not at all) with the lock released.
 * Needs a socket and no leader. False: nothing came. */
bool mlac_receive(struct mla_client *client, int64_t until);
/* The recovery is over: the session is what it was. */
void mlac_settled(struct mla_client *client);
/* End the client for good. */
void mlac_die(struct mla_client *client, const mla_error *error);

/* ---- rings.c, locked unless stated ---- */

/* Take the rings whose memory the daemon has sent; `fd` stays the caller's. False: they cannot be had. */
bool mlac_rings_open(struct mla_client *client, int fd, uint32_t entries);
void mlac_rings_close(struct mla_client *client);
/* By the thread that led: unmap what was closed meanwhile. */
void mlac_rings_retire(struct mla_client *client);
/* Send a call by the ring. False: it has to go over the socket. */
bool mlac_rings_submit(struct mla_client *client, const struct mlac_call *call);
/* Unlocked, by the leader, as mlac_rings_news and mlac_rings_ask: take up to `most` completions; -1: the daemon's index
 * is nonsense. */
int mlac_rings_take(struct mlac_rings *rings, struct mlap_completion *to, int most);
bool mlac_rings_news(const struct mlac_rings *rings);
/* Ask for a NEWS at the next completion, or take the asking back. */
void mlac_rings_ask(struct mlac_rings *rings, bool asked);
/* Nobody leads, and mla_fd is to speak for the ring: ask for NEWS. True: there are completions already. */
bool mlac_rings_watch(struct mla_client *client);
/* As mlac_done. */
bool mlac_rings_completed(struct mla_client *client, const struct mlap_completion *completion);

/* ---- wait.c, all locked ---- */

/* Wait until the call has reached `goal` or `deadline` (0: do not block). MLA_OK, MLA_TIMEOUT, or MLA_NOT_FOUND when
 * another thread collected it. */
mla_status mlac_await(struct mla_client *client, uint64_t id, enum mlac_state goal, int64_t deadline);
void mlac_wake(struct mla_client *client, uint64_t id);

/* ---- buffer.c ---- */

/* Unmap, close and free one whose registration is gone. */
void mlac_buffer_destroy(struct mla_buffer *buffer);

/* ---- batch.c ---- */

/* Check what the caller wrote and translate it; `uses` lists its buffers, each as often as it is named. */
mla_status mlac_batch(struct mla_client *client, const mla_batch *batch, struct mlap_batch *out,
                      struct mla_buffer *uses[MLAC_MAX_TENSORS], uint32_t *n_uses, mla_error *error);
/* Give a call its buffers. Locked. */
void mlac_batch_hold(struct mlac_call *call, struct mla_buffer *const *uses, uint32_t n_uses);

/* ---- placement.c ---- */

/* Before the first HELLO: what is to be seen from the thread that connects. */
void mlac_placement_look(struct mla_client *client);
/* Tell of it in a HELLO. */
void mlac_placement_hello(const struct mla_client *client, struct mlap_hello *hello);
/* A session is open. Locked. */
void mlac_placement_welcome(struct mla_client *client, const struct mlap_welcome *welcome);
/* GPU memory was registered. Locked. */
void mlac_placement_memory(struct mla_client *client, const char *gpu);
/* The placement as it is known now; `why` may be NULL. Locked. */
mla_placement mlac_placement(const struct mla_client *client, char why[MLA_WHY]);

/* ---- step.c, streams.c: see streams.h ---- */

/* Its owner needs it no more: free it, once no round does either. Locked. */
void mlac_step_destroy(struct mla_step *step);
/* End what the client has of stream order: whatever waits on a stream is released. Nothing of the client may be called
 * meanwhile; not locked. */
void mlac_streams_close(struct mla_client *client);

/* ---- plan.c, fd.c ---- */

/* Free a destroyed plan that no decode needs any more. Locked. */
void mlac_plan_drop(struct mla_plan *plan);
/* Make mla_fd's state that of the client. Locked. */
void mlac_fd_update(struct mla_client *client);
/* Take the socket out of mla_fd, before it is closed. Locked. */
void mlac_fd_forget(struct mla_client *client);

#endif
