/* launcher.h - the thread that runs launches, so that the loop never waits for a kernel.
 *
 * Takes one launch at a time: rows that were prepared, or parts of batches that the device prepares itself; a device
 * that runs several at once has a launcher for each. Rows and parts are the launch thread's from mlad_launcher_run
 * until the `ended` callback, which comes on the loop thread. It ends with the process. */
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
    uint32_t which; /* of the device's launches at once */
    void (*ended)(struct mlad_launcher *launcher, enum mlak_code code, const struct mlak_fault *fault);
    uv_async_t wake_loop;
    pthread_t thread;
    pthread_mutex_t lock; /* of what follows */
    pthread_cond_t work;
    int state;               /* enum mlad_launcher_state; changed under the lock, peeked at without */
    struct mlak_part *parts; /* NULL: the rows are prepared */
    struct mlak_row *rows;
    uint32_t count; /* of parts or rows */
    enum mlak_code code;
    struct mlak_fault fault;
};

bool mlad_launcher_start(struct mlad_launcher *launcher, uv_loop_t *loop, const struct mlak_backend *backend,
                         struct mlak_device *device, uint32_t which,
                         void (*ended)(struct mlad_launcher *launcher, enum mlak_code code,
                                       const struct mlak_fault *fault));

void mlad_launcher_run(struct mlad_launcher *launcher, struct mlak_row *rows, uint32_t count);
/* Parts, whose codes and rows say what came of them. */
void mlad_launcher_run_parts(struct mlad_launcher *launcher, struct mlak_part *parts, uint32_t count);

#endif
