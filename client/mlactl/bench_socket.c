/* bench_socket.c - the raw round trip: two processes, one SEQPACKET pair, blocking calls and nothing else. */
#include "bench.h"

#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { MAX_DATAGRAM = 4096 };

struct pingpong {
    int socket;
    pid_t child;
    size_t request_bytes, reply_bytes;
};

uint64_t bench_now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static _Noreturn void answer(int socket, size_t reply_bytes, pid_t parent)
{
    uint8_t bytes[MAX_DATAGRAM] = {0};
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent)
        _exit(0);
    while (recv(socket, bytes, sizeof bytes, 0) > 0)
        if (send(socket, bytes, reply_bytes, MSG_NOSIGNAL) < 0)
            break;
    _exit(0);
}

int pingpong_new(size_t request_bytes, size_t reply_bytes, struct pingpong **out, struct ctl_fault *fault)
{
    int ends[2];
    struct pingpong *pingpong = calloc(1, sizeof *pingpong);
    if (!pingpong || request_bytes > MAX_DATAGRAM || reply_bytes > MAX_DATAGRAM ||
        socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) < 0) {
        free(pingpong);
        return ctl_fail(fault, "cannot make a socket pair: %s", strerror(errno));
    }
    pid_t parent = getpid();
    *pingpong = (struct pingpong){ends[0], fork(), request_bytes, reply_bytes};
    if (pingpong->child == 0) {
        close(ends[0]);
        answer(ends[1], reply_bytes, parent);
    }
    close(ends[1]);
    if (pingpong->child < 0) {
        pingpong_free(pingpong);
        return ctl_fail(fault, "cannot fork: %s", strerror(errno));
    }
    *out = pingpong;
    return 0;
}

void pingpong_free(struct pingpong *pingpong)
{
    if (!pingpong)
        return;
    close(pingpong->socket); /* its end of file ends the child */
    if (pingpong->child > 0)
        waitpid(pingpong->child, NULL, 0);
    free(pingpong);
}

int pingpong_once(struct pingpong *pingpong, double *ns, struct ctl_fault *fault)
{
    uint8_t bytes[MAX_DATAGRAM] = {0};
    uint64_t from = bench_now_ns();
    if (send(pingpong->socket, bytes, pingpong->request_bytes, MSG_NOSIGNAL) < 0 ||
        recv(pingpong->socket, bytes, sizeof bytes, 0) != (ssize_t)pingpong->reply_bytes)
        return ctl_fail(fault, "the socket ping-pong broke: %s", strerror(errno));
    *ns = (double)(bench_now_ns() - from);
    return 0;
}
