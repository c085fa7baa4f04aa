/* mlak_combine.cuh - kernel 3 of a launch: parts become outputs, and the host hears of it.
 *
 *     warp       takes a piece of a folded row that was split at a time: one, two or four quarters of 128 columns, as
 *                there are enough warps; lane i owns columns 4i..4i+3 of each quarter
 * row order      splits are merged in their order, never in that of their arrival: the same launch gives the same bits
 *     the end    the last block to finish writes each row's result, then the completion word
 *
 * What it does is wait for memory: so each look-up is made by all lanes at once, and several parts are on their way at
 * a time. */
#include "mlak_items.cuh"

enum { COMBINE_QUARTERS = 4, COMBINE_COLUMNS = MLAK_V / COMBINE_QUARTERS };

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

__device__ static inline const float *combine_part(const struct mlak_cuda_job *job, const struct combine_parts *parts,
                                                   uint32_t i)
{
    uint64_t share = parts->first_share + i;
    uint32_t slot = parts->share == 0 ? parts->first_slot + i
                                      : item_slot(share * parts->abreast + parts->own,
                                                  share * parts->share >= parts->begin);
    return job->parts + (uint64_t)slot * MLAK_CUDA_PART_FLOATS;
}

__device__ static inline float combine_most(float value) /* of the warp */
{
    for (int lanes = 16; lanes > 0; lanes /= 2)
        value = fmaxf(value, __shfl_xor_sync(0xffffffff, value, lanes));
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

/* Quarters [quarter, end) of folded row `folded` of a request. */
__device__ static void combine_row(const struct mlak_cuda_job *job, uint32_t index, uint32_t folded, uint32_t quarter,
                                   uint32_t end_quarter)
{
    const struct mlak_row *row = &job->rows[index];
    uint32_t r = folded % job->rows_per_item, lane = threadIdx.x % 32;
    const struct combine_parts parts = combine_find(job, &job->requests[index], folded / job->rows_per_item);
    if (parts.written || row->code != MLAK_ROW_OK)
        return;
    float top = -INFINITY;
    for (uint32_t i = lane; i < parts.count; i += 32)
        top = fmaxf(top, combine_part(job, &parts, i)[part_maximum(r)]);
    top = combine_most(top);
    for (; quarter < end_quarter; quarter++) {
        uint32_t column = quarter * COMBINE_COLUMNS + lane * 4;
        float sum = 0;
        float4 o = make_float4(0, 0, 0, 0);
#pragma unroll 8
        for (uint32_t i = 0; i < parts.count; i++) {
            const float *part = combine_part(job, &parts, i);
            float4 value = *(const float4 *)(const void *)(part + part_o(r, column));
            float own = part[part_maximum(r)];
            float weight = own == -INFINITY ? 0 : power_of_two(own - top); /* not -inf - -inf */
            bool counts = weight != 0; /* what a part without a visible key holds may be NaN */
            sum += counts ? weight * part[part_sum(r)] : 0;
            o.x += counts ? weight * value.x : 0;
            o.y += counts ? weight * value.y : 0;
            o.z += counts ? weight * value.z : 0;
            o.w += counts ? weight * value.w : 0;
        }
        struct item_end end = item_end(row, folded % row->heads, top, sum);
        item_store(row, folded, column, o.x, o.y, end.factor);
        item_store(row, folded, column + 2, o.z, o.w, end.factor);
        if (quarter == 0 && lane == 0 && row->lse != NULL)
            row->lse[folded] = end.lse;
    }
}

MLAK_KERNEL(mlak_cuda_combine, MLAK_CUDA_THREADS, struct mlak_cuda_job job)
{
    uint32_t *last = (uint32_t *)(void *)mlak_shared;
    uint64_t warps = gridDim.x * (MLAK_CUDA_THREADS / 32), merges = job.schedule->merges;
    uint32_t pieces = merges * 4 <= warps ? 4 : merges * 2 <= warps ? 2 : 1, quarters = COMBINE_QUARTERS / pieces;
    for (uint64_t piece = blockIdx.x * (MLAK_CUDA_THREADS / 32) + threadIdx.x / 32; piece < merges * pieces;
         piece += warps) {
        uint32_t merge = (uint32_t)(piece / pieces), quarter = (uint32_t)(piece % pieces) * quarters;
        uint32_t index = combine_request(&job, merge);
        combine_row(&job, index, merge - job.requests[index].first_merge, quarter, quarter + quarters);
    }
    __syncthreads();
    if (threadIdx.x == 0) { /* what the others wrote happened before the barrier, and so before the fence */
        __threadfence_system();
        *last = atomicAdd(&job.schedule->blocks_done, 1u) == gridDim.x - 1;
    }
    __syncthreads();
    if (!*last)
        return;
    __threadfence();
    bool refused = job.schedule->refused != MLAK_OK;
    for (uint32_t i = threadIdx.x; i < job.count && !refused; i += MLAK_CUDA_THREADS) {
        const struct mlak_row *row = &job.rows[i];
        struct mlak_cuda_row_result *result = &job.row_results[i];
        result->code = row->code;
        result->detail[0] = row->detail[0];
        result->detail[1] = row->detail[1];
        result->local_len = row->local_len;
    }
    __threadfence_system();
    __syncthreads();
    if (threadIdx.x == 0) {
        job.schedule->blocks_done = 0;
        publish(&job.result->done, job.ticket);
    }
}
