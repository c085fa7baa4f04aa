/* request.c - the messages of a client, one function each, and their answers. See session.h.
 *
 * A message that breaks the protocol's frame is answered and ends the session; any other fault is answered with the
 * field at fault, and the session goes on as if the message had never come. */
#include "log.h"
#include "session.h"

#include <inttypes.h>
#include <string.h>

static void answer_ok(struct mlad_session *session, uint32_t sequence)
{
    mlad_link_send(&session->link, MLAP_OK, sequence, &(struct mlap_ok){0});
}

/* Each handler answers success itself, at once or later; what it returns as a fault is answered for it. */
typedef enum mlap_code handler(struct mlad_session *session, struct mlad_message *message, struct mlap_fault *fault);

static enum mlap_code check_free(const struct mlad_session *session, uint32_t id, struct mlap_fault *fault)
{
    if (!mlad_idmap_get(&session->buffers, id))
        return MLAP_code_OK;
    return mlap_fail(fault, MLAP_code_EXISTS, "buffer",
                     "buffer %" PRIu32 " is registered; unregister it or choose another id", id);
}

static enum mlap_code note_buffer(struct mlad_session *session, uint32_t sequence, struct mlad_buffer *buffer,
                                  struct mlap_fault *fault)
{
    if (!mlad_idmap_put(&session->buffers, buffer->id, buffer)) {
        mlad_buffer_unref(buffer);
        return mlap_fail(fault, MLAP_code_MEMORY, "", "no memory to note another buffer; unregister others first");
    }
    answer_ok(session, sequence);
    return MLAP_code_OK;
}

static enum mlap_code on_register(struct mlad_session *session, struct mlad_message *message, struct mlap_fault *fault)
{
    const struct mlap_register *request = &message->body->register_;
    struct mlad_buffer *buffer;
    enum mlap_code code = check_free(session, request->buffer, fault);
    if (code == MLAP_code_OK)
        code = mlad_buffer_import(&session->holder, message->fds[0], request, &buffer, fault);
    return code == MLAP_code_OK ? note_buffer(session, message->header.sequence, buffer, fault) : code;
}

static enum mlap_code on_import(struct mlad_session *session, struct mlad_message *message, struct mlap_fault *fault)
{
    const struct mlap_import *request = &message->body->import_;
    struct mlad_buffer *buffer;
    enum mlap_code code = check_free(session, request->buffer, fault);
    if (code == MLAP_code_OK)
        code = mlad_buffer_import_gpu(&session->holder, request, &buffer, fault);
    if (code == MLAP_code_OK)
        mlap_place_memory(&session->place, &session->sessions->place, request->gpu);
    return code == MLAP_code_OK ? note_buffer(session, message->header.sequence, buffer, fault) : code;
}

static enum mlap_code on_import_vmm(struct mlad_session *session, struct mlad_message *message,
                                    struct mlap_fault *fault)
{
    const struct mlap_import_vmm *request = &message->body->import_vmm_;
    struct mlad_buffer *buffer;
    enum mlap_code code = check_free(session, request->buffer, fault);
    if (code == MLAP_code_OK)
        code = mlad_buffer_import_vmm(&session->holder, message->fds, message->n_fds, request, &buffer, fault);
    if (code == MLAP_code_OK)
        mlap_place_memory(&session->place, &session->sessions->place, request->gpu);
    return code == MLAP_code_OK ? note_buffer(session, message->header.sequence, buffer, fault) : code;
}

static enum mlap_code on_unregister(struct mlad_session *session, struct mlad_message *message,
                                    struct mlap_fault *fault)
{
    uint32_t id = message->body->unregister_.buffer;
    struct mlad_buffer *buffer = mlad_idmap_get(&session->buffers, id);
    if (!buffer)
        return mlap_fail(fault, MLAP_code_NOT_FOUND, "buffer", "no buffer %" PRIu32 " is registered in this session",
                         id);
    uint32_t position = 0;
    const struct mlad_plan *plan;
    while ((plan = mlad_idmap_next(&session->plans, &position))) {
        if (mlad_plan_names(plan, buffer))
            return mlap_fail(fault, MLAP_code_IN_USE, "buffer",
                             "plan %" PRIu32 " names buffer %" PRIu32 "; drop it first", plan->id, id);
    }
    if (mlad_ordered_names(session, buffer))
        return mlap_fail(fault, MLAP_code_IN_USE, "buffer", "a step has its flags in buffer %" PRIu32 "; drop it first",
                         id);
    mlad_idmap_take(&session->buffers, id);
    mlad_buffer_retire(buffer, message->header.sequence); /* answered by session.c once it is unmapped */
    return MLAP_code_OK;
}

static enum mlap_code on_plan(struct mlad_session *session, struct mlad_message *message, struct mlap_fault *fault)
{
    const struct mlap_plan *request = &message->body->plan_;
    if (mlad_idmap_get(&session->plans, request->plan))
        return mlap_fail(fault, MLAP_code_EXISTS, "plan", "plan %" PRIu32 " exists; drop it or choose another id",
                         request->plan);
    enum mlap_code code = mlad_user_take_plan(session->holder.user, fault);
    if (code != MLAP_code_OK)
        return code;
    struct mlad_plan *plan = NULL;
    code = mlad_plan_new(&request->batch, request->plan, &session->buffers, &session->sessions->capabilities, &plan,
                         fault);
    if (code == MLAP_code_OK && !mlad_idmap_put(&session->plans, request->plan, plan)) {
        mlad_plan_unref(plan);
        code = mlap_fail(fault, MLAP_code_MEMORY, "", "no memory to note another plan; drop others first");
    }
    if (code != MLAP_code_OK) {
        mlad_user_give_plan(session->holder.user);
        return code;
    }
    answer_ok(session, message->header.sequence);
    return MLAP_code_OK;
}

static enum mlap_code on_drop(struct mlad_session *session, struct mlad_message *message, struct mlap_fault *fault)
{
    uint32_t id = message->body->drop_.plan;
    struct mlad_plan *plan = mlad_idmap_take(&session->plans, id);
    if (!plan)
        return mlap_fail(fault, MLAP_code_NOT_FOUND, "plan", "this session has no plan %" PRIu32, id);
    mlad_user_give_plan(session->holder.user);
    mlad_plan_unref(plan);
    answer_ok(session, message->header.sequence);
    return MLAP_code_OK;
}

static enum mlap_code submit(struct mlad_session *session, uint32_t sequence, struct mlad_plan *plan, uint64_t received,
                             struct mlap_fault *fault)
{
    enum mlap_code code =
        mlad_scheduler_submit(session->sessions->scheduler, &session->queue, plan, sequence, received, fault);
    if (code == MLAP_code_BUSY)
        session->sessions->stats->busy++;
    return code;
}

enum mlap_code mlad_session_submit(struct mlad_session *session, uint32_t sequence, uint32_t id, uint64_t received,
                                   struct mlap_fault *fault)
{
    struct mlad_plan *plan = mlad_idmap_get(&session->plans, id);
    if (!plan)
        return mlap_fail(fault, MLAP_code_NOT_FOUND, "plan", "this session has no plan %" PRIu32, id);
    return submit(session, sequence, plan, received, fault);
}

static enum mlap_code on_submit(struct mlad_session *session, struct mlad_message *message, struct mlap_fault *fault)
{
    return mlad_session_submit(session, message->header.sequence, message->body->submit_.plan, message->received,
                               fault);
}

static enum mlap_code on_decode(struct mlad_session *session, struct mlad_message *message, struct mlap_fault *fault)
{
    struct mlad_plan *plan;
    enum mlap_code code = mlad_plan_new(&message->body->decode_.batch, 0, &session->buffers,
                                        &session->sessions->capabilities, &plan, fault);
    if (code != MLAP_code_OK)
        return code;
    code = submit(session, message->header.sequence, plan, message->received, fault);
    mlad_plan_unref(plan); /* the decode has its own reference */
    return code;
}

static enum mlap_code on_step(struct mlad_session *session, struct mlad_message *message, struct mlap_fault *fault)
{
    enum mlap_code code = mlad_ordered_step(session, &message->body->step_, fault);
    if (code == MLAP_code_OK)
        answer_ok(session, message->header.sequence);
    return code;
}

static enum mlap_code on_step_drop(struct mlad_session *session, struct mlad_message *message, struct mlap_fault *fault)
{
    enum mlap_code code = mlad_ordered_drop(session, message->body->step_drop_.step, fault);
    if (code == MLAP_code_OK)
        answer_ok(session, message->header.sequence);
    return code;
}

static enum mlap_code on_arm(struct mlad_session *session, struct mlad_message *message, struct mlap_fault *fault)
{
    return mlad_ordered_arm(session, &message->body->arm_, message->header.sequence, message->received, fault);
}

static handler *find_handler(uint32_t type)
{
    switch (type) {
    case MLAP_REGISTER: return on_register;
    case MLAP_IMPORT: return on_import;
    case MLAP_IMPORT_VMM: return on_import_vmm;
    case MLAP_UNREGISTER: return on_unregister;
    case MLAP_PLAN: return on_plan;
    case MLAP_DROP: return on_drop;
    case MLAP_DECODE: return on_decode;
    case MLAP_SUBMIT: return on_submit;
    case MLAP_STEP: return on_step;
    case MLAP_STEP_DROP: return on_step_drop;
    case MLAP_ARM: return on_arm;
    default: return NULL;
    }
}

static enum mlap_code dispatch(struct mlad_session *session, struct mlad_message *message, struct mlap_fault *fault)
{
    uint32_t type = message->header.type;
    handler *handle = find_handler(type);
    if (!handle && mlap_type_from(type) == MLAP_FROM_CLIENT)
        return mlap_fail(fault, MLAP_code_STATE, "", "%s is not for a session that works on a device; %s",
                         mlap_type_name(type),
                         type == MLAP_HELLO ? "it was greeted already" : "connect with a HELLO that names none");
    if (!handle)
        return mlap_fail(fault, MLAP_code_UNKNOWN_TYPE, "", "%s is never sent by a client", mlap_type_name(type));
    if (!mlap_fds_fit(type, message->n_fds))
        return mlap_fail(fault, MLAP_code_FDS, "fd", "%s carries %s%d file descriptors, but %u came with it",
                         mlap_type_name(type), mlap_type_fds(type) > 1 ? "1 to " : "", mlap_type_fds(type),
                         message->n_fds);
    return handle(session, message, fault);
}

/* After these the sender's idea of the protocol is not ours: nothing it says later can be trusted to mean what we read.
 * Without a sequence there is nothing to answer to. */
static bool ends_session(const struct mlad_message *message)
{
    return message->fault.code == MLAP_code_MALFORMED || message->fault.code == MLAP_code_VERSION ||
           message->header.sequence == 0;
}

void mlad_session_receive(struct mlad_session *session, struct mlad_message *message)
{
    struct mlap_fault *fault = &message->fault;
    if (fault->code == MLAP_code_OK && message->header.type == MLAP_KNOCK && session->rings.mapping &&
        message->n_fds == 0)
        return; /* it has woken the loop, which looks at the rings next */
    mlad_rings_catch_up(session);
    if (session->draining)
        return;
    if (fault->code == MLAP_code_OK && message->header.sequence == 0)
        mlap_fail(fault, MLAP_code_MALFORMED, "sequence", "a request's sequence must not be 0, which stands for none");
    if (fault->code == MLAP_code_OK && dispatch(session, message, fault) == MLAP_code_OK)
        return;
    if (fault->code == MLAP_code_DEVICE_LOST) { /* found at a registration, which then is the next worker's to answer */
        struct mlad_scheduler *scheduler = session->sessions->scheduler;
        scheduler->lost(scheduler, fault->message);
    }
    mlad_session_refuse(session, message->header.sequence, fault);
    if (ends_session(message))
        mlad_session_drop(session, fault);
}

void mlad_session_complete(struct mlad_session *session, const struct mlap_completion *completion,
                           const struct mlap_failure *failures, uint32_t n_failures)
{
    if (completion->failed == 0 && mlad_rings_complete(session, completion))
        return;
    static struct mlap_done done; /* large, and only the loop thread's */
    done.receive_ns = completion->receive_ns;
    done.queue_ns = completion->queue_ns;
    done.kernel_ns = completion->kernel_ns;
    done.kv_tokens = completion->kv_tokens;
    done.failed = completion->failed;
    done.n_failures = n_failures;
    if (n_failures)
        memcpy(done.failures, failures, n_failures * sizeof *done.failures);
    mlad_link_send(&session->link, MLAP_DONE, completion->sequence, &done);
}

void mlad_session_answer(struct mlad_session *session, const struct mlad_decode *decode, const struct mlap_fault *fault)
{
    if (fault) {
        mlad_session_refuse(session, decode->sequence, fault);
        return;
    }
    session->decodes++;
    session->kv_tokens += decode->kv_tokens;
    const struct mlap_completion completion = {
        .sequence = decode->sequence,
        .receive_ns = decode->queued - decode->received,
        .queue_ns = decode->launched - decode->queued,
        .kernel_ns = decode->completed - decode->launched,
        .kv_tokens = decode->kv_tokens,
        .failed = decode->failed,
    };
    mlad_session_complete(session, &completion, decode->failures, decode->n_failures);
}
