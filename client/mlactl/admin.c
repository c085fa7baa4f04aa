/* admin.c - the query connection. It owns one non-blocking socket and one deadline. */
#include "admin.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

/* Session lists come in pieces; no daemon has a million sessions, a broken one might say so for ever. */
enum { MAX_SESSION_PAGES = 16384 };

struct admin {
    int socket;
    int timeout_ms;
    int64_t deadline_ms;
    uint32_t sequence;
    char path[108], daemon[64];
    union mlap_body body;
    uint8_t bytes[MLAP_MAX_MESSAGE];
};

static int64_t now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * INT64_C(1000) + now.tv_nsec / 1000000;
}

int admin_left_ms(const struct admin *admin)
{
    int64_t left = admin->deadline_ms - now_ms();
    return left > 1 ? (int)left : 1;
}

static int timed_out(const struct admin *admin, struct ctl_fault *fault)
{
    ctl_fail(fault, "mlad at %s did not answer in %g s", admin->path, admin->timeout_ms / 1000.0);
    return CTL_TIMED_OUT;
}

static int socket_failed(const struct admin *admin, struct ctl_fault *fault)
{
    if (errno == ENOENT || errno == ECONNREFUSED) {
        ctl_fail(fault, "mlad is not running: nobody listens at %s", admin->path);
        return CTL_NOT_RUNNING;
    }
    if (errno == EACCES || errno == EPERM)
        ctl_fail(fault, "%s: permission denied; is this user in mlad's group?", admin->path);
    else
        ctl_fail(fault, "%s: %s", admin->path, strerror(errno));
    return CTL_FAILED;
}

/* EAGAIN means a full backlog: the daemon is there and does not accept. */
static int connect_socket(struct admin *admin, struct ctl_fault *fault)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    memcpy(address.sun_path, admin->path, sizeof admin->path);
    admin->socket = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (admin->socket < 0)
        return socket_failed(admin, fault);
    while (connect(admin->socket, (struct sockaddr *)&address, sizeof address) < 0) {
        if (errno != EAGAIN && errno != EINTR)
            return socket_failed(admin, fault);
        if (now_ms() >= admin->deadline_ms)
            return timed_out(admin, fault);
        poll(NULL, 0, 10);
    }
    return CTL_OK;
}

static int receive(struct admin *admin, struct mlap_header *header, struct ctl_fault *fault)
{
    for (;;) {
        int fds[MLAP_MAX_FDS];
        unsigned n_fds = 0;
        long length = mlap_receive(admin->socket, admin->bytes, sizeof admin->bytes, fds, &n_fds, MSG_DONTWAIT);
        while (n_fds)
            close(fds[--n_fds]);
        if (length > 0) {
            struct mlap_fault bad;
            if (mlap_decode(admin->bytes, (size_t)length, header, &admin->body, &bad) == MLAP_code_OK)
                return CTL_OK;
            ctl_fail(fault, "mlad sent what mlactl " MLAD_VERSION_TEXT " cannot read: %s", bad.message);
            return CTL_FAILED;
        }
        if (length == 0 || errno == ECONNRESET) {
            ctl_fail(fault, "mlad closed the connection; its log says why");
            return CTL_FAILED;
        }
        if (errno != EAGAIN && errno != EINTR)
            return socket_failed(admin, fault);
        int64_t left = admin->deadline_ms - now_ms();
        if (left <= 0)
            return timed_out(admin, fault);
        poll(&(struct pollfd){.fd = admin->socket, .events = POLLIN}, 1, (int)left);
    }
}

int admin_ask(struct admin *admin, enum mlap_type type, const void *body, enum mlap_type expected,
              const union mlap_body **reply, struct ctl_fault *fault)
{
    uint32_t sequence = ++admin->sequence;
    if (mlap_send_message(admin->socket, type, sequence, body, -1, MSG_DONTWAIT) < 0 && errno != EPIPE &&
        errno != ECONNRESET)
        return socket_failed(admin, fault); /* a closed peer may have left the reason to read */
    struct mlap_header header;
    do {
        int code = receive(admin, &header, fault);
        if (code)
            return code;
        if (header.type == MLAP_ERROR && (header.sequence == sequence || header.sequence == 0)) {
            const struct mlap_error *error = &admin->body.error_;
            ctl_fail(fault, "%s (%s%s%s)", error->message, mlap_code_text(error->code), *error->field ? ", " : "",
                     error->field);
            return error->code == MLAP_code_TIMEOUT ? CTL_TIMED_OUT : CTL_FAILED;
        }
    } while (header.sequence != sequence);
    if (header.type != (uint32_t)expected) {
        ctl_fail(fault, "mlad answered %s with message type %u", mlap_type_name(type), header.type);
        return CTL_FAILED;
    }
    if (reply)
        *reply = &admin->body;
    return CTL_OK;
}

int admin_new(const struct ctl *ctl, struct admin **out, struct ctl_fault *fault)
{
    admin_auto struct admin *admin = calloc(1, sizeof *admin);
    if (!admin) {
        ctl_fail(fault, "out of memory");
        return CTL_FAILED;
    }
    admin->socket = -1;
    admin->timeout_ms = ctl->timeout_ms;
    admin->deadline_ms = now_ms() + ctl->timeout_ms;
    if (strlen(ctl->socket) >= sizeof admin->path) {
        ctl_fail(fault, "--socket: the path is longer than %zu bytes", sizeof admin->path - 1);
        return CTL_FAILED;
    }
    strcpy(admin->path, ctl->socket);
    int code = connect_socket(admin, fault);
    if (code)
        return code;
    struct mlap_hello hello = {.client = "mlactl"};
    const union mlap_body *reply;
    code = admin_ask(admin, MLAP_HELLO, &hello, MLAP_WELCOME, &reply, fault);
    if (code)
        return code;
    memcpy(admin->daemon, reply->welcome_.daemon, sizeof admin->daemon);
    *out = admin;
    admin = NULL;
    return CTL_OK;
}

void admin_free(struct admin *admin)
{
    if (!admin)
        return;
    if (admin->socket >= 0)
        close(admin->socket);
    free(admin);
}

const char *admin_daemon(const struct admin *admin) { return admin->daemon; }

int admin_status(struct admin *admin, struct mlap_status_reply **status, struct ctl_fault *fault)
{
    const union mlap_body *reply;
    int code = admin_ask(admin, MLAP_STATUS, &(struct mlap_status){0}, MLAP_STATUS_REPLY, &reply, fault);
    if (code)
        return code;
    *status = malloc(sizeof **status);
    if (!*status) {
        ctl_fail(fault, "out of memory");
        return CTL_FAILED;
    }
    **status = reply->status_reply_;
    return CTL_OK;
}

const struct mlap_device *admin_find(const struct mlap_status_reply *status, const char *device)
{
    for (unsigned i = 0; i < status->n_devices; i++)
        if (strcmp(status->devices[i].name, device) == 0)
            return &status->devices[i];
    return NULL;
}

int admin_sessions(struct admin *admin, const char *device, session_sink *sink, void *to, struct ctl_fault *fault)
{
    struct mlap_sessions ask = {0};
    snprintf(ask.device, sizeof ask.device, "%s", device);
    mlap_set(&ask, sessions, after);
    for (unsigned page = 0; page < MAX_SESSION_PAGES; page++) {
        const union mlap_body *reply;
        int code = admin_ask(admin, MLAP_SESSIONS, &ask, MLAP_SESSIONS_REPLY, &reply, fault);
        if (code)
            return code;
        const struct mlap_sessions_reply *part = &reply->sessions_reply_;
        for (unsigned i = 0; i < part->n_sessions; i++)
            sink(to, device, &part->sessions[i]);
        if (!part->more || !part->n_sessions)
            break;
        ask.after = part->sessions[part->n_sessions - 1].session;
    }
    return CTL_OK;
}
