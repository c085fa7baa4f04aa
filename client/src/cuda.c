/* cuda.c - see cuda.h. The few driver functions that are needed, declared here with the driver's ABI. */
#include "cuda.h"
#include "mlac.h"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

/* Numbers of the driver's cuda.h. */
enum {
    ATTRIBUTE_MEMORY_TYPE = 2,
    ATTRIBUTE_IS_MANAGED = 8,
    ATTRIBUTE_DEVICE_ORDINAL = 9,
    ATTRIBUTE_IS_LEGACY_IPC_CAPABLE = 10,
    MEMORY_TYPE_DEVICE = 2
};

struct ipc_handle {
    unsigned char bytes[64];
};
struct uuid {
    unsigned char bytes[16];
};

/* D(member, symbol, parameters); all return a CUresult, 0 for success. */
#define DRIVER(D)                                                                                                      \
    D(init, cuInit, (unsigned))                                                                                        \
    D(error_text, cuGetErrorString, (int, const char **))                                                              \
    D(device_get, cuDeviceGet, (int *, int))                                                                           \
    D(device_uuid, cuDeviceGetUuid_v2, (struct uuid *, int))                                                           \
    D(attribute, cuPointerGetAttribute, (void *, int, uint64_t))                                                       \
    D(range, cuMemGetAddressRange_v2, (uint64_t *, size_t *, uint64_t))                                                \
    D(export, cuIpcGetMemHandle, (struct ipc_handle *, uint64_t))                                                      \
    D(drain, cuStreamSynchronize, (void *))

static struct {
    const char *missing; /* why there is no driver; NULL: there is */
#define MEMBER(member, symbol, parameters) int(*member) parameters;
    DRIVER(MEMBER)
#undef MEMBER
} driver;

static void load(void)
{
    void *library = dlopen("libcuda.so.1", RTLD_NOW);
    if (!library) {
        driver.missing = "libcuda.so.1 cannot be loaded";
        return;
    }
#define FIND(member, symbol, parameters)                                                                               \
    *(void **)(void *)&driver.member = dlsym(library, #symbol);                                                        \
    if (!driver.member)                                                                                                \
        driver.missing = "it lacks " #symbol;
    DRIVER(FIND)
#undef FIND
    if (!driver.missing && driver.init(0) != 0)
        driver.missing = "cuInit failed";
}

static mla_status need_driver(mla_error *error)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, load);
    return driver.missing
               ? mlac_fail(error, MLA_NO_DEVICE, "", "this process has no usable NVIDIA driver: %s", driver.missing)
               : MLA_OK;
}

static mla_status driver_fail(mla_error *error, const char *field, const char *call, int code)
{
    const char *text = NULL;
    driver.error_text(code, &text);
    return mlac_fail(error, MLA_BUFFER, field, "%s: %s (%d)", call, text ? text : "unknown error", code);
}

static int attribute(int which, uint64_t pointer)
{
    int value = 0; /* some drivers do not know every attribute; those are then not set */
    return driver.attribute(&value, which, pointer) == 0 ? value : 0;
}

static mla_status name_gpu(uint64_t pointer, char name[64], mla_error *error)
{
    struct uuid uuid;
    int device = 0, ordinal = -1;
    int code = driver.attribute(&ordinal, ATTRIBUTE_DEVICE_ORDINAL, pointer);
    if (code == 0)
        code = driver.device_get(&device, ordinal);
    if (code == 0)
        code = driver.device_uuid(&uuid, device);
    if (code != 0)
        return driver_fail(error, "pointer", "cuDeviceGetUuid", code);
    int length = snprintf(name, 64, "GPU-");
    for (int i = 0; i < 16; i++)
        length += snprintf(name + length, (size_t)(64 - length), "%s%02x",
                           i == 4 || i == 6 || i == 8 || i == 10 ? "-" : "", uuid.bytes[i]);
    return MLA_OK;
}

mla_status mlac_cuda_export(const void *memory, size_t bytes, struct mlac_export *out, mla_error *error)
{
    uint64_t pointer = (uintptr_t)memory, base = 0;
    size_t size = 0;
    struct ipc_handle handle;
    mla_status status = need_driver(error);
    if (status != MLA_OK)
        return status;
    if (attribute(ATTRIBUTE_MEMORY_TYPE, pointer) != MEMORY_TYPE_DEVICE)
        return mlac_fail(
            error, MLA_BUFFER, "pointer",
            "it is no GPU memory of this process; host memory goes by mla_buffer_alloc or mla_buffer_import");
    if (attribute(ATTRIBUTE_IS_MANAGED, pointer))
        return mlac_fail(error, MLA_BUFFER, "pointer",
                         "managed memory (cudaMallocManaged) cannot be shared between processes; use cudaMalloc");
    int code = driver.range(&base, &size, pointer);
    if (code != 0)
        return driver_fail(error, "pointer", "cuMemGetAddressRange", code);
    if (bytes > size - (pointer - base))
        return mlac_fail(error, MLA_BUFFER, "bytes",
                         "%zu bytes pass the end of the allocation, which has %zu from there on", bytes,
                         size - (size_t)(pointer - base));
    if (!attribute(ATTRIBUTE_IS_LEGACY_IPC_CAPABLE, pointer))
        return mlac_fail(
            error, MLA_BUFFER, "pointer",
            "its allocator (cudaMallocAsync, or PyTorch with backend:cudaMallocAsync or "
            "expandable_segments:True) makes memory without an IPC handle; use cudaMalloc, or PyTorch with "
            "expandable_segments:False");
    code = driver.export(&handle, pointer);
    if (code != 0)
        return driver_fail(error, "pointer", "cuIpcGetMemHandle", code);
    for (unsigned i = 0; i < sizeof handle; i++)
        snprintf(out->handle + i * 2, 3, "%02x", handle.bytes[i]);
    explicit_bzero(&handle, sizeof handle);
    out->offset = pointer - base;
    return name_gpu(pointer, out->gpu, error);
}

MLA_API mla_status mla_stream_drain(void *stream, mla_error *error)
{
    mla_status status = need_driver(error);
    if (status != MLA_OK)
        return status;
    int code = driver.drain(stream);
    return code == 0 ? MLA_OK : driver_fail(error, "stream", "cuStreamSynchronize", code);
}
