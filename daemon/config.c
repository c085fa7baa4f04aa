/* config.c - reading the configuration, driven by the table of options.c. See config.h.
 *
 * Each kind of option has one parser here and one printer in config_print.c; neither knows an option by name. */
#include "config.h"

#include "options.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <pwd.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { FILE_LIMIT = 65536, LINE_LIMIT = 4096 };

/* Where a value came from, for the sentence that refuses it. */
struct origin {
    const char *file;
    unsigned line; /* 0: the command line */
    const char *key;
    char *error;
    uint64_t given; /* bit i: mlad_options[i] was set here */
};

__attribute__((format(printf, 2, 3))) static bool refuse(const struct origin *origin, const char *format, ...)
{
    int n = origin->line ? snprintf(origin->error, MLAD_CONFIG_ERROR, "%s:%u: %s%s", origin->file, origin->line,
                                    origin->key, *origin->key ? ": " : "")
                         : snprintf(origin->error, MLAD_CONFIG_ERROR, "%s: %s: ", origin->file, origin->key);
    va_list arguments;
    va_start(arguments, format);
    if (n >= 0 && n < MLAD_CONFIG_ERROR)
        vsnprintf(origin->error + n, (size_t)(MLAD_CONFIG_ERROR - n), format, arguments);
    va_end(arguments);
    return false;
}

static bool parse_number(const struct mlad_option *option, const char *value, uint64_t *number,
                         const struct origin *origin)
{
    char bounds[96], *end;
    mlad_option_print_bounds(option, bounds, sizeof bounds);
    errno = 0;
    unsigned long long n =
        isdigit((unsigned char)*value) ? strtoull(value, &end, option->kind == MLAD_MODE ? 8 : 10) : 0;
    if (!isdigit((unsigned char)*value))
        return refuse(origin, "'%.64s' is no number; write one of %s", value, bounds);
    const struct mlad_unit *unit = mlad_units(option->kind);
    while (unit->suffix && strcmp(unit->suffix, end) != 0)
        unit++;
    if (!unit->suffix)
        return refuse(origin, "'%.64s' is not understood from '%.16s' on; write a number of %s", value, end, bounds);
    if (errno == ERANGE || __builtin_mul_overflow(n, unit->factor, &n) || n < option->min || n > option->max)
        return refuse(origin, "%.64s is out of bounds; write a number of %s", value, bounds);
    *number = n;
    return true;
}

/* ---- lists ---- */

static char *trim(char *text)
{
    while (isspace((unsigned char)*text))
        text++;
    for (size_t n = strlen(text); n > 0 && isspace((unsigned char)text[n - 1]); n--)
        text[n - 1] = '\0';
    return text;
}

/* Has it the form of a GPU's UUID, as the driver and nvidia-smi write it? */
static bool is_uuid(const char *word)
{
    static const char form[] = "GPU-hhhhhhhh-hhhh-hhhh-hhhh-hhhhhhhhhhhh";
    for (size_t i = 0; i < sizeof form; i++) /* its end too */
        if (form[i] == 'h' ? !word[i] || !strchr("0123456789abcdef", word[i]) : word[i] != form[i])
            return false;
    return true;
}

static bool parse_name(const char *word, struct mlad_names *names, const struct origin *origin)
{
    if (strcmp(word, "cpu") != 0 && strcmp(word, "reference") != 0 && strcmp(word, MLAD_ALL) != 0 && !is_uuid(word))
        return refuse(origin,
                      "'%s' is no device; write cpu, reference, %s, or a GPU's UUID as nvidia-smi -L prints it: "
                      "GPU-01234567-89ab-cdef-0123-456789abcdef", word, MLAD_ALL);
    for (uint32_t i = 0; i < names->n; i++)
        if (strcmp(names->name[i], word) == 0)
            return refuse(origin, "'%s' is listed twice; remove one", word);
    strcpy(names->name[names->n++], word); /* parse_list bounded both */
    return true;
}

static bool parse_id(enum mlad_kind kind, const char *word, struct mlad_ids *ids, const struct origin *origin)
{
    const char *what = kind == MLAD_GROUPS ? "group" : "user";
    uint32_t id;
    if (strcmp(word, "*") == 0) {
        if (kind != MLAD_ANY_USERS)
            return refuse(origin, "* is not allowed here; list each %s", what);
        ids->everyone = true;
        return true;
    }
    if (strspn(word, "0123456789") == strlen(word)) {
        errno = 0;
        unsigned long long n = strtoull(word, NULL, 10);
        if (errno == ERANGE || n >= UINT32_MAX) /* the largest means "no id" */
            return refuse(origin, "%s is no %s id; write one of 0..4294967294, or a name", word, what);
        id = (uint32_t)n;
    } else if (kind == MLAD_GROUPS) {
        const struct group *group = getgrnam(word);
        if (!group)
            return refuse(origin, "there is no group '%s' here; create it, or write a numeric id", word);
        id = group->gr_gid;
    } else {
        const struct passwd *user = getpwnam(word);
        if (!user)
            return refuse(origin, "there is no user '%s' here; create it, or write a numeric id", word);
        id = user->pw_uid;
    }
    strcpy(ids->entry[ids->n].name, word);
    ids->entry[ids->n++].id = id;
    return true;
}

static bool parse_list(const struct mlad_option *option, char *value, void *into, const struct origin *origin)
{
    uint64_t n = 0;
    for (char *rest = *value ? value : NULL; rest;) {
        const char *word = trim(strsep(&rest, ","));
        if (!*word)
            return refuse(origin, "an entry is empty; remove the surplus comma");
        if (strlen(word) > 63)
            return refuse(origin, "'%.16s...' is too long; names have at most 63 bytes", word);
        if (++n > option->max)
            return refuse(origin, "more than %llu entries; remove some", (unsigned long long)option->max);
        if (option->kind == MLAD_NAMES ? !parse_name(word, into, origin) : !parse_id(option->kind, word, into, origin))
            return false;
    }
    return n >= option->min ? true
                            : refuse(origin, "the list is empty; name at least %llu", (unsigned long long)option->min);
}

/* ---- one option ---- */

static bool parse_choice(const struct mlad_option *option, const char *value, uint64_t *index,
                         const struct origin *origin)
{
    char bounds[96];
    const char *const *words = option->choices;
    for (*index = 0; words[*index]; ++*index)
        if (strcmp(words[*index], value) == 0)
            return true;
    mlad_option_print_bounds(option, bounds, sizeof bounds);
    return refuse(origin, "'%.64s' is none of the choices; write one of %s", value, bounds);
}

/* A path, but none that a line of the file could not hold. */
static bool parse_text(const struct mlad_option *option, const char *value, char *into, const struct origin *origin)
{
    if (strlen(value) < option->min || strlen(value) > option->max)
        return refuse(origin, "%zu bytes are out of bounds; write %llu..%llu bytes", strlen(value),
                      (unsigned long long)option->min, (unsigned long long)option->max);
    for (const char *c = value; *c; c++)
        if (iscntrl((unsigned char)*c) || (*c == '#' && (c == value || c[-1] == ' ')))
            return refuse(origin,
                          "it holds a control character, or a # where a comment would begin; choose another name");
    strcpy(into, value);
    return true;
}

static bool parse_value(const struct mlad_option *option, struct mlad_config *config, char *value,
                        const struct origin *origin)
{
    void *into = mlad_option_member(option, config);
    memset(into, 0, option->size);
    switch (option->kind) {
    case MLAD_TEXT:
        return parse_text(option, value, into, origin);
    case MLAD_MODE:
    case MLAD_NUMBER:
    case MLAD_BYTES:
    case MLAD_DURATION:
        return parse_number(option, value, into, origin);
    case MLAD_CHOICE:
        return parse_choice(option, value, into, origin);
    default:
        return parse_list(option, value, into, origin);
    }
}

/* Set option `origin->key`; `value` is changed. */
static bool set(struct mlad_config *config, char *value, struct origin *origin)
{
    const struct mlad_option *option = mlad_option_by_name(origin->key);
    if (!option)
        return refuse(origin, "unknown option; `mlad --help` lists them all");
    uint64_t bit = UINT64_C(1) << (option - mlad_options);
    if (origin->given & bit)
        return refuse(origin, "set twice; keep one");
    origin->given |= bit;
    return parse_value(option, config, value, origin);
}

static bool set_text(struct mlad_config *config, const char *text, struct origin *origin)
{
    char value[LINE_LIMIT];
    if (strlen(text) >= sizeof value)
        return refuse(origin, "the value is longer than %d bytes; shorten it", LINE_LIMIT - 1);
    strcpy(value, text);
    return set(config, trim(value), origin);
}

static bool set_defaults(struct mlad_config *config, char *error)
{
    struct origin origin = {.file = "default", .error = error};
    memset(config, 0, sizeof *config);
    for (size_t i = 0; i < mlad_n_options; i++) {
        origin.key = mlad_options[i].name;
        if (!set_text(config, mlad_options[i].standard, &origin))
            return false;
    }
    return true;
}

/* ---- files ---- */

/* One line, its end removed. A # at its start or after a blank begins a comment. */
static bool parse_line(struct mlad_config *config, char *line, struct origin *origin)
{
    for (char *c = line; *c; c++)
        if (*c == '#' && (c == line || isspace((unsigned char)c[-1]))) {
            *c = '\0';
            break;
        }
    line = trim(line);
    if (!*line)
        return true;
    char *equals = strchr(line, '=');
    if (!equals)
        return refuse(origin, "'%.64s' is no setting; write key = value", line);
    *equals = '\0';
    origin->key = trim(line);
    if (strlen(origin->key) > 63)
        return refuse(&(struct origin){origin->file, origin->line, "", origin->error, 0},
                      "'%.16s...' is no option; `mlad --help` lists them all", line);
    return set(config, trim(equals + 1), origin);
}

bool mlad_config_parse(struct mlad_config *config, const char *text, size_t length, const char *name,
                       char error[MLAD_CONFIG_ERROR])
{
    struct origin origin = {.file = name, .error = error};
    const char *end = text + length;
    while (text < end) {
        const char *newline = memchr(text, '\n', (size_t)(end - text));
        size_t n = (size_t)((newline ? newline : end) - text);
        char line[LINE_LIMIT];
        origin.line++;
        origin.key = "";
        if (n >= sizeof line)
            return refuse(&origin, "the line is longer than %d bytes; shorten it", LINE_LIMIT - 1);
        if (memchr(text, '\0', n))
            return refuse(&origin, "the line holds a NUL byte; remove it");
        memcpy(line, text, n);
        line[n] = '\0';
        if (!parse_line(config, line, &origin))
            return false;
        text += newline ? n + 1 : n;
    }
    return true;
}

/* The whole file into `text` of FILE_LIMIT + 1 bytes; -1 with errno. */
static ssize_t read_file(const char *path, char *text)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return -1;
    size_t length = 0;
    ssize_t n = 1;
    while (length <= FILE_LIMIT && (n = read(fd, text + length, FILE_LIMIT + 1 - length)) != 0)
        if (n > 0)
            length += (size_t)n;
        else if (errno != EINTR)
            break;
    int saved = errno;
    close(fd);
    errno = saved;
    return n < 0 ? -1 : (ssize_t)length;
}

static bool load_file(struct mlad_config *config, const char *path, bool must_exist, char *error)
{
    char *text = malloc(FILE_LIMIT + 1);
    ssize_t length = text ? read_file(path, text) : -1;
    bool done = false;
    if (length > FILE_LIMIT)
        snprintf(error, MLAD_CONFIG_ERROR, "%.256s: longer than %d bytes; this is no configuration file", path,
                 FILE_LIMIT);
    else if (length >= 0)
        done = mlad_config_parse(config, text, (size_t)length, path, error);
    else if (errno == ENOENT && !must_exist)
        done = true;
    else
        snprintf(error, MLAD_CONFIG_ERROR, "%.256s: cannot be read: %s", path, strerror(errno));
    free(text);
    return done;
}

bool mlad_config_load(struct mlad_config *config, const char *path, bool must_exist,
                      const struct mlad_setting *settings, size_t n_settings, char error[MLAD_CONFIG_ERROR])
{
    struct origin origin = {.file = "command line", .error = error};
    if (!set_defaults(config, error) || (path && !load_file(config, path, must_exist, error)))
        return false;
    for (size_t i = 0; i < n_settings; i++) {
        origin.key = settings[i].key;
        if (!set_text(config, settings[i].value, &origin))
            return false;
    }
    return true;
}

const char *mlad_config_choice(const struct mlad_config *config, const char *key)
{
    const struct mlad_option *option = mlad_option_by_name(key);
    return option->choices[*(const uint64_t *)mlad_option_value(option, config)];
}

void mlad_config_reload(struct mlad_config *live, const struct mlad_config *wanted, char *restart, size_t size)
{
    size_t n = 0;
    restart[0] = '\0';
    for (size_t i = 0; i < mlad_n_options; i++) {
        void *ours = mlad_option_member(&mlad_options[i], live);
        const void *theirs = mlad_option_value(&mlad_options[i], wanted);
        if (mlad_options[i].when == MLAD_RELOAD)
            memcpy(ours, theirs, mlad_options[i].size);
        else if (memcmp(ours, theirs, mlad_options[i].size) != 0 && n < size)
            n += (size_t)snprintf(restart + n, size - n, "%s%s", n ? ", " : "", mlad_options[i].name);
    }
}
