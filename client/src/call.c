/* call.c - the list of calls: everything that the daemon owes, or would owe again, an answer.
 *
 * A client owns its calls. The list is in the order of first sending, which is the order that dependencies need (a
 * buffer before its plan before its decodes), so recovery sends it again from the front. The table finds a call by
 * sequence.
 *
 * A full socket is never waited for: when it is full the daemon owes us answers, and after each of them mlac_flush
 * goes on (by the time of the last answer it has read everything, so there is room). That is why no call can be stuck
 * behind a daemon that waits for us to read. */
#include "mlac.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { REFUSED_PAUSE_MS = 5, FULL_PAUSE_MS = 10 };

static struct mlac_call **bucket_of(struct mla_client *client, uint64_t id)
{
    return &client->bucket[id % MLAC_BUCKETS];
}

static struct mlac_call *find_sequence(struct mla_client *client, uint32_t sequence)
{
    struct mlac_call *call = *bucket_of(client, sequence);
    while (call && (uint32_t)call->id != sequence)
        call = call->in_bucket;
    return call;
}

struct mlac_call *mlac_call_find(struct mla_client *client, uint64_t id)
{
    struct mlac_call *call = find_sequence(client, (uint32_t)id);
    return call && call->id == id ? call : NULL;
}

uint64_t mlac_next_id(struct mla_client *client)
{
    do
        client->last_id++;
    while ((uint32_t)client->last_id == 0 || find_sequence(client, (uint32_t)client->last_id));
    return client->last_id;
}

struct mlac_call *mlac_call_new(uint64_t id, enum mlap_type type, const void *body, mla_error *error)
{
    uint8_t bytes[4096];    /* the largest that we send, a DECODE with every field, takes about 800 */
    long length = mlap_encode(bytes, sizeof bytes, type, (uint32_t)id, body);
    if (length < 0) {
        mlac_fail(error, MLA_INTERNAL, "", "%s cannot be encoded: %s; please report this", mlap_type_name(type),
                  strerror(errno));
        return NULL;
    }
    struct mlac_call *call = calloc(1, sizeof *call + (size_t)length);
    if (!call) {
        mlac_fail(error, MLA_MEMORY, "", "out of memory in this process");
        return NULL;
    }
    call->id = id;
    call->type = type;
    call->length = (size_t)length;
    memcpy(call->bytes, bytes, (size_t)length);
    return call;
}

bool mlac_registers(const struct mlac_call *call)
{
    return call->type == MLAP_REGISTER || call->type == MLAP_IMPORT || call->type == MLAP_IMPORT_VMM;
}

static void enqueue(struct mla_client *client, struct mlac_call *call)
{
    call->state = MLAC_UNSENT;
    call->queued = true;
    client->arms_sent += call->type == MLAP_ARM;
    TAILQ_INSERT_TAIL(&client->outbox, call, out);
}

/* Rounds go out in the order in which they were armed, so many at a time that a user's limit is far. */
static void enqueue_or_hold(struct mla_client *client, struct mlac_call *call)
{
    if (call->type == MLAP_ARM &&
        (client->arms_held || client->arms_stopped || client->arms_sent >= MLAC_MOST_ARMS))
        call->held = client->arms_held = true;
    else
        enqueue(client, call);
}

static void dequeue(struct mla_client *client, struct mlac_call *call)
{
    if (call->queued)
        TAILQ_REMOVE(&client->outbox, call, out);
    call->queued = false;
}

void mlac_call_start(struct mla_client *client, struct mlac_call *call)
{
    struct mlac_call **bucket = bucket_of(client, call->id);
    call->in_bucket = *bucket;
    *bucket = call;
    TAILQ_INSERT_TAIL(&client->calls, call, order);
    call->listed = true;
    client->loose += call->loose;
    if (client->link == MLAC_DEAD) {
        mlac_call_complete(client, call, &client->failure);
    } else if (client->link == MLAC_UP) {
        enqueue_or_hold(client, call);
        mlac_flush(client, mlac_now());
    }
}

mla_status mlac_call_establish(struct mla_client *client, struct mlac_call *call, mla_error *error)
{
    mlac_call_start(client, call);
    mlac_await(client, call->id, MLAC_KEPT, MLAC_NEVER);
    mla_status status = mlac_report(error, &call->error);
    if (status != MLA_OK)
        mlac_call_free(client, call);
    return status;
}

/* Send rounds that were held back, as far as may be: those that came too soon for their streams once the daemon has let
 * go of all of them. */
static void send_held(struct mla_client *client, int64_t now)
{
    struct mlac_call *call;
    if (client->arms_stopped && client->arms_sent > 0)
        return;
    client->arms_stopped = client->arms_held = false;
    TAILQ_FOREACH(call, &client->calls, order) {
        if (!call->held)
            continue;
        call->held = false;
        enqueue_or_hold(client, call);
    }
    mlac_flush(client, now);
}

static bool is_decode(const struct mlac_call *call)
{
    return call->type == MLAP_SUBMIT || call->type == MLAP_DECODE || call->type == MLAP_ARM;
}

/* What it holds is free for others. */
static void release(struct mlac_call *call)
{
    for (uint32_t i = 0; i < call->n_uses; i++)
        call->uses[i]->uses--;
    call->n_uses = 0;
    struct mla_plan *plan = call->type == MLAP_SUBMIT ? call->plan : NULL;
    call->plan = NULL;
    if (plan && --plan->in_flight == 0 && plan->destroyed)
        mlac_plan_drop(plan);
}

static void accepted_again(struct mla_client *client, struct mlac_call *call)
{
    if (call->replaying && --client->replaying == 0)
        mlac_settled(client);
    call->replaying = false;
}

void mlac_call_free(struct mla_client *client, struct mlac_call *call)
{
    if (call->listed) {
        struct mlac_call **at = bucket_of(client, call->id);
        while (*at != call)
            at = &(*at)->in_bucket;
        *at = call->in_bucket;
        TAILQ_REMOVE(&client->calls, call, order);
        client->loose -= call->loose;
        client->ready -= call->loose && call->state == MLAC_COMPLETE;
    }
    dequeue(client, call);
    accepted_again(client, call);
    release(call);
    free(call->result.failures);
    free(call);
}

void mlac_call_detach(struct mla_client *client, struct mlac_call *call)
{
    if (call->state != MLAC_SENT) {
        mlac_call_free(client, call);
        return;
    }
    call->detached = true;
    if (!is_decode(call))       /* the daemon may use an abandoned decode's buffers until it answers */
        release(call);
}

void mlac_call_complete(struct mla_client *client, struct mlac_call *call, const mla_error *error)
{
    dequeue(client, call);
    release(call);
    call->state = MLAC_COMPLETE;
    client->ready += call->loose;
    if (error)
        call->error = *error;
    mlac_wake(client, call->id);
}

/* A buffer's registration has ended. It goes together with the answer: a later replay must not register it again. */
static void unregistered(struct mla_client *client, struct mlac_call *call)
{
    mlac_call_free(client, call->buffer->call);
    call->buffer->call = NULL;
    mlac_call_complete(client, call, NULL);
}

static bool registers_gpu(const struct mlac_call *call)
{
    return mlac_registers(call) && call->buffer->memfd < 0;
}

static void cannot_restore(struct mla_client *client, const mla_error *why)
{
    mla_error dead;
    mlac_fail(&dead, why->code, why->field, "the session could not be restored: %.480s", why->message);
    mlac_die(client, &dead);
}

bool mlac_calls_check(struct mla_client *client)
{
    struct mlac_call *call;
    mla_error lost;
    TAILQ_FOREACH(call, &client->calls, order) {
        if (!call->established || !registers_gpu(call))
            continue;
        if (mlac_cuda_check(call->buffer->pointer, &lost) == MLA_OK)
            return true; /* this one speaks for all: a process mostly has one context, and a refusal asks again */
        cannot_restore(client, &lost);
        return false;
    }
    return true;
}

/* What became of a call that did not end in a DONE: accepted, or refused with `error`. GPU memory whose context is lost
 * is refused for many reasons, and that is the true one. */
static void settle(struct mla_client *client, struct mlac_call *call, const mla_error *error)
{
    mla_error lost;
    bool lasting = mlac_registers(call) || call->type == MLAP_PLAN || call->type == MLAP_STEP;
    if (error && registers_gpu(call) && mlac_cuda_check(call->buffer->pointer, &lost) != MLA_OK)
        error = &lost;
    if (error && call->established) {
        cannot_restore(client, error);
    } else if (!error && call->type == MLAP_UNREGISTER) {
        unregistered(client, call);
    } else if (error || !lasting) {
        mlac_call_complete(client, call, error);
    } else {
        call->state = MLAC_KEPT;
        call->established = true;
        accepted_again(client, call);
        mlac_wake(client, call->id);
    }
}

/* Send it with the descriptors that it carries. 0; -1 with errno as mlap_send; 1: they cannot be had, says `error`. */
static int send_call(const struct mla_client *client, const struct mlac_call *call, mla_error *error)
{
    int fds[MLAP_MAX_FDS];
    if (call->type != MLAP_IMPORT_VMM)
        return mlap_send(client->socket, call->bytes, call->length,
                         call->type == MLAP_REGISTER ? call->buffer->memfd : -1, MSG_DONTWAIT);
    const struct mlac_vmm *vmm = &call->buffer->vmm;
    if (mlac_cuda_descriptors(vmm, fds, error) != MLA_OK)
        return 1;
    int sent = mlap_send_fds(client->socket, call->bytes, call->length, fds, vmm->count, MSG_DONTWAIT);
    int number = errno;
    for (uint32_t i = 0; i < vmm->count; i++)
        close(fds[i]);
    errno = number;
    return sent;
}

void mlac_flush(struct mla_client *client, int64_t now)
{
    if (now < client->paused_until)
        return;
    client->paused_until = 0;
    struct mlac_call *call;
    while (!client->broken && (call = TAILQ_FIRST(&client->outbox))) {
        mla_error error;
        bool ringed = mlac_rings_submit(client, call);
        int sent = ringed ? 0 : send_call(client, call, &error);
        if (sent == 0) {
            dequeue(client, call);
            call->state = MLAC_SENT;
            call->posted = is_decode(call) && !ringed;
            client->posted += call->posted;
            client->unanswered++;
            mlac_wake(client, call->id);
        } else if (sent > 0) {      /* of an IMPORT_VMM */
            settle(client, call, &error);
        } else if (errno == EAGAIN) {
            if (client->unanswered == 0)    /* no answer will bring us back here, so time must */
                client->paused_until = now + FULL_PAUSE_MS * MLAC_MS;
            return;
        } else if (errno == EPIPE || errno == ECONNRESET) {
            client->broken = true;          /* the receiver finds the end of file, and what was said before it */
        } else if (errno != EINTR) {
            client->arms_sent -= call->type == MLAP_ARM;
            mlac_fail(&error, MLA_INTERNAL, "", "the socket to the daemon fails: %s", strerror(errno));
            settle(client, call, &error);
        }
    }
}

/* A decode that had its place in the queue keeps it over a death, although others may have been quicker to return. */
static bool try_again(struct mla_client *client, struct mlac_call *call, enum mlap_code code, int64_t now)
{
    bool for_the_moment = code == MLAP_code_UNAVAILABLE ||
                          (call->replays && (code == MLAP_code_BUSY || code == MLAP_code_QUOTA));
    bool let_go = code == MLAP_code_TIMEOUT || code == MLAP_code_BUSY || code == MLAP_code_QUOTA;
    if (call->type == MLAP_ARM && let_go && now < client->arms_progress + client->reconnect_ns) {
        call->state = MLAC_UNSENT;
        call->held = client->arms_held = client->arms_stopped = true;
        return true;
    }
    if (!is_decode(call) || !for_the_moment)
        return false;
    if (call->retry_until == 0)
        call->retry_until = now + client->reconnect_ns;
    if (now >= call->retry_until)
        return false;
    enqueue(client, call);
    client->paused_until = now + REFUSED_PAUSE_MS * MLAC_MS;
    return true;
}

static void keep_result(struct mlac_call *call, const struct mlap_done *done)
{
    call->result.failed = done->failed;
    call->result.kv_tokens = done->kv_tokens;
    call->result.receive_ns = done->receive_ns;
    call->result.queue_ns = done->queue_ns;
    call->result.kernel_ns = done->kernel_ns;
    if (done->failed == 0)
        return;
    call->result.failures = calloc(done->n_failures, sizeof *call->result.failures);
    if (call->result.failures)
        call->result.listed = done->n_failures;     /* out of memory: the count alone */
    for (uint32_t i = 0; i < call->result.listed; i++) {
        mla_failure *to = &call->result.failures[i];
        to->request = done->failures[i].request;
        memcpy(to->field, done->failures[i].field, sizeof to->field);
        memcpy(to->message, done->failures[i].message, sizeof to->message);
    }
    const struct mlap_failure *first = &done->failures[0];
    mlac_fail(&call->error, MLA_REQUESTS, done->n_failures ? first->field : "",
              "%u requests of the batch failed and the others are complete%s%s", done->failed,
              done->n_failures ? "; the first: " : "", done->n_failures ? first->message : "");
}
_Static_assert(sizeof((mla_failure *)0)->field == sizeof((struct mlap_failure *)0)->field, "copied whole");
_Static_assert(sizeof((mla_failure *)0)->message == sizeof((struct mlap_failure *)0)->message, "copied whole");
_Static_assert(sizeof((mla_result *)0)->failures / sizeof(mla_failure) == MLAP_MAX_FAILURES_LISTED,
               "all that DONE lists");

/* The call that is owed an answer of this sequence, or NULL. */
static struct mlac_call *find_owed(struct mla_client *client, uint32_t sequence)
{
    struct mlac_call *call = find_sequence(client, sequence);
    return call && call->state == MLAC_SENT ? call : NULL;
}

static void note_answer(struct mla_client *client, struct mlac_call *call)
{
    client->unanswered--;
    client->arms_sent -= call->type == MLAP_ARM;
    client->posted -= call->posted;
    call->posted = false;
}

bool mlac_done(struct mla_client *client, uint32_t sequence, const struct mlap_done *done)
{
    struct mlac_call *call = find_owed(client, sequence);
    if (!call || !is_decode(call))
        return false;
    int64_t now = call->type == MLAP_ARM || client->arms_held ? mlac_now() : 0;
    note_answer(client, call);
    client->paused_until = 0;
    if (call->type == MLAP_ARM)
        client->arms_progress = now;
    if (call->detached) {
        mlac_call_free(client, call);
    } else {
        keep_result(call, done);
        mlac_call_complete(client, call, NULL);
    }
    if (client->arms_held)
        send_held(client, now);
    return true;
}

bool mlac_answer(struct mla_client *client, const struct mlap_header *header, const union mlap_body *body, int64_t now)
{
    if (header->type == MLAP_DONE)
        return mlac_done(client, header->sequence, &body->done_);
    struct mlac_call *call = find_owed(client, header->sequence);
    if (!call)
        return false;
    if (header->type == MLAP_ERROR ? body->error_.code == MLAP_code_OK : is_decode(call) || header->type != MLAP_OK)
        return false;
    note_answer(client, call);
    if (call->detached) {
        mlac_call_free(client, call);
    } else if (header->type == MLAP_OK) {
        settle(client, call, NULL);
    } else if (!try_again(client, call, body->error_.code, now)) {
        mla_error error;
        mlac_fail(&error, (mla_status)body->error_.code, body->error_.field, "%s", body->error_.message);
        settle(client, call, &error);
    }
    if (client->arms_held)
        send_held(client, now);
    return true;
}

void mlac_calls_end(struct mla_client *client, const mla_error *error)
{
    client->unanswered = client->posted = 0;
    client->replaying = 0;
    client->paused_until = 0;
    client->arms_sent = 0;
    client->arms_held = client->arms_stopped = false;
    TAILQ_INIT(&client->outbox);
    struct mlac_call *next;
    for (struct mlac_call *call = TAILQ_FIRST(&client->calls); call; call = next) {
        next = TAILQ_NEXT(call, order);     /* what is freed besides `call` comes before it */
        bool in_flight = call->state == MLAC_SENT;
        call->queued = call->replaying = call->posted = call->held = false;
        if (call->state == MLAC_COMPLETE)
            continue;
        call->state = MLAC_UNSENT;
        if (call->detached) {
            mlac_call_free(client, call);
        } else if (call->type == MLAP_UNREGISTER) {
            unregistered(client, call);
        } else if (call->established) {
            continue;
        } else if (error) {
            mlac_call_complete(client, call, error);
        } else if (in_flight && ++call->deaths == MLAC_MAX_DEATHS) {
            mla_error lost;
            mlac_fail(&lost, MLA_WORKER_LOST, "", "the worker died %d times in a row with this in flight; "
                      "see the daemon's log before trying it again", MLAC_MAX_DEATHS);
            mlac_call_complete(client, call, &lost);
        } else {
            call->replays += in_flight;
        }
    }
}

void mlac_calls_replay(struct mla_client *client)
{
    struct mlac_call *call;
    TAILQ_FOREACH(call, &client->calls, order) {
        if (call->state != MLAC_UNSENT)
            continue;
        if (call->type == MLAP_HELLO) {     /* mla_connect's: it waits for just this */
            mlac_call_complete(client, call, NULL);
            continue;
        }
        enqueue_or_hold(client, call);
        call->replaying = call->established;
        client->replaying += call->established;
    }
    if (client->replaying == 0)
        mlac_settled(client);
}
