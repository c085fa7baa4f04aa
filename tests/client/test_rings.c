/* test_rings.c - libmla's side of the rings: when a decode goes by them, and what a daemon can do with them. */
#include "peer.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

enum { MANY = 100 }; /* more than the peer's rings have entries */

static struct peer *ring_peer(peer_script *script, void *of_test)
{
    struct peer *peer = peer_new(script, of_test);
    peer->offers_rings = true;
    return peer;
}

/* ---- which way ---- */

static void rings_are_used_where_they_are_offered(void **state)
{
    (void)state;
    struct peer *peer = ring_peer(NULL, NULL);
    struct rig rig;
    rig_init(&rig, peer);
    assert_int_equal(mla_transport_used(rig.client), MLA_TRANSPORT_RINGS);
    mla_result result;
    for (uint32_t i = 1; i <= MANY; i++) {
        assert_ok(mla_decode(rig.client, rig.plan, 5000, &result, e));
        assert_true(result.receive_ns == 1 && result.queue_ns == 2 && result.kernel_ns == 3 && result.kv_tokens == 4);
        assert_int_equal(peer->taken, i);
        assert_int_equal(peer->completed, i);
    }
    assert_ok(mla_decode_batch(rig.client, &rig.batch, 5000, &result, e));
    assert_int_equal(peer->taken, MANY); /* its descriptor takes a datagram; its completion does not */
    assert_int_equal(peer->completed, MANY + 1);
    rig_free(&rig);
    peer_free(peer);
}

static mla_client *client_by(const struct peer *peer, mla_transport transport)
{
    mla_options options;
    mla_options_init(&options);
    assert_int_equal(options.transport, MLA_TRANSPORT_AUTO);
    options.socket = peer->path;
    options.device = "cpu";
    options.transport = transport;
    mla_client *client = NULL;
    assert_ok(mla_connect(&client, &options, e));
    return client;
}

static void rings_can_be_declined(void **state)
{
    (void)state;
    struct peer *peer = ring_peer(NULL, NULL);
    const struct { mla_transport asked; const char *environment; mla_transport used; } cases[] = {
        {MLA_TRANSPORT_AUTO, NULL, MLA_TRANSPORT_RINGS},        {MLA_TRANSPORT_AUTO, "socket", MLA_TRANSPORT_SOCKET},
        {MLA_TRANSPORT_AUTO, "rings", MLA_TRANSPORT_RINGS},     {MLA_TRANSPORT_AUTO, "", MLA_TRANSPORT_RINGS},
        {MLA_TRANSPORT_RINGS, "socket", MLA_TRANSPORT_RINGS},   {MLA_TRANSPORT_SOCKET, NULL, MLA_TRANSPORT_SOCKET},
        {MLA_TRANSPORT_SOCKET, "rings", MLA_TRANSPORT_SOCKET},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        if (cases[i].environment)
            setenv("MLAD_TRANSPORT", cases[i].environment, 1);
        else
            unsetenv("MLAD_TRANSPORT");
        mla_client *client = client_by(peer, cases[i].asked);
        assert_int_equal(mla_transport_used(client), cases[i].used);
        mla_close(client);
    }
    mla_options options;
    mla_options_init(&options);
    options.socket = peer->path;
    mla_client *client;
    setenv("MLAD_TRANSPORT", "pigeon", 1);
    assert_fails(MLA_INVALID, "options.transport", "rings or socket", mla_connect(&client, &options, e));
    unsetenv("MLAD_TRANSPORT");
    options.transport = (mla_transport)3;
    assert_fails(MLA_INVALID, "options.transport", "mla_transport", mla_connect(&client, &options, e));
    peer_free(peer);
}

static enum act in_order(struct peer *peer, const struct arrival *a)
{
    uint32_t *last = peer->of_test;
    if (a->header.type != MLAP_SUBMIT && a->header.type != MLAP_DECODE)
        return ANSWER;
    if (a->header.sequence <= *last)
        abort();
    *last = a->header.sequence;
    return ANSWER;
}

/* Nobody takes them at first: the ring fills, and the rest goes over the socket, behind it. */
static void more_than_the_ring_holds_keep_their_order(void **state)
{
    (void)state;
    uint32_t last = 0;
    struct peer *peer = ring_peer(in_order, &last);
    struct rig rig;
    rig_init(&rig, peer);
    mla_ticket tickets[MANY];
    for (int round = 0; round < 3; round++) {
        atomic_store(&peer->deaf, true);
        for (int i = 0; i < MANY; i++) {
            if (i % 10 == 9)
                assert_ok(mla_submit_batch(rig.client, &rig.batch, &tickets[i], e));
            else
                assert_ok(mla_submit(rig.client, rig.plan, &tickets[i], e));
        }
        atomic_store(&peer->deaf, false);
        for (int i = 0; i < MANY; i++)
            assert_ok(mla_wait(rig.client, tickets[i], 5000, NULL, e));
        assert_int_equal(peer->count[MLAP_SUBMIT] + peer->count[MLAP_DECODE], (round + 1) * MANY);
    }
    assert_in_range(peer->taken, 3, 3 * MANY);
    rig_free(&rig);
    peer_free(peer);
}

/* A second PLAN is answered with the first decode, and not before. */
static enum act plan_waits_for_a_decode(struct peer *peer, const struct arrival *a)
{
    uint32_t *plan = peer->of_test;
    if (a->header.type == MLAP_PLAN && peer->count[MLAP_PLAN] == 2) {
        *plan = a->header.sequence;
        return HANDLED;
    }
    if (a->header.type == MLAP_SUBMIT && *plan) {
        mlap_send_message(a->socket, MLAP_OK, *plan, &(struct mlap_ok){0}, -1, 0);
        *plan = 0;
    }
    return ANSWER;
}

static void *make_a_plan(void *argument)
{
    struct rig *rig = argument;
    mla_plan *plan;
    return mla_plan_create(rig->client, &rig->batch, &plan, NULL) == MLA_OK ? rig : NULL;
}

static void other_messages_keep_no_decode_from_the_ring(void **state)
{
    (void)state;
    uint32_t held = 0;
    struct peer *peer = ring_peer(plan_waits_for_a_decode, &held);
    struct rig rig;
    pthread_t thread;
    void *made;
    rig_init(&rig, peer);
    assert_int_equal(pthread_create(&thread, NULL, make_a_plan, &rig), 0);
    while (peer->count[MLAP_PLAN] < 2)
        usleep(1000);
    assert_ok(mla_decode(rig.client, rig.plan, 5000, NULL, e));
    assert_int_equal(peer->taken, 1);
    pthread_join(thread, &made);
    assert_ptr_equal(made, &rig);
    rig_free(&rig);
    peer_free(peer);
}

/* How many messages a socket takes that nobody reads, each no longer than these. */
static uint32_t room_of_a_socket(void)
{
    int sockets[2];
    uint32_t sent = 0;
    assert_return_code(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, sockets), errno);
    while (mlap_send_message(sockets[0], MLAP_DROP, UINT32_MAX, &(struct mlap_drop){.plan = UINT32_MAX}, -1,
                             MSG_DONTWAIT) == 0)
        sent++;
    assert_int_equal(errno, EAGAIN);
    close(sockets[0]);
    close(sockets[1]);
    return sent;
}

/* Messages that no decode waits for fill the socket of a daemon that is to be woken: it has those to read. */
static void a_full_socket_needs_no_knock(void **state)
{
    (void)state;
    enum { DECODES = 8, SPARE = 3 };
    struct peer *peer = ring_peer(NULL, NULL);
    struct rig rig;
    uint32_t room = room_of_a_socket(), drops = room - SPARE;
    mla_plan **plans = calloc(drops, sizeof *plans);
    mla_ticket tickets[DECODES];
    assert_in_range(room, SPARE + 1, 100000);
    assert_non_null(plans);
    rig_init(&rig, peer);
    for (uint32_t i = 0; i < drops; i++)
        assert_ok(mla_plan_create(rig.client, &rig.batch, &plans[i], e));
    atomic_store(&peer->deaf, true);
    for (uint32_t i = 0; i < drops; i++)
        mla_plan_destroy(plans[i]);
    for (int i = 0; i < DECODES; i++) {
        mlap_ring_set_wakeup(&peer->submission, true);
        assert_ok(mla_submit(rig.client, rig.plan, &tickets[i], e));
    }
    atomic_store(&peer->deaf, false);
    for (int i = 0; i < DECODES; i++)
        assert_ok(mla_wait(rig.client, tickets[i], 5000, NULL, e));
    assert_ok(mla_plan_create(rig.client, &rig.batch, &plans[0], e)); /* behind all that was in the socket */
    mla_plan_destroy(plans[0]);
    assert_int_equal(peer->taken, DECODES);
    assert_in_range(peer->count[MLAP_KNOCK], 1, DECODES - 1); /* so some met a full socket */
    assert_int_equal(peer->connections, 1);
    free(plans);
    rig_free(&rig);
    peer_free(peer);
}

static void the_descriptor_speaks_for_the_ring(void **state)
{
    (void)state;
    struct peer *peer = ring_peer(NULL, NULL);
    struct rig rig;
    rig_init(&rig, peer);
    struct pollfd item = {.fd = mla_fd(rig.client), .events = POLLIN};
    for (int i = 0; i < MANY; i++) {
        mla_ticket ticket;
        int done = 0;
        assert_ok(mla_submit(rig.client, rig.plan, &ticket, e));
        while (!done) {
            assert_int_equal(poll(&item, 1, 3000), 1);
            assert_ok(mla_poll(rig.client, ticket, &done, NULL, e));
        }
    }
    assert_int_equal(peer->completed, MANY);
    assert_int_equal(poll(&item, 1, 0), 0);
    rig_free(&rig);
    peer_free(peer);
}

/* The peer completes what it was given, and dies before the client has looked. */
static enum act complete_and_die(struct peer *peer, const struct arrival *a)
{
    if (a->header.type != MLAP_SUBMIT || a->connection > 1 || atomic_load(&peer->count[MLAP_SUBMIT]) < 5)
        return a->header.type == MLAP_SUBMIT && a->connection == 1 ? HANDLED : ANSWER;
    for (uint32_t i = 0; i < 5; i++) {
        union mlap_entry entry = {.completion = {.sequence = a->header.sequence - 4 + i}};
        if (mlap_ring_push(&peer->completion, &entry) != 0)
            abort();
    }
    return HANG_UP;
}

static void what_was_completed_before_a_death_is_not_done_again(void **state)
{
    (void)state;
    struct peer *peer = ring_peer(complete_and_die, NULL);
    struct rig rig;
    rig_init(&rig, peer);
    mla_ticket tickets[5];
    for (int i = 0; i < 5; i++)
        assert_ok(mla_submit(rig.client, rig.plan, &tickets[i], e));
    mla_result result;
    for (int i = 0; i < 5; i++) {
        assert_ok(mla_wait(rig.client, tickets[i], 5000, &result, e));
        assert_int_equal(result.replays, 0);
    }
    assert_ok(mla_decode(rig.client, rig.plan, 5000, &result, e));
    assert_int_equal(peer->count[MLAP_SUBMIT], 6);
    assert_int_equal(mla_transport_used(rig.client), MLA_TRANSPORT_RINGS); /* new ones */
    rig_free(&rig);
    peer_free(peer);
}

/* ---- a daemon that cannot be trusted ---- */

enum lie { TAIL_AHEAD, TAIL_BACK, HEAD_AHEAD, NOBODYS_SEQUENCE, CODE, FAILED, NONZERO, TWICE };

static enum act lie(struct peer *peer, const struct arrival *a)
{
    if (a->header.type != MLAP_SUBMIT)
        return ANSWER;
    union mlap_entry entry = {.completion = {.sequence = a->header.sequence}};
    switch (*(enum lie *)peer->of_test) {
    case TAIL_AHEAD: peer->completion.shared->tail = peer->completion.size + 1; return HANDLED;
    case TAIL_BACK: peer->completion.shared->tail = UINT32_MAX; return HANDLED;
    case HEAD_AHEAD: peer->submission.shared->head = 1000; return ANSWER;
    case NOBODYS_SEQUENCE: entry.completion.sequence++; break;
    case CODE: entry.completion.code = MLAP_code_BUSY; break;
    case FAILED: entry.completion.failed = 1; break;
    case NONZERO: entry.completion.zero[4] = 1; break;
    case TWICE: mlap_ring_push(&peer->completion, &entry); break;
    }
    mlap_ring_push(&peer->completion, &entry);
    return HANDLED;
}

static void lies_end_the_client(void **state)
{
    (void)state;
    for (enum lie which = TAIL_AHEAD; which <= TWICE; which++) {
        struct peer *peer = ring_peer(lie, &which);
        struct rig rig;
        rig_init(&rig, peer);
        if (which == HEAD_AHEAD) { /* the next one simply goes over the socket */
            assert_ok(mla_decode(rig.client, rig.plan, 5000, NULL, e));
            assert_ok(mla_decode(rig.client, rig.plan, 5000, NULL, e));
            assert_int_equal(peer->taken, 1);
        } else {
            mla_ticket ticket;
            assert_ok(mla_submit(rig.client, rig.plan, &ticket, e));
            if (which == TWICE) /* the second answer is to nothing; the first was one */
                mla_wait(rig.client, ticket, 5000, NULL, NULL);
            else
                assert_fails(MLA_MALFORMED, "", "broke the protocol", mla_wait(rig.client, ticket, 5000, NULL, e));
            assert_fails(MLA_MALFORMED, "", "broke the protocol", mla_decode(rig.client, rig.plan, 5000, NULL, e));
        }
        rig_free(&rig);
        peer_free(peer);
    }
}

enum offer { GRANT_ALONE, MEMORY_ALONE, TWO_MEMORIES, SHORT_MEMORY, ODD_ENTRIES, UNSEALED_MEMORY, NO_MEMFD };

static void send_memory(const struct arrival *a, uint32_t entries, off_t bytes, int seals)
{
    int fd = memfd_create("rings", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    struct mlap_ring_memory memory = {.entries = entries};
    if (ftruncate(fd, bytes) != 0 || fcntl(fd, F_ADD_SEALS, seals) != 0)
        abort();
    void *mapping = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    mlap_rings_init(mapping, entries);
    munmap(mapping, 4096);
    mlap_send_message(a->socket, MLAP_RING_MEMORY, 0, &memory, fd, 0);
    close(fd);
}

static enum act offer(struct peer *peer, const struct arrival *a)
{
    if (a->header.type != MLAP_HELLO || !(a->body->hello_.features & MLAP_FEATURE_RINGS))
        return ANSWER;
    struct mlap_welcome welcome = {.daemon = "peer", .session = 1, .features = 1, .max_message = MLAP_MAX_MESSAGE};
    struct mlap_ring_memory memory = {.entries = 8};
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);
    switch (*(enum offer *)peer->of_test) {
    case GRANT_ALONE: break;
    case MEMORY_ALONE: welcome.features = 0; send_memory(a, 8, 4096, F_SEAL_SHRINK); break;
    case TWO_MEMORIES: send_memory(a, 8, 4096, F_SEAL_SHRINK); send_memory(a, 8, 4096, F_SEAL_SHRINK); break;
    case SHORT_MEMORY: send_memory(a, 64, 4096, F_SEAL_SHRINK); break;
    case ODD_ENTRIES: send_memory(a, 7, 4096, F_SEAL_SHRINK); break;
    case UNSEALED_MEMORY: send_memory(a, 8, 4096, F_SEAL_GROW); break;
    case NO_MEMFD: mlap_send_message(a->socket, MLAP_RING_MEMORY, 0, &memory, null, 0); break;
    }
    close(null);
    peer_send(a->socket, MLAP_WELCOME, a->header.sequence, &welcome);
    return HANDLED;
}

static void odd_offers_are_refused_or_declined(void **state)
{
    (void)state;
    for (enum offer which = GRANT_ALONE; which <= NO_MEMFD; which++) {
        struct peer *peer = peer_new(offer, &which);
        mla_options options;
        mla_options_init(&options);
        options.socket = peer->path;
        options.device = "cpu";
        mla_client *client = NULL;
        if (which <= TWO_MEMORIES) {
            assert_fails(MLA_MALFORMED, "", "rings", mla_connect(&client, &options, e));
        } else { /* memory that cannot be had: the socket does */
            assert_ok(mla_connect(&client, &options, e));
            assert_int_equal(mla_transport_used(client), MLA_TRANSPORT_SOCKET);
            assert_int_equal(peer->connections, 2);
            mla_close(client);
        }
        peer_free(peer);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(rings_are_used_where_they_are_offered),
        cmocka_unit_test(rings_can_be_declined),
        cmocka_unit_test(more_than_the_ring_holds_keep_their_order),
        cmocka_unit_test(other_messages_keep_no_decode_from_the_ring),
        cmocka_unit_test(a_full_socket_needs_no_knock),
        cmocka_unit_test(the_descriptor_speaks_for_the_ring),
        cmocka_unit_test(what_was_completed_before_a_death_is_not_done_again),
        cmocka_unit_test(lies_end_the_client),
        cmocka_unit_test(odd_offers_are_refused_or_declined),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
