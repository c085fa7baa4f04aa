/* cuda_memory.h - memory of other processes on a GPU: what mlak_backend.import does for the cuda backend.
 *
 * A legacy handle is opened once, however many buffers lie in its allocation, and closed with the last of them. One
 * table for each device; its calls may come from several threads. */
#ifndef MLAK_CUDA_MEMORY_H
#define MLAK_CUDA_MEMORY_H

#include "cuda_driver.h"

#include <pthread.h>

struct cuda_opened;

struct cuda_memory {
    const struct mlak_driver *cu;
    CUdevice gpu;
    char name[MLAK_UUID_TEXT];
    pthread_mutex_t lock;
    struct cuda_opened *opened; /* allocations that buffers lie in */
};

void cuda_memory_init(struct cuda_memory *memory, const struct mlak_driver *cu, CUdevice gpu);
/* All mappings have been released. */
void cuda_memory_deinit(struct cuda_memory *memory);

/* With the device's context current. As mlak_backend.import and release. */
enum mlak_code cuda_memory_import(struct cuda_memory *memory, const struct mlak_memory *what,
                                  struct mlak_mapping *mapping, struct mlak_fault *fault);
void cuda_memory_release(struct cuda_memory *memory, struct mlak_mapping *mapping);

#endif
