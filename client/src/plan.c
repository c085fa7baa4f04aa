/* plan.c - a batch that was validated once and is run many times. It belongs to its client and to whoever made it.
 *
 * A destroyed plan lives on until its last decode in flight is complete, since a new worker would need it to run that
 * decode again; then the daemon is told to drop it. */
#include "mlac.h"

#include <stdlib.h>

/* A plan with both of its calls, none of them started. */
static mla_plan *new_plan(mla_client *client, struct mlap_plan *body, mla_error *error)
{
    mla_plan *plan = calloc(1, sizeof *plan);
    if (!plan) {
        mlac_fail(error, MLA_MEMORY, "", "out of memory in this process");
        return NULL;
    }
    uint64_t id = mlac_next_id(client);
    body->plan = (uint32_t)id;
    struct mlap_drop drop = {.plan = body->plan};
    plan->client = client;
    plan->call = mlac_call_new(id, MLAP_PLAN, body, error);
    plan->drop = plan->call ? mlac_call_new(mlac_next_id(client), MLAP_DROP, &drop, error) : NULL;
    if (plan->drop)
        return plan;
    if (plan->call)
        mlac_call_free(client, plan->call);
    free(plan);
    return NULL;
}

/* Where its outputs are on the GPU, as far as they are there. */
static void note_outputs(mla_plan *plan, const mla_batch *batch)
{
    const uint64_t rows = batch->q_rows * batch->heads;
    const mla_buffer *out = batch->out.buffer, *lse = batch->lse.buffer;
    plan->out = out->memfd < 0 ? out->pointer + batch->out.offset : 0;
    plan->out_bytes = rows * 512 * 2;
    if (lse)
        plan->lse = lse->memfd < 0 ? lse->pointer + batch->lse.offset : 0;
    if (lse && !plan->lse)
        plan->out = 0;
    plan->lse_bytes = plan->lse ? rows * 4 : 0;
}

/* Locked. */
static mla_status create(mla_client *client, const mla_batch *batch, mla_plan **out, mla_error *error)
{
    struct mlap_plan body = {0};
    struct mla_buffer *uses[MLAC_MAX_TENSORS];
    uint32_t n_uses;
    mla_status status = mlac_batch(client, batch, &body.batch, uses, &n_uses, error);
    if (status != MLA_OK)
        return status;
    mla_plan *plan = new_plan(client, &body, error);
    if (!plan)
        return MLA_MEMORY;
    plan->call->plan = plan;
    note_outputs(plan, batch);
    mlac_batch_hold(plan->call, uses, n_uses);
    status = mlac_call_establish(client, plan->call, error);
    if (status == MLA_OK) {
        *out = plan;
        return MLA_OK;
    }
    mlac_call_free(client, plan->drop);
    free(plan);
    return status;
}

MLA_API mla_status mla_plan_create(mla_client *client, const mla_batch *batch, mla_plan **plan, mla_error *error)
{
    if (!client)
        return mlac_fail(error, MLA_INVALID, "client", "it must not be NULL");
    if (!plan)
        return mlac_fail(error, MLA_INVALID, "plan", "it must not be NULL");
    mlac_lock(client);
    mla_status status = create(client, batch, plan, error);
    mlac_unlock(client);
    return status;
}

void mlac_plan_drop(struct mla_plan *plan)
{
    mla_client *client = plan->client;
    mlac_call_detach(client, plan->call);
    if (client->link == MLAC_UP) {
        plan->drop->detached = true;
        mlac_call_start(client, plan->drop);
    } else {
        mlac_call_free(client, plan->drop);     /* no session, so nothing there to drop */
    }
    free(plan);
}

MLA_API void mla_plan_destroy(mla_plan *plan)
{
    if (!plan)
        return;
    mla_client *client = plan->client;
    mlac_lock(client);
    plan->destroyed = true;
    if (plan->alone)
        mlac_step_destroy(plan->alone);     /* frees the plan, if nothing else has it */
    else if (plan->in_flight == 0)
        mlac_plan_drop(plan);
    mlac_unlock(client);
}
