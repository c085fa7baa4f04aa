/* scheduler.c - see scheduler.h. A decode's way: submit -> kick -> prepare -> (inline | launcher) -> slice_ended ->
 * finish. */
#include "scheduler.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>


/* ---- decodes ---- */

static struct mlad_decode *take_decode(struct mlad_scheduler *scheduler)
{
    struct mlad_decode *decode = STAILQ_FIRST(&scheduler->spare);
    if (decode)
        STAILQ_REMOVE_HEAD(&scheduler->spare, next);
    else
        decode = malloc(sizeof *decode);
    return decode;
}

/* Forget a decode that no queue lists any more, and let go of its plan. */
static void release(struct mlad_scheduler *scheduler, struct mlad_decode *decode)
{
    mlad_plan_unref(decode->plan);
    free(decode->cu_q);
    free(decode->failures);
    STAILQ_INSERT_HEAD(&scheduler->spare, decode, next);
}

static void uncount(struct mlad_scheduler *scheduler, struct mlad_decode *decode)
{
    if (decode->launched)
        mlad_stats_running(scheduler->stats, --scheduler->running);
    else
        scheduler->queued--;
    decode->queue->in_flight--;
    mlad_user_give_decode(decode->queue->user);
}

/* The decode has ended, `fault` NULL: its requests have run, some of them perhaps into failures. */
static void finish(struct mlad_scheduler *scheduler, struct mlad_decode *decode, const struct mlap_fault *fault)
{
    struct mlad_queue *queue = decode->queue;
    struct mlad_stats *stats = scheduler->stats;
    decode->completed = scheduler->ended = mlad_now_ns();
    STAILQ_REMOVE_HEAD(&queue->decodes, next);
    uncount(scheduler, decode);
    if (decode->cancelled) {
        queue->ended(queue, NULL, NULL);
        release(scheduler, decode);
        return;
    }
    if (fault || decode->failed)
        stats->decodes_failed++;
    if (!fault) {
        uint64_t bytes = decode->kv_tokens * mlak_kv_row_bytes(decode->plan->batch.kv_format);
        mlad_stats_decoded(stats, decode->kv_tokens, bytes);
        mlad_histogram_add(&stats->phases[MLAP_phase_RECEIVE], decode->queued - decode->received);
        mlad_histogram_add(&stats->phases[MLAP_phase_QUEUE], decode->launched - decode->queued);
        mlad_histogram_add(&stats->phases[MLAP_phase_KERNEL], decode->completed - decode->launched);
    }
    queue->ended(queue, decode, fault);
    if (!fault)
        mlad_histogram_add(&stats->phases[MLAP_phase_REPLY], mlad_now_ns() - decode->completed);
    release(scheduler, decode);
}

static void tell_idle(struct mlad_scheduler *scheduler)
{
    if (scheduler->queued + scheduler->running + scheduler->ordered == 0)
        scheduler->idle(scheduler);
}

void mlad_scheduler_ordered(struct mlad_scheduler *scheduler, int more)
{
    scheduler->ordered += (uint32_t)more;
    tell_idle(scheduler);
}

/* ---- slices ---- */

/* The lengths that later slices need, in memory of the decode's own: the scheduler's copy serves the next decode. */
static bool keep_cu_q(struct mlad_scheduler *scheduler, struct mlad_decode *decode)
{
    size_t bytes = (decode->plan->batch.batch + (size_t)1) * sizeof *decode->cu_q;
    decode->cu_q = malloc(bytes);
    if (decode->cu_q)
        memcpy(decode->cu_q, scheduler->cu_q, bytes);
    return decode->cu_q;
}

/* The decode's next slice goes to a device that prepares it itself. */
static void launch_batch(struct mlad_scheduler *scheduler, struct mlad_decode *decode)
{
    uint32_t left = decode->plan->batch.batch - decode->done;
    scheduler->slice = left < MLAD_SLICE_REQUESTS ? left : MLAD_SLICE_REQUESTS;
    scheduler->launching = decode;
    memset(scheduler->rows, 0, scheduler->slice * sizeof *scheduler->rows);
    mlad_launcher_run_batch(&scheduler->launcher, &decode->plan->batch, decode->done, scheduler->rows,
                            scheduler->slice);
}

/* Fill the rows with the decode's next slice and say in *estimate how long it should take. */
static enum mlap_code prepare(struct mlad_scheduler *scheduler, struct mlad_decode *decode, uint64_t *estimate,
                              struct mlap_fault *fault)
{
    const struct mlak_batch *batch = &decode->plan->batch;
    uint32_t left = batch->batch - decode->done;
    uint32_t count = left < decode->width ? left : decode->width;
    struct mlak_fault refusal;
    if (mlak_prepare(batch, decode->cu_q ? decode->cu_q : scheduler->cu_q, decode->done, count, scheduler->rows,
                     &refusal) != MLAK_OK)
        return mlap_fail(fault, MLAP_code_BATCH, refusal.field, "%s", refusal.message);
    *estimate = scheduler->backend->estimate_ns(scheduler->device, scheduler->rows, count);
    while (*estimate > MLAD_SLICE_NS && count > 1) {
        count /= 2;
        *estimate = scheduler->backend->estimate_ns(scheduler->device, scheduler->rows, count);
    }
    if (count < left && batch->has_cu_q && !decode->cu_q && !keep_cu_q(scheduler, decode))
        return mlap_fail(fault, MLAP_code_MEMORY, "", "no memory to run the batch in slices; try again");
    decode->width = count < MLAD_SLICE_REQUESTS / 2 ? count * 2 : MLAD_SLICE_REQUESTS;
    scheduler->launching = decode;
    scheduler->slice = count;
    return MLAP_code_OK;
}

static bool note_failure(struct mlad_decode *decode, const struct mlak_row *row)
{
    decode->failed++;
    if (decode->n_failures == MLAP_MAX_FAILURES_LISTED)
        return true;
    if (!decode->failures)
        decode->failures = malloc(MLAP_MAX_FAILURES_LISTED * sizeof *decode->failures);
    if (!decode->failures)
        return false;
    struct mlak_fault refusal;
    mlak_row_fault(row, &refusal);
    struct mlap_failure *failure = &decode->failures[decode->n_failures++];
    failure->present = 0;
    failure->request = row->request;
    memcpy(failure->field, refusal.field, sizeof failure->field);
    memcpy(failure->message, refusal.message, sizeof failure->message);
    return true;
}
_Static_assert(sizeof((struct mlap_failure *)0)->field == sizeof((struct mlak_fault *)0)->field, "copied whole");
_Static_assert(sizeof((struct mlap_failure *)0)->message == sizeof((struct mlak_fault *)0)->message, "copied whole");

/* Put the queue at the end of the line if it has anything left to run. */
static void line_up(struct mlad_scheduler *scheduler, struct mlad_queue *queue)
{
    if (!STAILQ_EMPTY(&queue->decodes))
        TAILQ_INSERT_TAIL(&scheduler->turns, queue, turn);
}

/* The slice in `rows` has run: count what came of it; the decode ends, or waits for its next turn. */
static void slice_ended(struct mlad_scheduler *scheduler, enum mlak_code code, const struct mlak_fault *refusal)
{
    if (code == MLAK_LOST)
        scheduler->lost(scheduler, scheduler->backend->lost(scheduler->device));
    struct mlad_decode *decode = scheduler->launching;
    struct mlad_queue *queue = decode->queue;
    scheduler->launching = NULL;
    bool noted = true;
    for (uint32_t i = 0; i < scheduler->slice && code == MLAK_OK && !decode->cancelled; i++) {
        const struct mlak_row *row = &scheduler->rows[i];
        if (__atomic_load_n(&row->code, __ATOMIC_RELAXED) == MLAK_ROW_OK)
            decode->kv_tokens += (uint64_t)row->local_len;
        else
            noted &= note_failure(decode, row);
    }
    decode->done += scheduler->slice;
    if (code == MLAK_BATCH && !decode->cancelled) {
        struct mlap_fault fault;
        mlap_fail(&fault, MLAP_code_BATCH, refusal->field, "%s", refusal->message);
        finish(scheduler, decode, &fault);
    } else if ((code != MLAK_OK && !decode->cancelled) || !noted) {
        struct mlap_fault fault;
        mlap_fail(&fault, MLAP_code_MEMORY, "",
                  "the device had no memory for the batch; try again, or with a smaller one");
        finish(scheduler, decode, &fault);
    } else if (decode->cancelled || decode->done == decode->plan->batch.batch) {
        finish(scheduler, decode, NULL);
    }
    line_up(scheduler, queue);
}

static void start(struct mlad_scheduler *scheduler, struct mlad_decode *decode)
{
    decode->launched = mlad_now_ns();
    scheduler->queued--;
    mlad_stats_running(scheduler->stats, ++scheduler->running);
}

/* Run what can be run: small slices here while they fit in MLAD_INLINE_NS together, else one on the launch thread. */
static void kick(struct mlad_scheduler *scheduler)
{
    uint64_t begun = mlad_now_ns();
    struct mlad_queue *queue;
    while (!scheduler->launching && (queue = TAILQ_FIRST(&scheduler->turns))) {
        TAILQ_REMOVE(&scheduler->turns, queue, turn);
        struct mlad_decode *decode = STAILQ_FIRST(&queue->decodes);
        if (!decode->launched)
            start(scheduler, decode);
        struct mlap_fault fault;
        uint64_t estimate = 0;
        if (scheduler->backend->launch_batch) {
            launch_batch(scheduler, decode);
        } else if (prepare(scheduler, decode, &estimate, &fault) != MLAP_code_OK) {
            finish(scheduler, decode, &fault);
            line_up(scheduler, queue);
        } else if (estimate < MLAD_INLINE_NS && mlad_now_ns() - begun + estimate < MLAD_INLINE_NS) {
            slice_ended(scheduler, scheduler->backend->launch(scheduler->device, scheduler->rows, scheduler->slice),
                        NULL);
        } else {
            mlad_launcher_run(&scheduler->launcher, scheduler->rows, scheduler->slice);
        }
    }
    tell_idle(scheduler);
}

static void on_launched(struct mlad_launcher *launcher, enum mlak_code code, const struct mlak_fault *fault)
{
    struct mlad_scheduler *scheduler =
        (struct mlad_scheduler *)((char *)launcher - offsetof(struct mlad_scheduler, launcher));
    slice_ended(scheduler, code, fault);
    kick(scheduler);
}

/* ---- the door ---- */

bool mlad_scheduler_start(struct mlad_scheduler *scheduler, uv_loop_t *loop, const struct mlak_backend *backend,
                          struct mlak_device *device, struct mlad_stats *stats,
                          void (*idle)(struct mlad_scheduler *scheduler),
                          void (*lost)(struct mlad_scheduler *scheduler, const char *why))
{
    scheduler->backend = backend;
    scheduler->device = device;
    scheduler->stats = stats;
    scheduler->idle = idle;
    scheduler->lost = lost;
    TAILQ_INIT(&scheduler->turns);
    STAILQ_INIT(&scheduler->spare);
    scheduler->rows = calloc(MLAD_SLICE_REQUESTS, sizeof *scheduler->rows);
    scheduler->cu_q = calloc(MLAK_MAX_BATCH + 1, sizeof *scheduler->cu_q);
    return scheduler->rows && scheduler->cu_q &&
           mlad_launcher_start(&scheduler->launcher, loop, backend, device, on_launched);
}

void mlad_queue_init(struct mlad_queue *queue, struct mlad_user *user,
                     void (*ended)(struct mlad_queue *, const struct mlad_decode *, const struct mlap_fault *))
{
    *queue = (struct mlad_queue){.user = user, .ended = ended};
    STAILQ_INIT(&queue->decodes);
}

enum mlap_code mlad_scheduler_submit(struct mlad_scheduler *scheduler, struct mlad_queue *queue, struct mlad_plan *plan,
                                     uint32_t sequence, uint64_t received, struct mlap_fault *fault)
{
    if (scheduler->draining)
        return mlap_fail(fault, MLAP_code_DRAINING, "",
                         "the device is being drained; work is taken again once an operator resumes it");
    if (scheduler->launching && scheduler->queued >= scheduler->queue_limit)
        return mlap_fail(fault, MLAP_code_BUSY, "",
                         "%" PRIu32 " decodes wait on this device and %" PRIu32
                         " may: try again after a completion, or raise queue_limit",
                         scheduler->queued, scheduler->queue_limit);
    enum mlap_code code = mlad_user_take_decode(queue->user, fault);
    if (code != MLAP_code_OK)
        return code;
    struct mlad_decode *decode = take_decode(scheduler);
    if (!decode) {
        mlad_user_give_decode(queue->user);
        return mlap_fail(fault, MLAP_code_MEMORY, "",
                         "no memory to queue another decode; try again after a completion");
    }
    *decode = (struct mlad_decode){
        .queue = queue,
        .plan = plan,
        .sequence = sequence,
        .width = MLAD_SLICE_REQUESTS,
        .received = received,
        .queued = mlad_now_ns(),
    };
    mlad_plan_ref(plan);
    bool lined_up = !STAILQ_EMPTY(&queue->decodes); /* or its first decode is being launched */
    STAILQ_INSERT_TAIL(&queue->decodes, decode, next);
    queue->in_flight++;
    scheduler->queued++;
    if (!lined_up)
        line_up(scheduler, queue);
    kick(scheduler);
    return MLAP_code_OK;
}

bool mlad_scheduler_lingers(const struct mlad_scheduler *scheduler)
{
    return !scheduler->launching && mlad_now_ns() - scheduler->ended < MLAD_LINGER_NS;
}

/* Nobody waits for the slice that is running: let the backend abandon it. */
static void cancel_slice(struct mlad_scheduler *scheduler)
{
    scheduler->launching->cancelled = true;
    for (uint32_t i = 0; i < scheduler->slice; i++)
        __atomic_store_n(&scheduler->rows[i].code, MLAK_ROW_CANCELLED, __ATOMIC_RELAXED);
}

void mlad_scheduler_cancel(struct mlad_scheduler *scheduler, struct mlad_queue *queue)
{
    struct mlad_decode *decode = STAILQ_FIRST(&queue->decodes);
    if (!decode)
        return;
    if (decode == scheduler->launching)
        cancel_slice(scheduler); /* it stays first until its slice has ended */
    else
        TAILQ_REMOVE(&scheduler->turns, queue, turn);
    struct mlad_decode *keep = decode->cancelled ? decode : NULL;
    if (keep)
        decode = STAILQ_NEXT(keep, next);
    STAILQ_INIT(&queue->decodes);
    if (keep)
        STAILQ_INSERT_HEAD(&queue->decodes, keep, next);
    while (decode) {
        struct mlad_decode *next = STAILQ_NEXT(decode, next);
        uncount(scheduler, decode);
        release(scheduler, decode);
        decode = next;
    }
    tell_idle(scheduler);
}
