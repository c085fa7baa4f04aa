/* mlak_prepare.cuh - kernel 1 of a launch, one block: client arrays become rows of the request table, and the rows
 * become the schedule of the split kernel.
 *
 *     thread i      1. copies entries i, i + 1024, ... of cu_q, and judges the copies (the first fault counts)
 *                   2. fills row i from the batch; reads its length, its tree masks once
 *                   3. counts its tiles; sums over the block say where it begins
 *                   4. finds where share i of the split kernel's work begins
 *     shared        struct prepare_shared, 32.8 KB
 *
 * What a client may change meanwhile is read once and only the copy is used, so every later kernel of the launch agrees
 * on lengths and splits whatever the client does. */
#include "mlak_items.cuh"

struct prepare_shared {
    uint32_t first_fault; /* entry of cu_q */
    float q_scale, k_scale, v_scale;
    /* running sums, two steps of them */
    uint64_t first[2][MLAK_CUDA_PREPARE_THREADS];
    uint32_t slots[2][MLAK_CUDA_PREPARE_THREADS], merges[2][MLAK_CUDA_PREPARE_THREADS];
};
static_assert(sizeof(struct prepare_shared) <= MLAK_CUDA_PREPARE_SHARED, "");

enum { PREPARE_MIN_TILES = 2 }; /* of a share: the combine of shorter ones costs more than it spreads */

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
__device__ static void prepare_extent(const struct mlak_row *row, uint32_t rows_per_item, uint32_t abreast,
                                      struct mlak_cuda_request *request)
{
    request->blocks = row->code == MLAK_ROW_OK ? (row->q_len * row->heads + rows_per_item - 1) / rows_per_item : 0;
    request->strips = (request->blocks + abreast - 1) / abreast;
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

/* Deterministic: the request's splits, from its row alone. */
__device__ static void prepare_splits(struct mlak_cuda_request *request)
{
    uint32_t most = (uint32_t)row_most(MLAK_CUDA_FIXED_SLOTS / row_most(request->blocks, 1), 1);
    request->split_tiles = (uint32_t)row_most((request->tiles + most - 1) / most, MLAK_CUDA_FIXED_TILES);
    request->splits = (request->tiles + request->split_tiles - 1) / request->split_tiles;
}

/* Folded rows of a request that combine has to look at. */
__device__ static uint32_t prepare_merges(const struct mlak_cuda_request *request, const struct mlak_row *row,
                                          uint64_t share)
{
    uint64_t end = request->first + (uint64_t)request->strips * request->tiles;
    bool whole = share ? request->first / share == (end - 1) / share : request->splits == 1;
    return request->blocks == 0 || (request->tiles > 0 && whole) ? 0 : row->q_len * row->heads;
}

/* Inclusive sums by doubling: after step s, entry i holds the sum of the 2^s entries that end at i. Entries from
 * `count` on are no one's. Returns which of the two steps holds the result. */
template <typename T>
__device__ static uint32_t prepare_sum(T sums[2][MLAK_CUDA_PREPARE_THREADS], T own, uint32_t count)
{
    uint32_t now = 0, thread = threadIdx.x;
    sums[0][thread] = own;
    __syncthreads();
    for (uint32_t reach = 1; reach < count; reach *= 2, now ^= 1) {
        sums[now ^ 1][thread] = sums[now][thread] + (thread >= reach ? sums[now][thread - reach] : 0);
        __syncthreads();
    }
    return now;
}

MLAK_KERNEL(mlak_cuda_prepare, MLAK_CUDA_PREPARE_THREADS, struct mlak_cuda_job job)
{
    struct prepare_shared *shared = (struct prepare_shared *)(void *)mlak_shared;
    const struct mlak_batch *batch = &job.batch;
    uint32_t thread = threadIdx.x;
    if (thread == 0) {
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
            job.schedule->work = job.schedule->slots = job.schedule->merges = 0;
        }
        return;
    }

    struct mlak_cuda_request request = {};
    if (thread < job.count) {
        prepare_row(&job, shared, thread);
        prepare_extent(&job.rows[thread], job.rows_per_item, job.abreast, &request);
        if (batch->deterministic)
            prepare_splits(&request);
    }
    uint64_t own = (uint64_t)request.strips * (batch->deterministic ? request.splits : request.tiles);
    uint32_t now = prepare_sum(shared->first, own, job.count);
    uint64_t work = shared->first[now][job.count - 1];
    uint32_t shares = job.grid / job.abreast;
    uint64_t share = batch->deterministic ? 0 : (uint64_t)row_most((int64_t)((work + shares - 1) / shares),
                                                                   PREPARE_MIN_TILES);
    request.first = shared->first[now][thread] - own;

    uint32_t slots = 0, merges = 0;
    if (batch->deterministic) {
        slots = request.splits > 1 ? request.blocks * request.splits : 0;
        now = prepare_sum(shared->slots, slots, job.count);
        request.first_slot = shared->slots[now][thread] - slots;
        slots = shared->slots[now][job.count - 1];
    }
    if (thread < job.count)
        merges = prepare_merges(&request, &job.rows[thread], share);
    now = prepare_sum(shared->merges, merges, job.count);
    request.first_merge = shared->merges[now][thread] - merges;
    merges = shared->merges[now][job.count - 1];

    if (thread < job.count)
        job.requests[thread] = request;
    if (thread == 0) {
        job.schedule->work = work;
        job.schedule->share = share;
        job.schedule->slots = slots;
        job.schedule->merges = merges;
        job.result->batch_code = job.schedule->refused = MLAK_OK;
    }
    __syncthreads(); /* requests can be read */
    if (thread < shares && thread * share < work) {
        uint32_t index = item_request(job.requests, job.count, thread * share);
        uint64_t within = thread * share - job.requests[index].first;
        struct mlak_cuda_start start = {index, 0, 0};
        if (!batch->deterministic) {
            start.strip = (uint32_t)(within / job.requests[index].tiles);
            start.tile = (uint32_t)(within % job.requests[index].tiles);
        }
        job.starts[thread] = start;
    }
}
