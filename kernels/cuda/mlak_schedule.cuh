/* mlak_schedule.cuh - the schedule's items: how a thread block of a split kernel walks through its share of them, and
 * where their parts lie.
 *
 * Nothing here depends on a tile's shape in a split kernel, nor on its number of threads. */
#ifndef MLAK_SCHEDULE_CUH
#define MLAK_SCHEDULE_CUH

#include "mlak_cuda.h"
#include "mlak_ptx.cuh"
#include "mlak_rows.h"

/* The last request that begins at or before `at`. Requests without any tile begin where the next one does, and are
 * passed over. */
__device__ static inline uint32_t item_request(const struct mlak_cuda_request *requests, uint32_t count, uint64_t at)
{
    uint32_t low = 0, high = count;
    while (high - low > 1) {
        uint32_t middle = (low + high) / 2;
        if (requests[middle].first <= at)
            low = middle;
        else
            high = middle;
    }
    return low;
}

/* Slots of the parts of thread block `block` of the split kernel: of the item that its share begins with, and of the
 * one that it ends with, if that is another. */
__device__ static inline uint32_t item_slot(uint64_t block, bool begins)
{
    return (uint32_t)(block * 2 + (begins ? 0 : 1));
}

/* Nobody wants the result of the item's source any more. */
__device__ static inline bool item_cancelled(const struct mlak_cuda_job *job, const struct mlak_cuda_item *item)
{
    return read_once(&job->schedule->cancelled[item->source]) == job->ticket;
}

/* In a slot, counted in floats: O of row `r` of the item, not normalised; its maximum, of log2 scores; its sum. */
__device__ static inline uint32_t part_o(uint32_t r, uint32_t column)
{
    return r * MLAK_V + column;
}
__device__ static inline uint32_t part_maximum(uint32_t r)
{
    return MLAK_CUDA_M * MLAK_V + r;
}
__device__ static inline uint32_t part_sum(uint32_t r)
{
    return MLAK_CUDA_M * (MLAK_V + 1) + r;
}

/* ---- a thread block's share ---- */

/* Thread block `block`'s share, but where it begins in its request. */
__device__ static inline struct mlak_cuda_walk schedule_share(const struct mlak_cuda_job *job, uint32_t block,
                                                              uint64_t share, uint64_t work)
{
    uint32_t shares = job->grid / job->abreast, own = block / job->abreast;
    struct mlak_cuda_walk walk = {share ? own * share : block, work, 0, share, block, 0, 0, 0};
    if (share)
        walk.end = own < shares ? (uint64_t)row_least((int64_t)(walk.at + share), (int64_t)work) : 0;
    walk.first = walk.at;
    return walk;
}

/* The next item: which it is, its tiles, and where it goes. False: there is none. `requests` are the job's. */
__device__ static inline bool schedule_next(const struct mlak_cuda_job *job, const struct mlak_cuda_request *requests,
                                            struct mlak_cuda_walk *walk, struct mlak_cuda_item *item)
{
    const struct mlak_cuda_request *request;
    do {
        uint64_t at = walk->at;
        bool begins = at == walk->first;
        if (at >= walk->end)
            return false;
        item->part = NULL;
        if (walk->share == 0) {
            item->request = item_request(requests, job->count, at);
            request = &requests[item->request];
            uint32_t own = (uint32_t)(at - request->first), split = own / request->blocks;
            item->block = own % request->blocks;
            item->tile = split * request->split_tiles;
            item->end_tile = (uint32_t)row_least(item->tile + request->split_tiles, request->tiles);
            if (request->splits > 1)
                item->part = job->parts + (request->first_slot + (uint64_t)item->block * request->splits + split) *
                                              MLAK_CUDA_PART_FLOATS;
            walk->at += job->grid;
            continue;
        }
        walk->strip += begins ? 0 : 1;
        item->tile = begins ? walk->tile : 0;
        while (request = &requests[walk->request], walk->strip >= request->strips || request->tiles == 0) {
            walk->request++;
            walk->strip = 0;
        }
        item->request = walk->request;
        item->block = walk->strip * job->abreast + walk->block % job->abreast;
        item->end_tile = (uint32_t)row_least(item->tile + (int64_t)(walk->end - at), request->tiles);
        if (item->tile > 0 || item->end_tile < request->tiles)
            item->part = job->parts + (uint64_t)item_slot(walk->block, begins) * MLAK_CUDA_PART_FLOATS;
        walk->at += (item->end_tile < request->tiles ? item->end_tile : request->room) - item->tile;
    } while (item->block >= request->blocks); /* a last strip may have less row blocks */
    item->source = request->source;
    item->box_rows = request->box_rows;
    item->tile += request->first_tile;
    item->end_tile += request->first_tile;
    return true;
}

#endif
