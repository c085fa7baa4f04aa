/* cpu_lanes.h - the fp32 path of the cpu backend, written once in GNU vectors and compiled once for each instruction
 * set: the file that includes it defines CPU_WIDTH, the floats of its vector (4, 8, 16). Also what every path shares:
 * softmax, merge, finish. Everything is static to the including file, so no code leaks from one instruction set to
 * another.
 *
 * Tiles, W = CPU_WIDTH:
 *            accumulators            streams                                  accumulators kept over
 *   scores   SCORE_KEYS x 16 rows    q [d][16] vectors, k [key][d] splatted   d = 0..575
 *   values   VALUE_ROWS x 2 W cols   v [key][col] vectors, p [key][row] spl.  the keys of the tile */
#ifndef MLAK_CPU_LANES_H
#define MLAK_CPU_LANES_H

#include "cpu.h"
#include "mlak_convert.h"

#include <math.h>
#if defined(__F16C__)
#include <immintrin.h>
#endif

enum {
    W = CPU_WIDTH,
    BLOCK_VECTORS = CPU_LANES / W,
    SCORE_KEYS = W == 16 ? 8 : W == 8 ? 4 : 2,
    VALUE_ROWS = W == 16 ? 8 : 4,
    VALUE_VECTORS = 2,
};

typedef float vf __attribute__((vector_size(4 * CPU_WIDTH), may_alias));
typedef float vf_any __attribute__((vector_size(4 * CPU_WIDTH), aligned(4), may_alias)); /* at any address of a float */
typedef int32_t vi __attribute__((vector_size(4 * CPU_WIDTH), may_alias));
typedef uint32_t vu __attribute__((vector_size(4 * CPU_WIDTH), may_alias));
typedef uint16_t vh __attribute__((vector_size(2 * CPU_WIDTH), aligned(1), may_alias));
typedef uint8_t vb __attribute__((vector_size(CPU_WIDTH), aligned(1), may_alias));

#define LANES_INLINE static inline __attribute__((always_inline))

LANES_INLINE vf splat(float value) { return value - (vf){0}; }
LANES_INLINE vf load(const float *at) { return *(const vf_any *)at; }
LANES_INLINE void store(float *at, vf value) { *(vf_any *)at = value; }
/* mask ? a : b, lanes of mask being 0 or -1. */
LANES_INLINE vf choose(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }

/* 2^x for x <= 0, and NaN for NaN; below 2^-126 it is 0. The polynomial is Taylor's, good to 1.3e-7 for |f| <= 1/2. */
LANES_INLINE vf exp2_vector(vf x)
{
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer, in the low bits */
    vi tiny = x < -126.0f;
    vf bounded = choose(tiny, splat(-126.0f), x);
    vf shifted = bounded + magic, f = bounded - (shifted - magic);
    vf p = f * 1.5403530e-4f + 1.3333558e-3f;
    p = p * f + 9.6181291e-3f;
    p = p * f + 5.5504109e-2f;
    p = p * f + 2.4022651e-1f;
    p = p * f + 6.9314718e-1f;
    p = p * f + 1.0f;
    vf scaled = (vf)((vu)p + ((vu)shifted << 23));
    return choose(x == x, choose(tiny, (vf){0}, scaled), x);
}

/* ---- storage types ---- */

LANES_INLINE vf decode_bf16(const uint8_t *at)
{
    return (vf)(__builtin_convertvector(*(const vh *)at, vu) << 16);
}

LANES_INLINE vf decode_fp16(const uint8_t *at)
{
#if CPU_WIDTH == 16
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)at));
#elif defined(__F16C__)
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)at));
#else
    vu code = __builtin_convertvector(*(const vh *)at, vu), magnitude = code & 0x7fff;
    vf value = choose((vi)(magnitude < 0x400), __builtin_convertvector((vi)magnitude, vf) * 0x1p-24f,
                      (vf)((magnitude << 13) + (112u << 23)));
    value = choose((vi)(magnitude >= 0x7c00), (vf)((magnitude << 13) + (224u << 23)), value);
    return (vf)((vu)value | (code & 0x8000) << 16);
#endif
}

LANES_INLINE vf decode_e4m3(const uint8_t *at)
{
    vu code = __builtin_convertvector(*(const vb *)at, vu), magnitude = code & 0x7f;
    vf normal = (vf)((magnitude << 20) + (120u << 23));
    vf subnormal = __builtin_convertvector((vi)magnitude, vf) * 0x1p-9f;
    vf value = choose((vi)(magnitude < 8), subnormal, normal);
    value = choose((vi)(magnitude == 0x7f), splat(NAN), value);
    return (vf)((vu)value | (code & 0x80) << 24);
}

LANES_INLINE void decode_run_e4m3(float *to, const uint8_t *from, uint32_t count, float scale)
{
    for (uint32_t i = 0; i < count; i += W)
        store(to + i, decode_e4m3(from + i) * scale);
}

/* One row of 576 numbers. */
static inline void decode_row(float *to, const uint8_t *from, enum mlak_kv_format format)
{
    enum { SCALES = MLAK_V, ROPE = MLAK_V + 16 }; /* bytes into a 656-byte row */
    switch (format) {
    case MLAK_KV_BF16:
        for (uint32_t i = 0; i < MLAK_D; i += W)
            store(to + i, decode_bf16(from + 2 * i));
        break;
    case MLAK_KV_FP16:
        for (uint32_t i = 0; i < MLAK_D; i += W)
            store(to + i, decode_fp16(from + 2 * i));
        break;
    case MLAK_KV_E4M3:
        decode_run_e4m3(to, from, MLAK_D, 1.0f);
        break;
    default:
        for (uint32_t group = 0; group < 4; group++) {
            float scale;
            memcpy(&scale, from + SCALES + 4 * group, sizeof scale);
            decode_run_e4m3(to + 128 * group, from + 128 * group, 128, scale);
        }
        for (uint32_t i = 0; i < MLAK_ROPE; i += W)
            store(to + MLAK_V + i, decode_bf16(from + ROPE + 2 * i));
    }
}

/* Round to nearest even; NaN stays NaN. */
LANES_INLINE void encode_bf16(uint8_t *at, vf value)
{
    vu bits = (vu)value, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16, quiet = (bits >> 16) | 0x40;
    vu nan = (vu)(value != value);
    *(vh *)at = __builtin_convertvector((nan & quiet) | (~nan & rounded), vh);
}

LANES_INLINE void encode_fp16(uint8_t *at, vf value)
{
#if CPU_WIDTH == 16
    _mm256_storeu_si256((__m256i *)at, _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
    _mm_storeu_si128((__m128i *)at, _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
    vh codes;
    for (int i = 0; i < W; i++)
        codes[i] = mlak_float_to_fp16(value[i]);
    *(vh *)at = codes;
#endif
}

/* ---- the fp32 path ---- */

static inline void lanes_pack(struct cpu_scratch *scratch, const struct mlak_row *row, uint32_t first, uint32_t rows)
{
    static const enum mlak_kv_format formats[] = {
        [MLAK_BF16] = MLAK_KV_BF16, [MLAK_FP16] = MLAK_KV_FP16, [MLAK_E4M3] = MLAK_KV_E4M3};
    uint64_t row_bytes = (uint64_t)MLAK_D * mlak_dtype_bytes(row->q_dtype);
    float *lines = (float *)(void *)scratch->rows; /* [16][576]; the rows are not in use yet */
    for (uint32_t b = 0; b * CPU_LANES < rows; b++) {
        float *q = (float *)(void *)scratch->q[b];
        for (uint32_t r = 0; r < CPU_LANES; r++) {
            uint32_t index = b * CPU_LANES + r;
            if (index < rows)
                decode_row(lines + (size_t)r * MLAK_D, row->q + (first + index) * row_bytes, formats[row->q_dtype]);
            else
                memset(lines + (size_t)r * MLAK_D, 0, MLAK_D * sizeof *lines);
        }
        for (size_t d = 0; d < MLAK_D; d++)
            for (size_t r = 0; r < CPU_LANES; r++)
                q[d * CPU_LANES + r] = lines[r * MLAK_D + d];
    }
}

static inline void lanes_scores(const float *q, const float *keys, uint32_t padded, float *scores)
{
    for (size_t k = 0; k < padded; k += SCORE_KEYS) {
        const float *key = keys + k * CPU_KEY_STRIDE;
        vf sum[SCORE_KEYS][BLOCK_VECTORS];
        memset(sum, 0, sizeof sum);
        for (size_t d = 0; d < MLAK_D; d++) {
            vf lanes[BLOCK_VECTORS];
            _Pragma("GCC unroll 4") for (size_t v = 0; v < BLOCK_VECTORS; v++)
                lanes[v] = load(q + d * CPU_LANES + v * W);
            _Pragma("GCC unroll 8") for (size_t j = 0; j < SCORE_KEYS; j++)
                _Pragma("GCC unroll 4") for (size_t v = 0; v < BLOCK_VECTORS; v++)
                    sum[j][v] += lanes[v] * key[j * CPU_KEY_STRIDE + d];
        }
        _Pragma("GCC unroll 8") for (size_t j = 0; j < SCORE_KEYS; j++)
            _Pragma("GCC unroll 4") for (size_t v = 0; v < BLOCK_VECTORS; v++)
                store(scores + (k + j) * CPU_LANES + v * W, sum[j][v]);
    }
}

/* Scores of a block to probabilities relative to the running maximum, in place; m, l and alpha follow. */
static inline void lanes_softmax(float *scores, const struct cpu_tile *tile, uint32_t block, float *alpha)
{
    float *m = tile->m + block * CPU_LANES, *l = tile->l + block * CPU_LANES;
    vi bit;
    for (int i = 0; i < W; i++)
        bit[i] = 1 << i;
    for (uint32_t v = 0; v < BLOCK_VECTORS; v++) {
        vf top = load(m + v * W), before = top, sum = {0};
        for (uint32_t k = 0; k < tile->count; k++) {
            float *at = scores + k * CPU_LANES + v * W;
            vf x = load(at) * tile->scale;
            if (tile->seen != NULL) {
                int32_t rows = (int32_t)(tile->seen[k] >> (block * CPU_LANES + v * W) & ((1u << W) - 1));
                x = choose((bit & rows) != 0, x, splat(-INFINITY));
            }
            top = choose(x > top, x, top);
            store(at, x);
        }
        vf anchor = choose(top == -INFINITY, (vf){0}, top);
        for (uint32_t k = 0; k < tile->count; k++) {
            float *at = scores + k * CPU_LANES + v * W;
            vf p = exp2_vector(load(at) - anchor);
            sum += p;
            store(at, p);
        }
        vf shrink = exp2_vector(before - anchor);
        store(alpha + block * CPU_LANES + v * W, shrink);
        store(m + v * W, top);
        store(l + v * W, load(l + v * W) * shrink + sum);
    }
}

static inline void lanes_values(const float *probs, const float *keys, uint32_t count, bool first, const float *alpha,
                                uint32_t rows, float *o)
{
    for (size_t column = 0; column < MLAK_V; column += VALUE_VECTORS * W)
        for (size_t r = 0; r < rows; r += VALUE_ROWS) {
            vf sum[VALUE_ROWS][VALUE_VECTORS];
            float *to = o + r * CPU_O_STRIDE + column;
            memset(sum, 0, sizeof sum);
            _Pragma("GCC unroll 8") for (size_t i = 0; i < VALUE_ROWS && !first; i++)
                _Pragma("GCC unroll 2") for (size_t v = 0; v < VALUE_VECTORS; v++)
                    sum[i][v] = load(to + i * CPU_O_STRIDE + v * W) * alpha[r + i];
            for (size_t k = 0; k < count; k++) {
                const float *value = keys + k * CPU_KEY_STRIDE + column, *p = probs + k * CPU_LANES + r;
                vf low = load(value), high = load(value + W);
                _Pragma("GCC unroll 8") for (size_t i = 0; i < VALUE_ROWS; i++) {
                    sum[i][0] += low * p[i];
                    sum[i][1] += high * p[i];
                }
            }
            _Pragma("GCC unroll 8") for (size_t i = 0; i < VALUE_ROWS; i++)
                _Pragma("GCC unroll 2") for (size_t v = 0; v < VALUE_VECTORS; v++)
                    store(to + i * CPU_O_STRIDE + v * W, sum[i][v]);
        }
}

static inline void lanes_tile_step(struct cpu_scratch *scratch, const struct cpu_tile *tile)
{
    float *keys = (float *)scratch->operand;
    for (uint32_t k = 0; k < tile->padded; k++)
        decode_row(keys + (size_t)k * CPU_KEY_STRIDE, tile->keys[k], tile->format);
    for (uint32_t b = 0; b < tile->blocks; b++) {
        uint32_t rows = tile->rows - b * CPU_LANES < CPU_LANES ? tile->rows - b * CPU_LANES : CPU_LANES;
        lanes_scores((const float *)scratch->q[b], keys, tile->padded, scratch->scores[b]);
        lanes_softmax(scratch->scores[b], tile, b, scratch->alpha);
        lanes_values(scratch->scores[b], keys, tile->count, tile->first, scratch->alpha + b * CPU_LANES, rows,
                     tile->o + (size_t)b * CPU_LANES * CPU_O_STRIDE);
    }
}

/* ---- ends, for every path ---- */

static inline void lanes_merge(float *const *parts, const float (*weights)[CPU_ROWS], uint32_t count, uint32_t rows)
{
    for (uint32_t r = 0; r < rows; r++)
        for (uint32_t i = 0; i < count; i++)
            for (uint32_t column = 0; column < MLAK_V; column += W) {
                float *to = parts[0] + (size_t)r * CPU_O_STRIDE + column;
                const float *from = parts[i] + (size_t)r * CPU_O_STRIDE + column;
                store(to, i == 0 ? load(to) * weights[0][r] : load(to) + load(from) * weights[i][r]);
            }
}

static inline void lanes_finish(const struct cpu_result *result)
{
    const struct mlak_row *row = result->row;
    for (uint32_t r = 0; r < result->rows; r++) {
        uint64_t index = result->first + r;
        uint8_t *out = row->out + index * MLAK_V * 2;
        float m = result->m[r], l = result->l[r], shrink = 1, lse = m + log2f(l), given = 0;
        if (row->sink != NULL) {
            given = row->sink[index % row->heads];
            float sink = given * 1.44269504088896341f, top = sink > m ? sink : m;
            float anchor = top == -INFINITY ? 0 : top;
            shrink = exp2f(m - anchor);
            float sum = l * shrink + (sink == anchor ? 1 : exp2f(sink - anchor)); /* inf - inf is NaN */
            lse = top + log2f(sum);
            shrink /= sum;
        } else {
            shrink /= l;
        }
        for (uint32_t column = 0; column < MLAK_V; column += W) {
            vf value = {0};
            if (l != 0)
                value = load(result->o + (size_t)r * CPU_O_STRIDE + column) * shrink * row->v_scale;
            if (row->out_dtype == MLAK_BF16)
                encode_bf16(out + 2 * column, value);
            else
                encode_fp16(out + 2 * column, value);
        }
        float natural = given > 0 && lse == INFINITY ? given : lse * 0.693147180559945309f;
        if (row->lse != NULL)
            row->lse[index] = row->lse_base == MLAK_LSE_2 ? lse : natural;
    }
}

#endif
