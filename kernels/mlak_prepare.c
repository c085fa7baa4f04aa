/* mlak_prepare.c - a batch becomes rows of the request table, and the rows' own arithmetic: which keys a query token
 * sees, under which mask, window and context-parallel rank.
 *
 * Client arrays (seqlens, cu_q, tree_mask, scales) may change at any moment. Each of their elements is read here
 * exactly once and only the copy is judged and used; block_table is left to the kernels. Rows are their caller's.
 *
 * Global and local keys: of the global keys 0..G-1, a rank holds runs of `interleave` keys, one run in every
 * `world * interleave`. All rules speak of global indices; kernels walk local ones. Both orders agree, so a range of
 * global keys is a range of local keys, and mlak_local_count maps its ends. */
#include "mlak.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

/* ---- what a row sees ---- */

int64_t mlak_local_count(const struct mlak_row *row, int64_t g)
{
    int64_t run = row->dcp_interleave, period = row->dcp_world * run;
    if (g <= 0)
        return 0;
    return g / period * run + least(most(g % period - row->dcp_rank * run, 0), run);
}

static int64_t global_index(const struct mlak_row *row, int64_t c)
{
    int64_t run = row->dcp_interleave;
    return c / run * row->dcp_world * run + row->dcp_rank * run + c % run;
}

/* The end of what token t may see: itself included under a causal mask, else all keys. */
static int64_t global_bound(const struct mlak_row *row, uint32_t t)
{
    int64_t k = row->global_len;
    return row->mask == MLAK_MASK_CAUSAL ? least(most(k - ((int64_t)row->q_len - 1) + t, 0), k) : k;
}

/* The first key of token t. */
static int64_t global_start(const struct mlak_row *row, uint32_t t)
{
    return row->window ? most(global_bound(row, t) - row->window, 0) : 0;
}

struct mlak_visible mlak_visible(const struct mlak_row *row, uint32_t t)
{
    int64_t bound = global_bound(row, t), base = row->mask == MLAK_MASK_TREE ? bound - row->q_len : bound;
    return (struct mlak_visible){
        .lo = mlak_local_count(row, global_start(row, t)),
        .base = mlak_local_count(row, base),
        .hi = mlak_local_count(row, bound),
    };
}

bool mlak_tree_sees(const struct mlak_row *row, uint64_t bits, int64_t c)
{
    int64_t draft = global_index(row, c) - (row->global_len - row->q_len);
    return draft >= 0 && draft < row->q_len && (bits >> draft & 1);
}

/* Windows of consecutive tokens advance by a key at most and hold one at least, so their union has no gap. */
struct mlak_visible mlak_visible_any(const struct mlak_row *row, uint64_t *bits)
{
    *bits = 0;
    if (row->q_len == 0)
        return (struct mlak_visible){0};
    for (uint32_t t = 0; t < row->q_len; t++)
        *bits |= row->tree_mask[t];
    struct mlak_visible any = mlak_visible(row, row->q_len - 1);
    any.lo = mlak_local_count(row, global_start(row, 0));
    return any;
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

static enum mlak_code copy_cu_q(const struct mlak_batch *batch, int32_t *copy, struct mlak_fault *fault)
{
    for (uint32_t i = 0; i <= batch->batch; i++) {
        int64_t value = copy[i] = __atomic_load_n(&batch->cu_q[i], __ATOMIC_RELAXED);
        int64_t step = i ? value - copy[i - 1] : 0;
        const char *wrong = i == 0 && value != 0              ? "the first request starts at row 0"
                            : step < 0                        ? "it cannot be less than the entry before it"
                            : step > MLAK_MAX_Q               ? "a request has at most 64 query tokens"
                            : value > (int64_t)batch->q_rows ? "it runs past the rows of q"
                                                              : NULL;
        if (wrong) {
            char field[64];
            snprintf(field, sizeof field, "cu_q[%u]", i);
            return mlak_fail(fault, MLAK_BATCH, field, "%" PRId64 " after %d, with %" PRIu64 " rows of q: %s", value,
                             i ? copy[i - 1] : 0, batch->q_rows, wrong);
        }
    }
    return MLAK_OK;
}

/* The length of the row's request, from client memory, judged. */
static void set_length(const struct mlak_batch *batch, struct mlak_row *row)
{
    int64_t room = (int64_t)row->max_pages * row->page_size;
    row->global_len = __atomic_load_n(&batch->seqlens[row->request], __ATOMIC_RELAXED);
    row->local_len = mlak_local_count(row, row->global_len);
    if (row->global_len < 0) {
        row->detail[0] = row->global_len;
        row->code = MLAK_ROW_SEQLEN_NEGATIVE;
    } else if (row->local_len > room) {
        row->detail[0] = row->local_len;
        row->detail[1] = room;
        row->code = MLAK_ROW_SEQLEN_TOO_LONG;
    }
}

/* Of the tree masks, only the bits that name a key: 0..q_len-1, and none before the first key. */
static void set_tree(const uint64_t *masks, struct mlak_row *row)
{
    int64_t missing = least(most(row->q_len - row->global_len, 0), row->q_len);
    uint64_t below = row->q_len == 64 ? UINT64_MAX : (UINT64_C(1) << row->q_len) - 1;
    uint64_t valid = missing == 64 ? 0 : below >> missing << missing;
    for (uint32_t t = 0; t < row->q_len; t++)
        row->tree_mask[t] = __atomic_load_n(&masks[t], __ATOMIC_RELAXED) & valid;
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
    uint64_t q_bytes = (uint64_t)batch->heads * MLAK_D * mlak_dtype_bytes(batch->q_dtype);
    uint64_t out_bytes = (uint64_t)batch->heads * MLAK_V * mlak_dtype_bytes(batch->out_dtype);

    for (uint32_t i = 0; i < count; i++) {
        struct mlak_row *row = &rows[i];
        uint32_t b = first + i;
        uint64_t token = batch->has_cu_q ? (uint64_t)cu_q_copy[b] : (uint64_t)b * uniform;
        *row = (struct mlak_row){
            .q = (const uint8_t *)batch->q + token * q_bytes,
            .kv = batch->kv,
            .out = (uint8_t *)batch->out + token * out_bytes,
            .lse = batch->has_lse ? batch->lse + token * batch->heads : NULL,
            .block_table = batch->block_table + (uint64_t)b * batch->max_pages,
            .sink = batch->has_sink && batch->dcp_rank == 0 ? batch->sink : NULL,
            .page_stride = batch->page_stride,
            .row_stride = batch->row_stride,
            .pages = batch->pages,
            .page_size = batch->page_size,
            .max_pages = batch->max_pages,
            .heads = batch->heads,
            .q_len = batch->has_cu_q ? (uint32_t)(cu_q_copy[b + 1] - cu_q_copy[b]) : uniform,
            .dcp_world = batch->dcp_world,
            .dcp_rank = batch->dcp_rank,
            .dcp_interleave = batch->dcp_interleave,
            .window = batch->window,
            .q_dtype = batch->q_dtype,
            .out_dtype = batch->out_dtype,
            .kv_format = batch->kv_format,
            .mask = batch->mask,
            .lse_base = batch->lse_base,
            .deterministic = batch->deterministic,
            .score_scale = (float)(batch->softmax_scale * (double)q_scale * (double)k_scale),
            .v_scale = v_scale,
            .request = b,
            .detail = {-1, -1},
        };
        set_length(batch, row);
        if (batch->mask == MLAK_MASK_TREE)
            set_tree(batch->tree_mask + token, row);
    }
    return MLAK_OK;
}
