/* options.h - the table of options, for config.c and config_print.c only. See options.c. */
#ifndef MLAD_OPTIONS_H
#define MLAD_OPTIONS_H

#include "config.h"

#include <stddef.h>
#include <stdint.h>

/* NAMES and those after it are lists. */
enum mlad_kind {
    MLAD_TEXT,
    MLAD_MODE,
    MLAD_NUMBER,
    MLAD_BYTES,
    MLAD_DURATION,
    MLAD_CHOICE,
    MLAD_NAMES,
    MLAD_USERS,
    MLAD_ANY_USERS,
    MLAD_GROUPS
};
enum mlad_when { MLAD_RESTART, MLAD_RELOAD };

struct mlad_option {
    const char *name;
    enum mlad_kind kind;
    uint64_t min, max;
    const char *standard;       /* the default, as a person would write it */
    const char *const *choices; /* CHOICE: its words, NULL at the end; the member holds an index */
    enum mlad_when when;
    const char *help;
    size_t offset, size; /* of its member in struct mlad_config */
};

extern const struct mlad_option mlad_options[];
extern const size_t mlad_n_options; /* at most 64 */

/* NULL if there is none of that name. */
const struct mlad_option *mlad_option_by_name(const char *name);

/* Its member. */
void *mlad_option_member(const struct mlad_option *option, struct mlad_config *config);
const void *mlad_option_value(const struct mlad_option *option, const struct mlad_config *config);

/* Suffixes that numbers of a kind may have, NULL at the end. */
struct mlad_unit {
    const char *suffix;
    uint64_t factor;
};
const struct mlad_unit *mlad_units(enum mlad_kind kind);

/* `value` as a person would write it. */
void mlad_option_print_number(enum mlad_kind kind, uint64_t value, char to[32]);

/* What it may be: "1..65536", "auto, stderr, journal". */
void mlad_option_print_bounds(const struct mlad_option *option, char *to, size_t size);

#endif
