/* supervisor.c - see supervisor.h. The daemon's life: start, tick, reload, stop; and what systemd is told of it. */
#include "supervisor.h"

#include "admin.h"
#include "log.h"
#include "peer.h"

#include <errno.h>
#include <libgen.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <systemd/sd-daemon.h>
#include <time.h>
#include <unistd.h>

struct mlad_device *mlad_supervisor_device(struct mlad_supervisor *supervisor, const char *name)
{
    for (uint32_t i = 0; i < supervisor->n_devices; i++)
        if (strcmp(supervisor->devices[i]->name, name) == 0)
            return supervisor->devices[i];
    return NULL;
}

/* ---- what systemd is told ---- */

/* One line: "cpu ready, reference restarting". READY comes once no device is still in its first start. */
static void notify_state(struct mlad_supervisor *supervisor)
{
    char line[1400] = "";
    size_t n = 0;
    bool settled = true;
    for (uint32_t i = 0; i < supervisor->n_devices && n < sizeof line; i++) {
        const struct mlad_device *device = supervisor->devices[i];
        settled = settled && device->state != MLAP_device_state_STARTING;
        n += (size_t)snprintf(line + n, sizeof line - n, "%s%s %s", i ? ", " : "", device->name,
                              mlap_device_state_text(device->state));
    }
    sd_notifyf(0, "STATUS=%s%s", supervisor->stopping ? "stopping; " : "", line);
    if (settled && !supervisor->settled) {
        supervisor->settled = true;
        sd_notify(0, "READY=1");
        mlad_log(LOG_NOTICE, "serving", MLAD_KV("socket", supervisor->listener.path), MLAD_KV("devices", line));
    }
}

static void on_watchdog(uv_timer_t *timer)
{
    (void)timer;
    sd_notify(0, "WATCHDOG=1");
}

static void start_watchdog(struct mlad_supervisor *supervisor)
{
    uint64_t interval_us = 0;
    uv_timer_init(&supervisor->loop, &supervisor->watchdog);
    if (sd_watchdog_enabled(1, &interval_us) > 0)
        uv_timer_start(&supervisor->watchdog, on_watchdog, 0, interval_us / 2000);
}

/* ---- reload ---- */

static void on_hangup(uv_signal_t *handle, int number)
{
    struct mlad_supervisor *supervisor = handle->data;
    const struct mlad_source *source = &supervisor->source;
    static struct mlad_config wanted; /* large */
    char error[MLAD_CONFIG_ERROR], restart[512];
    struct timespec now;
    (void)number;
    clock_gettime(CLOCK_MONOTONIC, &now);
    sd_notifyf(0, "RELOADING=1\nMONOTONIC_USEC=%lld", (long long)now.tv_sec * 1000000 + now.tv_nsec / 1000);
    if (!mlad_config_load(&wanted, source->path, source->must_exist, source->settings, source->n_settings, error))
        mlad_log(LOG_ERR, "the new configuration is refused, the old one stays", MLAD_KV("why", error));
    else {
        mlad_config_reload(&supervisor->config, &wanted, restart, sizeof restart);
        mlad_log_set_level((int)supervisor->config.log_level);
        for (uint32_t i = 0; i < supervisor->n_devices; i++)
            mlad_device_configure(supervisor->devices[i]);
        mlad_log(LOG_NOTICE, "configuration read again", MLAD_KV("path", source->path));
        if (restart[0])
            mlad_log(LOG_WARNING, "changed options that need a restart keep their old values",
                     MLAD_KV("options", restart));
    }
    sd_notify(0, supervisor->settled ? "READY=1" : "STATUS=starting");
}

/* ---- stop: nothing new, drain, end the workers, close the loop ---- */

static void close_loop(struct mlad_supervisor *supervisor)
{
    if (supervisor->closed)
        return;
    supervisor->closed = true;
    mlad_discovery_stop(&supervisor->discovery);
    mlad_peers_close(supervisor);
    for (uint32_t i = 0; i < supervisor->n_devices; i++)
        mlad_device_free(supervisor->devices[i]);
    supervisor->n_devices = 0;
    uv_close((uv_handle_t *)&supervisor->tick, NULL);
    uv_close((uv_handle_t *)&supervisor->watchdog, NULL);
    uv_close((uv_handle_t *)&supervisor->hangup, NULL);
    uv_close((uv_handle_t *)&supervisor->terminate, NULL);
    uv_close((uv_handle_t *)&supervisor->interrupt, NULL);
}

static void end_workers(struct mlad_supervisor *supervisor)
{
    if (supervisor->ending)
        return;
    supervisor->ending = true;
    for (uint32_t i = 0; i < supervisor->n_devices; i++)
        mlad_device_stop(supervisor->devices[i]);
}

/* A device has nothing in flight any more, or no worker, or no time. */
static void on_finished(void *context, const struct mlap_header *header, const union mlap_body *body)
{
    struct mlad_supervisor *supervisor = context;
    (void)header;
    (void)body;
    if (--supervisor->finishing == 0)
        end_workers(supervisor);
}

static void on_stop(uv_signal_t *handle, int number)
{
    struct mlad_supervisor *supervisor = handle->data;
    if (supervisor->stopping) { /* asked twice: do not wait */
        end_workers(supervisor);
        return;
    }
    supervisor->stopping = true;
    sd_notify(0, "STOPPING=1");
    mlad_log(LOG_NOTICE, "stopping", MLAD_KV("signal", strsignal(number)),
             MLAD_KV("drain_timeout_ms", supervisor->config.drain_timeout));
    mlad_listener_close(&supervisor->listener);
    mlad_peers_close(supervisor);
    if (supervisor->n_devices == 0) { /* which there are was not known yet */
        close_loop(supervisor);
        return;
    }
    if (supervisor->config.drain_timeout == 0) {
        end_workers(supervisor);
        return;
    }
    /* Set before the first is asked: one without a worker answers at once. */
    uint32_t n = supervisor->finishing = supervisor->n_devices;
    for (uint32_t i = 0; i < n; i++)
        mlad_device_finish(supervisor->devices[i], supervisor->config.drain_timeout, on_finished, supervisor);
}

/* ---- running ---- */

static void on_device_changed(struct mlad_device *device, void *owner)
{
    struct mlad_supervisor *supervisor = owner;
    bool all_gone = supervisor->ending;
    for (uint32_t i = 0; i < supervisor->n_devices; i++)
        all_gone = all_gone && mlad_device_is_gone(supervisor->devices[i]);
    notify_state(supervisor);
    if (all_gone)
        close_loop(supervisor);
    else
        mlad_peers_device_changed(supervisor, device);
}

static void on_tick(uv_timer_t *timer)
{
    struct mlad_supervisor *supervisor = timer->data;
    for (uint32_t i = 0; i < supervisor->n_devices; i++)
        mlad_device_tick(supervisor->devices[i]);
    mlad_peers_tick(supervisor);
    mlad_listener_tick(&supervisor->listener);
}

static void on_accepted(struct mlad_listener *listener, int fd)
{
    mlad_peer_new(listener->owner, fd);
}

/* mlad-worker lies at a fixed place from our own executable, which an upgrade may replace while we run. */
static bool find_worker(struct mlad_supervisor *supervisor)
{
    char self[3800];
    ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
    if (n < 0)
        return false;
    self[n] = '\0';
    snprintf(supervisor->executable, sizeof supervisor->executable, "%s/../libexec/mlad/mlad-worker", dirname(self));
    return true;
}

static bool make_devices(struct mlad_supervisor *supervisor, const struct mlad_names *names)
{
    const struct mlad_config *config = &supervisor->config;
    char path[sizeof supervisor->listener.path];
    snprintf(path, sizeof path, "%s", supervisor->listener.path);
    const char *directory = config->runtime_dir[0] ? config->runtime_dir : dirname(path);
    if (mkdir(directory, 0755) < 0 && errno != EEXIST) {
        mlad_log(LOG_ERR, "the directory of the lock files cannot be made", MLAD_KV("path", directory),
                 MLAD_KV("why", strerror(errno)));
        return false;
    }
    for (uint32_t i = 0; i < names->n; i++) {
        supervisor->devices[i] = mlad_device_new(names->name[i], &supervisor->loop, config,
                                                 supervisor->executable, directory, on_device_changed, supervisor);
        if (!supervisor->devices[i])
            return false;
        supervisor->n_devices++;
    }
    return true;
}

/* The devices are known: connections may come. */
static bool serve(struct mlad_supervisor *supervisor, const struct mlad_names *names)
{
    if (mlad_listener_start(&supervisor->listener, &supervisor->loop, on_accepted, supervisor) != 0 ||
        !make_devices(supervisor, names))
        return false;
    for (uint32_t i = 0; i < supervisor->n_devices; i++)
        mlad_device_start(supervisor->devices[i]);
    return true;
}

static void on_discovered(const struct mlad_discovered *discovered, void *owner)
{
    static struct mlad_names names; /* large */
    struct mlad_supervisor *supervisor = owner;
    uint32_t left_out = mlad_discovery_expand(&supervisor->config.devices, discovered, &names);
    for (uint32_t i = 0; i < discovered->total && i < MLAD_CONFIG_DEVICES; i++)
        mlad_log(LOG_INFO, "found a GPU", MLAD_KV("device", discovered->gpu[i].device),
                 MLAD_KV("model", discovered->gpu[i].model));
    if (discovered->total == 0)
        snprintf(supervisor->note, sizeof supervisor->note, "devices = all found no GPU: %.220s", discovered->why);
    else if (left_out)
        snprintf(supervisor->note, sizeof supervisor->note,
                 "devices = all found %u GPUs and leaves out %u: at most %d devices are served; name those wanted",
                 discovered->total, left_out, MLAD_CONFIG_DEVICES);
    if (discovered->total == 0)
        mlad_log(discovered->failed ? LOG_WARNING : LOG_NOTICE, "no GPU is found, cpu is served without",
                 MLAD_KV("why", discovered->why));
    else if (left_out)
        mlad_log(LOG_WARNING, "GPUs are left out", MLAD_KV("why", supervisor->note));
    if (serve(supervisor, &names))
        return;
    supervisor->failed = true;
    mlad_listener_close(&supervisor->listener);
    close_loop(supervisor);
}

static void watch_signal(struct mlad_supervisor *supervisor, uv_signal_t *handle, uv_signal_cb callback, int number)
{
    uv_signal_init(&supervisor->loop, handle);
    handle->data = supervisor;
    uv_signal_start(handle, callback, number);
}

/* All handles exist from here on, so that close_loop can close them. */
static bool start(struct mlad_supervisor *supervisor)
{
    char error[512];
    const struct mlad_config *config = &supervisor->config;
    if (uv_timer_init(&supervisor->loop, &supervisor->tick) != 0)
        return false;
    supervisor->tick.data = supervisor;
    start_watchdog(supervisor);
    watch_signal(supervisor, &supervisor->hangup, on_hangup, SIGHUP);
    watch_signal(supervisor, &supervisor->terminate, on_stop, SIGTERM);
    watch_signal(supervisor, &supervisor->interrupt, on_stop, SIGINT);
    uv_timer_start(&supervisor->tick, on_tick, MLAD_TICK_MS, MLAD_TICK_MS);
    supervisor->started_at = uv_now(&supervisor->loop);
    if (!find_worker(supervisor))
        return false;
    if (!mlad_listener_open(&supervisor->listener, config->socket, (mode_t)config->socket_mode, error, sizeof error)) {
        mlad_log(LOG_ERR, "cannot listen", MLAD_KV("why", error));
        return false;
    }
    if (!mlad_wants_all(&config->devices))
        return serve(supervisor, &config->devices);
    /* Who connects meanwhile waits in the socket's queue: no device is refused that may turn out to be there. */
    sd_notify(0, "STATUS=looking for GPUs");
    mlad_discovery_start(&supervisor->discovery, &supervisor->loop, supervisor->executable, config->discovery_timeout,
                         on_discovered, supervisor);
    return !supervisor->failed;
}

int mlad_supervisor_run(const struct mlad_config *config, const struct mlad_source *source)
{
    static struct mlad_supervisor supervisor; /* one in a process, and it lasts as long */
    supervisor.config = *config;
    supervisor.source = *source;
    supervisor.listener.fd = -1;
    if (uv_loop_init(&supervisor.loop) != 0)
        return 1;
    bool started = start(&supervisor);
    if (!started) {
        mlad_listener_close(&supervisor.listener);
        close_loop(&supervisor);
    }
    uv_run(&supervisor.loop, UV_RUN_DEFAULT); /* until close_loop has closed every handle */
    uv_loop_close(&supervisor.loop);
    if (started && !supervisor.failed)
        mlad_log(LOG_NOTICE, "stopped");
    return started && !supervisor.failed ? 0 : 1;
}
