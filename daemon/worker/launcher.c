/* launcher.c - see launcher.h. */
#include "launcher.h"

#include "stats.h"

#include <sched.h>
#include <signal.h>

/* The next launch often comes within microseconds of the last one's end, and waking a processor that went idle can cost
 * more than that: look out for it before sleeping, giving way to whoever else can run. */
static void look_out(const struct mlad_launcher *launcher)
{
    uint64_t until = mlad_now_ns() + MLAD_LINGER_NS;
    while (__atomic_load_n(&launcher->state, __ATOMIC_RELAXED) != MLAD_LAUNCHER_FULL && mlad_now_ns() < until)
        sched_yield();
}

static void *launch_all(void *context)
{
    struct mlad_launcher *launcher = context;
    pthread_mutex_lock(&launcher->lock);
    for (;;) {
        while (launcher->state != MLAD_LAUNCHER_FULL)
            pthread_cond_wait(&launcher->work, &launcher->lock);
        struct mlak_part *parts = launcher->parts;
        struct mlak_row *rows = launcher->rows;
        uint32_t count = launcher->count;
        pthread_mutex_unlock(&launcher->lock);
        struct mlak_fault fault = {0};
        enum mlak_code code =
            parts ? launcher->backend->launch_batches(launcher->device, launcher->which, parts, count, false, &fault)
                  : launcher->backend->launch(launcher->device, rows, count);
        pthread_mutex_lock(&launcher->lock);
        launcher->fault = fault;
        launcher->code = code;
        __atomic_store_n(&launcher->state, MLAD_LAUNCHER_DONE, __ATOMIC_RELAXED);
        uv_async_send(&launcher->wake_loop);
        pthread_mutex_unlock(&launcher->lock);
        look_out(launcher);
        pthread_mutex_lock(&launcher->lock);
    }
    return NULL;
}

/* uv_async_send may wake the loop once for many sends, or once too often. */
static void on_wake(uv_async_t *async)
{
    struct mlad_launcher *launcher = async->data;
    pthread_mutex_lock(&launcher->lock);
    bool done = launcher->state == MLAD_LAUNCHER_DONE;
    enum mlak_code code = launcher->code;
    struct mlak_fault fault = launcher->fault;
    if (done)
        __atomic_store_n(&launcher->state, MLAD_LAUNCHER_IDLE, __ATOMIC_RELAXED);
    pthread_mutex_unlock(&launcher->lock);
    if (done)
        launcher->ended(launcher, code, &fault);
}

bool mlad_launcher_start(struct mlad_launcher *launcher, uv_loop_t *loop, const struct mlak_backend *backend,
                         struct mlak_device *device, uint32_t which,
                         void (*ended)(struct mlad_launcher *launcher, enum mlak_code code,
                                       const struct mlak_fault *fault))
{
    *launcher = (struct mlad_launcher){.backend = backend, .device = device, .which = which, .ended = ended};
    pthread_mutex_init(&launcher->lock, NULL);
    pthread_cond_init(&launcher->work, NULL);
    if (uv_async_init(loop, &launcher->wake_loop, on_wake) != 0)
        return false;
    launcher->wake_loop.data = launcher;

    sigset_t all, before; /* signals are the loop thread's */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = pthread_create(&launcher->thread, NULL, launch_all, launcher);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (error == 0)
        pthread_setname_np(launcher->thread, "mlad:launch");
    return error == 0;
}

static void run(struct mlad_launcher *launcher, struct mlak_part *parts, struct mlak_row *rows, uint32_t count)
{
    pthread_mutex_lock(&launcher->lock);
    launcher->parts = parts;
    launcher->rows = rows;
    launcher->count = count;
    __atomic_store_n(&launcher->state, MLAD_LAUNCHER_FULL, __ATOMIC_RELAXED);
    pthread_cond_signal(&launcher->work);
    pthread_mutex_unlock(&launcher->lock);
}

void mlad_launcher_run(struct mlad_launcher *launcher, struct mlak_row *rows, uint32_t count)
{
    run(launcher, NULL, rows, count);
}

void mlad_launcher_run_parts(struct mlad_launcher *launcher, struct mlak_part *parts, uint32_t count)
{
    run(launcher, parts, NULL, count);
}
