/* mlak_combine.cuh - kernel 3 of a launch: parts become outputs, and the host hears of it.
 *
 *     block      walks the folded rows that were split; thread i owns columns 2i, 2i + 1 of each
 * row order      splits are merged in their order, never in that of their arrival: the same launch gives the same bits
 *     the end    the last block to finish writes each row's result, then the completion word */
#include "mlak_items.cuh"

enum { COMBINE_CHUNK = 128 }; /* parts whose weights are computed at a time */

struct combine_shared {
    float weight[COMBINE_CHUNK], top;
    uint32_t index, last;
};
static_assert(sizeof(struct combine_shared) <= MLAK_CUDA_COMBINE_SHARED, "");

/* The parts of a row block, in the order of their tiles. */
struct combine_parts {
    uint32_t count;
    bool written; /* its one part went to out */
    uint64_t first_block, begin, share; /* thread blocks from first_block on; begin: the row block's first tile */
    uint32_t first_slot;
};

__device__ static inline struct combine_parts combine_find(const struct mlak_cuda_job *job,
                                                           const struct mlak_cuda_request *request, uint32_t block)
{
    struct combine_parts parts = {0, false, 0, 0, job->schedule->share, 0};
    if (request->tiles == 0)
        return parts;
    if (parts.share == 0) {
        parts.count = request->splits;
        parts.first_slot = request->first_slot + block * request->splits;
    } else {
        parts.begin = request->first + (uint64_t)block * request->tiles;
        parts.first_block = parts.begin / parts.share;
        parts.count = (uint32_t)((parts.begin + request->tiles - 1) / parts.share - parts.first_block + 1);
    }
    parts.written = parts.count == 1;
    return parts;
}

__device__ static inline const float *combine_part(const struct mlak_cuda_job *job, const struct combine_parts *parts,
                                                   uint32_t i)
{
    uint64_t block = parts->first_block + i;
    uint32_t slot = parts->share == 0 ? parts->first_slot + i : item_slot(block, block * parts->share >= parts->begin);
    return job->parts + (uint64_t)slot * MLAK_CUDA_PART_FLOATS;
}

/* Warp 0: the maximum of all parts. */
__device__ static float combine_top(const struct mlak_cuda_job *job, const struct combine_parts *parts, uint32_t r)
{
    float top = -INFINITY;
    for (uint32_t i = threadIdx.x; i < parts->count; i += 32)
        top = fmaxf(top, combine_part(job, parts, i)[MLAK_CUDA_M * MLAK_V + r]);
    for (int lanes = 16; lanes > 0; lanes /= 2)
        top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, lanes));
    return top;
}

/* Folded row `folded` of a request; all threads. Unrolled, so that several parts are on their way at a time. */
__device__ static void combine_row(const struct mlak_cuda_job *job, struct combine_shared *shared, uint32_t index,
                                   uint32_t folded)
{
    const struct mlak_row *row = &job->rows[index];
    uint32_t r = folded % job->rows_per_item, column = threadIdx.x * 2;
    const struct combine_parts parts = combine_find(job, &job->requests[index], folded / job->rows_per_item);
    if (parts.written || row->code != MLAK_ROW_OK)
        return;
    float o[2] = {0, 0}, top = -INFINITY, sum = 0;
    if (threadIdx.x < 32) {
        top = combine_top(job, &parts, r);
        if (threadIdx.x == 0)
            shared->top = top;
    }
    for (uint32_t first = 0; first < parts.count; first += COMBINE_CHUNK) {
        uint32_t count = (uint32_t)row_least(parts.count - first, COMBINE_CHUNK);
        __syncthreads(); /* top is there; weights are no longer in use */
        top = shared->top;
        if (threadIdx.x < count) {
            float own = combine_part(job, &parts, first + threadIdx.x)[MLAK_CUDA_M * MLAK_V + r];
            shared->weight[threadIdx.x] = own == -INFINITY ? 0 : power_of_two(own - top); /* not -inf - -inf */
        }
        __syncthreads();
#pragma unroll 8
        for (uint32_t i = 0; i < count; i++) {
            const float *part = combine_part(job, &parts, first + i);
            float weight = shared->weight[i], low = part[r * MLAK_V + column], high = part[r * MLAK_V + column + 1];
            sum += weight * part[MLAK_CUDA_M * (MLAK_V + 1) + r];
            o[0] += weight == 0 ? 0 : weight * low; /* what a part without a visible key holds may be NaN */
            o[1] += weight == 0 ? 0 : weight * high;
        }
    }
    struct item_end end = item_end(row, folded % row->heads, top, sum);
    item_store(row, folded, column, o[0], o[1], end.factor);
    if (threadIdx.x == 0 && row->lse != NULL)
        row->lse[folded] = end.lse;
}

MLAK_KERNEL(mlak_cuda_combine, MLAK_CUDA_THREADS, struct mlak_cuda_job job)
{
    struct combine_shared *shared = (struct combine_shared *)(void *)mlak_shared;
    for (uint32_t merge = blockIdx.x; merge < job.schedule->merges; merge += gridDim.x) {
        for (uint32_t i = threadIdx.x; i < job.count; i += MLAK_CUDA_THREADS) /* a search would wait for each step */
            if (job.requests[i].first_merge <= merge &&
                merge < (i + 1 < job.count ? job.requests[i + 1].first_merge : job.schedule->merges))
                shared->index = i;
        __syncthreads();
        uint32_t index = shared->index;
        combine_row(&job, shared, index, merge - job.requests[index].first_merge);
        __syncthreads(); /* shared memory is the next row's */
    }
    __syncthreads();
    if (threadIdx.x == 0) { /* what the others wrote happened before the barrier, and so before the fence */
        __threadfence_system();
        shared->last = atomicAdd(&job.schedule->blocks_done, 1u) == gridDim.x - 1;
    }
    __syncthreads();
    if (!shared->last)
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
