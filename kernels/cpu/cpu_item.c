/* cpu_item.c - one work item of the cpu backend: a group of query rows over one split of the keys. Finds out which keys
 * the rows see, walks them in tiles through the functions of a path, and combines the splits. Holds nothing of its own.
 *
 * Keys that no row of the group sees are never touched, nor are their page ids: they stand as zero rows. Only tiles
 * that some row sees in part are masked, with real -inf. */
#include "cpu.h"

#include <math.h>
#include <string.h>

static const _Alignas(64) uint8_t zero_row[MLAK_D * 2];

/* What any row of an item sees: keys lo <= c < hi; of those >= base, the ones with a draft bit in `bits`. */
struct span { int64_t lo, base, hi; uint64_t bits; };

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/* Visibility of the group's tokens, into the scratch; the union is returned. */
static struct span find_visible(const struct cpu_group *group, struct cpu_scratch *scratch, uint32_t *first_token,
                                uint32_t *tokens)
{
    const struct mlak_row *row = group->row;
    uint32_t begin = group->first / row->heads, end = (group->first + group->rows - 1) / row->heads + 1;
    struct span span = {.lo = INT64_MAX, .base = INT64_MAX, .hi = 0, .bits = 0};
    for (uint32_t t = begin; t < end; t++) {
        struct mlak_visible visible = mlak_visible(row, t);
        int64_t low = larger((int64_t)t * row->heads - group->first, 0);
        int64_t high = smaller((int64_t)(t + 1) * row->heads - group->first, group->rows);
        scratch->visible[t - begin] = visible;
        scratch->token_rows[t - begin] = (~UINT64_C(0) >> (CPU_ROWS - (high - low))) << low;
        if (visible.lo >= visible.hi)
            continue;
        span.lo = smaller(span.lo, visible.lo);
        span.hi = larger(span.hi, visible.hi);
        span.base = smaller(span.base, visible.base);
        span.bits |= row->tree_mask[t];
    }
    if (row->mask != MLAK_MASK_TREE)
        span.base = span.hi;
    *first_token = begin;
    *tokens = end - begin;
    return span;
}

/* Row pointers of keys [c, c + count), then zero rows. False if a needed page id is out of range. */
static bool gather(struct mlak_row *row, const struct span *span, int64_t c, uint32_t count,
                   const uint8_t *keys[CPU_TILE])
{
    uint32_t i = 0;
    while (i < count) {
        int64_t entry = (c + i) / row->page_size;
        uint32_t offset = (uint32_t)((c + i) % row->page_size), run = row->page_size - offset;
        const uint8_t *page = NULL;
        for (; run > 0 && i < count; run--, i++, offset++) {
            int64_t key = c + i;
            if (key < span->lo || key >= span->hi || (key >= span->base && !mlak_tree_sees(row, span->bits, key))) {
                keys[i] = zero_row;
                continue;
            }
            if (page == NULL) {
                int32_t id = __atomic_load_n(&row->block_table[entry], __ATOMIC_RELAXED);
                if (id < 0 || (uint32_t)id >= row->pages) {
                    mlak_row_page_fault(row, (uint32_t)entry, id);
                    return false;
                }
                page = row->kv + (uint64_t)id * row->page_stride;
            }
            keys[i] = page + (uint64_t)offset * row->row_stride;
        }
    }
    for (; i < CPU_TILE; i++)
        keys[i] = zero_row;
    return true;
}

/* Which rows see each key of [c, c + count), into scratch->seen; NULL if all rows see all keys. */
static const uint64_t *mask_tile(const struct mlak_row *row, struct cpu_scratch *scratch, uint32_t first_token,
                                 uint32_t tokens, int64_t c, uint32_t count)
{
    bool partial = false;
    for (uint32_t t = 0; t < tokens; t++)
        partial |= scratch->visible[t].lo > c || scratch->visible[t].base < c + count;
    if (!partial)
        return NULL;
    memset(scratch->seen, 0, count * sizeof scratch->seen[0]);
    for (uint32_t t = 0; t < tokens; t++) {
        struct mlak_visible visible = scratch->visible[t];
        uint64_t rows = scratch->token_rows[t], bits = row->tree_mask[first_token + t];
        int64_t end = smaller(visible.hi, c + count);
        for (int64_t key = larger(visible.lo, c); key < end; key++)
            if (key < visible.base || mlak_tree_sees(row, bits, key))
                scratch->seen[key - c] |= rows;
    }
    return scratch->seen;
}

/* Keys begin <= c < end, begin a multiple of the tile, into o, m and l. False if the row failed; `*defined` says
 * whether there was any tile. */
static bool walk(const struct cpu_group *group, struct cpu_scratch *scratch, int64_t begin, int64_t end, float *o,
                 float *m, float *l, bool *defined)
{
    const struct cpu_path *path = group->path;
    uint32_t first_token, tokens;
    struct span span = find_visible(group, scratch, &first_token, &tokens);
    for (uint32_t r = 0; r < CPU_ROWS; r++) {
        m[r] = -INFINITY;
        l[r] = 0;
    }
    if (span.lo > begin)
        begin += (smaller(span.lo, end) - begin) / path->tile * path->tile;
    end = smaller(end, span.hi);
    if (begin >= end)
        return true;

    path->pack(scratch, group->row, group->first, group->rows);
    struct cpu_tile tile = {.rows = group->rows, .blocks = (group->rows + CPU_LANES - 1) / CPU_LANES, .first = true,
                            .scale = group->row->score_scale * 1.44269504088896341f, .format = group->row->kv_format,
                            .o = o, .m = m, .l = l};
    uint32_t count = 0, ahead = (uint32_t)smaller(end - begin, path->tile), flip = 0;
    if (!gather(group->row, &span, begin, ahead, scratch->keys[0]))
        return false;
    for (int64_t c = begin; c < end; c += count, flip ^= 1) {
        count = ahead;
        ahead = (uint32_t)smaller(end - c - count, path->tile);
        if (!gather(group->row, &span, c + count, ahead, scratch->keys[flip ^ 1]))
            return false;
        tile.keys = scratch->keys[flip];
        tile.next = ahead > 0 ? scratch->keys[flip ^ 1] : NULL;
        tile.count = count;
        tile.padded = (count + path->pad - 1) / path->pad * path->pad;
        tile.seen = mask_tile(group->row, scratch, first_token, tokens, c, count);
        path->tile_step(scratch, &tile);
        tile.first = false;
        if (scratch->progress != NULL)
            __atomic_fetch_add(scratch->progress, 1, __ATOMIC_RELAXED);
        if (__atomic_load_n(&group->row->code, __ATOMIC_RELAXED) != MLAK_ROW_OK)
            return false; /* failed elsewhere, or cancelled */
    }
    *defined = true;
    return true;
}

/* Combine the splits, in their order, and write the rows. */
static void combine(const struct cpu_group *group, struct cpu_scratch *scratch)
{
    size_t stride = cpu_part_floats(group->rows);
    float *parts[CPU_MAX_SPLITS]; /* those that saw any tile */
    float weights[CPU_MAX_SPLITS][CPU_ROWS];
    for (uint32_t r = 0; r < group->rows; r++) {
        float top = -INFINITY, sum = 0;
        for (uint32_t s = 0; s < group->splits; s++)
            top = fmaxf(top, group->parts[s * stride + r]);
        float anchor = top == -INFINITY ? 0 : top;
        for (uint32_t s = 0; s < group->splits; s++) {
            weights[s][r] = exp2f(group->parts[s * stride + r] - anchor);
            sum += weights[s][r] * group->parts[s * stride + CPU_ROWS + r];
        }
        scratch->m[r] = top;
        scratch->l[r] = sum;
    }
    uint32_t used = 0;
    for (uint32_t s = 0; s < group->splits; s++) {
        float *part = group->parts + s * stride;
        if (part[2 * CPU_ROWS] == 0)
            continue;
        parts[used] = part + 2 * CPU_ROWS + CPU_LANES;
        if (used < s)
            memcpy(weights[used], weights[s], sizeof weights[s]);
        used++;
    }
    if (used > 0)
        group->path->merge(parts, weights, used, group->rows);
    group->path->finish(&(struct cpu_result){.row = group->row, .first = group->first, .rows = group->rows,
                                             .o = used > 0 ? parts[0] : NULL, .m = scratch->m, .l = scratch->l});
}

void mlak_cpu_run_item(struct cpu_group *group, uint32_t split, struct cpu_scratch *scratch)
{
    int64_t begin = group->begin + (int64_t)split * group->split_keys;
    int64_t end = smaller(begin + group->split_keys, group->end);
    bool whole = group->splits == 1, defined = false;
    float *part = whole ? NULL : group->parts + split * cpu_part_floats(group->rows);
    float *m = whole ? scratch->m : part, *l = whole ? scratch->l : part + CPU_ROWS;
    float *o = whole ? scratch->o : part + 2 * CPU_ROWS + CPU_LANES;
    bool good = __atomic_load_n(&group->row->code, __ATOMIC_RELAXED) == MLAK_ROW_OK &&
                walk(group, scratch, begin, end, o, m, l, &defined);
    if (whole) {
        if (good)
            group->path->finish(&(struct cpu_result){.row = group->row, .first = group->first, .rows = group->rows,
                                                     .o = o, .m = m, .l = l});
        return;
    }
    part[2 * CPU_ROWS] = good && defined;
    if (__atomic_sub_fetch(&group->remaining, 1, __ATOMIC_ACQ_REL) == 0 &&
        __atomic_load_n(&group->row->code, __ATOMIC_RELAXED) == MLAK_ROW_OK)
        combine(group, scratch);
}

void mlak_cpu_plan_group(struct cpu_group *group)
{
    uint64_t bits;
    struct mlak_visible any = mlak_visible_any(group->row, &bits);
    uint32_t tile = group->path->tile;
    int64_t begin = any.hi > any.lo ? any.lo / tile * tile : 0, keys = any.hi > any.lo ? any.hi - begin : 0;
    int64_t split = (keys + CPU_MAX_SPLITS - 1) / CPU_MAX_SPLITS;
    split = larger((split + CPU_SPLIT - 1) / CPU_SPLIT * CPU_SPLIT, CPU_SPLIT);
    group->begin = begin;
    group->end = begin + keys;
    group->split_keys = (uint32_t)split;
    group->splits = (uint32_t)larger((keys + split - 1) / split, 1);
}
