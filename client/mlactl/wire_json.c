/* wire_json.c - one printer for each message, expanded from its field list. */
#include "wire_json.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

void wire_json_add(cJSON *object, const char *name, uint64_t value)
{
    char digits[24];
    snprintf(digits, sizeof digits, "%llu", (unsigned long long)value);
    cJSON_AddRawToObject(object, name, digits);
}

#define ADD_BOOL(name, sub) cJSON_AddBoolToObject(object, #name, from->name);
#define ADD_U32(name, sub) wire_json_add(object, #name, from->name);
#define ADD_U64(name, sub) wire_json_add(object, #name, from->name);
#define ADD_F64(name, sub) cJSON_AddNumberToObject(object, #name, from->name);
#define ADD_STR(name, sub) cJSON_AddStringToObject(object, #name, from->name);
#define ADD_ENUM(name, sub) cJSON_AddStringToObject(object, #name, mlap_##sub##_text(from->name));
#define ADD_LIST(name, sub) \
    do { \
        cJSON *list = cJSON_AddArrayToObject(object, #name); \
        for (uint32_t i = 0; i < from->n_##name; i++) \
            cJSON_AddItemToArray(list, wire_json_##sub(&from->name[i])); \
    } while (0);
#define ADD_FIELD(M, KIND, name, sub, min, max, NEED, doc) \
    if (MLAP_NEED_IS_##NEED || mlap_has(from, M, name)) { ADD_##KIND(name, sub) }
#define MLAP_NEED_IS_REQ 1
#define MLAP_NEED_IS_OPT 0

#define DEFINE(SCOPE, M) \
    SCOPE cJSON *wire_json_##M(const struct mlap_##M *from) { \
        cJSON *object = cJSON_CreateObject(); \
        MLAP_FIELDS_##M(ADD_FIELD, M) \
        return object; \
    }

DEFINE(static, latency)
DEFINE(, device)
DEFINE(, session)
DEFINE(, capability)
DEFINE(, status_reply)
DEFINE(, health_reply)

static double number(const cJSON *object, const char *name)
{
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(object, name);
    return item && item->valuestring ? strtod(item->valuestring, NULL) : NAN;
}

double wire_json_per_launch(const struct mlap_device *now, const struct mlap_device *then, const char *what)
{
    cJSON *to = wire_json_device(now), *from = wire_json_device(then);
    double launches = number(to, "launches") - number(from, "launches"), grown = number(to, what) - number(from, what);
    cJSON_Delete(to);
    cJSON_Delete(from);
    return launches > 0 ? grown / launches : NAN;
}
