/* link.h - one SEQPACKET socket on the loop: the control socket, or a session's.
 *
 * Reads one datagram a turn of the loop, so that a peer that floods gets its share and no more; sends at once, or
 * queues up to MLAD_LINK_QUEUE_BYTES for a peer that is slow to read. A peer that lets the queue fill is lost: nothing
 * more is sent, and the loop's next turn says so. Sending therefore never calls back.
 *
 * The owner embeds the link, handles what it says, and may free it once `closed` has been called. */
#ifndef MLAD_LINK_H
#define MLAD_LINK_H

#include "mlap.h"

#include <sys/queue.h>
#include <uv.h>

enum { MLAD_LINK_QUEUE_BYTES = 1 << 20 };

/* One received datagram; `body` and `fds` are only valid during the callback. */
struct mlad_message {
    struct mlap_header header;
    const union mlap_body *body;
    struct mlap_fault fault; /* code OK: the body is good */
    int fds[MLAP_MAX_FDS];   /* [n_fds], closed after the callback, but for those that it sets to -1 */
    unsigned n_fds;
    uint64_t received; /* nanoseconds, monotonic */
};

struct mlad_outgoing {
    STAILQ_ENTRY(mlad_outgoing) next;
    size_t length;
    uint8_t bytes[];
};

struct mlad_link {
    uv_poll_t poll;
    int fd;
    STAILQ_HEAD(, mlad_outgoing) out;
    size_t out_bytes;
    const char *lost; /* why nothing more is sent; NULL while all is well */
    bool flooded;     /* lost because the peer did not read */
    bool deaf;        /* nothing more is read */
    void (*received)(struct mlad_link *link, struct mlad_message *message);
    void (*ended)(struct mlad_link *link, const char *why); /* called once; then mlad_link_shutdown is due */
    void (*closed)(struct mlad_link *link);
};

/* Take over `fd` and start reading. 0, or a negative libuv error: then `fd` is still the caller's. */
int mlad_link_open(struct mlad_link *link, uv_loop_t *loop, int fd);

/* Send a message, or queue it. Nothing happens on a link that is lost or shut down. */
void mlad_link_send(struct mlad_link *link, enum mlap_type type, uint32_t sequence, const void *body);

/* Read nothing more; what is sent still goes. */
void mlad_link_deafen(struct mlad_link *link);

/* Nothing more in either direction; the peer sees its end of file after all that was sent. */
void mlad_link_shutdown(struct mlad_link *link);

/* Close the socket of a link that was shut down; `closed` follows in a later turn of the loop. */
void mlad_link_close(struct mlad_link *link);

#endif
