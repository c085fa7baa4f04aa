/* transport.c - the link to the daemon: connect, greet, receive, and start over when it breaks.
 *
 *            attempt            WELCOME, device known
 *   AWAY ------------> GREETING ----------------------> UP ---ERROR of sequence 0---> DEAD
 *    ^  ^                  | WELCOME, device not known   |
 *    |  |                  v                             |
 *    |  +--STATUS_REPLY-- ASKING                         |
 *    +------ end of file, or refused for the moment -----+
 *
 * The client owns its socket. Nothing here waits: mlac_recover does what is due, mlac_receive takes one datagram, and
 * wait.c calls them in turn. An *effort* is all attempts from the first until the session is restored (every
 * registration and plan accepted again); it lasts reconnect_ms at most, so a session that keeps dying while it is being
 * restored ends in an error. After a failed effort the client is AWAY, and the next call begins another. */
#include "mlac.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum { FIRST_DELAY_MS = 1, LAST_DELAY_MS = 500, GREETING_MS = 1000, HELLO_SEQUENCE = 1, STATUS_SEQUENCE = 2,
       LINGER_NS = 100000 };

static void forget_socket(struct mla_client *client)
{
    mlac_fd_forget(client);
    if (client->socket >= 0)
        close(client->socket);
    client->socket = -1;
    client->broken = false;
    client->link = MLAC_AWAY;
}

void mlac_settled(struct mla_client *client)
{
    client->trying = false;
    client->delay_ns = FIRST_DELAY_MS * MLAC_MS;
}

void mlac_die(struct mla_client *client, const mla_error *error)
{
    forget_socket(client);
    client->link = MLAC_DEAD;
    client->failure = *error;
    mlac_calls_end(client, &client->failure);
}

/* This effort has failed: whoever waits gets `error`. */
static void give_up(struct mla_client *client, const mla_error *error)
{
    forget_socket(client);
    mlac_settled(client);
    client->retry_at = 0;
    mlac_calls_end(client, error);
}

/* This attempt has failed for the moment: after a while try again, with delays that double and scatter (50..100 %). */
static void again(struct mla_client *client, int64_t now, const mla_error *error)
{
    if (now >= client->give_up_at) {
        give_up(client, error);
        return;
    }
    forget_socket(client);
    client->random = client->random * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    int64_t half = client->delay_ns / 2;
    client->retry_at = now + half + (int64_t)(client->random >> 33) % half;
    if (client->retry_at > client->give_up_at)
        client->retry_at = client->give_up_at;
    client->delay_ns *= 2;
    if (client->delay_ns > LAST_DELAY_MS * MLAC_MS)
        client->delay_ns = LAST_DELAY_MS * MLAC_MS;
}

/* The session that was up has died. */
static void lost(struct mla_client *client, int64_t now)
{
    forget_socket(client);
    mlac_calls_end(client, NULL);
    if (client->trying) {
        mla_error error;
        mlac_fail(&error, MLA_NOT_CONNECTED, "", "the worker keeps dying while the session is being restored; "
                  "`mlactl health` and the daemon's log say more");
        again(client, now, &error);
    } else {
        client->retry_at = now;
    }
}

void mlac_hello(const struct mla_client *client, struct mlap_hello *hello)
{
    memset(hello, 0, sizeof *hello);
    snprintf(hello->client, sizeof hello->client, "%s", client->name);
    if (client->device[0]) {
        snprintf(hello->device, sizeof hello->device, "%s", client->device);
        mlap_set(hello, hello, device);
    }
    mlac_placement_hello(client, hello);
}

/* errno of a failed connect, in words. */
static void describe(const struct mla_client *client, int number, mla_error *error)
{
    const char *path = client->address.sun_path;
    if (number == ENOENT || number == ECONNREFUSED)
        mlac_fail(error, MLA_NOT_CONNECTED, "options.socket",
                  "no daemon listens on %s; start mlad, or name its socket by mla_options.socket or $MLAD_SOCKET",
                  path);
    else if (number == EACCES || number == EPERM)
        mlac_fail(error, MLA_DENIED, "options.socket", "this user may not open %s; its owner and mode say who may",
                  path);
    else
        mlac_fail(error, MLA_NOT_CONNECTED, "options.socket", "%s cannot be connected to: %s", path, strerror(number));
}

static int connect_to(const struct sockaddr_un *address)
{
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return -1;
    if (connect(fd, (const struct sockaddr *)address, sizeof *address) == 0 && fcntl(fd, F_SETFL, 0) == 0)
        return fd;      /* blocking from here on; whatever must not block says so */
    int number = errno;
    close(fd);
    errno = number;
    return -1;
}

static void attempt(struct mla_client *client, int64_t now)
{
    /* Under MPS a fault that killed the worker also ended our context, and no worker may come before we are gone. */
    if (!mlac_calls_check(client))
        return;
    if (!client->trying)
        client->give_up_at = now + client->reconnect_ns;
    client->trying = true;
    mla_error error;
    client->socket = connect_to(&client->address);
    if (client->socket < 0) {
        int number = errno;
        describe(client, number, &error);
        /* A daemon that starts may not have set its socket's mode yet; one that we never met means it. */
        if (error.code == MLA_DENIED && !client->met)
            give_up(client, &error);
        else
            again(client, now, &error);
        return;
    }
    struct mlap_hello hello;
    mlac_hello(client, &hello);
    client->link = MLAC_GREETING;
    if (mlap_send_message(client->socket, MLAP_HELLO, HELLO_SEQUENCE, &hello, -1, MSG_DONTWAIT) < 0 &&
        errno != EPIPE && errno != ECONNRESET) {        /* gone already: its last words are still to be read */
        describe(client, errno, &error);
        again(client, now, &error);
        return;
    }
    client->greet_until = now + GREETING_MS * MLAC_MS;
    if (client->greet_until < client->give_up_at)
        client->greet_until = client->give_up_at;
}

void mlac_recover(struct mla_client *client, int64_t now)
{
    if (client->link == MLAC_AWAY && now >= client->retry_at) {
        attempt(client, now);
    } else if ((client->link == MLAC_GREETING || client->link == MLAC_ASKING) && now >= client->greet_until &&
               !client->leading)
{
        mla_error error;
        mlac_fail(&error, MLA_TIMEOUT, "", "the daemon on %s accepted a connection and did not answer in time",
                  client->address.sun_path);
        again(client, now, &error);
    }
    if (client->link == MLAC_UP)
        mlac_flush(client, now);
}

int64_t mlac_timer(const struct mla_client *client)
{
    switch (client->link) {
    case MLAC_AWAY:
        return client->retry_at;
    case MLAC_GREETING:
    case MLAC_ASKING:
        return client->greet_until;
    case MLAC_UP:
        return client->paused_until && !TAILQ_EMPTY(&client->outbox) ? client->paused_until : MLAC_NEVER;
    case MLAC_DEAD:
        break;
    }
    return MLAC_NEVER;
}

/* Of the daemon's devices take the first that is served and is no oracle. */
static void choose_device(struct mla_client *client, const struct mlap_status_reply *status, int64_t now)
{
    mla_error error;
    for (uint32_t i = 0; i < status->n_devices; i++) {
        const struct mlap_device *device = &status->devices[i];
        if (device->state == MLAP_device_state_ABSENT || strcmp(device->name, "reference") == 0)
            continue;
        snprintf(client->device, sizeof client->device, "%s", device->name);
        forget_socket(client);
        client->retry_at = now;
        return;
    }
    mlac_fail(&error, MLA_NO_DEVICE, "options.device",
              "the daemon serves no device but `reference`; name that one to use it");
    give_up(client, &error);
}

static void malformed(struct mla_client *client, mla_status code, const char *what)
{
    mla_error error;
    mlac_fail(&error, code, "", "the daemon broke the protocol: %s", what);
    mlac_die(client, &error);
}

static bool passes(enum mlap_code code)
{
    return code == MLAP_code_UNAVAILABLE || code == MLAP_code_BUSY || code == MLAP_code_TIMEOUT;
}

/* Before the session is up. */
static void greeted(struct mla_client *client, const struct mlap_header *header, const union mlap_body *body,
                    int64_t now)
{
    bool asking = client->link == MLAC_ASKING;
    if (header->type == MLAP_ERROR) {
        mla_error error;
        mlac_fail(&error, (mla_status)body->error_.code, body->error_.field, "%s", body->error_.message);
        if (body->error_.code == MLAP_code_OK)
            malformed(client, MLA_MALFORMED, "an error without a code");
        else if (passes(body->error_.code))
            again(client, now, &error);
        else
            give_up(client, &error);
    } else if (header->type == MLAP_WELCOME && !asking && client->device[0]) {
        client->link = MLAC_UP;
        client->met = true;
        mlac_placement_welcome(client, &body->welcome_);
        mlac_calls_replay(client);
    } else if (header->type == MLAP_WELCOME && !asking) {
        struct mlap_status status = {0};
        client->link = MLAC_ASKING;     /* should this not be sent, the end of file follows */
        mlap_send_message(client->socket, MLAP_STATUS, STATUS_SEQUENCE, &status, -1, MSG_DONTWAIT);
    } else if (header->type == MLAP_STATUS_REPLY && asking) {
        choose_device(client, &body->status_reply_, now);
    } else {
        malformed(client, MLA_MALFORMED, "an answer to nothing, before the session was open");
    }
}

static void message(struct mla_client *client, const struct mlap_header *header, const union mlap_body *body,
                    int64_t now)
{
    if (client->link != MLAC_UP) {
        greeted(client, header, body, now);
    } else if (header->type == MLAP_ERROR && header->sequence == 0 && passes(body->error_.code)) {
        lost(client, now);
    } else if (header->type == MLAP_ERROR && header->sequence == 0 && body->error_.code != MLAP_code_OK) {
        mla_error error;
        mlac_fail(&error, (mla_status)body->error_.code, body->error_.field, "%s", body->error_.message);
        mlac_die(client, &error);
    } else if (!mlac_answer(client, header, body, now)) {
        malformed(client, MLA_MALFORMED, "an answer to nothing that was asked");
    }
}

static void end_of_file(struct mla_client *client, int64_t now)
{
    if (client->link == MLAC_UP) {
        lost(client, now);
        return;
    }
    mla_error error;
    mlac_fail(&error, MLA_NOT_CONNECTED, "", "the daemon on %s closed the connection before the session was open",
              client->address.sun_path);
    again(client, now, &error);
}

/* One datagram, waited for until `until`. As mlap_receive; runs without the lock. A small decode is answered within
 * microseconds, which waking an idle processor can cost as well: look out for it for a moment before sleeping, giving
 * way to whoever else can run. */
static long receive(struct mla_client *client, int fd, int64_t until, struct mlap_header *header,
                    struct mlap_fault *fault)
{
    int fds[MLAP_MAX_FDS];
    unsigned n_fds = 0;
    long length;
    int64_t now = mlac_now(), asleep_at = now + LINGER_NS;
    while ((length = mlap_receive(fd, client->inbox, sizeof client->inbox, fds, &n_fds, MSG_DONTWAIT)) < 0 &&
           errno == EAGAIN && now < until) {
        struct pollfd item = {.fd = fd, .events = POLLIN};
        struct timespec span = {.tv_sec = (until - now) / 1000000000, .tv_nsec = (until - now) % 1000000000};
        if (now < asleep_at)
            sched_yield();
        else
            ppoll(&item, 1, until == MLAC_NEVER ? NULL : &span, NULL);
        now = mlac_now();
    }
    fault->code = MLAP_code_OK;
    if (length > 0)
        mlap_decode(client->inbox, (size_t)length, header, &client->body, fault);
    if (n_fds)
        mlap_fail(fault, MLAP_code_FDS, "", "a file descriptor came with the message");
    for (unsigned i = 0; i < n_fds; i++)
        close(fds[i]);
    return length;
}

bool mlac_receive(struct mla_client *client, int64_t until)
{
    struct mlap_header header;
    struct mlap_fault fault;
    int fd = client->socket;
    client->leading = true;
    mlac_unlock(client);
    long length = receive(client, fd, until, &header, &fault);
    int number = errno;
    mlac_lock(client);
    client->leading = false;

    int64_t now = mlac_now();
    if (length > 0 && fault.code == MLAP_code_OK)
        message(client, &header, &client->body, now);
    else if (length > 0 && fault.code == MLAP_code_MEMORY)
        end_of_file(client, now);       /* an answer is gone; a new session gives another */
    else if (length > 0)
        malformed(client, fault.code == MLAP_code_VERSION ? MLA_VERSION : MLA_MALFORMED, fault.message);
    else if (length == 0)
        end_of_file(client, now);
    else if (number == EAGAIN || number == EINTR)
        return false;
    else if (number == EMSGSIZE)
        malformed(client, MLA_MALFORMED, "a datagram longer than the protocol allows");
    else if (number != ECONNRESET) /* a reset is told once, then what the peer had sent before, then the end of file */
        end_of_file(client, now);
    return true;
}
