/* emulated_ptx_sm90.h - mlak_ptx_sm90.cuh's functions, for the emulator (hopper.cpp). Operands are what they are there,
 * descriptors' lower halves. */
#ifndef EMULATED_PTX_SM90_H
#define EMULATED_PTX_SM90_H

#include "emulated_ptx.h"

struct mlak_cuda_map;

uint32_t shared_address(const void *pointer);
void barrier_new(uint64_t *barrier, uint32_t arrivals);
void barriers_meet();
void barrier_arrive(uint64_t *barrier);
void barrier_arrive_expecting(uint64_t *barrier, uint32_t bytes);
void barrier_arrive_many(uint64_t *barrier, uint32_t arrivals);
void barrier_join_after_copies(uint64_t *barrier);
void barrier_wait(uint64_t *barrier, uint32_t parity);
void barrier_meet(uint32_t id, uint32_t threads);
void copy_async_to(uint32_t to, const void *from, bool valid);
void map_acquire(const struct mlak_cuda_map *map);
void copy_box(uint32_t to, const struct mlak_cuda_map *map, int32_t element, int32_t row, int32_t chunk, int32_t page,
              uint64_t *barrier, uint64_t stays);
void expect_box(const struct mlak_cuda_map *map, int32_t element, int32_t row, int32_t chunk, int32_t page,
                uint64_t stays);
void warp_meet();
bool warp_speaker();
int64_t shuffle(int64_t value, uint32_t lane);
bool __any_sync(uint32_t mask, bool value);
void products_begin();
void products_commit();
void emulated_products_wait(uint32_t pending);
void product_64x64_bf16(float c[32], uint32_t a, uint32_t b, bool add);
void product_64x64_fp16(float c[32], uint32_t a, uint32_t b, bool add);
void product_64x256_bf16(float c[128], uint32_t a, uint32_t b, bool add);
void product_64x256_fp16(float c[128], uint32_t a, uint32_t b, bool add);
void product_64x256_bf16_own(float c[128], const uint32_t a[4], uint32_t b, bool add);
void product_64x256_fp16_own(float c[128], const uint32_t a[4], uint32_t b, bool add);
void store_matrices(void *row, const uint32_t r[4]);

template <int PENDING> static inline void products_wait()
{
    emulated_products_wait(PENDING);
}
template <int COUNT> static inline void products_there(float *) {}
template <int REGISTERS> static inline void registers_give() {}
template <int REGISTERS> static inline void registers_take() {}
static inline void map_expect(const struct mlak_cuda_map *) {}
static inline void shared_to_products() {}
static inline void __threadfence_block() {}
static inline uint32_t warp_uniform(uint32_t value)
{
    return __shfl_sync(0xffffffff, value, 0);
}
static inline uint32_t operand_rows(const void *chunk)
{
    return (shared_address(chunk) & 0x3ffff) >> 4 | 1u << 16;
}
static inline uint32_t operand_columns(const void *chunk, uint32_t chunk_bytes)
{
    return (shared_address(chunk) & 0x3ffff) >> 4 | chunk_bytes >> 4 << 16;
}
static inline uint32_t operand_move(uint32_t operand, uint32_t bytes)
{
    return operand + (bytes >> 4);
}
static inline uint32_t operand_here(uint32_t operand)
{
    return operand;
}

#endif
