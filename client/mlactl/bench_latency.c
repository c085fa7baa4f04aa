/* bench_latency.c - `mlactl bench latency`: one client, one-key decodes one at a time: what a call costs, and where. */
#include "bench.h"
#include "progress.h"

#include <stdio.h>

enum { MOST = 1 << 20, PARTS = 5 };
static const char *const part_names[PARTS] = {"call", "receive", "queue", "kernel", "rest"};
static const double shares[] = {0.5, 0.9, 0.99, 0.999, 1};
enum { SHARES = sizeof shares / sizeof *shares };

struct latency {
    char device[64];
    unsigned count;
    double *samples[PARTS]; /* [MOST] nanoseconds; rest: of the call none of the others: wire, wake-ups, reply */
    double values[PARTS][SHARES];
};

static int measure(const struct ctl *ctl, mla_client *client, double seconds, struct latency *latency)
{
    run_auto struct run *run = NULL;
    mla_result result;
    double warm;
    int code = bench_bind(ctl, client, &(struct bench_batch){1, 1, 1, 1}, &run);
    for (unsigned i = 0; i < 100 && !code; i++)
        code = bench_decode(ctl, run, &warm, &result);
    double end = (double)bench_now_ns() + seconds * 1e9;
    unsigned n = 0;
    for (; !code && n < MOST && (n < 100 || (double)bench_now_ns() < end); n++) {
        code = bench_decode(ctl, run, &latency->samples[0][n], &result);
        const double parts[] = {(double)result.receive_ns, (double)result.queue_ns, (double)result.kernel_ns};
        latency->samples[PARTS - 1][n] = latency->samples[0][n];
        for (unsigned i = 0; i < 3; i++) {
            latency->samples[1 + i][n] = parts[i];
            latency->samples[PARTS - 1][n] -= parts[i];
        }
    }
    latency->count = n;
    for (unsigned i = 0; i < PARTS && !code; i++)
        for (unsigned j = 0; j < SHARES; j++)
            latency->values[i][j] = bench_percentile(latency->samples[i], n, shares[j]);
    return code;
}

static void report_json(const struct latency *latency)
{
    cJSON *root = cJSON_CreateObject();
    static const char *const names[SHARES] = {"p50_ns", "p90_ns", "p99_ns", "p999_ns", "max_ns"};
    bench_sizes_json(root, latency->device, &(struct bench_batch){1, 1, 1, 1});
    cJSON_AddNumberToObject(root, "count", latency->count);
    for (unsigned i = 0; i < PARTS; i++) {
        cJSON *part = cJSON_AddObjectToObject(root, part_names[i]);
        for (unsigned j = 0; j < SHARES; j++)
            cJSON_AddNumberToObject(part, names[j], latency->values[i][j]);
    }
    output_json(root);
}

static void report_text(const struct latency *latency)
{
    bench_sizes_text(latency->device, &(struct bench_batch){1, 1, 1, 1});
    struct table *table = table_new("PART|>P50|>P90|>P99|>P99.9|>MAX");
    for (unsigned i = 0; i < PARTS; i++) {
        table_cell(table, i ? PLAIN : BOLD, "%s", part_names[i]);
        for (unsigned j = 0; j < SHARES; j++)
            table_cell(table, PLAIN, "%s", human_ns(latency->values[i][j]).s);
    }
    table_print(table);
    output_print(DIM, "\n  %u calls; receive, queue and kernel are the worker's own times\n", latency->count);
}

int bench_latency(const struct ctl *ctl)
{
    uint64_t seconds = 10;
    client_auto mla_client *client = NULL;
    struct latency latency = {0};
    if (ctl_number(ctl, "--seconds", 1, 3600, &seconds))
        return CTL_USAGE;
    ctl_autofree double *samples = calloc((size_t)PARTS * MOST, sizeof *samples);
    if (!samples)
        return ctl_error(ctl, CTL_FAILED, "out of memory");
    for (unsigned i = 0; i < PARTS; i++)
        latency.samples[i] = samples + (size_t)i * MOST;
    int code = run_connect(ctl, ctl_value(ctl, "--device"), &client);
    if (code)
        return code;
    snprintf(latency.device, sizeof latency.device, "%s", mla_device(client));
    progress("measuring one-key decodes");
    code = measure(ctl, client, (double)seconds, &latency);
    progress_stop();
    if (!code && ctl->json)
        report_json(&latency);
    else if (!code)
        report_text(&latency);
    return code;
}
