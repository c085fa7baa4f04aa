/* decode.c - `mlactl decode`: a capture file through a device into a result file. */
#include "output.h"
#include "progress.h"
#include "run.h"
#include "wire_json.h"

#include <stdio.h>
#include <string.h>
#include <time.h>

static void report_json(const mla_result *result, double wall_ns, double kv_bytes, const char *device,
                        const char *output)
{
    cJSON *root = cJSON_CreateObject();
    cJSON_AddStringToObject(root, "output", output);
    cJSON_AddStringToObject(root, "device", device);
    cJSON_AddNumberToObject(root, "wall_ns", wall_ns);
    wire_json_add(root, "receive_ns", result->receive_ns);
    wire_json_add(root, "queue_ns", result->queue_ns);
    wire_json_add(root, "kernel_ns", result->kernel_ns);
    wire_json_add(root, "kv_tokens", result->kv_tokens);
    cJSON_AddNumberToObject(root, "kv_gb_per_s", kv_bytes / wall_ns);
    wire_json_add(root, "replays", result->replays);
    wire_json_add(root, "failed", result->failed);
    cJSON *failures = cJSON_AddArrayToObject(root, "failures");
    for (uint32_t i = 0; i < result->listed; i++) {
        cJSON *failure = cJSON_CreateObject();
        cJSON_AddNumberToObject(failure, "request", result->failures[i].request);
        cJSON_AddStringToObject(failure, "field", result->failures[i].field);
        cJSON_AddStringToObject(failure, "message", result->failures[i].message);
        cJSON_AddItemToArray(failures, failure);
    }
    output_json(root);
}

static void report_text(const mla_batch *batch, const mla_result *result, double wall_ns, double kv_bytes,
                        const char *device, const char *output)
{
    printf("%s: %u requests, %llu query tokens, %u heads, %s KV tokens on %s\n", output, batch->batch,
           (unsigned long long)batch->q_rows, batch->heads, human_count(result->kv_tokens).s, device);
    printf("%s (kernel %s, queue %s, receive %s), KV %.2f GB/s\n", human_ns(wall_ns).s,
           human_ns((double)result->kernel_ns).s, human_ns((double)result->queue_ns).s,
           human_ns((double)result->receive_ns).s, kv_bytes / wall_ns);
    if (result->replays)
        printf("submitted again %u times after the worker died\n", result->replays);
    if (!result->failed)
        return;
    output_print(BAD, "%u of %u requests failed; their rows are unspecified, the others are complete\n", result->failed,
                 batch->batch);
    for (uint32_t i = 0; i < result->listed; i++)
        printf("  request %u: %s: %s\n", result->failures[i].request, result->failures[i].field,
               result->failures[i].message);
    if (result->listed < result->failed)
        printf("  and %u more\n", result->failed - result->listed);
}

static int error_of(const struct ctl *ctl, const char *path, const mla_error *error)
{
    return ctl_error(ctl, run_exit_code(error->code), "%s: %s (%s%s%s)", path, error->message,
                     mla_status_text(error->code), *error->field ? ", " : "", error->field);
}

int ctl_decode(const struct ctl *ctl)
{
    const char *path = ctl->arguments[0], *output = ctl_value(ctl, "--output");
    if (!output || !*output)
        return ctl_error(ctl, CTL_USAGE, "decode: name the result file with -o OUT.safetensors");
    capture_auto struct capture *capture = NULL;
    struct ctl_fault fault;
    if (capture_open(path, &capture, &fault))
        return ctl_error(ctl, CTL_FAILED, "%s: %s", path, fault.text);

    client_auto mla_client *client = NULL;
    int code = run_connect(ctl, ctl_value(ctl, "--device"), &client);
    if (code)
        return code;
    run_auto struct run *run = NULL;
    mla_error error;
    progress("reading %.100s", path);
    if (run_new(client, capture, &(struct run_layout){0}, &run, &error))
        return error_of(ctl, path, &error);

    progress("decoding on %s", mla_device(client));
    struct timespec from, to;
    mla_result result = {0};
    clock_gettime(CLOCK_MONOTONIC, &from);
    mla_status status = run_decode(run, ctl->timeout_ms, &result, &error);
    clock_gettime(CLOCK_MONOTONIC, &to);
    double wall_ns = (double)(to.tv_sec - from.tv_sec) * 1e9 + (double)(to.tv_nsec - from.tv_nsec);
    if (status != MLA_OK && status != MLA_REQUESTS)
        return error_of(ctl, path, &error);

    progress("writing %.100s", output);
    if (capture_write_result(&run->batch, run->out, run->lse, output, &fault))
        return ctl_error(ctl, CTL_FAILED, "%s", fault.text);
    progress_stop();
    double kv_bytes = (double)result.kv_tokens * capture_row_bytes(&run->batch);
    if (ctl->json)
        report_json(&result, wall_ns, kv_bytes, mla_device(client), output);
    else
        report_text(&run->batch, &result, wall_ns, kv_bytes, mla_device(client), output);
    return run_exit_code(status);
}
