/* test_daemon.c - libmla with a real mlad: results, refusals in public words, and deaths that nobody notices. */
#include "daemon.h"
#include "peer.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* A batch whose every KV value is the same number, so that every output must be that number. */
enum { B = 4, H = 16, P = 64, PAGES = 64, MAX_PAGES = PAGES / B, ROW = 576 };
struct memory {
    uint16_t q[B][H][ROW], kv[PAGES][P][ROW], out[B][H][512];
    int32_t table[B][MAX_PAGES], lengths[B];
};
#define AT(buffer, member) ((mla_tensor){buffer, offsetof(struct memory, member)})

static mla_client *connect_to(const struct daemon *daemon)
{
    mla_options options;
    mla_options_init(&options);
    options.socket = daemon->socket;
    mla_client *client = NULL;
    assert_ok(mla_connect(&client, &options, e));
    return client;
}

static uint16_t bf16(unsigned n)
{
    union { float f; uint32_t u; } x = {.f = (float)n};
    return (uint16_t)(x.u >> 16);
}

static void set(uint16_t *to, size_t bytes, uint16_t value)
{
    for (size_t i = 0; i < bytes / 2; i++)
        to[i] = value;
}

static bool all(const uint16_t *from, size_t bytes, uint16_t value)
{
    for (size_t i = 0; i < bytes / 2; i++)
        if (from[i] != value)
            return false;
    return true;
}

static struct memory *make(mla_client *client, mla_buffer **buffer, mla_batch *batch)
{
    assert_ok(mla_buffer_alloc(client, sizeof(struct memory), buffer, e));
    struct memory *m = mla_buffer_data(*buffer);
    for (int b = 0; b < B; b++) {
        m->lengths[b] = MAX_PAGES * P - b;
        for (int i = 0; i < MAX_PAGES; i++)
            m->table[b][i] = b * MAX_PAGES + i;
    }
    set(m->q[0][0], sizeof m->q, bf16(1));
    mla_batch_init(batch);
    batch->batch = B;
    batch->q_rows = B;
    batch->heads = H;
    batch->pages = PAGES;
    batch->max_pages = MAX_PAGES;
    batch->softmax_scale = 0.01;
    batch->q = AT(*buffer, q);
    batch->kv = AT(*buffer, kv);
    batch->block_table = AT(*buffer, table);
    batch->seqlens = AT(*buffer, lengths);
    batch->out = AT(*buffer, out);
    return m;
}

static struct daemon the_daemon;

static int set_up(void **state)
{
    (void)state;
    daemon_start(&the_daemon, NULL);
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    daemon_stop(&the_daemon);
    return 0;
}

static void decodes_and_failed_requests(void **state)
{
    (void)state;
    mla_client *client = connect_to(&the_daemon);
    assert_string_equal(mla_device(client), "cpu");
    mla_buffer *buffer;
    mla_batch batch;
    mla_plan *plan;
    mla_result result;
    struct memory *m = make(client, &buffer, &batch);
    assert_ok(mla_plan_create(client, &batch, &plan, e));
    set(m->kv[0][0], sizeof m->kv, bf16(3));
    assert_ok(mla_decode(client, plan, MLA_FOREVER, &result, e));
    assert_true(all(m->out[0][0], sizeof m->out, bf16(3)));
    assert_int_equal(result.kv_tokens, B * MAX_PAGES * P - 6);
    assert_true(result.kernel_ns > 0);
    m->table[1][5] = PAGES;
    m->lengths[2] = -1;
    set(m->out[0][0], sizeof m->out, 0);
    assert_fails(MLA_REQUESTS, "block_table[1][5]", "2 requests", mla_decode(client, plan, MLA_FOREVER, &result, e));
    assert_int_equal(result.failed, 2);
    assert_int_equal(result.listed, 2);
    assert_int_equal(result.failures[1].request, 2);
    assert_string_equal(result.failures[1].field, "seqlens[2]");
    assert_true(all(m->out[0][0], sizeof m->out[0], bf16(3)) && all(m->out[3][0], sizeof m->out[3], bf16(3)));
    mla_close(client);
}

#define REFUSED(status, name, ...) \
    do { \
        mla_batch batch = good; \
        __VA_ARGS__; \
        mla_error error; \
        mla_plan *plan; \
        assert_int_equal(mla_plan_create(client, &batch, &plan, &error), status); \
        assert_string_equal(error.field, name); \
        assert_int_equal(mla_decode_batch(client, &batch, MLA_FOREVER, NULL, &error), status); \
        assert_string_equal(error.field, name); \
    } while (0)

static void the_daemons_refusals(void **state)
{
    (void)state;
    mla_client *client = connect_to(&the_daemon);
    mla_buffer *buffer;
    mla_batch good;
    make(client, &buffer, &good);
    REFUSED(MLA_RANGE, "batch.kv", batch.pages = 1000);
    REFUSED(MLA_OVERLAP, "batch.out", batch.out = batch.q);
    REFUSED(MLA_INVALID, "batch.q.offset", batch.q.offset += 2);
    REFUSED(MLA_INVALID, "batch.k_scale", batch.k_scale = (mla_scale){.kind = MLA_SCALE_VALUE, .value = 2});
    assert_ok(mla_decode_batch(client, &good, MLA_FOREVER, NULL, e));
    assert_ok(mla_buffer_free(buffer, e));
    mla_close(client);
}

struct decoder { pthread_t thread; atomic_bool *stop; atomic_uint decodes; unsigned wrong, replays; mla_error error; };

static void *decode_on_and_on(void *argument)
{
    struct decoder *d = argument;
    mla_client *client = connect_to(&the_daemon);
    mla_buffer *buffer;
    mla_batch batch;
    mla_plan *plan = NULL;
    struct memory *m = make(client, &buffer, &batch);
    mla_status status = mla_plan_create(client, &batch, &plan, &d->error);
    while (status == MLA_OK && !atomic_load(d->stop)) {
        unsigned number = atomic_fetch_add(&d->decodes, 1);
        uint16_t value = bf16(number % 200 + 1);
        mla_result result = {0};
        set(m->kv[0][0], sizeof m->kv, value);
        set(m->out[0][0], sizeof m->out, 0);
        status = number % 2 ? mla_decode(client, plan, MLA_FOREVER, &result, &d->error)
                            : mla_decode_batch(client, &batch, MLA_FOREVER, &result, &d->error);
        d->wrong += status != MLA_OK || !all(m->out[0][0], sizeof m->out, value);
        d->replays += result.replays;
    }
    mla_close(client);
    return NULL;
}

/* Two clients decode while `strike` does its worst `times` times, each after both have moved on (so that no decode is
 * there for three). Returns the number of replays. */
static unsigned under_fire(void (*strike)(void), int times)
{
    atomic_bool stop = false;
    struct decoder decoders[2] = {{.stop = &stop}, {.stop = &stop}};
    for (int i = 0; i < 2; i++)
        assert_int_equal(pthread_create(&decoders[i].thread, NULL, decode_on_and_on, &decoders[i]), 0);
    for (int i = 0; i <= times; i++) {
        unsigned before[2] = {atomic_load(&decoders[0].decodes), atomic_load(&decoders[1].decodes)};
        for (int d = 0; d < 2; d++)
            for (int ms = 0; atomic_load(&decoders[d].decodes) < before[d] + 3; ms++) {
                assert_in_range(ms, 0, 20000);
                sleep_ms(1);
            }
        sleep_ms(i % 5);
        if (i < times)
            strike();
    }
    atomic_store(&stop, true);
    unsigned replays = 0;
    for (int i = 0; i < 2; i++) {
        pthread_join(decoders[i].thread, NULL);
        if (decoders[i].wrong)
            fail_msg("%u decodes wrong; %s", decoders[i].wrong, decoders[i].error.message);
        replays += decoders[i].replays;
    }
    return replays;
}

static void kill_worker(void)
{
    pid_t worker = daemon_worker(&the_daemon);
    if (worker > 0)
        kill(worker, SIGKILL);
}

static void kill_daemon(void)
{
    daemon_kill(&the_daemon);
    sleep_ms(30);
    daemon_restart(&the_daemon);
}

static void killed_workers_go_unnoticed(void **state)
{
    (void)state;
    assert_in_range(under_fire(kill_worker, 20), 1, 1000);      /* some were hit in mid-decode */
}

static void a_killed_daemon_goes_unnoticed(void **state)
{
    (void)state;
    under_fire(kill_daemon, 5);
}

/* More than the daemon queues: some are told busy, none is lost, and the session goes on. */
static void more_than_fits(void **state)
{
    (void)state;
    struct daemon daemon;
    daemon_start(&daemon, "queue_limit = 3\n");
    mla_client *client = connect_to(&daemon);
    mla_buffer *buffer;
    mla_batch batch;
    mla_plan *plan;
    make(client, &buffer, &batch);
    assert_ok(mla_plan_create(client, &batch, &plan, e));
    enum { N = 40 };
    mla_ticket tickets[N];
    unsigned ok = 0, busy = 0;
    for (int i = 0; i < N; i++)
        assert_ok(mla_submit(client, plan, &tickets[i], e));
    for (int i = 0; i < N; i++) {
        mla_status status = mla_wait(client, tickets[i], 20000, NULL, NULL);
        ok += status == MLA_OK;
        busy += status == MLA_BUSY;
    }
    assert_int_equal(ok + busy, N);
    assert_in_range(busy, 1, N - 3);
    assert_ok(mla_decode(client, plan, MLA_FOREVER, NULL, e));
    mla_close(client);
    daemon_stop(&daemon);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(decodes_and_failed_requests, set_up, tear_down),
        cmocka_unit_test_setup_teardown(the_daemons_refusals, set_up, tear_down),
        cmocka_unit_test_setup_teardown(killed_workers_go_unnoticed, set_up, tear_down),
        cmocka_unit_test_setup_teardown(a_killed_daemon_goes_unnoticed, set_up, tear_down),
        cmocka_unit_test(more_than_fits),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
