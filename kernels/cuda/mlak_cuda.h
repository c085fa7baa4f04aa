/* mlak_cuda.h - what the host side (cuda_backend.c) and the kernels (*.cu) of the cuda backend agree on.
 *
 * A launch has the requests of one batch, or of several: each batch, or slice of one, is a source, and each request
 * knows its own. All sources have one split kernel and one `deterministic`; everything else may differ. The layers of a
 * step, which differ in buffers only, may use again what the first one's launch prepared: theirs leave out kernel 1.
 *
 * A launch is three kernels on one stream, each with one parameter, a struct mlak_cuda_job by value:
 *     mlak_cuda_prepare         1 block: reads client lengths once, fills rows and the schedule, validates cu_q
 *     mlak_cuda_split_<types>   a fixed grid, each block with its share of the schedule
 *     mlak_cuda_combine         merges the parts of split requests, in split order; then the results and `done`
 * Nothing of it depends on a length that the host knows, so a captured graph may be replayed with other lengths.
 *
 * An item is one row block (job.rows_per_item folded rows, token * heads + head) of one request over a range of its key
 * tiles. job.abreast thread blocks walk abreast, over the same tiles of a request at the same time and each for a row
 * block of its own: so a tile that many rows need comes from memory once, and from the L2 cache for the others. Such
 * row blocks are a strip. The schedule lays all tiles of all strips end to end and gives all that walk abreast an equal
 * share of them (as FlashMLA and "Stream-K", Osama et al. 2023, do): a strip is split only where a share ends in it,
 * and a thread block has at most two parts that do not stand for a whole row block, in slots of its own. To go on from
 * one strip to the next takes a thread block as long as some tiles: where shares that are hardly longer end where
 * strips do, they are that long. A deterministic batch is split by each request's own length instead, into items that
 * the thread blocks take in turn. */
#ifndef MLAK_CUDA_H
#define MLAK_CUDA_H

#include "mlak_rows.h"

enum {
    MLAK_CUDA_M = 64,              /* folded rows of an item at most: 16, 32 or 64, see mlak_cuda_rows */
    MLAK_CUDA_TILE = 64,           /* keys of a tile */
    MLAK_CUDA_THREADS = 256,       /* of each block of split and combine */
    MLAK_CUDA_WGMMA_THREADS = 384, /* of each block of the split kernels for Hopper */
    MLAK_CUDA_MOST_ABREAST = 8,
    MLAK_CUDA_PREPARE_THREADS = 1024, /* at most, see mlak_cuda_prepare_threads */
    MLAK_CUDA_MAX_REQUESTS = 1024, /* of a job */
    MLAK_CUDA_MAX_SOURCES = 64,    /* of a job */
    MLAK_CUDA_PART_FLOATS = MLAK_CUDA_M * (MLAK_V + 2), /* of a slot: O not normalised [64][512], maximum [64] (of log2
                                                         * scores), sum [64] */
    MLAK_CUDA_FIXED_TILES = 32,    /* deterministic: tiles of a split, more if there would be too many splits */
    MLAK_CUDA_FIXED_SLOTS = 64,    /* deterministic: slots a request uses at most */
    MLAK_CUDA_PREPARE_SHARED = 60 << 10,   /* dynamic shared memory of each kernel, bytes */
    MLAK_CUDA_SPLIT_SHARED_1 = 101376,     /* one tile in flight: the most that sm_86, 89 and 120 give */
    MLAK_CUDA_SPLIT_SHARED_2 = 177152,     /* two, from this size on: sm_90 and 100 */
    MLAK_CUDA_SPLIT_SHARED_WIDE = 201728,  /* two, and 32 rows: the wide kernels */
    MLAK_CUDA_SPLIT_SHARED_WGMMA = 231424, /* and 64 rows: those for Hopper; a block more of 1 KB may still start */
    MLAK_CUDA_COMBINE_SHARED = 81 << 10,   /* two at a time on sm_80, 90 and 100, else one; fits a block anywhere */
    MLAK_CUDA_SIGN_OF_LIFE = 64 /* items */
};

/* How far the schedule went; device memory, filled by prepare. Kernels look at nothing that lies in host memory: a look
 * takes more than 1 us, and those of all blocks at one address follow one another. */
struct mlak_cuda_schedule {
    uint32_t slots;                /* parts in use, deterministic only */
    uint32_t merges;               /* job.merges in use */
    uint32_t blocks_done;          /* combine's own, 0 before and after */
    unsigned long long progress;   /* items completed, ever growing */
    int32_t refused[MLAK_CUDA_MAX_SOURCES];    /* MLAK_BATCH: nothing of the source runs */
    uint64_t cancelled[MLAK_CUDA_MAX_SOURCES]; /* the host's, by copies: ticket of a launch of which this source should
                                                * stop as soon as may be */
};

/* What the schedule says of a request; device memory. */
struct mlak_cuda_request {
    uint64_t first;                /* tile (deterministic: item) of all, with which it begins */
    uint32_t blocks, strips;       /* row blocks, and what abreast makes of them */
    uint32_t tiles;                /* of each; counted from local key lo rounded down to a multiple of 64 */
    uint32_t room;                 /* of a strip in the schedule: its tiles, or up to a whole number of shares */
    uint32_t first_tile;
    uint32_t splits, split_tiles;  /* deterministic: of each row block, and their tiles; 1: written straight to out */
    uint32_t first_slot;           /* deterministic: slot of (block, split): first_slot + block * splits + split */
    uint32_t source, box_rows;     /* its source, and that one's box_rows */
};

/* Work of a thread block of the split kernel: rows of a row block over a range of tiles. The first lines are
 * schedule_next's to fill (mlak_schedule.cuh); the others are item_look's (mlak_items.cuh). */
struct mlak_cuda_item {
    uint32_t request, block;       /* its place in the job's requests; row block */
    uint32_t tile, end_tile;
    float *part;                   /* its slot; NULL: to out */
    uint32_t source, box_rows;     /* its request's */
    uint32_t first_row, rows;      /* folded rows of the block */
    uint32_t first_token, end_token;
    struct mlak_visible any;       /* what any of its rows sees */
    uint64_t any_bits;
    int64_t all_lo, all_end;       /* keys that all of its rows see: no mask needed */
    uint32_t fetch, fetch_end;     /* of its tiles, from `tile` on, those that the copy engine can fetch: not none */
};

/* Tiles (deterministic: items) of all, from a thread block's next one on; and the strip it is at. */
struct mlak_cuda_walk {
    uint64_t at, end, first;
    uint64_t share;                /* tiles of a thread block; deterministic: 0 */
    uint32_t block;                /* the thread block */
    uint32_t request, strip, tile; /* of `at`; tile 0 but at first */
};

/* What a thread block of the split kernel begins with; device memory. */
struct mlak_cuda_start {
    struct mlak_cuda_item item;    /* if there */
    struct mlak_cuda_walk walk, next; /* at the item, and after it */
    uint32_t there;
};

/* Rows that combine has to look at: a row block that was split, or all of a request without a tile; device memory. */
struct mlak_cuda_merge {
    uint32_t request, source, first_row, rows;
    uint32_t parts;                /* none: no row sees a key */
    uint32_t slot, next_slot, stride; /* of the first part, and of the second one; and so on */
};

/* Pinned host memory, written by the device. */
struct mlak_cuda_row_result { int32_t code; uint32_t reserved; int64_t detail[2]; int64_t local_len; };
struct mlak_cuda_source_result {
    int32_t code;                  /* 0, or MLAK_BATCH: cu_q is wrong; then nothing of the source ran */
    uint32_t index;                /* of the entry at fault */
    int64_t value, before;         /* the entry, and the one before it (0 for the first) */
};
struct mlak_cuda_result {
    uint64_t done;                 /* = job.ticket once everything else is visible to the host */
    uint64_t progress;             /* changes with every MLAK_CUDA_SIGN_OF_LIFE items completed */
    struct mlak_cuda_source_result sources[MLAK_CUDA_MAX_SOURCES];
};

/* A tensor map of the driver's. */
struct mlak_cuda_map {
    uint64_t words[16];
} __attribute__((aligned(64)));

/* What is added to the first pointers of a row, in their order (0 to those that are NULL): how far the buffers of a
 * step's layer are from those of the layer that was prepared. */
struct mlak_cuda_moved {
    uint64_t q, kv, out, lse, block_table, sink;
};

/* What requests of one batch have in common. */
struct mlak_cuda_source {
    struct mlak_cuda_map keys[2];  /* of kv as [page][chunk of 64 columns][row][64]; boxes of box_rows x 1, 2 chunks */
    struct mlak_cuda_moved moved;
    struct mlak_batch batch;       /* pointers are the device's */
    uint32_t box_rows;             /* of a page, 8..64; 0: there are no maps, and keys come by cp.async */
    uint32_t first, count;         /* requests of the batch; all of them, if it has cu_q and is not alone */
    uint32_t row;                  /* its first one's place among the job's */
    uint32_t cu_q;                 /* where its snapshot, [batch.batch + 1], begins in the job's cu_q */
};

struct mlak_cuda_job {
    struct mlak_cuda_source source;         /* the first; in a launch of one, all that there is */
    const struct mlak_cuda_source *sources; /* [n_sources], device memory, another launch's later: who lets the copy
                                             * engine use its maps must map_acquire them. Not there if n_sources is 1 */
    uint32_t n_sources;            /* 1..MLAK_CUDA_MAX_SOURCES */
    uint32_t count;                /* requests of all sources, at most MLAK_CUDA_MAX_REQUESTS */
    uint32_t rows_per_item;        /* 16, 32 with the wide kernels, 64 with those for Hopper */
    uint32_t abreast;              /* 1..MLAK_CUDA_MOST_ABREAST; deterministic: 1 */
    uint32_t grid;                 /* thread blocks of the split kernel, at most MLAK_CUDA_PREPARE_THREADS */
    uint32_t max_slots;            /* room in parts: 2 * grid; deterministic: mlak_cuda_slots of all requests */
    bool silent;                   /* nobody waits for its end, but for a later one's on the stream: `done` stays */
    uint64_t ticket;
    struct mlak_row *rows;                 /* [count] */
    struct mlak_cuda_request *requests;    /* [count] */
    struct mlak_cuda_start *starts;        /* [grid] */
    struct mlak_cuda_merge *merges;        /* [mlak_cuda_most_merges] */
    struct mlak_cuda_schedule *schedule;
    int32_t *cu_q;                         /* the sources' snapshots */
    float *parts;                          /* [max_slots][MLAK_CUDA_PART_FLOATS] */
    struct mlak_cuda_result *result;
    struct mlak_cuda_row_result *row_results; /* [count] */
};

/* Which split kernel: by what the batch's tensors hold, and by rows_per_item. */
enum mlak_cuda_types {
    MLAK_CUDA_BF16,
    MLAK_CUDA_FP16,
    MLAK_CUDA_WGMMA_TYPES, /* Hopper's own kernels are for those above */
    MLAK_CUDA_FP8 = MLAK_CUDA_WGMMA_TYPES,
    MLAK_CUDA_BF16_FP8,
    MLAK_CUDA_BF16_656,
    MLAK_CUDA_TYPES
};
static inline enum mlak_cuda_types mlak_cuda_types_of(const struct mlak_batch *batch)
{
    switch (batch->kv_format) {
    case MLAK_KV_BF16: return MLAK_CUDA_BF16;
    case MLAK_KV_FP16: return MLAK_CUDA_FP16;
    case MLAK_KV_E4M3_656: return MLAK_CUDA_BF16_656;
    default: return batch->q_dtype == MLAK_E4M3 ? MLAK_CUDA_FP8 : MLAK_CUDA_BF16_FP8;
    }
}

/* Rows of an item: 64 where the device is Hopper (`wgmma`) and the types are those of its kernels; else 32 where most
 * requests have more than 16 folded rows, as one walk over the keys then serves them all. Of a deterministic batch from
 * the heads alone, since the blocks decide where a request is split. */
static inline uint32_t mlak_cuda_rows(const struct mlak_batch *batch, uint64_t shared_bytes, bool wgmma)
{
    enum mlak_cuda_types types = mlak_cuda_types_of(batch);
    uint64_t rows = batch->deterministic ? batch->heads : batch->q_rows * batch->heads / batch->batch;
    if (wgmma && types < MLAK_CUDA_WGMMA_TYPES)
        return 64;
    return rows > 16 && shared_bytes >= MLAK_CUDA_SPLIT_SHARED_WIDE ? 32 : 16;
}

/* Whether two batches may be sources of one launch. */
static inline bool mlak_cuda_mergeable(const struct mlak_batch *a, const struct mlak_batch *b, uint64_t shared_bytes,
                                       bool wgmma)
{
    return mlak_cuda_types_of(a) == mlak_cuda_types_of(b) && a->deterministic == b->deterministic &&
           mlak_cuda_rows(a, shared_bytes, wgmma) == mlak_cuda_rows(b, shared_bytes, wgmma);
}

/* Thread blocks abreast: as many as leave at most a ninth of them without a row block, in a request of mean size.
 * `rows`: folded rows of all `requests` of the launch. */
static inline uint32_t mlak_cuda_abreast(uint64_t rows, uint64_t requests, bool deterministic, uint32_t rows_per_item,
                                         uint32_t grid)
{
    uint64_t blocks = (rows / requests + rows_per_item - 1) / rows_per_item;
    const uint32_t most = MLAK_CUDA_MOST_ABREAST;
    uint64_t abreast = deterministic ? 1 : grid < most ? grid : most;
    while ((blocks + abreast - 1) / abreast * abreast * 8 > blocks * 9 && abreast > 1)
        abreast--;
    return (uint32_t)abreast;
}

/* Threads of the prepare kernel: one for each request, source and thread block of the split kernel, in whole warps. */
MLAK_ROWS uint32_t mlak_cuda_prepare_threads(const struct mlak_cuda_job *job)
{
    uint32_t most = job->count > job->grid ? job->count : job->grid;
    return ((most > job->n_sources ? most : job->n_sources) + 31) / 32 * 32;
}

/* Row blocks that are split, each with two parts at least, and requests without a tile. */
static inline uint32_t mlak_cuda_most_merges(uint32_t max_slots, uint32_t requests)
{
    return max_slots / 2 + requests;
}

/* Deterministic: slots that a request of the batch uses at most. */
static inline uint32_t mlak_cuda_slots(const struct mlak_batch *batch, uint32_t rows_per_item)
{
    const uint64_t longest = MLAK_MAX_Q, most = MLAK_CUDA_FIXED_SLOTS;
    uint64_t q_len = batch->has_cu_q ? longest : batch->q_rows / batch->batch;
    uint64_t blocks = (q_len * batch->heads + rows_per_item - 1) / rows_per_item;
    uint64_t tiles = ((uint64_t)batch->max_pages * batch->page_size + MLAK_CUDA_TILE - 1) / MLAK_CUDA_TILE;
    uint64_t splits = (tiles + MLAK_CUDA_FIXED_TILES - 1) / MLAK_CUDA_FIXED_TILES;
    uint64_t slots = splits > 1 ? blocks * splits : 0;
    return (uint32_t)(slots < most ? slots : most);
}

/* Keys of a box that the copy engine fetches: as many of a tile, halved and halved again, as divide a page. 0: less
 * than 8, which it is not used for. */
static inline uint32_t mlak_cuda_box_rows(const struct mlak_batch *batch)
{
    uint32_t rows = MLAK_CUDA_TILE;
    while (batch->page_size % rows)
        rows /= 2;
    return rows < 8 ? 0 : rows;
}

/* "mlak_cuda_split_", "mlak_cuda_split_wide_" or "mlak_cuda_split_wgmma_" (the first two only) and one of these */
#define MLAK_CUDA_TYPE_NAMES {"bf16", "fp16", "fp8", "bf16_fp8", "bf16_656"}

#endif
