/* mlak_prepare.cuh - kernel 1 of a launch, one block: client arrays become rows of the request table, and the rows
 * become the schedule of the split kernel.
 *
 *     thread i      1. finds the source of row i, if there are several, and reads the row's length
 *                   2. copies entries i, i + threads, ... of cu_q; of several sources: row i's entry, and the last
 *                      one's or first one's beside it; judges the copies (the first fault of a source counts)
 *                   3. fills row i from the batch; reads its tree masks once
 *                   4. counts its tiles; sums over the block say where it begins
 *                   5. lists what of it the combine kernel has to look at
 *                   6. looks up what thread block i of the split kernel begins with
 *     shared        struct prepare_shared, 59 KB
 *
 * What a client may change meanwhile is read once and only the copy is used, so every later kernel of the launch agrees
 * on lengths and splits whatever the client does.
 *
 * It runs once a launch, from code that the split kernel's has displaced, so what it costs is above all the code that
 * it comes past: what is needed twice is called, and what only some batches need (divisions for DCP, tree masks) lies
 * apart. */
#include "mlak_items.cuh"

enum { PREPARE_WARPS = MLAK_CUDA_PREPARE_THREADS / 32 };

struct prepare_length {
    int32_t global_len;
    uint32_t q_len;
};

struct prepare_shared {
    uint64_t row[MLAK_CUDA_MAX_SOURCES];         /* as in mlak_cuda_source */
    uint32_t first_fault[MLAK_CUDA_MAX_SOURCES]; /* entry of cu_q */
    bool given_up[MLAK_CUDA_MAX_SOURCES]; /* before it began: nothing of it is computed or written */
    float q_scale[MLAK_CUDA_MAX_SOURCES], k_scale[MLAK_CUDA_MAX_SOURCES], v_scale[MLAK_CUDA_MAX_SOURCES];
    uint64_t sums[2][PREPARE_WARPS]; /* of warps; two, since one sum may begin where another is still read */
    bool ragged;                     /* strips have different numbers of tiles */
    struct mlak_cuda_request requests[MLAK_CUDA_MAX_REQUESTS]; /* as in memory */
    struct prepare_length lengths[MLAK_CUDA_MAX_REQUESTS];     /* of those that have tiles */
};
static_assert(sizeof(struct prepare_shared) <= MLAK_CUDA_PREPARE_SHARED, "");

enum { PREPARE_MIN_TILES = 1 }; /* of a share */
/* Tiles that it may be longer in order to end where a strip does: to go on with another strip takes a block as long,
 * and costs it a part more. */
enum { PREPARE_LONGER = 2 };
enum { PREPARE_STRIPS = 44 };   /* bits of all tiles, in the sum of them and of strips, which lie above */

__device__ static float prepare_scale(const struct mlak_scale *scale, float absent)
{
    return !scale->present ? absent : scale->tensor != NULL ? read_once(scale->tensor) : scale->value;
}

__device__ static const struct mlak_cuda_source *prepare_source(const struct mlak_cuda_job *job, uint32_t s)
{
    return job->n_sources == 1 ? &job->source : &job->sources[s];
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
    uint32_t threads = mlak_cuda_prepare_threads(job);
#pragma unroll 1
    for (uint32_t i = thread; i <= source->batch.batch; i += threads)
        prepare_copy(job, source, i);
    __syncthreads();
#pragma unroll 1
    for (uint32_t i = thread; i <= source->batch.batch; i += threads)
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

/* Request i of the job: the length as the client's memory says. */
__device__ static int32_t prepare_ask(const struct mlak_cuda_source *source, uint32_t i)
{
    return read_once(&source->batch.seqlens[source->first + i - source->row]);
}

/* A row as far as it says which keys its tokens see. DCP: there may be several ranks. */
template <bool DCP>
__device__ static inline void prepare_view(struct mlak_row *row, const struct mlak_batch *batch, uint32_t q_len)
{
    row->heads = batch->heads;
    row->q_len = q_len;
    row->mask = batch->mask;
    row->window = batch->window;
    row->dcp_world = DCP ? batch->dcp_world : 1;
    row->dcp_rank = DCP ? batch->dcp_rank : 0;
    row->dcp_interleave = DCP ? batch->dcp_interleave : 1;
}

/* Row i of the job, of source s, and what of it the schedule needs; its folded rows. A row without a visible key has no
 * tile, and still outputs to write. What is computed with is a view: the row itself lies in memory, and is only
 * written. */
template <bool DCP>
__device__ static inline uint32_t prepare_row_of(const struct mlak_cuda_job *job, struct prepare_shared *shared,
                                                 uint32_t s, uint32_t i, int32_t length,
                                                 struct mlak_cuda_request *request)
{
    const struct mlak_cuda_source *source = prepare_source(job, s);
    const struct mlak_batch *batch = &source->batch;
    struct mlak_row view, *row = &job->rows[i];
    uint32_t b = source->first + i - source->row, q_len;
    uint64_t token;
    if (batch->has_cu_q) {
        const int32_t *cu_q = job->cu_q + source->cu_q;
        token = (uint64_t)cu_q[b];
        q_len = (uint32_t)(cu_q[b + 1] - cu_q[b]);
    } else {
        q_len = (uint32_t)batch->q_rows / batch->batch; /* both below 2^32 */
        token = (uint64_t)b * q_len;
    }
    row_describe(row, batch, b, token, q_len, shared->q_scale[s], shared->k_scale[s], shared->v_scale[s]);
    prepare_view<DCP>(&view, batch, q_len);
    view.max_pages = batch->max_pages;
    view.page_size = batch->page_size;
    view.code = MLAK_ROW_OK;
    view.detail[0] = view.detail[1] = -1;
    row_set_length(&view, length);
    row->global_len = view.global_len;
    row->local_len = view.local_len;
    row->detail[0] = view.detail[0];
    row->detail[1] = view.detail[1];
    row->code = view.code;
    job->row_results[i] = {view.code, 0, {view.detail[0], view.detail[1]}, view.local_len};
    uint64_t valid = batch->mask == MLAK_MASK_TREE ? row_tree_bits(&view) : 0;
#pragma unroll 1
    for (uint32_t t = 0; t < q_len; t++)
        row->tree_mask[t] = valid ? read_once(&batch->tree_mask[token + t]) & valid : 0;

    uint32_t folded = q_len * view.heads;
    request->source = s;
    request->box_rows = source->box_rows;
    request->blocks = view.code == MLAK_ROW_OK ? (folded + job->rows_per_item - 1) / job->rows_per_item : 0;
    request->strips = (request->blocks + job->abreast - 1) / job->abreast;
    if (request->blocks == 0)
        return folded;
    int64_t lo = row_local_count(&view, row_global_start(&view, 0)), hi = row_visible(&view, q_len - 1).hi;
    if (hi <= lo)
        return folded;
    request->first_tile = (uint32_t)(lo / MLAK_CUDA_TILE);
    request->tiles = (uint32_t)((hi - 1) / MLAK_CUDA_TILE) + 1 - request->first_tile;
    shared->lengths[i] = {length, q_len};
    return folded;
}

/* The same of several ranks. */
MLAK_CALLED uint32_t prepare_row_dcp(const struct mlak_cuda_job *job, struct prepare_shared *shared, uint32_t s,
                                     uint32_t i, int32_t length)
{
    struct mlak_cuda_request request = {};
    uint32_t folded = prepare_row_of<true>(job, shared, s, i, length, &request);
    shared->requests[i] = request;
    return folded;
}

/* The same of any request; into shared->requests. */
__device__ static inline uint32_t prepare_row(const struct mlak_cuda_job *job, struct prepare_shared *shared,
                                              uint32_t s, uint32_t i, int32_t length)
{
    struct mlak_cuda_request request = {};
    uint32_t folded = 0;
    if (shared->first_fault[s] != UINT32_MAX || shared->given_up[s]) {
        struct mlak_row *row = &job->rows[i];
        row->code = MLAK_ROW_CANCELLED;
        row->local_len = row->detail[0] = row->detail[1] = 0;
        job->row_results[i] = {MLAK_ROW_CANCELLED, 0, {0, 0}, 0};
        request.source = s;
    } else if (prepare_source(job, s)->batch.dcp_world > 1) {
        return prepare_row_dcp(job, shared, s, i, length);
    } else {
        folded = prepare_row_of<false>(job, shared, s, i, length, &request);
    }
    shared->requests[i] = request;
    return folded;
}

/* Deterministic: the request's splits, from its row alone. */
__device__ static void prepare_splits(struct mlak_cuda_request *request)
{
    uint32_t most = (uint32_t)row_most(MLAK_CUDA_FIXED_SLOTS / row_most(request->blocks, 1), 1);
    request->split_tiles = (uint32_t)row_most((request->tiles + most - 1) / most, MLAK_CUDA_FIXED_TILES);
    request->splits = (request->tiles + request->split_tiles - 1) / request->split_tiles;
}

/* The source of row `at`. */
__device__ static uint32_t prepare_find(const struct prepare_shared *shared, uint32_t count, uint32_t at)
{
    uint32_t low = 0, high = count;
    while (high - low > 1) {
        uint32_t middle = (low + high) / 2;
        if (shared->row[middle] <= at)
            low = middle;
        else
            high = middle;
    }
    return low;
}

/* What combine has to look at of request `index`, which has `folded` rows: how many entries, and, unless `to` is NULL,
 * these. */
MLAK_CALLED uint32_t prepare_merges(const struct mlak_cuda_job *job, const struct mlak_cuda_request *request,
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
#pragma unroll 1
    for (uint32_t strip = 0; strip < request->strips; strip++) {
        uint64_t begin = request->first + (uint64_t)strip * request->room;
        uint64_t first = share ? begin / share : 0, last = share ? (begin + request->tiles - 1) / share : 0;
        uint32_t parts = share ? (uint32_t)(last - first) + 1 : request->splits;
        if (parts == 1)
            continue; /* straight to out */
#pragma unroll 1
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

/* item_look_around, of a request with tree masks or several ranks. */
MLAK_CALLED void prepare_look(const struct mlak_cuda_job *job, struct mlak_cuda_item *item)
{
    item_look_around(job, item, &job->rows[item->request]);
}

/* What thread block `block` of the split kernel begins with. All requests are there, in memory and here. */
__device__ static void prepare_start(const struct mlak_cuda_job *job, const struct prepare_shared *shared,
                                     uint32_t block, uint64_t share, uint64_t work)
{
    struct mlak_cuda_start start = {};
    bool apart = false;
    start.walk = schedule_share(job, block, share, work);
    if (share && start.walk.at < start.walk.end) {
        uint32_t index = item_request(shared->requests, job->count, start.walk.at);
        uint64_t within = start.walk.at - shared->requests[index].first, room = shared->requests[index].room;
        start.walk.request = index;
        start.walk.strip = (uint32_t)(within / room);
        start.walk.tile = (uint32_t)(within - start.walk.strip * room);
    }
    start.next = start.walk;
    start.there = schedule_next(job, shared->requests, &start.next, &start.item);
    if (start.there) {
        const struct mlak_batch *batch = &prepare_source(job, start.item.source)->batch;
        const struct prepare_length length = shared->lengths[start.item.request];
        apart = batch->mask == MLAK_MASK_TREE || batch->dcp_world > 1;
        if (!apart) {
            struct mlak_row view;
            prepare_view<false>(&view, batch, length.q_len);
            view.mask = batch->mask == MLAK_MASK_CAUSAL ? MLAK_MASK_CAUSAL : MLAK_MASK_NONE;
            view.global_len = length.global_len;
            item_look_around<false>(job, &start.item, &view);
        }
    }
    job->starts[block] = start;
    if (apart)
        prepare_look(job, &job->starts[block].item);
}

struct prepare_sum {
    uint64_t before, all;
};

/* The sum of what the threads before this one have, and that of all. All threads; `sums` is nobody else's meanwhile. */
MLAK_CALLED struct prepare_sum prepare_sum(uint64_t sums[PREPARE_WARPS], uint64_t own, uint32_t count)
{
    uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    uint64_t sum = own; /* of the lanes up to this one */
#pragma unroll 1
    for (uint32_t reach = 1; reach < 32; reach *= 2) {
        uint32_t from = lane >= reach ? lane - reach : lane;
        uint64_t low = __shfl_sync(0xffffffff, (uint32_t)sum, (int)from);
        uint64_t high = __shfl_sync(0xffffffff, (uint32_t)(sum >> 32), (int)from);
        sum += lane >= reach ? high << 32 | low : 0;
    }
    if (lane == 31)
        sums[warp] = sum;
    __syncthreads();
    struct prepare_sum found = {sum - own, 0};
    for (uint32_t w = 0; w < (count + 31) / 32; w++) {
        found.before += w < warp ? sums[w] : 0;
        found.all += sums[w];
    }
    return found;
}

/* Tiles of each of so many shares. */
__device__ static inline uint64_t prepare_share(uint64_t tiles, uint32_t shares)
{
    return (uint64_t)row_most((int64_t)((tiles + shares - 1) / shares), PREPARE_MIN_TILES);
}

/* The same of shares that end where strips do, of so many tiles each: some in a strip, or some strips in one. */
__device__ static inline uint64_t prepare_whole(uint64_t tiles, uint64_t strips, uint32_t shares)
{
    if (strips > shares)
        return (strips + shares - 1) / shares * tiles;
    return prepare_share(tiles, strips > 0 ? shares / (uint32_t)strips : shares);
}

MLAK_KERNEL(mlak_cuda_prepare, MLAK_CUDA_PREPARE_THREADS, struct mlak_cuda_job job)
{
    struct prepare_shared *shared = (struct prepare_shared *)(void *)mlak_shared;
    const bool deterministic = job.source.batch.deterministic;
    uint32_t thread = threadIdx.x, s = 0;
    int32_t length = 0;
    bool own = thread < job.count;
    kernel_begins();
    let_next_kernel_start();
    if (thread == 0)
        shared->ragged = false;
    if (own && job.n_sources == 1)
        length = prepare_ask(&job.source, thread);
    if (thread < job.n_sources)
        prepare_begin(&job, prepare_source(&job, thread), shared, thread);
    __syncthreads();
    if (job.n_sources > 1) {
        s = prepare_find(shared, job.n_sources, thread);
        if (own)
            length = prepare_ask(&job.sources[s], thread);
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

    uint32_t folded = own ? prepare_row(&job, shared, s, thread, length) : 0;
    struct mlak_cuda_request request = {}, *here = &shared->requests[thread]; /* its own to write until all meet */
    if (own) {
        request = *here;
        if (deterministic)
            prepare_splits(&request);
    }
    uint64_t steps = deterministic ? request.splits : request.tiles, share = 0;
    uint64_t of_strips = (uint64_t)(request.tiles > 0 ? request.strips : 0) << PREPARE_STRIPS;
    struct prepare_sum tiles = prepare_sum(shared->sums[0], request.strips * steps + of_strips, job.count);
    const uint64_t strips_before = tiles.before >> PREPARE_STRIPS, strips = tiles.all >> PREPARE_STRIPS;
    tiles.before &= (1ull << PREPARE_STRIPS) - 1;
    tiles.all &= (1ull << PREPARE_STRIPS) - 1;
    request.room = request.tiles;
    if (!deterministic) {
        uint64_t mean = strips ? (tiles.all + strips - 1) / strips : 0;
        if (own && request.tiles > 0 && request.tiles != mean)
            shared->ragged = true;
        __syncthreads();
        uint32_t shares = job.grid / job.abreast;
        share = prepare_share(tiles.all, shares);
        uint64_t whole = prepare_whole(mean, strips, shares);
        if (strips > 0 && !shared->ragged && whole <= share + PREPARE_LONGER + share / 64) {
            uint64_t room = strips <= shares ? (mean + whole - 1) / whole * whole : mean;
            share = whole;
            tiles = {strips_before * room, strips * room};
            request.room = (uint32_t)room;
        }
    }
    request.first = tiles.before;
    struct prepare_sum slots = {};
    if (deterministic) {
        slots = prepare_sum(shared->sums[1], request.splits > 1 ? request.blocks * request.splits : 0, job.count);
        request.first_slot = (uint32_t)slots.before;
    }
    uint32_t count = 0;
    if (own) {
        *here = request;
        job.requests[thread] = request;
        count = prepare_merges(&job, here, thread, folded, share, NULL);
    }
    const struct prepare_sum merges = prepare_sum(shared->sums[0], count, job.count);
    if (count > 0)
        prepare_merges(&job, here, thread, folded, share, job.merges + merges.before);
    if (thread == 0) {
        job.schedule->slots = (uint32_t)slots.all;
        job.schedule->merges = (uint32_t)merges.all;
    }
    __syncthreads(); /* all requests are there */
    if (thread < job.grid)
        prepare_start(&job, shared, thread, share, tiles.all);
}
