/* admin.h - what a session with the supervisor can ask: status, capabilities, sessions, health, drain, evict.
 *
 * A request lives from its message until its answer, asks the workers it needs without ever blocking, and forgets
 * its peer when that has gone. */
#ifndef MLAD_ADMIN_H
#define MLAD_ADMIN_H

#include "peer.h"

/* Serve one message of an open session; the peer may be gone when this returns. */
void mlad_admin_serve(struct mlad_peer *peer, const struct mlap_header *header, const union mlap_body *body);

/* The peer goes away: its requests are answered to nobody. */
void mlad_admin_forget(struct mlad_peer *peer);

#endif
