/* test_phases.c - what shifts the rings and hand-overs of a pipelined kernel against each other: every number of tiles,
 * requests without any, rows from few to thousands, pages that a copy engine takes beside others that it does not, and
 * launches on each other's heels: `test_phases [tiles] backend [variant]`. Each outcome is judged, or as large a sample
 * as is soon judged, and must come again with the same bits. With less than 60 tiles, for slow devices, all is smaller,
 * and nothing comes again. */
#include "test_device.h"

#include <ctype.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { TILE = 64, MOST_TILES = 60, MOST_BATCHES = 8, JUDGED = 1 << 19 /* row times key; less, where all is smaller */ };

static uint32_t tiles = MOST_TILES;

static bool smaller(void) { return tiles < MOST_TILES; }

/* ---- batches that share a launch, or are alone ---- */

struct scene {
    struct made *made[MOST_BATCHES];
    struct mlak_row *rows[MOST_BATCHES];
    enum mlak_code codes[MOST_BATCHES];
    uint8_t *bits[MOST_BATCHES]; /* of a first outcome, to compare another one with */
    uint32_t count;
};

/* Of pages of `page_size` keys, and keys enough for the longest of its requests. */
static void add(struct scene *scene, uint64_t seed, struct mlak_batch shape, uint32_t types, uint32_t page_size,
                const int32_t *lengths, const int32_t *q_lens)
{
    struct maker maker = maker_seeded(seed);
    int32_t longest = 1;
    uint64_t pages = 0;
    for (uint32_t b = 0; b < shape.batch; b++) {
        longest = lengths[b] > longest ? lengths[b] : longest;
        pages += ((uint32_t)lengths[b] + page_size - 1) / page_size;
    }
    shape.page_size = page_size;
    shape.max_pages = ((uint32_t)longest + page_size - 1) / page_size;
    shape.pages = (uint32_t)pages + 3;
    maker_set_types(&shape, types);
    scene->made[scene->count] = made_new(&maker, &shape, lengths, q_lens);
    scene->rows[scene->count++] = calloc(shape.batch, sizeof(struct mlak_row));
}

static void end(struct scene *scene)
{
    for (uint32_t i = 0; i < scene->count; i++) {
        made_free(scene->made[i]);
        free(scene->rows[i]);
        free(scene->bits[i]);
    }
}

static void run(struct scene *scene)
{
    test_device_decode_together(scene->made, scene->count, scene->rows, scene->codes);
    for (uint32_t i = 0; i < scene->count; i++)
        assert_int_equal(scene->codes[i], MLAK_OK);
}

/* Remember the outputs, or hold them against those that are remembered. */
static void remember_or_compare(struct scene *scene, const char *what)
{
    for (uint32_t i = 0; i < scene->count; i++) {
        if (!scene->bits[i])
            scene->bits[i] = made_outputs(scene->made[i]);
        else if (!made_outputs_are(scene->made[i], scene->bits[i]))
            fail_msg("%s: batch %u has other bits the second time", what, i);
    }
}

static void forget(struct scene *scene)
{
    for (uint32_t i = 0; i < scene->count; i++) {
        free(scene->bits[i]);
        scene->bits[i] = NULL;
    }
}

/* In order, until enough is judged; of each batch one request at least. */
static void judge(struct scene *scene, const char *what)
{
    for (uint32_t i = 0; i < scene->count; i++) {
        struct made *made = scene->made[i];
        uint64_t judged = 0, most = smaller() ? JUDGED / 8 : JUDGED;
        for (uint32_t b = 0; b < made->batch.batch && judged < most; b++) {
            char why[256];
            uint64_t rows = (uint64_t)made_q_len(made, b) * made->batch.heads;
            uint64_t keys = (uint64_t)made_seqlens(made)[b];
            if (judged > 0 && judged + rows * keys > most)
                continue;
            judged += rows * keys;
            assert_int_equal(scene->rows[i][b].code, MLAK_ROW_OK);
            struct oracle *oracle = oracle_new(made, b, !test_device_exact());
            bool holds = oracle_holds(oracle, test_device_bar(made->batch.q_dtype), why);
            oracle_free(oracle);
            if (!holds)
                fail_msg("%s: batch %u, %d keys: %s", what, i, made_seqlens(made)[b], why);
        }
        if (!made_intact(made))
            fail_msg("%s: batch %u: written outside the outputs", what, i);
    }
}

static void run_twice(struct scene *scene, const char *what)
{
    run(scene);
    judge(scene, what);
    if (smaller())
        return;
    remember_or_compare(scene, what);
    run(scene);
    remember_or_compare(scene, what);
    forget(scene);
}

/* ---- tiles ---- */

/* 1..`tiles` tiles, each once, the last one whole or not, in an order in which neighbours differ. */
static void every_number_of_tiles(uint32_t heads, uint32_t q_len)
{
    int32_t lengths[MOST_TILES];
    uint32_t step = tiles % 7 ? 7 : 11; /* no divisor of `tiles`, or it is 1 */
    for (uint32_t i = 0; i < tiles; i++) {
        uint32_t n = i * step % tiles + 1;
        lengths[i] = (int32_t)(n * TILE - n * 13 % TILE);
    }
    for (enum mlak_mask mask = MLAK_MASK_NONE; mask <= MLAK_MASK_CAUSAL; mask++) {
        struct mlak_batch shape = maker_plain(tiles, heads, q_len);
        struct scene scene = {0};
        shape.mask = mask;
        add(&scene, 11 + mask, shape, mask == MLAK_MASK_CAUSAL ? 0 : 1, TILE, lengths, NULL);
        for (uint32_t deterministic = 0; deterministic < 2; deterministic++) {
            char what[80];
            snprintf(what, sizeof what, "%u heads, q_len %u, mask %u%s", heads, q_len, (unsigned)mask,
                     deterministic ? ", deterministic" : "");
            scene.made[0]->batch.deterministic = deterministic;
            run_twice(&scene, what);
        }
        end(&scene);
    }
}

static void every_number_of_tiles_of_one_row_block(void **state)
{
    (void)state;
    every_number_of_tiles(4, 2);
}

/* Where blocks work in pairs, they do here. */
static void every_number_of_tiles_of_four_row_blocks(void **state)
{
    (void)state;
    every_number_of_tiles(MLAK_MAX_HEADS, 2);
}

/* One request alone, whose tiles all blocks divide among them. */
static void one_request_of_every_number_of_tiles(void **state)
{
    (void)state;
    for (uint32_t n = 1; n <= tiles; n++) {
        struct scene scene = {0};
        char what[32];
        snprintf(what, sizeof what, "%u tiles alone", n);
        add(&scene, 31, maker_plain(1, 3, 3), n % 2, 16, (int32_t[]){(int32_t)(n * TILE - n % 3)}, NULL);
        run(&scene);
        judge(&scene, what);
        end(&scene);
    }
}

/* ---- requests of nothing, and of much ---- */

static void requests_without_keys_or_tokens_among_others(void **state)
{
    (void)state;
    enum { B = 7 };
    static const int32_t lengths[][B] = {{0, 0, 0, 0, 0, 0, 0}, {700, 0, 0, 1, 64, 129, 0}, {0, 65, 300, 0, 0, 2, 640}};
    static const int32_t q_lens[][B] = {{1, 0, 2, 0, 3, 1, 0}, {0, 2, 0, 1, 3, 0, 1}, {4, 0, 1, 0, 0, 1, 2}};
    for (unsigned i = 0; i < 3 * 3 * 2; i += smaller() ? 5 : 1) {
        const int32_t *q = q_lens[i / 3 % 3];
        struct mlak_batch shape = maker_plain(B, i % 2 ? 5 : 100, 1);
        struct scene scene = {0};
        shape.has_cu_q = true;
        shape.q_rows = 0;
        for (uint32_t b = 0; b < B; b++)
            shape.q_rows += (uint64_t)q[b];
        shape.deterministic = i / 9;
        shape.dcp_world = 3; /* a rank that may have no key of a request that has some */
        shape.dcp_rank = i % 3;
        shape.dcp_interleave = 16;
        add(&scene, 41 + i, shape, i % 2, i % 2 ? 64 : 16, lengths[i % 3], q);
        run_twice(&scene, "requests without keys or tokens");
        end(&scene);
    }
}

/* From 16 folded rows to 8,192 (512, where all is smaller): of one batch, and of several. */
static void few_rows_and_thousands(void **state)
{
    (void)state;
    int32_t most = smaller() ? MLAK_MAX_Q / 16 : MLAK_MAX_Q;
    const int32_t q_lens[] = {1, most, 0, 3, most / 4, 1, 2}, lengths[] = {200, 70, 65, 129, 64, 500, 1};
    enum { B = sizeof q_lens / sizeof q_lens[0] };
    struct scene scene = {0};
    struct mlak_batch ragged = maker_plain(B, MLAK_MAX_HEADS, 1);
    ragged.has_cu_q = true;
    ragged.q_rows = 0;
    for (uint32_t b = 0; b < B; b++)
        ragged.q_rows += (uint64_t)q_lens[b];
    add(&scene, 51, maker_plain(3, 16, 1), 0, 64, (int32_t[]){300, 64, 1}, NULL);
    add(&scene, 52, ragged, 0, 64, lengths, q_lens);
    add(&scene, 53, maker_plain(2, 16, 1), 0, 32, (int32_t[]){640, 100}, NULL);
    add(&scene, 54, maker_plain(1, 32, 8), 0, 64, (int32_t[]){257}, NULL);
    run_twice(&scene, "few rows and thousands");
    end(&scene);
}

/* Keys that come in boxes of one page, of several, and each by itself, from one item to the next. */
static void pages_of_all_sizes_in_turn(void **state)
{
    (void)state;
    static const uint32_t page_sizes[] = {64, 1, 16, 4, 128, 7, 24, 32};
    static const int32_t lengths[][3] = {{130, 64, 300}, {1, 200, 63}, {65, 128, 10}};
    for (uint32_t turn = 0; turn < 3; turn++) {
        struct scene scene = {0};
        for (uint32_t i = 0; i < MOST_BATCHES; i++) {
            struct mlak_batch shape = maker_plain(smaller() ? 2 : 3, turn < 2 ? 7 : 48, 1 + turn * 2);
            shape.deterministic = turn == 1;
            shape.mask = i % 3 ? MLAK_MASK_CAUSAL : MLAK_MASK_NONE;
            add(&scene, 61 + i, shape, turn % 2, page_sizes[i], lengths[(turn + i) % 3], NULL);
        }
        run_twice(&scene, "pages of all sizes");
        end(&scene);
    }
}

/* ---- launches ---- */

/* No wait for the host between them, and all have the same scratch. */
static void launches_on_each_others_heels(void **state)
{
    (void)state;
    enum { COUNT = 6, REPLAYS = 20 };
    if (!test_device_captures())
        skip(); /* the host waits for each */
    struct scene scene = {0};
    for (uint32_t i = 0; i < COUNT; i++) {
        struct mlak_batch shape = maker_plain(3 + i % 2, i % 3 == 2 ? MLAK_MAX_HEADS : 4 + i, 1 + i % 3);
        shape.deterministic = i == 4;
        add(&scene, 71 + i, shape, i % 2, i % 2 ? 16 : 64, (int32_t[]){700 - 64 * (int32_t)i, 3, 65, 129}, NULL);
    }
    struct test_graph *graph = test_graph_new(scene.made, scene.count);
    for (uint32_t i = 0; i < REPLAYS; i++) {
        struct mlak_fault fault;
        assert_int_equal(test_graph_replay(graph, scene.made, scene.rows[COUNT - 1], &fault), MLAK_OK);
        if (i == 0)
            judge(&scene, "launches on each other's heels");
        remember_or_compare(&scene, "launches on each other's heels");
    }
    test_graph_free(graph);
    end(&scene);
}

int main(int argc, char **argv)
{
    if (argc > 1 && isdigit((unsigned char)argv[1][0])) {
        int wanted = atoi(argv[1]);
        tiles = wanted < 1 ? 1 : wanted > MOST_TILES ? MOST_TILES : (uint32_t)wanted;
        argc--;
        argv++;
    }
    test_device_open(argc, argv);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_number_of_tiles_of_one_row_block),
        cmocka_unit_test(every_number_of_tiles_of_four_row_blocks),
        cmocka_unit_test(one_request_of_every_number_of_tiles),
        cmocka_unit_test(requests_without_keys_or_tokens_among_others),
        cmocka_unit_test(few_rows_and_thousands),
        cmocka_unit_test(pages_of_all_sizes_in_turn),
        cmocka_unit_test(launches_on_each_others_heels),
    };
    int failures = cmocka_run_group_tests(tests, NULL, NULL);
    test_device_close();
    return failures != 0;
}
