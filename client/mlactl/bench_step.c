/* bench_step.c - `mlactl bench step`: the decodes of a model's layers, each with a plan and a KV cache of its own,
 * several ways in turn. In host order: every layer waited for before the next is submitted, as a model must whose
 * layers depend on each other; and submitted ahead. Where the placement allows stream order: put into a CUDA stream one
 * by one, and as a graph of all of them, replayed.
 *
 * What a layer costs beyond its kernels is the wall time less the worker's kernel times, which in stream order nobody
 * is told of: there it is less that of the layers that were waited for. */
#include "bench.h"
#include "gpu.h"
#include "progress.h"

#include <stdio.h>

enum { MOST_LAYERS = 256, AHEAD = 64, MOST_STEPS = 100000 };
enum way { WAITED, SUBMITTED_AHEAD, IN_STREAM, IN_GRAPH, WAYS, HOST_WAYS = IN_STREAM };
static const char *const way_names[WAYS] = {"waited", "ahead", "stream", "graph"};
static const char *const way_words[WAYS] = {"each waited for", "submitted ahead", "in a stream", "as a graph"};

struct way_result { double p50, p99, kernel, overhead; };   /* of a step; the latter two of a layer, medians */
struct step {
    const struct ctl *ctl;
    mla_client *client;
    char device[64], why[MLA_WHY]; /* why that order */
    struct bench_batch batch;
    unsigned layers, steps, ways;
    struct run *runs[MOST_LAYERS];
    void *stream, *graph;          /* NULL in host order */
    mla_step *armed;               /* the graph's rounds */
    struct way_result results[WAYS];
};

/* Complains. */
static int failed(const struct step *step, const mla_error *error)
{
    return ctl_error(step->ctl, run_exit_code(error->code), "%s", error->message);
}

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

static int in_stream(struct step *step, double *kernel_ns)
{
    mla_error error;
    (void)kernel_ns;
    for (unsigned i = 0; i < step->layers; i++)
        if (mla_submit_stream(step->runs[i]->plan, step->stream, &error))
            return failed(step, &error);
    return mla_stream_drain(step->stream, step->ctl->timeout_ms, &error) ? failed(step, &error) : CTL_OK;
}

static int in_graph(struct step *step, double *kernel_ns)
{
    mla_error error;
    (void)kernel_ns;
    if (mla_step_launch(step->armed, step->stream, &error) || gpu_graph_launch(step->graph, step->stream, &error) ||
        mla_stream_drain(step->stream, step->ctl->timeout_ms, &error))
        return failed(step, &error);
    return CTL_OK;
}

/* Whether anything failed that ran in the stream: outputs are NaN then, and nothing else tells. */
static int heard_of_failures(const struct step *step)
{
    mla_error error;
    for (unsigned i = 0; i < step->layers; i++)
        if (mla_plan_status(step->runs[i]->plan, &error))
            return failed(step, &error);
    return mla_step_status(step->armed, &error) ? failed(step, &error) : CTL_OK;
}

/* The graph of all layers, whose rounds in_graph arms. */
static int capture_step(struct step *step)
{
    mla_error error, of_capture;
    mla_plan *plans[MOST_LAYERS];
    for (unsigned i = 0; i < step->layers; i++)
        plans[i] = step->runs[i]->plan;
    if (mla_step_create(step->client, plans, step->layers, &step->armed, &error) ||
        gpu_capture_begin(step->stream, &error))
        return failed(step, &error);
    mla_status status = MLA_OK;
    for (unsigned i = 0; i < step->layers && status == MLA_OK; i++)
        status = mla_submit_stream(plans[i], step->stream, &error);
    int ended = gpu_capture_end(step->stream, &step->graph, &of_capture);
    return status ? failed(step, &error) : ended ? failed(step, &of_capture) : CTL_OK;
}

/* The layers, and in stream order the stream and its graph. */
static int make(struct step *step)
{
    int code = CTL_OK;
    for (unsigned i = 0; i < step->layers && !code; i++)
        code = bench_bind(step->ctl, step->client, &step->batch, &step->runs[i]);
    step->ways = HOST_WAYS;
    if (code || mla_client_order(step->client, step->why) == MLA_ORDER_HOST)
        return code;
    mla_error error;
    step->stream = gpu_stream_new(step->device, &error);
    if (!step->stream)
        return failed(step, &error);
    step->ways = WAYS;
    return capture_step(step);
}

static void unmake(struct step *step)
{
    gpu_graph_free(step->graph);
    mla_step_destroy(step->armed);
    gpu_stream_free(step->stream);
    for (unsigned i = 0; i < step->layers; i++)
        run_free(step->runs[i]);
}

static int measure(struct step *step, double seconds)
{
    int (*const ways[WAYS])(struct step *, double *) = {waited, submitted_ahead, in_stream, in_graph};
    ctl_autofree double *samples = calloc((size_t)WAYS * 3 * MOST_STEPS, sizeof *samples);
    if (!samples)
        return ctl_error(step->ctl, CTL_FAILED, "out of memory");
    double end = 0, ignored = 0;
    int code = CTL_OK;
    for (unsigned way = 0; way < step->ways && !code; way++) /* warm */
        code = ways[way](step, &ignored);
    unsigned n = 0;
    end = (double)bench_now_ns() + seconds * 1e9;
    for (; !code && n < MOST_STEPS && (n < 3 || (double)bench_now_ns() < end); n++) {
        for (unsigned way = 0; way < step->ways && !code; way++) {
            double *wall = samples + (size_t)way * 3 * MOST_STEPS, *kernel = wall + MOST_STEPS;
            double *overhead = kernel + MOST_STEPS, from = (double)bench_now_ns();
            code = ways[way](step, &kernel[n]);
            wall[n] = (double)bench_now_ns() - from;
            if (way >= HOST_WAYS)
                kernel[n] = samples[MOST_STEPS + n]; /* those that were waited for, in the same turn */
            overhead[n] = wall[n] - kernel[n];
        }
        if (!code && step->armed)
            code = heard_of_failures(step);
    }
    step->steps = n;
    for (unsigned way = 0; way < step->ways && !code; way++) {
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
    cJSON_AddStringToObject(root, "order", step->ways == WAYS ? "stream" : "host");
    cJSON_AddStringToObject(root, "why", step->why);
    for (unsigned i = 0; i < step->ways; i++) {
        cJSON *way = cJSON_AddObjectToObject(root, way_names[i]);
        cJSON_AddNumberToObject(way, "step_p50_ns", step->results[i].p50);
        cJSON_AddNumberToObject(way, "step_p99_ns", step->results[i].p99);
        if (i < HOST_WAYS)
            cJSON_AddNumberToObject(way, "kernel_per_layer_ns", step->results[i].kernel);
        cJSON_AddNumberToObject(way, "overhead_per_layer_ns", step->results[i].overhead);
    }
    output_json(root);
}

static void report_text(const struct step *step)
{
    bench_sizes_text(step->device, &step->batch);
    struct table *table = table_new("LAYERS|>STEP P50|>STEP P99|>A LAYER'S KERNELS|>BEYOND THEM, A LAYER");
    for (unsigned i = 0; i < step->ways; i++) {
        const struct way_result *way = &step->results[i];
        table_cell(table, BOLD, "%u, %s", step->layers, way_words[i]);
        table_cell(table, PLAIN, "%s", human_ns(way->p50).s);
        table_cell(table, PLAIN, "%s", human_ns(way->p99).s);
        table_cell(table, PLAIN, "%s", i < HOST_WAYS ? human_ns(way->kernel).s : "-");
        table_cell(table, PLAIN, "%s", way->overhead < 0 ? "none" : human_ns(way->overhead).s);
    }
    table_print(table);
    output_print(DIM, "\n  %u steps; %s order: %s\n", step->steps, step->ways == WAYS ? "stream" : "host", step->why);
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
    code = make(&step);
    progress("measuring steps");
    code = code ? code : measure(&step, (double)seconds);
    progress_stop();
    unmake(&step);
    if (!code && ctl->json)
        report_json(&step);
    else if (!code)
        report_text(&step);
    return code;
}
