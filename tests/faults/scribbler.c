/* scribbler - a hostile client: its lengths, page ids, cu_q and masks change at random while its decodes run.
 *
 *     scribbler MUTATIONS SEED
 *
 * Each output lies between canaries. Any answer is fine (success, failed requests, a batch error) as long as it comes,
 * the canaries and the inputs stay as they are, and the session lives. Prints one line of JSON. */
#include "mla.h"

#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { BATCH = 8, HEADS = 4, PAGE = 16, PAGES = 40, MAX_PAGES = 12, ROWS = BATCH * 6, CANARY = 4096 };
enum {
    OUT_BYTES = ROWS * HEADS * 512 * 2,
    LSE_BYTES = ROWS * HEADS * 4,
    AT_Q = 0,
    AT_KV = AT_Q + ROWS * HEADS * 576 * 2,
    AT_TABLE = AT_KV + PAGES * PAGE * 576 * 2,
    AT_LENS = AT_TABLE + BATCH * MAX_PAGES * 4,
    AT_CU_Q = AT_LENS + BATCH * 4,
    AT_MASK = AT_CU_Q + 64,
    AT_OUT = AT_MASK + ROWS * 8 + CANARY,
    AT_LSE = AT_OUT + OUT_BYTES + CANARY,
    BYTES = AT_LSE + LSE_BYTES + CANARY
};

static unsigned char *data;
static unsigned long mutations_wanted, mutations;
static int finished, quiet;

static uint32_t next_random(uint64_t *state)
{
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(*state >> 33);
}

/* One in eight is an extreme, one in eight near the bounds, the others are legal. */
static int32_t nasty(uint64_t *state, int32_t legal)
{
    static const int32_t extremes[] = {-1, INT32_MAX, INT32_MIN, INT32_MAX - 63, 65536, -65536, 1 << 30};
    const uint32_t r = next_random(state);
    if (r % 8 == 0) return extremes[(r >> 4) % (sizeof extremes / sizeof *extremes)];
    if (r % 8 == 1) return legal + (int32_t)((r >> 4) % 3) - 1;
    return (int32_t)((r >> 4) % (uint32_t)legal);
}

static void scribble_once(uint64_t *state)
{
    const uint32_t r = next_random(state) >> 8;
    const uint32_t what = r % 16, at = r / 16;
    if (what < 7)
        __atomic_store_n((int32_t *)(data + AT_TABLE) + at % (BATCH * MAX_PAGES), nasty(state, PAGES),
                         __ATOMIC_RELAXED);
    else if (what < 12)
        __atomic_store_n((int32_t *)(data + AT_LENS) + at % BATCH, nasty(state, PAGE * MAX_PAGES), __ATOMIC_RELAXED);
    else if (what < 15)
        __atomic_store_n((uint64_t *)(data + AT_MASK) + at % ROWS, (uint64_t)next_random(state) << 32 | r,
                         __ATOMIC_RELAXED);
    else __atomic_store_n((int32_t *)(data + AT_CU_Q) + at % (BATCH + 1), nasty(state, ROWS), __ATOMIC_RELAXED);
}

static void make_legal(uint64_t *state)
{
    for (int b = 0; b <= BATCH; b++) __atomic_store_n((int32_t *)(data + AT_CU_Q) + b, b * 6, __ATOMIC_RELAXED);
    for (int b = 0; b < BATCH; b++)
        __atomic_store_n((int32_t *)(data + AT_LENS) + b, (int32_t)(next_random(state) % (PAGE * MAX_PAGES)),
                         __ATOMIC_RELAXED);
    for (int i = 0; i < BATCH * MAX_PAGES; i++)
        __atomic_store_n((int32_t *)(data + AT_TABLE) + i, (int32_t)(next_random(state) % PAGES), __ATOMIC_RELAXED);
}

/* Runs beside the decodes, but those that are to succeed: a few mutations at any moment of each. */
static void *scribble(void *seed)
{
    uint64_t state = *(uint64_t *)seed;
    while (!__atomic_load_n(&finished, __ATOMIC_RELAXED)) {
        if (!__atomic_load_n(&quiet, __ATOMIC_RELAXED)) {
            scribble_once(&state);
            __atomic_add_fetch(&mutations, 1, __ATOMIC_RELAXED);
        }
        nanosleep(&(struct timespec){.tv_nsec = 1000}, NULL);
    }
    return NULL;
}

static int canaries_intact(void)
{
    static const size_t at[] = {AT_OUT - CANARY, AT_OUT + OUT_BYTES, AT_LSE + LSE_BYTES};
    for (size_t i = 0; i < sizeof at / sizeof *at; i++)
        for (size_t j = 0; j < CANARY; j++)
            if (data[at[i] + j] != 0xa5) return 0;
    return 1;
}

static _Noreturn void give_up(const char *what, const mla_error *error)
{
    fprintf(stderr, "scribbler: %s: %s [%s] %s\n", what, mla_status_text(error->code), error->field, error->message);
    exit(1);
}

int main(int argc, char **argv)
{
    mutations_wanted = argc > 1 ? strtoul(argv[1], NULL, 10) : 100000;
    uint64_t seed = argc > 2 ? strtoull(argv[2], NULL, 10) : 1;
    mla_options options;
    mla_options_init(&options);
    options.device = "cpu", options.name = "scribbler";
    mla_client *client;
    mla_buffer *buffer;
    mla_error error;
    if (mla_connect(&client, &options, &error)) give_up("connect", &error);
    if (mla_buffer_alloc(client, BYTES, &buffer, &error)) give_up("alloc", &error);
    data = mla_buffer_data(buffer);
    uint64_t state = seed;
    for (size_t i = AT_Q; i < AT_TABLE; i += 2)
        *(uint16_t *)(data + i) = (uint16_t)(0x3e00 | next_random(&state) % 0x1ff);
    make_legal(&state);
    memset(data + AT_OUT - CANARY, 0xa5, (size_t)(BYTES - AT_OUT + CANARY));
    unsigned char *inputs = malloc(AT_TABLE);
    if (!inputs) return 1;
    memcpy(inputs, data, AT_TABLE);

    mla_plan *plans[3];
    for (int mask = 0; mask < 3; mask++) {
        mla_batch batch;
        mla_batch_init(&batch);
        batch.batch = BATCH, batch.heads = HEADS, batch.q_rows = ROWS, batch.pages = PAGES, batch.page_size = PAGE,
        batch.max_pages = MAX_PAGES;
        batch.softmax_scale = 1 / sqrt(576), batch.mask = (mla_mask)mask;
        batch.q = (mla_tensor){buffer, AT_Q}, batch.kv = (mla_tensor){buffer, AT_KV};
        batch.block_table = (mla_tensor){buffer, AT_TABLE}, batch.seqlens = (mla_tensor){buffer, AT_LENS};
        batch.cu_q = (mla_tensor){buffer, AT_CU_Q}, batch.out = (mla_tensor){buffer, AT_OUT},
        batch.lse = (mla_tensor){buffer, AT_LSE};
        if (mask == MLA_MASK_TREE) batch.tree_mask = (mla_tensor){buffer, AT_MASK};
        if (mla_plan_create(client, &batch, &plans[mask], &error)) give_up("plan", &error);
    }

    pthread_t scribbling;
    if (pthread_create(&scribbling, NULL, scribble, &seed)) return 1;
    unsigned long ok = 0, requests = 0, batches = 0;
    for (unsigned turn = 0; __atomic_load_n(&mutations, __ATOMIC_RELAXED) < mutations_wanted; turn++) {
        __atomic_store_n(&quiet, turn % 8 == 0, __ATOMIC_RELAXED); /* on a slow machine none would be legal otherwise */
        make_legal(&state); /* else nearly every batch fails before it starts; mutations before each start, too */
        for (unsigned i = 0; i < 16 * (turn % 4); i++, __atomic_add_fetch(&mutations, 1, __ATOMIC_RELAXED))
            scribble_once(&state);
        const mla_status status = mla_decode(client, plans[turn % 3], 30000, NULL, &error);
        if (status == MLA_OK) ok++;
        else if (status == MLA_REQUESTS) requests++;
        else if (status == MLA_BATCH) batches++;
        else give_up("decode", &error);
        if (!canaries_intact()) { fprintf(stderr, "scribbler: a canary died\n"); return 1; }
    }
    __atomic_store_n(&finished, 1, __ATOMIC_RELAXED);
    pthread_join(scribbling, NULL);
    if (memcmp(inputs, data, AT_TABLE)) { fprintf(stderr, "scribbler: an input was written\n"); return 1; }
    printf("{\"mutations\": %lu, \"ok\": %lu, \"requests\": %lu, \"batch\": %lu}\n", mutations, ok, requests, batches);
    free(inputs);
    mla_close(client);
    return 0;
}
