/* config.h - what an operator can set: one struct, filled from one table of options.
 *
 * The table (config.c) holds each option's name, kind, bounds, default, whether a reload changes it, and its help. From
 * it come the parser, --help, --print-config and deploy/mlad.conf. A configuration is the defaults, then the file, then
 * the command line. The struct holds no pointers: it is copied by assignment and compared option by option. */
#ifndef MLAD_CONFIG_H
#define MLAD_CONFIG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#define MLAD_CONFIG_PATH "/etc/mlad/mlad.conf"

enum { MLAD_CONFIG_TEXT = 108, MLAD_CONFIG_DEVICES = 16, MLAD_CONFIG_IDS = 32, MLAD_CONFIG_ERROR = 512 };

/* The device that stands for cpu and every GPU. */
#define MLAD_ALL "all"

struct mlad_names {
    uint32_t n;
    char name[MLAD_CONFIG_DEVICES][64];
};

/* Users or groups, resolved when they were read. */
struct mlad_ids {
    bool everyone;
    uint32_t n;
    struct {
        char name[64]; /* as written */
        uint32_t id;
    } entry[MLAD_CONFIG_IDS];
};

struct mlad_config {
    char socket[MLAD_CONFIG_TEXT];
    uint64_t socket_mode;
    struct mlad_names devices; /* as written: "all" is still to be expanded */
    struct mlad_ids allowed_users, allowed_groups, admin_users, high_priority_users;
    uint64_t max_sessions, max_bytes, max_buffers, max_plans, max_in_flight, queue_limit;
    uint64_t max_bytes_per_session, max_in_flight_per_session;
    uint64_t max_connections, max_connections_per_user;
    uint64_t hello_timeout, worker_timeout, drain_timeout; /* milliseconds */
    uint64_t discovery_timeout;                            /* milliseconds */
    char runtime_dir[MLAD_CONFIG_TEXT];                    /* "": the socket's directory */
    uint64_t cpu_threads;                                  /* 0: one per processor */
    uint64_t cpu_variant;                                  /* see mlad_config_choice */
    uint64_t log_level;                                    /* a syslog priority */
    uint64_t log_target;                                   /* enum mlad_log_target */
};

/* An option set on the command line; the texts are the caller's. */
struct mlad_setting {
    const char *key, *value;
};

/* Defaults, then the file at `path` (NULL: none; one that is absent is an error only if `must_exist`), then `settings`.
 * False: `error` is one sentence that names file and line, the option, its bounds and the remedy; `config` is
 * unspecified. */
bool mlad_config_load(struct mlad_config *config, const char *path, bool must_exist,
                      const struct mlad_setting *settings, size_t n_settings, char error[MLAD_CONFIG_ERROR]);

/* Apply the text of a file called `name` (for errors) to `config`. */
bool mlad_config_parse(struct mlad_config *config, const char *text, size_t length, const char *name,
                       char error[MLAD_CONFIG_ERROR]);

/* The word chosen for a choice option, such as "avx2" for "cpu_variant". */
const char *mlad_config_choice(const struct mlad_config *config, const char *key);

/* Take over into `live` what a reload may change in `wanted`. Options that differ but need a restart stay as they are;
 * their names are written to `restart`, separated by ", ". */
void mlad_config_reload(struct mlad_config *live, const struct mlad_config *wanted, char *restart, size_t size);

/* A configuration file that says the same as `config`, every option documented; those with their default value
 * are commented out. */
void mlad_config_print(const struct mlad_config *config, FILE *to);

/* The options, their bounds and defaults, for --help. */
void mlad_config_help(FILE *to);

#endif
