/* device.c - see device.h. */
#include "device.h"

#include "log.h"

#include <errno.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

enum { FIRST_DELAY_MS = 50, LAST_DELAY_MS = 5000, STOP_GRACE_MS = 1000 };

/* A question to the worker that waits for its answer. */
struct mlad_call {
    struct mlad_call *next;
    uint32_t sequence;
    uint64_t deadline; /* ms of the loop's clock; 0: none */
    mlad_answer *answer;
    void *context;
};

static uint64_t now_ms(const struct mlad_device *device)
{
    return uv_now(device->loop);
}

bool mlad_device_is_ready(const struct mlad_device *device)
{
    return device->ready;
}

bool mlad_device_is_gone(const struct mlad_device *device)
{
    return device->stopping && !device->process;
}

/* ---- questions ---- */

/* Give the first call that `wanted` names its answer. */
static bool answer_call(struct mlad_device *device, bool (*wanted)(const struct mlad_call *, uint64_t), uint64_t key,
                        const struct mlap_header *header, const union mlap_body *body)
{
    for (struct mlad_call **at = &device->calls; *at; at = &(*at)->next)
        if (wanted(*at, key)) {
            struct mlad_call *call = *at;
            *at = call->next; /* before the callee, which may ask again */
            call->answer(call->context, header, body);
            free(call);
            return true;
        }
    return false;
}

static bool has_sequence(const struct mlad_call *call, uint64_t sequence)
{
    return call->sequence == sequence;
}

static bool is_late(const struct mlad_call *call, uint64_t now)
{
    return call->deadline && call->deadline <= now;
}

static bool any(const struct mlad_call *call, uint64_t unused)
{
    return call && unused == 0;
}

void mlad_device_ask(struct mlad_device *device, enum mlap_type type, const void *body, uint64_t limit_ms,
                     mlad_answer *answer, void *context)
{
    /* A worker that starts can say why it takes long. */
    bool able = device->ready || (device->process && type == MLAP_QUERY);
    struct mlad_call *call = able ? malloc(sizeof *call) : NULL;
    if (call && ++device->last_sequence == 0) /* 0 means unasked */
        device->last_sequence = 1;
    if (!call || mlad_process_send(device->process, type, device->last_sequence, body, -1) < 0) {
        free(call);
        answer(context, NULL, NULL);
        return;
    }
    *call = (struct mlad_call){device->calls, device->last_sequence, limit_ms ? now_ms(device) + limit_ms : 0, answer,
                               context};
    device->calls = call;
}

/* ---- state ---- */

__attribute__((format(printf, 3, 4))) static void enter(struct mlad_device *device, enum mlap_device_state state,
                                                        const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(device->reason, sizeof device->reason, format, arguments);
    va_end(arguments);
    device->state = state;
}

static void serve(struct mlad_device *device)
{
    if (device->draining)
        enter(device, MLAP_device_state_DRAINING, "an operator drains it; `mlactl drain --resume` ends that");
    else
        enter(device, MLAP_device_state_READY, "%s", "");
}

void mlad_device_configure(struct mlad_device *device)
{
    const struct mlad_config *c = device->config;
    struct mlap_configure configure = {
        .max_sessions = (uint32_t)c->max_sessions,
        .max_bytes = c->max_bytes,
        .max_buffers = (uint32_t)c->max_buffers,
        .max_plans = (uint32_t)c->max_plans,
        .max_in_flight = (uint32_t)c->max_in_flight,
        .max_bytes_per_session = c->max_bytes_per_session,
        .max_in_flight_per_session = (uint32_t)c->max_in_flight_per_session,
        .queue_limit = (uint32_t)c->queue_limit,
        .log_level = (uint32_t)c->log_level,
        .draining = device->draining,
        .stopping = device->stopping,
    };
    if (device->stopping)
        mlap_set(&configure, configure, stopping);
    device->configure_due =
        device->process && mlad_process_send(device->process, MLAP_CONFIGURE, 0, &configure, -1) < 0 && errno == EAGAIN;
}

static void on_ready(struct mlad_device *device, const struct mlap_ready *ready)
{
    if (device->ready)
        return;
    device->capabilities = *ready;
    device->ready = true;
    device->ready_at = now_ms(device);
    serve(device);
    mlad_log(LOG_DEBUG, "worker reported ready", MLAD_KV("device", device->name),
             MLAD_KV("pid", mlad_process_pid(device->process)), MLAD_KV("variant", ready->variant),
             MLAD_KV("threads", ready->threads));
    device->changed(device, device->owner);
}

static void on_message(void *owner, const struct mlap_header *header, const union mlap_body *body)
{
    struct mlad_device *device = owner;
    if (header->type == MLAP_READY)
        on_ready(device, &body->ready_);
    else if (header->type == MLAP_ERROR && header->sequence == 0) {
        snprintf(device->last_words, sizeof device->last_words, "%.255s", body->error_.message);
        device->cannot_run = !device->ready;
    } else {
        if (header->type == MLAP_REPORT)
            device->figures = body->report_.device;
        /* An answer whose time was up finds no call, and is of no use. */
        answer_call(device, has_sequence, header->sequence, header, body);
    }
}

static void on_writable(void *owner)
{
    struct mlad_device *device = owner;
    if (device->configure_due)
        mlad_device_configure(device);
    device->changed(device, device->owner);
}

/* ---- the worker's life ---- */

static void on_restart(uv_timer_t *timer)
{
    mlad_device_start(timer->data);
}

/* The worker is gone, or did not come to be; `absent`: because it cannot run here. */
static void schedule_restart(struct mlad_device *device, bool absent, const char *why, uint64_t decodes)
{
    bool again = strcmp(device->end_reason, why) == 0 && device->state == MLAP_device_state_ABSENT;
    uint64_t delay = decodes ? 0 : device->restart_delay;
    device->restart_delay = decodes ? FIRST_DELAY_MS : delay * 2 < LAST_DELAY_MS ? delay * 2 : LAST_DELAY_MS;
    device->ended_at = now_ms(device);
    snprintf(device->end_reason, sizeof device->end_reason, "%s", why);
    enter(device, absent ? MLAP_device_state_ABSENT : MLAP_device_state_RESTARTING, "%s", why);
    /* What stays away says so once, not every five seconds. */
    mlad_log(again ? LOG_DEBUG : LOG_WARNING, absent ? "device is absent" : "worker ended",
             MLAD_KV("device", device->name), MLAD_KV("why", why), MLAD_KV("restart_in_ms", delay));
    uv_timer_start(&device->restart, on_restart, delay, 0);
}

static void on_ended(void *owner, const char *how)
{
    struct mlad_device *device = owner;
    uint64_t decodes = mlad_process_life(device->process).decodes;
    device->process = NULL;
    device->ready = device->configure_due = false;
    device->figures = (struct mlap_device){0};
    if (!device->stopping)
        schedule_restart(device, device->cannot_run, device->last_words[0] ? device->last_words : how, decodes);
    while (answer_call(device, any, 0, NULL, NULL))
        ;
    device->changed(device, device->owner);
}

static const struct mlad_process_events process_events = {on_message, on_writable, on_ended};

void mlad_device_start(struct mlad_device *device)
{
    const struct mlad_config *config = device->config;
    bool is_cpu = strcmp(device->name, "cpu") == 0;
    struct mlad_process_command command = {
        .executable = device->executable,
        .device = device->name,
        .lock = device->lock,
        .threads = is_cpu ? config->cpu_threads : 0,
        .variant = is_cpu && config->cpu_variant ? mlad_config_choice(config, "cpu_variant") : NULL,
        .log_level = mlad_log_level(),
        .log_target = mlad_log_target() == MLAD_LOG_JOURNAL ? "journal" : "stderr",
    };
    if (device->started_at)
        device->restarts++;
    uv_update_time(device->loop);
    device->started_at = now_ms(device);
    device->last_words[0] = '\0';
    device->cannot_run = false;
    int error = mlad_process_start(&device->process, device->loop, &command, &process_events, device);
    if (error) {
        char why[256];
        device->process = NULL;
        snprintf(why, sizeof why, "its worker %.140s cannot be started: %.80s", device->executable, uv_strerror(error));
        schedule_restart(device, true, why, 0);
        device->changed(device, device->owner);
        return;
    }
    mlad_log(LOG_DEBUG, "worker started", MLAD_KV("device", device->name),
             MLAD_KV("pid", mlad_process_pid(device->process)));
    mlad_device_configure(device);
}

static void kill_worker(struct mlad_device *device, const char *why)
{
    snprintf(device->last_words, sizeof device->last_words, "%s", why);
    mlad_process_kill(device->process);
}

void mlad_device_tick(struct mlad_device *device)
{
    while (answer_call(device, is_late, now_ms(device), NULL, NULL))
        ;
    if (!device->process)
        return;
    uint64_t silence = mlad_process_silence(device->process);
    bool told = device->last_words[0]; /* it ends anyway */
    if (device->stop_at && now_ms(device) >= device->stop_at + STOP_GRACE_MS)
        mlad_process_kill(device->process);
    else if (silence >= device->config->worker_timeout && !told) {
        char why[128];
        snprintf(why, sizeof why, "the worker was stuck: no sign of life for %llu ms (worker_timeout); it was killed",
                 (unsigned long long)silence);
        device->ready = false; /* nothing more is to be sent to it */
        enter(device, MLAP_device_state_RESTARTING, "%s", why);
        kill_worker(device, why);
    }
}

/* ---- what others ask of it ---- */

int mlad_device_attach(struct mlad_device *device, const struct mlap_attach *attach, int fd)
{
    return mlad_process_send(device->process, MLAP_ATTACH, 0, attach, fd);
}

void mlad_device_drain(struct mlad_device *device, bool resume, mlad_answer *answer, void *context)
{
    struct mlap_drain drain = {.resume = resume};
    mlap_set(&drain, drain, resume);
    snprintf(drain.device, sizeof drain.device, "%s", device->name);
    device->draining = !resume;
    if (device->ready)
        serve(device);
    mlad_device_configure(device); /* a worker that is not ready yet must know too */
    mlad_device_ask(device, MLAP_DRAIN, &drain, 0, answer, context);
    device->changed(device, device->owner);
}

void mlad_device_finish(struct mlad_device *device, uint64_t limit_ms, mlad_answer *answer, void *context)
{
    struct mlap_drain drain = {0};
    snprintf(drain.device, sizeof drain.device, "%s", device->name);
    device->stopping = true;
    uv_timer_stop(&device->restart);
    mlad_device_configure(device);
    mlad_device_ask(device, MLAP_DRAIN, &drain, limit_ms, answer, context);
}

void mlad_device_describe(const struct mlad_device *device, struct mlap_device *out)
{
    *out = device->figures;
    snprintf(out->name, sizeof out->name, "%s", device->name);
    snprintf(out->variant, sizeof out->variant, "%s", device->capabilities.variant);
    if (device->state != MLAP_device_state_STARTING ||
        !out->reason[0]) /* a worker that starts knows what it waits for */
        snprintf(out->reason, sizeof out->reason, "%s", device->reason);
    out->threads = device->capabilities.threads;
    out->state = device->state;
    out->pid = device->process ? (uint32_t)mlad_process_pid(device->process) : 0;
    out->restarts = device->restarts;
    out->uptime_ms = device->ready ? now_ms(device) - device->ready_at : 0;
    out->queue_limit = (uint32_t)device->config->queue_limit;
}

void mlad_device_stop(struct mlad_device *device)
{
    device->stopping = true;
    uv_timer_stop(&device->restart);
    device->stop_at = now_ms(device);
    if (device->process)
        mlad_process_hang_up(device->process);
    else
        device->changed(device, device->owner);
}

/* ---- its own life ---- */

struct mlad_device *mlad_device_new(const char *name, uv_loop_t *loop, const struct mlad_config *config,
                                    const char *executable, const char *runtime_dir,
                                    void (*changed)(struct mlad_device *device, void *owner), void *owner)
{
    struct mlad_device *device = calloc(1, sizeof *device);
    if (!device)
        return NULL;
    device->loop = loop;
    device->config = config;
    device->executable = executable;
    device->changed = changed;
    device->owner = owner;
    device->restart_delay = FIRST_DELAY_MS;
    snprintf(device->name, sizeof device->name, "%s", name);
    snprintf(device->lock, sizeof device->lock, "%s/%s.lock", runtime_dir, name);
    enter(device, MLAP_device_state_STARTING, "its worker has not reported ready yet");
    uv_timer_init(loop, &device->restart);
    device->restart.data = device;
    return device;
}

static void on_timer_closed(uv_handle_t *timer)
{
    free(timer->data);
}

void mlad_device_free(struct mlad_device *device)
{
    uv_close((uv_handle_t *)&device->restart, on_timer_closed);
}
