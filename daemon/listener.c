/* listener.c - see listener.h. */
#include "listener.h"

#include "log.h"

#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <systemd/sd-daemon.h>
#include <time.h>
#include <unistd.h>

struct sentence {
    char *text;
    size_t size;
};

__attribute__((format(printf, 2, 3))) static bool refuse(struct sentence *error, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(error->text, error->size, format, arguments);
    va_end(arguments);
    return false;
}

static bool take_passed(struct mlad_listener *listener, int n, struct sentence *error)
{
    struct sockaddr_un address = {0};
    socklen_t size = sizeof address;
    int fd = SD_LISTEN_FDS_START;
    if (n > 1)
        return refuse(error, "systemd passed %d sockets; mlad.socket must name one", n);
    if (sd_is_socket(fd, AF_UNIX, SOCK_SEQPACKET, 1) <= 0)
        return refuse(error,
                      "the socket that systemd passed is no listening SEQPACKET socket; use ListenSequentialPacket=");
    if (fcntl(fd, F_SETFL, O_NONBLOCK) < 0 || getsockname(fd, (struct sockaddr *)&address, &size) < 0)
        return refuse(error, "the socket that systemd passed: %s", strerror(errno));
    snprintf(listener->path, sizeof listener->path, "%.107s", address.sun_path);
    listener->fd = fd;
    return true;
}

/* Nobody listens on the socket file at `address`? */
static bool is_stale(const struct sockaddr_un *address, struct sentence *error)
{
    struct stat st;
    if (lstat(address->sun_path, &st) == 0 && !S_ISSOCK(st.st_mode))
        return refuse(error, "%s exists and is no socket; move it away or choose another path", address->sun_path);
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    int error_number = fd < 0 || connect(fd, (const struct sockaddr *)address, sizeof *address) < 0 ? errno : 0;
    if (fd >= 0)
        close(fd);
    if (error_number == 0 || error_number == EAGAIN)
        return refuse(error, "another mlad is serving %s; stop it or choose another path", address->sun_path);
    if (error_number != ECONNREFUSED && error_number != ENOENT)
        return refuse(error, "%s exists and cannot be examined: %s", address->sun_path, strerror(error_number));
    return true;
}

static bool bind_or_replace(int fd, const struct sockaddr_un *address, struct sentence *error)
{
    if (bind(fd, (const struct sockaddr *)address, sizeof *address) == 0)
        return true;
    if (errno == EADDRINUSE) {
        if (!is_stale(address, error))
            return false;
        mlad_log(LOG_NOTICE, "replacing a socket that nobody serves", MLAD_KV("path", address->sun_path));
        if ((unlink(address->sun_path) == 0 || errno == ENOENT) &&
            bind(fd, (const struct sockaddr *)address, sizeof *address) == 0)
            return true;
    }
    return refuse(error, "cannot bind %s: %s", address->sun_path, strerror(errno));
}

/* Two daemons that start at a time must not both find the other's socket stale: whoever holds the lock on the
 * directory may look and replace. Returns its descriptor, -1 with errno. */
static int lock_directory(const char *path)
{
    char copy[108];
    snprintf(copy, sizeof copy, "%s", path);
    const char *directory = dirname(copy);
    if (mkdir(directory, 0755) == 0)
        mlad_log(LOG_INFO, "made the socket's directory", MLAD_KV("path", directory));
    int fd = open(directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    for (int i = 0; fd >= 0 && flock(fd, LOCK_EX | LOCK_NB) < 0; i++) {
        if (errno != EWOULDBLOCK || i == 20) { /* a second; daemons hold it for less than a millisecond */
            int saved = errno;
            close(fd);
            errno = saved;
            return -1;
        }
        nanosleep(&(struct timespec){.tv_nsec = 50000000}, NULL);
    }
    return fd;
}

static bool make_own(struct mlad_listener *listener, const char *path, mode_t mode, struct sentence *error)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct stat st;
    snprintf(address.sun_path, sizeof address.sun_path, "%s", path);
    snprintf(listener->path, sizeof listener->path, "%s", path);
    int directory = lock_directory(path);
    if (directory < 0)
        return refuse(error, "the directory of %s cannot be used: %s; make it, or choose another path with --socket",
                      path, strerror(errno));
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    bool done = false;
    /* The file gets the socket's mode less the umask, from its first moment. */
    mode_t umask_before = umask(0);
    if (fd < 0 || fchmod(fd, mode) < 0)
        refuse(error, "no socket can be made: %s", strerror(errno));
    else if (bind_or_replace(fd, &address, error)) {
        done = listen(fd, SOMAXCONN) == 0 && stat(path, &st) == 0;
        if (!done)
            refuse(error, "cannot listen on %s: %s", path, strerror(errno));
    }
    umask(umask_before);
    close(directory);
    if (!done) {
        if (fd >= 0)
            close(fd);
        return false;
    }
    listener->fd = fd;
    listener->ours = true;
    listener->device = st.st_dev;
    listener->inode = st.st_ino;
    return true;
}

bool mlad_listener_open(struct mlad_listener *listener, const char *path, mode_t mode, char *error, size_t size)
{
    struct sentence sentence = {error, size};
    *listener = (struct mlad_listener){.fd = -1};
    int passed = sd_listen_fds(1);
    if (passed < 0)
        return refuse(&sentence, "the sockets passed by systemd cannot be used: %s", strerror(-passed));
    return passed > 0 ? take_passed(listener, passed, &sentence) : make_own(listener, path, mode, &sentence);
}

static void on_connection(uv_poll_t *poll, int status, int events)
{
    struct mlad_listener *listener = poll->data;
    for (int i = 0; status == 0 && (events & UV_READABLE) && i < 32; i++) {
        int fd = accept4(listener->fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
        if (fd >= 0)
            listener->accepted(listener, fd);
        else if (errno == EAGAIN)
            return;
        else if (errno != EINTR && errno != ECONNABORTED) {
            /* Without a descriptor the connection stays pending and the poll readable: look again at the next tick. */
            mlad_log_provoked(LOG_ERR, "cannot accept a connection", MLAD_KV("why", strerror(errno)));
            uv_poll_stop(&listener->poll);
            return;
        }
    }
}

int mlad_listener_start(struct mlad_listener *listener, uv_loop_t *loop,
                        void (*accepted)(struct mlad_listener *listener, int fd), void *owner)
{
    listener->accepted = accepted;
    listener->poll.data = listener;
    int error = uv_poll_init(loop, &listener->poll, listener->fd);
    if (error)
        return error;
    listener->owner = owner;
    return uv_poll_start(&listener->poll, UV_READABLE, on_connection);
}

void mlad_listener_tick(struct mlad_listener *listener)
{
    if (listener->fd >= 0 && listener->owner && !uv_is_active((uv_handle_t *)&listener->poll))
        uv_poll_start(&listener->poll, UV_READABLE, on_connection);
}

void mlad_listener_close(struct mlad_listener *listener)
{
    struct stat st;
    if (listener->fd < 0)
        return;
    if (listener->ours && lstat(listener->path, &st) == 0 && st.st_dev == listener->device &&
        st.st_ino == listener->inode)
        unlink(listener->path);
    if (listener->owner)
        uv_close((uv_handle_t *)&listener->poll, NULL);
    close(listener->fd);
    listener->fd = -1;
}
