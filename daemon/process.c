/* process.c - see process.h.
 *
 * The child gets descriptor 3, its end of a SEQPACKET pair, and 4, the page of life; all others are close-on-exec. */
#include "process.h"

#include "log.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

extern char **environ;

struct mlad_process {
    uv_process_t handle;
    uv_poll_t poll;
    unsigned open_handles; /* of the two above; freed at 0 */
    int control;           /* -1: hung up */
    bool full;             /* a send found no room; waiting for some */
    bool reaped;
    const struct mlad_life *life;
    struct mlad_life seen;
    uint64_t looked_at, silent_beat, silent_progress; /* ms of the loop's clock; ms of silence */
    const struct mlad_process_events *events;
    void *owner;
};

static void on_closed(uv_handle_t *handle)
{
    struct mlad_process *process = handle->data;
    if (--process->open_handles == 0) {
        munmap((void *)(uintptr_t)process->life, sizeof *process->life);
        free(process);
    }
}

int mlad_process_pid(const struct mlad_process *process)
{
    return process->handle.pid;
}

void mlad_process_kill(struct mlad_process *process)
{
    if (!process->reaped) /* the id may be another's by now */
        uv_process_kill(&process->handle, SIGKILL);
}

void mlad_process_hang_up(struct mlad_process *process)
{
    if (process->control < 0)
        return;
    uv_close((uv_handle_t *)&process->poll, on_closed);
    close(process->control);
    process->control = -1;
}

/* ---- control socket ---- */

/* Deliver one message; false when there is none left, or no way on. */
static bool receive_one(struct mlad_process *process)
{
    static char datagram[MLAP_MAX_MESSAGE]; /* one loop, one thread, and no message is handled inside another */
    static union mlap_body body;
    struct mlap_header header;
    struct mlap_fault fault;
    int fds[MLAP_MAX_FDS];
    unsigned n_fds;

    long length = mlap_receive(process->control, datagram, sizeof datagram, fds, &n_fds, MSG_DONTWAIT);
    if (length < 0 && errno == EAGAIN)
        return false;
    for (unsigned i = 0; length > 0 && i < n_fds; i++)
        close(fds[i]);
    if (length > 0 && mlap_decode(datagram, (size_t)length, &header, &body, &fault) == MLAP_code_OK) {
        process->events->message(process->owner, &header, &body);
        return process->control >= 0;
    }
    if (length > 0 && fault.code == MLAP_code_MEMORY) {
        mlad_log(LOG_ERR, "message of a worker lost", MLAD_KV("pid", process->handle.pid),
                 MLAD_KV("why", fault.message));
        return true; /* whoever waits for it has a time limit */
    }
    if (length > 0)
        mlad_log(LOG_ERR, "worker sent nonsense; killing it", MLAD_KV("pid", process->handle.pid),
                 MLAD_KV("field", fault.field), MLAD_KV("why", fault.message));
    /* End of file: it ends, or it closed its side and would never hear from us again. */
    mlad_process_kill(process);
    mlad_process_hang_up(process);
    return false;
}

static void on_poll(uv_poll_t *poll, int status, int events);

static void watch(struct mlad_process *process)
{
    uv_poll_start(&process->poll, UV_READABLE | (process->full ? UV_WRITABLE : 0), on_poll);
}

static void on_poll(uv_poll_t *poll, int status, int events)
{
    struct mlad_process *process = poll->data;
    if (status < 0 || (events & UV_READABLE))
        for (int i = 0; i < 64 && receive_one(process); i++)
            ;
    if (process->control >= 0 && process->full && (events & UV_WRITABLE)) {
        process->full = false;
        watch(process);
        process->events->writable(process->owner);
    }
}

int mlad_process_send(struct mlad_process *process, enum mlap_type type, uint32_t sequence, const void *body, int fd)
{
    if (process->control < 0) {
        errno = EPIPE;
        return -1;
    }
    int sent = mlap_send_message(process->control, type, sequence, body, fd, MSG_DONTWAIT);
    if (sent < 0 && errno == EAGAIN && !process->full) {
        process->full = true;
        watch(process);
        errno = EAGAIN;
    }
    return sent;
}

/* ---- signs of life ---- */

struct mlad_life mlad_process_life(const struct mlad_process *process)
{
    const struct mlad_life *life = process->life;
    return (struct mlad_life){
        .beat = __atomic_load_n(&life->beat, __ATOMIC_RELAXED),
        .progress = __atomic_load_n(&life->progress, __ATOMIC_RELAXED),
        .running = __atomic_load_n(&life->running, __ATOMIC_RELAXED),
        .decodes = __atomic_load_n(&life->decodes, __ATOMIC_RELAXED),
    };
}

uint64_t mlad_process_silence(struct mlad_process *process)
{
    enum { LOOK_MS = 250 }; /* our caller looks more often than this unless we were stopped ourselves */
    struct mlad_life now = mlad_process_life(process);
    uint64_t clock = uv_now(process->handle.loop), passed = clock - process->looked_at;
    if (passed > LOOK_MS)
        passed = LOOK_MS;
    bool moved = now.running == 0 || now.progress != process->seen.progress || now.decodes != process->seen.decodes;
    process->silent_beat = now.beat != process->seen.beat ? 0 : process->silent_beat + passed;
    process->silent_progress = moved ? 0 : process->silent_progress + passed;
    process->looked_at = clock;
    process->seen = now;
    return process->silent_beat > process->silent_progress ? process->silent_beat : process->silent_progress;
}

/* ---- start and end ---- */

static void on_reaped(uv_process_t *handle, int64_t status, int signal)
{
    struct mlad_process *process = handle->data;
    char how[96];
    process->reaped = true;
    if (signal)
        snprintf(how, sizeof how, "the worker was ended by signal %d (%s)", signal, strsignal(signal));
    else
        snprintf(how, sizeof how, "the worker exited with status %lld", (long long)status);
    /* Its last words may explain its end. */
    while (process->control >= 0 && receive_one(process))
        ;
    mlad_process_hang_up(process);
    process->events->ended(process->owner, how);
    uv_close((uv_handle_t *)handle, on_closed);
}

static void close_fd(int *fd)
{
    if (*fd >= 0)
        close(*fd);
}

static void free_strings(char ***strings)
{
    free(*strings);
}

char **mlad_process_environment(void)
{
    size_t n = 0, kept = 0;
    while (environ[n])
        n++;
    char **copy = calloc(n + 1, sizeof *copy);
    for (size_t i = 0; copy && i < n; i++)
        if (strncmp(environ[i], "NOTIFY_SOCKET=", 14) != 0)
            copy[kept++] = environ[i];
    return copy;
}

/* A zeroed page that neither side can shorten under the other, mapped for reading at *life. -1 with errno. */
static int make_life(const struct mlad_life **life)
{
    int fd = memfd_create("mlad-life", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0)
        return -1;
    if (ftruncate(fd, getpagesize()) == 0 && fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) == 0) {
        void *page = mmap(NULL, sizeof **life, PROT_READ, MAP_SHARED, fd, 0);
        if (page != MAP_FAILED) {
            *life = page;
            return fd;
        }
    }
    close_fd(&fd);
    return -1;
}

static int spawn(struct mlad_process *process, uv_loop_t *loop, const struct mlad_process_command *command,
                 char **environment, int control, int life)
{
    char threads[24], level[4];
    snprintf(threads, sizeof threads, "%llu", (unsigned long long)command->threads);
    snprintf(level, sizeof level, "%d", command->log_level);
    const char *arguments[20] = {
        "mlad-worker", "--device", command->device, "--control",        "3", "--life", "4", "--lock", command->lock,
        "--log-level", level,      "--log-target",  command->log_target};
    unsigned n = 13;
    if (command->threads) {
        arguments[n++] = "--threads";
        arguments[n++] = threads;
    }
    if (command->variant) {
        arguments[n++] = "--variant";
        arguments[n++] = command->variant;
    }
    uv_stdio_container_t descriptors[5] = {
        {.flags = UV_IGNORE},
        {.flags = UV_INHERIT_FD, .data.fd = STDERR_FILENO},
        {.flags = UV_INHERIT_FD, .data.fd = STDERR_FILENO},
        {.flags = UV_INHERIT_FD, .data.fd = control},
        {.flags = UV_INHERIT_FD, .data.fd = life},
    };
    uv_process_options_t options = {
        .file = command->executable,
        .args = (char **)(uintptr_t)arguments,
        .env = environment,
        .exit_cb = on_reaped,
        .stdio_count = 5,
        .stdio = descriptors,
    };
    return uv_spawn(loop, &process->handle, &options);
}

int mlad_process_start(struct mlad_process **started, uv_loop_t *loop, const struct mlad_process_command *command,
                       const struct mlad_process_events *events, void *owner)
{
    __attribute__((cleanup(free_strings))) char **environment = mlad_process_environment();
    struct mlad_process *process = calloc(1, sizeof *process);
    if (!process || !environment) {
        free(process);
        return UV_ENOMEM;
    }
    int pair[2] = {-1, -1};
    __attribute__((cleanup(close_fd))) int life = make_life(&process->life);
    int error = life < 0 || socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0 ? -errno : 0;
    __attribute__((cleanup(close_fd))) int theirs = pair[1];
    if (!error)
        error = uv_poll_init(loop, &process->poll, pair[0]);
    if (error) {
        close_fd(&pair[0]);
        if (process->life)
            munmap((void *)(uintptr_t)process->life, sizeof *process->life);
        free(process);
        return error;
    }

    /* From here on closing its two handles frees it. */
    process->handle.data = process->poll.data = process;
    process->open_handles = 2;
    process->control = pair[0];
    process->events = events;
    process->owner = owner;
    process->looked_at = uv_now(loop);
    error = spawn(process, loop, command, environment, theirs, life);
    if (error) {
        mlad_process_hang_up(process);
        uv_close((uv_handle_t *)&process->handle, on_closed);
        return error;
    }
    watch(process);
    *started = process;
    return 0;
}
