/* test_shares.c - the prepare kernel alone, in the emulator: how tiles are shared out among thread blocks. Shares end
 * where requests do if that makes them hardly longer; else all are equal. */
#include "emulator.h"
#include "mlak_cuda.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { HEADS = 16, Q_LEN = MLAK_CUDA_M / HEADS, MOST_REQUESTS = 64, MOST_BLOCKS = 132, MOST_TILES = 128 };

struct scene {
    struct mlak_cuda_job job;
    struct mlak_cuda_schedule schedule;
    struct mlak_cuda_result result;
    struct mlak_row rows[MOST_REQUESTS];
    struct mlak_cuda_request requests[MOST_REQUESTS];
    struct mlak_cuda_start starts[MOST_BLOCKS];
    struct mlak_cuda_merge merges[MOST_BLOCKS + MOST_REQUESTS];
    struct mlak_cuda_row_result row_results[MOST_REQUESTS];
    int32_t lengths[MOST_REQUESTS];
};

/* So many requests, each of so many row blocks, of these tiles by turns. */
static struct scene *share_out(uint32_t grid, uint32_t count, uint32_t blocks, const uint32_t *tiles, uint32_t turns)
{
    struct scene *scene = calloc(1, sizeof *scene);
    assert_non_null(scene);
    for (uint32_t i = 0; i < count; i++)
        scene->lengths[i] = (int32_t)(tiles[i % turns] * MLAK_CUDA_TILE);
    struct mlak_batch batch = {.batch = count,
                               .heads = HEADS,
                               .q_rows = (uint64_t)count * Q_LEN * blocks,
                               .q_dtype = MLAK_BF16,
                               .kv_format = MLAK_KV_BF16,
                               .page_size = MLAK_CUDA_TILE,
                               .max_pages = MOST_TILES};
    mlak_batch_defaults(&batch);
    batch.seqlens = scene->lengths;
    scene->job = (struct mlak_cuda_job){.source = {.batch = batch, .count = count},
                                        .n_sources = 1,
                                        .count = count,
                                        .rows_per_item = MLAK_CUDA_M,
                                        .abreast = 1,
                                        .grid = grid,
                                        .ticket = 1,
                                        .rows = scene->rows,
                                        .requests = scene->requests,
                                        .starts = scene->starts,
                                        .merges = scene->merges,
                                        .row_results = scene->row_results,
                                        .schedule = &scene->schedule,
                                        .result = &scene->result};
    assert_true(mlak_emulate("mlak_cuda_prepare", 1, mlak_cuda_prepare_threads(&scene->job), MLAK_CUDA_PREPARE_SHARED,
                             &scene->job));
    return scene;
}

/* Blocks begin with items that are all there is, each tile once; none goes on to another. */
static void judge_lone_items(const struct scene *scene, uint32_t share)
{
    uint32_t seen[MOST_REQUESTS][2] = {{0}};
    for (uint32_t i = 0; i < scene->job.grid; i++) {
        const struct mlak_cuda_start *start = &scene->starts[i];
        if (!start->there)
            continue;
        uint32_t *tile = &seen[start->item.request][start->item.block];
        assert_int_equal(start->item.tile, *tile);
        assert_in_range(start->item.end_tile, start->item.tile + 1, start->item.tile + share);
        assert_true(start->next.at >= start->next.end);
        *tile = start->item.end_tile;
    }
    for (uint32_t i = 0; i < scene->job.count; i++)
        for (uint32_t block = 0; block < scene->requests[i].blocks; block++)
            assert_int_equal(seen[i][block] * MLAK_CUDA_TILE, scene->lengths[i]);
}

static void shares_end_in_each_request(void **state)
{
    const struct { uint32_t grid, count, blocks, tiles, share, parts; } cases[] = {
        {132, 10, 1, 32, 3, 11}, {132, 5, 2, 32, 3, 11}, {132, 64, 1, 128, 64, 2},
        {7, 2, 1, 9, 3, 3},      {132, 1, 1, 8, 1, 8},   {132, 44, 1, 6, 2, 3},
    };
    (void)state;
    for (unsigned i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct scene *scene = share_out(cases[i].grid, cases[i].count, cases[i].blocks, &cases[i].tiles, 1);
        assert_int_equal(scene->starts[0].walk.share, cases[i].share);
        judge_lone_items(scene, cases[i].share);
        assert_int_equal(scene->schedule.merges, cases[i].count * cases[i].blocks);
        for (uint32_t m = 0; m < scene->schedule.merges; m++)
            assert_int_equal(scene->merges[m].parts, cases[i].parts);
        free(scene);
    }
}

static void requests_that_fill_a_share_have_no_parts(void **state)
{
    const struct { uint32_t grid, count, tiles, share; } cases[] = {{7, 8, 3, 6}, {5, 5, 40, 40}, {33, 64, 16, 32}};
    (void)state;
    for (unsigned i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct scene *scene = share_out(cases[i].grid, cases[i].count, 1, &cases[i].tiles, 1);
        assert_int_equal(scene->starts[0].walk.share, cases[i].share);
        assert_int_equal(scene->schedule.merges, 0);
        free(scene);
    }
}

/* Where it would take much longer, or lengths differ: as many tiles for each. */
static void else_shares_are_equal(void **state)
{
    const struct { uint32_t grid, count, tiles[2], share; } cases[] = {{12, 7, {10, 10}, 6}, {132, 10, {40, 8}, 2}};
    (void)state;
    for (unsigned i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct scene *scene = share_out(cases[i].grid, cases[i].count, 1, cases[i].tiles, 2);
        assert_int_equal(scene->starts[0].walk.share, cases[i].share);
        for (uint32_t request = 0; request < cases[i].count; request++)
            assert_int_equal(scene->requests[request].room, cases[i].tiles[request % 2]);
        free(scene);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(shares_end_in_each_request),
                                       cmocka_unit_test(requests_that_fill_a_share_have_no_parts),
                                       cmocka_unit_test(else_shares_are_equal)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
