/* discovery.c - see discovery.h.
 *
 * The list is short enough for the pipes to hold it all, so they are read once, when the process has ended. One that
 * does not end even when it is killed, because a driver holds it in the kernel, is waited for no longer. */
#include "discovery.h"

#include "process.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { LIST_BYTES = 16384, COMPLAINT_BYTES = 4096 };

/* ---- what it said ---- */

/* What a pipe holds, as printable lines. */
static void read_all(int fd, char *to, size_t size)
{
    size_t length = 0;
    ssize_t n;
    while (length < size - 1 && (n = read(fd, to + length, size - 1 - length)) != 0)
        if (n > 0)
            length += (size_t)n;
        else if (errno != EINTR)
            break;
    for (size_t i = 0; i < length; i++)
        if (to[i] != '\n' && (to[i] < ' ' || to[i] > '~'))
            to[i] = '?';
    to[length] = '\0';
}

/* The last line that says anything: what libraries print comes before. */
static const char *last_line(char *text)
{
    size_t length = strlen(text);
    while (length > 0 && text[length - 1] == '\n')
        text[--length] = '\0';
    const char *newline = strrchr(text, '\n');
    return newline ? newline + 1 : text;
}

/* A line of the list, "GPU-01234567-... NVIDIA H100 80GB HBM3". */
static void take_line(struct mlad_discovered *found, const char *line)
{
    size_t length = strcspn(line, " ");
    if (strncmp(line, "GPU-", 4) != 0 || length >= sizeof found->gpu[0].device ||
        strspn(line, "GPU-0123456789abcdef") < length)
        return;
    if (found->total < MLAD_CONFIG_DEVICES) {
        const char *model = line + length + (line[length] == ' ');
        memcpy(found->gpu[found->total].device, line, length);
        snprintf(found->gpu[found->total].model, sizeof found->gpu[0].model, "%s", model);
    }
    found->total++;
}

static void answer(struct mlad_discovery *discovery, const struct mlad_discovered *found)
{
    discovery->asked = false;
    uv_close((uv_handle_t *)&discovery->limit, NULL);
    discovery->answer(found, discovery->owner);
}

static void on_ended(uv_process_t *process, int64_t status, int number)
{
    struct mlad_discovery *discovery = process->data;
    static struct mlad_discovered found; /* large */
    char list[LIST_BYTES], complaints[COMPLAINT_BYTES], *rest = list;
    discovery->runs = false;
    uv_close((uv_handle_t *)process, NULL);
    if (!discovery->asked)
        return;
    memset(&found, 0, sizeof found);
    read_all(discovery->list, list, sizeof list);
    read_all(discovery->complaints, complaints, sizeof complaints);
    close(discovery->list);
    close(discovery->complaints);
    const char *why = last_line(complaints);
    if (number)
        snprintf(found.why, sizeof found.why, "mlad-worker --list was ended by signal %d (%s)", number,
                 strsignal(number));
    else if (status == MLAD_NO_GPU_STATUS && *why)
        snprintf(found.why, sizeof found.why, "%.255s", why);
    else if (status != 0)
        snprintf(found.why, sizeof found.why, "mlad-worker --list exited with status %lld: %.180s", (long long)status,
                 *why ? why : "it did not say why");
    else
        while (rest)
            take_line(&found, strsep(&rest, "\n"));
    if (status == 0 && !number && found.total == 0)
        snprintf(found.why, sizeof found.why, "mlad-worker --list named no GPU, and did not say why");
    found.failed = found.total == 0 && (number || status != MLAD_NO_GPU_STATUS);
    answer(discovery, &found);
}

/* ---- asking ---- */

__attribute__((format(printf, 2, 3))) static void fail(struct mlad_discovery *discovery, const char *format, ...)
{
    static struct mlad_discovered found;
    va_list arguments;
    memset(&found, 0, sizeof found);
    found.failed = true;
    va_start(arguments, format);
    vsnprintf(found.why, sizeof found.why, format, arguments);
    va_end(arguments);
    answer(discovery, &found);
}

static void on_limit(uv_timer_t *timer)
{
    struct mlad_discovery *discovery = timer->data;
    uv_process_kill(&discovery->process, SIGKILL); /* it may be reaped much later, or never */
    close(discovery->list);
    close(discovery->complaints);
    fail(discovery, "mlad-worker --list gave no answer within %llu ms (discovery_timeout); it was killed",
         (unsigned long long)discovery->limit_ms);
}

static void close_fd(int *fd)
{
    if (*fd >= 0)
        close(*fd);
}

static int spawn(struct mlad_discovery *discovery, uv_loop_t *loop, const char *executable)
{
    int out[2] = {-1, -1}, complaints[2] = {-1, -1};
    char **environment = mlad_process_environment();
    int error = environment ? 0 : UV_ENOMEM;
    if (!error && (pipe2(out, O_CLOEXEC | O_NONBLOCK) < 0 || pipe2(complaints, O_CLOEXEC | O_NONBLOCK) < 0))
        error = -errno;
    if (!error) {
        uv_stdio_container_t descriptors[3] = {
            {.flags = UV_IGNORE},
            {.flags = UV_INHERIT_FD, .data.fd = out[1]},
            {.flags = UV_INHERIT_FD, .data.fd = complaints[1]},
        };
        const char *const arguments[] = {"mlad-worker", "--list", NULL};
        uv_process_options_t options = {
            .file = executable,
            .args = (char **)(uintptr_t)arguments,
            .env = environment,
            .exit_cb = on_ended,
            .stdio_count = 3,
            .stdio = descriptors,
        };
        error = uv_spawn(loop, &discovery->process, &options);
        if (error)
            uv_close((uv_handle_t *)&discovery->process, NULL);
    }
    free(environment);
    close_fd(&out[1]);
    close_fd(&complaints[1]);
    discovery->list = out[0];
    discovery->complaints = complaints[0];
    if (error) {
        close_fd(&out[0]);
        close_fd(&complaints[0]);
    }
    return error;
}

void mlad_discovery_start(struct mlad_discovery *discovery, uv_loop_t *loop, const char *executable, uint64_t limit_ms,
                          void (*callee)(const struct mlad_discovered *discovered, void *owner), void *owner)
{
    *discovery = (struct mlad_discovery){.limit_ms = limit_ms, .asked = true, .answer = callee, .owner = owner};
    discovery->process.data = discovery->limit.data = discovery;
    uv_timer_init(loop, &discovery->limit);
    int error = spawn(discovery, loop, executable);
    discovery->runs = error == 0;
    if (error)
        fail(discovery, "mlad-worker --list cannot be started: %s", uv_strerror(error));
    else
        uv_timer_start(&discovery->limit, on_limit, limit_ms, 0);
}

void mlad_discovery_stop(struct mlad_discovery *discovery)
{
    if (discovery->asked) {
        discovery->asked = false;
        uv_close((uv_handle_t *)&discovery->limit, NULL);
        close(discovery->list);
        close(discovery->complaints);
    }
    if (discovery->runs) {
        discovery->runs = false;
        uv_process_kill(&discovery->process, SIGKILL);
        uv_close((uv_handle_t *)&discovery->process, NULL);
    }
}

/* ---- what "all" stands for ---- */

static bool holds(const struct mlad_names *names, const char *name)
{
    for (uint32_t i = 0; i < names->n; i++)
        if (strcmp(names->name[i], name) == 0)
            return true;
    return false;
}

bool mlad_wants_all(const struct mlad_names *wanted)
{
    return holds(wanted, MLAD_ALL);
}

/* Unless it is there, or is named elsewhere and will be. False: no place is left. */
static bool add(struct mlad_names *served, const struct mlad_names *named, uint32_t *room, const char *name)
{
    if (holds(served, name) || holds(named, name))
        return true;
    if (*room == 0)
        return false;
    --*room;
    snprintf(served->name[served->n++], sizeof served->name[0], "%s", name);
    return true;
}

uint32_t mlad_discovery_expand(const struct mlad_names *wanted, const struct mlad_discovered *discovered,
                               struct mlad_names *served)
{
    uint32_t room = MLAD_CONFIG_DEVICES - (wanted->n - 1), left_out = 0;
    served->n = 0;
    for (uint32_t i = 0; i < wanted->n; i++) {
        if (strcmp(wanted->name[i], MLAD_ALL) != 0) {
            snprintf(served->name[served->n++], sizeof served->name[0], "%s", wanted->name[i]);
            continue;
        }
        add(served, wanted, &room, "cpu");
        for (uint32_t j = 0; j < discovered->total; j++)
            if (j >= MLAD_CONFIG_DEVICES || !add(served, wanted, &room, discovered->gpu[j].device))
                left_out++;
    }
    return left_out;
}
