/* log.h - the daemon's one logger, for the supervisor and its workers.
 *
 * A record is a level, a fixed sentence and fields that are its variables:
 *
 *     mlad_log(LOG_WARNING, "worker ended", MLAD_KV("device", device->name), MLAD_KV("pid", pid));
 *
 * On stderr it is one line: time, level, sentence, key=value fields, and for warnings and worse (and debug) the
 * function and line it came from. In the journal each field is also a journal field of its own, MLAD_DEVICE=cpu. An
 * error is logged once, where it arises; who passes it on says nothing. Text that a peer chose is quoted and escaped.
 *
 * The logger belongs to the process. mlad_log may be called from any thread once mlad_log_open has returned;
 * it allocates nothing. */
#ifndef MLAD_LOG_H
#define MLAD_LOG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <syslog.h> /* LOG_ERR .. LOG_DEBUG */

enum mlad_log_target { MLAD_LOG_AUTO, MLAD_LOG_STDERR, MLAD_LOG_JOURNAL };

/* Choose where records go and the least urgent level that is kept. AUTO: the journal if stderr leads there
 * (JOURNAL_STREAM), else stderr. Also before this call records go to stderr, at LOG_INFO. */
void mlad_log_open(enum mlad_log_target target, int level);

void mlad_log_set_level(int level);
int mlad_log_level(void);
enum mlad_log_target mlad_log_target(void); /* never AUTO */

/* The syslog priority that "error", "warning", ... or a number 0..7 names; -1 if it is none. */
int mlad_log_level_from_text(const char *text);

struct mlad_field {
    const char *key; /* lower-case letters, digits and _ */
    enum { MLAD_FIELD_END, MLAD_FIELD_TEXT, MLAD_FIELD_SIGNED, MLAD_FIELD_UNSIGNED } kind;
    union {
        const char *text; /* NULL is shown as empty */
        int64_t i;
        uint64_t u;
    };
};

static inline struct mlad_field mlad_field_text(const char *key, const char *value)
{
    return (struct mlad_field){.key = key, .kind = MLAD_FIELD_TEXT, .text = value};
}

static inline struct mlad_field mlad_field_signed(const char *key, int64_t value)
{
    return (struct mlad_field){.key = key, .kind = MLAD_FIELD_SIGNED, .i = value};
}

static inline struct mlad_field mlad_field_unsigned(const char *key, uint64_t value)
{
    return (struct mlad_field){.key = key, .kind = MLAD_FIELD_UNSIGNED, .u = value};
}

/* A field of text or of any integer type. */
#define MLAD_KV(key, value)                                                                                            \
    _Generic((value), \
        char *: mlad_field_text, const char *: mlad_field_text, \
        signed char: mlad_field_signed, short: mlad_field_signed, int: mlad_field_signed, \
        long: mlad_field_signed, long long: mlad_field_signed, \
        bool: mlad_field_unsigned, unsigned char: mlad_field_unsigned, unsigned short: mlad_field_unsigned, \
        unsigned: mlad_field_unsigned, unsigned long: mlad_field_unsigned, \
        unsigned long long: mlad_field_unsigned)(key, value)

#define mlad_log(level, sentence, ...)                                                                                 \
    ((level) > mlad_log_level() ? (void)0                                                                              \
                                : mlad_log_write((level), __FILE__, __LINE__, __func__, (sentence),                    \
                                                 (struct mlad_field[]){__VA_ARGS__ __VA_OPT__(, ){0}}))

/* The same for what a peer can provoke at will: at most ten records each ten seconds from one place in the code; the
 * next one says how many were left out. */
#define mlad_log_provoked(level, sentence, ...)                                                                        \
    do {                                                                                                               \
        static struct mlad_log_limit limit_here;                                                                       \
        uint64_t left_out_here;                                                                                        \
        if (mlad_log_allows(&limit_here, &left_out_here))                                                              \
            mlad_log((level), (sentence), __VA_ARGS__, MLAD_KV("left_out", left_out_here));                            \
    } while (0)

struct mlad_log_limit {
    uint64_t period, count, left_out; /* __atomic_*, relaxed: a race may let one record more through */
};
bool mlad_log_allows(struct mlad_log_limit *limit, uint64_t *left_out);

/* What mlad_log calls; at most 16 fields are shown. errno is kept. */
void mlad_log_write(int level, const char *file, int line, const char *function, const char *sentence,
                    const struct mlad_field *fields);

#endif
