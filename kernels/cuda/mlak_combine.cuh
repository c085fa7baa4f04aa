/* mlak_combine.cuh - kernel 3 of a launch: parts become outputs, and the host hears of it.
 *
 *     block      walks the (request, 16 folded rows) pairs that were split; thread i owns columns 2i, 2i + 1 of each
 * row order      splits are merged in their order, never in that of their arrival: the same launch gives the same bits
 *     the end    the last block to finish writes each row's result, then the completion word */
#include "mlak_items.cuh"

/* O, maximum and sum of a row that was split, merged; columns of this thread in `o`. */
__device__ static void combine_row(const float *parts, uint32_t splits, uint32_t r, uint32_t column, float o[2],
                                   float *maximum, float *sum)
{
    const uint64_t part = MLAK_CUDA_PART_FLOATS;
    const float *maxima = parts + MLAK_CUDA_M * MLAK_V, *sums = maxima + MLAK_CUDA_M;
    float top = -INFINITY;
    for (uint32_t s = 0; s < splits; s++)
        top = fmaxf(top, maxima[s * part + r]);
    *maximum = top;
    *sum = o[0] = o[1] = 0;
    for (uint32_t s = 0; s < splits; s++) {
        float own = maxima[s * part + r];
        if (own == -INFINITY)
            continue; /* no visible key in it: nothing to add, and -inf - -inf is NaN */
        float weight = power_of_two(own - top);
        *sum += weight * sums[s * part + r];
        o[0] += weight * parts[s * part + r * MLAK_V + column];
        o[1] += weight * parts[s * part + r * MLAK_V + column + 1];
    }
}

__device__ static void combine_block(const struct mlak_cuda_job *job, uint32_t index, uint32_t block)
{
    const struct mlak_row *row = &job->rows[index];
    const struct mlak_cuda_request *request = &job->requests[index];
    const float *parts = job->parts + (request->first_slot + (uint64_t)block * request->splits) * MLAK_CUDA_PART_FLOATS;
    uint32_t folded = row->q_len * row->heads, column = threadIdx.x * 2;
    for (uint32_t r = 0; r < MLAK_CUDA_M && block * MLAK_CUDA_M + r < folded; r++) {
        float o[2], maximum, sum;
        combine_row(parts, request->splits, r, column, o, &maximum, &sum);
        struct item_end end = item_end(row, (block * MLAK_CUDA_M + r) % row->heads, maximum, sum);
        item_store(row, block * MLAK_CUDA_M + r, column, o[0], o[1], end.factor);
        if (threadIdx.x == 0 && row->lse != NULL)
            row->lse[block * MLAK_CUDA_M + r] = end.lse;
    }
}

MLAK_KERNEL(mlak_cuda_combine, struct mlak_cuda_job job)
{
    uint32_t *last = (uint32_t *)(void *)mlak_shared;
    for (uint32_t item = blockIdx.x; item < job.schedule->items; item += gridDim.x) {
        uint32_t index = item_request(&job, item), local = item - job.requests[index].first_item;
        if (job.requests[index].splits > 1 && local < job.requests[index].blocks)
            combine_block(&job, index, local);
    }
    __threadfence_system();
    __syncthreads();
    if (threadIdx.x == 0)
        *last = atomicAdd(&job.schedule->blocks_done, 1u) == gridDim.x - 1;
    __syncthreads();
    if (!*last)
        return;
    __threadfence();
    bool refused = job.schedule->items == 0 && job.result->batch_code != MLAK_OK;
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
