/* wire_json.h - protocol messages as JSON, field for field under their wire names.
 *
 * Drawn from the lists in mlap_messages.h, so a new field shows up by itself. Absent optional fields are left out. */
#ifndef MLACTL_WIRE_JSON_H
#define MLACTL_WIRE_JSON_H

#include "mlap.h"

#include <cjson/cJSON.h>

cJSON *wire_json_device(const struct mlap_device *device);
cJSON *wire_json_session(const struct mlap_session *session);
cJSON *wire_json_capability(const struct mlap_capability *capability);
cJSON *wire_json_status_reply(const struct mlap_status_reply *status);
cJSON *wire_json_health_reply(const struct mlap_health_reply *health);

/* How much the counter `what` grew for each launch between two states of a worker. Both are read by their names on the
 * wire, because a device need not count them: then it is NaN, as it is where nothing was launched. */
double wire_json_per_launch(const struct mlap_device *now, const struct mlap_device *then, const char *what);

/* Add a 64-bit number with all its digits (a cJSON number is a double). */
void wire_json_add(cJSON *object, const char *name, uint64_t value);

#endif
