/* health.c - `mlactl health`: one line, one exit code: 0 ok, 1 degraded, 2 failed, 3 not running, 4 timed out.
 *
 * The daemon judges itself (HEALTH). --deep trusts nothing: it decodes a batch whose answer is known in closed form on
 * every device but the reference. The batch: key j carries e(j) = j % 3 + (j & 1), head h asks for h times that, and
 * softmax_scale is ln 2, so that a key weighs 2^(h e(j)): O and LSE are ratios and logarithms of whole numbers. Two
 * requests of two query tokens, causal, over shuffled pages. */
#include "admin.h"
#include "output.h"
#include "progress.h"
#include "run.h"
#include "wire_json.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

/* ---- the known batch ---- */

enum { REQUESTS = 2, HEADS = 3, Q_LEN = 2, PAGE = 16, PAGES = 9, MAX_PAGES = 6, D = 576, V = 512 };
static const int32_t lengths[REQUESTS] = {5, 70};
static const int32_t table[REQUESTS][MAX_PAGES] = {{4, -1, -1, -1, -1, -1}, {8, 0, 6, 2, 7, -1}};

/* The bf16 of a number that has one: its upper half as fp32. */
static uint16_t bf16(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (uint16_t)(bits >> 16);
}

static float from_bf16(uint16_t half)
{
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static double key_latent(int j, int d) { return d == 0 ? j & 1 : (j + d) % 7 - 3; }

static struct capture *known_batch(void)
{
    struct capture *capture = capture_new();
    if (!capture)
        return NULL;
    mla_batch *batch = &capture->batch;
    batch->batch = REQUESTS, batch->heads = HEADS, batch->q_rows = REQUESTS * Q_LEN;
    batch->pages = PAGES, batch->page_size = PAGE, batch->max_pages = MAX_PAGES;
    batch->softmax_scale = M_LN2;
    uint16_t *q = capture_add(capture, CAPTURE_Q), *kv = capture_add(capture, CAPTURE_KV);
    void *block_table = capture_add(capture, CAPTURE_BLOCK_TABLE), *seqlens = capture_add(capture, CAPTURE_SEQLENS);
    if (!q || !kv || !block_table || !seqlens) {
        capture_free(capture);
        return NULL;
    }
    memcpy(block_table, table, sizeof table);
    memcpy(seqlens, lengths, sizeof lengths);
    memset(kv, 0xff, PAGES * PAGE * D * sizeof *kv); /* NaN wherever no key is */
    for (int row = 0; row < REQUESTS * Q_LEN; row++)
        for (int h = 0; h < HEADS; h++) {
            uint16_t *to = q + (row * HEADS + h) * D;
            to[0] = to[V] = bf16((float)h);
        }
    for (int b = 0; b < REQUESTS; b++)
        for (int j = 0; j < lengths[b]; j++) {
            uint16_t *to = kv + (table[b][j / PAGE] * PAGE + j % PAGE) * D;
            memset(to, 0, D * sizeof *to);
            for (int d = 0; d < V; d++)
                to[d] = bf16((float)key_latent(j, d));
            to[V] = bf16((float)(j % 3));
        }
    return capture;
}

/* Compare with the closed form; 0, or -1 with what differs. */
static int check_known(const struct run *run, struct ctl_fault *fault)
{
    const uint16_t *out = run->out;
    for (int row = 0; row < REQUESTS * Q_LEN; row++) {
        int b = row / Q_LEN, bound = lengths[b] - (Q_LEN - 1) + row % Q_LEN;
        for (int h = 0; h < HEADS; h++) {
            double sum = 0, weighted[V] = {0};
            for (int j = 0; j < bound; j++) {
                double weight = exp2(h * (j % 3 + (j & 1)));
                sum += weight;
                for (int d = 0; d < V; d++)
                    weighted[d] += weight * key_latent(j, d);
            }
            double lse = run->lse[row * HEADS + h], right = log(sum);
            if (!(fabs(lse - right) <= 2e-5 * fmax(fabs(right), 1)))
                return ctl_fail(fault, "wrong answer: lse[%d][%d] is %g, must be %g", row, h, lse, right);
            for (int d = 0; d < V; d++) {
                double value = from_bf16(out[(row * HEADS + h) * V + d]), must = weighted[d] / sum;
                if (!(fabs(value - must) <= fabs(must) / 128 + 1e-3))
                    return ctl_fail(fault, "wrong answer: out[%d][%d][%d] is %g, must be %g", row, h, d, value, must);
            }
        }
    }
    return 0;
}

/* Decode it on one device: CTL_OK, CTL_PARTLY (failed) or CTL_TIMED_OUT. */
static int decode_known(const struct ctl *ctl, const struct admin *admin, const char *device, uint64_t *kernel_ns,
                        struct ctl_fault *fault)
{
    client_auto mla_client *client = NULL;
    capture_auto struct capture *capture = known_batch();
    run_auto struct run *run = NULL;
    mla_options options;
    mla_options_init(&options);
    options.socket = ctl->socket;
    options.device = device;
    options.name = "mlactl health";
    options.reconnect_ms = admin_left_ms(admin);
    mla_error error = {.code = MLA_MEMORY, .message = "out of memory"};
    mla_result result;
    progress("decoding a known batch on %s", device);
    if (!capture || mla_connect(&client, &options, &error) != MLA_OK ||
        run_new(client, capture, &(struct run_layout){0}, &run, &error) ||
        run_decode(run, admin_left_ms(admin), &result, &error) != MLA_OK) {
        ctl_fail(fault, "%s", error.message);
        return error.code == MLA_TIMEOUT || error.code == MLA_NOT_CONNECTED || error.code == MLA_UNAVAILABLE
                   ? CTL_TIMED_OUT
                   : CTL_PARTLY;
    }
    *kernel_ns = result.kernel_ns;
    if (check_known(run, fault))
        return CTL_PARTLY;
    if (!run_surroundings_intact(run)) {
        ctl_fail(fault, "it wrote outside out and lse");
        return CTL_PARTLY;
    }
    return CTL_OK;
}

/* ---- the verdict ---- */

struct verdict {
    int code;
    char reason[768];
    cJSON *deep;    /* an array, NULL without --deep */
};

/* The oracle is slow and nobody's production device: it is asked only where there is no other. */
static bool is_spared(const struct mlap_status_reply *status, const struct mlap_device *device)
{
    return strcmp(device->name, "reference") == 0 && status->n_devices > 1;
}

static void check_deep(const struct ctl *ctl, const struct admin *admin, const struct mlap_status_reply *status,
                       struct verdict *verdict)
{
    verdict->deep = cJSON_CreateArray();
    for (unsigned i = 0; i < status->n_devices; i++) {
        const struct mlap_device *device = &status->devices[i];
        if (is_spared(status, device))
            continue;
        struct ctl_fault fault = {""};
        uint64_t kernel_ns = 0;
        /* A device that drains takes no decode; HEALTH has said so. */
        bool skip = device->state == MLAP_device_state_DRAINING || device->state == MLAP_device_state_ABSENT;
        int code = skip ? CTL_OK : decode_known(ctl, admin, device->name, &kernel_ns, &fault);
        cJSON *entry = cJSON_CreateObject();
        cJSON_AddStringToObject(entry, "device", device->name);
        cJSON_AddStringToObject(entry, "result",
                                skip                    ? "skipped"
                                : code == CTL_OK        ? "ok"
                                : code == CTL_TIMED_OUT ? "timed out"
                                                        : "failed");
        cJSON_AddStringToObject(entry, "reason", skip ? mlap_device_state_text(device->state) : fault.text);
        wire_json_add(entry, "kernel_ns", kernel_ns);
        cJSON_AddItemToArray(verdict->deep, entry);
        if (code > verdict->code) {
            verdict->code = code;
            snprintf(verdict->reason, sizeof verdict->reason, "%s: %s", device->name, fault.text);
        }
    }
}

static void judge(const struct ctl *ctl, struct verdict *verdict)
{
    admin_auto struct admin *admin = NULL;
    ctl_autofree struct mlap_status_reply *status = NULL;
    struct ctl_fault fault;
    const union mlap_body *reply;
    progress("asking %.100s", ctl->socket);
    verdict->code = admin_new(ctl, &admin, &fault);
    if (!verdict->code)
        verdict->code = admin_ask(admin, MLAP_HEALTH, &(struct mlap_health){0}, MLAP_HEALTH_REPLY, &reply, &fault);
    if (verdict->code) {
        if (verdict->code == CTL_FAILED)
            verdict->code = CTL_PARTLY; /* a daemon that refuses or garbles HEALTH has failed */
        snprintf(verdict->reason, sizeof verdict->reason, "%s", fault.text);
        return;
    }
    verdict->code = (int)reply->health_reply_.health;
    snprintf(verdict->reason, sizeof verdict->reason, "%s", reply->health_reply_.reason);
    if (!ctl_value(ctl, "--deep"))
        return;
    int code = admin_status(admin, &status, &fault);
    if (code == CTL_OK) {
        check_deep(ctl, admin, status, verdict);
    } else {
        verdict->code = code == CTL_TIMED_OUT ? CTL_TIMED_OUT : CTL_PARTLY;
        snprintf(verdict->reason, sizeof verdict->reason, "%s", fault.text);
    }
}

int ctl_health(const struct ctl *ctl)
{
    _Static_assert((int)MLAP_health_state_OK == 0 && (int)MLAP_health_state_DEGRADED == 1 &&
                       (int)MLAP_health_state_FAILED == 2,
                   "health states are exit codes");
    static const char *const words[] = {"ok", "degraded", "failed", "not running", "timed out"};
    static const enum output_style styles[] = {GOOD, WARN, BAD, BAD, BAD};
    struct verdict verdict = {0};
    judge(ctl, &verdict);
    progress_stop();
    if (ctl->json) {
        cJSON *root = cJSON_CreateObject();
        cJSON_AddStringToObject(root, "health", words[verdict.code]);
        cJSON_AddStringToObject(root, "reason", verdict.reason);
        cJSON_AddNumberToObject(root, "exit", verdict.code);
        if (verdict.deep)
            cJSON_AddItemToObject(root, "deep", verdict.deep);
        output_json(root);
        return verdict.code;
    }
    output_print(styles[verdict.code], "%s", words[verdict.code]);
    if (*verdict.reason)
        printf(": %s", verdict.reason);
    else if (verdict.deep)
        printf(": %d device%s decoded a known batch", cJSON_GetArraySize(verdict.deep),
               cJSON_GetArraySize(verdict.deep) == 1 ? "" : "s");
    putchar('\n');
    cJSON_Delete(verdict.deep);
    return verdict.code;
}
