/* victim - a client that keeps decodes in flight until it is killed, for test_kill_clients.py.
 *
 * One buffer, one plan of long requests, eight submissions always in flight; prints "decoding" once they are. */
#include "mla.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { BATCH = 4, HEADS = 16, PAGE = 64, PAGES = 32, Q_LEN = 4, IN_FLIGHT = 8,
       AT_TABLE = BATCH * Q_LEN * HEADS * 576 * 2, AT_LENS = AT_TABLE + BATCH * PAGES * 4, AT_OUT = AT_LENS + 64,
       AT_KV = AT_OUT + BATCH * Q_LEN * HEADS * 512 * 2, BYTES = AT_KV + PAGES * PAGE * 576 * 2 };

static _Noreturn void give_up(const char *what, const mla_error *error)
{
    fprintf(stderr, "victim: %s: %s [%s] %s\n", what, mla_status_text(error->code), error->field, error->message);
    exit(1);
}

int main(void)
{
    mla_options options;
    mla_options_init(&options);
    options.device = "cpu", options.name = "victim";
    mla_client *client;
    mla_buffer *buffer;
    mla_plan *plan;
    mla_error error;
    if (mla_connect(&client, &options, &error)) give_up("connect", &error);
    if (mla_buffer_alloc(client, BYTES, &buffer, &error)) give_up("alloc", &error);
    unsigned char *data = mla_buffer_data(buffer);
    int32_t *table = (int32_t *)(data + AT_TABLE), *lens = (int32_t *)(data + AT_LENS);
    for (int i = 0; i < BATCH * PAGES; i++) table[i] = i % PAGES;
    for (int b = 0; b < BATCH; b++) lens[b] = PAGES * PAGE;

    mla_batch batch;
    mla_batch_init(&batch);
    batch.batch = BATCH, batch.heads = HEADS, batch.q_rows = BATCH * Q_LEN;
    batch.pages = PAGES, batch.page_size = PAGE, batch.max_pages = PAGES;
    batch.softmax_scale = 1 / sqrt(576);
    batch.q = (mla_tensor){buffer, 0}, batch.kv = (mla_tensor){buffer, AT_KV};
    batch.block_table = (mla_tensor){buffer, AT_TABLE}, batch.seqlens = (mla_tensor){buffer, AT_LENS};
    batch.out = (mla_tensor){buffer, AT_OUT};
    if (mla_plan_create(client, &batch, &plan, &error)) give_up("plan", &error);

    mla_ticket tickets[IN_FLIGHT];
    for (int i = 0; i < IN_FLIGHT; i++)
        if (mla_submit(client, plan, &tickets[i], &error)) give_up("submit", &error);
    puts("decoding");
    fflush(stdout);
    for (int i = 0;; i = (i + 1) % IN_FLIGHT) {
        if (mla_wait(client, tickets[i], MLA_FOREVER, NULL, &error)) give_up("wait", &error);
        if (mla_submit(client, plan, &tickets[i], &error)) give_up("submit", &error);
    }
}
