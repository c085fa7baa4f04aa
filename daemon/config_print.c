/* config_print.c - the configuration as text: for --print-config, deploy/mlad.conf and --help. See config.h. */
#include "config.h"

#include "options.h"

#include <string.h>

/* The value as parse_value reads it, after a blank if there is any. */
static void print_value(const struct mlad_option *option, const struct mlad_config *config, FILE *to)
{
    const void *value = mlad_option_value(option, config);
    char number[32];
    switch (option->kind) {
    case MLAD_TEXT:
        fprintf(to, "%s%s", *(const char *)value ? " " : "", (const char *)value);
        break;
    case MLAD_CHOICE:
        fprintf(to, " %s", mlad_config_choice(config, option->name));
        break;
    case MLAD_NAMES: {
        const struct mlad_names *names = value;
        for (uint32_t i = 0; i < names->n; i++)
            fprintf(to, "%s %s", i ? "," : "", names->name[i]);
        break;
    }
    case MLAD_USERS:
    case MLAD_ANY_USERS:
    case MLAD_GROUPS: {
        const struct mlad_ids *ids = value;
        fputs(ids->everyone ? " *" : "", to);
        for (uint32_t i = 0; i < ids->n; i++)
            fprintf(to, "%s %s", i || ids->everyone ? "," : "", ids->entry[i].name);
        break;
    }
    default:
        mlad_option_print_number(option->kind, *(const uint64_t *)value, number);
        fprintf(to, " %s", number);
    }
}

/* Words of `text`, each line begun with `indent` and at most 100 columns long. */
static void print_wrapped(const char *indent, const char *text, FILE *to)
{
    size_t column = 0;
    while (*text) {
        size_t n = strcspn(text, " ");
        if (column > 0 && column + 1 + n > 100) {
            fputc('\n', to);
            column = 0;
        }
        int printed = column == 0 ? fprintf(to, "%s%.*s", indent, (int)n, text) : fprintf(to, " %.*s", (int)n, text);
        column += printed > 0 ? (size_t)printed : 0;
        text += n + strspn(text + n, " ");
    }
    fputc('\n', to);
}

static void print_option_help(const char *indent, const struct mlad_option *option, FILE *to)
{
    char bounds[96], text[1024];
    mlad_option_print_bounds(option, bounds, sizeof bounds);
    snprintf(text, sizeof text, "%s (%s%s)", option->help, bounds,
             option->when == MLAD_RESTART ? "; needs a restart" : "");
    print_wrapped(indent, text, to);
}

void mlad_config_print(const struct mlad_config *config, FILE *to)
{
    static struct mlad_config standard;
    char error[MLAD_CONFIG_ERROR];
    mlad_config_load(&standard, NULL, false, NULL, 0, error);
    fputs(
        "# mlad.conf - configuration of mlad, the decode daemon. Written by `mlad --print-config`.\n"
        "#\n"
        "# One `key = value` a line; a # at the start of a line or after a blank begins a comment; lists are "
        "separated\n"
        "# by commas. What is commented out here has its default. `systemctl reload mlad` (or SIGHUP) reads this file\n"
        "# again; options that need a restart say so. `mlad --check-config` checks it; the command line\n"
        "# (`-o key=value`) goes before it.\n",
        to);
    for (size_t i = 0; i < mlad_n_options; i++) {
        const struct mlad_option *option = &mlad_options[i];
        bool same = memcmp(mlad_option_value(option, config), mlad_option_value(option, &standard), option->size) == 0;
        fputc('\n', to);
        print_option_help("# ", option, to);
        fprintf(to, "%s%s =", same ? "#" : "", option->name);
        print_value(option, config, to);
        fputc('\n', to);
    }
}

void mlad_config_help(FILE *to)
{
    for (size_t i = 0; i < mlad_n_options; i++) {
        fprintf(to, "  %s = %s\n", mlad_options[i].name,
                *mlad_options[i].standard ? mlad_options[i].standard : "(empty)");
        print_option_help("        ", &mlad_options[i], to);
    }
}
