/* bench_direct.c - mlad-kernel-bench as a child: a line with seconds in, a line of JSON out. It ends when its input
 * does, so it never outlives us. */
#include "bench.h"

#include <cjson/cJSON.h>
#include <errno.h>
#include <fcntl.h>
#include <spawn.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

extern char **environ;

struct direct {
    pid_t child;
    FILE *to, *from;
    char *line;
    size_t line_bytes;
    struct direct_rates rates;
};

/* bin/mlactl finds libexec/mlad/mlad-kernel-bench, in the build tree and in the installed one. */
static int find_program(char path[4096], struct ctl_fault *fault)
{
    char self[3072];
    ssize_t length = readlink("/proc/self/exe", self, sizeof self - 1);
    char *slash = length > 0 ? (self[length] = 0, strrchr(self, '/')) : NULL;
    if (!slash)
        return ctl_fail(fault, "cannot read /proc/self/exe: %s", strerror(errno));
    *slash = 0;
    snprintf(path, 4096, "%s/../libexec/mlad/mlad-kernel-bench", self);
    if (access(path, X_OK) < 0)
        return ctl_fail(fault, "%s: %s; it is installed with mlad", path, strerror(errno));
    return 0;
}

static int spawn(struct direct *direct, char *const argv[], struct ctl_fault *fault)
{
    int in[2], out[2];
    if (pipe2(in, O_CLOEXEC) < 0)
        return ctl_fail(fault, "cannot make a pipe: %s", strerror(errno));
    if (pipe2(out, O_CLOEXEC) < 0) {
        close(in[0]);
        close(in[1]);
        return ctl_fail(fault, "cannot make a pipe: %s", strerror(errno));
    }
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, in[0], STDIN_FILENO);
    posix_spawn_file_actions_adddup2(&actions, out[1], STDOUT_FILENO);
    int error = posix_spawn(&direct->child, argv[0], &actions, NULL, argv, environ);
    posix_spawn_file_actions_destroy(&actions);
    close(in[0]);
    close(out[1]);
    direct->to = fdopen(in[1], "w");
    direct->from = fdopen(out[0], "r");
    if (error) {
        direct->child = 0;
        return ctl_fail(fault, "cannot start %s: %s", argv[0], strerror(error));
    }
    return direct->to && direct->from ? 0 : ctl_fail(fault, "out of memory");
}

/* One line of JSON of that "type"; NULL with `fault`. */
static cJSON *read_line(struct direct *direct, const char *type, struct ctl_fault *fault)
{
    cJSON *line = getline(&direct->line, &direct->line_bytes, direct->from) > 0 ? cJSON_Parse(direct->line) : NULL;
    const char *is = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(line, "type"));
    if (is && strcmp(is, type) == 0)
        return line;
    cJSON_Delete(line);
    ctl_fail(fault, "mlad-kernel-bench printed no %s", type);
    return NULL;
}

/* Every rate but "read" is of an instruction that multiplies and adds. */
static void read_rates(const cJSON *line, struct direct_rates *rates)
{
    for (const cJSON *item = line->child; item; item = item->next) {
        if (!cJSON_IsNumber(item) || strcmp(item->string, "threads") == 0)
            continue;
        if (strcmp(item->string, "read") == 0) {
            rates->read_gb_s = item->valuedouble;
        } else if (item->valuedouble > rates->matmul_gflop_s) {
            rates->matmul_gflop_s = item->valuedouble;
            snprintf(rates->matmul, sizeof rates->matmul, "%s", item->string);
        }
    }
}

int direct_new(const char *device, const char *variant, unsigned threads, const struct bench_shape *shape,
               struct direct **out, struct ctl_fault *fault)
{
    char path[4096], n_threads[12], n_q[12], n_heads[12], n_batch[12], n_keys[12], n_page[12], n_copies[12];
    struct direct *direct = calloc(1, sizeof *direct);
    if (!direct)
        return ctl_fail(fault, "out of memory");
    snprintf(n_threads, sizeof n_threads, "%u", threads);
    snprintf(n_q, sizeof n_q, "%u", shape->q_len);
    snprintf(n_heads, sizeof n_heads, "%d", BENCH_HEADS);
    snprintf(n_batch, sizeof n_batch, "%u", shape->batch);
    snprintf(n_keys, sizeof n_keys, "%u", shape->keys);
    snprintf(n_copies, sizeof n_copies, "%u", shape->copies);
    snprintf(n_page, sizeof n_page, "%d", BENCH_PAGE);
    char *const argv[] = {path, "--serve", "--dtype", "bf16", "--device", (char *)device, "--variant", (char *)variant,
                          "--q-len", n_q, "--heads", n_heads, "--batch", n_batch, "--kv-len", n_keys,
                          "--page-size", n_page, "--copies", n_copies, threads ? "--threads" : NULL, n_threads, NULL};
    cJSON *line = NULL;
    if (find_program(path, fault) || spawn(direct, argv, fault) || !(line = read_line(direct, "ceilings", fault))) {
        direct_free(direct);
        return -1;
    }
    read_rates(line, &direct->rates);
    cJSON_Delete(line);
    *out = direct;
    return 0;
}

void direct_free(struct direct *direct)
{
    if (!direct)
        return;
    if (direct->to)
        fclose(direct->to);
    if (direct->from)
        fclose(direct->from);
    if (direct->child > 0)
        waitpid(direct->child, NULL, 0);
    free(direct->line);
    free(direct);
}

const struct direct_rates *direct_rates(const struct direct *direct) { return &direct->rates; }

int direct_run(struct direct *direct, double seconds, double *median_ns, struct ctl_fault *fault)
{
    if (fprintf(direct->to, "%g\n", seconds) < 0 || fflush(direct->to))
        return ctl_fail(fault, "mlad-kernel-bench has ended");
    cJSON *line = read_line(direct, "case", fault);
    if (!line)
        return -1;
    const cJSON *median = cJSON_GetObjectItemCaseSensitive(line, "median_us");
    bool good = cJSON_IsNumber(median);
    if (good)
        *median_ns = median->valuedouble * 1e3;
    else
        ctl_fail(fault, "mlad-kernel-bench: a case without median_us");
    cJSON_Delete(line);
    return good ? 0 : -1;
}
