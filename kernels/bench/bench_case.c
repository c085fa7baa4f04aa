/* bench_case.c - see bench_case.h. Values are small pseudo-random numbers; pages lie in random order. */
#include "bench_case.h"

#include <stdlib.h>
#include <string.h>

enum {
    MAX_LAUNCHES = 100000,
    PERIOD = 64 << 20 /* bytes after which values repeat: to draw gigabytes would take longer than to decode them */
};

static const struct types { const char *name; enum mlak_dtype q; enum mlak_kv_format kv; } all_types[] = {
    {"bf16", MLAK_BF16, MLAK_KV_BF16},
    {"fp16", MLAK_FP16, MLAK_KV_FP16},
    {"e4m3", MLAK_E4M3, MLAK_KV_E4M3},
    {"bf16_e4m3", MLAK_BF16, MLAK_KV_E4M3},
    {"bf16_656", MLAK_BF16, MLAK_KV_E4M3_656},
};
enum { TYPES = sizeof all_types / sizeof all_types[0] };

const char *shape_types_name(uint32_t types) { return types < TYPES ? all_types[types].name : NULL; }

struct bench_case {
    const struct mlak_backend *backend;
    struct mlak_device *device;
    struct mlak_batch batch;            /* of the first copy */
    uint32_t copies;
    size_t kv_bytes;
    uint8_t *kv, *q, *out;              /* kv: [copies] */
    int32_t *table, *seqlens;
    struct mlak_row *rows;              /* [copies][batch] */
    struct mlak_batch *batches;         /* [copies], of devices with memory of their own: theirs */
    uint8_t *own;                       /* that memory: [copies] of kv, then q, out, table, seqlens */
    double *times;                      /* [MAX_LAUNCHES] */
};

static uint64_t next_random(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

/* Elements of magnitude 2^-3..2 in any of the types: sign, one of a few exponents, mantissa. */
static void fill(uint8_t *to, size_t bytes, enum mlak_dtype dtype, uint64_t *state)
{
    const size_t fresh = bytes < PERIOD ? bytes : PERIOD;
    for (size_t i = 0; i + 2 <= fresh; i += 2) {
        uint64_t random = next_random(state);
        uint16_t code = (uint16_t)(dtype == MLAK_BF16   ? 0x3f00 + (random & 0x80ff)
                                   : dtype == MLAK_FP16 ? 0x3000 + (random & 0x8bff)
                                                        : 0x2020 + (random & 0x9f9f));
        memcpy(to + i, &code, sizeof code);
    }
    for (size_t i = fresh; i < bytes; i += fresh)
        memcpy(to + i, to, bytes - i < fresh ? bytes - i : fresh);
}

static void fill_656(uint8_t *rows, size_t count, uint64_t *state)
{
    const float scales[4] = {1, 0.5f, 2, 1};
    for (size_t i = 0; i < count; i++, rows += 656) {
        fill(rows, MLAK_V, MLAK_E4M3, state);
        memcpy(rows + MLAK_V, scales, sizeof scales);
        fill(rows + MLAK_V + sizeof scales, MLAK_ROPE * 2, MLAK_BF16, state);
    }
}

void bench_case_free(struct bench_case *bench)
{
    if (bench == NULL)
        return;
    if (bench->own != NULL)
        bench->backend->memory_free(bench->device, bench->own);
    free(bench->batches);
    free(bench->kv);
    free(bench->q);
    free(bench->out);
    free(bench->table);
    free(bench->seqlens);
    free(bench->rows);
    free(bench->times);
    free(bench);
}

static struct mlak_batch describe(const struct shape *shape)
{
    const struct types *types = &all_types[shape->types];
    struct mlak_batch batch = {.q_dtype = types->q, .kv_format = types->kv, .page_size = shape->page_size};
    mlak_batch_defaults(&batch);
    batch.out_dtype = types->q == MLAK_E4M3 ? MLAK_BF16 : types->q;
    batch.batch = shape->batch;
    batch.heads = shape->heads;
    batch.q_rows = (uint64_t)shape->batch * shape->q_len;
    batch.max_pages = shape->page_size > 0 ? (shape->kv_len + shape->page_size - 1) / shape->page_size : 0;
    batch.pages = batch.max_pages * shape->batch;
    batch.softmax_scale = 0.0417;
    return batch;
}

static bool allocate(struct bench_case *bench)
{
    const struct mlak_batch *batch = &bench->batch;
    uint32_t here = bench->backend->memory_new != NULL ? 1 : bench->copies;
    bench->kv = aligned_alloc(4096, (bench->kv_bytes * here + 4095) / 4096 * 4096);
    bench->q = aligned_alloc(64, (mlak_extent(batch, MLAK_T_Q) + 63) / 64 * 64);
    bench->out = aligned_alloc(64, (mlak_extent(batch, MLAK_T_OUT) + 63) / 64 * 64);
    bench->table = calloc((size_t)batch->batch * batch->max_pages, sizeof *bench->table);
    bench->seqlens = calloc(batch->batch, sizeof *bench->seqlens);
    bench->rows = calloc((size_t)bench->copies * batch->batch, sizeof *bench->rows);
    bench->times = calloc(MAX_LAUNCHES, sizeof *bench->times);
    bench->batches = calloc(bench->copies, sizeof *bench->batches);
    return bench->batches != NULL && bench->kv != NULL && bench->q != NULL && bench->out != NULL &&
           bench->table != NULL && bench->seqlens != NULL && bench->rows != NULL && bench->times != NULL;
}

static uint64_t aligned(uint64_t bytes) { return (bytes + 255) / 256 * 256; }

/* The batch in the device's memory. */
static enum mlak_code move_to_device(struct bench_case *bench, struct mlak_fault *fault)
{
    const struct mlak_backend *backend = bench->backend;
    const struct mlak_batch *batch = &bench->batch;
    const struct { enum mlak_tensor tensor; const void *from; } rest[] = {
        {MLAK_T_Q, bench->q},
        {MLAK_T_OUT, bench->out},
        {MLAK_T_BLOCK_TABLE, bench->table},
        {MLAK_T_SEQLENS, bench->seqlens},
    };
    uint64_t kv = aligned(bench->kv_bytes), bytes = kv * bench->copies;
    const uint8_t *at[4];
    for (int i = 0; i < 4; i++)
        bytes += aligned(mlak_extent(batch, rest[i].tensor));
    bench->own = backend->memory_new(bench->device, bytes, fault);
    if (bench->own == NULL)
        return MLAK_MEMORY;
    enum mlak_code code = MLAK_OK;
    uint8_t *next = bench->own + kv * bench->copies;
    for (int i = 0; i < 4 && code == MLAK_OK; i++) {
        at[i] = next;
        code = backend->memory_copy(bench->device, next, rest[i].from, mlak_extent(batch, rest[i].tensor));
        next += aligned(mlak_extent(batch, rest[i].tensor));
    }
    for (uint32_t copy = 0; copy < bench->copies && code == MLAK_OK; copy++) {
        bench->batches[copy] = *batch;
        bench->batches[copy].kv = bench->own + copy * kv;
        bench->batches[copy].q = at[0];
        bench->batches[copy].out = (void *)(uintptr_t)at[1];
        bench->batches[copy].block_table = (const void *)at[2];
        bench->batches[copy].seqlens = (const void *)at[3];
        code = backend->memory_copy(bench->device, bench->own + copy * kv, bench->kv, bench->kv_bytes);
    }
    return code == MLAK_OK ? code : mlak_fail(fault, code, "device", "%.200s", backend->lost(bench->device));
}

struct bench_case *bench_case_new(const struct shape *shape, const struct mlak_backend *backend,
                                  struct mlak_device *device, size_t cache_bytes, struct mlak_fault *fault)
{
    size_t capabilities;
    const struct mlak_capability *table = backend->capabilities(device, &capabilities);
    struct bench_case *bench = calloc(1, sizeof *bench);
    uint64_t state = 88172645463325252;
    if (bench == NULL) {
        mlak_fail(fault, MLAK_MEMORY, "batch", "no memory");
        return NULL;
    }
    *bench = (struct bench_case){.backend = backend, .device = device, .batch = describe(shape)};
    struct mlak_batch *batch = &bench->batch;
    if (mlak_check(batch, table, capabilities, fault) != MLAK_OK) {
        bench_case_free(bench);
        return NULL;
    }
    bench->kv_bytes = mlak_extent(batch, MLAK_T_KV);
    bench->copies = (uint32_t)(bench->kv_bytes >= 2 * cache_bytes ? 1 : 2 * cache_bytes / bench->kv_bytes + 1);
    if (shape->copies > 0)
        bench->copies = shape->copies;
    if (bench->copies > 4096)
        bench->copies = 4096;
    if (!allocate(bench)) {
        mlak_fail(fault, MLAK_MEMORY, "batch", "no memory for %u copies of %zu bytes of KV; ask for a smaller batch",
                  bench->copies, bench->kv_bytes);
        bench_case_free(bench);
        return NULL;
    }

    fill(bench->q, mlak_extent(batch, MLAK_T_Q), batch->q_dtype, &state);
    if (batch->kv_format == MLAK_KV_E4M3_656)
        fill_656(bench->kv, (size_t)batch->pages * batch->page_size, &state);
    else
        fill(bench->kv, bench->kv_bytes, (enum mlak_dtype)batch->kv_format, &state);
    for (uint32_t i = 0; i < batch->pages; i++) {
        uint32_t other = (uint32_t)(next_random(&state) % (i + 1));
        bench->table[i] = bench->table[other];
        bench->table[other] = (int32_t)i;
    }
    for (uint32_t b = 0; b < batch->batch; b++)
        bench->seqlens[b] = (int32_t)shape->kv_len;
    batch->q = bench->q;
    batch->out = bench->out;
    batch->block_table = bench->table;
    batch->seqlens = bench->seqlens;
    if (backend->memory_new != NULL) {
        if (move_to_device(bench, fault) == MLAK_OK)
            return bench;
        bench_case_free(bench);
        return NULL;
    }
    for (uint32_t copy = 0; copy < bench->copies; copy++) {
        uint8_t *kv = bench->kv + copy * bench->kv_bytes;
        batch->kv = kv;
        if (copy > 0)
            memcpy(kv, bench->kv, bench->kv_bytes);
        mlak_prepare(batch, NULL, 0, batch->batch, bench->rows + (size_t)copy * batch->batch, fault);
    }
    return bench;
}

static int by_value(const void *a, const void *b)
{
    const double *x = a, *y = b;
    return (*x > *y) - (*x < *y);
}

/* Samples of many launches each, so that the events' own time does not count. */
static enum mlak_code run_on_device(struct bench_case *bench, double seconds, uint32_t *samples)
{
    double begin = bench_now(), ns = 0;
    uint32_t rounds = bench->copies < 16 ? 16 / bench->copies + 1 : 1;
    enum mlak_code code =
        bench->backend->time_batches(bench->device, bench->batches, bench->copies, false, 1, &ns, NULL);
    for (*samples = 0; code == MLAK_OK && *samples < MAX_LAUNCHES &&
                       (*samples < 3 || bench_now() - begin < seconds * 1e9);
         ++*samples) {
        code = bench->backend->time_batches(bench->device, bench->batches, bench->copies, false, rounds, &ns, NULL);
        bench->times[*samples] = ns / ((double)rounds * bench->copies);
    }
    return code;
}

static enum mlak_code run_here(struct bench_case *bench, double seconds, uint32_t *samples)
{
    const struct mlak_batch *batch = &bench->batch;
    enum mlak_code code = MLAK_OK;
    uint32_t launches = 0, copy = 0;
    double begin = bench_now(), now = begin;
    for (bool warm = false; launches < MAX_LAUNCHES && (launches < 3 || now - begin < seconds * 1e9);
         copy = (copy + 1) % bench->copies) {
        double start = bench_now();
        code = bench->backend->launch(bench->device, bench->rows + (size_t)copy * batch->batch, batch->batch);
        now = bench_now();
        if (code != MLAK_OK)
            return code;
        if (warm)
            bench->times[launches++] = now - start;
        else
            begin = now;
        warm = true;
    }
    *samples = launches;
    return MLAK_OK;
}

enum mlak_code bench_case_run(struct bench_case *bench, double seconds, struct timing *timing)
{
    const struct mlak_batch *batch = &bench->batch;
    double rows = (double)batch->q_rows * batch->heads, keys = bench->seqlens[0];
    uint32_t launches;
    enum mlak_code code = bench->backend->time_batches != NULL ? run_on_device(bench, seconds, &launches)
                                                               : run_here(bench, seconds, &launches);
    if (code != MLAK_OK)
        return code;
    qsort(bench->times, launches, sizeof *bench->times, by_value);
    *timing = (struct timing){
        .launches = launches,
        .median = bench->times[launches / 2],
        .least = bench->times[0],
        .p90 = bench->times[launches * 9 / 10],
        .bytes = keys * batch->batch * mlak_kv_row_bytes(batch->kv_format),
        .flop = 2.0 * (MLAK_D + MLAK_V) * rows * keys,
    };
    return code;
}

enum ceiling binding_ceiling(const struct ceilings *ceilings, const char *variant, uint32_t types,
                             const struct timing *timing, double *least)
{
    bool bf16 = all_types[types].kv == MLAK_KV_BF16 || all_types[types].kv == MLAK_KV_E4M3;
    enum ceiling compute = CEILING_READ;
    if (strcmp(variant, "generic") == 0)
        compute = CEILING_SSE;
    else if (strcmp(variant, "avx2") == 0)
        compute = CEILING_AVX2;
    else if (strcmp(variant, "amx") == 0)
        compute = bf16 ? CEILING_AMX : CEILING_AVX512;
    else if (strcmp(variant, "avx512") == 0)
        compute = bf16 && ceilings->rate[CEILING_BF16] > 0 ? CEILING_BF16 : CEILING_AVX512;
    double read = timing->bytes / ceilings->rate[CEILING_READ], work = 0;
    if (compute != CEILING_READ && ceilings->rate[compute] > 0)
        work = timing->flop / ceilings->rate[compute];
    *least = read > work ? read : work;
    return read > work ? CEILING_READ : compute;
}
