/* cuda.h - memory of this process on a GPU, as another process can be told of it. The driver is found at run time, so
 * that libmla depends on nothing of CUDA. Thread-safe; no state but the driver's functions. */
#ifndef MLAC_CUDA_H
#define MLAC_CUDA_H

#include "mla.h"

#include <stdbool.h>

/* VMM memory (cuMemCreate): `count` allocations of `bytes` each, end to end from `start`. count 0: it is none. */
struct mlac_vmm {
    uint64_t start, bytes;
    uint32_t count;
};

struct mlac_export {
    char handle[129];    /* the allocation's legacy IPC handle in hexadecimal: a secret; empty for VMM memory */
    char gpu[64];        /* "GPU-..." */
    uint64_t offset;     /* from the (first) allocation's start to the pointer */
    struct mlac_vmm vmm; /* VMM memory */
};

/* Say how the daemon can map [pointer, pointer + bytes). MLA_OK; MLA_BUFFER, MLA_NO_DEVICE or
 * MLA_DEVICE_LOST with what to change. */
mla_status mlac_cuda_export(const void *pointer, size_t bytes, struct mlac_export *out, mla_error *error);

/* One new descriptor for each of the allocations, fds[0..vmm->count), the caller's to close; none is left open without
 * success. From any thread: it needs no context. */
mla_status mlac_cuda_descriptors(const struct mlac_vmm *vmm, int *fds, mla_error *error);

/* The GPU of the context that is current in this thread, and whether its process is a client of MPS: 1, 0, or -1 where
 * the driver does not say. False without a context; loads no driver and makes no context. */
bool mlac_cuda_current(char gpu[64], int *mps);

/* Does the context still live in which the memory at `pointer` was made, or, where memory has none of its own
 * (cuMemCreate), the one that is current here? MLA_DEVICE_LOST if the driver says that it does not; MLA_OK also where
 * it cannot tell. Takes tens of microseconds; never waits for the caller's kernels, since what it asks of the GPU goes
 * by a stream of its own, and where those leave no room it gives up after 20 ms. Only after mlac_cuda_export
 * succeeded. */
mla_status mlac_cuda_check(uint64_t pointer, mla_error *error);

#endif
