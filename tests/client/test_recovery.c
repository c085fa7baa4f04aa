/* test_recovery.c - what happens to a client when its session dies: the peer hangs up at chosen moments. */
#include "peer.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Hang up on the messages of one type, the first `times` of them. */
struct fault { enum mlap_type type; atomic_uint times; };

static enum act hang_up(struct peer *peer, const struct arrival *a)
{
    struct fault *fault = peer->of_test;
    if (a->header.type != fault->type || fault->times == 0)
        return ANSWER;
    fault->times--;
    return HANG_UP;
}

static void deaths_in_every_request(void **state)
{
    (void)state;
    static const enum mlap_type types[] = {MLAP_HELLO, MLAP_REGISTER, MLAP_PLAN, MLAP_SUBMIT, MLAP_DECODE, MLAP_DROP,
                                           MLAP_UNREGISTER};
    for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
        struct fault fault = {types[i], 2};
        struct peer *peer = peer_new(hang_up, &fault);
        struct rig rig;
        rig_init(&rig, peer);
        mla_result result;
        assert_ok(mla_decode(rig.client, rig.plan, 5000, &result, e));
        assert_int_equal(result.replays, types[i] == MLAP_SUBMIT ? 2 : 0);
        assert_ok(mla_decode_batch(rig.client, &rig.batch, 5000, &result, e));
        assert_int_equal(result.replays, types[i] == MLAP_DECODE ? 2 : 0);
        mla_plan_destroy(rig.plan);
        assert_ok(mla_buffer_free(rig.buffer, e));
        rig_free(&rig);
        peer_free(peer);
    }
}

static void replay_is_in_order(void **state)
{
    (void)state;
    struct fault fault = {MLAP_DECODE, 1};
    struct peer *peer = peer_new(hang_up, &fault);
    struct rig rig;
    rig_init(&rig, peer);
    mla_buffer *second, *freed;
    assert_ok(mla_buffer_alloc(rig.client, 4096, &second, e));
    assert_ok(mla_buffer_alloc(rig.client, 4096, &freed, e));
    assert_ok(mla_buffer_free(freed, e));
    mla_ticket t[2];
    assert_ok(mla_submit(rig.client, rig.plan, &t[0], e));
    assert_ok(mla_wait(rig.client, t[0], 5000, NULL, e));
    assert_ok(mla_submit_batch(rig.client, &rig.batch, &t[0], e));
    assert_ok(mla_submit(rig.client, rig.plan, &t[1], e));
    assert_ok(mla_wait(rig.client, t[1], 5000, NULL, e));
    assert_ok(mla_wait(rig.client, t[0], 5000, NULL, e));
    /* hello, register, plan, register, register, unregister, submit, decode; then only what is alive */
    assert_string_equal(peer_types(peer), "|HRPRRUSD|HRPRDS");
    rig_free(&rig);
    peer_free(peer);
}

static void a_destroyed_plan_is_replayed_for_its_decodes(void **state)
{
    (void)state;
    struct fault fault = {MLAP_SUBMIT, 1};
    struct peer *peer = peer_new(hang_up, &fault);
    struct rig rig;
    rig_init(&rig, peer);
    mla_ticket ticket;
    assert_ok(mla_submit(rig.client, rig.plan, &ticket, e));
    mla_plan_destroy(rig.plan);
    assert_ok(mla_wait(rig.client, ticket, 5000, NULL, e));
    assert_ok(mla_buffer_free(rig.buffer, e));
    assert_string_equal(peer_types(peer), "|HRPS|HRPSDU");
    rig_free(&rig);
    peer_free(peer);
}

static void three_deaths_are_enough(void **state)
{
    (void)state;
    struct fault fault = {MLAP_DECODE, 1000};
    struct peer *peer = peer_new(hang_up, &fault);
    struct rig rig;
    rig_init(&rig, peer);
    mla_result result;
    for (int i = 0; i < 2; i++) {
        atomic_store(&peer->connections, 0);
        assert_fails(MLA_WORKER_LOST, "", "3 times", mla_decode_batch(rig.client, &rig.batch, 5000, &result, e));
        assert_int_equal(peer->connections, 2);     /* the first death was an older one's */
        assert_ok(mla_decode(rig.client, rig.plan, 5000, &result, e));      /* work that kills nobody goes on */
        assert_int_equal(result.replays, 0);
    }
    fault.times = 2;
    assert_ok(mla_decode_batch(rig.client, &rig.batch, 5000, &result, e));
    fault.times = 2;
    assert_ok(mla_decode_batch(rig.client, &rig.batch, 5000, &result, e));  /* counted anew for each */
    rig_free(&rig);
    peer_free(peer);
}

static void a_poisonous_plan_is_lost(void **state)
{
    (void)state;
    struct fault fault = {MLAP_PLAN, 0};
    struct peer *peer = peer_new(hang_up, &fault);
    struct rig rig;
    rig_init(&rig, peer);
    mla_plan_destroy(rig.plan);
    fault.times = 3;
    mla_plan *plan = NULL;
    assert_fails(MLA_WORKER_LOST, "", "3 times", mla_plan_create(rig.client, &rig.batch, &plan, e));
    assert_null(plan);
    rig_free(&rig);
    peer_free(peer);
}

/* A session that dies while it is being restored, again and again, ends with the effort's time. */
static void a_session_that_cannot_be_restored(void **state)
{
    (void)state;
    struct fault fault = {MLAP_REGISTER, 0};
    struct peer *peer = peer_new(hang_up, &fault);
    mla_client *client = client_of(peer, 300);
    mla_buffer *buffer, *second;
    assert_ok(mla_buffer_alloc(client, 4096, &buffer, e));
    fault.times = 1000000;
    int64_t start = now_ms();
    mla_status status = mla_buffer_alloc(client, 4096, &second, NULL);
    assert_true(status == MLA_NOT_CONNECTED || status == MLA_WORKER_LOST);
    assert_in_range(now_ms() - start, 0, 3000);
    assert_in_range(peer->connections, 2, 100);     /* it backs off */
    fault.times = 0;
    assert_ok(mla_buffer_alloc(client, 4096, &second, e));      /* a later call tries again */
    mla_close(client);
    peer_free(peer);
}

struct last_words { atomic_uint upon, code, sequence, from; bool once; };

static enum act last_words(struct peer *peer, const struct arrival *a)
{
    struct last_words *words = peer->of_test;
    if (a->header.type != words->upon || a->connection < words->from)
        return ANSWER;
    if (words->once)
        words->upon = 0;
    peer_error(a->socket, words->sequence ? a->header.sequence : 0, (enum mlap_code)words->code, "", "my last words");
    return words->sequence ? HANDLED : HANG_UP;
}

static void evicted_clients_are_dead(void **state)
{
    (void)state;
    struct last_words words = {.upon = MLAP_SUBMIT, .code = MLAP_code_EVICTED};
    struct peer *peer = peer_new(last_words, &words);
    struct rig rig;
    rig_init(&rig, peer);
    mla_ticket t[2];
    assert_ok(mla_submit_batch(rig.client, &rig.batch, &t[0], e));
    assert_ok(mla_submit(rig.client, rig.plan, &t[1], e));
    assert_fails(MLA_EVICTED, "", "my last words", mla_wait(rig.client, t[1], 5000, NULL, e));
    assert_ok(mla_wait(rig.client, t[0], 5000, NULL, e));       /* it had been answered */
    assert_fails(MLA_EVICTED, "", "my last words", mla_decode(rig.client, rig.plan, 5000, NULL, e));
    mla_buffer *buffer;
    assert_fails(MLA_EVICTED, "", "my last words", mla_buffer_alloc(rig.client, 1, &buffer, e));
    assert_int_equal(peer->connections, 1);
    mla_plan_destroy(rig.plan);
    assert_ok(mla_buffer_free(rig.buffer, e));      /* ours to free, whatever the daemon */
    rig_free(&rig);
    peer_free(peer);
}

static void last_words_are_read_though_sending_fails(void **state)
{
    (void)state;
    struct last_words words = {.upon = MLAP_SUBMIT, .code = MLAP_code_EVICTED};
    struct peer *peer = peer_new(last_words, &words);
    struct rig rig;
    rig_init(&rig, peer);
    mla_ticket t[2];
    assert_ok(mla_submit(rig.client, rig.plan, &t[0], e));
    sleep_ms(30);       /* the peer has hung up: what follows gets EPIPE */
    assert_ok(mla_submit(rig.client, rig.plan, &t[1], e));
    assert_fails(MLA_EVICTED, "", "my last words", mla_wait(rig.client, t[1], 5000, NULL, e));
    assert_fails(MLA_EVICTED, "", "my last words", mla_wait(rig.client, t[0], 5000, NULL, e));
    rig_free(&rig);
    peer_free(peer);
}

static void unavailable_as_last_words_is_a_death(void **state)
{
    (void)state;
    struct last_words words = {.upon = MLAP_SUBMIT, .code = MLAP_code_UNAVAILABLE, .once = true};
    struct peer *peer = peer_new(last_words, &words);
    struct rig rig;
    rig_init(&rig, peer);
    assert_ok(mla_decode(rig.client, rig.plan, 5000, NULL, e));
    assert_int_equal(peer->connections, 2);
    rig_free(&rig);
    peer_free(peer);
}

static void refused_restoration_is_final(void **state)
{
    (void)state;
    static const enum mlap_type upon[] = {MLAP_REGISTER, MLAP_PLAN};
    for (size_t i = 0; i < 2; i++) {
        struct last_words words = {.upon = upon[i], .code = MLAP_code_QUOTA, .sequence = 1, .from = 2};
        struct peer *peer = peer_new(last_words, &words);
        peer->offers_rings = false; /* what it does after its last words would come before them */
        struct rig rig;
        rig_init(&rig, peer);
        mla_ticket ticket;
        assert_ok(mla_submit(rig.client, rig.plan, &ticket, e));
        assert_ok(mla_wait(rig.client, ticket, 5000, NULL, e));
        peer_error(atomic_load(&peer->connection), 0, MLAP_code_UNAVAILABLE, "", "restart");
        assert_ok(mla_submit(rig.client, rig.plan, &ticket, e));
        assert_fails(MLA_QUOTA, "", "could not be restored: my last words",
                     mla_wait(rig.client, ticket, 5000, NULL, e));
        assert_fails(MLA_QUOTA, "", "could not be restored", mla_decode(rig.client, rig.plan, 5000, NULL, e));
        mla_plan_destroy(rig.plan);
        assert_ok(mla_buffer_free(rig.buffer, e));
        rig_free(&rig);
        peer_free(peer);
    }
}

static void busy_after_a_death_is_tried_again(void **state)
{
    (void)state;
    struct last_words words = {.upon = MLAP_SUBMIT, .code = MLAP_code_UNAVAILABLE, .once = true};
    struct peer *peer = peer_new(last_words, &words);
    struct rig rig;
    rig_init(&rig, peer);
    mla_ticket ticket;
    assert_ok(mla_submit(rig.client, rig.plan, &ticket, e));
    sleep_ms(30);
    words.code = MLAP_code_BUSY;
    words.sequence = 1;
    words.from = 2;
    words.upon = MLAP_SUBMIT;
    mla_result result;
    assert_ok(mla_wait(rig.client, ticket, 5000, &result, e));
    assert_int_equal(result.replays, 1);
    assert_int_equal(peer->count[MLAP_SUBMIT], 3);
    rig_free(&rig);
    peer_free(peer);
}

static void waiting_honours_its_timeout_without_a_daemon(void **state)
{
    (void)state;
    struct fault fault = {MLAP_SUBMIT, 1};
    struct peer *peer = peer_new(hang_up, &fault);
    struct rig rig;
    rig_init(&rig, peer);
    mla_ticket ticket;
    assert_ok(mla_submit(rig.client, rig.plan, &ticket, e));
    char away[80];
    snprintf(away, sizeof away, "%s-away", peer->path);
    assert_int_equal(rename(peer->path, away), 0);
    int64_t start = now_ms();
    assert_fails(MLA_TIMEOUT, "timeout_ms", "not complete", mla_wait(rig.client, ticket, 100, NULL, e));
    assert_in_range(now_ms() - start, 95, 1000);
    int fd = mla_fd(rig.client), done = 0;
    assert_int_equal(rename(away, peer->path), 0);
    while (!done) {     /* the descriptor alone is enough to drive the recovery */
        struct pollfd item = {.fd = fd, .events = POLLIN};
        assert_int_equal(poll(&item, 1, 3000), 1);
        assert_ok(mla_poll(rig.client, ticket, &done, NULL, e));
    }
    rig_free(&rig);
    peer_free(peer);
}

static void it_gives_up_and_begins_again(void **state)
{
    (void)state;
    struct peer *peer = peer_new(NULL, NULL);
    peer->offers_rings = false; /* what it does after its last words would come before them */
    mla_client *client = client_of(peer, 100);
    mla_buffer *buffer;
    assert_ok(mla_buffer_alloc(client, 2 * 1024 * 1024, &buffer, e));
    mla_batch batch = batch_in(buffer);
    char away[80];
    snprintf(away, sizeof away, "%s-away", peer->path);
    assert_int_equal(rename(peer->path, away), 0);
    peer_error(atomic_load(&peer->connection), 0, MLAP_code_UNAVAILABLE, "", "restart");
    mla_ticket ticket;
    int64_t start = now_ms();
    assert_ok(mla_submit_batch(client, &batch, &ticket, e));        /* sent, before the news was read */
    assert_fails(MLA_NOT_CONNECTED, "options.socket", peer->path, mla_wait(client, ticket, MLA_FOREVER, NULL, e));
    assert_in_range(now_ms() - start, 95, 2000);
    assert_fails(MLA_NOT_CONNECTED, "options.socket", peer->path,
                 mla_decode_batch(client, &batch, MLA_FOREVER, NULL, e));
    assert_int_equal(rename(away, peer->path), 0);
    assert_ok(mla_decode_batch(client, &batch, MLA_FOREVER, NULL, e));
    assert_string_equal(peer_types(peer) + strlen(peer->types) - 4, "|HRD");
    mla_close(client);
    peer_free(peer);
}

static enum act wrong_answer(struct peer *peer, const struct arrival *a)
{
    (void)peer;
    if (a->header.type != MLAP_DECODE)
        return ANSWER;
    peer_ok(a->socket, a->header.sequence);
    return HANDLED;
}

static void an_answer_of_the_wrong_kind_is_fatal(void **state)
{
    (void)state;
    struct peer *peer = peer_new(wrong_answer, NULL);
    struct rig rig;
    rig_init(&rig, peer);
    assert_fails(MLA_MALFORMED, "", "broke the protocol", mla_decode_batch(rig.client, &rig.batch, 5000, NULL, e));
    rig_free(&rig);
    peer_free(peer);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(deaths_in_every_request),
        cmocka_unit_test(replay_is_in_order),
        cmocka_unit_test(a_destroyed_plan_is_replayed_for_its_decodes),
        cmocka_unit_test(three_deaths_are_enough),
        cmocka_unit_test(a_poisonous_plan_is_lost),
        cmocka_unit_test(a_session_that_cannot_be_restored),
        cmocka_unit_test(evicted_clients_are_dead),
        cmocka_unit_test(last_words_are_read_though_sending_fails),
        cmocka_unit_test(unavailable_as_last_words_is_a_death),
        cmocka_unit_test(refused_restoration_is_final),
        cmocka_unit_test(busy_after_a_death_is_tried_again),
        cmocka_unit_test(waiting_honours_its_timeout_without_a_daemon),
        cmocka_unit_test(it_gives_up_and_begins_again),
        cmocka_unit_test(an_answer_of_the_wrong_kind_is_fatal),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
