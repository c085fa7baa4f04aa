/* mlak_combine.cuh - kernel 3 of a launch: parts become outputs, and the host hears of it.
 *
 *     warp       takes a piece of a folded row that was split at a time: all of its 512 columns, a half, a quarter or
 *                an eighth, as there are enough warps
 *     lane       owns 4 or 2 neighbouring columns of each step of a warp; looks at one of 32 parts' maximum and sum
 *     row order  splits are merged in their order, never in that of their arrival: the same launch gives the same bits
 *     the end    the last block to finish writes each row's result, then the completion word
 *
 * What it does is wait for memory: so each look-up is made by all lanes at once, and many parts are on their way at a
 * time. */
#include "mlak_items.cuh"

enum { COMBINE_MOST_PIECES = 8 };

/* The parts of a row block, in the order of their tiles. */
struct combine_parts {
    uint32_t count;
    bool written; /* its one part went to out */
    uint64_t first_share, begin, share; /* shares from first_share on; begin: the strip's first tile */
    uint32_t abreast, own;              /* which of the thread blocks of a share */
    uint32_t first_slot;
};

__device__ static inline struct combine_parts combine_find(const struct mlak_cuda_job *job,
                                                           const struct mlak_cuda_request *request, uint32_t block)
{
    struct combine_parts parts = {0, false, 0, 0, job->schedule->share, job->abreast, block % job->abreast, 0};
    if (request->tiles == 0)
        return parts;
    if (parts.share == 0) {
        parts.count = request->splits;
        parts.first_slot = request->first_slot + block * request->splits;
    } else {
        parts.begin = request->first + (uint64_t)(block / job->abreast) * request->tiles;
        parts.first_share = parts.begin / parts.share;
        parts.count = (uint32_t)((parts.begin + request->tiles - 1) / parts.share - parts.first_share + 1);
    }
    parts.written = parts.count == 1;
    return parts;
}

__device__ static inline uint32_t combine_slot(const struct combine_parts *parts, uint32_t i)
{
    uint64_t share = parts->first_share + i;
    return parts->share == 0 ? parts->first_slot + i
                             : item_slot(share * parts->abreast + parts->own, share * parts->share >= parts->begin);
}

__device__ static inline float combine_most(float value) /* of the warp */
{
    for (int lanes = 16; lanes > 0; lanes /= 2)
        value = fmaxf(value, __shfl_xor_sync(0xffffffff, value, lanes));
    return value;
}

__device__ static inline float combine_sum(float value) /* of the warp */
{
    for (int lanes = 16; lanes > 0; lanes /= 2)
        value += __shfl_xor_sync(0xffffffff, value, lanes);
    return value;
}

/* The request of folded row `merge`: the last that begins at or before it. Two looks of 32 requests find one of
 * 1024. */
__device__ static uint32_t combine_request(const struct mlak_cuda_job *job, uint32_t merge)
{
    uint32_t lane = threadIdx.x % 32, found = 0;
    for (uint32_t step = 32; step > 0; step = step == 32 ? 1 : 0) {
        uint32_t i = found + lane * step;
        bool begins = i < job->count && job->requests[i].first_merge <= merge;
        found = (uint32_t)combine_most(begins ? (float)i : 0);
    }
    return found;
}
static_assert(MLAK_CUDA_MAX_REQUESTS <= 32 * 32, "two looks");

/* WIDTH neighbouring columns, or what they add up to. */
template <int WIDTH> struct combine_columns {
    float at[WIDTH];
};
template <int WIDTH> __device__ static inline struct combine_columns<WIDTH> combine_load(const float *from)
{
    if constexpr (WIDTH == 4) {
        const float4 all = *(const float4 *)(const void *)from;
        return {{all.x, all.y, all.z, all.w}};
    } else {
        const float2 all = *(const float2 *)(const void *)from;
        return {{all.x, all.y}};
    }
}

/* Columns [column, end) of folded row `folded` of a request. */
template <int WIDTH>
__device__ static inline void combine_row(const struct mlak_cuda_job *job, uint32_t index, uint32_t folded,
                                          uint32_t column, uint32_t end)
{
    enum { AT_A_TIME = 32 / WIDTH };
    const struct mlak_row here = row_here(job, index, job->requests[index].source), *row = &here;
    uint32_t r = folded % job->rows_per_item, lane = threadIdx.x % 32;
    const struct combine_parts parts = combine_find(job, &job->requests[index], folded / job->rows_per_item);
    if (parts.written || row->code != MLAK_ROW_OK)
        return;
    float top = -INFINITY;
    for (uint32_t i = lane; i < parts.count; i += 32)
        top = fmaxf(top, job->parts[(uint64_t)combine_slot(&parts, i) * MLAK_CUDA_PART_FLOATS + part_maximum(r)]);
    top = combine_most(top);
    for (bool speaks = column == 0 && lane == 0; column < end; column += 32 * WIDTH, speaks = false) {
        struct combine_columns<WIDTH> o = {};
        float sum = 0;
        for (uint32_t first = 0; first < parts.count; first += 32) {
            uint32_t own = first + lane, count = (uint32_t)row_least(parts.count - first, 32), slot = 0;
            float weight = 0;
            if (own < parts.count) {
                slot = combine_slot(&parts, own);
                const float *part = job->parts + (uint64_t)slot * MLAK_CUDA_PART_FLOATS;
                float maximum = part[part_maximum(r)];
                weight = maximum == -INFINITY ? 0 : power_of_two(maximum - top); /* not -inf - -inf */
                sum += weight == 0 ? 0 : weight * part[part_sum(r)];
            }
            for (uint32_t at = 0; at < count; at += AT_A_TIME) {
                struct combine_columns<WIDTH> values[AT_A_TIME];
#pragma unroll
                for (uint32_t i = 0; i < AT_A_TIME; i++) {
                    uint32_t from = __shfl_sync(0xffffffff, slot, (int)(at + i));
                    const float *part = job->parts + (uint64_t)from * MLAK_CUDA_PART_FLOATS;
                    values[i] = at + i < count ? combine_load<WIDTH>(part + part_o(r, column + lane * WIDTH))
                                               : combine_columns<WIDTH>{};
                }
#pragma unroll
                for (uint32_t i = 0; i < AT_A_TIME; i++) {
                    float by = __shfl_sync(0xffffffff, weight, (int)(at + i));
#pragma unroll
                    for (uint32_t j = 0; j < WIDTH; j++) /* what a part without a visible key holds may be NaN */
                        o.at[j] += by == 0 ? 0 : by * values[i].at[j];
                }
            }
        }
        struct item_end outcome = item_end(row, folded % row->heads, top, combine_sum(sum));
#pragma unroll
        for (uint32_t j = 0; j < WIDTH; j += 2)
            item_store(row, folded, column + lane * WIDTH + j, o.at[j], o.at[j + 1], outcome.factor);
        if (speaks && row->lse != NULL)
            row->lse[folded] = outcome.lse;
    }
}

MLAK_KERNEL(mlak_cuda_combine, MLAK_CUDA_THREADS, struct mlak_cuda_job job)
{
    enum { WARPS = MLAK_CUDA_THREADS / 32 };
    uint32_t *last = (uint32_t *)(void *)mlak_shared;
    await_kernel_before();
    uint64_t warps = gridDim.x * WARPS, merges = job.schedule->merges;
    uint32_t pieces = COMBINE_MOST_PIECES;
    while (merges * pieces > warps && pieces > 1)
        pieces /= 2;
    uint64_t busy = (uint64_t)row_least(row_most((int64_t)(merges * pieces + WARPS - 1) / WARPS, 1), gridDim.x);
    if (blockIdx.x >= busy) /* the first one always has something to say */
        return;
    for (uint64_t piece = blockIdx.x * WARPS + threadIdx.x / 32; piece < merges * pieces; piece += warps) {
        uint32_t merge = (uint32_t)(piece / pieces), columns = MLAK_V / pieces;
        uint32_t column = (uint32_t)(piece % pieces) * columns, index = combine_request(&job, merge);
        uint32_t folded = merge - job.requests[index].first_merge;
        if (pieces == COMBINE_MOST_PIECES)
            combine_row<2>(&job, index, folded, column, column + columns);
        else
            combine_row<4>(&job, index, folded, column, column + columns);
    }
    __syncthreads();
    if (threadIdx.x == 0) { /* what the others wrote happened before the barrier, and so before the fence */
        __threadfence();
        *last = atomicAdd(&job.schedule->blocks_done, 1u) == busy - 1;
    }
    __syncthreads();
    if (!*last)
        return;
    __threadfence();
    for (uint32_t i = threadIdx.x; i < job.count; i += MLAK_CUDA_THREADS) {
        const struct mlak_row *row = &job.rows[i];
        struct mlak_cuda_row_result *result = &job.row_results[i];
        result->code = row->code;
        result->detail[0] = row->detail[0];
        result->detail[1] = row->detail[1];
        result->local_len = row->local_len;
    }
    if (threadIdx.x < job.n_sources)
        job.result->sources[threadIdx.x].code = job.schedule->refused[threadIdx.x];
    __threadfence_system(); /* also for what the other blocks wrote, as far as this one has seen it: all of it */
    __syncthreads();
    if (threadIdx.x == 0) {
        job.schedule->blocks_done = 0;
        publish(&job.result->done, job.ticket);
    }
}
