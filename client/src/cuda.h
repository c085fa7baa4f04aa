/* cuda.h - memory of this process on a GPU, as another process can be told of it. The driver is found at run time, so
 * that libmla depends on nothing of CUDA. Thread-safe; no state but the driver's functions. */
#ifndef MLAC_CUDA_H
#define MLAC_CUDA_H

#include "mla.h"

struct mlac_export {
    char handle[129]; /* the allocation's legacy IPC handle in hexadecimal: a secret */
    char gpu[64];     /* "GPU-..." */
    uint64_t offset;  /* from the allocation's start to the pointer */
};

/* Say how the daemon can map [pointer, pointer + bytes). MLA_OK; MLA_BUFFER or MLA_NO_DEVICE with what to change. */
mla_status mlac_cuda_export(const void *pointer, size_t bytes, struct mlac_export *out, mla_error *error);

#endif
