/* peer.h - a daemon's place on a socket, taken by a thread of the test: for faults that a real daemon has no reason to
 * commit.
 *
 * It serves one connection at a time and answers everything with success, unless the test's script says otherwise. With
 * rings it takes what it is knocked for; to the script an entry is a SUBMIT like any other. The test owns the peer;
 * peer_free joins the thread and removes the socket. */
#ifndef PEER_H
#define PEER_H

#include "mla.h"
#include "mlap.h"
#include "mlap_ring.h"

#include <stdatomic.h>

enum act {
    ANSWER,     /* as a daemon that is well */
    HANDLED,    /* the script has answered, or nothing is to be answered */
    HANG_UP     /* close the connection */
};

struct peer;
struct arrival {
    unsigned connection;                /* 1 is the first */
    struct mlap_header header;
    const union mlap_body *body;
    int socket;
};
/* What to do about a message; called on the peer's thread. */
typedef enum act peer_script(struct peer *peer, const struct arrival *arrival);

struct peer {
    char path[64];
    peer_script *script;                     /* NULL: ANSWER */
    void *of_test;                      /* the script's own */
    atomic_uint connections, arrivals;
    atomic_uint count[128];             /* messages of each type, over all connections */
    atomic_bool deaf;                   /* stop reading, until cleared */
    char types[1024];                   /* see peer_types */
    int listener;
    atomic_int connection;
    atomic_bool stopping;
    unsigned long thread;
    bool offers_rings;                  /* to clients that ask; $MLA_TEST_RINGS is the default */
    void *mapping;                      /* of the present connection's rings, or NULL */
    struct mlap_ring submission, completion;
    atomic_uint taken, completed;       /* entries of the rings, over all connections */
};

struct peer *peer_new(peer_script *script, void *of_test);
void peer_free(struct peer *peer);

/* The first letter of each message's type, in order; '|' a new connection. */
const char *peer_types(struct peer *peer);

/* Send from a script, or (with the current connection) from the test. */
void peer_send(int socket, enum mlap_type type, uint32_t sequence, const void *body);
void peer_error(int socket, uint32_t sequence, enum mlap_code code, const char *field, const char *message);
void peer_done(int socket, uint32_t sequence);
void peer_ok(int socket, uint32_t sequence);

/* ---- a client to test with ---- */

mla_client *client_of(struct peer *peer, int reconnect_ms);
/* One buffer and a batch of one request in it that passes all of libmla's checks. */
struct rig { mla_client *client; mla_buffer *buffer; mla_batch batch; mla_plan *plan; };
void rig_init(struct rig *rig, struct peer *peer);      /* with plan */
void rig_free(struct rig *rig);
mla_batch batch_in(mla_buffer *buffer);

int64_t now_ms(void);
void sleep_ms(int ms);

#define assert_ok(call) \
    do { \
        mla_error assert_ok_error = {0}; \
        mla_error *e = &assert_ok_error; \
        mla_status assert_ok_status = (call); \
        if (assert_ok_status != MLA_OK) \
            fail_msg("%s: %s %s: %s", #call, mla_status_text(assert_ok_status), e->field, e->message); \
    } while (0)
/* The call returns `status_` and its error says so too, with `field_` and a message that contains `words`. */
#define assert_fails(status_, field_, words, call)                                                                     \
    do {                                                                                                               \
        mla_error assert_fails_error = {0};                                                                            \
        mla_error *e = &assert_fails_error;                                                                            \
        mla_status assert_fails_status = (call);                                                                       \
        if (assert_fails_status != (status_) || e->code != (status_) || strcmp(e->field, field_) ||                    \
            !strstr(e->message, words))                                                                                \
            fail_msg("%s: %s/%s [%s]: %s", #call, mla_status_text(assert_fails_status), mla_status_text(e->code),      \
                     e->field, e->message);                                                                            \
    } while (0)

#endif
