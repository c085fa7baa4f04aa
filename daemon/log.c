/* log.c - the process's logger: one record is one write to stderr or one journal entry. See log.h.
 *
 * State is two atomics, so records from any thread need no lock; a line is built on the stack and written whole. */
#define SD_JOURNAL_SUPPRESS_LOCATION
#include "log.h"

#include <errno.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <systemd/sd-journal.h>
#include <time.h>
#include <unistd.h>

enum { MAX_FIELDS = 16, LINE_BYTES = 2048 };

static atomic_int log_level = LOG_INFO;
static atomic_int log_target = MLAD_LOG_STDERR;

static const char *const level_names[] = {"emergency", "alert",  "critical", "error",
                                          "warning",   "notice", "info",     "debug"};

/* Text under construction; what does not fit is cut. */
struct text {
    char *at;
    size_t left; /* the terminating NUL included */
};

static void put(struct text *to, const char *bytes, size_t length)
{
    if (length >= to->left)
        length = to->left - 1;
    memcpy(to->at, bytes, length);
    to->at += length;
    to->left -= length;
    *to->at = '\0';
}

static void put_text(struct text *to, const char *text)
{
    put(to, text, strlen(text));
}

/* Bare if it is one plain word; else in double quotes, with quotes, backslashes and control bytes escaped: a peer's
 * name can neither end the line nor look like another field. */
static void put_value(struct text *to, const char *value)
{
    bool plain = *value != '\0';
    for (const unsigned char *c = (const unsigned char *)value; *c; c++)
        plain = plain && *c > ' ' && *c < 0x7f && *c != '"' && *c != '\\' && *c != '=';
    if (plain) {
        put_text(to, value);
        return;
    }
    put_text(to, "\"");
    for (const unsigned char *c = (const unsigned char *)value; *c; c++) {
        char escaped[5];
        if (*c < ' ' || *c == 0x7f)
            snprintf(escaped, sizeof escaped, "\\x%02x", *c);
        else
            snprintf(escaped, sizeof escaped, *c == '"' || *c == '\\' ? "\\%c" : "%c", *c);
        put_text(to, escaped);
    }
    put_text(to, "\"");
}

/* The field's value as text: its own, or a number's in `number`. */
static const char *field_value(const struct mlad_field *field, char number[24])
{
    if (field->kind == MLAD_FIELD_TEXT)
        return field->text ? field->text : "";
    if (field->kind == MLAD_FIELD_SIGNED)
        snprintf(number, 24, "%lld", (long long)field->i);
    else
        snprintf(number, 24, "%llu", (unsigned long long)field->u);
    return number;
}

static void put_sentence(struct text *to, const char *sentence, const struct mlad_field *fields)
{
    put_text(to, sentence);
    for (unsigned i = 0; i < MAX_FIELDS && fields[i].kind != MLAD_FIELD_END; i++) {
        char number[24];
        put_text(to, " ");
        put_text(to, fields[i].key);
        put_text(to, "=");
        put_value(to, field_value(&fields[i], number));
    }
}

static void write_stderr(int level, int line, const char *function, const char *sentence,
                         const struct mlad_field *fields)
{
    char buffer[LINE_BYTES];
    struct text to = {buffer, sizeof buffer - 1}; /* one byte is kept for the end of the line */
    struct timespec now;
    struct tm utc;
    char stamp[32], place[96];

    clock_gettime(CLOCK_REALTIME, &now);
    gmtime_r(&now.tv_sec, &utc);
    strftime(stamp, sizeof stamp, "%Y-%m-%dT%H:%M:%S", &utc);
    put_text(&to, stamp);
    snprintf(stamp, sizeof stamp, ".%03ldZ ", now.tv_nsec / 1000000);
    put_text(&to, stamp);
    put_text(&to, level_names[level]);
    put_text(&to, " ");
    put_sentence(&to, sentence, fields);
    if (level <= LOG_WARNING || level == LOG_DEBUG) {
        snprintf(place, sizeof place, " (%s:%d)", function, line);
        put_text(&to, place);
    }
    *to.at++ = '\n';
    /* Nothing can be done about a log that takes no more. */
    ssize_t written = write(STDERR_FILENO, buffer, (size_t)(to.at - buffer));
    (void)written;
}

/* "NAME=value" in `storage`, as a journal field. */
__attribute__((format(printf, 3, 4))) static struct iovec journal_field(char *storage, size_t size, const char *format,
                                                                        ...)
{
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(storage, size, format, arguments);
    va_end(arguments);
    return (struct iovec){storage, (size_t)length < size ? (size_t)length : size - 1};
}

static int write_journal(int level, const char *file, int line, const char *function, const char *sentence,
                         const struct mlad_field *fields)
{
    char message[LINE_BYTES], own[MAX_FIELDS][300], place[4][160];
    struct iovec entry[MAX_FIELDS + 5];
    int n = 0;

    struct text to = {message, sizeof message};
    put_text(&to, "MESSAGE=");
    put_sentence(&to, sentence, fields);
    entry[n++] = (struct iovec){message, (size_t)(to.at - message)};
    entry[n++] = journal_field(place[0], sizeof place[0], "PRIORITY=%d", level);
    entry[n++] = journal_field(place[1], sizeof place[1], "CODE_FILE=%s", file);
    entry[n++] = journal_field(place[2], sizeof place[2], "CODE_LINE=%d", line);
    entry[n++] = journal_field(place[3], sizeof place[3], "CODE_FUNC=%s", function);
    for (unsigned i = 0; i < MAX_FIELDS && fields[i].kind != MLAD_FIELD_END; i++) {
        char number[24];
        entry[n] = journal_field(own[i], sizeof own[i], "MLAD_%s=%s", fields[i].key, field_value(&fields[i], number));
        for (char *c = own[i]; *c != '='; c++)
            if (*c >= 'a' && *c <= 'z')
                *c = (char)(*c - 'a' + 'A');
        n++;
    }
    return sd_journal_sendv(entry, n);
}

void mlad_log_write(int level, const char *file, int line, const char *function, const char *sentence,
                    const struct mlad_field *fields)
{
    int keep = errno;
    /* Without a journal the record must not be lost. */
    if (mlad_log_target() != MLAD_LOG_JOURNAL || write_journal(level, file, line, function, sentence, fields) < 0)
        write_stderr(level, line, function, sentence, fields);
    errno = keep;
}

bool mlad_log_allows(struct mlad_log_limit *limit, uint64_t *left_out)
{
    enum { PERIOD_S = 10, RECORDS = 10 };
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    uint64_t period = 1 + (uint64_t)now.tv_sec / PERIOD_S;
    if (__atomic_exchange_n(&limit->period, period, __ATOMIC_RELAXED) != period)
        __atomic_store_n(&limit->count, 0, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&limit->count, 1, __ATOMIC_RELAXED) > RECORDS) {
        __atomic_add_fetch(&limit->left_out, 1, __ATOMIC_RELAXED);
        return false;
    }
    *left_out = __atomic_exchange_n(&limit->left_out, 0, __ATOMIC_RELAXED);
    return true;
}

/* systemd names stderr's socket in JOURNAL_STREAM; somebody may have redirected stderr since. */
static bool stderr_is_journal(void)
{
    const char *stream = getenv("JOURNAL_STREAM");
    unsigned long long device, inode;
    struct stat st;
    return stream && sscanf(stream, "%llu:%llu", &device, &inode) == 2 && fstat(STDERR_FILENO, &st) == 0 &&
           st.st_dev == device && st.st_ino == inode;
}

void mlad_log_open(enum mlad_log_target target, int level)
{
    if (target == MLAD_LOG_AUTO)
        target = stderr_is_journal() ? MLAD_LOG_JOURNAL : MLAD_LOG_STDERR;
    atomic_store_explicit(&log_target, (int)target, memory_order_relaxed);
    mlad_log_set_level(level);
}

void mlad_log_set_level(int level)
{
    atomic_store_explicit(&log_level, level, memory_order_relaxed);
}

int mlad_log_level(void)
{
    return atomic_load_explicit(&log_level, memory_order_relaxed);
}

enum mlad_log_target mlad_log_target(void)
{
    return (enum mlad_log_target)atomic_load_explicit(&log_target, memory_order_relaxed);
}

int mlad_log_level_from_text(const char *text)
{
    for (int level = 0; level <= LOG_DEBUG; level++)
        if (strcmp(text, level_names[level]) == 0 || (text[0] == '0' + level && text[1] == '\0'))
            return level;
    return -1;
}
