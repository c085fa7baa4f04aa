/* mlak_wgmma.cuh - kernel 2 of a launch on Hopper (sm_90a), of bf16 and fp16: attention of 64 folded rows over a range
 * of key tiles. Three warpgroups: two compute, each owner of every other tile's scores and of half of O's columns, and
 * one loads.
 *
 *   warpgroup   what it does                                                          registers a thread
 *   0, 1        own tiles: S = Q K^T, 36 products of 64 x 64 x 16; P = 2^(S - maximum)  208
 *               every tile: O[64][own 256 columns] += P V, 4 products of 64 x 256 x 16  (O is 128 of them, S 32)
 *   loads       page ids, keys, q: tiles that are seen whole by the copy engine        88
 *               (TMA), where boxes of the pages are a tile; else by cp.async, to which
 *               any page size will do, and zeros where no row of the item sees a key
 *
 * While one makes weights of its tile, the other's products keep the tensor cores busy (FlashMLA's "seesaw"). The owner
 * of tile t does this, and the other one of t + 1 the same a half turn later:
 *
 *     scores of t over the own half | P(t - 1), which the other made, times own columns | scores of t over the other
 *     half and the rope | its weights | P(t) times own columns
 *
 * Nothing is waited for between products: the next ones are in the queue when those before end. Scores of the half that
 * was loaded first need no P, and come while the other still weighs. Only two tiles fit, so keys that come late are
 * waited for: a half is given back as soon as its last product has ended, in the middle of a turn.
 *
 *   shared memory, bytes                     barriers: full, and empty again
 *   q        9 chunks of 64 x 64     73728   q_full      loads -> both          q_empty
 *   keys     2 stages of 9 chunks   147456   keys_full   loads -> owner         keys_empty, of each stage and half
 *   the rest of wgmma_shared        ~ 8500   maxima_full, p_full   owner -> the other one, a while before P and with it
 *
 * P lies where the tile's rope was, which nobody needs any more once there are scores. A tile is loaded in pieces, in
 * the order of its products: the owner's half; the other half; the rope. It is given back by halves, the rope's place
 * with that of the one who is not the owner.
 *
 * Where a request has several row blocks, blocks abreast take the same tiles at the same time: a tile comes from memory
 * once. Where they are four or more, most tiles come to the L2 cache before they are fetched.
 *
 * The loads run ahead by two tiles, into the next item as well: while an item is written out, the next one's keys are
 * on their way. They walk the schedule and tell the others through a ring of slots, shared->items. A slot is written
 * anew eight items later, when its readers are long past it: an item has a tile at least, and the loads are two tiles,
 * and one more item that they look up, ahead of either of the others at most. */
#include "mlak_types.cuh"
#include "mlak_wgmma_loads.cuh"

/* ---- scores ---- */

/* What a thread knows of its two rows, lane / 4 of its warp's 16 and the one 8 below. */
struct wgmma_rows {
    float maximum[2]; /* that O and the sums refer to: of the tiles so far */
    float sum[2];     /* of the weights in its own columns of its own tiles */
};

/* Keys that did not come by the copy engine: the products see them once this thread has seen them all. */
__device__ static inline void wgmma_see_copies(struct wgmma_shared *shared, const struct wgmma_item *slot, uint32_t i,
                                               uint32_t count)
{
    if (i >= slot->item.fetch && i < slot->item.fetch_end)
        return;
#pragma unroll 1
    for (uint32_t piece = 0; piece < WGMMA_PIECES; piece++)
        barrier_wait(&shared->keys_full[count % WGMMA_STAGES][piece], count / WGMMA_STAGES % 2);
    shared_to_products();
}

/* S = Q K^T sets off, over pieces [FROM, TO) in their order, each as soon as its keys are there. */
template <enum mlak_cuda_types TYPES, uint32_t FROM, uint32_t TO>
__device__ static inline void wgmma_score(struct wgmma_shared *shared, uint32_t owner, uint32_t count, float s[32])
{
    uint32_t stage = count % WGMMA_STAGES;
#pragma unroll
    for (uint32_t n = FROM; n < TO; n++) {
        uint32_t piece = wgmma_piece(n, owner), first = wgmma_first(piece);
        uint32_t q = operand_here(operand_rows(shared->q[first]));
        uint32_t keys = operand_here(operand_rows(shared->keys[stage][first]));
        barrier_wait(&shared->keys_full[stage][piece], count / WGMMA_STAGES % 2);
        if (n == FROM)
            products_begin();
#pragma unroll
        for (uint32_t step = 0; step < wgmma_chunks(n) * 4; step++) {
            uint32_t at = step / 4 * WGMMA_CHUNK + step % 4 * 32;
            bool add = n > 0 || step > 0;
            if (TYPES == MLAK_CUDA_FP16)
                product_64x64_fp16(s, operand_move(q, at), operand_move(keys, at), add);
            else
                product_64x64_bf16(s, operand_move(q, at), operand_move(keys, at), add);
        }
    }
    products_commit();
}

/* Which keys of a tile a thread's rows see: bit i for its i-th of either row's 16. */
struct wgmma_sight {
    uint32_t of[2];
};
__device__ static inline struct wgmma_sight wgmma_look(const struct wgmma_item *slot, uint32_t tile)
{
    const struct mlak_cuda_item *item = &slot->item;
    struct wgmma_sight sight = {{0xffff, 0xffff}};
    if ((int64_t)tile * MLAK_CUDA_TILE >= item->all_lo && ((int64_t)tile + 1) * MLAK_CUDA_TILE <= item->all_end)
        return sight;
    uint32_t warp = threadIdx.x % WGMMA_GROUP / 32, lane = threadIdx.x % 32;
    const struct mlak_row *row = &slot->row;
#pragma unroll 1
    for (uint32_t half = 0; half < 2; half++) {
        uint32_t token = item_token(item, row, warp * 16 + lane / 4 + half * 8), bits = 0;
        const struct mlak_visible sees = row_visible(row, token);
        uint64_t tree = row->tree_mask[token];
#pragma unroll 1
        for (uint32_t i = 0; i < 16; i++) {
            int64_t c = (int64_t)tile * MLAK_CUDA_TILE + i / 2 * 8 + lane % 4 * 2 + i % 2;
            bool sees_it = c >= sees.lo && c < sees.hi && (c < sees.base || row_tree_sees(row, tree, c));
            bits |= (uint32_t)sees_it << i;
        }
        sight.of[0] = half == 0 ? bits : sight.of[0];
        sight.of[1] = half == 1 ? bits : sight.of[1];
    }
    return sight;
}

/* 2^(from - to), of maxima that may be -inf. */
__device__ static inline float wgmma_shrink(float from, float to)
{
    return from == to ? 1 : power_of_two(from - to);
}

__device__ static inline void wgmma_shrink_o(float o[128], const float by[2])
{
    if (!__any_sync(0xffffffff, by[0] != 1 || by[1] != 1))
        return;
#pragma unroll
    for (uint32_t n = 0; n < 128; n++)
        o[n] *= by[n / 2 % 2];
}

/* S becomes P, in registers and, for the other warpgroup, in shared memory. `shrink`: of what O holds so far. */
template <enum mlak_cuda_types TYPES>
__device__ static inline void wgmma_weigh(struct wgmma_shared *shared, float scale, const struct wgmma_sight *sight,
                                          struct wgmma_rows *rows, uint32_t stage, float s[32], uint32_t p[16],
                                          float shrink[2])
{
    uint32_t warp = threadIdx.x % WGMMA_GROUP / 32, lane = threadIdx.x % 32, r = warp * 16 + lane / 4;
    float from[2];
    if (!(scale > 0)) { /* else it goes into the exponent, and the greatest score stays the greatest */
#pragma unroll
        for (uint32_t i = 0; i < 32; i++)
            s[i] *= scale;
        scale = 1;
    }
    if (sight->of[0] != 0xffff || sight->of[1] != 0xffff) {
#pragma unroll
        for (uint32_t i = 0; i < 32; i++)
            s[i] = sight->of[i / 2 % 2] >> (i / 4 * 2 + i % 2) & 1 ? s[i] : -INFINITY;
    }
#pragma unroll
    for (uint32_t half = 0; half < 2; half++) {
        float top = -INFINITY;
#pragma unroll
        for (uint32_t i = 0; i < 16; i++)
            top = fmaxf(top, s[i / 2 * 4 + half * 2 + i % 2]);
        top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, 1));
        top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, 2)) * scale;
        top = fmaxf(top, rows->maximum[half]);
        shrink[half] = wgmma_shrink(rows->maximum[half], top);
        rows->maximum[half] = top;
        rows->sum[half] *= shrink[half];
        from[half] = top == -INFINITY ? 0 : top; /* nothing seen yet: weights are 0 */
        if (lane % 4 == 0)
            shared->maximum[stage][r + half * 8] = top;
    }
    barrier_arrive(&shared->maxima_full[stage]);
#pragma unroll
    for (uint32_t n = 0; n < 8; n++)
#pragma unroll
        for (uint32_t half = 0; half < 2; half++) {
            float low = power_of_two(fmaf(s[n * 4 + half * 2], scale, -from[half]));
            float high = power_of_two(fmaf(s[n * 4 + half * 2 + 1], scale, -from[half]));
            rows->sum[half] += low + high;
            p[n * 2 + half] = pack<TYPES>(low, high);
        }
    /* matrix m of each four: rows m % 2 * 8.., columns m / 2 * 8.. of 16 */
#pragma unroll
    for (uint32_t step = 0; step < 4; step++)
        store_matrices(shared->keys[stage][WGMMA_ROPE_CHUNK] + wgmma_at(warp * 16 + lane % 16, step * 2 + lane / 16),
                       p + step * 4);
    shared_to_products();
    barrier_arrive(&shared->p_full[stage]);
}

/* ---- values ---- */

/* The other warpgroup has maxima of tile `count`: rows and O follow them. */
__device__ static inline void wgmma_follow(struct wgmma_shared *shared, struct wgmma_rows *rows, uint32_t count,
                                           bool first, float o[128])
{
    uint32_t warp = threadIdx.x % WGMMA_GROUP / 32, lane = threadIdx.x % 32, r = warp * 16 + lane / 4;
    uint32_t stage = count % WGMMA_STAGES;
    float shrink[2];
    barrier_wait(&shared->maxima_full[stage], count / WGMMA_STAGES % 2);
#pragma unroll
    for (uint32_t half = 0; half < 2; half++) {
        float top = shared->maximum[stage][r + half * 8];
        shrink[half] = wgmma_shrink(rows->maximum[half], top);
        rows->maximum[half] = top;
        rows->sum[half] *= shrink[half];
    }
    if (!first)
        wgmma_shrink_o(o, shrink);
}

/* O += P V of tile `count` sets off, in own columns: P of shared memory. `first`: of the item. */
template <enum mlak_cuda_types TYPES>
__device__ static inline void wgmma_add_shared(struct wgmma_shared *shared, uint32_t own, uint32_t count, bool first,
                                               float o[128])
{
    uint32_t stage = count % WGMMA_STAGES;
    uint32_t p = operand_here(operand_rows(shared->keys[stage][WGMMA_ROPE_CHUNK]));
    uint32_t values = operand_here(operand_columns(shared->keys[stage][own * 4], WGMMA_CHUNK));
    products_begin();
#pragma unroll
    for (uint32_t step = 0; step < MLAK_CUDA_TILE / 16; step++) {
        uint32_t a = operand_move(p, step * 32), b = operand_move(values, step * 2048);
        bool add = !first || step > 0;
        if (TYPES == MLAK_CUDA_FP16)
            product_64x256_fp16(o, a, b, add);
        else
            product_64x256_bf16(o, a, b, add);
    }
    products_commit();
}

/* The same of an own tile: P of registers. */
template <enum mlak_cuda_types TYPES>
__device__ static inline void wgmma_add_own(struct wgmma_shared *shared, const uint32_t p[16], uint32_t own,
                                            uint32_t count, bool first, float o[128])
{
    uint32_t values = operand_here(operand_columns(shared->keys[count % WGMMA_STAGES][own * 4], WGMMA_CHUNK));
    products_begin();
#pragma unroll
    for (uint32_t step = 0; step < MLAK_CUDA_TILE / 16; step++) {
        uint32_t b = operand_move(values, step * 2048);
        bool add = !first || step > 0;
        if (TYPES == MLAK_CUDA_FP16)
            product_64x256_fp16_own(o, p + step * 4, b, add);
        else
            product_64x256_bf16_own(o, p + step * 4, b, add);
    }
    products_commit();
}

/* Room for others: own half of tile `count`; and, of another's, where its P was. */
__device__ static inline void wgmma_give(struct wgmma_shared *shared, uint32_t own, uint32_t count)
{
    if (threadIdx.x % 32 == 0)
        barrier_arrive(&shared->keys_empty[count % WGMMA_STAGES][own]);
}

/* The other one's tile: O follows its maxima, and its products set off. */
template <enum mlak_cuda_types TYPES>
__device__ static inline void wgmma_other(struct wgmma_shared *shared, struct wgmma_rows *rows, uint32_t own,
                                          uint32_t count, bool first, float o[128])
{
    wgmma_follow(shared, rows, count, first, o);
    barrier_wait(&shared->p_full[count % WGMMA_STAGES], count / WGMMA_STAGES % 2);
    wgmma_add_shared<TYPES>(shared, own, count, first, o);
}

/* Own tile i of the item, of `count` of all, and between its scores the other's, the one before. FIRST: of both, there
 * is none before. */
template <enum mlak_cuda_types TYPES, bool FIRST>
__device__ static inline void wgmma_own(struct wgmma_shared *shared, const struct wgmma_item *slot,
                                        struct wgmma_rows *rows, uint32_t own, uint32_t i, uint32_t count,
                                        float o[128])
{
    float s[32], shrink[2];
    uint32_t p[16];
    wgmma_see_copies(shared, slot, i, count);
    wgmma_score<TYPES, 0, 2>(shared, own, count, s);
    if (!FIRST)
        wgmma_other<TYPES>(shared, rows, own, count - 1, i == 1, o);
    wgmma_score<TYPES, 2, 3>(shared, own, count, s);
    if (!FIRST) {
        products_wait<1>();
        wgmma_give(shared, own, count - 1);
    }
    wgmma_score<TYPES, 3, WGMMA_PIECES>(shared, own, count, s);
    struct wgmma_sight sight = wgmma_look(slot, slot->item.tile + i);
    float scale = slot->scale;
    bool last = i + 2 >= slot->tiles; /* q is not needed any more */
    products_wait<0>();
    products_there<32>(s);
    if (!FIRST)
        products_there<128>(o);
    if (last && threadIdx.x % 32 == 0)
        barrier_arrive(&shared->q_empty);
    wgmma_weigh<TYPES>(shared, scale, &sight, rows, count % WGMMA_STAGES, s, p, shrink);
    if (!FIRST)
        wgmma_shrink_o(o, shrink);
    wgmma_add_own<TYPES>(shared, p, own, count, FIRST, o);
    products_wait<0>();
    products_there<128>(o);
    wgmma_give(shared, own, count);
}

/* Four lanes' values i are lane i's four. */
__device__ static inline void wgmma_transpose(uint32_t v[4])
{
    uint32_t lane = threadIdx.x % 32;
#pragma unroll
    for (uint32_t i = 0; i < 4; i += 2) {
        uint32_t got = __shfl_xor_sync(0xffffffff, lane & 1 ? v[i] : v[i + 1], 1);
        v[i] = lane & 1 ? got : v[i];
        v[i + 1] = lane & 1 ? v[i + 1] : got;
    }
#pragma unroll
    for (uint32_t i = 0; i < 2; i++) {
        uint32_t got = __shfl_xor_sync(0xffffffff, lane & 2 ? v[i] : v[i + 2], 2);
        v[i] = lane & 2 ? got : v[i];
        v[i + 2] = lane & 2 ? v[i + 2] : got;
    }
}

/* The rows' outcome: to out and lse, or to their slot. */
__device__ static inline void wgmma_finish(const struct wgmma_item *slot, uint32_t own, const float maximum[2],
                                           const float sum[2], const float o[128])
{
    const struct mlak_cuda_item *item = &slot->item;
    const struct mlak_row *row = &slot->row;
    uint32_t warp = threadIdx.x % WGMMA_GROUP / 32, lane = threadIdx.x % 32, columns = own * 256;
#pragma unroll
    for (uint32_t half = 0; half < 2; half++) {
        uint32_t r = warp * 16 + lane / 4 + half * 8, folded = item->first_row + r;
        bool there = r < item->rows, speaks = there && own == 0 && lane % 4 == 0;
        if (item->part == NULL) {
            struct item_end end = item_end(row, folded % row->heads, maximum[half], sum[half]);
            uint4 *to = (uint4 *)(void *)item_out(row, folded, columns + lane % 4 * 8);
#pragma unroll
            for (uint32_t n = 0; n < 32; n += 4) { /* a lane has 2 of 8 columns; then it has all of another 8 */
                uint32_t v[4];
#pragma unroll
                for (uint32_t i = 0; i < 4; i++)
                    v[i] = item_pack(row, o[(n + i) * 4 + half * 2], o[(n + i) * 4 + half * 2 + 1], end.factor);
                wgmma_transpose(v);
                if (there)
                    to[n] = make_uint4(v[0], v[1], v[2], v[3]);
            }
            if (speaks && row->lse != NULL)
                row->lse[folded] = end.lse;
            continue;
        }
        if (!there)
            continue;
        float2 *to = (float2 *)(void *)(item->part + part_o(r, columns + lane % 4 * 2));
#pragma unroll
        for (uint32_t n = 0; n < 32; n++)
            to[n * 4] = make_float2(o[n * 4 + half * 2], o[n * 4 + half * 2 + 1]);
        if (speaks) {
            item->part[part_maximum(r)] = maximum[half];
            item->part[part_sum(r)] = sum[half];
        }
    }
}

/* Sums of both warpgroups' weights: all that is left to know of a row. */
__device__ static inline void wgmma_sums(struct wgmma_shared *shared, const struct wgmma_rows *rows, uint32_t own,
                                         uint32_t items, float sum[2])
{
    uint32_t warp = threadIdx.x % WGMMA_GROUP / 32, lane = threadIdx.x % 32, r = warp * 16 + lane / 4;
#pragma unroll
    for (uint32_t half = 0; half < 2; half++) {
        sum[half] = rows->sum[half];
        sum[half] += __shfl_xor_sync(0xffffffff, sum[half], 1);
        sum[half] += __shfl_xor_sync(0xffffffff, sum[half], 2);
        if (lane % 4 == 0)
            shared->sums[items % 2][own][r + half * 8] = sum[half];
    }
    barrier_meet(WGMMA_ENDS, 2 * WGMMA_GROUP);
#pragma unroll
    for (uint32_t half = 0; half < 2; half++)
        sum[half] = shared->sums[items % 2][0][r + half * 8] + shared->sums[items % 2][1][r + half * 8];
}

template <enum mlak_cuda_types TYPES>
__device__ static inline void wgmma_compute(struct wgmma_shared *shared, uint32_t own)
{
    float o[128];
    for (uint32_t items = 0, begun = 0;; items++) { /* tiles of the items before */
        const struct wgmma_item *slot = &shared->items[items % WGMMA_ITEMS];
        barrier_wait(&shared->q_full, items % 2);
        shared_to_products();
        uint32_t tiles = slot->tiles, i = own;
        if (tiles == 0)
            return;
        struct wgmma_rows rows = {{-INFINITY, -INFINITY}, {0, 0}};
        warp_meet(); /* all of it have seen q_full */
        if (own == 1 && tiles == 1 && threadIdx.x % 32 == 0)
            barrier_arrive(&shared->q_empty);
        if (own == 0) {
            wgmma_own<TYPES, true>(shared, slot, &rows, own, 0, begun, o);
            i += 2;
        }
#pragma unroll 1
        for (; i < tiles; i += 2)
            wgmma_own<TYPES, false>(shared, slot, &rows, own, i, begun + i, o);
        if (i == tiles) { /* the last one is not own */
            wgmma_other<TYPES>(shared, &rows, own, begun + tiles - 1, tiles == 1, o);
            products_wait<0>();
            products_there<128>(o);
            wgmma_give(shared, own, begun + tiles - 1);
        }
        begun += tiles;
        float sum[2];
        wgmma_sums(shared, &rows, own, items, sum);
        bool stopped = wgmma_stopped(slot);
        if (!stopped)
            wgmma_finish(slot, own, rows.maximum, sum, o);
    }
}

/* ---- the kernel ---- */

template <enum mlak_cuda_types TYPES> __device__ static inline void wgmma_kernel(const struct mlak_cuda_job *job)
{
    struct wgmma_shared *shared = (struct wgmma_shared *)(void *)mlak_shared;
    uint32_t group = warp_uniform(threadIdx.x / WGMMA_GROUP);
    kernel_begins();
    if (threadIdx.x == 0) {
        barrier_new(&shared->q_full, WGMMA_LOAD_WARPS - 1);
        barrier_new(&shared->q_empty, 2 * WGMMA_GROUP / 32);
        for (uint32_t stage = 0; stage < WGMMA_STAGES; stage++) {
            barrier_new(&shared->maxima_full[stage], WGMMA_GROUP);
            barrier_new(&shared->p_full[stage], WGMMA_GROUP);
            for (uint32_t piece = 0; piece < WGMMA_PIECES; piece++)
                barrier_new(&shared->keys_full[stage][piece], WGMMA_LOAD_WARPS);
            for (uint32_t half = 0; half < 2; half++)
                barrier_new(&shared->keys_empty[stage][half], WGMMA_GROUP / 32);
        }
    }
    if (threadIdx.x == WGMMA_LOADS * WGMMA_GROUP && job->n_sources == 1 && job->source.box_rows > 0)
        for (uint32_t i = 0; i < 2; i++)
            map_expect(&job->source.keys[i]);
    barriers_meet();
    await_kernel_before();
    let_next_kernel_start();
    if (group == WGMMA_LOADS) {
        registers_give<WGMMA_LOAD_REGISTERS>();
        wgmma_loads(shared, job);
    } else {
        registers_take<WGMMA_COMPUTE_REGISTERS>();
        wgmma_compute<TYPES>(shared, group);
    }
}

#define WGMMA_KERNEL(name, TYPES)                                                                                      \
    MLAK_KERNEL(mlak_cuda_split_wgmma_##name, MLAK_CUDA_WGMMA_THREADS, struct mlak_cuda_job job)                       \
    {                                                                                                                  \
        wgmma_kernel<TYPES>(&job);                                                                                     \
    }
WGMMA_KERNEL(bf16, MLAK_CUDA_BF16)
WGMMA_KERNEL(fp16, MLAK_CUDA_FP16)
