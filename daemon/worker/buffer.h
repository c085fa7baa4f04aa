/* buffer.h - client memory mapped into the worker.
 *
 * This file is the trust boundary for memory: whatever a file descriptor or a handle is, mlad_buffer_import and
 * mlad_buffer_import_gpu either map memory that stays readable (and writable) until it is unmapped, or say why not. A
 * memfd sealed with F_SEAL_SHRINK cannot lose the mapped pages, so touching them never raises SIGBUS; what they hold
 * may change at any moment.
 *
 * A buffer is held by reference counts: its session's id, each plan that names it. When the last one goes it is
 * unmapped, its bytes are given back to the user's quota, and its holder hears of it. Unmapping memory whose client has
 * gone frees it, which takes up to a second a GiB: beyond MLAD_UNMAP_PIECE bytes libuv's worker thread does it, piece
 * by piece, so that neither the loop nor a page fault of another session waits for long. All else is the loop
 * thread's.
 *
 * A device with memory of its own (a GPU) is given each buffer through its backend, host memory too; handles of GPU
 * memory are bearer secrets: no copy is kept here. Nothing tells whether two descriptors of GPU memory are one
 * allocation, so overlap goes by the addresses that the client says; one that lies spoils its own outputs. */
#ifndef MLAD_BUFFER_H
#define MLAD_BUFFER_H

#include "mlak.h"
#include "quota.h"

#include <uv.h>

enum { MLAD_UNMAP_PIECE = 1 << 22 };

/* Whose memory it is: each session embeds one, and lives until `buffers` is 0 again. */
struct mlad_holder {
    struct mlad_user *user;
    uv_loop_t *loop;
    const struct mlak_backend *backend; /* NULL, or without import: kernels read this process's memory */
    struct mlak_device *device;
    const char *name; /* the device's */
    uint64_t bytes;
    uint32_t buffers;
    /* `answer` is the sequence given to mlad_buffer_retire, 0 without */
    void (*unmapped)(struct mlad_holder *holder, uint32_t answer);
};

struct mlad_buffer {
    struct mlad_holder *holder;
    uv_work_t unmapping;
    uint8_t *data;               /* mapped here; NULL: GPU memory */
    uint8_t *pointer;            /* where kernels see it */
    struct mlak_mapping mapping; /* `owner` NULL: none, the device reads `data` */
    uint64_t bytes;
    uint64_t identity[2], offset; /* which file or allocation, and where in it: two buffers may be parts of one */
    uint32_t id;
    uint32_t refs;
    uint32_t answer;
    bool writable;
    char gpu[64]; /* on which the memory lies, by the client's word: "GPU-..."; empty: host memory */
};

/* Check `fd`, map what REGISTER asks for, count it. The new buffer has one reference. `fd` stays the caller's. */
enum mlap_code mlad_buffer_import(struct mlad_holder *holder, int fd, const struct mlap_register *request,
                                  struct mlad_buffer **buffer, struct mlap_fault *fault);

/* The same for GPU memory behind a legacy handle. MLAP_code_UNSUPPORTED on a device that has none. */
enum mlap_code mlad_buffer_import_gpu(struct mlad_holder *holder, const struct mlap_import *request,
                                      struct mlad_buffer **buffer, struct mlap_fault *fault);

/* The same for GPU memory behind descriptors, fds[0..n_fds); they stay the caller's. */
enum mlap_code mlad_buffer_import_vmm(struct mlad_holder *holder, const int *fds, unsigned n_fds,
                                      const struct mlap_import_vmm *request, struct mlad_buffer **buffer,
                                      struct mlap_fault *fault);

void mlad_buffer_ref(struct mlad_buffer *buffer);
void mlad_buffer_unref(struct mlad_buffer *buffer);

/* Give up the id's reference; holder->unmapped passes `answer` on once the memory is unmapped. */
void mlad_buffer_retire(struct mlad_buffer *buffer, uint32_t answer);

/* Do bytes [offset, offset + length) of one buffer and those of another share a byte of the same file or
 * allocation? */
bool mlad_buffer_overlap(const struct mlad_buffer *a, uint64_t a_offset, uint64_t a_length, const struct mlad_buffer *b,
                         uint64_t b_offset, uint64_t b_length);

/* Bytes mapped by all buffers of this process; counted apart from the holders' sums, to check them. */
uint64_t mlad_buffer_mapped_bytes(void);

#endif
