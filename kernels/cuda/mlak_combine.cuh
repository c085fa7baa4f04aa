/* mlak_combine.cuh - kernel 3 of a launch: parts become outputs, and the host hears of it.
 *
 *     entry      of job.merges: a row block that was split, or rows without a key. Blocks take entries in turn; or,
 *                where there are more blocks than entries, several blocks one entry
 *     piece      of a row: a quarter of its 512 columns; or two or all four, where there are more pieces than warps and
 *                parts so few that all of it is on its way at once
 *     warp       takes a piece at a time; or up to eight of a block one piece, each some of its parts
 *     lane       owns 4 neighbouring columns of each quarter; looks at one part's maximum and sum
 *     row order  splits are merged in their order, never in that of their arrival: the same launch gives the same bits
 *     the end    the last block to finish writes the completion word
 *
 * What it does is wait: for memory, so all that a warp adds up is on its way to shared memory at once, 20 times 16
 * bytes of each lane, together with the look at maxima and sums, and its row; and for code, which goes in circles
 * where it can. */
#include "mlak_items.cuh"

enum {
    COMBINE_WARPS = MLAK_CUDA_THREADS / 32,
    COMBINE_QUARTERS = 4, /* of a row */
    COMBINE_COLUMNS = MLAK_V / COMBINE_QUARTERS,
    COMBINE_PLACES = 20 /* of a warp: an eighth of a row's parts, a block of the split kernel each */
};
static_assert(COMBINE_COLUMNS == 32 * 4, "four of each lane");

struct combine_shared {
    float4 places[COMBINE_WARPS][COMBINE_PLACES][32]; /* of what a lane fetches for itself; then [0], its sum */
    float tops[COMBINE_WARPS], sums[COMBINE_WARPS];   /* of each warp's parts */
    uint32_t last;
};
static_assert(sizeof(struct combine_shared) <= MLAK_CUDA_COMBINE_SHARED, "");

__device__ static inline const float *combine_part(const struct mlak_cuda_job *job, const struct mlak_cuda_merge *merge,
                                                   uint32_t i)
{
    uint32_t slot = i == 0 ? merge->slot : merge->next_slot + (i - 1) * merge->stride;
    return job->parts + (uint64_t)slot * MLAK_CUDA_PART_FLOATS;
}

/* What a lane knows of a row's parts so far: the largest maximum; sum and columns, which refer to it. */
struct combine_row {
    float top, sum;
    float4 o;
};

/* Columns from `column` on of row `r` set off, of `count` parts from `first` on: of each, 2^wide neighbouring
 * places, a quarter of the row's columns in each. */
__device__ static inline void combine_fetch(const struct mlak_cuda_job *job, const struct mlak_cuda_merge *merge,
                                            uint32_t r, uint32_t column, uint32_t wide, uint32_t first, uint32_t count,
                                            float4 (*places)[32])
{
    enum { AT_A_TIME = 4 };
    uint32_t lane = threadIdx.x % 32;
#pragma unroll 1
    for (uint32_t at = 0; at < count << wide; at += AT_A_TIME)
#pragma unroll
        for (uint32_t i = 0; i < AT_A_TIME; i++) {
            uint32_t place = at + i, quarter = place & ((1u << wide) - 1);
            if (place < count << wide)
                copy_async(&places[place][lane],
                           combine_part(job, merge, first + (place >> wide)) +
                               part_o(r, column + quarter * COMBINE_COLUMNS + lane * 4),
                           true);
        }
    copy_commit();
}

/* More parts, of which each lane has the maximum and the sum of one, or -inf: the row's top, sum and columns follow.
 * The weight of the lane's part. */
__device__ static inline float combine_weigh(struct combine_row *row, float maximum, float sum)
{
    float before = row->top, top = fmaxf(before, maximum);
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2)
        top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, lanes));
    float shrink = before == -INFINITY ? 0 : power_of_two(before - top); /* not -inf - -inf */
    float weight = maximum == -INFINITY ? 0 : power_of_two(maximum - top);
    sum = weight == 0 ? 0 : weight * sum;
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2)
        sum += __shfl_xor_sync(0xffffffff, sum, lanes);
    row->top = top;
    row->sum = row->sum * shrink + sum;
    row->o.x = shrink == 0 ? 0 : row->o.x * shrink;
    row->o.y = shrink == 0 ? 0 : row->o.y * shrink;
    row->o.z = shrink == 0 ? 0 : row->o.z * shrink;
    row->o.w = shrink == 0 ? 0 : row->o.w * shrink;
    return weight;
}

/* `o` and what `count` places hold, `apart` from each other, the i-th times lane i's weight. */
__device__ static inline float4 combine_add(float4 o, const float4 (*place)[32], uint32_t apart, uint32_t count,
                                            float weight)
{
    enum { AT_A_TIME = 4 };
#pragma unroll 1
    for (uint32_t at = 0; at < count; at += AT_A_TIME, place += AT_A_TIME * apart) {
        float by[AT_A_TIME];
        float4 values[AT_A_TIME];
#pragma unroll
        for (uint32_t i = 0; i < AT_A_TIME; i++) { /* a part without a visible key may hold NaN */
            by[i] = __shfl_sync(0xffffffff, weight, (int)(at + i));
            values[i] = make_float4(0, 0, 0, 0);
            if (by[i] != 0)
                values[i] = place[i * apart][threadIdx.x % 32];
        }
#pragma unroll
        for (uint32_t i = 0; i < AT_A_TIME; i++) {
            o.x += by[i] * values[i].x;
            o.y += by[i] * values[i].y;
            o.z += by[i] * values[i].z;
            o.w += by[i] * values[i].w;
        }
    }
    return o;
}

/* What the `together` warps from this one on have of a piece, each of its parts. All threads of the block; of use to
 * the first of those warps. */
__device__ static inline void combine_gather(struct combine_shared *shared, struct combine_row *row, uint32_t together)
{
    uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float maximum = -INFINITY, sum = 0;
    shared->tops[warp] = row->top;
    shared->sums[warp] = row->sum;
    shared->places[warp][0][lane] = row->o;
    __syncthreads();
    if (warp % together == 0) {
        if (lane < together) {
            maximum = shared->tops[warp + lane];
            sum = shared->sums[warp + lane];
        }
        *row = {-INFINITY, 0, {}};
        float weight = combine_weigh(row, maximum, sum);
        row->o = combine_add(row->o, shared->places[warp], COMBINE_PLACES, together, weight);
    }
    __syncthreads(); /* shared memory is the next entry's */
}

/* One entry, by `blocks` blocks, of which this is number `block`. */
__device__ static inline void combine_entry(const struct mlak_cuda_job *job, const struct mlak_cuda_merge *merge,
                                            uint32_t block, uint32_t blocks)
{
    struct combine_shared *shared = (struct combine_shared *)(void *)mlak_shared;
    const struct mlak_row row = row_here(job, merge->request, merge->source);
    uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blocks * COMBINE_WARPS;
    uint32_t pieces = merge->rows * COMBINE_QUARTERS, parts = merge->parts;
    uint32_t wide = 0, many = 0; /* quarters of a piece, and warps that take one together: powers of two */
    while (wide < 2 && pieces > warps && parts << (wide + 1) <= COMBINE_PLACES) {
        pieces /= 2;
        wide++;
    }
    while (1 << many < COMBINE_WARPS && parts > 8u << many && pieces << (many + 1) <= warps &&
           !job->source.batch.deterministic) /* whose bits depend on nothing else */
        many++;
    uint32_t together = 1u << many, own = warp % together, share = (parts + together - 1) >> many;
    float4(*places)[32] = shared->places[warp];
#pragma unroll 1
    for (uint32_t unit = (warp >> many) * blocks + block; unit < pieces || many > 0; unit += warps >> many) {
        uint32_t r = unit << wide >> 2, column = (unit << wide) % COMBINE_QUARTERS * COMBINE_COLUMNS;
        uint32_t first = own * share, end = unit < pieces ? (uint32_t)row_least(first + share, parts) : 0, count;
        float weight;
        struct combine_row sum = {-INFINITY, 0, {}};
#pragma unroll 1
        for (;; first += COMBINE_PLACES) {
            float maximum = -INFINITY, whole = 0;
            count = first < end ? (uint32_t)row_least(end - first, COMBINE_PLACES) : 0;
            if (lane < count) {
                const float *part = combine_part(job, merge, first + lane);
                maximum = part[part_maximum(r)];
                whole = part[part_sum(r)];
            }
            combine_fetch(job, merge, r, column, wide, first, count, places);
            weight = combine_weigh(&sum, maximum, whole);
            copy_wait<0>();
            sum.o = combine_add(sum.o, places, 1u << wide, count, weight);
            if (first + COMBINE_PLACES >= end)
                break;
        }
        if (many > 0)
            combine_gather(shared, &sum, together);
        if (own == 0 && unit < pieces && row.code == MLAK_ROW_OK) {
            uint32_t folded = merge->first_row + r;
            struct item_end outcome = item_end(&row, folded % row.heads, sum.top, sum.sum);
            if (column == 0 && lane == 0 && row.lse != NULL)
                row.lse[folded] = outcome.lse;
            for (uint32_t quarter = 0;;) {
                *(uint2 *)(void *)item_out(&row, folded, column + quarter * COMBINE_COLUMNS + lane * 4) =
                    make_uint2(item_pack(&row, sum.o.x, sum.o.y, outcome.factor),
                               item_pack(&row, sum.o.z, sum.o.w, outcome.factor));
                if (++quarter >> wide)
                    break;
                sum.o = combine_add({}, places + quarter, 1u << wide, count, weight);
            }
        }
        if (many > 0)
            break;
    }
}

MLAK_KERNEL(mlak_cuda_combine, MLAK_CUDA_THREADS, struct mlak_cuda_job job)
{
    struct combine_shared *shared = (struct combine_shared *)(void *)mlak_shared;
    kernel_begins();
    await_kernel_before();
    uint32_t merges = job.schedule->merges, grid = gridDim.x;
    uint32_t blocks = merges == 0 || merges > grid ? 1 : grid / merges; /* of an entry */
    uint32_t busy = merges > grid ? grid : merges == 0 ? 1 : merges * blocks;
    if (blockIdx.x >= busy) /* the first one always has something to say */
        return;
#pragma unroll 1
    for (uint32_t entry = blockIdx.x / blocks; entry < merges; entry += grid) { /* more than one: of a block each */
        const struct mlak_cuda_merge merge = job.merges[entry];
        combine_entry(&job, &merge, blockIdx.x % blocks, blocks);
    }
    if (job.silent)
        return;
    __syncthreads();
    if (threadIdx.x == 0) { /* what the others wrote happened before the barrier, and so before the fence */
        __threadfence();
        shared->last = atomicAdd(&job.schedule->blocks_done, 1u) == busy - 1;
    }
    __syncthreads();
    if (!shared->last || threadIdx.x > 0)
        return;
    job.schedule->blocks_done = 0;
    __threadfence_system(); /* also for what the other blocks wrote, as far as this one has seen it: all of it */
    publish(&job.result->done, job.ticket);
}
