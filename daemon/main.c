/* main.c - mlad's command line: find the configuration, then run the supervisor in the foreground. */
#include "config.h"
#include "log.h"
#include "supervisor.h"

#include <getopt.h>
#include <linux/close_range.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

enum { MAX_SETTINGS = 64, EXIT_BAD_CONFIGURATION = 2 };

static struct mlad_setting settings[MAX_SETTINGS];
static size_t n_settings;

static void print_help(void)
{
    fputs("usage: mlad [options]\n"
          "Serve multi-head latent attention decodes on a Unix socket; runs in the foreground.\n\n"
          "  --devices LIST        devices to serve, such as cpu,reference; all: cpu and every GPU\n"
          "  --socket PATH         where to listen\n"
          "  --config FILE         read FILE, not " MLAD_CONFIG_PATH "\n"
          "  --log-level LEVEL     least urgent records to keep, such as debug\n"
          "  --log-target TARGET   stderr, journal or auto\n"
          "  -o KEY=VALUE          set any option below; goes before the file\n"
          "  --check-config        read the configuration, say whether it is right, exit\n"
          "  --print-config        print it as a commented file, exit\n"
          "  --version, --help\n\n"
          "SIGHUP reads the configuration again; SIGTERM and SIGINT stop in order, a second one at once.\n\n"
          "Options of the file and of -o, with their defaults:\n",
          stdout);
    mlad_config_help(stdout);
}

static int refuse_usage(const char *what)
{
    fprintf(stderr, "mlad: %s; `mlad --help` explains\n", what);
    return EXIT_BAD_CONFIGURATION;
}

static bool add_setting(const char *key, const char *value)
{
    if (n_settings == MAX_SETTINGS)
        return false;
    settings[n_settings++] = (struct mlad_setting){key, value};
    return true;
}

/* -o KEY=VALUE; the text is the command line's own, and is cut in two. */
static bool add_pair(char *text)
{
    char *equals = strchr(text, '=');
    if (!equals)
        return false;
    *equals = '\0';
    return add_setting(text, equals + 1);
}

/* Nothing that our parent forgot to close may reach the workers, and a shell's low limit must not bound our clients. */
static void tidy_process(void)
{
    struct rlimit files;
    close_range(STDERR_FILENO + 1, ~0u, CLOSE_RANGE_CLOEXEC);
    if (getrlimit(RLIMIT_NOFILE, &files) == 0) {
        files.rlim_cur = files.rlim_max;
        setrlimit(RLIMIT_NOFILE, &files); /* if it may not, the limit stays */
    }
    signal(SIGPIPE, SIG_IGN); /* stderr may be a pipe whose reader has gone */
}

int main(int argc, char **argv)
{
    enum { DEVICES = 256, SOCKET, CONFIG, LOG_LEVEL, LOG_TARGET, CHECK, PRINT, VERSION, HELP };
    static const struct option options[] = {
        {"devices", required_argument, NULL, DEVICES},
        {"socket", required_argument, NULL, SOCKET},
        {"config", required_argument, NULL, CONFIG},
        {"log-level", required_argument, NULL, LOG_LEVEL},
        {"log-target", required_argument, NULL, LOG_TARGET},
        {"check-config", no_argument, NULL, CHECK},
        {"print-config", no_argument, NULL, PRINT},
        {"version", no_argument, NULL, VERSION},
        {"help", no_argument, NULL, HELP},
        {NULL, 0, NULL, 0},
    };
    static struct mlad_config config; /* large */
    char error[MLAD_CONFIG_ERROR];
    struct mlad_source source = {.path = MLAD_CONFIG_PATH, .settings = settings};
    bool check = false, print = false, kept = true;

    for (int c; kept && (c = getopt_long(argc, argv, "o:h", options, NULL)) != -1;)
        switch (c) {
        case DEVICES:
            kept = add_setting("devices", optarg);
            break;
        case SOCKET:
            kept = add_setting("socket", optarg);
            break;
        case LOG_LEVEL:
            kept = add_setting("log_level", optarg);
            break;
        case LOG_TARGET:
            kept = add_setting("log_target", optarg);
            break;
        case 'o':
            kept = add_pair(optarg);
            break;
        case CONFIG:
            source.path = optarg;
            source.must_exist = true;
            break;
        case CHECK:
            check = true;
            break;
        case PRINT:
            print = true;
            break;
        case VERSION:
            puts(MLAD_NAME);
            return 0;
        case HELP:
        case 'h':
            print_help();
            return 0;
        default: /* getopt_long has said what is wrong */
            return EXIT_BAD_CONFIGURATION;
        }
    if (!kept)
        return refuse_usage("-o takes KEY=VALUE, and there may be 64 settings");
    if (optind < argc)
        return refuse_usage("there are arguments that no option takes");

    source.n_settings = n_settings;
    if (!mlad_config_load(&config, source.path, source.must_exist, settings, n_settings, error)) {
        fprintf(stderr, "mlad: %s\n", error);
        return EXIT_BAD_CONFIGURATION;
    }
    if (check)
        printf("%s: ok\n", source.path);
    if (print)
        mlad_config_print(&config, stdout);
    if (check || print)
        return 0;
    mlad_log_open((enum mlad_log_target)config.log_target, (int)config.log_level);
    tidy_process();
    return mlad_supervisor_run(&config, &source);
}
