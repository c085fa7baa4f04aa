/* batch_maker.c - see batch_maker.h. A `made` owns its tensors; the maker only holds the generator's state. */
#include "batch_maker.h"

#include "mlak_convert.h"

#include <stdlib.h>
#include <string.h>

struct maker maker_seeded(uint64_t seed)
{
    return (struct maker){.state = seed, .max_batch = 5, .max_heads = 9, .max_q = 9, .max_keys = 150, .max_world = 5};
}

/* splitmix64 */
uint64_t maker_random(struct maker *maker)
{
    uint64_t z = maker->state += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
}

uint32_t maker_below(struct maker *maker, uint32_t n) { return (uint32_t)((maker_random(maker) >> 32) * n >> 32); }

/* Sum of four 16-bit uniforms: no tail beyond 3.5, cheap. */
double maker_normal(struct maker *maker)
{
    uint64_t r = maker_random(maker);
    double sum = (double)((r & 0xffff) + (r >> 16 & 0xffff) + (r >> 32 & 0xffff) + (r >> 48));
    return (sum / 65536 - 2) * 1.7320508;
}

/* ---- descriptors ---- */

static bool one_in(struct maker *maker, uint32_t n) { return maker_below(maker, n) == 0; }

void maker_set_types(struct mlak_batch *batch, uint32_t types)
{
    static const struct { enum mlak_dtype q; enum mlak_kv_format kv; enum mlak_dtype out; } all[MAKER_TYPES] = {
        {MLAK_BF16, MLAK_KV_BF16, MLAK_BF16}, {MLAK_FP16, MLAK_KV_FP16, MLAK_FP16},
        {MLAK_E4M3, MLAK_KV_E4M3, MLAK_BF16}, {MLAK_E4M3, MLAK_KV_E4M3, MLAK_FP16},
        {MLAK_BF16, MLAK_KV_E4M3, MLAK_BF16}, {MLAK_BF16, MLAK_KV_E4M3_656, MLAK_BF16},
    };
    batch->q_dtype = all[types].q;
    batch->kv_format = all[types].kv;
    batch->out_dtype = all[types].out;
    batch->row_stride = mlak_kv_row_bytes(batch->kv_format);
    batch->page_stride = batch->page_size * batch->row_stride;
}

static struct mlak_scale draw_scale(struct maker *maker)
{
    bool tensor = one_in(maker, 2);
    return (struct mlak_scale){.present = !one_in(maker, 3),
                               .has_tensor = tensor,
                               .value = 0.5f + (float)maker_below(maker, 1000) / 1000};
}

struct mlak_batch maker_describe(struct maker *maker)
{
    static const uint32_t page_sizes[] = {64, 32, 16, 1, 1, 7, 64, 256};
    struct mlak_batch batch = {.page_size = page_sizes[maker_below(maker, 8)]};
    mlak_batch_defaults(&batch);
    maker_set_types(&batch, maker_below(maker, MAKER_TYPES));
    batch.batch = 1 + maker_below(maker, maker->max_batch);
    batch.heads = 1 + maker_below(maker, maker->max_heads);
    batch.has_cu_q = one_in(maker, 2);
    batch.q_rows =
        (uint64_t)batch.batch * maker_below(maker, maker->max_q + 1) + (batch.has_cu_q ? maker_below(maker, 5) : 0);
    batch.max_pages = (maker->max_keys + batch.page_size - 1) / batch.page_size + maker_below(maker, 3);
    batch.pages = batch.batch * batch.max_pages + maker_below(maker, 4);
    if (one_in(maker, 3)) {
        batch.row_stride += 16 * maker_below(maker, 4);
        batch.page_stride = batch.page_size * batch.row_stride + 16 * maker_below(maker, 4);
    }
    batch.softmax_scale = (one_in(maker, 10) ? -1 : 1) * (0.5 + maker_below(maker, 1000) / 1000.0) / 24;
    if (batch.q_dtype == MLAK_E4M3)
        batch.q_scale = draw_scale(maker);
    if (batch.kv_format == MLAK_KV_E4M3) {
        batch.k_scale = draw_scale(maker);
        batch.v_scale = draw_scale(maker);
    }
    batch.mask = (enum mlak_mask)maker_below(maker, MLAK_MASK_COUNT);
    batch.has_tree_mask = batch.mask == MLAK_MASK_TREE;
    batch.lse_base = one_in(maker, 2) ? MLAK_LSE_E : MLAK_LSE_2;
    batch.has_lse = !one_in(maker, 4);
    batch.has_sink = one_in(maker, 3);
    if (one_in(maker, 3)) {
        batch.dcp_world = 1 + maker_below(maker, maker->max_world);
        batch.dcp_rank = maker_below(maker, batch.dcp_world);
        batch.dcp_interleave = 1 + maker_below(maker, 7);
    }
    batch.window = one_in(maker, 3) ? 1 + maker_below(maker, one_in(maker, 2) ? 12 : maker->max_keys) : 0;
    batch.deterministic = one_in(maker, 3);
    return batch;
}

struct mlak_batch maker_plain(uint32_t batch, uint32_t heads, uint32_t q_len)
{
    struct mlak_batch shape = {.page_size = 16, .batch = batch, .heads = heads, .q_rows = (uint64_t)batch * q_len};
    mlak_batch_defaults(&shape);
    shape.max_pages = 8;
    shape.pages = batch * 8 + 3;
    shape.softmax_scale = 1 / 24.0;
    shape.has_lse = true;
    return shape;
}

/* ---- the contract, key by key ---- */

bool contract_sees(const struct mlak_batch *batch, int64_t k, int64_t q, int64_t t, uint64_t bits, int64_t g)
{
    int64_t bound = k;
    if (batch->mask == MLAK_MASK_CAUSAL) {
        bound = k - (q - 1) + t;
        bound = bound < 0 ? 0 : bound > k ? k : bound;
    }
    if (g < 0 || g >= bound || (batch->window && g < bound - (int64_t)batch->window))
        return false;
    if (batch->mask == MLAK_MASK_TREE && g >= k - q)
        return bits & UINT64_C(1) << (g - (k - q));
    return true;
}

bool contract_holds(const struct mlak_batch *batch, int64_t g)
{
    return g / batch->dcp_interleave % batch->dcp_world == batch->dcp_rank;
}

/* ---- contents ---- */

static void put_half(uint8_t *to, uint16_t code) { memcpy(to, &code, sizeof code); }

static void put_element(enum mlak_dtype dtype, uint8_t *to, double value)
{
    if (dtype == MLAK_E4M3)
        *to = mlak_float_to_e4m3((float)value);
    else
        put_half(to, dtype == MLAK_BF16 ? mlak_double_to_bf16(value) : mlak_double_to_fp16(value));
}

static void put_key(struct maker *maker, enum mlak_kv_format format, uint8_t *to)
{
    enum mlak_dtype dtype = format == MLAK_KV_BF16 ? MLAK_BF16 : format == MLAK_KV_FP16 ? MLAK_FP16 : MLAK_E4M3;
    uint32_t plain = format == MLAK_KV_E4M3_656 ? 0 : MLAK_D;
    for (uint32_t i = 0; i < plain; i++)
        put_element(dtype, to + i * mlak_dtype_bytes(dtype), maker_normal(maker));
    if (plain)
        return;
    for (uint32_t group = 0; group < 4; group++) {
        float scale = 0.01f + (float)maker_below(maker, 1000) / 5000;
        memcpy(to + MLAK_V + 4 * group, &scale, sizeof scale);
        for (uint32_t i = 0; i < 128; i++)
            put_element(MLAK_E4M3, to + 128 * group + i, maker_normal(maker) / (double)scale);
    }
    for (uint32_t i = 0; i < MLAK_ROPE; i++)
        put_half(to + MLAK_V + 16 + 2 * i, mlak_double_to_bf16(maker_normal(maker)));
}

static int32_t nonsense_page(struct maker *maker, const struct mlak_batch *batch)
{
    const int32_t nonsense[] = {-1, INT32_MIN, INT32_MAX, (int32_t)batch->pages, (int32_t)maker_random(maker)};
    return nonsense[maker_below(maker, 5)];
}

static int32_t draw_seqlen(struct maker *maker, const struct mlak_batch *batch, uint32_t q_len)
{
    uint32_t most = maker->max_keys, pages = most / batch->page_size;
    uint32_t k = most;
    switch (maker_below(maker, 5)) {
    case 0: k = 0; break;
    case 1: k = maker_below(maker, q_len + 3); break;
    case 2: k = batch->page_size * maker_below(maker, pages + 1) + maker_below(maker, 3); k -= k > 0; break;
    default: k = maker_below(maker, most + 1);
    }
    return (int32_t)(k < most ? k : most);
}

static bool any_sees(const struct made *made, uint32_t b, int64_t k, int64_t g)
{
    uint32_t q_len = made_q_len(made, b), start = made_q_start(made, b);
    for (uint32_t t = 0; t < q_len; t++)
        if (contract_sees(&made->batch, k, q_len, t, made->batch.has_tree_mask ? made->batch.tree_mask[start + t] : 0,
                          g))
            return true;
    return false;
}

/* Give the request's needed keys contents, and their pages numbers from `pool`, of which *used are taken. */
static void fill_request(struct maker *maker, struct made *made, uint32_t b, const int32_t *pool, uint32_t *used)
{
    const struct mlak_batch *batch = &made->batch;
    int32_t *table = made_table(made, b);
    int64_t k = made_seqlens(made)[b], c = 0, column = -1;
    for (uint32_t i = 0; i < batch->max_pages; i++)
        table[i] = nonsense_page(maker, batch);
    for (int64_t g = 0; g < k; g++) {
        if (!contract_holds(batch, g))
            continue;
        if (any_sees(made, b, k, g)) {
            if (c / batch->page_size != column) {
                column = c / batch->page_size;
                if (*used == batch->pages)
                    abort();
                table[column] = pool[(*used)++];
            }
            put_key(maker, batch->kv_format, made_key(made, b, c));
        }
        c++;
    }
}

static void fill_cu_q(struct maker *maker, struct made *made, const int32_t *q_lens)
{
    const struct mlak_batch *batch = &made->batch;
    int32_t *cu_q = (int32_t *)(void *)made->tensor[MLAK_T_CU_Q].data;
    cu_q[0] = 0;
    for (uint32_t b = 0; b < batch->batch; b++) {
        uint64_t left = batch->q_rows - (uint64_t)cu_q[b], most = left < MLAK_MAX_Q ? left : MLAK_MAX_Q;
        uint32_t share = (uint32_t)(most < maker->max_q ? most : maker->max_q);
        cu_q[b + 1] = cu_q[b] + (q_lens ? q_lens[b] : one_in(maker, 5) ? 0 : (int32_t)maker_below(maker, share + 1));
    }
}

/* A token sees itself, most of what is before it, and bits that name nothing. */
static void fill_tree(struct maker *maker, struct made *made)
{
    uint64_t *masks = (uint64_t *)(void *)made->tensor[MLAK_T_TREE_MASK].data;
    for (uint64_t i = 0; i < made->batch.q_rows; i++)
        masks[i] = one_in(maker, 8) ? 0 : maker_random(maker) & maker_random(maker);
}

static void fill_scale(struct made *made, enum mlak_tensor tensor, struct mlak_scale *scale)
{
    scale->tensor = NULL;
    if (!scale->present || !scale->has_tensor)
        return;
    scale->tensor = (const float *)(const void *)made->tensor[tensor].data;
    memcpy(made->tensor[tensor].data, &scale->value, sizeof scale->value);
    scale->value = -77; /* not to be read */
}

static void resolve(struct made *made)
{
    struct mlak_batch *batch = &made->batch;
    struct fence *tensor = made->tensor;
    batch->q = tensor[MLAK_T_Q].data;
    batch->kv = tensor[MLAK_T_KV].data;
    batch->block_table = (const int32_t *)(const void *)tensor[MLAK_T_BLOCK_TABLE].data;
    batch->seqlens = (const int32_t *)(const void *)tensor[MLAK_T_SEQLENS].data;
    batch->cu_q = batch->has_cu_q ? (const int32_t *)(const void *)tensor[MLAK_T_CU_Q].data : NULL;
    batch->tree_mask = batch->has_tree_mask ? (const uint64_t *)(const void *)tensor[MLAK_T_TREE_MASK].data : NULL;
    batch->sink = batch->has_sink ? (const float *)(const void *)tensor[MLAK_T_SINK].data : NULL;
    batch->out = tensor[MLAK_T_OUT].data;
    batch->lse = batch->has_lse ? (float *)(void *)tensor[MLAK_T_LSE].data : NULL;
}

struct made *made_new(struct maker *maker, const struct mlak_batch *shape, const int32_t *seqlens,
                      const int32_t *q_lens)
{
    struct made *made = calloc(1, sizeof *made);
    int32_t *pool = malloc((shape->pages + UINT64_C(1)) * sizeof *pool);
    if (!made || !pool)
        abort();
    made->batch = *shape;
    struct mlak_batch *batch = &made->batch;
    for (int i = 0; i < MLAK_T_COUNT; i++)
        fence_init(&made->tensor[i], mlak_extent(shape, (enum mlak_tensor)i),
                   mlak_alignment(shape, (enum mlak_tensor)i), one_in(maker, 2));
    resolve(made);

    uint32_t bytes = mlak_dtype_bytes(batch->q_dtype), used = 0;
    for (uint64_t i = 0; i < batch->q_rows * batch->heads * MLAK_D; i++)
        put_element(batch->q_dtype, made->tensor[MLAK_T_Q].data + i * bytes, maker_normal(maker));
    if (batch->has_cu_q)
        fill_cu_q(maker, made, q_lens);
    if (batch->has_tree_mask)
        fill_tree(maker, made);
    for (uint32_t h = 0; batch->has_sink && h < batch->heads; h++)
        ((float *)(void *)made->tensor[MLAK_T_SINK].data)[h] = (float)maker_normal(maker);
    fill_scale(made, MLAK_T_Q_SCALE, &batch->q_scale);
    fill_scale(made, MLAK_T_K_SCALE, &batch->k_scale);
    fill_scale(made, MLAK_T_V_SCALE, &batch->v_scale);

    for (uint32_t i = 0; i < batch->pages; i++) {
        uint32_t other = maker_below(maker, i + 1);
        pool[i] = pool[other];
        pool[other] = (int32_t)i;
    }
    for (uint32_t b = 0; b < batch->batch; b++) {
        made_seqlens(made)[b] = seqlens ? seqlens[b] : draw_seqlen(maker, batch, made_q_len(made, b));
        fill_request(maker, made, b, pool, &used);
    }
    free(pool);
    return made;
}

void made_free(struct made *made)
{
    if (!made)
        return;
    for (int i = 0; i < MLAK_T_COUNT; i++)
        fence_deinit(&made->tensor[i]);
    free(made);
}

bool made_intact(const struct made *made)
{
    for (int i = 0; i < MLAK_T_COUNT; i++)
        if (!fence_intact(&made->tensor[i]))
            return false;
    return true;
}

uint8_t *made_outputs(const struct made *made)
{
    const struct fence *out = &made->tensor[MLAK_T_OUT], *lse = &made->tensor[MLAK_T_LSE];
    uint8_t *copy = malloc(out->bytes + lse->bytes + 1);
    if (!copy)
        abort();
    memcpy(copy, out->data, out->bytes);
    if (lse->bytes > 0)
        memcpy(copy + out->bytes, lse->data, lse->bytes);
    return copy;
}

bool made_outputs_are(const struct made *made, const uint8_t *copy)
{
    const struct fence *out = &made->tensor[MLAK_T_OUT], *lse = &made->tensor[MLAK_T_LSE];
    return memcmp(out->data, copy, out->bytes) == 0 &&
           (lse->bytes == 0 || memcmp(lse->data, copy + out->bytes, lse->bytes) == 0);
}

uint32_t made_q_start(const struct made *made, uint32_t b)
{
    const struct mlak_batch *batch = &made->batch;
    return batch->has_cu_q ? (uint32_t)batch->cu_q[b] : (uint32_t)(batch->q_rows / batch->batch * b);
}

uint32_t made_q_len(const struct made *made, uint32_t b)
{
    const struct mlak_batch *batch = &made->batch;
    return batch->has_cu_q ? (uint32_t)(batch->cu_q[b + 1] - batch->cu_q[b]) : (uint32_t)(batch->q_rows / batch->batch);
}

uint8_t *made_key(struct made *made, uint32_t b, int64_t c)
{
    const struct mlak_batch *batch = &made->batch;
    uint64_t page = (uint64_t)made_table(made, b)[c / batch->page_size], slot = (uint64_t)(c % batch->page_size);
    return made->tensor[MLAK_T_KV].data + page * batch->page_stride + slot * batch->row_stride;
}

uint16_t made_out(const struct made *made, size_t row, size_t i)
{
    uint16_t code;
    memcpy(&code, made->tensor[MLAK_T_OUT].data + (row * MLAK_V + i) * 2, sizeof code);
    return code;
}
