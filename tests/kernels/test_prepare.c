/* test_prepare.c - a batch into rows, and what rows see, against the contract taken key by key. */
#include "batch_maker.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static bool row_sees(const struct mlak_row *row, struct mlak_visible sees, uint64_t bits, int64_t c)
{
    return c >= sees.lo && c < sees.hi && (c < sees.base || mlak_tree_sees(row, bits, c));
}

/* One request of a batch whose q, kv and outputs are never touched. */
struct single { struct mlak_batch batch; int32_t seqlen; uint64_t tree[MLAK_MAX_Q]; struct mlak_row row; };

static void single_prepare(struct single *s)
{
    struct mlak_fault fault;
    s->batch.batch = 1;
    s->batch.seqlens = &s->seqlen;
    s->batch.tree_mask = s->tree;
    s->batch.has_tree_mask = s->batch.mask == MLAK_MASK_TREE;
    assert_int_equal(mlak_prepare(&s->batch, NULL, 0, 1, &s->row, &fault), MLAK_OK);
}

static void draw_single(struct maker *maker, struct single *s)
{
    uint32_t q_len = maker_below(maker, maker_below(maker, 2) ? 9 : 65);
    *s = (struct single){.batch = {.page_size = 64}};
    mlak_batch_defaults(&s->batch);
    s->seqlen = (int32_t)maker_below(maker, maker_below(maker, 2) ? q_len + 3 : 201);
    s->batch.heads = 1;
    s->batch.q_rows = q_len;
    s->batch.max_pages = 4;
    s->batch.mask = (enum mlak_mask)maker_below(maker, MLAK_MASK_COUNT);
    s->batch.dcp_world = 1 + maker_below(maker, 5);
    s->batch.dcp_rank = maker_below(maker, s->batch.dcp_world);
    s->batch.dcp_interleave = 1 + maker_below(maker, 7);
    s->batch.window = maker_below(maker, 2) ? 1 + maker_below(maker, maker_below(maker, 2) ? 5 : 220) : 0;
    for (uint32_t t = 0; t < MLAK_MAX_Q; t++)
        s->tree[t] = maker_below(maker, 4) ? maker_random(maker) & maker_random(maker) : 0;
}

static void assert_key_by_key(const struct single *s)
{
    const struct mlak_batch *batch = &s->batch;
    const struct mlak_row *row = &s->row;
    int64_t k = s->seqlen, c = 0;
    uint64_t bits;
    struct mlak_visible any = mlak_visible_any(row, &bits);
    for (int64_t g = 0; g < k; g++) {
        bool seen = false;
        if (!contract_holds(batch, g))
            continue;
        assert_int_equal(mlak_local_count(row, g), c);
        for (uint32_t t = 0; t < row->q_len; t++) {
            bool sees = contract_sees(batch, k, row->q_len, t, s->tree[t], g);
            seen |= sees;
            if (row_sees(row, mlak_visible(row, t), row->tree_mask[t], c) != sees)
                fail_msg("mask %d K %d q %u t %u g %d window %u dcp %u/%u/%u: %s", batch->mask, (int)k, row->q_len, t,
                         (int)g, batch->window, batch->dcp_rank, batch->dcp_world, batch->dcp_interleave,
                         sees ? "not seen" : "seen");
        }
        if (row_sees(row, any, bits, c) != seen)
            fail_msg("mask %d K %d q %u g %d window %u: the union %s it", batch->mask, (int)k, row->q_len, (int)g,
                     batch->window, seen ? "lacks" : "has");
        c++;
    }
    assert_int_equal(row->local_len, c);
    assert_int_equal(mlak_local_count(row, k), c);
    assert_int_equal(mlak_local_count(row, -5), 0);
    for (uint32_t t = 0; t < row->q_len; t++) {
        struct mlak_visible sees = mlak_visible(row, t);
        assert_true(0 <= sees.lo && sees.lo <= sees.hi && sees.base <= sees.hi && sees.hi <= c);
        assert_true(any.lo <= sees.lo && sees.hi <= any.hi);
        if (batch->mask != MLAK_MASK_TREE)
            assert_int_equal(sees.base, sees.hi);
    }
}

static void visible_keys(void **state)
{
    (void)state;
    struct maker maker = maker_seeded(11);
    for (unsigned i = 0; i < 6000; i++) {
        struct single s;
        draw_single(&maker, &s);
        single_prepare(&s);
        assert_int_equal(s.row.code, MLAK_ROW_OK);
        assert_key_by_key(&s);
    }
}

/* Lengths up to INT32_MAX, ranks and runs at their bounds: keys around every edge. */
static void visible_keys_of_huge_requests(void **state)
{
    (void)state;
    struct maker maker = maker_seeded(12);
    for (unsigned i = 0; i < 3000; i++) {
        struct single s;
        draw_single(&maker, &s);
        s.seqlen = INT32_MAX - (int32_t)maker_below(&maker, 3);
        s.batch.max_pages = UINT32_MAX;
        s.batch.page_size = MLAK_MAX_PAGE;
        s.batch.dcp_interleave = 1 + maker_below(&maker, 1 << 20);
        s.batch.dcp_world = 1 + maker_below(&maker, 4096);
        s.batch.dcp_rank = maker_below(&maker, s.batch.dcp_world);
        s.batch.window = maker_below(&maker, 2) ? UINT32_MAX - maker_below(&maker, 3) : maker_below(&maker, 1 << 20);
        single_prepare(&s);
        const int64_t k = s.seqlen, edges[] = {0, k - s.row.q_len, k - s.batch.window, k};
        for (unsigned edge = 0; edge < 4; edge++)
            for (int64_t g = edges[edge] - 70; g < edges[edge] + 70; g++)
                for (uint32_t t = 0; t < s.row.q_len; t += 7)
                    if (g >= 0 && contract_holds(&s.batch, g))
                        assert_int_equal(
                            row_sees(&s.row, mlak_visible(&s.row, t), s.row.tree_mask[t], mlak_local_count(&s.row, g)),
                            contract_sees(&s.batch, k, s.row.q_len, t, s.tree[t], g));
    }
}

/* Causal is the special case of lower-triangular bits. */
static void causal_is_a_lower_triangular_tree(void **state)
{
    (void)state;
    struct maker maker = maker_seeded(13);
    for (unsigned i = 0; i < 500; i++) {
        struct single causal, tree;
        draw_single(&maker, &causal);
        causal.batch.mask = MLAK_MASK_CAUSAL;
        causal.batch.window = 0;
        tree = causal;
        tree.batch.mask = MLAK_MASK_TREE;
        for (uint32_t t = 0; t < MLAK_MAX_Q; t++)
            tree.tree[t] = t == 63 ? UINT64_MAX : (UINT64_C(2) << t) - 1;
        single_prepare(&causal);
        single_prepare(&tree);
        for (uint32_t t = 0; t < causal.row.q_len; t++)
            for (int64_t c = 0; c < causal.row.local_len; c++)
                assert_int_equal(row_sees(&causal.row, mlak_visible(&causal.row, t), 0, c),
                                 row_sees(&tree.row, mlak_visible(&tree.row, t), tree.row.tree_mask[t], c));
    }
}

static void bits_that_name_no_key_are_dropped(void **state)
{
    (void)state;
    struct single s;
    struct maker maker = maker_seeded(14);
    static const struct { int32_t k; uint32_t q; uint64_t kept; } cases[] = {
        {100, 64, UINT64_MAX}, {64, 64, UINT64_MAX}, {63, 64, UINT64_MAX - 1}, {1, 64, UINT64_C(1) << 63}, {0, 64, 0},
        {100, 5, 31},          {5, 5, 31},           {3, 5, 28},               {0, 5, 0},                  {100, 1, 1},
    };
    for (unsigned i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        draw_single(&maker, &s);
        s.batch.mask = MLAK_MASK_TREE;
        s.batch.q_rows = cases[i].q;
        s.batch.max_pages = 100;
        s.seqlen = cases[i].k;
        memset(s.tree, 0xff, sizeof s.tree);
        single_prepare(&s);
        for (uint32_t t = 0; t < MLAK_MAX_Q; t++)
            assert_true(s.row.tree_mask[t] == (t < cases[i].q ? cases[i].kept : 0));
    }
}

static void rows_point_at_their_requests(void **state)
{
    (void)state;
    struct maker maker = maker_seeded(15);
    for (unsigned i = 0; i < 200; i++) {
        struct mlak_batch shape = maker_describe(&maker);
        struct made *made = made_new(&maker, &shape, NULL, NULL);
        const struct mlak_batch *b = &made->batch;
        struct mlak_row rows[8];
        struct mlak_fault fault;
        int32_t cu_q[9];
        assert_int_equal(mlak_prepare(b, cu_q, 0, b->batch, rows, &fault), MLAK_OK);
        for (uint32_t r = 0; r < b->batch; r++) {
            size_t first = (size_t)made_q_start(made, r) * b->heads;
            assert_ptr_equal(rows[r].q, made->tensor[MLAK_T_Q].data + first * MLAK_D * mlak_dtype_bytes(b->q_dtype));
            assert_ptr_equal(rows[r].out, made->tensor[MLAK_T_OUT].data + first * MLAK_V * 2);
            assert_ptr_equal(rows[r].lse, b->has_lse ? b->lse + first : NULL);
            assert_ptr_equal(rows[r].kv, b->kv);
            assert_ptr_equal(rows[r].block_table, made_table(made, r));
            assert_ptr_equal(rows[r].sink, b->dcp_rank == 0 ? b->sink : NULL);
            assert_int_equal(rows[r].q_len, made_q_len(made, r));
            assert_int_equal(rows[r].global_len, made_seqlens(made)[r]);
            assert_int_equal(rows[r].heads, b->heads);
            assert_int_equal(rows[r].pages, b->pages);
            assert_int_equal(rows[r].page_size, b->page_size);
            assert_int_equal(rows[r].max_pages, b->max_pages);
            assert_true(rows[r].page_stride == b->page_stride && rows[r].row_stride == b->row_stride);
            assert_int_equal(rows[r].request, r);
            assert_int_equal(rows[r].mask, b->mask);
            assert_int_equal(rows[r].lse_base, b->lse_base);
            assert_int_equal(rows[r].q_dtype, b->q_dtype);
            assert_int_equal(rows[r].kv_format, b->kv_format);
            assert_int_equal(rows[r].out_dtype, b->out_dtype);
            assert_int_equal(rows[r].window, b->window);
            assert_int_equal(rows[r].deterministic, b->deterministic);
            assert_int_equal(rows[r].code, MLAK_ROW_OK);
        }
        made_free(made);
    }
}

static void scales_and_their_defaults(void **state)
{
    (void)state;
    struct single s = {.batch = {.page_size = 1}};
    mlak_batch_defaults(&s.batch);
    float in_memory = 8;
    s.batch.softmax_scale = 0.5;
    single_prepare(&s);
    assert_true(s.row.score_scale == 0.5f && s.row.v_scale == 1);
    s.batch.k_scale = (struct mlak_scale){.value = 4, .present = true};
    single_prepare(&s);
    assert_true(s.row.score_scale == 2 && s.row.v_scale == 4);
    s.batch.q_scale = (struct mlak_scale){.value = 99, .tensor = &in_memory, .present = true, .has_tensor = true};
    s.batch.v_scale = (struct mlak_scale){.value = 3, .present = true};
    single_prepare(&s);
    assert_true(s.row.score_scale == 16 && s.row.v_scale == 3);
    s.batch.v_scale.present = false;
    s.batch.k_scale = (struct mlak_scale){.value = 99, .tensor = &in_memory, .present = true, .has_tensor = true};
    single_prepare(&s);
    assert_true(s.row.score_scale == 32 && s.row.v_scale == 8);
    in_memory = 2;
    single_prepare(&s);
    assert_true(s.row.score_scale == 2 && s.row.v_scale == 2);
}

static void assert_row_fault(const struct single *s, int code, const char *field, const char *says)
{
    struct mlak_fault fault;
    assert_int_equal(s->row.code, code);
    mlak_row_fault(&s->row, &fault);
    assert_int_equal(fault.code, MLAK_REQUESTS);
    assert_string_equal(fault.field, field);
    if (!strstr(fault.message, says))
        fail_msg("\"%s\" does not say \"%s\"", fault.message, says);
}

static void lengths_out_of_range(void **state)
{
    (void)state;
    struct single s = {.batch = {.page_size = 16}};
    mlak_batch_defaults(&s.batch);
    s.batch.max_pages = 3;
    static const int32_t negative[] = {-1, -7, INT32_MIN};
    for (unsigned i = 0; i < 3; i++) {
        s.seqlen = negative[i];
        single_prepare(&s);
        assert_row_fault(&s, MLAK_ROW_SEQLEN_NEGATIVE, "seqlens[0]", "is negative");
    }
    s.seqlen = 48;
    single_prepare(&s);
    assert_int_equal(s.row.code, MLAK_ROW_OK);
    s.seqlen = 49;
    single_prepare(&s);
    assert_row_fault(&s, MLAK_ROW_SEQLEN_TOO_LONG, "seqlens[0]", "49 keys do not fit the 48");
    s.seqlen = INT32_MAX;
    s.batch.window = 1; /* no excuse: the length itself is beyond the table */
    single_prepare(&s);
    assert_row_fault(&s, MLAK_ROW_SEQLEN_TOO_LONG, "seqlens[0]", "2147483647 keys");

    s.batch.dcp_world = 2; /* 97 keys: rank 0 has 49, rank 1 has 48 */
    s.seqlen = 97;
    single_prepare(&s);
    assert_row_fault(&s, MLAK_ROW_SEQLEN_TOO_LONG, "seqlens[0]", "49 keys on this rank");
    s.batch.dcp_rank = 1;
    single_prepare(&s);
    assert_int_equal(s.row.code, MLAK_ROW_OK);

    s.batch.max_pages = 0;
    s.seqlen = 1; /* rank 0's */
    single_prepare(&s);
    assert_int_equal(s.row.code, MLAK_ROW_OK);
    s.seqlen = 2;
    single_prepare(&s);
    assert_row_fault(&s, MLAK_ROW_SEQLEN_TOO_LONG, "seqlens[0]", "1 keys on this rank do not fit the 0");
}

static void the_first_page_fault_counts(void **state)
{
    (void)state;
    struct single s = {.batch = {.page_size = 16}};
    mlak_batch_defaults(&s.batch);
    s.batch.pages = 5;
    single_prepare(&s);
    struct mlak_fault fault;
    mlak_row_fault(&s.row, &fault);
    assert_int_equal(fault.code, MLAK_OK);
    s.row.request = 3;
    mlak_row_page_fault(&s.row, 7, -9);
    mlak_row_page_fault(&s.row, 2, 100);
    assert_row_fault(&s, MLAK_ROW_PAGE_RANGE, "block_table[3][7]", "page -9 is needed but the pool has 5 pages");
}

static void cu_q_is_judged_whole(void **state)
{
    (void)state;
    enum { B = 4 };
    static const struct { int32_t cu_q[B + 1]; const char *field; } cases[] = {
        {{0, 0, 0, 0, 0}, NULL},          {{0, 64, 100, 100, 100}, NULL}, {{0, 1, 2, 3, 99}, "cu_q[4]"},
        {{1, 1, 2, 3, 4}, "cu_q[0]"},     {{-1, 0, 1, 2, 3}, "cu_q[0]"},  {{0, 2, 1, 3, 4}, "cu_q[2]"},
        {{0, 65, 65, 65, 65}, "cu_q[1]"}, {{0, 1, 2, 3, -1}, "cu_q[4]"},  {{0, 60, 120, 120, 120}, "cu_q[2]"},
        {{0, 0, 0, 0, INT32_MAX}, "cu_q[4]"}, {{0, INT32_MIN, 0, 0, 0}, "cu_q[1]"}, {{0, 64, 0, 0, 0}, "cu_q[2]"},
    };
    int32_t seqlens[B] = {0};
    struct mlak_batch b = {.page_size = 1, .batch = B, .heads = 1, .q_rows = 100, .has_cu_q = true, .seqlens = seqlens};
    mlak_batch_defaults(&b);
    for (unsigned i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct mlak_row rows[B];
        struct mlak_fault fault = {0};
        int32_t copy[B + 1];
        b.cu_q = cases[i].cu_q;
        enum mlak_code code = mlak_prepare(&b, copy, 0, B, rows, &fault);
        assert_int_equal(code, cases[i].field ? MLAK_BATCH : MLAK_OK);
        if (cases[i].field)
            assert_string_equal(fault.field, cases[i].field);
        for (uint32_t r = 0; !code && r < B; r++)
            assert_int_equal(rows[r].q_len, cases[i].cu_q[r + 1] - cases[i].cu_q[r]);
    }
}

/* A slice after the first takes cu_q from the copy: the client's may have changed meanwhile. */
static void slices_share_one_copy_of_cu_q(void **state)
{
    (void)state;
    enum { B = 65536 };
    int32_t *cu_q = calloc(B + 1, sizeof *cu_q), *copy = calloc(B + 1, sizeof *copy),
            *seqlens = calloc(B, sizeof *seqlens);
    struct mlak_row *rows = calloc(1024, sizeof *rows);
    struct mlak_batch b = {.page_size = 1, .batch = B, .heads = 1, .has_cu_q = true, .cu_q = cu_q, .seqlens = seqlens};
    struct mlak_fault fault;
    uint64_t tokens = 0;
    mlak_batch_defaults(&b);
    for (int32_t i = 0; i < B; i++)
        cu_q[i + 1] = cu_q[i] + i % 65;
    b.q_rows = (uint64_t)cu_q[B];
    for (uint32_t first = 0; first < B; first += 1024) {
        assert_int_equal(mlak_prepare(&b, copy, first, 1024, rows, &fault), MLAK_OK);
        memset(cu_q, 0xee, (B + 1) * sizeof *cu_q);
        for (uint32_t i = 0; i < 1024; i++) {
            assert_int_equal(rows[i].request, first + i);
            assert_int_equal(rows[i].q_len, (first + i) % 65);
            assert_true((uint64_t)(uintptr_t)rows[i].q == tokens * MLAK_D * 2);
            tokens += rows[i].q_len;
        }
    }
    assert_true(tokens == b.q_rows);
    free(cu_q);
    free(copy);
    free(seqlens);
    free(rows);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(visible_keys),
        cmocka_unit_test(visible_keys_of_huge_requests),
        cmocka_unit_test(causal_is_a_lower_triangular_tree),
        cmocka_unit_test(bits_that_name_no_key_are_dropped),
        cmocka_unit_test(rows_point_at_their_requests),
        cmocka_unit_test(scales_and_their_defaults),
        cmocka_unit_test(lengths_out_of_range),
        cmocka_unit_test(the_first_page_fault_counts),
        cmocka_unit_test(cu_q_is_judged_whole),
        cmocka_unit_test(slices_share_one_copy_of_cu_q),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
