/* quota.h - what each user holds on this device, and how much a user, and a session, may.
 *
 * The worker owns one mlad_quota. A user's record exists while the user has a session here, draining ones included, and
 * a session keeps a pointer to it. New limits apply to what is taken from then on; what is held already stays. */
#ifndef MLAD_QUOTA_H
#define MLAD_QUOTA_H

#include "mlap.h"

struct mlad_limits {
    uint32_t max_sessions, max_buffers, max_plans, max_in_flight;
    uint64_t max_bytes;
    uint32_t max_in_flight_per_session;
    uint64_t max_bytes_per_session;
};

/* What a session may hold if its user has nothing else. */
static inline uint64_t mlad_session_most_bytes(const struct mlad_limits *limits)
{
    return limits->max_bytes < limits->max_bytes_per_session ? limits->max_bytes : limits->max_bytes_per_session;
}
static inline uint32_t mlad_session_most_in_flight(const struct mlad_limits *limits)
{
    return limits->max_in_flight < limits->max_in_flight_per_session ? limits->max_in_flight
                                                                     : limits->max_in_flight_per_session;
}

struct mlad_quota {
    struct mlad_limits limits;
    struct mlad_user *users;
};

struct mlad_user {
    struct mlad_user *next;
    const struct mlad_limits *limits; /* the quota's */
    uint32_t uid;
    uint32_t sessions, buffers, plans, in_flight;
    uint64_t bytes;
};

/* Count a session of `uid` and give its user's record. MLAP_code_QUOTA or MEMORY with `fault` filled otherwise. */
enum mlap_code mlad_quota_enter(struct mlad_quota *quota, uint32_t uid, struct mlad_user **user,
                                struct mlap_fault *fault);
/* The session has ended and holds nothing; `user` may be gone afterwards. */
void mlad_quota_leave(struct mlad_quota *quota, struct mlad_user *user);

/* Count one more, or answer MLAP_code_QUOTA (a decode: BUSY, since waiting helps) with a sentence that names limit and
 * option. `held`, `in_flight`: what the session that asks has already, which its owner counts. */
enum mlap_code mlad_user_take_buffer(struct mlad_user *user, uint64_t held, uint64_t bytes, struct mlap_fault *fault);
enum mlap_code mlad_user_take_plan(struct mlad_user *user, struct mlap_fault *fault);
enum mlap_code mlad_user_take_decode(struct mlad_user *user, uint32_t in_flight, struct mlap_fault *fault);

void mlad_user_give_buffer(struct mlad_user *user, uint64_t bytes);
void mlad_user_give_plan(struct mlad_user *user);
void mlad_user_give_decode(struct mlad_user *user);

#endif
