/* mlak_wgmma_loads.cuh - the loads of Hopper's split kernel, one warpgroup: it walks the schedule, and brings keys and
 * q to shared memory, by the copy engine (TMA) where that can be, else by cp.async. mlak_wgmma.cuh has the picture. */
#ifndef MLAK_WGMMA_LOADS_CUH
#define MLAK_WGMMA_LOADS_CUH

#include "mlak_wgmma_shared.cuh"

/* The warps of the loads have each an arrival at keys_full, and all but one at q_full. Copies by cp.async, of a thread
 * of any of them, add one more, which comes when they have landed. */
enum { WGMMA_LOAD_WARPS = WGMMA_GROUP / 32, WGMMA_FETCHER = 0, WGMMA_SEEKER = WGMMA_LOAD_WARPS - 1 };

/* Tiles go to the L2 cache so many before they are fetched, where so many blocks abreast fetch them: they all come to a
 * key at once, and would all wait for memory. Where it is fewer, memory is what bounds, and has enough to do. */
enum { WGMMA_AHEAD = 2, WGMMA_EXPECT_ABREAST = 4 };

/* Until there is room for a half of tile `count`. */
__device__ static inline void wgmma_await_room(struct wgmma_shared *shared, uint32_t half, uint32_t count)
{
    barrier_wait(&shared->keys_empty[count % WGMMA_STAGES][half], count / WGMMA_STAGES % 2 ^ 1);
}

/* A piece will come by the copy engine: one thread says so for all warps. */
__device__ static inline void wgmma_promise(uint64_t *full, uint32_t chunks)
{
    barrier_arrive_many(full, WGMMA_LOAD_WARPS - 1);
    barrier_arrive_expecting(full, chunks * WGMMA_CHUNK);
}

/* All of a warp's copies so far are told to the barrier, and that there are no more. */
__device__ static inline void wgmma_told(uint64_t *full)
{
    barrier_join_after_copies(full);
    warp_meet();
    if (threadIdx.x % 32 == 0)
        barrier_arrive(full);
}

/* Set off the copies of 16 of tile i's keys by each warp, eight lanes each chunk of a key, each piece as soon as there
 * is room for it. `address`: of the warp's key lane % 16, or ITEM_NOBODY. */
__device__ static inline void wgmma_copy_keys(struct wgmma_shared *shared, const uint8_t *kv, int64_t address,
                                              uint32_t i, uint32_t count)
{
    uint32_t warp = threadIdx.x % WGMMA_GROUP / 32, lane = threadIdx.x % 32, stage = count % WGMMA_STAGES;
    uint32_t to[2]; /* of even and odd fours of keys: what is left is known at compile time */
    const uint8_t *from[4];
    bool seen[4];
#pragma unroll
    for (uint32_t four = 0; four < 4; four++) {
        int64_t at = shuffle(address, four * 4 + lane / 8);
        seen[four] = at != ITEM_NOBODY;
        from[four] = kv + (seen[four] ? at : 0) + lane % 8 * 16;
        if (four < 2)
            to[four] = shared_address(shared->keys[stage][0]) + wgmma_at(warp * 16 + four * 4 + lane / 8, lane);
    }
#pragma unroll 1
    for (uint32_t n = 0; n < WGMMA_PIECES; n++) {
        uint32_t piece = wgmma_piece(n, i % 2), first = wgmma_first(piece);
        if (wgmma_begins_half(n))
            wgmma_await_room(shared, piece / 2, count);
        for (uint32_t chunk = first; chunk < first + wgmma_chunks(n); chunk++)
#pragma unroll
            for (uint32_t four = 0; four < 4; four++)
                copy_async_to(to[four % 2] + chunk * WGMMA_CHUNK + four / 2 * 1024, from[four] + chunk * 128,
                              seen[four]);
        wgmma_told(&shared->keys_full[stage][piece]);
    }
}

/* Tiles [i, end) of an item by cp.async, 16 keys of each by this warp. Whose page is asked for a tile ahead. */
__device__ static inline void wgmma_copy_tiles(struct wgmma_shared *shared, const struct mlak_cuda_job *job,
                                               struct wgmma_item *slot, uint32_t i, uint32_t end, uint32_t begun)
{
    enum { LOOK_UP = 32 }; /* tiles between two looks at whether anybody still wants the result */
    uint32_t key = threadIdx.x % WGMMA_GROUP / 32 * 16 + threadIdx.x % 16;
    const struct mlak_cuda_item *item = &slot->item;
    const struct mlak_row *row = &slot->row;
    struct item_key asked;
    if (i < end)
        asked = item_ask(item, row, item->tile + i, key);
#pragma unroll 1
    for (; i < end; i++) {
        int failed = 0;
        int64_t address = item_settle(job, item, row, &asked, &failed);
        if (failed || (threadIdx.x % WGMMA_GROUP == 0 && i % LOOK_UP == LOOK_UP - 1 && item_cancelled(job, item)))
            wgmma_stop(slot);
        if (wgmma_stopped(slot))
            address = ITEM_NOBODY; /* nothing is read any more, but all go on counting tiles */
        if (i + 1 < end)
            asked = item_ask(item, row, item->tile + i + 1, key);
        wgmma_copy_keys(shared, row->kv, address, i, begun + i);
    }
}

/* The same of a tile that is seen whole, by the copy engine, in boxes of two chunks of all its keys, which lie in one
 * page. One warp, all of it with the same page and slot. Short, and no lane has a condition or an address of its own:
 * what computes displaces this code from the instruction cache between any two tiles, and registers that are not the
 * same for a warp are copied, one by one, to those that the instruction takes. */
__device__ static inline void wgmma_fetch_tile(struct wgmma_shared *shared, const struct mlak_cuda_map *maps,
                                               uint64_t stays, int32_t page, int32_t slot, uint32_t owner,
                                               uint32_t count)
{
    uint32_t stage = count % WGMMA_STAGES, to = shared_address(shared->keys[stage][0]);
#pragma unroll
    for (uint32_t half = 0; half < 2; half++) {
        wgmma_await_room(shared, half ^ owner, count);
        if (!warp_speaker())
            continue;
#pragma unroll
        for (uint32_t n = half * 2; n < (half == 0 ? 2 : WGMMA_PIECES); n++) {
            uint32_t piece = wgmma_piece(n, owner), chunk = wgmma_first(piece), chunks = wgmma_chunks(n);
            uint64_t *full = &shared->keys_full[stage][piece];
            wgmma_promise(full, chunks);
            copy_box(to + chunk * WGMMA_CHUNK, &maps[chunks - 1], 0, slot, (int32_t)chunk, page, full, stays);
        }
    }
}

/* The same in boxes of one chunk of so many keys of one page each; lane i names the place of box i. One warp. */
__device__ static inline void wgmma_fetch_boxes(struct wgmma_shared *shared, const struct mlak_cuda_map *maps,
                                                uint64_t stays, uint32_t boxes, int32_t page, int32_t slot,
                                                uint32_t owner, uint32_t count)
{
    uint32_t lane = threadIdx.x % 32, stage = count % WGMMA_STAGES, box = WGMMA_CHUNK / boxes;
#pragma unroll 1
    for (uint32_t n = 0; n < WGMMA_PIECES; n++) {
        uint32_t piece = wgmma_piece(n, owner), chunk = wgmma_first(piece), chunks = wgmma_chunks(n);
        uint64_t *full = &shared->keys_full[stage][piece];
        if (wgmma_begins_half(n))
            wgmma_await_room(shared, piece / 2, count);
        uint32_t to = shared_address(shared->keys[stage][chunk]) + lane * box;
        warp_meet(); /* all of it have seen keys_empty */
        if (lane == 0)
            wgmma_promise(full, chunks);
        warp_meet();
        for (uint32_t c = 0; c < chunks && lane < boxes; c++)
            copy_box(to + c * WGMMA_CHUNK, &maps[0], 0, slot, (int32_t)(chunk + c), page, full, stays);
    }
}

/* A tile that is fetched later comes to the L2 cache: each of the blocks abreast asks for its share of the pieces. */
__device__ static inline void wgmma_expect_tile(const struct mlak_cuda_job *job, const struct mlak_cuda_map *maps,
                                                uint64_t stays, int32_t page, int32_t slot)
{
    if (!warp_speaker())
        return;
#pragma unroll 1
    for (uint32_t piece = blockIdx.x % job->abreast; piece < WGMMA_PIECES; piece += job->abreast)
        expect_box(&maps[wgmma_chunks(piece) - 1], 0, slot, (int32_t)wgmma_first(piece), page, stays);
}

/* Lane `lane`'s value, and the compiler takes it for the same in all. */
__device__ static inline int32_t wgmma_of_lane(uint32_t value, uint32_t lane)
{
    return (int32_t)warp_uniform(__shfl_sync(0xffffffff, value, (int)lane));
}

/* Tiles [i, end) of an item by the copy engine. One warp: a lane knows the page of one box of several tiles, and asks
 * for that of a later one. */
__device__ static inline void wgmma_fetch_tiles(struct wgmma_shared *shared, const struct mlak_cuda_job *job,
                                                struct wgmma_item *slot, uint32_t i, uint32_t end, uint32_t begun)
{
    const struct mlak_cuda_item *item = &slot->item;
    uint32_t lane = threadIdx.x % 32, boxes = MLAK_CUDA_TILE / item->box_rows, tiles = 32 / boxes; /* at a time */
    const struct mlak_row *row = &slot->row;
    const struct mlak_cuda_map *maps = item_maps(job, item);
    uint32_t key = lane % boxes * item->box_rows;
    uint64_t stays = job->abreast > 1 ? MLAK_COMES_AGAIN : MLAK_COMES_ONCE;
    bool expects = boxes == 1 && job->abreast >= WGMMA_EXPECT_ABREAST;
    struct item_key asked = {};
    if (job->n_sources > 1) /* each lane: any of them may be the one that fetches */
        for (uint32_t n = 0; n < 2; n++)
            map_acquire(&maps[n]);
    if (i + lane / boxes < end)
        asked = item_ask(item, row, item->tile + i + lane / boxes, key);
#pragma unroll 1
    while (i < end) {
        struct item_key known = asked;
        asked.seen = false;
        if (i + tiles + lane / boxes < end)
            asked = item_ask(item, row, item->tile + i + tiles + lane / boxes, key);
        int failed = 0;
        item_settle(job, item, row, &known, &failed);
        if (__any_sync(0xffffffff, failed || (lane == 0 && i >= tiles && item_cancelled(job, item))))
            wgmma_stop(slot);
        uint32_t page = wgmma_stopped(slot) ? row->pages : (uint32_t)known.page; /* zeros come of no page */
#pragma unroll 1
        for (uint32_t n = 0; n < tiles && i < end; n++, i++) {
            if (boxes > 1) {
                uint32_t from = n * boxes + lane % boxes;
                wgmma_fetch_boxes(shared, maps, stays, boxes, (int32_t)__shfl_sync(0xffffffff, page, (int)from),
                                  (int32_t)__shfl_sync(0xffffffff, known.slot, (int)from), i % 2, begun + i);
                continue;
            }
            if (expects && n + WGMMA_AHEAD < tiles && i + WGMMA_AHEAD < end)
                wgmma_expect_tile(job, maps, stays, wgmma_of_lane(page, n + WGMMA_AHEAD),
                                  wgmma_of_lane((uint32_t)known.slot, n + WGMMA_AHEAD));
            wgmma_fetch_tile(shared, maps, stays, wgmma_of_lane(page, n), wgmma_of_lane((uint32_t)known.slot, n),
                             i % 2, begun + i);
        }
    }
}

/* Four rows at a time, by all warps but the one that fetches keys. Rows beyond the item's are zeros. */
__device__ static inline void wgmma_load_q(struct wgmma_shared *shared, const struct mlak_cuda_item *item,
                                           const uint8_t *q)
{
    uint32_t warp = threadIdx.x % WGMMA_GROUP / 32, lane = threadIdx.x % 32;
#pragma unroll 1
    for (uint32_t r = (warp - 1) * 4 + lane / 8; r < WGMMA_ROWS; r += (WGMMA_LOAD_WARPS - 1) * 4) {
        uint32_t to = shared_address(shared->q[0]) + wgmma_at(r, lane);
        bool there = r < item->rows;
        const uint8_t *from = q + (uint64_t)(item->first_row + (there ? r : 0)) * (MLAK_D * 2) + lane % 8 * 16;
#pragma unroll
        for (uint32_t chunk = 0; chunk < WGMMA_CHUNKS; chunk++)
            copy_async_to(to + chunk * WGMMA_CHUNK, from + chunk * 128, there);
    }
}

/* An item and its row go into a slot. One warp. */
__device__ static inline void wgmma_fill(const struct mlak_cuda_job *job, const struct mlak_cuda_item *item,
                                         struct wgmma_item *slot)
{
    row_copy(job, item, &slot->row, threadIdx.x % 32, 32);
    warp_meet();
    if (threadIdx.x % 32 > 0)
        return;
    slot->item = *item;
    slot->tiles = item->end_tile - item->tile;
    slot->scale = slot->row.score_scale * ITEM_LOG2_E;
    item_done(job); /* or will be soon */
}

/* The schedule's next item that is to be computed, into a slot. One warp. */
__device__ static inline void wgmma_seek(const struct mlak_cuda_job *job, struct mlak_cuda_walk *walk,
                                         struct wgmma_item *slot)
{
    struct mlak_cuda_item item;
    bool there, wanted = true;
    do {
        there = schedule_next(job, job->requests, walk, &item);
        if (there) {
            int code = read_once(&job->rows[item.request].code);
            wanted = !__any_sync(0xffffffff, code != MLAK_ROW_OK || item_cancelled(job, &item));
        }
    } while (there && !wanted);
    if (!there) {
        if (threadIdx.x % 32 == 0)
            slot->tiles = 0;
        return;
    }
    wgmma_fill(job, &item, slot);
    if (threadIdx.x % 32 > 0)
        return;
    item_look_around(job, &slot->item, &slot->row);
    slot->stopped = false;
}

/* What the block begins with. */
__device__ static inline void wgmma_start(const struct mlak_cuda_job *job, struct wgmma_item *slot)
{
    const struct mlak_cuda_start *start = &job->starts[blockIdx.x];
    if (threadIdx.x % 32 == 0)
        slot->tiles = slot->stopped = 0;
    if (start->there)
        wgmma_fill(job, &start->item, slot);
}

static_assert((uint32_t)MLAK_MAX_Q <= MLAK_CUDA_TILE, ""); /* so two tiles at most are copied before q is loaded */

/* All tiles of all items. The first warp fetches those that the copy engine can; all copy the others, at an item's
 * ends. Meanwhile the others load q, and the last one looks for the next item: that takes as long as several look-ups
 * of memory, one after the other. */
__device__ static inline void wgmma_loads(struct wgmma_shared *shared, const struct mlak_cuda_job *job)
{
    uint32_t warp = warp_uniform(threadIdx.x % WGMMA_GROUP / 32), begun = 0;
    struct mlak_cuda_walk walk;
    if (warp == WGMMA_SEEKER) {
        wgmma_start(job, &shared->items[0]);
        walk = job->starts[blockIdx.x].next;
    }
    for (uint32_t items = 0;; items++) {
        struct wgmma_item *slot = &shared->items[items % WGMMA_ITEMS];
        barrier_meet(WGMMA_LOADERS, WGMMA_GROUP); /* the item is there */
        uint32_t tiles = slot->tiles, fetch = slot->item.fetch, fetch_end = slot->item.fetch_end;
        if (tiles > 0)
            wgmma_copy_tiles(shared, job, slot, 0, fetch, begun);
        if (warp != WGMMA_FETCHER) {
            barrier_wait(&shared->q_empty, items % 2 ^ 1);
            if (tiles > 0)
                wgmma_load_q(shared, &slot->item, slot->row.q);
            wgmma_told(&shared->q_full); /* and with it, the slot is the others'; without tiles, the last word */
        }
        if (tiles == 0)
            return;
        if (warp == WGMMA_SEEKER)
            wgmma_seek(job, &walk, &shared->items[(items + 1) % WGMMA_ITEMS]);
        if (warp == WGMMA_FETCHER && fetch < fetch_end)
            wgmma_fetch_tiles(shared, job, slot, fetch, fetch_end, begun);
        if (fetch_end < tiles) {
            barrier_meet(WGMMA_LOADERS, WGMMA_GROUP); /* parities tell two phases apart, and no more */
            wgmma_copy_tiles(shared, job, slot, fetch_end, tiles, begun);
        }
        begun += tiles;
    }
}

#endif
