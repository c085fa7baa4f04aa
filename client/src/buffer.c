/* buffer.c - memory shared with the daemon and its registration there: a memfd with its mapping here, or GPU memory.
 *
 * A buffer belongs to its client and to whoever holds it: mla_buffer_free ends it, mla_close too. The memfd stays open
 * as long as the buffer, because a new worker has to be given it again. Descriptors of GPU memory are not kept, since a
 * KV cache may be hundreds of them: they are exported again from the memory, which outlives the buffer. */
#include "mlac.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define SAME(A, B) _Static_assert((int)(A) == (int)(B), "one numbering of access");
SAME(MLA_READWRITE, MLAP_access_READWRITE) SAME(MLA_READ, MLAP_access_READ)

void mlac_buffer_destroy(struct mla_buffer *buffer)
{
    if (buffer->data)
        munmap(buffer->data, buffer->size);
    if (buffer->memfd >= 0)
        close(buffer->memfd);
    free(buffer);
}

static mla_buffer *new_buffer(mla_client *client, int memfd, uint64_t offset, size_t size, mla_access access)
{
    mla_buffer *buffer = malloc(sizeof *buffer);
    if (buffer)
        *buffer = (mla_buffer){.client = client, .memfd = memfd, .offset = offset, .size = size, .access = access};
    return buffer;
}

static bool map(mla_buffer *buffer)
{
    int protection = buffer->access == MLA_READ ? PROT_READ : PROT_READ | PROT_WRITE;
    void *data = mmap(NULL, buffer->size, protection, MAP_SHARED, buffer->memfd, (off_t)buffer->offset);
    buffer->data = data == MAP_FAILED ? NULL : data;
    return buffer->data;
}

static struct mlac_call *vmm_call(uint64_t id, const mla_buffer *buffer, const struct mlac_export *exported,
                                  mla_error *error)
{
    struct mlap_import_vmm body = {.buffer = (uint32_t)id, .allocation = exported->vmm.bytes,
                                   .offset = exported->offset, .bytes = buffer->size,
                                   .address = exported->vmm.start + exported->offset,
                                   .access = (enum mlap_access)buffer->access};
    memcpy(body.gpu, exported->gpu, sizeof body.gpu);
    mlap_set(&body, import_vmm, access);
    return mlac_call_new(id, MLAP_IMPORT_VMM, &body, error);
}

/* The call that registers it. */
static struct mlac_call *register_call(uint64_t id, const mla_buffer *buffer, const struct mlac_export *exported,
                                       mla_error *error)
{
    if (exported && exported->vmm.count)
        return vmm_call(id, buffer, exported, error);
    if (exported) {
        struct mlap_import body = {.buffer = (uint32_t)id, .offset = exported->offset, .bytes = buffer->size,
                                   .access = (enum mlap_access)buffer->access};
        memcpy(body.handle, exported->handle, sizeof body.handle);
        memcpy(body.gpu, exported->gpu, sizeof body.gpu);
        mlap_set(&body, import, access);
        struct mlac_call *call = mlac_call_new(id, MLAP_IMPORT, &body, error);
        explicit_bzero(&body, sizeof body);
        return call;
    }
    struct mlap_register body = {.buffer = (uint32_t)id, .kind = MLAP_buffer_kind_MEMFD, .offset = buffer->offset,
                                 .bytes = buffer->size, .access = (enum mlap_access)buffer->access};
    mlap_set(&body, register, offset);
    mlap_set(&body, register, access);
    return mlac_call_new(id, MLAP_REGISTER, &body, error);
}

/* Locked. */
static mla_status start_register(mla_client *client, mla_buffer *buffer, const struct mlac_export *exported,
                                 mla_error *error)
{
    uint64_t id = mlac_next_id(client);
    struct mlac_call *call = register_call(id, buffer, exported, error);
    if (!call)
        return MLA_MEMORY;
    call->buffer = buffer;
    buffer->call = call;
    return mlac_call_establish(client, call, error);
}

/* Register it and hand it to the caller, or destroy it. */
static mla_status publish(mla_client *client, mla_buffer *buffer, const struct mlac_export *exported, mla_buffer **out,
                          mla_error *error)
{
    mlac_lock(client);
    mla_status status = start_register(client, buffer, exported, error);
    if (status == MLA_OK && exported)
        mlac_placement_memory(client, exported->gpu);
    mlac_unlock(client);
    if (status == MLA_OK)
        *out = buffer;
    else
        mlac_buffer_destroy(buffer);
    return status;
}

static mla_status check(const mla_client *client, size_t bytes, mla_buffer *const *out, mla_error *error)
{
    if (!client)
        return mlac_fail(error, MLA_INVALID, "client", "it must not be NULL");
    if (!out)
        return mlac_fail(error, MLA_INVALID, "buffer", "it must not be NULL");
    if (bytes == 0 || bytes > INT64_MAX)
        return mlac_fail(error, MLA_INVALID, "bytes", "it must be 1 to 2^63 - 1, not %zu", bytes);
    return MLA_OK;
}

MLA_API mla_status mla_buffer_alloc(mla_client *client, size_t bytes, mla_buffer **out, mla_error *error)
{
    mla_status status = check(client, bytes, out, error);
    if (status != MLA_OK)
        return status;
    int memfd = memfd_create("mla", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    mla_buffer *buffer = memfd < 0 ? NULL : new_buffer(client, memfd, 0, bytes, MLA_READWRITE);
    /* Sealed at one size, for good: the daemon needs it not to shrink, and nobody needs it to grow. */
    if (buffer && ftruncate(memfd, (off_t)bytes) == 0 &&
        fcntl(memfd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) == 0 && map(buffer))
        return publish(client, buffer, NULL, out, error);
    status =
        mlac_fail(error, MLA_MEMORY, "bytes", "%zu bytes of shared memory cannot be had: %s", bytes, strerror(errno));
    if (buffer)
        mlac_buffer_destroy(buffer);
    else if (memfd >= 0)
        close(memfd);
    return status;
}

static mla_status check_memfd(int memfd, uint64_t offset, size_t bytes, mla_error *error)
{
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    if (offset % page || offset > INT64_MAX - bytes)
        return mlac_fail(error, MLA_INVALID, "offset", "it must be a multiple of the page size, %llu, and not overflow",
                         (unsigned long long)page);
    int seals = fcntl(memfd, F_GET_SEALS);
    if (seals < 0)
        return mlac_fail(error, MLA_BUFFER, "memfd", "descriptor %d is no memfd (%s); make one with memfd_create and "
                         "MFD_ALLOW_SEALING, or use mla_buffer_alloc", memfd, strerror(errno));
    if (!(seals & F_SEAL_SHRINK))
        return mlac_fail(error, MLA_BUFFER, "memfd",
                         "the memfd can still shrink; fcntl(memfd, F_ADD_SEALS, F_SEAL_SHRINK) first");
    struct stat status;
    if (fstat(memfd, &status) < 0)
        return mlac_fail(error, MLA_BUFFER, "memfd", "its size cannot be read: %s", strerror(errno));
    if ((uint64_t)status.st_size < offset + bytes)
        return mlac_fail(error, MLA_BUFFER, "bytes", "offset + bytes is %llu and the memfd has %llu bytes",
                         (unsigned long long)(offset + bytes), (unsigned long long)status.st_size);
    return MLA_OK;
}

MLA_API mla_status mla_buffer_import(mla_client *client, int memfd, uint64_t offset, size_t bytes, mla_access access,
                                     mla_buffer **out, mla_error *error)
{
    mla_status status = check(client, bytes, out, error);
    if (status == MLA_OK && access != MLA_READWRITE && access != MLA_READ)
        status = mlac_fail(error, MLA_INVALID, "access", "it must be MLA_READWRITE or MLA_READ, not %d", (int)access);
    if (status == MLA_OK)
        status = check_memfd(memfd, offset, bytes, error);
    if (status != MLA_OK)
        return status;
    int ours = fcntl(memfd, F_DUPFD_CLOEXEC, 0);
    if (ours < 0)
        return mlac_fail(error, MLA_MEMORY, "memfd", "the descriptor cannot be duplicated: %s", strerror(errno));
    mla_buffer *buffer = new_buffer(client, ours, offset, bytes, access);
    if (buffer)
        return publish(client, buffer, NULL, out, error);
    close(ours);
    return mlac_fail(error, MLA_MEMORY, "", "out of memory in this process");
}

MLA_API mla_status mla_buffer_import_device(mla_client *client, void *pointer, size_t bytes, mla_access access,
                                            mla_buffer **out, mla_error *error)
{
    struct mlac_export exported;
    mla_status status = check(client, bytes, out, error);
    if (status == MLA_OK && access != MLA_READWRITE && access != MLA_READ)
        status = mlac_fail(error, MLA_INVALID, "access", "it must be MLA_READWRITE or MLA_READ, not %d", (int)access);
    if (status == MLA_OK)
        status = mlac_cuda_export(pointer, bytes, &exported, error);
    if (status != MLA_OK)
        return status;
    mla_buffer *buffer = new_buffer(client, -1, 0, bytes, access);
    if (buffer) {
        buffer->pointer = (uintptr_t)pointer;
        buffer->vmm = exported.vmm;
    }
    status = buffer ? publish(client, buffer, &exported, out, error)
                    : mlac_fail(error, MLA_MEMORY, "", "out of memory in this process");
    explicit_bzero(&exported, sizeof exported);
    return status;
}

MLA_API void *mla_buffer_data(mla_buffer *buffer)
{
    mlac_lock(buffer->client);
    if (!buffer->data && buffer->memfd >= 0)
        map(buffer);
    void *data = buffer->data;
    mlac_unlock(buffer->client);
    return data;
}

MLA_API size_t mla_buffer_size(const mla_buffer *buffer)
{
    return buffer->size;
}

/* End the registration. Locked. */
static mla_status unregister(mla_client *client, mla_buffer *buffer, mla_error *error)
{
    mlac_await(client, buffer->call->id, MLAC_COMPLETE, 0);     /* takes in completions that have arrived */
    if (buffer->uses)
        return mlac_fail(error, MLA_IN_USE, "buffer",
                         "%u plans and decodes in flight still name it; destroy and collect those first",
                         buffer->uses);
    if (client->link != MLAC_UP) {      /* no session: nothing to undo there */
        mlac_call_free(client, buffer->call);
        return MLA_OK;
    }
    uint64_t id = mlac_next_id(client);
    struct mlap_unregister body = {.buffer = (uint32_t)buffer->call->id};
    struct mlac_call *call = mlac_call_new(id, MLAP_UNREGISTER, &body, error);
    if (!call)
        return MLA_MEMORY;
    call->buffer = buffer;
    mlac_call_start(client, call);
    mlac_await(client, id, MLAC_COMPLETE, MLAC_NEVER);
    mla_status status = mlac_report(error, &call->error);
    mlac_call_free(client, call);
    return status;
}

MLA_API mla_status mla_buffer_free(mla_buffer *buffer, mla_error *error)
{
    if (!buffer)
        return mlac_fail(error, MLA_INVALID, "buffer", "it must not be NULL");
    mla_client *client = buffer->client;
    mlac_lock(client);
    mla_status status = unregister(client, buffer, error);
    mlac_unlock(client);
    if (status == MLA_OK)
        mlac_buffer_destroy(buffer);
    return status;
}
