/* cpu_amx.c - the cpu backend for AMX-BF16: the paths of cpu_avx512_bf16.c with products of whole 16 x 16 tiles.
 *
 *            C, 16 x 16 fp32            A, 16 x 32 bf16              B, 16 pairs x 16
 *   scores   tmm0-3: 64 keys x block    tmm5-7: keys, where they     tmm4: q lines
 *                                       are if evenly spaced
 *   values   tmm0-3: block x 64 cols    tmm4: rows of p              tmm5-7: v lines
 *
 * A step of the scores takes 32 columns of the key, a step of the values 32 keys of the tile. */
#include "cpu_bf16.h"

enum { STEP_KEYS = 32, GROUP_KEYS = 64, TILE_ROWS = 16 };

struct tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};
_Static_assert(sizeof(struct tile_config) == 64, "LDTILECFG's operand");

static const struct tile_config config = {
    .palette = 1,
    .row_bytes = {LINE, LINE, LINE, LINE, LINE, LINE, LINE, LINE},
    .rows = {TILE_ROWS, TILE_ROWS, TILE_ROWS, TILE_ROWS, TILE_ROWS, TILE_ROWS, TILE_ROWS, TILE_ROWS},
};

/* Sixteen key rows at an even distance, as a tile load wants them. */
struct key_rows { const uint8_t *base; ptrdiff_t stride; };

static struct key_rows even_rows(struct cpu_scratch *scratch, const uint8_t *const *keys, uint32_t first)
{
    struct key_rows rows = {keys[first], (ptrdiff_t)((uintptr_t)keys[first + 1] - (uintptr_t)keys[first])};
    bool even = true;
    for (uint32_t k = first + 1; k < first + TILE_ROWS; k++)
        even &= (ptrdiff_t)((uintptr_t)keys[k] - (uintptr_t)keys[k - 1]) == rows.stride;
    if (even)
        return rows;
    uint16_t *copy = scratch->rows + (size_t)first * MLAK_D;
    for (uint32_t k = 0; k < TILE_ROWS; k++)
        memcpy(copy + k * MLAK_D, keys[first + k], MLAK_D * sizeof *copy);
    return (struct key_rows){(const uint8_t *)copy, MLAK_D * sizeof *copy};
}

static void prefetch_lines(const struct cpu_tile *tile, uint32_t first, uint32_t line)
{
    for (uint32_t k = first; k < first + GROUP_KEYS && tile->next != NULL; k++)
        __builtin_prefetch(tile->next[k] + line * LINE, 0, 2);
}

static void scores(struct cpu_scratch *scratch, const struct cpu_tile *tile, const uint8_t *const *keys)
{
    uint32_t prefetched = tile->format == MLAK_KV_BF16 ? ROW_LINES : ROW_LINES / 2;
    for (uint32_t k = 0; k < tile->padded; k += GROUP_KEYS) {
        struct key_rows rows[4];
        for (uint32_t i = 0; i < 4; i++)
            rows[i] = even_rows(scratch, keys, k + i * TILE_ROWS);
        for (uint32_t b = 0; b < tile->blocks; b++) {
            float *to = scratch->scores[b] + k * CPU_LANES;
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (uint32_t line = 0; line < ROW_LINES; line++) {
                if (b == 0 && line < prefetched)
                    prefetch_lines(tile, k, line);
                _tile_loadd(4, scratch->q[b] + line * TILE_ROWS * LINE, LINE);
                _tile_loadd(5, rows[0].base + line * LINE, rows[0].stride);
                _tile_dpbf16ps(0, 5, 4);
                _tile_loadd(6, rows[1].base + line * LINE, rows[1].stride);
                _tile_dpbf16ps(1, 6, 4);
                _tile_loadd(7, rows[2].base + line * LINE, rows[2].stride);
                _tile_dpbf16ps(2, 7, 4);
                _tile_loadd(5, rows[3].base + line * LINE, rows[3].stride);
                _tile_dpbf16ps(3, 5, 4);
            }
            _tile_stored(0, to, LINE);
            _tile_stored(1, to + 16 * CPU_LANES, LINE);
            _tile_stored(2, to + 32 * CPU_LANES, LINE);
            _tile_stored(3, to + 48 * CPU_LANES, LINE);
        }
    }
}

/* P of a block, from lines of pairs to rows: [step][16 rows][16 pairs], in place. */
static void turn_probs(float *probs, uint32_t padded)
{
    for (uint32_t step = 0; step < padded / STEP_KEYS; step++, probs += TILE_ROWS * CPU_LANES) {
        __m512i words[TILE_ROWS];
        _Pragma("GCC unroll 16") for (uint32_t i = 0; i < TILE_ROWS; i++)
            words[i] = _mm512_load_si512(probs + i * CPU_LANES);
        transpose(words);
        _Pragma("GCC unroll 16") for (uint32_t i = 0; i < TILE_ROWS; i++)
            _mm512_store_si512(probs + i * CPU_LANES, words[i]);
    }
}

static void rescale(float *o, const float *alpha)
{
    for (uint32_t r = 0; r < TILE_ROWS; r++)
        for (uint32_t column = 0; column < MLAK_V && alpha[r] != 1; column += W)
            store(o + r * CPU_O_STRIDE + column, load(o + r * CPU_O_STRIDE + column) * alpha[r]);
}

static void values(const struct cpu_scratch *scratch, const struct cpu_tile *tile, uint32_t block)
{
    enum { STRIDE = CPU_O_STRIDE * 4, CHUNK = CPU_PAIR_STRIDE * LINE };
    const float *probs = scratch->scores[block];
    float *o = tile->o + (size_t)block * CPU_LANES * CPU_O_STRIDE;
    if (!tile->first)
        rescale(o, scratch->alpha + block * CPU_LANES);
    for (uint32_t chunk = 0; chunk < CHUNKS; chunk += 4) {
        float *to = o + chunk * CPU_LANES;
        if (tile->first) {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
        } else {
            _tile_loadd(0, to, STRIDE);
            _tile_loadd(1, to + 16, STRIDE);
            _tile_loadd(2, to + 32, STRIDE);
            _tile_loadd(3, to + 48, STRIDE);
        }
        for (uint32_t step = 0; step < tile->padded / STEP_KEYS; step++) {
            const uint8_t *v = scratch->operand + (size_t)chunk * CHUNK + step * TILE_ROWS * LINE;
            _tile_loadd(4, probs + step * TILE_ROWS * CPU_LANES, LINE);
            _tile_loadd(5, v, LINE);
            _tile_dpbf16ps(0, 4, 5);
            _tile_loadd(6, v + CHUNK, LINE);
            _tile_dpbf16ps(1, 4, 6);
            _tile_loadd(7, v + 2 * CHUNK, LINE);
            _tile_dpbf16ps(2, 4, 7);
            _tile_loadd(5, v + 3 * CHUNK, LINE);
            _tile_dpbf16ps(3, 4, 5);
        }
        _tile_stored(0, to, STRIDE);
        _tile_stored(1, to + 16, STRIDE);
        _tile_stored(2, to + 32, STRIDE);
        _tile_stored(3, to + 48, STRIDE);
    }
}

static void tile_step(struct cpu_scratch *scratch, const struct cpu_tile *tile)
{
    const uint8_t *keys[CPU_TILE];
    bf16_keys(scratch, tile, keys);
    _tile_loadconfig(&config);
    scores(scratch, tile, keys);
    bf16_interleave(scratch, tile->padded, keys);
    for (uint32_t b = 0; b < tile->blocks; b++) {
        lanes_softmax(scratch->scores[b], tile, b, scratch->alpha);
        bf16_round_probs(scratch->scores[b], tile->count, tile->padded);
        turn_probs(scratch->scores[b], tile->padded);
        values(scratch, tile, b);
    }
    _tile_release();
}

const struct cpu_path mlak_cpu_amx = {
    .tile = CPU_TILE, .pad = GROUP_KEYS, .key_ns = 25,
    .pack = bf16_pack, .tile_step = tile_step, .merge = lanes_merge, .finish = lanes_finish,
};
