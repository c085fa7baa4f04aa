/* policy.h - who may connect, and who may administer: the trust boundary's first file.
 *
 * The kernel says who the peer is (SO_PEERCRED, SO_PEERGROUPS: as it was when it connected); the configuration says
 * what that user may do. Nothing else is asked, and nothing that the peer sends can change the answer. */
#ifndef MLAD_POLICY_H
#define MLAD_POLICY_H

#include "config.h"

#include <stdbool.h>
#include <sys/types.h>

struct mlad_identity {
    uid_t uid;
    gid_t gid;
    pid_t pid; /* 0 if it is outside our pid namespace */
};

/* Who is at the other end of `socket`? False, with errno, if the kernel does not say. */
bool mlad_policy_identify(int socket, struct mlad_identity *identity);

/* May that user connect? `socket` is asked for supplementary groups. */
bool mlad_policy_allows(const struct mlad_config *config, const struct mlad_identity *identity, int socket);

/* May that user drain, evict and see the sessions of others? */
bool mlad_policy_is_admin(const struct mlad_config *config, const struct mlad_identity *identity);

/* May sessions of that user have high priority? */
bool mlad_policy_may_hurry(const struct mlad_config *config, const struct mlad_identity *identity);

#endif
