/* test_log.c - what a record looks like, on stderr caught in a pipe. */
#include "../proto/cmocka_all.h"

#include "log.h"

#include <errno.h>
#include <regex.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static char text[8192];

#define CAUGHT(statement) (catch_begin(), (void)(statement), catch_end())
static int real_stderr, catcher[2];

static void catch_begin(void)
{
    fflush(stderr);
    real_stderr = dup(STDERR_FILENO);
    assert_int_equal(pipe(catcher), 0);
    dup2(catcher[1], STDERR_FILENO);
    close(catcher[1]);
}

static const char *catch_end(void)
{
    dup2(real_stderr, STDERR_FILENO);
    close(real_stderr);
    ssize_t n = read(catcher[0], text, sizeof text - 1);
    close(catcher[0]);
    text[n > 0 ? n : 0] = '\0';
    return text;
}

static void assert_matches(const char *line, const char *pattern)
{
    regex_t regex;
    assert_int_equal(regcomp(&regex, pattern, REG_EXTENDED | REG_NOSUB), 0);
    if (regexec(&regex, line, 0, NULL, 0) != 0)
        fail_msg("%s does not match %s", line, pattern);
    regfree(&regex);
}

#define STAMP "^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:]{8}[.][0-9]{3}Z "

static void a_record_is_one_line_with_its_fields(void **state)
{
    (void)state;
    char name[] = "cpu";
    uint64_t bytes = UINT64_MAX;
    mlad_log_open(MLAD_LOG_STDERR, LOG_INFO);
    assert_matches(CAUGHT(mlad_log(LOG_NOTICE, "worker ended", MLAD_KV("device", name), MLAD_KV("status", -3),
                                   MLAD_KV("bytes", bytes), MLAD_KV("ok", true))),
                   STAMP "notice worker ended device=cpu status=-3 bytes=18446744073709551615 ok=1\n$");
    assert_matches(CAUGHT(mlad_log(LOG_INFO, "nothing more")), STAMP "info nothing more\n$");
}

static void warnings_and_worse_say_where_they_arose(void **state)
{
    (void)state;
    mlad_log_open(MLAD_LOG_STDERR, LOG_INFO);
    assert_matches(
        CAUGHT(mlad_log(LOG_ERR, "broken", MLAD_KV("why", strerror(ENOENT)))),
        STAMP "error broken why=\"No such file or directory\" [(]warnings_and_worse_say_where_they_arose:[0-9]+[)]\n$");
}

static void less_urgent_records_are_left_out(void **state)
{
    (void)state;
    mlad_log_open(MLAD_LOG_STDERR, LOG_WARNING);
    assert_string_equal(CAUGHT(mlad_log(LOG_NOTICE, "unheard")), "");
    mlad_log_set_level(LOG_NOTICE);
    assert_matches(CAUGHT(mlad_log(LOG_NOTICE, "heard")), STAMP "notice heard\n$");
}

static void text_of_a_peer_cannot_forge_records(void **state)
{
    (void)state;
    const char *hostile = "x\n2026 error \"pwned\" uid=0 \\ \x1b[31m";
    mlad_log_open(MLAD_LOG_STDERR, LOG_INFO);
    const char *line = CAUGHT(mlad_log(LOG_INFO, "hello", MLAD_KV("client", hostile), MLAD_KV("empty", "")));
    assert_non_null(strstr(line, "hello client=\"x\\x0a2026 error \\\"pwned\\\" uid=0 \\\\ \\x1b[31m\" empty=\"\"\n"));
    assert_ptr_equal(strchr(line, '\n'), line + strlen(line) - 1);
}

static void long_text_is_cut_and_the_line_still_ends(void **state)
{
    (void)state;
    char *huge = malloc(5001);
    memset(huge, 'a', 5000);
    huge[5000] = '\0';
    mlad_log_open(MLAD_LOG_STDERR, LOG_INFO);
    const char *line = CAUGHT(mlad_log(LOG_INFO, "big", MLAD_KV("value", huge)));
    assert_in_range(strlen(line), 1000, 2048);
    assert_int_equal(line[strlen(line) - 1], '\n');
    free(huge);
}

static void provoke(int times)
{
    for (int i = 0; i < times; i++)
        mlad_log_provoked(LOG_INFO, "refused", MLAD_KV("i", i));
}

static void what_a_peer_provokes_is_bounded(void **state)
{
    (void)state;
    mlad_log_open(MLAD_LOG_STDERR, LOG_INFO);
    const char *lines = CAUGHT(provoke(10000));
    unsigned said = 0;
    for (const char *c = lines; *c; c++)
        said += *c == '\n';
    assert_in_range(said, 10, 20); /* within one period of ten seconds, or over the border of two */
}

static void the_journal_is_chosen_when_stderr_leads_there(void **state)
{
    (void)state;
    struct stat st;
    char stream[64];
    fstat(STDERR_FILENO, &st);
    snprintf(stream, sizeof stream, "%llu:%llu", (unsigned long long)st.st_dev, (unsigned long long)st.st_ino);
    setenv("JOURNAL_STREAM", stream, 1);
    mlad_log_open(MLAD_LOG_AUTO, LOG_INFO);
    assert_int_equal(mlad_log_target(), MLAD_LOG_JOURNAL);
    setenv("JOURNAL_STREAM", "1:1", 1);
    mlad_log_open(MLAD_LOG_AUTO, LOG_INFO);
    assert_int_equal(mlad_log_target(), MLAD_LOG_STDERR);
    unsetenv("JOURNAL_STREAM");
    mlad_log_open(MLAD_LOG_AUTO, LOG_INFO);
    assert_int_equal(mlad_log_target(), MLAD_LOG_STDERR);
}

static void errno_survives(void **state)
{
    (void)state;
    mlad_log_open(MLAD_LOG_STDERR, LOG_INFO);
    int closed = dup(STDERR_FILENO);
    close(STDERR_FILENO);
    errno = EAGAIN;
    mlad_log(LOG_INFO, "into nothing");
    int kept = errno;
    dup2(closed, STDERR_FILENO);
    close(closed);
    assert_int_equal(kept, EAGAIN);
}

static void levels_have_names_and_numbers(void **state)
{
    (void)state;
    assert_int_equal(mlad_log_level_from_text("warning"), LOG_WARNING);
    assert_int_equal(mlad_log_level_from_text("7"), LOG_DEBUG);
    assert_int_equal(mlad_log_level_from_text("8"), -1);
    assert_int_equal(mlad_log_level_from_text(""), -1);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_record_is_one_line_with_its_fields),
        cmocka_unit_test(warnings_and_worse_say_where_they_arose),
        cmocka_unit_test(less_urgent_records_are_left_out),
        cmocka_unit_test(text_of_a_peer_cannot_forge_records),
        cmocka_unit_test(long_text_is_cut_and_the_line_still_ends),
        cmocka_unit_test(what_a_peer_provokes_is_bounded),
        cmocka_unit_test(the_journal_is_chosen_when_stderr_leads_there),
        cmocka_unit_test(errno_survives),
        cmocka_unit_test(levels_have_names_and_numbers),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
