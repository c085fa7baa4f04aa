/* admin.c - see admin.h.
 *
 * STATUS and HEALTH ask every worker and wait a second for the slowest; a worker that does not answer is reported with
 * its last figures. SESSIONS goes on asking until its page is full. DRAIN waits for as long as work is in flight. */
#include "admin.h"

#include "log.h"

#include <stdlib.h>
#include <string.h>

enum { ANSWER_LIMIT_MS = 1000, EVICT_LIMIT_MS = 5000, REQUESTS_A_PEER = 4, RECENT_MS = 60000 };

/* A request between its message and its answer. */
struct mlad_request {
    struct mlad_request *next; /* of its peer's */
    struct mlad_supervisor *supervisor;
    struct mlad_peer *peer; /* NULL: it has gone */
    uint32_t sequence;
    enum mlap_type type;
    struct mlad_device *device; /* the one asked; NULL: all */
    uint32_t waiting;           /* devices still to answer */
    struct question {
        struct mlad_request *request;
        bool answered;
    } questions[MLAD_CONFIG_DEVICES];
    struct mlap_sessions_reply *sessions; /* SESSIONS: collected so far */
};

/* ---- requests ---- */

static struct mlad_request *request_new(struct mlad_peer *peer, const struct mlap_header *header,
                                        struct mlad_device *device)
{
    struct mlad_request *request = NULL;
    if (peer->n_requests >= REQUESTS_A_PEER) {
        mlad_peer_refuse(peer, header->sequence, MLAP_code_BUSY, "",
                         "four requests of this session wait; collect an answer first");
        return NULL;
    }
    request = calloc(1, sizeof *request);
    if (!request) {
        mlad_peer_refuse(peer, header->sequence, MLAP_code_MEMORY, "", "the daemon has no memory for the request");
        return NULL;
    }
    request->supervisor = peer->supervisor;
    request->peer = peer;
    request->sequence = header->sequence;
    request->type = header->type;
    request->device = device;
    request->next = peer->requests;
    peer->requests = request;
    peer->n_requests++;
    return request;
}

/* Send the answer, if there is still somebody to read it, and forget the request. */
static void request_answer(struct mlad_request *request, enum mlap_type type, const void *body)
{
    struct mlad_peer *peer = request->peer;
    if (peer) {
        struct mlad_request **at = &peer->requests;
        while (*at != request)
            at = &(*at)->next;
        *at = request->next;
        peer->n_requests--;
        mlad_peer_send(peer, type, request->sequence, body);
    }
    free(request->sessions);
    free(request);
}

static void request_fail(struct mlad_request *request, enum mlap_code code, const char *field, const char *message)
{
    struct mlap_error error = {.code = code};
    snprintf(error.field, sizeof error.field, "%s", field);
    snprintf(error.message, sizeof error.message, "%s", message);
    request_answer(request, MLAP_ERROR, &error);
}

/* No answer came from the request's device. */
static void request_unanswered(struct mlad_request *request)
{
    const struct mlad_device *device = request->device;
    char why[400];
    if (mlad_device_is_ready(device)) {
        snprintf(why, sizeof why, "the worker of %s did not answer in time; see `mlactl health`", device->name);
        request_fail(request, MLAP_code_TIMEOUT, "device", why);
    } else {
        snprintf(why, sizeof why, "the device %s has no worker now: %s", device->name, device->reason);
        request_fail(request, MLAP_code_UNAVAILABLE, "device", why);
    }
}

void mlad_admin_forget(struct mlad_peer *peer)
{
    for (struct mlad_request *request = peer->requests; request; request = request->next)
        request->peer = NULL;
    peer->requests = NULL;
    peer->n_requests = 0;
}

/* ---- STATUS and HEALTH: every device ---- */

static void answer_status(struct mlad_request *request)
{
    static struct mlap_status_reply reply; /* large; one thread */
    struct mlad_supervisor *supervisor = request->supervisor;
    reply = (struct mlap_status_reply){
        .daemon = MLAD_NAME,
        .pid = (uint32_t)uv_os_getpid(),
        .uptime_ms = uv_now(&supervisor->loop) - supervisor->started_at,
        .connections = supervisor->n_peers,
        .denied = supervisor->denied,
        .n_devices = supervisor->n_devices,
    };
    if (supervisor->note[0]) {
        mlap_set(&reply, status_reply, note);
        snprintf(reply.note, sizeof reply.note, "%s", supervisor->note);
    }
    for (uint32_t i = 0; i < supervisor->n_devices; i++) {
        mlad_device_describe(supervisor->devices[i], &reply.devices[i]);
        reply.devices[i].responding = request->questions[i].answered;
    }
    request_answer(request, MLAP_STATUS_REPLY, &reply);
}

/* What is wrong with a device, as part of a sentence; empty if nothing is. */
static void find_fault(const struct mlad_device *device, bool answered, char *to, size_t size)
{
    struct mlap_device shown;
    uint64_t since_end = uv_now(device->loop) - device->ended_at;
    mlad_device_describe(device, &shown);
    to[0] = '\0';
    if (device->state != MLAP_device_state_READY)
        snprintf(to, size, "%s is %s: %s", device->name, mlap_device_state_text(device->state), shown.reason);
    else if (!answered)
        snprintf(to, size, "%s does not answer", device->name);
    else if (device->ended_at && since_end < RECENT_MS)
        snprintf(to, size, "%s was restarted %llu s ago: %s", device->name, (unsigned long long)since_end / 1000,
                 device->end_reason);
}

static void answer_health(struct mlad_request *request)
{
    struct mlap_health_reply reply = {.health = MLAP_health_state_FAILED};
    struct mlad_supervisor *supervisor = request->supervisor;
    size_t n = 0;
    for (uint32_t i = 0; i < supervisor->n_devices; i++) {
        char fault[400];
        if (mlad_device_is_ready(supervisor->devices[i]))
            reply.health = MLAP_health_state_DEGRADED;
        find_fault(supervisor->devices[i], request->questions[i].answered, fault, sizeof fault);
        if (fault[0] && n < sizeof reply.reason)
            n += (size_t)snprintf(reply.reason + n, sizeof reply.reason - n, "%s%s", n ? "; " : "", fault);
    }
    if (n == 0)
        reply.health = MLAP_health_state_OK;
    request_answer(request, MLAP_HEALTH_REPLY, &reply);
}

static void on_report(void *context, const struct mlap_header *header, const union mlap_body *body)
{
    struct question *question = context;
    struct mlad_request *request = question->request;
    (void)body; /* the device kept its figures */
    question->answered = header && header->type == MLAP_REPORT;
    if (--request->waiting > 0)
        return;
    if (request->type == MLAP_STATUS)
        answer_status(request);
    else
        answer_health(request);
}

static void ask_all(struct mlad_peer *peer, const struct mlap_header *header)
{
    static const struct mlap_query query;
    struct mlad_request *request = request_new(peer, header, NULL);
    struct mlad_supervisor *supervisor = peer->supervisor;
    if (!request)
        return;
    /* Set before the first question: an answer that there is none comes at once. */
    uint32_t n = request->waiting = supervisor->n_devices;
    for (uint32_t i = 0; i < n; i++) {
        request->questions[i].request = request;
        mlad_device_ask(supervisor->devices[i], MLAP_QUERY, &query, ANSWER_LIMIT_MS, on_report, &request->questions[i]);
    }
}

/* ---- SESSIONS ---- */

static void on_sessions(void *context, const struct mlap_header *header, const union mlap_body *body);

static void ask_sessions(struct mlad_request *request, uint64_t after)
{
    struct mlap_sessions sessions = {.after = after};
    mlap_set(&sessions, sessions, after);
    snprintf(sessions.device, sizeof sessions.device, "%s", request->device->name);
    mlad_device_ask(request->device, MLAP_SESSIONS, &sessions, ANSWER_LIMIT_MS, on_sessions, request);
}

/* Add what the asker may see; users see their own. False when the page is full. */
static bool collect(struct mlad_request *request, const struct mlap_sessions_reply *from)
{
    const struct mlad_identity *identity = &request->peer->identity;
    struct mlap_sessions_reply *page = request->sessions;
    bool admin = mlad_policy_is_admin(&request->supervisor->config, identity);
    for (uint32_t i = 0; i < from->n_sessions; i++) {
        if (!admin && from->sessions[i].uid != identity->uid)
            continue;
        if (page->n_sessions == MLAP_MAX_SESSIONS_LISTED)
            return false;
        page->sessions[page->n_sessions++] = from->sessions[i];
    }
    return true;
}

static void on_sessions(void *context, const struct mlap_header *header, const union mlap_body *body)
{
    struct mlad_request *request = context;
    if (header && header->type == MLAP_ERROR)
        request_answer(request, MLAP_ERROR, body);
    else if (!header || header->type != MLAP_SESSIONS_REPLY)
        request_unanswered(request);
    else if (!request->peer)
        request_answer(request, MLAP_SESSIONS_REPLY, NULL);
    else {
        const struct mlap_sessions_reply *from = &body->sessions_reply_;
        request->sessions->more = !collect(request, from);
        if (!request->sessions->more && from->more && from->n_sessions > 0)
            ask_sessions(request, from->sessions[from->n_sessions - 1].session);
        else
            request_answer(request, MLAP_SESSIONS_REPLY, request->sessions);
    }
}

static void serve_sessions(struct mlad_peer *peer, const struct mlap_header *header,
                           const struct mlap_sessions *sessions, struct mlad_device *device)
{
    struct mlad_request *request = request_new(peer, header, device);
    if (!request)
        return;
    request->sessions = calloc(1, sizeof *request->sessions);
    if (!request->sessions) {
        request_fail(request, MLAP_code_MEMORY, "", "the daemon has no memory for the list");
        return;
    }
    snprintf(request->sessions->device, sizeof request->sessions->device, "%s", device->name);
    ask_sessions(request, sessions->after);
}

/* ---- the rest ---- */

static void serve_capabilities(struct mlad_peer *peer, uint32_t sequence, const struct mlad_device *device)
{
    static struct mlap_capabilities_reply reply; /* large; one thread */
    char why[400];
    if (!device->capabilities.n_capabilities) {
        snprintf(why, sizeof why, "the device %s has not been ready yet: %s", device->name, device->reason);
        mlad_peer_refuse(peer, sequence, MLAP_code_UNAVAILABLE, "device", why);
        return;
    }
    reply = (struct mlap_capabilities_reply){.n_rows = device->capabilities.n_capabilities};
    snprintf(reply.device, sizeof reply.device, "%s", device->name);
    memcpy(reply.rows, device->capabilities.capabilities, reply.n_rows * sizeof reply.rows[0]);
    mlad_peer_send(peer, MLAP_CAPABILITIES_REPLY, sequence, &reply);
}

static void on_drained(void *context, const struct mlap_header *header, const union mlap_body *body)
{
    const struct mlad_request *request = context;
    if (header && header->type == MLAP_ERROR)
        request_answer(context, MLAP_ERROR, body);
    else if (!header && mlad_device_is_ready(request->device)) /* it could not be asked */
        request_unanswered(context);
    else /* or no worker is left, and nothing in flight with it */
        request_answer(context, MLAP_OK, &(struct mlap_ok){0});
}

static void on_evicted(void *context, const struct mlap_header *header, const union mlap_body *body)
{
    if (header)
        request_answer(context, header->type, body);
    else
        request_unanswered(context);
}

static void serve_operator(struct mlad_peer *peer, const struct mlap_header *header, const union mlap_body *body,
                           struct mlad_device *device)
{
    const char *what = header->type == MLAP_EVICT ? "evict" : body->drain_.resume ? "resume" : "drain";
    char why[200];
    if (!mlad_policy_is_admin(&peer->supervisor->config, &peer->identity)) {
        snprintf(why, sizeof why, "user %u may not %s; an operator can list the user in admin_users of mlad.conf",
                 peer->identity.uid, what);
        mlad_peer_refuse(peer, header->sequence, MLAP_code_DENIED, "", why);
        return;
    }
    struct mlad_request *request = request_new(peer, header, device);
    if (!request)
        return;
    mlad_log(LOG_NOTICE, "an operator acts", MLAD_KV("what", what), MLAD_KV("device", device->name),
             MLAD_KV("uid", peer->identity.uid),
             MLAD_KV("session", header->type == MLAP_EVICT ? body->evict_.session : 0));
    if (header->type == MLAP_DRAIN)
        mlad_device_drain(device, body->drain_.resume, on_drained, request);
    else
        mlad_device_ask(device, MLAP_EVICT, &body->evict_, EVICT_LIMIT_MS, on_evicted, request);
}

/* The device that the message names; NULL after refusing it. */
static struct mlad_device *named_device(struct mlad_peer *peer, uint32_t sequence, const char *name)
{
    struct mlad_device *device = mlad_supervisor_device(peer->supervisor, name);
    char why[160];
    if (!device) {
        snprintf(why, sizeof why, "no device '%s' is served here; STATUS lists those that are", name);
        mlad_peer_refuse(peer, sequence, MLAP_code_NO_DEVICE, "device", why);
    }
    return device;
}

void mlad_admin_serve(struct mlad_peer *peer, const struct mlap_header *header, const union mlap_body *body)
{
    struct mlad_device *device;
    switch (header->type) {
    case MLAP_STATUS:
    case MLAP_HEALTH:
        ask_all(peer, header);
        break;
    case MLAP_CAPABILITIES:
        if ((device = named_device(peer, header->sequence, body->capabilities_.device)))
            serve_capabilities(peer, header->sequence, device);
        break;
    case MLAP_SESSIONS:
        if ((device = named_device(peer, header->sequence, body->sessions_.device)))
            serve_sessions(peer, header, &body->sessions_, device);
        break;
    case MLAP_DRAIN:
        if ((device = named_device(peer, header->sequence, body->drain_.device)))
            serve_operator(peer, header, body, device);
        break;
    case MLAP_EVICT:
        if ((device = named_device(peer, header->sequence, body->evict_.device)))
            serve_operator(peer, header, body, device);
        break;
    default:
        mlad_peer_refuse(peer, header->sequence, MLAP_code_STATE, "",
                         "this session has no device; name one in HELLO to register buffers and decode");
    }
}
