/* test_threads.c - eight threads on one client: everybody gets their own answer, whoever reads it, also over deaths. */
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

enum { THREADS = 8, ROUNDS = 300 };

struct work { struct rig *rig; unsigned number; unsigned failures; };

/* kv_tokens tells whose answer it is: the number of heads of a decode's batch. */
static enum act mark(struct peer *peer, const struct arrival *a)
{
    atomic_uint *deaths = peer->of_test;
    if (a->header.type != MLAP_DECODE)
        return ANSWER;
    if (deaths && atomic_load(&peer->count[MLAP_DECODE]) % 97 == 0 && atomic_fetch_add(deaths, 1) < 20)
        return HANG_UP;
    struct mlap_done done = {.kv_tokens = a->body->decode_.batch.heads};
    peer_send(a->socket, MLAP_DONE, a->header.sequence, &done);
    return HANDLED;
}

static bool expect(struct work *work, mla_status status, const mla_result *result, uint32_t heads)
{
    bool right = status == MLA_OK && result->kv_tokens == heads;
    work->failures += !right;
    return right;
}

static void *run(void *argument)
{
    struct work *work = argument;
    mla_client *client = work->rig->client;
    mla_result result;
    mla_ticket tickets[3];
    mla_error error = {0};
    for (unsigned round = 0; round < ROUNDS; round++) {
        mla_batch batch = work->rig->batch;
        batch.heads = work->number * 8 + round % 8 + 1;
        if (round % 3 == 0) {
            expect(work, mla_decode_batch(client, &batch, MLA_FOREVER, &result, &error), &result, batch.heads);
        } else if (round % 3 == 1) {
            for (int i = 0; i < 3; i++)
                work->failures += mla_submit_batch(client, &batch, &tickets[i], &error) != MLA_OK;
            for (int i = 2; i >= 0; i--)
                expect(work, mla_wait(client, tickets[i], 20000, &result, &error), &result, batch.heads);
        } else {
            work->failures += mla_submit_batch(client, &batch, &tickets[0], &error) != MLA_OK;
            int done = 0;
            mla_status status = MLA_OK;
            while (!done && status == MLA_OK) {
                struct pollfd item = {.fd = mla_fd(client), .events = POLLIN};
                poll(&item, 1, 5);
                status = mla_poll(client, tickets[0], &done, &result, &error);
            }
            expect(work, status, &result, batch.heads);
        }
        if (round % 10 == 7) {
            mla_buffer *buffer;
            work->failures += mla_buffer_alloc(client, 4096, &buffer, &error) != MLA_OK ||
                              mla_buffer_free(buffer, &error) != MLA_OK;
        }
    }
    if (work->failures)
        fprintf(stderr, "thread %u: %u failures, the last: %s %s\n", work->number, work->failures,
                mla_status_text(error.code), error.message);
    return NULL;
}

static void on_eight_threads(struct peer *peer)
{
    struct rig rig;
    rig_init(&rig, peer);
    struct work work[THREADS];
    pthread_t threads[THREADS];
    for (unsigned i = 0; i < THREADS; i++) {
        work[i] = (struct work){.rig = &rig, .number = i};
        assert_int_equal(pthread_create(&threads[i], NULL, run, &work[i]), 0);
    }
    unsigned failures = 0;
    for (unsigned i = 0; i < THREADS; i++) {
        pthread_join(threads[i], NULL);
        failures += work[i].failures;
    }
    assert_int_equal(failures, 0);
    rig_free(&rig);
    peer_free(peer);
}

static void everybody_gets_their_own(void **state)
{
    (void)state;
    on_eight_threads(peer_new(mark, NULL));
}

static void also_when_the_session_dies(void **state)
{
    (void)state;
    atomic_uint deaths = 0;
    on_eight_threads(peer_new(mark, &deaths));
    assert_in_range(deaths, 10, 1000000);
}

static void *collect(void *argument)
{
    struct { mla_client *client; mla_ticket ticket; mla_status status; } *of = argument;
    of->status = mla_wait(of->client, of->ticket, MLA_FOREVER, NULL, NULL);
    return NULL;
}

static enum act slowly(struct peer *peer, const struct arrival *a)
{
    (void)peer;
    if (a->header.type == MLAP_DECODE)
        sleep_ms(30);
    return ANSWER;
}

static void one_ticket_is_collected_once(void **state)
{
    (void)state;
    struct peer *peer = peer_new(slowly, NULL);
    struct rig rig;
    rig_init(&rig, peer);
    struct { mla_client *client; mla_ticket ticket; mla_status status; } of[2] = {{.client = rig.client}};
    assert_ok(mla_submit_batch(rig.client, &rig.batch, &of[0].ticket, e));
    of[1] = of[0];
    pthread_t threads[2];
    for (int i = 0; i < 2; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, collect, &of[i]), 0);
    for (int i = 0; i < 2; i++)
        pthread_join(threads[i], NULL);
    assert_int_equal((of[0].status == MLA_OK) + (of[1].status == MLA_OK), 1);
    assert_int_equal((of[0].status == MLA_NOT_FOUND) + (of[1].status == MLA_NOT_FOUND), 1);
    rig_free(&rig);
    peer_free(peer);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(everybody_gets_their_own),
        cmocka_unit_test(also_when_the_session_dies),
        cmocka_unit_test(one_ticket_is_collected_once),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
