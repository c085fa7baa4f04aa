/* status.c - `mlactl status`: one page about the daemon. */
#include "admin.h"
#include "output.h"
#include "wire_json.h"

#include <stdio.h>
#include <string.h>

struct view {
    const struct ctl *ctl;
    struct admin *admin;
    const struct mlap_status_reply *status;
    const char *only;   /* a device's name, or NULL */
};

static bool shown(const struct view *view, const struct mlap_device *device)
{
    return !view->only || strcmp(view->only, device->name) == 0;
}

static enum output_style state_style(enum mlap_device_state state)
{
    switch (state) {
    case MLAP_device_state_READY: return GOOD;
    case MLAP_device_state_ABSENT: return BAD;
    default: return WARN;
    }
}

/* ---- sections, as text ---- */

static void print_devices(const struct view *view)
{
    struct table *table =
        table_new("DEVICE|STATE|VARIANT|>THREADS|>PID|>RESTARTS|UPTIME|>SESSIONS|>BUFFERS|>HELD|>ORPHANED");
    for (unsigned i = 0; i < view->status->n_devices; i++) {
        const struct mlap_device *d = &view->status->devices[i];
        if (!shown(view, d))
            continue;
        table_cell(table, BOLD, "%s", d->name);
        if (d->responding || d->pid == 0)
            table_cell(table, state_style(d->state), "%s", mlap_device_state_text(d->state));
        else
            table_cell(table, BAD, "%s, silent", mlap_device_state_text(d->state));
        table_cell(table, PLAIN, "%s", *d->variant ? d->variant : "-");
        table_cell(table, PLAIN, "%u", d->threads);
        table_cell(table, PLAIN, "%u", d->pid);
        table_cell(table, d->restarts ? WARN : PLAIN, "%u", d->restarts);
        table_cell(table, PLAIN, "%s", human_age(d->uptime_ms).s);
        if (d->sessions_draining)
            table_cell(table, PLAIN, "%u + %u ending", d->sessions, d->sessions_draining);
        else
            table_cell(table, PLAIN, "%u", d->sessions);
        table_cell(table, PLAIN, "%u", d->buffers);
        table_cell(table, PLAIN, "%s", human_bytes((double)d->held_bytes).s);
        table_cell(table, d->orphaned_bytes ? BAD : PLAIN, "%s", human_bytes((double)d->orphaned_bytes).s);
    }
    table_print(table);
    for (unsigned i = 0; i < view->status->n_devices; i++) {
        const struct mlap_device *d = &view->status->devices[i];
        if (shown(view, d) && *d->reason)
            output_print(state_style(d->state), "  %s: %s\n", d->name, d->reason);
        if (shown(view, d) && mlap_has(d, device, mps))
            printf("  %s: under the MPS of %s\n", d->name, d->mps);
    }
}

static void print_work(const struct view *view)
{
    struct table *table =
        table_new("WORK|>QUEUED|>RUNNING|>DECODES|>FAILED|>REFUSED|>BUSY|>DROPPED|>KV TOKENS|>KV BYTES");
    for (unsigned i = 0; i < view->status->n_devices; i++) {
        const struct mlap_device *d = &view->status->devices[i];
        if (!shown(view, d))
            continue;
        table_cell(table, BOLD, "%s", d->name);
        table_cell(table, d->queued && d->queued >= d->queue_limit ? WARN : PLAIN, "%u of %u", d->queued,
                   d->queue_limit);
        table_cell(table, PLAIN, "%u", d->running);
        table_cell(table, PLAIN, "%s", human_count(d->decodes).s);
        table_cell(table, PLAIN, "%s", human_count(d->decodes_failed).s);
        table_cell(table, PLAIN, "%s", human_count(d->refused).s);
        table_cell(table, PLAIN, "%s", human_count(d->busy).s);
        table_cell(table, PLAIN, "%s", human_count(d->dropped).s);
        table_cell(table, PLAIN, "%s", human_count(d->kv_tokens).s);
        table_cell(table, PLAIN, "%s", human_bytes((double)d->kv_bytes).s);
    }
    table_print(table);
}

static void print_latency(const struct view *view)
{
    struct table *table = table_new("LATENCY|PHASE|>COUNT|>MEAN|>P50|>P90|>P99|>MAX");
    bool any = false;
    for (unsigned i = 0; i < view->status->n_devices; i++) {
        const struct mlap_device *d = &view->status->devices[i];
        for (unsigned j = 0; shown(view, d) && j < d->n_latency; j++) {
            const struct mlap_latency *l = &d->latency[j];
            if (!l->count)
                continue;
            table_cell(table, BOLD, "%s", any && j ? "" : d->name);
            table_cell(table, PLAIN, "%s", mlap_phase_text(l->phase));
            table_cell(table, PLAIN, "%s", human_count(l->count).s);
            const double values[] = {(double)l->sum_ns / (double)l->count, (double)l->p50_ns, (double)l->p90_ns,
                                     (double)l->p99_ns, (double)l->max_ns};
            for (unsigned k = 0; k < sizeof values / sizeof *values; k++)
                table_cell(table, PLAIN, "%s", human_ns(values[k]).s);
            any = true;
        }
    }
    if (any) {
        putchar('\n');
        table_print(table);
    } else {
        table_free(table);
    }
}

/* ---- what runs where ---- */

static const char all_features[] = "ragged dcp window sink lse_e lse_2 deterministic strided";

static bool same_but_mask(const struct mlap_capability *a, const struct mlap_capability *b)
{
    return strcmp(a->variant, b->variant) == 0 && a->q_dtype == b->q_dtype && a->kv_format == b->kv_format &&
           a->out_dtype == b->out_dtype && a->max_heads == b->max_heads && a->max_q_len == b->max_q_len &&
           a->max_page_size == b->max_page_size && strcmp(a->features, b->features) == 0;
}

static void capability_cells(struct table *table, const char *device, const struct mlap_capability *row,
                             const char *masks)
{
    table_cell(table, BOLD, "%s", device);
    table_cell(table, PLAIN, "%s", mlap_dtype_text(row->q_dtype));
    table_cell(table, PLAIN, "%s", mlap_kv_format_text(row->kv_format));
    table_cell(table, PLAIN, "%s", mlap_dtype_text(row->out_dtype));
    table_cell(table, PLAIN, "%s", masks);
    table_cell(table, PLAIN, "%s", row->variant);
    table_cell(table, PLAIN, "1-%u", row->max_heads);
    table_cell(table, PLAIN, "0-%u", row->max_q_len);
    table_cell(table, PLAIN, "1-%u", row->max_page_size);
    table_cell(table, PLAIN, "%s", strcmp(row->features, all_features) == 0 ? "all" : row->features);
}

/* Rows that differ in the mask alone become one line, unless every row is wanted. */
static void group_capabilities(struct table *table, const struct mlap_capabilities_reply *reply, bool every_row,
                               bool *all)
{
    bool done[MLAP_MAX_CAPABILITIES] = {0};
    const char *device = reply->device;
    for (unsigned i = 0; i < reply->n_rows; i++) {
        if (done[i])
            continue;
        char masks[64] = "";
        for (unsigned j = i; j < reply->n_rows; j++)
            if (j == i || (!every_row && same_but_mask(&reply->rows[i], &reply->rows[j]))) {
                done[j] = true;
                snprintf(masks + strlen(masks), sizeof masks - strlen(masks), "%s%s", *masks ? " " : "",
                         mlap_mask_text(reply->rows[j].mask));
            }
        capability_cells(table, device, &reply->rows[i], masks);
        *all |= strcmp(reply->rows[i].features, all_features) == 0;
        device = "";
    }
}

static int ask_capabilities(const struct view *view, const char *device, const union mlap_body **reply,
                            struct ctl_fault *fault)
{
    struct mlap_capabilities ask = {0};
    snprintf(ask.device, sizeof ask.device, "%s", device);
    return admin_ask(view->admin, MLAP_CAPABILITIES, &ask, MLAP_CAPABILITIES_REPLY, reply, fault);
}

static void print_capabilities(const struct view *view)
{
    struct table *table = table_new("RUNS|Q|KV|OUT|MASKS|VARIANT|H|Q_LEN|PAGE|FEATURES");
    bool all = false, every_row = ctl_value(view->ctl, "--capabilities") != NULL;
    char missing[512] = "";
    for (unsigned i = 0; i < view->status->n_devices; i++) {
        const union mlap_body *reply;
        struct ctl_fault fault;
        const struct mlap_device *d = &view->status->devices[i];
        if (!shown(view, d))
            continue;
        if (ask_capabilities(view, d->name, &reply, &fault) == CTL_OK)
            group_capabilities(table, &reply->capabilities_reply_, every_row, &all);
        else
            snprintf(missing + strlen(missing), sizeof missing - strlen(missing), "  %s: %.200s\n", d->name,
                     fault.text);
    }
    putchar('\n');
    table_print(table);
    if (all)
        output_print(DIM, "  all = %s\n", all_features);
    fputs(missing, stdout);
}

/* ---- sessions ---- */

struct session_view {
    struct table *table;
    cJSON *reasons; /* lines to print below it */
};

static enum output_style placement_style(enum mlap_placement placement)
{
    return placement == MLAP_placement_SHARED_TIMESLICED ? WARN : PLAIN;
}

static void note_reason(struct session_view *view, const struct mlap_session *s)
{
    char line[320];
    if (s->placement == MLAP_placement_HOST)
        return; /* says it all */
    snprintf(line, sizeof line, "  session %llu is %s: %s", (unsigned long long)s->session,
             mlap_placement_text(s->placement), s->why);
    cJSON_AddItemToArray(view->reasons, cJSON_CreateString(line));
}

static void session_cells(void *to, const char *device, const struct mlap_session *s)
{
    struct table *table = ((struct session_view *)to)->table;
    note_reason(to, s);
    table_cell(table, BOLD, "%s", device);
    table_cell(table, PLAIN, "%llu", (unsigned long long)s->session);
    table_cell(table, s->draining ? WARN : PLAIN, "%s%s", printable(s->client).s, s->draining ? " (ending)" : "");
    table_cell(table, PLAIN, "%u", s->uid);
    table_cell(table, PLAIN, "%u", s->pid);
    table_cell(table, PLAIN, "%s", human_age(s->age_ms).s);
    table_cell(table, PLAIN, "%u", s->buffers);
    table_cell(table, PLAIN, "%s", human_bytes((double)s->bytes).s);
    table_cell(table, PLAIN, "%u", s->plans);
    table_cell(table, PLAIN, "%u", s->in_flight);
    table_cell(table, PLAIN, "%s", human_count(s->decodes).s);
    table_cell(table, PLAIN, "%s", human_count(s->kv_tokens).s);
    table_cell(table, placement_style(s->placement), "%s", mlap_placement_text(s->placement));
    table_cell(table, PLAIN, "%s", mlap_order_text(s->order));
}

static void print_sessions(const struct view *view)
{
    struct session_view sessions = {
        table_new("SESSIONS|>ID|CLIENT|>UID|>PID|AGE|>BUFFERS|>BYTES|>PLANS|>IN FLIGHT|>DECODES|>KV TOKENS|PLACEMENT|"
                  "ORDER"),
        cJSON_CreateArray()};
    for (unsigned i = 0; i < view->status->n_devices; i++) {
        struct ctl_fault fault;
        const struct mlap_device *d = &view->status->devices[i];
        if (shown(view, d) && admin_sessions(view->admin, d->name, session_cells, &sessions, &fault))
            output_print(WARN, "  %s: %s\n", d->name, fault.text);
    }
    putchar('\n');
    table_print(sessions.table);
    const cJSON *reason;
    cJSON_ArrayForEach(reason, sessions.reasons)
        puts(reason->valuestring);
    cJSON_Delete(sessions.reasons);
}

/* ---- JSON ---- */

static void session_to_json(void *to, const char *device, const struct mlap_session *session)
{
    (void)device;
    cJSON_AddItemToArray(to, wire_json_session(session));
}

/* STATUS as it came, each device with its "capabilities" and, if asked for, "sessions". */
static void print_json(const struct view *view)
{
    cJSON *root = wire_json_status_reply(view->status);
    cJSON *devices = cJSON_GetObjectItemCaseSensitive(root, "devices");
    for (int i = cJSON_GetArraySize(devices) - 1; i >= 0; i--) {
        const struct mlap_device *d = &view->status->devices[i];
        cJSON *object = cJSON_GetArrayItem(devices, i);
        if (!shown(view, d)) {
            cJSON_DeleteItemFromArray(devices, i);
            continue;
        }
        const union mlap_body *reply;
        struct ctl_fault fault;
        if (ask_capabilities(view, d->name, &reply, &fault) == CTL_OK) {
            cJSON *rows = cJSON_AddArrayToObject(object, "capabilities");
            for (unsigned j = 0; j < reply->capabilities_reply_.n_rows; j++)
                cJSON_AddItemToArray(rows, wire_json_capability(&reply->capabilities_reply_.rows[j]));
        }
        if (ctl_value(view->ctl, "--sessions") &&
            admin_sessions(view->admin, d->name, session_to_json, cJSON_AddArrayToObject(object, "session_list"),
                           &fault))
            cJSON_AddStringToObject(object, "session_error", fault.text);
    }
    output_json(root);
}

int ctl_status(const struct ctl *ctl)
{
    admin_auto struct admin *admin = NULL;
    ctl_autofree struct mlap_status_reply *status = NULL;
    struct ctl_fault fault;
    int code = admin_new(ctl, &admin, &fault);
    if (!code)
        code = admin_status(admin, &status, &fault);
    if (code)
        return ctl_error(ctl, code, "%s", fault.text);
    struct view view = {ctl, admin, status, ctl_value(ctl, "--device")};
    if (view.only && !admin_find(status, view.only))
        return ctl_error(ctl, CTL_FAILED, "no device %s is served here", view.only);
    if (ctl->json) {
        print_json(&view);
        return CTL_OK;
    }
    output_print(BOLD, "%s", status->daemon);
    printf("   pid %u   up %s   %u connection%s to the supervisor   %s denied\n\n", status->pid,
           human_age(status->uptime_ms).s, status->connections, status->connections == 1 ? "" : "s",
           human_count(status->denied).s);
    print_devices(&view);
    if (mlap_has(status, status_reply, note))
        output_print(WARN, "  %s\n", status->note);
    putchar('\n');
    print_work(&view);
    print_latency(&view);
    print_capabilities(&view);
    if (ctl_value(ctl, "--sessions"))
        print_sessions(&view);
    return CTL_OK;
}
