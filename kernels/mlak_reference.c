/* mlak_reference.c - the reference backend: the decode contract in fp64, the oracle that every kernel is measured by.
 *
 * Work item        one query token of one request, all heads
 * Loop             chunks of CHUNK visible keys: page ids -> keys decoded to fp64 once for all heads -> scores ->
 *                  running maximum -> sum and accumulator
 * Scratch          one per thread, of fixed size, allocated when the device is opened (about 1.4 MB)
 *
 * A key that the token does not see is never read, so nothing it holds can reach a product. */
#include "mlak_backends.h"
#include "mlak_convert.h"
#include "mlak_pool.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { CHUNK = 32, LANES = 8 };

struct scratch {
    double q[MLAK_MAX_HEADS][MLAK_D];
    double sum[MLAK_MAX_HEADS][MLAK_V];     /* of exp(score - maximum) * value */
    double weight[MLAK_MAX_HEADS];          /* of exp(score - maximum), sink included */
    double maximum[MLAK_MAX_HEADS];
    double key[CHUNK][MLAK_D];
};

struct mlak_device {
    struct mlak_pool *pool;
    struct scratch *scratch;                /* one a thread */
    uint64_t *progress;                     /* the opener's, or NULL */
    double e4m3[256];                       /* decoded */
    struct mlak_capability capabilities[MLAK_CONTRACT_ROWS];
};

/* ---- element types ---- */

static void decode_halves(const uint8_t *from, unsigned count, float (*decode)(uint16_t), double *to)
{
    for (unsigned i = 0; i < count; i++) {
        uint16_t code;
        memcpy(&code, from + 2 * i, sizeof code);
        to[i] = (double)decode(code);
    }
}

static void decode_e4m3(const double table[256], const uint8_t *from, unsigned count, double scale, double *to)
{
    for (unsigned i = 0; i < count; i++)
        to[i] = table[from[i]] * scale;
}

static void decode_q(const struct mlak_device *device, const struct mlak_row *row, const uint8_t *from, double *to)
{
    switch (row->q_dtype) {
    case MLAK_BF16: decode_halves(from, MLAK_D, mlak_bf16_to_float, to); break;
    case MLAK_FP16: decode_halves(from, MLAK_D, mlak_fp16_to_float, to); break;
    default: decode_e4m3(device->e4m3, from, MLAK_D, 1, to);
    }
}

static void decode_key(const struct mlak_device *device, const struct mlak_row *row, const uint8_t *from, double *to)
{
    float scales[4];
    switch (row->kv_format) {
    case MLAK_KV_BF16: decode_halves(from, MLAK_D, mlak_bf16_to_float, to); break;
    case MLAK_KV_FP16: decode_halves(from, MLAK_D, mlak_fp16_to_float, to); break;
    case MLAK_KV_E4M3: decode_e4m3(device->e4m3, from, MLAK_D, 1, to); break;
    default:
        memcpy(scales, from + MLAK_V, sizeof scales);
        for (unsigned i = 0; i < 4; i++)
            decode_e4m3(device->e4m3, from + 128 * i, 128, (double)scales[i], to + 128 * i);
        decode_halves(from + MLAK_V + sizeof scales, MLAK_ROPE, mlak_bf16_to_float, to + MLAK_V);
    }
}

static void store_out(const struct mlak_row *row, const double *value, double factor, uint8_t *to)
{
    for (unsigned i = 0; i < MLAK_V; i++) {
        double o = value[i] * factor;
        uint16_t code = row->out_dtype == MLAK_BF16 ? mlak_double_to_bf16(o) : mlak_double_to_fp16(o);
        memcpy(to + 2 * i, &code, sizeof code);
    }
}

/* ---- one query token ---- */

static double dot(const double *a, const double *b)
{
    double lanes[LANES] = {0}, sum = 0;
    for (unsigned i = 0; i < MLAK_D; i += LANES)
        for (unsigned lane = 0; lane < LANES; lane++)
            lanes[lane] += a[i + lane] * b[i + lane];
    for (unsigned lane = 0; lane < LANES; lane++)
        sum += lanes[lane];
    return sum;
}

static void start_token(const struct mlak_device *device, const struct mlak_row *row, uint32_t t, struct scratch *s)
{
    size_t q_bytes = MLAK_D * mlak_dtype_bytes(row->q_dtype);
    for (uint32_t h = 0; h < row->heads; h++) {
        decode_q(device, row, row->q + ((size_t)t * row->heads + h) * q_bytes, s->q[h]);
        s->maximum[h] = row->sink ? (double)row->sink[h] : -INFINITY;
        s->weight[h] = s->maximum[h] == -INFINITY ? 0 : 1;
        memset(s->sum[h], 0, sizeof s->sum[h]);
    }
}

/* Decode the next keys from *c on that token t sees, CHUNK at most. Their number; -1 once the row has failed. */
static int gather(const struct mlak_device *device, struct mlak_row *row, uint32_t t, const struct mlak_visible *sees,
                  int64_t *c, struct scratch *s)
{
    int64_t column = -1;
    int32_t page = 0;
    int count = 0;
    for (; *c < sees->hi && count < CHUNK; ++*c) {
        if (*c >= sees->base && !mlak_tree_sees(row, row->tree_mask[t], *c))
            continue;
        if (column != *c / row->page_size) {
            column = *c / row->page_size;
            page = __atomic_load_n(&row->block_table[column], __ATOMIC_RELAXED);
            if (page < 0 || (uint32_t)page >= row->pages) {
                mlak_row_page_fault(row, (uint32_t)column, page);
                return -1;
            }
        }
        uint64_t slot = (uint64_t)(*c % row->page_size);
        decode_key(device, row, row->kv + (uint64_t)page * row->page_stride + slot * row->row_stride, s->key[count++]);
    }
    return count;
}

static void accumulate(const struct mlak_row *row, int count, struct scratch *s)
{
    for (uint32_t h = 0; h < row->heads; h++) {
        double score[CHUNK], top = s->maximum[h], *sum = s->sum[h];
        for (int j = 0; j < count; j++) {
            score[j] = (double)row->score_scale * dot(s->q[h], s->key[j]);
            top = score[j] > top ? score[j] : top;
        }
        if (top > s->maximum[h]) {
            double shrink = exp(s->maximum[h] - top);
            s->weight[h] *= shrink;
            for (unsigned i = 0; i < MLAK_V; i++)
                sum[i] *= shrink;
            s->maximum[h] = top;
        }
        for (int j = 0; j < count; j++) {
            double p = exp(score[j] - top);
            s->weight[h] += p;
            for (unsigned i = 0; i < MLAK_V; i++)
                sum[i] += p * s->key[j][i];
        }
    }
}

/* Heads of a token without a visible key keep a zero sum: O = 0 even where there is nothing to divide by. */
static void finish_token(const struct mlak_row *row, uint32_t t, bool any, const struct scratch *s)
{
    for (uint32_t h = 0; h < row->heads; h++) {
        size_t at = (size_t)t * row->heads + h;
        double lse = s->maximum[h] + log(s->weight[h]);
        store_out(row, s->sum[h], any ? (double)row->v_scale / s->weight[h] : 0, row->out + at * MLAK_V * 2);
        if (row->lse)
            row->lse[at] = (float)(row->lse_base == MLAK_LSE_2 ? lse / M_LN2 : lse);
    }
}

struct launch { struct mlak_device *device; struct mlak_row *rows; uint32_t tokens; /* items a row */ };

static bool failed(const struct mlak_row *row) { return __atomic_load_n(&row->code, __ATOMIC_RELAXED) != MLAK_ROW_OK; }

static void progress(const struct mlak_device *device)
{
    if (device->progress)
        __atomic_fetch_add(device->progress, 1, __ATOMIC_RELAXED);
}

static void run_token(void *context, uint32_t item, uint32_t thread)
{
    const struct launch *launch = context;
    struct mlak_device *device = launch->device;
    struct mlak_row *row = &launch->rows[item / launch->tokens];
    struct scratch *s = &device->scratch[thread];
    uint32_t t = item % launch->tokens;
    if (t >= row->q_len || failed(row))
        return;

    struct mlak_visible sees = mlak_visible(row, t);
    bool any = false;
    start_token(device, row, t, s);
    for (int64_t c = sees.lo; c < sees.hi; progress(device)) {
        int count = gather(device, row, t, &sees, &c, s);
        if (count < 0 || failed(row))
            return;
        accumulate(row, count, s);
        any = any || count > 0;
    }
    finish_token(row, t, any, s);
    progress(device);
}

/* ---- the device ---- */

static enum mlak_code reference_launch(struct mlak_device *device, struct mlak_row *rows, uint32_t count)
{
    struct launch launch = {.device = device, .rows = rows};
    for (uint32_t i = 0; i < count; i++)
        if (rows[i].q_len > launch.tokens)
            launch.tokens = rows[i].q_len;
    mlak_pool_run(device->pool, count * launch.tokens, run_token, &launch);
    return MLAK_OK;
}

/* About 1 ns for each multiplication of 576 scores and 512 values, at 2 a nanosecond and thread. */
static uint64_t reference_estimate(const struct mlak_device *device, const struct mlak_row *rows, uint32_t count)
{
    double pairs = 0; /* wide enough: 1024 of the largest requests pass 64 bits */
    for (uint32_t i = 0; i < count; i++)
        if (rows[i].code == MLAK_ROW_OK)
            pairs += (double)(rows[i].local_len + 1) * rows[i].q_len * rows[i].heads;
    double ns = pairs * (MLAK_D + MLAK_V) / 2 / mlak_pool_threads(device->pool);
    return ns < 1e18 ? (uint64_t)ns : (uint64_t)1e18;
}

static void reference_close(struct mlak_device *device)
{
    if (!device)
        return;
    mlak_pool_free(device->pool);
    free(device->scratch);
    free(device);
}

static struct mlak_device *reference_open(const struct mlak_options *options, struct mlak_fault *fault)
{
    if (options->variant && strcmp(options->variant, "reference") != 0) {
        mlak_fail(fault, MLAK_UNSUPPORTED, "variant", "the reference device has no variant %s; leave it out",
                  options->variant);
        return NULL;
    }
    struct mlak_device *device = calloc(1, sizeof *device);
    if (device && (device->pool = mlak_pool_new(options->threads)))
        device->scratch = calloc(mlak_pool_threads(device->pool), sizeof *device->scratch);
    if (!device || !device->scratch) {
        reference_close(device);
        mlak_fail(fault, MLAK_MEMORY, "threads",
                  "no memory or threads for the reference device; ask for fewer threads");
        return NULL;
    }
    device->progress = options->progress;
    for (unsigned code = 0; code < 256; code++)
        device->e4m3[code] = (double)mlak_e4m3_to_float((uint8_t)code);
    mlak_whole_contract(device->capabilities, "reference");
    return device;
}

static const char *reference_variant(const struct mlak_device *device)
{
    (void)device;
    return "reference";
}

static uint32_t reference_threads(const struct mlak_device *device) { return mlak_pool_threads(device->pool); }

static const struct mlak_capability *reference_capabilities(const struct mlak_device *device, size_t *count)
{
    *count = MLAK_CONTRACT_ROWS;
    return device->capabilities;
}

const struct mlak_backend mlak_reference_backend = {
    .name = "reference",
    .open = reference_open,
    .close = reference_close,
    .variant = reference_variant,
    .threads = reference_threads,
    .capabilities = reference_capabilities,
    .launch = reference_launch,
    .estimate_ns = reference_estimate,
};
