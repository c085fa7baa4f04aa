/* mlak_contract.c - a descriptor against the decode contract and a device's capability table, and what follows from a
 * descriptor alone: names, sizes, alignments, defaults. Looks at no tensor; keeps no state. */
#include "mlak.h"

#include <float.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>

enum { MAX_DCP_WORLD = 4096, MAX_DCP_INTERLEAVE = 1 << 20, STRIDE_UNIT = 16 };
#define MAX_Q_ROWS ((uint64_t)MLAK_MAX_BATCH * MLAK_MAX_Q)

enum mlak_code mlak_fail(struct mlak_fault *fault, enum mlak_code code, const char *field, const char *format, ...)
{
    if (!fault)
        return code;
    fault->code = code;
    snprintf(fault->field, sizeof fault->field, "%s", field);
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(fault->message, sizeof fault->message, format, arguments);
    va_end(arguments);
    return code;
}

/* ---- names and sizes ---- */

static const char *const dtype_names[MLAK_DTYPE_COUNT] = {"bf16", "fp16", "fp8_e4m3"};
static const char *const kv_names[MLAK_KV_FORMAT_COUNT] = {"bf16", "fp16", "fp8_e4m3", "fp8_656"};
static const char *const mask_names[MLAK_MASK_COUNT] = {"none", "causal", "tree"};

const char *mlak_tensor_name(enum mlak_tensor tensor)
{
    static const char *const names[MLAK_T_COUNT] = {"q",    "kv",      "block_table", "seqlens", "cu_q", "tree_mask",
                                                    "sink", "q_scale", "k_scale",     "v_scale", "out",  "lse"};
    return (unsigned)tensor < MLAK_T_COUNT ? names[tensor] : "?";
}

uint32_t mlak_dtype_bytes(enum mlak_dtype dtype) { return dtype == MLAK_E4M3 ? 1 : 2; }

uint32_t mlak_kv_row_bytes(enum mlak_kv_format format)
{
    switch (format) {
    case MLAK_KV_E4M3: return MLAK_D;
    case MLAK_KV_E4M3_656: return MLAK_V + 4 * sizeof(float) + MLAK_ROPE * 2;
    default: return MLAK_D * 2;
    }
}

/* Bytes from a page's first row to the end of its last, and from the pool's first page to the end of its last; false if
 * that is beyond what an offset can name. */
static bool page_span(const struct mlak_batch *batch, uint64_t *bytes)
{
    return !__builtin_mul_overflow(batch->page_size - 1, batch->row_stride, bytes) &&
           !__builtin_add_overflow(*bytes, mlak_kv_row_bytes(batch->kv_format), bytes) && *bytes <= INT64_MAX;
}

static bool kv_span(const struct mlak_batch *batch, uint64_t *bytes)
{
    uint64_t page = 0;
    *bytes = 0;
    return batch->pages == 0 || (page_span(batch, &page) &&
                                 !__builtin_mul_overflow(batch->pages - 1, batch->page_stride, bytes) &&
                                 !__builtin_add_overflow(*bytes, page, bytes) && *bytes <= INT64_MAX);
}

uint64_t mlak_extent(const struct mlak_batch *batch, enum mlak_tensor tensor)
{
    const struct mlak_scale *scale = NULL;
    uint64_t bytes = 0;
    switch (tensor) {
    case MLAK_T_Q: return batch->q_rows * batch->heads * MLAK_D * mlak_dtype_bytes(batch->q_dtype);
    case MLAK_T_KV: kv_span(batch, &bytes); return bytes;
    case MLAK_T_BLOCK_TABLE: return (uint64_t)batch->batch * batch->max_pages * sizeof(int32_t);
    case MLAK_T_SEQLENS: return batch->batch * sizeof(int32_t);
    case MLAK_T_CU_Q: return batch->has_cu_q ? (batch->batch + UINT64_C(1)) * sizeof(int32_t) : 0;
    case MLAK_T_TREE_MASK: return batch->has_tree_mask ? batch->q_rows * sizeof(uint64_t) : 0;
    case MLAK_T_SINK: return batch->has_sink ? batch->heads * sizeof(float) : 0;
    case MLAK_T_Q_SCALE: scale = &batch->q_scale; break;
    case MLAK_T_K_SCALE: scale = &batch->k_scale; break;
    case MLAK_T_V_SCALE: scale = &batch->v_scale; break;
    case MLAK_T_OUT: return batch->q_rows * batch->heads * MLAK_V * mlak_dtype_bytes(batch->out_dtype);
    case MLAK_T_LSE: return batch->has_lse ? batch->q_rows * batch->heads * sizeof(float) : 0;
    default: return 0;
    }
    return scale->present && (scale->has_tensor || scale->tensor) ? sizeof(float) : 0;
}

uint32_t mlak_alignment(const struct mlak_batch *batch, enum mlak_tensor tensor)
{
    (void)batch;
    switch (tensor) {
    case MLAK_T_Q:
    case MLAK_T_KV:
    case MLAK_T_OUT: return 16;
    case MLAK_T_TREE_MASK: return 8;
    default: return 4;
    }
}

void mlak_batch_defaults(struct mlak_batch *batch)
{
    batch->dcp_world = 1;
    batch->dcp_rank = 0;
    batch->dcp_interleave = 1;
    batch->mask = MLAK_MASK_CAUSAL;
    batch->lse_base = MLAK_LSE_E;
    batch->out_dtype = batch->q_dtype == MLAK_E4M3 ? MLAK_BF16 : batch->q_dtype;
    batch->row_stride = mlak_kv_row_bytes(batch->kv_format);
    batch->page_stride = batch->page_size * batch->row_stride;
}

void mlak_features_text(uint32_t features, char text[128])
{
    static const char *const names[] = {"ragged", "dcp",   "window",        "sink",
                                        "lse_e",  "lse_2", "deterministic", "strided"};
    size_t length = 0;
    text[0] = 0;
    for (unsigned i = 0; i < sizeof names / sizeof names[0]; i++)
        if (features >> i & 1)
            length += (size_t)snprintf(text + length, 128 - length, "%s%s", length ? " " : "", names[i]);
}

/* ---- the contract ---- */

#define INVALID(field, ...) mlak_fail(fault, MLAK_INVALID, field, __VA_ARGS__)

static enum mlak_code check_types(const struct mlak_batch *b, struct mlak_fault *fault)
{
    if ((unsigned)b->q_dtype >= MLAK_DTYPE_COUNT)
        return INVALID("q_dtype", "%u is no element type; use bf16, fp16 or fp8_e4m3", (unsigned)b->q_dtype);
    if ((unsigned)b->kv_format >= MLAK_KV_FORMAT_COUNT)
        return INVALID("kv_format", "%u is no KV format; use bf16, fp16, fp8_e4m3 or fp8_656",
                       (unsigned)b->kv_format);
    if ((unsigned)b->out_dtype >= MLAK_DTYPE_COUNT)
        return INVALID("out_dtype", "%u is no element type; use bf16 or fp16", (unsigned)b->out_dtype);
    if ((unsigned)b->mask >= MLAK_MASK_COUNT)
        return INVALID("mask", "%u is no mask; use none, causal or tree", (unsigned)b->mask);
    if (b->lse_base != MLAK_LSE_E && b->lse_base != MLAK_LSE_2)
        return INVALID("lse_base", "%u is no base; use e or 2", (unsigned)b->lse_base);

    bool pair = b->q_dtype == MLAK_BF16   ? b->kv_format != MLAK_KV_FP16
                : b->q_dtype == MLAK_FP16 ? b->kv_format == MLAK_KV_FP16
                                          : b->kv_format == MLAK_KV_E4M3;
    if (!pair)
        return INVALID("kv_format",
                       "q %s cannot read kv %s; bf16 q reads bf16, fp8_e4m3 and fp8_656, fp16 q reads fp16, "
                       "fp8_e4m3 q reads fp8_e4m3",
                       dtype_names[b->q_dtype], kv_names[b->kv_format]);
    if (b->q_dtype == MLAK_E4M3 ? b->out_dtype == MLAK_E4M3 : b->out_dtype != b->q_dtype)
        return INVALID("out_dtype", "q %s cannot give out %s; use %s", dtype_names[b->q_dtype],
                       dtype_names[b->out_dtype], b->q_dtype == MLAK_E4M3 ? "bf16 or fp16" : dtype_names[b->q_dtype]);
    return MLAK_OK;
}

static enum mlak_code check_shape(const struct mlak_batch *b, struct mlak_fault *fault)
{
    if (b->batch < 1 || b->batch > MLAK_MAX_BATCH)
        return INVALID("batch", "%u requests; give 1..%d", b->batch, MLAK_MAX_BATCH);
    if (b->heads < 1 || b->heads > MLAK_MAX_HEADS)
        return INVALID("heads", "%u heads; give 1..%d", b->heads, MLAK_MAX_HEADS);
    if (b->q_rows > MAX_Q_ROWS)
        return INVALID("q_rows", "%llu rows; give at most %llu", (unsigned long long)b->q_rows,
                       (unsigned long long)MAX_Q_ROWS);
    if (!b->has_cu_q && b->q_rows % b->batch)
        return INVALID("q_rows", "%llu rows do not divide by %u requests; give a multiple, or cu_q",
                       (unsigned long long)b->q_rows, b->batch);
    if (!b->has_cu_q && b->q_rows / b->batch > MLAK_MAX_Q)
        return INVALID("q_rows", "%llu rows are %llu for each of %u requests; give at most %d each",
                       (unsigned long long)b->q_rows, (unsigned long long)(b->q_rows / b->batch), b->batch, MLAK_MAX_Q);
    if (b->page_size < 1 || b->page_size > MLAK_MAX_PAGE)
        return INVALID("page_size", "%u tokens a page; give 1..%d", b->page_size, MLAK_MAX_PAGE);
    if (b->pages > INT32_MAX)
        return INVALID("pages", "%u pages; page ids are int32, give at most %d", b->pages, INT32_MAX);
    if (b->has_tree_mask != (b->mask == MLAK_MASK_TREE))
        return INVALID("tree_mask", b->has_tree_mask ? "given with mask %s; leave it out, or set mask to tree"
                                                     : "missing with mask %s; give it, or set mask to none or causal",
                       mask_names[b->mask]);
    if (b->dcp_world < 1 || b->dcp_world > MAX_DCP_WORLD)
        return INVALID("dcp_world", "%u ranks; give 1..%d", b->dcp_world, MAX_DCP_WORLD);
    if (b->dcp_rank >= b->dcp_world)
        return INVALID("dcp_rank", "rank %u of %u; give 0..%u", b->dcp_rank, b->dcp_world, b->dcp_world - 1);
    if (b->dcp_interleave < 1 || b->dcp_interleave > MAX_DCP_INTERLEAVE)
        return INVALID("dcp_interleave", "%u keys; give 1..%d", b->dcp_interleave, MAX_DCP_INTERLEAVE);
    return MLAK_OK;
}

static enum mlak_code check_strides(const struct mlak_batch *b, struct mlak_fault *fault)
{
    uint32_t row = mlak_kv_row_bytes(b->kv_format);
    uint64_t page, pool;
    if (b->row_stride % STRIDE_UNIT)
        return INVALID("row_stride", "%llu bytes; give a multiple of %d", (unsigned long long)b->row_stride,
                       STRIDE_UNIT);
    if (b->row_stride < row)
        return INVALID("row_stride", "%llu bytes; a row of %s has %u, give that at least",
                       (unsigned long long)b->row_stride, kv_names[b->kv_format], row);
    if (!page_span(b, &page))
        return INVALID("row_stride", "%llu bytes; a page of %u rows does not fit 63 bits, give less",
                       (unsigned long long)b->row_stride, b->page_size);
    if (b->page_stride % STRIDE_UNIT)
        return INVALID("page_stride", "%llu bytes; give a multiple of %d", (unsigned long long)b->page_stride,
                       STRIDE_UNIT);
    if (b->page_stride < page)
        return INVALID("page_stride", "%llu bytes; a page of %u rows has %llu, give that at least",
                       (unsigned long long)b->page_stride, b->page_size, (unsigned long long)page);
    if (!kv_span(b, &pool))
        return INVALID("page_stride", "%llu bytes; %u pages do not fit 63 bits, give less",
                       (unsigned long long)b->page_stride, b->pages);
    return MLAK_OK;
}

static enum mlak_code check_scales(const struct mlak_batch *b, struct mlak_fault *fault)
{
    const struct {
        const char *name;
        const struct mlak_scale *scale;
        bool taken;
        const char *tensor, *remedy;
    } scales[] = {
        {"q_scale", &b->q_scale, b->q_dtype == MLAK_E4M3, dtype_names[b->q_dtype], "only fp8_e4m3 q has one"},
        {"k_scale", &b->k_scale, b->kv_format == MLAK_KV_E4M3, kv_names[b->kv_format], "only fp8_e4m3 kv has one"},
        {"v_scale", &b->v_scale, b->kv_format == MLAK_KV_E4M3, kv_names[b->kv_format], "only fp8_e4m3 kv has one"},
    };
    double product = b->softmax_scale;
    if (!(fabs(product) <= (double)FLT_MAX))
        return INVALID("softmax_scale", "%g is no fp32 number; give the finite factor on every score", product);
    for (unsigned i = 0; i < sizeof scales / sizeof scales[0]; i++) {
        const struct mlak_scale *scale = scales[i].scale;
        if (!scale->present)
            continue;
        if (!scales[i].taken)
            return INVALID(scales[i].name, "given for a %s tensor; leave it out, %s", scales[i].tensor,
                           scales[i].remedy);
        if (scale->has_tensor || scale->tensor)
            continue;
        if (!isfinite(scale->value))
            return INVALID(scales[i].name, "%g is not finite; give a number, or a tensor of one fp32",
                           (double)scale->value);
        if (scale != &b->v_scale)
            product *= (double)scale->value;
    }
    if (!(fabs(product) <= (double)FLT_MAX))
        return INVALID("softmax_scale", "times q_scale and k_scale it is %g, beyond fp32; give smaller factors",
                       product);
    return MLAK_OK;
}

/* ---- the capability table ---- */

static uint32_t features_used(const struct mlak_batch *b)
{
    bool packed = b->row_stride == mlak_kv_row_bytes(b->kv_format) && b->page_stride == b->page_size * b->row_stride;
    return (b->has_cu_q ? MLAK_CAN_RAGGED : 0u) | (b->dcp_world > 1 ? MLAK_CAN_DCP : 0u) |
           (b->window ? MLAK_CAN_WINDOW : 0u) | (b->has_sink ? MLAK_CAN_SINK : 0u) |
           (b->deterministic ? MLAK_CAN_DETERMINISTIC : 0u) |
           (b->has_lse ? b->lse_base == MLAK_LSE_E ? MLAK_CAN_LSE_E : MLAK_CAN_LSE_2 : 0u) |
           (packed ? 0u : MLAK_CAN_STRIDED);
}

/* How far a capability row goes with the batch: the number of the first thing that it lacks, WHOLE if none. */
enum step { TYPES, MASK, HEADS, Q_LEN, PAGE_SIZE, FEATURES, WHOLE };

static enum step matches(const struct mlak_capability *row, const struct mlak_batch *b)
{
    uint64_t q_len = b->has_cu_q ? MLAK_MAX_Q : b->q_rows / b->batch;
    return row->q_dtype != b->q_dtype || row->kv_format != b->kv_format || row->out_dtype != b->out_dtype ? TYPES
           : row->mask != b->mask                                                                         ? MASK
           : row->max_heads < b->heads                                                                    ? HEADS
           : row->max_q_len < q_len                                                                       ? Q_LEN
           : row->max_page_size < b->page_size                                                            ? PAGE_SIZE
           : features_used(b) & ~row->features                                                            ? FEATURES
                                                                                                          : WHOLE;
}

static enum mlak_code check_capabilities(const struct mlak_batch *b, const struct mlak_capability *rows, size_t count,
                                         struct mlak_fault *fault)
{
    static const char *const fields[] = {"kv_format", "mask", "heads", "q_rows", "page_size", "features"};
    const struct mlak_capability *best = NULL;
    enum step reached = TYPES;
    for (size_t i = 0; i < count; i++) {
        enum step step = matches(&rows[i], b);
        if (step == WHOLE)
            return MLAK_OK;
        if (step > reached)
            reached = step, best = &rows[i];
    }
    char what[128], have[128];
    snprintf(what, sizeof what, "q %s, kv %s, out %s, mask %s", dtype_names[b->q_dtype], kv_names[b->kv_format],
             dtype_names[b->out_dtype], mask_names[b->mask]);
    if (!best || reached == MASK)
        return mlak_fail(fault, MLAK_UNSUPPORTED, fields[reached],
                         "the capability table of this device has no row for %s", what);
    if (reached == FEATURES) {
        mlak_features_text(features_used(b) & ~best->features, have);
        return mlak_fail(fault, MLAK_UNSUPPORTED, fields[reached], "%s: the capability table's row (%s) lacks %s", what,
                         best->variant, have);
    }
    return mlak_fail(fault, MLAK_UNSUPPORTED, fields[reached],
                     "%s: the capability table's row (%s) ends at %u heads, q_len %u, page size %u", what,
                     best->variant, best->max_heads, best->max_q_len, best->max_page_size);
}

enum mlak_code mlak_check(const struct mlak_batch *batch, const struct mlak_capability *capabilities, size_t count,
                          struct mlak_fault *fault)
{
    enum mlak_code code = check_types(batch, fault);
    code = code ? code : check_shape(batch, fault);
    code = code ? code : check_strides(batch, fault);
    code = code ? code : check_scales(batch, fault);
    return code ? code : check_capabilities(batch, capabilities, count, fault);
}

static bool same_scale(const struct mlak_scale *a, const struct mlak_scale *b)
{
    return a->present == b->present && a->has_tensor == b->has_tensor && a->tensor == b->tensor &&
           (!a->present || a->tensor || a->value == b->value);
}

bool mlak_same_step(const struct mlak_batch *a, const struct mlak_batch *b)
{
#define SAME(field) (a->field == b->field)
    return SAME(batch) && SAME(heads) && SAME(q_rows) && SAME(q_dtype) && SAME(out_dtype) && SAME(kv_format) &&
           SAME(pages) && SAME(page_size) && SAME(max_pages) && SAME(page_stride) && SAME(row_stride) &&
           SAME(softmax_scale) && same_scale(&a->q_scale, &b->q_scale) && same_scale(&a->k_scale, &b->k_scale) &&
           same_scale(&a->v_scale, &b->v_scale) && SAME(mask) && SAME(lse_base) && SAME(dcp_world) && SAME(dcp_rank) &&
           SAME(dcp_interleave) && SAME(window) && SAME(deterministic) && SAME(block_table) && SAME(seqlens) &&
           SAME(cu_q) && SAME(tree_mask) && SAME(has_cu_q) && SAME(has_tree_mask) && SAME(has_sink) && SAME(has_lse);
#undef SAME
}
