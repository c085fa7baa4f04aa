/* cpu.h - inside the cpu backend: what the driver (cpu_item.c) and the rooms of the instruction sets agree on.
 *
 * A request's query rows are folded (row m = token * heads + head) and cut into groups of at most 64 rows, its keys
 * into splits; one group over one split is a work item. Every boundary depends on the request alone, so results do not
 * depend on batch-mates or on the number of threads. An item walks its keys in tiles:
 *
 *   gather    pointers to the tile's key rows; page ids are read and checked here        cpu_item.c
 *   load      operands: fp32 or bf16 keys, values interleaved in pairs of keys           a path
 *   scores    S[key][row] = <k, q>; the 16 rows of a block are the lanes of a vector     a path
 *   softmax   running maximum and sum of each row; S becomes P in place                  cpu_lanes.h
 *   values    O[row][512] = alpha * O + P V; the lanes are columns                       a path
 *
 * and ends by writing its rows, or a partial (m, l, O) which the item that finishes last combines in split order. */
#ifndef MLAK_CPU_H
#define MLAK_CPU_H

#include "mlak.h"

enum {
    CPU_LANES = 16, /* rows of a block */
    CPU_BLOCKS = 4, /* blocks of a group */
    CPU_ROWS = CPU_LANES * CPU_BLOCKS,
    CPU_TILE = 128,               /* most keys of a tile */
    CPU_TILE_FP32 = 64,           /* keys of a tile in the fp32 path */
    CPU_SPLIT = 1024,             /* keys of a split, a multiple of every tile */
    CPU_MAX_SPLITS = 256,         /* of a request; longer requests have longer splits */
    CPU_O_STRIDE = MLAK_V + 16,   /* floats from row to row of O: off the power of two that would share cache sets */
    CPU_KEY_STRIDE = MLAK_D + 16, /* floats from key to key of an fp32 tile, likewise */
    CPU_PAIR_STRIDE = CPU_TILE / 2 + 1, /* 64-byte lines from one 16-column chunk of interleaved values to the next */
};

/* Scratch of one thread. Allocated by the backend, aligned to 64.
 *   member    fp32 path                  bf16 paths
 *   q         [block][576][16] fp32      [block][288][16] pairs of bf16
 *   scores    [block][tile][16] fp32, S then P; bf16: then [block][tile / 2][16] pairs, in place
 *   operand   [64][592] fp32 keys        [32][65][16] pairs: values of keys 2j and 2j + 1, chunks of 16 columns;
 *                                        amx: two slabs of [2 or 4 chunks][64 pairs][16]
 *   rows      [16][576] fp32, in pack    [128][576] bf16: keys converted from fp8, or made contiguous for AMX
 *   o         [64][528] fp32, unless the item writes a partial */
struct cpu_scratch {
    _Alignas(64) uint8_t q[CPU_BLOCKS][MLAK_D * CPU_LANES * 4];
    _Alignas(64) float scores[CPU_BLOCKS][CPU_TILE * CPU_LANES];
    _Alignas(64) uint8_t operand[CPU_TILE_FP32 * CPU_KEY_STRIDE * 4];
    _Alignas(64) uint16_t rows[CPU_TILE * MLAK_D];
    _Alignas(64) float o[CPU_ROWS * CPU_O_STRIDE];
    _Alignas(64) float alpha[CPU_ROWS], m[CPU_ROWS], l[CPU_ROWS];
    uint64_t *progress;                 /* NULL, or what counts the tiles of all threads */
    uint64_t seen[CPU_TILE];
    const uint8_t *keys[2][CPU_TILE];   /* this tile's and the next one's */
    struct mlak_visible visible[MLAK_MAX_Q];
    uint64_t token_rows[MLAK_MAX_Q];    /* rows of the group that are of a token */
};
_Static_assert(sizeof((struct cpu_scratch *)0)->operand >= 32 * CPU_PAIR_STRIDE * 64, "holds either operand");

/* One tile of an item, for the functions of a path. Running state: m in log2 units, l, and o. */
struct cpu_tile {
    const uint8_t *const *keys;         /* [CPU_TILE], row pointers; to zeros from count on */
    const uint8_t *const *next;         /* [CPU_TILE], rows of the next tile, to prefetch; NULL after the last */
    uint32_t count, padded;
    uint32_t rows, blocks;
    const uint64_t *seen;               /* [count], bit r: row r sees the key; NULL: every row sees every key */
    bool first;                         /* o, m and l are undefined yet */
    float scale;                        /* of scores, to log2 units */
    enum mlak_kv_format format;
    float *o, *m, *l;
};

/* The finished rows of a group. */
struct cpu_result {
    const struct mlak_row *row;
    uint32_t first, rows;               /* folded rows */
    const float *o, *m, *l;             /* o is not read where l is 0 */
};

/* How one variant computes one pair of element types. */
struct cpu_path {
    uint32_t tile, pad;                 /* keys of a tile, and what its count is padded to a multiple of */
    uint32_t key_ns;                    /* for one key and one block, about: for estimates */
    void (*pack)(struct cpu_scratch *scratch, const struct mlak_row *row, uint32_t first, uint32_t rows);
    void (*tile_step)(struct cpu_scratch *scratch, const struct cpu_tile *tile);
    /* parts[0][row] = sum of weights[i][row] * parts[i][row] */
    void (*merge)(float *const *parts, const float (*weights)[CPU_ROWS], uint32_t count, uint32_t rows);
    void (*finish)(const struct cpu_result *result);
};

extern const struct cpu_path mlak_cpu_generic;
#if defined(__x86_64__)
extern const struct cpu_path mlak_cpu_avx2, mlak_cpu_avx512, mlak_cpu_avx512_bf16, mlak_cpu_amx;
#endif

/* Rows of a request's group run over one split. */
struct cpu_group {
    struct mlak_row *row;
    const struct cpu_path *path;
    uint32_t first, rows;               /* folded rows */
    uint32_t splits, split_keys;
    int64_t begin, end;                 /* keys that the request sees lie within; begin is a multiple of the tile */
    size_t parts_offset;                /* floats into the arena */
    float *parts;                       /* [splits] of cpu_part_floats(), unused if there is one split */
    uint32_t remaining;                 /* atomic: splits not done */
};

/* A partial: m [64], l [64], whether o is defined, o. */
static inline size_t cpu_part_floats(uint32_t rows)
{
    return 2 * CPU_ROWS + CPU_LANES + (size_t)(rows + CPU_LANES - 1) / CPU_LANES * CPU_LANES * CPU_O_STRIDE;
}

/* Cut a request's keys into splits: fills splits, split_keys, begin and end. */
void mlak_cpu_plan_group(struct cpu_group *group);

/* Run one item. Sets the row's code if a needed page is out of range. */
void mlak_cpu_run_item(struct cpu_group *group, uint32_t split, struct cpu_scratch *scratch);

#endif
