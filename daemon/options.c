/* options.c - every option of mlad, described once. See options.h.
 *
 * O(name, KIND, min, max, default, RELOAD | RESTART, "help"), in the order of the documentation. KIND is
 *   TEXT      min..max bytes               NUMBER    min..max
 *   MODE      octal, min..max              BYTES     with K, M, G or T (powers of 1024), min..max bytes
 *   DURATION  with ms, s (implied) or min, min..max milliseconds
 *   NAMES     min..max device names        USERS, ANY_USERS, GROUPS  names or numeric ids; ANY_USERS may be *
 * and C(name, default, when, "help") is a CHOICE, one of the words of choices_<name>. */
#include "options.h"

#include <stdio.h>
#include <string.h>

static const char *const choices_cpu_variant[] = {"auto", "generic", "avx2", "avx512", "amx", NULL};
static const char *const choices_log_level[] = {"emergency", "alert", "critical", "error", "warning",
                                                "notice",    "info",  "debug",    NULL};
static const char *const choices_log_target[] = {"auto", "stderr", "journal", NULL};

/* clang-format off */
#define OPTIONS(O, C) \
    O(socket, TEXT, 1, 107, "/run/mlad/mlad.sock", RESTART, \
      "Path of the Unix socket. Ignored when systemd passes a listening socket (socket activation).") \
    O(socket_mode, MODE, 0, 0777, "0666", RESTART, \
      "Permissions of the socket file. Open to all by default, because who may connect is decided by " \
      "allowed_users and allowed_groups: a user who is refused there is told so, and by which option, instead of a " \
      "bare EACCES. A narrower mode shuts users out before mlad sees them. Ignored with socket activation " \
      "(SocketMode= decides).") \
    O(devices, NAMES, 1, 16, "cpu", RESTART, \
      "Devices to serve, one worker process each: cpu (vector code), reference (slow, exact to double precision), " \
      "and GPUs by their UUID, as nvidia-smi -L prints it. all: cpu and every GPU that the driver names at the " \
      "start; without a GPU, cpu alone, and mlactl status says why. Name a GPU whose absence is a fault: health " \
      "tells of it.") \
    O(allowed_users, ANY_USERS, 0, 32, "", RELOAD, \
      "Users who may connect, names or numeric ids; * is everyone. Root, the user that mlad runs as and " \
      "admin_users always may. Empty: nobody else, unless allowed_groups names a group of theirs.") \
    O(allowed_groups, GROUPS, 0, 32, "", RELOAD, \
      "Groups whose members may connect, primary or supplementary, as they were when the client connected.") \
    O(admin_users, USERS, 0, 32, "", RELOAD, \
      "Users who may also drain devices, evict sessions and list the sessions of others. Root and the user " \
      "that mlad runs as always may.") \
    O(high_priority_users, ANY_USERS, 0, 32, "", RELOAD, \
      "Users whose sessions may ask for high priority: decodes of these go before others that wait, though never " \
      "before one that has waited for 8 launches; * is everyone. Administrators always may.") \
    O(max_sessions, NUMBER, 1, 65536, "64", RELOAD, "Sessions a user may have on a device.") \
    O(max_bytes, BYTES, 4096, 1ull << 50, "64G", RELOAD, "Bytes of buffers a user may register on a device.") \
    O(max_bytes_per_session, BYTES, 4096, 1ull << 50, "64G", RELOAD, "The same for one session.") \
    O(max_buffers, NUMBER, 1, 1000000, "1024", RELOAD, "Buffers a user may register on a device.") \
    O(max_plans, NUMBER, 1, 1000000, "4096", RELOAD, "Plans a user may hold on a device.") \
    O(max_in_flight, NUMBER, 1, 65536, "256", RELOAD, "Decodes a user may have queued or running on a device.") \
    O(max_in_flight_per_session, NUMBER, 1, 65536, "128", RELOAD, \
      "The same for one session: all engines under one MPS server are of one user.") \
    O(queue_limit, NUMBER, 1, 65536, "1024", RELOAD, \
      "Decodes that may wait on a device, all users together; above, busy.") \
    O(max_connections, NUMBER, 1, 65536, "512", RELOAD, \
      "Connections that the supervisor holds at a time: those that have not said HELLO, wait for a device to start, " \
      "or ask for status. Sessions on a device do not count.") \
    O(max_connections_per_user, NUMBER, 1, 65536, "128", RELOAD, "The same for one user.") \
    O(hello_timeout, DURATION, 50, 600000, "5s", RELOAD, \
      "How long a connection may stay silent before its HELLO, and how long it may wait for a device that starts.") \
    O(worker_timeout, DURATION, 500, 3600000, "10s", RELOAD, \
      "A worker that shows no sign of life, or has a decode running without progress, for so long is killed and " \
      "started again.") \
    O(drain_timeout, DURATION, 0, 3600000, "10s", RELOAD, \
      "How long a stop waits for decodes in flight. Clients submit what was cut off to the next daemon.") \
    O(discovery_timeout, DURATION, 50, 600000, "20s", RESTART, \
      "How long a start with devices = all waits for the list of GPUs; clients wait as long.") \
    O(runtime_dir, TEXT, 0, 107, "", RESTART, "Directory of the devices' lock files. Empty: that of the socket.") \
    O(cpu_threads, NUMBER, 0, 1024, "0", RESTART, "Compute threads of the device cpu. 0: one per processor.") \
    C(cpu_variant, "auto", RESTART, \
      "Kernels of the device cpu. auto: the best that this processor runs; one that it cannot run makes the device " \
      "absent.") \
    C(log_level, "info", RELOAD, "Least urgent records to keep.") \
    C(log_target, "auto", RESTART, "Where records go. auto: the journal if stderr leads there, else stderr.")

#define MEMBER(option) offsetof(struct mlad_config, option), sizeof(((struct mlad_config *)0)->option)
#define PLAIN(option, KIND, min, max, standard, WHEN, help) \
    {#option, MLAD_##KIND, min, max, standard, NULL, MLAD_##WHEN, help, MEMBER(option)},
#define CHOICE(option, standard, WHEN, help) \
    {#option, MLAD_CHOICE, 0, 0, standard, choices_##option, MLAD_##WHEN, help, MEMBER(option)},
/* clang-format on */

const struct mlad_option mlad_options[] = {OPTIONS(PLAIN, CHOICE)};
const size_t mlad_n_options = sizeof mlad_options / sizeof mlad_options[0];
_Static_assert(sizeof mlad_options / sizeof mlad_options[0] <= 64, "config.c keeps a set of them in 64 bits");

const struct mlad_option *mlad_option_by_name(const char *name)
{
    for (size_t i = 0; i < mlad_n_options; i++)
        if (strcmp(mlad_options[i].name, name) == 0)
            return &mlad_options[i];
    return NULL;
}

void *mlad_option_member(const struct mlad_option *option, struct mlad_config *config)
{
    return (char *)config + option->offset;
}

const void *mlad_option_value(const struct mlad_option *option, const struct mlad_config *config)
{
    return (const char *)config + option->offset;
}

/* ---- numbers as people write them ---- */

static const struct mlad_unit no_units[] = {{"", 1}, {NULL, 0}};
static const struct mlad_unit byte_units[] = {{"T", 1ull << 40}, {"G", 1 << 30}, {"M", 1 << 20},
                                              {"K", 1 << 10},    {"", 1},        {NULL, 0}};
static const struct mlad_unit duration_units[] = {{"min", 60000}, {"s", 1000}, {"ms", 1}, {"", 1000}, {NULL, 0}};

const struct mlad_unit *mlad_units(enum mlad_kind kind)
{
    return kind == MLAD_BYTES ? byte_units : kind == MLAD_DURATION ? duration_units : no_units;
}

/* In the largest unit that divides it. */
void mlad_option_print_number(enum mlad_kind kind, uint64_t value, char to[32])
{
    if (kind == MLAD_MODE) {
        snprintf(to, 32, "%04llo", (unsigned long long)value);
        return;
    }
    const struct mlad_unit *unit = mlad_units(kind);
    if (kind == MLAD_DURATION)
        unit++; /* minutes are understood, seconds are what people compare */
    while (unit[1].suffix && (value == 0 || value % unit->factor != 0))
        unit++;
    snprintf(to, 32, "%llu%s", (unsigned long long)(value / unit->factor), value == 0 ? "" : unit->suffix);
}

void mlad_option_print_bounds(const struct mlad_option *option, char *to, size_t size)
{
    char low[32], high[32];
    mlad_option_print_number(option->kind, option->min, low);
    mlad_option_print_number(option->kind, option->max, high);
    switch (option->kind) {
    case MLAD_TEXT:
        snprintf(to, size, "%s..%s bytes", low, high);
        break;
    case MLAD_CHOICE: {
        size_t n = 0;
        for (const char *const *word = option->choices; *word && n < size; word++)
            n += (size_t)snprintf(to + n, size - n, "%s%s", n ? ", " : "", *word);
        break;
    }
    case MLAD_NAMES:
    case MLAD_USERS:
    case MLAD_ANY_USERS:
    case MLAD_GROUPS:
        snprintf(to, size, "a comma-separated list of %s..%s", low, high);
        break;
    default:
        snprintf(to, size, "%s..%s", low, high);
    }
}
