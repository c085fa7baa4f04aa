/* mlak_prepare.cuh - kernel 1 of a launch, one block: client arrays become rows of the request table, and the rows
 * become the schedule of the split kernel.
 *
 *     thread i      1. finds the source of row i, if there are several
 *                   2. copies entries i, i + 1024, ... of cu_q; of several sources: row i's entry, and the last one's
 *                      or first one's beside it; judges the copies (the first fault of a source counts)
 *                   3. fills row i from the batch; reads its length, its tree masks once
 *                   4. counts its tiles; sums over the block say where it begins
 *                   5. lists what of it the combine kernel has to look at
 *                   6. looks up what thread block i of the split kernel begins with
 *     shared        struct prepare_shared, 14 KB
 *
 * What a client may change meanwhile is read once and only the copy is used, so every later kernel of the launch agrees
 * on lengths and splits whatever the client does. */
#include "mlak_items.cuh"

enum { PREPARE_WARPS = MLAK_CUDA_PREPARE_THREADS / 32 };

struct prepare_shared {
    uint64_t row[MLAK_CUDA_MAX_SOURCES];         /* as in mlak_cuda_source, if there are several */
    uint32_t first_fault[MLAK_CUDA_MAX_SOURCES]; /* entry of cu_q */
    bool given_up[MLAK_CUDA_MAX_SOURCES]; /* before it began: nothing of it is computed or written */
    float q_scale[MLAK_CUDA_MAX_SOURCES], k_scale[MLAK_CUDA_MAX_SOURCES], v_scale[MLAK_CUDA_MAX_SOURCES];
    uint64_t first[MLAK_CUDA_MAX_REQUESTS]; /* as in mlak_cuda_request, and tiles */
    uint32_t tiles[MLAK_CUDA_MAX_REQUESTS];
    uint64_t sums[2][PREPARE_WARPS]; /* of warps; two, since one sum may begin where another is still read */
};
static_assert(sizeof(struct prepare_shared) <= MLAK_CUDA_PREPARE_SHARED, "");

enum { PREPARE_MIN_TILES = 1 }; /* of a share */

__device__ static float prepare_scale(const struct mlak_scale *scale, float absent)
{
    return !scale->present ? absent : scale->tensor != NULL ? read_once(scale->tensor) : scale->value;
}

__device__ static void prepare_begin(const struct mlak_cuda_job *job, const struct mlak_cuda_source *source,
                                     struct prepare_shared *shared, uint32_t s)
{
    const struct mlak_batch *batch = &source->batch;
    shared->row[s] = source->row;
    shared->first_fault[s] = UINT32_MAX;
    shared->given_up[s] = read_once(&job->schedule->cancelled[s]) == job->ticket;
    shared->q_scale[s] = prepare_scale(&batch->q_scale, 1);
    shared->k_scale[s] = prepare_scale(&batch->k_scale, 1);
    shared->v_scale[s] = prepare_scale(&batch->v_scale, shared->k_scale[s]);
}

/* Entry i of a source's cu_q: the only look at the client's memory; then, of the copies, whether it is one. */
__device__ static void prepare_copy(const struct mlak_cuda_job *job, const struct mlak_cuda_source *source, uint32_t i)
{
    job->cu_q[source->cu_q + i] = read_once(&source->batch.cu_q[i]);
}
__device__ static bool prepare_judge(const struct mlak_cuda_job *job, const struct mlak_cuda_source *source,
                                     struct prepare_shared *shared, uint32_t s, uint32_t i)
{
    const int32_t *copy = job->cu_q + source->cu_q;
    if (row_judge_cu_q(i, copy[i], i ? copy[i - 1] : 0, source->batch.q_rows) == ROW_CU_Q_OK)
        return true;
    atomicMin(&shared->first_fault[s], i);
    return false;
}

/* Of the only source. */
__device__ static void prepare_cu_q(const struct mlak_cuda_job *job, struct prepare_shared *shared, uint32_t thread)
{
    const struct mlak_cuda_source *source = &job->source;
    for (uint32_t i = thread; i <= source->batch.batch; i += MLAK_CUDA_PREPARE_THREADS)
        prepare_copy(job, source, i);
    __syncthreads();
    for (uint32_t i = thread; i <= source->batch.batch; i += MLAK_CUDA_PREPARE_THREADS)
        if (!prepare_judge(job, source, shared, 0, i))
            break;
    __syncthreads();
}

/* Of several, whose batches are whole if they have any: what there is for row `thread`, of source s. */
__device__ static void prepare_all_cu_q(const struct mlak_cuda_job *job, struct prepare_shared *shared, uint32_t s,
                                        uint32_t thread)
{
    const struct mlak_cuda_source *source = &job->sources[s];
    bool own = thread < job->count && source->batch.has_cu_q;
    uint32_t i = thread - (uint32_t)shared->row[s];
    if (own && i == 0)
        prepare_copy(job, source, 0);
    if (own)
        prepare_copy(job, source, i + 1);
    __syncthreads();
    if (own && (i > 0 || prepare_judge(job, source, shared, s, 0)))
        prepare_judge(job, source, shared, s, i + 1);
    __syncthreads();
}

/* Row i of the job, of source s, and what of it the schedule needs; its folded rows. A row without a visible key has no
 * tile, and still outputs to write. What is computed with is a copy: the row itself lies in memory, and is only
 * written. */
__device__ static inline uint32_t prepare_row(const struct mlak_cuda_job *job, const struct mlak_cuda_source *source,
                                              const struct prepare_shared *shared, uint32_t s, uint32_t i,
                                              struct mlak_cuda_request *request)
{
    const struct mlak_batch *batch = &source->batch;
    struct mlak_row copy, *row = &job->rows[i];
    request->source = s;
    request->box_rows = source->box_rows;
    if (shared->first_fault[s] != UINT32_MAX || shared->given_up[s]) {
        row->code = MLAK_ROW_CANCELLED;
        row->local_len = row->detail[0] = row->detail[1] = 0;
        job->row_results[i] = {MLAK_ROW_CANCELLED, 0, {0, 0}, 0};
        return 0;
    }
    uint32_t b = source->first + i - source->row, q_len;
    int32_t length = read_once(&batch->seqlens[b]);
    uint64_t token;
    if (batch->has_cu_q) {
        const int32_t *cu_q = job->cu_q + source->cu_q;
        token = (uint64_t)cu_q[b];
        q_len = (uint32_t)(cu_q[b + 1] - cu_q[b]);
    } else {
        q_len = (uint32_t)(batch->q_rows / batch->batch);
        token = (uint64_t)b * q_len;
    }
    const float q_scale = shared->q_scale[s], k_scale = shared->k_scale[s], v_scale = shared->v_scale[s];
    row_describe(row, batch, b, token, q_len, q_scale, k_scale, v_scale);
    row_describe(&copy, batch, b, token, q_len, q_scale, k_scale, v_scale);
    row_set_length(&copy, length);
    row->global_len = copy.global_len;
    row->local_len = copy.local_len;
    row->detail[0] = copy.detail[0];
    row->detail[1] = copy.detail[1];
    row->code = copy.code;
    job->row_results[i] = {copy.code, 0, {copy.detail[0], copy.detail[1]}, copy.local_len};
    uint64_t valid = batch->mask == MLAK_MASK_TREE ? row_tree_bits(&copy) : 0;
    for (uint32_t t = 0; t < q_len; t++)
        row->tree_mask[t] = valid ? read_once(&batch->tree_mask[token + t]) & valid : 0;

    uint32_t folded = q_len * copy.heads;
    request->blocks = copy.code == MLAK_ROW_OK ? (folded + job->rows_per_item - 1) / job->rows_per_item : 0;
    request->strips = (request->blocks + job->abreast - 1) / job->abreast;
    if (request->blocks == 0)
        return folded;
    int64_t lo = row_local_count(&copy, row_global_start(&copy, 0)), hi = row_visible(&copy, q_len - 1).hi;
    if (hi <= lo)
        return folded;
    request->first_tile = (uint32_t)(lo / MLAK_CUDA_TILE);
    request->tiles = (uint32_t)((hi - 1) / MLAK_CUDA_TILE) + 1 - request->first_tile;
    return folded;
}

/* Deterministic: the request's splits, from its row alone. */
__device__ static void prepare_splits(struct mlak_cuda_request *request)
{
    uint32_t most = (uint32_t)row_most(MLAK_CUDA_FIXED_SLOTS / row_most(request->blocks, 1), 1);
    request->split_tiles = (uint32_t)row_most((request->tiles + most - 1) / most, MLAK_CUDA_FIXED_TILES);
    request->splits = (request->tiles + request->split_tiles - 1) / request->split_tiles;
}

/* The last request that begins at or before `at`: item_request's, by what is at hand. */
__device__ static uint32_t prepare_find(const uint64_t *first, uint32_t count, uint64_t at)
{
    uint32_t low = 0, high = count;
    while (high - low > 1) {
        uint32_t middle = (low + high) / 2;
        if (first[middle] <= at)
            low = middle;
        else
            high = middle;
    }
    return low;
}

/* What combine has to look at of request `index`, which has `folded` rows: how many entries, and, unless `to` is NULL,
 * these. */
__device__ static uint32_t prepare_merges(const struct mlak_cuda_job *job, const struct mlak_cuda_request *request,
                                          uint32_t index, uint32_t folded, uint64_t share, struct mlak_cuda_merge *to)
{
    uint32_t most = job->rows_per_item, count = 0;
    if (request->blocks == 0)
        return 0;
    if (request->tiles == 0) {
        if (to)
            *to = {index, request->source, 0, folded, 0, 0, 0, 0};
        return 1;
    }
    for (uint32_t strip = 0; strip < request->strips; strip++) {
        uint64_t begin = request->first + (uint64_t)strip * request->tiles;
        uint64_t first = share ? begin / share : 0, last = share ? (begin + request->tiles - 1) / share : 0;
        uint32_t parts = share ? (uint32_t)(last - first) + 1 : request->splits;
        if (parts == 1)
            continue; /* straight to out */
        for (uint32_t own = 0; own < job->abreast; own++) {
            uint32_t block = strip * job->abreast + own;
            if (block >= request->blocks)
                break;
            struct mlak_cuda_merge merge = {index, request->source, block * most,
                                            (uint32_t)row_least(folded - block * most, most), parts, 0, 0, 0};
            if (share) {
                merge.slot = item_slot(first * job->abreast + own, first * share >= begin);
                merge.next_slot = item_slot((first + 1) * job->abreast + own, true);
                merge.stride = item_slot(job->abreast, true);
            } else {
                merge.slot = request->first_slot + block * request->splits;
                merge.next_slot = merge.slot + 1;
                merge.stride = 1;
            }
            if (to)
                to[count] = merge;
            count++;
        }
    }
    return count;
}

/* What thread block `block` of the split kernel begins with. All requests are there, in memory. */
__device__ static void prepare_start(const struct mlak_cuda_job *job, const struct prepare_shared *shared,
                                     uint32_t block, uint64_t share, uint64_t work)
{
    struct mlak_cuda_start start = {};
    start.walk = schedule_share(job, block, share, work);
    if (share && start.walk.at < start.walk.end) {
        uint32_t index = prepare_find(shared->first, job->count, start.walk.at), tiles = shared->tiles[index];
        uint64_t within = start.walk.at - shared->first[index];
        start.walk.request = index;
        start.walk.strip = (uint32_t)(within / tiles);
        start.walk.tile = (uint32_t)(within % tiles);
    }
    start.next = start.walk;
    start.there = schedule_next(job, &start.next, &start.item);
    if (start.there)
        item_look_around(job, &start.item, &job->rows[start.item.request]);
    job->starts[block] = start;
}

/* The sum of what the threads before this one have, and that of all. All threads; `sums` is nobody else's meanwhile. */
__device__ static uint64_t prepare_sum(uint64_t sums[PREPARE_WARPS], uint64_t own, uint32_t count, uint64_t *all)
{
    uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    uint64_t sum = own; /* of the lanes up to this one */
    for (uint32_t reach = 1; reach < 32; reach *= 2) {
        uint32_t from = lane >= reach ? lane - reach : lane;
        uint64_t low = __shfl_sync(0xffffffff, (uint32_t)sum, (int)from);
        uint64_t high = __shfl_sync(0xffffffff, (uint32_t)(sum >> 32), (int)from);
        sum += lane >= reach ? high << 32 | low : 0;
    }
    if (lane == 31)
        sums[warp] = sum;
    __syncthreads();
    *all = 0;
    sum -= own;
    for (uint32_t w = 0; w < (count + 31) / 32; w++) {
        sum += w < warp ? sums[w] : 0;
        *all += sums[w];
    }
    return sum;
}

MLAK_KERNEL(mlak_cuda_prepare, MLAK_CUDA_PREPARE_THREADS, struct mlak_cuda_job job)
{
    struct prepare_shared *shared = (struct prepare_shared *)(void *)mlak_shared;
    const bool deterministic = job.source.batch.deterministic;
    uint32_t thread = threadIdx.x, s = 0;
    kernel_begins();
    let_next_kernel_start();
    if (job.n_sources == 1 && thread == 0)
        prepare_begin(&job, &job.source, shared, 0);
    else if (job.n_sources > 1 && thread < job.n_sources)
        prepare_begin(&job, &job.sources[thread], shared, thread);
    __syncthreads();
    if (job.n_sources > 1) {
        s = prepare_find(shared->row, job.n_sources, thread);
        prepare_all_cu_q(&job, shared, s, thread);
    } else if (job.source.batch.has_cu_q) {
        prepare_cu_q(&job, shared, thread);
    }
    if (thread < job.n_sources) {
        uint32_t fault = shared->first_fault[thread];
        job.schedule->refused[thread] = fault == UINT32_MAX ? MLAK_OK : MLAK_BATCH;
        if (fault != UINT32_MAX) {
            const int32_t *cu_q = job.cu_q + (thread > 0 ? job.sources[thread].cu_q : 0);
            job.result->sources[thread].index = fault;
            job.result->sources[thread].value = cu_q[fault];
            job.result->sources[thread].before = fault ? cu_q[fault - 1] : 0;
        }
        job.result->sources[thread].code = fault == UINT32_MAX ? MLAK_OK : MLAK_BATCH;
    }

    struct mlak_cuda_request request = {};
    uint32_t folded = 0;
    if (thread < job.count) {
        folded = job.n_sources == 1 ? prepare_row(&job, &job.source, shared, 0, thread, &request)
                                    : prepare_row(&job, &job.sources[s], shared, s, thread, &request);
        if (deterministic)
            prepare_splits(&request);
        shared->tiles[thread] = request.tiles;
    }
    uint64_t work, slots = 0, merges;
    request.first = prepare_sum(shared->sums[0],
                                (uint64_t)request.strips * (deterministic ? request.splits : request.tiles), job.count,
                                &work);
    uint32_t shares = job.grid / job.abreast;
    uint64_t share = deterministic ? 0 : (uint64_t)row_most((int64_t)((work + shares - 1) / shares), PREPARE_MIN_TILES);
    if (deterministic)
        request.first_slot = (uint32_t)prepare_sum(
            shared->sums[1], request.splits > 1 ? request.blocks * request.splits : 0, job.count, &slots);
    uint32_t own = thread < job.count ? prepare_merges(&job, &request, thread, folded, share, NULL) : 0;
    uint32_t merge = (uint32_t)prepare_sum(shared->sums[deterministic ? 0 : 1], own, job.count, &merges);
    if (own > 0)
        prepare_merges(&job, &request, thread, folded, share, job.merges + merge);

    if (thread < job.count) {
        job.requests[thread] = request;
        shared->first[thread] = request.first;
    }
    if (thread == 0) {
        job.schedule->slots = (uint32_t)slots;
        job.schedule->merges = (uint32_t)merges;
    }
    __syncthreads(); /* shared->first is there, and job.requests */
    if (thread < job.grid)
        prepare_start(&job, shared, thread, share, work);
}
