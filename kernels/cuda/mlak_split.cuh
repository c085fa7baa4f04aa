/* mlak_split.cuh - kernel 2 of a launch: attention of 16 or 32 folded rows over a range of key tiles; sm_80 and up.
 *
 *   Tile     ROWS rows (token * heads + head) x 64 keys; 8 warps. GROUPS = ROWS / 16 groups of rows, as an mma takes
 *   scores   warp w: rows of group w % GROUPS; 8 GROUPS keys from 8 GROUPS (w / GROUPS) on; 36 steps of 16 dimensions,
 *            with most of the rows' q in registers for the whole item
 *   values   warp w: columns 64w..64w+63 of O of all rows, 32 fp32 a thread and group, 4 steps of 16 keys
 *
 *   Shared memory, bytes    16 rows, one tile   two tiles   32 rows, two tiles
 *   q      ROWS x 1152                  18432       18432                36864
 *   keys   64 x 1152                    73728      147456               147456   both in chunks of 16 bytes, chunk c
 *   scales 64 x 4 fp32                   1024        2048                 2048   of row r at c ^ (r & 7); scales are
 *   p      ROWS x 72 fp32                4608        4608                 9216   of 656-byte rows only; p is of 16-bit
 *   struct split_shared                                                          numbers but for those
 *   all of it, at most                 101376      177152               201728
 *
 *   Pipeline, a tile             who
 *   keys of tile n+1 set off     all (cp.async; fp8 through registers, widened to bf16, which loses nothing)
 *   page ids of tile n+2         threads 0..63, a key each: asked for before tile n is computed, checked after it
 *   scores, running maximum      all; maxima of the warps of a group meet in shared memory
 *   O = O * shrink + P V         all, each warp its own columns
 *
 * Keys that no row of the item sees are zeros in shared memory, so what lies there in the client's pool, NaN or
 * nonsense, reaches no product; keys that some rows see and others do not get a score of -inf for the others. Most
 * tiles are seen whole by every row, and pay for neither. */
#include "mlak_split_tile.cuh" /* which includes mlak_split_loads.cuh: read that first, and this last */

/* What each row of the item sees. */
template <int GROUPS> __device__ static void split_look(const struct split<GROUPS> *s)
{
    struct split_shared<GROUPS> *shared = s->shared;
    const struct mlak_row *row = &shared->row;
    uint32_t r = threadIdx.x;
    if (r >= 16 * GROUPS)
        return;
    uint32_t token = item_token(&s->item, row, r);
    struct mlak_visible sees = row_visible(row, token);
    shared->lo[r] = sees.lo;
    shared->base[r] = sees.base;
    shared->hi[r] = sees.hi;
    shared->bits[r] = row->tree_mask[token];
}

/* The rows' outcome: to out and lse, or to their slot. */
template <int GROUPS>
__device__ static void split_finish(const struct split<GROUPS> *s, struct split_state<GROUPS> *state)
{
    struct split_shared<GROUPS> *shared = s->shared;
    const struct mlak_row *row = &shared->row;
    uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    __syncthreads(); /* the last tile's maxima have been read */
    for (uint32_t half = 0; half < 2; half++) {
        float sum = state->sum[half];
        sum += __shfl_xor_sync(0xffffffff, sum, 1);
        sum += __shfl_xor_sync(0xffffffff, sum, 2);
        if (lane % 4 == 0)
            shared->reduced[0][warp / GROUPS][warp % GROUPS * 16 + lane / 4 + half * 8] = sum;
    }
    __syncthreads();
    float *part = s->item.part;
#pragma unroll
    for (uint32_t g = 0; g < GROUPS; g++)
#pragma unroll
        for (uint32_t half = 0; half < 2; half++) {
            uint32_t r = g * 16 + lane / 4 + half * 8, folded = s->item.first_row + r;
            if (r >= s->item.rows)
                continue;
            float sum = 0;
            for (uint32_t w = 0; w < SPLIT_WARPS / GROUPS; w++)
                sum += shared->reduced[0][w][r];
            bool speaks = warp == 0 && lane % 4 == 0;
            if (part == NULL) {
                struct item_end end = item_end(row, folded % row->heads, state->maximum[g][half], sum);
#pragma unroll
                for (uint32_t j = 0; j < 8; j++)
                    item_store(row, folded, warp * 64 + j * 8 + lane % 4 * 2, state->o[g][j][half * 2],
                               state->o[g][j][half * 2 + 1], end.factor);
                if (speaks && row->lse != NULL)
                    row->lse[folded] = end.lse;
                continue;
            }
#pragma unroll
            for (uint32_t j = 0; j < 8; j++) {
                float *to = part + part_o(r, warp * 64 + j * 8 + lane % 4 * 2);
                to[0] = state->o[g][j][half * 2];
                to[1] = state->o[g][j][half * 2 + 1];
            }
            if (speaks) {
                part[part_maximum(r)] = state->maximum[g][half];
                part[part_sum(r)] = sum;
            }
        }
}

/* The item's tiles with `stages` of them in flight. False: the request failed, or the launch was cancelled. */
template <enum mlak_cuda_types TYPES, int GROUPS>
__device__ static inline bool split_tiles(const struct split<GROUPS> *s, uint32_t stages,
                                          struct split_state<GROUPS> *state)
{
    enum { LOOK_UP = 32 }; /* tiles between two looks at whether anybody still wants the result */
    const struct mlak_row *row = &s->shared->row;
    uint32_t q[split_held<TYPES, GROUPS>::STEPS][4], tile = s->item.tile, end = s->item.end_tile, stage = 0, walked = 0;
    struct item_key key = item_ask(&s->item, row, tile, threadIdx.x);
    split_settle<GROUPS>(s, tile, &key);
    if (tile + 1 < end) {
        key = item_ask(&s->item, row, tile + 1, threadIdx.x);
        split_settle<GROUPS>(s, tile + 1, &key);
    }
    __syncthreads();
    split_load_keys<TYPES, GROUPS>(s, tile, 0);
#pragma unroll
    for (uint32_t step = 0; step < split_held<TYPES, GROUPS>::STEPS; step++)
        split_get_q<GROUPS>(s, step, q[step]);
    for (; tile < end; tile++, walked++, stage ^= stages - 1) {
        bool next = tile + 1 < end, after = tile + 2 < end;
        if (next && stages == 2) {
            split_load_keys<TYPES, GROUPS>(s, tile + 1, stage ^ 1);
            copy_wait<1>();
        } else {
            copy_wait<0>();
        }
        if (threadIdx.x == 0 && walked % LOOK_UP == LOOK_UP - 1 && item_cancelled(s->job, &s->item))
            s->shared->failed = 1;
        if (after)
            key = item_ask(&s->item, row, tile + 2, threadIdx.x);
        __syncthreads();
        if (s->shared->failed)
            return false;
        split_tile<TYPES, GROUPS>(s, tile, stage, q, state);
        if (after) /* where this tile's addresses were: its copies have been set off */
            split_settle<GROUPS>(s, tile + 2, &key);
        __syncthreads(); /* its keys and p have been read */
        if (next && stages == 1)
            split_load_keys<TYPES, GROUPS>(s, tile + 1, 0);
    }
    return true;
}

template <enum mlak_cuda_types TYPES, int GROUPS>
__device__ static inline void split_item(struct split<GROUPS> *s, uint32_t stages)
{
    struct split_shared<GROUPS> *shared = s->shared;
    if (!item_open(s->job, &s->item, &shared->row, &shared->failed, MLAK_CUDA_THREADS))
        return;
    item_look(&s->item, &shared->row, 16 * GROUPS);
    split_look<GROUPS>(s);
    split_load_q<TYPES, GROUPS>(s);
    __syncthreads(); /* all have seen that it has not failed yet */

    struct split_state<GROUPS> state;
    state.sum[0] = state.sum[1] = 0;
#pragma unroll
    for (uint32_t g = 0; g < GROUPS; g++) {
        state.maximum[g][0] = state.maximum[g][1] = -INFINITY;
#pragma unroll
        for (uint32_t j = 0; j < 8; j++)
#pragma unroll
            for (uint32_t i = 0; i < 4; i++)
                state.o[g][j][i] = 0;
    }
    if (!split_tiles<TYPES, GROUPS>(s, stages, &state))
        return;
    split_finish<GROUPS>(s, &state);
    if (threadIdx.x == 0)
        item_done(s->job);
}

template <enum mlak_cuda_types TYPES, int GROUPS>
__device__ static inline void split_kernel(const struct mlak_cuda_job *job)
{
    uint32_t stages = GROUPS == 2 || shared_bytes() >= MLAK_CUDA_SPLIT_SHARED_2 ? 2 : 1;
    unsigned char *room = mlak_shared;
    struct split<GROUPS> s;
    s.job = job;
    s.q = room;
    room += SPLIT_Q_BYTES(GROUPS);
    s.keys = room;
    s.scales = (float *)(void *)(room + stages * SPLIT_KEYS_BYTES);
    room += stages * (SPLIT_KEYS_BYTES + SPLIT_SCALES_BYTES);
    s.p = (float *)(void *)room;
    s.shared = (struct split_shared<GROUPS> *)(void *)(room + SPLIT_P_BYTES(GROUPS));
    kernel_begins();
    await_kernel_before();
    let_next_kernel_start();
    struct mlak_cuda_walk walk = job->starts[blockIdx.x].walk;
    while (schedule_next(job, job->requests, &walk, &s.item)) {
        split_item<TYPES, GROUPS>(&s, stages);
        copy_wait<0>();  /* an item that was abandoned had copies under way */
        __syncthreads(); /* shared memory is the next item's */
    }
}

#define SPLIT_KERNEL(name, TYPES)                                                                                      \
    MLAK_KERNEL(mlak_cuda_split_##name, MLAK_CUDA_THREADS, struct mlak_cuda_job job)                                   \
    {                                                                                                                  \
        split_kernel<TYPES, 1>(&job);                                                                                  \
    }                                                                                                                  \
    MLAK_KERNEL(mlak_cuda_split_wide_##name, MLAK_CUDA_THREADS, struct mlak_cuda_job job)                              \
    {                                                                                                                  \
        split_kernel<TYPES, 2>(&job);                                                                                  \
    }
SPLIT_KERNEL(bf16, MLAK_CUDA_BF16)
SPLIT_KERNEL(fp16, MLAK_CUDA_FP16)
SPLIT_KERNEL(fp8, MLAK_CUDA_FP8)
SPLIT_KERNEL(bf16_fp8, MLAK_CUDA_BF16_FP8)
SPLIT_KERNEL(bf16_656, MLAK_CUDA_BF16_656)
