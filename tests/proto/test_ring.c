/* The rings: order, bounds, lies of the peer, and two threads that sleep and wake each other. */
#include "cmocka_all.h"
#include "mlap_ring.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

enum { ENTRIES = 8 };

struct fixture {
    void *memory;
    size_t bytes;
    struct mlap_ring push, pop, unused;   /* both sides of the submission ring */
};

static int setup(void **state)
{
    struct fixture *fixture = calloc(1, sizeof *fixture);
    fixture->bytes = mlap_rings_bytes(ENTRIES);
    fixture->memory = aligned_alloc(64, fixture->bytes);
    memset(fixture->memory, 0, fixture->bytes);
    mlap_rings_init(fixture->memory, ENTRIES);
    *state = fixture;
    return mlap_rings_open(fixture->memory, fixture->bytes, &fixture->push, &fixture->unused) != 0 ||
           mlap_rings_open(fixture->memory, fixture->bytes, &fixture->pop, &fixture->unused) != 0;
}

static int teardown(void **state)
{
    struct fixture *fixture = *state;
    free(fixture->memory);
    free(fixture);
    return 0;
}

static union mlap_entry numbered(uint32_t number)
{
    return (union mlap_entry){.submission = {.operation = MLAP_OPERATION_SUBMIT, .sequence = number, .plan = ~number}};
}

static void the_layout_is_as_documented(void **state)
{
    struct fixture *fixture = *state;
    const unsigned char *memory = fixture->memory;
    assert_int_equal(fixture->bytes, 0x200 + 2 * ENTRIES * 64);
    assert_memory_equal(memory, "MLPR\x02\x00\x00\x00\x08\x00\x00\x00", 12);
    assert_ptr_equal(&fixture->push.shared->head, memory + 0x40);
    assert_ptr_equal(&fixture->push.shared->tail, memory + 0x80);
    assert_ptr_equal(&fixture->unused.shared->head, memory + 0xc0);
    assert_ptr_equal(&fixture->unused.shared->tail, memory + 0x100);
    assert_ptr_equal(fixture->push.entries, memory + 0x200);
    assert_ptr_equal(fixture->unused.entries, memory + 0x200 + ENTRIES * 64);
    const union mlap_entry arm = {.submission = {.operation = MLAP_OPERATION_ARM,
                                                 .sequence = 0x04030201,
                                                 .step = 0x14131211,
                                                 .round = 0xfffffffe}};
    assert_int_equal(mlap_ring_push(&fixture->push, &arm), 0);
    assert_memory_equal(memory + 0x200,
                        "\x02\x00\x00\x00\x01\x02\x03\x04\x11\x12\x13\x14\xfe\xff\xff\xff\x00\x00\x00\x00", 20);
}

static void entries_come_out_in_order_through_the_wrap_of_indices(void **state)
{
    struct fixture *fixture = *state;
    fixture->push.mine = fixture->pop.mine = UINT32_MAX - 2;
    fixture->push.shared->head = fixture->push.shared->tail = UINT32_MAX - 2;
    union mlap_entry entry;
    for (uint32_t round = 0; round < 5; round++) {
        for (uint32_t i = 0; i < ENTRIES; i++) {
            entry = numbered(round * ENTRIES + i);
            assert_int_equal(mlap_ring_push(&fixture->push, &entry), 0);
        }
        assert_int_equal(mlap_ring_push(&fixture->push, &entry), -1);
        assert_int_equal(errno, EAGAIN);
        for (uint32_t i = 0; i < ENTRIES; i++) {
            assert_int_equal(mlap_ring_pop(&fixture->pop, &entry), 0);
            union mlap_entry right = numbered(round * ENTRIES + i);
            assert_memory_equal(&entry, &right, sizeof entry);
        }
        assert_int_equal(mlap_ring_pop(&fixture->pop, &entry), -1);
        assert_int_equal(errno, EAGAIN);
    }
}

static void a_corrupt_tail_is_an_error_for_the_consumer(void **state)
{
    struct fixture *fixture = *state;
    const uint32_t lies[] = {ENTRIES + 1, 0x80000000u, UINT32_MAX};
    union mlap_entry entry;
    for (size_t i = 0; i < sizeof lies / sizeof lies[0]; i++) {
        fixture->pop.shared->tail = lies[i];
        assert_int_equal(mlap_ring_pop(&fixture->pop, &entry), -1);
        assert_int_equal(errno, EPROTO);
    }
    /* Its own index is private: a peer that overwrites it changes nothing. */
    fixture->pop.shared->tail = 1;
    fixture->pop.shared->head = 12345;
    assert_int_equal(mlap_ring_pop(&fixture->pop, &entry), 0);
    assert_int_equal(fixture->pop.shared->head, 1);
}

static void a_corrupt_head_is_an_error_for_the_producer(void **state)
{
    struct fixture *fixture = *state;
    const uint32_t lies[] = {1, UINT32_MAX - ENTRIES, 0x80000000u};
    union mlap_entry entry = numbered(1);
    for (size_t i = 0; i < sizeof lies / sizeof lies[0]; i++) {
        fixture->push.shared->head = lies[i];
        assert_int_equal(mlap_ring_push(&fixture->push, &entry), -1);
        assert_int_equal(errno, EPROTO);
    }
    fixture->push.shared->head = 0;
    assert_int_equal(mlap_ring_push(&fixture->push, &entry), 0);
}

static void a_foreign_or_short_mapping_is_not_opened(void **state)
{
    struct fixture *fixture = *state;
    struct mlap_rings *rings = fixture->memory;
    struct mlap_ring one, two;
    assert_int_equal(mlap_rings_open(rings, fixture->bytes - 1, &one, &two), -1);
    assert_int_equal(errno, EPROTO);
    assert_int_equal(mlap_rings_open(rings, 8, &one, &two), -1);
    const uint32_t sizes[] = {0, 3, ENTRIES + 1, 2 * ENTRIES, 2 * MLAP_RING_MAX_ENTRIES, 0x80000000u};
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        rings->entries = sizes[i];
        assert_int_equal(mlap_rings_open(rings, fixture->bytes, &one, &two), -1);
    }
    rings->entries = ENTRIES / 2;
    assert_int_equal(mlap_rings_open(rings, fixture->bytes, &one, &two), 0);
    for (int by = -1; by <= 1; by += 2) {
        rings->version = MLAP_RINGS_VERSION + (uint32_t)by;
        assert_int_equal(mlap_rings_open(rings, fixture->bytes, &one, &two), -1);
    }
    rings->version = MLAP_RINGS_VERSION;
    rings->magic = 0;
    assert_int_equal(mlap_rings_open(rings, fixture->bytes, &one, &two), -1);
    assert_int_equal(mlap_rings_bytes(3), 0);
    assert_int_equal(mlap_rings_bytes(2 * MLAP_RING_MAX_ENTRIES), 0);
}

static void a_wakeup_that_was_asked_for_is_given_once(void **state)
{
    struct fixture *fixture = *state;
    assert_false(mlap_ring_take_wakeup(&fixture->push));
    mlap_ring_set_wakeup(&fixture->pop, true);
    assert_true(mlap_ring_take_wakeup(&fixture->push));
    assert_false(mlap_ring_take_wakeup(&fixture->push));
    mlap_ring_set_wakeup(&fixture->pop, true);
    mlap_ring_set_wakeup(&fixture->pop, false);
    assert_false(mlap_ring_take_wakeup(&fixture->push));
    fixture->pop.shared->flags = ~MLAP_RING_NEED_WAKEUP; /* what else is in flags asks for nothing */
    assert_false(mlap_ring_take_wakeup(&fixture->push));
}

static void news_are_entries_and_lies(void **state)
{
    struct fixture *fixture = *state;
    union mlap_entry entry = numbered(1);
    assert_false(mlap_ring_has_news(&fixture->pop));
    assert_int_equal(mlap_ring_push(&fixture->push, &entry), 0);
    assert_true(mlap_ring_has_news(&fixture->pop));
    assert_int_equal(mlap_ring_pop(&fixture->pop, &entry), 0);
    assert_false(mlap_ring_has_news(&fixture->pop));
    fixture->pop.shared->tail = 0; /* it runs back */
    assert_true(mlap_ring_has_news(&fixture->pop));
    assert_int_equal(mlap_ring_pop(&fixture->pop, &entry), -1);
    assert_int_equal(errno, EPROTO);
}

/* ---- two threads ---- */

enum { MESSAGES = 200000 };
static int bell;
static unsigned rings_of_bell;

static void *consume(void *argument)
{
    struct mlap_ring *ring = argument;
    uintptr_t wrong = 0;
    for (uint32_t i = 0; i < MESSAGES; i++) {
        union mlap_entry entry, right = numbered(i);
        while (mlap_ring_pop(ring, &entry) != 0) {
            mlap_ring_set_wakeup(ring, true);
            if (mlap_ring_pop(ring, &entry) == 0) {
                mlap_ring_set_wakeup(ring, false);
                break;
            }
            uint64_t count;
            wrong += errno != EAGAIN || read(bell, &count, sizeof count) != sizeof count;
            mlap_ring_set_wakeup(ring, false);
        }
        wrong += memcmp(&entry, &right, sizeof entry) != 0;
    }
    return (void *)wrong;
}

/* A lost wake-up would leave the consumer asleep for ever, and the test would run into its time limit. */
static void two_threads_lose_nothing_and_wake_each_other(void **state)
{
    struct fixture *fixture = *state;
    bell = eventfd(0, EFD_CLOEXEC);
    pthread_t consumer;
    assert_int_equal(pthread_create(&consumer, NULL, consume, &fixture->pop), 0);
    for (uint32_t i = 0; i < MESSAGES; i++) {
        union mlap_entry entry = numbered(i);
        while (mlap_ring_push(&fixture->push, &entry) != 0) {
            assert_int_equal(errno, EAGAIN);
            sched_yield();
        }
        if (mlap_ring_take_wakeup(&fixture->push)) {
            const uint64_t one = 1;
            assert_int_equal(write(bell, &one, sizeof one), sizeof one);
            rings_of_bell++;
        }
    }
    void *wrong;
    pthread_join(consumer, &wrong);
    close(bell);
    assert_null(wrong);
    assert_true(rings_of_bell > 0);
}

#define RING_TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        RING_TEST(the_layout_is_as_documented),
        RING_TEST(entries_come_out_in_order_through_the_wrap_of_indices),
        RING_TEST(a_corrupt_tail_is_an_error_for_the_consumer),
        RING_TEST(a_corrupt_head_is_an_error_for_the_producer),
        RING_TEST(a_foreign_or_short_mapping_is_not_opened),
        RING_TEST(a_wakeup_that_was_asked_for_is_given_once),
        RING_TEST(news_are_entries_and_lies),
        RING_TEST(two_threads_lose_nothing_and_wake_each_other),
    };
    return cmocka_run_group_tests_name("ring", tests, NULL, NULL);
}
