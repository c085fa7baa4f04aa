/* step.c - steps: plans that a stream runs one after the other, each with a slot in the client's mailbox. See
 * streams.h.
 *
 * The daemon knows a step by its STEP, which is kept and sent again like any registration. It is freed once its owner
 * has given it up and no round of it is in flight. */
#include "streams.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The first of `count` units in a row; MLAC_UNITS: there are none. Locked. */
static uint32_t take_units(struct mlac_streams *streams, uint32_t count)
{
    uint32_t run = 0;
    for (uint32_t at = 0; at < MLAC_UNITS; at++) {
        run = streams->used[at] ? 0 : run + 1;
        if (run < count)
            continue;
        memset(&streams->used[at + 1 - count], true, count * sizeof *streams->used);
        return at + 1 - count;
    }
    return MLAC_UNITS;
}

/* Let go of what the step has, but for its calls; a plan that only it kept goes too. Locked. */
static void free_step(struct mla_step *step)
{
    struct mla_client *client = step->client;
    if (step->first < MLAC_UNITS && client->streams)
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
    struct mlac_relaxed before = mlac_relax(streams->context);
    memset(&streams->notes[first], 0, sizeof *streams->notes);
    mlac_driver.set_words(streams->mailbox + first * sizeof(struct mlap_mail_slot), 0,
                          count * sizeof(struct mlap_mail_slot) / 4, streams->side);
    mlac_poll_stream(streams->side, mlac_deadline(MLAC_MARGIN_MS));
    mlac_unrelax(before);
}

mla_status mlac_step_new(struct mla_client *client, mla_plan *const *plans, uint32_t count, struct mla_step **out,
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
    if (step->first == MLAC_UNITS) {
        free(step->plans);
        free(step);
        return mlac_fail(error, MLA_QUOTA, "plans", "the client's steps have %d layers together at most; destroy some",
                         MLAC_UNITS - 1);
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

/* Whether kernels of both sides can run at the same time. */
static bool side_by_side(mla_placement placement)
{
    return placement == MLA_PLACEMENT_SHARED_MPS || placement == MLA_PLACEMENT_OWN_GPU;
}

mla_status mlac_check_order(struct mla_client *client, const mla_plan *plan, mla_error *error)
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
    if (side_by_side(placement) || (forced && strcmp(forced, "stream") == 0))
        return MLA_OK;
    return mlac_fail(error, MLA_UNSUPPORTED, "stream", "%s", why);
}

MLA_API mla_order mla_client_order(mla_client *client, char why[MLA_WHY])
{
    mla_error error = {0};
    mla_status status = mlac_check_order(client, NULL, &error);
    if (why && status != MLA_OK)
        snprintf(why, MLA_WHY, "%.*s", MLA_WHY - 1, error.message);
    else if (why && !side_by_side(mla_client_placement(client, why)))
        snprintf(why, MLA_WHY, "$MLAD_ORDER is stream");
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
        mla_status status = mlac_check_order(client, plans[i], error);
        if (status != MLA_OK)
            return status;
    }
    mla_status status = mlac_need_streams(client, error);
    if (status != MLA_OK)
        return status;
    mlac_lock(client);
    uint32_t taken = 0;
    while (taken < count && !plans[taken]->step) /* marked as it goes, so that a plan named twice is found */
        plans[taken++]->step = (struct mla_step *)&taken;
    bool all = taken == count;
    for (uint32_t i = 0; i < taken; i++)
        plans[i]->step = NULL;
    status = all ? mlac_step_new(client, plans, count, out, error)
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
