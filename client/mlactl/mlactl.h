/* mlactl.h - what the rooms of mlactl share: options, exit codes, faults, one entry point per command.
 *
 * main.c owns the command table and parses the command line into `struct ctl`, which every command is handed and none
 * changes. A command prints its result on stdout (tables, or JSON with --json), its complaint through ctl_error, and
 * returns an exit code; it never exits by itself. */
#ifndef MLACTL_H
#define MLACTL_H

#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>

/* Exit codes of every command; mlactl(1) documents them. `health` alone reads 1 as degraded and 2 as failed. */
enum ctl_exit {
    CTL_OK = 0,
    CTL_FAILED = 1,
    CTL_PARTLY = 2,         /* decode: written, but some requests failed */
    CTL_NOT_RUNNING = 3,
    CTL_TIMED_OUT = 4,
    CTL_USAGE = 64
};

enum { CTL_MAX_OPTIONS = 8, CTL_MAX_ARGUMENTS = 2 };

enum { CTL_WORDS = 1000 };

/* A parsed command line. Strings belong to argv or the environment. */
struct ctl {
    const struct ctl_command *command;
    const char *socket;                         /* --socket, $MLAD_SOCKET, /run/mlad/mlad.sock */
    int timeout_ms;                             /* --timeout, else the command's own */
    bool json, quiet;
    const char *arguments[CTL_MAX_ARGUMENTS];   /* NULL where not given */
    char **words;                               /* of a command that takes a command: argv from its name on */
    const char *values[CTL_MAX_OPTIONS];        /* of command->options: NULL not given, "" a flag */
};

struct ctl_option {
    const char *name;           /* "--seconds" */
    const char *argument;       /* "N"; NULL: a flag */
    const char *help;
    char letter;                /* 'o' for -o, 0 for none */
};

struct ctl_command {
    const char *name;
    const char *arguments;      /* as help shows them: "DEVICE SESSION", "" */
    unsigned n_arguments, n_required;           /* CTL_WORDS: another command, with whatever follows it */
    int timeout_s;              /* default of --timeout */
    int (*run)(const struct ctl *ctl);
    const char *summary;        /* one line */
    const char *details;        /* what else a user should know */
    struct ctl_option options[CTL_MAX_OPTIONS + 1];
};

/* The value of the command's option `name` ("--seconds"): NULL if not given. */
const char *ctl_value(const struct ctl *ctl, const char *name);
/* Its --socket where none is given. */
#define CTL_SOCKET "/run/mlad/mlad.sock"

/* A whole number within [min, max] from option `name` into *value, untouched if not given; CTL_USAGE after complaining.
 */
int ctl_number(const struct ctl *ctl, const char *name, uint64_t min, uint64_t max, uint64_t *value);

/* A sentence about what went wrong, on its way to whoever prints it. */
struct ctl_fault { char text[512]; };
/* Fill it (NULL allowed) and return -1. */
int ctl_fail(struct ctl_fault *fault, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Print a complaint, as {"error": ...} on stdout with --json, else on stderr, and return `code`. */
int ctl_error(const struct ctl *ctl, int code, const char *format, ...) __attribute__((format(printf, 3, 4)));

int ctl_status(const struct ctl *ctl);
int ctl_health(const struct ctl *ctl);
int ctl_decode(const struct ctl *ctl);
int ctl_verify(const struct ctl *ctl);
int ctl_metrics(const struct ctl *ctl);
int ctl_bench(const struct ctl *ctl);
int ctl_drain(const struct ctl *ctl);
int ctl_evict(const struct ctl *ctl);
int ctl_version(const struct ctl *ctl);
int ctl_doctor(const struct ctl *ctl);
int ctl_engine(const struct ctl *ctl);
int ctl_top(const struct ctl *ctl);

static inline void ctl_free(void *pointer) { free(*(void **)pointer); }
#define ctl_autofree __attribute__((cleanup(ctl_free)))

#endif
