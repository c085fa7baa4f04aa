/* mlak_split_loads.cuh - the split kernel's first room: its shared memory, and how q and keys come to lie there. */
#ifndef MLAK_SPLIT_LOADS_CUH
#define MLAK_SPLIT_LOADS_CUH

#include "mlak_items.cuh"
#include "mlak_types.cuh"

enum {
    SPLIT_ROW = MLAK_D * 2, /* bytes of a row of q or keys in shared memory */
    SPLIT_CHUNKS = SPLIT_ROW / 16,
    SPLIT_STEPS = MLAK_D / 16,         /* of the scores */
    SPLIT_P = MLAK_CUDA_TILE + 8,      /* elements of a row of p: 16-bit ones, or floats with 656-byte rows */
    SPLIT_SCALES = MLAK_CUDA_TILE * 4, /* floats: one a key and group of 128 */
    SPLIT_WARPS = MLAK_CUDA_THREADS / 32
};

template <int GROUPS> struct split_shared {
    enum { ROWS = 16 * GROUPS };
    struct mlak_row row;                /* a copy: the rows ask it for every key of a masked tile */
    int64_t address[2][MLAK_CUDA_TILE]; /* of each key of a tile, from row.kv on; or ITEM_NOBODY; even and odd tiles */
    int64_t lo[ROWS], base[ROWS], hi[ROWS]; /* what each row sees */
    uint64_t bits[ROWS];                    /* its tree mask */
    float reduced[2][SPLIT_WARPS / GROUPS][ROWS];
    int failed; /* the request has a bad page, or the launch is cancelled */
};

/* Placed in this order in dynamic shared memory. */
#define SPLIT_KEYS_BYTES (MLAK_CUDA_TILE * SPLIT_ROW)
#define SPLIT_SCALES_BYTES (SPLIT_SCALES * (int)sizeof(float))
#define SPLIT_Q_BYTES(groups) (16 * (groups) * SPLIT_ROW)
#define SPLIT_P_BYTES(groups) (16 * (groups) * SPLIT_P * (int)sizeof(float))
#define SPLIT_BYTES(groups, stages)                                                                                    \
    (SPLIT_Q_BYTES(groups) + (stages) * (SPLIT_KEYS_BYTES + SPLIT_SCALES_BYTES) + SPLIT_P_BYTES(groups) +              \
     sizeof(struct split_shared<groups>))
static_assert(SPLIT_BYTES(1, 1) <= MLAK_CUDA_SPLIT_SHARED_1, "16 rows, one tile");
static_assert(SPLIT_BYTES(1, 2) <= MLAK_CUDA_SPLIT_SHARED_2, "16 rows, two tiles");
static_assert(SPLIT_BYTES(2, 2) <= MLAK_CUDA_SPLIT_SHARED_WIDE, "32 rows, two tiles");


/* An item in work: what it is, and where its things lie. */
template <int GROUPS> struct split {
    const struct mlak_cuda_job *job;
    struct split_shared<GROUPS> *shared;
    unsigned char *q, *keys; /* keys and scales: of stage 0, those of stage 1 follow */
    float *scales, *p;
    struct mlak_cuda_item item;
};

/* Where chunk `chunk` (16 bytes) of row `row` lies: eight rows' same chunk fall on different banks. */
__device__ static inline unsigned char *split_at(unsigned char *rows, uint32_t row, uint32_t chunk)
{
    return rows + row * SPLIT_ROW + (chunk ^ (row & 7)) * 16;
}

/* ---- q ---- */

template <enum mlak_cuda_types TYPES, int GROUPS> __device__ static void split_load_q(const struct split<GROUPS> *s)
{
    const uint8_t *from = s->shared->row.q;
    for (uint32_t i = threadIdx.x; i < 16 * GROUPS * SPLIT_CHUNKS; i += MLAK_CUDA_THREADS) {
        uint32_t r = i / SPLIT_CHUNKS, chunk = i % SPLIT_CHUNKS;
        uint64_t row = s->item.first_row + r;
        uint4 value = make_uint4(0, 0, 0, 0); /* rows beyond the request's: their scores are never looked at */
        if (r < s->item.rows && TYPES == MLAK_CUDA_FP8) {
            uint2 codes = *(const uint2 *)(const void *)(from + row * MLAK_D + chunk * 8);
            value = widen_eight(codes.x, codes.y);
        } else if (r < s->item.rows) {
            value = *(const uint4 *)(const void *)(from + row * SPLIT_ROW + chunk * 16);
        }
        *(uint4 *)(void *)split_at(s->q, r, chunk) = value;
    }
}

/* Steps of the scores whose q stays in registers for the whole item: as many as leave no spill. Even. */
template <enum mlak_cuda_types TYPES, int GROUPS> struct split_held {
    enum { STEPS = TYPES == MLAK_CUDA_BF16_656 ? (GROUPS == 2 ? 10 : 26) : GROUPS == 2 ? 24 : 32 };
};

/* The warp's rows of q as a fragment: lanes 0..15 name the rows of the lower half of a step's 16 dimensions, 16..31
 * those of the upper. */
template <int GROUPS>
__device__ static inline void split_get_q(const struct split<GROUPS> *s, uint32_t step, uint32_t a[4])
{
    uint32_t lane = threadIdx.x % 32, group = threadIdx.x / 32 % GROUPS;
    load_matrices(a, split_at(s->q, group * 16 + lane % 16, step * 2 + lane / 16));
}

/* ---- keys ---- */

/* Thread i < 64: where key i of the tile lies. */
template <int GROUPS>
__device__ static inline void split_settle(const struct split<GROUPS> *s, uint32_t tile, const struct item_key *key)
{
    struct split_shared<GROUPS> *shared = s->shared;
    if (threadIdx.x < MLAK_CUDA_TILE)
        shared->address[tile % 2][threadIdx.x] =
            item_settle(s->job, &s->item, &shared->row, key, &shared->failed);
}

/* Set off the copies of a tile's keys: four threads a key, of which thread i has chunks i, i + 4, ... All addresses of
 * a thread are two bases, of even and odd fours, and a number known at compile time. */
template <enum mlak_cuda_types TYPES, int GROUPS>
__device__ static inline void split_load_keys(const struct split<GROUPS> *s, uint32_t tile, uint32_t stage)
{
    enum { FOURS = SPLIT_CHUNKS / 4, CODE_FOURS = TYPES == MLAK_CUDA_BF16_656 ? MLAK_V / 32 : FOURS, AT_A_TIME = 6 };
    uint32_t key = threadIdx.x / 4, first = threadIdx.x % 4;
    int64_t address = s->shared->address[tile % 2][key];
    bool seen = address != ITEM_NOBODY;
    const uint8_t *from = s->shared->row.kv + (seen ? address : 0);
    unsigned char *keys = s->keys + stage * SPLIT_KEYS_BYTES;
    unsigned char *const to[2] = {split_at(keys, key, first), split_at(keys, key, first + 4)};
    if (TYPES == MLAK_CUDA_BF16 || TYPES == MLAK_CUDA_FP16) {
#pragma unroll
        for (uint32_t i = 0; i < FOURS; i++)
            copy_async(to[i % 2] + i / 2 * 128, from + first * 16 + i * 64, seen);
    } else {
#pragma unroll
        for (uint32_t at = 0; at < CODE_FOURS; at += AT_A_TIME) {
            uint2 codes[AT_A_TIME]; /* on their way together */
#pragma unroll
            for (uint32_t i = 0; i < AT_A_TIME; i++)
                codes[i] = seen && at + i < CODE_FOURS
                               ? *(const uint2 *)(const void *)(from + first * 8 + (at + i) * 32)
                               : make_uint2(0, 0);
#pragma unroll
            for (uint32_t i = 0; i < AT_A_TIME; i++)
                if (at + i < CODE_FOURS)
                    *(uint4 *)(void *)(to[(at + i) % 2] + (at + i) / 2 * 128) = widen_eight(codes[i].x, codes[i].y);
        }
#pragma unroll
        for (uint32_t i = CODE_FOURS; i < FOURS; i++) /* the rope of 656-byte rows is bf16 */
            *(uint4 *)(void *)(to[i % 2] + i / 2 * 128) =
                seen ? *(const uint4 *)(const void *)(from + MLAK_V + 16 + first * 16 + (i - CODE_FOURS) * 64)
                     : make_uint4(0, 0, 0, 0);
    }
    if (TYPES == MLAK_CUDA_BF16_656) /* 64 keys x 4 scales: one a thread */
        (s->scales + stage * SPLIT_SCALES)[threadIdx.x] =
            seen ? *(const float *)(const void *)(from + MLAK_V + first * 4) : 0;
    copy_commit();
}

#endif
