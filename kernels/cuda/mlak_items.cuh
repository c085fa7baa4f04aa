/* mlak_items.cuh - what the split and the combine kernel share: which request an item belongs to, and how a row ends.
 */
#ifndef MLAK_ITEMS_CUH
#define MLAK_ITEMS_CUH

#include "mlak_cuda.h"
#include "mlak_ptx.cuh"
#include "mlak_rows.h"

#define ITEM_LOG2_E 1.4426950408889634f
#define ITEM_LN_2 0.6931471805599453f

/* The last request that begins at or before `at`. Requests without any tile begin where the next one does, and are
 * passed over. */
__device__ static inline uint32_t item_request(const struct mlak_cuda_request *requests, uint32_t count, uint64_t at)
{
    uint32_t low = 0, high = count;
    while (high - low > 1) {
        uint32_t middle = (low + high) / 2;
        if (requests[middle].first <= at)
            low = middle;
        else
            high = middle;
    }
    return low;
}

/* Slots of the parts of thread block `block` of the split kernel: of the item that its share begins with, and of the one
 * that it ends with, if that is another. */
__device__ static inline uint32_t item_slot(uint64_t block, bool begins)
{
    return (uint32_t)(block * 2 + (begins ? 0 : 1));
}

/* Nobody wants the launch's result any more. */
__device__ static inline bool item_cancelled(const struct mlak_cuda_job *job)
{
    return read_once(&job->schedule->cancelled) == job->ticket;
}

/* A row's last step. `maximum` and `sum` are of its visible keys, in base 2; -inf and 0 without any. The sink is one
 * more logit, in natural-log units. */
struct item_end {
    float factor, lse;
};
__device__ static inline struct item_end item_end(const struct mlak_row *row, uint32_t head, float maximum, float sum)
{
    float top = maximum, weight = maximum == -INFINITY ? 0 : 1, natural = NAN;
    if (row->sink != NULL) {
        natural = read_once(&row->sink[head]);
        float sink = natural * ITEM_LOG2_E; /* infinite, of the largest numbers */
        top = fmaxf(maximum, sink);
        weight = maximum == top && top != -INFINITY ? 1 : maximum == -INFINITY ? 0 : power_of_two(maximum - top);
        sum = sum * weight + (sink == -INFINITY ? 0 : sink == top ? 1 : power_of_two(sink - top));
    }
    struct item_end end;
    end.factor = weight == 0 ? 0 : weight * row->v_scale / sum;
    end.lse = top == -INFINITY ? -INFINITY : top + log2f(sum);
    if (row->lse_base == MLAK_LSE_E) /* where there is only a sink, it is the outcome, unrounded */
        end.lse = weight == 0 && sum == 1 && natural == natural ? natural : end.lse * ITEM_LN_2;
    return end;
}

/* Two neighbouring elements of folded row r. */
__device__ static inline void item_store(const struct mlak_row *row, uint32_t r, uint32_t column, float a, float b,
                                         float factor)
{
    a = factor == 0 ? 0 : a * factor; /* a row that sees nothing is 0, whatever the others of its tile saw */
    b = factor == 0 ? 0 : b * factor;
    uint32_t *to = (uint32_t *)(void *)(row->out + ((uint64_t)r * MLAK_V + column) * 2);
    *to = row->out_dtype == MLAK_BF16 ? pack_bf16(a, b) : pack_fp16(a, b);
}

#endif
