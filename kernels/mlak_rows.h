/* mlak_rows.h - a row of the request table: how it is drawn from a batch, and which keys its query tokens see, under
 * which mask, window and context-parallel rank. One source for the host (mlak_prepare.c) and for CUDA kernels.
 *
 * Global and local keys: of the global keys 0..G-1, a rank holds runs of `interleave` keys, one run in every
 * `world * interleave`. All rules speak of global indices; kernels walk local ones. Both orders agree, so a range of
 * global keys is a range of local keys, and row_local_count maps its ends. */
#ifndef MLAK_ROWS_H
#define MLAK_ROWS_H

#include "mlak.h"

#ifdef __CUDACC__
#define MLAK_ROWS static __host__ __device__ inline
#else
#define MLAK_ROWS static inline
#endif

MLAK_ROWS int64_t row_least(int64_t a, int64_t b) { return a < b ? a : b; }
MLAK_ROWS int64_t row_most(int64_t a, int64_t b) { return a > b ? a : b; }

/* ---- what a row sees ---- */

MLAK_ROWS int64_t row_local_count(const struct mlak_row *row, int64_t g)
{
    int64_t run = row->dcp_interleave, period = row->dcp_world * run;
    if (g <= 0 || period == run) /* one rank: all of them */
        return row_most(g, 0);
    return g / period * run + row_least(row_most(g % period - row->dcp_rank * run, 0), run);
}

MLAK_ROWS int64_t row_global_index(const struct mlak_row *row, int64_t c)
{
    int64_t run = row->dcp_interleave;
    if (row->dcp_world == 1)
        return c;
    return c / run * row->dcp_world * run + row->dcp_rank * run + c % run;
}

/* The end of what token t may see: itself included under a causal mask, else all keys. */
MLAK_ROWS int64_t row_global_bound(const struct mlak_row *row, uint32_t t)
{
    int64_t k = row->global_len;
    return row->mask == MLAK_MASK_CAUSAL ? row_least(row_most(k - ((int64_t)row->q_len - 1) + t, 0), k) : k;
}

/* The first key of token t. */
MLAK_ROWS int64_t row_global_start(const struct mlak_row *row, uint32_t t)
{
    return row->window ? row_most(row_global_bound(row, t) - row->window, 0) : 0;
}

/* mlak_visible. */
MLAK_ROWS struct mlak_visible row_visible(const struct mlak_row *row, uint32_t t)
{
    int64_t bound = row_global_bound(row, t), base = row->mask == MLAK_MASK_TREE ? bound - row->q_len : bound;
    struct mlak_visible visible;
    visible.lo = row_local_count(row, row_global_start(row, t));
    visible.base = row_local_count(row, base);
    visible.hi = row_local_count(row, bound);
    return visible;
}

/* mlak_tree_sees. */
MLAK_ROWS bool row_tree_sees(const struct mlak_row *row, uint64_t bits, int64_t c)
{
    int64_t draft = row_global_index(row, c) - (row->global_len - row->q_len);
    return draft >= 0 && draft < row->q_len && (bits >> draft & 1);
}

/* What any of the tokens [first, end) sees, first < end, but for the draft bits. Windows of consecutive tokens advance
 * by a key at most and hold one at least, so their union has no gap. */
MLAK_ROWS struct mlak_visible row_visible_range(const struct mlak_row *row, uint32_t first, uint32_t end)
{
    struct mlak_visible any = row_visible(row, end - 1);
    any.lo = row_local_count(row, row_global_start(row, first));
    return any;
}

/* The same with the bits; as mlak_visible_any. */
MLAK_ROWS struct mlak_visible row_visible_any(const struct mlak_row *row, uint32_t first, uint32_t end, uint64_t *bits)
{
    *bits = 0;
    for (uint32_t t = first; t < end; t++)
        *bits |= row->tree_mask[t];
    return row_visible_range(row, first, end);
}

/* ---- a batch into rows ---- */

/* The first rule that entry i of cu_q breaks, NULL if none; `before` is entry i - 1. */
enum row_cu_q_fault { ROW_CU_Q_OK, ROW_CU_Q_START, ROW_CU_Q_LESS, ROW_CU_Q_STEP, ROW_CU_Q_END };
MLAK_ROWS enum row_cu_q_fault row_judge_cu_q(uint32_t i, int64_t value, int64_t before, uint64_t q_rows)
{
    int64_t step = i ? value - before : 0;
    return i == 0 && value != 0      ? ROW_CU_Q_START
           : step < 0                ? ROW_CU_Q_LESS
           : step > MLAK_MAX_Q       ? ROW_CU_Q_STEP
           : value > (int64_t)q_rows ? ROW_CU_Q_END
                                     : ROW_CU_Q_OK;
}

/* The row of request b, whose query tokens are [token, token + q_len): everything but its length, and its tree masks,
 * which are zero without a tree. */
MLAK_ROWS void row_describe(struct mlak_row *row, const struct mlak_batch *batch, uint32_t b, uint64_t token,
                            uint32_t q_len, float q_scale, float k_scale, float v_scale)
{
    uint64_t q_bytes = batch->q_dtype == MLAK_E4M3 ? MLAK_D : MLAK_D * 2;
    row->q = (const uint8_t *)batch->q + token * batch->heads * q_bytes;
    row->kv = (const uint8_t *)batch->kv;
    row->out = (uint8_t *)batch->out + token * batch->heads * (MLAK_V * 2);
    row->lse = batch->has_lse ? batch->lse + token * batch->heads : NULL;
    row->block_table = batch->block_table + (uint64_t)b * batch->max_pages;
    row->sink = batch->has_sink && batch->dcp_rank == 0 ? batch->sink : NULL;
    row->page_stride = batch->page_stride;
    row->row_stride = batch->row_stride;
    row->pages = batch->pages;
    row->page_size = batch->page_size;
    row->max_pages = batch->max_pages;
    row->heads = batch->heads;
    row->q_len = q_len;
    row->dcp_world = batch->dcp_world;
    row->dcp_rank = batch->dcp_rank;
    row->dcp_interleave = batch->dcp_interleave;
    row->window = batch->window;
    row->q_dtype = batch->q_dtype;
    row->out_dtype = batch->out_dtype;
    row->kv_format = batch->kv_format;
    row->mask = batch->mask;
    row->lse_base = batch->lse_base;
    row->deterministic = batch->deterministic;
    row->score_scale = (float)(batch->softmax_scale * (double)q_scale * (double)k_scale);
    row->v_scale = v_scale;
    row->request = b;
    row->owner = 0;
    row->code = MLAK_ROW_OK;
    row->detail[0] = row->detail[1] = -1;
}

/* The length of the row's request, as read from client memory, judged. */
MLAK_ROWS void row_set_length(struct mlak_row *row, int32_t length)
{
    int64_t room = (int64_t)row->max_pages * row->page_size;
    row->global_len = length;
    row->local_len = row_local_count(row, row->global_len);
    if (row->global_len < 0) {
        row->detail[0] = row->global_len;
        row->code = MLAK_ROW_SEQLEN_NEGATIVE;
    } else if (row->local_len > room) {
        row->detail[0] = row->local_len;
        row->detail[1] = room;
        row->code = MLAK_ROW_SEQLEN_TOO_LONG;
    }
}

/* Of the tree masks, only the bits that name a key: 0..q_len-1, and none before the first key. Call after
 * row_set_length. */
MLAK_ROWS uint64_t row_tree_bits(const struct mlak_row *row)
{
    int64_t missing = row_least(row_most(row->q_len - row->global_len, 0), row->q_len);
    uint64_t below = row->q_len == 64 ? UINT64_MAX : (UINT64_C(1) << row->q_len) - 1;
    return missing == 64 ? 0 : below >> missing << missing;
}

#endif
