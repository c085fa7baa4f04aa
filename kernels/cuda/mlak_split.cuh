/* mlak_split.cuh - kernel 2 of a launch: attention of 16 or 32 folded rows over a range of key tiles; sm_80 and up.
 *
 *   Tile     ROWS rows (token * heads + head) x 64 keys; 8 warps. GROUPS = ROWS / 16 groups of rows, as an mma takes
 *   scores   warp w: rows of group w % GROUPS; 8 GROUPS keys from 8 GROUPS (w / GROUPS) on; 36 steps of 16 dimensions,
 *            with most of the rows' q in registers for the whole item
 *   values   warp w: columns 64w..64w+63 of O of all rows, 32 fp32 a thread and group, 4 steps of 16 keys
 *
 *   Shared memory, bytes    16 rows, one tile   two tiles   32 rows, two tiles
 *   q      ROWS x 1152                  18432       18432                36864
 *   keys   64 x 1152                    73728      147456               147456   both in chunks of 16 bytes, chunk c
 *   scales 64 x 4 fp32                   1024        2048                 2048   of row r at c ^ (r & 7); scales are
 *   p      ROWS x 72 fp32                4608        4608                 9216   of 656-byte rows only; p is of 16-bit
 *   struct split_shared, below                                                   numbers but for those
 *   all of it, at most                 101376      177152               201728
 *
 *   Pipeline, a tile             who
 *   keys of tile n+1 set off     all (cp.async; fp8 through registers, widened to bf16, which loses nothing)
 *   page ids of tile n+2         threads 0..63, a key each: asked for before tile n is computed, checked after it
 *   scores, running maximum      all; maxima of the warps of a group meet in shared memory
 *   O = O * shrink + P V         all, each warp its own columns
 *
 * Keys that no row of the item sees are zeros in shared memory, so what lies there in the client's pool, NaN or
 * nonsense, reaches no product; keys that some rows see and others do not get a score of -inf for the others. Most
 * tiles are seen whole by every row, and pay for neither. */
#include "mlak_items.cuh"

enum {
    SPLIT_ROW = MLAK_D * 2, /* bytes of a row of q or keys in shared memory */
    SPLIT_CHUNKS = SPLIT_ROW / 16,
    SPLIT_STEPS = MLAK_D / 16,         /* of the scores */
    SPLIT_P = MLAK_CUDA_TILE + 8,      /* elements of a row of p: 16-bit ones, or floats with 656-byte rows */
    SPLIT_SCALES = MLAK_CUDA_TILE * 4, /* floats: one a key and group of 128 */
    SPLIT_WARPS = MLAK_CUDA_THREADS / 32,
    SPLIT_NOBODY = -1 /* address of a key that no row sees */
};

template <int GROUPS> struct split_shared {
    enum { ROWS = 16 * GROUPS };
    struct mlak_row row;                /* a copy: the rows ask it for every key of a masked tile */
    int64_t address[2][MLAK_CUDA_TILE]; /* of each key of a tile, from row.kv on; or SPLIT_NOBODY; even and odd tiles */
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
    uint32_t index, block; /* request, row block */
    float *part;           /* its slot; NULL: to out */
    uint32_t first_row, rows;     /* folded rows of the block */
    uint32_t first_token, end_token;
    struct mlak_visible any; /* what any of its rows sees */
    uint64_t any_bits;
    int64_t all_lo, all_end; /* keys that all of its rows see: no mask needed */
};

/* ---- element types ---- */

/* Two e4m3 codes, in the upper bytes of the halves of `codes`, to two bf16: exact, since bf16 has more of both exponent
 * and mantissa. Shifted into place, their exponents are 120 too small (bf16's bias is 127, e4m3's 7), which also holds
 * for subnormals. e4m3 has no infinity, and its one NaN would come out as 480. */
__device__ static inline uint32_t widen_two(uint32_t codes)
{
    uint32_t wide = lift_bf16((codes & 0x80008000) | (codes & 0x7f007f00) >> 4);
    wide = (codes & 0x7f00) == 0x7f00 ? wide | 0x7fff : wide;
    return (codes & 0x7f000000) == 0x7f000000 ? wide | 0x7fff0000 : wide;
}

/* 8 codes to 8 bf16. */
__device__ static inline uint4 widen_eight(uint32_t low, uint32_t high)
{
    return make_uint4(widen_two(pick_bytes(low, 0, 0x1404)), widen_two(pick_bytes(low, 0, 0x3424)),
                      widen_two(pick_bytes(high, 0, 0x1404)), widen_two(pick_bytes(high, 0, 0x3424)));
}

template <enum mlak_cuda_types TYPES>
__device__ static inline void multiply(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1)
{
    if (TYPES == MLAK_CUDA_FP16)
        multiply_fp16(c, a, b0, b1);
    else
        multiply_bf16(c, a, b0, b1);
}

template <enum mlak_cuda_types TYPES> __device__ static inline uint32_t pack(float low, float high)
{
    return TYPES == MLAK_CUDA_FP16 ? pack_fp16(low, high) : pack_bf16(low, high);
}

/* Where chunk `chunk` (16 bytes) of row `row` lies: eight rows' same chunk fall on different banks. */
__device__ static inline unsigned char *split_at(unsigned char *rows, uint32_t row, uint32_t chunk)
{
    return rows + row * SPLIT_ROW + (chunk ^ (row & 7)) * 16;
}

/* ---- loads ---- */

template <enum mlak_cuda_types TYPES, int GROUPS> __device__ static void split_load_q(const struct split<GROUPS> *s)
{
    const uint8_t *from = s->shared->row.q;
    for (uint32_t i = threadIdx.x; i < 16 * GROUPS * SPLIT_CHUNKS; i += MLAK_CUDA_THREADS) {
        uint32_t r = i / SPLIT_CHUNKS, chunk = i % SPLIT_CHUNKS;
        uint64_t row = s->first_row + r;
        uint4 value = make_uint4(0, 0, 0, 0); /* rows beyond the request's: their scores are never looked at */
        if (r < s->rows && TYPES == MLAK_CUDA_FP8) {
            uint2 codes = *(const uint2 *)(const void *)(from + row * MLAK_D + chunk * 8);
            value = widen_eight(codes.x, codes.y);
        } else if (r < s->rows) {
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

/* A key of a tile on its way to its address: the page id is asked for early and used late. */
struct split_key {
    bool seen;
    uint32_t column, slot; /* of the block table; of the page */
    int32_t page;
};

/* Thread i < 64: key i of the tile. A page is needed iff some row of the item sees one of its keys. */
template <int GROUPS> __device__ static inline struct split_key split_ask(const struct split<GROUPS> *s, uint32_t tile)
{
    const struct mlak_row *row = &s->shared->row;
    int64_t c = (int64_t)tile * MLAK_CUDA_TILE + threadIdx.x;
    struct split_key key = {false, 0, 0, 0};
    if (threadIdx.x >= MLAK_CUDA_TILE || c < s->any.lo || c >= s->any.hi ||
        (c >= s->any.base && !row_tree_sees(row, s->any_bits, c)))
        return key;
    key.seen = true;
    key.column = (uint32_t)c / row->page_size; /* lengths are int32: so are keys */
    key.slot = (uint32_t)c - key.column * row->page_size;
    key.page = read_once(&row->block_table[key.column]);
    return key;
}

/* A page that is needed and out of range fails the request, and nothing is read from it. */
template <int GROUPS>
__device__ static inline void split_settle(const struct split<GROUPS> *s, uint32_t tile, const struct split_key *key)
{
    const struct mlak_row *row = &s->shared->row;
    int64_t address = SPLIT_NOBODY;
    if (threadIdx.x >= MLAK_CUDA_TILE)
        return;
    if (key->seen && key->page >= 0 && (uint32_t)key->page < row->pages) {
        address = (int64_t)((uint64_t)key->page * row->page_stride + (uint64_t)key->slot * row->row_stride);
    } else if (key->seen) {
        struct mlak_row *shared_by_all = &s->job->rows[s->index];
        if (atomicCAS((unsigned long long *)&shared_by_all->detail[0], (unsigned long long)-1,
                      (unsigned long long)key->column) == (unsigned long long)-1) {
            shared_by_all->detail[1] = key->page;
            shared_by_all->code = MLAK_ROW_PAGE_RANGE;
        }
        s->shared->failed = 1;
    }
    s->shared->address[tile % 2][threadIdx.x] = address;
}

/* Set off the copies of a tile's keys: four threads a key, of which thread i has chunks i, i + 4, ... All addresses of a
 * thread are two bases, of even and odd fours, and a number known at compile time. */
template <enum mlak_cuda_types TYPES, int GROUPS>
__device__ static inline void split_load_keys(const struct split<GROUPS> *s, uint32_t tile, uint32_t stage)
{
    enum { FOURS = SPLIT_CHUNKS / 4, CODE_FOURS = TYPES == MLAK_CUDA_BF16_656 ? MLAK_V / 32 : FOURS, AT_A_TIME = 6 };
    uint32_t key = threadIdx.x / 4, first = threadIdx.x % 4;
    int64_t address = s->shared->address[tile % 2][key];
    bool seen = address != SPLIT_NOBODY;
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

/* ---- a tile ---- */

/* Scores of the warp's rows g, g+8 and keys n*8 + 2i, 2i+1, not scaled: score[n][0], [1] row g; [2], [3] row g+8. Of
 * the keys, one load serves two steps: lanes 8m..8m+7 name eight keys at chunk m of 4. Even and odd steps are summed
 * apart, since each product waits for the one before it in its sum. */
template <enum mlak_cuda_types TYPES, int GROUPS>
__device__ static inline void split_scores(const struct split<GROUPS> *s, uint32_t stage,
                                           const uint32_t (*q)[4], float score[GROUPS][4])
{
    enum { HELD = split_held<TYPES, GROUPS>::STEPS };
    uint32_t lane = threadIdx.x % 32, first_key = threadIdx.x / 32 / GROUPS * 8 * GROUPS;
    float part[GROUPS][2][4];
    const unsigned char *keys[GROUPS][2]; /* of even and odd pairs of steps; what is left is known at compile time */
#pragma unroll
    for (uint32_t n = 0; n < GROUPS; n++) {
#pragma unroll
        for (uint32_t i = 0; i < 4; i++)
            score[n][i] = part[n][0][i] = part[n][1][i] = 0;
#pragma unroll
        for (uint32_t i = 0; i < 2; i++)
            keys[n][i] = split_at(s->keys + stage * SPLIT_KEYS_BYTES, first_key + n * 8 + lane % 8, i * 4 + lane / 8);
    }
#pragma unroll
    for (uint32_t step = 0; step < SPLIT_STEPS; step += 2) {
        uint32_t a[2][4];
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            a[0][i] = step < HELD ? q[step][i] : 0;
            a[1][i] = step < HELD ? q[step + 1][i] : 0;
        }
        if (step >= HELD) {
            split_get_q<GROUPS>(s, step, a[0]);
            split_get_q<GROUPS>(s, step + 1, a[1]);
        }
#pragma unroll
        for (uint32_t n = 0; n < GROUPS; n++) {
            uint32_t b[4];
            load_matrices(b, keys[n][step / 2 % 2] + step / 4 * 128);
            multiply<TYPES>(part[n][0], a[0], b[0], b[1]);
            multiply<TYPES>(part[n][1], a[1], b[2], b[3]);
            if (TYPES == MLAK_CUDA_BF16_656 &&
                (step % 8 == 6 || step + 2 == SPLIT_STEPS)) { /* a group of 128 ends, or the rope */
                uint32_t group = step / 8;
                const float *scales = s->scales + stage * SPLIT_SCALES + (first_key + n * 8 + lane % 4 * 2) * 4;
                float first = group < 4 ? scales[group] : 1, second = group < 4 ? scales[4 + group] : 1;
#pragma unroll
                for (uint32_t i = 0; i < 4; i++) {
                    score[n][i] += (part[n][0][i] + part[n][1][i]) * (i % 2 ? second : first);
                    part[n][0][i] = part[n][1][i] = 0;
                }
            }
        }
    }
    if (TYPES != MLAK_CUDA_BF16_656)
#pragma unroll
        for (uint32_t n = 0; n < GROUPS; n++)
#pragma unroll
            for (uint32_t i = 0; i < 4; i++)
                score[n][i] = part[n][0][i] + part[n][1][i];
}

/* -inf where a row does not see a key. */
template <int GROUPS>
__device__ static void split_mask(const struct split<GROUPS> *s, uint32_t tile, float score[GROUPS][4])
{
    const struct split_shared<GROUPS> *shared = s->shared;
    uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (uint32_t n = 0; n < GROUPS; n++)
        for (uint32_t i = 0; i < 4; i++) {
            uint32_t r = warp % GROUPS * 16 + lane / 4 + i / 2 * 8;
            int64_t c =
                (int64_t)tile * MLAK_CUDA_TILE + (warp / GROUPS * GROUPS + n) * 8 + lane % 4 * 2 + i % 2;
            bool sees = c >= shared->lo[r] && c < shared->hi[r] &&
                        (c < shared->base[r] || row_tree_sees(&shared->row, shared->bits[r], c));
            score[n][i] = sees ? score[n][i] : -INFINITY;
        }
}

/* O += P V of the warp's 64 columns. Of 656-byte rows, a group's scale goes with P, whose product is no longer a weight
 * that rounds well (a weight of 1 is exact, times a scale it is not): it is taken in two parts, so that it keeps 16
 * bits. */
template <enum mlak_cuda_types TYPES, int GROUPS>
__device__ static inline void split_values(const struct split<GROUPS> *s, uint32_t stage, float o[GROUPS][8][4])
{
    uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4;
    const float *scales = s->scales + stage * SPLIT_SCALES + warp / 2; /* the columns of a warp are of one group */
    const unsigned char *columns[4]; /* lanes 8m..8m+7: keys of half m % 2, columns of eight 2 i + m / 2 */
#pragma unroll
    for (uint32_t i = 0; i < 4; i++)
        columns[i] = split_at(s->keys + stage * SPLIT_KEYS_BYTES, lane % 16, warp * 8 + i * 2 + lane / 16);
#pragma unroll
    for (uint32_t step = 0; step < MLAK_CUDA_TILE / 16; step++) {
        uint32_t a[GROUPS][4], rest[GROUPS][4], key = step * 16 + lane % 4 * 2;
#pragma unroll
        for (uint32_t g = 0; g < GROUPS; g++) {
            if (TYPES != MLAK_CUDA_BF16_656) {
                const uint16_t *p = (const uint16_t *)(const void *)s->p;
                load_matrices(a[g], p + (g * 16 + lane % 16) * SPLIT_P + step * 16 + lane / 16 * 8);
            }
#pragma unroll
            for (uint32_t i = 0; TYPES == MLAK_CUDA_BF16_656 && i < 4; i++) {
                uint32_t k = key + i / 2 * 8;
                const float *p = s->p + (g * 16 + row + i % 2 * 8) * SPLIT_P + k;
                float low = p[0] * scales[k * 4], high = p[1] * scales[(k + 1) * 4];
                a[g][i] = pack_bf16(low, high);
                rest[g][i] = pack_bf16(low - bits_float(a[g][i] << 16), high - bits_float(a[g][i] & 0xffff0000));
            }
        }
#pragma unroll
        for (uint32_t j = 0; j < 8; j += 2) {
            uint32_t b[4];
            load_matrices_transposed(b, columns[j / 2] + step * 16 * SPLIT_ROW);
#pragma unroll
            for (uint32_t g = 0; g < GROUPS; g++) {
                multiply<TYPES>(o[g][j], a[g], b[0], b[1]);
                multiply<TYPES>(o[g][j + 1], a[g], b[2], b[3]);
                if (TYPES == MLAK_CUDA_BF16_656) {
                    multiply_bf16(o[g][j], rest[g], b[0], b[1]);
                    multiply_bf16(o[g][j + 1], rest[g], b[2], b[3]);
                }
            }
        }
    }
}

/* What a thread keeps of the rows of each group that it holds O of (g and g + 8): the maximum of all their scores. And
 * of the group whose scores it computes, the sum of its own keys' weights. */
template <int GROUPS> struct split_state {
    float o[GROUPS][8][4], maximum[GROUPS][2], sum[2];
};

template <enum mlak_cuda_types TYPES, int GROUPS>
__device__ static inline void split_tile(const struct split<GROUPS> *s, uint32_t tile, uint32_t stage,
                                         const uint32_t (*q)[4], struct split_state<GROUPS> *state)
{
    enum { KEY_WARPS = SPLIT_WARPS / GROUPS };
    uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, own = warp % GROUPS, key_warp = warp / GROUPS;
    float score[GROUPS][4], scale = s->shared->row.score_scale * ITEM_LOG2_E,
                            (*reduced)[16 * GROUPS] = s->shared->reduced[tile % 2];
    int64_t first = (int64_t)tile * MLAK_CUDA_TILE;
    split_scores<TYPES, GROUPS>(s, stage, q, score);
#pragma unroll
    for (uint32_t n = 0; n < GROUPS; n++)
#pragma unroll
        for (uint32_t i = 0; i < 4; i++)
            score[n][i] *= scale;
    if (first < s->all_lo || first + MLAK_CUDA_TILE > s->all_end)
        split_mask<GROUPS>(s, tile, score);

#pragma unroll
    for (uint32_t half = 0; half < 2; half++) {
        float top = -INFINITY;
#pragma unroll
        for (uint32_t n = 0; n < GROUPS; n++)
            top = fmaxf(top, fmaxf(score[n][half * 2], score[n][half * 2 + 1]));
        top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, 1));
        top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, 2));
        if (lane % 4 == 0)
            reduced[key_warp][own * 16 + lane / 4 + half * 8] = top;
    }
    __syncthreads();
#pragma unroll
    for (uint32_t g = 0; g < GROUPS; g++)
#pragma unroll
        for (uint32_t half = 0; half < 2; half++) {
            uint32_t r = g * 16 + lane / 4 + half * 8;
            float before = state->maximum[g][half], now = before;
#pragma unroll
            for (uint32_t w = 0; w < KEY_WARPS; w++)
                now = fmaxf(now, reduced[w][r]);
            float shrink = now == -INFINITY ? 1 : power_of_two(before - now); /* nothing seen yet: nothing to shrink */
            state->maximum[g][half] = now;
            if (shrink != 1)
#pragma unroll
                for (uint32_t j = 0; j < 8; j++) {
                    state->o[g][j][half * 2] *= shrink;
                    state->o[g][j][half * 2 + 1] *= shrink;
                }
            if (g != own)
                continue;
            state->sum[half] *= shrink;
#pragma unroll
            for (uint32_t n = 0; n < GROUPS; n++) {
                float low = now == -INFINITY ? 0 : power_of_two(score[n][half * 2] - now);
                float high = now == -INFINITY ? 0 : power_of_two(score[n][half * 2 + 1] - now);
                state->sum[half] += low + high;
                uint32_t at = r * SPLIT_P + (key_warp * GROUPS + n) * 8 + lane % 4 * 2;
                if (TYPES == MLAK_CUDA_BF16_656) {
                    s->p[at] = low;
                    s->p[at + 1] = high;
                } else {
                    ((uint32_t *)(void *)s->p)[at / 2] = pack<TYPES>(low, high);
                }
            }
        }
    __syncthreads();
    split_values<TYPES, GROUPS>(s, stage, state->o);
}

/* ---- an item ---- */

/* What each row of the block sees, and what they see together. All threads; shared->row is there. */
template <int GROUPS> __device__ static void split_look(struct split<GROUPS> *s)
{
    struct split_shared<GROUPS> *shared = s->shared;
    const struct mlak_row *row = &shared->row;
    if (threadIdx.x < 16 * GROUPS) {
        uint32_t r = threadIdx.x, t = (s->first_row + r) / row->heads;
        struct mlak_visible sees =
            row_visible(row, r < s->rows ? t : s->end_token - 1); /* a row too many sees as the last */
        shared->lo[r] = sees.lo;
        shared->base[r] = sees.base;
        shared->hi[r] = sees.hi;
        shared->bits[r] = row->tree_mask[r < s->rows ? t : s->end_token - 1];
    }
    s->any = row_visible_any(row, s->first_token, s->end_token, &s->any_bits);
    struct mlak_visible first = row_visible(row, s->first_token), last = row_visible(row, s->end_token - 1);
    s->all_lo = last.lo;
    s->all_end = first.base;
}

/* The rows' outcome: to out and lse, or to their slot. */
template <int GROUPS>
__device__ static void split_finish(const struct split<GROUPS> *s, struct split_state<GROUPS> *state)
{
    struct split_shared<GROUPS> *shared = s->shared;
    const struct mlak_row *row = &shared->row;
    uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    __syncthreads(); /* the last tile's maxima have been read */
    for (uint32_t half = 0; half < 2; half++) {
        float sum = state->sum[half];
        sum += __shfl_xor_sync(0xffffffff, sum, 1);
        sum += __shfl_xor_sync(0xffffffff, sum, 2);
        if (lane % 4 == 0)
            shared->reduced[0][warp / GROUPS][warp % GROUPS * 16 + lane / 4 + half * 8] = sum;
    }
    __syncthreads();
    float *part = s->part;
#pragma unroll
    for (uint32_t g = 0; g < GROUPS; g++)
#pragma unroll
        for (uint32_t half = 0; half < 2; half++) {
            uint32_t r = g * 16 + lane / 4 + half * 8, folded = s->first_row + r;
            if (r >= s->rows)
                continue;
            float sum = 0;
            for (uint32_t w = 0; w < SPLIT_WARPS / GROUPS; w++)
                sum += shared->reduced[0][w][r];
            bool speaks = warp == 0 && lane % 4 == 0;
            if (part == NULL) {
                struct item_end end = item_end(row, folded % row->heads, state->maximum[g][half], sum);
#pragma unroll
                for (uint32_t j = 0; j < 8; j++)
                    item_store(row, folded, warp * 64 + j * 8 + lane % 4 * 2, state->o[g][j][half * 2],
                               state->o[g][j][half * 2 + 1], end.factor);
                if (speaks && row->lse != NULL)
                    row->lse[folded] = end.lse;
                continue;
            }
#pragma unroll
            for (uint32_t j = 0; j < 8; j++) {
                float *to = part + r * MLAK_V + warp * 64 + j * 8 + lane % 4 * 2;
                to[0] = state->o[g][j][half * 2];
                to[1] = state->o[g][j][half * 2 + 1];
            }
            if (speaks) {
                part[MLAK_CUDA_M * MLAK_V + r] = state->maximum[g][half];
                part[MLAK_CUDA_M * (MLAK_V + 1) + r] = sum;
            }
        }
}

/* Tiles [tile, end) with `stages` of them in flight. False: the request failed, or the launch was cancelled. */
template <enum mlak_cuda_types TYPES, int GROUPS>
__device__ static inline bool split_tiles(const struct split<GROUPS> *s, uint32_t tile, uint32_t end, uint32_t stages,
                                          struct split_state<GROUPS> *state)
{
    enum { LOOK_UP = 32 }; /* tiles between two looks at whether anybody still wants the result */
    uint32_t q[split_held<TYPES, GROUPS>::STEPS][4], stage = 0, walked = 0;
    struct split_key key = split_ask<GROUPS>(s, tile);
    split_settle<GROUPS>(s, tile, &key);
    if (tile + 1 < end) {
        key = split_ask<GROUPS>(s, tile + 1);
        split_settle<GROUPS>(s, tile + 1, &key);
    }
    __syncthreads();
    split_load_keys<TYPES, GROUPS>(s, tile, 0);
#pragma unroll
    for (uint32_t step = 0; step < split_held<TYPES, GROUPS>::STEPS; step++)
        split_get_q<GROUPS>(s, step, q[step]);
    for (; tile < end; tile++, walked++, stage ^= stages - 1) {
        bool next = tile + 1 < end, after = tile + 2 < end;
        if (next && stages == 2) {
            split_load_keys<TYPES, GROUPS>(s, tile + 1, stage ^ 1);
            copy_wait<1>();
        } else {
            copy_wait<0>();
        }
        if (threadIdx.x == 0 && walked % LOOK_UP == LOOK_UP - 1 && item_cancelled(s->job))
            s->shared->failed = 1;
        if (after)
            key = split_ask<GROUPS>(s, tile + 2);
        __syncthreads();
        if (s->shared->failed)
            return false;
        split_tile<TYPES, GROUPS>(s, tile, stage, q, state);
        if (after)
            split_settle<GROUPS>(s, tile + 2, &key); /* where this tile's addresses were: its copies have been set off */
        __syncthreads(); /* its keys and p have been read */
        if (next && stages == 1)
            split_load_keys<TYPES, GROUPS>(s, tile + 1, 0);
    }
    return true;
}

/* Tiles [tile, end) of the item that `s` names. */
template <enum mlak_cuda_types TYPES, int GROUPS>
__device__ static inline void split_item(struct split<GROUPS> *s, uint32_t tile, uint32_t end, uint32_t stages)
{
    struct split_shared<GROUPS> *shared = s->shared;
    const uint64_t *from = (const uint64_t *)(const void *)&s->job->rows[s->index];
    static_assert(sizeof shared->row % 8 == 0, "copied in words");
    for (uint32_t i = threadIdx.x; i < sizeof shared->row / 8; i += MLAK_CUDA_THREADS)
        ((uint64_t *)(void *)&shared->row)[i] = from[i];
    if (threadIdx.x == 0)
        shared->failed = item_cancelled(s->job);
    __syncthreads();
    const struct mlak_row *row = &shared->row;
    if (row->code != MLAK_ROW_OK || shared->failed)
        return;
    uint32_t folded = row->q_len * row->heads;
    s->first_row = s->block * 16 * GROUPS;
    s->rows = (uint32_t)row_least(folded - s->first_row, 16 * GROUPS);
    s->first_token = s->first_row / row->heads;
    s->end_token = (s->first_row + s->rows - 1) / row->heads + 1;
    split_look<GROUPS>(s);
    split_load_q<TYPES, GROUPS>(s);
    __syncthreads(); /* all have seen that it has not failed yet */

    struct split_state<GROUPS> state;
    state.sum[0] = state.sum[1] = 0;
#pragma unroll
    for (uint32_t g = 0; g < GROUPS; g++) {
        state.maximum[g][0] = state.maximum[g][1] = -INFINITY;
#pragma unroll
        for (uint32_t j = 0; j < 8; j++)
#pragma unroll
            for (uint32_t i = 0; i < 4; i++)
                state.o[g][j][i] = 0;
    }
    if (!split_tiles<TYPES, GROUPS>(s, tile, end, stages, &state))
        return;
    split_finish<GROUPS>(s, &state);
    if (threadIdx.x == 0) {
        unsigned long long done = atomicAdd(&s->job->schedule->progress, 1ull) + 1;
        if (done % MLAK_CUDA_SIGN_OF_LIFE == 0)
            write_for_host(&s->job->result->progress, done);
    }
}

/* Find the thread block's next item at tile (deterministic: item) `at` of all: which it is, its tiles, and where it
 * goes. Returns how many tiles or items to go on by. */
template <int GROUPS>
__device__ static inline uint64_t split_next(struct split<GROUPS> *s, uint64_t at, uint64_t end, uint32_t *tile,
                                             uint32_t *end_tile)
{
    const struct mlak_cuda_job *job = s->job;
    uint64_t share = job->schedule->share, step = gridDim.x;
    s->part = NULL;
    if (share == 0) {
        s->index = item_request(job->requests, job->count, at);
        const struct mlak_cuda_request *request = &job->requests[s->index];
        uint32_t item = (uint32_t)(at - request->first), split = item / request->blocks;
        s->block = item % request->blocks;
        *tile = split * request->split_tiles;
        *end_tile = (uint32_t)row_least(*tile + request->split_tiles, request->tiles);
        if (request->splits > 1)
            s->part = job->parts + (request->first_slot + (uint64_t)s->block * request->splits + split) *
                                       MLAK_CUDA_PART_FLOATS;
    } else {
        bool begins = at == blockIdx.x * share;
        if (begins) {
            struct mlak_cuda_start start = job->starts[blockIdx.x];
            s->index = start.request;
            s->block = start.block;
            *tile = start.tile;
        } else {
            *tile = 0;
            s->block++;
            while (s->block >= job->requests[s->index].blocks || job->requests[s->index].tiles == 0) {
                s->index++;
                s->block = 0;
            }
        }
        uint32_t tiles = job->requests[s->index].tiles;
        *end_tile = (uint32_t)row_least(*tile + (int64_t)(end - at), tiles);
        if (*tile > 0 || *end_tile < tiles)
            s->part = job->parts + (uint64_t)item_slot(blockIdx.x, begins) * MLAK_CUDA_PART_FLOATS;
        step = *end_tile - *tile;
    }
    *tile += job->requests[s->index].first_tile;
    *end_tile += job->requests[s->index].first_tile;
    return step;
}

template <enum mlak_cuda_types TYPES, int GROUPS> __device__ static inline void split_kernel(const struct mlak_cuda_job *job)
{
    uint32_t stages = GROUPS == 2 || shared_bytes() >= MLAK_CUDA_SPLIT_SHARED_2 ? 2 : 1;
    unsigned char *room = mlak_shared;
    struct split<GROUPS> s;
    s.job = job;
    s.q = room;
    room += SPLIT_Q_BYTES(GROUPS);
    s.keys = room;
    s.scales = (float *)(void *)(room + stages * SPLIT_KEYS_BYTES);
    room += stages * (SPLIT_KEYS_BYTES + SPLIT_SCALES_BYTES);
    s.p = (float *)(void *)room;
    s.shared = (struct split_shared<GROUPS> *)(void *)(room + SPLIT_P_BYTES(GROUPS));
    const struct mlak_cuda_schedule *schedule = job->schedule;
    uint64_t at = schedule->share ? blockIdx.x * schedule->share : blockIdx.x, end = schedule->work;
    if (schedule->share)
        end = (uint64_t)row_least((int64_t)(at + schedule->share), (int64_t)end);
    while (at < end) {
        uint32_t tile, end_tile;
        at += split_next<GROUPS>(&s, at, end, &tile, &end_tile);
        split_item<TYPES, GROUPS>(&s, tile, end_tile, stages);
        copy_wait<0>();  /* an item that was abandoned had copies under way */
        __syncthreads(); /* shared memory is the next item's */
    }
}

#define SPLIT_KERNEL(name, TYPES)                                                                                      \
    MLAK_KERNEL(mlak_cuda_split_##name, MLAK_CUDA_THREADS, struct mlak_cuda_job job)                                   \
    {                                                                                                                  \
        split_kernel<TYPES, 1>(&job);                                                                                  \
    }                                                                                                                  \
    MLAK_KERNEL(mlak_cuda_split_wide_##name, MLAK_CUDA_THREADS, struct mlak_cuda_job job)                              \
    {                                                                                                                  \
        split_kernel<TYPES, 2>(&job);                                                                                  \
    }
SPLIT_KERNEL(bf16, MLAK_CUDA_BF16)
SPLIT_KERNEL(fp16, MLAK_CUDA_FP16)
SPLIT_KERNEL(fp8, MLAK_CUDA_FP8)
SPLIT_KERNEL(bf16_fp8, MLAK_CUDA_BF16_FP8)
SPLIT_KERNEL(bf16_656, MLAK_CUDA_BF16_656)
