/* Frames: arbitrary datagrams with any number of descriptors, through mlap_receive and mlap_decode; none of the
 * descriptors may be left open.
 *
 * An input is a row of frames: one byte of flags and descriptors, two of length, the datagram. Bit 7 of the first byte
 * makes the receive buffer small, so that datagrams are cut without having to be large. */
#include "fuzz.h"
#include "mlap.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

enum { MOST_DESCRIPTORS = MLAP_MAX_FDS + 1, SMALL_BUFFER = 48 };

static void require(int condition)
{
    if (!condition)
        abort();
}

static void send_frame(int socket, const uint8_t *bytes, size_t length, int fd, unsigned count)
{
    struct iovec part = {(void *)(uintptr_t)bytes, length};
    union { struct cmsghdr align; char bytes[CMSG_SPACE(MOST_DESCRIPTORS * sizeof(int))]; } control = {0};
    struct msghdr datagram = {.msg_iov = &part, .msg_iovlen = 1};
    if (count > 0) {
        datagram.msg_control = control.bytes;
        datagram.msg_controllen = CMSG_SPACE(count * sizeof(int));
        struct cmsghdr *rights = CMSG_FIRSTHDR(&datagram);
        *rights = (struct cmsghdr){.cmsg_len = CMSG_LEN(count * sizeof(int)), .cmsg_level = SOL_SOCKET,
                                   .cmsg_type = SCM_RIGHTS};
        for (unsigned i = 0; i < count; i++)
            memcpy(CMSG_DATA(rights) + i * sizeof fd, &fd, sizeof fd);
    }
    require(sendmsg(socket, &datagram, MSG_NOSIGNAL) == (ssize_t)length);
}

static void receive_frame(int socket, size_t capacity, size_t sent, unsigned sent_fds)
{
    static char buffer[MLAP_MAX_MESSAGE];
    static union mlap_body body;
    int fds[MLAP_MAX_FDS];
    unsigned n_fds;
    long length = mlap_receive(socket, buffer, capacity, fds, &n_fds, MSG_DONTWAIT);
    if (sent > capacity || sent_fds > MLAP_MAX_FDS)
        require(length == -1 && errno == EMSGSIZE && n_fds == 0);
    else
        require(length == (long)sent && n_fds == (sent == 0 ? 0 : sent_fds));
    for (unsigned i = 0; i < n_fds; i++)
        close(fds[i]);
    struct mlap_header header;
    if (length > 0)
        mlap_decode(buffer, (size_t)length, &header, &body, NULL);
}

/* Descriptors are given out lowest first: one that was left open shows in the next number. */
static int next_descriptor(int any)
{
    int next = dup(any);
    close(next);
    return next;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static int ends[2] = {-1, -1}, passed;
    if (ends[0] == -1) {
        require(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) == 0);
        passed = open("/dev/null", O_RDONLY | O_CLOEXEC);
    }
    int next = next_descriptor(passed);
    while (size >= 3) {
        unsigned count = data[0] % (MOST_DESCRIPTORS + 1);
        size_t capacity = data[0] & 0x80 ? SMALL_BUFFER : MLAP_MAX_MESSAGE;
        size_t length = (size_t)(data[1] | data[2] << 8);
        data += 3;
        size -= 3;
        length = length < size ? length : size;
        send_frame(ends[0], data, length, passed, count);
        receive_frame(ends[1], capacity, length, count);
        data += length;
        size -= length;
    }
    require(next_descriptor(passed) == next);
    return 0;
}
