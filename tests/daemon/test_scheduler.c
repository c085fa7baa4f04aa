/* test_scheduler.c - which decodes share a launch, in which order, over a device that takes as long as the test says.
 *
 * A batch's `heads` tells the device's log whose it is; its keys are all that its block table has room for. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "quota.h"
#include "scheduler.h"

#include <sched.h>
#include <semaphore.h>
#include <stdlib.h>
#include <string.h>

enum { TESTS = 7, QUEUES = 8, LOG = 4096, SPOILED = 99 };

static struct {
    sem_t go;                /* a launch may end */
    uint32_t launches, rows; /* of the last launch */
    uint32_t parts[LOG], log[LOG][MLAD_PARTS];
    uint32_t cancelled; /* rows, at the end of a launch */
} gpu;

static enum mlak_code slow_launch(struct mlak_device *device, struct mlak_part *parts, uint32_t count, bool layer,
                                  struct mlak_fault *fault)
{
    (void)device, (void)layer, (void)fault;
    uint32_t own = gpu.launches;
    gpu.parts[own] = count;
    for (uint32_t i = 0; i < count; i++)
        gpu.log[own][i] = parts[i].batch->heads;
    __atomic_store_n(&gpu.launches, own + 1, __ATOMIC_RELEASE);
    sem_wait(&gpu.go);
    gpu.cancelled = gpu.rows = 0;
    for (uint32_t i = 0; i < count; i++) {
        if (parts[i].batch->heads == SPOILED)
            parts[i].code = mlak_fail(&parts[i].fault, MLAK_BATCH, "cu_q[1]", "spoiled");
        for (uint32_t row = 0; row < parts[i].count; row++, gpu.rows++) {
            parts[i].rows[row].local_len = (int64_t)parts[i].batch->max_pages * parts[i].batch->page_size;
            gpu.cancelled += __atomic_load_n(&parts[i].rows[row].code, __ATOMIC_RELAXED) == MLAK_ROW_CANCELLED;
        }
    }
    return MLAK_OK;
}

static bool same_types(const struct mlak_device *device, const struct mlak_batch *a, const struct mlak_batch *b)
{
    (void)device;
    return a->kv_format == b->kv_format;
}

static const struct mlak_backend slow = {.name = "slow", .launch_batches = slow_launch, .mergeable = same_types};

/* One for each test: launch threads end with the process. */
static struct world {
    uv_loop_t loop;
    struct mlad_life life;
    struct mlad_stats stats;
    struct mlad_quota quota;
    struct mlad_user *user;
    struct mlad_scheduler scheduler;
    struct mlad_queue queues[QUEUES];
    uint32_t ended[QUEUES], failed[QUEUES], dropped[QUEUES];
    uint64_t tokens[QUEUES];
} worlds[TESTS], *world;

static void on_idle(struct mlad_scheduler *scheduler)
{
    (void)scheduler;
}
static void on_lost(struct mlad_scheduler *scheduler, const char *why)
{
    (void)scheduler;
    fail_msg("%s", why);
}

static void on_ended(struct mlad_queue *queue, const struct mlad_decode *decode, const struct mlap_fault *fault)
{
    size_t own = (size_t)(queue - world->queues);
    world->ended[own] += decode && !fault;
    world->failed[own] += decode && fault;
    world->dropped[own] += !decode;
    world->tokens[own] += decode ? decode->kv_tokens : 0;
}

static int begin(void **state)
{
    (void)state;
    struct mlap_fault fault;
    world = world ? world + 1 : worlds;
    memset(&gpu, 0, sizeof gpu);
    sem_init(&gpu.go, 0, 0);
    world->stats.life = &world->life;
    world->quota.limits = (struct mlad_limits){
        .max_sessions = 1, .max_in_flight = 10000, .max_in_flight_per_session = 10000};
    world->scheduler.queue_limit = 10000;
    assert_int_equal(mlad_quota_enter(&world->quota, 1, &world->user, &fault), MLAP_code_OK);
    assert_int_equal(uv_loop_init(&world->loop), 0);
    assert_true(mlad_scheduler_start(&world->scheduler, &world->loop, &slow, NULL, &world->stats, on_idle, on_lost));
    for (uint32_t i = 0; i < QUEUES; i++)
        mlad_queue_init(&world->queues[i], world->user, i < QUEUES / 2 ? MLAD_NORMAL : MLAD_HIGH, on_ended);
    return 0;
}

/* A decode of `requests` requests of `keys` keys each, in queue `own`. */
static void submit_as(uint32_t own, uint32_t heads, uint32_t requests, uint32_t keys, enum mlak_kv_format format)
{
    struct mlad_plan *plan = calloc(1, sizeof *plan);
    struct mlap_fault fault;
    plan->refs = 1;
    plan->batch = (struct mlak_batch){
        .batch = requests, .heads = heads, .max_pages = keys, .page_size = 1, .kv_format = format};
    assert_int_equal(mlad_scheduler_submit(&world->scheduler, &world->queues[own], plan, 1, mlad_now_ns(), &fault),
                     MLAP_code_OK);
    mlad_plan_unref(plan);
}
static void submit(uint32_t own, uint32_t requests, uint32_t keys)
{
    submit_as(own, own, requests, keys, MLAK_KV_BF16);
}

/* The launch that runs ends, and the next one begins, if anything waits. */
static void turn(void)
{
    uint32_t before = __atomic_load_n(&gpu.launches, __ATOMIC_ACQUIRE);
    bool waits = world->scheduler.queued > 0;
    sem_post(&gpu.go);
    do
        uv_run(&world->loop, UV_RUN_ONCE);
    while (world->scheduler.launching && world->scheduler.launches == before);
    while (waits && __atomic_load_n(&gpu.launches, __ATOMIC_ACQUIRE) == before)
        sched_yield();
}

static void begun(void)
{
    while (__atomic_load_n(&gpu.launches, __ATOMIC_ACQUIRE) == 0)
        sched_yield();
}

static void finish_all(void)
{
    while (world->scheduler.launching)
        turn();
}

static bool has(uint32_t launch, uint32_t heads)
{
    for (uint32_t i = 0; i < gpu.parts[launch]; i++)
        if (gpu.log[launch][i] == heads)
            return true;
    return false;
}

static void what_waits_shares_the_next_launch(void **state)
{
    (void)state;
    submit(0, 1, 4096);
    begun();
    assert_int_equal(gpu.parts[0], 1); /* alone: at once */
    for (uint32_t own = 0; own < QUEUES; own++)
        for (uint32_t i = 0; i < 2; i++)
            submit(own, 1, 4096);
    finish_all();
    assert_int_equal(gpu.launches, 2);
    assert_int_equal(gpu.parts[1], 2 * QUEUES);
    assert_int_equal(world->ended[0], 3);
    assert_int_equal(world->ended[QUEUES - 1], 2);
    assert_int_equal(world->stats.launches, 2);
    assert_int_equal(world->stats.launched_parts, 1 + 2 * QUEUES);
    assert_int_equal(world->stats.launched_rows, 1 + 2 * QUEUES);
}

static void other_kinds_wait_for_the_launch_after(void **state)
{
    (void)state;
    submit(0, 1, 16);
    begun();
    for (uint32_t own = 0; own < 4; own++)
        submit_as(own, own, 1, 16, own % 2 ? MLAK_KV_FP16 : MLAK_KV_BF16);
    finish_all();
    assert_int_equal(gpu.launches, 3);
    assert_true(has(1, 0) && has(1, 2) && has(2, 1) && has(2, 3));
}

/* A short decode that comes while one of the flood's runs is in the launch after it, and nothing large is with it. */
static void a_flood_of_large_decodes_delays_a_short_one_by_one_launch(void **state)
{
    (void)state;
    for (uint32_t i = 0; i < 20; i++)
        submit(0, 64, 8192);
    begun();
    for (uint32_t i = 0; i < 8; i++) {
        uint32_t running = gpu.launches - 1;
        assert_int_equal(gpu.log[running][0], 0);
        submit(1, 1, 4096);
        turn();
        assert_int_equal(gpu.parts[running + 1], 1);
        assert_int_equal(gpu.log[running + 1][0], 1);
        turn(); /* and then the flood goes on */
        assert_int_equal(gpu.log[running + 2][0], 0);
    }
    finish_all();
    assert_int_equal(world->ended[0], 20);
    assert_int_equal(world->ended[1], 8);
}

/* Both always have work: 8 times as many decodes of an eighth of the keys. */
static void tenants_share_by_keys(void **state)
{
    (void)state;
    for (uint32_t i = 0; i < 50; i++)
        submit(0, 4, 32768);
    for (uint32_t i = 0; i < 400; i++)
        submit(1, 1, 16384);
    begun();
    for (uint32_t i = 0; i < 20; i++) {
        turn();
        int64_t ahead = (int64_t)(world->tokens[0] - world->tokens[1]);
        if (llabs(ahead) > MLAD_LAUNCH_TOKENS + 2 * MLAD_QUANTUM)
            fail_msg("after %u launches one is %lld keys ahead", i, (long long)ahead);
    }
    assert_true(world->tokens[0] > 0 && world->tokens[1] > 0);
    finish_all();
}

static void high_priority_goes_first_but_not_for_ever(void **state)
{
    (void)state;
    enum { HIGH = QUEUES - 1 };
    submit(HIGH, 64, 8192);
    begun();
    submit(0, 64, 8192); /* too large for company */
    submit(1, 64, 8192);
    for (uint32_t i = 0; i < 40; i++)
        submit(HIGH, 64, 8192);
    uint32_t first[2] = {0, 0};
    while (world->scheduler.launching) {
        turn();
        for (uint32_t own = 0; own < 2; own++)
            if (!first[own] && has(gpu.launches - 1, own))
                first[own] = gpu.launches - 1;
    }
    assert_int_equal(first[0], MLAD_PATIENCE + 1);
    assert_in_range(first[1], first[0] + 1, first[0] + MLAD_PATIENCE + 1);
    assert_int_equal(world->ended[HIGH], 41);
}

static void one_that_leaves_or_fails_is_alone_in_that(void **state)
{
    (void)state;
    submit(0, 1, 16);
    begun();
    submit(1, 3, 16);
    submit(1, 2, 16);
    submit(2, 1, 16);
    submit_as(3, SPOILED, 1, 16, MLAK_KV_BF16);
    submit(4, 1, 16);
    turn();
    assert_int_equal(gpu.parts[1], 5);
    submit(1, 1, 16);
    mlad_scheduler_cancel(&world->scheduler, &world->queues[1]);
    assert_int_equal(world->queues[1].in_flight, 2); /* in the launch, which still names their memory */
    finish_all();
    assert_int_equal(gpu.launches, 2);
    assert_int_equal(gpu.cancelled, 5);
    assert_int_equal(world->dropped[1], 2);
    assert_int_equal(world->queues[1].in_flight, 0);
    assert_int_equal(world->failed[3], 1);
    assert_int_equal(world->ended[2] + world->ended[4], 2);
    assert_int_equal(world->scheduler.queued + world->scheduler.running, 0);
    assert_int_equal(world->user->in_flight, 0);
}

static void large_batches_run_in_slices_among_others(void **state)
{
    (void)state;
    submit(0, 3000, 1);
    submit(1, 1, 1);
    begun();
    finish_all();
    assert_int_equal(world->tokens[0], 3000);
    assert_int_equal(world->ended[0] + world->ended[1], 2);
    assert_int_equal(world->stats.launched_rows, 3001);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup(what_waits_shares_the_next_launch, begin),
        cmocka_unit_test_setup(other_kinds_wait_for_the_launch_after, begin),
        cmocka_unit_test_setup(a_flood_of_large_decodes_delays_a_short_one_by_one_launch, begin),
        cmocka_unit_test_setup(tenants_share_by_keys, begin),
        cmocka_unit_test_setup(high_priority_goes_first_but_not_for_ever, begin),
        cmocka_unit_test_setup(one_that_leaves_or_fails_is_alone_in_that, begin),
        cmocka_unit_test_setup(large_batches_run_in_slices_among_others, begin),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
