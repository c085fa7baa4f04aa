/* stream.c - decodes in the order of a CUDA stream: rounds of steps. See streams.h.
 *
 * A *step* is plans that a stream runs one after the other. Each of its layers has a slot in the client's mailbox, GPU
 * memory that the daemon maps (mlap_mailbox.h says who writes what). A *round* is one run of the step: it is armed by
 * an entry of the ring, or a message, to the daemon, which then waits for the slots' flags, and the stream signals and
 * waits for each layer by the kernels of mlac_gates.cu. Both sides of a round are independent of when the other comes,
 * so nothing here waits for the stream, and the stream never for a host.
 *
 *   mla_submit_stream ---> arm a round of the plan's own step; signal, gate on the stream
 *   under capture     ---> a host node at the graph's start that arms a round; signal, gate in the graph
 *   mla_step_launch   ---> arm a round of a step whose layers are, or will be, captured */
#include "streams.h"

enum { LEGACY = 1 }; /* CU_STREAM_LEGACY; 0 is the same, unless compiled otherwise */

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
    MLAC_TRY(graph_host_node, &made, graph, &streams->capture_node, streams->capture_node != NULL, &node);
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
                              .wait_ns = (uint64_t)(step->client->reconnect_ns + MLAC_MARGIN_MS * MLAC_MS),
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
    mla_status status = mlac_need_streams(step->client, error);
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
    mla_status status = plan->alone ? MLA_OK : mlac_step_new(plan->client, &plan, 1, &plan->alone, error);
    mlac_unlock(plan->client);
    return status;
}

static mla_status submit(mla_plan *plan, void *stream, mla_error *error)
{
    mla_status status = mlac_need_streams(plan->client, error);
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
    mla_status status = mlac_check_order(plan->client, plan, &why);
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
