/* worker.h - the worker process: one device, its sessions, and the control socket to the supervisor.
 *
 * It takes the device's lock (a predecessor may still be dying), opens the backend, says READY, and from then on does
 * what the control socket and its sessions ask. It keeps nothing on disk and ends when the control socket ends: the
 * supervisor and the clients bring everything back. */
#ifndef MLAD_WORKER_H
#define MLAD_WORKER_H

#include <stdint.h>

struct mlad_worker_options {
    const char *device;
    const char *lock;    /* path; held by flock for as long as this process lives */
    const char *variant; /* NULL: the best here */
    uint32_t threads;    /* 0: one per processor */
    int control;         /* SEQPACKET socket of the supervisor */
    int life;            /* memfd holding a struct mlad_life */
};

/* Serve until the control socket ends, then _exit(0). Returns only when it cannot start: the status to exit with. */
int mlad_worker_run(const struct mlad_worker_options *options);

#endif
