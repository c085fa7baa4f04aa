/* control.c - `mlactl drain`, `evict` and `version`: one question, one line. */
#include "admin.h"
#include "output.h"
#include "progress.h"

#include <errno.h>
#include <mla.h>
#include <stdio.h>
#include <string.h>

static int done(const struct ctl *ctl, const char *sentence, const char *device)
{
    progress_stop();
    if (ctl->json) {
        cJSON *root = cJSON_CreateObject();
        cJSON_AddStringToObject(root, "device", device);
        cJSON_AddStringToObject(root, "result", sentence);
        output_json(root);
    } else {
        printf("%s: %s\n", device, sentence);
    }
    return CTL_OK;
}

static int named(const struct ctl *ctl, char device[64])
{
    if (strlen(ctl->arguments[0]) > 63 || !*ctl->arguments[0])
        return ctl_error(ctl, CTL_USAGE, "%s: a device's name has 1 to 63 bytes", ctl->command->name);
    strcpy(device, ctl->arguments[0]);
    return CTL_OK;
}

int ctl_drain(const struct ctl *ctl)
{
    struct mlap_drain ask = {.resume = ctl_value(ctl, "--resume") != NULL};
    mlap_set(&ask, drain, resume);
    int code = named(ctl, ask.device);
    if (code)
        return code;
    admin_auto struct admin *admin = NULL;
    struct ctl_fault fault;
    progress("%s %s", ask.resume ? "resuming" : "draining", ask.device);
    code = admin_new(ctl, &admin, &fault);
    if (!code)
        code = admin_ask(admin, MLAP_DRAIN, &ask, MLAP_OK, NULL, &fault);
    if (code)
        return ctl_error(ctl, code, "%s", fault.text);
    return done(ctl, ask.resume ? "serving again" : "drained: nothing is in flight and nothing new is taken",
                ask.device);
}

int ctl_evict(const struct ctl *ctl)
{
    struct mlap_evict ask = {0};
    int code = named(ctl, ask.device);
    if (code)
        return code;
    char *end;
    errno = 0;
    ask.session = strtoull(ctl->arguments[1], &end, 10);
    if (*ctl->arguments[1] < '0' || *ctl->arguments[1] > '9' || *end || errno || !ask.session)
        return ctl_error(ctl, CTL_USAGE, "evict: session %s is no id; `mlactl status --sessions` shows them",
                         ctl->arguments[1]);
    admin_auto struct admin *admin = NULL;
    struct ctl_fault fault;
    progress("evicting session %s", ctl->arguments[1]);
    code = admin_new(ctl, &admin, &fault);
    if (!code)
        code = admin_ask(admin, MLAP_EVICT, &ask, MLAP_OK, NULL, &fault);
    if (code)
        return ctl_error(ctl, code, "%s", fault.text);
    return done(ctl, "session closed", ask.device);
}

int ctl_version(const struct ctl *ctl)
{
    admin_auto struct admin *admin = NULL;
    struct ctl_fault fault;
    int code = admin_new(ctl, &admin, &fault);
    if (ctl->json) {
        cJSON *root = cJSON_CreateObject();
        cJSON_AddStringToObject(root, "mlactl", MLAD_VERSION_TEXT);
        cJSON_AddStringToObject(root, "libmla", mla_version());
        cJSON_AddNumberToObject(root, "protocol", MLAP_VERSION);
        if (code)
            cJSON_AddNullToObject(root, "daemon");
        else
            cJSON_AddStringToObject(root, "daemon", admin_daemon(admin));
        output_json(root);
        return CTL_OK;
    }
    printf("mlactl %s\nlibmla %s\nprotocol %u\n", MLAD_VERSION_TEXT, mla_version(), MLAP_VERSION);
    if (code)
        printf("daemon: %s\n", fault.text);
    else
        printf("daemon: %s\n", admin_daemon(admin));
    return CTL_OK;
}
