/* test_merge.c - batches that share a launch: each is as it would be alone, whatever becomes of the others.
 * `test_merge backend [variant]`. */
#include "test_device.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { MOST = 80 };

struct merge {
    struct made *made[MOST];
    struct mlak_row *rows[MOST];
    enum mlak_code codes[MOST];
    uint32_t count;
};

static void add(struct merge *merge, struct maker *maker, const struct mlak_batch *shape, const int32_t *seqlens)
{
    merge->made[merge->count] = made_new(maker, shape, seqlens, NULL);
    merge->rows[merge->count++] = calloc(shape->batch, sizeof(struct mlak_row));
}

static void launch(struct merge *merge)
{
    test_device_decode_together(merge->made, merge->count, merge->rows, merge->codes);
}

static void assert_right(struct merge *merge, uint32_t i, uint32_t failed)
{
    char what[32];
    snprintf(what, sizeof what, "part %u", i);
    assert_int_equal(merge->codes[i], MLAK_OK);
    test_device_judge(merge->made[i], merge->rows[i], failed, what);
}

static void end(struct merge *merge)
{
    for (uint32_t i = 0; i < merge->count; i++) {
        made_free(merge->made[i]);
        free(merge->rows[i]);
    }
}

/* Of whatever shape, but types and determinism, by which kernels are chosen. */
static struct mlak_batch any_shape(struct maker *maker, uint32_t types, bool deterministic)
{
    struct mlak_batch shape = maker_describe(maker), wanted = shape;
    maker_set_types(&wanted, types);
    while (shape.q_dtype != wanted.q_dtype || shape.kv_format != wanted.kv_format ||
           shape.out_dtype != wanted.out_dtype)
        shape = maker_describe(maker);
    shape.deterministic = deterministic;
    return shape;
}

static void batches_of_any_shape_share_a_launch(void **state)
{
    (void)state;
    for (uint32_t types = 0; types < MAKER_TYPES; types++) {
        struct maker maker = maker_seeded(51 + types);
        struct merge merge = {0};
        for (uint32_t i = 0; i < 6; i++) {
            struct mlak_batch shape = any_shape(&maker, types, types % 2);
            add(&merge, &maker, &shape, NULL);
        }
        launch(&merge);
        for (uint32_t i = 0; i < merge.count; i++)
            assert_right(&merge, i, 0);
        end(&merge);
    }
}

static void kinds_that_no_kernel_takes_together_follow_one_another(void **state)
{
    (void)state;
    struct maker maker = maker_seeded(61);
    struct merge merge = {0};
    for (uint32_t i = 0; i < 2 * MAKER_TYPES; i++) {
        struct mlak_batch shape = any_shape(&maker, i % MAKER_TYPES, i % 5 == 0);
        add(&merge, &maker, &shape, NULL);
    }
    launch(&merge);
    for (uint32_t i = 0; i < merge.count; i++)
        assert_right(&merge, i, 0);
    end(&merge);
}

/* Keys of the first request need a page out of the pool. */
static void spoil_page(struct made *made)
{
    made_table(made, 0)[0] = (int32_t)made->batch.pages;
}

static void spoil_cu_q(struct made *made)
{
    int32_t *cu_q = (int32_t *)(void *)made->tensor[MLAK_T_CU_Q].data;
    cu_q[made->batch.batch] = INT32_MAX;
}

static void one_batch_that_fails_leaves_the_others_right(void **state)
{
    (void)state;
    struct maker maker = maker_seeded(71);
    enum { WHOLE, RAGGED, BAD_CU_Q, BAD_PAGE, BAD_LENGTH, CANCELLED, LAST, PARTS };
    struct merge merge = {0};
    for (uint32_t i = 0; i < PARTS; i++) {
        struct mlak_batch shape = maker_plain(2 + i % 3, 3 + i * 5, 1 + i % 4);
        const int32_t lengths[4] = {100, 128, 7, 65};
        shape.page_size = 16u << (i + 1) % 3;
        shape.page_stride = shape.page_size * shape.row_stride;
        shape.mask = i % 3 == 1 ? MLAK_MASK_NONE : MLAK_MASK_CAUSAL;
        shape.has_cu_q = i == RAGGED || i == BAD_CU_Q || i == LAST;
        add(&merge, &maker, &shape, lengths);
    }
    spoil_cu_q(merge.made[BAD_CU_Q]);
    spoil_page(merge.made[BAD_PAGE]);
    made_seqlens(merge.made[BAD_LENGTH])[0] = -1;
    for (uint32_t b = 0; b < merge.made[CANCELLED]->batch.batch; b++)
        merge.rows[CANCELLED][b].code = MLAK_ROW_CANCELLED;
    launch(&merge);
    assert_right(&merge, WHOLE, 0);
    assert_right(&merge, RAGGED, 0);
    assert_int_equal(merge.codes[BAD_CU_Q], MLAK_BATCH);
    assert_true(made_intact(merge.made[BAD_CU_Q]));
    for (size_t i = 0; i < merge.made[BAD_CU_Q]->tensor[MLAK_T_OUT].bytes; i++)
        assert_int_equal(merge.made[BAD_CU_Q]->tensor[MLAK_T_OUT].data[i], 0xff);
    assert_int_equal(merge.rows[BAD_PAGE][0].code, MLAK_ROW_PAGE_RANGE);
    assert_right(&merge, BAD_PAGE, 1);
    assert_int_equal(merge.rows[BAD_LENGTH][0].code, MLAK_ROW_SEQLEN_NEGATIVE);
    assert_right(&merge, BAD_LENGTH, 1);
    assert_true(made_intact(merge.made[CANCELLED]));
    assert_right(&merge, LAST, 0);
    end(&merge);
}

static void more_batches_than_a_launch_takes_are_all_right(void **state)
{
    (void)state;
    struct maker maker = maker_seeded(81);
    struct merge merge = {0};
    for (uint32_t i = 0; i < 70; i++) {
        struct mlak_batch shape = maker_plain(1, 2, 1 + i % 2);
        shape.has_cu_q = i % 3 == 0;
        add(&merge, &maker, &shape, (int32_t[]){(int32_t)i});
    }
    launch(&merge);
    for (uint32_t i = 0; i < merge.count; i++)
        assert_right(&merge, i, 0);
    end(&merge);
}

/* Long enough to be split, where anything is, but the widest. */
static void deterministic_bits_are_those_of_a_launch_alone(void **state)
{
    (void)state;
    for (uint32_t types = 0; types < MAKER_TYPES; types++) {
        struct maker maker = maker_seeded(91 + types);
        struct merge merge = {0};
        for (uint32_t i = 0; i < 3; i++) {
            struct mlak_batch shape = maker_plain(2, 4 + 9 * i, 1 + i);
            maker_set_types(&shape, types);
            shape.deterministic = true;
            shape.max_pages = 160;
            shape.pages = 140; /* 132 + 5 */
            add(&merge, &maker, &shape, (int32_t[]){i < 2 ? 2100 + (int32_t)i : 130, 70});
        }
        launch(&merge);
        for (uint32_t i = 0; i < merge.count; i++) {
            struct made *made = merge.made[i];
            uint8_t *together = made_outputs(made);
            test_device_run(made, merge.rows[i]);
            assert_true(made_outputs_are(made, together));
            free(together);
        }
        end(&merge);
    }
}

/* A layer with the lengths, tables and masks of another, and keys of the other sign. */
static void become_layer(struct made *layer, const struct made *first)
{
    static const enum mlak_tensor same[] = {MLAK_T_SEQLENS, MLAK_T_CU_Q, MLAK_T_TREE_MASK, MLAK_T_BLOCK_TABLE,
                                            MLAK_T_KV};
    for (unsigned i = 0; i < sizeof same / sizeof same[0]; i++)
        memcpy(layer->tensor[same[i]].data, first->tensor[same[i]].data, first->tensor[same[i]].bytes);
    bool wide = layer->batch.kv_format == MLAK_KV_BF16 || layer->batch.kv_format == MLAK_KV_FP16;
    for (size_t i = wide; i < layer->tensor[MLAK_T_KV].bytes; i += wide ? 2 : 1)
        layer->tensor[MLAK_T_KV].data[i] ^= 0x80;
}

/* Long enough to be split: a deterministic one is beyond 2,048 keys, another one wherever blocks share it. */
static void layers_share_what_the_first_one_prepared(void **state)
{
    (void)state;
    enum { LAYERS = 3, TYPES = 3 };
    if (!test_device_captures())
        skip(); /* it prepares on the host, or every time */
    for (uint32_t turn = 0; turn < 2 * TYPES; turn++) {
        struct maker maker = maker_seeded(101 + turn);
        bool deterministic = turn >= TYPES;
        struct mlak_batch shape = maker_plain(3, deterministic ? 17 : 20, 4);
        struct made *made[LAYERS];
        struct mlak_row rows[3];
        maker_set_types(&shape, turn % TYPES);
        shape.max_pages = 160;
        shape.pages = 145; /* 132 + 6 + 3 */
        shape.deterministic = deterministic;
        shape.has_cu_q = turn % 2;
        shape.has_sink = true;
        shape.has_tree_mask = turn % 2;
        shape.mask = turn % 2 ? MLAK_MASK_TREE : MLAK_MASK_CAUSAL;
        const int32_t lengths[] = {deterministic ? 2100 : 500, 90, 33}, q_lens[] = {4, 2, 4};
        for (uint32_t i = 0; i < LAYERS; i++) {
            made[i] = made_new(&maker, &shape, lengths, shape.has_cu_q ? q_lens : NULL);
            if (i > 0)
                become_layer(made[i], made[0]);
        }
        test_device_decode_step(made, LAYERS, rows);
        for (uint32_t i = 0; i < LAYERS; i++) {
            uint8_t *step = made_outputs(made[i]);
            test_device_run(made[i], rows);
            assert_true(made_outputs_are(made[i], step));
            free(step);
            made_free(made[i]);
        }
    }
}

int main(int argc, char **argv)
{
    test_device_open(argc, argv);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(batches_of_any_shape_share_a_launch),
        cmocka_unit_test(kinds_that_no_kernel_takes_together_follow_one_another),
        cmocka_unit_test(one_batch_that_fails_leaves_the_others_right),
        cmocka_unit_test(more_batches_than_a_launch_takes_are_all_right),
        cmocka_unit_test(deterministic_bits_are_those_of_a_launch_alone),
        cmocka_unit_test(layers_share_what_the_first_one_prepared),
    };
    int failures = cmocka_run_group_tests(tests, NULL, NULL);
    test_device_close();
    return failures != 0;
}
