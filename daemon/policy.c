/* policy.c - see policy.h. Every question ends in "no" unless a line here says otherwise. */
#include "policy.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

bool mlad_policy_identify(int socket, struct mlad_identity *identity)
{
    struct ucred cred;
    socklen_t size = sizeof cred;
    if (getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &cred, &size) < 0)
        return false;
    *identity = (struct mlad_identity){.uid = cred.uid, .gid = cred.gid, .pid = cred.pid};
    return true;
}

static bool lists(const struct mlad_ids *ids, uint32_t id)
{
    for (uint32_t i = 0; i < ids->n; i++)
        if (ids->entry[i].id == id)
            return true;
    return false;
}

bool mlad_policy_is_admin(const struct mlad_config *config, const struct mlad_identity *identity)
{
    return identity->uid == 0 || identity->uid == geteuid() || lists(&config->admin_users, identity->uid);
}

bool mlad_policy_may_hurry(const struct mlad_config *config, const struct mlad_identity *identity)
{
    return mlad_policy_is_admin(config, identity) || config->high_priority_users.everyone ||
           lists(&config->high_priority_users, identity->uid);
}

static bool in_allowed_group(const struct mlad_config *config, gid_t gid, int socket)
{
    if (lists(&config->allowed_groups, gid))
        return true;
    gid_t *groups = NULL;
    socklen_t size = 0;
    bool found = false;
    /* Asked with no room, the kernel says how much is needed; a peer's groups do not change once it has connected. */
    if (getsockopt(socket, SOL_SOCKET, SO_PEERGROUPS, NULL, &size) < 0 && errno == ERANGE)
        groups = malloc(size);
    if (groups && getsockopt(socket, SOL_SOCKET, SO_PEERGROUPS, groups, &size) == 0)
        for (size_t i = 0; i < size / sizeof *groups && !found; i++)
            found = lists(&config->allowed_groups, groups[i]);
    free(groups);
    return found;
}

bool mlad_policy_allows(const struct mlad_config *config, const struct mlad_identity *identity, int socket)
{
    return mlad_policy_is_admin(config, identity) || config->allowed_users.everyone ||
           lists(&config->allowed_users, identity->uid) ||
           (config->allowed_groups.n > 0 && in_allowed_group(config, identity->gid, socket));
}
