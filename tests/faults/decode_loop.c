/* decode_loop - a client that decodes without pause and checks every result, for tests that kill things around it.
 *
 *     decode_loop SEED      device cpu of $MLAD_SOCKET; `reference` must be served too
 *
 * Two plans (a uniform and a ragged batch) are always in flight. Their first outputs are compared with the reference
 * device (50 dB at least), all later ones bit by bit with the first; outputs are overwritten with NaN before each
 * submission, so that an output that was not written shows. Prints "ready" once it loops; SIGTERM ends it
 * with one line of JSON: decodes, hit (decodes that were in flight at a death), replays, wrong, errors, last_error. */
#include "mla.h"

#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    BATCH = 6,
    HEADS = 16,
    PAGES = 96,
    PAGE = 64,
    ROWS_MAX = BATCH * 8,
    MAX_PAGES = 16,
    OUT_BYTES = ROWS_MAX * HEADS * 512 * 2
};

/* One buffer holds everything of a batch; the offsets are those of its tensors. */
enum {
    AT_Q = 0,
    AT_TABLE = ROWS_MAX * HEADS * 576 * 2,
    AT_LENS = AT_TABLE + BATCH * MAX_PAGES * 4,
    AT_CU_Q = AT_LENS + 64,
    AT_OUT = AT_CU_Q + 64,
    AT_KV = AT_OUT + OUT_BYTES,
    BUFFER_BYTES = AT_KV + PAGES * PAGE * 576 * 2
};

struct job {
    mla_buffer *buffer;
    mla_plan *plan;
    mla_ticket ticket;
    size_t out_bytes;
    unsigned char *expected;
};

static volatile sig_atomic_t stop;
static void on_term(int signal_number) { (void)signal_number; stop = 1; }

static uint64_t random_state;
static uint32_t next_random(void)
{
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(random_state >> 33);
}

static uint16_t random_bf16(void) { /* roughly normal, sum of four uniforms */
    float sum = 0;
    for (int i = 0; i < 4; i++) sum += (float)next_random() / 2147483648.0f - 0.5f;
    sum *= 1.7f;
    uint32_t bits;
    memcpy(&bits, &sum, 4);
    return (uint16_t)(bits >> 16);
}

static float from_bf16(uint16_t value)
{
    uint32_t bits = (uint32_t)value << 16;
    float out;
    memcpy(&out, &bits, 4);
    return out;
}

static _Noreturn void give_up(const char *what, const mla_error *error)
{
    fprintf(stderr, "decode_loop: %s: %s [%s] %s\n", what, mla_status_text(error->code), error->field, error->message);
    exit(1);
}

static void fill(unsigned char *data, const int32_t *cu_q)
{
    uint16_t *q = (uint16_t *)(data + AT_Q), *kv = (uint16_t *)(data + AT_KV);
    for (size_t i = 0; i < (size_t)ROWS_MAX * HEADS * 576; i++) q[i] = random_bf16();
    for (size_t i = 0; i < (size_t)PAGES * PAGE * 576; i++) kv[i] = random_bf16();
    int32_t *table = (int32_t *)(data + AT_TABLE), *lens = (int32_t *)(data + AT_LENS);
    for (int i = 0; i < BATCH * MAX_PAGES; i++) table[i] = (i * 37 + 11) % PAGES;
    for (int b = 0; b < BATCH; b++) lens[b] = 1 + (int32_t)(next_random() % (MAX_PAGES * PAGE - 1));
    if (cu_q) memcpy(data + AT_CU_Q, cu_q, (BATCH + 1) * 4);
}

static mla_batch describe(mla_buffer *buffer, uint64_t rows, int ragged)
{
    mla_batch d;
    mla_batch_init(&d);
    d.batch = BATCH, d.heads = HEADS, d.q_rows = rows, d.pages = PAGES, d.page_size = PAGE, d.max_pages = MAX_PAGES;
    d.softmax_scale = 1 / sqrt(576), d.deterministic = 1;
    d.q = (mla_tensor){buffer, AT_Q}, d.kv = (mla_tensor){buffer, AT_KV};
    d.block_table = (mla_tensor){buffer, AT_TABLE}, d.seqlens = (mla_tensor){buffer, AT_LENS};
    if (ragged) d.cu_q = (mla_tensor){buffer, AT_CU_Q};
    d.out = (mla_tensor){buffer, AT_OUT};
    return d;
}

/* Decode the job's batch once on the reference device, from a copy of its inputs, into `out`. */
static void decode_on_reference(const struct job *job, uint64_t rows, int ragged, uint16_t *out)
{
    mla_options options;
    mla_options_init(&options);
    options.device = "reference", options.name = "decode_loop";
    mla_client *client;
    mla_buffer *buffer;
    mla_error error;
    if (mla_connect(&client, &options, &error) || mla_buffer_alloc(client, BUFFER_BYTES, &buffer, &error))
        give_up("reference", &error);
    memcpy(mla_buffer_data(buffer), mla_buffer_data(job->buffer), BUFFER_BYTES);
    mla_batch batch = describe(buffer, rows, ragged);
    if (mla_decode_batch(client, &batch, 120000, NULL, &error)) give_up("reference decode", &error);
    memcpy(out, (unsigned char *)mla_buffer_data(buffer) + AT_OUT, job->out_bytes);
    mla_close(client);
}

static double snr_db(const uint16_t *reference, const uint16_t *out, size_t count)
{
    double signal = 0, noise = 0;
    for (size_t i = 0; i < count; i++) {
        const double r = from_bf16(reference[i]), d = r - from_bf16(out[i]);
        signal += r * r, noise += d * d;
    }
    return 10 * log10(signal / noise);
}

int main(int argc, char **argv)
{
    random_state = argc > 1 ? strtoull(argv[1], NULL, 10) : 1;
    signal(SIGTERM, on_term);
    static const int32_t cu_q[BATCH + 1] = {0, 1, 5, 5, 13, 15, 18};
    const uint64_t rows[2] = {BATCH * 4, (uint64_t)cu_q[BATCH]};
    mla_client *client;
    mla_error error;
    mla_options options;
    mla_options_init(&options);
    options.device = "cpu", options.name = "decode_loop", options.reconnect_ms = 60000;
    if (mla_connect(&client, &options, &error)) give_up("connect", &error);

    struct job jobs[2];
    for (int i = 0; i < 2; i++) {
        struct job *job = &jobs[i];
        if (mla_buffer_alloc(client, BUFFER_BYTES, &job->buffer, &error)) give_up("alloc", &error);
        fill(mla_buffer_data(job->buffer), i ? cu_q : NULL);
        mla_batch batch = describe(job->buffer, rows[i], i);
        if (mla_plan_create(client, &batch, &job->plan, &error)) give_up("plan", &error);
        job->out_bytes = rows[i] * HEADS * 512 * 2;
        if (mla_decode(client, job->plan, MLA_FOREVER, NULL, &error)) give_up("first decode", &error);
        job->expected = malloc(job->out_bytes);
        uint16_t *reference = malloc(job->out_bytes);
        if (!job->expected || !reference) abort();
        memcpy(job->expected, (unsigned char *)mla_buffer_data(job->buffer) + AT_OUT, job->out_bytes);
        decode_on_reference(job, rows[i], i, reference);
        const double snr = snr_db(reference, (uint16_t *)job->expected, job->out_bytes / 2);
        if (!(snr >= 50)) { fprintf(stderr, "decode_loop: %.2f dB against the reference\n", snr); return 1; }
        free(reference);
    }
    puts("ready");
    fflush(stdout);

    unsigned long decodes = 0, hit = 0, replays = 0, wrong = 0, errors = 0;
    char last_error[768] = "";
    for (int i = 0; i < 2; i++) jobs[i].ticket = 0;
    for (int turn = 0;; turn ^= 1) {
        struct job *job = &jobs[turn];
        unsigned char *out = (unsigned char *)mla_buffer_data(job->buffer) + AT_OUT;
        if (job->ticket) {
            mla_result result;
            const mla_status status = mla_wait(client, job->ticket, MLA_FOREVER, &result, &error);
            decodes++;
            if (status) {
                errors++;
                snprintf(last_error, sizeof last_error, "%s: %s", mla_status_text(status), error.message);
            } else {
                hit += result.replays > 0, replays += result.replays;
                wrong += memcmp(out, job->expected, job->out_bytes) != 0;
            }
            job->ticket = 0;
        }
        if (stop && !jobs[turn ^ 1].ticket) break;
        if (stop) continue;
        memset(out, 0xff, job->out_bytes);
        if (mla_submit(client, job->plan, &job->ticket, &error)) {
            errors++, job->ticket = 0;
            snprintf(last_error, sizeof last_error, "submit: %s: %s", mla_status_text(error.code), error.message);
            if (errors > 100) break;
        }
    }
    printf(
        "{\"decodes\": %lu, \"hit\": %lu, \"replays\": %lu, \"wrong\": %lu, \"errors\": %lu, \"last_error\": \"%s\"}\n",
        decodes, hit, replays, wrong, errors, last_error);
    mla_close(client);
    for (int i = 0; i < 2; i++) free(jobs[i].expected);
    return wrong || errors;
}
