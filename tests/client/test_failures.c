/* test_failures.c - the n-th allocation or system call of libmla fails, for every n of a whole session: each call then
 * succeeds or reports an error, nothing crashes, and (under ASan) nothing leaks. The linker wraps the calls (see
 * CMakeLists.txt). */
#include "peer.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>
#include <errno.h>
#include <fcntl.h>
#include <msgpack.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <unistd.h>

static _Thread_local int countdown;     /* calls of this thread until one fails; 0: none does */

static bool fails(int number)
{
    if (countdown == 0 || --countdown > 0)
        return false;
    errno = number;
    return true;
}

#define WRAP(type, name, failure, number, parameters, arguments) \
    type __real_##name parameters; \
    type __wrap_##name parameters; \
    type __wrap_##name parameters { return fails(number) ? failure : __real_##name arguments; }

WRAP(void *, malloc, NULL, ENOMEM, (size_t n), (n))
WRAP(void *, calloc, NULL, ENOMEM, (size_t n, size_t size), (n, size))
WRAP(void *, mmap, MAP_FAILED, ENOMEM, (void *a, size_t n, int p, int f, int fd, off_t o), (a, n, p, f, fd, o))
WRAP(int, memfd_create, -1, EMFILE, (const char *name, unsigned flags), (name, flags))
WRAP(int, ftruncate, -1, ENOSPC, (int fd, off_t n), (fd, n))
WRAP(int, socket, -1, EMFILE, (int a, int b, int c), (a, b, c))
WRAP(int, connect, -1, ECONNREFUSED, (int fd, const struct sockaddr *a, socklen_t n), (fd, a, n))
WRAP(ssize_t, sendmsg, -1, ENOBUFS, (int fd, const struct msghdr *m, int f), (fd, m, f))
WRAP(ssize_t, recvmsg, -1, EINTR, (int fd, struct msghdr *m, int f), (fd, m, f))
WRAP(int, epoll_create1, -1, EMFILE, (int flags), (flags))
WRAP(int, epoll_ctl, -1, ENOSPC, (int e, int op, int fd, struct epoll_event *event), (e, op, fd, event))
WRAP(msgpack_unpack_return, msgpack_unpack_next, MSGPACK_UNPACK_NOMEM_ERROR, ENOMEM,
     (msgpack_unpacked *u, const char *b, size_t n, size_t *o), (u, b, n, o))
WRAP(int, timerfd_create, -1, EMFILE, (int clock, int flags), (clock, flags))

static bool sane(mla_status status, const mla_error *error)
{
    return status == MLA_OK || (error->code == status && error->message[0]);
}

/* A session from beginning to end, as far as it gets. */
static void session(const struct peer *peer)
{
    mla_error e = {0};
    mla_options options;
    mla_options_init(&options);
    options.socket = peer->path;
    options.device = "cpu";
    options.reconnect_ms = 2000;
    mla_client *client;
    mla_status status = mla_connect(&client, &options, &e);
    assert_true(sane(status, &e));
    if (status != MLA_OK)
        return;
    mla_buffer *buffer;
    mla_plan *plan;
    mla_ticket ticket;
    mla_result result;
    mla_fd(client);
    status = mla_buffer_alloc(client, 2 * 1024 * 1024, &buffer, &e);
    assert_true(sane(status, &e));
    if (status == MLA_OK) {
        mla_batch batch = batch_in(buffer);
        status = mla_plan_create(client, &batch, &plan, &e);
        assert_true(sane(status, &e));
        if (status == MLA_OK) {
            status = mla_decode(client, plan, MLA_FOREVER, &result, &e);
            assert_true(sane(status, &e));
            mla_plan_destroy(plan);
        }
        status = mla_submit_batch(client, &batch, &ticket, &e);
        assert_true(sane(status, &e));
        if (status == MLA_OK) {
            status = mla_wait(client, ticket, MLA_FOREVER, &result, &e);
            assert_true(sane(status, &e));
        }
        status = mla_buffer_free(buffer, &e);
        assert_true(sane(status, &e));
    }
    mla_close(client);
}

static enum act one_request_failed(struct peer *peer, const struct arrival *a)
{
    (void)peer;
    if (a->header.type != MLAP_SUBMIT && a->header.type != MLAP_DECODE)
        return ANSWER;
    struct mlap_done *done = calloc(1, sizeof *done);
    done->failed = done->n_failures = 1;
    peer_send(a->socket, MLAP_DONE, a->header.sequence, done);
    free(done);
    return HANDLED;
}

static void every_single_failure(void **state)
{
    (void)state;
    struct peer *peer = peer_new(one_request_failed, NULL);
    int n = 0, left;
    do {
        countdown = ++n;
        session(peer);
        left = countdown;
        countdown = 0;
    } while (left == 0);    /* the last n was beyond the last call */
    assert_in_range(n, 30, 2000);
    peer_free(peer);
}

static unsigned open_descriptors(void)
{
    unsigned n = 0;
    for (int fd = 0; fd < 256; fd++)
        n += fcntl(fd, F_GETFD) >= 0;
    return n;
}

static void descriptors_are_closed(void **state)
{
    unsigned before = open_descriptors();
    every_single_failure(state);
    assert_int_equal(open_descriptors(), before);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(descriptors_are_closed),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
