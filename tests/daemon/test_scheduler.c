/* test_scheduler.c - which decodes share a launch, in which order, over a device that takes as long as the test says
 * and runs one launch at a time, or two.
 *
 * A batch's `heads` tells the device's log whose it is; its keys are all that its block table has room for. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "quota.h"
#include "scheduler.h"

#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <stdlib.h>
#include <string.h>

enum { TESTS = 16, QUEUES = 8, LOG = 4096, SPOILED = 99 };

/* Launches by number, in the order in which they began. */
static struct {
    pthread_mutex_t lock;      /* of a launch that begins */
    sem_t go[MLAD_LAUNCHES];   /* the one that runs there may end */
    uint32_t launches;
    uint32_t which[LOG], parts[LOG], log[LOG][MLAD_PARTS];
    uint32_t cancelled[LOG];   /* rows, at its end */
    bool ended[LOG];           /* the loop's, as are those below */
} gpu = {.lock = PTHREAD_MUTEX_INITIALIZER};

static enum mlak_code slow_launch(struct mlak_device *device, uint32_t which, struct mlak_part *parts, uint32_t count,
                                  bool layer, struct mlak_fault *fault)
{
    (void)device, (void)layer, (void)fault;
    pthread_mutex_lock(&gpu.lock);
    uint32_t own = gpu.launches;
    gpu.which[own] = which;
    gpu.parts[own] = count;
    for (uint32_t i = 0; i < count; i++)
        gpu.log[own][i] = parts[i].batch->heads;
    __atomic_store_n(&gpu.launches, own + 1, __ATOMIC_RELEASE);
    pthread_mutex_unlock(&gpu.lock);
    sem_wait(&gpu.go[which]);
    for (uint32_t i = 0; i < count; i++) {
        if (parts[i].batch->heads == SPOILED)
            parts[i].code = mlak_fail(&parts[i].fault, MLAK_BATCH, "cu_q[1]", "spoiled");
        for (uint32_t row = 0; row < parts[i].count; row++) {
            parts[i].rows[row].local_len = (int64_t)parts[i].batch->max_pages * parts[i].batch->page_size;
            gpu.cancelled[own] += __atomic_load_n(&parts[i].rows[row].code, __ATOMIC_RELAXED) == MLAK_ROW_CANCELLED;
        }
    }
    return MLAK_OK;
}

static bool same_types(const struct mlak_device *device, const struct mlak_batch *a, const struct mlak_batch *b)
{
    (void)device;
    return a->kv_format == b->kv_format;
}

static const struct mlak_backend slow = {.name = "slow", .launch_batches = slow_launch, .mergeable = same_types},
                                 twice = {.name = "twice", .launches = 2, .launch_batches = slow_launch,
                                          .mergeable = same_types};

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

static int begin_on(const struct mlak_backend *backend)
{
    struct mlap_fault fault;
    world = world ? world + 1 : worlds;
    assert_true(world < worlds + TESTS);
    gpu.launches = 0;
    memset(gpu.cancelled, 0, sizeof gpu.cancelled);
    memset(gpu.ended, 0, sizeof gpu.ended);
    for (uint32_t i = 0; i < MLAD_LAUNCHES; i++)
        sem_init(&gpu.go[i], 0, 0);
    world->stats.life = &world->life;
    world->quota.limits = (struct mlad_limits){
        .max_sessions = 1, .max_in_flight = 10000, .max_in_flight_per_session = 10000};
    world->scheduler.queue_limit = 10000;
    assert_int_equal(mlad_quota_enter(&world->quota, 1, &world->user, &fault), MLAP_code_OK);
    assert_int_equal(uv_loop_init(&world->loop), 0);
    assert_true(mlad_scheduler_start(&world->scheduler, &world->loop, backend, NULL, &world->stats, on_idle, on_lost));
    for (uint32_t i = 0; i < QUEUES; i++)
        mlad_queue_init(&world->queues[i], world->user, i < QUEUES / 2 ? MLAD_NORMAL : MLAD_HIGH, on_ended);
    return 0;
}

static int begin(void **state)
{
    (void)state;
    return begin_on(&slow);
}
static int begin_twice(void **state)
{
    (void)state;
    return begin_on(&twice);
}

/* What is due begins. */
static void run(void)
{
    mlad_scheduler_run(&world->scheduler);
    while (__atomic_load_n(&gpu.launches, __ATOMIC_ACQUIRE) < world->stats.launches)
        sched_yield();
}

/* A decode of `requests` requests of `keys` keys each, in queue `own`; it comes together with what comes before the
 * next run. `out`: the buffer it writes, or NULL. */
static void queue_as(uint32_t own, uint32_t heads, uint32_t requests, uint32_t keys, enum mlak_kv_format format,
                     struct mlad_buffer *out)
{
    struct mlad_plan *plan = calloc(1, sizeof *plan);
    struct mlap_fault fault;
    plan->refs = 1;
    plan->batch = (struct mlak_batch){
        .batch = requests, .heads = heads, .max_pages = keys, .page_size = 1, .kv_format = format};
    plan->buffers[MLAK_T_OUT] = out;
    plan->lengths[MLAK_T_OUT] = 1;
    if (out)
        mlad_buffer_ref(out);
    assert_int_equal(mlad_scheduler_submit(&world->scheduler, &world->queues[own], plan, 1, mlad_now_ns(), &fault),
                     MLAP_code_OK);
    mlad_plan_unref(plan);
}
static void submit_as(uint32_t own, uint32_t heads, uint32_t requests, uint32_t keys, enum mlak_kv_format format)
{
    queue_as(own, heads, requests, keys, format, NULL);
    run();
}
static void submit(uint32_t own, uint32_t requests, uint32_t keys)
{
    submit_as(own, own, requests, keys, MLAK_KV_BF16);
}
static void submit_to(uint32_t own, uint32_t heads, struct mlad_buffer *out)
{
    queue_as(own, heads, 1, 16, MLAK_KV_BF16, out);
    run();
}

/* A launch that runs ends, and what is due then begins. */
static void end(uint32_t launch)
{
    assert_true(launch < gpu.launches && !gpu.ended[launch]);
    gpu.ended[launch] = true;
    sem_post(&gpu.go[gpu.which[launch]]);
    while (world->scheduler.launch[gpu.which[launch]].running)
        uv_run(&world->loop, UV_RUN_ONCE);
    run();
}

/* The one that has run longest ends. */
static void turn(void)
{
    uint32_t launch = 0;
    while (gpu.ended[launch])
        launch++;
    end(launch);
}

static void finish_all(void)
{
    while (world->scheduler.in_flight > 0)
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

/* Both always have work: 8 times as many decodes of an eighth of the keys. On either device. */
static void tenants_share_by_keys(void **state)
{
    const uint32_t at_once = world->scheduler.n_launches;
    (void)state;
    for (uint32_t i = 0; i < 50; i++)
        submit(0, 4, 32768);
    for (uint32_t i = 0; i < 400; i++)
        submit(1, 1, 16384);
    for (uint32_t i = 0; i < 20; i++) {
        turn();
        int64_t ahead = (int64_t)(world->tokens[0] - world->tokens[1]);
        if (llabs(ahead) > at_once * MLAD_LAUNCH_TOKENS + 2 * MLAD_QUANTUM)
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
    submit(0, 64, 8192); /* too large for company */
    submit(1, 64, 8192);
    for (uint32_t i = 0; i < 40; i++)
        submit(HIGH, 64, 8192);
    uint32_t first[2] = {0, 0};
    while (world->scheduler.in_flight > 0) {
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
    assert_int_equal(gpu.cancelled[1], 5);
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
    finish_all();
    assert_int_equal(world->tokens[0], 3000);
    assert_int_equal(world->ended[0] + world->ended[1], 2);
    assert_int_equal(world->stats.launched_rows, 3001);
}

static void what_comes_together_shares_the_first_launch(void **state)
{
    (void)state;
    for (uint32_t own = 0; own < QUEUES; own++)
        queue_as(own, own, 1, 4096, MLAK_KV_BF16, NULL);
    assert_int_equal(world->scheduler.queued, QUEUES);
    run();
    assert_int_equal(gpu.launches, 1);
    assert_int_equal(gpu.parts[0], QUEUES);
    finish_all();
}

/* The queue is full of what has come together while nothing runs: that runs, and one more may wait. */
static void what_comes_together_is_no_full_queue(void **state)
{
    struct mlap_fault fault;
    (void)state;
    world->scheduler.queue_limit = 2;
    for (uint32_t i = 0; i < 4; i++)
        queue_as(0, i, 1, 16, MLAK_KV_BF16, NULL);
    assert_int_equal(world->scheduler.in_flight, 1);
    struct mlad_plan plan = {.refs = 2, .batch = {.batch = 1, .max_pages = 1, .page_size = 1}};
    assert_int_equal(mlad_scheduler_submit(&world->scheduler, &world->queues[1], &plan, 1, mlad_now_ns(), &fault),
                     MLAP_code_BUSY);
    run();
    finish_all();
    assert_int_equal(world->ended[0], 4);
}

/* ---- two at once ---- */

static void the_second_begins_when_as_many_wait_as_run(void **state)
{
    (void)state;
    for (uint32_t own = 0; own < 4; own++)
        queue_as(own, own, 1, 16, MLAK_KV_BF16, NULL);
    run();
    assert_int_equal(gpu.parts[0], 4);
    for (uint32_t own = 0; own < 3; own++)
        submit(own, 1, 16);
    assert_int_equal(gpu.launches, 1); /* three beside four would part company for ever */
    submit(3, 1, 16);
    assert_int_equal(gpu.launches, 2);
    assert_int_equal(gpu.parts[1], 4);
    for (uint32_t i = 0; i < 9; i++)
        submit(i % 4, 1, 16);
    assert_int_equal(gpu.launches, 2); /* no third */
    assert_int_equal(world->scheduler.running, 8);
    end(1); /* the younger first */
    assert_int_equal(world->ended[0] + world->ended[1] + world->ended[2] + world->ended[3], 4);
    assert_int_equal(gpu.launches, 3);
    assert_int_equal(gpu.parts[2], 9);
    submit(0, 1, 16);
    end(0);
    assert_int_equal(gpu.launches, 3); /* one waits, nine run */
    end(2);
    assert_int_equal(gpu.launches, 4); /* nothing runs: one is enough */
    finish_all();
    assert_int_equal(world->scheduler.queued + world->scheduler.running, 0);
    assert_int_equal(world->user->in_flight, 0);
    assert_int_equal(world->stats.decodes, 18);
    assert_int_equal(world->stats.launched_parts, 18);
    assert_int_equal(world->life.running, 0);
}

static void decodes_wait_for_what_they_read_in_either_launch(void **state)
{
    enum { FIRST = 10, SECOND, OTHER, AFTER_FIRST, AFTER_SECOND, LAST };
    struct mlad_buffer x = {.identity = {1}, .refs = 1, .bytes = 1}, y = {.identity = {2}, .refs = 1, .bytes = 1};
    (void)state;
    submit_to(0, FIRST, &x);
    submit_to(0, SECOND, &y);
    assert_int_equal(gpu.launches, 2); /* neither writes what the other does */
    submit_to(0, AFTER_FIRST, &x);
    submit_to(0, AFTER_SECOND, &y);
    submit_to(1, OTHER, NULL);
    end(1);
    assert_int_equal(gpu.launches, 3); /* a launch is free, but FIRST still runs: the queue's others keep their order */
    assert_true(gpu.parts[2] == 1 && has(2, OTHER));
    end(2);
    assert_int_equal(gpu.launches, 3);
    end(0);
    assert_int_equal(gpu.launches, 4);
    assert_true(gpu.parts[3] == 2 && has(3, AFTER_FIRST) && has(3, AFTER_SECOND));
    submit_to(0, LAST, &y);
    submit_to(2, OTHER, NULL); /* as many as run: the second launch begins without what has to see the first */
    assert_int_equal(gpu.launches, 5);
    assert_true(gpu.parts[4] == 1 && has(4, OTHER));
    end(4);
    assert_int_equal(gpu.launches, 5);
    end(3);
    assert_int_equal(gpu.launches, 6);
    assert_true(gpu.parts[5] == 1 && has(5, LAST));
    finish_all();
    submit_to(2, OTHER, NULL);
    submit_to(0, SECOND, &y);
    submit_to(0, AFTER_SECOND, &y);
    assert_int_equal(gpu.launches, 8);
    assert_true(gpu.which[6] != gpu.which[7]);
    end(6);
    assert_int_equal(gpu.launches, 8); /* what it has to see is in the other launch */
    end(7);
    assert_true(gpu.launches == 9 && has(8, AFTER_SECOND));
    finish_all();
    assert_int_equal(world->ended[0], 7);
    assert_int_equal(x.refs + y.refs, 2);
}

static void one_that_leaves_leaves_both(void **state)
{
    (void)state;
    queue_as(1, 1, 3, 16, MLAK_KV_BF16, NULL);
    queue_as(2, 2, 1, 16, MLAK_KV_BF16, NULL);
    run();
    queue_as(1, 1, 2, 16, MLAK_KV_BF16, NULL);
    queue_as(3, 3, 1, 16, MLAK_KV_BF16, NULL);
    run();
    submit(1, 1, 16);
    assert_int_equal(gpu.launches, 2);
    mlad_scheduler_cancel(&world->scheduler, &world->queues[1]);
    assert_int_equal(world->queues[1].in_flight, 2); /* in launches, which still name their memory */
    assert_int_equal(world->scheduler.queued, 0);
    end(1);
    assert_int_equal(world->queues[1].in_flight, 1);
    end(0);
    assert_int_equal(world->queues[1].in_flight, 0);
    assert_true(gpu.cancelled[0] == 3 && gpu.cancelled[1] == 2);
    assert_int_equal(world->dropped[1], 2);
    assert_int_equal(world->ended[2] + world->ended[3], 2);
    assert_int_equal(world->scheduler.queued + world->scheduler.running, 0);
    assert_int_equal(world->user->in_flight, 0);
}

/* Beside a large decode the short ones go on, and the next large one waits for it. */
static void one_large_decode_at_a_time(void **state)
{
    enum { LARGE = 3 };
    uint32_t large = 0;
    (void)state;
    for (uint32_t i = 0; i < LARGE; i++)
        submit(0, 64, 8192);
    assert_int_equal(gpu.launches, 1);
    for (uint32_t i = 0; i < LARGE; i++) {
        submit(1, 1, 4096); /* at once, and no large one with or behind it */
        uint32_t small = gpu.launches - 1;
        assert_int_equal(small, large + 1);
        assert_true(gpu.parts[small] == 1 && has(small, 1));
        end(small);
        assert_int_equal(gpu.launches, small + 1);
        submit(1, 1, 4096);
        assert_true(gpu.launches == small + 2 && has(small + 1, 1));
        end(large); /* while a short one runs, the next large one may */
        if (i + 1 < LARGE)
            assert_true(gpu.launches == small + 3 && gpu.parts[small + 2] == 1 && has(small + 2, 0));
        end(small + 1);
        large = small + 2;
    }
    assert_int_equal(world->ended[0], LARGE);
    assert_int_equal(world->ended[1], 2 * LARGE);
    assert_int_equal(world->scheduler.in_flight, 0);
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
        cmocka_unit_test_setup(what_comes_together_shares_the_first_launch, begin),
        cmocka_unit_test_setup(what_comes_together_is_no_full_queue, begin),
        cmocka_unit_test_setup(the_second_begins_when_as_many_wait_as_run, begin_twice),
        cmocka_unit_test_setup(decodes_wait_for_what_they_read_in_either_launch, begin_twice),
        cmocka_unit_test_setup(one_that_leaves_leaves_both, begin_twice),
        cmocka_unit_test_setup(one_large_decode_at_a_time, begin_twice),
        cmocka_unit_test_setup(tenants_share_by_keys, begin_twice),
        cmocka_unit_test_setup(high_priority_goes_first_but_not_for_ever, begin_twice),
        cmocka_unit_test_setup(large_batches_run_in_slices_among_others, begin_twice),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
