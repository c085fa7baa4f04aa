/* mlak_prepare.cuh - kernel 1 of a launch, one block: client arrays become rows of the request table, and the rows
 * become the schedule of the split kernel.
 *
 *     thread i      1. copies entries i, i + 1024, ... of cu_q, and judges the copies (the first fault counts)
 *                   2. fills row i from the batch; reads its length, its tree masks once
 *                   3. counts its items; sums over the block give its first item and slot
 *     shared        struct prepare_shared, 24.6 KB
 *
 * What a client may change meanwhile is read once and only the copy is used, so every later kernel of the launch agrees
 * on lengths and splits whatever the client does. */
#include "mlak_cuda.h"
#include "mlak_ptx.cuh"
#include "mlak_rows.h"

struct prepare_shared {
    unsigned long long work; /* tiles of all blocks of all requests */
    uint32_t first_fault;    /* entry of cu_q */
    float q_scale, k_scale, v_scale;
    uint32_t items[2][MLAK_CUDA_PREPARE_THREADS], slots[2][MLAK_CUDA_PREPARE_THREADS],
        merges[2][MLAK_CUDA_PREPARE_THREADS]; /* running sums, two steps of them */
};

enum { PREPARE_MIN_TILES = 4 }; /* of a split: the combine of shorter ones costs more than it spreads */

__device__ static float prepare_scale(const struct mlak_scale *scale, float absent)
{
    return !scale->present ? absent : scale->tensor != NULL ? read_once(scale->tensor) : scale->value;
}

__device__ static void prepare_cu_q(const struct mlak_cuda_job *job, struct prepare_shared *shared, uint32_t thread)
{
    const struct mlak_batch *batch = &job->batch;
    for (uint32_t i = thread; i <= batch->batch; i += MLAK_CUDA_PREPARE_THREADS)
        job->cu_q[i] = read_once(&batch->cu_q[i]);
    __syncthreads();
    for (uint32_t i = thread; i <= batch->batch; i += MLAK_CUDA_PREPARE_THREADS)
        if (row_judge_cu_q(i, job->cu_q[i], i ? job->cu_q[i - 1] : 0, batch->q_rows) != ROW_CU_Q_OK) {
            atomicMin(&shared->first_fault, i);
            break;
        }
    __syncthreads();
}

__device__ static void prepare_row(const struct mlak_cuda_job *job, const struct prepare_shared *shared, uint32_t i)
{
    const struct mlak_batch *batch = &job->batch;
    struct mlak_row *row = &job->rows[i];
    uint32_t b = job->first + i, q_len;
    uint64_t token;
    if (batch->has_cu_q) {
        token = (uint64_t)job->cu_q[b];
        q_len = (uint32_t)(job->cu_q[b + 1] - job->cu_q[b]);
    } else {
        q_len = (uint32_t)(batch->q_rows / batch->batch);
        token = (uint64_t)b * q_len;
    }
    row_describe(row, batch, b, token, q_len, shared->q_scale, shared->k_scale, shared->v_scale);
    row_set_length(row, read_once(&batch->seqlens[b]));
    if (batch->mask == MLAK_MASK_TREE) {
        uint64_t valid = row_tree_bits(row);
        for (uint32_t t = 0; t < q_len; t++)
            row->tree_mask[t] = read_once(&batch->tree_mask[token + t]) & valid;
    }
}

/* Blocks and tiles of a row. A row without a visible key has no tile, and still outputs to write. */
__device__ static void prepare_extent(const struct mlak_row *row, uint32_t rows_per_item,
                                      struct mlak_cuda_request *request)
{
    request->blocks = row->code == MLAK_ROW_OK ? (row->q_len * row->heads + rows_per_item - 1) / rows_per_item : 0;
    request->first_tile = request->tiles = 0;
    if (request->blocks == 0)
        return;
    uint64_t bits;
    struct mlak_visible any = row_visible_any(row, 0, row->q_len, &bits);
    if (any.hi <= any.lo)
        return;
    request->first_tile = (uint32_t)(any.lo / MLAK_CUDA_TILE);
    request->tiles = (uint32_t)((any.hi - 1) / MLAK_CUDA_TILE) + 1 - request->first_tile;
}

/* Tiles of each of the row's splits: with `deterministic`, from the row alone. */
__device__ static uint32_t prepare_split_tiles(const struct mlak_cuda_job *job, const struct mlak_cuda_request *request,
                                               unsigned long long work)
{
    if (!job->batch.deterministic) {
        uint64_t even = (work + job->target_items - 1) / job->target_items;
        return (uint32_t)row_most((int64_t)even, PREPARE_MIN_TILES);
    }
    int64_t most = row_most(MLAK_CUDA_FIXED_SLOTS / row_most(request->blocks, 1), 1); /* splits */
    return (uint32_t)row_most((request->tiles + most - 1) / most, MLAK_CUDA_FIXED_TILES);
}

MLAK_KERNEL(mlak_cuda_prepare, MLAK_CUDA_PREPARE_THREADS, struct mlak_cuda_job job)
{
    struct prepare_shared *shared = (struct prepare_shared *)(void *)mlak_shared;
    const struct mlak_batch *batch = &job.batch;
    uint32_t thread = threadIdx.x;
    if (thread == 0) {
        shared->work = 0;
        shared->first_fault = UINT32_MAX;
        shared->q_scale = prepare_scale(&batch->q_scale, 1);
        shared->k_scale = prepare_scale(&batch->k_scale, 1);
        shared->v_scale = prepare_scale(&batch->v_scale, shared->k_scale);
    }
    __syncthreads();
    if (batch->has_cu_q)
        prepare_cu_q(&job, shared, thread);
    uint32_t fault = shared->first_fault;
    if (fault != UINT32_MAX) {
        if (thread == 0) {
            job.result->batch_index = fault;
            job.result->batch_value = job.cu_q[fault];
            job.result->batch_before = fault ? job.cu_q[fault - 1] : 0;
            job.result->batch_code = job.schedule->refused = MLAK_BATCH;
            job.schedule->items = job.schedule->slots = job.schedule->merges = 0;
        }
        return;
    }

    struct mlak_cuda_request request = {};
    if (thread < job.count) {
        prepare_row(&job, shared, thread);
        prepare_extent(&job.rows[thread], job.rows_per_item, &request);
        atomicAdd(&shared->work, (unsigned long long)request.blocks * request.tiles);
    }
    __syncthreads();
    request.split_tiles = prepare_split_tiles(&job, &request, shared->work);
    request.splits =
        request.tiles > request.split_tiles ? (request.tiles + request.split_tiles - 1) / request.split_tiles : 1;
    uint32_t items = request.blocks * request.splits, slots = request.splits > 1 ? items : 0;
    uint32_t merges = request.splits > 1 && request.blocks > 0 ? job.rows[thread].q_len * job.rows[thread].heads : 0;

    /* Inclusive sums by doubling: after step s, entry i holds the sum of the 2^s entries that end at i. */
    uint32_t now = 0;
    shared->items[0][thread] = items;
    shared->slots[0][thread] = slots;
    shared->merges[0][thread] = merges;
    __syncthreads();
    for (uint32_t reach = 1; reach < MLAK_CUDA_PREPARE_THREADS; reach *= 2, now ^= 1) {
        uint32_t before = thread >= reach ? thread - reach : UINT32_MAX;
        shared->items[now ^ 1][thread] =
            shared->items[now][thread] + (before != UINT32_MAX ? shared->items[now][before] : 0);
        shared->slots[now ^ 1][thread] =
            shared->slots[now][thread] + (before != UINT32_MAX ? shared->slots[now][before] : 0);
        shared->merges[now ^ 1][thread] =
            shared->merges[now][thread] + (before != UINT32_MAX ? shared->merges[now][before] : 0);
        __syncthreads();
    }
    request.first_item = shared->items[now][thread] - items;
    request.first_slot = shared->slots[now][thread] - slots;
    request.first_merge = shared->merges[now][thread] - merges;
    if (thread < job.count)
        job.requests[thread] = request;
    if (thread == MLAK_CUDA_PREPARE_THREADS - 1) {
        job.schedule->items = shared->items[now][thread];
        job.schedule->slots = shared->slots[now][thread];
        job.schedule->merges = shared->merges[now][thread];
        job.schedule->split_tiles = request.split_tiles;
        job.result->batch_code = job.schedule->refused = MLAK_OK;
    }
}
