/* device.h - a device that mlad serves: its worker process, kept alive; its state, as status shows it.
 *
 * Owned by the supervisor. A device starts its worker, watches its signs of life, kills it when it is stuck and starts
 * another once the old one is reaped: at once if the dead one had completed a decode, else after a delay that doubles
 * from 50 ms to 5 s, so that a worker that dies at birth does not spin. A drain belongs to the device and outlives
 * workers. Whoever asks the worker something gets exactly one answer, if need be that there is none. */
#ifndef MLAD_DEVICE_H
#define MLAD_DEVICE_H

#include "config.h"
#include "mlap.h"
#include "process.h"

#include <stdbool.h>
#include <uv.h>

/* Called exactly once for each question, during it or later. `header` is NULL if there is no answer: no worker, it
 * died, it cannot take the question, or the time is up. */
typedef void mlad_answer(void *context, const struct mlap_header *header, const union mlap_body *body);

struct mlad_call;

struct mlad_device {
    char name[64];
    enum mlap_device_state state;
    char reason[256]; /* why it is in that state; empty when ready */
    bool draining;
    uint32_t restarts;
    uint64_t started_at, ready_at;  /* ms of the loop's clock; 0: never */
    uint64_t ended_at;              /* when a worker last ended unasked; 0: never */
    char end_reason[256];           /* and why */
    struct mlap_ready capabilities; /* as the last READY told */
    struct mlap_device figures;     /* as the last REPORT told; zeros once its worker ended */

    /* the rest is device.c's own */
    uv_loop_t *loop;
    const struct mlad_config *config;
    const char *executable;
    char lock[256];
    struct mlad_process *process; /* NULL: none runs */
    uv_timer_t restart;
    uint64_t restart_delay, stop_at;
    bool ready, configure_due, stopping;
    bool cannot_run;      /* the worker said so before it was ever ready */
    char last_words[256]; /* why the worker will end, if that is known before */
    struct mlad_call *calls;
    uint32_t last_sequence;
    void (*changed)(struct mlad_device *device, void *owner);
    void *owner;
};

/* Make one; nothing runs yet. `config` and `executable` must outlive it; its lock file lies in `runtime_dir`. `changed`
 * is called after each change of what it can do: ready, gone, room for another ATTACH. NULL without memory. */
struct mlad_device *mlad_device_new(const char *name, uv_loop_t *loop, const struct mlad_config *config,
                                    const char *executable, const char *runtime_dir,
                                    void (*changed)(struct mlad_device *device, void *owner), void *owner);

/* Start its worker, now and whenever it ends. */
void mlad_device_start(struct mlad_device *device);

/* Due every 100 ms: signs of life, questions out of time. */
void mlad_device_tick(struct mlad_device *device);

/* A worker serves: it can be sent ATTACH and questions. */
bool mlad_device_is_ready(const struct mlad_device *device);

/* Hand a connection over; `fd` stays the caller's. 0, or -1 with errno: EAGAIN, `changed` follows; EPIPE, its worker
 * ends. */
int mlad_device_attach(struct mlad_device *device, const struct mlap_attach *attach, int fd);

/* Ask the worker; no answer within `limit_ms` (0: no limit) counts as none. */
void mlad_device_ask(struct mlad_device *device, enum mlap_type type, const void *body, uint64_t limit_ms,
                     mlad_answer *answer, void *context);

/* Take no new work, or take it again. The answer comes when nothing is in flight; none means that no worker is left. */
void mlad_device_drain(struct mlad_device *device, bool resume, mlad_answer *answer, void *context);

/* Before the end: read nothing more from clients, whose next messages then are the next daemon's to answer, and finish
 * what they asked for. The answer comes when nothing is in flight, or at the limit. */
void mlad_device_finish(struct mlad_device *device, uint64_t limit_ms, mlad_answer *answer, void *context);

/* Tell the worker the limits as the configuration now has them. */
void mlad_device_configure(struct mlad_device *device);

/* What status says of it; `responding` is the caller's to set. */
void mlad_device_describe(const struct mlad_device *device, struct mlap_device *out);

/* End its worker for good; `changed` follows when it is gone, at once if there is none. */
void mlad_device_stop(struct mlad_device *device);

/* Nothing runs and nothing will. */
bool mlad_device_is_gone(const struct mlad_device *device);

/* Free a device that is gone; its timer is closed on the loop first. */
void mlad_device_free(struct mlad_device *device);

#endif
