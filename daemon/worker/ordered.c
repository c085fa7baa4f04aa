/* ordered.c - see ordered.h. A round's way: arm -> waiting -> launch -> launched -> poll -> answer. */
#include "ordered.h"

#include "mlap_mailbox.h"
#include "session.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

_Static_assert((int)MLAP_MAIL_OK == (int)MLAK_MAIL_OK && (int)MLAP_MAIL_REQUESTS == (int)MLAK_MAIL_REQUESTS &&
                   (int)MLAP_MAIL_BATCH == (int)MLAK_MAIL_BATCH,
               "the mailbox's and the backends'");

struct mlad_step {
    uint32_t id, refs; /* by its id, and by each of its rounds */
    uint32_t count;
    struct mlad_plan **plans; /* [count] */
    struct mlad_buffer *slots;
    struct mlak_order *order;
};

static uint32_t lanes_in_use;

static const struct mlak_backend *backend_of(const struct mlad_session *session)
{
    return session->sessions->scheduler->backend;
}
static struct mlak_device *device_of(const struct mlad_session *session)
{
    return session->sessions->scheduler->device;
}

static void lose(struct mlad_session *session)
{
    struct mlad_scheduler *scheduler = session->sessions->scheduler;
    scheduler->lost(scheduler, scheduler->backend->lost(scheduler->device));
}

/* ---- steps ---- */

static void unref(struct mlad_session *session, struct mlad_step *step)
{
    if (--step->refs > 0)
        return;
    if (step->order)
        backend_of(session)->order_free(device_of(session), step->order);
    for (uint32_t i = 0; i < step->count && step->plans; i++)
        if (step->plans[i])
            mlad_plan_unref(step->plans[i]);
    if (step->slots)
        mlad_buffer_unref(step->slots);
    free(step->plans);
    free(step);
}

static enum mlap_code need_lane(struct mlad_session *session, struct mlap_fault *fault)
{
    struct mlad_ordered *ordered = &session->ordered;
    struct mlak_fault refusal = {0};
    if (ordered->lane)
        return MLAP_code_OK;
    if (lanes_in_use == MLAD_LANES)
        return mlap_fail(fault, MLAP_code_BUSY, "step",
                         "%d clients use stream order on this device already, which is as many as it waits for; submit "
                         "in host order, or try again when one of them has left", MLAD_LANES);
    ordered->lane = backend_of(session)->lane_new(device_of(session), &refusal);
    if (!ordered->lane)
        return refusal.code == MLAK_LOST
                   ? mlap_fail(fault, MLAP_code_DEVICE_LOST, "step", "%s", refusal.message)
                   : mlap_fail(fault, MLAP_code_BUSY, "step",
                               "the device has no room for another client's stream order; submit in host order, or try "
                               "again: %s", refusal.message);
    lanes_in_use++;
    session->order = MLAP_order_STREAM;
    return MLAP_code_OK;
}

/* The buffer of the flags, checked. */
static enum mlap_code find_slots(struct mlad_session *session, const struct mlap_step *request, struct mlad_step *step,
                                 struct mlap_fault *fault)
{
    const uint64_t bytes = request->n_layers * sizeof(struct mlap_mail_slot), offset = request->slots.offset;
    struct mlad_buffer *buffer = mlad_idmap_get(&session->buffers, request->slots.buffer);
    if (!buffer)
        return mlap_fail(fault, MLAP_code_NOT_FOUND, "slots.buffer",
                         "no buffer %" PRIu32 " is registered in this session", request->slots.buffer);
    if (buffer->data || !buffer->writable)
        return mlap_fail(fault, MLAP_code_INVALID, "slots.buffer",
                         "flags must lie in GPU memory that is registered with access readwrite");
    if (((uintptr_t)buffer->pointer + offset) % sizeof(struct mlap_mail_slot) != 0)
        return mlap_fail(fault, MLAP_code_INVALID, "slots.offset", "%" PRIu64 " is no multiple of %zu bytes", offset,
                         sizeof(struct mlap_mail_slot));
    if (offset > buffer->bytes || bytes > buffer->bytes - offset)
        return mlap_fail(fault, MLAP_code_RANGE, "slots",
                         "%" PRIu32 " layers need %" PRIu64 " bytes from offset %" PRIu64 " of buffer %" PRIu32
                         ", which is shorter", request->n_layers, bytes, offset, buffer->id);
    mlad_buffer_ref(buffer);
    step->slots = buffer;
    return MLAP_code_OK;
}

static enum mlap_code find_plans(struct mlad_session *session, const struct mlap_step *request, struct mlad_step *step,
                                 struct mlap_fault *fault)
{
    step->plans = calloc(request->n_layers, sizeof *step->plans);
    if (!step->plans)
        return mlap_fail(fault, MLAP_code_MEMORY, "", "no memory for another step; try again");
    step->count = request->n_layers;
    for (uint32_t i = 0; i < step->count; i++) {
        struct mlad_plan *plan = mlad_idmap_get(&session->plans, request->layers[i].plan);
        if (!plan)
            return mlap_fail(fault, MLAP_code_NOT_FOUND, "layers",
                             "layer %" PRIu32 ": this session has no plan %" PRIu32, i, request->layers[i].plan);
        mlad_plan_ref(plan);
        step->plans[i] = plan;
    }
    return MLAP_code_OK;
}

static enum mlap_code make_order(struct mlad_session *session, const struct mlap_step *request, struct mlad_step *step,
                                 struct mlap_fault *fault)
{
    static const struct mlak_batch *batches[MLAP_MAX_LAYERS]; /* large, and only the loop thread's */
    static struct mlak_flags flags[MLAP_MAX_LAYERS];
    struct mlap_mail_slot *slots = (void *)(step->slots->pointer + request->slots.offset);
    for (uint32_t i = 0; i < step->count; i++) {
        batches[i] = &step->plans[i]->batch;
        flags[i] = (struct mlak_flags){&slots[i].go, (uint64_t *)(void *)&slots[i].done};
    }
    struct mlak_fault refusal = {0};
    step->order = backend_of(session)->order_new(device_of(session), session->ordered.lane, batches, flags, step->count,
                                                 MLAD_ORDER_WAIT_MS, &refusal);
    if (step->order)
        return MLAP_code_OK;
    return mlap_fail(fault, refusal.code == MLAK_LOST ? MLAP_code_DEVICE_LOST
                            : refusal.code == MLAK_UNSUPPORTED ? MLAP_code_UNSUPPORTED : MLAP_code_MEMORY,
                     refusal.field, "%s", refusal.message);
}

enum mlap_code mlad_ordered_step(struct mlad_session *session, const struct mlap_step *request,
                                 struct mlap_fault *fault)
{
    struct mlad_ordered *ordered = &session->ordered;
    if (!backend_of(session)->lane_new)
        return mlap_fail(fault, MLAP_code_UNSUPPORTED, "step", "%s has no stream order: submit the plans in host order",
                         session->sessions->device);
    if (mlad_idmap_get(&ordered->steps, request->step))
        return mlap_fail(fault, MLAP_code_EXISTS, "step", "step %" PRIu32 " exists; drop it or choose another id",
                         request->step);
    if (request->n_layers == 0)
        return mlap_fail(fault, MLAP_code_INVALID, "layers", "a step has one layer at least");
    enum mlap_code code = mlad_user_take_plan(session->holder.user, fault);
    if (code != MLAP_code_OK)
        return code;
    struct mlad_step *step = calloc(1, sizeof *step);
    if (!step) {
        mlad_user_give_plan(session->holder.user);
        return mlap_fail(fault, MLAP_code_MEMORY, "", "no memory for another step; try again");
    }
    *step = (struct mlad_step){.id = request->step, .refs = 1};
    code = find_slots(session, request, step, fault);
    if (code == MLAP_code_OK)
        code = find_plans(session, request, step, fault);
    if (code == MLAP_code_OK)
        code = need_lane(session, fault);
    if (code == MLAP_code_OK)
        code = make_order(session, request, step, fault);
    if (code == MLAP_code_OK && !mlad_idmap_put(&ordered->steps, step->id, step))
        code = mlap_fail(fault, MLAP_code_MEMORY, "", "no memory to note another step; drop others first");
    if (code == MLAP_code_OK)
        return code;
    unref(session, step);
    mlad_user_give_plan(session->holder.user);
    return code;
}

enum mlap_code mlad_ordered_drop(struct mlad_session *session, uint32_t id, struct mlap_fault *fault)
{
    struct mlad_step *step = mlad_idmap_take(&session->ordered.steps, id);
    if (!step)
        return mlap_fail(fault, MLAP_code_NOT_FOUND, "step", "this session has no step %" PRIu32, id);
    mlad_user_give_plan(session->holder.user);
    unref(session, step);
    return MLAP_code_OK;
}

bool mlad_ordered_names(const struct mlad_session *session, const struct mlad_buffer *buffer)
{
    uint32_t position = 0;
    const struct mlad_step *step;
    while ((step = mlad_idmap_next(&session->ordered.steps, &position)))
        if (step->slots == buffer)
            return true;
    return false;
}

/* ---- rounds ---- */

/* It is over, told to the client or not. */
static void forget(struct mlad_session *session, struct mlad_round *round)
{
    unref(session, round->step);
    free(round);
    session->queue.in_flight--;
    mlad_user_give_decode(session->holder.user);
    mlad_scheduler_ordered(session->sessions->scheduler, -1);
}

/* What the device has done, whether or not its client is still there. */
static void count(struct mlad_session *session, const struct mlad_round *round,
                  const struct mlak_order_outcome *outcome)
{
    struct mlad_stats *stats = session->sessions->stats;
    for (uint32_t i = 0; i < outcome->n_times; i++) { /* of a round that stopped, what ran is not run again */
        mlad_histogram_add(&stats->phases[MLAP_phase_GATE], outcome->times[i].gate_ns);
        mlad_histogram_add(&stats->phases[MLAP_phase_SERVE], outcome->times[i].serve_ns);
    }
    if (outcome->stopped)
        return;
    if (outcome->code != MLAK_OK)
        stats->decodes_failed++;
    mlad_stats_decoded(stats, outcome->kv_tokens,
                       outcome->kv_tokens * mlak_kv_row_bytes(round->step->plans[0]->batch.kv_format));
    session->decodes++;
    session->kv_tokens += outcome->kv_tokens;
}

static void answer(struct mlad_session *session, const struct mlad_round *round,
                   const struct mlak_order_outcome *outcome)
{
    const uint64_t now = mlad_now_ns();
    struct mlap_fault fault;
    if (outcome->stopped) {
        mlap_fail(&fault, MLAP_code_TIMEOUT, "",
                  "the client's stream did not come to this round, or to one before it, within %d ms; arm it again",
                  MLAD_ORDER_WAIT_MS);
        mlad_session_refuse(session, round->sequence, &fault);
        return;
    }
    if (outcome->code == MLAK_BATCH) {
        mlap_fail(&fault, MLAP_code_BATCH, outcome->fault.field, "%s", outcome->fault.message);
        mlad_session_refuse(session, round->sequence, &fault);
        return;
    }
    const struct mlap_completion completion = {
        .sequence = round->sequence,
        .receive_ns = round->queued - round->received,
        .queue_ns = round->launched - round->queued,
        .kernel_ns = now - round->launched,
        .kv_tokens = outcome->kv_tokens,
        .failed = outcome->failed,
    };
    struct mlap_failure failure = {.request = 0};
    memcpy(failure.field, outcome->fault.field, sizeof failure.field);
    memcpy(failure.message, outcome->fault.message, sizeof failure.message);
    mlad_session_complete(session, &completion, &failure, outcome->failed != 0);
}
_Static_assert(sizeof((struct mlap_failure *)0)->field == sizeof((struct mlak_fault *)0)->field &&
                   sizeof((struct mlap_failure *)0)->message == sizeof((struct mlak_fault *)0)->message,
               "copied whole");

/* Take what the device has done. */
static void collect(struct mlad_session *session)
{
    struct mlad_ordered *ordered = &session->ordered;
    struct mlad_round *round;
    while ((round = STAILQ_FIRST(&ordered->launched))) {
        struct mlak_order_outcome outcome;
        struct mlak_fault refusal;
        bool ended;
        if (backend_of(session)->order_poll(device_of(session), round->step->order, &ended, &outcome, &refusal) ==
            MLAK_LOST)
            lose(session);
        if (!ended)
            return;
        STAILQ_REMOVE_HEAD(&ordered->launched, next);
        ordered->stopped |= outcome.stopped;
        count(session, round, &outcome);
        if (!ordered->abandoned)
            answer(session, round, &outcome);
        forget(session, round);
    }
    if (ordered->stopped && !ordered->abandoned) {
        struct mlak_fault refusal;
        if (backend_of(session)->lane_restart(device_of(session), ordered->lane, &refusal) == MLAK_LOST)
            lose(session);
        ordered->stopped = false;
    }
}

/* Give the device what it has room for. */
static void launch(struct mlad_session *session)
{
    struct mlad_ordered *ordered = &session->ordered;
    struct mlad_round *round;
    while (!ordered->stopped && !ordered->abandoned && (round = STAILQ_FIRST(&ordered->waiting)) &&
           backend_of(session)->order_room(device_of(session), round->step->order)) {
        struct mlak_fault refusal;
        enum mlak_code code = backend_of(session)->order_launch(device_of(session), round->step->order, round->number,
                                                                &refusal);
        if (code == MLAK_LOST)
            lose(session);
        STAILQ_REMOVE_HEAD(&ordered->waiting, next);
        if (code == MLAK_OK) {
            round->launched = mlad_now_ns();
            STAILQ_INSERT_TAIL(&ordered->launched, round, next);
            continue;
        }
        struct mlap_fault fault;
        mlap_fail(&fault, MLAP_code_MEMORY, "", "%s", refusal.message);
        mlad_session_refuse(session, round->sequence, &fault);
        forget(session, round);
    }
}

static void free_lane(struct mlad_session *session)
{
    struct mlad_ordered *ordered = &session->ordered;
    if (!ordered->lane)
        return;
    backend_of(session)->lane_free(device_of(session), ordered->lane);
    ordered->lane = NULL;
    lanes_in_use--;
}

static void on_timer_closed(uv_handle_t *handle)
{
    struct mlad_session *session = handle->data;
    session->ordered.timing = false;
    mlad_session_settle(session);
}

/* After the session's end, once nothing of it is on the device. */
static void finish(struct mlad_session *session)
{
    struct mlad_ordered *ordered = &session->ordered;
    if (!STAILQ_EMPTY(&ordered->launched))
        return;
    free_lane(session);
    if (ordered->timing && !uv_is_closing((uv_handle_t *)&ordered->timer))
        uv_close((uv_handle_t *)&ordered->timer, on_timer_closed);
}

static void turn(struct mlad_session *session)
{
    struct mlad_ordered *ordered = &session->ordered;
    collect(session);
    launch(session);
    if (ordered->abandoned)
        finish(session);
    else if (STAILQ_EMPTY(&ordered->launched) && STAILQ_EMPTY(&ordered->waiting))
        uv_timer_stop(&ordered->timer);
}

static void on_timer(uv_timer_t *timer)
{
    turn(timer->data);
}

/* ---- the door ---- */

void mlad_ordered_init(struct mlad_session *session)
{
    struct mlad_ordered *ordered = &session->ordered;
    STAILQ_INIT(&ordered->launched);
    STAILQ_INIT(&ordered->waiting);
    ordered->timer.data = session;
}

enum mlap_code mlad_ordered_arm(struct mlad_session *session, const struct mlap_arm *request, uint32_t sequence,
                                uint64_t received, struct mlap_fault *fault)
{
    struct mlad_ordered *ordered = &session->ordered;
    struct mlad_step *step = mlad_idmap_get(&ordered->steps, request->step);
    if (!step)
        return mlap_fail(fault, MLAP_code_NOT_FOUND, "step", "this session has no step %" PRIu32, request->step);
    if (session->sessions->scheduler->draining)
        return mlap_fail(fault, MLAP_code_DRAINING, "",
                         "the device is being drained; work is taken again once an operator resumes it");
    enum mlap_code code = mlad_user_take_decode(session->holder.user, session->queue.in_flight, fault);
    if (code != MLAP_code_OK)
        return code;
    struct mlad_round *round = calloc(1, sizeof *round);
    if (!round) {
        mlad_user_give_decode(session->holder.user);
        return mlap_fail(fault, MLAP_code_MEMORY, "", "no memory to queue another round; try again after a completion");
    }
    *round = (struct mlad_round){.step = step, .sequence = sequence, .number = request->round, .received = received,
                                 .queued = mlad_now_ns()};
    step->refs++;
    session->queue.in_flight++;
    STAILQ_INSERT_TAIL(&ordered->waiting, round, next);
    mlad_scheduler_ordered(session->sessions->scheduler, 1);
    if (!ordered->timing) {
        uv_timer_init(session->sessions->loop, &ordered->timer);
        ordered->timing = true;
    }
    if (!uv_is_active((uv_handle_t *)&ordered->timer))
        uv_timer_start(&ordered->timer, on_timer, MLAD_ORDER_POLL_MS, MLAD_ORDER_POLL_MS);
    turn(session);
    return MLAP_code_OK;
}

void mlad_ordered_end(struct mlad_session *session)
{
    struct mlad_ordered *ordered = &session->ordered;
    struct mlad_round *round;
    ordered->abandoned = true;
    if (ordered->lane)
        backend_of(session)->lane_abandon(device_of(session), ordered->lane);
    while ((round = STAILQ_FIRST(&ordered->waiting))) {
        STAILQ_REMOVE_HEAD(&ordered->waiting, next);
        forget(session, round);
    }
    uint32_t position = 0;
    struct mlad_step *step;
    while ((step = mlad_idmap_next(&ordered->steps, &position))) {
        mlad_user_give_plan(session->holder.user);
        unref(session, step);
    }
    mlad_idmap_deinit(&ordered->steps);
    finish(session);
}

bool mlad_ordered_idle(const struct mlad_session *session)
{
    return !session->ordered.timing && !session->ordered.lane;
}
