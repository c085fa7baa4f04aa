/* ticket.c - decodes: submit, poll, wait, collect. A ticket is a call that its submitter collects. */
#include "mlac.h"

#include <string.h>

static mla_status check(const mla_client *client, int timeout_ms, mla_error *error)
{
    if (!client)
        return mlac_fail(error, MLA_INVALID, "client", "it must not be NULL");
    if (timeout_ms < 0 && timeout_ms != MLA_FOREVER)
        return mlac_fail(error, MLA_INVALID, "timeout_ms", "it must be MLA_FOREVER or 0 or more milliseconds, not %d",
                         timeout_ms);
    return MLA_OK;
}

static mla_status too_late(mla_error *error, const char *what)
{
    return mlac_fail(error, MLA_TIMEOUT, "timeout_ms", "%s", what);
}

/* A call that runs `plan`, or else `batch`. Locked. */
static mla_status make(mla_client *client, mla_plan *plan, const mla_batch *batch, struct mlac_call **out,
                       mla_error *error)
{
    if (plan) {
        if (plan->client != client)
            return mlac_fail(error, MLA_INVALID, "plan", "it belongs to another client");
        struct mlap_submit body = {.plan = (uint32_t)plan->call->id};
        *out = mlac_call_new(mlac_next_id(client), MLAP_SUBMIT, &body, error);
        if (!*out)
            return MLA_MEMORY;
        (*out)->plan = plan;
        plan->in_flight++;
        return MLA_OK;
    }
    struct mlap_decode body = {0};
    struct mla_buffer *uses[MLAC_MAX_TENSORS];
    uint32_t n_uses;
    mla_status status = mlac_batch(client, batch, &body.batch, uses, &n_uses, error);
    if (status != MLA_OK)
        return status;
    *out = mlac_call_new(mlac_next_id(client), MLAP_DECODE, &body, error);
    if (!*out)
        return MLA_MEMORY;
    mlac_batch_hold(*out, uses, n_uses);
    return MLA_OK;
}

/* Hand a complete call's outcome to its submitter, and free it. Locked. */
static mla_status collect(mla_client *client, struct mlac_call *call, mla_result *result, mla_error *error)
{
    if (result) {
        memset(result, 0, sizeof *result);
        result->failed = call->result.failed;
        result->listed = call->result.listed;
        if (call->result.listed)
            memcpy(result->failures, call->result.failures, call->result.listed * sizeof *result->failures);
        result->kv_tokens = call->result.kv_tokens;
        result->receive_ns = call->result.receive_ns;
        result->queue_ns = call->result.queue_ns;
        result->kernel_ns = call->result.kernel_ns;
        result->replays = call->replays;
    }
    mla_status status = mlac_report(error, &call->error);
    mlac_call_free(client, call);
    return status;
}

/* ---- asynchronous ---- */

static mla_status submit(mla_client *client, mla_plan *plan, const mla_batch *batch, mla_ticket *ticket,
                         mla_error *error)
{
    mla_status status = check(client, MLA_FOREVER, error);
    if (status == MLA_OK && !ticket)
        status = mlac_fail(error, MLA_INVALID, "ticket", "it must not be NULL");
    if (status != MLA_OK)
        return status;
    struct mlac_call *call;
    mlac_lock(client);
    status = make(client, plan, batch, &call, error);
    if (status == MLA_OK) {
        uint64_t id = call->id;
        call->loose = true;
        mlac_call_start(client, call);
        mlac_await(client, id, MLAC_SENT, MLAC_NEVER);
        *ticket = id;       /* should it have failed already, the ticket says so when collected */
    }
    mlac_unlock(client);
    return status;
}

MLA_API mla_status mla_submit(mla_client *client, mla_plan *plan, mla_ticket *ticket, mla_error *error)
{
    if (!plan)
        return mlac_fail(error, MLA_INVALID, "plan", "it must not be NULL");
    return submit(client, plan, NULL, ticket, error);
}

MLA_API mla_status mla_submit_batch(mla_client *client, const mla_batch *batch, mla_ticket *ticket, mla_error *error)
{
    return submit(client, NULL, batch, ticket, error);
}

/* MLA_TIMEOUT with *done 0 if it is not complete by then, else collected. */
static mla_status await_ticket(mla_client *client, mla_ticket ticket, int timeout_ms, bool *done, mla_result *result,
                               mla_error *error)
{
    *done = false;
    mlac_lock(client);
    struct mlac_call *call = mlac_call_find(client, ticket);
    mla_status status = call && call->loose ? mlac_await(client, ticket, MLAC_COMPLETE, mlac_deadline(timeout_ms))
                                            : MLA_NOT_FOUND;
    if (status == MLA_OK) {
        *done = true;
        status = collect(client, mlac_call_find(client, ticket), result, error);
    } else if (status == MLA_TIMEOUT) {
        too_late(error, "the decode is not complete yet; its ticket can be waited for again");
    } else {
        mlac_fail(error, MLA_NOT_FOUND, "ticket", "no decode has ticket %llu; it was never submitted here, or was "
                  "collected before", (unsigned long long)ticket);
    }
    mlac_unlock(client);
    return status;
}

MLA_API mla_status mla_poll(mla_client *client, mla_ticket ticket, int *done, mla_result *result, mla_error *error)
{
    mla_status status = check(client, 0, error);
    if (status == MLA_OK && !done)
        status = mlac_fail(error, MLA_INVALID, "done", "it must not be NULL");
    if (status != MLA_OK)
        return status;
    bool complete;
    mla_error own;
    status = await_ticket(client, ticket, 0, &complete, result, &own);
    if (!complete && status == MLA_TIMEOUT) {
        *done = 0;
        return MLA_OK;
    }
    if (complete)
        *done = 1;
    return status == MLA_OK ? MLA_OK : mlac_report(error, &own);
}

MLA_API mla_status mla_wait(mla_client *client, mla_ticket ticket, int timeout_ms, mla_result *result, mla_error *error)
{
    bool complete;
    mla_status status = check(client, timeout_ms, error);
    return status == MLA_OK ? await_ticket(client, ticket, timeout_ms, &complete, result, error) : status;
}

/* ---- synchronous ---- */

static mla_status decode(mla_client *client, mla_plan *plan, const mla_batch *batch, int timeout_ms, mla_result *result,
                         mla_error *error)
{
    mla_status status = check(client, timeout_ms, error);
    if (status != MLA_OK)
        return status;
    struct mlac_call *call;
    mlac_lock(client);
    status = make(client, plan, batch, &call, error);
    if (status == MLA_OK) {
        int64_t deadline = mlac_deadline(timeout_ms);
        mlac_call_start(client, call);
        status = mlac_await(client, call->id, MLAC_COMPLETE, deadline);
        if (status == MLA_OK) {
            status = collect(client, call, result, error);
        } else {
            mlac_call_detach(client, call);
            too_late(error, "the decode did not complete in time and was abandoned");
        }
    }
    mlac_unlock(client);
    return status;
}

MLA_API mla_status mla_decode(mla_client *client, mla_plan *plan, int timeout_ms, mla_result *result, mla_error *error)
{
    if (!plan)
        return mlac_fail(error, MLA_INVALID, "plan", "it must not be NULL");
    return decode(client, plan, NULL, timeout_ms, result, error);
}

MLA_API mla_status mla_decode_batch(mla_client *client, const mla_batch *batch, int timeout_ms, mla_result *result,
                                    mla_error *error)
{
    return decode(client, NULL, batch, timeout_ms, result, error);
}
