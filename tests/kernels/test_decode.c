/* test_decode.c - random batches over the whole contract against the oracle: `test_decode backend [variant]`. */
#include "test_device.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static void describe(const struct mlak_batch *b, uint64_t seed, char text[256])
{
    snprintf(text, 256,
             "seed %llu (q %d kv %d out %d mask %d B %u H %u q_rows %llu%s P %u dcp %u/%u/%u window %u sink %d)",
             (unsigned long long)seed, b->q_dtype, b->kv_format, b->out_dtype, b->mask, b->batch, b->heads,
             (unsigned long long)b->q_rows, b->has_cu_q ? " ragged" : "", b->page_size, b->dcp_rank, b->dcp_world,
             b->dcp_interleave, b->window, b->has_sink);
}

static void random_batches(struct maker limits, uint32_t types, uint64_t seed, uint32_t count)
{
    for (uint64_t i = seed; i < seed + count; i++) {
        struct maker maker = limits;
        char text[256];
        maker.state = i;
        struct mlak_batch shape = maker_describe(&maker);
        maker_set_types(&shape, types);
        if (shape.q_dtype != MLAK_E4M3)
            shape.q_scale.present = false;
        if (shape.kv_format != MLAK_KV_E4M3)
            shape.k_scale.present = shape.v_scale.present = false;
        struct made *made = made_new(&maker, &shape, NULL, NULL);
        describe(&made->batch, i, text);
        test_device_assert_right(made, 0, text);
        made_free(made);
    }
}

/* Element types in turn, so that each has its share of every other field. */
static void every_type_and_feature(void **state)
{
    (void)state;
    for (uint32_t types = 0; types < MAKER_TYPES; types++)
        random_batches(maker_seeded(0), types, 1000 * (types + 1), 20);
}

/* Tiles of heads and of folded rows end at odd places. */
static void many_heads(void **state)
{
    (void)state;
    struct maker maker = maker_seeded(0);
    maker.max_heads = MLAK_MAX_HEADS;
    maker.max_batch = 2;
    maker.max_q = 3;
    maker.max_keys = 70;
    for (uint32_t types = 0; types < MAKER_TYPES; types++)
        random_batches(maker, types, 50 + 1000 * types, 3);
}

static void many_tokens(void **state)
{
    (void)state;
    struct maker maker = maker_seeded(0);
    maker.max_heads = 3;
    maker.max_batch = 3;
    maker.max_q = MLAK_MAX_Q;
    for (uint32_t types = 0; types < MAKER_TYPES; types++)
        random_batches(maker, types, 100 + 1000 * types, 4);
}

static void many_keys(void **state)
{
    (void)state;
    struct maker maker = maker_seeded(0);
    maker.max_heads = 5;
    maker.max_batch = 3;
    maker.max_q = 4;
    maker.max_keys = 1500;
    for (uint32_t types = 0; types < MAKER_TYPES; types++)
        random_batches(maker, types, 200 + 1000 * types, 3);
}

/* Requests of four row blocks and many tiles, even and odd numbers of them: blocks that share what they fetch, where
 * there are any, are handed from one request to the next in every phase. */
static void many_rows_over_many_tiles(void **state)
{
    (void)state;
    static const int32_t lengths[] = {64 * 9 + 5, 64 * 6, 64 * 4 + 63, 64 * 11};
    enum { COUNT = sizeof lengths / sizeof lengths[0] };
    for (uint32_t page_size = 16; page_size <= 64; page_size *= 4) {
        struct maker maker = maker_seeded(400 + page_size);
        struct mlak_batch shape = {.page_size = page_size};
        mlak_batch_defaults(&shape);
        shape.batch = COUNT;
        shape.heads = MLAK_MAX_HEADS;
        shape.q_rows = 2 * COUNT;
        shape.max_pages = 64 * 11 / page_size;
        shape.pages = COUNT * shape.max_pages;
        shape.softmax_scale = 1 / 24.0;
        shape.has_lse = true;
        struct made *made = made_new(&maker, &shape, lengths, NULL);
        test_device_assert_right(made, 0, "many rows over many tiles");
        made_free(made);
    }
}

/* Every K around tile edges, with the causal mask and without, because a lost mask hides at long K. */
static void short_contexts(void **state)
{
    (void)state;
    static const int32_t lengths[] = {0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129};
    enum { COUNT = sizeof lengths / sizeof lengths[0] };
    for (uint32_t mask = 0; mask < MLAK_MASK_COUNT; mask++) {
        struct maker maker = maker_seeded(300 + mask);
        struct mlak_batch shape = {.page_size = 16};
        mlak_batch_defaults(&shape);
        shape.batch = COUNT;
        shape.heads = 2;
        shape.q_rows = 4 * COUNT;
        shape.max_pages = 9;
        shape.pages = COUNT * 9;
        shape.softmax_scale = 1 / 24.0;
        shape.mask = (enum mlak_mask)mask;
        shape.has_tree_mask = mask == MLAK_MASK_TREE;
        shape.has_lse = true;
        struct made *made = made_new(&maker, &shape, lengths, NULL);
        test_device_assert_right(made, 0, "short contexts");
        made_free(made);
    }
}

int main(int argc, char **argv)
{
    test_device_open(argc, argv);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_type_and_feature), cmocka_unit_test(many_heads),     cmocka_unit_test(many_tokens),
        cmocka_unit_test(many_keys),              cmocka_unit_test(many_rows_over_many_tiles),
        cmocka_unit_test(short_contexts),
    };
    int failures = cmocka_run_group_tests(tests, NULL, NULL);
    test_device_close();
    return failures != 0;
}
