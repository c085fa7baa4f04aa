/* peer.c - see peer.h. What is read here is hostile: every datagram is bounded, decoded and answered before the next.
 */
#include "peer.h"

#include "admin.h"
#include "log.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum {
    DATAGRAMS_A_TURN = 16, /* then others have theirs */
    ADMIN_RESERVE = 16,    /* connections beyond max_connections, so that an operator gets through a flood */
};

static uint64_t now_ms(const struct mlad_supervisor *supervisor)
{
    return uv_now(&supervisor->loop);
}

static void on_poll(uv_poll_t *poll, int status, int events);

/* ---- the end ---- */

static void on_closed(uv_handle_t *poll)
{
    free(poll->data);
}

/* Leave the list and close our descriptor. A worker may hold the connection by then. */
static void leave(struct mlad_peer *peer)
{
    struct mlad_supervisor *supervisor = peer->supervisor;
    struct mlad_peer **at = &supervisor->peers;
    while (*at != peer)
        at = &(*at)->next;
    *at = peer->next;
    supervisor->n_peers--;
    mlad_admin_forget(peer);
    uv_close((uv_handle_t *)&peer->poll, on_closed);
    close(peer->fd);
    peer->fd = -1;
}

/* Closing a socket with unread input makes the kernel tell the peer ECONNRESET before it has read what we sent. So:
 * take no more, discard what is there, then close. */
static void discard_input(int fd)
{
    char byte;
    shutdown(fd, SHUT_RD);
    while (recv(fd, &byte, sizeof byte, MSG_DONTWAIT) > 0)
        ;
}

static void send_error(int fd, uint32_t sequence, enum mlap_code code, const char *field, const char *message)
{
    struct mlap_error error = {.code = code};
    snprintf(error.field, sizeof error.field, "%s", field);
    snprintf(error.message, sizeof error.message, "%s", message);
    /* Whoever has no room for its last message goes without. */
    mlap_send_message(fd, MLAP_ERROR, sequence, &error, -1, MSG_DONTWAIT);
}

void mlad_peer_end(struct mlad_peer *peer, uint32_t sequence, enum mlap_code code, const char *field,
                   const char *message)
{
    mlad_log_provoked(LOG_INFO, "connection ended", MLAD_KV("uid", peer->identity.uid),
                      MLAD_KV("pid", peer->identity.pid), MLAD_KV("code", mlap_code_text(code)),
                      MLAD_KV("why", message));
    send_error(peer->fd, sequence, code, field, message);
    discard_input(peer->fd);
    leave(peer);
}

void mlad_peers_close(struct mlad_supervisor *supervisor)
{
    while (supervisor->peers) {
        discard_input(supervisor->peers->fd);
        leave(supervisor->peers);
    }
}

/* ---- answers ---- */

void mlad_peer_send(struct mlad_peer *peer, enum mlap_type type, uint32_t sequence, const void *body)
{
    if (peer->fd < 0 || mlap_send_message(peer->fd, type, sequence, body, -1, MSG_DONTWAIT) == 0)
        return;
    mlad_log_provoked(LOG_INFO, "connection dropped", MLAD_KV("uid", peer->identity.uid),
                      MLAD_KV("pid", peer->identity.pid),
                      MLAD_KV("why", errno == EAGAIN ? "it does not read its answers" : strerror(errno)));
    leave(peer);
}

void mlad_peer_refuse(struct mlad_peer *peer, uint32_t sequence, enum mlap_code code, const char *field,
                      const char *message)
{
    struct mlap_error error = {.code = code};
    snprintf(error.field, sizeof error.field, "%s", field);
    snprintf(error.message, sizeof error.message, "%s", message);
    mlad_peer_send(peer, MLAP_ERROR, sequence, &error);
}

/* ---- HELLO ---- */

/* Hand the connection over if the device takes it now; keep it waiting, or refuse it, if not. */
static void try_attach(struct mlad_peer *peer, struct mlad_device *device)
{
    char why[400];
    if (device->state == MLAP_device_state_ABSENT) {
        snprintf(why, sizeof why, "the device %s is absent: %s", device->name, device->reason);
        mlad_peer_end(peer, peer->attach.hello_seq, MLAP_code_UNAVAILABLE, "device", why);
    } else if (mlad_device_is_ready(device) && mlad_device_attach(device, &peer->attach, peer->fd) == 0) {
        mlad_log(LOG_DEBUG, "session handed over", MLAD_KV("session", peer->attach.session),
                 MLAD_KV("device", device->name), MLAD_KV("uid", peer->identity.uid),
                 MLAD_KV("pid", peer->identity.pid), MLAD_KV("client", peer->attach.hello.client));
        leave(peer);
    }
}

static void refuse_device(struct mlad_peer *peer, uint32_t sequence, const char *name)
{
    struct mlad_supervisor *supervisor = peer->supervisor;
    char served[256] = "", why[400];
    size_t n = 0;
    for (uint32_t i = 0; i < supervisor->n_devices && n < sizeof served; i++)
        n += (size_t)snprintf(served + n, sizeof served - n, "%s%s", i ? ", " : "", supervisor->devices[i]->name);
    snprintf(why, sizeof why, "no device '%s' is served here; there is %s", name, served);
    mlad_peer_refuse(peer, sequence, MLAP_code_NO_DEVICE, "device", why);
}

static void open_session(struct mlad_peer *peer, uint32_t sequence)
{
    struct mlap_welcome welcome = {.daemon = MLAD_NAME, .session = peer->session, .max_message = MLAP_MAX_MESSAGE};
    peer->state = MLAD_PEER_OPEN;
    mlad_peer_send(peer, MLAP_WELCOME, sequence, &welcome);
}

static void serve_hello(struct mlad_peer *peer, uint32_t sequence, const struct mlap_hello *hello)
{
    struct mlad_supervisor *supervisor = peer->supervisor;
    if (!mlap_has(hello, hello, device)) {
        peer->session = ++supervisor->last_session;
        open_session(peer, sequence);
        return;
    }
    struct mlad_device *device = mlad_supervisor_device(supervisor, hello->device);
    if (!device) {
        refuse_device(peer, sequence, hello->device);
        return;
    }
    if (mlap_has(hello, hello, priority) && hello->priority == MLAP_priority_HIGH &&
        !mlad_policy_may_hurry(&supervisor->config, &peer->identity)) {
        mlad_peer_refuse(peer, sequence, MLAP_code_DENIED, "priority",
                         "high priority is for users that high_priority_users in mlad.conf lists, and you are none; "
                         "ask for normal, or the administrator");
        return;
    }
    peer->attach = (struct mlap_attach){
        .session = ++supervisor->last_session,
        .uid = peer->identity.uid,
        .pid = (uint32_t)peer->identity.pid,
        .hello_seq = sequence,
        .hello = *hello,
    };
    peer->state = MLAD_PEER_WAITING;
    peer->deadline = now_ms(supervisor) + supervisor->config.hello_timeout;
    /* What it sends from now on is the worker's to read; here only its going away matters. */
    uv_poll_start(&peer->poll, UV_DISCONNECT, on_poll);
    try_attach(peer, device);
}

void mlad_peers_device_changed(struct mlad_supervisor *supervisor, struct mlad_device *device)
{
    struct mlad_peer *next;
    for (struct mlad_peer *peer = supervisor->peers; peer; peer = next) {
        next = peer->next;
        if (peer->state == MLAD_PEER_WAITING && strcmp(peer->attach.hello.device, device->name) == 0)
            try_attach(peer, device);
    }
}

/* ---- what it sends ---- */

static void deny(struct mlad_peer *peer, uint32_t sequence)
{
    char why[200];
    peer->supervisor->denied++;
    snprintf(why, sizeof why,
             "user %u may not connect; an operator can list the user in allowed_users, or a group of theirs in "
             "allowed_groups, of mlad.conf",
             peer->identity.uid);
    mlad_peer_end(peer, sequence, MLAP_code_DENIED, "", why);
}

static void serve(struct mlad_peer *peer, const struct mlap_header *header, const union mlap_body *body)
{
    char why[200];
    if (mlap_type_from(header->type) != MLAP_FROM_CLIENT) {
        snprintf(why, sizeof why, "%s is not a client's to send", mlap_type_name(header->type));
        mlad_peer_refuse(peer, header->sequence, MLAP_code_UNKNOWN_TYPE, "", why);
    } else if (header->type == MLAP_HELLO && peer->state == MLAD_PEER_OPEN)
        mlad_peer_refuse(peer, header->sequence, MLAP_code_STATE, "",
                         "HELLO was said before; connect anew for another session");
    else if (header->type == MLAP_HELLO)
        serve_hello(peer, header->sequence, &body->hello_);
    else if (peer->state != MLAD_PEER_OPEN) {
        snprintf(why, sizeof why, "%s came before HELLO; say HELLO first", mlap_type_name(header->type));
        mlad_peer_refuse(peer, header->sequence, MLAP_code_STATE, "", why);
    } else
        mlad_admin_serve(peer, header, body);
}

/* One datagram. Errors after which the two sides may no longer agree on what was said end the connection. */
static void handle(struct mlad_peer *peer, const char *datagram, long length, unsigned n_fds)
{
    static union mlap_body body;
    struct mlap_header header;
    struct mlap_fault fault;
    char why[200];
    enum mlap_code code = mlap_decode(datagram, (size_t)length, &header, &body, &fault);
    if (peer->state == MLAD_PEER_SILENT && !mlad_policy_allows(&peer->supervisor->config, &peer->identity, peer->fd))
        deny(peer, header.sequence);
    else if (code == MLAP_code_VERSION || code == MLAP_code_MALFORMED)
        mlad_peer_end(peer, 0, code, fault.field, fault.message);
    else if (header.sequence == 0)
        mlad_peer_end(peer, 0, MLAP_code_MALFORMED, "sequence",
                      "a request's sequence is 1 or more; 0 could not be answered");
    else if (code != MLAP_code_OK)
        mlad_peer_refuse(peer, header.sequence, code, fault.field, fault.message);
    else if (!mlap_fds_fit(header.type, n_fds)) { /* n_fds only says whether any came */
        snprintf(why, sizeof why, "%s carries %s file descriptor", mlap_type_name(header.type),
                 mlap_type_fds(header.type) ? "at least one" : "no");
        mlad_peer_refuse(peer, header.sequence, MLAP_code_FDS, "", why);
    } else
        serve(peer, &header, &body);
}

/* False when there is nothing to read. */
static bool receive_one(struct mlad_peer *peer)
{
    static char datagram[MLAP_MAX_MESSAGE];
    unsigned n_fds;
    long length = mlap_receive(peer->fd, datagram, sizeof datagram, NULL, &n_fds, MSG_DONTWAIT);
    if (length < 0 && errno == EAGAIN)
        return false;
    if (length > 0)
        handle(peer, datagram, length, n_fds);
    else if (length < 0 && errno == EMSGSIZE)
        mlad_peer_end(peer, 0, MLAP_code_MALFORMED, "", "the datagram is longer than 65536 bytes");
    else
        leave(peer);
    return true;
}

static void on_poll(uv_poll_t *poll, int status, int events)
{
    struct mlad_peer *peer = poll->data;
    if (status < 0 || (events & UV_DISCONNECT)) {
        leave(peer);
        return;
    }
    for (int i = 0; i < DATAGRAMS_A_TURN && peer->fd >= 0 && peer->state != MLAD_PEER_WAITING; i++)
        if (!receive_one(peer))
            return;
}

void mlad_peers_tick(struct mlad_supervisor *supervisor)
{
    struct mlad_peer *next;
    for (struct mlad_peer *peer = supervisor->peers; peer; peer = next) {
        next = peer->next;
        if (peer->state == MLAD_PEER_OPEN || now_ms(supervisor) < peer->deadline)
            continue;
        if (peer->state == MLAD_PEER_SILENT)
            mlad_peer_end(peer, 0, MLAP_code_TIMEOUT, "", "no valid HELLO came within hello_timeout");
        else
            mlad_peer_end(peer, peer->attach.hello_seq, MLAP_code_UNAVAILABLE, "device",
                          "the device's worker did not become ready in time; try again, or see `mlactl health`");
    }
}

/* ---- the beginning ---- */

static const char *over_limit(const struct mlad_supervisor *supervisor, const struct mlad_identity *identity)
{
    bool admin = mlad_policy_is_admin(&supervisor->config, identity);
    uint32_t of_user = 0;
    for (const struct mlad_peer *peer = supervisor->peers; peer; peer = peer->next)
        of_user += peer->identity.uid == identity->uid;
    if (supervisor->n_peers >= supervisor->config.max_connections + (admin ? ADMIN_RESERVE : 0))
        return "the daemon holds max_connections connections; close some, or try again";
    if (of_user >= supervisor->config.max_connections_per_user + (admin ? ADMIN_RESERVE : 0))
        return "the user has max_connections_per_user connections; close some, or try again";
    return NULL;
}

void mlad_peer_new(struct mlad_supervisor *supervisor, int fd)
{
    struct mlad_identity identity;
    const char *limit = NULL;
    struct mlad_peer *peer = NULL;
    bool known = mlad_policy_identify(fd, &identity);
    if (known)
        limit = over_limit(supervisor, &identity);
    if (known && !limit)
        peer = calloc(1, sizeof *peer);
    if (limit) {
        mlad_log_provoked(LOG_WARNING, "connection refused", MLAD_KV("uid", identity.uid), MLAD_KV("why", limit));
        send_error(fd, 0, MLAP_code_BUSY, "", limit);
        discard_input(fd);
    }
    if (!peer || uv_poll_init(&supervisor->loop, &peer->poll, fd) != 0) {
        free(peer);
        close(fd);
        return;
    }
    peer->supervisor = supervisor;
    peer->fd = fd;
    peer->identity = identity;
    peer->deadline = now_ms(supervisor) + supervisor->config.hello_timeout;
    peer->poll.data = peer;
    peer->next = supervisor->peers;
    supervisor->peers = peer;
    supervisor->n_peers++;
    if (uv_poll_start(&peer->poll, UV_READABLE, on_poll) != 0)
        leave(peer);
}
