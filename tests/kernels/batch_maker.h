/* batch_maker.h - random batches over the whole decode contract, for tests of any backend.
 *
 *     struct maker maker = maker_seeded(7);
 *     struct mlak_batch shape = maker_describe(&maker);       then change what the test is about
 *     struct made *made = made_new(&maker, &shape, NULL, NULL);
 *     ... mlak_prepare(&made->batch, ...), launch, compare ...
 *     made_free(made);
 *
 * Every tensor lies in its own fence. Whatever no query token may see holds NaN: the rest of a page, unused pages, gaps
 * of strides, keys outside all windows and trees. Block-table entries that are not needed name nonsense pages. The
 * same seed gives the same batch. */
#ifndef BATCH_MAKER_H
#define BATCH_MAKER_H

#include "fence.h"
#include "mlak.h"

struct maker {
    uint64_t state;
    uint32_t max_batch, max_heads, max_q, max_keys, max_world;  /* what maker_describe draws from; change freely */
};

struct maker maker_seeded(uint64_t seed);
uint64_t maker_random(struct maker *maker);
uint32_t maker_below(struct maker *maker, uint32_t n);          /* 0..n-1; n >= 1 */
double maker_normal(struct maker *maker);                       /* N(0, 1), nearly */

/* The contract's element types: 0..MAKER_TYPES-1. */
enum { MAKER_TYPES = 6 };
void maker_set_types(struct mlak_batch *batch, uint32_t types);  /* q_dtype, kv_format, out_dtype; packed strides */

/* A descriptor that mlak_check accepts, pointers NULL. */
struct mlak_batch maker_describe(struct maker *maker);
/* A plain one to start from: bf16, causal, 8 pages of 16 keys a request, with lse. */
struct mlak_batch maker_plain(uint32_t batch, uint32_t heads, uint32_t q_len);

struct made {
    struct mlak_batch batch;                    /* pointers resolved */
    struct fence tensor[MLAK_T_COUNT];          /* the memory of each; absent ones are empty */
};

/* Allocate and fill. `seqlens` and `q_lens` ([batch], q_lens only with has_cu_q) are drawn if NULL. Needed keys must
 * fit shape->pages, as those of maker_describe do. Aborts without memory. */
struct made *made_new(struct maker *maker, const struct mlak_batch *shape, const int32_t *seqlens,
                      const int32_t *q_lens);
void made_free(struct made *made);
bool made_intact(const struct made *made);      /* every fence_intact */

/* A copy of the outputs, in one piece of memory that is the caller's to free; whether they have its bits. */
uint8_t *made_outputs(const struct made *made);
bool made_outputs_are(const struct made *made, const uint8_t *copy);

static inline int32_t *made_seqlens(struct made *made) { return (int32_t *)(void *)made->tensor[MLAK_T_SEQLENS].data; }
static inline int32_t *made_table(struct made *made, uint32_t b)
{
    return (int32_t *)(void *)made->tensor[MLAK_T_BLOCK_TABLE].data + (size_t)b * made->batch.max_pages;
}
uint32_t made_q_start(const struct made *made, uint32_t b);
uint32_t made_q_len(const struct made *made, uint32_t b);
/* Where the row of local key c of request b lies. */
uint8_t *made_key(struct made *made, uint32_t b, int64_t c);
/* Code of out's element i in row `row` of [q_rows * heads]. */
uint16_t made_out(const struct made *made, size_t row, size_t i);

/* The contract's words, key by key: does token t (tree mask `bits`) of a request with k keys and q tokens see global
 * key g? Does the batch's rank hold it? */
bool contract_sees(const struct mlak_batch *batch, int64_t k, int64_t q, int64_t t, uint64_t bits, int64_t g);
bool contract_holds(const struct mlak_batch *batch, int64_t g);

#endif
