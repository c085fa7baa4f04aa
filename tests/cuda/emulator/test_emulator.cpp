/* test_emulator.cpp - the emulator itself: a kernel of which one thread fetches tiles of two boxes, and a warp reads
 * them; sound, and with one mistake at a time. */
#include "emulated_ptx_sm90.h"
#include "emulator.h"
#include "fibers.h"

#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>
extern "C" {
#include <cmocka.h>
}

enum {
    ROWS = 8, /* of a box, and of a page */
    BOX = ROWS * 128,
    TILE = 2 * BOX,
    TILES = 7,
    BLOCKS = 4, /* in two of them, who arrives goes on last */
    THREADS = 64,
    SHARED = TILE + 64,
    ROW_BYTES = MLAK_D * 2
};

/* What is wrong with the kernel; job.max_slots here. */
enum mistake {
    NONE,
    BARRIERS_NOT_SEEN, /* threads meet, but not those new barriers */
    NO_BARRIERS,
    ARRIVES_TWICE,     /* where bytes are still to come */
    NEVER_GIVES_ROOM,
    GIVES_ROOM_TOO_EARLY,
    LAST_TILE_NOT_AWAITED
};

struct shared_tile {
    unsigned char tile[TILE];
    uint64_t full, empty;
};
static_assert(sizeof(struct shared_tile) <= SHARED, "");

static void fetch(struct shared_tile *shared, const struct mlak_cuda_job *job)
{
    for (uint32_t n = 0; n < TILES; n++) {
        uint32_t to = shared_address(shared->tile);
        barrier_wait(&shared->empty, n % 2 ^ 1);
        barrier_arrive_expecting(&shared->full, TILE);
        for (uint32_t box = 0; box < 2; box++)
            copy_box(to + box * BOX, &job->source.keys[0], 0, 0, (int32_t)box, (int32_t)(blockIdx.x * TILES + n),
                     &shared->full, 0);
        if (job->max_slots == ARRIVES_TWICE)
            barrier_arrive(&shared->full);
    }
}

/* Each tile, its rows in order, to job.parts: [block][tile][box][row][128]. One warp. */
static void read(struct shared_tile *shared, const struct mlak_cuda_job *job)
{
    uint32_t lane = threadIdx.x % WARP, mistake = job->max_slots;
    unsigned char *out = (unsigned char *)job->parts + (size_t)blockIdx.x * TILES * TILE;
    for (uint32_t n = 0; n < TILES; n++) {
        if (mistake == LAST_TILE_NOT_AWAITED && n == TILES - 1)
            return;
        barrier_wait(&shared->full, n % 2);
        if (mistake == GIVES_ROOM_TOO_EARLY && lane == 0)
            barrier_arrive(&shared->empty);
        for (uint32_t piece = lane; piece < TILE / 16; piece += WARP) {
            uint32_t row = piece / 8, at = row * 128 + (piece % 8 ^ row % 8) * 16;
            memcpy(out + n * TILE + piece * 16, shared->tile + at, 16);
        }
        if (warp_speaker() && mistake != NEVER_GIVES_ROOM && mistake != GIVES_ROOM_TOO_EARLY)
            barrier_arrive(&shared->empty);
    }
}

static void kernel(const struct mlak_cuda_job job)
{
    struct shared_tile *shared = (struct shared_tile *)(void *)mlak_shared;
    if (threadIdx.x == 0 && job.max_slots != NO_BARRIERS) {
        barrier_new(&shared->full, 1);
        barrier_new(&shared->empty, 1);
    }
    if (job.max_slots == BARRIERS_NOT_SEEN)
        __syncthreads();
    else
        barriers_meet();
    if (threadIdx.x == 0)
        fetch(shared, &job);
    if (threadIdx.x >= WARP)
        read(shared, &job);
}

static uint16_t keys[BLOCKS * TILES][ROWS][MLAK_D];
static unsigned char out[BLOCKS][TILES][2][ROWS][128];

/* Run the kernel. */
static void run(enum mistake mistake)
{
    struct mlak_cuda_job job = {};
    job.source.batch.kv = keys;
    job.source.batch.row_stride = ROW_BYTES;
    job.source.batch.page_stride = sizeof keys[0];
    job.source.batch.page_size = ROWS;
    job.source.batch.pages = BLOCKS * TILES;
    job.max_slots = mistake;
    job.parts = (float *)(void *)out;
    emulated_map(&job.source.keys[0], &job.source.batch, ROWS, 1);
    for (size_t i = 0; i < sizeof keys / 2; i++)
        ((uint16_t *)keys)[i] = (uint16_t)(i * 40503 % 65521); /* none is 0xffff */
    memset(out, 0, sizeof out);
    emulate(kernel, BLOCKS, THREADS, SHARED, &job);
}

static const unsigned char *row_of(unsigned block, unsigned tile, unsigned box, unsigned row)
{
    return (const unsigned char *)keys[block * TILES + tile][row] + box * 128;
}

/* Rows of boxes that are not what they should be; and those of them that have a NaN. */
static void count_wrong(unsigned *wrong, unsigned *nan)
{
    *wrong = *nan = 0;
    for (unsigned i = 0; i < BLOCKS * TILES * 2 * ROWS; i++) {
        unsigned block = i / (TILES * 2 * ROWS), tile = i / (2 * ROWS) % TILES, box = i / ROWS % 2, row = i % ROWS;
        const unsigned char *got = out[block][tile][box][row];
        *wrong += memcmp(got, row_of(block, tile, box, row), 128) != 0;
        *nan += got[0] == 0xff && got[1] == 0xff;
    }
}

static void test_tiles_come(void **)
{
    unsigned wrong, nan;
    for (uint64_t seed = 0; seed < 20; seed++) { /* 0: in order */
        mlak_emulate_disorder(seed);
        run(NONE);
        count_wrong(&wrong, &nan);
        assert_int_equal(wrong, 0);
    }
    mlak_emulate_disorder(0);
}

static void test_room_given_too_early_is_nan(void **)
{
    unsigned wrong, nan;
    run(GIVES_ROOM_TOO_EARLY);
    count_wrong(&wrong, &nan);
    assert_true(nan > 0);
}

/* It aborts, and says both; with NULL, the one. */
static void assert_faults(enum mistake mistake, const char *says, const char *also)
{
    char text[65536];
    size_t length = 0;
    int ends[2], status;
    assert_int_equal(pipe(ends), 0);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        signal(SIGABRT, SIG_DFL);
        dup2(ends[1], STDERR_FILENO);
        run(mistake);
        _exit(0);
    }
    close(ends[1]);
    for (ssize_t n; (n = ::read(ends[0], text + length, sizeof text - 1 - length)) > 0;)
        length += (size_t)n;
    close(ends[0]);
    text[length] = 0;
    assert_int_equal(waitpid(child, &status, 0), child);
    if (!WIFSIGNALED(status) || WTERMSIG(status) != SIGABRT || !strstr(text, says) || (also && !strstr(text, also)))
        fail_msg("status %d, and it says: %s", status, text);
}

static void test_deadlock_names_barrier(void **)
{
    assert_faults(NEVER_GIVES_ROOM, "threads 0 to 0: wait for barrier 2056, phase 0: 0 of 1 have arrived",
                  "every thread waits for another one");
}

static void test_block_that_ends_early(void **)
{
    assert_faults(LAST_TILE_NOT_AWAITED, "the block has ended, and copies are on their way into its shared memory",
                  NULL);
}

static void test_barriers_that_are_not_there(void **)
{
    assert_faults(NO_BARRIERS, "a barrier that is not there yet", NULL);
    assert_faults(BARRIERS_NOT_SEEN, "a barrier that is not there yet", NULL);
}

static void test_arrival_too_many(void **)
{
    assert_faults(ARRIVES_TWICE, "an arrival too many at a barrier", NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_tiles_come),
        cmocka_unit_test(test_room_given_too_early_is_nan),
        cmocka_unit_test(test_deadlock_names_barrier),
        cmocka_unit_test(test_block_that_ends_early),
        cmocka_unit_test(test_barriers_that_are_not_there),
        cmocka_unit_test(test_arrival_too_many),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
