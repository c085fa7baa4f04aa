/* bench.c - `mlactl bench`: its subcommands, and the plain one: three questions, each answered by two things measured
 * in turn in one run.
 *
 *   how close is the cpu backend to what this machine can do?   direct decode : ceilings
 *   what does the daemon cost a large decode?                   daemon : direct, slice by slice
 *   what does it cost a tiny one?                               one-key decode : raw ping-pong, hundred by hundred
 *                                                               (by rings, and by the socket)
 *
 * On a GPU the first has no ceilings to be answered with, and the others no targets. */
#include "bench.h"
#include "admin.h"
#include "gpu.h"
#include "output.h"
#include "progress.h"
#include "run.h"

#include <math.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum {
    D = 576,
    V = 512,
    MIN_ROUNDS = 5,
    MAX_ROUNDS = 1000,
    MAX_LAUNCHES = 4096,
    ROUND_TRIPS = 20000,
    BURST = 100
};
static const unsigned q_lens[] = {1, 4};
enum { SHAPES = sizeof q_lens / sizeof *q_lens };
static const double target_ceiling = 0.5, target_daemon = 0.97, target_round_trip = 2.0;

struct shape_result { double direct_ns, daemon_ns, alone_ns, ratio; unsigned rounds; };
struct round_trip_result { double decode_p50, decode_p99, socket_p50, socket_p99, raw_p50, raw_p99; unsigned count; };
struct bench {
    const struct ctl *ctl;
    mla_client *client;
    mla_client *by_socket;  /* beside a client that has rings; else NULL */
    struct pingpong *pingpong;
    char device[64], variant[32];
    unsigned threads;   /* 0: a GPU's */
    unsigned batch, keys;
    double slice_s;     /* of one side at a time */
    double load;        /* processes that wanted to run when we began */
    struct direct_rates rates;  /* the best that any part of the run measured: a host may slow a part of it */
    struct shape_result shapes[SHAPES];
    struct round_trip_result round_trip;
};

/* ---- measurements ---- */

struct copies { struct run *runs[BENCH_COPIES]; unsigned count, next; };

static struct run *next_copy(struct copies *copies) { return copies->runs[copies->next++ % copies->count]; }

static bool slice_goes_on(unsigned count, double end)
{
    return count < MAX_LAUNCHES && (count < 3 || (double)bench_now_ns() < end);
}

/* Throughput: two decodes in flight for a slice, so that the daemon always has the next one, as the direct backend has.
 * The median time from completion to completion. */
static int run_in_flight(struct bench *bench, struct copies *copies, double *samples, double *median_ns)
{
    mla_ticket running, waiting;
    unsigned count = 0;
    int code = bench_submit(bench->ctl, next_copy(copies), &running);
    code = code ? code : bench_submit(bench->ctl, next_copy(copies), &waiting);
    code = code ? code : bench_collect(bench->ctl, bench->client, running, NULL); /* warm */
    double from = (double)bench_now_ns(), end = from + bench->slice_s * 1e9;
    while (!code && slice_goes_on(count, end)) {
        running = waiting;
        code = bench_submit(bench->ctl, next_copy(copies), &waiting);
        code = code ? code : bench_collect(bench->ctl, bench->client, running, NULL);
        double now = (double)bench_now_ns();
        samples[count++] = now - from;
        from = now;
    }
    code = code ? code : bench_collect(bench->ctl, bench->client, waiting, NULL);
    *median_ns = code ? 0 : bench_percentile(samples, count, 0.5);
    return code;
}

/* Latency: one decode at a time, its median round trip. */
static int run_alone(struct bench *bench, struct copies *copies, double *samples, double *median_ns)
{
    unsigned count = 0;
    int code = CTL_OK;
    for (double end = (double)bench_now_ns() + bench->slice_s * 1e9; !code && slice_goes_on(count, end); count++)
        code = bench_decode(bench->ctl, next_copy(copies), &samples[count], NULL);
    *median_ns = code ? 0 : bench_percentile(samples, count, 0.5);
    return code;
}

/* Direct and daemon in turn until the time is over. */
static int run_rounds(struct bench *bench, struct direct *direct, struct copies *copies, double seconds,
                      struct shape_result *result)
{
    ctl_autofree double *samples = calloc(MAX_LAUNCHES + 4 * MAX_ROUNDS, sizeof *samples);
    if (!samples)
        return ctl_error(bench->ctl, CTL_FAILED, "out of memory");
    double *direct_ns = samples + MAX_LAUNCHES, *daemon_ns = direct_ns + MAX_ROUNDS, *alone_ns = daemon_ns + MAX_ROUNDS;
    double *ratio = alone_ns + MAX_ROUNDS, end = (double)bench_now_ns() + seconds * 1e9;
    unsigned rounds = 0;
    while (rounds < MIN_ROUNDS || (rounds < MAX_ROUNDS && (double)bench_now_ns() < end)) {
        struct ctl_fault fault;
        if (direct_run(direct, bench->slice_s, &direct_ns[rounds], &fault))
            return ctl_error(bench->ctl, CTL_FAILED, "%s", fault.text);
        int code = run_in_flight(bench, copies, samples, &daemon_ns[rounds]);
        code = code ? code : run_alone(bench, copies, samples, &alone_ns[rounds]);
        if (code)
            return code;
        ratio[rounds] = direct_ns[rounds] / daemon_ns[rounds];
        rounds++;
    }
    result->rounds = rounds;
    result->direct_ns = bench_percentile(direct_ns, rounds, 0.5);
    result->daemon_ns = bench_percentile(daemon_ns, rounds, 0.5);
    result->alone_ns = bench_percentile(alone_ns, rounds, 0.5);
    result->ratio = bench_percentile(ratio, rounds, 0.5);
    return CTL_OK;
}

static void note_rates(struct direct_rates *best, const struct direct_rates *rates)
{
    best->read_gb_s = fmax(best->read_gb_s, rates->read_gb_s);
    best->matmul_gflop_s = fmax(best->matmul_gflop_s, rates->matmul_gflop_s);
    memcpy(best->matmul, rates->matmul, sizeof best->matmul);
}

static int measure_shape(struct bench *bench, unsigned q_len, double seconds, struct shape_result *result)
{
    const struct bench_batch batch = {bench->batch, BENCH_HEADS, q_len, bench->keys};
    struct copies copies = {.count = bench_copies(bench->device, &batch)};
    const struct bench_shape shape = {bench->batch, bench->keys, q_len, copies.count};
    struct direct *direct = NULL;
    struct ctl_fault fault;
    int code = CTL_OK;
    progress("measuring q_len %u", q_len);
    for (unsigned i = 0; i < copies.count && !code; i++)
        code = bench_bind(bench->ctl, bench->client, &batch, &copies.runs[i]);
    if (!code && direct_new(bench->device, bench->variant, bench->threads, &shape, &direct, &fault))
        code = ctl_error(bench->ctl, CTL_FAILED, "%s", fault.text);
    if (!code) {
        note_rates(&bench->rates, direct_rates(direct));
        code = run_rounds(bench, direct, &copies, seconds, result);
    }
    direct_free(direct);
    for (unsigned i = 0; i < copies.count; i++)
        run_free(copies.runs[i]);
    return code;
}

static int measure_round_trip(struct bench *bench, double seconds, struct round_trip_result *result)
{
    run_auto struct run *run = NULL;
    run_auto struct run *socket_run = NULL;
    ctl_autofree double *samples = calloc(3 * ROUND_TRIPS, sizeof *samples);
    double *decode = samples, *raw = samples + ROUND_TRIPS, *by_socket = raw + ROUND_TRIPS;
    struct ctl_fault fault;
    if (!samples)
        return ctl_error(bench->ctl, CTL_FAILED, "out of memory");
    progress("measuring the round trip");
    int code = bench_bind(bench->ctl, bench->client, &(struct bench_batch){1, 1, 1, 1}, &run);
    if (!code && bench->by_socket)
        code = bench_bind(bench->ctl, bench->by_socket, &(struct bench_batch){1, 1, 1, 1}, &socket_run);
    if (!code)
        code = bench_decode(bench->ctl, run, &decode[0], NULL); /* warm */
    double end = (double)bench_now_ns() + seconds * 1e9;
    unsigned count = 0;
    while (!code && count + BURST <= ROUND_TRIPS && (count == 0 || (double)bench_now_ns() < end)) {
        for (unsigned i = 0; i < BURST && !code; i++)
            code = bench_decode(bench->ctl, run, &decode[count + i], NULL);
        for (unsigned i = 0; i < BURST && !code && socket_run; i++)
            code = bench_decode(bench->ctl, socket_run, &by_socket[count + i], NULL);
        for (unsigned i = 0; i < BURST && !code; i++)
            if (pingpong_once(bench->pingpong, &raw[count + i], &fault))
                code = ctl_error(bench->ctl, CTL_FAILED, "%s", fault.text);
        count += BURST;
    }
    if (code)
        return code;
    *result = (struct round_trip_result){bench_percentile(decode, count, 0.5), bench_percentile(decode, count, 0.99),
                                         bench_percentile(by_socket, count, 0.5),
                                         bench_percentile(by_socket, count, 0.99),
                                         bench_percentile(raw, count, 0.5), bench_percentile(raw, count, 0.99), count};
    return CTL_OK;
}

/* The datagrams of a one-key decode, as libmla and the worker encode them. */
static int start_pingpong(struct bench *bench)
{
    uint8_t bytes[512];
    struct ctl_fault fault;
    long request = mlap_encode(bytes, sizeof bytes, MLAP_SUBMIT, 1000, &(struct mlap_submit){.plan = 1});
    long reply =
        mlap_encode(bytes, sizeof bytes, MLAP_DONE, 1000,
                    &(struct mlap_done){.receive_ns = 5000, .queue_ns = 1000, .kernel_ns = 5000, .kv_tokens = 1});
    if (pingpong_new((size_t)request, (size_t)reply, &bench->pingpong, &fault))
        return ctl_error(bench->ctl, CTL_FAILED, "%s", fault.text);
    return CTL_OK;
}

/* ---- report ---- */

static double round_trip_ratio(const struct round_trip_result *r) { return r->decode_p50 / r->raw_p50; }
static double kv_gb_s(const struct bench *bench, double ns) { return (double)bench->batch * bench->keys * D * 2 / ns; }

static double tflop_s(const struct bench *bench, unsigned i, double ns)
{
    return 2.0 * (D + V) * BENCH_HEADS * q_lens[i] * bench->batch * bench->keys / ns / 1e3;
}

static const char *transport(const struct bench *bench) { return bench->by_socket ? "rings" : "socket"; }

static bool has_ceilings(const struct bench *bench) { return bench->rates.read_gb_s > 0; }

/* The share of the ceiling that binds: the larger of the times that reading the KV and that the arithmetic take at
 * best. */
static double of_ceiling(const struct bench *bench, unsigned i, const char **ceiling)
{
    const double direct_ns = bench->shapes[i].direct_ns;
    const double read = kv_gb_s(bench, direct_ns) / bench->rates.read_gb_s;
    const double work = tflop_s(bench, i, direct_ns) * 1e3 / bench->rates.matmul_gflop_s;
    *ceiling = read > work ? "read" : bench->rates.matmul;
    return fmax(read, work);
}

/* Beside its target, which only cpu has. */
static void mark(const struct bench *bench, struct table *table, bool good, const char *format, double value)
{
    char text[32];
    snprintf(text, sizeof text, format, value);
    if (has_ceilings(bench))
        table_cell(table, good ? GOOD : BAD, "%s %s", text, good ? "pass" : "MISS");
    else
        table_cell(table, PLAIN, "%s", text);
}

static void report_text(const struct bench *bench)
{
    printf("%s, variant %s", bench->device, bench->variant);
    if (bench->threads > 0)
        printf(", %u threads", bench->threads);
    printf(", by %s", transport(bench));
    printf("; bf16, H=%d, B=%u, K=%u, pages of %d\n\n", BENCH_HEADS, bench->batch, bench->keys, BENCH_PAGE);
    if (bench->load >= 1)
        output_print(WARN, "  the machine was busy (load %.1f): these figures mean little\n\n", bench->load);
    if (has_ceilings(bench))
        printf("  ceilings: read %.1f GB/s, %s %.0f GFLOP/s\n\n", bench->rates.read_gb_s, bench->rates.matmul,
               bench->rates.matmul_gflop_s);
    char headings[256];
    snprintf(headings, sizeof headings,
             ">Q_LEN|>ROUNDS|>DIRECT|>DAEMON|>OVERHEAD|>ONE AT A TIME|>ITS OVERHEAD|>DIRECT KV GB/S|>DAEMON KV GB/S|"
             ">DIRECT TFLOP/S|%s",
             has_ceilings(bench) ? "BINDS|>OF CEILING, >= 0.5|>DAEMON/DIRECT, >= 0.97" : ">DAEMON/DIRECT");
    struct table *table = table_new(headings);
    for (unsigned i = 0; i < SHAPES; i++) {
        const struct shape_result *shape = &bench->shapes[i];
        table_cell(table, PLAIN, "%u", q_lens[i]);
        table_cell(table, PLAIN, "%u", shape->rounds);
        table_cell(table, PLAIN, "%s", human_ns(shape->direct_ns).s);
        table_cell(table, PLAIN, "%s", human_ns(shape->daemon_ns).s);
        table_cell(table, PLAIN, "%.1f us", (shape->daemon_ns - shape->direct_ns) / 1e3);
        table_cell(table, PLAIN, "%s", human_ns(shape->alone_ns).s);
        table_cell(table, PLAIN, "%.1f us", (shape->alone_ns - shape->direct_ns) / 1e3);
        table_cell(table, PLAIN, "%.1f", kv_gb_s(bench, shape->direct_ns));
        table_cell(table, PLAIN, "%.1f", kv_gb_s(bench, shape->daemon_ns));
        table_cell(table, PLAIN, "%.2f", tflop_s(bench, i, shape->direct_ns));
        if (has_ceilings(bench)) {
            const char *ceiling;
            double share = of_ceiling(bench, i, &ceiling);
            table_cell(table, PLAIN, "%s", ceiling);
            mark(bench, table, share >= target_ceiling, "%.2f", share);
        }
        mark(bench, table, shape->ratio >= target_daemon, "%.3f", shape->ratio);
    }
    table_print(table);
    const struct round_trip_result *r = &bench->round_trip;
    putchar('\n');
    table = table_new(has_ceilings(bench) ? "ROUND TRIP|>COUNT|>P50|>P99|>RATIO OF P50, <= 2.0"
                                          : "ROUND TRIP|>COUNT|>P50|>P99|>RATIO OF P50");
    table_cell(table, PLAIN, "one-key decode, %s", transport(bench));
    table_cell(table, PLAIN, "%u", r->count);
    table_cell(table, PLAIN, "%s", human_ns(r->decode_p50).s);
    table_cell(table, PLAIN, "%s", human_ns(r->decode_p99).s);
    mark(bench, table, round_trip_ratio(r) <= target_round_trip, "%.2f", round_trip_ratio(r));
    if (bench->by_socket) {
        table_cell(table, PLAIN, "one-key decode, socket");
        table_cell(table, PLAIN, "%u", r->count);
        table_cell(table, PLAIN, "%s", human_ns(r->socket_p50).s);
        table_cell(table, PLAIN, "%s", human_ns(r->socket_p99).s);
        table_cell(table, PLAIN, "%.2f", r->socket_p50 / r->raw_p50);
    }
    table_cell(table, PLAIN, "raw socket");
    table_cell(table, PLAIN, "%u", r->count);
    table_cell(table, PLAIN, "%s", human_ns(r->raw_p50).s);
    table_cell(table, PLAIN, "%s", human_ns(r->raw_p99).s);
    table_cell(table, PLAIN, " ");
    table_print(table);
}

static void report_json(const struct bench *bench)
{
    cJSON *root = cJSON_CreateObject();
    cJSON_AddStringToObject(root, "device", bench->device);
    cJSON_AddStringToObject(root, "variant", bench->variant);
    if (bench->threads > 0)
        cJSON_AddNumberToObject(root, "threads", bench->threads);
    cJSON_AddStringToObject(root, "transport", transport(bench));
    cJSON_AddNumberToObject(root, "load", bench->load);
    cJSON_AddNumberToObject(root, "batch", bench->batch);
    cJSON_AddNumberToObject(root, "heads", BENCH_HEADS);
    cJSON_AddNumberToObject(root, "kv_len", bench->keys);
    cJSON_AddNumberToObject(root, "page_size", BENCH_PAGE);
    if (has_ceilings(bench)) {
        cJSON *ceilings = cJSON_AddObjectToObject(root, "ceilings");
        cJSON_AddNumberToObject(ceilings, "read_gb_s", bench->rates.read_gb_s);
        cJSON_AddNumberToObject(ceilings, "matmul_gflop_s", bench->rates.matmul_gflop_s);
        cJSON_AddStringToObject(ceilings, "matmul", bench->rates.matmul);
    }
    cJSON *cases = cJSON_AddArrayToObject(root, "cases");
    for (unsigned i = 0; i < SHAPES; i++) {
        const struct shape_result *shape = &bench->shapes[i];
        cJSON *entry = cJSON_CreateObject();
        cJSON_AddNumberToObject(entry, "q_len", q_lens[i]);
        cJSON_AddNumberToObject(entry, "rounds", shape->rounds);
        cJSON_AddNumberToObject(entry, "direct_ns", shape->direct_ns);
        cJSON_AddNumberToObject(entry, "daemon_ns", shape->daemon_ns);
        cJSON_AddNumberToObject(entry, "overhead_us", (shape->daemon_ns - shape->direct_ns) / 1e3);
        cJSON_AddNumberToObject(entry, "one_at_a_time_ns", shape->alone_ns);
        cJSON_AddNumberToObject(entry, "one_at_a_time_overhead_us", (shape->alone_ns - shape->direct_ns) / 1e3);
        cJSON_AddNumberToObject(entry, "direct_kv_gb_s", kv_gb_s(bench, shape->direct_ns));
        cJSON_AddNumberToObject(entry, "daemon_kv_gb_s", kv_gb_s(bench, shape->daemon_ns));
        cJSON_AddNumberToObject(entry, "direct_tflop_s", tflop_s(bench, i, shape->direct_ns));
        cJSON_AddNumberToObject(entry, "daemon_over_direct", shape->ratio);
        if (has_ceilings(bench)) {
            const char *ceiling;
            double share = of_ceiling(bench, i, &ceiling);
            cJSON_AddStringToObject(entry, "binding_ceiling", ceiling);
            cJSON_AddNumberToObject(entry, "of_ceiling", share);
            cJSON_AddBoolToObject(entry, "of_ceiling_pass", share >= target_ceiling);
            cJSON_AddBoolToObject(entry, "daemon_over_direct_pass", shape->ratio >= target_daemon);
        }
        cJSON_AddItemToArray(cases, entry);
    }
    const struct round_trip_result *r = &bench->round_trip;
    cJSON *trip = cJSON_AddObjectToObject(root, "round_trip");
    cJSON_AddNumberToObject(trip, "count", r->count);
    cJSON_AddNumberToObject(trip, "decode_p50_ns", r->decode_p50);
    cJSON_AddNumberToObject(trip, "decode_p99_ns", r->decode_p99);
    if (bench->by_socket) {
        cJSON_AddNumberToObject(trip, "socket_p50_ns", r->socket_p50);
        cJSON_AddNumberToObject(trip, "socket_p99_ns", r->socket_p99);
    }
    cJSON_AddNumberToObject(trip, "raw_p50_ns", r->raw_p50);
    cJSON_AddNumberToObject(trip, "raw_p99_ns", r->raw_p99);
    cJSON_AddNumberToObject(trip, "ratio", round_trip_ratio(r));
    if (has_ceilings(bench))
        cJSON_AddBoolToObject(trip, "ratio_pass", round_trip_ratio(r) <= target_round_trip);
    output_json(root);
}

/* ---- the run ---- */

/* The direct backend gets the threads and the variant that the worker has. */
static int read_device(struct bench *bench)
{
    admin_auto struct admin *admin = NULL;
    ctl_autofree struct mlap_status_reply *status = NULL;
    struct ctl_fault fault;
    int code = admin_new(bench->ctl, &admin, &fault);
    if (!code)
        code = admin_status(admin, &status, &fault);
    if (code)
        return ctl_error(bench->ctl, code, "%s", fault.text);
    const struct mlap_device *device = admin_find(status, bench->device);
    if (!device)
        return ctl_error(bench->ctl, CTL_FAILED, "device %s is no longer served", bench->device);
    snprintf(bench->variant, sizeof bench->variant, "%s", device->variant);
    bench->threads = device->threads;
    return CTL_OK;
}

/* The client that is measured, and one beside it that has no rings if it has. */
static int connect_both(struct bench *bench)
{
    const char *device = ctl_value(bench->ctl, "--device"), *way = ctl_value(bench->ctl, "--transport");
    bool rings = way && strcmp(way, "rings") == 0;
    if (way && !rings && strcmp(way, "socket") != 0)
        return ctl_error(bench->ctl, CTL_USAGE, "--transport takes rings or socket, not %s", way);
    mla_transport wanted = rings ? MLA_TRANSPORT_RINGS : way ? MLA_TRANSPORT_SOCKET : MLA_TRANSPORT_AUTO;
    int code = run_connect_by(bench->ctl, device, wanted, &bench->client);
    if (code)
        return code;
    if (mla_transport_used(bench->client) == MLA_TRANSPORT_RINGS)
        return run_connect_by(bench->ctl, mla_device(bench->client), MLA_TRANSPORT_SOCKET, &bench->by_socket);
    return rings ? ctl_error(bench->ctl, CTL_FAILED, "the daemon has no rings for this session; its log says more")
                 : CTL_OK;
}

/* Sizes that were not given are the device's. */
static int choose_device(struct bench *bench)
{
    int code = connect_both(bench);
    if (code)
        return code;
    snprintf(bench->device, sizeof bench->device, "%s", mla_device(bench->client));
    bool gpu = gpu_named(bench->device);
    if (!gpu && strcmp(bench->device, "cpu") != 0)
        return ctl_error(bench->ctl, CTL_FAILED, "device %s is not measured; serve and name cpu or a GPU",
                         bench->device);
    bench->batch = bench->batch ? bench->batch : gpu ? 64 : 8;
    bench->keys = bench->keys ? bench->keys : 4096;
    return read_device(bench);
}

static int measure_all(struct bench *bench, double seconds)
{
    int code = choose_device(bench);
    if (!code)
        code = start_pingpong(bench);
    if (code)
        return code;
    for (unsigned i = 0; i < SHAPES && !code; i++)
        code = measure_shape(bench, q_lens[i], seconds * 0.35, &bench->shapes[i]);
    if (!code)
        code = measure_round_trip(bench, seconds * 0.3, &bench->round_trip);
    return code;
}

static int bench_device(const struct ctl *ctl)
{
    uint64_t seconds = 10, batch = 0, keys = 0;
    if (ctl_number(ctl, "--seconds", 1, 3600, &seconds) || ctl_number(ctl, "--batch", 1, 1024, &batch) ||
        ctl_number(ctl, "--kv-len", 1, 1 << 20, &keys))
        return CTL_USAGE;
    struct bench bench = {.ctl = ctl, .batch = (unsigned)batch, .keys = (unsigned)keys,
                          .slice_s = fmin(fmax((double)seconds / 40, 0.02), 0.25)};
    if (getloadavg(&bench.load, 1) != 1)
        bench.load = 0;
    int code = measure_all(&bench, (double)seconds);
    pingpong_free(bench.pingpong);
    mla_close(bench.client);
    mla_close(bench.by_socket);
    progress_stop();
    if (!code && ctl->json)
        report_json(&bench);
    else if (!code)
        report_text(&bench);
    return code;
}

/* ---- the subcommands ---- */

int ctl_bench(const struct ctl *ctl)
{
    static const struct { const char *name, *options; int (*run)(const struct ctl *ctl); } kinds[] = {
        {"device", "--device --batch --kv-len --seconds --transport", bench_device},
        {"tenants", "--device --batch --kv-len --heads --q-len --tenants --seconds", bench_tenants},
        {"latency", "--device --seconds", bench_latency},
        {"step", "--device --batch --kv-len --heads --q-len --layers --seconds", bench_step}};
    const char *name = ctl->arguments[0] ? ctl->arguments[0] : "device";
    for (unsigned i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        if (strcmp(kinds[i].name, name) != 0)
            continue;
        for (const struct ctl_option *option = ctl->command->options; option->name; option++)
            if (ctl_value(ctl, option->name) && !strstr(kinds[i].options, option->name))
                return ctl_error(ctl, CTL_USAGE, "bench %s takes no %s, only %s", name, option->name, kinds[i].options);
        return kinds[i].run(ctl);
    }
    return ctl_error(ctl, CTL_USAGE, "bench %s: there are device (the default), tenants, latency and step", name);
}
