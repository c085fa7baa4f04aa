/* test_clusters.cpp - two blocks of a cluster, in the emulator: a kernel of which each block fetches one of a tile's
 * two boxes for both; sound, and with one mistake at a time. */
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
    STAGES = 2,
    TILES = 7,
    BLOCKS = 12, /* six clusters: all orders in which the emulator runs them */
    THREADS = 64,
    SHARED = STAGES * TILE + 64,
    ROW_BYTES = MLAK_D * 2
};

/* What is wrong with the kernel; job.max_slots here. All but the first two are of one block alone. */
enum mistake {
    NONE,
    BARRIERS_NOT_SEEN,   /* no meeting once there are barriers */
    NO_MEETING_AT_END,
    NEVER_GIVES_ROOM,    /* to the other block */
    GIVES_ROOM_TOO_EARLY,
    LAST_TILE_NOT_AWAITED,
    NO_SUCH_BLOCK
};

struct shared_tiles {
    unsigned char tiles[STAGES][TILE];
    uint64_t full[STAGES], empty[STAGES];
};
static_assert(sizeof(struct shared_tiles) <= SHARED, "");

static void fetch(struct shared_tiles *shared, const struct mlak_cuda_job *job)
{
    uint32_t rank = cluster_rank();
    for (uint32_t n = 0; n < TILES; n++) {
        uint32_t stage = n % STAGES, to = shared_address(shared->tiles[stage]) + rank * BOX;
        barrier_wait(&shared->empty[stage], n / STAGES % 2 ^ 1);
        barrier_arrive_expecting(&shared->full[stage], TILE);
        copy_box_to_both(to, &job->source.keys[0], 0, 0, (int32_t)rank, (int32_t)(blockIdx.x / 2 * TILES + n),
                         &shared->full[stage], 0);
    }
}

/* Each tile, its rows in order, to job.parts: [block][tile][box][row][128]. One warp. */
static void read(struct shared_tiles *shared, const struct mlak_cuda_job *job)
{
    uint32_t rank = cluster_rank(), lane = threadIdx.x % WARP, mistake = rank == 1 ? job->max_slots : (uint32_t)NONE;
    unsigned char *out = (unsigned char *)job->parts + (size_t)blockIdx.x * TILES * TILE;
    for (uint32_t n = 0; n < TILES; n++) {
        uint32_t stage = n % STAGES;
        if (mistake == LAST_TILE_NOT_AWAITED && n == TILES - 1)
            return;
        barrier_wait(&shared->full[stage], n / STAGES % 2);
        if (mistake == GIVES_ROOM_TOO_EARLY && lane == 0)
            barrier_arrive_at(&shared->empty[stage], 0);
        for (uint32_t piece = lane; piece < TILE / 16; piece += WARP) {
            uint32_t row = piece / 8, at = row * 128 + (piece % 8 ^ row % 8) * 16;
            memcpy(out + n * TILE + piece * 16, shared->tiles[stage] + at, 16);
        }
        warp_meet();
        if (lane > 0)
            continue;
        barrier_arrive_at(&shared->empty[stage], rank);
        if (mistake != NEVER_GIVES_ROOM && mistake != GIVES_ROOM_TOO_EARLY)
            barrier_arrive_at(&shared->empty[stage], mistake == NO_SUCH_BLOCK ? 2 : 1 - rank);
    }
}

static void kernel(const struct mlak_cuda_job job)
{
    struct shared_tiles *shared = (struct shared_tiles *)(void *)mlak_shared;
    if (threadIdx.x == 0)
        for (uint32_t stage = 0; stage < STAGES; stage++) {
            barrier_new(&shared->full[stage], 1);
            barrier_new(&shared->empty[stage], 2);
        }
    __syncthreads();
    if (job.max_slots != BARRIERS_NOT_SEEN)
        cluster_meet();
    if (threadIdx.x == 0)
        fetch(shared, &job);
    if (threadIdx.x >= WARP)
        read(shared, &job);
    barrier_meet(1, THREADS);
    if (job.max_slots != NO_MEETING_AT_END && job.max_slots != LAST_TILE_NOT_AWAITED)
        cluster_meet();
}

static uint16_t keys[BLOCKS / 2 * TILES][ROWS][MLAK_D];
static unsigned char out[BLOCKS][TILES][2][ROWS][128];

/* Run the kernel. */
static void run(enum mistake mistake)
{
    struct mlak_cuda_job job = {};
    job.source.batch.kv = keys;
    job.source.batch.row_stride = ROW_BYTES;
    job.source.batch.page_stride = sizeof keys[0];
    job.source.batch.page_size = ROWS;
    job.source.batch.pages = BLOCKS / 2 * TILES;
    job.max_slots = mistake;
    job.parts = (float *)(void *)out;
    emulated_map(&job.source.keys[0], &job.source.batch, ROWS, 1);
    for (size_t i = 0; i < sizeof keys / 2; i++)
        ((uint16_t *)keys)[i] = (uint16_t)(i * 40503 % 65521); /* none is 0xffff */
    memset(out, 0, sizeof out);
    emulate(kernel, BLOCKS, THREADS, 2, SHARED, &job);
}

static const unsigned char *row_of(unsigned block, unsigned tile, unsigned box, unsigned row)
{
    return (const unsigned char *)keys[block / 2 * TILES + tile][row] + box * 128;
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

static void test_tiles_are_shared(void **)
{
    unsigned wrong, nan;
    run(NONE);
    count_wrong(&wrong, &nan);
    assert_int_equal(wrong, 0);
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

static void test_deadlock_names_block_and_barrier(void **)
{
    assert_faults(NEVER_GIVES_ROOM, "block 0, threads 0 to 0: wait for barrier 4112, phase 0: 1 of 2 have arrived",
                  "every thread waits for another one");
}

static void test_block_that_ends_early(void **)
{
    assert_faults(NO_MEETING_AT_END, "the other block of the cluster has ended, and this one still reaches for it",
                  NULL);
    assert_faults(LAST_TILE_NOT_AWAITED, "the block has ended, and copies are on their way into its shared memory",
                  NULL);
}

static void test_nothing_there_to_reach(void **)
{
    assert_faults(BARRIERS_NOT_SEEN, "a barrier that is not there yet in the other block of the cluster", NULL);
    assert_faults(NO_SUCH_BLOCK, "a cluster has no block of this rank", NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_tiles_are_shared),
        cmocka_unit_test(test_room_given_too_early_is_nan),
        cmocka_unit_test(test_deadlock_names_block_and_barrier),
        cmocka_unit_test(test_block_that_ends_early),
        cmocka_unit_test(test_nothing_there_to_reach),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
