/* mlak_prepare.c - a batch becomes rows of the request table, on the host, and what is said of rows that failed. The
 * rows' own arithmetic is mlak_rows.h.
 *
 * Client arrays (seqlens, cu_q, tree_mask, scales) may change at any moment. Each of their elements is read here
 * exactly once and only the copy is judged and used; block_table is left to the kernels. Rows are their caller's. */
#include "mlak_rows.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

/* ---- what a row sees ---- */

int64_t mlak_local_count(const struct mlak_row *row, int64_t g) { return row_local_count(row, g); }
struct mlak_visible mlak_visible(const struct mlak_row *row, uint32_t t) { return row_visible(row, t); }
bool mlak_tree_sees(const struct mlak_row *row, uint64_t bits, int64_t c) { return row_tree_sees(row, bits, c); }

struct mlak_visible mlak_visible_any(const struct mlak_row *row, uint64_t *bits)
{
    *bits = 0;
    return row->q_len ? row_visible_any(row, 0, row->q_len, bits) : (struct mlak_visible){0};
}

/* ---- faults of a row ---- */

void mlak_row_page_fault(struct mlak_row *row, uint32_t column, int32_t page)
{
    int64_t unclaimed = -1;
    if (!__atomic_compare_exchange_n(&row->detail[0], &unclaimed, column, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
        return;
    __atomic_store_n(&row->detail[1], page, __ATOMIC_RELAXED);
    __atomic_store_n(&row->code, MLAK_ROW_PAGE_RANGE, __ATOMIC_RELEASE);
}

void mlak_row_fault(const struct mlak_row *row, struct mlak_fault *fault)
{
    int code = __atomic_load_n(&row->code, __ATOMIC_ACQUIRE);
    int64_t first = __atomic_load_n(&row->detail[0], __ATOMIC_RELAXED);
    int64_t second = __atomic_load_n(&row->detail[1], __ATOMIC_RELAXED);
    char field[64];
    snprintf(field, sizeof field, "seqlens[%u]", row->request);
    switch (code) {
    case MLAK_ROW_SEQLEN_NEGATIVE:
        mlak_fail(fault, MLAK_REQUESTS, field, "%" PRId64 " is negative; give the number of KV tokens, 0 for none",
                  first);
        break;
    case MLAK_ROW_SEQLEN_TOO_LONG:
        mlak_fail(fault, MLAK_REQUESTS, field,
                  "%" PRId64 " keys%s do not fit the %" PRId64 " of a block_table row (%u pages of %u); "
                  "shorten it or widen block_table",
                  first, row->dcp_world > 1 ? " on this rank" : "", second, row->max_pages, row->page_size);
        break;
    case MLAK_ROW_PAGE_RANGE:
        snprintf(field, sizeof field, "block_table[%u][%" PRId64 "]", row->request, first);
        mlak_fail(fault, MLAK_REQUESTS, field, "page %" PRId64 " is needed but the pool has %u pages; give 0..pages-1",
                  second, row->pages);
        break;
    case MLAK_ROW_CANCELLED:
        mlak_fail(fault, MLAK_REQUESTS, "", "the request was cancelled while it ran");
        break;
    default:
        mlak_fail(fault, MLAK_OK, "", "%s", "");
    }
}

/* ---- a batch into rows ---- */

static float scale_of(const struct mlak_scale *scale, float absent)
{
    float value = scale->value;
    if (!scale->present)
        return absent;
    if (scale->tensor)
        __atomic_load(scale->tensor, &value, __ATOMIC_RELAXED);
    return value;
}

enum mlak_code mlak_cu_q_fault(uint32_t i, int64_t value, int64_t before, uint64_t q_rows, struct mlak_fault *fault)
{
    static const char *const wrong[] = {
        [ROW_CU_Q_START] = "the first request starts at row 0",
        [ROW_CU_Q_LESS] = "it cannot be less than the entry before it",
        [ROW_CU_Q_STEP] = "a request has at most 64 query tokens",
        [ROW_CU_Q_END] = "it runs past the rows of q",
    };
    enum row_cu_q_fault judgement = row_judge_cu_q(i, value, before, q_rows);
    if (judgement == ROW_CU_Q_OK)
        return MLAK_OK;
    char field[64];
    snprintf(field, sizeof field, "cu_q[%u]", i);
    return mlak_fail(fault, MLAK_BATCH, field, "%" PRId64 " after %" PRId64 ", with %" PRIu64 " rows of q: %s", value,
                     before, q_rows, wrong[judgement]);
}

static enum mlak_code copy_cu_q(const struct mlak_batch *batch, int32_t *copy, struct mlak_fault *fault)
{
    enum mlak_code code = MLAK_OK;
    for (uint32_t i = 0; i <= batch->batch && code == MLAK_OK; i++) {
        copy[i] = __atomic_load_n(&batch->cu_q[i], __ATOMIC_RELAXED);
        code = mlak_cu_q_fault(i, copy[i], i ? copy[i - 1] : 0, batch->q_rows, fault);
    }
    return code;
}

enum mlak_code mlak_prepare(const struct mlak_batch *batch, int32_t *cu_q_copy, uint32_t first, uint32_t count,
                            struct mlak_row *rows, struct mlak_fault *fault)
{
    if (batch->has_cu_q && first == 0) {
        enum mlak_code code = copy_cu_q(batch, cu_q_copy, fault);
        if (code)
            return code;
    }
    float q_scale = scale_of(&batch->q_scale, 1), k_scale = scale_of(&batch->k_scale, 1);
    float v_scale = scale_of(&batch->v_scale, k_scale);
    uint32_t uniform = batch->has_cu_q ? 0 : (uint32_t)(batch->q_rows / batch->batch);

    for (uint32_t i = 0; i < count; i++) {
        struct mlak_row *row = &rows[i];
        uint32_t b = first + i;
        uint64_t token = batch->has_cu_q ? (uint64_t)cu_q_copy[b] : (uint64_t)b * uniform;
        uint32_t q_len = batch->has_cu_q ? (uint32_t)(cu_q_copy[b + 1] - cu_q_copy[b]) : uniform;
        row_describe(row, batch, b, token, q_len, q_scale, k_scale, v_scale);
        row_set_length(row, __atomic_load_n(&batch->seqlens[b], __ATOMIC_RELAXED));
        uint64_t valid = batch->mask == MLAK_MASK_TREE ? row_tree_bits(row) : 0;
        for (uint32_t t = 0; t < q_len; t++)
            row->tree_mask[t] = valid ? __atomic_load_n(&batch->tree_mask[token + t], __ATOMIC_RELAXED) & valid : 0;
    }
    return MLAK_OK;
}
