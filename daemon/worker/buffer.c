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
        return mlap_fail(
            fault, bad, "fd",
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

/* ---- the device's view ---- */

static bool has_import(const struct mlad_holder *holder)
{
    return holder->backend && holder->backend->import;
}

/* Hand the memory to the device. */
static enum mlap_code give_to_device(struct mlad_buffer *buffer, const struct mlak_memory *memory,
                                     struct mlap_fault *fault)
{
    struct mlad_holder *holder = buffer->holder;
    struct mlak_fault refusal = {0};
    enum mlak_code code = holder->backend->import(holder->device, memory, &buffer->mapping, &refusal);
    if (code == MLAK_OK) {
        buffer->pointer = buffer->mapping.pointer;
        return MLAP_code_OK;
    }
    return mlap_fail(fault,
                     code == MLAK_MEMORY        ? MLAP_code_MEMORY
                     : code == MLAK_UNSUPPORTED ? MLAP_code_UNSUPPORTED
                     : code == MLAK_LOST        ? MLAP_code_DEVICE_LOST
                                                : MLAP_code_BUFFER,
                     refusal.field, "%s", refusal.message);
}

/* Count a buffer that is complete and give it to the caller. */
static void publish(struct mlad_buffer *made, struct mlad_buffer **buffer)
{
    mapped_bytes += made->bytes;
    made->holder->bytes += made->bytes;
    made->holder->buffers++;
    *buffer = made;
}

/* ---- import ---- */

enum mlap_code mlad_buffer_import(struct mlad_holder *holder, int fd, const struct mlap_register *request,
                                  struct mlad_buffer **buffer, struct mlap_fault *fault)
{
    struct stat st;
    enum mlap_code code = check(fd, request, &st, fault);
    if (code == MLAP_code_OK)
        code = mlad_user_take_buffer(holder->user, holder->bytes, request->bytes, fault);
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
        .pointer = data,
        .bytes = request->bytes,
        .identity = {st.st_ino, st.st_dev},
        .offset = request->offset,
        .id = request->buffer,
        .refs = 1,
        .writable = writes,
    };
    if (has_import(holder)) {
        struct mlak_memory memory = {.kind = MLAK_MEMORY_HOST, .host = data, .bytes = made->bytes, .writable = writes};
        code = give_to_device(made, &memory, fault);
    }
    if (code != MLAP_code_OK) {
        munmap(data, made->bytes);
        mlad_user_give_buffer(holder->user, made->bytes);
        free(made);
        return code;
    }
    publish(made, buffer);
    return MLAP_code_OK;
}

static bool read_handle(const char *text, uint8_t handle[64])
{
    for (unsigned i = 0; i < 64; i++) {
        unsigned byte = 0;
        for (unsigned j = 0; j < 2; j++) {
            char c = text[i * 2 + j];
            int digit = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
            if (digit < 0)
                return false;
            byte = byte * 16 + (unsigned)digit;
        }
        handle[i] = (uint8_t)byte;
    }
    return true;
}

static enum mlap_code need_gpu(const struct mlad_holder *holder, struct mlap_fault *fault)
{
    if (has_import(holder))
        return MLAP_code_OK;
    return mlap_fail(fault, MLAP_code_UNSUPPORTED, "gpu",
                     "this device reads host memory only; send a memfd with REGISTER, or connect to a GPU's device");
}

/* Make buffer `id` of what `memory` says. Its identity is the device's. */
static enum mlap_code import_gpu(struct mlad_holder *holder, uint32_t id, const struct mlak_memory *memory,
                                 struct mlad_buffer **buffer, struct mlap_fault *fault)
{
    enum mlap_code code = mlad_user_take_buffer(holder->user, holder->bytes, memory->bytes, fault);
    if (code != MLAP_code_OK)
        return code;
    struct mlad_buffer *made = malloc(sizeof *made);
    if (made) {
        *made = (struct mlad_buffer){
            .holder = holder,
            .bytes = memory->bytes,
            .id = id,
            .refs = 1,
            .writable = memory->writable,
        };
        code = give_to_device(made, memory, fault);
    } else {
        code = mlap_fail(fault, MLAP_code_MEMORY, "", "no memory to note another buffer; unregister others first");
    }
    if (code != MLAP_code_OK) {
        free(made);
        mlad_user_give_buffer(holder->user, memory->bytes);
        return code;
    }
    memcpy(made->identity, made->mapping.identity, sizeof made->identity);
    memcpy(made->gpu, memory->gpu, sizeof made->gpu);
    made->offset = made->mapping.first;
    publish(made, buffer);
    return MLAP_code_OK;
}

enum mlap_code mlad_buffer_import_gpu(struct mlad_holder *holder, const struct mlap_import *request,
                                      struct mlad_buffer **buffer, struct mlap_fault *fault)
{
    struct mlak_memory memory = {
        .kind = MLAK_MEMORY_CUDA_IPC,
        .offset = request->offset,
        .bytes = request->bytes,
        .writable = request->access == MLAP_access_READWRITE,
    };
    memcpy(memory.gpu, request->gpu, sizeof memory.gpu);
    enum mlap_code code = need_gpu(holder, fault);
    if (code == MLAP_code_OK && !read_handle(request->handle, memory.handle))
        code = mlap_fail(fault, MLAP_code_INVALID, "handle", "it is no 64 bytes in lower-case hexadecimal");
    if (code == MLAP_code_OK)
        code = import_gpu(holder, request->buffer, &memory, buffer, fault);
    explicit_bzero(memory.handle, sizeof memory.handle);
    return code;
}
_Static_assert(sizeof((struct mlap_import *)0)->gpu == sizeof((struct mlak_memory *)0)->gpu, "copied whole");

enum mlap_code mlad_buffer_import_vmm(struct mlad_holder *holder, const int *fds, unsigned n_fds,
                                      const struct mlap_import_vmm *request, struct mlad_buffer **buffer,
                                      struct mlap_fault *fault)
{
    struct mlak_memory memory = {
        .kind = MLAK_MEMORY_CUDA_VMM,
        .fds = fds,
        .n_fds = n_fds,
        .allocation = request->allocation,
        .offset = request->offset,
        .bytes = request->bytes,
        .writable = request->access == MLAP_access_READWRITE,
    };
    memcpy(memory.gpu, request->gpu, sizeof memory.gpu);
    enum mlap_code code = need_gpu(holder, fault);
    if (code != MLAP_code_OK)
        return code;
    if (request->offset >= request->allocation)
        return mlap_fail(fault, MLAP_code_INVALID, "offset",
                         "%" PRIu64 " lies past the first allocation, which has %" PRIu64 " bytes; leave that one out",
                         request->offset, request->allocation);
    uint64_t needed = (request->offset + request->bytes - 1) / request->allocation + 1;
    if (needed != n_fds)
        return mlap_fail(fault, MLAP_code_FDS, "fd",
                         "%" PRIu64 " bytes from offset %" PRIu64 " need %" PRIu64 " allocations of %" PRIu64
                         " bytes, but %u file descriptors came; at most %u go with one buffer",
                         request->bytes, request->offset, needed, request->allocation, n_fds, MLAP_MAX_FDS);
    code = import_gpu(holder, request->buffer, &memory, buffer, fault);
    if (code == MLAP_code_OK) {
        memset((*buffer)->identity, 0xff, sizeof (*buffer)->identity); /* no file's: the client's addresses */
        (*buffer)->offset = request->address;
    }
    return code;
}
_Static_assert(sizeof((struct mlap_import_vmm *)0)->gpu == sizeof((struct mlak_memory *)0)->gpu, "copied whole");
_Static_assert(sizeof((struct mlad_buffer *)0)->identity == sizeof((struct mlak_mapping *)0)->identity, "copied whole");

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
    if (buffer->mapping.owner)
        buffer->holder->backend->release(buffer->holder->device, &buffer->mapping);
    if (!buffer->data)
        return;
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
    if (buffer->bytes > MLAD_UNMAP_PIECE || buffer->mapping.owner) {
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
    if (memcmp(a->identity, b->identity, sizeof a->identity) != 0 || a_length == 0 || b_length == 0)
        return false;
    uint64_t a_first = a->offset + a_offset, b_first = b->offset + b_offset;
    return a_first < b_first + b_length && b_first < a_first + a_length;
}
