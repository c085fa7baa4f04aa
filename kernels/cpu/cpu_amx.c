/* cpu_amx.c - the cpu backend for AMX-BF16: the paths of cpu_avx512_bf16.c with products of whole 16 x 16 tiles.
 *
 *                        C, 16 x 16 fp32                    A, 16 x 32 bf16         B, 16 pairs x 16
 *   scores   one block   tmm0-3: 64 keys x block            tmm5-7: keys, where     tmm4: q lines
 *            more        tmm0-3: 32 keys x 2 blocks         tmm4-5: they are if     tmm6-7: q lines
 *                                                           evenly spaced
 *   values   one block   tmm0-3: block x 64 columns         tmm4: rows of p         tmm5-7: v lines
 *            more        tmm0-3: 2 blocks x 32 columns      tmm4-5: rows of p       tmm6-7: v lines
 *
 * A step of the scores takes 32 columns of the key, a step of the values 32 keys of the tile. What bounds them is not
 * the products but the traffic from L2: two by two, each operand that is loaded serves two products. An odd block is
 * paired with itself.
 *
 * The values go by slabs of columns, of all blocks. A slab of interleaved values is small, so it stays in L1; each step
 * writes a part of the next slab, while the products run, long before a tile load reads it (which would have to wait
 * for a store under way). Likewise each step of either kind prefetches its share of the next tile: all at once, they
 * would occupy the fill buffers that the tile loads need, and leave the memory idle later. */
#include "cpu_bf16.h"

enum {
    STEP_KEYS = 32, GROUP_KEYS = 64, TILE_ROWS = 16,
    CHUNK_BYTES = CPU_TILE / 2 * LINE,          /* of a slab: 16 columns, [pairs of keys][16 columns] */
    SLAB_COLUMNS = 32, SLAB_COLUMNS_ALONE = 64, /* alone: for one block */
    AHEAD_BYTES = MLAK_D,                       /* prefetched at a time: a row of fp8, half of one of bf16 */
};
_Static_assert(sizeof((struct cpu_scratch *)0)->operand >= 2 * SLAB_COLUMNS_ALONE / CPU_LANES * CHUNK_BYTES, "2 slabs");

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

/* gcc 12 does not know that a tile load reads memory: keep it behind the stores before it. */
LANES_INLINE void tiles_see_stores(void) { __asm__ volatile("" : : : "memory"); }

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

/* What is left to prefetch of the next tile: [units] of AHEAD_BYTES, `share` of them in a step. */
struct ahead { const uint8_t *const *rows; uint32_t unit, units, share, halves; };

static struct ahead find_ahead(const struct cpu_tile *tile)
{
    uint32_t halves = tile->format == MLAK_KV_BF16;
    /* a tile of one block has 68 steps, of two 136, of more 272 */
    return (struct ahead){.rows = tile->next, .units = tile->next != NULL ? (uint32_t)CPU_TILE << halves : 0,
                          .share = tile->blocks == 1 ? 4 : tile->blocks == 2 ? 2 : 1, .halves = halves};
}

LANES_INLINE void prefetch_share(struct ahead *ahead)
{
    for (uint32_t i = 0; i < ahead->share && ahead->unit < ahead->units; i++, ahead->unit++) {
        const uint8_t *at = ahead->rows[ahead->unit >> ahead->halves] + (ahead->unit & ahead->halves) * AHEAD_BYTES;
        _Pragma("GCC unroll 9") for (uint32_t line = 0; line < AHEAD_BYTES; line += LINE)
            __builtin_prefetch(at + line, 0, 2);
    }
}

/* Scores of 64 keys from `first` on, for a request of one block. */
static void scores_alone(struct cpu_scratch *scratch, uint32_t first, const struct key_rows rows[4],
                         struct ahead *ahead)
{
    const uint8_t *q = scratch->q[0];
    float *to = scratch->scores[0] + first * CPU_LANES;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (size_t line = 0; line < ROW_LINES; line++) {
        _tile_loadd(4, q + line * TILE_ROWS * LINE, LINE);
        _tile_loadd(5, rows[0].base + line * LINE, rows[0].stride);
        _tile_dpbf16ps(0, 5, 4);
        _tile_loadd(6, rows[1].base + line * LINE, rows[1].stride);
        _tile_dpbf16ps(1, 6, 4);
        _tile_loadd(7, rows[2].base + line * LINE, rows[2].stride);
        _tile_dpbf16ps(2, 7, 4);
        _tile_loadd(5, rows[3].base + line * LINE, rows[3].stride);
        _tile_dpbf16ps(3, 5, 4);
        prefetch_share(ahead);
    }
    _tile_stored(0, to, LINE);
    _tile_stored(1, to + 16 * CPU_LANES, LINE);
    _tile_stored(2, to + 32 * CPU_LANES, LINE);
    _tile_stored(3, to + 48 * CPU_LANES, LINE);
}

/* Scores of 32 keys from `first` on for blocks b and c. */
static void scores_pair(struct cpu_scratch *scratch, uint32_t first, const struct key_rows rows[2], size_t b,
                        size_t c, struct ahead *ahead)
{
    const uint8_t *q = scratch->q[b], *q2 = scratch->q[c];
    float *to = scratch->scores[b] + first * CPU_LANES, *to2 = scratch->scores[c] + first * CPU_LANES;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (size_t line = 0; line < ROW_LINES; line++) {
        _tile_loadd(4, rows[0].base + line * LINE, rows[0].stride);
        _tile_loadd(6, q + line * TILE_ROWS * LINE, LINE);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, rows[1].base + line * LINE, rows[1].stride);
        _tile_dpbf16ps(1, 5, 6);
        _tile_loadd(7, q2 + line * TILE_ROWS * LINE, LINE);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
        prefetch_share(ahead);
    }
    _tile_stored(0, to, LINE);
    _tile_stored(1, to + 16 * CPU_LANES, LINE);
    _tile_stored(2, to2, LINE);
    _tile_stored(3, to2 + 16 * CPU_LANES, LINE);
}

static void scores(struct cpu_scratch *scratch, const struct cpu_tile *tile, const uint8_t *const *keys,
                   struct ahead *ahead)
{
    for (uint32_t k = 0; k < tile->padded; k += GROUP_KEYS) {
        struct key_rows rows[4];
        for (uint32_t i = 0; i < 4; i++)
            rows[i] = even_rows(scratch, keys, k + i * TILE_ROWS);
        tiles_see_stores();
        if (tile->blocks == 1) {
            scores_alone(scratch, k, rows, ahead);
            continue;
        }
        for (uint32_t i = 0; i < 4; i += 2)
            for (size_t b = 0; b < tile->blocks; b += 2)
                scores_pair(scratch, k + i * TILE_ROWS, rows + i, b, b + 1 < tile->blocks ? b + 1 : b, ahead);
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

/* Columns from `column` on of some pairs of keys, one line of each key, to two chunks of a slab. */
LANES_INLINE void interleave(uint8_t *slab, const uint8_t *const *keys, size_t column, size_t pair, size_t pairs)
{
    slab += pair * LINE;
    keys += 2 * pair;
    for (const uint8_t *const *end = keys + 2 * pairs; keys < end; keys += 8, slab += 4 * LINE)
        _Pragma("GCC unroll 4") for (size_t i = 0; i < 4; i++)
            bf16_interleave_line(keys[2 * i] + column * 2, keys[2 * i + 1] + column * 2, slab + i * LINE,
                                 slab + CHUNK_BYTES + i * LINE);
}

enum { O_BYTES = CPU_O_STRIDE * 4 };

static void values_alone(struct cpu_scratch *scratch, const struct cpu_tile *tile, const uint8_t *const *keys,
                         struct ahead *ahead)
{
    enum { SLAB_BYTES = SLAB_COLUMNS_ALONE / CPU_LANES * CHUNK_BYTES };
    uint8_t *slab = scratch->operand, *next = slab + SLAB_BYTES;
    interleave(slab, keys, 0, 0, tile->padded / 2);
    interleave(slab + 2 * CHUNK_BYTES, keys, 32, 0, tile->padded / 2);
    tiles_see_stores();
    for (size_t column = 0; column < MLAK_V; column += SLAB_COLUMNS_ALONE) {
        float *to = tile->o + column;
        size_t ahead_column = column + SLAB_COLUMNS_ALONE;
        if (tile->first) {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
        } else {
            _tile_loadd(0, to, O_BYTES);
            _tile_loadd(1, to + 16, O_BYTES);
            _tile_loadd(2, to + 32, O_BYTES);
            _tile_loadd(3, to + 48, O_BYTES);
        }
        for (size_t pair = 0; pair < tile->padded / 2; pair += TILE_ROWS) {
            const uint8_t *v = slab + pair * LINE;
            _tile_loadd(4, scratch->scores[0] + pair * CPU_LANES, LINE);
            _tile_loadd(5, v, LINE);
            _tile_dpbf16ps(0, 4, 5);
            _tile_loadd(6, v + CHUNK_BYTES, LINE);
            _tile_dpbf16ps(1, 4, 6);
            _tile_loadd(7, v + 2 * CHUNK_BYTES, LINE);
            _tile_dpbf16ps(2, 4, 7);
            _tile_loadd(5, v + 3 * CHUNK_BYTES, LINE);
            _tile_dpbf16ps(3, 4, 5);
            if (ahead_column < MLAK_V) {
                interleave(next, keys, ahead_column, pair, TILE_ROWS);
                interleave(next + 2 * CHUNK_BYTES, keys, ahead_column + 32, pair, TILE_ROWS);
            }
            prefetch_share(ahead);
        }
        _tile_stored(0, to, O_BYTES);
        _tile_stored(1, to + 16, O_BYTES);
        _tile_stored(2, to + 32, O_BYTES);
        _tile_stored(3, to + 48, O_BYTES);
        uint8_t *used = slab;
        slab = next;
        next = used;
    }
}

static void values_pairs(struct cpu_scratch *scratch, const struct cpu_tile *tile, const uint8_t *const *keys,
                         struct ahead *ahead)
{
    enum { SLAB_BYTES = SLAB_COLUMNS / CPU_LANES * CHUNK_BYTES };
    uint8_t *slab = scratch->operand, *next = slab + SLAB_BYTES;
    size_t part = tile->blocks > 2 ? TILE_ROWS / 2 : TILE_ROWS; /* pairs of keys, of the next slab, of a step */
    interleave(slab, keys, 0, 0, tile->padded / 2);
    tiles_see_stores();
    for (size_t column = 0; column < MLAK_V; column += SLAB_COLUMNS) {
        for (size_t b = 0; b < tile->blocks; b += 2) {
            size_t c = b + 1 < tile->blocks ? b + 1 : b;
            const float *p = scratch->scores[b], *p2 = scratch->scores[c];
            float *to = tile->o + b * CPU_LANES * CPU_O_STRIDE + column;
            float *to2 = tile->o + c * CPU_LANES * CPU_O_STRIDE + column;
            if (tile->first) {
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
            } else {
                _tile_loadd(0, to, O_BYTES);
                _tile_loadd(1, to + 16, O_BYTES);
                _tile_loadd(2, to2, O_BYTES);
                _tile_loadd(3, to2 + 16, O_BYTES);
            }
            for (size_t pair = 0; pair < tile->padded / 2; pair += TILE_ROWS) {
                const uint8_t *v = slab + pair * LINE;
                _tile_loadd(4, p + pair * CPU_LANES, LINE);
                _tile_loadd(6, v, LINE);
                _tile_dpbf16ps(0, 4, 6);
                _tile_loadd(7, v + CHUNK_BYTES, LINE);
                _tile_dpbf16ps(1, 4, 7);
                _tile_loadd(5, p2 + pair * CPU_LANES, LINE);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
                if (column + SLAB_COLUMNS < MLAK_V)
                    interleave(next, keys, column + SLAB_COLUMNS, pair + b / 2 * part, part);
                prefetch_share(ahead);
            }
            _tile_stored(0, to, O_BYTES);
            _tile_stored(1, to + 16, O_BYTES);
            _tile_stored(2, to2, O_BYTES);
            _tile_stored(3, to2 + 16, O_BYTES);
        }
        uint8_t *used = slab;
        slab = next;
        next = used;
    }
}

static void tile_step(struct cpu_scratch *scratch, const struct cpu_tile *tile)
{
    const uint8_t *keys[CPU_TILE];
    struct ahead ahead = find_ahead(tile);
    bf16_keys(scratch, tile, keys);
    _tile_loadconfig(&config);
    scores(scratch, tile, keys, &ahead);
    for (uint32_t b = 0; b < tile->blocks; b++) {
        lanes_softmax(scratch->scores[b], tile, b, scratch->alpha);
        bf16_round_probs(scratch->scores[b], tile->count, tile->padded);
        turn_probs(scratch->scores[b], tile->padded);
        if (!tile->first)
            rescale(tile->o + (size_t)b * CPU_LANES * CPU_O_STRIDE, scratch->alpha + b * CPU_LANES);
    }
    (tile->blocks == 1 ? values_alone : values_pairs)(scratch, tile, keys, &ahead);
    _tile_release();
}

const struct cpu_path mlak_cpu_amx = {
    .tile = CPU_TILE, .pad = GROUP_KEYS, .key_ns = 25,
    .pack = bf16_pack, .tile_step = tile_step, .merge = lanes_merge, .finish = lanes_finish,
};
