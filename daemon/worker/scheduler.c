/* scheduler.c - see scheduler.h. A decode's way: submit -> run -> put_together -> take -> (inline | launcher) ->
 * launch_ended -> slice_ended -> finish. */
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

/* The queue's turn at what follows its next decode; none, if nothing does. */
static void pass_on(struct mlad_scheduler *scheduler, struct mlad_queue *queue)
{
    queue->next = STAILQ_NEXT(queue->next, next);
    if (!queue->next)
        TAILQ_REMOVE(&scheduler->turns[queue->priority], queue, turn);
}

/* A decode has ended, `fault` NULL: its requests have run, some of them perhaps into failures. */
static void finish(struct mlad_scheduler *scheduler, struct mlad_decode *decode, const struct mlap_fault *fault)
{
    struct mlad_queue *queue = decode->queue;
    struct mlad_stats *stats = scheduler->stats;
    decode->completed = scheduler->ended = mlad_now_ns();
    if (queue->next == decode)
        pass_on(scheduler, queue);
    STAILQ_REMOVE(&queue->decodes, decode, mlad_decode, next);
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

/* ---- what the next launch takes ---- */

/* The lengths that later slices need, in memory of the decode's own: the scheduler's copy serves the next decode. */
static bool keep_cu_q(struct mlad_scheduler *scheduler, struct mlad_decode *decode)
{
    size_t bytes = (decode->plan->batch.batch + (size_t)1) * sizeof *decode->cu_q;
    decode->cu_q = malloc(bytes);
    if (decode->cu_q)
        memcpy(decode->cu_q, scheduler->cu_q, bytes);
    return decode->cu_q;
}

/* Fill the part's rows with `count` requests of the decode, or less, so that they take no longer than a slice may. Says
 * how long they should take. If they cannot be prepared, the part has none, and its code and fault say why. */
static uint64_t prepare(struct mlad_scheduler *scheduler, struct mlad_decode *decode, uint32_t count,
                        struct mlak_part *part)
{
    const struct mlak_batch *batch = part->batch;
    uint32_t left = batch->batch - decode->done;
    count = count < decode->width ? count : decode->width;
    part->code = mlak_prepare(batch, decode->cu_q ? decode->cu_q : scheduler->cu_q, decode->done, count, part->rows,
                              &part->fault);
    if (part->code != MLAK_OK)
        return 0;
    uint64_t estimate = scheduler->backend->estimate_ns(scheduler->device, part->rows, count);
    while (estimate > MLAD_SLICE_NS && count > 1) {
        count /= 2;
        estimate = scheduler->backend->estimate_ns(scheduler->device, part->rows, count);
    }
    if (count < left && batch->has_cu_q && !decode->cu_q && !keep_cu_q(scheduler, decode)) {
        part->code = mlak_fail(&part->fault, MLAK_MEMORY, "", "no memory to run the batch in slices; try again");
        return 0;
    }
    decode->width = count < MLAD_SLICE_REQUESTS / 2 ? count * 2 : MLAD_SLICE_REQUESTS;
    part->count = count;
    return estimate;
}

static uint64_t tokens_of(const struct mlak_row *rows, uint32_t count)
{
    uint64_t tokens = 0;
    for (uint32_t i = 0; i < count; i++)
        if (__atomic_load_n(&rows[i].code, __ATOMIC_RELAXED) == MLAK_ROW_OK)
            tokens += (uint64_t)rows[i].local_len;
    return tokens;
}

static void give(struct mlad_queue *queue, int64_t tokens)
{
    queue->balance += tokens;
    if (queue->balance > MLAD_QUANTUM)
        queue->balance = MLAD_QUANTUM;
}

static bool has_room(const struct mlad_launch *launch)
{
    return launch->n_slices < MLAD_PARTS && launch->n_rows < MLAD_SLICE_REQUESTS &&
           launch->tokens < MLAD_LAUNCH_TOKENS && launch->estimate < MLAD_LAUNCH_NS;
}

static void start(struct mlad_scheduler *scheduler, struct mlad_decode *decode)
{
    decode->launched = mlad_now_ns();
    scheduler->queued--;
    mlad_stats_running(scheduler->stats, ++scheduler->running);
}

/* Whether the decode has to see what an earlier one of its session, which is in a launch, leaves behind. */
static bool depends(const struct mlad_scheduler *scheduler, const struct mlad_decode *decode)
{
    if (decode->queue->running == 0)
        return false;
    for (const struct mlad_launch *launch = scheduler->launch; launch < scheduler->launch + MLAD_LAUNCHES; launch++) {
        for (uint32_t i = 0; i < launch->n_slices; i++) {
            const struct mlad_decode *earlier = launch->slices[i].decode;
            if (earlier->queue == decode->queue && mlad_plan_depends(earlier->plan, decode->plan))
                return true;
        }
    }
    return false;
}

/* KV tokens of `count` requests of the queue's next decode, as far as one knows. */
static uint64_t cost_of(const struct mlad_queue *queue, uint32_t count)
{
    const struct mlak_batch *batch = &queue->next->plan->batch;
    return count * (queue->per_request ? queue->per_request : (uint64_t)batch->max_pages * batch->page_size);
}

/* Whether the queue's next decode, or slice of one, may run beside what is in launches already. */
static bool may_go(const struct mlad_scheduler *scheduler, const struct mlad_queue *queue)
{
    const struct mlad_decode *decode = queue->next;
    uint32_t left = decode->plan->batch.batch - decode->done;
    bool large_runs = false;
    if (decode->running || depends(scheduler, decode))
        return false;
    for (uint32_t i = 0; i < MLAD_LAUNCHES; i++)
        large_runs |= scheduler->launch[i].tokens > MLAD_LAUNCH_TOKENS;
    return !large_runs || cost_of(queue, left < MLAD_SLICE_REQUESTS ? left : MLAD_SLICE_REQUESTS) <= MLAD_LAUNCH_TOKENS;
}

/* Add the queue's next decode, which may go, or a slice of it if nothing else is in the launch, which has room. False:
 * it does not go with what is there already. */
static bool take(struct mlad_scheduler *scheduler, struct mlad_launch *launch, struct mlad_queue *queue)
{
    const struct mlak_backend *backend = scheduler->backend;
    struct mlad_decode *decode = queue->next;
    const struct mlak_batch *batch = &decode->plan->batch;
    struct mlak_part *part = &launch->parts[launch->n_slices];
    bool first = launch->n_slices == 0;
    uint32_t left = batch->batch - decode->done, room = MLAD_SLICE_REQUESTS - launch->n_rows;
    uint64_t cost, estimate = 0;
    if (left > room && !first)
        return false;
    *part = (struct mlak_part){.batch = batch, .first = decode->done, .rows = launch->rows + launch->n_rows};
    if (backend->launch_batches) {
        if (!first && !backend->mergeable(scheduler->device, launch->parts[0].batch, batch))
            return false;
        part->count = left < room ? left : room;
        cost = cost_of(queue, part->count);
        if (!first && launch->tokens + cost > MLAD_LAUNCH_TOKENS)
            return false;
        memset(part->rows, 0, part->count * sizeof *part->rows);
    } else {
        estimate = prepare(scheduler, decode, left < room ? left : room, part);
        if (!first && launch->estimate + estimate > MLAD_LAUNCH_NS)
            return false;
        cost = tokens_of(part->rows, part->count);
    }
    if (!decode->launched)
        start(scheduler, decode);
    decode->running = true;
    launch->slices[launch->n_slices++] = (struct mlad_slice){decode, cost};
    launch->n_rows += part->count;
    launch->estimate += estimate;
    launch->tokens += cost;
    queue->balance -= (int64_t)cost;
    queue->launch = scheduler->launches;
    queue->running++;
    if (part->code != MLAK_OK || decode->done + part->count == batch->batch)
        pass_on(scheduler, queue);
    if (queue->next) {
        TAILQ_REMOVE(&scheduler->turns[queue->priority], queue, turn);
        TAILQ_INSERT_TAIL(&scheduler->turns[queue->priority], queue, turn);
    }
    return true;
}

/* A decode of each queue in turn that is not in debt. False: none was taken; *least is the least debt of those that
 * might be, or -1. */
static bool take_turns(struct mlad_scheduler *scheduler, struct mlad_launch *launch, struct mlad_turns *turns,
                       int64_t *least)
{
    bool taken = false;
    struct mlad_queue *last = TAILQ_LAST(turns, mlad_turns), *next;
    *least = -1;
    for (struct mlad_queue *queue = TAILQ_FIRST(turns); queue && has_room(launch); queue = next) {
        next = queue == last ? NULL : TAILQ_NEXT(queue, turn);
        if (queue->left_out == scheduler->launches)
            continue;
        if (!may_go(scheduler, queue))
            queue->left_out = scheduler->launches;
        else if (queue->balance <= 0)
            *least = *least < 0 || -queue->balance < *least ? -queue->balance : *least;
        else if (take(scheduler, launch, queue))
            taken = true;
        else
            queue->left_out = scheduler->launches;
    }
    return taken;
}

static void take_all(struct mlad_scheduler *scheduler, struct mlad_launch *launch, struct mlad_turns *turns)
{
    int64_t least;
    while (take_turns(scheduler, launch, turns, &least) || least >= 0) {
        struct mlad_queue *queue;
        if (!has_room(launch))
            return;
        if (least >= 0)
            TAILQ_FOREACH(queue, turns, turn)
                give(queue, (least / MLAD_QUANTUM + 1) * MLAD_QUANTUM);
    }
}

/* The next launch. False: nothing waits that may go. */
static bool put_together(struct mlad_scheduler *scheduler, struct mlad_launch *launch)
{
    struct mlad_turns *normal = &scheduler->turns[MLAD_NORMAL], *high = &scheduler->turns[MLAD_HIGH];
    struct mlad_queue *queue, *longest = TAILQ_FIRST(normal);
    bool normal_first = scheduler->passed_over >= MLAD_PATIENCE;
    if (!longest && TAILQ_EMPTY(high))
        return false;
    bool could = longest && may_go(scheduler, longest);
    scheduler->launches++;
    take_all(scheduler, launch, normal_first ? normal : high);
    take_all(scheduler, launch, normal_first ? high : normal);
    if (launch->n_slices == 0)
        return false;
    launch->running = true;
    scheduler->in_flight++;
    scheduler->passed_over = longest && longest->launch != scheduler->launches ? scheduler->passed_over + could : 0;
    for (unsigned i = 0; i < MLAD_PRIORITIES; i++)
        TAILQ_FOREACH(queue, &scheduler->turns[i], turn)
            if (queue->launch != scheduler->launches)
                give(queue, MLAD_QUANTUM);
    return true;
}

/* ---- launches ---- */

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

/* Slice `index` of the launch has run: count what came of it; its decode ends, or waits for its next turn. `code`: the
 * launch's. */
static void slice_ended(struct mlad_launch *launch, uint32_t index, enum mlak_code code)
{
    struct mlad_scheduler *scheduler = launch->scheduler;
    const struct mlad_slice *slice = &launch->slices[index];
    const struct mlak_part *part = &launch->parts[index];
    struct mlad_decode *decode = slice->decode;
    struct mlad_queue *queue = decode->queue;
    bool ran = code == MLAK_OK && part->code == MLAK_OK && !decode->cancelled, noted = true;
    decode->running = false;
    queue->running--;
    for (uint32_t i = 0; i < part->count && ran; i++)
        if (__atomic_load_n(&part->rows[i].code, __ATOMIC_RELAXED) != MLAK_ROW_OK)
            noted &= note_failure(decode, &part->rows[i]);
    if (ran && part->count > 0) {
        uint64_t tokens = tokens_of(part->rows, part->count);
        decode->kv_tokens += tokens;
        queue->per_request = tokens / part->count;
        give(queue, (int64_t)slice->cost - (int64_t)tokens);
    }
    decode->done += part->count;
    struct mlap_fault fault;
    if (decode->cancelled) {
        finish(scheduler, decode, NULL);
    } else if (part->code != MLAK_OK) {
        mlap_fail(&fault, part->code == MLAK_BATCH ? MLAP_code_BATCH : MLAP_code_MEMORY, part->fault.field, "%s",
                  part->fault.message);
        finish(scheduler, decode, &fault);
    } else if (code != MLAK_OK || !noted) {
        mlap_fail(&fault, MLAP_code_MEMORY, "",
                  "the device had no memory for the batch; try again, or with a smaller one");
        finish(scheduler, decode, &fault);
    } else if (decode->done == decode->plan->batch.batch) {
        finish(scheduler, decode, NULL);
    }
}

static void idle_if_nothing_is_left(struct mlad_scheduler *scheduler)
{
    if (scheduler->queued + scheduler->running > 0)
        return;
    scheduler->period++;
    if (scheduler->ordered == 0)
        scheduler->idle(scheduler);
}

static void launch_ended(struct mlad_launch *launch, enum mlak_code code)
{
    struct mlad_scheduler *scheduler = launch->scheduler;
    if (code == MLAK_LOST)
        scheduler->lost(scheduler, scheduler->backend->lost(scheduler->device));
    for (uint32_t i = 0; i < launch->n_slices; i++)
        slice_ended(launch, i, code);
    launch->running = false;
    launch->n_slices = launch->n_rows = 0;
    launch->tokens = launch->estimate = 0;
    scheduler->in_flight--;
    scheduler->changed = true;
    idle_if_nothing_is_left(scheduler);
}

/* One that may be put together now; NULL: all run, or what runs has more decodes than wait. */
static struct mlad_launch *next_launch(struct mlad_scheduler *scheduler)
{
    struct mlad_launch *next = NULL;
    uint32_t slices = 0;
    for (uint32_t i = scheduler->n_launches; i-- > 0;) {
        slices += scheduler->launch[i].n_slices;
        if (!scheduler->launch[i].running)
            next = &scheduler->launch[i];
    }
    uint32_t waiting = scheduler->queued + scheduler->running - slices;
    return waiting >= slices ? next : NULL;
}

/* Small launches run here while they fit in MLAD_INLINE_NS together, others on their launch thread. */
void mlad_scheduler_run(struct mlad_scheduler *scheduler)
{
    const struct mlak_backend *backend = scheduler->backend;
    struct mlad_launch *launch;
    uint64_t begun = 0;
    if (!scheduler->changed)
        return;
    scheduler->changed = false;
    while ((launch = next_launch(scheduler)) && put_together(scheduler, launch)) {
        uint32_t rows = launch->n_rows;
        begun = begun ? begun : mlad_now_ns();
        if (rows > 0)
            mlad_stats_launched(scheduler->stats, launch->n_slices, rows);
        if (rows == 0) /* what was taken could not be prepared */
            launch_ended(launch, MLAK_OK);
        else if (backend->launch_batches)
            mlad_launcher_run_parts(&launch->launcher, launch->parts, launch->n_slices);
        else if (launch->estimate < MLAD_INLINE_NS && mlad_now_ns() - begun + launch->estimate < MLAD_INLINE_NS)
            launch_ended(launch, backend->launch(scheduler->device, launch->rows, rows));
        else
            mlad_launcher_run(&launch->launcher, launch->rows, rows);
    }
}

static void on_launched(struct mlad_launcher *launcher, enum mlak_code code, const struct mlak_fault *fault)
{
    (void)fault; /* of the whole launch: lost says why, and memory needs no other words */
    launch_ended((struct mlad_launch *)((char *)launcher - offsetof(struct mlad_launch, launcher)), code);
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
    for (unsigned i = 0; i < MLAD_PRIORITIES; i++)
        TAILQ_INIT(&scheduler->turns[i]);
    scheduler->period = 1; /* no queue's yet */
    STAILQ_INIT(&scheduler->spare);
    scheduler->cu_q = calloc(MLAK_MAX_BATCH + 1, sizeof *scheduler->cu_q);
    bool started = scheduler->cu_q;
    uint32_t at_once = backend->launches < MLAD_LAUNCHES ? backend->launches : MLAD_LAUNCHES;
    scheduler->n_launches = at_once ? at_once : 1;
    for (uint32_t i = 0; i < scheduler->n_launches && started; i++) {
        struct mlad_launch *launch = &scheduler->launch[i];
        launch->scheduler = scheduler;
        launch->rows = calloc(MLAD_SLICE_REQUESTS, sizeof *launch->rows);
        launch->parts = calloc(MLAD_PARTS, sizeof *launch->parts);
        started = launch->rows && launch->parts &&
                  mlad_launcher_start(&launch->launcher, loop, backend, device, i, on_launched);
    }
    return started;
}

void mlad_queue_init(struct mlad_queue *queue, struct mlad_user *user, enum mlad_priority priority,
                     void (*ended)(struct mlad_queue *, const struct mlad_decode *, const struct mlap_fault *))
{
    *queue = (struct mlad_queue){.user = user, .priority = priority, .ended = ended};
    STAILQ_INIT(&queue->decodes);
}

enum mlap_code mlad_scheduler_submit(struct mlad_scheduler *scheduler, struct mlad_queue *queue, struct mlad_plan *plan,
                                     uint32_t sequence, uint64_t received, struct mlap_fault *fault)
{
    if (scheduler->draining)
        return mlap_fail(fault, MLAP_code_DRAINING, "",
                         "the device is being drained; work is taken again once an operator resumes it");
    if (scheduler->queued >= scheduler->queue_limit) /* perhaps only of what has come together */
        mlad_scheduler_run(scheduler);
    if (scheduler->in_flight > 0 && scheduler->queued >= scheduler->queue_limit)
        return mlap_fail(fault, MLAP_code_BUSY, "",
                         "%" PRIu32 " decodes wait on this device and %" PRIu32
                         " may: try again after a completion, or raise queue_limit",
                         scheduler->queued, scheduler->queue_limit);
    enum mlap_code code = mlad_user_take_decode(queue->user, queue->in_flight, fault);
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
    if (queue->period != scheduler->period) {
        queue->period = scheduler->period;
        queue->balance = MLAD_QUANTUM;
    }
    STAILQ_INSERT_TAIL(&queue->decodes, decode, next);
    queue->in_flight++;
    scheduler->queued++;
    scheduler->changed = true;
    if (!queue->next) {
        queue->next = decode;
        TAILQ_INSERT_TAIL(&scheduler->turns[queue->priority], queue, turn);
    }
    return MLAP_code_OK;
}

bool mlad_scheduler_lingers(const struct mlad_scheduler *scheduler)
{
    return scheduler->in_flight == 0 && mlad_now_ns() - scheduler->ended < MLAD_LINGER_NS;
}

void mlad_scheduler_ordered(struct mlad_scheduler *scheduler, int more)
{
    scheduler->ordered += (uint32_t)more;
    idle_if_nothing_is_left(scheduler);
}

void mlad_scheduler_cancel(struct mlad_scheduler *scheduler, struct mlad_queue *queue)
{
    if (STAILQ_EMPTY(&queue->decodes))
        return;
    if (queue->next)
        TAILQ_REMOVE(&scheduler->turns[queue->priority], queue, turn);
    queue->next = NULL;
    for (struct mlad_launch *launch = scheduler->launch; launch < scheduler->launch + MLAD_LAUNCHES; launch++) {
        for (uint32_t i = 0; i < launch->n_slices; i++) {
            const struct mlak_part *part = &launch->parts[i];
            if (launch->slices[i].decode->queue != queue)
                continue;
            launch->slices[i].decode->cancelled = true;
            for (uint32_t row = 0; row < part->count; row++) /* nobody waits for it: let the backend abandon it */
                __atomic_store_n(&part->rows[row].code, MLAK_ROW_CANCELLED, __ATOMIC_RELAXED);
        }
    }
    struct mlad_decode *decode = STAILQ_FIRST(&queue->decodes), *next;
    STAILQ_INIT(&queue->decodes);
    for (; decode; decode = next) {
        next = STAILQ_NEXT(decode, next);
        if (decode->running) { /* until its slice has ended */
            STAILQ_INSERT_TAIL(&queue->decodes, decode, next);
        } else {
            uncount(scheduler, decode);
            release(scheduler, decode);
        }
    }
    idle_if_nothing_is_left(scheduler);
}
