/* worker.c - see worker.h. One static struct, since there is one worker in a process and it lasts as long. */
#include "worker.h"

#include "log.h"
#include "session.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <unistd.h>

enum { BEAT_MS = 100, BEATS_A_CHECK = 10, LOCK_RETRY_MS = 10, MAX_DRAINS = 64, EXIT_CANNOT_START = 3, LOOK_NS = 2000 };

static struct {
    const struct mlad_worker_options *options;
    uv_loop_t loop;
    uv_timer_t beat, lock_retry;
    int lock;
    struct mlad_link control;
    struct mlad_stats stats;
    struct mlad_quota quota;
    struct mlad_scheduler scheduler;
    struct mlad_sessions sessions;
    const struct mlak_backend *backend;
    struct mlak_device *device; /* NULL until the lock is ours */
    uint64_t ready_ns;          /* monotonic */
    bool configured;
    uint32_t drains[MAX_DRAINS]; /* sequences of DRAINs to answer once nothing is queued or running */
    unsigned n_drains;
} worker;

/* ---- answers to the supervisor ---- */

static void control_ok(uint32_t sequence)
{
    mlad_link_send(&worker.control, MLAP_OK, sequence, &(struct mlap_ok){0});
}

static void control_refuse(uint32_t sequence, const struct mlap_fault *fault)
{
    struct mlap_error error = {.code = fault->code};
    memcpy(error.field, fault->field, sizeof error.field);
    memcpy(error.message, fault->message, sizeof error.message);
    mlad_link_send(&worker.control, MLAP_ERROR, sequence, &error);
}

/* The worker cannot start: the supervisor hears why, and decides whether to try again. */
static void give_up(const struct mlap_fault *fault)
{
    mlad_log(LOG_ERR, "the device cannot be served", MLAD_KV("device", worker.options->device),
             MLAD_KV("field", fault->field), MLAD_KV("why", fault->message));
    control_refuse(0, fault);
    mlad_link_shutdown(&worker.control); /* or what it has not read yet would be lost */
    _exit(EXIT_CANNOT_START);
}

/* ---- draining ---- */

static void on_idle(struct mlad_scheduler *scheduler)
{
    (void)scheduler;
    for (unsigned i = 0; i < worker.n_drains; i++)
        control_ok(worker.drains[i]);
    worker.n_drains = 0;
}

static void set_draining(bool draining)
{
    if (draining != worker.scheduler.draining)
        mlad_log(LOG_NOTICE, draining ? "drain begins" : "drain ends", MLAD_KV("device", worker.options->device));
    worker.scheduler.draining = draining;
    if (draining)
        return;
    struct mlap_fault fault;
    mlap_fail(&fault, MLAP_code_STATE, "", "the drain was ended before the device was idle");
    for (unsigned i = 0; i < worker.n_drains; i++)
        control_refuse(worker.drains[i], &fault);
    worker.n_drains = 0;
}

/* ---- what the supervisor asks ---- */

static enum mlap_code on_configure(const struct mlap_configure *configure)
{
    worker.quota.limits = (struct mlad_limits){
        .max_sessions = configure->max_sessions,
        .max_bytes = configure->max_bytes,
        .max_buffers = configure->max_buffers,
        .max_plans = configure->max_plans,
        .max_in_flight = configure->max_in_flight,
        .max_bytes_per_session = configure->max_bytes_per_session,
        .max_in_flight_per_session = configure->max_in_flight_per_session,
    };
    worker.scheduler.queue_limit = configure->queue_limit;
    worker.configured = true;
    mlad_log_set_level((int)configure->log_level);
    set_draining(configure->draining);
    if (mlap_has(configure, configure, stopping) && configure->stopping)
        mlad_sessions_deafen(&worker.sessions);
    return MLAP_code_OK;
}

static enum mlap_code on_attach(struct mlad_message *message, struct mlap_fault *fault)
{
    if (message->n_fds != 1)
        return mlap_fail(fault, MLAP_code_FDS, "fd", "ATTACH came without its connection");
    if (!worker.device || !worker.configured)
        return mlap_fail(fault, MLAP_code_STATE, "", "ATTACH before READY and CONFIGURE");
    mlad_session_open(&worker.sessions, &message->body->attach_, message->fds[0]);
    message->fds[0] = -1;
    return MLAP_code_OK;
}

static void report_mps(struct mlap_device *device)
{
    const char *log = getenv("CUDA_MPS_LOG_DIRECTORY");
    if (!worker.sessions.place.mps[0])
        return;
    memcpy(device->mps, worker.sessions.place.mps, sizeof device->mps);
    mlap_set(device, device, mps);
    if (log && *log && strlen(log) < sizeof device->mps_log) {
        strcpy(device->mps_log, log);
        mlap_set(device, device, mps_log);
    }
}

static void on_query(uint32_t sequence)
{
    static struct mlap_report report;
    struct mlap_device *device = &report.device;
    memset(&report, 0, sizeof report);
    strncpy(device->name, worker.options->device, sizeof device->name - 1);
    device->state = MLAP_device_state_STARTING;
    device->pid = (uint32_t)getpid();
    device->responding = true;
    device->queue_limit = worker.scheduler.queue_limit;
    mlad_stats_report(&worker.stats, device);
    if (worker.device) {
        device->state = worker.scheduler.draining ? MLAP_device_state_DRAINING : MLAP_device_state_READY;
        strncpy(device->variant, worker.backend->variant(worker.device), sizeof device->variant - 1);
        device->threads = worker.backend->threads(worker.device);
        device->uptime_ms = (mlad_now_ns() - worker.ready_ns) / 1000000;
        device->queued = worker.scheduler.queued;
        device->running = worker.scheduler.running;
        mlad_sessions_report(&worker.sessions, device);
        report_mps(device);
    }
    if (device->state == MLAP_device_state_STARTING)
        strcpy(device->reason, "waiting for the device's lock, which another worker holds");
    else if (device->state == MLAP_device_state_DRAINING)
        strcpy(device->reason, "an operator drains it");
    mlad_link_send(&worker.control, MLAP_REPORT, sequence, &report);
}

static void on_sessions(uint32_t sequence, const struct mlap_sessions *sessions)
{
    static struct mlap_sessions_reply reply;
    mlad_sessions_list(&worker.sessions, mlap_has(sessions, sessions, after) ? sessions->after : 0, &reply);
    mlad_link_send(&worker.control, MLAP_SESSIONS_REPLY, sequence, &reply);
}

static enum mlap_code on_drain(uint32_t sequence, const struct mlap_drain *drain, struct mlap_fault *fault)
{
    bool resume = mlap_has(drain, drain, resume) && drain->resume;
    if (!resume && worker.n_drains == MAX_DRAINS)
        return mlap_fail(fault, MLAP_code_BUSY, "", "%d drains are being waited for already", MAX_DRAINS);
    set_draining(!resume);
    if (resume || worker.scheduler.queued + worker.scheduler.running + worker.scheduler.ordered == 0)
        control_ok(sequence);
    else
        worker.drains[worker.n_drains++] = sequence;
    return MLAP_code_OK;
}

static enum mlap_code on_evict(uint32_t sequence, const struct mlap_evict *evict, struct mlap_fault *fault)
{
    struct mlad_session *session = mlad_session_find(&worker.sessions, evict->session);
    if (!session)
        return mlap_fail(fault, MLAP_code_NOT_FOUND, "session", "no open session %llu on this device",
                         (unsigned long long)evict->session);
    struct mlap_fault why;
    mlap_fail(&why, MLAP_code_EVICTED, "", "an operator ended the session");
    mlad_session_refuse(session, 0, &why);
    mlad_session_end(session, "evicted by an operator");
    control_ok(sequence);
    return MLAP_code_OK;
}

static enum mlap_code dispatch(struct mlad_message *message, struct mlap_fault *fault)
{
    uint32_t sequence = message->header.sequence;
    switch (message->header.type) {
    case MLAP_CONFIGURE: return on_configure(&message->body->configure_);
    case MLAP_ATTACH: return on_attach(message, fault);
    case MLAP_QUERY: on_query(sequence); return MLAP_code_OK;
    case MLAP_SESSIONS: on_sessions(sequence, &message->body->sessions_); return MLAP_code_OK;
    case MLAP_DRAIN: return on_drain(sequence, &message->body->drain_, fault);
    case MLAP_EVICT: return on_evict(sequence, &message->body->evict_, fault);
    default:
        return mlap_fail(fault, MLAP_code_UNKNOWN_TYPE, "", "%s is not for a worker",
                         mlap_type_name(message->header.type));
    }
}

static void on_control(struct mlad_link *link, struct mlad_message *message)
{
    (void)link;
    struct mlap_fault *fault = &message->fault;
    if (fault->code == MLAP_code_OK && dispatch(message, fault) == MLAP_code_OK)
        return;
    mlad_log(LOG_ERR, "control message refused", MLAD_KV("type", message->header.type), MLAD_KV("field", fault->field),
             MLAD_KV("why", fault->message));
    if (message->header.sequence)
        control_refuse(message->header.sequence, fault);
}

/* Without a supervisor nobody watches us, and clients are on their way to our successor: leave at once, even in
 * mid-launch. */
static void on_control_ended(struct mlad_link *link, const char *why)
{
    (void)link;
    mlad_log(LOG_INFO, "worker ends", MLAD_KV("device", worker.options->device), MLAD_KV("why", why));
    mlad_sessions_hang_up(&worker.sessions);
    _exit(0);
}

/* ---- start ---- */

static void announce(void)
{
    static struct mlap_ready ready;
    size_t count;
    const struct mlak_capability *rows = worker.backend->capabilities(worker.device, &count);
    struct mlap_fault fault;
    if (count > MLAP_MAX_CAPABILITIES) {
        mlap_fail(&fault, MLAP_code_INTERNAL, "capabilities", "the device's table has %zu rows, READY carries %d",
                  count, MLAP_MAX_CAPABILITIES);
        give_up(&fault);
    }
    worker.sessions.capabilities = (struct mlad_capabilities){.rows = rows, .count = count};
    strncpy(ready.variant, worker.backend->variant(worker.device), sizeof ready.variant - 1);
    ready.threads = worker.backend->threads(worker.device);
    ready.n_capabilities = (uint32_t)count;
    for (size_t i = 0; i < count; i++) {
        struct mlap_capability *to = &ready.capabilities[i];
        strncpy(to->variant, rows[i].variant, sizeof to->variant - 1);
        to->q_dtype = (enum mlap_dtype)rows[i].q_dtype;
        to->kv_format = (enum mlap_kv_format)rows[i].kv_format;
        to->out_dtype = (enum mlap_dtype)rows[i].out_dtype;
        to->mask = (enum mlap_mask)rows[i].mask;
        to->max_heads = rows[i].max_heads;
        to->max_q_len = rows[i].max_q_len;
        to->max_page_size = rows[i].max_page_size;
        mlak_features_text(rows[i].features, to->features);
    }
    mlad_log(LOG_INFO, "worker ready", MLAD_KV("device", worker.options->device), MLAD_KV("variant", ready.variant),
             MLAD_KV("threads", ready.threads));
    mlad_link_send(&worker.control, MLAP_READY, 0, &ready);
}
_Static_assert(sizeof((struct mlap_capability *)0)->features >= 128, "mlak_features_text writes up to 128 bytes");

static enum mlap_code open_failure_code(enum mlak_code code)
{
    return code == MLAK_INVALID       ? MLAP_code_INVALID
           : code == MLAK_UNSUPPORTED ? MLAP_code_UNSUPPORTED
           : code == MLAK_MEMORY      ? MLAP_code_MEMORY
                                      : MLAP_code_INTERNAL;
}

/* The device is of no use to this process any more; the next one's clients submit again what was in flight. */
static void on_lost(struct mlad_scheduler *scheduler, const char *why)
{
    (void)scheduler;
    struct mlap_fault fault;
    mlap_fail(&fault, MLAP_code_DEVICE_LOST, "device", "%s", why);
    give_up(&fault);
}

static void do_nothing(uv_work_t *work)
{
    (void)work;
}

static void open_device(void)
{
    static uv_work_t first; /* libuv starts its thread now, and not when memory is short */
    uv_queue_work(&worker.loop, &first, do_nothing, NULL);
    struct mlap_fault fault;
    struct mlak_fault refusal = {0};
    worker.backend = mlak_backend(worker.options->device);
    if (!worker.backend) {
        mlap_fail(&fault, MLAP_code_NO_DEVICE, "device",
                  "no device is called %s; there are cpu, reference and GPUs by their UUID (GPU-...)",
                  worker.options->device);
        give_up(&fault);
    }
    worker.device = worker.backend->open(&(struct mlak_options){.threads = worker.options->threads,
                                                                .device = worker.options->device,
                                                                .variant = worker.options->variant,
                                                                .progress = &worker.stats.life->progress},
                                         &refusal);
    if (!worker.device) {
        mlap_fail(&fault, open_failure_code(refusal.code), refusal.field, "%s", refusal.message);
        give_up(&fault);
    }
    if (!mlad_scheduler_start(&worker.scheduler, &worker.loop, worker.backend, worker.device, &worker.stats, on_idle,
                              on_lost)) {
        mlap_fail(&fault, MLAP_code_MEMORY, "", "no memory or no thread for the scheduler");
        give_up(&fault);
    }
    if (worker.backend->mps) {
        struct mlap_place *place = &worker.sessions.place;
        strncpy(place->gpu, worker.options->device, sizeof place->gpu - 1);
        mlap_place_mps(place, worker.backend->mps(worker.device));
    }
    worker.ready_ns = mlad_now_ns();
    announce();
}

/* The loop goes on turning while another worker holds the lock: the beat grows, the control socket is heard. */
static void try_lock(uv_timer_t *timer)
{
    if (flock(worker.lock, LOCK_EX | LOCK_NB) == 0) {
        uv_timer_stop(timer);
        open_device();
    } else if (errno != EWOULDBLOCK) {
        struct mlap_fault fault;
        mlap_fail(&fault, MLAP_code_INTERNAL, "lock", "%s cannot be locked: %s", worker.options->lock, strerror(errno));
        give_up(&fault);
    }
}

/* A device that is lost while nothing runs would be noticed by the next client only; and under MPS no client may come
 * before we are gone. */
static void check_device(void)
{
    struct mlak_fault fault;
    if (worker.device && worker.backend->check && worker.scheduler.running == 0 &&
        worker.backend->check(worker.device, &fault) == MLAK_LOST)
        on_lost(&worker.scheduler, fault.message);
}

static void on_beat(uv_timer_t *timer)
{
    static unsigned beats;
    (void)timer;
    mlad_stats_beat(&worker.stats);
    if (++beats % BEATS_A_CHECK == 0)
        check_device();
}

/* For a moment, or once when none has had anything for long; then the sockets have their turn. What a pass has found
 * and what the sockets brought before runs together: every turn of the loop comes by here. */
static bool look_at_rings(void)
{
    bool heard = false;
    uint64_t until = mlad_now_ns() + LOOK_NS;
    do {
        if (mlad_rings_look(&worker.sessions))
            heard = true;
        else
            mlap_ring_pause();
        mlad_scheduler_run(&worker.scheduler);
    } while (mlad_rings_linger(&worker.sessions) && mlad_now_ns() < until);
    return heard;
}

int mlad_worker_run(const struct mlad_worker_options *options)
{
    worker.options = options;
    worker.stats.life = mmap(NULL, sizeof *worker.stats.life, PROT_READ | PROT_WRITE, MAP_SHARED, options->life, 0);
    if (worker.stats.life == MAP_FAILED) {
        mlad_log(LOG_ERR, "the life page cannot be mapped", MLAD_KV("why", strerror(errno)));
        return EXIT_CANNOT_START;
    }
    close(options->life);
    worker.lock = open(options->lock, O_RDWR | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (worker.lock < 0) {
        mlad_log(LOG_ERR, "the lock file cannot be opened", MLAD_KV("path", options->lock),
                 MLAD_KV("why", strerror(errno)));
        return EXIT_CANNOT_START;
    }
    worker.sessions = (struct mlad_sessions){.loop = &worker.loop,
                                             .device = options->device,
                                             .scheduler = &worker.scheduler,
                                             .quota = &worker.quota,
                                             .stats = &worker.stats};
    TAILQ_INIT(&worker.sessions.all);
    worker.control.received = on_control;
    worker.control.ended = on_control_ended;
    int error = uv_loop_init(&worker.loop);
    if (error == 0)
        error = mlad_link_open(&worker.control, &worker.loop, options->control);
    if (error != 0) {
        mlad_log(LOG_ERR, "the control socket cannot be watched", MLAD_KV("why", uv_strerror(error)));
        return EXIT_CANNOT_START;
    }
    uv_timer_init(&worker.loop, &worker.beat);
    uv_timer_start(&worker.beat, on_beat, 0, BEAT_MS);
    uv_timer_init(&worker.loop, &worker.lock_retry);
    uv_timer_start(&worker.lock_retry, try_lock, 0, LOCK_RETRY_MS);
    for (;;) {
        bool heard = look_at_rings();
        /* Waking an idle processor costs more than a small decode. */
        if (heard || mlad_scheduler_lingers(&worker.scheduler) || mlad_rings_linger(&worker.sessions)) {
            uv_run(&worker.loop, UV_RUN_NOWAIT);
            if (!heard)
                sched_yield();
        } else if (mlad_rings_ask(&worker.sessions)) {
            uv_run(&worker.loop, UV_RUN_ONCE);
        }
    }
}
