/* bench_load.c - what the benchmarks decode, and how: random bf16 batches over shuffled pages, in buffers of the
 * device. */
#include "bench.h"
#include "gpu.h"

#include <math.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum { D = 576 };

static uint64_t next_random(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

/* Random bf16 of magnitude 0.5 to 2 and either sign. */
static void fill_bf16(uint16_t *to, uint64_t count, uint64_t *state)
{
    for (uint64_t i = 0; i < count; i++)
        to[i] = (uint16_t)((next_random(state) & 0x80ff) | 0x3f00);
}

static struct capture *make_batch(uint32_t requests, uint32_t heads, uint32_t q_len, uint32_t keys)
{
    capture_auto struct capture *capture = capture_new();
    if (!capture)
        return NULL;
    mla_batch *batch = &capture->batch;
    batch->batch = requests, batch->heads = heads, batch->q_rows = (uint64_t)requests * q_len;
    batch->page_size = BENCH_PAGE;
    batch->max_pages = (keys + BENCH_PAGE - 1) / BENCH_PAGE;
    batch->pages = requests * batch->max_pages;
    batch->softmax_scale = 1 / 24.0;
    uint16_t *q = capture_add(capture, CAPTURE_Q), *kv = capture_add(capture, CAPTURE_KV);
    int32_t *table = capture_add(capture, CAPTURE_BLOCK_TABLE), *seqlens = capture_add(capture, CAPTURE_SEQLENS);
    if (!q || !kv || !table || !seqlens)
        return NULL;
    uint64_t state = 88172645463325252u;
    fill_bf16(q, batch->q_rows * heads * D, &state);
    fill_bf16(kv, (uint64_t)batch->pages * BENCH_PAGE * D, &state);
    for (uint32_t i = 0; i < batch->pages; i++) { /* shuffled */
        uint32_t other = (uint32_t)(next_random(&state) % (i + 1));
        table[i] = table[other];
        table[other] = (int32_t)i;
    }
    for (uint32_t b = 0; b < requests; b++)
        seqlens[b] = (int32_t)keys;
    struct capture *made = capture;
    capture = NULL;
    return made;
}

int bench_bind(const struct ctl *ctl, mla_client *client, const struct bench_batch *batch, struct run **run)
{
    capture_auto struct capture *capture = make_batch(batch->requests, batch->heads, batch->q_len, batch->keys);
    mla_error error = {.message = "out of memory"};
    if (!capture || run_new(client, capture, &(struct run_layout){0}, run, &error))
        return ctl_error(ctl, run_exit_code(error.code), "%s", error.message);
    return CTL_OK;
}

int bench_decode(const struct ctl *ctl, struct run *run, double *wall_ns, mla_result *result)
{
    mla_error error;
    uint64_t from = bench_now_ns();
    mla_status status = mla_decode(run->client, run->plan, ctl->timeout_ms, result, &error);
    *wall_ns = (double)(bench_now_ns() - from);
    return status == MLA_OK ? CTL_OK : ctl_error(ctl, run_exit_code(status), "%s", error.message);
}

int bench_submit(const struct ctl *ctl, struct run *run, mla_ticket *ticket)
{
    mla_error error;
    mla_status status = mla_submit(run->client, run->plan, ticket, &error);
    return status == MLA_OK ? CTL_OK : ctl_error(ctl, run_exit_code(status), "%s", error.message);
}

int bench_collect(const struct ctl *ctl, mla_client *client, mla_ticket ticket, mla_result *result)
{
    mla_error error;
    mla_status status = mla_wait(client, ticket, ctl->timeout_ms, result, &error);
    return status == MLA_OK ? CTL_OK : ctl_error(ctl, run_exit_code(status), "%s", error.message);
}

unsigned bench_copies(const char *device, const struct bench_batch *batch)
{
    const double kv_bytes = (double)batch->requests * batch->keys * D * 2;
    double cache = gpu_named(device) ? 128 << 20 /* no GPU served has more L2 */
                                            : fmin(fmax((double)sysconf(_SC_LEVEL3_CACHE_SIZE), 16 << 20), 256 << 20);
    return kv_bytes >= 2 * cache ? 1 : (unsigned)fmin(2 * cache / kv_bytes + 1, BENCH_COPIES);
}

static int compare(const void *a, const void *b)
{
    double left = *(const double *)a, right = *(const double *)b;
    return (left > right) - (left < right);
}

double bench_percentile(double *values, unsigned count, double share)
{
    qsort(values, count, sizeof *values, compare);
    unsigned index = (unsigned)(share * count);
    return values[index < count ? index : count - 1];
}

int bench_sizes(const struct ctl *ctl, struct bench_batch *batch)
{
    uint64_t requests = batch->requests, heads = batch->heads, q_len = batch->q_len, keys = batch->keys;
    if (ctl_number(ctl, "--batch", 1, 1024, &requests) || ctl_number(ctl, "--heads", 1, 128, &heads) ||
        ctl_number(ctl, "--q-len", 1, 64, &q_len) || ctl_number(ctl, "--kv-len", 1, 1 << 20, &keys))
        return CTL_USAGE;
    *batch = (struct bench_batch){(unsigned)requests, (unsigned)heads, (unsigned)q_len, (unsigned)keys};
    return CTL_OK;
}

void bench_sizes_json(cJSON *root, const char *device, const struct bench_batch *batch)
{
    cJSON_AddStringToObject(root, "device", device);
    cJSON_AddNumberToObject(root, "batch", batch->requests);
    cJSON_AddNumberToObject(root, "heads", batch->heads);
    cJSON_AddNumberToObject(root, "q_len", batch->q_len);
    cJSON_AddNumberToObject(root, "kv_len", batch->keys);
}

void bench_sizes_text(const char *device, const struct bench_batch *batch)
{
    printf("%s   bf16, %u request%s of %u key%s, %u head%s, %u query token%s\n\n", device, batch->requests,
           batch->requests == 1 ? "" : "s", batch->keys, batch->keys == 1 ? "" : "s", batch->heads,
           batch->heads == 1 ? "" : "s", batch->q_len, batch->q_len == 1 ? "" : "s");
}
