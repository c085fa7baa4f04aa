/* peer.h - a connection while the supervisor holds it.
 *
 * It begins with an accepted socket and ends in one of three ways: handed to a worker (HELLO with a device), closed by
 * the peer, or dropped with an ERROR. Until its HELLO it has hello_timeout; a HELLO without a device opens a session
 * with the supervisor itself, whose requests admin.c serves. A peer costs a fixed amount: it has no queue, and one that
 * does not read its answers is dropped.
 *
 * A closed peer has fd -1 and stays valid until the loop's next turn. */
#ifndef MLAD_PEER_H
#define MLAD_PEER_H

#include "mlap.h"
#include "policy.h"
#include "supervisor.h"

struct mlad_request; /* admin.c */

struct mlad_peer {
    struct mlad_supervisor *supervisor;
    struct mlad_peer *next;
    uv_poll_t poll;
    int fd; /* -1: closed */
    struct mlad_identity identity;
    uint64_t session;
    uint64_t deadline; /* ms of the loop's clock, until the session is open */
    enum { MLAD_PEER_SILENT, MLAD_PEER_WAITING, MLAD_PEER_OPEN } state;
    struct mlap_attach attach; /* WAITING: what its device will get */
    struct mlad_request *requests;
    uint32_t n_requests;
};

/* Take an accepted connection over. */
void mlad_peer_new(struct mlad_supervisor *supervisor, int fd);

/* Answer. A peer that has no room for it, or has gone, is closed. */
void mlad_peer_send(struct mlad_peer *peer, enum mlap_type type, uint32_t sequence, const void *body);

/* Refuse a message and keep the connection. */
void mlad_peer_refuse(struct mlad_peer *peer, uint32_t sequence, enum mlap_code code, const char *field,
                      const char *message);

/* Tell it why and close the connection. */
void mlad_peer_end(struct mlad_peer *peer, uint32_t sequence, enum mlap_code code, const char *field,
                   const char *message);

/* Close the connections: the daemon stops. Their peers connect to the next one. */
void mlad_peers_close(struct mlad_supervisor *supervisor);

/* Deadlines of all peers. Due every 100 ms. */
void mlad_peers_tick(struct mlad_supervisor *supervisor);

/* The device changed: hand over, or refuse, those that wait for it. */
void mlad_peers_device_changed(struct mlad_supervisor *supervisor, struct mlad_device *device);

#endif
