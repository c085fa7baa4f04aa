/* mlak_wgmma.cuh - kernel 2 of a launch on Hopper (sm_90a), of bf16 and fp16: attention of 64 folded rows over a range
 * of key tiles, by four warpgroups that hand tiles to each other and are seldom at the same one.
 *
 *   warpgroup   what it does with tile n of 64 keys                                   registers a thread
 *   values 0    O[64][0..255]   = O * shrink + P V, 8 products of 64 x 128 x 16       160 (O is 128 of them)
 *   values 1    O[64][256..511]                                                       160
 *   scores      S = Q K^T, 36 products of 64 x 64 x 16; P = 2^(S - maximum)            96
 *   loads       page ids, keys, q: tiles that are seen whole by the copy engine       96
 *               (TMA), where boxes of the pages are a tile; else by cp.async, to which
 *               any page size will do, and zeros where no row of the item sees a key
 *
 *   shared memory, bytes                     barriers: full, and empty again
 *   q        9 chunks of 64 x 64     73728   q_full      loads -> scores        q_empty
 *   keys     2 stages of 9 chunks   147456   keys_full   loads -> scores        keys_empty, of each stage and piece:
 *   p        1 chunk                  8192                                      rope by scores, halves by their values
 *   the rest of wgmma_shared        ~ 1500   p_full      scores -> values       p_empty; sums_empty, of a whole item's
 *
 * The loads run ahead by two tiles, into the next item as well: while the values write an item out, the next one's keys
 * and q are on their way. They walk the schedule and tell the others through a ring of slots, shared->items. A slot is
 * written anew four items later, when its readers are long past it: an item has a tile at least, and the loads are two
 * tiles ahead of the values at most.
 *
 * The maximum that a row's weights refer to is that of its scores, so that the largest weight is 1 and not rounded; but
 * a larger one that would still be less than an eighth of all weights so far is let pass, as its rounding is lost among
 * theirs. So O need be touched in an item's first tiles only, unless few keys have nearly all weight. */
#include "mlak_items.cuh"
#include "mlak_ptx_sm90.cuh"
#include "mlak_types.cuh"

enum {
    WGMMA_ROWS = 64,
    WGMMA_CHUNK = WGMMA_ROWS * 128, /* bytes of 64 rows x 64 columns */
    WGMMA_CHUNKS = MLAK_D / 64,
    WGMMA_GROUP = 128, /* threads of a warpgroup */
    WGMMA_STAGES = 2,
    WGMMA_ITEMS = 4,   /* slots of the ring */
    WGMMA_LOADERS = 1, /* named barrier of the loads */
    WGMMA_SHARE = 8,   /* weights above 1 are less than 1 / 8 of their sum, */
    WGMMA_MOST = 256   /* and no more than this: fp16 ends at 65504 */
};
enum { WGMMA_VALUES_0, WGMMA_VALUES_1, WGMMA_SCORES, WGMMA_LOADS }; /* warpgroups */

/* A tile's keys in the order of their loading, which is that in which the room for them is given back: the rope, by
 * scores; columns 0..127 and 256..383, by values 0 and 1; and the rest of their halves. */
enum { WGMMA_ROPE, WGMMA_VALUES, WGMMA_PIECES = WGMMA_VALUES + 4 };
__device__ static constexpr uint32_t wgmma_piece(uint32_t values, uint32_t part)
{
    return WGMMA_VALUES + part * 2 + values;
}
__device__ static constexpr uint32_t wgmma_first(uint32_t piece) /* of its chunks */
{
    return piece == WGMMA_ROPE ? 8 : (piece - WGMMA_VALUES) % 2 * 4 + (piece - WGMMA_VALUES) / 2 * 2;
}
__device__ static constexpr uint32_t wgmma_chunks(uint32_t piece)
{
    return piece == WGMMA_ROPE ? 1 : 2;
}

struct wgmma_item {
    struct item item;
    uint32_t tiles; /* none: there is no item any more */
    int stopped;    /* a bad page, or the launch is cancelled: nothing is written */
};

struct wgmma_shared {
    unsigned char q[WGMMA_CHUNKS][WGMMA_CHUNK], keys[WGMMA_STAGES][WGMMA_CHUNKS][WGMMA_CHUNK], p[WGMMA_CHUNK];
    uint64_t q_full, q_empty, p_full, p_empty, sums_empty;
    uint64_t keys_full[WGMMA_STAGES][WGMMA_PIECES], keys_empty[WGMMA_STAGES][WGMMA_PIECES];
    struct wgmma_item items[WGMMA_ITEMS];
    float shrink[WGMMA_ROWS];                         /* of each row's O, before the tile's values are added */
    uint32_t shrinks[WGMMA_GROUP / 32];               /* whether any of a warp's 16 rows does */
    float maximum[WGMMA_ROWS], sum[WGMMA_ROWS]; /* of a whole item, with its last p */
};
static_assert(sizeof(struct wgmma_shared) <= MLAK_CUDA_SPLIT_SHARED_WGMMA, "");

/* ---- loads ---- */

/* Where piece `lane % 8`, 16 bytes, of row `row` of a chunk lies. */
__device__ static inline uint32_t wgmma_at(uint32_t row, uint32_t lane)
{
    return row * 128 + (lane % 8 ^ row % 8) * 16;
}

/* Set off the copies of tile `count`, each piece as soon as there is room for it: a warp has 16 keys, and eight lanes
 * each chunk of a key. `address`: of key lane % 16 of the warp, or ITEM_NOBODY. */
__device__ static inline void wgmma_copy_keys(struct wgmma_shared *shared, const uint8_t *kv, int64_t address,
                                              uint32_t count)
{
    uint32_t warp = threadIdx.x % WGMMA_GROUP / 32, lane = threadIdx.x % 32, stage = count % WGMMA_STAGES;
    uint32_t to[2]; /* of even and odd fours of keys: what is left is known at compile time */
    const uint8_t *from[4];
    bool seen[4];
#pragma unroll
    for (uint32_t i = 0; i < 4; i++) {
        int64_t at = shuffle(address, i * 4 + lane / 8);
        seen[i] = at != ITEM_NOBODY;
        from[i] = kv + (seen[i] ? at : 0) + lane % 8 * 16;
        if (i < 2)
            to[i] = shared_address(shared->keys[stage][0]) + wgmma_at(warp * 16 + i * 4 + lane / 8, lane);
    }
#pragma unroll
    for (uint32_t piece = 0; piece < WGMMA_PIECES; piece++) {
        barrier_wait(&shared->keys_empty[stage][piece], count / WGMMA_STAGES % 2 ^ 1);
#pragma unroll
        for (uint32_t chunk = wgmma_first(piece); chunk < wgmma_first(piece) + wgmma_chunks(piece); chunk++)
#pragma unroll
            for (uint32_t i = 0; i < 4; i++)
                copy_async_to(to[i % 2] + chunk * WGMMA_CHUNK + i / 2 * 1024, from[i] + chunk * 128, seen[i]);
        barrier_arrive_after_copies(&shared->keys_full[stage][piece]);
    }
}

/* The same of a tile that is seen whole, by the copy engine, in boxes of box_rows keys of one page. Lane i of the first
 * warp names the place of box i. All threads arrive, as they do when they copy. */
__device__ static inline void wgmma_fetch_keys(struct wgmma_shared *shared, const struct mlak_cuda_job *job,
                                               const struct item *item, int32_t page, int32_t slot, uint32_t count)
{
    uint32_t thread = threadIdx.x % WGMMA_GROUP, stage = count % WGMMA_STAGES, rows = item->box_rows;
    const struct mlak_cuda_map *maps = item_maps(job, item);
    bool whole = rows == WGMMA_ROWS, fetches = thread < WGMMA_ROWS / rows;
#pragma unroll
    for (uint32_t piece = 0; piece < WGMMA_PIECES; piece++) {
        uint64_t *full = &shared->keys_full[stage][piece];
        barrier_wait(&shared->keys_empty[stage][piece], count / WGMMA_STAGES % 2 ^ 1);
        if (thread > 0)
            barrier_arrive(full);
        else
            barrier_arrive_expecting(full, wgmma_chunks(piece) * WGMMA_CHUNK);
        if (thread < 32)
            warp_meet();
        uint32_t chunk = wgmma_first(piece), to = shared_address(shared->keys[stage][chunk]) + thread * rows * 128;
        bool two = wgmma_chunks(piece) == 2;
        if (fetches)
            copy_box(to, &maps[two && whole], 0, slot, (int32_t)chunk, page, full);
        if (fetches && two && !whole)
            copy_box(to + WGMMA_CHUNK, &maps[0], 0, slot, (int32_t)chunk + 1, page, full);
    }
}

/* Rows beyond the item's are zeros. */
__device__ static inline void wgmma_load_q(struct wgmma_shared *shared, const struct item *item, const uint8_t *q)
{
    uint32_t warp = threadIdx.x % WGMMA_GROUP / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (uint32_t i = 0; i < 4; i++) {
        uint32_t r = warp * 16 + i * 4 + lane / 8, to = shared_address(shared->q[0]) + wgmma_at(r, lane);
        bool there = r < item->rows;
        const uint8_t *from = q + (uint64_t)(item->first_row + (there ? r : 0)) * (MLAK_D * 2) + lane % 8 * 16;
#pragma unroll
        for (uint32_t chunk = 0; chunk < WGMMA_CHUNKS; chunk++)
            copy_async_to(to + chunk * WGMMA_CHUNK, from + chunk * 128, there);
    }
}

/* Nothing of the item is written any more. Those who wait for a tile that this thread loads later see it. */
__device__ static inline void wgmma_stop(struct wgmma_item *slot)
{
    *(volatile int *)&slot->stopped = 1;
    __threadfence_block();
}

/* Whether the copy engine can fetch a tile: it fetches what it finds, so all keys must be some row's. */
__device__ static inline bool wgmma_fetches(const struct item *item, uint32_t tile)
{
    int64_t c = (int64_t)tile * MLAK_CUDA_TILE;
    return item->box_rows > 0 && c >= item->any.lo && c + MLAK_CUDA_TILE <= item->any.base;
}

/* The page of the key whose place in the pool a thread has to know. */
__device__ static inline struct item_key wgmma_ask(const struct item *item, const struct mlak_row *row, uint32_t tile)
{
    uint32_t thread = threadIdx.x % WGMMA_GROUP, key = thread / 32 * 16 + thread % 16;
    if (wgmma_fetches(item, tile))
        key = row_least(thread * item->box_rows, MLAK_CUDA_TILE); /* from 64 on: nobody's */
    return item_ask(item, row, tile, key);
}

/* Tile i of the item, `count` of all, whose pages have been asked for; then asks for those of the next one. `item` and
 * `row` are copies, in registers. */
__device__ static inline void wgmma_load_tile(struct wgmma_shared *shared, const struct mlak_cuda_job *job,
                                              const struct item *item, const struct mlak_row *row,
                                              struct wgmma_item *slot, struct item_key *asked, uint32_t i,
                                              uint32_t count)
{
    enum { LOOK_UP = 32 }; /* tiles between two looks at whether anybody still wants the result */
    uint32_t tile = item->tile + i;
    int failed = 0;
    int64_t address = item_settle(row, &job->rows[item->request], asked, &failed);
    if (failed || (threadIdx.x % WGMMA_GROUP == 0 && i % LOOK_UP == LOOK_UP - 1 && item_cancelled(job, item)))
        wgmma_stop(slot);
    if (*(volatile int *)&slot->stopped)
        address = ITEM_NOBODY; /* nothing is read any more, but all go on counting tiles */
    int32_t page = address == ITEM_NOBODY ? (int32_t)row->pages : asked->page, key = (int32_t)asked->slot;
    if (tile + 1 < item->end_tile)
        *asked = wgmma_ask(item, row, tile + 1);
    if (wgmma_fetches(item, tile))
        wgmma_fetch_keys(shared, job, item, page, key, count);
    else
        wgmma_copy_keys(shared, row->kv, address, count);
}

/* The schedule's next item that is to be computed, into a slot. One thread. */
__device__ static inline void wgmma_next(const struct mlak_cuda_job *job, struct schedule_walk *walk,
                                         struct wgmma_item *slot)
{
    struct item item;
    slot->tiles = 0;
    slot->stopped = 0;
    while (schedule_next(job, walk, &item)) {
        const struct mlak_row *row = &job->rows[item.request];
        if (read_once(&row->code) != MLAK_ROW_OK || item_cancelled(job, &item))
            continue;
        item_look(&item, row, WGMMA_ROWS);
        slot->item = item;
        slot->tiles = item.end_tile - item.tile;
        break;
    }
}

/* All tiles of all items. The first thread looks for the next item when two tiles are on their way, since that takes as
 * long as several look-ups of memory, one after the other. */
__device__ static inline void wgmma_loads(struct wgmma_shared *shared, const struct mlak_cuda_job *job)
{
    enum { AHEAD = 2 };
    struct schedule_walk walk = schedule_begin(job);
    bool first = threadIdx.x % WGMMA_GROUP == 0;
    struct wgmma_item *slot = NULL, *next = &shared->items[0];
    uint32_t tiles = 0, count = 0;
    for (uint32_t items = 0;; items++) { /* this many items are on their way, and the one in `slot` is being loaded */
        struct item_key asked;
        struct item item = {};
        struct mlak_row row = {};
        if (tiles > 0) {
            item = slot->item;
            row = row_here(job, item.request, item.source);
            asked = wgmma_ask(&item, &row, item.tile);
            if (job->n_sources > 1 && item.box_rows > 0 && threadIdx.x % WGMMA_GROUP < WGMMA_ROWS / item.box_rows)
                for (uint32_t i = 0; i < 2; i++)
                    map_acquire(&item_maps(job, &item)[i]);
        }
#pragma unroll 1
        for (uint32_t i = 0;; i++, count++) {
            if (first && i == (uint32_t)row_least(tiles, AHEAD))
                wgmma_next(job, &walk, next);
            if (i == tiles)
                break;
            wgmma_load_tile(shared, job, &item, &row, slot, &asked, i, count);
            if (i > 0)
                continue;
            barrier_wait(&shared->q_empty, items % 2); /* of items - 1 */
            wgmma_load_q(shared, &item, row.q);
            barrier_arrive_after_copies(&shared->q_full);
            if (first)
                barrier_arrive(&shared->q_full); /* and with it, the slot is the others' */
        }
        barrier_meet(WGMMA_LOADERS, WGMMA_GROUP); /* the next item is there */
        slot = next;
        next = &shared->items[(items + 1) % WGMMA_ITEMS];
        tiles = slot->tiles;
        if (tiles > 0)
            continue;
        barrier_wait(&shared->q_empty, items % 2 ^ 1); /* the last word */
        barrier_arrive(&shared->q_full);
        if (first)
            barrier_arrive(&shared->q_full);
        return;
    }
}

/* ---- scores ---- */

/* What a thread knows of its two rows, lane / 4 of its warp's 16 and the one 8 below. */
struct wgmma_rows {
    float maximum[2], sum[2]; /* the sum of its own columns' weights */
    float whole[2];           /* of all columns' */
    float scale;              /* to log2 */
};

/* S += Q K^T over the columns of a piece, as soon as its keys are there. */
template <enum mlak_cuda_types TYPES, uint32_t PIECE>
__device__ static inline void wgmma_score_piece(struct wgmma_shared *shared, uint32_t count, float s[32])
{
    uint32_t q = operand_here(operand_rows(shared->q[wgmma_first(PIECE)]));
    uint32_t keys = operand_here(operand_rows(shared->keys[count % WGMMA_STAGES][wgmma_first(PIECE)]));
    barrier_wait(&shared->keys_full[count % WGMMA_STAGES][PIECE], count / WGMMA_STAGES % 2);
    shared_to_products(); /* what did not come by the copy engine */
    products_begin();
#pragma unroll
    for (uint32_t step = 0; step < wgmma_chunks(PIECE) * 4; step++) {
        uint32_t at = step / 4 * WGMMA_CHUNK + step % 4 * 32;
        bool add = PIECE != WGMMA_ROPE || step > 0;
        if (TYPES == MLAK_CUDA_FP16)
            product_64x64_fp16(s, operand_move(q, at), operand_move(keys, at), add);
        else
            product_64x64_bf16(s, operand_move(q, at), operand_move(keys, at), add);
    }
}

/* S of tile `count`. `last`: of the item, so that q is not needed any more. */
template <enum mlak_cuda_types TYPES>
__device__ static inline void wgmma_score_tile(struct wgmma_shared *shared, uint32_t count, bool last, float s[32])
{
    wgmma_score_piece<TYPES, 0>(shared, count, s);
    wgmma_score_piece<TYPES, 1>(shared, count, s);
    wgmma_score_piece<TYPES, 2>(shared, count, s);
    wgmma_score_piece<TYPES, 3>(shared, count, s);
    wgmma_score_piece<TYPES, 4>(shared, count, s);
    products_commit();
    products_wait<0>();
    if (threadIdx.x % 32 == 0) {
        barrier_arrive(&shared->keys_empty[count % WGMMA_STAGES][WGMMA_ROPE]);
        if (last)
            barrier_arrive(&shared->q_empty);
    }
}

/* -inf where a row does not see a key. */
__device__ static inline void wgmma_mask(const struct item *item, const struct mlak_row *row, uint32_t tile,
                                         float s[32])
{
    uint32_t warp = threadIdx.x % WGMMA_GROUP / 32, lane = threadIdx.x % 32;
    uint32_t visible[2] = {0, 0};
    for (uint32_t half = 0; half < 2; half++) {
        uint32_t token = item_token(item, row, warp * 16 + lane / 4 + half * 8);
        const struct mlak_visible sees = row_visible(row, token);
        uint64_t bits = row->tree_mask[token];
#pragma unroll 1
        for (uint32_t i = 0; i < 16; i++) {
            int64_t c = (int64_t)tile * MLAK_CUDA_TILE + i / 2 * 8 + lane % 4 * 2 + i % 2;
            bool sees_it = c >= sees.lo && c < sees.hi && (c < sees.base || row_tree_sees(row, bits, c));
            visible[half] |= (uint32_t)sees_it << i;
        }
    }
#pragma unroll
    for (uint32_t i = 0; i < 32; i++)
        s[i] = visible[i / 2 % 2] >> (i / 4 * 2 + i % 2) & 1 ? s[i] : -INFINITY;
}

/* S becomes P, in shared memory. `last`: of the item, whose sums and maxima follow. */
template <enum mlak_cuda_types TYPES>
__device__ static inline void wgmma_weigh(struct wgmma_shared *shared, const struct mlak_cuda_job *job,
                                          const struct item *item, struct wgmma_rows *rows, uint32_t tile,
                                          uint32_t count, uint32_t items, bool last, float s[32])
{
    uint32_t warp = threadIdx.x % WGMMA_GROUP / 32, lane = threadIdx.x % 32, r = warp * 16 + lane / 4;
    float shrink[2], from[2], scale = rows->scale;
    if (!(scale > 0)) { /* else it goes into the exponent, and the greatest score stays the greatest */
#pragma unroll
        for (uint32_t i = 0; i < 32; i++)
            s[i] *= scale;
        scale = 1;
    }
    if ((int64_t)tile * MLAK_CUDA_TILE < item->all_lo || ((int64_t)tile + 1) * MLAK_CUDA_TILE > item->all_end)
        wgmma_mask(item, &job->rows[item->request], tile, s);
#pragma unroll
    for (uint32_t half = 0; half < 2; half++) {
        float top = -INFINITY, before = rows->maximum[half];
#pragma unroll
        for (uint32_t i = 0; i < 16; i++)
            top = fmaxf(top, s[i / 2 * 4 + half * 2 + i % 2]);
        top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, 1));
        top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, 2)) * scale;
        float growth = power_of_two(top - before); /* infinite from -inf */
        bool follow = top > before && (growth * WGMMA_SHARE > rows->whole[half] || growth > WGMMA_MOST);
        shrink[half] = follow ? power_of_two(before - top) : 1;
        rows->maximum[half] = follow ? top : before;
        rows->sum[half] *= shrink[half];
        from[half] = rows->maximum[half] == -INFINITY ? 0 : rows->maximum[half]; /* nothing seen yet: weights are 0 */
    }
    bool any = __any_sync(0xffffffff, shrink[0] != 1 || shrink[1] != 1);
    barrier_wait(&shared->p_empty, count % 2 ^ 1);
    if (last)
        barrier_wait(&shared->sums_empty, items % 2 ^ 1);
    if (lane % 4 == 0) {
        shared->shrink[r] = shrink[0];
        shared->shrink[r + 8] = shrink[1];
    }
    if (lane == 0)
        shared->shrinks[warp] = any;
#pragma unroll
    for (uint32_t n = 0; n < 8; n++)
#pragma unroll
        for (uint32_t half = 0; half < 2; half++) {
            float low = power_of_two(fmaf(s[n * 4 + half * 2], scale, -from[half]));
            float high = power_of_two(fmaf(s[n * 4 + half * 2 + 1], scale, -from[half]));
            rows->sum[half] += low + high;
            uint32_t *to = (uint32_t *)(void *)(shared->p + wgmma_at(r + half * 8, n));
            to[lane % 4] = pack<TYPES>(low, high);
        }
#pragma unroll
    for (uint32_t half = 0; half < 2; half++) {
        float sum = rows->sum[half];
        sum += __shfl_xor_sync(0xffffffff, sum, 1);
        sum += __shfl_xor_sync(0xffffffff, sum, 2);
        rows->whole[half] = sum;
        if (last && lane % 4 == 0) {
            shared->maximum[r + half * 8] = rows->maximum[half];
            shared->sum[r + half * 8] = sum;
        }
    }
    shared_to_products();
    barrier_arrive(&shared->p_full);
}

template <enum mlak_cuda_types TYPES>
__device__ static inline void wgmma_scores(struct wgmma_shared *shared, const struct mlak_cuda_job *job)
{
    uint32_t count = 0;
    for (uint32_t items = 0;; items++) {
        const struct wgmma_item *slot = &shared->items[items % WGMMA_ITEMS];
        const struct item *item = &slot->item;
        barrier_wait(&shared->q_full, items % 2);
        shared_to_products();
        uint32_t tiles = slot->tiles, tile = item->tile;
        if (tiles == 0)
            break;
        float scale = job->rows[item->request].score_scale * ITEM_LOG2_E;
        struct wgmma_rows rows = {{-INFINITY, -INFINITY}, {0, 0}, {0, 0}, scale};
        for (uint32_t i = 0; i < tiles; i++, count++) {
            float s[32];
            wgmma_score_tile<TYPES>(shared, count, i + 1 == tiles, s);
            wgmma_weigh<TYPES>(shared, job, item, &rows, tile + i, count, items, i + 1 == tiles, s);
        }
    }
    barrier_wait(&shared->p_empty, count % 2 ^ 1);
    barrier_arrive(&shared->p_full); /* the last word goes on */
}

/* ---- values ---- */

/* The rows' outcome: to out and lse, or to their slot. */
__device__ static inline void wgmma_finish(const struct wgmma_shared *shared, const struct mlak_cuda_job *job,
                                           const struct item *item, uint32_t columns, const float o[128])
{
    const struct mlak_row here = row_here(job, item->request, item->source), *row = &here;
    uint32_t warp = threadIdx.x % WGMMA_GROUP / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (uint32_t half = 0; half < 2; half++) {
        uint32_t r = warp * 16 + lane / 4 + half * 8, folded = item->first_row + r, column = columns + lane % 4 * 2;
        bool speaks = columns == 0 && lane % 4 == 0;
        if (r >= item->rows)
            continue;
        float maximum = shared->maximum[r], sum = shared->sum[r];
        if (item->part == NULL) {
            struct item_end end = item_end(row, folded % row->heads, maximum, sum);
            uint32_t *to = item_out(row, folded, column);
#pragma unroll
            for (uint32_t n = 0; n < 32; n++)
                to[n * 4] = item_pack(row, o[n * 4 + half * 2], o[n * 4 + half * 2 + 1], end.factor);
            if (speaks && row->lse != NULL)
                row->lse[folded] = end.lse;
            continue;
        }
        float2 *to = (float2 *)(void *)(item->part + part_o(r, column));
#pragma unroll
        for (uint32_t n = 0; n < 32; n++)
            to[n * 4] = make_float2(o[n * 4 + half * 2], o[n * 4 + half * 2 + 1]);
        if (speaks) {
            item->part[part_maximum(r)] = maximum;
            item->part[part_sum(r)] = sum;
        }
    }
}

/* O of half `own` of the columns. */
template <enum mlak_cuda_types TYPES>
__device__ static inline void wgmma_values(struct wgmma_shared *shared, const struct mlak_cuda_job *job, uint32_t own)
{
    uint32_t warp = threadIdx.x % WGMMA_GROUP / 32, lane = threadIdx.x % 32, r = warp * 16 + lane / 4, count = 0;
    const uint32_t p = operand_rows(shared->p);
    float o[128];
    for (uint32_t items = 0;; items++) {
        const struct wgmma_item *slot = &shared->items[items % WGMMA_ITEMS];
        barrier_wait(&shared->p_full, count % 2);
        uint32_t tiles = slot->tiles;
        if (tiles == 0)
            break;
        for (uint32_t i = 0; i < tiles; i++, count++) {
            uint32_t stage = count % WGMMA_STAGES;
            uint32_t values = operand_columns(shared->keys[stage][own * 4], WGMMA_CHUNK);
            if (i > 0)
                barrier_wait(&shared->p_full, count % 2);
            if (i > 0 && shared->shrinks[warp]) {
                float upper = shared->shrink[r], lower = shared->shrink[r + 8];
#pragma unroll
                for (uint32_t n = 0; n < 128; n++)
                    o[n] *= n % 4 < 2 ? upper : lower;
            }
            products_begin();
#pragma unroll
            for (uint32_t part = 0; part < 2; part++) {
#pragma unroll
                for (uint32_t step = 0; step < MLAK_CUDA_TILE / 16; step++) {
                    uint32_t a = operand_move(p, step * 32);
                    uint32_t b = operand_move(values, part * 2 * WGMMA_CHUNK + step * 2048);
                    if (TYPES == MLAK_CUDA_FP16)
                        product_64x128_fp16(o + part * 64, a, b, i > 0 || step > 0);
                    else
                        product_64x128_bf16(o + part * 64, a, b, i > 0 || step > 0);
                }
                products_commit();
            }
            products_wait<1>();
            if (lane == 0)
                barrier_arrive(&shared->keys_empty[stage][wgmma_piece(own, 0)]);
            products_wait<0>();
            if (lane == 0)
                barrier_arrive(&shared->keys_empty[stage][wgmma_piece(own, 1)]);
            barrier_arrive(&shared->p_empty);
        }
        bool stopped = *(const volatile int *)&slot->stopped;
        if (!stopped)
            wgmma_finish(shared, job, &slot->item, own * 256, o);
        barrier_arrive(&shared->sums_empty);
        if (!stopped && own == 0 && threadIdx.x % WGMMA_GROUP == 0)
            item_done(job);
    }
}

/* ---- the kernel ---- */

template <enum mlak_cuda_types TYPES> __device__ static inline void wgmma_kernel(const struct mlak_cuda_job *job)
{
    struct wgmma_shared *shared = (struct wgmma_shared *)(void *)mlak_shared;
    uint32_t group = warp_uniform(threadIdx.x / WGMMA_GROUP);
    if (threadIdx.x == 0) {
        barrier_new(&shared->q_full, WGMMA_GROUP + 1);
        barrier_new(&shared->q_empty, WGMMA_GROUP / 32);
        barrier_new(&shared->p_full, WGMMA_GROUP);
        barrier_new(&shared->p_empty, 2 * WGMMA_GROUP);
        barrier_new(&shared->sums_empty, 2 * WGMMA_GROUP);
        for (uint32_t stage = 0; stage < WGMMA_STAGES; stage++)
            for (uint32_t piece = 0; piece < WGMMA_PIECES; piece++) {
                barrier_new(&shared->keys_full[stage][piece], WGMMA_GROUP);
                barrier_new(&shared->keys_empty[stage][piece], WGMMA_GROUP / 32);
            }
    }
    if (threadIdx.x == WGMMA_LOADS * WGMMA_GROUP && job->n_sources == 1 && job->source.box_rows > 0)
        for (uint32_t i = 0; i < 2; i++)
            map_expect(&job->source.keys[i]);
    __syncthreads();
    await_kernel_before();
    let_next_kernel_start();
    if (group == WGMMA_LOADS) {
        registers_give<96>();
        wgmma_loads(shared, job);
    } else if (group == WGMMA_SCORES) {
        registers_give<96>();
        wgmma_scores<TYPES>(shared, job);
    } else {
        registers_take<160>();
        wgmma_values<TYPES>(shared, job, group);
    }
}

#define WGMMA_KERNEL(name, TYPES)                                                                                      \
    MLAK_KERNEL(mlak_cuda_split_wgmma_##name, MLAK_CUDA_WGMMA_THREADS, struct mlak_cuda_job job)                       \
    {                                                                                                                  \
        wgmma_kernel<TYPES>(&job);                                                                                     \
    }
WGMMA_KERNEL(bf16, MLAK_CUDA_BF16)
WGMMA_KERNEL(fp16, MLAK_CUDA_FP16)
