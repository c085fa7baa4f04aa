/* streams.c - what a client has of stream order: the mailbox, the kernels, and the watcher. See streams.h.
 *
 * The watcher is a thread that exists once a step does. While rounds are in flight it takes in what the daemon says of
 * them and restores a session that has died, which arms again what had not been told complete; a round that cannot be
 * had is released by a word in the mailbox, at which its gates leave NaN and a note behind. */
#include "streams.h"

#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum {
    WATCH_NS = 1000000,
    CARVEOUT = 9,   /* CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT */
    HOST_MAPPED = 3 /* CU_MEMHOSTALLOC_PORTABLE | DEVICEMAP */
};

/* A round that nobody waits for any more: `word` of its head = `round`. */
struct release {
    uint64_t word;
    uint32_t round;
};

struct mlac_relaxed mlac_relax(void *context)
{
    struct mlac_relaxed before = {MLAC_CAPTURE_RELAXED, false};
    mlac_driver.capture_mode(&before.mode);
    before.pushed = context && mlac_driver.push(context) == 0;
    return before;
}

void mlac_unrelax(struct mlac_relaxed before)
{
    void *context;
    if (before.pushed)
        mlac_driver.pop(&context);
    mlac_driver.capture_mode(&before.mode);
}

/* ---- the watcher ---- */

static uint64_t release_word(const struct mla_step *step)
{
    return step->client->streams->mailbox + step->first * sizeof(struct mlap_mail_head) +
           offsetof(struct mlap_mail_head, release);
}

/* What became of a round. Locked. True: its stream may wait for it still. */
static bool collect(struct mla_client *client, struct mlac_call *call, struct release *release)
{
    struct mla_step *step = call->step;
    const bool told = call->error.code == MLA_OK || call->error.code == MLA_REQUESTS || call->error.code == MLA_BATCH;
    if (call->error.code != MLA_OK && step->failure.code == MLA_OK)
        step->failure = call->error;
    *release = (struct release){release_word(step), call->round};
    client->arms--;
    mlac_call_free(client, call);
    if (--step->in_flight == 0 && step->destroyed) {
        step->destroyed = false;
        mlac_step_destroy(step);
        return false;
    }
    return !told;
}

static void release_rounds(const struct mlac_streams *streams, const struct release *releases, uint32_t count)
{
    if (count == 0)
        return;
    struct mlac_relaxed before = mlac_relax(streams->context);
    for (uint32_t i = 0; i < count; i++) /* the gate's own time ends, should the driver refuse */
        mlac_driver.set_words(releases[i].word, releases[i].round, 1, streams->side);
    mlac_unrelax(before);
}

/* The first round in flight. Locked. */
static uint64_t first_round(const struct mla_client *client)
{
    const struct mlac_call *call;
    TAILQ_FOREACH(call, &client->calls, order)
        if (call->type == MLAP_ARM)
            return call->id;
    return 0;
}

/* Look after the rounds once. Locked; unlocks meanwhile. */
static void look(struct mla_client *client)
{
    enum { AT_A_TIME = 64 };
    struct release releases[AT_A_TIME];
    uint32_t count = 0;
    struct mlac_call *call, *next;
    mlac_await(client, first_round(client), MLAC_COMPLETE, 0);
    for (call = TAILQ_FIRST(&client->calls); call && count < AT_A_TIME; call = next) {
        next = TAILQ_NEXT(call, order);
        if (call->type == MLAP_ARM && call->state == MLAC_COMPLETE)
            count += collect(client, call, &releases[count]);
        else if (call->type == MLAP_ARM)
            break; /* told in order, so that an earlier release is not undone by a later one */
    }
    mlac_unlock(client);
    release_rounds(client->streams, releases, count);
    nanosleep(&(struct timespec){.tv_nsec = WATCH_NS}, NULL);
    mlac_lock(client);
}

static void *watch(void *argument)
{
    struct mla_client *client = argument;
    struct mlac_streams *streams = client->streams;
    mlac_lock(client);
    while (!streams->stop) {
        if (client->arms)
            look(client);
        else
            pthread_cond_wait(&streams->work, &client->lock);
    }
    mlac_unlock(client);
    return NULL;
}

static mla_status start_watcher(struct mla_client *client, mla_error *error)
{
    struct mlac_streams *streams = client->streams;
    sigset_t all, before; /* signals are the program's */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    streams->watching = pthread_create(&streams->watcher, NULL, watch, client) == 0;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (!streams->watching)
        return mlac_fail(error, MLA_MEMORY, "", "no thread can be had in this process");
    pthread_setname_np(streams->watcher, "mla:streams");
    return MLA_OK;
}

/* ---- the first use ---- */

static mla_status take_memory(struct mlac_streams *streams, mla_error *error)
{
    const size_t bytes = MLAC_UNITS * sizeof(struct mlap_mail_slot);
    MLAC_TRY(module_load, &streams->module, mlac_gates_image);
    MLAC_TRY(module_function, &streams->arm, streams->module, "mlac_arm");
    MLAC_TRY(module_function, &streams->signal, streams->module, "mlac_signal");
    MLAC_TRY(module_function, &streams->gate, streams->module, "mlac_gate");
    void *const kernels[] = {streams->arm, streams->signal, streams->gate};
    for (unsigned i = 0; i < 3; i++) /* as the daemon's kernels need a processor's memory cut */
        MLAC_TRY(function_attribute, kernels[i], CARVEOUT, 100);
    MLAC_TRY(stream_new, &streams->side, MLAC_STREAM_NON_BLOCKING);
    MLAC_TRY(alloc, &streams->mailbox, bytes);
    MLAC_TRY(host_alloc, (void **)&streams->notes, MLAC_UNITS * sizeof *streams->notes, HOST_MAPPED);
    memset(streams->notes, 0, MLAC_UNITS * sizeof *streams->notes);
    MLAC_TRY(host_pointer, &streams->notes_here, streams->notes, 0);
    MLAC_TRY(set_words, streams->mailbox, 0, bytes / 4, streams->side);
    int code = mlac_poll_stream(streams->side, mlac_deadline(MLAC_MARGIN_MS));
    return code == 0 ? MLA_OK : mlac_driver_fail(error, "stream", "clearing the mailbox", code);
}

static void give_memory(struct mlac_streams *streams)
{
    if (streams->side)
        mlac_driver.stream_free(streams->side);
    if (streams->mailbox)
        mlac_driver.free(streams->mailbox);
    if (streams->notes)
        mlac_driver.host_free(streams->notes);
    if (streams->module)
        mlac_driver.module_unload(streams->module);
    pthread_mutex_destroy(&streams->ordering);
    pthread_cond_destroy(&streams->work);
    free(streams);
}

static mla_status open_streams(struct mla_client *client, void *context, mla_error *error)
{
    struct mlac_streams *streams = calloc(1, sizeof *streams);
    if (!streams)
        return mlac_fail(error, MLA_MEMORY, "", "out of memory in this process");
    pthread_mutex_init(&streams->ordering, NULL);
    pthread_cond_init(&streams->work, NULL);
    streams->context = context;
    mla_status status = take_memory(streams, error);
    const size_t bytes = MLAC_UNITS * sizeof(struct mlap_mail_slot);
    if (status == MLA_OK)
        status = mla_buffer_import_device(client, (void *)(uintptr_t)streams->mailbox, bytes, MLA_READWRITE,
                                          &streams->buffer, error);
    if (status != MLA_OK) {
        give_memory(streams);
        return status;
    }
    mlac_lock(client);
    client->streams = streams;
    status = start_watcher(client, error);
    mlac_unlock(client);
    return status;
}

mla_status mlac_need_streams(struct mla_client *client, mla_error *error)
{
    static pthread_mutex_t opening = PTHREAD_MUTEX_INITIALIZER;
    void *context = NULL;
    MLAC_TRY(context, &context);
    if (!context)
        return mlac_fail(error, MLA_INVALID, "stream", "no GPU's context is current in this thread; call cudaSetDevice "
                         "first");
    pthread_mutex_lock(&opening);
    mla_status status = MLA_OK;
    if (!client->streams) {
        struct mlac_relaxed before = mlac_relax(NULL);
        status = open_streams(client, context, error);
        mlac_unrelax(before);
    }
    pthread_mutex_unlock(&opening);
    if (status == MLA_OK && client->streams->context != context)
        return mlac_fail(error, MLA_INVALID, "stream", "this client's streams are those of another GPU; make a client "
                         "for each GPU whose streams are used");
    return status == MLA_OK && !client->streams->watching
               ? mlac_fail(error, MLA_MEMORY, "", "no thread could be had in this process; close the client")
               : status;
}

void mlac_streams_close(struct mla_client *client)
{
    struct mlac_streams *streams = client->streams;
    if (!streams)
        return;
    mlac_lock(client);
    streams->stop = true;
    pthread_cond_signal(&streams->work);
    mlac_unlock(client);
    if (streams->watching)
        pthread_join(streams->watcher, NULL);
    struct mlac_call *call;
    TAILQ_FOREACH(call, &client->calls, order)
        if (call->type == MLAP_ARM)
            release_rounds(streams, &(struct release){release_word(call->step), call->step->round}, 1);
    struct mlac_relaxed before = mlac_relax(streams->context);
    mlac_poll_stream(streams->side, mlac_deadline(MLAC_MARGIN_MS));
    give_memory(streams);
    mlac_unrelax(before);
    client->streams = NULL;
}
