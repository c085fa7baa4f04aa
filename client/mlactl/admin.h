/* admin.h - a session with the supervisor itself: status, health, capabilities, sessions, drain, evict.
 *
 * One blocking request at a time, all of them together within the time of --timeout. */
#ifndef MLACTL_ADMIN_H
#define MLACTL_ADMIN_H

#include "mlactl.h"

#include "mlap.h"

struct admin;

/* Connect and say HELLO. CTL_OK with *admin the caller's until admin_free, else CTL_NOT_RUNNING, CTL_TIMED_OUT or
 * CTL_FAILED with the reason in `fault`. */
int admin_new(const struct ctl *ctl, struct admin **admin, struct ctl_fault *fault);
void admin_free(struct admin *admin);

/* Milliseconds until the connection's --timeout runs out, 1 at least. */
int admin_left_ms(const struct admin *admin);

/* Send `type` with `body` and wait for its answer, which must be of type `expected`. *reply stays valid until the next
 * call. An ERROR of the daemon is CTL_FAILED, its sentence in `fault`. */
int admin_ask(struct admin *admin, enum mlap_type type, const void *body, enum mlap_type expected,
              const union mlap_body **reply, struct ctl_fault *fault);

/* What the daemon called itself in WELCOME: "mlad 0.1.0". */
const char *admin_daemon(const struct admin *admin);
/* The whole STATUS, a copy for the caller to free. */
int admin_status(struct admin *admin, struct mlap_status_reply **status, struct ctl_fault *fault);
/* The entry of `device` in a status, NULL if it is not served. */
const struct mlap_device *admin_find(const struct mlap_status_reply *status, const char *device);

/* Hand every session of the device that this user may see to `sink`, by ascending id. */
typedef void session_sink(void *to, const char *device, const struct mlap_session *session);
int admin_sessions(struct admin *admin, const char *device, session_sink *sink, void *to, struct ctl_fault *fault);

static inline void admin_freep(struct admin **admin) { admin_free(*admin); }
#define admin_auto __attribute__((cleanup(admin_freep)))

#endif
