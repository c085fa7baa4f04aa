/* metrics.c - `mlactl metrics`: STATUS as OpenMetrics text, or the same families as JSON.
 *
 * Each family is one entry of a list; a device's families take their value from struct mlap_device. */
#include "admin.h"
#include "output.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

/* Where families go: text on stdout, or a JSON array. */
struct sink {
    cJSON *families;    /* NULL: text */
    cJSON *samples;     /* of the family being written */
};

static void family(struct sink *sink, const char *name, const char *type, const char *unit, const char *help)
{
    if (sink->families) {
        cJSON *object = cJSON_CreateObject();
        cJSON_AddStringToObject(object, "name", name);
        cJSON_AddStringToObject(object, "type", type);
        cJSON_AddStringToObject(object, "unit", unit);
        cJSON_AddStringToObject(object, "help", help);
        sink->samples = cJSON_AddArrayToObject(object, "samples");
        cJSON_AddItemToArray(sink->families, object);
        return;
    }
    printf("# TYPE %s %s\n", name, type);
    if (*unit)
        printf("# UNIT %s %s\n", name, unit);
    printf("# HELP %s %s\n", name, help);
}

struct label { const char *name, *value; };

/* `value` is already a number as text. */
static void sample(struct sink *sink, const char *name, const struct label *labels, unsigned count, const char *value)
{
    if (sink->families) {
        cJSON *object = cJSON_CreateObject(), *pairs = cJSON_CreateObject();
        cJSON_AddStringToObject(object, "name", name);
        for (unsigned i = 0; i < count; i++)
            cJSON_AddStringToObject(pairs, labels[i].name, labels[i].value);
        cJSON_AddItemToObject(object, "labels", pairs);
        cJSON_AddRawToObject(object, "value", value);
        cJSON_AddItemToArray(sink->samples, object);
        return;
    }
    printf("%s", name);
    for (unsigned i = 0; i < count; i++) {
        printf("%s%s=\"", i ? "," : "{", labels[i].name);
        for (const char *at = labels[i].value; *at; at++) {
            if (*at == '\\' || *at == '"')
                putchar('\\');
            if (*at == '\n')
                fputs("\\n", stdout);
            else
                putchar(*at);
        }
        putchar('"');
    }
    printf("%s %s\n", count ? "}" : "", value);
}

struct number { char s[40]; };
static struct number whole(uint64_t value)
{
    struct number text;
    snprintf(text.s, sizeof text.s, "%" PRIu64, value);
    return text;
}
/* Nanoseconds (or milliseconds) as seconds, every digit kept. */
static struct number seconds(uint64_t value, uint64_t per_second)
{
    struct number text;
    snprintf(text.s, sizeof text.s, "%" PRIu64 ".%0*" PRIu64, value / per_second, per_second == 1000 ? 3 : 9,
             value % per_second);
    return text;
}

/* X(name, type, sample suffix, unit, help, number) */
#define DEVICE_FAMILIES(X)                                                                                             \
    X("mlad_device_responding", "gauge", "", "", "Whether the worker answered this query in time",                     \
      whole(d->responding))                                                                                            \
    X("mlad_device_threads", "gauge", "", "", "Compute threads of the worker", whole(d->threads))                      \
    X("mlad_device_uptime_seconds", "gauge", "", "seconds", "Time since the worker became ready",                      \
      seconds(d->uptime_ms, 1000))                                                                                     \
    X("mlad_worker_restarts", "counter", "_total", "", "Times the worker was started again", whole(d->restarts))       \
    X("mlad_sessions", "gauge", "", "", "Open sessions", whole(d->sessions))                                           \
    X("mlad_sessions_draining", "gauge", "", "", "Closed sessions that wait for a launch to end",                      \
      whole(d->sessions_draining))                                                                                     \
    X("mlad_buffers", "gauge", "", "", "Registered buffers", whole(d->buffers))                                        \
    X("mlad_plans", "gauge", "", "", "Plans", whole(d->plans))                                                         \
    X("mlad_held_bytes", "gauge", "", "bytes", "Bytes mapped for open sessions", whole(d->held_bytes))                 \
    X("mlad_orphaned_bytes", "gauge", "", "bytes", "Bytes mapped that belong to no session", whole(d->orphaned_bytes)) \
    X("mlad_decodes_queued", "gauge", "", "", "Decodes waiting", whole(d->queued))                                     \
    X("mlad_decodes_running", "gauge", "", "", "Decodes running", whole(d->running))                                   \
    X("mlad_queue_limit", "gauge", "", "", "Decodes that may wait", whole(d->queue_limit))                             \
    X("mlad_progress", "counter", "_total", "", "Work items done by the backend", whole(d->progress))                  \
    X("mlad_decodes", "counter", "_total", "", "Decodes completed", whole(d->decodes))                                 \
    X("mlad_decodes_failed", "counter", "_total", "", "Decodes that ended in an error wholly or in part",              \
      whole(d->decodes_failed))                                                                                        \
    X("mlad_messages_refused", "counter", "_total", "", "Messages answered with an error", whole(d->refused))          \
    X("mlad_decodes_busy", "counter", "_total", "", "Decodes answered with busy", whole(d->busy))                      \
    X("mlad_sessions_dropped", "counter", "_total", "", "Sessions dropped for misbehaviour", whole(d->dropped))        \
    X("mlad_kv_tokens", "counter", "_total", "", "KV tokens of completed decodes", whole(d->kv_tokens))                \
    X("mlad_kv_bytes", "counter", "_total", "bytes", "KV bytes of completed decodes", whole(d->kv_bytes))

static void device_families(struct sink *sink, const struct mlap_status_reply *status)
{
#define FAMILY(title, type, suffix, unit, help, number) \
    family(sink, title, type, unit, help); \
    for (unsigned i = 0; i < status->n_devices; i++) { \
        const struct mlap_device *d = &status->devices[i]; \
        sample(sink, title suffix, &(struct label){"device", d->name}, 1, number.s); \
    }
    DEVICE_FAMILIES(FAMILY)
#undef FAMILY
}

static void state_family(struct sink *sink, const struct mlap_status_reply *status)
{
    family(sink, "mlad_device_state", "stateset", "", "What the device is doing");
    for (unsigned i = 0; i < status->n_devices; i++)
        for (int state = 0; state < MLAP_device_state_COUNT; state++) {
            const struct label labels[] = {
                {"device", status->devices[i].name},
                {"mlad_device_state", mlap_device_state_text((enum mlap_device_state)state)}};
            sample(sink, "mlad_device_state", labels, 2, (int)status->devices[i].state == state ? "1" : "0");
        }
}

static void latency_families(struct sink *sink, const struct mlap_status_reply *status)
{
    family(sink, "mlad_decode_phase_seconds", "summary", "seconds", "Latency of decodes by phase");
    for (unsigned i = 0; i < status->n_devices; i++)
        for (unsigned j = 0; j < status->devices[i].n_latency; j++) {
            const struct mlap_latency *l = &status->devices[i].latency[j];
            struct label labels[] = {
                {"device", status->devices[i].name}, {"phase", mlap_phase_text(l->phase)}, {"quantile", "0.5"}};
            sample(sink, "mlad_decode_phase_seconds", labels, 3, seconds(l->p50_ns, 1000000000).s);
            labels[2].value = "0.9";
            sample(sink, "mlad_decode_phase_seconds", labels, 3, seconds(l->p90_ns, 1000000000).s);
            labels[2].value = "0.99";
            sample(sink, "mlad_decode_phase_seconds", labels, 3, seconds(l->p99_ns, 1000000000).s);
            sample(sink, "mlad_decode_phase_seconds_sum", labels, 2, seconds(l->sum_ns, 1000000000).s);
            sample(sink, "mlad_decode_phase_seconds_count", labels, 2, whole(l->count).s);
        }
    family(sink, "mlad_decode_phase_max_seconds", "gauge", "seconds", "Longest decode by phase");
    for (unsigned i = 0; i < status->n_devices; i++)
        for (unsigned j = 0; j < status->devices[i].n_latency; j++) {
            const struct mlap_latency *l = &status->devices[i].latency[j];
            const struct label labels[] = {{"device", status->devices[i].name}, {"phase", mlap_phase_text(l->phase)}};
            sample(sink, "mlad_decode_phase_max_seconds", labels, 2, seconds(l->max_ns, 1000000000).s);
        }
}

int ctl_metrics(const struct ctl *ctl)
{
    admin_auto struct admin *admin = NULL;
    ctl_autofree struct mlap_status_reply *status = NULL;
    struct ctl_fault fault;
    int code = admin_new(ctl, &admin, &fault);
    if (!code)
        code = admin_status(admin, &status, &fault);
    if (code)
        return ctl_error(ctl, code, "%s", fault.text);

    struct sink sink = {.families = ctl->json ? cJSON_CreateArray() : NULL};
    family(&sink, "mlad", "info", "", "The daemon");
    sample(&sink, "mlad_info", &(struct label){"version", status->daemon}, 1, "1");
    family(&sink, "mlad_uptime_seconds", "gauge", "seconds", "Time since the supervisor started");
    sample(&sink, "mlad_uptime_seconds", NULL, 0, seconds(status->uptime_ms, 1000).s);
    family(&sink, "mlad_supervisor_connections", "gauge", "", "Connections that the supervisor itself holds");
    sample(&sink, "mlad_supervisor_connections", NULL, 0, whole(status->connections).s);
    family(&sink, "mlad_connections_denied", "counter", "", "Connections refused by policy");
    sample(&sink, "mlad_connections_denied_total", NULL, 0, whole(status->denied).s);
    state_family(&sink, status);
    device_families(&sink, status);
    latency_families(&sink, status);
    if (sink.families)
        output_json(sink.families);
    else
        puts("# EOF");
    return CTL_OK;
}
