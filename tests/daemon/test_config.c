/* test_config.c - the configuration: every option is read, every mistake is refused in words that say where and what to
 * do. */
#include "../proto/cmocka_all.h"

#include "config.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static struct mlad_config config, other;
static char error[MLAD_CONFIG_ERROR];

static bool parse(const char *text)
{
    assert_true(mlad_config_load(&config, NULL, false, NULL, 0, error));
    error[0] = '\0';
    return mlad_config_parse(&config, text, strlen(text), "test.conf", error);
}

static void assert_refused(const char *text, const char *sentence)
{
    if (parse(text))
        fail_msg("'%s' was accepted", text);
    if (strcmp(error, sentence) != 0)
        fail_msg("'%s' is refused with\n  %s\nnot\n  %s", text, error, sentence);
}

static void no_device(const char *name)
{
    char text[128], sentence[MLAD_CONFIG_ERROR];
    snprintf(text, sizeof text, "devices = cpu, %s", name);
    snprintf(sentence, sizeof sentence,
             "test.conf:1: devices: '%s' is no device; write cpu, reference, all, or a GPU's UUID as nvidia-smi -L "
             "prints it: GPU-01234567-89ab-cdef-0123-456789abcdef", name);
    assert_refused(text, sentence);
}

static void defaults_are_those_of_the_documentation(void **state)
{
    (void)state;
    assert_true(parse(""));
    assert_string_equal(config.socket, "/run/mlad/mlad.sock");
    assert_int_equal(config.socket_mode, 0666);
    assert_int_equal(config.devices.n, 1);
    assert_string_equal(config.devices.name[0], "cpu");
    assert_int_equal(config.allowed_users.n + config.allowed_groups.n + config.admin_users.n, 0);
    assert_false(config.allowed_users.everyone);
    assert_int_equal(config.max_bytes, 64ull << 30);
    assert_int_equal(config.hello_timeout, 5000);
    assert_int_equal(config.worker_timeout, 10000);
    assert_string_equal(config.runtime_dir, "");
    assert_string_equal(mlad_config_choice(&config, "cpu_variant"), "auto");
    assert_string_equal(mlad_config_choice(&config, "log_level"), "info");
}

static void every_option_is_read(void **state)
{
    (void)state;
    assert_true(
        parse("socket = /tmp/x.sock\nsocket_mode = 0600\ndevices = cpu, reference\nallowed_users = root , 1000\n"
              "allowed_groups = 12,root\nadmin_users = 7\nmax_sessions = 2\nmax_bytes = 3M\nmax_buffers = 4\n"
              "max_plans = 5\nmax_in_flight = 6\nqueue_limit = 7\nmax_connections = 8\n"
              "max_bytes_per_session = 2M\nmax_in_flight_per_session = 3\n"
              "max_connections_per_user = 9\nhello_timeout = 100ms\nworker_timeout = 2\ndrain_timeout = 3min\n"
              "runtime_dir = /tmp\ncpu_threads = 10\ncpu_variant = avx2\nlog_level = debug\nlog_target = journal"));
    assert_string_equal(config.socket, "/tmp/x.sock");
    assert_int_equal(config.socket_mode, 0600);
    assert_int_equal(config.devices.n, 2);
    assert_string_equal(config.devices.name[1], "reference");
    assert_int_equal(config.allowed_users.n, 2);
    assert_int_equal(config.allowed_users.entry[0].id, 0);
    assert_int_equal(config.allowed_users.entry[1].id, 1000);
    assert_int_equal(config.allowed_groups.entry[0].id, 12);
    assert_int_equal(config.allowed_groups.entry[1].id, 0);
    assert_int_equal(config.admin_users.entry[0].id, 7);
    assert_int_equal(config.max_sessions, 2);
    assert_int_equal(config.max_bytes, 3 << 20);
    assert_int_equal(config.max_buffers, 4);
    assert_int_equal(config.max_plans, 5);
    assert_int_equal(config.max_in_flight, 6);
    assert_int_equal(config.max_bytes_per_session, 2 << 20);
    assert_int_equal(config.max_in_flight_per_session, 3);
    assert_int_equal(config.queue_limit, 7);
    assert_int_equal(config.max_connections, 8);
    assert_int_equal(config.max_connections_per_user, 9);
    assert_int_equal(config.hello_timeout, 100);
    assert_int_equal(config.worker_timeout, 2000);
    assert_int_equal(config.drain_timeout, 180000);
    assert_string_equal(config.runtime_dir, "/tmp");
    assert_int_equal(config.cpu_threads, 10);
    assert_string_equal(mlad_config_choice(&config, "cpu_variant"), "avx2");
    assert_string_equal(mlad_config_choice(&config, "log_level"), "debug");
    assert_string_equal(mlad_config_choice(&config, "log_target"), "journal");
}

static void blanks_and_comments_are_skipped(void **state)
{
    (void)state;
    assert_true(parse("# a comment\n\n  \t\n   max_plans=5 # another\r\nsocket = /tmp/a#b\nallowed_users = *"));
    assert_int_equal(config.max_plans, 5);
    assert_string_equal(config.socket, "/tmp/a#b");
    assert_true(config.allowed_users.everyone);
    assert_true(parse("allowed_users ="));
    assert_int_equal(config.allowed_users.n, 0);
}

static void mistakes_are_refused_with_place_bounds_and_remedy(void **state)
{
    (void)state;
    assert_refused("\nmax_plan = 5", "test.conf:2: max_plan: unknown option; `mlad --help` lists them all");
    assert_refused("max_plans = 1\n\nmax_plans = 1", "test.conf:3: max_plans: set twice; keep one");
    assert_refused("max_plans", "test.conf:1: 'max_plans' is no setting; write key = value");
    assert_refused("max_plans = 0", "test.conf:1: max_plans: 0 is out of bounds; write a number of 1..1000000");
    assert_refused("max_plans = 1000001",
                   "test.conf:1: max_plans: 1000001 is out of bounds; write a number of 1..1000000");
    assert_refused("max_plans = 99999999999999999999",
                   "test.conf:1: max_plans: 99999999999999999999 is out of bounds; write a number of 1..1000000");
    assert_refused("max_plans = many", "test.conf:1: max_plans: 'many' is no number; write one of 1..1000000");
    assert_refused("max_plans = -1", "test.conf:1: max_plans: '-1' is no number; write one of 1..1000000");
    assert_refused("max_plans =", "test.conf:1: max_plans: '' is no number; write one of 1..1000000");
    assert_refused("max_plans = 5k",
                   "test.conf:1: max_plans: '5k' is not understood from 'k' on; write a number of 1..1000000");
    assert_refused("max_bytes = 1K", "test.conf:1: max_bytes: 1K is out of bounds; write a number of 4K..1024T");
    assert_refused("max_bytes = 99999999999999T",
                   "test.conf:1: max_bytes: 99999999999999T is out of bounds; write a number of 4K..1024T");
    assert_refused("hello_timeout = 5h",
                   "test.conf:1: hello_timeout: '5h' is not understood from 'h' on; write a number of 50ms..600s");
    assert_refused("hello_timeout = 1ms",
                   "test.conf:1: hello_timeout: 1ms is out of bounds; write a number of 50ms..600s");
    assert_refused("socket_mode = 0999",
                   "test.conf:1: socket_mode: '0999' is not understood from '999' on; write a number of 0000..0777");
    assert_refused("socket_mode = 01777",
                   "test.conf:1: socket_mode: 01777 is out of bounds; write a number of 0000..0777");
    assert_refused("socket =", "test.conf:1: socket: 0 bytes are out of bounds; write 1..107 bytes");
    assert_refused("socket =#x",
                   "test.conf:1: socket: it holds a control character, or a # where a comment would begin; "
                   "choose another name");
    assert_refused("log_level = loud",
                   "test.conf:1: log_level: 'loud' is none of the choices; write one of emergency, alert, "
                   "critical, error, warning, notice, info, debug");
    assert_refused("devices =", "test.conf:1: devices: the list is empty; name at least 1");
    assert_refused("devices = cpu,,cpu", "test.conf:1: devices: an entry is empty; remove the surplus comma");
    assert_refused("devices = cpu,cpu", "test.conf:1: devices: 'cpu' is listed twice; remove one");
    no_device("gpu0");
    no_device("../cpu");
    no_device("CPU");
    no_device("GPU-");
    no_device("GPU-0");
    no_device("GPU-01234567-89ab-cdef-0123-456789abcde");
    no_device("GPU-01234567-89ab-cdef-0123-456789abcdef0");
    no_device("GPU-01234567-89AB-CDEF-0123-456789ABCDEF");
    no_device("GPU-01234567089ab-cdef-0123-456789abcdef");
    no_device("MIG-01234567-89ab-cdef-0123-456789abcdef");
    char many[1024] = "devices = cpu,reference,all";
    for (int i = 3; i < 16; i++)
        snprintf(many + strlen(many), sizeof many - strlen(many), ",GPU-%08x-89ab-cdef-0123-456789abcdef", i);
    assert_true(parse(many));
    strcat(many, ",GPU-01234567-89ab-cdef-0123-456789abcdef");
    assert_refused(many, "test.conf:1: devices: more than 16 entries; remove some");
    assert_refused("devices = 0123456789012345678901234567890123456789012345678901234567890123",
                   "test.conf:1: devices: '0123456789012345...' is too long; names have at most 63 bytes");
    assert_refused(
        "allowed_users = no-such-user",
        "test.conf:1: allowed_users: there is no user 'no-such-user' here; create it, or write a numeric id");
    assert_refused(
        "allowed_groups = no-such-group",
        "test.conf:1: allowed_groups: there is no group 'no-such-group' here; create it, or write a numeric id");
    assert_refused("allowed_groups = *", "test.conf:1: allowed_groups: * is not allowed here; list each group");
    assert_refused("admin_users = *", "test.conf:1: admin_users: * is not allowed here; list each user");
    assert_refused("admin_users = 4294967295",
                   "test.conf:1: admin_users: 4294967295 is no user id; write one of 0..4294967294, or a name");
}

static void strange_bytes_are_refused(void **state)
{
    (void)state;
    static const char nul[] = "max_plans = 5\n\0";
    assert_true(mlad_config_load(&config, NULL, false, NULL, 0, error));
    assert_false(mlad_config_parse(&config, nul, sizeof nul - 1, "test.conf", error));
    assert_string_equal(error, "test.conf:2: the line holds a NUL byte; remove it");
    char *line = malloc(6000);
    memset(line, 'x', 5999);
    line[5999] = '\0';
    assert_refused(line, "test.conf:1: the line is longer than 4095 bytes; shorten it");
    memcpy(line + 100, " = 5", 5);
    assert_refused(line, "test.conf:1: 'xxxxxxxxxxxxxxxx...' is no option; `mlad --help` lists them all");
    free(line);
}

/* A private file with `text`; the caller unlinks it. */
static void write_file(char path[32], const char *text)
{
    strcpy(path, "/tmp/mlad-test-XXXXXX");
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    assert_int_equal(write(fd, text, strlen(text)), strlen(text));
    close(fd);
}

static void the_command_line_goes_before_the_file(void **state)
{
    (void)state;
    char path[32];
    const struct mlad_setting settings[] = {{"max_plans", "7"}, {"devices", "reference"}};
    write_file(path, "max_plans = 5\nmax_buffers = 6\n");
    assert_true(mlad_config_load(&config, path, true, settings, 2, error));
    unlink(path);
    assert_int_equal(config.max_plans, 7);
    assert_int_equal(config.max_buffers, 6);
    assert_string_equal(config.devices.name[0], "reference");
    const struct mlad_setting wrong[] = {{"max_plans", "0"}};
    assert_false(mlad_config_load(&config, NULL, false, wrong, 1, error));
    assert_string_equal(error, "command line: max_plans: 0 is out of bounds; write a number of 1..1000000");
    const struct mlad_setting twice[] = {{"max_plans", "1"}, {"max_plans", "2"}};
    assert_false(mlad_config_load(&config, NULL, false, twice, 2, error));
    assert_string_equal(error, "command line: max_plans: set twice; keep one");
}

static void only_a_file_that_was_asked_for_must_exist(void **state)
{
    (void)state;
    assert_true(mlad_config_load(&config, "/nonexistent/mlad.conf", false, NULL, 0, error));
    assert_false(mlad_config_load(&config, "/nonexistent/mlad.conf", true, NULL, 0, error));
    assert_string_equal(error, "/nonexistent/mlad.conf: cannot be read: No such file or directory");
    assert_false(mlad_config_load(&config, "/tmp", false, NULL, 0, error));
    assert_string_equal(error, "/tmp: cannot be read: Is a directory");
    assert_false(mlad_config_load(&config, "/dev/zero", false, NULL, 0, error));
    assert_string_equal(error, "/dev/zero: longer than 65536 bytes; this is no configuration file");
}

static void what_is_printed_reads_the_same(void **state)
{
    (void)state;
    char *text;
    size_t size;
    assert_true(
        parse("socket_mode = 0600\ndevices = reference, cpu\nallowed_users = *, 1000\nallowed_groups = 5\n"
              "max_bytes = 1536M\nhello_timeout = 1500ms\ndrain_timeout = 0\ncpu_variant = amx\nruntime_dir = /tmp"));
    FILE *to = open_memstream(&text, &size);
    mlad_config_print(&config, to);
    fclose(to);
    other = config;
    assert_non_null(strstr(text, "\nmax_bytes = 1536M\n"));
    assert_non_null(strstr(text, "\nhello_timeout = 1500ms\n"));
    assert_non_null(strstr(text, "\n#max_plans = 4096\n"));
    assert_true(parse(text));
    assert_memory_equal(&config, &other, sizeof config);
    free(text);
}

static void a_reload_takes_what_it_may_and_names_the_rest(void **state)
{
    (void)state;
    char restart[256];
    assert_true(parse("max_plans = 5\nsocket = /tmp/a\nlog_level = debug\ndevices = reference\nallowed_users = 9"));
    other = config;
    assert_true(parse(""));
    mlad_config_reload(&config, &other, restart, sizeof restart);
    assert_string_equal(restart, "socket, devices");
    assert_int_equal(config.max_plans, 5);
    assert_int_equal(config.log_level, 7);
    assert_int_equal(config.allowed_users.entry[0].id, 9);
    assert_string_equal(config.socket, "/run/mlad/mlad.sock");
    assert_string_equal(config.devices.name[0], "cpu");
    mlad_config_reload(&config, &config, restart, sizeof restart);
    assert_string_equal(restart, "");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(defaults_are_those_of_the_documentation),
        cmocka_unit_test(every_option_is_read),
        cmocka_unit_test(blanks_and_comments_are_skipped),
        cmocka_unit_test(mistakes_are_refused_with_place_bounds_and_remedy),
        cmocka_unit_test(strange_bytes_are_refused),
        cmocka_unit_test(the_command_line_goes_before_the_file),
        cmocka_unit_test(only_a_file_that_was_asked_for_must_exist),
        cmocka_unit_test(what_is_printed_reads_the_same),
        cmocka_unit_test(a_reload_takes_what_it_may_and_names_the_rest),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
