/* cpu_bf16.h - what the paths with bf16 products share (AVX512_BF16 and AMX): packing of q, conversion of fp8, which
 * bf16 holds exactly, interleaving of values, and rounding of P. Static to the including file.
 *
 *   operand of         layout                              one 64-byte line
 *   q     (scores)     [block][288 pairs of columns]       16 rows, columns 2i and 2i + 1
 *   v     (values)     [32 chunks][64 pairs of keys, +1]   16 columns, keys 2j and 2j + 1
 *   p     (values)     [block][64 pairs of keys]           16 rows, keys 2j and 2j + 1 */
#ifndef MLAK_CPU_BF16_H
#define MLAK_CPU_BF16_H

#define CPU_WIDTH 16
#include "cpu_lanes.h"

#include <immintrin.h>

enum { LINE = 64, ROW_LINES = MLAK_D * 2 / LINE, CHUNKS = MLAK_V / CPU_LANES };

/* 16 x 16 words of 32 bits. */
LANES_INLINE void transpose(__m512i r[16])
{
    __m512i t[16];
    _Pragma("GCC unroll 8") for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    _Pragma("GCC unroll 4") for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    /* r[i + j] has, in its 128-bit part b, column 4 b + j of rows i..i + 3 */
    _Pragma("GCC unroll 4") for (int j = 0; j < 4; j++) {
        t[j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88);
        t[4 + j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
        t[8 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
        t[12 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
    }
    _Pragma("GCC unroll 4") for (int j = 0; j < 4; j++) {
        r[j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0x88);
        r[4 + j] = _mm512_shuffle_i32x4(t[4 + j], t[12 + j], 0x88);
        r[8 + j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0xdd);
        r[12 + j] = _mm512_shuffle_i32x4(t[4 + j], t[12 + j], 0xdd);
    }
}

LANES_INLINE __m512i bf16_of_e4m3(__m256i codes)
{
    const __m512i subnormals =
        _mm512_castsi128_si512(_mm_setr_epi16(0x0000, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60));
    __m512i x = _mm512_cvtepu8_epi16(codes), magnitude = _mm512_and_si512(x, _mm512_set1_epi16(0x7f));
    __m512i value = _mm512_add_epi16(_mm512_slli_epi16(magnitude, 4), _mm512_set1_epi16(0x3c00));
    value = _mm512_mask_permutexvar_epi16(value, _mm512_cmplt_epu16_mask(magnitude, _mm512_set1_epi16(8)), magnitude,
                                          subnormals);
    value = _mm512_mask_mov_epi16(value, _mm512_cmpeq_epi16_mask(magnitude, _mm512_set1_epi16(0x7f)),
                                  _mm512_set1_epi16(0x7fc0));
    return _mm512_ternarylogic_epi32(value, _mm512_slli_epi16(x, 8), _mm512_set1_epi16((short)0x8000),
                                     0xf8); /* a | (b & c) */
}

static inline void bf16_row_of_e4m3(uint16_t *to, const uint8_t *from)
{
    for (uint32_t d = 0; d < MLAK_D; d += 32)
        _mm512_storeu_si512(to + d, bf16_of_e4m3(_mm256_loadu_si256((const __m256i *)(from + d))));
}

static inline void bf16_pack(struct cpu_scratch *scratch, const struct mlak_row *row, uint32_t first, uint32_t rows)
{
    for (uint32_t b = 0; b * CPU_LANES < rows; b++) {
        const uint8_t *lines[CPU_LANES];
        for (uint32_t r = 0; r < CPU_LANES; r++) {
            uint64_t index = first + b * CPU_LANES + r;
            uint16_t *line = scratch->rows + (size_t)r * MLAK_D;
            lines[r] = (const uint8_t *)line;
            if (b * CPU_LANES + r >= rows)
                memset(line, 0, MLAK_D * sizeof *line);
            else if (row->q_dtype == MLAK_E4M3)
                bf16_row_of_e4m3(line, row->q + index * MLAK_D);
            else
                lines[r] = row->q + index * MLAK_D * 2;
        }
        for (uint32_t line = 0; line < ROW_LINES; line++) {
            __m512i words[CPU_LANES];
            _Pragma("GCC unroll 16") for (uint32_t r = 0; r < CPU_LANES; r++)
                words[r] = _mm512_loadu_si512(lines[r] + line * LINE);
            transpose(words);
            _Pragma("GCC unroll 16") for (uint32_t i = 0; i < CPU_LANES; i++)
                _mm512_store_si512(scratch->q[b] + (line * CPU_LANES + i) * LINE, words[i]);
        }
    }
}

/* The tile's keys as bf16 rows: in place if they are, else converted. */
static inline void bf16_keys(struct cpu_scratch *scratch, const struct cpu_tile *tile, const uint8_t *keys[CPU_TILE])
{
    for (uint32_t k = 0; k < tile->padded; k++) {
        keys[k] = tile->keys[k];
        if (tile->format == MLAK_KV_E4M3) {
            uint16_t *row = scratch->rows + (size_t)k * MLAK_D;
            bf16_row_of_e4m3(row, tile->keys[k]);
            keys[k] = (const uint8_t *)row;
        }
    }
}

/* A line of two keys, 32 columns, to a line of pairs for each of its chunks. */
LANES_INLINE void bf16_interleave_line(const uint8_t *even_key, const uint8_t *odd_key, uint8_t *low, uint8_t *high)
{
    /* unpack works within 128 bits: put columns 0..15 in the low halves, 16..31 in the high ones */
    const __m512i spread = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    __m512i even = _mm512_permutexvar_epi64(spread, _mm512_loadu_si512(even_key));
    __m512i odd = _mm512_permutexvar_epi64(spread, _mm512_loadu_si512(odd_key));
    _mm512_store_si512(low, _mm512_unpacklo_epi16(even, odd));
    _mm512_store_si512(high, _mm512_unpackhi_epi16(even, odd));
}

static inline void bf16_interleave(struct cpu_scratch *scratch, uint32_t padded, const uint8_t *const *keys)
{
    for (uint32_t j = 0; j < padded / 2; j++)
        for (uint32_t chunk = 0; chunk < CHUNKS; chunk += 2) {
            uint8_t *line = scratch->operand + ((size_t)chunk * CPU_PAIR_STRIDE + j) * LINE;
            bf16_interleave_line(keys[2 * j] + chunk * 32, keys[2 * j + 1] + chunk * 32, line,
                                 line + CPU_PAIR_STRIDE * LINE);
        }
}

/* A block's P to pairs, in place; the padding is 0. */
static inline void bf16_round_probs(float *probs, uint32_t count, uint32_t padded)
{
    const __m512i zip = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
                                         23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    for (uint32_t j = 0; j < padded / 2; j++) {
        __m512 even = 2 * j < count ? _mm512_load_ps(probs + 2 * j * CPU_LANES) : _mm512_setzero_ps();
        __m512 odd = 2 * j + 1 < count ? _mm512_load_ps(probs + (2 * j + 1) * CPU_LANES) : _mm512_setzero_ps();
        __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
        _mm512_store_si512(probs + j * CPU_LANES, _mm512_permutexvar_epi16(zip, both));
    }
}

#endif
