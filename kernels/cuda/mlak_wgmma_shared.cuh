/* mlak_wgmma_shared.cuh - what the warpgroups of Hopper's split kernel have between them: shared memory, how a tile is
 * cut into pieces, and the slots by which items are handed over. mlak_wgmma.cuh has the picture. */
#ifndef MLAK_WGMMA_SHARED_CUH
#define MLAK_WGMMA_SHARED_CUH

#include "mlak_items.cuh"
#include "mlak_ptx_sm90.cuh"

enum {
    WGMMA_ROWS = 64,
    WGMMA_CHUNK = WGMMA_ROWS * 128, /* bytes of 64 rows x 64 columns */
    WGMMA_CHUNKS = MLAK_D / 64,
    WGMMA_GROUP = 128, /* threads of a warpgroup */
    WGMMA_STAGES = 2,
    WGMMA_ITEMS = 8, /* slots of the ring */
    WGMMA_COMPUTE_REGISTERS = 208,
    WGMMA_LOAD_REGISTERS = 88 /* a thread */
};
static_assert(2 * WGMMA_COMPUTE_REGISTERS + WGMMA_LOAD_REGISTERS <= 3 * 168, "of a block, 168 a thread at entry");
enum { WGMMA_LOADS = 2 };                                      /* warpgroups: the two that compute are 0 and 1 */
enum { WGMMA_LOADERS = 1, WGMMA_ENDS };                        /* named barriers: of the loads; of those that compute */
enum { WGMMA_ROPE = 4, WGMMA_PIECES = 5, WGMMA_ROPE_CHUNK = 8 }; /* of a tile: 0, 1 and 2, 3 are halves */

/* The n-th piece in the order of loading: the owner's half, the other half, the rope. */
__device__ static constexpr uint32_t wgmma_piece(uint32_t n, uint32_t owner)
{
    return n == WGMMA_ROPE ? n : n ^ owner * 2;
}
/* Whether room for it is room for a half. The rope's is given back with the half of the one who is not the owner. */
__device__ static constexpr bool wgmma_begins_half(uint32_t n)
{
    return n == 0 || n == 2;
}
/* The first of its chunks, and how many they are. */
__device__ static constexpr uint32_t wgmma_first(uint32_t piece)
{
    return piece * 2;
}
__device__ static constexpr uint32_t wgmma_chunks(uint32_t piece)
{
    return piece == (uint32_t)WGMMA_ROPE ? 1 : 2;
}

struct wgmma_item {
    struct mlak_cuda_item item;
    struct mlak_row row; /* its request's */
    uint32_t tiles;      /* none: there is no item any more */
    float scale;         /* of scores, to log2 */
    int stopped;         /* a bad page, or the launch is cancelled: nothing is written */
};

struct wgmma_shared {
    unsigned char q[WGMMA_CHUNKS][WGMMA_CHUNK], keys[WGMMA_STAGES][WGMMA_CHUNKS][WGMMA_CHUNK];
    uint64_t q_full, q_empty, maxima_full[WGMMA_STAGES], p_full[WGMMA_STAGES];
    uint64_t keys_full[WGMMA_STAGES][WGMMA_PIECES], keys_empty[WGMMA_STAGES][2]; /* of each piece; of each half */
    struct wgmma_item items[WGMMA_ITEMS];
    float maximum[WGMMA_STAGES][WGMMA_ROWS]; /* that the tile's weights refer to */
    float sums[2][2][WGMMA_ROWS];            /* of weights, each warpgroup's own; of this item and the one before */
};
static_assert(sizeof(struct wgmma_shared) <= MLAK_CUDA_SPLIT_SHARED_WGMMA, "");

/* Where piece `lane % 8`, 16 bytes, of row `row` of a chunk lies. */
__device__ static inline uint32_t wgmma_at(uint32_t row, uint32_t lane)
{
    return row * 128 + (lane % 8 ^ row % 8) * 16;
}

/* Nothing of the item is written any more. Those who wait for a tile that this thread loads later see it. */
__device__ static inline void wgmma_stop(struct wgmma_item *slot)
{
    *(volatile int *)&slot->stopped = 1;
    __threadfence_block();
}

__device__ static inline bool wgmma_stopped(const struct wgmma_item *slot)
{
    return *(const volatile int *)&slot->stopped;
}

#endif
