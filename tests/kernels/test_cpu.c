/* test_cpu.c - what the cpu backend promises beyond the contract's words, on every variant that this machine has: bits
 * that depend on nothing but the request, work of any size in bounded slices, variants that are refused by name. */
#include "oracle.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static const char *const variants[] = {"generic", "avx2", "avx512", "amx"};
enum { VARIANTS = sizeof variants / sizeof variants[0] };

static struct mlak_device *open_device(const char *variant, uint32_t threads, uint64_t *progress)
{
    struct mlak_options options = {.threads = threads, .variant = variant, .progress = progress};
    struct mlak_fault fault = {0};
    struct mlak_device *device = mlak_backend("cpu")->open(&options, &fault);
    if (device == NULL) {
        assert_int_equal(fault.code, MLAK_UNSUPPORTED);
        assert_string_equal(fault.field, "variant");
    }
    return device;
}

static void launch(struct mlak_device *device, struct mlak_row *rows, uint32_t count)
{
    assert_int_equal(mlak_backend("cpu")->launch(device, rows, count), MLAK_OK);
}

static struct mlak_row *prepare(const struct made *made)
{
    struct mlak_row *rows = calloc(made->batch.batch, sizeof *rows);
    int32_t *cu_q = calloc(made->batch.batch + UINT64_C(1), sizeof *cu_q);
    struct mlak_fault fault;
    assert_non_null(rows);
    assert_non_null(cu_q);
    assert_int_equal(mlak_prepare(&made->batch, cu_q, 0, made->batch.batch, rows, &fault), MLAK_OK);
    free(cu_q);
    return rows;
}

/* The bytes of out and lse, then the outputs are filled with NaN again. */
static uint8_t *take_outputs(struct made *made)
{
    struct fence *out = &made->tensor[MLAK_T_OUT], *lse = &made->tensor[MLAK_T_LSE];
    uint8_t *copy = made_outputs(made);
    memset(out->data, 0xff, out->bytes);
    if (lse->bytes > 0)
        memset(lse->data, 0xff, lse->bytes);
    return copy;
}

static void assert_same_outputs(struct made *made, const uint8_t *wanted, const char *what)
{
    uint8_t *got = take_outputs(made);
    if (memcmp(got, wanted, made->tensor[MLAK_T_OUT].bytes + made->tensor[MLAK_T_LSE].bytes) != 0)
        fail_msg("%s: other bits", what);
    free(got);
}

static struct mlak_batch plain_shape(uint32_t batch, uint32_t heads, uint32_t q_len, uint32_t keys, uint32_t types)
{
    struct mlak_batch shape = {.page_size = 64};
    mlak_batch_defaults(&shape);
    maker_set_types(&shape, types);
    shape.batch = batch;
    shape.heads = heads;
    shape.q_rows = (uint64_t)batch * q_len;
    shape.max_pages = (keys + 63) / 64;
    shape.pages = batch * shape.max_pages;
    shape.softmax_scale = 1 / 24.0;
    shape.has_lse = true;
    return shape;
}

/* Together, in another order, one by one, and on other numbers of threads. Several splits, and lengths on their edges.
 */
static void bits_do_not_depend_on_batch_mates_or_threads(void **state)
{
    (void)state;
    static const int32_t seqlens[] = {2300, 37, 1025, 0, 1024};
    for (uint32_t i = 0; i < VARIANTS; i++)
        for (uint32_t types = 0; types < MAKER_TYPES; types++) {
            struct mlak_device *device = open_device(variants[i], 3, NULL), *single = open_device(variants[i], 1, NULL);
            struct maker maker = maker_seeded(types);
            struct mlak_batch shape = plain_shape(5, 7, 3, 2304, types);
            if (device == NULL)
                break;
            struct made *made = made_new(&maker, &shape, seqlens, NULL);
            struct mlak_row *rows = prepare(made), *turned = prepare(made);
            launch(device, rows, 5);
            uint8_t *wanted = take_outputs(made);
            launch(device, rows, 5);
            assert_same_outputs(made, wanted, "again");
            for (uint32_t b = 0; b < 5; b++)
                turned[b] = rows[4 - b];
            launch(device, turned, 5);
            assert_same_outputs(made, wanted, "in another order");
            for (uint32_t b = 0; b < 5; b++)
                launch(device, &rows[b], 1);
            assert_same_outputs(made, wanted, "one by one");
            launch(single, rows, 5);
            assert_same_outputs(made, wanted, "on one thread");
            free(wanted);
            free(rows);
            free(turned);
            made_free(made);
            mlak_backend("cpu")->close(device);
            mlak_backend("cpu")->close(single);
        }
}

/* A key that is not finite may spoil its request, and no other. */
static void what_is_not_finite_stays_in_its_request(void **state)
{
    (void)state;
    static const int32_t seqlens[] = {70, 90, 80};
    static const uint16_t poison[] = {0x7fc0, 0x7f80, 0xff80, 0xffff};
    for (uint32_t i = 0; i < VARIANTS; i++) {
        struct mlak_device *device = open_device(variants[i], 2, NULL);
        struct maker maker = maker_seeded(5);
        struct mlak_batch shape = plain_shape(3, 4, 2, 128, 0);
        if (device == NULL)
            continue;
        struct made *made = made_new(&maker, &shape, seqlens, NULL);
        struct mlak_row *rows = prepare(made);
        launch(device, rows, 3);
        uint8_t *wanted = take_outputs(made);
        size_t request = made->tensor[MLAK_T_OUT].bytes / 3;
        for (uint32_t p = 0; p < 4; p++) {
            memcpy(made_key(made, 1, 40), &poison[p], sizeof poison[p]);
            launch(device, rows, 3);
            uint8_t *got = take_outputs(made);
            assert_memory_equal(got, wanted, request);
            assert_memory_equal(got + 2 * request, wanted + 2 * request, request);
            assert_memory_not_equal(got + request, wanted + request, request);
            free(got);
        }
        free(wanted);
        free(rows);
        made_free(made);
        mlak_backend("cpu")->close(device);
    }
}

/* A request of more keys than CPU_MAX_SPLITS splits of the usual length. Its pages repeat, so the answer is that of one
 * round of them, and lse grows by the logarithm of the rounds. */
static void very_long_requests(void **state)
{
    (void)state;
    enum { ROUND = 128, ROUNDS = 2500 };
    struct mlak_device *device = open_device(NULL, 2, NULL);
    struct maker maker = maker_seeded(11);
    struct mlak_batch shape = plain_shape(1, 2, 1, ROUND, 0);
    struct made *made = made_new(&maker, &shape, (const int32_t[]){ROUND}, NULL);
    struct mlak_row *rows = prepare(made);
    int32_t *table = calloc(2 * ROUNDS, sizeof *table);
    assert_non_null(table);
    struct oracle *oracle = oracle_new(made, 0, true);
    char why[256];
    for (uint32_t page = 0; page < 2 * ROUNDS; page++)
        table[page] = made_table(made, 0)[page % 2];
    rows[0].block_table = table;
    rows[0].max_pages = 2 * ROUNDS;
    rows[0].global_len = rows[0].local_len = (int64_t)ROUND * ROUNDS;
    launch(device, rows, 1);
    for (uint32_t h = 0; h < 2; h++)
        oracle->lse[h] += log(ROUNDS);
    if (!oracle_holds(oracle, (struct oracle_bar){.margin_db = 1, .lse = 2e-5}, why))
        fail_msg("%s", why);
    oracle_free(oracle);
    free(table);
    free(rows);
    made_free(made);
    mlak_backend("cpu")->close(device);
}

/* More requests than a slice has groups: all rows are the same request. */
static void more_requests_than_a_slice(void **state)
{
    (void)state;
    enum { COUNT = 10000, OUT = MLAK_V * 2 };
    uint64_t progress = 0;
    struct mlak_device *device = open_device(NULL, 2, &progress);
    struct maker maker = maker_seeded(12);
    struct mlak_batch shape = plain_shape(1, 1, 1, 64, 0);
    struct made *made = made_new(&maker, &shape, (const int32_t[]){3}, NULL);
    struct mlak_row *one = prepare(made), *rows = calloc(COUNT, sizeof *rows);
    uint8_t *out = calloc(COUNT, OUT);
    assert_non_null(rows);
    assert_non_null(out);
    for (uint32_t i = 0; i < COUNT; i++) {
        rows[i] = one[0];
        rows[i].out = out + (size_t)i * OUT;
        rows[i].lse = NULL;
    }
    launch(device, one, 1);
    launch(device, rows, COUNT);
    assert_int_equal(progress, COUNT + 1);
    for (uint32_t i = 0; i < COUNT; i++)
        assert_memory_equal(rows[i].out, one[0].out, OUT);
    free(out);
    free(rows);
    free(one);
    made_free(made);
    mlak_backend("cpu")->close(device);
}

/* More partial results than the arena holds: 64 tokens of 128 heads over 5 splits. Against the same tokens in launches
 * of their own. */
static void more_partials_than_the_arena(void **state)
{
    (void)state;
    enum { HEADS = 128, TOKENS = 64, KEYS = 4200, OUT = HEADS * MLAK_V * 2 };
    struct mlak_device *device = open_device(NULL, 2, NULL);
    struct maker maker = maker_seeded(13);
    struct mlak_batch shape = plain_shape(1, HEADS, TOKENS, KEYS, 0);
    shape.mask = MLAK_MASK_NONE;
    struct made *made = made_new(&maker, &shape, (const int32_t[]){KEYS}, NULL);
    struct mlak_row *rows = prepare(made);
    static const uint32_t tokens[] = {0, 31, 63};
    launch(device, rows, 1);
    uint8_t *wanted = take_outputs(made);
    for (uint32_t i = 0; i < 3; i++) {
        struct mlak_row row = rows[0];
        row.q += (size_t)tokens[i] * HEADS * MLAK_D * 2;
        row.out += (size_t)tokens[i] * OUT;
        row.lse += tokens[i] * HEADS;
        row.q_len = 1;
        launch(device, &row, 1);
        assert_memory_equal(row.out, wanted + (size_t)tokens[i] * OUT, OUT);
    }
    free(wanted);
    free(rows);
    made_free(made);
    mlak_backend("cpu")->close(device);
}

static void unknown_variants_are_refused(void **state)
{
    (void)state;
    struct mlak_fault fault = {0};
    struct mlak_options options = {.threads = 1, .variant = "avx"};
    assert_null(mlak_backend("cpu")->open(&options, &fault));
    assert_int_equal(fault.code, MLAK_UNSUPPORTED);
    assert_string_equal(fault.field, "variant");
}

/* The estimate that decides where work runs: it grows with the keys and is small for one of them. */
static void estimates_tell_small_from_large(void **state)
{
    (void)state;
    struct mlak_device *device = open_device(NULL, 2, NULL);
    struct maker maker = maker_seeded(14);
    struct mlak_batch shape = plain_shape(1, 16, 1, 4096, 0);
    struct made *made = made_new(&maker, &shape, (const int32_t[]){4096}, NULL);
    struct mlak_row *rows = prepare(made);
    uint64_t large = mlak_backend("cpu")->estimate_ns(device, rows, 1);
    rows[0].global_len = rows[0].local_len = 1;
    uint64_t small = mlak_backend("cpu")->estimate_ns(device, rows, 1);
    assert_in_range(small, 100, 20000);
    assert_in_range(large, 20001, 100000000);
    free(rows);
    made_free(made);
    mlak_backend("cpu")->close(device);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(bits_do_not_depend_on_batch_mates_or_threads),
        cmocka_unit_test(what_is_not_finite_stays_in_its_request),
        cmocka_unit_test(very_long_requests),
        cmocka_unit_test(more_requests_than_a_slice),
        cmocka_unit_test(more_partials_than_the_arena),
        cmocka_unit_test(unknown_variants_are_refused),
        cmocka_unit_test(estimates_tell_small_from_large),
    };
    return cmocka_run_group_tests(tests, NULL, NULL) != 0;
}
