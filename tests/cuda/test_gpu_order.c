/* test_gpu_order.c - the cuda backend's launches in stream order over the fake driver: what runs beside a gate that
 * waits, and what an ordered launch leaves out. Clients and their streams are in tests/daemon/test_streams.py. */
#include "gpu_fixture.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

enum { LAYERS = 2 };

static uint32_t go[LAYERS];
static uint64_t done[LAYERS];

/* Four row blocks of Hopper's kernels. */
static struct made *wide(uint64_t seed)
{
    struct maker maker = maker_seeded(seed);
    struct mlak_batch shape = maker_plain(1, 64, 4);
    return made_new(&maker, &shape, (int32_t[]){100}, NULL);
}

static void launch_beside(struct mlak_device *device, struct made *made)
{
    struct mlak_row row = {0};
    struct mlak_fault fault = {0};
    memset(made->tensor[MLAK_T_OUT].data, 0xff, made->tensor[MLAK_T_OUT].bytes);
    if (mlak_launch_batch(backend, device, &made->batch, 0, 1, &row, &fault) != MLAK_OK)
        fail_msg("%s", fault.message);
    assert_outputs_are_right(made);
}

static struct mlak_order_outcome await_round(struct mlak_device *device, struct mlak_order *order)
{
    struct mlak_order_outcome outcome;
    struct mlak_fault fault = {0};
    for (bool ended = false; !ended; usleep(1000))
        if (backend->order_poll(device, order, &ended, &outcome, &fault) != MLAK_OK)
            fail_msg("%s", fault.message);
    return outcome;
}

static void a_gate_that_waits_is_left_room_and_orders_are_silent(void **state)
{
    (void)state;
    const char *const split = "mlak_cuda_split_wgmma_bf16 10", *const beside = "mlak_cuda_split_wgmma_bf16 9";
    const char *const ordered = "mlak_cuda_split_wgmma_bf16 9 silent";
    const char *const combine = "mlak_cuda_combine 20", *const silent = "mlak_cuda_combine 20 silent";
    struct made *layers[LAYERS] = {wide(1), wide(2)}, *other = wide(3);
    const struct mlak_batch *const batches[LAYERS] = {&layers[0]->batch, &layers[1]->batch};
    struct mlak_flags flags[LAYERS];
    struct mlak_fault fault = {0};
    for (uint32_t i = 0; i < LAYERS; i++)
        flags[i] = (struct mlak_flags){&go[i], &done[i]};
    struct mlak_device *device = open_device(NULL);
    launch_beside(device, other);
    assert_int_equal(launched(split), 1);
    assert_int_equal(launched(combine), 1);
    struct mlak_lane *lane = backend->lane_new(device, &fault);
    assert_non_null(lane);
    struct mlak_order *order = backend->order_new(device, lane, batches, flags, LAYERS, 60000, &fault);
    assert_non_null(order);
    assert_int_equal(launched(ordered), LAYERS); /* what it captured */
    assert_int_equal(launched(silent), LAYERS);
    for (uint32_t round = 1; round <= 2; round++) {
        for (uint32_t i = 0; i < LAYERS; i++)
            memset(layers[i]->tensor[MLAK_T_OUT].data, 0xff, layers[i]->tensor[MLAK_T_OUT].bytes);
        assert_int_equal(backend->order_launch(device, order, round, &fault), MLAK_OK);
        launch_beside(device, other);
        assert_int_equal(launched(beside), round);
        assert_int_equal(launched(combine), 1 + round); /* the host waits for its end */
        assert_int_equal(launched(silent), LAYERS);
        for (uint32_t i = 0; i < LAYERS; i++)
            assert_int_equal((uint32_t)__atomic_load_n(&done[i], __ATOMIC_ACQUIRE), round - 1);
        for (uint32_t i = 0; i < LAYERS; i++)
            __atomic_store_n(&go[i], round, __ATOMIC_RELEASE);
        struct mlak_order_outcome outcome = await_round(device, order);
        assert_int_equal(outcome.code, MLAK_OK);
        assert_false(outcome.stopped);
        assert_int_equal(outcome.round, round);
        assert_int_equal(outcome.kv_tokens, LAYERS * 100);
        for (uint32_t i = 0; i < LAYERS; i++) {
            assert_int_equal(__atomic_load_n(&done[i], __ATOMIC_ACQUIRE), (uint64_t)MLAK_MAIL_OK << 32 | round);
            assert_outputs_are_right(layers[i]);
        }
    }
    launch_beside(device, other); /* nothing waits any more */
    assert_int_equal(launched(split), 2);
    backend->order_free(device, order);
    backend->lane_free(device, lane);
    backend->close(device);
    for (uint32_t i = 0; i < LAYERS; i++)
        made_free(layers[i]);
    made_free(other);
}

/* The grid of a launch beside each number of gates that wait, on a device of `processors`. */
static void grids_beside_gates_are(unsigned processors, const unsigned *grids, uint32_t most)
{
    enum { LANES = 4 };
    static uint32_t never;
    static uint64_t undone;
    struct made *made = wide(4), *other = wide(5);
    const struct mlak_batch *const batch = &made->batch;
    struct mlak_lane *lanes[LANES];
    struct mlak_order *orders[LANES];
    struct mlak_fault fault = {0};
    char words[64];
    assert_true(most <= LANES);
    snprintf(words, sizeof words, "processors=%u memory=4000000000", processors);
    inject(words);
    struct mlak_device *device = open_device(NULL);
    for (uint32_t waiting = 0; waiting <= most; waiting++) {
        char beside[64];
        snprintf(beside, sizeof beside, "mlak_cuda_split_wgmma_bf16 %u", grids[waiting]);
        unsigned before = launched(beside);
        launch_beside(device, other);
        assert_int_equal(launched(beside), before + 1);
        if (waiting == most)
            break;
        assert_non_null(lanes[waiting] = backend->lane_new(device, &fault));
        orders[waiting] = backend->order_new(device, lanes[waiting], &batch, &(struct mlak_flags){&never, &undone}, 1,
                                             60000, &fault);
        assert_non_null(orders[waiting]);
        assert_int_equal(backend->order_launch(device, orders[waiting], 1, &fault), MLAK_OK);
    }
    for (uint32_t i = 0; i < most; i++)
        backend->lane_abandon(device, lanes[i]);
    for (uint32_t i = 0; i < most; i++) {
        assert_true(await_round(device, orders[i]).stopped);
        backend->order_free(device, orders[i]);
        backend->lane_free(device, lanes[i]);
    }
    assert_int_equal(undone, 0);
    backend->close(device);
    made_free(made);
    made_free(other);
}

/* A quarter at most. */
static void a_processor_is_left_out_for_each_gate(void **state)
{
    (void)state;
    grids_beside_gates_are(16, (const unsigned[]){16, 15, 14, 13, 12}, 4);
    grids_beside_gates_are(15, (const unsigned[]){15, 14, 13, 12, 12}, 4);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_gate_that_waits_is_left_room_and_orders_are_silent),
        cmocka_unit_test(a_processor_is_left_out_for_each_gate),
    };
    gpu_fixture_begin("processors=10 memory=4000000000");
    int failures = cmocka_run_group_tests(tests, NULL, NULL);
    gpu_fixture_end();
    return failures != 0;
}
