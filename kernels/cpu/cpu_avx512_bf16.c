/* cpu_avx512_bf16.c - the cpu backend for AVX512_BF16: bf16 and fp8 with vdpbf16ps, two products for each of 16 lanes.
 *
 *            accumulators         streams                                        accumulators kept over
 *   scores   8 keys x 1 or 2      q lines (16 rows), a key's pair of columns     288 pairs of columns
 *            blocks of rows       splatted from the row itself, in its page
 *   values   8 rows x 2 chunks    v lines (16 columns), a row's pair of keys     the pairs of keys of the tile
 *            of 16 columns        splatted from p
 *
 * The scores loop prefetches the rows of the next tile, a line of eight keys at a time, so memory works while we
 * multiply. */
#include "cpu_bf16.h"

enum { KEYS = 8, ROWS = 8 };

LANES_INLINE __m512bh splat_pair(const void *at)
{
    int32_t pair;
    memcpy(&pair, at, sizeof pair);
    return (__m512bh)_mm512_set1_epi32(pair);
}

LANES_INLINE __m512bh load_line(const void *at) { return (__m512bh)_mm512_load_si512(at); }

/* Scores of eight keys and `blocks` (1 or 2, constant) blocks. Prefetches, of the eight rows of `next`, the lines whose
 * bit in `ahead` is set. Everything is addressed from pointers that advance by a line: sixteen registers are few. */
LANES_INLINE void scores_of(const uint8_t *const *keys, const uint8_t *q, size_t blocks, float *to,
                            const uint8_t *const *next, uint32_t ahead)
{
    enum { BLOCK = sizeof ((struct cpu_scratch *)0)->q[0] };
    const uint8_t *k0 = keys[0], *k1 = keys[1], *k2 = keys[2], *k3 = keys[3];
    const uint8_t *k4 = keys[4], *k5 = keys[5], *k6 = keys[6], *k7 = keys[7];
    __m512 sum[KEYS][2];
    _Pragma("GCC unroll 8") for (int j = 0; j < KEYS; j++)
        sum[j][0] = sum[j][1] = _mm512_setzero_ps();
    for (size_t line = 0; line < ROW_LINES * LINE; line += LINE, ahead >>= 1) {
        if (ahead & 1)
            _Pragma("GCC unroll 8") for (int j = 0; j < KEYS; j++)
                __builtin_prefetch(next[j] + line, 0, 2);
        _Pragma("GCC unroll 16") for (size_t i = 0; i < CPU_LANES; i++) {
            const uint8_t *const key[KEYS] = {k0, k1, k2, k3, k4, k5, k6, k7};
            __m512bh lanes[2];
            _Pragma("GCC unroll 2") for (size_t b = 0; b < blocks; b++)
                lanes[b] = load_line(q + b * BLOCK + i * LINE);
            _Pragma("GCC unroll 8") for (int j = 0; j < KEYS; j++) {
                __m512bh splat = splat_pair(key[j] + i * 4);
                _Pragma("GCC unroll 2") for (size_t b = 0; b < blocks; b++)
                    sum[j][b] = _mm512_dpbf16_ps(sum[j][b], lanes[b], splat);
            }
        }
        q += CPU_LANES * LINE;
        k0 += LINE, k1 += LINE, k2 += LINE, k3 += LINE, k4 += LINE, k5 += LINE, k6 += LINE, k7 += LINE;
    }
    _Pragma("GCC unroll 8") for (size_t j = 0; j < KEYS; j++)
        _Pragma("GCC unroll 2") for (size_t b = 0; b < blocks; b++)
            _mm512_store_ps(to + (b * CPU_TILE + j) * CPU_LANES, sum[j][b]);
}

static void scores(struct cpu_scratch *scratch, const struct cpu_tile *tile, const uint8_t *const *keys)
{
    uint32_t lines = tile->format == MLAK_KV_BF16 ? ROW_LINES : ROW_LINES / 2, passes = (tile->blocks + 1) / 2;
    for (uint32_t k = 0; k < tile->padded; k += KEYS)
        for (uint32_t pass = 0; pass < passes; pass++) {
            uint32_t b = pass * 2, from = lines * pass / passes, to = lines * (pass + 1) / passes;
            uint32_t ahead = tile->next != NULL ? (1u << to) - (1u << from) : 0;
            const uint8_t *const *next = tile->next != NULL ? tile->next + k : NULL;
            float *at = scratch->scores[b] + k * CPU_LANES;
            if (b + 1 < tile->blocks)
                scores_of(keys + k, scratch->q[b], 2, at, next, ahead);
            else
                scores_of(keys + k, scratch->q[b], 1, at, next, ahead);
        }
}

static void values(const struct cpu_scratch *scratch, const struct cpu_tile *tile)
{
    for (size_t chunk = 0; chunk < CHUNKS; chunk += 2)
        for (size_t r = 0; r < tile->rows; r += ROWS) {
            const uint8_t *v = scratch->operand + chunk * CPU_PAIR_STRIDE * LINE, *end = v + tile->padded / 2 * LINE;
            const float *p = scratch->scores[r / CPU_LANES] + r % CPU_LANES, *alpha = scratch->alpha + r;
            float *o = tile->o + r * CPU_O_STRIDE + chunk * CPU_LANES;
            __m512 sum[ROWS][2];
            _Pragma("GCC unroll 8") for (size_t i = 0; i < ROWS; i++)
                _Pragma("GCC unroll 2") for (size_t c = 0; c < 2; c++)
                    sum[i][c] = _mm512_setzero_ps();
            if (!tile->first)
                _Pragma("GCC unroll 8") for (size_t i = 0; i < ROWS; i++)
                    _Pragma("GCC unroll 2") for (size_t c = 0; c < 2; c++)
                        sum[i][c] = alpha[i] * _mm512_load_ps(o + i * CPU_O_STRIDE + c * CPU_LANES);
            for (; v < end; v += LINE, p += CPU_LANES) {
                __m512bh low = load_line(v), high = load_line(v + CPU_PAIR_STRIDE * LINE);
                _Pragma("GCC unroll 8") for (size_t i = 0; i < ROWS; i++) {
                    __m512bh splat = splat_pair(p + i);
                    sum[i][0] = _mm512_dpbf16_ps(sum[i][0], low, splat);
                    sum[i][1] = _mm512_dpbf16_ps(sum[i][1], high, splat);
                }
            }
            _Pragma("GCC unroll 8") for (size_t i = 0; i < ROWS; i++)
                _Pragma("GCC unroll 2") for (size_t c = 0; c < 2; c++)
                    _mm512_store_ps(o + i * CPU_O_STRIDE + c * CPU_LANES, sum[i][c]);
        }
}

static void tile_step(struct cpu_scratch *scratch, const struct cpu_tile *tile)
{
    const uint8_t *keys[CPU_TILE];
    bf16_keys(scratch, tile, keys);
    scores(scratch, tile, keys);
    bf16_interleave(scratch, tile->padded, keys);
    for (uint32_t b = 0; b < tile->blocks; b++) {
        lanes_softmax(scratch->scores[b], tile, b, scratch->alpha);
        bf16_round_probs(scratch->scores[b], tile->count, tile->padded);
    }
    values(scratch, tile);
}

const struct cpu_path mlak_cpu_avx512_bf16 = {
    .tile = CPU_TILE, .pad = KEYS, .key_ns = 170,
    .pack = bf16_pack, .tile_step = tile_step, .merge = lanes_merge, .finish = lanes_finish,
};
