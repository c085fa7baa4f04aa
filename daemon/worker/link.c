/* link.c - see link.h. */
#include "link.h"

#include "stats.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

/* The loop thread reads, and builds, one datagram at a time. */
static uint8_t incoming[MLAP_MAX_MESSAGE];
static uint8_t outgoing[MLAP_MAX_MESSAGE];
static union mlap_body incoming_body;

static void on_poll(uv_poll_t *poll, int status, int events);

static struct mlad_link *link_of(uv_handle_t *poll)
{
    return poll->data;
}

static void lose(struct mlad_link *link, const char *why)
{
    if (link->lost)
        return;
    link->lost = why;
    shutdown(link->fd, SHUT_RDWR); /* makes it readable: on_poll reports the loss */
}

static void watch(struct mlad_link *link)
{
    int events = (link->deaf ? 0 : UV_READABLE) | (STAILQ_EMPTY(&link->out) ? 0 : UV_WRITABLE);
    if (uv_poll_start(&link->poll, events, on_poll) != 0)
        lose(link, "it cannot be polled");
}

static void flush(struct mlad_link *link)
{
    struct mlad_outgoing *message;
    while ((message = STAILQ_FIRST(&link->out))) {
        if (mlap_send(link->fd, message->bytes, message->length, -1, MSG_DONTWAIT) != 0) {
            if (errno != EAGAIN)
                lose(link, "the peer has gone");
            return;
        }
        STAILQ_REMOVE_HEAD(&link->out, next);
        link->out_bytes -= sizeof *message + message->length;
        free(message);
    }
    watch(link);
}

static void enqueue(struct mlad_link *link, const uint8_t *bytes, size_t length)
{
    struct mlad_outgoing *message = NULL;
    bool first = STAILQ_EMPTY(&link->out);
    link->flooded = link->out_bytes + sizeof *message + length > MLAD_LINK_QUEUE_BYTES;
    if (!link->flooded)
        message = malloc(sizeof *message + length);
    if (!message) {
        lose(link, link->flooded ? "the peer does not read what is sent to it" : "no memory to queue a message");
        return;
    }
    message->length = length;
    memcpy(message->bytes, bytes, length);
    STAILQ_INSERT_TAIL(&link->out, message, next);
    link->out_bytes += sizeof *message + length;
    if (first)
        watch(link);
}

void mlad_link_send(struct mlad_link *link, enum mlap_type type, uint32_t sequence, const void *body)
{
    if (link->lost)
        return;
    long length = mlap_encode(outgoing, sizeof outgoing, type, sequence, body);
    if (length < 0)
        lose(link, "a message to it cannot be encoded");
    else if (!STAILQ_EMPTY(&link->out))
        enqueue(link, outgoing, (size_t)length);
    else if (mlap_send(link->fd, outgoing, (size_t)length, -1, MSG_DONTWAIT) != 0) {
        if (errno == EAGAIN)
            enqueue(link, outgoing, (size_t)length);
        else
            lose(link, "the peer has gone");
    }
}

static void receive(struct mlad_link *link)
{
    struct mlad_message message = {.body = &incoming_body};
    long length = mlap_receive(link->fd, incoming, sizeof incoming, message.fds, &message.n_fds, MSG_DONTWAIT);
    if (length < 0 && errno == EAGAIN)
        return;
    if (length <= 0 && !(length < 0 && errno == EMSGSIZE)) {
        link->ended(link, length == 0 ? "the peer closed it" : strerror(errno));
        return;
    }
    message.received = mlad_now_ns();
    if (length < 0)
        mlap_fail(&message.fault, MLAP_code_MALFORMED, "",
                  "a datagram was cut: at most %u bytes and %u file descriptors are allowed", MLAP_MAX_MESSAGE,
                  MLAP_MAX_FDS);
    else
        mlap_decode(incoming, (size_t)length, &message.header, &incoming_body, &message.fault);
    link->received(link, &message);
    if (message.header.type == MLAP_IMPORT) { /* its handle is a secret, and is not kept */
        explicit_bzero(incoming, sizeof incoming);
        explicit_bzero(&incoming_body.import_, sizeof incoming_body.import_);
    }
    for (unsigned i = 0; i < message.n_fds; i++) {
        if (message.fds[i] >= 0)
            close(message.fds[i]);
    }
}

static void on_poll(uv_poll_t *poll, int status, int events)
{
    struct mlad_link *link = link_of((uv_handle_t *)poll);
    if (!link->lost && status < 0)
        lose(link, "the peer has gone");
    if (!link->lost && (events & UV_WRITABLE))
        flush(link);
    if (link->lost)
        link->ended(link, link->lost);
    else if (events & UV_READABLE)
        receive(link);
}

int mlad_link_open(struct mlad_link *link, uv_loop_t *loop, int fd)
{
    STAILQ_INIT(&link->out);
    link->out_bytes = 0;
    link->lost = NULL;
    link->flooded = false;
    link->deaf = false;
    link->fd = fd;
    link->poll.data = link;
    int error = uv_poll_init(loop, &link->poll, fd);
    if (error == 0)
        watch(link);
    return error;
}

void mlad_link_deafen(struct mlad_link *link)
{
    if (link->lost)
        return;
    link->deaf = true;
    watch(link);
}

void mlad_link_shutdown(struct mlad_link *link)
{
    uv_poll_stop(&link->poll);
    link->lost = "it was shut down";
    /* Closing a socket with unread input would make the peer lose what it has not read yet: take no more, empty it,
     * close. */
    shutdown(link->fd, SHUT_RD);
    long length;
    do {
        int fds[MLAP_MAX_FDS];
        unsigned n_fds = 0;
        length = mlap_receive(link->fd, incoming, sizeof incoming, fds, &n_fds, MSG_DONTWAIT);
        for (unsigned i = 0; i < n_fds; i++)
            close(fds[i]);
    } while (length > 0 || (length < 0 && errno == EMSGSIZE));
    shutdown(link->fd, SHUT_RDWR);
    struct mlad_outgoing *message;
    while ((message = STAILQ_FIRST(&link->out))) {
        STAILQ_REMOVE_HEAD(&link->out, next);
        free(message);
    }
}

static void on_closed(uv_handle_t *poll)
{
    struct mlad_link *link = link_of(poll);
    link->closed(link);
}

void mlad_link_close(struct mlad_link *link)
{
    if (uv_is_closing((uv_handle_t *)&link->poll))
        return;
    uv_close((uv_handle_t *)&link->poll, on_closed);
    close(link->fd);
}
