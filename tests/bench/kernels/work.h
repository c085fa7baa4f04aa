/* work.h - what is decoded: one shape, as several decodes that differ in their KV alone. */
#ifndef COMPARE_WORK_H
#define COMPARE_WORK_H

#include "mlak.h"

/* bf16, causal, pages of 64. Lengths are q_len at least. */
struct shape {
    uint32_t batch, heads, q_len;
    int32_t *seqlens; /* [batch], the shape's */
};

/* "BATCH HEADS Q_LEN LENGTH...": a length for all requests, or one for each. MLAK_OK, or INVALID with a sentence. */
enum mlak_code shape_parse(struct shape *shape, const char *line, struct mlak_fault *fault);
void shape_free(struct shape *shape);
uint64_t shape_kv_bytes(const struct shape *shape);

/* Copies of a shape's KV that together exceed `cold_bytes`; two at least. */
uint32_t shape_copies(const struct shape *shape, uint64_t cold_bytes);

/* KV of random numbers, from which each shape takes what it needs: filling gigabytes for each would take long. */
struct pool {
    const struct mlak_backend *backend;
    struct mlak_device *device;
    void *memory; /* the device's */
    uint64_t bytes;
};
enum mlak_code pool_init(struct pool *pool, const struct mlak_backend *backend, struct mlak_device *device,
                         uint64_t bytes, struct mlak_fault *fault);
void pool_deinit(struct pool *pool);

/* One q, table and lengths; a part of the pool for each copy. Two sets of outputs. Owns all but the pool. */
struct work {
    const struct pool *pool;
    const struct shape *shape;
    uint32_t copies;
    struct mlak_batch *batches; /* [copies]: they write the first set */
    void *out[2], *lse[2];      /* the device's: [rows, 512] bf16, [rows] */
    uint64_t rows;              /* batch * q_len * heads */
    void *q, *table, *seqlens;  /* the device's */
    uint64_t keys;              /* of all requests */
};
enum mlak_code work_init(struct work *work, const struct pool *pool, const struct shape *shape, uint64_t cold_bytes,
                         struct mlak_fault *fault);
void work_deinit(struct work *work);

/* NaN into both sets of outputs. */
enum mlak_code work_poison(struct work *work, struct mlak_fault *fault);

/* How far the second set is from the first: the largest difference of an element over the root mean square of the first
 * set, and the largest difference of an LSE. Infinite where either is no number. */
struct difference { double out, lse; };
enum mlak_code work_compare(struct work *work, struct difference *difference, struct mlak_fault *fault);

#endif
