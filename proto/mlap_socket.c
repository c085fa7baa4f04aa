/* mlap_socket.c - datagrams and the file descriptors that travel with them, over AF_UNIX SOCK_SEQPACKET.
 * A received descriptor is either handed to the caller or closed here; none is ever lost. */
#include "mlap.h"

#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

/* Room for one descriptor more than is legal: with padding the kernel may deliver it anyway. */
union control {
    struct cmsghdr align;
    char bytes[CMSG_SPACE(sizeof(int) * (MLAP_MAX_FDS + 1))];
};

/* The kernel's own shortages pass: for a caller they are one with "not now". */
static int not_now(void)
{
    if (errno == ENOMEM || errno == ENOBUFS || errno == ETOOMANYREFS)
        errno = EAGAIN;
    return -1;
}

int mlap_send_fds(int socket, const void *bytes, size_t length, const int *fds, unsigned n_fds, int flags)
{
    struct iovec part = {(void *)(uintptr_t)bytes, length};
    struct msghdr datagram = {.msg_iov = &part, .msg_iovlen = 1};
    union control control = {0};
    if (n_fds > MLAP_MAX_FDS) {
        errno = EINVAL;
        return -1;
    }
    if (n_fds > 0) {
        size_t room = n_fds * sizeof *fds;
        datagram.msg_control = control.bytes;
        datagram.msg_controllen = CMSG_SPACE(room);
        struct cmsghdr *rights = CMSG_FIRSTHDR(&datagram);
        *rights = (struct cmsghdr){.cmsg_len = CMSG_LEN(room), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS};
        memcpy(CMSG_DATA(rights), fds, room);
    }
    ssize_t sent;
    do
        sent = sendmsg(socket, &datagram, flags | MSG_NOSIGNAL);
    while (sent < 0 && errno == EINTR);
    return sent < 0 ? not_now() : 0;
}

int mlap_send(int socket, const void *bytes, size_t length, int fd, int flags)
{
    return mlap_send_fds(socket, bytes, length, &fd, fd != -1, flags);
}

long mlap_receive(int socket, void *buffer, size_t capacity, int fds[MLAP_MAX_FDS], unsigned *n_fds, int flags)
{
    struct iovec part = {buffer, capacity};
    union control control;
    struct msghdr datagram = {.msg_iov = &part, .msg_iovlen = 1};
    if (fds != NULL) {
        datagram.msg_control = control.bytes;
        datagram.msg_controllen = sizeof control.bytes;
    }
    *n_fds = 0;
    ssize_t length;
    do
        length = recvmsg(socket, &datagram, flags | MSG_CMSG_CLOEXEC);
    while (length < 0 && errno == EINTR);
    if (length < 0)
        return not_now();

    if (fds == NULL && (datagram.msg_flags & MSG_CTRUNC) != 0) {
        datagram.msg_flags &= ~MSG_CTRUNC;
        *n_fds = 1;
    }
    int got[sizeof control.bytes / sizeof(int)];
    unsigned n_got = 0;
    for (struct cmsghdr *item = CMSG_FIRSTHDR(&datagram); item != NULL; item = CMSG_NXTHDR(&datagram, item)) {
        if (item->cmsg_level != SOL_SOCKET || item->cmsg_type != SCM_RIGHTS)
            continue;
        size_t bytes = item->cmsg_len - CMSG_LEN(0);
        memcpy(got + n_got, CMSG_DATA(item), bytes);
        n_got += (unsigned)(bytes / sizeof(int));
    }
    bool cut = (datagram.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) != 0 || n_got > MLAP_MAX_FDS;
    if (cut || length == 0) {
        for (unsigned i = 0; i < n_got; i++)
            close(got[i]);
        if (cut)
            errno = EMSGSIZE;
        return cut ? -1 : 0;
    }
    if (fds != NULL) {
        memcpy(fds, got, n_got * sizeof(int));
        *n_fds = n_got;
    }
    return (long)length;
}

int mlap_send_message(int socket, enum mlap_type type, uint32_t sequence, const void *body, int fd, int flags)
{
    char buffer[MLAP_MAX_MESSAGE];
    long length = mlap_encode(buffer, sizeof buffer, type, sequence, body);
    return length < 0 ? -1 : mlap_send(socket, buffer, (size_t)length, fd, flags);
}
