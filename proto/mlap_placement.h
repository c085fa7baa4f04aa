/* mlap_placement.h - how the GPU work of a client and that of a worker meet. One rule for both sides, from what each
 * says of itself in HELLO and WELCOME and from the memory that the client registers. */
#ifndef MLAP_PLACEMENT_H
#define MLAP_PLACEMENT_H

#include "mlap.h"

enum { MLAP_GPU = 64, MLAP_MPS = 128, MLAP_WHY = 256 };

/* Where one side works; all zero: on no GPU, without MPS. */
struct mlap_place {
    char gpu[MLAP_GPU]; /* UUID */
    char mps[MLAP_MPS]; /* pipe directory of the MPS control daemon that serves it */
};

/* CUDA_MPS_PIPE_DIRECTORY, else the driver's own choice: where a process with this environment looks for MPS. False:
 * longer than a place can hold, or no text. */
bool mlap_mps_directory(char path[MLAP_MPS]);

/* Set place->mps. `enabled`: what the driver says of this process, 1 or 0; -1: it has not been asked, then a control
 * daemon's pipe in the directory counts. */
void mlap_place_mps(struct mlap_place *place, int enabled);

/* The client has registered memory on `gpu`. One that has not said where it works is taken to work there; of several
 * GPUs on one that is not the worker's, because KV has to lie on the worker's anyway. */
void mlap_place_memory(struct mlap_place *client, const struct mlap_place *worker, const char *gpu);

/* The placement, and why in one sentence. */
enum mlap_placement mlap_placement_of(const struct mlap_place *worker, const struct mlap_place *client,
                                      char why[MLAP_WHY]);

#endif
