/* capture.h - a batch on disk, or made up in memory: the capture schema of the decode contract.
 *
 * A capture is a mla_batch without buffers, plus where the bytes of each tensor are: in its open file or in memory that
 * it owns. Everything about names, types, shapes and metadata has been checked once it exists; what remains (cu_q,
 * lengths, page ids, combinations the device lacks) is the daemon's to judge. */
#ifndef MLACTL_CAPTURE_H
#define MLACTL_CAPTURE_H

#include "mlactl.h"
#include "safetensors.h"

#include <mla.h>

enum capture_tensor {
    CAPTURE_Q, CAPTURE_KV, CAPTURE_BLOCK_TABLE, CAPTURE_SEQLENS, CAPTURE_CU_Q, CAPTURE_TREE_MASK, CAPTURE_SINK,
    CAPTURE_Q_SCALE, CAPTURE_K_SCALE, CAPTURE_V_SCALE, CAPTURE_TENSORS
};

struct capture_data {
    bool present;
    uint64_t bytes;
    uint64_t offset;    /* in the file */
    void *memory;       /* owned; NULL: in the file */
};

struct capture {
    mla_batch batch;    /* its mla_tensor members stay empty; run.h fills a copy */
    struct capture_data data[CAPTURE_TENSORS];
    int fd;             /* -1: all in memory */
};

/* Read and check. *capture is the caller's until capture_free. capture_read takes over `fd`, on failure too. */
int capture_open(const char *path, struct capture **capture, struct ctl_fault *fault);
int capture_read(int fd, struct capture **capture, struct ctl_fault *fault);

/* An empty capture in memory with the defaults of the schema; capture_add gives it a tensor, zeroed, of the bytes that
 * follow from `batch`. NULL: no memory. */
struct capture *capture_new(void);
void *capture_add(struct capture *capture, enum capture_tensor tensor);
void capture_free(struct capture *capture);

/* Copy a tensor's bytes out. */
int capture_load(const struct capture *capture, enum capture_tensor tensor, void *to, struct ctl_fault *fault);

/* Write a capture whose tensors are all in memory. */
int capture_write(const struct capture *capture, const char *path, struct ctl_fault *fault);

/* Write the result file: `out` as the batch's output type, and `lse`. */
int capture_write_result(const mla_batch *batch, const void *out, const float *lse, const char *path,
                         struct ctl_fault *fault);

const char *capture_name(enum capture_tensor tensor);       /* "block_table" */
mla_dtype capture_out_dtype(const mla_batch *batch);        /* defaults resolved */
unsigned capture_row_bytes(const mla_batch *batch);         /* of one KV row: 1152, 576 or 656 */

static inline void capture_freep(struct capture **capture) { capture_free(*capture); }
#define capture_auto __attribute__((cleanup(capture_freep)))

#endif
