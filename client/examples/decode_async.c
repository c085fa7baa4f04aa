/* decode_async.c - several layers in flight from one event loop.
 *
 * Each layer has its own KV pages and its own output; q, the block table and the lengths are shared. All layers are
 * submitted, then poll() waits on libmla's descriptor next to whatever else the program listens to.
 *
 *     cc decode_async.c $(pkg-config --cflags --libs libmla) && ./a.out */
#include <mla.h>

#include <poll.h>
#include <stdio.h>

enum { LAYERS = 4, B = 3, H = 16, P = 64, PAGES = 16, MAX_PAGES = 4, D = 576, V = 512 };

struct memory {
    uint16_t q[B][H][D];
    struct { uint16_t kv[PAGES][P][D], out[B][H][V]; } layer[LAYERS];
    int32_t block_table[B][MAX_PAGES];
    int32_t seqlens[B];
};

static int fail(const mla_error *e)
{
    fprintf(stderr, "%s: %s%s%s\n", mla_status_text(e->code), e->field, *e->field ? ": " : "", e->message);
    return 1;
}

static uint16_t bf16(float value)
{
    union { float f; uint32_t u; } x = {.f = value};
    return (uint16_t)(x.u >> 16);
}

static void set(uint16_t *to, size_t bytes, float value)
{
    for (size_t i = 0; i < bytes / sizeof *to; i++)
        to[i] = bf16(value);
}

/* Every value of layer l's cache is l + 1, so that every value of its output must be l + 1 too. */
static void fill(struct memory *m)
{
    set(m->q[0][0], sizeof m->q, 0.5f);
    for (int l = 0; l < LAYERS; l++)
        set(m->layer[l].kv[0][0], sizeof m->layer[l].kv, (float)(l + 1));
    for (int b = 0; b < B; b++) {
        m->seqlens[b] = 50 + 70 * b;
        for (int i = 0; i < MAX_PAGES; i++)
            m->block_table[b][i] = b * MAX_PAGES + i;
    }
}

int main(void)
{
    mla_error e;
    mla_client *client;
    mla_buffer *buffer;
    if (mla_connect(&client, NULL, &e) || mla_buffer_alloc(client, sizeof(struct memory), &buffer, &e))
        return fail(&e);
    struct memory *m = mla_buffer_data(buffer);
    fill(m);

    mla_batch batch;
    mla_batch_init(&batch);
    batch.batch = B;
    batch.heads = H;
    batch.q_rows = B;       /* one query token each */
    batch.pages = PAGES;
    batch.page_size = P;
    batch.max_pages = MAX_PAGES;
    batch.softmax_scale = 0.0417;
    batch.q = (mla_tensor){buffer, offsetof(struct memory, q)};
    batch.block_table = (mla_tensor){buffer, offsetof(struct memory, block_table)};
    batch.seqlens = (mla_tensor){buffer, offsetof(struct memory, seqlens)};

    mla_ticket tickets[LAYERS];
    for (int l = 0; l < LAYERS; l++) {
        batch.kv = (mla_tensor){buffer, offsetof(struct memory, layer) + sizeof m->layer[0] * (size_t)l};
        batch.out = (mla_tensor){buffer, batch.kv.offset + sizeof m->layer[0].kv};
        mla_plan *plan;
        if (mla_plan_create(client, &batch, &plan, &e) || mla_submit(client, plan, &tickets[l], &e))
            return fail(&e);
    }

    int right = 0;
    for (int left = LAYERS; left > 0;) {
        struct pollfd readable = {.fd = mla_fd(client), .events = POLLIN};
        poll(&readable, 1, -1);
        for (int l = 0; l < LAYERS; l++) {
            int done = 0;
            mla_result result;
            if (tickets[l] && mla_poll(client, tickets[l], &done, &result, &e))
                return fail(&e);
            if (!done)
                continue;
            printf("layer %d: queued %.0f us, computed %.0f us\n", l, (double)result.queue_ns / 1000,
                   (double)result.kernel_ns / 1000);
            tickets[l] = 0;     /* collected */
            right += m->layer[l].out[B - 1][H - 1][V - 1] == bf16((float)(l + 1));
            left--;
        }
    }
    mla_close(client);          /* frees plans and buffer, too */
    printf("%d of %d layers right\n", right, LAYERS);
    return right == LAYERS ? 0 : 1;
}
