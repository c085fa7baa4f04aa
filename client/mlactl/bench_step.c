/* bench_step.c - `mlactl bench step`: the decodes of a model's layers, each with a plan and a KV cache of its own, in
 * host order. Two ways in turn: every layer waited for before the next is submitted, as a model must whose layers
 * depend on each other; and submitted ahead, which is the least that the daemon can do. What a layer costs beyond its
 * kernels is the wall time less the worker's kernel times. */
#include "bench.h"
#include "progress.h"

#include <stdio.h>

enum { MOST_LAYERS = 256, AHEAD = 64, MOST_STEPS = 100000 };
enum way { WAITED, SUBMITTED_AHEAD, WAYS };
static const char *const way_names[WAYS] = {"waited", "ahead"};

struct way_result { double p50, p99, kernel, overhead; };   /* of a step; the latter two of a layer, medians */
struct step {
    const struct ctl *ctl;
    mla_client *client;
    char device[64];
    struct bench_batch batch;
    unsigned layers, steps;
    struct run *runs[MOST_LAYERS];
    struct way_result results[WAYS];
};

static int waited(struct step *step, double *kernel_ns)
{
    int code = CTL_OK;
    for (unsigned i = 0; i < step->layers && !code; i++) {
        mla_result result;
        double wall;
        code = bench_decode(step->ctl, step->runs[i], &wall, &result);
        *kernel_ns += code ? 0 : (double)result.kernel_ns;
    }
    return code;
}

/* A user may have only so many in flight. */
static int submitted_ahead(struct step *step, double *kernel_ns)
{
    mla_ticket tickets[AHEAD];
    int code = CTL_OK;
    for (unsigned i = 0; i < step->layers + AHEAD && !code; i++) {
        mla_result result;
        if (i >= AHEAD && i - AHEAD < step->layers) {
            code = bench_collect(step->ctl, step->client, tickets[i % AHEAD], &result);
            *kernel_ns += code ? 0 : (double)result.kernel_ns;
        }
        if (i < step->layers && !code)
            code = bench_submit(step->ctl, step->runs[i], &tickets[i % AHEAD]);
    }
    return code;
}

static int measure(struct step *step, double seconds)
{
    int (*const ways[WAYS])(struct step *, double *) = {waited, submitted_ahead};
    ctl_autofree double *samples = calloc((size_t)WAYS * 3 * MOST_STEPS, sizeof *samples);
    if (!samples)
        return ctl_error(step->ctl, CTL_FAILED, "out of memory");
    double end = 0, ignored = 0;
    int code = waited(step, &ignored); /* warm */
    unsigned n = 0;
    end = (double)bench_now_ns() + seconds * 1e9;
    for (; !code && n < MOST_STEPS && (n < 3 || (double)bench_now_ns() < end); n++)
        for (unsigned way = 0; way < WAYS && !code; way++) {
            double *wall = samples + (size_t)way * 3 * MOST_STEPS, *kernel = wall + MOST_STEPS;
            double *overhead = kernel + MOST_STEPS, from = (double)bench_now_ns();
            code = ways[way](step, &kernel[n]);
            wall[n] = (double)bench_now_ns() - from;
            overhead[n] = wall[n] - kernel[n];
        }
    step->steps = n;
    for (unsigned way = 0; way < WAYS && !code; way++) {
        double *wall = samples + (size_t)way * 3 * MOST_STEPS;
        step->results[way] = (struct way_result){
            bench_percentile(wall, n, 0.5), bench_percentile(wall, n, 0.99),
            bench_percentile(wall + MOST_STEPS, n, 0.5) / step->layers,
            bench_percentile(wall + 2 * MOST_STEPS, n, 0.5) / step->layers};
    }
    return code;
}

static void report_json(const struct step *step)
{
    cJSON *root = cJSON_CreateObject();
    bench_sizes_json(root, step->device, &step->batch);
    cJSON_AddNumberToObject(root, "layers", step->layers);
    cJSON_AddNumberToObject(root, "steps", step->steps);
    cJSON_AddStringToObject(root, "order", "host");
    for (unsigned i = 0; i < WAYS; i++) {
        cJSON *way = cJSON_AddObjectToObject(root, way_names[i]);
        cJSON_AddNumberToObject(way, "step_p50_ns", step->results[i].p50);
        cJSON_AddNumberToObject(way, "step_p99_ns", step->results[i].p99);
        cJSON_AddNumberToObject(way, "kernel_per_layer_ns", step->results[i].kernel);
        cJSON_AddNumberToObject(way, "overhead_per_layer_ns", step->results[i].overhead);
    }
    output_json(root);
}

static void report_text(const struct step *step)
{
    bench_sizes_text(step->device, &step->batch);
    struct table *table = table_new("LAYERS|>STEP P50|>STEP P99|>A LAYER'S KERNELS|>BEYOND THEM, A LAYER");
    for (unsigned i = 0; i < WAYS; i++) {
        const struct way_result *way = &step->results[i];
        table_cell(table, BOLD, "%u, %s", step->layers,
                   i == WAITED ? "each waited for" : "submitted ahead");
        table_cell(table, PLAIN, "%s", human_ns(way->p50).s);
        table_cell(table, PLAIN, "%s", human_ns(way->p99).s);
        table_cell(table, PLAIN, "%s", human_ns(way->kernel).s);
        table_cell(table, PLAIN, "%s", human_ns(way->overhead).s);
    }
    table_print(table);
    output_print(DIM, "\n  %u steps, host order\n", step->steps);
}

int bench_step(const struct ctl *ctl)
{
    uint64_t seconds = 10, layers = 61;
    client_auto mla_client *client = NULL;
    struct step step = {.ctl = ctl, .batch = {1, BENCH_HEADS, 1, 4096}};
    if (ctl_number(ctl, "--seconds", 1, 3600, &seconds) || ctl_number(ctl, "--layers", 1, MOST_LAYERS, &layers) ||
        bench_sizes(ctl, &step.batch))
        return CTL_USAGE;
    int code = run_connect(ctl, ctl_value(ctl, "--device"), &client);
    if (code)
        return code;
    step.client = client;
    step.layers = (unsigned)layers;
    snprintf(step.device, sizeof step.device, "%s", mla_device(client));
    progress("making %u layers", step.layers);
    for (unsigned i = 0; i < step.layers && !code; i++)
        code = bench_bind(ctl, client, &step.batch, &step.runs[i]);
    progress("measuring steps");
    code = code ? code : measure(&step, (double)seconds);
    progress_stop();
    for (unsigned i = 0; i < step.layers; i++)
        run_free(step.runs[i]);
    if (!code && ctl->json)
        report_json(&step);
    else if (!code)
        report_text(&step);
    return code;
}
