/* placement.c - which of the placements this client has. What is known of this process goes out by HELLO and comes with
 * each registration, so that the worker, which shows it, concludes the same. */
#include "mlac.h"

#include <string.h>

#define SAME(NAME) _Static_assert((int)MLA_PLACEMENT_##NAME == (int)MLAP_placement_##NAME, "one numbering");
SAME(SHARED_MPS) SAME(OWN_GPU) SAME(SHARED_TIMESLICED) SAME(HOST)
_Static_assert(MLA_WHY == (int)MLAP_WHY, "one length");
_Static_assert(sizeof((struct mlap_hello *)0)->gpu == MLAP_GPU && sizeof((struct mlap_hello *)0)->mps == MLAP_MPS,
               "a place fits HELLO");

void mlac_placement_look(struct mla_client *client)
{
    int mps = -1;
    if (!mlac_cuda_current(client->here.gpu, &mps))
        client->here.gpu[0] = '\0';
    mlap_place_mps(&client->here, mps);
}

void mlac_placement_hello(const struct mla_client *client, struct mlap_hello *hello)
{
    memcpy(hello->gpu, client->here.gpu, sizeof hello->gpu);
    memcpy(hello->mps, client->here.mps, sizeof hello->mps);
    if (hello->gpu[0])
        mlap_set(hello, hello, gpu);
    if (hello->mps[0])
        mlap_set(hello, hello, mps);
}

void mlac_placement_welcome(struct mla_client *client, const struct mlap_welcome *welcome)
{
    client->there = (struct mlap_place){0};
    if (strncmp(welcome->device, "GPU-", 4) == 0)
        memcpy(client->there.gpu, welcome->device, sizeof client->there.gpu);
    memcpy(client->there.mps, welcome->mps, sizeof client->there.mps); /* absent: empty */
}

void mlac_placement_memory(struct mla_client *client, const char *gpu)
{
    mlap_place_memory(&client->here, &client->there, gpu);
}

mla_placement mlac_placement(const struct mla_client *client, char why[MLA_WHY])
{
    char text[MLAP_WHY];
    return (mla_placement)mlap_placement_of(&client->there, &client->here, why ? why : text);
}

MLA_API mla_placement mla_client_placement(mla_client *client, char why[MLA_WHY])
{
    mlac_lock(client);
    mla_placement placement = mlac_placement(client, why);
    mlac_unlock(client);
    return placement;
}
