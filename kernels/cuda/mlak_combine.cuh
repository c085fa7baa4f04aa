/* mlak_combine.cuh - kernel 3 of a launch: parts become outputs, and the host hears of it.
 *
 *     block      walks the folded rows that were split; thread i owns columns 2i, 2i + 1 of each
 * row order      splits are merged in their order, never in that of their arrival: the same launch gives the same bits
 *     the end    the last block to finish writes each row's result, then the completion word */
#include "mlak_items.cuh"

/* Folded row `folded` of a request. Unrolled, so that several parts are on their way at a time. */
__device__ static void combine_row(const struct mlak_cuda_job *job, uint32_t index, uint32_t folded)
{
    const uint64_t part = MLAK_CUDA_PART_FLOATS;
    const struct mlak_row *row = &job->rows[index];
    const struct mlak_cuda_request *request = &job->requests[index];
    uint32_t block = folded / job->rows_per_item, r = folded % job->rows_per_item, column = threadIdx.x * 2;
    const float *parts = job->parts + (request->first_slot + (uint64_t)block * request->splits) * part;
    const float *maxima = parts + MLAK_CUDA_M * MLAK_V + r, *sums = maxima + MLAK_CUDA_M;
    float top = -INFINITY, sum = 0, o[2] = {0, 0};
#pragma unroll 8
    for (uint32_t s = 0; s < request->splits; s++)
        top = fmaxf(top, maxima[s * part]);
#pragma unroll 4
    for (uint32_t s = 0; s < request->splits; s++) {
        const float *from = parts + s * part + r * MLAK_V + column;
        float own = maxima[s * part], low = from[0], high = from[1];
        bool seen = own != -INFINITY; /* no visible key in it: nothing to add, and -inf - -inf is NaN */
        float weight = seen ? power_of_two(own - top) : 0;
        sum += seen ? weight * sums[s * part] : 0;
        o[0] += seen ? weight * low : 0;
        o[1] += seen ? weight * high : 0;
    }
    struct item_end end = item_end(row, folded % row->heads, top, sum);
    item_store(row, folded, column, o[0], o[1], end.factor);
    if (threadIdx.x == 0 && row->lse != NULL)
        row->lse[folded] = end.lse;
}

MLAK_KERNEL(mlak_cuda_combine, MLAK_CUDA_THREADS, struct mlak_cuda_job job)
{
    uint32_t *last = (uint32_t *)(void *)mlak_shared;
    for (uint32_t merge = blockIdx.x; merge < job.schedule->merges; merge += gridDim.x) {
        uint32_t index = item_request<&mlak_cuda_request::first_merge>(&job, merge);
        combine_row(&job, index, merge - job.requests[index].first_merge);
    }
    __threadfence_system();
    __syncthreads();
    if (threadIdx.x == 0)
        *last = atomicAdd(&job.schedule->blocks_done, 1u) == gridDim.x - 1;
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
