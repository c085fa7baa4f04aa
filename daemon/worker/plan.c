/* plan.c - see plan.h. */
#include "plan.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define SAME(M, N, name) \
    _Static_assert((int)MLAP_##M##_##name == (int)MLAK_##N##name, "the wire's and the backends' " #M)
SAME(dtype, , BF16);
SAME(dtype, , FP16);
SAME(dtype, , E4M3);
SAME(kv_format, KV_, BF16);
SAME(kv_format, KV_, FP16);
SAME(kv_format, KV_, E4M3);
SAME(kv_format, KV_, E4M3_656);
SAME(mask, MASK_, NONE);
SAME(mask, MASK_, CAUSAL);
SAME(mask, MASK_, TREE);
_Static_assert((int)MLAP_lse_base_E == (int)MLAK_LSE_E && (int)MLAP_lse_base_TWO == (int)MLAK_LSE_2, "bases");
_Static_assert((int)MLAP_dtype_COUNT == (int)MLAK_DTYPE_COUNT &&
                   (int)MLAP_kv_format_COUNT == (int)MLAK_KV_FORMAT_COUNT &&
                   (int)MLAP_mask_COUNT == (int)MLAK_MASK_COUNT,
               "no enumerator on one side only");

/* One tensor of the wire's descriptor, and where its resolved pointer goes. */
struct place {
    const struct mlap_tensor *wire; /* NULL: absent */
    size_t pointer;                 /* offset in struct mlak_batch */
};

static void find_places(const struct mlap_batch *wire, struct place places[MLAK_T_COUNT])
{
#define REQUIRED(name) {&wire->name, offsetof(struct mlak_batch, name)}
#define OPTIONAL(name) {mlap_has(wire, batch, name) ? &wire->name : NULL, offsetof(struct mlak_batch, name)}
#define SCALE(name) \
    {mlap_has(wire, batch, name) && mlap_has(&wire->name, scale, tensor) ? &wire->name.tensor : NULL, \
     offsetof(struct mlak_batch, name.tensor)}
    const struct place all[MLAK_T_COUNT] = {
        [MLAK_T_Q] = REQUIRED(q),
        [MLAK_T_KV] = REQUIRED(kv),
        [MLAK_T_BLOCK_TABLE] = REQUIRED(block_table),
        [MLAK_T_SEQLENS] = REQUIRED(seqlens),
        [MLAK_T_CU_Q] = OPTIONAL(cu_q),
        [MLAK_T_TREE_MASK] = OPTIONAL(tree_mask),
        [MLAK_T_SINK] = OPTIONAL(sink),
        [MLAK_T_Q_SCALE] = SCALE(q_scale),
        [MLAK_T_K_SCALE] = SCALE(k_scale),
        [MLAK_T_V_SCALE] = SCALE(v_scale),
        [MLAK_T_OUT] = REQUIRED(out),
        [MLAK_T_LSE] = OPTIONAL(lse),
    };
#undef REQUIRED
#undef OPTIONAL
#undef SCALE
    for (unsigned t = 0; t < MLAK_T_COUNT; t++)
        places[t] = all[t];
}

static bool is_output(unsigned tensor)
{
    return tensor == MLAK_T_OUT || tensor == MLAK_T_LSE;
}

/* A scale's own field is its tensor. */
static const char *suffix(unsigned tensor)
{
    return tensor == MLAK_T_Q_SCALE || tensor == MLAK_T_K_SCALE || tensor == MLAK_T_V_SCALE ? ".tensor" : "";
}

/* mlap_fail for the field batch.<tensor><rest>. */
#define FAIL_TENSOR(fault, code, tensor, rest, ...) \
    ({ \
        char field_[64]; \
        snprintf(field_, sizeof field_, "batch.%s%s%s", mlak_tensor_name(tensor), suffix(tensor), rest); \
        mlap_fail(fault, code, field_, __VA_ARGS__); \
    })

static enum mlap_code describe_scale(const struct mlap_scale *wire, bool present, const char *field,
                                     struct mlak_scale *scale, struct mlap_fault *fault)
{
    if (!present)
        return MLAP_code_OK;
    if (mlap_has(wire, scale, value) == mlap_has(wire, scale, tensor))
        return mlap_fail(fault, MLAP_code_INVALID, field, "a scale is either a value or a tensor; give exactly one");
    scale->present = true;
    scale->value = (float)wire->value;
    scale->has_tensor = mlap_has(wire, scale, tensor);
    return MLAP_code_OK;
}

/* Everything of the descriptor but the pointers. */
static enum mlap_code describe(const struct mlap_batch *wire, struct mlak_batch *batch, struct mlap_fault *fault)
{
    *batch = (struct mlak_batch){
        .batch = wire->batch,
        .heads = wire->heads,
        .q_rows = wire->q_rows,
        .q_dtype = (enum mlak_dtype)wire->q_dtype,
        .kv_format = (enum mlak_kv_format)wire->kv_format,
        .pages = wire->pages,
        .page_size = wire->page_size,
        .max_pages = wire->max_pages,
        .softmax_scale = wire->softmax_scale,
    };
    mlak_batch_defaults(batch);
    if (mlap_has(wire, batch, out_dtype))
        batch->out_dtype = (enum mlak_dtype)wire->out_dtype;
    if (mlap_has(wire, batch, row_stride)) {
        batch->row_stride = wire->row_stride;
        batch->page_stride = wire->row_stride * wire->page_size; /* both are bounded: no overflow */
    }
    if (mlap_has(wire, batch, page_stride))
        batch->page_stride = wire->page_stride;
    if (mlap_has(wire, batch, mask))
        batch->mask = (enum mlak_mask)wire->mask;
    if (mlap_has(wire, batch, lse_base))
        batch->lse_base = (enum mlak_lse_base)wire->lse_base;
    if (mlap_has(wire, batch, dcp_world))
        batch->dcp_world = wire->dcp_world;
    if (mlap_has(wire, batch, dcp_rank))
        batch->dcp_rank = wire->dcp_rank;
    if (mlap_has(wire, batch, dcp_interleave))
        batch->dcp_interleave = wire->dcp_interleave;
    if (mlap_has(wire, batch, window))
        batch->window = wire->window;
    if (mlap_has(wire, batch, deterministic))
        batch->deterministic = wire->deterministic;
    batch->has_cu_q = mlap_has(wire, batch, cu_q);
    batch->has_tree_mask = mlap_has(wire, batch, tree_mask);
    batch->has_sink = mlap_has(wire, batch, sink);
    batch->has_lse = mlap_has(wire, batch, lse);

    enum mlap_code code =
        describe_scale(&wire->q_scale, mlap_has(wire, batch, q_scale), "batch.q_scale", &batch->q_scale, fault);
    if (code == MLAP_code_OK)
        code = describe_scale(&wire->k_scale, mlap_has(wire, batch, k_scale), "batch.k_scale", &batch->k_scale, fault);
    if (code == MLAP_code_OK)
        code = describe_scale(&wire->v_scale, mlap_has(wire, batch, v_scale), "batch.v_scale", &batch->v_scale, fault);
    return code;
}

/* The contract's bounds and the device's capability table. */
static enum mlap_code check_contract(const struct mlak_batch *batch, const struct mlad_capabilities *capabilities,
                                     struct mlap_fault *fault)
{
    struct mlak_fault refusal;
    enum mlak_code code = mlak_check(batch, capabilities->rows, capabilities->count, &refusal);
    if (code == MLAK_OK)
        return MLAP_code_OK;
    char field[64];
    snprintf(field, sizeof field, "batch%s%.57s", refusal.field[0] ? "." : "", refusal.field);
    return mlap_fail(fault, code == MLAK_UNSUPPORTED ? MLAP_code_UNSUPPORTED : MLAP_code_INVALID, field, "%s",
                     refusal.message);
}

/* Find the tensor's buffer, check that it lies inside, and set its pointer. */
static enum mlap_code resolve(struct mlad_plan *plan, unsigned tensor, const struct place *place,
                              const struct mlad_idmap *buffers, struct mlap_fault *fault)
{
    const struct mlap_tensor *wire = place->wire;
    struct mlad_buffer *buffer = mlad_idmap_get(buffers, wire->buffer);
    if (!buffer)
        return FAIL_TENSOR(fault, MLAP_code_NOT_FOUND, tensor, ".buffer",
                           "no buffer %" PRIu32 " is registered in this session", wire->buffer);
    uint32_t alignment = mlak_alignment(&plan->batch, tensor);
    if (((uintptr_t)buffer->pointer + wire->offset) % alignment != 0)
        return FAIL_TENSOR(fault, MLAP_code_INVALID, tensor, ".offset",
                           "%" PRIu64 " is no multiple of %" PRIu32 " bytes%s", wire->offset, alignment,
                           buffer->data ? "" : " in memory, the buffer's own place in its allocation counted");
    uint64_t needed = mlak_extent(&plan->batch, tensor);
    uint64_t available = wire->offset < buffer->bytes ? buffer->bytes - wire->offset : 0;
    if (wire->offset > buffer->bytes || needed > available)
        return FAIL_TENSOR(fault, MLAP_code_RANGE, tensor, "",
                           "needs %" PRIu64 " bytes from offset %" PRIu64 " of buffer %" PRIu32 ", which has %" PRIu64
                           " there; register a larger buffer or correct the sizes",
                           needed, wire->offset, buffer->id, available);
    if (is_output(tensor) && !buffer->writable)
        return FAIL_TENSOR(fault, MLAP_code_INVALID, tensor, ".buffer",
                           "buffer %" PRIu32 " is registered with access read; an output needs access readwrite",
                           buffer->id);
    if (tensor == MLAK_T_KV && buffer->mapping.owner && !buffer->mapping.local)
        return FAIL_TENSOR(fault, MLAP_code_UNSUPPORTED, tensor, ".buffer",
                           "buffer %" PRIu32 " lies %s%s, and the KV cache must lie on %s itself; allocate it on %s",
                           buffer->id, buffer->mapping.host ? "in host memory" : "on ", buffer->gpu,
                           buffer->holder->name, buffer->holder->name);
    void *first = buffer->pointer + wire->offset;
    memcpy((char *)&plan->batch + place->pointer, &first, sizeof first); /* members differ in what they point to */
    plan->buffers[tensor] = buffer;
    plan->offsets[tensor] = wire->offset;
    plan->lengths[tensor] = needed;
    mlad_buffer_ref(buffer);
    return MLAP_code_OK;
}

static bool share_a_byte(const struct mlad_plan *a, unsigned tensor_a, const struct mlad_plan *b, unsigned tensor_b)
{
    return a->buffers[tensor_a] && b->buffers[tensor_b] &&
           mlad_buffer_overlap(a->buffers[tensor_a], a->offsets[tensor_a], a->lengths[tensor_a], b->buffers[tensor_b],
                               b->offsets[tensor_b], b->lengths[tensor_b]);
}

/* Does an output share a byte with another tensor? */
static enum mlap_code check_overlap(const struct mlad_plan *plan, struct mlap_fault *fault)
{
    for (unsigned output = MLAK_T_OUT; output <= MLAK_T_LSE; output++) {
        for (unsigned other = 0; other < output; other++) {
            if (share_a_byte(plan, output, plan, other))
                return FAIL_TENSOR(fault, MLAP_code_OVERLAP, output, "",
                                   "shares memory with %s; give outputs memory of their own", mlak_tensor_name(other));
        }
    }
    return MLAP_code_OK;
}
_Static_assert(MLAK_T_OUT + 1 == MLAK_T_LSE && MLAK_T_LSE + 1 == MLAK_T_COUNT, "the outputs come last");

enum mlap_code mlad_plan_new(const struct mlap_batch *wire, uint32_t id, const struct mlad_idmap *buffers,
                             const struct mlad_capabilities *capabilities, struct mlad_plan **plan,
                             struct mlap_fault *fault)
{
    struct mlad_plan *made = calloc(1, sizeof *made);
    if (!made)
        return mlap_fail(fault, MLAP_code_MEMORY, "", "no memory for another plan; try again");
    made->id = id;
    made->refs = 1;

    struct place places[MLAK_T_COUNT];
    find_places(wire, places);
    enum mlap_code code = describe(wire, &made->batch, fault);
    if (code == MLAP_code_OK)
        code = check_contract(&made->batch, capabilities, fault);
    for (unsigned tensor = 0; tensor < MLAK_T_COUNT && code == MLAP_code_OK; tensor++) {
        if (places[tensor].wire)
            code = resolve(made, tensor, &places[tensor], buffers, fault);
    }
    if (code == MLAP_code_OK)
        code = check_overlap(made, fault);
    if (code != MLAP_code_OK) {
        mlad_plan_unref(made);
        return code;
    }
    *plan = made;
    return MLAP_code_OK;
}

void mlad_plan_ref(struct mlad_plan *plan)
{
    plan->refs++;
}

void mlad_plan_unref(struct mlad_plan *plan)
{
    if (--plan->refs > 0)
        return;
    for (unsigned tensor = 0; tensor < MLAK_T_COUNT; tensor++) {
        if (plan->buffers[tensor])
            mlad_buffer_unref(plan->buffers[tensor]);
    }
    free(plan);
}

bool mlad_plan_names(const struct mlad_plan *plan, const struct mlad_buffer *buffer)
{
    for (unsigned tensor = 0; tensor < MLAK_T_COUNT; tensor++) {
        if (plan->buffers[tensor] == buffer)
            return true;
    }
    return false;
}

bool mlad_plan_depends(const struct mlad_plan *a, const struct mlad_plan *b)
{
    for (unsigned output = MLAK_T_OUT; output <= MLAK_T_LSE; output++) {
        for (unsigned other = 0; other < MLAK_T_COUNT; other++) {
            if (share_a_byte(a, output, b, other) || share_a_byte(b, output, a, other))
                return true;
        }
    }
    return false;
}
