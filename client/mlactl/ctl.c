/* ctl.c - the doors of mlactl.h: complaints, and the values of options. */
#include "mlactl.h"
#include "output.h"
#include "progress.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

int ctl_fail(struct ctl_fault *fault, const char *format, ...)
{
    if (fault) {
        va_list list;
        va_start(list, format);
        vsnprintf(fault->text, sizeof fault->text, format, list);
        va_end(list);
    }
    return -1;
}

int ctl_error(const struct ctl *ctl, int code, const char *format, ...)
{
    char text[1024];
    va_list list;
    va_start(list, format);
    vsnprintf(text, sizeof text, format, list);
    va_end(list);
    progress_stop();
    if (ctl->json) {
        cJSON *root = cJSON_CreateObject();
        cJSON_AddStringToObject(root, "error", text);
        cJSON_AddNumberToObject(root, "exit", code);
        output_json(root);
    } else {
        fflush(stdout);
        fprintf(stderr, "mlactl: %s\n", text);
    }
    return code;
}

const char *ctl_value(const struct ctl *ctl, const char *name)
{
    for (unsigned i = 0; ctl->command->options[i].name; i++)
        if (strcmp(ctl->command->options[i].name, name) == 0)
            return ctl->values[i];
    return NULL;
}

int ctl_number(const struct ctl *ctl, const char *name, uint64_t min, uint64_t max, uint64_t *value)
{
    const char *text = ctl_value(ctl, name);
    if (!text)
        return CTL_OK;
    char *end;
    errno = 0;
    unsigned long long number = strtoull(text, &end, 10);
    if (*text < '0' || *text > '9' || *end || errno || number < min || number > max)
        return ctl_error(ctl, CTL_USAGE, "%s %s: give a whole number from %llu to %llu", name, text,
                         (unsigned long long)min, (unsigned long long)max);
    *value = number;
    return CTL_OK;
}
