/* session.c - see session.h: how sessions begin and end, and what is told about them. */
#include "session.h"

#include "log.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* ---- the end ---- */

/* Close a draining session's socket once nothing of it runs or is mapped; the session is freed in a later turn of the
 * loop. */
void mlad_session_settle(struct mlad_session *session)
{
    if (session->draining && session->queue.in_flight == 0 && session->holder.buffers == 0 &&
        mlad_ordered_idle(session))
        mlad_link_close(&session->link);
}

static void on_link_closed(struct mlad_link *link)
{
    struct mlad_session *session = (struct mlad_session *)link;
    mlad_log_provoked(LOG_INFO, "session freed", MLAD_KV("session", session->id), MLAD_KV("decodes", session->decodes));
    TAILQ_REMOVE(&session->sessions->all, session, entry);
    mlad_quota_leave(session->sessions->quota, session->holder.user);
    free(session);
}

void mlad_session_end(struct mlad_session *session, const char *why)
{
    mlad_log_provoked(LOG_INFO, "session ended", MLAD_KV("session", session->id), MLAD_KV("why", why));
    mlad_link_shutdown(&session->link);
    mlad_rings_close(session);
    session->draining = true;
    mlad_ordered_end(session);
    uint32_t position = 0;
    struct mlad_plan *plan;
    while ((plan = mlad_idmap_next(&session->plans, &position))) {
        mlad_user_give_plan(session->holder.user);
        mlad_plan_unref(plan);
    }
    mlad_idmap_deinit(&session->plans);
    struct mlad_buffer *buffer;
    position = 0;
    while ((buffer = mlad_idmap_next(&session->buffers, &position)))
        mlad_buffer_unref(buffer);
    mlad_idmap_deinit(&session->buffers);
    mlad_scheduler_cancel(session->sessions->scheduler, &session->queue);
    mlad_session_settle(session);
}

void mlad_session_drop(struct mlad_session *session, const struct mlap_fault *fault)
{
    session->sessions->stats->dropped++;
    mlad_log_provoked(LOG_WARNING, "session dropped", MLAD_KV("session", session->id), MLAD_KV("uid", session->uid),
             MLAD_KV("client", session->client), MLAD_KV("why", fault->message));
    mlad_session_end(session, "it broke the protocol");
}

static void on_link_ended(struct mlad_link *link, const char *why)
{
    struct mlad_session *session = (struct mlad_session *)link;
    if (link->flooded)
        session->sessions->stats->dropped++;
    mlad_session_end(session, why);
}

/* ---- what happens to it ---- */

static void on_received(struct mlad_link *link, struct mlad_message *message)
{
    mlad_session_receive((struct mlad_session *)link, message);
}

static void on_unmapped(struct mlad_holder *holder, uint32_t answer)
{
    struct mlad_session *session = (struct mlad_session *)((char *)holder - offsetof(struct mlad_session, holder));
    if (answer)
        mlad_link_send(&session->link, MLAP_OK, answer, &(struct mlap_ok){0});
    mlad_session_settle(session);
}

static void on_decode_ended(struct mlad_queue *queue, const struct mlad_decode *decode, const struct mlap_fault *fault)
{
    struct mlad_session *session = (struct mlad_session *)((char *)queue - offsetof(struct mlad_session, queue));
    if (decode)
        mlad_session_answer(session, decode, fault);
    mlad_session_settle(session);
}

void mlad_session_refuse(struct mlad_session *session, uint32_t sequence, const struct mlap_fault *fault)
{
    struct mlap_error error = {.code = fault->code};
    memcpy(error.field, fault->field, sizeof error.field);
    memcpy(error.message, fault->message, sizeof error.message);
    session->sessions->stats->refused++;
    mlad_link_send(&session->link, MLAP_ERROR, sequence, &error);
}
_Static_assert(sizeof((struct mlap_error *)0)->field == sizeof((struct mlap_fault *)0)->field, "copied whole");
_Static_assert(sizeof((struct mlap_error *)0)->message == sizeof((struct mlap_fault *)0)->message, "copied whole");

/* ---- the beginning ---- */

/* Refuse a connection that did not become a session. */
static void turn_away(struct mlad_sessions *sessions, const struct mlap_attach *attach, int fd,
                      const struct mlap_fault *fault)
{
    struct mlap_error error = {.code = fault->code};
    memcpy(error.field, fault->field, sizeof error.field);
    memcpy(error.message, fault->message, sizeof error.message);
    sessions->stats->refused++;
    mlad_log_provoked(LOG_INFO, "session refused", MLAD_KV("session", attach->session), MLAD_KV("uid", attach->uid),
             MLAD_KV("why", fault->message));
    mlap_send_message(fd, MLAP_ERROR, attach->hello_seq, &error, -1, MSG_DONTWAIT);
    close(fd);
}

static void welcome(struct mlad_session *session, uint32_t sequence, const struct mlap_hello *hello)
{
    bool wanted = mlap_has(hello, hello, features) && (hello->features & MLAP_FEATURE_RINGS);
    const struct mlad_limits *limits = session->holder.user->limits;
    struct mlap_welcome welcome = {
        .daemon = "mlad " MLAD_VERSION_TEXT,
        .session = session->id,
        .features = wanted && mlad_rings_offer(session) ? MLAP_FEATURE_RINGS : 0,
        .max_message = MLAP_MAX_MESSAGE,
        .max_buffers = limits->max_buffers,
        .max_bytes = mlad_session_most_bytes(limits),
        .max_plans = limits->max_plans,
        .max_in_flight = mlad_session_most_in_flight(limits),
    };
    strncpy(welcome.device, session->sessions->device, sizeof welcome.device - 1);
    if (session->sessions->place.mps[0]) {
        memcpy(welcome.mps, session->sessions->place.mps, sizeof welcome.mps);
        mlap_set(&welcome, welcome, mps);
    }
    mlad_link_send(&session->link, MLAP_WELCOME, sequence, &welcome);
}

_Static_assert(sizeof((struct mlap_hello *)0)->gpu == MLAP_GPU && sizeof((struct mlap_hello *)0)->mps == MLAP_MPS &&
                   sizeof((struct mlap_welcome *)0)->mps == MLAP_MPS &&
                   sizeof((struct mlap_session *)0)->why == MLAP_WHY, "places go by the wire as they are");

static void enlist(struct mlad_sessions *sessions, struct mlad_session *session)
{
    struct mlad_session *before = TAILQ_LAST(&sessions->all, mlad_session_list);
    while (before && before->id > session->id)
        before = TAILQ_PREV(before, mlad_session_list, entry);
    if (before)
        TAILQ_INSERT_AFTER(&sessions->all, before, session, entry);
    else
        TAILQ_INSERT_HEAD(&sessions->all, session, entry);
}

void mlad_session_open(struct mlad_sessions *sessions, const struct mlap_attach *attach, int fd)
{
    struct mlap_fault fault;
    struct mlad_user *user;
    if (mlad_quota_enter(sessions->quota, attach->uid, &user, &fault) != MLAP_code_OK) {
        turn_away(sessions, attach, fd, &fault);
        return;
    }
    struct mlad_session *session = calloc(1, sizeof *session);
    if (session) {
        session->link.received = on_received;
        session->link.ended = on_link_ended;
        session->link.closed = on_link_closed;
    }
    if (!session || mlad_link_open(&session->link, sessions->loop, fd) != 0) {
        mlap_fail(&fault, MLAP_code_MEMORY, "", "no memory for another session; try again");
        free(session);
        mlad_quota_leave(sessions->quota, user);
        turn_away(sessions, attach, fd, &fault);
        return;
    }
    session->sessions = sessions;
    session->id = attach->session;
    session->uid = attach->uid;
    session->pid = attach->pid;
    memcpy(session->client, attach->hello.client, sizeof session->client);
    memcpy(session->place.gpu, attach->hello.gpu, sizeof session->place.gpu); /* absent: empty */
    memcpy(session->place.mps, attach->hello.mps, sizeof session->place.mps);
    session->opened = mlad_now_ns();
    session->holder = (struct mlad_holder){.user = user,
                                           .loop = sessions->loop,
                                           .backend = sessions->scheduler->backend,
                                           .device = sessions->scheduler->device,
                                           .name = sessions->device,
                                           .unmapped = on_unmapped};
    bool high = mlap_has(&attach->hello, hello, priority) && attach->hello.priority == MLAP_priority_HIGH;
    mlad_queue_init(&session->queue, user, high ? MLAD_HIGH : MLAD_NORMAL, on_decode_ended);
    mlad_ordered_init(session);
    enlist(sessions, session);
    mlad_log_provoked(LOG_INFO, "session opened", MLAD_KV("session", session->id), MLAD_KV("uid", session->uid),
             MLAD_KV("pid", session->pid), MLAD_KV("client", session->client));
    welcome(session, attach->hello_seq, &attach->hello);
}

/* ---- what is told ---- */

struct mlad_session *mlad_session_find(struct mlad_sessions *sessions, uint64_t id)
{
    struct mlad_session *session;
    TAILQ_FOREACH(session, &sessions->all, entry) {
        if (session->id == id && !session->draining)
            return session;
    }
    return NULL;
}

void mlad_sessions_deafen(struct mlad_sessions *sessions)
{
    struct mlad_session *session;
    TAILQ_FOREACH(session, &sessions->all, entry)
        mlad_link_deafen(&session->link);
}

void mlad_sessions_hang_up(struct mlad_sessions *sessions)
{
    struct mlad_session *session;
    TAILQ_FOREACH(session, &sessions->all, entry) {
        if (!session->draining)
            mlad_link_shutdown(&session->link);
    }
}

void mlad_sessions_list(const struct mlad_sessions *sessions, uint64_t after, struct mlap_sessions_reply *reply)
{
    uint64_t now = mlad_now_ns();
    const struct mlad_session *session;
    reply->present = 0;
    reply->n_sessions = 0;
    reply->more = false;
    strncpy(reply->device, sessions->device, sizeof reply->device);
    reply->device[sizeof reply->device - 1] = '\0';
    TAILQ_FOREACH(session, &sessions->all, entry) {
        if (session->id <= after)
            continue;
        if (reply->n_sessions == MLAP_MAX_SESSIONS_LISTED) {
            reply->more = true;
            break;
        }
        struct mlap_session *entry = &reply->sessions[reply->n_sessions++];
        *entry = (struct mlap_session){
            .session = session->id,
            .uid = session->uid,
            .pid = session->pid,
            .age_ms = (now - session->opened) / 1000000,
            .draining = session->draining,
            .buffers = session->holder.buffers,
            .bytes = session->holder.bytes,
            .plans = session->plans.count,
            .in_flight = session->queue.in_flight,
            .decodes = session->decodes,
            .kv_tokens = session->kv_tokens,
            .rings = session->rings.mapping,
            .order = session->order,
        };
        memcpy(entry->client, session->client, sizeof entry->client);
        entry->placement = mlap_placement_of(&sessions->place, &session->place, entry->why);
    }
}

void mlad_sessions_report(const struct mlad_sessions *sessions, struct mlap_device *device)
{
    const struct mlad_session *session;
    uint64_t draining_bytes = 0;
    TAILQ_FOREACH(session, &sessions->all, entry) {
        if (session->draining) {
            device->sessions_draining++;
            draining_bytes += session->holder.bytes;
        } else {
            device->sessions++;
            device->held_bytes += session->holder.bytes;
        }
        device->buffers += session->holder.buffers;
        device->plans += session->plans.count;
    }
    device->orphaned_bytes = mlad_buffer_mapped_bytes() - device->held_bytes - draining_bytes;
}
