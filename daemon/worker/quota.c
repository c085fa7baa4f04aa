/* quota.c - see quota.h. Few users are connected at a time, so their records are a list. */
#include "quota.h"

#include <inttypes.h>
#include <stdlib.h>

enum mlap_code mlad_quota_enter(struct mlad_quota *quota, uint32_t uid, struct mlad_user **user,
                                struct mlap_fault *fault)
{
    struct mlad_user *found = quota->users;
    while (found && found->uid != uid)
        found = found->next;
    if ((found ? found->sessions : 0) >= quota->limits.max_sessions)
        return mlap_fail(fault, MLAP_code_QUOTA, "",
                         "user %" PRIu32 " has %" PRIu32 " sessions on this device and may have %" PRIu32
                         ": close one or raise max_sessions",
                         uid, found ? found->sessions : 0, quota->limits.max_sessions);
    if (!found) {
        found = calloc(1, sizeof *found);
        if (!found)
            return mlap_fail(fault, MLAP_code_MEMORY, "", "no memory for another user's record; try again");
        *found = (struct mlad_user){.next = quota->users, .limits = &quota->limits, .uid = uid};
        quota->users = found;
    }
    found->sessions++;
    *user = found;
    return MLAP_code_OK;
}

void mlad_quota_leave(struct mlad_quota *quota, struct mlad_user *user)
{
    if (--user->sessions > 0)
        return;
    struct mlad_user **at = &quota->users;
    while (*at != user)
        at = &(*at)->next;
    *at = user->next;
    free(user);
}

enum mlap_code mlad_user_take_buffer(struct mlad_user *user, uint64_t held, uint64_t bytes, struct mlap_fault *fault)
{
    const struct mlad_limits *limits = user->limits;
    if (user->buffers >= limits->max_buffers)
        return mlap_fail(fault, MLAP_code_QUOTA, "buffer",
                         "user %" PRIu32 " has %" PRIu32 " buffers on this device and may have %" PRIu32
                         ": unregister one or raise max_buffers",
                         user->uid, user->buffers, limits->max_buffers);
    /* what is held may exceed a limit that was lowered since */
    if (user->bytes > limits->max_bytes || bytes > limits->max_bytes - user->bytes)
        return mlap_fail(fault, MLAP_code_QUOTA, "bytes",
                         "user %" PRIu32 " has %" PRIu64 " bytes registered on this device and may have %" PRIu64
                         ", this buffer needs %" PRIu64 ": unregister one or raise max_bytes",
                         user->uid, user->bytes, limits->max_bytes, bytes);
    if (held > limits->max_bytes_per_session || bytes > limits->max_bytes_per_session - held)
        return mlap_fail(fault, MLAP_code_QUOTA, "bytes",
                         "this session has %" PRIu64 " bytes registered and may have %" PRIu64
                         ", this buffer needs %" PRIu64 ": unregister one or raise max_bytes_per_session",
                         held, limits->max_bytes_per_session, bytes);
    user->buffers++;
    user->bytes += bytes;
    return MLAP_code_OK;
}

enum mlap_code mlad_user_take_plan(struct mlad_user *user, struct mlap_fault *fault)
{
    if (user->plans >= user->limits->max_plans)
        return mlap_fail(fault, MLAP_code_QUOTA, "plan",
                         "user %" PRIu32 " has %" PRIu32 " plans on this device and may have %" PRIu32
                         ": drop one or raise max_plans",
                         user->uid, user->plans, user->limits->max_plans);
    user->plans++;
    return MLAP_code_OK;
}

enum mlap_code mlad_user_take_decode(struct mlad_user *user, uint32_t in_flight, struct mlap_fault *fault)
{
    if (user->in_flight >= user->limits->max_in_flight)
        return mlap_fail(fault, MLAP_code_BUSY, "",
                         "user %" PRIu32 " has %" PRIu32 " decodes in flight on this device and may have %" PRIu32
                         ": wait for a completion or raise max_in_flight",
                         user->uid, user->in_flight, user->limits->max_in_flight);
    if (in_flight >= user->limits->max_in_flight_per_session)
        return mlap_fail(fault, MLAP_code_BUSY, "",
                         "this session has %" PRIu32 " decodes in flight and may have %" PRIu32
                         ": wait for a completion or raise max_in_flight_per_session",
                         in_flight, user->limits->max_in_flight_per_session);
    user->in_flight++;
    return MLAP_code_OK;
}

void mlad_user_give_buffer(struct mlad_user *user, uint64_t bytes)
{
    user->buffers--;
    user->bytes -= bytes;
}

void mlad_user_give_plan(struct mlad_user *user)
{
    user->plans--;
}

void mlad_user_give_decode(struct mlad_user *user)
{
    user->in_flight--;
}
