/* batch.c - the public batch, checked and translated into the protocol's.
 *
 * Bounds of numbers are those of proto/mlap_messages.h, read from the same list that the daemon enforces. What needs to
 * know a kernel's rules (extents, overlaps, combinations) is the daemon's to refuse; all that concerns the caller's own
 * pointers is refused here, and so is every value that the protocol cannot carry. */
#include "mlac.h"

#include <math.h>
#include <string.h>

#define SAME(A, B) _Static_assert((int)(A) == (int)(B), "one numbering of enumerators");
SAME(MLA_BF16, MLAP_dtype_BF16) SAME(MLA_FP16, MLAP_dtype_FP16) SAME(MLA_E4M3, MLAP_dtype_E4M3)
SAME(MLA_KV_BF16, MLAP_kv_format_BF16) SAME(MLA_KV_FP16, MLAP_kv_format_FP16) SAME(MLA_KV_E4M3, MLAP_kv_format_E4M3)
SAME(MLA_KV_E4M3_656, MLAP_kv_format_E4M3_656)
SAME(MLA_MASK_NONE, MLAP_mask_NONE) SAME(MLA_MASK_CAUSAL, MLAP_mask_CAUSAL) SAME(MLA_MASK_TREE, MLAP_mask_TREE)
SAME(MLA_LSE_E, MLAP_lse_base_E) SAME(MLA_LSE_2, MLAP_lse_base_TWO)

MLA_API void mla_batch_init(mla_batch *batch)
{
    *batch = (mla_batch){.struct_size = sizeof *batch, .q_dtype = MLA_BF16, .out_dtype = MLA_DTYPE_DEFAULT,
                         .kv_format = MLA_KV_BF16, .page_size = 64, .softmax_scale = NAN, .mask = MLA_MASK_CAUSAL,
                         .lse_base = MLA_LSE_E, .dcp_world = 1, .dcp_interleave = 1};
}

/* min and max of every field of the descriptor. */
struct bounds { uint64_t min, max; };
#define BOUNDS_MEMBER(M, KIND, name, sub, min, max, NEED, doc) struct bounds name;
#define BOUNDS_VALUE(M, KIND, name, sub, min, max, NEED, doc) .name = {min, max},
static const struct { MLAP_FIELDS_batch(BOUNDS_MEMBER, batch) } bounds = { MLAP_FIELDS_batch(BOUNDS_VALUE, batch) };

/* What one translation carries along. */
struct translation {
    mla_client *client;
    struct mla_buffer **uses;
    uint32_t *n_uses;
    mla_error *error;
};

static mla_status number(struct translation *t, const char *field, uint64_t value, struct bounds in)
{
    if (value >= in.min && value <= in.max)
        return MLA_OK;
    return mlac_fail(t->error, MLA_INVALID, field, "it must be %llu to %llu, not %llu", (unsigned long long)in.min,
                     (unsigned long long)in.max, (unsigned long long)value);
}

static mla_status enumerator(struct translation *t, const char *field, int value, int count)
{
    if (value >= 0 && value < count)
        return MLA_OK;
    return mlac_fail(t->error, MLA_INVALID, field, "%d is none of its enumerators", value);
}

static mla_status tensor(struct translation *t, const char *field, const mla_tensor *in, bool written,
                         struct mlap_tensor *out)
{
    mla_buffer *buffer = in->buffer;
    if (buffer->client != t->client)
        return mlac_fail(t->error, MLA_INVALID, field, "its buffer belongs to another client");
    if (in->offset >= buffer->size)
        return mlac_fail(t->error, MLA_RANGE, field, "its offset, %llu, is past its buffer's %zu bytes",
                         (unsigned long long)in->offset, buffer->size);
    if (written && buffer->access == MLA_READ)
        return mlac_fail(t->error, MLA_INVALID, field,
                         "its buffer was imported with MLA_READ and cannot take an output");
    t->uses[(*t->n_uses)++] = buffer;
    out->buffer = (uint32_t)buffer->call->id;
    out->offset = in->offset;
    return MLA_OK;
}

static mla_status scale(struct translation *t, const char *field, const mla_scale *in, struct mlap_scale *out)
{
    switch (in->kind) {
    case MLA_SCALE_VALUE:
        out->value = (double)in->value;
        mlap_set(out, scale, value);
        return isfinite(in->value) ? MLA_OK : mlac_fail(t->error, MLA_INVALID, field, "its value must be finite");
    case MLA_SCALE_TENSOR:
        if (!in->tensor.buffer)
            return mlac_fail(t->error, MLA_INVALID, field, "its kind is MLA_SCALE_TENSOR and its tensor has no buffer");
        mlap_set(out, scale, tensor);
        return tensor(t, field, &in->tensor, false, &out->tensor);
    case MLA_SCALE_NONE:
        break;
    }
    return mlac_fail(t->error, MLA_INVALID, field, "its kind, %d, is none of mla_scale_kind", (int)in->kind);
}

#define TRY(expression) \
    do { \
        mla_status tried = (expression); \
        if (tried != MLA_OK) \
            return tried; \
    } while (0)
#define NUMBER(name) \
    do { \
        TRY(number(t, "batch." #name, in->name, bounds.name)); \
        out->name = in->name; \
        mlap_set(out, batch, name); \
    } while (0)
#define NUMBER_UNLESS_0(name) \
    do { \
        if (in->name != 0) \
            NUMBER(name); \
    } while (0)
#define ENUMERATOR(name, sub) \
    do { \
        TRY(enumerator(t, "batch." #name, (int)in->name, MLAP_##sub##_COUNT)); \
        out->name = (enum mlap_##sub)in->name; \
        mlap_set(out, batch, name); \
    } while (0)
#define TENSOR(name, written) \
    do { \
        if (in->name.buffer) { \
            TRY(tensor(t, "batch." #name, &in->name, written, &out->name)); \
            mlap_set(out, batch, name); \
        } \
    } while (0)
#define REQUIRED(name, written) \
    do { \
        if (!in->name.buffer) \
            return mlac_fail(t->error, MLA_INVALID, "batch." #name, "it is required and has no buffer"); \
        TENSOR(name, written); \
    } while (0)
#define SCALE(name) \
    do { \
        if (in->name.kind != MLA_SCALE_NONE) { \
            TRY(scale(t, "batch." #name, &in->name, &out->name)); \
            mlap_set(out, batch, name); \
        } \
    } while (0)

static mla_status translate(struct translation *t, const mla_batch *in, struct mlap_batch *out)
{
    if (in->struct_size != sizeof *in)
        return mlac_fail(t->error, MLA_INVALID, "batch.struct_size", "it is %zu and this library's is %zu; call "
                         "mla_batch_init first", in->struct_size, sizeof *in);
    NUMBER(batch);
    NUMBER(heads);
    NUMBER(q_rows);
    NUMBER(pages);
    NUMBER(page_size);
    NUMBER(max_pages);
    NUMBER_UNLESS_0(page_stride);
    NUMBER_UNLESS_0(row_stride);
    NUMBER_UNLESS_0(window);
    NUMBER(dcp_world);
    NUMBER(dcp_rank);
    NUMBER(dcp_interleave);
    ENUMERATOR(q_dtype, dtype);
    ENUMERATOR(kv_format, kv_format);
    if (in->out_dtype != MLA_DTYPE_DEFAULT)
        ENUMERATOR(out_dtype, dtype);
    ENUMERATOR(mask, mask);
    ENUMERATOR(lse_base, lse_base);
    if (!isfinite(in->softmax_scale))
        return mlac_fail(t->error, MLA_INVALID, "batch.softmax_scale", "it is required and must be finite");
    out->softmax_scale = in->softmax_scale;
    out->deterministic = in->deterministic != 0;
    mlap_set(out, batch, deterministic);
    REQUIRED(q, false);
    REQUIRED(kv, false);
    REQUIRED(block_table, false);
    REQUIRED(seqlens, false);
    TENSOR(cu_q, false);
    TENSOR(tree_mask, false);
    TENSOR(sink, false);
    SCALE(q_scale);
    SCALE(k_scale);
    SCALE(v_scale);
    REQUIRED(out, true);
    TENSOR(lse, true);
    if (in->page_stride % 16)
        return mlac_fail(t->error, MLA_INVALID, "batch.page_stride", "it must be a multiple of 16 bytes");
    if (in->row_stride % 16)
        return mlac_fail(t->error, MLA_INVALID, "batch.row_stride", "it must be a multiple of 16 bytes");
    if (in->dcp_rank >= in->dcp_world)
        return mlac_fail(t->error, MLA_INVALID, "batch.dcp_rank", "it must be below dcp_world, %u, not %u",
                         in->dcp_world, in->dcp_rank);
    if (!in->cu_q.buffer && in->q_rows % in->batch)
        return mlac_fail(t->error, MLA_INVALID, "batch.q_rows",
                         "without cu_q it must be a multiple of batch, %u, not %llu", in->batch,
                         (unsigned long long)in->q_rows);
    if ((in->mask == MLA_MASK_TREE) != (in->tree_mask.buffer != NULL))
        return mlac_fail(t->error, MLA_INVALID, "batch.tree_mask",
                         "it must be given exactly when mask is MLA_MASK_TREE");
    return MLA_OK;
}

mla_status mlac_batch(struct mla_client *client, const mla_batch *batch, struct mlap_batch *out,
                      struct mla_buffer *uses[MLAC_MAX_TENSORS], uint32_t *n_uses, mla_error *error)
{
    if (!batch)
        return mlac_fail(error, MLA_INVALID, "batch", "it must not be NULL");
    struct translation t = {.client = client, .uses = uses, .n_uses = n_uses, .error = error};
    memset(out, 0, sizeof *out);
    *n_uses = 0;
    return translate(&t, batch, out);
}

void mlac_batch_hold(struct mlac_call *call, struct mla_buffer *const *uses, uint32_t n_uses)
{
    for (uint32_t i = 0; i < n_uses; i++) {
        call->uses[i] = uses[i];
        uses[i]->uses++;
    }
    call->n_uses = n_uses;
}
