/* decode.c - one decode with libmla, checked against the definition of attention.
 *
 * Two requests of one verify step: 4 query tokens each (the last accepted token and 3 drafts), 16 heads, bf16, a paged
 * KV cache.
 *
 *     cc decode.c $(pkg-config --cflags --libs libmla) -lm && ./a.out */
#include <mla.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { B = 2, H = 16, Q = 4, P = 64, PAGES = 4, MAX_PAGES = 2, D = 576, V = 512 };
static const double scale = 0.0417;     /* of the model: 1 / sqrt(192 + 384), say */

/* All tensors in one buffer; each starts on a multiple of 16 bytes. */
struct memory {
    uint16_t q[B * Q][H][D];
    uint16_t kv[PAGES][P][D];
    int32_t block_table[B][MAX_PAGES];
    int32_t seqlens[B];
    _Alignas(16) uint16_t out[B * Q][H][V];
};

static double from_bf16(uint16_t bits)
{
    union { uint32_t u; float f; } x = {.u = (uint32_t)bits << 16};
    return x.f;
}

static void fill(uint16_t *to, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        union { float f; uint32_t u; } x = {.f = (float)rand() / (float)RAND_MAX * 2 - 1};
        to[i] = (uint16_t)(x.u >> 16);
    }
}

/* One row of the output as the definition has it: token t of request b sees its first K - (Q - 1) + t keys. */
static double snr_db(const struct memory *m, int b, int t, int h)
{
    int seen = m->seqlens[b] - (Q - 1) + t;
    const uint16_t *q = m->q[b * Q + t][h];
    double expected[V] = {0}, sum = 0, signal = 0, noise = 0;
    for (int j = 0; j < seen; j++) {
        const uint16_t *key = m->kv[m->block_table[b][j / P]][j % P];
        double score = 0;
        for (int d = 0; d < D; d++)
            score += from_bf16(q[d]) * from_bf16(key[d]);
        double weight = exp(scale * score);
        sum += weight;
        for (int d = 0; d < V; d++)
            expected[d] += weight * from_bf16(key[d]);
    }
    for (int d = 0; d < V; d++) {
        double right = expected[d] / sum, error = right - from_bf16(m->out[b * Q + t][h][d]);
        signal += right * right;
        noise += error * error;
    }
    return 10 * log10(signal / noise);
}

static int fail(const mla_error *e)
{
    fprintf(stderr, "%s: %s%s%s\n", mla_status_text(e->code), e->field, *e->field ? ": " : "", e->message);
    return 1;
}

int main(void)
{
    mla_error e;
    mla_client *client;
    mla_buffer *buffer;
    if (mla_connect(&client, NULL, &e) || mla_buffer_alloc(client, sizeof(struct memory), &buffer, &e))
        return fail(&e);

    struct memory *m = mla_buffer_data(buffer);
    fill(m->q[0][0], sizeof m->q / 2);
    fill(m->kv[0][0], sizeof m->kv / 2);
    m->block_table[0][0] = 2, m->block_table[0][1] = 0, m->block_table[1][0] = 3;
    m->seqlens[0] = 100, m->seqlens[1] = 37;    /* the 4 new tokens included */

    mla_batch batch;
    mla_batch_init(&batch);     /* causal, bf16, no scales */
    batch.batch = B;
    batch.heads = H;
    batch.q_rows = B * Q;
    batch.pages = PAGES;
    batch.page_size = P;
    batch.max_pages = MAX_PAGES;
    batch.softmax_scale = scale;
    batch.q = (mla_tensor){buffer, offsetof(struct memory, q)};
    batch.kv = (mla_tensor){buffer, offsetof(struct memory, kv)};
    batch.block_table = (mla_tensor){buffer, offsetof(struct memory, block_table)};
    batch.seqlens = (mla_tensor){buffer, offsetof(struct memory, seqlens)};
    batch.out = (mla_tensor){buffer, offsetof(struct memory, out)};

    mla_plan *plan;     /* validated once; run it for every step, with new contents */
    mla_result result;
    if (mla_plan_create(client, &batch, &plan, &e) || mla_decode(client, plan, MLA_FOREVER, &result, &e))
        return fail(&e);

    double worst = INFINITY;
    for (int row = 0; row < B * Q * H; row++)
        worst = fmin(worst, snr_db(m, row / (Q * H), row / H % Q, row % H));
    printf("%s: %llu KV tokens in %.0f us, worst row %.1f dB\n", mla_device(client),
           (unsigned long long)result.kv_tokens, (double)result.kernel_ns / 1000, worst);
    mla_close(client);
    return worst > 45 ? 0 : 1;
}
