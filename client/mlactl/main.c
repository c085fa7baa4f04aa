/* main.c - the command line: every command, option and sentence of help in one table. */
#include "mlactl.h"
#include "output.h"
#include "progress.h"

#include <errno.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>

#define DEVICE_OPTION                                                                                                  \
    {"--device", "NAME", "the device to use; default: $MLAD_DEVICE, else the first that is not reference", 0}

#define DEVICE_ONLY {"--device", "NAME", "this device only", 0}

static const struct ctl_command commands[] = {
    {"status", "", 0, 0, 5, ctl_status, "Show the daemon, its devices, their work and what runs where",
     "Devices with state, worker, sessions and bytes; work done and waiting; latency percentiles of each phase of a "
     "decode, and of a layer in stream order; the capability table, grouped.",
     {{"--capabilities", NULL, "every row of the capability table", 0},
      {"--sessions", NULL, "the open sessions too; those of others only for admin users", 0},
      DEVICE_ONLY}},
    {"health", "", 0, 0, 5, ctl_health, "Say in one line whether the daemon is well",
     "Exits with 0 ok, 1 degraded, 2 failed, 3 not running, 4 timed out.",
     {{"--deep", NULL, "decode a batch with a known answer on every device; on reference only if it is alone", 0}}},
    {"decode", "IN.safetensors", 1, 1, 600, ctl_decode, "Decode a capture file",
     "Reads a batch from a capture file, decodes it and writes `out` and `lse`. Requests that fail are listed, the "
     "others are written; the exit status is then 2.",
     {{"--output", "OUT.safetensors", "the result file (required)", 'o'}, DEVICE_OPTION}},
    {"verify", "", 0, 0, 600, ctl_verify, "Compare a device with the reference on random batches",
     "Random batches over the whole decode contract, every capability row at least once. Both the device and "
     "`reference` (start mlad with --devices cpu,reference) must meet the accuracy bar. A failing batch is written as "
     "a capture file.",
     {DEVICE_OPTION,
      {"--cases", "N", "batches to run; default: two for each capability row", 0},
      {"--seconds", "N", "run for so long instead, and until each row had its turn", 0},
      {"--seed", "S", "repeat an earlier run; default: from the clock", 0},
      {"--save", "DIRECTORY", "where a failing batch is written; default: the current directory", 0}}},
    {"metrics", "", 0, 0, 5, ctl_metrics, "Print the daemon's figures as OpenMetrics text",
     "For a Prometheus textfile or exec collector.", {{0}}},
    {"bench", "[device|tenants|latency|step]", 1, 0, 60, ctl_bench, "Measure a device's speed and the daemon's cost",
     "The cpu backend or a GPU's called directly and through the daemon in turn, cpu's beside the ceilings of this "
     "machine, and the round trip of a one-key decode, by rings and by the socket, next to a raw socket ping-pong. A "
     "GPU's direct calls are timed by its own events, and what it decodes lies in its memory. Needs the machine to "
     "itself. `bench tenants`: processes with a small batch each, one of them alone and all at once in turn. `bench "
     "latency`: percentiles of a one-key decode. `bench step`: a model's layers one behind the other, in host order "
     "and where that can be in stream order, and what each costs beyond its kernels.",
     {DEVICE_OPTION,
      {"--batch", "N", "requests of a decode; default: 8, on a GPU 64; of tenants and step 1", 0},
      {"--kv-len", "N", "keys of a request; default 4096", 0},
      {"--heads", "N", "query heads, of tenants and step; default 16", 0},
      {"--q-len", "N", "query tokens of a request, of tenants and step; default 4, of step 1", 0},
      {"--tenants", "N", "processes, of tenants; default 8", 0},
      {"--layers", "N", "decodes of a step; default 61", 0},
      {"--seconds", "N", "measure for about so long; default 10", 0},
      {"--transport", "WAY", "rings or socket, for what goes through the daemon; default: rings if it has them", 0}}},
    {"top", "", 0, 0, 5, ctl_top, "Watch the daemon at work: rates of each device and client, live",
     "Decodes and KV tokens a second since the last look, what waits and runs, percentiles of each phase since the "
     "worker's start: of decodes in host order (receive, queue, kernel, reply), and of each layer in stream order how "
     "long the worker was ready before the client's stream came (gate), and from then until it was told that the "
     "outputs are written (serve). Ends with q or ctrl-c, and goes on when the daemon is started again. Not on a "
     "terminal, looks follow one another; with --json each is a line.",
     {{"--interval", "SECONDS", "between two looks; default 2", 0},
      {"--once", NULL, "one look over one interval, then end; fails if no daemon answers", 0},
      DEVICE_ONLY}},
    {"doctor", "", 0, 0, 5, ctl_doctor, "Look at this machine and say how to get a better placement",
     "The socket, the daemon, its devices, MPS and this process's limits; each finding is ok, warn or fail, with what "
     "to do about it. Exits with 0 if nothing failed, warnings or not, else with 1; 3 if the daemon is not running.",
     {DEVICE_ONLY}},
    {"run", "COMMAND [argument ...]", CTL_WORDS, 1, 5, ctl_engine,
     "Start a program under the MPS of the daemon's worker",
     "Sets CUDA_MPS_PIPE_DIRECTORY and CUDA_MPS_LOG_DIRECTORY as the worker has them, MLAD_SOCKET and MLAD_DEVICE as "
     "given here, and becomes COMMAND. Options of mlactl come before COMMAND. Refuses where the worker is not under "
     "MPS.",
     {DEVICE_ONLY,
      {"--without-mps", NULL, "start it all the same, without MPS, where the worker has none", 0}}},
    {"drain", "DEVICE", 1, 1, 60, ctl_drain, "Let a device finish what it has and take nothing new (admin users)",
     "Returns once nothing is in flight. New decodes are refused until `drain DEVICE --resume`.",
     {{"--resume", NULL, "end the drain", 0}}},
    {"evict", "DEVICE SESSION", 2, 2, 10, ctl_evict, "End a session (admin users)",
     "SESSION is the id that `status --sessions` shows. Its client gets an error and no reconnect.", {{0}}},
    {"version", "", 0, 0, 1, ctl_version, "Print the versions of mlactl, libmla and the daemon, if it runs", "", {{0}}},
};
enum { COMMANDS = sizeof commands / sizeof *commands };

static const struct ctl_option global_options[] = {
    {"--socket", "PATH", "the daemon's socket; default: $MLAD_SOCKET, else " CTL_SOCKET, 0},
    {"--timeout", "SECONDS", "give up after so long", 0},
    {"--json", NULL, "print JSON", 0},
    {"--quiet", NULL, "no progress lines", 'q'},
    {"--help", NULL, "show help", 'h'},
};
enum { GLOBAL_SOCKET, GLOBAL_TIMEOUT, GLOBAL_JSON, GLOBAL_QUIET, GLOBAL_HELP, GLOBALS };

static const struct ctl_command *find_command(const char *name)
{
    for (unsigned i = 0; i < COMMANDS; i++)
        if (strcmp(commands[i].name, name) == 0)
            return &commands[i];
    return NULL;
}

/* Levenshtein distance of two short words. */
static unsigned distance(const char *a, const char *b)
{
    unsigned row[32];
    size_t width = strlen(b);
    if (width >= 31 || strlen(a) >= 31)
        return 99;
    for (unsigned j = 0; j <= width; j++)
        row[j] = j;
    for (unsigned i = 1; *a; i++, a++) {
        unsigned diagonal = row[0];
        row[0] = i;
        for (unsigned j = 1; j <= width; j++) {
            unsigned change = diagonal + (*a != b[j - 1]);
            diagonal = row[j];
            unsigned shorter = row[j] < row[j - 1] ? row[j] + 1 : row[j - 1] + 1;
            row[j] = change < shorter ? change : shorter;
        }
    }
    return row[width];
}

static const char *nearest_command(const char *name)
{
    const char *best = NULL;
    unsigned least = 3;
    for (unsigned i = 0; i < COMMANDS; i++) {
        unsigned far = distance(name, commands[i].name);
        if (far < least) {
            least = far;
            best = commands[i].name;
        }
    }
    return best;
}

static void print_option(const struct ctl_option *option)
{
    char left[64];
    snprintf(left, sizeof left, "%c%c%s%s%s%s", option->letter ? '-' : ' ', option->letter ? option->letter : ' ',
             option->letter ? ", " : "  ", option->name, option->argument ? " " : "",
             option->argument ? option->argument : "");
    printf("  %-28s %s\n", left, option->help);
}

/* Words in lines of at most 100 columns. */
static void print_wrapped(const char *text)
{
    size_t column = 0;
    while (*text) {
        size_t word = strcspn(text, " ");
        if (column && column + 1 + word > 100) {
            putchar('\n');
            column = 0;
        }
        column += (size_t)printf("%s%.*s", column ? " " : "", (int)word, text);
        text += word + strspn(text + word, " ");
    }
    putchar('\n');
}

static void print_help(const struct ctl_command *command)
{
    if (command) {
        bool last = command->n_arguments == CTL_WORDS;
        printf("Usage: mlactl %s%s%s%s%s\n\n%s.\n", command->name, last ? " [options]" : "",
               *command->arguments ? " " : "", command->arguments, last ? "" : " [options]", command->summary);
        if (*command->details)
            print_wrapped(command->details);
        printf("\nOptions:\n");
        for (const struct ctl_option *option = command->options; option->name; option++)
            print_option(option);
    } else {
        printf("Usage: mlactl COMMAND [arguments] [options]\n\nLook after mlad, the decode daemon, and replay batches "
               "on it.\n\n"
               "Commands:\n");
        for (unsigned i = 0; i < COMMANDS; i++)
            printf("  %-10s %s\n", commands[i].name, commands[i].summary);
        printf("  %-10s %s\n\nOptions of every command:\n", "help", "Show this, or the help of a command");
    }
    for (unsigned i = 0; i < GLOBALS; i++)
        print_option(&global_options[i]);
    if (command)
        printf("\nDefault of --timeout: %d s.\n", command->timeout_s);
    else
        printf("\n`mlactl help COMMAND` says more; see also mlactl(1).\n");
}

static bool matches(const struct ctl_option *option, const char *word, size_t length)
{
    if (length == 2 && word[0] == '-' && word[1] == option->letter)
        return true;
    return strlen(option->name) == length && strncmp(option->name, word, length) == 0;
}

/* Take argv[*at] as one of `options`; its value goes to values[its index]. 1: taken, 0: not one of them, -1: it was
 * complained of. */
static int take_option(struct ctl *ctl, const struct ctl_option *options, unsigned count, const char **values, int argc,
                       char **argv, int *at)
{
    const char *word = argv[*at];
    const char *equals = strncmp(word, "--", 2) == 0 ? strchr(word, '=') : NULL;
    size_t length = equals ? (size_t)(equals - word) : strlen(word);
    for (unsigned i = 0; i < count && options[i].name; i++) {
        if (!matches(&options[i], word, length))
            continue;
        if (!options[i].argument) {
            if (equals)
                return ctl_error(ctl, CTL_USAGE, "%s takes no value", options[i].name), -1;
            values[i] = "";
        } else if (equals) {
            values[i] = equals + 1;
        } else if (*at + 1 < argc) {
            values[i] = argv[++*at];
        } else {
            return ctl_error(ctl, CTL_USAGE, "%s needs a value: %s", options[i].name, options[i].argument), -1;
        }
        return 1;
    }
    return 0;
}

static int parse_timeout(struct ctl *ctl, const char *text)
{
    if (!text) {
        ctl->timeout_ms = ctl->command->timeout_s * 1000;
        return CTL_OK;
    }
    char *end;
    double seconds = strtod(text, &end);
    if (end == text || *end || !(seconds >= 0.001 && seconds <= 1e6))
        return ctl_error(ctl, CTL_USAGE, "--timeout %s: give seconds, from 0.001 to 1000000", text);
    ctl->timeout_ms = (int)ceil(seconds * 1000);
    return CTL_OK;
}

static int parse_and_run(int argc, char **argv)
{
    struct ctl ctl = {0};
    const char *globals[GLOBALS] = {0};
    unsigned n_arguments = 0;
    bool help = false, options_end = false;

    /* --json first: complaints about the rest are JSON too. */
    for (int i = 1; i < argc && strcmp(argv[i], "--"); i++)
        ctl.json |= strcmp(argv[i], "--json") == 0;
    for (int i = 1; i < argc; i++) {
        const char *word = argv[i];
        if (!options_end && strcmp(word, "--") == 0) {
            options_end = true;
        } else if (!options_end && word[0] == '-' && word[1]) {
            int taken = take_option(&ctl, global_options, GLOBALS, globals, argc, argv, &i);
            if (taken == 0 && ctl.command)
                taken = take_option(&ctl, ctl.command->options, CTL_MAX_OPTIONS, ctl.values, argc, argv, &i);
            if (taken < 0)
                return CTL_USAGE;
            if (taken == 0)
                return ctl.command ? ctl_error(&ctl, CTL_USAGE, "%s has no option %s; see `mlactl help %s`",
                                               ctl.command->name, word, ctl.command->name)
                                   : ctl_error(&ctl, CTL_USAGE, "no option %s before a command; see `mlactl help`",
                                               word);
        } else if (!ctl.command && !help && strcmp(word, "help") == 0) {
            help = true;
        } else if (!ctl.command) {
            ctl.command = find_command(word);
            const char *near = ctl.command ? NULL : nearest_command(word);
            if (!ctl.command && near)
                return ctl_error(&ctl, CTL_USAGE, "no command %s; did you mean %s?", word, near);
            if (!ctl.command)
                return ctl_error(&ctl, CTL_USAGE, "no command %s; `mlactl help` lists them", word);
        } else if (ctl.command->n_arguments == CTL_WORDS) {
            ctl.words = argv + i;
            ctl.json = globals[GLOBAL_JSON] != NULL; /* one behind COMMAND is COMMAND's */
            n_arguments = CTL_WORDS;
            break;
        } else if (n_arguments < ctl.command->n_arguments) {
            ctl.arguments[n_arguments++] = word;
        } else {
            return ctl_error(&ctl, CTL_USAGE, "%s: one argument too many: %s", ctl.command->name, word);
        }
    }
    if (help || globals[GLOBAL_HELP]) {
        print_help(ctl.command);
        return CTL_OK;
    }
    if (!ctl.command)
        return ctl_error(&ctl, CTL_USAGE, "give a command; `mlactl help` lists them");
    if (n_arguments < ctl.command->n_required)
        return ctl_error(&ctl, CTL_USAGE, "usage: mlactl %s %s; see `mlactl help %s`", ctl.command->name,
                         ctl.command->arguments, ctl.command->name);
    const char *from_environment = getenv("MLAD_SOCKET");
    ctl.socket = globals[GLOBAL_SOCKET] ? globals[GLOBAL_SOCKET]
                 : from_environment && *from_environment ? from_environment
                                                         : CTL_SOCKET;
    ctl.quiet = globals[GLOBAL_QUIET] != NULL;
    int code = parse_timeout(&ctl, globals[GLOBAL_TIMEOUT]);
    if (code)
        return code;
    progress_init(ctl.quiet);
    code = ctl.command->run(&ctl);
    progress_stop();
    return code;
}

int main(int argc, char **argv)
{
    signal(SIGPIPE, SIG_IGN); /* a reader that has had enough is no error */
    output_init();
    int code = parse_and_run(argc, argv);
    if ((fflush(stdout) || ferror(stdout)) && errno != EPIPE) {
        fprintf(stderr, "mlactl: cannot write the output: %s\n", strerror(errno));
        return CTL_FAILED;
    }
    return code;
}
