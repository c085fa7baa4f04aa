/* mlak_items.cuh - what the kernels do with an item that does not depend on how they compute it: begin one, find its
 * keys, end its rows. */
#ifndef MLAK_ITEMS_CUH
#define MLAK_ITEMS_CUH

#include "mlak_schedule.cuh"

#define ITEM_LOG2_E 1.4426950408889634f
#define ITEM_LN_2 0.6931471805599453f

/* ---- rows ---- */

/* What is added to the pointers of a source's rows. */
__device__ static inline struct mlak_cuda_moved row_moved(const struct mlak_cuda_job *job, uint32_t source)
{
    return job->n_sources == 1 ? job->source.moved : job->sources[source].moved;
}

/* A request as the launch has it: what is looked at of the copy is all that is loaded. */
__device__ static inline struct mlak_row row_here(const struct mlak_cuda_job *job, uint32_t request, uint32_t source)
{
    const struct mlak_cuda_moved moved = row_moved(job, source);
    struct mlak_row row = job->rows[request];
    row.q += moved.q;
    row.kv += moved.kv;
    row.out += moved.out;
    row.lse = (float *)(void *)((uint8_t *)row.lse + moved.lse);
    row.sink = (const float *)(const void *)((const uint8_t *)row.sink + moved.sink);
    return row;
}

/* The item's maps, of boxes of one chunk and of two. */
__device__ static inline const struct mlak_cuda_map *item_maps(const struct mlak_cuda_job *job,
                                                               const struct mlak_cuda_item *item)
{
    return job->n_sources == 1 ? job->source.keys : job->sources[item->source].keys;
}

/* ---- begin ---- */

/* Copy the item's request to `row`, in shared memory, by `threads` threads, of which this is the `thread`-th. */
__device__ static inline void row_copy(const struct mlak_cuda_job *job, const struct mlak_cuda_item *item,
                                       struct mlak_row *row, uint32_t thread, uint32_t threads)
{
    const uint64_t *from = (const uint64_t *)(const void *)&job->rows[item->request];
    const struct mlak_cuda_moved moved = row_moved(job, item->source);
    const uint64_t by[] = {moved.q, moved.kv, moved.out, moved.lse, moved.block_table, moved.sink};
    static_assert(sizeof *row % 8 == 0, "copied in words");
    static_assert(offsetof(struct mlak_row, sink) == sizeof by - 8, "the first words are pointers, in this order");
    for (uint32_t i = thread; i < sizeof *row / 8; i += threads) {
        uint64_t word = from[i];
#pragma unroll
        for (uint32_t j = 0; j < sizeof by / 8; j++)
            word += i == j ? by[j] : 0;
        ((uint64_t *)(void *)row)[i] = word;
    }
}

/* Copy the item's request to `row`, in shared memory, by all `threads` of the block, and begin with `failed`, shared
 * too: the request has a bad page, or its source is cancelled. False: there is nothing to do. Until the next barrier
 * some threads may still have to look at `failed`: nobody sets it before. */
__device__ static inline bool item_open(const struct mlak_cuda_job *job, const struct mlak_cuda_item *item,
                                        struct mlak_row *row, int *failed, uint32_t threads)
{
    row_copy(job, item, row, threadIdx.x, threads);
    if (threadIdx.x == 0)
        *failed = item_cancelled(job, item);
    __syncthreads();
    return row->code == MLAK_ROW_OK && !*failed;
}

/* Which rows the item has, of at most `most`, and what they see together. TREE: the row may have tree masks. */
template <bool TREE = true>
__device__ static inline void item_look(struct mlak_cuda_item *item, const struct mlak_row *row, uint32_t most)
{
    uint32_t folded = row->q_len * row->heads;
    item->first_row = item->block * most;
    item->rows = (uint32_t)row_least(folded - item->first_row, most);
    item->first_token = item->first_row / row->heads;
    item->end_token = (item->first_row + item->rows - 1) / row->heads + 1;
    item->any_bits = 0;
    item->any = TREE ? row_visible_any(row, item->first_token, item->end_token, &item->any_bits)
                     : row_visible_range(row, item->first_token, item->end_token);
    item->all_lo = row_visible(row, item->end_token - 1).lo;
    item->all_end = row_visible(row, item->first_token).base;
}

/* The same, and which tiles the copy engine can fetch: what it finds it fetches, so all keys must be some row's. */
template <bool TREE = true>
__device__ static inline void item_look_around(const struct mlak_cuda_job *job, struct mlak_cuda_item *item,
                                               const struct mlak_row *row)
{
    item_look<TREE>(item, row, job->rows_per_item);
    int64_t from = row_most(0, (item->any.lo + MLAK_CUDA_TILE - 1) / MLAK_CUDA_TILE - item->tile);
    int64_t to = row_least(item->end_tile - item->tile, item->any.base / MLAK_CUDA_TILE - item->tile);
    bool fetched = item->box_rows > 0 && from < to;
    item->fetch = fetched ? (uint32_t)from : 1; /* else the first is copied, and then the others */
    item->fetch_end = fetched ? (uint32_t)to : 1;
}

/* The token of row `r` of the item; a row too many sees as the last. */
__device__ static inline uint32_t item_token(const struct mlak_cuda_item *item, const struct mlak_row *row, uint32_t r)
{
    return r < item->rows ? (item->first_row + r) / row->heads : item->end_token - 1;
}

/* ---- keys ---- */

enum { ITEM_NOBODY = -1 }; /* address of a key that no row of the item sees */

/* A key of a tile on its way to its address: the page id is asked for early and used late. */
struct item_key {
    bool seen;
    uint32_t column, slot; /* of the block table; of the page */
    int32_t page;
};

/* Key `i` of a tile; none from MLAK_CUDA_TILE on. A page is needed iff some row of the item sees one of its keys. */
__device__ static inline struct item_key item_ask(const struct mlak_cuda_item *item, const struct mlak_row *row,
                                                  uint32_t tile, uint32_t i)
{
    int64_t c = (int64_t)tile * MLAK_CUDA_TILE + i;
    struct item_key key = {false, 0, 0, 0};
    if (i >= MLAK_CUDA_TILE || c < item->any.lo || c >= item->any.hi ||
        (c >= item->any.base && !row_tree_sees(row, item->any_bits, c)))
        return key;
    key.seen = true;
    key.column = (uint32_t)c / row->page_size; /* lengths are int32: so are keys */
    key.slot = (uint32_t)c - key.column * row->page_size;
    key.page = read_once(&row->block_table[key.column]);
    return key;
}

/* The key's address, from row->kv on; or ITEM_NOBODY. A page that is needed and out of range fails the request, of
 * which `row` is a copy, and nothing is read from it. */
__device__ static inline int64_t item_settle(const struct mlak_cuda_job *job, const struct mlak_cuda_item *item,
                                             const struct mlak_row *row, const struct item_key *key, int *failed)
{
    if (key->seen && key->page >= 0 && (uint32_t)key->page < row->pages)
        return (int64_t)((uint64_t)key->page * row->page_stride + (uint64_t)key->slot * row->row_stride);
    if (key->seen) {
        struct mlak_row *all = &job->rows[item->request];
        struct mlak_cuda_row_result *result = &job->row_results[item->request];
        if (atomicCAS((unsigned long long *)&all->detail[0], (unsigned long long)-1, (unsigned long long)key->column) ==
            (unsigned long long)-1) {
            all->detail[1] = result->detail[1] = key->page;
            result->detail[0] = key->column;
            all->code = result->code = MLAK_ROW_PAGE_RANGE;
        }
        *failed = 1;
    }
    return ITEM_NOBODY;
}

/* ---- end ---- */

/* A row's last step. `maximum` and `sum` are of its visible keys, in base 2; -inf and 0 without any. The sink is one
 * more logit, in natural-log units. */
struct item_end {
    float factor, lse;
};
__device__ static inline struct item_end item_end(const struct mlak_row *row, uint32_t head, float maximum, float sum)
{
    float top = maximum, weight = maximum == -INFINITY ? 0 : 1, natural = NAN;
    if (row->sink != NULL) {
        natural = read_once(&row->sink[head]);
        float sink = natural * ITEM_LOG2_E; /* infinite, of the largest numbers */
        top = fmaxf(maximum, sink);
        weight = maximum == top && top != -INFINITY ? 1 : maximum == -INFINITY ? 0 : power_of_two(maximum - top);
        sum = sum * weight + (sink == -INFINITY ? 0 : sink == top ? 1 : power_of_two(sink - top));
    }
    struct item_end end;
    end.factor = weight == 0 ? 0 : weight * row->v_scale / sum;
    end.lse = top == -INFINITY ? -INFINITY : top + log2f(sum);
    if (row->lse_base == MLAK_LSE_E) /* where there is only a sink, it is the outcome, unrounded */
        end.lse = weight == 0 && sum == 1 && natural == natural ? natural : end.lse * ITEM_LN_2;
    return end;
}

/* Two neighbouring elements of folded row r: where they go, and what is stored there. */
__device__ static inline uint32_t *item_out(const struct mlak_row *row, uint32_t r, uint32_t column)
{
    return (uint32_t *)(void *)(row->out + ((uint64_t)r * MLAK_V + column) * 2);
}
__device__ static inline uint32_t item_pack(const struct mlak_row *row, float a, float b, float factor)
{
    a = factor == 0 ? 0 : a * factor; /* a row that sees nothing is 0, whatever the others of its tile saw */
    b = factor == 0 ? 0 : b * factor;
    return row->out_dtype == MLAK_BF16 ? pack_bf16(a, b) : pack_fp16(a, b);
}
__device__ static inline void item_store(const struct mlak_row *row, uint32_t r, uint32_t column, float a, float b,
                                         float factor)
{
    *item_out(row, r, column) = item_pack(row, a, b, factor);
}

/* An item is complete, or nearly. One thread. */
__device__ static inline void item_done(const struct mlak_cuda_job *job)
{
    unsigned long long done = atomicAdd(&job->schedule->progress, 1ull) + 1;
    if (done % MLAK_CUDA_SIGN_OF_LIFE == 0)
        write_for_host(&job->result->progress, done);
}

#endif
