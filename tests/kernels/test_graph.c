/* test_graph.c - launches captured once, replayed with other lengths, tables, cu_q, masks and contents:
 * `test_graph backend [variant]`, of a backend that captures. When it does, nothing of a batch is there but its
 * descriptor. */
#include "test_device.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { B = 4, PAGES = 16, KEYS = PAGES * 16, REPLAYS = 9 };

/* heads * q_len: up to 16, and above, where a device may use other kernels; of deterministic ones the heads alone. */
static const struct kind {
    const char *name;
    uint32_t types;
    enum mlak_mask mask;
    bool ragged, deterministic, extras; /* extras: window, sink, ranks */
    uint32_t heads, q_len;
} kinds[] = {
    {"bf16, causal", 0, MLAK_MASK_CAUSAL, false, false, false, 4, 4},
    {"bf16, causal, ragged, many rows", 0, MLAK_MASK_CAUSAL, true, false, false, 6, 4},
    {"bf16, tree, many rows", 0, MLAK_MASK_TREE, false, false, false, 7, 5},
    {"bf16, causal, deterministic, many rows", 0, MLAK_MASK_CAUSAL, true, true, false, 17, 2},
    {"fp16, window, sink, ranks", 1, MLAK_MASK_NONE, true, false, true, 3, 3},
    {"fp8, causal, ragged", 2, MLAK_MASK_CAUSAL, true, false, false, 3, 5},
    {"fp8, tree, ragged, many rows", 2, MLAK_MASK_TREE, true, false, false, 6, 4},
    {"fp8, tree, deterministic", 3, MLAK_MASK_TREE, true, true, false, 5, 3},
    {"bf16 over fp8, causal, window, sink, ranks", 4, MLAK_MASK_CAUSAL, false, false, true, 4, 4},
    {"656, causal, ragged, many rows", 5, MLAK_MASK_CAUSAL, true, false, false, 5, 4},
    {"656, tree, ragged", 5, MLAK_MASK_TREE, true, false, false, 2, 4},
    {"656, causal, deterministic", 5, MLAK_MASK_CAUSAL, false, true, false, 6, 4},
};
enum { KINDS = sizeof kinds / sizeof kinds[0] };

/* The lengths of the first replays; those of the others are drawn. */
static const int32_t lengths[][B] = {
    {0, 0, 0, 0}, {1, 1, 1, 1}, {KEYS, KEYS, KEYS, KEYS}, {1, 2, 3, 2}, {KEYS, 0, 1, 63}, {64, 65, 128, 127},
};

/* Contents of a kind's descriptor, all of it drawn anew; lengths where they are not given. */
static struct made *contents(const struct kind *kind, uint64_t seed, const int32_t *seqlens, const int32_t *q_lens)
{
    struct maker maker = maker_seeded(seed);
    struct mlak_batch shape = maker_plain(B, kind->heads, kind->q_len);
    maker_set_types(&shape, kind->types);
    maker.max_keys = KEYS;
    shape.max_pages = PAGES;
    shape.pages = B * PAGES + 3;
    shape.mask = kind->mask;
    shape.has_tree_mask = kind->mask == MLAK_MASK_TREE;
    shape.has_cu_q = kind->ragged;
    shape.deterministic = kind->deterministic;
    if (shape.q_dtype == MLAK_E4M3) /* scales: one by value, the others other ones in each replay */
        shape.q_scale = (struct mlak_scale){.present = true, .value = 0.75f};
    if (shape.kv_format == MLAK_KV_E4M3) {
        shape.k_scale = shape.v_scale = (struct mlak_scale){.present = true, .has_tensor = true};
        shape.k_scale.value = 0.5f + (float)maker_below(&maker, 100) / 100;
        shape.v_scale.value = 0.5f + (float)maker_below(&maker, 100) / 100;
    }
    if (kind->extras) {
        shape.window = 70;
        shape.has_sink = true;
        shape.dcp_world = 2;
        shape.dcp_interleave = 3;
    }
    return made_new(&maker, &shape, seqlens, q_lens);
}

/* The rows tell of this replay, not of one before it. */
static void assert_rows_are_of(struct made *made, const struct mlak_row *rows)
{
    for (uint32_t b = 0; b < B; b++) {
        int64_t local = 0;
        for (int64_t g = 0; g < made_seqlens(made)[b]; g++)
            local += contract_holds(&made->batch, g);
        assert_int_equal(rows[b].request, b);
        assert_int_equal(rows[b].local_len, local);
    }
}

static void replay_right(struct test_graph *graph, struct made *made, const char *what)
{
    struct mlak_row rows[B];
    struct mlak_fault fault;
    if (test_graph_replay(graph, &made, rows, &fault) != MLAK_OK)
        fail_msg("%s: %s: %s", what, fault.field, fault.message);
    assert_rows_are_of(made, rows);
    test_device_judge(made, rows, 0, what);
}

/* The launch, not captured, has the same bits. */
static void assert_plain_is_same(struct made *made)
{
    struct mlak_row rows[B];
    uint8_t *bits = made_outputs(made);
    test_device_run(made, rows);
    assert_true(made_outputs_are(made, bits));
    free(bits);
}

static void every_replay_reads_anew(void **state)
{
    (void)state;
    for (uint32_t k = 0; k < KINDS; k++) {
        struct made *first = contents(&kinds[k], 7000 + k, (int32_t[B]){5, 70, 128, 0}, NULL);
        struct test_graph *graph = test_graph_new(&first, 1);
        made_free(first);
        for (uint32_t i = 0; i < REPLAYS; i++) {
            const bool given = i < sizeof lengths / sizeof lengths[0];
            struct made *made = contents(&kinds[k], 100 * k + i, given ? lengths[i] : NULL, NULL);
            char what[128];
            snprintf(what, sizeof what, "%s, replay %u", kinds[k].name, i);
            replay_right(graph, made, what);
            if (i % 8 == 7) /* launches of other work come between */
                assert_plain_is_same(made);
            made_free(made);
        }
        test_graph_free(graph);
    }
}

/* The same contents again: nothing is left of a replay that the next could see. */
static void the_same_replay_has_the_same_bits(void **state)
{
    (void)state;
    struct made *made = contents(&kinds[1], 3, NULL, NULL);
    struct test_graph *graph = test_graph_new(&made, 1);
    const size_t bytes = made->tensor[MLAK_T_OUT].bytes;
    uint8_t *bits = malloc(bytes);
    replay_right(graph, made, "the first");
    memcpy(bits, made->tensor[MLAK_T_OUT].data, bytes);
    for (uint32_t i = 0; i < 20; i++) {
        replay_right(graph, made, "again");
        assert_memory_equal(made->tensor[MLAK_T_OUT].data, bits, bytes);
    }
    free(bits);
    test_graph_free(graph);
    made_free(made);
}

static void spoil_length(struct made *made) { made_seqlens(made)[1] = -1; }
static void spoil_length_too(struct made *made) { made_seqlens(made)[1] = KEYS + 1; }
static void spoil_page(struct made *made) { made_table(made, 1)[2] = B * PAGES + 3; }
static void spoil_cu_q(struct made *made) { ((int32_t *)(void *)made->tensor[MLAK_T_CU_Q].data)[2] = 1000; }

static void assert_untouched(const struct made *made)
{
    for (size_t i = 0; i < made->tensor[MLAK_T_OUT].bytes; i++)
        assert_int_equal(made->tensor[MLAK_T_OUT].data[i], 0xff);
    for (size_t i = 0; i < made->tensor[MLAK_T_LSE].bytes; i++)
        assert_int_equal(made->tensor[MLAK_T_LSE].data[i], 0xff);
}

/* A request or a batch that is wrong in one replay fails as it does without a graph, in that replay alone. */
static void what_is_wrong_is_so_in_one_replay(void **state)
{
    (void)state;
    static const struct {
        void (*spoil)(struct made *made);
        enum mlak_row_code code;
        const char *field;
    } wrongs[] = {
        {spoil_length, MLAK_ROW_SEQLEN_NEGATIVE, "seqlens[1]"},
        {spoil_length_too, MLAK_ROW_SEQLEN_TOO_LONG, "seqlens[1]"},
        {spoil_page, MLAK_ROW_PAGE_RANGE, "block_table[1][2]"},
        {spoil_cu_q, MLAK_ROW_OK, "cu_q[2]"},
    };
    const struct kind *ragged[] = {&kinds[1], &kinds[6], &kinds[3]};
    for (uint32_t k = 0; k < 3; k++) {
        struct made *made = contents(ragged[k], 50, NULL, NULL);
        struct test_graph *graph = test_graph_new(&made, 1);
        made_free(made);
        for (uint32_t i = 0; i < sizeof wrongs / sizeof wrongs[0]; i++) {
            struct mlak_row rows[B];
            struct mlak_fault fault;
            made = contents(ragged[k], 51 + i, (int32_t[B]){33, 100, KEYS, 60}, (int32_t[B]){1, 2, 0, 2});
            wrongs[i].spoil(made);
            enum mlak_code code = test_graph_replay(graph, &made, rows, &fault);
            if (wrongs[i].code == MLAK_ROW_OK) {
                assert_int_equal(code, MLAK_BATCH);
                assert_untouched(made);
            } else {
                assert_int_equal(code, MLAK_OK);
                assert_int_equal(rows[1].code, wrongs[i].code);
                mlak_row_fault(&rows[1], &fault);
                test_device_judge(made, rows, 1, wrongs[i].field);
            }
            assert_string_equal(fault.field, wrongs[i].field);
            made_free(made);
            made = contents(ragged[k], 61 + i, NULL, NULL);
            replay_right(graph, made, "the replay after one that was wrong");
            made_free(made);
        }
        test_graph_free(graph);
    }
}

/* A graph of several batches runs them all, on one scratch; one that is refused keeps none of the others. */
static void a_graph_holds_several_batches(void **state)
{
    (void)state;
    enum { COUNT = 5 };
    const struct kind *of[COUNT] = {&kinds[1], &kinds[9], &kinds[3], &kinds[6], &kinds[0]};
    struct made *made[COUNT];
    struct mlak_row rows[B];
    struct mlak_fault fault;
    for (uint32_t i = 0; i < COUNT; i++)
        made[i] = contents(of[i], 80 + i, NULL, NULL);
    struct test_graph *graph = test_graph_new(made, COUNT);
    for (uint32_t replay = 0; replay < 6; replay++) {
        for (uint32_t i = 0; i < COUNT; i++) {
            made_free(made[i]);
            made[i] = contents(of[i], 100 * replay + i, replay == 0 ? lengths[i] : NULL, NULL);
        }
        const bool refused = replay == 3;
        if (refused)
            spoil_cu_q(made[1]);
        if (test_graph_replay(graph, made, rows, &fault) != MLAK_OK)
            fail_msg("%s: %s", fault.field, fault.message);
        assert_rows_are_of(made[COUNT - 1], rows);
        for (uint32_t i = 0; i < COUNT; i++) {
            if (refused && i == 1)
                assert_untouched(made[i]);
            else
                test_device_judge(made[i], i == COUNT - 1 ? rows : NULL, 0, of[i]->name);
        }
    }
    test_graph_free(graph);
    for (uint32_t i = 0; i < COUNT; i++)
        made_free(made[i]);
}

int main(int argc, char **argv)
{
    test_device_open(argc, argv);
    if (!test_device_captures()) {
        fprintf(stderr, "%s: this device has no graphs\n", argv[0]);
        test_device_close();
        return 77;
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_replay_reads_anew),
        cmocka_unit_test(the_same_replay_has_the_same_bits),
        cmocka_unit_test(what_is_wrong_is_so_in_one_replay),
        cmocka_unit_test(a_graph_holds_several_batches),
    };
    int failures = cmocka_run_group_tests(tests, NULL, NULL);
    test_device_close();
    return failures != 0;
}
