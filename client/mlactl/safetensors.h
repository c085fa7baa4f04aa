/* safetensors.h - the .safetensors container: 8 bytes of header length, a JSON header, tensor data.
 *
 * Reading checks everything before any tensor is touched: a bounded header, no repeated keys, known element types,
 * sizes that match shapes, and data ranges that cover the file without overlap or hole. Nothing is read beyond what was
 * checked, and a file that shrinks meanwhile gives an error. */
#ifndef MLACTL_SAFETENSORS_H
#define MLACTL_SAFETENSORS_H

#include "mlactl.h"

#include <stddef.h>

enum { ST_MAX_HEADER = 65536, ST_MAX_RANK = 4 };
enum st_dtype { ST_BF16, ST_F16, ST_F8_E4M3, ST_U8, ST_I32, ST_U64, ST_F32, ST_DTYPES };

const char *st_dtype_name(enum st_dtype dtype);     /* "BF16" */
size_t st_dtype_bytes(enum st_dtype dtype);

struct st_tensor {
    const char *name;
    enum st_dtype dtype;
    unsigned rank;
    uint64_t shape[ST_MAX_RANK];
    uint64_t offset;        /* from the start of the file; any alignment */
    uint64_t bytes;
    const void *data;       /* for st_write */
};
struct st_pair { const char *key, *value; };

/* A file's header. Names belong to it. */
struct st_file {
    struct cJSON *header;
    unsigned n_tensors, n_pairs;
    struct st_tensor *tensors;
    struct st_pair *pairs;      /* of __metadata__ */
};

/* Read and check the header of a regular file. 0 with *file the caller's until st_free; `fd` stays the caller's. */
int st_read(int fd, struct st_file **file, struct ctl_fault *fault);
void st_free(struct st_file *file);

/* Read `bytes` at `offset`. */
int st_load(int fd, uint64_t offset, uint64_t bytes, void *to, struct ctl_fault *fault);

/* Write a file whole or not at all: to a temporary beside it, then renamed. Offsets are chosen here. */
int st_write(const char *path, const struct st_tensor *tensors, unsigned n_tensors, const struct st_pair *pairs,
             unsigned n_pairs, struct ctl_fault *fault);

#endif
