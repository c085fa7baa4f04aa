/* supervisor.h - the daemon itself: one loop, the devices it keeps alive, the connections it holds.
 *
 * The state below belongs to supervisor.c and is shared by the rooms around it: peer.c (connections) and admin.c (what
 * they may ask). Devices, processes, the listener and the policy know nothing of it. Everything runs on one thread. */
#ifndef MLAD_SUPERVISOR_H
#define MLAD_SUPERVISOR_H

#include "config.h"
#include "device.h"
#include "discovery.h"
#include "listener.h"

#include <stdbool.h>
#include <uv.h>

enum { MLAD_TICK_MS = 100 };

#define MLAD_NAME "mlad " MLAD_VERSION_TEXT

/* Where the configuration came from, to read it again. */
struct mlad_source {
    const char *path;
    bool must_exist;
    const struct mlad_setting *settings;
    size_t n_settings;
};

struct mlad_peer;

struct mlad_supervisor {
    uv_loop_t loop;
    uv_timer_t tick, watchdog;
    uv_signal_t hangup, terminate, interrupt;
    struct mlad_source source;
    struct mlad_config config;
    struct mlad_listener listener;
    struct mlad_discovery discovery;
    char note[256]; /* for status: what an operator should know of the devices; mostly empty */
    char executable[4096]; /* of the workers */
    struct mlad_device *devices[MLAD_CONFIG_DEVICES];
    uint32_t n_devices;
    struct mlad_peer *peers;
    uint32_t n_peers;
    uint64_t last_session; /* ids are never used again, whatever the device */
    uint64_t denied;       /* connections refused by policy */
    uint64_t started_at;   /* ms of the loop's clock */
    uint32_t finishing;    /* devices whose decodes in flight are awaited before the end */
    bool settled;          /* no device is in its first start any more */
    bool stopping, ending; /* decodes in flight are awaited; workers' ends are */
    bool closed;
    bool failed; /* it could not go on after its start */
};

/* Run until SIGTERM or SIGINT. The process's exit status. */
int mlad_supervisor_run(const struct mlad_config *config, const struct mlad_source *source);

/* NULL if it is not served. */
struct mlad_device *mlad_supervisor_device(struct mlad_supervisor *supervisor, const char *name);

#endif
