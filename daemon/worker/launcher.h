/* launcher.h - the thread that runs slices, so that the loop never waits for a kernel.
 *
 * Takes one slice at a time. The rows are the launch thread's from mlad_launcher_run until the `ended` callback, which
 * comes on the loop thread. It ends with the process. */
#ifndef MLAD_LAUNCHER_H
#define MLAD_LAUNCHER_H

#include "mlak.h"

#include <pthread.h>
#include <uv.h>

enum { MLAD_LINGER_NS = 100000 }; /* how long a thread that had work polls for more before it sleeps */

enum mlad_launcher_state { MLAD_LAUNCHER_IDLE, MLAD_LAUNCHER_FULL, MLAD_LAUNCHER_DONE };

struct mlad_launcher {
    const struct mlak_backend *backend;
    struct mlak_device *device;
    void (*ended)(struct mlad_launcher *launcher, enum mlak_code code);
    uv_async_t wake_loop;
    pthread_t thread;
    pthread_mutex_t lock; /* of what follows */
    pthread_cond_t work;
    int state; /* enum mlad_launcher_state; changed under the lock, peeked at without */
    struct mlak_row *rows;
    uint32_t count;
    enum mlak_code code;
};

bool mlad_launcher_start(struct mlad_launcher *launcher, uv_loop_t *loop, const struct mlak_backend *backend,
                         struct mlak_device *device,
                         void (*ended)(struct mlad_launcher *launcher, enum mlak_code code));

void mlad_launcher_run(struct mlad_launcher *launcher, struct mlak_row *rows, uint32_t count);

#endif
