/* cases.c - see the header. Every choice is one draw from a splitmix64 stream. */
#include "cases.h"
#include "model.h"
#include "numbers.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

enum {
    D = 576, V = 512, MAX_REQUESTS = 4,
    WORK = 24000,   /* largest rows times keys of a request: what the reference does in milliseconds */
};

struct random { uint64_t state; };

static uint64_t next(struct random *random)
{
    uint64_t z = random->state += UINT64_C(0x9e3779b97f4a7c15);
    z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
    return z ^ z >> 31;
}

/* A whole number in [low, high]. */
static int64_t between(struct random *random, int64_t low, int64_t high)
{
    return low + (int64_t)(next(random) % (uint64_t)(high - low + 1));
}
static bool chance(struct random *random, unsigned percent) { return next(random) % 100 < percent; }
static double uniform(struct random *random, double low, double high)
{
    return low + (high - low) * ((double)(next(random) >> 11) * 0x1p-53);
}
static double normal(struct random *random)
{
    double radius = sqrt(-2 * log(uniform(random, 0x1p-53, 1)));
    return radius * cos(uniform(random, 0, 2 * M_PI));
}
#define PICK(random, array) ((array)[next(random) % (sizeof(array) / sizeof *(array))])

/* ---- shape ---- */

static uint32_t pick_heads(struct random *random, uint32_t max)
{
    static const uint32_t usual[] = {1, 2, 3, 6, 8, 12, 16, 16, 24, 32, 48, 96, 128};
    uint32_t heads = chance(random, 80) ? PICK(random, usual) : (uint32_t)between(random, 1, 128);
    return heads < max ? heads : max;
}

static uint32_t pick_q_len(struct random *random, uint32_t heads, uint32_t max)
{
    static const uint32_t usual[] = {0, 1, 1, 1, 2, 3, 4, 4, 5, 8};
    uint32_t q_len = chance(random, 85) ? PICK(random, usual) : (uint32_t)between(random, 1, 64);
    while (q_len > 1 && q_len * heads > 1024)
        q_len /= 2;
    return q_len < max ? q_len : max;
}

static int32_t pick_length(struct random *random, uint32_t heads, uint32_t q_len)
{
    static const int32_t edges[] = {0,  1,  2,   3,   15,  16,  17,  31,  32,  33, 63,
                                    64, 65, 127, 128, 129, 191, 192, 255, 256, 257};
    int64_t most = WORK / (heads * (q_len ? q_len : 1));
    most = most < 600 ? most : 600;
    int64_t length = PICK(random, edges);
    if (chance(random, 35))
        length = (int64_t)q_len + between(random, -2, 2);
    else if (chance(random, 40))
        length = between(random, 1, most);
    length = length > most ? between(random, 0, most) : length;
    return (int32_t)(length < 0 ? 0 : length);
}

static void pick_context_parallel(struct random *random, mla_batch *batch)
{
    static const uint32_t worlds[] = {2, 2, 3, 4, 8}, interleaves[] = {1, 1, 1, 2, 16, 64};
    batch->dcp_world = PICK(random, worlds);
    batch->dcp_rank = (uint32_t)between(random, 0, batch->dcp_world - 1);
    batch->dcp_interleave = PICK(random, interleaves);
}

/* ---- contents ---- */

static int fill_scales(struct random *random, struct capture *capture)
{
    mla_batch *batch = &capture->batch;
    double product = 1;
    bool may[] = {batch->q_dtype == MLA_E4M3, batch->kv_format == MLA_KV_E4M3, batch->kv_format == MLA_KV_E4M3};
    for (unsigned i = 0; i < 3; i++) {
        if (!may[i] || chance(random, 25))
            continue;
        float *scale = capture_add(capture, (enum capture_tensor)(CAPTURE_Q_SCALE + i));
        if (!scale)
            return -1;
        *scale = (float)exp2(uniform(random, -3, 3));
        product *= i < 2 ? (double)*scale : 1;
    }
    batch->softmax_scale =
        uniform(random, 0.2, 2.5) / 24 / product; /* scores of N(0,1) inputs then deviate by 0.2 to 2.5 */
    return 0;
}

static int fill_queries(struct random *random, struct capture *capture)
{
    const mla_batch *batch = &capture->batch;
    void *q = capture_add(capture, CAPTURE_Q);
    if (!q)
        return -1;
    for (uint64_t i = 0; i < batch->q_rows * batch->heads * D; i++)
        number_put(batch->q_dtype, q, i, normal(random));
    if (batch->mask == MLA_MASK_TREE) {
        uint64_t *masks = capture_add(capture, CAPTURE_TREE_MASK);
        if (!masks)
            return -1;
        for (uint64_t i = 0; i < batch->q_rows; i++) /* bits past q_len are there to be ignored */
            masks[i] = chance(random, 10) ? 0 : next(random) | (chance(random, 50) ? 1 : 0);
    }
    return 0;
}

static void fill_key(struct random *random, const mla_batch *batch, uint8_t *to)
{
    if (batch->kv_format == MLA_KV_E4M3_656) {
        float scales[4];
        for (unsigned i = 0; i < 4; i++)
            scales[i] = (float)exp2(uniform(random, -1, 1));
        for (unsigned d = 0; d < V; d++)
            number_put(MLA_E4M3, to, d, normal(random) / (double)scales[d / 128]);
        memcpy(to + V, scales, sizeof scales);
        for (unsigned d = V; d < D; d++)
            number_put(MLA_BF16, to + V + sizeof scales, d - V, normal(random));
        return;
    }
    mla_dtype type = batch->kv_format == MLA_KV_BF16 ? MLA_BF16 : batch->kv_format == MLA_KV_FP16 ? MLA_FP16 : MLA_E4M3;
    for (unsigned d = 0; d < D; d++)
        number_put(type, to, d, normal(random));
}

static bool page_needed(const struct model_request *request, uint32_t page)
{
    int64_t size = request->capture->batch.page_size, end = (page + INT64_C(1)) * size;
    for (int64_t c = page * size; c < end && c < request->local_len; c++)
        if (model_seen(request, c))
            return true;
    return false;
}

/* Give every needed entry of the block table a page of its own, in shuffled order, and every other one nonsense. */
static int fill_block_table(struct random *random, struct capture *capture)
{
    mla_batch *batch = &capture->batch;
    int32_t *table = capture_add(capture, CAPTURE_BLOCK_TABLE);
    uint64_t entries = (uint64_t)batch->batch * batch->max_pages;
    ctl_autofree int32_t *order = calloc(entries + 4, sizeof *order);
    if (!table || !order)
        return -1;
    for (uint64_t i = 0; i < entries; i++) {
        struct model_request request = model_request(capture, (uint32_t)(i / batch->max_pages));
        if (page_needed(&request, (uint32_t)(i % batch->max_pages)))
            table[i] = (int32_t)batch->pages++;
        else
            table[i] = -1;
    }
    batch->pages += (uint32_t)between(random, 0, 3);
    for (uint32_t i = 0; i < batch->pages; i++) {
        uint32_t other = (uint32_t)between(random, 0, i);
        order[i] = order[other];
        order[other] = (int32_t)i;
    }
    const int32_t nonsense[] = {-1, INT32_MIN, INT32_MAX, (int32_t)batch->pages, -7};
    for (uint64_t i = 0; i < entries; i++)
        table[i] = table[i] >= 0 ? order[table[i]] : PICK(random, nonsense);
    return 0;
}

/* Keys that a row sees get numbers; all other memory stays NaN in every format. */
static int fill_keys(struct random *random, struct capture *capture)
{
    const mla_batch *batch = &capture->batch;
    uint8_t *kv = capture_add(capture, CAPTURE_KV);
    if (!kv)
        return -1;
    memset(kv, 0xff, capture->data[CAPTURE_KV].bytes);
    for (uint32_t b = 0; b < batch->batch; b++) {
        struct model_request request = model_request(capture, b);
        for (int64_t c = 0; c < request.local_len; c++)
            if (model_seen(&request, c)) {
                uint64_t row = (uint64_t)request.block_table[c / batch->page_size] * batch->page_size +
                               (uint64_t)c % batch->page_size;
                fill_key(random, batch, kv + row * capture_row_bytes(batch));
            }
    }
    return 0;
}

static int fill_lengths(struct random *random, struct capture *capture, const uint32_t q_lens[], bool ragged)
{
    mla_batch *batch = &capture->batch;
    int32_t *seqlens = capture_add(capture, CAPTURE_SEQLENS),
            *cu_q = ragged ? capture_add(capture, CAPTURE_CU_Q) : NULL;
    if (!seqlens || (ragged && !cu_q))
        return -1;
    for (uint32_t b = 0; b < batch->batch; b++) {
        seqlens[b] = pick_length(random, batch->heads, q_lens[b]);
        if (ragged)
            cu_q[b + 1] = cu_q[b] + (int32_t)q_lens[b];
        int64_t pages = (model_local_len(batch, seqlens[b]) + batch->page_size - 1) / batch->page_size;
        if (pages > batch->max_pages)
            batch->max_pages = (uint32_t)pages;
    }
    batch->max_pages += (uint32_t)between(random, 0, 2);
    return 0;
}

static int fill_sink(struct random *random, struct capture *capture)
{
    float *sink = capture_add(capture, CAPTURE_SINK);
    if (!sink)
        return -1;
    for (uint32_t h = 0; h < capture->batch.heads; h++)
        sink[h] = (float)(3 * normal(random));
    return 0;
}

static void describe(const struct capture *capture, const struct run_layout *layout, char text[200])
{
    const mla_batch *batch = &capture->batch;
    snprintf(text, 200, "B=%u H=%u q rows %llu%s, page %u, DCP %u/%u x%u, window %u, lse %s%s%s%s%s", batch->batch,
             batch->heads, (unsigned long long)batch->q_rows, capture->data[CAPTURE_CU_Q].present ? " ragged" : "",
             batch->page_size, batch->dcp_rank, batch->dcp_world, batch->dcp_interleave, batch->window,
             batch->lse_base == MLA_LSE_2 ? "2" : "e", capture->data[CAPTURE_SINK].present ? ", sink" : "",
             batch->deterministic ? ", deterministic" : "", layout->row_gap || layout->page_gap ? ", strided KV" : "",
             layout->host_scales ? ", host scales" : "");
}

static bool can(const struct mlap_capability *row, const char *feature)
{
    size_t length = strlen(feature);
    for (const char *at = row->features; (at = strstr(at, feature)); at += length)
        if ((at == row->features || at[-1] == ' ') && (at[length] == ' ' || !at[length]))
            return true;
    return false;
}

struct capture *case_new(uint64_t seed, const struct mlap_capability *row, struct run_layout *layout, char text[200])
{
    static const uint32_t page_sizes[] = {1, 16, 32, 64, 64, 128, 256};
    capture_auto struct capture *capture = capture_new();
    if (!capture)
        return NULL;
    struct random random = {seed};
    mla_batch *batch = &capture->batch;
    batch->q_dtype = (mla_dtype)row->q_dtype;
    batch->kv_format = (mla_kv_format)row->kv_format;
    batch->out_dtype = (mla_dtype)row->out_dtype;
    batch->mask = (mla_mask)row->mask;
    batch->lse_base = can(row, "lse_2") && (chance(&random, 50) || !can(row, "lse_e")) ? MLA_LSE_2 : MLA_LSE_E;
    batch->batch = (uint32_t)between(&random, 1, MAX_REQUESTS);
    batch->heads = pick_heads(&random, row->max_heads);
    batch->page_size = chance(&random, 75) ? PICK(&random, page_sizes) : (uint32_t)between(&random, 1, 256);
    batch->page_size = batch->page_size < row->max_page_size ? batch->page_size : row->max_page_size;
    bool ragged = can(row, "ragged") && chance(&random, 60);
    uint32_t q_lens[MAX_REQUESTS], same = pick_q_len(&random, batch->heads, row->max_q_len);
    for (uint32_t b = 0; b < batch->batch; b++) {
        q_lens[b] = ragged ? pick_q_len(&random, batch->heads, row->max_q_len) : same;
        batch->q_rows += q_lens[b];
    }
    if (can(row, "dcp") && chance(&random, 35))
        pick_context_parallel(&random, batch);
    if (can(row, "window") && chance(&random, 30))
        batch->window = (uint32_t)(chance(&random, 10) ? INT32_MAX : between(&random, 1, 300));
    batch->deterministic = can(row, "deterministic") && chance(&random, 25);
    bool sink = can(row, "sink") && chance(&random, 35);
    bool strided = can(row, "strided") && chance(&random, 30);
    *layout = (struct run_layout){.host_scales = chance(&random, 50)};
    if (strided) {
        layout->row_gap = 16 * (uint32_t)between(&random, 0, 8);
        layout->page_gap = 16 * (uint32_t)between(&random, 0, 64);
    }
    if (fill_scales(&random, capture) || fill_lengths(&random, capture, q_lens, ragged) ||
        fill_queries(&random, capture) || (sink && fill_sink(&random, capture)) || fill_block_table(&random, capture) ||
        fill_keys(&random, capture))
        return NULL;
    describe(capture, layout, text);
    struct capture *made = capture;
    capture = NULL;
    return made;
}
