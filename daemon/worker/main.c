/* main.c - mlad-worker's arguments, and what the process is before the worker runs in it. Started by mlad only. */
#include "discovery.h"
#include "log.h"
#include "mlak.h"
#include "worker.h"

#include <errno.h>
#include <getopt.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <unistd.h>

static const char usage[] =
    "usage: mlad-worker --device NAME --control FD --life FD --lock PATH [--threads N] [--variant V]\n"
    "                   [--log-level LEVEL] [--log-target stderr|journal]\n"
    "       mlad-worker --list\n"
    "One device's worker. mlad starts it; it serves nobody on its own. --list prints the GPUs of this machine, one a\n"
    "line, UUID and name; with none it says why on stderr and exits with status 4.\n";

enum { MOST_GPUS = 64 };

static _Noreturn void refuse(const char *option, const char *value)
{
    fprintf(stderr, "mlad-worker: --%s does not take \"%s\"\n%s", option, value, usage);
    exit(2);
}

static long number(const char *option, const char *text, long max)
{
    char *end;
    errno = 0;
    long value = strtol(text, &end, 10);
    if (errno || end == text || *end || value < 0 || value > max)
        refuse(option, text);
    return value;
}

/* Signals are the supervisor's: whoever signals the whole group must not cut short its grace for our clients. */
static void become_worker(const char *device)
{
    char name[16];
    snprintf(name, sizeof name, "mlad:%s", device);
    prctl(PR_SET_NAME, name);
    prctl(PR_SET_PDEATHSIG, SIGKILL); /* for a loop that hangs and cannot see its control socket end */
    const int ignored[] = {SIGINT, SIGTERM, SIGHUP, SIGPIPE};
    for (unsigned i = 0; i < sizeof ignored / sizeof ignored[0]; i++)
        signal(ignored[i], SIG_IGN);
    setenv("UV_THREADPOOL_SIZE", "1", 1); /* libuv's: it unmaps buffers */
    /* A gate of one client must neither hold the hardware queue of another's stream, nor wait for a kernel that is
     * loaded once everything else has ended. */
    setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 0);
    setenv("CUDA_MODULE_LOADING", "EAGER", 1);
    struct rlimit files;                  /* one descriptor a session */
    if (getrlimit(RLIMIT_NOFILE, &files) == 0) {
        files.rlim_cur = files.rlim_max;
        setrlimit(RLIMIT_NOFILE, &files);
    }
}

/* For --list. In a process of its own, because a driver that fails or hangs must not take the supervisor along. */
static int list_gpus(void)
{
    static struct mlak_gpu gpus[MOST_GPUS];
    struct mlak_fault why = {0};
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    uint32_t n = mlak_gpus(gpus, MOST_GPUS, &why);
    for (uint32_t i = 0; i < n; i++)
        printf("%s %s\n", gpus[i].device, gpus[i].model);
    if (n == 0)
        fprintf(stderr, "%s\n", why.message);
    fflush(stdout);
    _exit(n ? 0 : MLAD_NO_GPU_STATUS); /* the driver's own exit handlers have nothing to do for us */
}

int main(int argc, char **argv)
{
    static const struct option options[] = {
        {"device", required_argument, NULL, 'd'},
        {"control", required_argument, NULL, 'c'},
        {"life", required_argument, NULL, 'f'},
        {"lock", required_argument, NULL, 'k'},
        {"threads", required_argument, NULL, 't'},
        {"variant", required_argument, NULL, 'v'},
        {"log-level", required_argument, NULL, 'l'},
        {"log-target", required_argument, NULL, 'g'},
        {"list", no_argument, NULL, 'i'},
        {NULL, 0, NULL, 0},
    };
    struct mlad_worker_options worker = {.control = -1, .life = -1};
    enum mlad_log_target target = MLAD_LOG_AUTO;
    int level = LOG_INFO;
    bool list = false;
    int option;
    while ((option = getopt_long(argc, argv, "", options, NULL)) != -1) {
        switch (option) {
        case 'd': worker.device = optarg; break;
        case 'c': worker.control = (int)number("control", optarg, 65535); break;
        case 'f': worker.life = (int)number("life", optarg, 65535); break;
        case 'k': worker.lock = optarg; break;
        case 't': worker.threads = (uint32_t)number("threads", optarg, 65535); break;
        case 'v': worker.variant = optarg; break;
        case 'l':
            level = mlad_log_level_from_text(optarg);
            if (level < 0)
                refuse("log-level", optarg);
            break;
        case 'g':
            if (strcmp(optarg, "stderr") == 0)
                target = MLAD_LOG_STDERR;
            else if (strcmp(optarg, "journal") == 0)
                target = MLAD_LOG_JOURNAL;
            else
                refuse("log-target", optarg);
            break;
        case 'i': list = true; break;
        default: fputs(usage, stderr); return 2;
        }
    }
    if (list && argc == 2)
        return list_gpus();
    if (list || optind != argc || !worker.device || worker.control < 0 || worker.life < 0 || !worker.lock) {
        fputs(usage, stderr);
        return 2;
    }
    mlad_log_open(target, level);
    become_worker(worker.device);
    return mlad_worker_run(&worker);
}
