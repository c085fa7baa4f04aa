/* test_same.c - the same decode in other words has the same result: strides, batch-mates, launches, ranks; and so has
 * the same decode again, many times: `test_same [times] backend [variant]`. */
#include "test_device.h"

#include <ctype.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { B = 4, H = 6, Q = 4 }; /* 24 folded rows: more than one block of 16, less than one of 32 */

static struct mlak_batch plain_shape(void) { return maker_plain(B, H, Q); }

static struct made *made_with(const struct mlak_batch *shape, const int32_t *seqlens)
{
    struct maker maker = maker_seeded(41);
    return made_new(&maker, shape, seqlens, NULL);
}

/* Two requests have the same bits of out and lse. */
static bool same_request(const struct made *a, uint32_t request_a, const struct made *b, uint32_t request_b)
{
    size_t heads = a->batch.heads, rows = made_q_len(a, request_a) * heads;
    size_t first_a = made_q_start(a, request_a) * heads, first_b = made_q_start(b, request_b) * heads;
    return memcmp(a->tensor[MLAK_T_OUT].data + first_a * MLAK_V * 2, b->tensor[MLAK_T_OUT].data + first_b * MLAK_V * 2,
                  rows * MLAK_V * 2) == 0 &&
           (!a->batch.has_lse || memcmp(a->batch.lse + first_a, b->batch.lse + first_b, rows * 4) == 0);
}

static void copy_tensor(struct made *to, const struct made *from, enum mlak_tensor tensor)
{
    assert_int_equal(to->tensor[tensor].bytes, from->tensor[tensor].bytes);
    memcpy(to->tensor[tensor].data, from->tensor[tensor].data, from->tensor[tensor].bytes);
}

static void strides_change_no_bit(void **state)
{
    (void)state;
    for (uint32_t types = 0; types < MAKER_TYPES; types++) {
        struct mlak_batch shape = plain_shape(), wide;
        struct mlak_row rows[B];
        maker_set_types(&shape, types);
        wide = shape;
        wide.row_stride += 48;
        wide.page_stride = 16 * wide.row_stride + 80;
        const int32_t lengths[B] = {5, 70, 128, 0};
        struct made *packed = made_with(&shape, lengths), *strided = made_with(&wide, lengths);
        copy_tensor(strided, packed, MLAK_T_Q);
        copy_tensor(strided, packed, MLAK_T_BLOCK_TABLE);
        for (uint32_t b = 0; b < B; b++)
            for (int64_t c = 0; c < lengths[b]; c++)
                memcpy(made_key(strided, b, c), made_key(packed, b, c), mlak_kv_row_bytes(shape.kv_format));
        test_device_run(packed, rows);
        test_device_run(strided, rows);
        for (uint32_t b = 0; b < B; b++)
            assert_true(same_request(packed, b, strided, b));
        made_free(packed);
        made_free(strided);
    }
}

/* With `deterministic`, a request alone has the bits that it has among others, long and short. */
static void deterministic_bits_do_not_depend_on_batch_mates(void **state)
{
    (void)state;
    for (uint32_t types = 0; types < MAKER_TYPES; types++) {
        struct mlak_batch shape = plain_shape();
        struct mlak_row rows[B];
        maker_set_types(&shape, types);
        shape.deterministic = true;
        shape.max_pages = 64;
        shape.pages = B * 64;
        const int32_t lengths[B] = {1000, 3, 257, 64};
        struct made *all = made_with(&shape, lengths);
        test_device_run(all, rows);
        shape.batch = 1;
        shape.q_rows = Q;
        for (uint32_t b = 0; b < B; b++) {
            struct made *alone = made_with(&shape, &lengths[b]);
            size_t q_bytes = alone->tensor[MLAK_T_Q].bytes;
            memcpy(alone->tensor[MLAK_T_Q].data, all->tensor[MLAK_T_Q].data + b * q_bytes, q_bytes);
            copy_tensor(alone, all, MLAK_T_KV);
            memcpy(alone->tensor[MLAK_T_BLOCK_TABLE].data, made_table(all, b), 4 * 64);
            struct mlak_row row;
            test_device_run(alone, &row);
            assert_true(same_request(alone, 0, all, b));
            made_free(alone);
        }
        made_free(all);
    }
}

/* ---- again and again ---- */

enum { MOST_BATCHES = 4 };
static unsigned times = 3;

/* Batches of one launch. */
struct launch {
    struct made *made[MOST_BATCHES];
    struct mlak_row *rows[MOST_BATCHES];
    enum mlak_code codes[MOST_BATCHES];
    uint8_t *first[MOST_BATCHES]; /* out and lse of its first run */
    uint32_t count;
    const char *what;
};

static void add(struct launch *launch, struct mlak_batch shape, uint32_t types, const int32_t *lengths,
                const int32_t *q_lens)
{
    struct maker maker = maker_seeded(43 + launch->count);
    shape.max_pages = 64;
    shape.pages = shape.batch * 64;
    shape.has_cu_q = q_lens != NULL;
    maker_set_types(&shape, types);
    launch->made[launch->count] = made_new(&maker, &shape, lengths, q_lens);
    launch->rows[launch->count++] = calloc(shape.batch, sizeof(struct mlak_row));
}

static void compare(void *context, unsigned time)
{
    struct launch *launch = context;
    for (uint32_t i = 0; i < launch->count; i++) {
        assert_int_equal(launch->codes[i], MLAK_OK);
        if (time == 0)
            launch->first[i] = made_outputs(launch->made[i]);
        else if (!made_outputs_are(launch->made[i], launch->first[i]))
            fail_msg("%s: run %u of batch %u has other bits", launch->what, time + 1, i);
    }
}

static void run_again(struct launch *launch, const char *what)
{
    launch->what = what;
    test_device_decode_again(launch->made, launch->count, launch->rows, launch->codes, times, compare, launch);
    for (uint32_t i = 0; i < launch->count; i++) {
        test_device_judge(launch->made[i], launch->rows[i], 0, what);
        made_free(launch->made[i]);
        free(launch->rows[i]);
        free(launch->first[i]);
    }
}

static void the_same_launch_has_the_same_bits(void **state)
{
    (void)state;
    for (uint32_t types = 0; types < MAKER_TYPES; types++) {
        struct launch launch = {0};
        struct mlak_batch shape = plain_shape();
        shape.deterministic = types == 4;
        add(&launch, shape, types, (int32_t[B]){1000, 3, 257, 64}, NULL);
        run_again(&launch, "some rows");
    }
}

static void a_ragged_launch_has_the_same_bits(void **state)
{
    (void)state;
    struct launch launch = {0};
    struct mlak_batch shape = maker_plain(B, 20, 4);
    add(&launch, shape, 0, (int32_t[B]){900, 0, 130, 64}, (int32_t[B]){1, 2, 9, 0});
    run_again(&launch, "ragged");
}

/* Two row blocks or more a request: blocks that work in pairs, where there are any. */
static void a_launch_of_many_rows_has_the_same_bits(void **state)
{
    (void)state;
    struct launch launch = {0};
    add(&launch, maker_plain(2, MLAK_MAX_HEADS, 2), 0, (int32_t[]){190, 70}, NULL);
    run_again(&launch, "many rows");
}

static void batches_in_one_launch_have_the_same_bits(void **state)
{
    (void)state;
    struct launch launch = {0};
    add(&launch, plain_shape(), 1, (int32_t[B]){500, 3, 257, 64}, NULL);
    add(&launch, maker_plain(2, 70, 1), 1, (int32_t[]){190, 65}, NULL);
    add(&launch, maker_plain(3, 9, 4), 1, (int32_t[]){1, 1000, 63}, (int32_t[]){4, 1, 7});
    run_again(&launch, "several batches");
}

/* ---- in company ---- */

/* Rows of batches that differ in everything, in one launch. */
static void a_launch_mixes_batches(void **state)
{
    (void)state;
    if (!test_device_takes_rows())
        skip(); /* its launches are of one batch */
    enum { BATCHES = 12 };
    struct maker maker = maker_seeded(33);
    struct made *made[BATCHES];
    struct mlak_row rows[BATCHES * 8], *next = rows;
    for (uint32_t i = 0; i < BATCHES; i++) {
        struct mlak_batch shape = maker_describe(&maker);
        struct mlak_fault fault;
        int32_t cu_q[9];
        made[i] = made_new(&maker, &shape, NULL, NULL);
        assert_int_equal(mlak_prepare(&made[i]->batch, cu_q, 0, shape.batch, next, &fault), MLAK_OK);
        next += shape.batch;
    }
    assert_int_equal(test_device_launch(rows, (uint32_t)(next - rows)), MLAK_OK);
    next = rows;
    for (uint32_t i = 0; i < BATCHES; i++) {
        for (uint32_t b = 0; b < made[i]->batch.batch; b++) {
            char why[256];
            assert_int_equal((next++)->code, MLAK_ROW_OK);
            struct oracle *oracle = oracle_new(made[i], b, !test_device_exact());
            if (!oracle_holds(oracle, test_device_bar(made[i]->batch.q_dtype), why))
                fail_msg("batch %u: %s", i, why);
            oracle_free(oracle);
        }
        assert_true(made_intact(made[i]));
        made_free(made[i]);
    }
}

/* The ranks' partial results, merged as a framework does, are the result without ranks. */
static void ranks_merge_to_the_whole(void **state)
{
    (void)state;
    enum { K = 101, WORLD = 3 };
    struct mlak_batch shape = plain_shape();
    struct mlak_row row;
    shape.batch = 1;
    shape.q_rows = Q;
    shape.has_sink = true;
    struct made *whole = made_with(&shape, (int32_t[]){K});
    test_device_run(whole, &row);
    double out[Q * H][MLAK_V] = {{0}}, weight[Q * H] = {0};
    for (uint32_t rank = 0; rank < WORLD; rank++) {
        struct mlak_batch part_shape = shape;
        part_shape.dcp_world = WORLD;
        part_shape.dcp_rank = rank;
        part_shape.dcp_interleave = 4;
        struct made *part = made_with(&part_shape, (int32_t[]){K});
        copy_tensor(part, whole, MLAK_T_Q);
        copy_tensor(part, whole, MLAK_T_SINK);
        int64_t c = 0;
        for (int64_t g = 0; g < K; g++)
            if (contract_holds(&part_shape, g))
                memcpy(made_key(part, 0, c++), made_key(whole, 0, g), 1152);
        test_device_run(part, &row);
        for (size_t r = 0; r < Q * H; r++) {
            double w = exp((double)part->batch.lse[r] - (double)whole->batch.lse[r]);
            weight[r] += w;
            for (size_t i = 0; i < MLAK_V; i++)
                out[r][i] += w * oracle_decode(MLAK_BF16, made_out(part, r, i));
        }
        made_free(part);
    }
    for (size_t r = 0; r < Q * H; r++) {
        assert_true(fabs(weight[r] - 1) < 1e-4);
        for (size_t i = 0; i < MLAK_V; i++)
            assert_true(fabs(out[r][i] - oracle_decode(MLAK_BF16, made_out(whole, r, i))) < 0.02);
    }
    made_free(whole);
}

int main(int argc, char **argv)
{
    if (argc > 1 && isdigit((unsigned char)argv[1][0])) {
        times = atoi(argv[1]) > 0 ? (unsigned)atoi(argv[1]) : 1;
        argc--;
        argv++;
    }
    test_device_open(argc, argv);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(strides_change_no_bit),
        cmocka_unit_test(deterministic_bits_do_not_depend_on_batch_mates),
        cmocka_unit_test(the_same_launch_has_the_same_bits),
        cmocka_unit_test(a_ragged_launch_has_the_same_bits),
        cmocka_unit_test(a_launch_of_many_rows_has_the_same_bits),
        cmocka_unit_test(batches_in_one_launch_have_the_same_bits),
        cmocka_unit_test(a_launch_mixes_batches),
        cmocka_unit_test(ranks_merge_to_the_whole),
    };
    int failures = cmocka_run_group_tests(tests, NULL, NULL);
    test_device_close();
    return failures != 0;
}
