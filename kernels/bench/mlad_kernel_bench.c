/* mlad_kernel_bench.c - times a backend by direct calls, next to what the machine could do at most. Run by hand, and by
 * `mlactl bench`, for which it prints a line of JSON for each result. */
#include "bench_case.h"

#include <errno.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct options {
    const char *device, *variant;
    uint32_t threads, types;            /* types: UINT32_MAX, all */
    struct shape shape;                 /* q_len 0: 1 and 4 */
    double seconds;
    bool json, serve;
};

static const char usage[] =
    "usage: mlad-kernel-bench [OPTION...]\n"
    "Times decodes by direct calls of a backend, and prints the ceilings of the machine first: read bandwidth and the\n"
    "rates of the vector instructions, on the same threads. KV is cold: copies of the batch are used in turn.\n"
    "  --device NAME       cpu (default), reference, or a GPU's UUID (GPU-...), which is timed by its own events over\n"
    "                      replays of a CUDA graph of all copies, and has no ceilings\n"
    "  --variant NAME      generic, avx2, avx512 or amx; of a GPU mma or wgmma; the best of this device by default\n"
    "  --threads N         default: one for each processor\n"
    "  --dtype NAME        bf16, fp16, e4m3, bf16_e4m3 or bf16_656 (q and KV types); all by default\n"
    "  --q-len N           query tokens of a request, 1..64; default: 1, then 4\n"
    "  --batch N           default 8\n"
    "  --heads N           default 16\n"
    "  --kv-len N          default 4096\n"
    "  --page-size N       default 64\n"
    "  --copies N          of the batch, 1..4096; default: as many as exceed the last-level cache twice\n"
    "  --seconds S         of each case, default 1\n"
    "  --json              a line of JSON for each result\n"
    "  --serve             with --dtype and --q-len: run the case once for each line on standard input, which holds\n"
    "                      the seconds to run; implies --json\n"
    "  --help\n";

static _Noreturn void refuse(const char *option, const char *text, const char *remedy)
{
    fprintf(stderr, "mlad-kernel-bench: --%s %s: %s\n", option, text, remedy);
    exit(2);
}

static uint32_t number(const char *option, const char *text, uint32_t least, uint32_t most)
{
    char *end, remedy[64];
    errno = 0;
    unsigned long value = strtoul(text, &end, 10);
    if (text[0] < '0' || text[0] > '9' || *end != '\0' || errno != 0 || value < least || value > most) {
        snprintf(remedy, sizeof remedy, "give a whole number from %u to %u", least, most);
        refuse(option, text, remedy);
    }
    return (uint32_t)value;
}

static bool parse_seconds(const char *text, double *seconds)
{
    char *end;
    *seconds = strtod(text, &end);
    return end != text && (*end == '\0' || *end == '\n') && *seconds > 0 && *seconds <= 3600;
}

static uint32_t types_of(const char *name)
{
    for (uint32_t i = 0; shape_types_name(i) != NULL; i++)
        if (strcmp(name, shape_types_name(i)) == 0)
            return i;
    refuse("dtype", name, "give bf16, fp16, e4m3, bf16_e4m3 or bf16_656");
}

static struct options parse(int argc, char **argv)
{
    enum { DEVICE = 256, VARIANT, THREADS, DTYPE, Q_LEN, BATCH, HEADS, KV_LEN, PAGE_SIZE, COPIES, SECONDS, JSON, SERVE,
           HELP };
    static const struct option table[] = {
        {"device", 1, NULL, DEVICE},       {"variant", 1, NULL, VARIANT},
        {"threads", 1, NULL, THREADS},     {"dtype", 1, NULL, DTYPE},
        {"q-len", 1, NULL, Q_LEN},         {"batch", 1, NULL, BATCH},
        {"heads", 1, NULL, HEADS},         {"kv-len", 1, NULL, KV_LEN},
        {"page-size", 1, NULL, PAGE_SIZE}, {"copies", 1, NULL, COPIES},
        {"seconds", 1, NULL, SECONDS},     {"json", 0, NULL, JSON},
        {"serve", 0, NULL, SERVE},         {"help", 0, NULL, HELP},
        {NULL, 0, NULL, 0},
    };
    struct options options = {.device = "cpu", .types = UINT32_MAX, .seconds = 1,
                              .shape = {.batch = 8, .heads = 16, .kv_len = 4096, .page_size = 64}};
    int option;
    while ((option = getopt_long(argc, argv, "", table, NULL)) != -1) {
        switch (option) {
        case DEVICE: options.device = optarg; break;
        case VARIANT: options.variant = optarg; break;
        case THREADS: options.threads = number("threads", optarg, 1, 4096); break;
        case DTYPE: options.types = types_of(optarg); break;
        case Q_LEN: options.shape.q_len = number("q-len", optarg, 1, MLAK_MAX_Q); break;
        case BATCH: options.shape.batch = number("batch", optarg, 1, MLAK_MAX_BATCH); break;
        case HEADS: options.shape.heads = number("heads", optarg, 1, MLAK_MAX_HEADS); break;
        case KV_LEN: options.shape.kv_len = number("kv-len", optarg, 1, 1 << 24); break;
        case PAGE_SIZE: options.shape.page_size = number("page-size", optarg, 1, MLAK_MAX_PAGE); break;
        case COPIES: options.shape.copies = number("copies", optarg, 1, 4096); break;
        case SECONDS:
            if (!parse_seconds(optarg, &options.seconds))
                refuse("seconds", optarg, "give a number above 0, to 3600");
            break;
        case JSON: options.json = true; break;
        case SERVE: options.serve = options.json = true; break;
        case HELP: fputs(usage, stdout); exit(0);
        default: fputs("try mlad-kernel-bench --help\n", stderr); exit(2);
        }
    }
    if (optind < argc)
        refuse("help", argv[optind], "there are no arguments besides options");
    if (options.serve && (options.types == UINT32_MAX || options.shape.q_len == 0))
        refuse("serve", "", "needs --dtype and --q-len, to say which case");
    return options;
}

/* Of the last-level cache that KV has to be larger than. */
static size_t cache_bytes(const struct mlak_backend *backend)
{
    if (backend->time_batches != NULL)
        return 128 << 20; /* no GPU served has more L2 */
    long size = sysconf(_SC_LEVEL3_CACHE_SIZE);
    return size > 16 << 20 ? size < 256 << 20 ? (size_t)size : 256 << 20 : 16 << 20;
}

/* A GPU has none. */
static bool has_ceilings(const struct ceilings *ceilings) { return ceilings->rate[CEILING_READ] > 0; }

static void print_ceilings(const struct ceilings *ceilings, uint32_t threads, const char *device, const char *variant,
                           bool json)
{
    bool any = has_ceilings(ceilings);
    if (json)
        printf("{\"type\":\"ceilings\",\"device\":\"%s\",\"variant\":\"%s\",\"threads\":%u", device, variant, threads);
    else if (any)
        printf("%s, variant %s, %u thread%s. Ceilings:\n", device, variant, threads, threads == 1 ? "" : "s");
    else
        printf("%s, variant %s\n", device, variant);
    for (int i = 0; i < CEILING_COUNT; i++) {
        const char *name = ceiling_name((enum ceiling)i), *unit = i == CEILING_READ ? "GB/s" : "GFLOP/s";
        if (ceilings->rate[i] == 0)
            continue;
        if (json)
            printf(",\"%s\":%.1f", name, ceilings->rate[i]);
        else
            printf("  %-12s %8.1f %s\n", name, ceilings->rate[i], unit);
    }
    if (json)
        printf("}\n");
    else
        printf("%-10s %5s %5s %5s %6s %5s %10s %10s %10s %8s %9s%s\n", "dtype", "batch", "heads", "q_len", "kv_len",
               "page", "median us", "min us", "p90 us", "KV GB/s", any ? "GFLOP/s" : "TFLOP/s",
               any ? "  of the ceiling" : "");
    fflush(stdout);
}

static void print_case(const struct options *options, const struct shape *shape, const struct ceilings *ceilings,
                       const char *variant, const struct timing *timing)
{
    double least = 0, gflops = timing->flop / timing->median;
    printf(options->json
               ? "{\"type\":\"case\",\"dtype\":\"%s\",\"batch\":%u,\"heads\":%u,\"q_len\":%u,\"kv_len\":%u,"
                 "\"page_size\":%u,\"median_us\":%.2f,\"min_us\":%.2f,\"p90_us\":%.2f,\"kv_gbps\":%.2f,"
               : "%-10s %5u %5u %5u %6u %5u %10.1f %10.1f %10.1f %8.2f ",
           shape_types_name(shape->types), shape->batch, shape->heads, shape->q_len, shape->kv_len, shape->page_size,
           timing->median / 1e3, timing->least / 1e3, timing->p90 / 1e3, timing->bytes / timing->median);
    if (has_ceilings(ceilings)) {
        enum ceiling ceiling = binding_ceiling(ceilings, variant, shape->types, timing, &least);
        printf(options->json ? "\"gflops\":%.1f,\"fraction\":%.3f,\"ceiling\":\"%s\"," : "%9.1f  %.3f of %s", gflops,
               least / timing->median, ceiling_name(ceiling));
    } else {
        printf(options->json ? "\"tflops\":%.3f," : "%9.1f ", gflops / 1e3);
    }
    printf(options->json ? "\"launches\":%u}\n" : " (%u launches)\n", timing->launches);
    fflush(stdout);
}

struct bench { const struct mlak_backend *backend; struct mlak_device *device; struct ceilings ceilings; };

/* One case, once; or, serving, once for each line. */
static int run_case(const struct bench *bench, const struct options *options, const struct shape *shape)
{
    struct mlak_fault fault = {0};
    struct timing timing;
    struct bench_case *bench_case =
        bench_case_new(shape, bench->backend, bench->device, cache_bytes(bench->backend), &fault);
    if (bench_case == NULL) {
        fprintf(stderr, "mlad-kernel-bench: %s: %s\n", fault.field, fault.message);
        return 1;
    }
    char line[64];
    double seconds = options->seconds;
    int status = 0;
    while (status == 0 && (!options->serve || fgets(line, sizeof line, stdin) != NULL)) {
        if (options->serve && !parse_seconds(line, &seconds)) {
            fprintf(stderr, "mlad-kernel-bench: a line holds the seconds to run, such as 0.5\n");
            status = 2;
        } else if (bench_case_run(bench_case, seconds, &timing) != MLAK_OK) {
            fprintf(stderr, "mlad-kernel-bench: no memory to launch\n");
            status = 1;
        } else {
            print_case(options, shape, &bench->ceilings, bench->backend->variant(bench->device), &timing);
        }
        if (!options->serve)
            break;
    }
    bench_case_free(bench_case);
    return status;
}

static int run_cases(const struct bench *bench, const struct options *options)
{
    static const uint32_t q_lens[] = {1, 4};
    for (uint32_t types = 0; shape_types_name(types) != NULL; types++) {
        if (options->types != UINT32_MAX && options->types != types)
            continue;
        for (uint32_t i = 0; i < 2; i++) {
            struct shape shape = options->shape;
            shape.types = types;
            shape.q_len = options->shape.q_len > 0 ? options->shape.q_len : q_lens[i];
            int status = run_case(bench, options, &shape);
            if (status != 0)
                return status;
            if (options->shape.q_len > 0)
                break;
        }
    }
    return 0;
}

int main(int argc, char **argv)
{
    struct options options = parse(argc, argv);
    struct mlak_fault fault = {0};
    struct bench bench = {.backend = mlak_backend(options.device)};
    if (bench.backend == NULL)
        refuse("device", options.device, "there is no such device; give cpu, reference or a GPU's UUID");
    if (options.threads > 0 && bench.backend->time_batches != NULL)
        refuse("threads", "", "a GPU computes with none of ours; leave it out");
    bench.device = bench.backend->open(
        &(struct mlak_options){.threads = options.threads, .variant = options.variant, .device = options.device},
        &fault);
    if (bench.device == NULL) {
        fprintf(stderr, "mlad-kernel-bench: %s: %s\n", fault.field, fault.message);
        return 1;
    }
    uint32_t threads = bench.backend->threads(bench.device); /* 0: none of ours compute */
    struct mlak_pool *pool = mlak_pool_new(threads > 0 ? threads : 1);
    int status = 1;
    if (pool == NULL || (threads > 0 && !ceilings_measure(&bench.ceilings, pool, cache_bytes(bench.backend)))) {
        fprintf(stderr, "mlad-kernel-bench: no memory to measure the ceilings\n");
    } else {
        print_ceilings(&bench.ceilings, threads, options.device, bench.backend->variant(bench.device),
                       options.json);
        status = run_cases(&bench, &options);
    }
    mlak_pool_free(pool);
    bench.backend->close(bench.device);
    return status;
}
