/* test_decode.c - tickets: submit, poll, wait, time out, abandon, collect; results; mla_fd; a full socket. */
#include "peer.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Decodes wait here until the test answers them. */
struct held { pthread_mutex_t lock; uint32_t sequences[4096]; unsigned n, socket; };

static enum act hold(struct peer *peer, const struct arrival *a)
{
    struct held *held = peer->of_test;
    if (a->header.type != MLAP_SUBMIT && a->header.type != MLAP_DECODE)
        return ANSWER;
    pthread_mutex_lock(&held->lock);
    held->sequences[held->n++] = a->header.sequence;
    pthread_mutex_unlock(&held->lock);
    return HANDLED;
}

static unsigned held_now(struct held *held)
{
    pthread_mutex_lock(&held->lock);
    unsigned n = held->n;
    pthread_mutex_unlock(&held->lock);
    return n;
}

static void until_held(struct held *held, unsigned n)
{
    for (int i = 0; held_now(held) < n; i++) {
        assert_in_range(i, 0, 5000);
        sleep_ms(1);
    }
}

struct fixture { struct peer *peer; struct rig rig; struct held held; };

static int set_up(void **state)
{
    struct fixture *f = calloc(1, sizeof *f);
    pthread_mutex_init(&f->held.lock, NULL);
    f->peer = peer_new(hold, &f->held);
    rig_init(&f->rig, f->peer);
    *state = f;
    return 0;
}

static int tear_down(void **state)
{
    struct fixture *f = *state;
    rig_free(&f->rig);
    peer_free(f->peer);
    free(f);
    return 0;
}

static void answer(struct fixture *f, unsigned i)
{
    until_held(&f->held, i + 1);
    peer_done(atomic_load(&f->peer->connection), f->held.sequences[i]);
}

static bool readable(int fd, int timeout_ms)
{
    struct pollfd item = {.fd = fd, .events = POLLIN};
    return poll(&item, 1, timeout_ms) == 1;
}

static void out_of_order(void **state)
{
    struct fixture *f = *state;
    mla_client *c = f->rig.client;
    mla_ticket t[3];
    for (int i = 0; i < 3; i++)
        assert_ok(mla_submit(c, f->rig.plan, &t[i], e));
    int done = 9;
    assert_ok(mla_poll(c, t[0], &done, NULL, e));
    assert_int_equal(done, 0);
    answer(f, 2);
    answer(f, 0);
    assert_ok(mla_wait(c, t[2], 2000, NULL, e));
    mla_result result;
    assert_ok(mla_wait(c, t[0], MLA_FOREVER, &result, e));
    assert_true(result.receive_ns == 1 && result.queue_ns == 2 && result.kernel_ns == 3 && result.kv_tokens == 4);
    assert_true(result.failed == 0 && result.listed == 0 && result.replays == 0);
    assert_fails(MLA_NOT_FOUND, "ticket", "collected", mla_wait(c, t[0], 0, NULL, e));
    int64_t start = now_ms();
    assert_fails(MLA_TIMEOUT, "timeout_ms", "not complete yet", mla_wait(c, t[1], 60, NULL, e));
    assert_in_range(now_ms() - start, 60, 1000);
    assert_fails(MLA_TIMEOUT, "timeout_ms", "not complete yet", mla_wait(c, t[1], 0, NULL, e));
    answer(f, 1);
    do
        assert_ok(mla_poll(c, t[1], &done, &result, e));
    while (!done);
    assert_fails(MLA_NOT_FOUND, "ticket", "collected", mla_poll(c, t[1], &done, NULL, e));
}

static void abandoned_decode(void **state)
{
    struct fixture *f = *state;
    mla_client *c = f->rig.client;
    assert_fails(MLA_TIMEOUT, "timeout_ms", "abandoned", mla_decode(c, f->rig.plan, 20, NULL, e));
    assert_fails(MLA_TIMEOUT, "timeout_ms", "abandoned", mla_decode_batch(c, &f->rig.batch, 20, NULL, e));
    mla_plan_destroy(f->rig.plan);
    assert_fails(MLA_IN_USE, "buffer", "flight", mla_buffer_free(f->rig.buffer, e));
    assert_int_equal(f->peer->count[MLAP_DROP], 0);     /* not while its decode is in flight */
    answer(f, 0);
    answer(f, 1);
    sleep_ms(20);
    assert_ok(mla_buffer_free(f->rig.buffer, e));
    assert_int_equal(f->peer->count[MLAP_DROP], 1);
}

static void failed_requests(void **state)
{
    struct fixture *f = *state;
    mla_ticket ticket;
    assert_ok(mla_submit_batch(f->rig.client, &f->rig.batch, &ticket, e));
    until_held(&f->held, 1);
    struct mlap_done *done = calloc(1, sizeof *done);
    done->failed = 40;
    done->n_failures = 32;
    for (uint32_t i = 0; i < 32; i++) {
        done->failures[i].request = 2 * i;
        snprintf(done->failures[i].field, 64, "seqlens[%u]", 2 * i);
        snprintf(done->failures[i].message, 256, "it is -%u", i);
    }
    peer_send(atomic_load(&f->peer->connection), MLAP_DONE, f->held.sequences[0], done);
    free(done);
    mla_result result;
    assert_fails(MLA_REQUESTS, "seqlens[0]", "40 requests", mla_wait(f->rig.client, ticket, 2000, &result, e));
    assert_int_equal(result.failed, 40);
    assert_int_equal(result.listed, 32);
    assert_int_equal(result.failures[31].request, 62);
    assert_string_equal(result.failures[31].field, "seqlens[62]");
    assert_string_equal(result.failures[31].message, "it is -31");
}

static void busy_is_collected(void **state)
{
    struct fixture *f = *state;
    mla_ticket ticket;
    assert_ok(mla_submit(f->rig.client, f->rig.plan, &ticket, e));
    until_held(&f->held, 1);
    peer_error(atomic_load(&f->peer->connection), f->held.sequences[0], MLAP_code_BUSY, "", "8 decodes wait");
    mla_result result;
    assert_fails(MLA_BUSY, "", "8 decodes wait", mla_wait(f->rig.client, ticket, 2000, &result, e));
    assert_int_equal(result.failed, 0);
    assert_ok(mla_submit(f->rig.client, f->rig.plan, &ticket, e));      /* the session goes on */
    answer(f, 1);
    assert_ok(mla_wait(f->rig.client, ticket, 2000, NULL, e));
}

static void fd_speaks_for_tickets(void **state)
{
    struct fixture *f = *state;
    mla_client *c = f->rig.client;
    int fd = mla_fd(c), done;
    assert_true(fd >= 0);
    assert_int_equal(mla_fd(c), fd);
    assert_false(readable(fd, 0));
    mla_ticket t[2];
    assert_ok(mla_submit(c, f->rig.plan, &t[0], e));
    assert_ok(mla_submit(c, f->rig.plan, &t[1], e));
    assert_false(readable(fd, 10));
    answer(f, 0);
    assert_true(readable(fd, 2000));
    assert_ok(mla_poll(c, t[1], &done, NULL, e));       /* reads the answer of the other */
    assert_int_equal(done, 0);
    assert_true(readable(fd, 0));                       /* which is still to be collected */
    assert_ok(mla_poll(c, t[0], &done, NULL, e));
    assert_int_equal(done, 1);
    assert_false(readable(fd, 0));
    answer(f, 1);
    assert_true(readable(fd, 2000));
    assert_ok(mla_poll(c, t[1], &done, NULL, e));
    assert_int_equal(done, 1);
    assert_false(readable(fd, 0));
}

static void fd_is_silent_without_tickets(void **state)
{
    struct fixture *f = *state;
    mla_client *c = f->rig.client;
    int fd = mla_fd(c), done;
    mla_plan_destroy(f->rig.plan);      /* its OK is nobody's news */
    assert_false(readable(fd, 50));
    peer_error(atomic_load(&f->peer->connection), 0, MLAP_code_EVICTED, "", "go away");
    assert_false(readable(fd, 50));
    mla_ticket ticket;
    assert_ok(mla_submit_batch(c, &f->rig.batch, &ticket, e));
    assert_true(readable(fd, 2000));
    assert_fails(MLA_EVICTED, "", "go away", mla_poll(c, ticket, &done, NULL, e));
    assert_int_equal(done, 1);
    assert_false(readable(fd, 0));
}

static void *wait_for_it(void *argument)
{
    struct { mla_client *client; mla_ticket ticket; } *of = argument;
    assert_int_equal(mla_wait(of->client, of->ticket, MLA_FOREVER, NULL, NULL), MLA_OK);
    return NULL;
}

static void fd_tells_what_another_thread_read(void **state)
{
    struct fixture *f = *state;
    mla_client *c = f->rig.client;
    int fd = mla_fd(c), done;
    mla_ticket t[2];
    for (int i = 0; i < 2; i++)
        assert_ok(mla_submit(c, f->rig.plan, &t[i], e));
    struct { mla_client *client; mla_ticket ticket; } of = {c, t[0]};
    pthread_t thread;
    assert_int_equal(pthread_create(&thread, NULL, wait_for_it, &of), 0);
    sleep_ms(20);
    answer(f, 1);
    sleep_ms(20);       /* the waiting thread leads, and has read it by now */
    assert_true(readable(fd, 2000));
    assert_ok(mla_poll(c, t[1], &done, NULL, e));
    assert_int_equal(done, 1);
    answer(f, 0);
    pthread_join(thread, NULL);
    assert_false(readable(fd, 0));
}

/* A thousand in flight, submitted while the daemon does not read and answered while we do not. */
static void *let_hear(void *argument)
{
    struct peer *peer = argument;
    sleep_ms(50);
    atomic_store(&peer->deaf, false);
    return NULL;
}

static void full_socket(void **state)
{
    struct fixture *f = *state;
    enum { N = 1000 };
    mla_ticket t[N];
    f->peer->script = NULL;     /* answers each at once, blocking while we do not read */
    atomic_store(&f->peer->deaf, true);
    pthread_t thread;
    assert_int_equal(pthread_create(&thread, NULL, let_hear, f->peer), 0);
    for (int i = 0; i < N; i++)
        assert_ok(mla_submit(f->rig.client, f->rig.plan, &t[i], e));
    for (int i = N - 1; i >= 0; i--)
        assert_ok(mla_wait(f->rig.client, t[i], 5000, NULL, e));
    pthread_join(thread, NULL);
    assert_int_equal(f->peer->count[MLAP_SUBMIT], N);
}

static enum act be_deaf(struct peer *peer, const struct arrival *a)
{
    if (a->header.type == MLAP_SUBMIT && peer->count[MLAP_SUBMIT] == 1)
        atomic_store(&peer->deaf, true);
    return ANSWER;
}

static void full_socket_and_timeout(void **state)
{
    struct fixture *f = *state;
    enum { N = 1000 };
    f->peer->script = be_deaf; /* once it has the first decode */
    assert_ok(mla_decode(f->rig.client, f->rig.plan, 5000, NULL, e));
    for (int i = 0; i < N; i++)
        assert_fails(MLA_TIMEOUT, "timeout_ms", "abandoned", mla_decode(f->rig.client, f->rig.plan, 0, NULL, e));
    atomic_store(&f->peer->deaf, false);
    assert_ok(mla_decode(f->rig.client, f->rig.plan, 5000, NULL, e));
    assert_in_range(f->peer->count[MLAP_SUBMIT], 2, N);     /* abandoned before they could be sent: they never were */
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(out_of_order, set_up, tear_down),
        cmocka_unit_test_setup_teardown(abandoned_decode, set_up, tear_down),
        cmocka_unit_test_setup_teardown(failed_requests, set_up, tear_down),
        cmocka_unit_test_setup_teardown(busy_is_collected, set_up, tear_down),
        cmocka_unit_test_setup_teardown(fd_speaks_for_tickets, set_up, tear_down),
        cmocka_unit_test_setup_teardown(fd_is_silent_without_tickets, set_up, tear_down),
        cmocka_unit_test_setup_teardown(fd_tells_what_another_thread_read, set_up, tear_down),
        cmocka_unit_test_setup_teardown(full_socket, set_up, tear_down),
        cmocka_unit_test_setup_teardown(full_socket_and_timeout, set_up, tear_down),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
