/* work.c - see work.h. */
#include "work.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    PAGE = 64,
    PERIOD = (57 << 20) + 1168 /* bytes after which the pool's numbers repeat: no multiple of a page's */
};

/* ---- shapes ---- */

enum mlak_code shape_parse(struct shape *shape, const char *line, struct mlak_fault *fault)
{
    unsigned batch, heads, q_len;
    int used = 0;
    *shape = (struct shape){0};
    if (sscanf(line, "%u %u %u%n", &batch, &heads, &q_len, &used) != 3 || batch < 1 || batch > 1024 || heads < 1 ||
        heads > MLAK_MAX_HEADS || q_len < 1 || q_len > MLAK_MAX_Q)
        return mlak_fail(fault, MLAK_INVALID, "shape",
                         "%.60s: give BATCH (to 1024) HEADS (to 128) Q_LEN (to 64) and lengths", line);
    *shape = (struct shape){.batch = batch, .heads = heads, .q_len = q_len, .seqlens = calloc(batch, sizeof(int32_t))};
    if (!shape->seqlens)
        return mlak_fail(fault, MLAK_MEMORY, "shape", "no memory");
    uint32_t count = 0;
    const char *at = line + used;
    for (char *end; count <= batch; count++, at = end) {
        errno = 0;
        long length = strtol(at, &end, 10);
        if (end == at)
            break;
        if (errno || length < (long)q_len || length > 1 << 24 || count == batch) {
            count = batch + 1;
            break;
        }
        shape->seqlens[count] = (int32_t)length;
    }
    if ((count != 1 && count != batch) || strspn(at, " \n") != strlen(at)) {
        shape_free(shape);
        return mlak_fail(fault, MLAK_INVALID, "shape",
                         "%.60s: give one length, or one for each request, from Q_LEN to 16777216", line);
    }
    for (uint32_t b = count; b < batch; b++)
        shape->seqlens[b] = shape->seqlens[0];
    return MLAK_OK;
}

void shape_free(struct shape *shape)
{
    free(shape->seqlens);
    *shape = (struct shape){0};
}

static uint32_t pages_of(int32_t length) { return ((uint32_t)length + PAGE - 1) / PAGE; }

static uint64_t shape_pages(const struct shape *shape)
{
    uint64_t pages = 0;
    for (uint32_t b = 0; b < shape->batch; b++)
        pages += pages_of(shape->seqlens[b]);
    return pages;
}

uint64_t shape_kv_bytes(const struct shape *shape)
{
    return shape_pages(shape) * PAGE * mlak_kv_row_bytes(MLAK_KV_BF16);
}

uint32_t shape_copies(const struct shape *shape, uint64_t cold_bytes)
{
    uint64_t copies = cold_bytes / shape_kv_bytes(shape) + 1;
    return copies < 2 ? 2 : (uint32_t)copies;
}

/* ---- memory ---- */

static uint64_t next_random(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

/* bf16 of magnitude 0.5 to 2. */
static void fill(uint16_t *to, uint64_t count, uint64_t *state)
{
    for (uint64_t i = 0; i < count; i++)
        to[i] = (uint16_t)(0x3f00 + (next_random(state) & 0x80ff));
}

/* Memory of the device that holds `bytes` of `from`. */
static void *place(const struct pool *pool, const void *from, uint64_t bytes, struct mlak_fault *fault)
{
    void *to = pool->backend->memory_new(pool->device, bytes, fault);
    if (to && from && pool->backend->memory_copy(pool->device, to, from, bytes) != MLAK_OK) {
        mlak_fail(fault, MLAK_LOST, "device", "%.200s", pool->backend->lost(pool->device));
        pool->backend->memory_free(pool->device, to);
        return NULL;
    }
    return to;
}

enum mlak_code pool_init(struct pool *pool, const struct mlak_backend *backend, struct mlak_device *device,
                         uint64_t bytes, struct mlak_fault *fault)
{
    uint64_t state = 88172645463325252, fresh = bytes < PERIOD ? bytes : PERIOD;
    *pool = (struct pool){.backend = backend, .device = device, .bytes = bytes};
    uint16_t *host = malloc(fresh + 2);
    if (!host)
        return mlak_fail(fault, MLAK_MEMORY, "pool", "no memory");
    fill(host, fresh / 2 + 1, &state);
    pool->memory = place(pool, NULL, bytes, fault);
    enum mlak_code code = pool->memory ? backend->memory_copy(device, pool->memory, host, fresh) : MLAK_MEMORY;
    free(host);
    for (uint64_t done = fresh, next; code == MLAK_OK && done < bytes; done += next) {
        next = bytes - done < done ? bytes - done : done;
        code = backend->memory_copy(device, (uint8_t *)pool->memory + done, pool->memory, next);
    }
    if (code != MLAK_OK && pool->memory)
        mlak_fail(fault, code, "device", "%.200s", backend->lost(device));
    return code;
}

void pool_deinit(struct pool *pool)
{
    if (pool->memory)
        pool->backend->memory_free(pool->device, pool->memory);
    *pool = (struct pool){0};
}

/* ---- work ---- */

/* A random order of all pages; each request takes the next ones. */
static int32_t *new_table(const struct shape *shape, uint32_t pages, uint32_t max_pages, uint64_t *state)
{
    int32_t *order = calloc(pages, sizeof *order), *table = calloc((size_t)shape->batch * max_pages, sizeof *table);
    for (uint32_t i = 0; order && i < pages; i++) {
        uint32_t other = (uint32_t)(next_random(state) % (i + 1));
        order[i] = order[other];
        order[other] = (int32_t)i;
    }
    uint32_t next = 0;
    for (uint32_t b = 0; order && table && b < shape->batch; b++)
        for (uint32_t p = 0; p < pages_of(shape->seqlens[b]); p++)
            table[(size_t)b * max_pages + p] = order[next++];
    if (!order) {
        free(table);
        table = NULL;
    }
    free(order);
    return table;
}

static enum mlak_code allocate(struct work *work, const struct mlak_batch *batch, struct mlak_fault *fault)
{
    uint64_t state = 1234567890123, q_bytes = mlak_extent(batch, MLAK_T_Q);
    int32_t *table = new_table(work->shape, batch->pages, batch->max_pages, &state);
    uint16_t *q = malloc(q_bytes);
    work->batches = calloc(work->copies, sizeof *work->batches);
    enum mlak_code code = MLAK_MEMORY;
    if (!table || !q || !work->batches) {
        mlak_fail(fault, code, "shape", "no memory");
    } else {
        fill(q, q_bytes / 2, &state);
        work->q = place(work->pool, q, q_bytes, fault);
        work->table = place(work->pool, table, mlak_extent(batch, MLAK_T_BLOCK_TABLE), fault);
        work->seqlens = place(work->pool, work->shape->seqlens, work->shape->batch * sizeof(int32_t), fault);
        for (int i = 0; i < 2; i++) {
            work->out[i] = place(work->pool, NULL, work->rows * MLAK_V * 2, fault);
            work->lse[i] = place(work->pool, NULL, work->rows * sizeof(float), fault);
        }
        if (work->q && work->table && work->seqlens && work->out[0] && work->out[1] && work->lse[0] && work->lse[1])
            code = MLAK_OK;
    }
    free(table);
    free(q);
    return code;
}

enum mlak_code work_init(struct work *work, const struct pool *pool, const struct shape *shape, uint64_t cold_bytes,
                         struct mlak_fault *fault)
{
    uint64_t kv_bytes = shape_kv_bytes(shape), pages = shape_pages(shape);
    *work = (struct work){.pool = pool, .shape = shape, .copies = shape_copies(shape, cold_bytes),
                          .rows = (uint64_t)shape->batch * shape->q_len * shape->heads};
    struct mlak_batch batch = {.q_dtype = MLAK_BF16, .kv_format = MLAK_KV_BF16, .page_size = PAGE};
    mlak_batch_defaults(&batch);
    batch.batch = shape->batch;
    batch.heads = shape->heads;
    batch.q_rows = (uint64_t)shape->batch * shape->q_len;
    batch.pages = (uint32_t)pages;
    batch.softmax_scale = 0.0417;
    batch.has_lse = true;
    for (uint32_t b = 0; b < shape->batch; b++) {
        work->keys += (uint64_t)shape->seqlens[b];
        if (pages_of(shape->seqlens[b]) > batch.max_pages)
            batch.max_pages = pages_of(shape->seqlens[b]);
    }
    size_t count;
    const struct mlak_capability *table = pool->backend->capabilities(pool->device, &count);
    enum mlak_code code = mlak_check(&batch, table, count, fault);
    if (code == MLAK_OK && kv_bytes * work->copies > pool->bytes)
        code = mlak_fail(fault, MLAK_INVALID, "shape", "its KV does not fit the pool");
    if (code == MLAK_OK)
        code = allocate(work, &batch, fault);
    if (code != MLAK_OK) {
        work_deinit(work);
        return code;
    }
    batch.q = work->q;
    batch.block_table = work->table;
    batch.seqlens = work->seqlens;
    batch.out = work->out[0];
    batch.lse = work->lse[0];
    for (uint32_t i = 0; i < work->copies; i++) {
        work->batches[i] = batch;
        work->batches[i].kv = (const uint8_t *)pool->memory + i * kv_bytes;
    }
    return MLAK_OK;
}

void work_deinit(struct work *work)
{
    void *const all[] = {work->out[0], work->out[1], work->lse[0], work->lse[1], work->q, work->table, work->seqlens};
    for (unsigned i = 0; i < sizeof all / sizeof all[0]; i++)
        if (all[i])
            work->pool->backend->memory_free(work->pool->device, all[i]);
    free(work->batches);
    *work = (struct work){0};
}

static enum mlak_code copy(const struct pool *pool, void *to, const void *from, uint64_t bytes,
                           struct mlak_fault *fault)
{
    enum mlak_code code = pool->backend->memory_copy(pool->device, to, from, bytes);
    return code == MLAK_OK ? code : mlak_fail(fault, code, "device", "%.200s", pool->backend->lost(pool->device));
}

enum mlak_code work_poison(struct work *work, struct mlak_fault *fault)
{
    uint64_t bytes = work->rows * MLAK_V * 2;
    void *host = malloc(bytes);
    if (!host)
        return mlak_fail(fault, MLAK_MEMORY, "shape", "no memory");
    memset(host, 0xff, bytes);
    enum mlak_code code = MLAK_OK;
    for (int i = 0; i < 2 && code == MLAK_OK; i++) {
        code = copy(work->pool, work->out[i], host, bytes, fault);
        if (code == MLAK_OK)
            code = copy(work->pool, work->lse[i], host, work->rows * sizeof(float), fault);
    }
    free(host);
    return code;
}

static float from_bf16(uint16_t bits)
{
    uint32_t word = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &word, sizeof value);
    return value;
}

/* The largest |a - b|; infinite if one is no number. */
static double largest(double most, double a, double b)
{
    double d = fabs(a - b);
    return isfinite(d) ? d > most ? d : most : INFINITY;
}

enum mlak_code work_compare(struct work *work, struct difference *difference, struct mlak_fault *fault)
{
    uint64_t elements = work->rows * MLAK_V;
    uint16_t *out[2] = {malloc(elements * 2), malloc(elements * 2)};
    float *lse[2] = {malloc(work->rows * sizeof(float)), malloc(work->rows * sizeof(float))};
    enum mlak_code code = MLAK_OK;
    if (!out[0] || !out[1] || !lse[0] || !lse[1])
        code = mlak_fail(fault, MLAK_MEMORY, "shape", "no memory to compare outputs");
    for (int i = 0; i < 2 && code == MLAK_OK; i++) {
        code = copy(work->pool, out[i], work->out[i], elements * 2, fault);
        if (code == MLAK_OK)
            code = copy(work->pool, lse[i], work->lse[i], work->rows * sizeof(float), fault);
    }
    *difference = (struct difference){0};
    double square = 0;
    for (uint64_t i = 0; i < elements && code == MLAK_OK; i++) {
        double a = (double)from_bf16(out[0][i]), b = (double)from_bf16(out[1][i]);
        square += a * a;
        difference->out = largest(difference->out, a, b);
    }
    for (uint64_t i = 0; i < work->rows && code == MLAK_OK; i++)
        difference->lse = largest(difference->lse, (double)lse[0][i], (double)lse[1][i]);
    double size = sqrt(square / (double)elements);
    difference->out = size > 0 ? difference->out / size : INFINITY;
    for (int i = 0; i < 2; i++) {
        free(out[i]);
        free(lse[i]);
    }
    return code;
}
