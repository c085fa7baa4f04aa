/* rings.h - a session's submission and completion rings: making them, taking what they hold, answering through them.
 *
 * The memory is the worker's own memfd, sealed in its size and sent with RING_MEMORY; the client can write all of it at
 * any time. So an entry is copied once and the copy validated, and the client's indices are believed no further than
 * the rings' size: what it breaks is its own session.
 *
 * While work comes the loop looks at all rings in turn, one entry of each session a turn; before it sleeps it asks for
 * a KNOCK. That doorbell is a datagram and no eventfd: the counter and the O_NONBLOCK of an eventfd belong to both
 * sides, so that a client could make the worker block in it. A session has its rings until it ends. Loop thread only.
 */
#ifndef MLAD_RINGS_H
#define MLAD_RINGS_H

#include "mlap_ring.h"

enum { MLAD_RING_ENTRIES = 256 };

struct mlad_session;
struct mlad_sessions;

struct mlad_rings {
    void *mapping; /* NULL: the session has none */
    struct mlap_ring submission, completion;
    bool asks;   /* we asked for a KNOCK and have taken nothing since */
    bool broken; /* the client's index in the completion ring is nonsense: the next look ends the session */
};

/* Make the rings of a session that asked for them, and send their memory. False: it goes without. */
bool mlad_rings_offer(struct mlad_session *session);
void mlad_rings_close(struct mlad_session *session);

/* Put a completion into the ring. False: it is the socket's to bring, be it that there are no rings, or no room. */
bool mlad_rings_complete(struct mlad_session *session, const struct mlap_completion *completion);

/* Take at most one entry of each session. False: there was nothing. */
bool mlad_rings_look(struct mlad_sessions *sessions);
/* Take all that the session's ring holds: a datagram of its was sent after that. May end the session. */
void mlad_rings_catch_up(struct mlad_session *session);

/* Whether an entry was taken so recently that the next one is likely to come at once. */
bool mlad_rings_linger(const struct mlad_sessions *sessions);
/* Before the loop sleeps: ask every client for a KNOCK. False: do not sleep, something has come. */
bool mlad_rings_ask(struct mlad_sessions *sessions);

#endif
