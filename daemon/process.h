/* process.h - one worker process, from fork to reaping: its control socket, its page of life, its end.
 *
 * Owned by its device (device.c), which is told what happens through three calls. A process frees itself after `ended`;
 * its device then may start another. Nothing here decides anything: when to start, restart or kill is the device's. */
#ifndef MLAD_PROCESS_H
#define MLAD_PROCESS_H

#include "life.h"
#include "mlap.h"

#include <stdbool.h>
#include <uv.h>

struct mlad_process;

/* How to start it: the worker's command line. Texts are copied. */
struct mlad_process_command {
    const char *executable;
    const char *device;
    const char *lock;    /* path of the device's lock file */
    uint64_t threads;    /* 0: its own choice */
    const char *variant; /* NULL: its own choice */
    int log_level;
    const char *log_target; /* "stderr" or "journal" */
};

struct mlad_process_events {
    /* A message came from the worker. It is the callee's for the length of the call only. */
    void (*message)(void *owner, const struct mlap_header *header, const union mlap_body *body);
    /* After a send found the socket full: there is room again. */
    void (*writable)(void *owner);
    /* It is reaped, and everything it had sent was delivered. `how` says how it ended, for a person. */
    void (*ended)(void *owner, const char *how);
};

/* Start one. 0, or a negative libuv error, and then there is none. */
int mlad_process_start(struct mlad_process **process, uv_loop_t *loop, const struct mlad_process_command *command,
                       const struct mlad_process_events *events, void *owner);

/* Our environment without the way to notify systemd, which is the supervisor's alone. The caller frees the array, not
 * its texts; NULL without memory. */
char **mlad_process_environment(void);

int mlad_process_pid(const struct mlad_process *process);

/* Send a message, with `fd` unless it is -1; `fd` stays the caller's. 0, or -1 with errno: EAGAIN, `writable` will
 * follow. */
int mlad_process_send(struct mlad_process *process, enum mlap_type type, uint32_t sequence, const void *body, int fd);

/* What its page says now. */
struct mlad_life mlad_process_life(const struct mlad_process *process);

/* Look at the page; to be called often. Returns for how many milliseconds the worker has shown no sign of life: no
 * beat, or no progress while decodes run. Time in which we did not run ourselves (a frozen container) counts for
 * little. */
uint64_t mlad_process_silence(struct mlad_process *process);

/* SIGKILL. `ended` follows. */
void mlad_process_kill(struct mlad_process *process);

/* Close the control socket, at which a worker exits. `ended` follows. */
void mlad_process_hang_up(struct mlad_process *process);

#endif
