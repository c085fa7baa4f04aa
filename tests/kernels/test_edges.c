/* test_edges.c - the contract's edges, one by one: `test_edges backend [variant]`. */
#include "test_device.h"

#include "mlak_convert.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { B = 4, H = 6, Q = 4 }; /* 24 folded rows: more than one block of 16, less than one of 32 */

static struct mlak_batch plain_shape(void) { return maker_plain(B, H, Q); }

static struct made *made_with(const struct mlak_batch *shape, const int32_t *seqlens)
{
    struct maker maker = maker_seeded(21);
    return made_new(&maker, shape, seqlens, NULL);
}

static void assert_row_is(const struct made *made, size_t row, double lse)
{
    for (size_t i = 0; i < MLAK_V; i++)
        assert_int_equal(made_out(made, row, i) & 0x7fff, 0);
    if (isinf(lse))
        assert_true((double)made->batch.lse[row] == lse);
    else
        assert_true(fabs((double)made->batch.lse[row] - lse) <= 1e-6 * fmax(1, fabs(lse)));
}

/* ---- nothing to see ---- */

static void no_keys_give_zero_and_minus_infinity(void **state)
{
    (void)state;
    for (unsigned base = 0; base < 2; base++) {
        struct mlak_batch shape = plain_shape();
        struct mlak_row rows[B];
        shape.lse_base = (enum mlak_lse_base)base;
        struct made *made = made_with(&shape, (int32_t[B]){0, 37, 0, 0});
        test_device_run(made, rows);
        for (uint32_t b = 0; b < B; b++)
            for (size_t row = 0; b != 1 && row < Q * H; row++)
                assert_row_is(made, b * Q * H + row, -INFINITY);
        made_free(made);
    }
}

static void a_batch_without_pages(void **state)
{
    (void)state;
    struct mlak_batch shape = plain_shape();
    struct mlak_row rows[B];
    shape.pages = shape.max_pages = 0;
    struct made *made = made_with(&shape, (int32_t[B]){0});
    test_device_run(made, rows);
    for (size_t row = 0; row < B * Q * H; row++)
        assert_row_is(made, row, -INFINITY);
    made_free(made);
}

static void fewer_keys_than_tokens(void **state)
{
    (void)state;
    struct mlak_batch shape = plain_shape();
    struct mlak_row rows[B];
    struct made *made = made_with(&shape, (int32_t[B]){1, 2, 3, 4});
    test_device_run(made, rows);
    for (uint32_t b = 0; b < B; b++)
        for (uint32_t t = 0; t < Q; t++)
            for (uint32_t h = 0; h < H && t + b + 1 < Q; h++)
                assert_row_is(made, (b * Q + t) * H + h, -INFINITY);
    test_device_assert_right(made, 0, "K = 1..4, q = 4");
    made_free(made);
}

static void a_tree_without_bits(void **state)
{
    (void)state;
    struct mlak_batch shape = plain_shape();
    struct mlak_row rows[B];
    shape.mask = MLAK_MASK_TREE;
    shape.has_tree_mask = true;
    struct made *made = made_with(&shape, (int32_t[B]){0, 3, 4, 30});
    memset(made->tensor[MLAK_T_TREE_MASK].data, 0, made->tensor[MLAK_T_TREE_MASK].bytes);
    for (uint32_t t = 0; t < Q; t++)
        ((uint64_t *)(void *)made->tensor[MLAK_T_TREE_MASK].data)[Q + t] = 1; /* request 1: the key at -1 */
    test_device_run(made, rows);
    for (size_t row = 0; row < 3 * Q * H; row++)
        assert_row_is(made, row, -INFINITY);
    made_free(made);
}

static void only_the_sink(void **state)
{
    (void)state;
    for (unsigned base = 0; base < 2; base++) {
        struct mlak_batch shape = plain_shape();
        struct mlak_row rows[B];
        shape.lse_base = (enum mlak_lse_base)base;
        shape.has_sink = true;
        struct made *made = made_with(&shape, (int32_t[B]){0, 12, 0, 100});
        test_device_run(made, rows);
        for (size_t row = 0; row < Q * H; row++)
            assert_row_is(made, row, (double)made->batch.sink[row % H] / (base ? log(2) : 1));
        test_device_assert_right(made, 0, "sink");
        made_free(made);
    }
}

static void an_infinite_sink_takes_all_or_nothing(void **state)
{
    (void)state;
    struct mlak_batch shape = plain_shape();
    struct mlak_row rows[B];
    shape.has_sink = true;
    struct made *made = made_with(&shape, (int32_t[B]){0, 12, 64, 100});
    float *sink = (float *)(void *)made->tensor[MLAK_T_SINK].data;
    for (uint32_t h = 0; h < H; h++)
        sink[h] = h % 2 ? (h % 4 == 1 ? INFINITY : 3e38f) : -INFINITY;
    test_device_run(made, rows);
    for (size_t row = 0; row < B * Q * H; row++) {
        if (row % H % 2)
            assert_row_is(made, row, (double)sink[row % H]);
        else if (row < Q * H)
            assert_row_is(made, row, -INFINITY);
        else
            assert_true(isfinite(made->batch.lse[row]));
    }
    made_free(made);
}

static void only_rank_0_adds_the_sink(void **state)
{
    (void)state;
    struct mlak_batch shape = plain_shape();
    struct mlak_row rows[B];
    shape.has_sink = true;
    shape.dcp_world = 2;
    shape.dcp_rank = 1;
    struct made *made = made_with(&shape, (int32_t[B]){0, 1, 40, 41});
    test_device_run(made, rows);
    for (size_t row = 0; row < 2 * Q * H; row++)
        assert_row_is(made, row, -INFINITY);
    test_device_assert_right(made, 0, "sink on rank 1");
    made_free(made);
}

static void a_batch_without_queries(void **state)
{
    (void)state;
    struct mlak_batch shape = plain_shape();
    struct mlak_row rows[B];
    shape.q_rows = 0;
    struct made *made = made_with(&shape, (int32_t[B]){5, 0, 16, 17});
    test_device_run(made, rows);
    made_free(made);
}

/* ---- what must reach nothing ---- */

static void nan_beyond_the_keys(void **state)
{
    (void)state;
    for (uint32_t types = 0; types < MAKER_TYPES; types++) {
        struct mlak_batch shape = plain_shape();
        maker_set_types(&shape, types);
        struct made *made = made_with(&shape, (int32_t[B]){1, 15, 17, 100});
        assert_int_equal(*(made_key(made, 0, 1)), 0xff); /* the maker's poison is where it should be */
        assert_int_equal(*(made_key(made, 2, 17)), 0xff);
        test_device_assert_right(made, 0, "NaN after the last key");
        made_free(made);
    }
}

static void nan_in_keys_that_no_token_sees(void **state)
{
    (void)state;
    for (uint32_t types = 0; types < MAKER_TYPES; types++) {
        struct mlak_batch shape = plain_shape();
        maker_set_types(&shape, types);
        shape.window = 5;
        struct made *made = made_with(&shape, (int32_t[B]){20, 40, 17, 100});
        assert_int_equal(*(made_key(made, 0, 11)), 0xff);
        assert_int_not_equal(*(made_key(made, 0, 12)), 0xff);
        test_device_assert_right(made, 0, "NaN before the window");
        made_free(made);

        shape.window = 0;
        shape.mask = MLAK_MASK_TREE;
        shape.has_tree_mask = true;
        made = made_with(&shape, (int32_t[B]){20, 40, 17, 100});
        uint64_t *masks = (uint64_t *)(void *)made->tensor[MLAK_T_TREE_MASK].data;
        for (uint32_t i = 0; i < B * Q; i++)
            masks[i] = 5;
        for (uint32_t b = 0; b < B; b++) {
            int64_t base = made_seqlens(made)[b] - Q;
            for (int64_t c = base; c < base + Q; c++) {
                /* A tree drawn without a draft may leave its page unassigned: give every draft a page and a key. */
                int32_t *page = &made_table(made, b)[c / 16];
                *page = *page >= 0 && *page < B * 8 + 3 ? *page : B * 8 + 2;
                if (c - base == 0 || c - base == 2)
                    memcpy(made_key(made, b, c), made_key(made, b, 0), mlak_kv_row_bytes(shape.kv_format));
                else
                    memset(made_key(made, b, c), 0xff, mlak_kv_row_bytes(shape.kv_format));
            }
        }
        test_device_assert_right(made, 0, "NaN in drafts of no token");
        made_free(made);
    }
}

static void a_non_finite_key_stays_in_its_request(void **state)
{
    (void)state;
    struct mlak_batch shape = plain_shape();
    struct mlak_row rows[B];
    struct made *made = made_with(&shape, (int32_t[B]){30, 31, 32, 33});
    for (unsigned poison = 0; poison < 3; poison++) {
        const uint16_t codes[] = {0x7fc0, 0x7f80, 0xff80};
        memcpy(made_key(made, 1, 7), &codes[poison], 2);
        test_device_run(made, rows);
        for (uint32_t b = 0; b < B; b++) {
            char why[256];
            assert_int_equal(rows[b].code, MLAK_ROW_OK);
            if (b == 1)
                continue;
            struct oracle *oracle = oracle_new(made, b, !test_device_exact());
            if (!oracle_holds(oracle, test_device_bar(MLAK_BF16), why))
                fail_msg("%s", why);
            oracle_free(oracle);
        }
    }
    made_free(made);
}

static void nonsense_in_unused_table_entries(void **state)
{
    (void)state;
    static const int32_t nonsense[] = {-1, INT32_MIN, INT32_MAX, B * 8 + 3, 0};
    for (unsigned i = 0; i < 5; i++) {
        struct mlak_batch shape = plain_shape();
        shape.window = 20;
        struct made *made = made_with(&shape, (int32_t[B]){16, 17, 60, 128});
        for (uint32_t b = 0; b < B; b++) {
            uint32_t k = (uint32_t)made_seqlens(made)[b], first = k < 20 + Q ? 0 : (k - 20 - Q + 1) / 16;
            for (uint32_t column = 0; column < 8; column++)
                if (column < first || column > (k - 1) / 16)
                    made_table(made, b)[column] = nonsense[i];
        }
        test_device_assert_right(made, 0, "nonsense pages that nothing needs");
        made_free(made);
    }
}

/* ---- one request's fault ---- */

static void assert_one_fails(struct made *made, uint32_t request, enum mlak_row_code code, const char *field)
{
    struct mlak_row rows[B];
    struct mlak_fault fault;
    test_device_run(made, rows);
    for (uint32_t b = 0; b < B; b++) {
        char why[256];
        if (b == request) {
            assert_int_equal(rows[b].code, code);
            mlak_row_fault(&rows[b], &fault);
            assert_int_equal(fault.code, MLAK_REQUESTS);
            assert_string_equal(fault.field, field);
            continue;
        }
        assert_int_equal(rows[b].code, MLAK_ROW_OK);
        struct oracle *oracle = oracle_new(made, b, !test_device_exact());
        if (!oracle_holds(oracle, test_device_bar(made->batch.q_dtype), why))
            fail_msg("%s", why);
        oracle_free(oracle);
    }
}

static void a_page_out_of_range_fails_its_request_only(void **state)
{
    (void)state;
    static const int32_t pages[] = {-1, INT32_MIN, INT32_MAX, B * 8 + 3};
    for (unsigned i = 0; i < 4; i++)
        for (uint32_t mask = 0; mask < 2; mask++) {
            struct mlak_batch shape = plain_shape();
            shape.mask = (enum mlak_mask)mask;
            struct made *made = made_with(&shape, (int32_t[B]){33, 100, 100, 0});
            made_table(made, 1)[6] = pages[i]; /* holds the last four keys, one a causal token */
            assert_one_fails(made, 1, MLAK_ROW_PAGE_RANGE, "block_table[1][6]");
            made_free(made);
        }
}

/* Only the last token sees the last key, alone in its page. */
static void a_page_that_one_token_needs_is_needed(void **state)
{
    (void)state;
    struct mlak_batch shape = plain_shape();
    struct made *made = made_with(&shape, (int32_t[B]){33, 97, 100, 0});
    made_table(made, 1)[6] = -1;
    assert_one_fails(made, 1, MLAK_ROW_PAGE_RANGE, "block_table[1][6]");
    made_free(made);
}

static void a_pool_without_pages_fails_who_needs_one(void **state)
{
    (void)state;
    struct mlak_batch shape = plain_shape();
    struct made *made = made_with(&shape, (int32_t[B]){0, 0, 0, 0});
    made->batch.pages = 0;
    made_seqlens(made)[2] = 1;
    made_table(made, 2)[0] = 0;
    assert_one_fails(made, 2, MLAK_ROW_PAGE_RANGE, "block_table[2][0]");
    made_free(made);
}

static void a_bad_length_fails_its_request_only(void **state)
{
    (void)state;
    static const struct { int32_t k; enum mlak_row_code code; } cases[] = {
        {-1, MLAK_ROW_SEQLEN_NEGATIVE}, {INT32_MIN, MLAK_ROW_SEQLEN_NEGATIVE},
        {129, MLAK_ROW_SEQLEN_TOO_LONG}, {INT32_MAX, MLAK_ROW_SEQLEN_TOO_LONG},
    };
    for (unsigned i = 0; i < 4; i++) {
        struct mlak_batch shape = plain_shape();
        struct made *made = made_with(&shape, (int32_t[B]){5, 70, 128, 0});
        made_seqlens(made)[0] = cases[i].k;
        assert_one_fails(made, 0, cases[i].code, "seqlens[0]");
        made_free(made);
    }
}

static void an_inconsistent_cu_q_writes_nothing(void **state)
{
    (void)state;
    struct mlak_batch shape = plain_shape();
    struct mlak_row rows[B];
    struct mlak_fault fault;
    shape.has_cu_q = true;
    struct made *made = made_with(&shape, (int32_t[B]){5, 70, 128, 0});
    ((int32_t *)(void *)made->tensor[MLAK_T_CU_Q].data)[2] = 1000;
    assert_int_equal(test_device_decode(made, rows, &fault), MLAK_BATCH);
    assert_string_equal(fault.field, "cu_q[2]");
    for (size_t i = 0; i < made->tensor[MLAK_T_OUT].bytes; i++)
        assert_int_equal(made->tensor[MLAK_T_OUT].data[i], 0xff);
    made_free(made);
}

/* ---- what is written ---- */

/* Rows of q after the last request's are nobody's. */
static void rows_past_the_last_request_stay(void **state)
{
    (void)state;
    struct mlak_batch shape = plain_shape();
    struct mlak_row rows[B];
    struct maker maker = maker_seeded(3);
    shape.has_cu_q = true;
    struct made *made = made_new(&maker, &shape, (int32_t[B]){5, 0, 128, 64}, (int32_t[B]){1, 4, 0, 7});
    test_device_run(made, rows);
    for (size_t i = 12 * H * MLAK_V * 2; i < made->tensor[MLAK_T_OUT].bytes; i++)
        assert_int_equal(made->tensor[MLAK_T_OUT].data[i], 0xff);
    for (size_t i = 0; i < 12 * H * MLAK_V; i++)
        assert_int_not_equal(made_out(made, 0, i), 0xffff);
    for (size_t i = 0; i < 16 * H; i++)
        assert_int_equal(isnan(made->batch.lse[i]), i >= 12 * H);
    made_free(made);
}

static void lse_is_written_only_where_asked(void **state)
{
    (void)state;
    struct mlak_batch shape = plain_shape();
    shape.has_lse = false;
    struct made *made = made_with(&shape, (int32_t[B]){5, 70, 128, 0});
    test_device_assert_right(made, 0, "without lse");
    made_free(made);
}

static void both_bases_of_the_lse(void **state)
{
    (void)state;
    struct mlak_batch shape = plain_shape();
    struct mlak_row rows[B];
    struct made *made = made_with(&shape, (int32_t[B]){1, 2, 70, 128});
    float natural[B * Q * H];
    test_device_run(made, rows);
    memcpy(natural, made->batch.lse, sizeof natural);
    made->batch.lse_base = MLAK_LSE_2;
    test_device_run(made, rows);
    for (size_t i = 0; i < B * Q * H; i++) {
        double want = (double)natural[i] / log(2);
        assert_true(isinf(want) ? (double)made->batch.lse[i] == want
                                : fabs((double)made->batch.lse[i] - want) < 1e-5 * fmax(1, fabs(want)));
    }
    made_free(made);
}

int main(int argc, char **argv)
{
    test_device_open(argc, argv);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(no_keys_give_zero_and_minus_infinity),
        cmocka_unit_test(a_batch_without_pages),
        cmocka_unit_test(fewer_keys_than_tokens),
        cmocka_unit_test(a_tree_without_bits),
        cmocka_unit_test(only_the_sink),
        cmocka_unit_test(an_infinite_sink_takes_all_or_nothing),
        cmocka_unit_test(only_rank_0_adds_the_sink),
        cmocka_unit_test(a_batch_without_queries),
        cmocka_unit_test(nan_beyond_the_keys),
        cmocka_unit_test(nan_in_keys_that_no_token_sees),
        cmocka_unit_test(a_non_finite_key_stays_in_its_request),
        cmocka_unit_test(nonsense_in_unused_table_entries),
        cmocka_unit_test(a_page_out_of_range_fails_its_request_only),
        cmocka_unit_test(a_page_that_one_token_needs_is_needed),
        cmocka_unit_test(a_pool_without_pages_fails_who_needs_one),
        cmocka_unit_test(a_bad_length_fails_its_request_only),
        cmocka_unit_test(an_inconsistent_cu_q_writes_nothing),
        cmocka_unit_test(rows_past_the_last_request_stay),
        cmocka_unit_test(lse_is_written_only_where_asked),
        cmocka_unit_test(both_bases_of_the_lse),
    };
    int failures = cmocka_run_group_tests(tests, NULL, NULL);
    test_device_close();
    return failures != 0;
}
