/* mlad_kernel_compare.c - times our kernels beside a peer's on a GPU, shape by shape, and prints what it measured: a
 * line of JSON for the run and one for each shape. compare.py chooses shapes, runs this, and judges the numbers.
 *
 * For each shape: both decode once and their outputs are compared; then samples, the two in turn and in alternating
 * order, until there are enough or the shape's share of the time is used. Numbers are nanoseconds of one decode. */
#include "ceilings.h"
#include "contender.h"

#include <errno.h>
#include <getopt.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    MOST_SAMPLES = 101,
    LEAST_CALLS = 16,       /* in a graph, so that its start does not count */
    PREPARES = 7,
    SAMPLE_NS = 1000000,    /* a sample takes at least so long */
    CEILING_BYTES = 1 << 30 /* that the read ceiling reads at least */
};
/* Where outputs differ by more, one of the two computes something else. bf16 rounds P and the outputs, by 2^-9 of
 * values that are a few times the mean; a tile of 64 keys left out of 50,000 moves outputs by 0.1. */
static const double MOST_OUT_DIFFERENCE = 0.125, MOST_LSE_DIFFERENCE = 2e-3;

static const char usage[] =
    "usage: mlad-kernel-compare --device GPU-... [options] < shapes\n"
    "Times our kernels, and a peer's beside them, on shapes given as lines \"BATCH HEADS Q_LEN LENGTH...\" (one\n"
    "length, or one for each request): bf16, causal, pages of 64. Prints lines of JSON, which compare.py judges.\n"
    "  --device NAME          a GPU's UUID\n"
    "  --peer FILE.so         a library as peer.h describes; without it only ours is timed\n"
    "  --limit-seconds N      for all shapes together (120); shapes beyond it are skipped, and said to be\n"
    "  --pairs N              samples of a shape at least (7)\n"
    "  --most-pairs N         samples of a shape at most (101)\n"
    "  --cold-mb N            MB of KV that are read between two reads of the same (four times the L2)\n"
    "  --own-edges            join the peer's calls as it captures them, by programmatic edges too, not by full ones\n"
    "  --ceilings GBPS,TFLOPS read and matmul rates, instead of measuring them\n"
    "  --help\n";

struct options {
    const char *device, *peer;
    double limit;
    uint32_t pairs, most_pairs;
    uint64_t cold_bytes;
    bool own_edges;
    struct gpu_ceilings ceilings;
};

static _Noreturn void stop(const struct mlak_fault *fault)
{
    fprintf(stderr, "mlad-kernel-compare: %s: %s\n", fault->field, fault->message);
    exit(1);
}

static _Noreturn void refuse(const char *option, const char *text, const char *remedy)
{
    fprintf(stderr, "mlad-kernel-compare: --%s %s: %s\n", option, text, remedy);
    exit(2);
}

static double number(const char *option, const char *text, double least, double most)
{
    char *end, remedy[64];
    double value = strtod(text, &end);
    if (end == text || *end != '\0' || !(value >= least && value <= most)) {
        snprintf(remedy, sizeof remedy, "give a number from %g to %g", least, most);
        refuse(option, text, remedy);
    }
    return value;
}

static struct options parse(int argc, char **argv)
{
    enum { DEVICE = 256, PEER, LIMIT, PAIRS, MOST, COLD, EDGES, CEILINGS, HELP };
    static const struct option table[] = {
        {"device", 1, NULL, DEVICE}, {"peer", 1, NULL, PEER},         {"limit-seconds", 1, NULL, LIMIT},
        {"pairs", 1, NULL, PAIRS},   {"most-pairs", 1, NULL, MOST},   {"cold-mb", 1, NULL, COLD},
        {"own-edges", 0, NULL, EDGES}, {"ceilings", 1, NULL, CEILINGS}, {"help", 0, NULL, HELP},
        {NULL, 0, NULL, 0},
    };
    struct options options = {.limit = 120, .pairs = 7, .most_pairs = MOST_SAMPLES};
    int option;
    while ((option = getopt_long(argc, argv, "", table, NULL)) != -1) {
        switch (option) {
        case DEVICE: options.device = optarg; break;
        case PEER: options.peer = optarg; break;
        case LIMIT: options.limit = number("limit-seconds", optarg, 0.1, 86400); break;
        case PAIRS: options.pairs = (uint32_t)number("pairs", optarg, 1, MOST_SAMPLES); break;
        case MOST: options.most_pairs = (uint32_t)number("most-pairs", optarg, 1, MOST_SAMPLES); break;
        case COLD: options.cold_bytes = (uint64_t)(number("cold-mb", optarg, 0.001, 65536) * 1e6); break;
        case EDGES: options.own_edges = true; break;
        case CEILINGS:
            if (sscanf(optarg, "%lf,%lf", &options.ceilings.read_gbps, &options.ceilings.tflops) != 2 ||
                !(options.ceilings.read_gbps > 0 && options.ceilings.tflops > 0))
                refuse("ceilings", optarg, "give GB/s and TFLOP/s, such as 3158,790");
            break;
        case HELP: fputs(usage, stdout); exit(0);
        default: fputs("try mlad-kernel-compare --help\n", stderr); exit(2);
        }
    }
    if (optind < argc || !options.device)
        refuse("device", "", "name a GPU by its UUID; shapes come by the standard input");
    return options;
}

/* ---- one shape ---- */

struct run {
    struct options options;
    struct gpu gpu;
    const struct mlak_backend *backend;
    struct mlak_device *device;
    struct ours ours;
    struct peer peer;
    struct contender *contenders[2]; /* ours, the peer or NULL */
    struct pool pool;
    double end; /* gpu_now() when the time is over */
};

struct samples {
    uint32_t count;
    double decode[2][MOST_SAMPLES], layer[2][MOST_SAMPLES], alone[2][MOST_SAMPLES], prepare[2][PREPARES];
    unsigned mhz[MOST_SAMPLES];
    struct difference difference;
    bool agree;
};

static const char *const names[2] = {"ours", "peer"};

static enum mlak_code compare(struct run *run, struct work *work, struct samples *samples, struct mlak_fault *fault)
{
    enum mlak_code code = work_poison(work, fault);
    for (int i = 0; i < 2 && code == MLAK_OK; i++)
        if (run->contenders[i])
            code = run->contenders[i]->decode(run->contenders[i], fault);
    if (code != MLAK_OK || !run->contenders[1])
        return code;
    code = work_compare(work, &samples->difference, fault);
    samples->agree = samples->difference.out <= MOST_OUT_DIFFERENCE && samples->difference.lse <= MOST_LSE_DIFFERENCE;
    return code;
}

static enum mlak_code sample(struct run *run, const struct work *work, uint32_t calls, uint32_t rounds,
                             struct samples *samples, struct mlak_fault *fault)
{
    const uint32_t n = samples->count;
    enum mlak_code code = MLAK_OK;
    for (uint32_t turn = 0; turn < 4 && code == MLAK_OK; turn++) {
        const uint32_t who = (turn + n) % 2; /* ours first, then the peer first */
        struct contender *contender = run->contenders[who];
        if (!contender)
            continue;
        if (turn < 2) {
            code = contender->back_to_back(contender, rounds, &samples->decode[who][n], fault);
            samples->decode[who][n] /= (double)calls * rounds;
            if (code == MLAK_OK && contender->layers)
                code = contender->layers(contender, rounds, &samples->layer[who][n], fault);
            samples->layer[who][n] /= (double)calls * rounds;
        } else {
            code = gpu_flush(&run->gpu, fault);
            if (code == MLAK_OK)
                code = contender->alone(contender, n % work->copies, &samples->alone[who][n], fault);
        }
    }
    samples->mhz[n] = gpu_sm_mhz(&run->gpu);
    samples->count += code == MLAK_OK;
    return code;
}

static enum mlak_code sample_all(struct run *run, const struct work *work, uint32_t calls, double until,
                                 struct samples *samples, struct mlak_fault *fault)
{
    enum mlak_code code = MLAK_OK;
    for (int i = 0; i < 2 && code == MLAK_OK; i++) {
        struct contender *contender = run->contenders[i];
        for (uint32_t n = 0; contender && contender->prepare && n < PREPARES && code == MLAK_OK; n++)
            code = contender->prepare(contender, &samples->prepare[i][n], fault);
    }
    if (code == MLAK_OK)
        code = sample(run, work, calls, 1, samples, fault); /* a first one, which tells how long it takes */
    if (code != MLAK_OK)
        return code;
    const double once = samples->decode[0][0] * calls;
    const uint32_t rounds = once > 0 && once < SAMPLE_NS ? (uint32_t)(SAMPLE_NS / once) + 1 : 1;
    samples->count = 0;
    while (code == MLAK_OK && samples->count < run->options.most_pairs &&
           (samples->count < run->options.pairs || gpu_now() < until))
        code = sample(run, work, calls, rounds, samples, fault);
    return code;
}

static void print_list(const char *key, const double *values, uint32_t count)
{
    printf(",\"%s\":[", key);
    for (uint32_t i = 0; i < count; i++)
        printf("%s%.1f", i ? "," : "", values[i]);
    printf("]");
}

static void print_flag(const char *key, bool flag) { printf(",\"%s\":%s", key, flag ? "true" : "false"); }

/* JSON has no infinity: null. */
static void print_number(const char *key, double value)
{
    if (isfinite(value))
        printf(",\"%s\":%.3g", key, value);
    else
        printf(",\"%s\":null", key);
}

static void print_shape(const struct shape *shape)
{
    bool uniform = true;
    for (uint32_t b = 1; b < shape->batch; b++)
        uniform = uniform && shape->seqlens[b] == shape->seqlens[0];
    printf("\"batch\":%u,\"heads\":%u,\"q_len\":%u,\"seqlens\":[", shape->batch, shape->heads, shape->q_len);
    for (uint32_t b = 0; b < (uniform ? 1 : shape->batch); b++)
        printf("%s%d", b ? "," : "", shape->seqlens[b]);
    printf("]");
}

static void print_samples(const struct run *run, const struct work *work, uint32_t calls, const struct samples *samples)
{
    char key[32];
    printf("{\"type\":\"shape\",");
    print_shape(work->shape);
    printf(",\"keys\":%llu,\"copies\":%u,\"calls\":%u", (unsigned long long)work->keys, work->copies, calls);
    for (int i = 0; i < 2; i++) {
        if (!run->contenders[i])
            continue;
        snprintf(key, sizeof key, "%s_ns", names[i]);
        print_list(key, samples->decode[i], samples->count);
        snprintf(key, sizeof key, "%s_layer_ns", names[i]);
        if (run->contenders[i]->layers)
            print_list(key, samples->layer[i], samples->count);
        snprintf(key, sizeof key, "%s_alone_ns", names[i]);
        print_list(key, samples->alone[i], samples->count);
        snprintf(key, sizeof key, "%s_prepare_ns", names[i]);
        if (run->contenders[i]->prepare)
            print_list(key, samples->prepare[i], PREPARES);
    }
    if (run->contenders[1]) {
        print_number("out_difference", samples->difference.out);
        print_number("lse_difference", samples->difference.lse);
        print_flag("agree", samples->agree);
    }
    printf(",\"sm_mhz\":[");
    for (uint32_t i = 0; i < samples->count && samples->mhz[i]; i++)
        printf("%s%u", i ? "," : "", samples->mhz[i]);
    printf("]}\n");
    fflush(stdout);
}

static void print_skipped(const struct shape *shape, const char *field, const char *why)
{
    printf("{\"type\":\"skipped\",");
    print_shape(shape);
    printf(",\"why\":\"%s: ", field);
    for (; *why; why++)
        putchar(*why == '"' || *why == '\\' || (unsigned char)*why < ' ' ? '\'' : *why);
    printf("\"}\n");
    fflush(stdout);
}

/* MLAK_OK if the two agree; INVALID, already told, if not. A peer that does not take the shape is UNSUPPORTED. */
static enum mlak_code run_shape(struct run *run, const struct shape *shape, double until, struct mlak_fault *fault)
{
    static struct samples samples;
    struct work work;
    memset(&samples, 0, sizeof samples);
    enum mlak_code code = work_init(&work, &run->pool, shape, run->options.cold_bytes, fault);
    if (code != MLAK_OK)
        return code;
    uint32_t calls = work.copies > LEAST_CALLS ? work.copies : LEAST_CALLS;
    for (int i = 0; i < 2 && code == MLAK_OK; i++)
        if (run->contenders[i])
            code = run->contenders[i]->begin(run->contenders[i], &work, calls, fault);
    if (code == MLAK_OK)
        code = compare(run, &work, &samples, fault);
    if (code == MLAK_OK)
        code = sample_all(run, &work, calls, until, &samples, fault);
    if (code == MLAK_OK)
        print_samples(run, &work, calls, &samples);
    for (int i = 0; i < 2; i++)
        if (run->contenders[i])
            run->contenders[i]->end(run->contenders[i]);
    work_deinit(&work);
    if (code == MLAK_OK && run->contenders[1] && !samples.agree)
        code = mlak_fail(fault, MLAK_INVALID, "peer",
                         "the outputs differ by %g and the LSEs by %g, and may by %g and %g: one of the two computes "
                         "something else", samples.difference.out, samples.difference.lse, MOST_OUT_DIFFERENCE,
                         MOST_LSE_DIFFERENCE);
    return code;
}

/* ---- the run ---- */

static struct shape *read_shapes(uint32_t *count)
{
    struct shape *shapes = NULL;
    struct mlak_fault fault;
    char *line = NULL;
    size_t room = 0;
    for (*count = 0; getline(&line, &room, stdin) > 0; ++*count) {
        shapes = reallocarray(shapes, *count + 1, sizeof *shapes);
        if (!shapes || shape_parse(&shapes[*count], line, &fault) != MLAK_OK)
            stop(shapes ? &fault : &(struct mlak_fault){.field = "shape", .message = "no memory"});
    }
    free(line);
    if (*count == 0)
        stop(&(struct mlak_fault){.field = "shape", .message = "the standard input holds none"});
    return shapes;
}

static void open_all(struct run *run, const struct shape *shapes, uint32_t count)
{
    struct mlak_fault fault = {0};
    const struct options *options = &run->options;
    run->backend = mlak_backend(options->device);
    if (!run->backend || !run->backend->time_batches)
        refuse("device", options->device, "give a GPU's UUID, as nvidia-smi -L lists them");
    run->device = run->backend->open(&(struct mlak_options){.device = options->device}, &fault);
    if (!run->device || gpu_open(&run->gpu, options->device, options->cold_bytes, &fault) != MLAK_OK)
        stop(&fault);
    run->options.cold_bytes = run->gpu.flush_bytes;
    run->gpu.has_joins = run->gpu.has_joins && !options->own_edges;
    ours_init(&run->ours, &run->gpu, run->backend, run->device);
    run->contenders[0] = &run->ours.contender;
    if (options->peer) {
        if (peer_init(&run->peer, &run->gpu, options->peer, &fault) != MLAK_OK)
            stop(&fault);
        run->contenders[1] = &run->peer.contender;
    }
    bool measured = options->ceilings.read_gbps == 0;
    uint64_t bytes = measured ? CEILING_BYTES : 0;
    for (uint32_t i = 0; i < count; i++) {
        uint64_t all = shape_kv_bytes(&shapes[i]) * shape_copies(&shapes[i], run->options.cold_bytes);
        bytes = all > bytes ? all : bytes;
    }
    if (pool_init(&run->pool, run->backend, run->device, bytes, &fault) != MLAK_OK)
        stop(&fault);
    if (measured && gpu_ceilings_measure(&run->options.ceilings, &run->gpu, run->pool.memory, bytes, &fault) != MLAK_OK)
        stop(&fault);
    printf("{\"type\":\"run\",\"device\":\"%s\",\"model\":\"%s\",\"processors\":%d,\"ours\":\"%s\",\"peer\":",
           options->device, run->gpu.model, run->gpu.processors, run->backend->variant(run->device));
    printf(options->peer ? "\"%s\"" : "null", options->peer ? run->peer.library->name : "");
    print_flag("graphs", run->gpu.has_graphs);
    print_flag("full_edges", run->gpu.has_graphs && run->gpu.has_joins);
    print_flag("ceilings_measured", measured);
    printf(",\"cold_bytes\":%llu,\"read_gbps\":%.1f,\"tflops\":%.1f}\n",
           (unsigned long long)run->options.cold_bytes, run->options.ceilings.read_gbps, run->options.ceilings.tflops);
    fflush(stdout);
}

static void close_all(struct run *run)
{
    pool_deinit(&run->pool);
    gpu_close(&run->gpu);
    run->backend->close(run->device);
}

int main(int argc, char **argv)
{
    static struct run run;
    run.options = parse(argc, argv);
    uint32_t count;
    struct shape *shapes = read_shapes(&count);
    open_all(&run, shapes, count);
    run.end = gpu_now() + run.options.limit * 1e9;
    int status = 0;
    for (uint32_t i = 0; i < count; i++) {
        struct mlak_fault fault = {0};
        double now = gpu_now();
        if (now >= run.end) {
            print_skipped(&shapes[i], "limit-seconds", "the time was over");
            continue;
        }
        enum mlak_code code = run_shape(&run, &shapes[i], now + (run.end - now) / (count - i), &fault);
        if (code == MLAK_OK)
            continue;
        fprintf(stderr, "mlad-kernel-compare: shape %u: %s: %s\n", i + 1, fault.field, fault.message);
        if (code == MLAK_LOST)
            stop(&fault);
        if (code != MLAK_INVALID)
            print_skipped(&shapes[i], fault.field, fault.message);
        if (code != MLAK_UNSUPPORTED)
            status = 1;
    }
    for (uint32_t i = 0; i < count; i++)
        shape_free(&shapes[i]);
    free(shapes);
    close_all(&run);
    return status;
}
