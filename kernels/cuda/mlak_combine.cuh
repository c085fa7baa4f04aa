/* mlak_combine.cuh - kernel 3 of a launch: parts become outputs, and the host hears of it.
 *
 *     entry      of job.merges: a row block that was split, or rows without a key. Blocks take entries in turn; or,
 *                where there are more blocks than entries, several blocks one entry
 *     piece      of a row: all of its 512 columns, a half, a quarter or an eighth, as there are enough warps
 *     warp       takes a piece of a row at a time; or up to eight of a block one piece, each some of its parts
 *     lane       owns 2 neighbouring columns of each 64; looks at one of 32 parts' maximum and sum
 *     row order  splits are merged in their order, never in that of their arrival: the same launch gives the same bits
 *     the end    the last block to finish writes the completion word
 *
 * What it does is wait for memory: so each look-up is made by all lanes at once, and many parts are on their way at a
 * time. */
#include "mlak_items.cuh"

enum { COMBINE_WARPS = MLAK_CUDA_THREADS / 32, COMBINE_MOST_PIECES = 8, COMBINE_COLUMNS = MLAK_V / 8 };

struct combine_shared {
    uint32_t last;
    float sums[COMBINE_WARPS], columns[COMBINE_WARPS][COMBINE_COLUMNS]; /* of each warp's parts */
};
static_assert(sizeof(struct combine_shared) <= MLAK_CUDA_COMBINE_SHARED, "");

__device__ static inline const float *combine_part(const struct mlak_cuda_job *job, const struct mlak_cuda_merge *merge,
                                                   uint32_t i)
{
    uint32_t slot = i == 0 ? merge->slot : merge->next_slot + (i - 1) * merge->stride;
    return job->parts + (uint64_t)slot * MLAK_CUDA_PART_FLOATS;
}

__device__ static inline float combine_most(float value) /* of the warp */
{
    for (int lanes = 16; lanes > 0; lanes /= 2)
        value = fmaxf(value, __shfl_xor_sync(0xffffffff, value, lanes));
    return value;
}

__device__ static inline float combine_sum(float value) /* of the warp */
{
    for (int lanes = 16; lanes > 0; lanes /= 2)
        value += __shfl_xor_sync(0xffffffff, value, lanes);
    return value;
}

/* The largest maximum of row `r`. */
__device__ static inline float combine_top(const struct mlak_cuda_job *job, const struct mlak_cuda_merge *merge,
                                           uint32_t r)
{
    float top = -INFINITY;
    for (uint32_t i = threadIdx.x % 32; i < merge->parts; i += 32)
        top = fmaxf(top, combine_part(job, merge, i)[part_maximum(r)]);
    return combine_most(top);
}

/* What a lane has of a row: two neighbouring columns of each 64 of PAIRS times 64. */
template <int PAIRS> struct combine_columns {
    float2 at[PAIRS];
};

/* Of parts [first, end), the columns from `column` on of row `r`, weighed by how far they are from the row's top, which
 * is told, as is the sum of the weights of those parts. Up to 16 loads are on their way at a time, and none of them
 * waits for a weight. */
template <int PAIRS>
__device__ static inline struct combine_columns<PAIRS> combine_add(const struct mlak_cuda_job *job,
                                                                   const struct mlak_cuda_merge *merge, uint32_t r,
                                                                   uint32_t column, uint32_t first, uint32_t end,
                                                                   float *top, float *sum)
{
    enum { AT_A_TIME = 16 / PAIRS };
    uint32_t lane = threadIdx.x % 32;
    struct combine_columns<PAIRS> o = {};
    float weights = 0;
    bool all = first == 0 && end == merge->parts && end <= 32; /* then one look tells */
    *top = all ? -INFINITY : combine_top(job, merge, r);
    for (; first < end; first += 32) {
        uint32_t own = first + lane, count = (uint32_t)row_least(end - first, 32);
        float maximum = -INFINITY, whole = 0;
        if (own < end) {
            const float *part = combine_part(job, merge, own);
            maximum = part[part_maximum(r)];
            whole = part[part_sum(r)];
        }
        float weight = 0;
        for (uint32_t at = 0; at < count; at += AT_A_TIME) {
            float2 values[AT_A_TIME][PAIRS];
#pragma unroll
            for (uint32_t i = 0; i < AT_A_TIME; i++)
#pragma unroll
                for (uint32_t j = 0; j < PAIRS; j++) {
                    const float *part = combine_part(job, merge, first + at + i);
                    const void *from = part + part_o(r, column + j * 64 + lane * 2);
                    values[i][j] = at + i < count ? *(const float2 *)from : make_float2(0, 0);
                }
            if (at == 0) {
                *top = all ? combine_most(maximum) : *top;
                weight = maximum == -INFINITY ? 0 : power_of_two(maximum - *top); /* not -inf - -inf */
                weights += weight == 0 ? 0 : weight * whole;
            }
#pragma unroll
            for (uint32_t i = 0; i < AT_A_TIME; i++) {
                float by = __shfl_sync(0xffffffff, weight, (int)(at + i));
#pragma unroll
                for (uint32_t j = 0; j < PAIRS; j++) { /* what a part without a visible key holds may be NaN */
                    o.at[j].x += by == 0 ? 0 : by * values[i][j].x;
                    o.at[j].y += by == 0 ? 0 : by * values[i][j].y;
                }
            }
        }
    }
    *sum = combine_sum(weights);
    return o;
}

/* Row `r` of an entry, columns from `column` on: what all parts add up to. `sum`: of the whole row. */
template <int PAIRS>
__device__ static inline void combine_end(const struct mlak_row *row, uint32_t folded, uint32_t column, float top,
                                          float sum, const struct combine_columns<PAIRS> *o)
{
    struct item_end outcome = item_end(row, folded % row->heads, top, sum);
    uint32_t lane = threadIdx.x % 32;
#pragma unroll
    for (uint32_t j = 0; j < PAIRS; j++)
        item_store(row, folded, column + j * 64 + lane * 2, o->at[j].x, o->at[j].y, outcome.factor);
    if (column == 0 && lane == 0 && row->lse != NULL)
        row->lse[folded] = outcome.lse;
}

/* PAIRS times 64 columns of row `r`, by one warp. */
template <int PAIRS>
__device__ static inline void combine_piece(const struct mlak_cuda_job *job, const struct mlak_cuda_merge *merge,
                                            const struct mlak_row *row, uint32_t r, uint32_t piece)
{
    float top = -INFINITY, sum = 0;
    const struct combine_columns<PAIRS> o =
        combine_add<PAIRS>(job, merge, r, piece * PAIRS * 64, 0, merge->parts, &top, &sum);
    combine_end<PAIRS>(row, merge->first_row + r, piece * PAIRS * 64, top, sum, &o);
}

/* An eighth of row `r`, by `warps` warps of the block, of which this is number `own`. All threads of the block. */
__device__ static inline void combine_together(const struct mlak_cuda_job *job, const struct mlak_cuda_merge *merge,
                                               const struct mlak_row *row, uint32_t r, uint32_t column, uint32_t warps,
                                               uint32_t own)
{
    struct combine_shared *shared = (struct combine_shared *)(void *)mlak_shared;
    uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, share = (merge->parts + warps - 1) / warps;
    bool there = r < merge->rows;
    float top = -INFINITY, sum = 0;
    struct combine_columns<1> o = {};
    if (there)
        o = combine_add<1>(job, merge, r, column, own * share, (uint32_t)row_least((own + 1) * share, merge->parts),
                           &top, &sum);
    shared->sums[warp] = sum;
    shared->columns[warp][lane * 2] = o.at[0].x;
    shared->columns[warp][lane * 2 + 1] = o.at[0].y;
    __syncthreads();
    for (uint32_t other = warp + 1; own == 0 && other < warp + warps; other++) {
        sum += shared->sums[other];
        o.at[0].x += shared->columns[other][lane * 2];
        o.at[0].y += shared->columns[other][lane * 2 + 1];
    }
    if (own == 0 && there)
        combine_end<1>(row, merge->first_row + r, column, top, sum, &o);
    __syncthreads(); /* shared memory is the next entry's */
}

/* One entry, by `blocks` blocks, of which this is number `block`. */
__device__ static inline void combine_entry(const struct mlak_cuda_job *job, const struct mlak_cuda_merge *merge,
                                            uint32_t block, uint32_t blocks)
{
    const struct mlak_row here = row_here(job, merge->request, merge->source), *row = &here;
    uint32_t warps = blocks * COMBINE_WARPS, own = block * COMBINE_WARPS + threadIdx.x / 32;
    uint32_t pieces = COMBINE_MOST_PIECES, together = 1;
    if (row->code != MLAK_ROW_OK)
        return;
    while (merge->rows * pieces > warps && pieces > 1)
        pieces /= 2;
    while (together < COMBINE_WARPS && merge->parts > together * 8 && merge->rows * pieces * together * 2 <= warps &&
           !job->source.batch.deterministic) /* whose bits depend on nothing else */
        together *= 2;
    if (together > 1) {
        uint32_t unit = own / together;
        combine_together(job, merge, row, unit / pieces, unit % pieces * COMBINE_COLUMNS, together, own % together);
        return;
    }
    for (uint32_t unit = own; unit < merge->rows * pieces; unit += warps) {
        if (pieces == 8)
            combine_piece<1>(job, merge, row, unit / pieces, unit % pieces);
        else if (pieces == 4)
            combine_piece<2>(job, merge, row, unit / pieces, unit % pieces);
        else if (pieces == 2)
            combine_piece<4>(job, merge, row, unit / pieces, unit % pieces);
        else
            combine_piece<8>(job, merge, row, unit, 0);
    }
}

MLAK_KERNEL(mlak_cuda_combine, MLAK_CUDA_THREADS, struct mlak_cuda_job job)
{
    struct combine_shared *shared = (struct combine_shared *)(void *)mlak_shared;
    kernel_begins();
    await_kernel_before();
    uint32_t merges = job.schedule->merges;
    uint32_t blocks = merges == 0 ? 1 : (uint32_t)row_most(gridDim.x / merges, 1); /* of an entry */
    uint32_t busy = (uint32_t)row_least(row_most((int64_t)merges * blocks, 1), gridDim.x);
    if (blockIdx.x >= busy) /* the first one always has something to say */
        return;
    for (uint32_t entry = blockIdx.x / blocks; entry < merges; entry += (busy + blocks - 1) / blocks) {
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
