/* test_combine.c - the combine kernel alone, in the emulator, over parts that are made up: of none to as many as a
 * large GPU splits a row block into, by few blocks and by many, so that a warp takes a row, a part of one, or some
 * parts. */
#include "emulator.h"
#include "fence.h"
#include "mlak_convert.h"
#include "mlak_cuda.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { HEADS = 8, MOST_MERGES = 24, TICKET = 77 };

/* Rows and parts of a row block. Its request, one each, ends its rows in one of six ways. */
struct made_merge {
    uint32_t rows, parts;
};

struct scene {
    struct mlak_cuda_job job;
    struct mlak_cuda_schedule schedule;
    struct mlak_cuda_result result;
    struct mlak_row rows[MOST_MERGES];
    struct mlak_cuda_merge merges[MOST_MERGES];
    struct fence parts, out[MOST_MERGES], lse[MOST_MERGES];
    float sink[HEADS];
    uint64_t random;
};

static double draw(struct scene *scene) /* 0 to 1 */
{
    scene->random = scene->random * 6364136223846793005u + 1442695040888963407u;
    return (double)(scene->random >> 40) / (1 << 24);
}

static float *part_of(const struct scene *scene, const struct mlak_cuda_merge *merge, uint32_t part)
{
    uint32_t slot = part ? merge->next_slot + (part - 1) * merge->stride : merge->slot;
    return (float *)(void *)scene->parts.data + (size_t)slot * MLAK_CUDA_PART_FLOATS;
}

/* A row of a part: one of seven sees no key there, and then what it holds is NaN, as all of `parts` is at first. */
static void fill(struct scene *scene, float *part, uint32_t r)
{
    bool blind = draw(scene) < 1. / 7;
    part[MLAK_CUDA_M * MLAK_V + r] = blind ? -INFINITY : (float)(draw(scene) * 30 - 15);
    part[MLAK_CUDA_M * (MLAK_V + 1) + r] = blind ? 0 : (float)(1 + draw(scene) * 60);
    for (uint32_t column = 0; column < MLAK_V && !blind; column++)
        part[r * MLAK_V + column] = (float)(draw(scene) * 80 - 40);
}

static void scene_init(struct scene *scene, const struct made_merge *made, uint32_t count)
{
    uint32_t slots = 0;
    *scene = (struct scene){.random = 5 + count};
    for (uint32_t i = 0; i < HEADS; i++)
        scene->sink[i] = i == 3 ? -INFINITY : (float)(draw(scene) * 6 - 3);
    for (uint32_t i = 0; i < count; i++) { /* slots as shares have them, every other one */
        scene->merges[i] = (struct mlak_cuda_merge){i, 0, 0, made[i].rows, made[i].parts, slots + i % 2, slots + 2, 2};
        slots += 2 * made[i].parts;
    }
    fence_init(&scene->parts, (size_t)(slots + 1) * MLAK_CUDA_PART_FLOATS * sizeof(float), 16, true);
    for (uint32_t i = 0; i < count; i++) {
        struct mlak_row *row = &scene->rows[i];
        for (uint32_t part = 0; part < made[i].parts; part++)
            for (uint32_t r = 0; r < made[i].rows; r++)
                fill(scene, part_of(scene, &scene->merges[i], part), r);
        fence_init(&scene->out[i], (size_t)made[i].rows * MLAK_V * 2, 16, true);
        fence_init(&scene->lse[i], made[i].rows * sizeof(float), 4, true);
        row->out = scene->out[i].data;
        row->lse = i % 4 == 3 ? NULL : (float *)(void *)scene->lse[i].data;
        row->sink = i % 3 == 1 ? scene->sink : NULL;
        row->heads = HEADS;
        row->v_scale = i % 2 ? 0.5f : 1;
        row->out_dtype = i % 2 ? MLAK_FP16 : MLAK_BF16;
        row->lse_base = i % 6 < 3 ? MLAK_LSE_2 : MLAK_LSE_E;
        row->code = i == 5 ? MLAK_ROW_PAGE_RANGE : MLAK_ROW_OK;
    }
    scene->schedule.merges = count;
    scene->job = (struct mlak_cuda_job){.n_sources = 1,
                                        .count = count,
                                        .ticket = TICKET,
                                        .rows = scene->rows,
                                        .merges = scene->merges,
                                        .schedule = &scene->schedule,
                                        .parts = (float *)(void *)scene->parts.data,
                                        .result = &scene->result};
}

static void scene_deinit(struct scene *scene)
{
    for (uint32_t i = 0; i < scene->job.count; i++) {
        assert_true(fence_intact(&scene->out[i]) && fence_intact(&scene->lse[i]));
        fence_deinit(&scene->out[i]);
        fence_deinit(&scene->lse[i]);
    }
    fence_deinit(&scene->parts);
}

static void run(struct scene *scene, uint32_t grid)
{
    for (uint32_t i = 0; i < scene->job.count; i++) {
        memset(scene->out[i].data, 0xff, scene->out[i].bytes);
        memset(scene->lse[i].data, 0xff, scene->lse[i].bytes);
    }
    scene->result.done = 0;
    assert_true(mlak_emulate("mlak_cuda_combine", grid, MLAK_CUDA_THREADS, MLAK_CUDA_COMBINE_SHARED, &scene->job));
    assert_int_equal(scene->result.done, scene->job.silent ? 0 : TICKET);
    assert_int_equal(scene->schedule.blocks_done, 0);
}

static double out_at(const struct scene *scene, uint32_t i, size_t at)
{
    uint16_t code;
    memcpy(&code, scene->out[i].data + at * 2, 2);
    return (double)(scene->rows[i].out_dtype == MLAK_FP16 ? mlak_fp16_to_float(code) : mlak_bf16_to_float(code));
}

static void judge_row(const struct scene *scene, uint32_t i, uint32_t r)
{
    const struct mlak_cuda_merge *merge = &scene->merges[i];
    const struct mlak_row *row = &scene->rows[i];
    double top = -INFINITY, sum = 0, o[MLAK_V] = {0};
    double sink = row->sink ? (double)row->sink[r % HEADS] * 1.4426950408889634 : -INFINITY;
    for (uint32_t part = 0; part < merge->parts; part++)
        top = fmax(top, (double)part_of(scene, merge, part)[MLAK_CUDA_M * MLAK_V + r]);
    bool sees = top > -INFINITY;
    top = fmax(top, sink);
    for (uint32_t part = 0; part < merge->parts; part++) {
        const float *from = part_of(scene, merge, part);
        if (isinf(from[MLAK_CUDA_M * MLAK_V + r]))
            continue;
        double by = exp2((double)from[MLAK_CUDA_M * MLAK_V + r] - top);
        sum += by * (double)from[MLAK_CUDA_M * (MLAK_V + 1) + r];
        for (uint32_t column = 0; column < MLAK_V; column++)
            o[column] += by * (double)from[r * MLAK_V + column];
    }
    sum += isinf(sink) ? 0 : exp2(sink - top);
    for (uint32_t column = 0; column < MLAK_V; column++) {
        double right = sees ? o[column] / sum * (double)row->v_scale : 0;
        double is = out_at(scene, i, (size_t)r * MLAK_V + column);
        if (!(fabs(is - right) <= fabs(right) / 250 + 1e-4))
            fail_msg("merge %u of %u parts, row %u, column %u: %g, not %g", i, merge->parts, r, column, is, right);
    }
    if (row->lse == NULL)
        return;
    double lse = isinf(top) ? -INFINITY : (top + log2(sum)) * (row->lse_base == MLAK_LSE_E ? 0.6931471805599453 : 1);
    double is = (double)row->lse[r];
    if (!(isinf(lse) ? is == lse : fabs(is - lse) <= 1e-5))
        fail_msg("merge %u of %u parts, row %u: lse %g, not %g", i, merge->parts, r, is, lse);
}

static bool untouched(const struct fence *fence)
{
    for (size_t i = 0; i < fence->bytes; i++)
        if (fence->data[i] != 0xff)
            return false;
    return true;
}

static void judge(const struct scene *scene)
{
    for (uint32_t i = 0; i < scene->job.count; i++) {
        if (scene->rows[i].code != MLAK_ROW_OK)
            assert_true(untouched(&scene->out[i]) && untouched(&scene->lse[i]));
        for (uint32_t r = 0; r < scene->merges[i].rows && scene->rows[i].code == MLAK_ROW_OK; r++)
            judge_row(scene, i, r);
    }
}

static const struct made_merge alone_few[] = {{16, 8}}, alone_many[] = {{16, 132}}, one_row[] = {{1, 21}},
                               no_keys[] = {{40, 0}},
                               several[] = {{64, 2},  {64, 3},  {5, 41}, {17, 0}, {64, 5},  {3, 4},
                                            {64, 6},  {64, 11}, {1, 20}, {9, 19}, {64, 21}, {33, 10},
                                            {16, 33}, {64, 2},  {2, 64}, {7, 17}, {64, 2},  {64, 4}};
static const struct {
    const struct made_merge *made;
    uint32_t count;
} scenes[] = {{alone_few, 1}, {alone_many, 1}, {one_row, 1}, {no_keys, 1}, {several, sizeof several / sizeof *several}};
static const uint32_t grids[] = {1, 5, 16, 64, 264};
enum { SCENES = sizeof scenes / sizeof *scenes, GRIDS = sizeof grids / sizeof *grids };

static void rows_are_what_their_parts_add_up_to(void **state)
{
    static struct scene scene;
    (void)state;
    for (uint32_t i = 0; i < SCENES; i++) {
        scene_init(&scene, scenes[i].made, scenes[i].count);
        for (uint32_t grid = 0; grid < GRIDS; grid++) {
            run(&scene, grids[grid]);
            judge(&scene);
        }
        scene_deinit(&scene);
    }
}

/* The same bits, however many blocks there are, and whatever else there is to merge. */
static void a_deterministic_batch_depends_on_nothing_else(void **state)
{
    static struct scene scene, alone;
    (void)state;
    for (uint32_t i = 0; i < SCENES; i++) {
        uint8_t *first[MOST_MERGES];
        scene_init(&scene, scenes[i].made, scenes[i].count);
        scene.job.source.batch.deterministic = true;
        for (uint32_t grid = 0; grid < GRIDS; grid++) {
            run(&scene, grids[grid]);
            for (uint32_t m = 0; m < scenes[i].count; m++) {
                const struct fence *out = &scene.out[m];
                if (grid == 0)
                    first[m] = memcpy(malloc(out->bytes), out->data, out->bytes);
                assert_memory_equal(out->data, first[m], out->bytes);
            }
        }
        judge(&scene);
        alone = scene; /* the last one, by all warps */
        alone.merges[0] = scene.merges[scenes[i].count - 1];
        alone.schedule.merges = 1;
        alone.job.merges = alone.merges;
        alone.job.schedule = &alone.schedule;
        alone.job.result = &alone.result;
        run(&alone, 264);
        const struct fence *last = &scene.out[scenes[i].count - 1];
        assert_memory_equal(last->data, first[scenes[i].count - 1], last->bytes);
        for (uint32_t m = 0; m < scenes[i].count; m++)
            free(first[m]);
        scene_deinit(&scene);
    }
}

static void a_source_may_lie_elsewhere_by_now(void **state)
{
    static struct scene scene;
    static struct mlak_cuda_source sources[2];
    (void)state;
    scene_init(&scene, several, sizeof several / sizeof *several);
    for (uint32_t i = 0; i < scene.job.count; i++) { /* what one row of a source has, all have */
        scene.rows[i].lse = (float *)(void *)scene.lse[i].data;
        scene.rows[i].sink = scene.sink;
    }
    for (uint32_t several_sources = 0; several_sources < 2; several_sources++) {
        struct mlak_cuda_moved *moved = several_sources ? &sources[1].moved : &scene.job.source.moved;
        struct scene there = scene; /* rows say where they lay before; judged by where they are */
        *moved = (struct mlak_cuda_moved){.out = 4096, .lse = 64, .sink = 8};
        for (uint32_t i = 0; i < scene.job.count; i++) {
            bool moves = !several_sources || i % 2;
            there.merges[i].source = several_sources && i % 2;
            there.rows[i].out -= moves ? moved->out : 0;
            there.rows[i].lse -= moves ? moved->lse / sizeof(float) : 0;
            there.rows[i].sink -= moves ? moved->sink / sizeof(float) : 0;
        }
        there.job = scene.job;
        there.job.n_sources = 1 + several_sources;
        there.job.sources = sources;
        there.job.rows = there.rows;
        there.job.merges = there.merges;
        there.job.schedule = &there.schedule;
        there.job.result = &there.result;
        if (several_sources)
            there.job.source.moved = (struct mlak_cuda_moved){0};
        run(&there, 64);
        judge(&scene);
    }
    scene_deinit(&scene);
}

static void a_silent_launch_says_nothing(void **state)
{
    static struct scene scene;
    (void)state;
    scene_init(&scene, alone_few, 1);
    scene.job.silent = true;
    run(&scene, 16);
    judge(&scene);
    scene_deinit(&scene);
    scene_init(&scene, NULL, 0); /* and one without merges still has its last word */
    run(&scene, 16);
    scene_deinit(&scene);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(rows_are_what_their_parts_add_up_to),
        cmocka_unit_test(a_deterministic_batch_depends_on_nothing_else),
        cmocka_unit_test(a_source_may_lie_elsewhere_by_now),
        cmocka_unit_test(a_silent_launch_says_nothing),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
