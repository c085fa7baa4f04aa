/* gpu.h - memory of a GPU that mlactl allocates for itself, as an engine would, so that a capture goes the way a
 * client's batch does. The driver is found at run time; one GPU a process is enough here.
 *
 * Copies are synchronous: when one returns, the data has arrived. Not for several threads at once. */
#ifndef MLACTL_GPU_H
#define MLACTL_GPU_H

#include "mla.h"

#include <stdbool.h>

/* Is it the name of a GPU ("GPU-...")? */
bool gpu_named(const char *device);

/* `bytes` of memory on the GPU of that UUID; NULL with `error`. The caller's until gpu_free. */
void *gpu_alloc(const char *device, size_t bytes, mla_error *error);
void gpu_free(void *pointer);

/* 0, or -1 with `error`. */
int gpu_upload(void *to, const void *from, size_t bytes, mla_error *error);
int gpu_download(void *to, const void *from, size_t bytes, mla_error *error);

#endif
