/* verify.c - `mlactl verify`: random batches on a device and on `reference`, both held to the contract's bar.
 *
 * Case i draws from seed + i and takes capability row i modulo the rows, so that a seed and a count repeat a run
 * exactly. */
#include "admin.h"
#include "cases.h"
#include "model.h"
#include "output.h"
#include "progress.h"
#include "run.h"
#include "wire_json.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

enum { MAX_SAVED = 3 };

struct tally { uint64_t cases, requests, failed; double margin_db, lse_share; };

struct verify {
    const struct ctl *ctl;
    mla_client *device, *reference;
    struct mlap_capabilities_reply *table;
    struct tally *tallies;          /* one a row of the table */
    uint64_t seed, cases, seconds, done, failed;
    const char *directory;          /* of saved batches */
    cJSON *failures;
};

/* ---- one case ---- */

/* Errors that say nothing about the batch, and after which no other would fare better. */
static bool ends_the_run(mla_status status)
{
    return status == MLA_NOT_CONNECTED || status == MLA_TIMEOUT || status == MLA_EVICTED || status == MLA_DRAINING ||
           status == MLA_DENIED || status == MLA_STATE || status == MLA_UNAVAILABLE || status == MLA_DEVICE_LOST;
}

/* Decode on one device and judge every request. 0; 1 with what is wrong in `why`; -1 with `why`: it cannot go on. */
static int run_case(struct verify *verify, mla_client *client, const struct capture *capture,
                    const struct run_layout *layout, const struct model *model, struct tally *tally,
                    struct ctl_fault *why)
{
    run_auto struct run *run = NULL;
    mla_error error;
    mla_result result = {0};
    if (run_new(client, capture, layout, &run, &error))
        return ctl_fail(why, "refused: %s (%s)", error.message, error.field), ends_the_run(error.code) ? -1 : 1;
    mla_status status = run_decode(run, verify->ctl->timeout_ms, &result, &error);
    if (status == MLA_REQUESTS)
        return ctl_fail(why, "request %u failed: %s: %s", result.failures[0].request, result.failures[0].field,
                        result.failures[0].message),
               1;
    if (status != MLA_OK)
        return ctl_fail(why, "%s", error.message), ends_the_run(status) ? -1 : 1;
    if (!run_surroundings_intact(run))
        return ctl_fail(why, "wrote outside out and lse"), 1;
    for (uint32_t b = 0; b < capture->batch.batch; b++) {
        struct model_request request = model_request(capture, b);
        struct judgement judgement = model_judge(model, &request, run->out, run->lse);
        if (!judgement.good)
            return ctl_fail(why, "request %u (q_len %u, K %" PRId64 "): %s", b, request.q_len, request.global_len,
                            judgement.why),
                   1;
        if (tally) {
            if (isfinite(judgement.snr_db))
                tally->margin_db = fmin(tally->margin_db, judgement.snr_db - judgement.bar_db);
            tally->lse_share = fmax(tally->lse_share, judgement.lse_share);
        }
    }
    return 0;
}

static void record_failure(struct verify *verify, uint64_t index, const struct capture *capture,
                           const struct run_layout *layout, const char *device, const char *text, const char *why)
{
    ctl_autofree char *path = NULL;
    struct ctl_fault fault = {""};
    bool saved =
        verify->failed < MAX_SAVED &&
        asprintf(&path, "%s/verify-%" PRIu64 "-%" PRIu64 ".safetensors", verify->directory, verify->seed, index) >= 0 &&
        capture_write(capture, path, &fault) == 0;
    verify->failed++;
    progress_stop();
    if (verify->ctl->json) {
        cJSON *entry = cJSON_CreateObject();
        wire_json_add(entry, "case", index);
        cJSON_AddStringToObject(entry, "device", device);
        cJSON_AddStringToObject(entry, "batch", text);
        cJSON_AddStringToObject(entry, "reason", why);
        cJSON_AddStringToObject(entry, "saved", saved ? path : "");
        cJSON_AddItemToArray(verify->failures, entry);
        return;
    }
    output_print(BAD, "case %" PRIu64 " failed on %s: %s\n", index, device, why);
    printf("  %s\n", text);
    if (saved && (layout->row_gap || layout->page_gap || layout->host_scales))
        printf("  saved as %s, with KV packed and scales in tensors\n", path);
    else if (saved)
        printf("  saved as %s: mlactl decode replays it\n", path);
    else if (*fault.text)
        printf("  not saved: %s\n", fault.text);
}

/* 0, or an exit code after complaining. */
static int verify_case(struct verify *verify, uint64_t index)
{
    const struct mlap_capability *row = &verify->table->rows[index % verify->table->n_rows];
    struct tally *tally = &verify->tallies[index % verify->table->n_rows];
    struct run_layout layout;
    char text[200];
    capture_auto struct capture *capture = case_new(verify->seed + index, row, &layout, text);
    struct model *model = capture ? model_new(capture) : NULL;
    if (!model)
        return ctl_error(verify->ctl, CTL_FAILED, "out of memory");
    tally->cases++;
    tally->requests += capture->batch.batch;
    mla_client *const clients[] = {verify->device, verify->reference};
    int code = CTL_OK;
    for (unsigned i = 0; i < 2 && !code; i++) {
        struct ctl_fault why;
        int outcome = run_case(verify, clients[i], capture, &layout, model, i == 0 ? tally : NULL, &why);
        if (outcome < 0)
            code = ctl_error(verify->ctl, CTL_FAILED, "case %" PRIu64 " on %s: %s", index, mla_device(clients[i]),
                             why.text);
        if (outcome <= 0)
            continue;
        record_failure(verify, index, capture, &layout, mla_device(clients[i]), text, why.text);
        tally->failed++;
        break;
    }
    model_free(model);
    return code;
}

/* ---- report ---- */

static void report_row_json(cJSON *rows, const struct mlap_capability *row, const struct tally *tally)
{
    cJSON *entry = wire_json_capability(row);
    wire_json_add(entry, "cases", tally->cases);
    wire_json_add(entry, "requests", tally->requests);
    wire_json_add(entry, "failed", tally->failed);
    if (isfinite(tally->margin_db))
        cJSON_AddNumberToObject(entry, "worst_margin_db", tally->margin_db);
    cJSON_AddNumberToObject(entry, "worst_lse_share", tally->lse_share);
    cJSON_AddItemToArray(rows, entry);
}

static void report_row(struct table *table, const struct mlap_capability *row, const struct tally *tally)
{
    table_cell(table, PLAIN, "%s", mlap_dtype_text(row->q_dtype));
    table_cell(table, PLAIN, "%s", mlap_kv_format_text(row->kv_format));
    table_cell(table, PLAIN, "%s", mlap_dtype_text(row->out_dtype));
    table_cell(table, PLAIN, "%s", mlap_mask_text(row->mask));
    table_cell(table, PLAIN, "%s", row->variant);
    table_cell(table, PLAIN, "%" PRIu64, tally->cases);
    table_cell(table, PLAIN, "%" PRIu64, tally->requests);
    if (isfinite(tally->margin_db))
        table_cell(table, PLAIN, "+%.2f dB", tally->margin_db);
    else
        table_cell(table, PLAIN, "-");
    if (tally->cases)
        table_cell(table, PLAIN, "%.0f%% of the bar", 100 * tally->lse_share);
    else
        table_cell(table, PLAIN, "-");
    if (tally->cases)
        table_cell(table, tally->failed ? BAD : GOOD, "%s", tally->failed ? "FAILED" : "ok");
    else
        table_cell(table, WARN, "not run");
}

static int report(struct verify *verify)
{
    const struct mlap_capabilities_reply *capabilities = verify->table;
    int code = verify->failed ? CTL_FAILED : CTL_OK;
    progress_stop();
    if (verify->ctl->json) {
        cJSON *root = cJSON_CreateObject();
        cJSON_AddStringToObject(root, "device", capabilities->device);
        wire_json_add(root, "seed", verify->seed);
        wire_json_add(root, "cases", verify->done);
        wire_json_add(root, "failed", verify->failed);
        cJSON *rows = cJSON_AddArrayToObject(root, "rows");
        for (uint32_t i = 0; i < capabilities->n_rows; i++)
            report_row_json(rows, &capabilities->rows[i], &verify->tallies[i]);
        cJSON_AddItemToObject(root, "failures", verify->failures);
        verify->failures = NULL;
        output_json(root);
        return code;
    }
    struct table *table = table_new("Q|KV|OUT|MASK|VARIANT|>CASES|>REQUESTS|>ABOVE THE BAR|>LSE ERROR|VERDICT");
    for (uint32_t i = 0; i < capabilities->n_rows; i++)
        report_row(table, &capabilities->rows[i], &verify->tallies[i]);
    table_print(table);
    output_print(code ? BAD : GOOD, "%s", code ? "failed" : "ok");
    printf(": %" PRIu64 " of %" PRIu64 " batches on %s meet the contract's bar; seed %" PRIu64 "\n",
           verify->done - verify->failed, verify->done, capabilities->device, verify->seed);
    return code;
}

/* ---- set-up ---- */

static int load_capabilities(struct verify *verify)
{
    const struct ctl *ctl = verify->ctl;
    admin_auto struct admin *admin = NULL;
    ctl_autofree struct mlap_status_reply *status = NULL;
    struct ctl_fault fault;
    const union mlap_body *reply;
    struct mlap_capabilities ask = {0};
    snprintf(ask.device, sizeof ask.device, "%s", mla_device(verify->device));
    int code = admin_new(ctl, &admin, &fault);
    if (!code)
        code = admin_status(admin, &status, &fault);
    if (!code && strcmp(ask.device, "reference") == 0)
        return ctl_error(ctl, CTL_USAGE, "verify: reference is what others are compared with; name another --device");
    if (!code && !admin_find(status, "reference"))
        return ctl_error(ctl, CTL_FAILED, "device reference is not served; start mlad with --devices %s,reference",
                         ask.device);
    if (!code)
        code = admin_ask(admin, MLAP_CAPABILITIES, &ask, MLAP_CAPABILITIES_REPLY, &reply, &fault);
    if (code)
        return ctl_error(ctl, code, "%s", fault.text);
    if (!reply->capabilities_reply_.n_rows)
        return ctl_error(ctl, CTL_FAILED, "device %s lists no capabilities", ask.device);
    verify->table = malloc(sizeof *verify->table);
    verify->tallies = calloc(reply->capabilities_reply_.n_rows, sizeof *verify->tallies);
    if (!verify->table || !verify->tallies)
        return ctl_error(ctl, CTL_FAILED, "out of memory");
    *verify->table = reply->capabilities_reply_;
    for (uint32_t i = 0; i < verify->table->n_rows; i++)
        verify->tallies[i].margin_db = INFINITY;
    return CTL_OK;
}

static double now_s(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

static int verify_all(struct verify *verify)
{
    const struct ctl *ctl = verify->ctl;
    int code = run_connect(ctl, ctl_value(ctl, "--device"), &verify->device);
    if (!code)
        code = load_capabilities(verify);
    if (!code)
        code = run_connect(ctl, "reference", &verify->reference);
    uint64_t rows = code ? 0 : verify->table->n_rows;
    if (!verify->cases)
        verify->cases = 2 * rows;
    double end = now_s() + (double)verify->seconds;
    for (uint64_t i = 0; !code && (verify->seconds ? i < rows || now_s() < end : i < verify->cases); i++) {
        progress("verifying %s: case %" PRIu64 "%s", mla_device(verify->device), i + 1,
                 verify->failed ? ", some failed" : "");
        code = verify_case(verify, i);
        verify->done += !code;
    }
    return code ? code : report(verify);
}

int ctl_verify(const struct ctl *ctl)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    struct verify verify = {.ctl = ctl, .seed = (uint64_t)now.tv_sec, .directory = ctl_value(ctl, "--save")};
    if (ctl_value(ctl, "--cases") && ctl_value(ctl, "--seconds"))
        return ctl_error(ctl, CTL_USAGE, "verify: give --cases or --seconds, not both");
    if (ctl_number(ctl, "--cases", 1, 1000000000, &verify.cases) ||
        ctl_number(ctl, "--seconds", 1, 1000000, &verify.seconds) ||
        ctl_number(ctl, "--seed", 0, UINT64_MAX, &verify.seed))
        return CTL_USAGE;
    if (!verify.directory)
        verify.directory = ".";
    verify.failures = cJSON_CreateArray();
    int code = verify_all(&verify);
    cJSON_Delete(verify.failures);
    mla_close(verify.device);
    mla_close(verify.reference);
    free(verify.table);
    free(verify.tallies);
    return code;
}
