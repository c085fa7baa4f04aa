/* top.c - `mlactl top`: looks at the daemon's counters again and again and shows what they grew by in between.
 *
 * A look owns one STATUS and the sessions of every device. Two looks give rates; a worker or a session that is not in
 * the earlier look, or began again since, has none but that of its own life. */
#include "admin.h"
#include "output.h"
#include "wire_json.h"

#include <errno.h>
#include <math.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

struct client { uint32_t device; struct mlap_session session; double decodes_s, kv_tokens_s; };
struct look {
    double at;                          /* seconds, monotonic */
    struct mlap_status_reply *status;
    struct client *clients;
    unsigned n_clients, room;
    char complaint[600];                /* sessions that could not be listed; "" */
};

static volatile sig_atomic_t stopped;
static void on_signal(int number) { stopped = number; }

static double now_s(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

/* ---- looking ---- */

static void look_free(struct look *look)
{
    if (!look)
        return;
    free(look->status);
    free(look->clients);
    free(look);
}

static void take_session(void *to, const char *device, const struct mlap_session *session)
{
    struct look *look = to;
    if (look->n_clients == look->room) {
        look->room = look->room ? 2 * look->room : 64;
        look->clients = realloc(look->clients, look->room * sizeof *look->clients);
        if (!look->clients)
            abort();
    }
    uint32_t index = (uint32_t)(admin_find(look->status, device) - look->status->devices);
    look->clients[look->n_clients++] = (struct client){index, *session, NAN, NAN};
}

static int look_new(const struct ctl *ctl, struct look **out, struct ctl_fault *fault)
{
    admin_auto struct admin *admin = NULL;
    const char *only = ctl_value(ctl, "--device");
    struct look *look = calloc(1, sizeof *look);
    if (!look)
        abort();
    int code = admin_new(ctl, &admin, fault);
    code = code ? code : admin_status(admin, &look->status, fault);
    if (!code && only && !admin_find(look->status, only)) {
        ctl_fail(fault, "no device %s is served here", only);
        code = CTL_FAILED;
    }
    if (code) {
        look_free(look);
        return code;
    }
    look->at = now_s();
    for (unsigned i = 0; i < look->status->n_devices; i++) {
        const char *name = look->status->devices[i].name;
        struct ctl_fault why;
        if ((!only || strcmp(only, name) == 0) && look->status->devices[i].pid &&
            admin_sessions(admin, name, take_session, look, &why))
            snprintf(look->complaint, sizeof look->complaint, "%s: %s", name, why.text);
    }
    *out = look;
    return CTL_OK;
}

/* ---- what grew ---- */

/* The same worker in the earlier look. */
static const struct mlap_device *earlier(const struct look *before, const struct mlap_device *now)
{
    const struct mlap_device *then = before ? admin_find(before->status, now->name) : NULL;
    return then && then->pid == now->pid && then->decodes <= now->decodes ? then : NULL;
}

static double rate(uint64_t now, uint64_t then, double seconds) { return (double)(now - then) / seconds; }

/* How much `what` grew for each launch since; NaN: nothing was launched, or it is not counted. */
static double per_launch(const struct mlap_device *now, const struct mlap_device *then, const char *what)
{
    return then ? wire_json_per_launch(now, then, what) : NAN;
}

static const struct mlap_session *session_before(const struct look *before, const char *device,
                                                 const struct mlap_session *now)
{
    for (unsigned i = 0; before && i < before->n_clients; i++) {
        const struct client *then = &before->clients[i];
        if (then->session.session == now->session && then->session.age_ms <= now->age_ms &&
            then->session.decodes <= now->decodes && strcmp(before->status->devices[then->device].name, device) == 0)
            return &then->session;
    }
    return NULL;
}

static int busiest_first(const void *a, const void *b)
{
    const struct client *left = a, *right = b;
    return (left->decodes_s < right->decodes_s) - (left->decodes_s > right->decodes_s);
}

static void rate_clients(const struct look *before, struct look *now)
{
    for (unsigned i = 0; before && i < now->n_clients; i++) {
        struct client *client = &now->clients[i];
        const struct mlap_session *s = &client->session;
        const struct mlap_session *then = session_before(before, now->status->devices[client->device].name, s);
        double seconds = then ? now->at - before->at : fmax((double)s->age_ms / 1000, 1e-3);
        client->decodes_s = rate(s->decodes, then ? then->decodes : 0, seconds);
        client->kv_tokens_s = rate(s->kv_tokens, then ? then->kv_tokens : 0, seconds);
    }
    if (before && now->n_clients)
        qsort(now->clients, now->n_clients, sizeof *now->clients, busiest_first);
}

/* ---- as text ---- */

enum { FIRST_OF_STREAM = MLAP_phase_GATE }; /* phases before it are those of decodes in host order */

static void number_cell(struct table *table, double value)
{
    if (isnan(value))
        table_cell(table, PLAIN, "-");
    else if (value < 100)
        table_cell(table, PLAIN, "%.1f", value);
    else
        table_cell(table, PLAIN, "%s", human_count((uint64_t)llround(value)).s);
}

static const struct mlap_latency *find_phase(const struct mlap_device *device, int phase)
{
    for (unsigned i = 0; i < device->n_latency; i++)
        if ((int)device->latency[i].phase == phase)
            return &device->latency[i];
    return NULL;
}

/* Has anything run in stream order on a device that is shown? */
static bool has_streams(const struct look *now, const char *only)
{
    for (unsigned i = 0; i < now->status->n_devices; i++) {
        const struct mlap_device *d = &now->status->devices[i];
        const struct mlap_latency *l = find_phase(d, FIRST_OF_STREAM);
        if (l && l->count && (!only || strcmp(only, d->name) == 0))
            return true;
    }
    return false;
}

/* The phases [first, end). */
static void print_phases(const struct look *now, const char *only, const char *title, int first, int end)
{
    char headings[256];
    snprintf(headings, sizeof headings, "%s, P50 / P99", title);
    for (int phase = first; phase < end; phase++)
        snprintf(headings + strlen(headings), sizeof headings - strlen(headings), "|>%s",
                 mlap_phase_text((enum mlap_phase)phase));
    struct table *table = table_new(headings);
    for (unsigned i = 0; i < now->status->n_devices; i++) {
        const struct mlap_device *d = &now->status->devices[i];
        if (only && strcmp(only, d->name) != 0)
            continue;
        table_cell(table, BOLD, "%s", d->name);
        for (int phase = first; phase < end; phase++) {
            const struct mlap_latency *l = find_phase(d, phase);
            if (l && l->count)
                table_cell(table, PLAIN, "%s / %s", human_ns((double)l->p50_ns).s, human_ns((double)l->p99_ns).s);
            else
                table_cell(table, PLAIN, "-");
        }
    }
    putchar('\n');
    table_print(table);
}

static void print_devices(const struct look *before, const struct look *now, const char *only)
{
    struct table *table = table_new("DEVICE|STATE|>DECODES/S|>KV TOKENS/S|>ROWS/LAUNCH|>MERGED|>QUEUED|>RUNNING|"
                                    ">CLIENTS");
    for (unsigned i = 0; i < now->status->n_devices; i++) {
        const struct mlap_device *d = &now->status->devices[i], *then = earlier(before, d);
        if (only && strcmp(only, d->name) != 0)
            continue;
        double seconds = then ? now->at - before->at : NAN;
        table_cell(table, BOLD, "%s", d->name);
        table_cell(table, d->state == MLAP_device_state_READY ? GOOD : WARN, "%s", mlap_device_state_text(d->state));
        number_cell(table, then ? rate(d->decodes, then->decodes, seconds) : NAN);
        number_cell(table, then ? rate(d->kv_tokens, then->kv_tokens, seconds) : NAN);
        number_cell(table, per_launch(d, then, "launched_rows"));
        number_cell(table, per_launch(d, then, "launched_parts"));
        table_cell(table, d->queued && d->queued >= d->queue_limit ? WARN : PLAIN, "%u", d->queued);
        table_cell(table, PLAIN, "%u", d->running);
        table_cell(table, PLAIN, "%u", d->sessions);
    }
    table_print(table);
    print_phases(now, only, "PHASES", 0, FIRST_OF_STREAM);
    if (has_streams(now, only))
        print_phases(now, only, "STREAM ORDER", FIRST_OF_STREAM, MLAP_phase_COUNT);
}

static void print_clients(const struct look *now, unsigned most)
{
    struct table *table = table_new("CLIENT|DEVICE|>ID|>PID|>DECODES/S|>KV TOKENS/S|>IN FLIGHT|>BYTES|PLACEMENT");
    for (unsigned i = 0; i < now->n_clients && i < most; i++) {
        const struct mlap_session *s = &now->clients[i].session;
        table_cell(table, BOLD, "%s", printable(s->client).s);
        table_cell(table, PLAIN, "%.12s", now->status->devices[now->clients[i].device].name);
        table_cell(table, PLAIN, "%llu", (unsigned long long)s->session);
        table_cell(table, PLAIN, "%u", s->pid);
        number_cell(table, now->clients[i].decodes_s);
        number_cell(table, now->clients[i].kv_tokens_s);
        table_cell(table, PLAIN, "%u", s->in_flight);
        table_cell(table, PLAIN, "%s", human_bytes((double)s->bytes).s);
        table_cell(table, PLAIN, "%s", mlap_placement_text(s->placement));
    }
    putchar('\n');
    table_print(table);
    if (now->n_clients > most)
        output_print(DIM, "  and %u more\n", now->n_clients - most);
}

static void print_text(const struct look *before, const struct look *now, const char *only, unsigned most)
{
    output_print(BOLD, "%s", now->status->daemon);
    printf("   up %s", human_age(now->status->uptime_ms).s);
    if (before)
        printf("   over %.1f s", now->at - before->at);
    printf("   phases since each worker's start\n\n");
    print_devices(before, now, only);
    print_clients(now, most);
    if (*now->complaint)
        output_print(WARN, "  %s\n", now->complaint);
}

/* ---- as JSON, a line a look ---- */

static void add_rate(cJSON *object, const char *name, double value)
{
    if (isnan(value))
        cJSON_AddNullToObject(object, name);
    else
        cJSON_AddNumberToObject(object, name, value);
}

static cJSON *device_json(const struct look *before, const struct look *now, uint32_t index)
{
    const struct mlap_device *d = &now->status->devices[index], *then = earlier(before, d);
    double seconds = then ? now->at - before->at : NAN;
    cJSON *object = cJSON_CreateObject();
    cJSON_AddStringToObject(object, "name", d->name);
    cJSON_AddStringToObject(object, "state", mlap_device_state_text(d->state));
    add_rate(object, "decodes_per_s", then ? rate(d->decodes, then->decodes, seconds) : NAN);
    add_rate(object, "kv_tokens_per_s", then ? rate(d->kv_tokens, then->kv_tokens, seconds) : NAN);
    add_rate(object, "rows_per_launch", per_launch(d, then, "launched_rows"));
    add_rate(object, "parts_per_launch", per_launch(d, then, "launched_parts"));
    cJSON_AddNumberToObject(object, "queued", d->queued);
    cJSON_AddNumberToObject(object, "running", d->running);
    cJSON *phases = cJSON_AddObjectToObject(object, "phases");
    for (unsigned i = 0; i < d->n_latency; i++) {
        cJSON *phase = cJSON_AddObjectToObject(phases, mlap_phase_text(d->latency[i].phase));
        wire_json_add(phase, "count", d->latency[i].count);
        wire_json_add(phase, "p50_ns", d->latency[i].p50_ns);
        wire_json_add(phase, "p99_ns", d->latency[i].p99_ns);
    }
    cJSON *clients = cJSON_AddArrayToObject(object, "clients");
    for (unsigned i = 0; i < now->n_clients; i++) {
        if (now->clients[i].device != index)
            continue;
        cJSON *client = wire_json_session(&now->clients[i].session);
        add_rate(client, "decodes_per_s", now->clients[i].decodes_s);
        add_rate(client, "kv_tokens_per_s", now->clients[i].kv_tokens_s);
        cJSON_AddItemToArray(clients, client);
    }
    return object;
}

static void print_json(const struct look *before, const struct look *now, const char *only)
{
    cJSON *root = cJSON_CreateObject();
    cJSON_AddStringToObject(root, "daemon", now->status->daemon);
    add_rate(root, "seconds", before ? now->at - before->at : NAN);
    cJSON *devices = cJSON_AddArrayToObject(root, "devices");
    for (uint32_t i = 0; i < now->status->n_devices; i++)
        if (!only || strcmp(only, now->status->devices[i].name) == 0)
            cJSON_AddItemToArray(devices, device_json(before, now, i));
    char *text = cJSON_PrintUnformatted(root);
    if (text)
        puts(text);
    cJSON_free(text);
    cJSON_Delete(root);
}

/* ---- the screen ---- */

struct screen { bool terminal, keys; struct termios was; };

/* Keys are read one at a time; the signals end the loop, which puts things back. */
static void screen_open(struct screen *screen, bool terminal)
{
    const int signals[] = {SIGINT, SIGTERM, SIGHUP};
    for (unsigned i = 0; i < sizeof signals / sizeof *signals; i++)
        sigaction(signals[i], &(struct sigaction){.sa_handler = on_signal}, NULL);
    screen->terminal = terminal;
    screen->keys = terminal && tcgetattr(STDIN_FILENO, &screen->was) == 0;
    if (screen->keys) {
        struct termios raw = screen->was;
        raw.c_lflag &= ~(tcflag_t)(ICANON | ECHO);
        tcsetattr(STDIN_FILENO, TCSANOW, &raw);
    }
    if (terminal)
        fputs("\033[?25l", stdout);
}

static void screen_close(const struct screen *screen)
{
    if (screen->keys)
        tcsetattr(STDIN_FILENO, TCSANOW, &screen->was);
    if (screen->terminal)
        fputs("\033[?25h", stdout);
}

static unsigned screen_rows(void)
{
    struct winsize size;
    return ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_row > 8 ? size.ws_row : 24;
}

/* False: the user has had enough. */
static bool wait_interval(const struct screen *screen, double seconds)
{
    double until = now_s() + seconds, left;
    while (!stopped && (left = until - now_s()) > 0) {
        struct pollfd input = {.fd = screen->keys ? STDIN_FILENO : -1, .events = POLLIN};
        char key;
        if (poll(&input, 1, (int)ceil(left * 1000)) <= 0)
            continue;
        if (read(STDIN_FILENO, &key, 1) != 1 || key == 'q' || key == 'Q')
            return false;
    }
    return !stopped;
}

/* Nobody reads any more: then there is nobody to show anything. */
static bool flushed(void) { return fflush(stdout) == 0 && !ferror(stdout); }

static void show(const struct ctl *ctl, const struct screen *screen, const struct look *before, const struct look *now)
{
    const char *only = ctl_value(ctl, "--device");
    bool streams = has_streams(now, only);
    unsigned above = 9 + 2 * now->status->n_devices + (streams ? 2 + now->status->n_devices : 0);
    unsigned rows = screen->terminal ? screen_rows() : 0;
    if (ctl->json) {
        print_json(before, now, only);
        return;
    }
    if (screen->terminal)
        fputs("\033[H\033[J", stdout);
    print_text(before, now, only, !screen->terminal ? UINT32_MAX : rows > above + 2 ? rows - above : 2);
    if (!screen->terminal)
        putchar('\n');
}

static void show_absence(const struct ctl *ctl, const struct screen *screen, const char *why)
{
    if (screen->terminal)
        fputs("\033[H\033[J", stdout);
    if (ctl->json) {
        cJSON *root = cJSON_CreateObject();
        cJSON_AddStringToObject(root, "error", why);
        char *text = cJSON_PrintUnformatted(root);
        puts(text ? text : "{}");
        cJSON_free(text);
        cJSON_Delete(root);
    } else {
        output_print(BAD, "%s", why);
        printf("; trying again\n");
    }
}

static int watch(const struct ctl *ctl, const struct screen *screen, double interval, bool once)
{
    struct look *before = NULL, *now = NULL;
    int code = CTL_OK;
    do {
        struct ctl_fault fault;
        code = look_new(ctl, &now, &fault);
        if (code && once)
            ctl_error(ctl, code, "%s", fault.text);
        else if (code)
            show_absence(ctl, screen, fault.text);
        else
            rate_clients(before, now);
        if (!code && (before || (screen->terminal && !once)))
            show(ctl, screen, before, now);
        bool last = once && (code || before);
        look_free(before);
        before = code ? NULL : now;
        now = NULL;
        if (last)
            break;
    } while (flushed() && wait_interval(screen, interval));
    look_free(before);
    return once ? code : CTL_OK;
}

int ctl_top(const struct ctl *ctl)
{
    const char *text = ctl_value(ctl, "--interval");
    bool once = ctl_value(ctl, "--once") != NULL;
    char *end = NULL;
    double interval = text ? strtod(text, &end) : 2;
    if (text && (end == text || *end || !(interval >= 0.1 && interval <= 3600)))
        return ctl_error(ctl, CTL_USAGE, "--interval %s: give seconds, from 0.1 to 3600", text);
    struct screen screen = {0};
    if (!once) /* which a signal ends as any other command */
        screen_open(&screen, !ctl->json && isatty(STDOUT_FILENO) && isatty(STDIN_FILENO));
    int code = watch(ctl, &screen, interval, once);
    screen_close(&screen);
    return code;
}
