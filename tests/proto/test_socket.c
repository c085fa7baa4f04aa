/* Datagrams and descriptors: what arrives, what is refused, and that no descriptor is ever left behind. */
#include "cmocka_all.h"
#include "mlap.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static int ends[2];
static unsigned open_before;

static unsigned open_descriptors(void)
{
    unsigned count = 0;
    DIR *folder = opendir("/proc/self/fd");
    assert_non_null(folder);
    while (readdir(folder) != NULL)
        count++;
    closedir(folder);
    return count;
}

static int setup(void **state)
{
    (void)state;
    open_before = open_descriptors();
    return socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends);
}

static int teardown(void **state)
{
    (void)state;
    close(ends[0]);
    if (ends[1] != -1)
        close(ends[1]);
    return open_descriptors() == open_before ? 0 : -1;
}

/* Send a datagram with any number of copies of a descriptor, as a client that does not use mlap_send would. */
static void send_with_descriptors(const void *bytes, size_t length, int fd, unsigned count)
{
    struct iovec part = {(void *)(uintptr_t)bytes, length};
    union { struct cmsghdr align; char bytes[CMSG_SPACE((MLAP_MAX_FDS + 1) * sizeof(int))]; } control = {0};
    struct msghdr datagram = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = control.bytes,
                              .msg_controllen = CMSG_SPACE(count * sizeof(int))};
    struct cmsghdr *rights = CMSG_FIRSTHDR(&datagram);
    *rights = (struct cmsghdr){.cmsg_len = CMSG_LEN(count * sizeof(int)), .cmsg_level = SOL_SOCKET,
                               .cmsg_type = SCM_RIGHTS};
    for (unsigned i = 0; i < count; i++)
        memcpy(CMSG_DATA(rights) + i * sizeof fd, &fd, sizeof fd);
    assert_int_equal(sendmsg(ends[0], &datagram, 0), length);
}

static long receive(void *buffer, size_t capacity, int fds[MLAP_MAX_FDS], unsigned *n_fds)
{
    errno = 0;
    *n_fds = 99;
    return mlap_receive(ends[1], buffer, capacity, fds, n_fds, MSG_DONTWAIT);
}

static void datagrams_keep_their_bounds(void **state)
{
    (void)state;
    char buffer[64];
    int fds[MLAP_MAX_FDS];
    unsigned n_fds;
    assert_int_equal(mlap_send(ends[0], "one", 3, -1, 0), 0);
    assert_int_equal(mlap_send(ends[0], "three", 5, -1, 0), 0);
    assert_int_equal(receive(buffer, sizeof buffer, fds, &n_fds), 3);
    assert_int_equal(n_fds, 0);
    assert_memory_equal(buffer, "one", 3);
    assert_int_equal(receive(buffer, sizeof buffer, fds, &n_fds), 5);
    assert_int_equal(receive(buffer, sizeof buffer, fds, &n_fds), -1);
    assert_int_equal(errno, EAGAIN);
    assert_int_equal(n_fds, 0);
}

static void a_descriptor_arrives_close_on_exec(void **state)
{
    (void)state;
    int memfd = memfd_create("test", MFD_CLOEXEC);
    assert_int_equal(ftruncate(memfd, 12345), 0);
    struct mlap_register request = {.buffer = 1, .kind = MLAP_buffer_kind_MEMFD, .bytes = 4096};
    assert_int_equal(mlap_send_message(ends[0], MLAP_REGISTER, 7, &request, memfd, 0), 0);
    close(memfd);

    static char buffer[MLAP_MAX_MESSAGE];
    static union mlap_body body;
    int fds[MLAP_MAX_FDS];
    unsigned n_fds;
    struct mlap_header header;
    long length = receive(buffer, sizeof buffer, fds, &n_fds);
    assert_true(length > 0);
    assert_int_equal(n_fds, 1);
    assert_int_equal(fcntl(fds[0], F_GETFD), FD_CLOEXEC);
    struct stat facts;
    assert_int_equal(fstat(fds[0], &facts), 0);
    assert_int_equal(facts.st_size, 12345);
    close(fds[0]);
    assert_int_equal(mlap_decode(buffer, (size_t)length, &header, &body, NULL), MLAP_code_OK);
    assert_int_equal(header.sequence, 7);
    assert_int_equal(body.register_.bytes, 4096);
}

static void surplus_descriptors_are_refused_and_closed(void **state)
{
    (void)state;
    unsigned before = open_descriptors();
    char buffer[64];
    int fds[MLAP_MAX_FDS + 1];
    unsigned n_fds;
    send_with_descriptors("x", 1, ends[0], MLAP_MAX_FDS + 1);
    assert_int_equal(receive(buffer, sizeof buffer, fds, &n_fds), -1);
    assert_int_equal(errno, EMSGSIZE);
    assert_int_equal(n_fds, 0);
    assert_int_equal(open_descriptors(), before);
    assert_int_equal(mlap_send_fds(ends[0], "x", 1, fds, MLAP_MAX_FDS + 1, 0), -1);
    assert_int_equal(errno, EINVAL);
}

static void as_many_descriptors_as_are_legal_arrive_in_order(void **state)
{
    (void)state;
    char buffer[64];
    int sent[MLAP_MAX_FDS], fds[MLAP_MAX_FDS];
    unsigned n_fds;
    for (unsigned i = 0; i < MLAP_MAX_FDS; i++)
        sent[i] = ends[i % 2];
    assert_int_equal(mlap_send_fds(ends[0], "x", 1, sent, MLAP_MAX_FDS, 0), 0);
    assert_int_equal(receive(buffer, sizeof buffer, fds, &n_fds), 1);
    assert_int_equal(n_fds, MLAP_MAX_FDS);
    for (unsigned i = 0; i < n_fds; i++) {
        struct stat got, meant;
        assert_return_code(fstat(fds[i], &got), errno);
        assert_return_code(fstat(sent[i], &meant), errno);
        assert_int_equal(got.st_ino, meant.st_ino);
        close(fds[i]);
    }
}

/* Whoever has no room for them all refuses the datagram and keeps none. */
static void descriptors_without_room_are_refused_and_closed(void **state)
{
    (void)state;
    unsigned before = open_descriptors();
    struct rlimit limit, little;
    assert_int_equal(getrlimit(RLIMIT_NOFILE, &limit), 0);
    little = limit;
    little.rlim_cur = 40;
    char buffer[64];
    int fds[MLAP_MAX_FDS];
    unsigned n_fds;
    send_with_descriptors("x", 1, ends[0], 100);
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &little), 0);
    long length = receive(buffer, sizeof buffer, fds, &n_fds);
    int number = errno;
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &limit), 0);
    assert_int_equal(length, -1);
    assert_int_equal(number, EMSGSIZE);
    assert_int_equal(n_fds, 0);
    assert_int_equal(open_descriptors(), before);
}

static void a_long_datagram_is_refused_with_its_descriptor(void **state)
{
    (void)state;
    unsigned before = open_descriptors();
    static char text[2 * MLAP_MAX_MESSAGE], buffer[MLAP_MAX_MESSAGE];
    int fds[MLAP_MAX_FDS];
    unsigned n_fds;
    send_with_descriptors(text, sizeof buffer + 1, ends[0], 1);
    send_with_descriptors(text, sizeof buffer, ends[0], 1);
    assert_int_equal(receive(buffer, sizeof buffer, fds, &n_fds), -1);
    assert_int_equal(errno, EMSGSIZE);
    assert_int_equal(n_fds, 0);
    assert_int_equal(open_descriptors(), before);
    /* The long one is consumed: the next is whole. */
    assert_int_equal(receive(buffer, sizeof buffer, fds, &n_fds), sizeof buffer);
    assert_int_equal(n_fds, 1);
    close(fds[0]);
}

static void an_empty_datagram_is_the_end_even_with_a_descriptor(void **state)
{
    (void)state;
    unsigned before = open_descriptors();
    char buffer[64];
    int fds[MLAP_MAX_FDS];
    unsigned n_fds;
    send_with_descriptors("", 0, ends[0], 1);
    assert_int_equal(receive(buffer, sizeof buffer, fds, &n_fds), 0);
    assert_int_equal(n_fds, 0);
    assert_int_equal(open_descriptors(), before);
}

static void end_of_file_comes_after_what_was_sent(void **state)
{
    (void)state;
    char buffer[64];
    int fds[MLAP_MAX_FDS];
    unsigned n_fds;
    assert_int_equal(mlap_send(ends[0], "last", 4, -1, 0), 0);
    assert_int_equal(shutdown(ends[0], SHUT_WR), 0);
    assert_int_equal(receive(buffer, sizeof buffer, fds, &n_fds), 4);
    assert_int_equal(receive(buffer, sizeof buffer, fds, &n_fds), 0);
    assert_int_equal(receive(buffer, sizeof buffer, fds, &n_fds), 0);
}

static void a_peer_that_has_gone_is_an_error_and_no_signal(void **state)
{
    (void)state;
    close(ends[1]);
    ends[1] = -1;
    assert_int_equal(mlap_send(ends[0], "x", 1, -1, 0), -1);
    assert_true(errno == EPIPE || errno == ECONNRESET);
}

static void a_full_socket_does_not_block(void **state)
{
    (void)state;
    char text[1024] = "";
    unsigned sent = 0;
    while (sent < 100000 && mlap_send(ends[0], text, sizeof text, -1, MSG_DONTWAIT) == 0)
        sent++;
    assert_true(sent > 0 && sent < 100000);
    assert_int_equal(errno, EAGAIN);
}

static void an_illegal_message_is_not_sent(void **state)
{
    (void)state;
    struct mlap_submit request = {.plan = 0};
    char buffer[64];
    int fds[MLAP_MAX_FDS];
    unsigned n_fds;
    assert_int_equal(mlap_send_message(ends[0], MLAP_SUBMIT, 1, &request, -1, 0), -1);
    assert_int_equal(errno, EINVAL);
    assert_int_equal(receive(buffer, sizeof buffer, fds, &n_fds), -1);
    assert_int_equal(errno, EAGAIN);
}

#define SOCKET_TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        SOCKET_TEST(datagrams_keep_their_bounds),
        SOCKET_TEST(a_descriptor_arrives_close_on_exec),
        SOCKET_TEST(surplus_descriptors_are_refused_and_closed),
        SOCKET_TEST(as_many_descriptors_as_are_legal_arrive_in_order),
        SOCKET_TEST(descriptors_without_room_are_refused_and_closed),
        SOCKET_TEST(a_long_datagram_is_refused_with_its_descriptor),
        SOCKET_TEST(an_empty_datagram_is_the_end_even_with_a_descriptor),
        SOCKET_TEST(end_of_file_comes_after_what_was_sent),
        SOCKET_TEST(a_peer_that_has_gone_is_an_error_and_no_signal),
        SOCKET_TEST(a_full_socket_does_not_block),
        SOCKET_TEST(an_illegal_message_is_not_sent),
    };
    return cmocka_run_group_tests_name("socket", tests, NULL, NULL);
}
