/* mlak_split_tile.cuh - the split kernel's second room: one tile, whose keys lie in shared memory, from scores through
 * masks and softmax to values. */
#ifndef MLAK_SPLIT_TILE_CUH
#define MLAK_SPLIT_TILE_CUH

#include "mlak_split_loads.cuh"

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
    if (first < s->item.all_lo || first + MLAK_CUDA_TILE > s->item.all_end)
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

#endif
