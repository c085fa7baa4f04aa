/* bench_tenants.c - `mlactl bench tenants`: processes that share a device, each with a small batch of its own and two
 * decodes in flight. Slices with one of them at work and slices with all of them follow each other.
 *
 * A tenant is a child with a socket to us: it says that it is ready, then for each slice reads how long it is to run
 * and answers with what it did. Latencies lie in memory that we share. A child ends when its socket does. */
#include "admin.h"
#include "bench.h"
#include "progress.h"
#include "wire_json.h"

#include <errno.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

enum { MOST_TENANTS = 256, MOST_SAMPLES = 1 << 14, ROUNDS = 5, MOST_KEPT = 1 << 21 };

struct answer { double seconds; uint64_t batches; uint32_t n_samples; int32_t code; };
struct tenant { pid_t pid; int socket; };

/* Of slices with one tenant, or with all. */
struct load {
    double per_s[ROUNDS];                       /* of all tenants together */
    double tenant_s[MOST_TENANTS];              /* each one's batches over all rounds, then per second */
    double *samples;                            /* nanoseconds from completion to completion */
    unsigned n_samples;
    double median_s, p50_ns, p99_ns, least_s, most_s;
};

struct tenants {
    const struct ctl *ctl;
    char device[64];
    struct bench_batch batch;
    unsigned count;
    struct tenant all[MOST_TENANTS];
    double (*shared)[MOST_SAMPLES];             /* [count] */
    struct load alone, together;
    double parts_per_launch;                    /* while all are at work; NaN: not counted */
};

/* ---- a tenant ---- */

static int run_slice(const struct ctl *ctl, struct run *const *copies, unsigned n_copies, double seconds,
                     double *samples, struct answer *answer)
{
    mla_client *client = copies[0]->client;
    mla_ticket running, waiting;
    unsigned next = 0;
    int code = bench_submit(ctl, copies[next++ % n_copies], &running);
    code = code ? code : bench_submit(ctl, copies[next++ % n_copies], &waiting);
    code = code ? code : bench_collect(ctl, client, running, NULL);
    const double from = (double)bench_now_ns();
    double then = from;
    while (!code && then < from + seconds * 1e9) {
        running = waiting;
        code = bench_submit(ctl, copies[next++ % n_copies], &waiting);
        code = code ? code : bench_collect(ctl, client, running, NULL);
        double now = (double)bench_now_ns();
        if (answer->n_samples < MOST_SAMPLES)
            samples[answer->n_samples++] = now - then;
        answer->batches++;
        then = now;
    }
    answer->seconds = (then - from) / 1e9;
    return code ? code : bench_collect(ctl, client, waiting, NULL);
}

static int serve(const struct tenants *tenants, int socket, double *samples)
{
    struct run *copies[BENCH_COPIES] = {0};
    unsigned n_copies = bench_copies(tenants->device, &tenants->batch);
    client_auto mla_client *client = NULL;
    struct answer answer = {0};
    double seconds;
    int code = run_connect(tenants->ctl, tenants->device, &client);
    for (unsigned i = 0; i < n_copies && !code; i++)
        code = bench_bind(tenants->ctl, client, &tenants->batch, &copies[i]);
    for (unsigned i = 0; i < n_copies && !code; i++)
        code = bench_decode(tenants->ctl, copies[i], &seconds, NULL); /* warm */
    do {
        answer.code = code;
        if (send(socket, &answer, sizeof answer, MSG_NOSIGNAL) < 0 || code)
            break;
        answer = (struct answer){0};
        if (recv(socket, &seconds, sizeof seconds, 0) != sizeof seconds)
            break;
        code = run_slice(tenants->ctl, copies, n_copies, seconds, samples, &answer);
    } while (true);
    for (unsigned i = 0; i < n_copies; i++)
        run_free(copies[i]);
    return code;
}

/* Nothing of libmla or of a GPU is in use yet: a child may use both. */
static int start(struct tenants *tenants)
{
    pid_t parent = getpid();
    struct ctl quiet = *tenants->ctl;
    quiet.json = false; /* stdout is the parent's alone */
    for (unsigned i = 0; i < tenants->count; i++) {
        int ends[2];
        if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) < 0)
            return ctl_error(tenants->ctl, CTL_FAILED, "cannot make a socket pair: %s", strerror(errno));
        tenants->all[i] = (struct tenant){fork(), ends[0]};
        if (tenants->all[i].pid == 0) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            for (unsigned j = 0; j <= i; j++)
                close(tenants->all[j].socket);
            tenants->ctl = &quiet;
            progress_init(true);
            int code = getppid() == parent ? serve(tenants, ends[1], tenants->shared[i]) : CTL_FAILED;
            fflush(stderr);
            _exit(code);
        }
        close(ends[1]);
        if (tenants->all[i].pid < 0)
            return ctl_error(tenants->ctl, CTL_FAILED, "cannot fork: %s", strerror(errno));
    }
    return CTL_OK;
}

static void end(struct tenants *tenants)
{
    for (unsigned i = 0; i < tenants->count && tenants->all[i].pid; i++) {
        close(tenants->all[i].socket);
        if (tenants->all[i].pid > 0)
            waitpid(tenants->all[i].pid, NULL, 0);
    }
}

/* ---- slices ---- */

static int hear(const struct tenants *tenants, unsigned i, struct answer *answer)
{
    if (recv(tenants->all[i].socket, answer, sizeof *answer, 0) != sizeof *answer)
        return ctl_error(tenants->ctl, CTL_FAILED, "tenant %u has died", i);
    return answer->code ? ctl_error(tenants->ctl, answer->code, "tenant %u failed", i) : CTL_OK;
}

static int slice(struct tenants *tenants, unsigned count, double seconds, unsigned round, struct load *load)
{
    int code = CTL_OK;
    for (unsigned i = 0; i < count; i++)
        if (send(tenants->all[i].socket, &seconds, sizeof seconds, MSG_NOSIGNAL) < 0)
            return ctl_error(tenants->ctl, CTL_FAILED, "tenant %u has died", i);
    for (unsigned i = 0; i < count && !code; i++) {
        struct answer answer;
        code = hear(tenants, i, &answer);
        if (code)
            break;
        load->per_s[round] += (double)answer.batches / answer.seconds;
        load->tenant_s[i] += (double)answer.batches / answer.seconds / ROUNDS;
        for (unsigned j = 0; j < answer.n_samples && load->n_samples < MOST_KEPT; j++)
            load->samples[load->n_samples++] = tenants->shared[i][j];
    }
    return code;
}

static void conclude(struct load *load, unsigned count)
{
    load->median_s = bench_percentile(load->per_s, ROUNDS, 0.5);
    load->p50_ns = bench_percentile(load->samples, load->n_samples, 0.5);
    load->p99_ns = bench_percentile(load->samples, load->n_samples, 0.99);
    load->least_s = load->most_s = load->tenant_s[0];
    for (unsigned i = 1; i < count; i++) {
        load->least_s = fmin(load->least_s, load->tenant_s[i]);
        load->most_s = fmax(load->most_s, load->tenant_s[i]);
    }
}

/* The daemon's state; NULL after complaining. */
static struct mlap_status_reply *ask(const struct tenants *tenants, int *code)
{
    admin_auto struct admin *admin = NULL;
    struct mlap_status_reply *status = NULL;
    struct ctl_fault fault;
    *code = admin_new(tenants->ctl, &admin, &fault);
    *code = *code ? *code : admin_status(admin, &status, &fault);
    if (*code)
        ctl_error(tenants->ctl, *code, "%s", fault.text);
    return status;
}

/* One round more than counts, with all tenants, for what the worker counts. */
static int count_merging(struct tenants *tenants, double seconds)
{
    int code;
    struct load ignored = {.samples = NULL, .n_samples = MOST_KEPT};
    ctl_autofree struct mlap_status_reply *before = ask(tenants, &code), *after = NULL;
    code = code ? code : slice(tenants, tenants->count, seconds, 0, &ignored);
    after = code ? NULL : ask(tenants, &code);
    const struct mlap_device *then = before ? admin_find(before, tenants->device) : NULL;
    const struct mlap_device *now = after ? admin_find(after, tenants->device) : NULL;
    tenants->parts_per_launch = then && now ? wire_json_per_launch(now, then, "launched_parts") : NAN;
    return code;
}

static int measure(struct tenants *tenants, double seconds)
{
    struct answer ready;
    int code = CTL_OK;
    for (unsigned i = 0; i < tenants->count && !code; i++)
        code = hear(tenants, i, &ready);
    double slice_s = seconds / (2 * ROUNDS + 1);
    for (unsigned round = 0; round < ROUNDS && !code; round++) {
        code = slice(tenants, 1, slice_s, round, &tenants->alone);
        code = code ? code : slice(tenants, tenants->count, slice_s, round, &tenants->together);
    }
    code = code ? code : count_merging(tenants, slice_s);
    if (!code) {
        conclude(&tenants->alone, 1);
        conclude(&tenants->together, tenants->count);
    }
    return code;
}

/* ---- report ---- */

static void load_json(cJSON *root, const char *name, const struct load *load)
{
    cJSON *object = cJSON_AddObjectToObject(root, name);
    cJSON_AddNumberToObject(object, "batches_per_s", load->median_s);
    cJSON_AddNumberToObject(object, "tenant_least_per_s", load->least_s);
    cJSON_AddNumberToObject(object, "tenant_most_per_s", load->most_s);
    cJSON_AddNumberToObject(object, "batch_p50_ns", load->p50_ns);
    cJSON_AddNumberToObject(object, "batch_p99_ns", load->p99_ns);
}

static void report_json(const struct tenants *tenants)
{
    cJSON *root = cJSON_CreateObject();
    bench_sizes_json(root, tenants->device, &tenants->batch);
    cJSON_AddNumberToObject(root, "tenants", tenants->count);
    load_json(root, "alone", &tenants->alone);
    load_json(root, "together", &tenants->together);
    cJSON_AddNumberToObject(root, "together_over_alone", tenants->together.median_s / tenants->alone.median_s);
    if (isnan(tenants->parts_per_launch))
        cJSON_AddNullToObject(root, "parts_per_launch");
    else
        cJSON_AddNumberToObject(root, "parts_per_launch", tenants->parts_per_launch);
    output_json(root);
}

static void load_cells(struct table *table, unsigned count, const struct load *load)
{
    table_cell(table, BOLD, "%u", count);
    table_cell(table, PLAIN, "%.0f", load->median_s);
    table_cell(table, PLAIN, "%.0f", load->least_s);
    table_cell(table, PLAIN, "%.0f", load->most_s);
    table_cell(table, PLAIN, "%s", human_ns(load->p50_ns).s);
    table_cell(table, PLAIN, "%s", human_ns(load->p99_ns).s);
}

static void report_text(const struct tenants *tenants)
{
    bench_sizes_text(tenants->device, &tenants->batch);
    struct table *table = table_new("TENANTS|>BATCHES/S|>LEAST OF ONE|>MOST OF ONE|>A BATCH EVERY, P50|>P99");
    load_cells(table, 1, &tenants->alone);
    load_cells(table, tenants->count, &tenants->together);
    table_print(table);
    printf("\n  %u tenants: %.2f times one alone", tenants->count,
           tenants->together.median_s / tenants->alone.median_s);
    if (!isnan(tenants->parts_per_launch))
        printf(", %.1f batches a launch", tenants->parts_per_launch);
    putchar('\n');
}

/* ---- the run ---- */

/* The device that libmla would choose; it must not run in this process. */
static int choose_device(struct tenants *tenants)
{
    int code;
    ctl_autofree struct mlap_status_reply *status = ask(tenants, &code);
    if (code)
        return code;
    const char *said = ctl_value(tenants->ctl, "--device"), *name = said ? said : getenv("MLAD_DEVICE");
    const struct mlap_device *device = name && *name ? admin_find(status, name) : NULL;
    for (unsigned i = 0; !device && !(name && *name) && i < status->n_devices; i++)
        if (status->devices[i].state != MLAP_device_state_ABSENT && strcmp(status->devices[i].name, "reference"))
            device = &status->devices[i];
    if (!device)
        return ctl_error(tenants->ctl, CTL_FAILED, "no device %s is served here",
                         name && *name ? name : "but reference");
    snprintf(tenants->device, sizeof tenants->device, "%s", device->name);
    return CTL_OK;
}

static int run_tenants(struct tenants *tenants, double seconds)
{
    size_t bytes = tenants->count * sizeof *tenants->shared;
    tenants->shared = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (tenants->shared == MAP_FAILED)
        return ctl_error(tenants->ctl, CTL_FAILED, "out of memory");
    int code = start(tenants);
    progress("measuring %u tenants", tenants->count);
    code = code ? code : measure(tenants, seconds);
    end(tenants);
    munmap(tenants->shared, bytes);
    progress_stop();
    return code;
}

int bench_tenants(const struct ctl *ctl)
{
    uint64_t seconds = 10, count = 8;
    struct tenants tenants = {.ctl = ctl, .batch = {1, BENCH_HEADS, 4, 4096}};
    if (ctl_number(ctl, "--seconds", 1, 3600, &seconds) || ctl_number(ctl, "--tenants", 1, MOST_TENANTS, &count) ||
        bench_sizes(ctl, &tenants.batch))
        return CTL_USAGE;
    ctl_autofree double *samples = calloc((size_t)2 * MOST_KEPT, sizeof *samples);
    if (!samples)
        return ctl_error(ctl, CTL_FAILED, "out of memory");
    tenants.alone.samples = samples;
    tenants.together.samples = samples + MOST_KEPT;
    tenants.count = (unsigned)count;
    int code = choose_device(&tenants);
    code = code ? code : run_tenants(&tenants, (double)seconds);
    if (!code && ctl->json)
        report_json(&tenants);
    else if (!code)
        report_text(&tenants);
    return code;
}
