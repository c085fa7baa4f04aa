/* cuda_memory.c - see cuda_memory.h. */
#include "cuda_memory.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

/* An allocation, or registered host memory, that buffers use. */
struct cuda_opened {
    struct cuda_opened *next;
    enum mlak_memory_kind kind;
    uint32_t refs;
    CUdevice gpu; /* on which it lies, except HOST */
    bool local;
    CUdeviceptr base;
    size_t bytes; /* of all that was opened */
    void *host;         /* HOST */
    uint8_t handle[64]; /* CUDA_IPC */
};
_Static_assert(sizeof(CUipcMemHandle) == 64, "a handle is copied whole");

void cuda_memory_init(struct cuda_memory *memory, const struct mlak_driver *cu, CUdevice gpu)
{
    CUuuid uuid = {{0}};
    *memory = (struct cuda_memory){.cu = cu, .gpu = gpu};
    cu->device_uuid(&uuid, gpu);
    mlak_uuid_text(&uuid, memory->name);
    pthread_mutex_init(&memory->lock, NULL);
}

void cuda_memory_deinit(struct cuda_memory *memory)
{
    pthread_mutex_destroy(&memory->lock);
}

/* ---- which GPU ---- */

/* The GPU of that name; false if the driver sees none. */
static bool find_gpu(const struct mlak_driver *cu, const char *name, CUdevice *gpu)
{
    int count = 0;
    cu->device_count(&count);
    for (int i = 0; i < count; i++) {
        CUuuid uuid;
        char text[MLAK_UUID_TEXT];
        if (cu->device_get(gpu, i) != CUDA_SUCCESS || cu->device_uuid(&uuid, *gpu) != CUDA_SUCCESS)
            continue;
        mlak_uuid_text(&uuid, text);
        if (strcmp(text, name) == 0)
            return true;
    }
    return false;
}

/* Is the memory's GPU one that our kernels reach? */
static enum mlak_code check_gpu(const struct cuda_memory *memory, const struct mlak_memory *what, CUdevice *gpu,
                                struct mlak_fault *fault)
{
    int reaches = 0;
    if (!find_gpu(memory->cu, what->gpu, gpu))
        return mlak_fail(fault, MLAK_INVALID, "gpu",
                         "this daemon sees no GPU %.48s; give the UUID of one on this machine", what->gpu);
    if (*gpu == memory->gpu)
        return MLAK_OK;
    if (memory->cu->can_access_peer(&reaches, memory->gpu, *gpu) != CUDA_SUCCESS || !reaches)
        return mlak_fail(fault, MLAK_UNSUPPORTED, "gpu",
                         "the memory lies on %.48s, which %s cannot access; allocate it on %s, or on a peer of it",
                         what->gpu, memory->name, memory->name);
    return MLAK_OK;
}

/* ---- opening and closing ---- */

#define TRY(call, field, ...)                                                                                          \
    do {                                                                                                               \
        CUresult result_ = cu->call(__VA_ARGS__);                                                                      \
        if (result_ != CUDA_SUCCESS) {                                                                                 \
            mlak_driver_fail(fault, result_ == CUDA_ERROR_OUT_OF_MEMORY ? MLAK_MEMORY : MLAK_INVALID, field, #call,    \
                             result_);                                                                                 \
            goto failed;                                                                                               \
        }                                                                                                              \
    } while (0)

static enum mlak_code open_host(const struct cuda_memory *memory, const struct mlak_memory *what,
                                struct cuda_opened *opened, struct mlak_fault *fault)
{
    const struct mlak_driver *cu = memory->cu;
    unsigned flags = CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP;
    int read_only = 0; /* where the attribute is 0, the flag is refused */
    if (!what->writable)
        cu->device_attribute(&read_only, CU_DEVICE_ATTRIBUTE_READ_ONLY_HOST_REGISTER_SUPPORTED, memory->gpu);
    if (read_only)
        flags |= CU_MEMHOSTREGISTER_READ_ONLY;
    opened->host = what->host;
    TRY(host_register, "host", what->host, what->bytes, flags);
    CUresult result = cu->host_pointer(&opened->base, what->host, 0);
    if (result == CUDA_SUCCESS)
        return MLAK_OK;
    cu->host_unregister(what->host);
    mlak_driver_fail(fault, MLAK_INVALID, "host", "host_pointer", result);
failed:
    return fault->code;
}

/* On which GPU a handle's memory lies is the client's word: of an opened handle the driver names the GPU that opened it
 * (seen with driver 580), wherever the memory is. A wrong word costs the client speed, or its KV is refused. */
static enum mlak_code open_ipc(const struct mlak_driver *cu, const struct mlak_memory *what, struct cuda_opened *opened,
                               struct mlak_fault *fault)
{
    CUipcMemHandle handle;
    CUdeviceptr base;
    memcpy(&handle, what->handle, sizeof handle);
    CUresult result = cu->ipc_open(&opened->base, handle, CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS);
    explicit_bzero(&handle, sizeof handle);
    if (result != CUDA_SUCCESS)
        return mlak_driver_fail(fault, result == CUDA_ERROR_OUT_OF_MEMORY ? MLAK_MEMORY : MLAK_INVALID, "handle",
                                "cuIpcOpenMemHandle", result);
    memcpy(opened->handle, what->handle, sizeof opened->handle);
    TRY(address_range, "handle", &base, &opened->bytes, opened->base);
    opened->bytes -= opened->base - base; /* less what lies before the handle's memory */
    return MLAK_OK;
failed:
    cu->ipc_close(opened->base);
    explicit_bzero(opened->handle, sizeof opened->handle);
    return fault->code;
}

/* Map the allocation behind `fd` at `at`. The mapping keeps it, so its handle is given back at once. */
static enum mlak_code map_one(const struct mlak_driver *cu, const struct mlak_memory *what, int fd, CUdevice gpu,
                              CUdeviceptr at, struct mlak_fault *fault)
{
    CUmemAllocationProp properties = {0};
    CUmemGenericAllocationHandle object;
    CUresult result = cu->import_fd(&object, (void *)(uintptr_t)fd, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
    if (result != CUDA_SUCCESS)
        return mlak_driver_fail(fault, result == CUDA_ERROR_OUT_OF_MEMORY ? MLAK_MEMORY : MLAK_INVALID, "fd",
                                "import_fd", result);
    TRY(allocation_properties, "fd", &properties, object);
    if (properties.location.type == CU_MEM_LOCATION_TYPE_DEVICE && properties.location.id == gpu)
        TRY(map, "allocation", at, what->allocation, 0, object, 0);
    else
        mlak_fail(fault, MLAK_INVALID, "gpu", "the allocation does not lie on %.48s; give the GPU it was made on",
                  what->gpu);
failed:
    cu->release(object);
    return fault->code;
}

static enum mlak_code open_vmm(const struct cuda_memory *memory, const struct mlak_memory *what, CUdevice gpu,
                               struct cuda_opened *opened, struct mlak_fault *fault)
{
    const struct mlak_driver *cu = memory->cu;
    CUmemAccessDesc access = {.location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = memory->gpu},
                              .flags =
                                  what->writable ? CU_MEM_ACCESS_FLAGS_PROT_READWRITE : CU_MEM_ACCESS_FLAGS_PROT_READ};
    uint32_t mapped = 0;
    fault->code = MLAK_OK;
    opened->bytes = what->allocation * what->n_fds;
    CUresult result = cu->address_reserve(&opened->base, opened->bytes, 0, 0, 0);
    if (result != CUDA_SUCCESS)
        return mlak_driver_fail(fault, result == CUDA_ERROR_OUT_OF_MEMORY ? MLAK_MEMORY : MLAK_INVALID, "allocation",
                                "address_reserve", result);
    for (; mapped < what->n_fds; mapped++)
        if (map_one(cu, what, what->fds[mapped], gpu, opened->base + mapped * what->allocation, fault) != MLAK_OK)
            goto failed;
    TRY(set_access, "access", opened->base, opened->bytes, &access, 1);
    return MLAK_OK;
failed:
    if (mapped)
        cu->unmap(opened->base, mapped * what->allocation);
    cu->address_free(opened->base, opened->bytes);
    return fault->code;
}

static void close_opened(const struct mlak_driver *cu, struct cuda_opened *opened)
{
    switch (opened->kind) {
    case MLAK_MEMORY_HOST: cu->host_unregister(opened->host); break;
    case MLAK_MEMORY_CUDA_IPC:
        cu->ipc_close(opened->base);
        explicit_bzero(opened->handle, sizeof opened->handle);
        break;
    case MLAK_MEMORY_CUDA_VMM:
        cu->unmap(opened->base, opened->bytes);
        cu->address_free(opened->base, opened->bytes);
    }
    free(opened);
}

/* ---- the door ---- */

static struct cuda_opened *find_handle(const struct cuda_memory *memory, const uint8_t handle[64])
{
    struct cuda_opened *opened = memory->opened;
    while (opened && (opened->kind != MLAK_MEMORY_CUDA_IPC || memcmp(opened->handle, handle, 64) != 0))
        opened = opened->next;
    return opened;
}

/* A reference to what the buffer lies in, opened now if it is not yet. Locked. */
static struct cuda_opened *find_or_open(struct cuda_memory *memory, const struct mlak_memory *what,
                                        struct mlak_fault *fault)
{
    CUdevice gpu = memory->gpu;
    bool host = what->kind == MLAK_MEMORY_HOST;
    if (!host && check_gpu(memory, what, &gpu, fault) != MLAK_OK)
        return NULL;
    struct cuda_opened *opened = what->kind == MLAK_MEMORY_CUDA_IPC ? find_handle(memory, what->handle) : NULL;
    if (opened && opened->gpu != gpu) {
        mlak_fail(fault, MLAK_INVALID, "gpu",
                  "the handle's memory was registered before, and as on another GPU than %.48s; give the one that it "
                  "was allocated on", what->gpu);
        return NULL;
    }
    if (opened) {
        opened->refs++;
        return opened;
    }
    opened = calloc(1, sizeof *opened);
    if (!opened) {
        mlak_fail(fault, MLAK_MEMORY, "", "no memory to note another buffer; unregister others first");
        return NULL;
    }
    opened->kind = what->kind;
    opened->refs = 1;
    opened->bytes = what->bytes;
    opened->gpu = gpu;
    opened->local = !host && gpu == memory->gpu;
    enum mlak_code code = host                                 ? open_host(memory, what, opened, fault)
                          : what->kind == MLAK_MEMORY_CUDA_IPC ? open_ipc(memory->cu, what, opened, fault)
                                                               : open_vmm(memory, what, gpu, opened, fault);
    if (code != MLAK_OK) {
        free(opened);
        return NULL;
    }
    opened->next = memory->opened;
    memory->opened = opened;
    return opened;
}

/* Give a reference up. Locked. */
static void unref(struct cuda_memory *memory, struct cuda_opened *opened)
{
    struct cuda_opened **at = &memory->opened;
    if (--opened->refs > 0)
        return;
    while (*at != opened)
        at = &(*at)->next;
    *at = opened->next;
    close_opened(memory->cu, opened);
}

enum mlak_code cuda_memory_import(struct cuda_memory *memory, const struct mlak_memory *what,
                                  struct mlak_mapping *mapping, struct mlak_fault *fault)
{
    struct mlak_fault own;
    fault = fault ? fault : &own;
    pthread_mutex_lock(&memory->lock);
    struct cuda_opened *opened = find_or_open(memory, what, fault);
    uint64_t offset = what->kind == MLAK_MEMORY_HOST ? 0 : what->offset;
    if (opened && (offset > opened->bytes || what->bytes > opened->bytes - offset)) {
        mlak_fail(fault, MLAK_INVALID, "bytes",
                  "%" PRIu64 " bytes from offset %" PRIu64 " pass the end of the allocation, which has %zu bytes",
                  what->bytes, offset, opened->bytes);
        unref(memory, opened);
        opened = NULL;
    }
    if (opened) {
        *mapping = (struct mlak_mapping){.pointer = (void *)(uintptr_t)(opened->base + offset),
                                         .host = what->kind == MLAK_MEMORY_HOST,
                                         .local = opened->local,
                                         .first = offset,
                                         .owner = opened};
        memcpy(mapping->identity, &opened->base, sizeof opened->base);
    }
    pthread_mutex_unlock(&memory->lock);
    return opened ? MLAK_OK : fault->code;
}

void cuda_memory_release(struct cuda_memory *memory, struct mlak_mapping *mapping)
{
    pthread_mutex_lock(&memory->lock);
    unref(memory, mapping->owner);
    mapping->owner = NULL;
    pthread_mutex_unlock(&memory->lock);
}
