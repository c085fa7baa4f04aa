/* stream.c - decodes in the order of a CUDA stream: steps, their rounds, and the thread that looks after them.
 *
 * A *step* is plans that a stream runs one after the other. Each of its layers has a slot in the client's mailbox, GPU
 * memory that the daemon maps (mlap_mailbox.h says who writes what). A *round* is one run of the step: it is armed by a
 * message to the daemon, which then waits for the slots' flags, and the stream signals and waits for each layer by the
 * kernels of mlac_gates.cu. Both sides of a round are independent of when the other comes, so nothing here waits for
 * the stream, and the stream never for a host.
 *
 *   mla_submit_stream ---> arm a round of the plan's own step; signal, gate on the stream
 *   under capture     ---> a host node at the graph's start that arms a round; signal, gate in the graph
 *   mla_step_launch   ---> arm a round of a step whose layers are, or will be, captured
 *
 * The watcher is a thread that exists once a step does. While rounds are in flight it takes in what the daemon says of
 * them and restores a session that has died, which arms again what had not been told complete; a round that cannot be
 * had is released by a word in the mailbox, at which its gates leave NaN and a note behind.
 *
 * Locks: `ordering` makes rounds and the stream's kernels come in one order; it is held over launches, which may wait
 * for room on a stream, and taken before client->lock, which never is. */
#include "driver.h"
#include "mlac.h"
#include "mlac_gates.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* The fatbin, gates_image.c; absent without nvcc. */
extern const unsigned char mlac_gates_image[] __attribute__((weak));

enum {
    UNITS = 4096,     /* of the mailbox, 128 bytes each */
    WATCH_NS = 1000000,
    MARGIN_MS = 5000, /* what a gate waits beyond reconnect_ms: libmla should be the one to give up */
    LEGACY = 1,       /* CU_STREAM_LEGACY; 0 is the same, unless compiled otherwise */
    CARVEOUT = 9,     /* CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT */
    HOST_MAPPED = 3   /* CU_MEMHOSTALLOC_PORTABLE | DEVICEMAP */
};

struct mlac_streams {
    void *context, *module, *arm, *signal, *gate;
    void *side;                 /* a stream for words that overtake the caller's */
    uint64_t mailbox, notes_here;
    mla_buffer *buffer;         /* the mailbox, registered */
    struct mlac_notes *notes;   /* pinned, [UNITS]: a step's is that of its head */
    bool used[UNITS];
    pthread_mutex_t ordering;
    uint64_t capture;           /* the last one that was added to, and its last host node */
    void *capture_node;
    pthread_t watcher;
    pthread_cond_t work;        /* with client->lock */
    bool watching, stop;
};

/* A round that nobody waits for any more: `word` of its head = `round`. */
struct release {
    uint64_t word;
    uint32_t round;
};

/* ---- the driver, in a mode that leaves captures alone ---- */

struct relaxed { int mode; bool pushed; };

static struct relaxed relax(void *context)
{
    struct relaxed before = {MLAC_CAPTURE_RELAXED, false};
    mlac_driver.capture_mode(&before.mode);
    before.pushed = context && mlac_driver.push(context) == 0;
    return before;
}

static void unrelax(struct relaxed before)
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
    struct relaxed before = relax(streams->context);
    for (uint32_t i = 0; i < count; i++) /* the gate's own time ends, should the driver refuse */
        mlac_driver.set_words(releases[i].word, releases[i].round, 1, streams->side);
    unrelax(before);
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

#define TRY(call, ...)                                                                                                 \
    do {                                                                                                               \
        int code_ = mlac_driver.call(__VA_ARGS__);                                                                     \
        if (code_ != 0)                                                                                                \
            return mlac_driver_fail(error, "stream", #call, code_);                                                    \
    } while (0)

static mla_status take_memory(struct mlac_streams *streams, mla_error *error)
{
    const size_t bytes = UNITS * sizeof(struct mlap_mail_slot);
    TRY(module_load, &streams->module, mlac_gates_image);
    TRY(module_function, &streams->arm, streams->module, "mlac_arm");
    TRY(module_function, &streams->signal, streams->module, "mlac_signal");
    TRY(module_function, &streams->gate, streams->module, "mlac_gate");
    void *const kernels[] = {streams->arm, streams->signal, streams->gate};
    for (unsigned i = 0; i < 3; i++) /* as the daemon's kernels need a processor's memory cut */
        TRY(function_attribute, kernels[i], CARVEOUT, 100);
    TRY(stream_new, &streams->side, MLAC_STREAM_NON_BLOCKING);
    TRY(alloc, &streams->mailbox, bytes);
    TRY(host_alloc, (void **)&streams->notes, UNITS * sizeof *streams->notes, HOST_MAPPED);
    memset(streams->notes, 0, UNITS * sizeof *streams->notes);
    TRY(host_pointer, &streams->notes_here, streams->notes, 0);
    TRY(set_words, streams->mailbox, 0, bytes / 4, streams->side);
    int code = mlac_poll_stream(streams->side, mlac_deadline(MARGIN_MS));
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
    const size_t bytes = UNITS * sizeof(struct mlap_mail_slot);
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

/* The client's streams, made at the first call: in the context that is current. */
static mla_status need_streams(struct mla_client *client, mla_error *error)
{
    static pthread_mutex_t opening = PTHREAD_MUTEX_INITIALIZER;
    void *context = NULL;
    TRY(context, &context);
    if (!context)
        return mlac_fail(error, MLA_INVALID, "stream", "no GPU's context is current in this thread; call cudaSetDevice "
                         "first");
    pthread_mutex_lock(&opening);
    mla_status status = MLA_OK;
    if (!client->streams) {
        struct relaxed before = relax(NULL);
        status = open_streams(client, context, error);
        unrelax(before);
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
    struct relaxed before = relax(streams->context);
    mlac_poll_stream(streams->side, mlac_deadline(MARGIN_MS));
    give_memory(streams);
    unrelax(before);
    client->streams = NULL;
}

/* ---- steps ---- */

/* The first of `count` units in a row; UNITS: there are none. Locked. */
static uint32_t take_units(struct mlac_streams *streams, uint32_t count)
{
    uint32_t run = 0;
    for (uint32_t at = 0; at < UNITS; at++) {
        run = streams->used[at] ? 0 : run + 1;
        if (run < count)
            continue;
        memset(&streams->used[at + 1 - count], true, count * sizeof *streams->used);
        return at + 1 - count;
    }
    return UNITS;
}

/* Let go of what the step has, but for its calls; a plan that only it kept goes too. Locked. */
static void free_step(struct mla_step *step)
{
    struct mla_client *client = step->client;
    if (step->first < UNITS && client->streams)
        memset(&client->streams->used[step->first], false, (step->layers + 1) * sizeof *client->streams->used);
    for (uint32_t i = 0; i < step->layers; i++) {
        struct mla_plan *plan = step->plans[i];
        if (plan->step == step)
            plan->step = NULL;
        if (plan->alone == step)
            plan->alone = NULL;
        if (--plan->in_flight == 0 && plan->destroyed)
            mlac_plan_drop(plan);
    }
    free(step->plans);
    free(step);
}

void mlac_step_destroy(struct mla_step *step)
{
    struct mla_client *client = step->client;
    step->destroyed = true;
    if (step->in_flight)
        return;
    mlac_call_detach(client, step->call);
    if (client->link == MLAC_UP) {
        step->drop->detached = true;
        mlac_call_start(client, step->drop);
    } else {
        mlac_call_free(client, step->drop);
    }
    free_step(step);
}

static mla_status make_calls(struct mla_step *step, mla_error *error)
{
    static __thread struct mlap_step body;
    struct mla_client *client = step->client;
    uint64_t id = mlac_next_id(client);
    body = (struct mlap_step){.step = (uint32_t)id, .n_layers = step->layers};
    body.slots.buffer = (uint32_t)client->streams->buffer->call->id;
    body.slots.offset = (step->first + 1) * sizeof(struct mlap_mail_slot);
    for (uint32_t i = 0; i < step->layers; i++)
        body.layers[i].plan = (uint32_t)step->plans[i]->call->id;
    struct mlap_step_drop drop = {.step = body.step};
    step->call = mlac_call_new(id, MLAP_STEP, &body, error);
    step->drop = step->call ? mlac_call_new(mlac_next_id(client), MLAP_STEP_DROP, &drop, error) : NULL;
    if (step->drop)
        return MLA_OK;
    if (step->call)
        mlac_call_free(client, step->call);
    return MLA_MEMORY;
}

/* Slots that were another's begin anew. */
static void clear_units(const struct mlac_streams *streams, uint32_t first, uint32_t count)
{
    struct relaxed before = relax(streams->context);
    memset(&streams->notes[first], 0, sizeof *streams->notes);
    mlac_driver.set_words(streams->mailbox + first * sizeof(struct mlap_mail_slot), 0,
                          count * sizeof(struct mlap_mail_slot) / 4, streams->side);
    mlac_poll_stream(streams->side, mlac_deadline(MARGIN_MS));
    unrelax(before);
}

/* Locked. */
static mla_status new_step(struct mla_client *client, mla_plan *const *plans, uint32_t count, struct mla_step **out,
                           mla_error *error)
{
    struct mla_step *step = calloc(1, sizeof *step);
    if (step)
        step->plans = calloc(count, sizeof(mla_plan *));
    if (!step || !step->plans) {
        free(step);
        return mlac_fail(error, MLA_MEMORY, "", "out of memory in this process");
    }
    step->client = client;
    step->first = take_units(client->streams, count + 1);
    if (step->first == UNITS) {
        free(step->plans);
        free(step);
        return mlac_fail(error, MLA_QUOTA, "plans", "the client's steps have %d layers together at most; destroy some",
                         UNITS - 1);
    }
    clear_units(client->streams, step->first, count + 1);
    for (uint32_t i = 0; i < count; i++) {
        step->plans[i] = plans[i];
        plans[i]->in_flight++;
    }
    step->layers = count;
    mla_status status = make_calls(step, error);
    if (status != MLA_OK) {
        free_step(step);
        return status;
    }
    step->call->step = step;
    status = mlac_call_establish(client, step->call, error);
    if (status == MLA_OK) {
        *out = step;
        return MLA_OK;
    }
    mlac_call_free(client, step->drop);
    free_step(step);
    return status;
}

/* Where stream order is of no use, or cannot be. MLA_UNSUPPORTED says why. */
static mla_status check_order(struct mla_client *client, const mla_plan *plan, mla_error *error)
{
    char gpu[64], why[MLA_WHY];
    int mps;
    const char *forced = secure_getenv("MLAD_ORDER");
    mla_status status = mlac_need_driver(error);
    if (status != MLA_OK)
        return status;
    if (!mlac_gates_image)
        return mlac_fail(error, MLA_UNSUPPORTED, "stream", "this build of libmla has no gate kernels; build it where "
                         "there is a CUDA compiler (nvcc)");
    if (plan && !plan->out)
        return mlac_fail(error, MLA_UNSUPPORTED, "plan", "its outputs lie in host memory, which a stream cannot wait "
                         "for; put out and lse on the GPU");
    if (forced && strcmp(forced, "host") == 0)
        return mlac_fail(error, MLA_UNSUPPORTED, "stream", "$MLAD_ORDER is host");
    mlac_lock(client);
    if (!client->here.gpu[0] && mlac_cuda_current(gpu, &mps))
        mlac_placement_memory(client, gpu);
    mla_placement placement = mlac_placement(client, why);
    mlac_unlock(client);
    if ((forced && strcmp(forced, "stream") == 0) || placement == MLA_PLACEMENT_SHARED_MPS ||
        placement == MLA_PLACEMENT_OWN_GPU)
        return MLA_OK;
    return mlac_fail(error, MLA_UNSUPPORTED, "stream", "%s", why);
}

MLA_API mla_order mla_client_order(mla_client *client, char why[MLA_WHY])
{
    mla_error error = {0};
    mla_status status = check_order(client, NULL, &error);
    if (why && status == MLA_OK)
        mla_client_placement(client, why);
    else if (why)
        memcpy(why, error.message, MLA_WHY - 1), why[MLA_WHY - 1] = '\0';
    return status == MLA_OK ? MLA_ORDER_STREAM : MLA_ORDER_HOST;
}

MLA_API mla_status mla_step_create(mla_client *client, mla_plan *const *plans, uint32_t count, mla_step **out,
                                   mla_error *error)
{
    if (!client)
        return mlac_fail(error, MLA_INVALID, "client", "it must not be NULL");
    if (!out)
        return mlac_fail(error, MLA_INVALID, "step", "it must not be NULL");
    if (!plans || count == 0 || count > MLAP_MAX_LAYERS)
        return mlac_fail(error, MLA_INVALID, "count", "a step has 1 to %d plans, not %u", MLAP_MAX_LAYERS, count);
    for (uint32_t i = 0; i < count; i++) {
        if (!plans[i] || plans[i]->client != client)
            return mlac_fail(error, MLA_INVALID, "plans", "plan %u is %s", i, plans[i] ? "another client's" : "NULL");
        mla_status status = check_order(client, plans[i], error);
        if (status != MLA_OK)
            return status;
    }
    mla_status status = need_streams(client, error);
    if (status != MLA_OK)
        return status;
    mlac_lock(client);
    uint32_t taken = 0;
    while (taken < count && !plans[taken]->step) /* marked as it goes, so that a plan named twice is found */
        plans[taken++]->step = (struct mla_step *)&taken;
    bool all = taken == count;
    for (uint32_t i = 0; i < taken; i++)
        plans[i]->step = NULL;
    status = all ? new_step(client, plans, count, out, error)
                 : mlac_fail(error, MLA_IN_USE, "plans", "plan %u is in a step already; make another plan of its batch",
                             taken);
    for (uint32_t i = 0; i < count && status == MLA_OK; i++)
        plans[i]->step = *out;
    mlac_unlock(client);
    return status;
}

MLA_API void mla_step_destroy(mla_step *step)
{
    if (!step)
        return;
    mla_client *client = step->client;
    mlac_lock(client);
    mlac_step_destroy(step);
    mlac_unlock(client);
}

MLA_API mla_status mla_step_status(mla_step *step, mla_error *error)
{
    static const char *const texts[] = {
        [MLAP_MAIL_REQUESTS] = "some requests of layer %u failed; their outputs are NaN",
        [MLAP_MAIL_BATCH] = "the batch of layer %u was refused; its outputs are NaN",
        [MLAP_MAIL_UNARMED] = "layer %u ran in a round that nobody had armed; its outputs are NaN: call "
                              "mla_step_launch before each replay",
        [MLAP_MAIL_RELEASED] = "layer %u was given up; its outputs are NaN",
        [MLAP_MAIL_LATE] = "layer %u was not decoded in time; its outputs are NaN",
    };
    static const mla_status codes[] = {[MLAP_MAIL_REQUESTS] = MLA_REQUESTS,
                                       [MLAP_MAIL_BATCH] = MLA_BATCH,
                                       [MLAP_MAIL_UNARMED] = MLA_STATE,
                                       [MLAP_MAIL_RELEASED] = MLA_TIMEOUT,
                                       [MLAP_MAIL_LATE] = MLA_TIMEOUT};
    if (!step)
        return mlac_fail(error, MLA_INVALID, "step", "it must not be NULL");
    mlac_lock(step->client);
    struct mlac_notes *notes = &step->client->streams->notes[step->first];
    uint32_t count = __atomic_load_n(&notes->count, __ATOMIC_ACQUIRE), what = notes->what, layer = notes->layer;
    mla_error failure = step->failure;
    step->failure.code = MLA_OK;
    if (failure.code == MLA_OK && count != step->noted && what < sizeof texts / sizeof texts[0] && texts[what]) {
        char field[64];
        snprintf(field, sizeof field, "layers[%u]", layer);
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wformat-nonliteral"
        mlac_fail(&failure, codes[what], field, texts[what], layer);
#pragma GCC diagnostic pop
    }
    step->noted = count;
    mlac_unlock(step->client);
    return mlac_report(error, &failure);
}

/* ---- rounds ---- */

/* Arm the step's next round. Locked. */
static mla_status arm(struct mla_step *step, mla_error *error)
{
    struct mla_client *client = step->client;
    uint64_t id = mlac_next_id(client);
    struct mlap_arm body = {.step = (uint32_t)step->call->id, .round = step->round + 1};
    struct mlac_call *call = mlac_call_new(id, MLAP_ARM, &body, error);
    if (!call)
        return MLA_MEMORY;
    call->step = step;
    call->round = ++step->round;
    step->in_flight++;
    if (client->arms++ == 0)
        client->arms_progress = mlac_now();
    mlac_call_start(client, call);
    pthread_cond_signal(&client->streams->work);
    return MLA_OK;
}

/* A host node: the graph is being replayed. */
static void arm_replay(void *data)
{
    struct mla_step *step = data;
    mla_error error;
    mlac_lock(step->client);
    if (arm(step, &error) != MLA_OK && step->failure.code == MLA_OK)
        step->failure = error; /* the gates' own time ends */
    mlac_unlock(step->client);
}

static int is_capturing(void *stream, bool *capturing, uint64_t *id, void **graph)
{
    int status = 0;
    void *const *dependencies;
    size_t count;
    *capturing = false;
    if ((uintptr_t)stream <= LEGACY) /* never is, and to ask would end others' captures */
        return 0;
    int code = mlac_driver.capture_info(stream, &status, id, graph, &dependencies, &count);
    *capturing = status == 1;
    return code;
}

/* At the start of the graph that is being captured, beside all else, but behind others of its kind: rounds are armed in
 * the order of the capture. */
static mla_status capture_arming(struct mla_step *step, uint64_t id, void *graph, mla_error *error)
{
    struct mlac_streams *streams = step->client->streams;
    const struct mlac_host_node node = {arm_replay, step};
    void *made;
    if (streams->capture != id)
        streams->capture_node = NULL;
    TRY(graph_host_node, &made, graph, &streams->capture_node, streams->capture_node != NULL, &node);
    streams->capture = id;
    streams->capture_node = made;
    return MLA_OK;
}

static int launch(void *kernel, unsigned threads, struct mlac_gate *gate, void *stream)
{
    void *parameters[] = {gate};
    return mlac_driver.launch(kernel, 1, 1, 1, threads, 1, 1, 0, stream, parameters, NULL);
}

static struct mlac_gate gate_of(const struct mla_step *step, uint32_t layer, bool advance)
{
    const struct mlac_streams *streams = step->client->streams;
    const struct mla_plan *plan = step->plans[layer];
    struct mlap_mail_slot *units = (void *)(uintptr_t)streams->mailbox;
    struct mlac_notes *notes = (void *)(uintptr_t)streams->notes_here;
    return (struct mlac_gate){.head = (void *)&units[step->first],
                              .slot = &units[step->first + 1 + layer],
                              .out = (void *)(uintptr_t)plan->out,
                              .lse = (void *)(uintptr_t)plan->lse,
                              .out_bytes = plan->out_bytes,
                              .lse_bytes = plan->lse_bytes,
                              .notes = &notes[step->first],
                              .wait_ns = (uint64_t)(step->client->reconnect_ns + MARGIN_MS * MLAC_MS),
                              .layer = layer,
                              .advance = advance};
}

static mla_status enqueue_layer(struct mla_step *step, uint32_t layer, bool advance, void *stream, mla_error *error)
{
    struct mlac_streams *streams = step->client->streams;
    struct mlac_gate gate = gate_of(step, layer, advance);
    int code = launch(streams->signal, 1, &gate, stream);
    if (code == 0)
        code = launch(streams->gate, MLAC_GATE_THREADS, &gate, stream);
    return code == 0 ? MLA_OK : mlac_driver_fail(error, "stream", "cuLaunchKernel", code);
}

/* Arm a round now, or with each replay of what is being captured. */
static mla_status arm_somehow(struct mla_step *step, void *stream, mla_error *error)
{
    bool capturing;
    uint64_t id = 0;
    void *graph = NULL;
    int code = is_capturing(stream, &capturing, &id, &graph);
    if (code != 0)
        return mlac_driver_fail(error, "stream", "cuStreamGetCaptureInfo", code);
    if (capturing)
        return capture_arming(step, id, graph, error);
    mlac_lock(step->client);
    mla_status status = arm(step, error);
    mlac_unlock(step->client);
    return status;
}

MLA_API mla_status mla_step_launch(mla_step *step, void *stream, mla_error *error)
{
    if (!step)
        return mlac_fail(error, MLA_INVALID, "step", "it must not be NULL");
    mla_status status = need_streams(step->client, error);
    if (status != MLA_OK)
        return status;
    struct mlac_streams *streams = step->client->streams;
    pthread_mutex_lock(&streams->ordering);
    status = arm_somehow(step, stream, error);
    if (status == MLA_OK) {
        struct mlac_gate gate = gate_of(step, 0, false);
        int code = launch(streams->arm, 1, &gate, stream);
        if (code != 0)
            status = mlac_driver_fail(error, "stream", "cuLaunchKernel", code);
    }
    pthread_mutex_unlock(&streams->ordering);
    return status;
}

/* Its own step, made at its first use. */
static mla_status need_alone(mla_plan *plan, mla_error *error)
{
    mlac_lock(plan->client);
    mla_status status = plan->alone ? MLA_OK : new_step(plan->client, &plan, 1, &plan->alone, error);
    mlac_unlock(plan->client);
    return status;
}

static mla_status submit(mla_plan *plan, void *stream, mla_error *error)
{
    mla_status status = need_streams(plan->client, error);
    bool capturing = false;
    uint64_t id;
    void *graph;
    if (status != MLA_OK)
        return status;
    int code = is_capturing(stream, &capturing, &id, &graph);
    if (code != 0)
        return mlac_driver_fail(error, "stream", "cuStreamGetCaptureInfo", code);
    struct mlac_streams *streams = plan->client->streams;
    pthread_mutex_lock(&streams->ordering);
    if (capturing && plan->step) {
        uint32_t layer = 0;
        while (plan->step->plans[layer] != plan)
            layer++;
        status = enqueue_layer(plan->step, layer, false, stream, error);
    } else {
        status = need_alone(plan, error);
        if (status == MLA_OK)
            status = arm_somehow(plan->alone, stream, error);
        if (status == MLA_OK)
            status = enqueue_layer(plan->alone, 0, true, stream, error);
    }
    pthread_mutex_unlock(&streams->ordering);
    return status;
}

/* The same from the host: once the stream has come here, decode, and only then go on. `why` says why. */
static mla_status host_order(mla_plan *plan, void *stream, const mla_error *why, mla_error *error)
{
    bool capturing = false;
    uint64_t id;
    void *graph;
    mla_status status = mlac_need_driver(error);
    if (status != MLA_OK)
        return status;
    int code = is_capturing(stream, &capturing, &id, &graph);
    if (code != 0)
        return mlac_driver_fail(error, "stream", "cuStreamGetCaptureInfo", code);
    if (capturing)
        return mlac_fail(error, why->code, why->field, "a stream that is being captured needs stream order: %.440s",
                         why->message);
    status = mla_stream_drain(stream, MLA_FOREVER, error);
    return status == MLA_OK ? mla_decode(plan->client, plan, MLA_FOREVER, NULL, error) : status;
}

MLA_API mla_status mla_submit_stream(mla_plan *plan, void *stream, mla_error *error)
{
    mla_error why;
    if (!plan)
        return mlac_fail(error, MLA_INVALID, "plan", "it must not be NULL");
    mla_status status = check_order(plan->client, plan, &why);
    if (status == MLA_OK)
        status = submit(plan, stream, &why);
    if (status == MLA_UNSUPPORTED || status == MLA_BUSY) /* nothing is on the stream */
        return host_order(plan, stream, &why, error);
    return status == MLA_OK ? MLA_OK : mlac_report(error, &why);
}

MLA_API mla_status mla_plan_status(mla_plan *plan, mla_error *error)
{
    if (!plan)
        return mlac_fail(error, MLA_INVALID, "plan", "it must not be NULL");
    return plan->alone ? mla_step_status(plan->alone, error) : MLA_OK;
}
