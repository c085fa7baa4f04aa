/* mlap_placement.c - see mlap_placement.h. No state; reads the environment and looks for one file. */
#include "mlap_placement.h"
#include "mlap_tables.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

bool mlap_mps_directory(char path[MLAP_MPS])
{
    const char *said = secure_getenv("CUDA_MPS_PIPE_DIRECTORY");
    const char *directory = said && *said ? said : "/tmp/nvidia-mps";
    size_t length = strlen(directory);
    while (length > 1 && directory[length - 1] == '/')
        length--;
    bool fits = length < MLAP_MPS && mlap_is_text(directory, length);
    snprintf(path, MLAP_MPS, "%.*s", fits ? (int)length : 0, directory);
    return fits;
}

void mlap_place_mps(struct mlap_place *place, int enabled)
{
    char control[MLAP_MPS + sizeof "/control"];
    if (!mlap_mps_directory(place->mps))
        return;
    snprintf(control, sizeof control, "%s/control", place->mps);
    if (enabled == 0 || (enabled < 0 && access(control, F_OK) != 0))
        place->mps[0] = '\0';
}

void mlap_place_memory(struct mlap_place *client, const struct mlap_place *worker, const char *gpu)
{
    if (!client->gpu[0] || strcmp(client->gpu, worker->gpu) == 0)
        snprintf(client->gpu, sizeof client->gpu, "%s", gpu);
}

/* A client's own word, for a terminal: printable ASCII. */
static const char *printable(const char *from, char to[MLAP_GPU])
{
    size_t i = 0;
    for (; from[i] && i + 1 < MLAP_GPU; i++)
        to[i] = (char)(from[i] < ' ' || from[i] > '~' ? '?' : from[i]);
    to[i] = '\0';
    return to;
}

enum mlap_placement mlap_placement_of(const struct mlap_place *worker, const struct mlap_place *client,
                                      char why[MLAP_WHY])
{
    if (!worker->gpu[0]) {
        snprintf(why, MLAP_WHY, "the device is no GPU");
        return MLAP_placement_HOST;
    }
    if (!client->gpu[0]) {
        snprintf(why, MLAP_WHY, "the client is known to use host memory only");
        return MLAP_placement_OWN_GPU;
    }
    if (strcmp(client->gpu, worker->gpu) != 0) {
        char gpu[MLAP_GPU];
        snprintf(why, MLAP_WHY, "the client works on %s", printable(client->gpu, gpu));
        return MLAP_placement_OWN_GPU;
    }
    if (worker->mps[0] && strcmp(worker->mps, client->mps) == 0) {
        snprintf(why, MLAP_WHY, "client and worker are under the MPS of %s", worker->mps);
        return MLAP_placement_SHARED_MPS;
    }
    if (!worker->mps[0])
        snprintf(why, MLAP_WHY, "the worker is not under MPS%s", client->mps[0] ? ", the client is" : "");
    else if (!client->mps[0])
        snprintf(why, MLAP_WHY, "the client is not under the worker's MPS, of %s; start it by mlactl run", worker->mps);
    else
        snprintf(why, MLAP_WHY, "the client is under an MPS of its own, not the worker's of %s; start it by mlactl run",
                 worker->mps);
    return MLAP_placement_SHARED_TIMESLICED;
}
