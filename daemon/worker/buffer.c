/* buffer.c - see buffer.h. */
#include "buffer.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/magic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

static uint64_t mapped_bytes;

uint64_t mlad_buffer_mapped_bytes(void)
{
    return mapped_bytes;
}

/* Everything that must hold before the file may be mapped. */
static enum mlap_code check(int fd, const struct mlap_register *request, struct stat *st, struct mlap_fault *fault)
{
    const enum mlap_code bad = MLAP_code_BUFFER;
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    bool writes = request->access == MLAP_access_READWRITE;
    struct statfs fs;
    /* First what never asks a file system: one of the peer's own may not answer. Only memory files have seals. */
    int seals = fcntl(fd, F_GET_SEALS);
    if (seals < 0)
        return mlap_fail(fault, bad, "fd",
                         "the file descriptor is no open memory file (a pipe, socket, device or disk file?): %s; send a memfd",
                         strerror(errno));
    if (fstat(fd, st) != 0 || fstatfs(fd, &fs) != 0)
        return mlap_fail(fault, bad, "fd", "the file descriptor cannot be examined: %s; send a memfd", strerror(errno));
    if (!S_ISREG(st->st_mode))
        return mlap_fail(fault, bad, "fd",
                         "the file descriptor is no memory file (a pipe, socket or device?); send a memfd");
    if (fs.f_type == HUGETLBFS_MAGIC)
        return mlap_fail(fault, bad, "fd",
                         "the memfd was made with MFD_HUGETLB, which cannot be served; make it without");
    if (fs.f_type != TMPFS_MAGIC)
        return mlap_fail(fault, bad, "fd", "the file lies on a disk or other file system; send a memfd");
    if (!(seals & F_SEAL_SHRINK))
        return mlap_fail(
            fault, bad, "fd",
            "the memfd is not sealed against shrinking; make it with MFD_ALLOW_SEALING and add F_SEAL_SHRINK");
    if (writes && (seals & (F_SEAL_WRITE | F_SEAL_FUTURE_WRITE)))
        return mlap_fail(fault, bad, "access", "the memfd is sealed against writing; register it with access read");
    int mode = fcntl(fd, F_GETFL) & O_ACCMODE;
    if (mode == O_WRONLY || (writes && mode != O_RDWR))
        return mlap_fail(fault, bad, "access",
                         "the file descriptor is open for %s only; open it for reading and writing%s",
                         mode == O_WRONLY ? "writing" : "reading", writes ? " or register it with access read" : "");
    if (request->offset % page != 0)
        return mlap_fail(fault, MLAP_code_INVALID, "offset", "%" PRIu64 " is no multiple of the page size, %" PRIu64,
                         request->offset, page);
    uint64_t size = (uint64_t)st->st_size;
    if (request->offset > size || request->bytes > size - request->offset)
        return mlap_fail(fault, bad, "bytes",
                         "%" PRIu64 " bytes from offset %" PRIu64 " pass the end of the memfd, which has %" PRIu64
                         " bytes",
                         request->bytes, request->offset, size);
    return MLAP_code_OK;
}

enum mlap_code mlad_buffer_import(struct mlad_holder *holder, int fd, const struct mlap_register *request,
                                  struct mlad_buffer **buffer, struct mlap_fault *fault)
{
    struct stat st;
    enum mlap_code code = check(fd, request, &st, fault);
    if (code == MLAP_code_OK)
        code = mlad_user_take_buffer(holder->user, request->bytes, fault);
    if (code != MLAP_code_OK)
        return code;

    struct mlad_buffer *made = malloc(sizeof *made);
    bool writes = request->access == MLAP_access_READWRITE;
    void *data = MAP_FAILED;
    if (made)
        data = mmap(NULL, request->bytes, writes ? PROT_READ | PROT_WRITE : PROT_READ, MAP_SHARED, fd,
                    (off_t)request->offset);
    if (data == MAP_FAILED) {
        int error = errno;
        free(made);
        mlad_user_give_buffer(holder->user, request->bytes);
        return mlap_fail(fault, MLAP_code_MEMORY, "bytes",
                         "%" PRIu64 " bytes cannot be mapped: %s; unregister others first", request->bytes,
                         strerror(error));
    }
    madvise(data, request->bytes, MADV_DONTDUMP); /* a core dump of ours is no place for client data */
    *made = (struct mlad_buffer){
        .holder = holder,
        .data = data,
        .bytes = request->bytes,
        .offset = request->offset,
        .device = st.st_dev,
        .inode = st.st_ino,
        .id = request->buffer,
        .refs = 1,
        .writable = writes,
    };
    mapped_bytes += made->bytes;
    holder->bytes += made->bytes;
    holder->buffers++;
    *buffer = made;
    return MLAP_code_OK;
}

void mlad_buffer_ref(struct mlad_buffer *buffer)
{
    buffer->refs++;
}

/* The memory is unmapped: settle the accounts. */
static void forget(struct mlad_buffer *buffer)
{
    struct mlad_holder *holder = buffer->holder;
    uint32_t answer = buffer->answer;
    mapped_bytes -= buffer->bytes;
    holder->bytes -= buffer->bytes;
    holder->buffers--;
    mlad_user_give_buffer(holder->user, buffer->bytes);
    free(buffer);
    holder->unmapped(holder, answer);
}

static void unmap(uv_work_t *work)
{
    struct mlad_buffer *buffer = work->data;
    for (uint64_t at = 0; at < buffer->bytes; at += MLAD_UNMAP_PIECE) {
        uint64_t left = buffer->bytes - at;
        munmap(buffer->data + at, left < MLAD_UNMAP_PIECE ? left : MLAD_UNMAP_PIECE);
    }
}

static void on_unmapped(uv_work_t *work, int status)
{
    (void)status; /* it is never cancelled */
    forget(work->data);
}

void mlad_buffer_unref(struct mlad_buffer *buffer)
{
    if (--buffer->refs > 0)
        return;
    buffer->unmapping.data = buffer;
    if (buffer->bytes > MLAD_UNMAP_PIECE) {
        uv_queue_work(buffer->holder->loop, &buffer->unmapping, unmap, on_unmapped);
    } else {
        unmap(&buffer->unmapping);
        forget(buffer);
    }
}

void mlad_buffer_retire(struct mlad_buffer *buffer, uint32_t answer)
{
    buffer->answer = answer;
    mlad_buffer_unref(buffer);
}

bool mlad_buffer_overlap(const struct mlad_buffer *a, uint64_t a_offset, uint64_t a_length, const struct mlad_buffer *b,
                         uint64_t b_offset, uint64_t b_length)
{
    if (a->device != b->device || a->inode != b->inode || a_length == 0 || b_length == 0)
        return false;
    uint64_t a_first = a->offset + a_offset, b_first = b->offset + b_offset;
    return a_first < b_first + b_length && b_first < a_first + a_length;
}
