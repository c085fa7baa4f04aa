/* cuda.c - see cuda.h and driver.h. */
#include "cuda.h"
#include "driver.h"
#include "mlac.h"

#include <dlfcn.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* Numbers of the driver's cuda.h. */
enum {
    ATTRIBUTE_CONTEXT = 1,
    ATTRIBUTE_MEMORY_TYPE = 2,
    ATTRIBUTE_IS_MANAGED = 8,
    ATTRIBUTE_DEVICE_ORDINAL = 9,
    ATTRIBUTE_IS_LEGACY_IPC_CAPABLE = 10,
    ATTRIBUTE_MEMPOOL_HANDLE = 17,
    DEVICE_MPS_ENABLED = 133,
    MEMORY_TYPE_DEVICE = 2,
    HANDLE_TYPE_POSIX_FD = 1,
    STREAM_NON_BLOCKING = 1,
    EVENT_DISABLE_TIMING = 2,
    CAPTURE_RELAXED = 2,
    ERROR_INVALID_CONTEXT = 201,
    ERROR_NOT_READY = 600
};

enum { PROBE_MS = 20 };

struct mlac_driver mlac_driver;

static void load(void)
{
    void *library = dlopen("libcuda.so.1", RTLD_NOW);
    if (!library) {
        mlac_driver.missing = "libcuda.so.1 cannot be loaded";
        return;
    }
#define FIND(member, symbol, parameters)                                                                               \
    *(void **)(void *)&mlac_driver.member = dlsym(library, #symbol);                                                   \
    if (!mlac_driver.member)                                                                                           \
        mlac_driver.missing = "it lacks " #symbol;
    MLAC_DRIVER(FIND)
#undef FIND
    if (!mlac_driver.missing && mlac_driver.init(0) != 0)
        mlac_driver.missing = "cuInit failed";
}

mla_status mlac_need_driver(mla_error *error)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, load);
    return mlac_driver.missing
               ? mlac_fail(error, MLA_NO_DEVICE, "", "this process has no usable NVIDIA driver: %s",
                           mlac_driver.missing)
               : MLA_OK;
}

/* Errors that stay: this process's context is of no use any more, of its own doing or, under MPS, of another's. */
static bool is_lost(int code)
{
    return code == 214 || code == 220 || code == 700 || code == 702 || code == 709 || code == 710 ||
           (code >= 714 && code <= 719) || (code >= 805 && code <= 810);
}

mla_status mlac_driver_fail(mla_error *error, const char *field, const char *call, int code)
{
    const char *text = NULL;
    mlac_driver.error_text(code, &text);
    if (is_lost(code))
        return mlac_fail(error, MLA_DEVICE_LOST, field,
                         "%s: %s (%d); this process's own CUDA context is lost: start the process again (under MPS a "
                         "fault of any client ends the contexts of all clients on that GPU)",
                         call, text ? text : "unknown error", code);
    return mlac_fail(error, MLA_BUFFER, field, "%s: %s (%d)%s", call, text ? text : "unknown error", code,
                     code == ERROR_INVALID_CONTEXT ? "; call cudaSetDevice in this thread first" : "");
}

/* Attributes have 1, 4 or 8 bytes. */
static uint64_t attribute(int which, uint64_t pointer)
{
    uint64_t value = 0; /* some drivers do not know every attribute; those are then not set */
    return mlac_driver.attribute(&value, which, pointer) == 0 ? value : 0;
}

static int name_device(int device, char name[64])
{
    struct mlac_uuid uuid;
    int code = mlac_driver.device_uuid(&uuid, device);
    if (code != 0)
        return code;
    int length = snprintf(name, 64, "GPU-");
    for (int i = 0; i < 16; i++)
        length += snprintf(name + length, (size_t)(64 - length), "%s%02x",
                           i == 4 || i == 6 || i == 8 || i == 10 ? "-" : "", uuid.bytes[i]);
    return 0;
}

static mla_status name_gpu(uint64_t pointer, char name[64], mla_error *error)
{
    int device = 0, ordinal = -1;
    int code = mlac_driver.attribute(&ordinal, ATTRIBUTE_DEVICE_ORDINAL, pointer);
    if (code == 0)
        code = mlac_driver.device_get(&device, ordinal);
    if (code == 0)
        code = name_device(device, name);
    return code == 0 ? MLA_OK : mlac_driver_fail(error, "pointer", "cuDeviceGetUuid", code);
}

bool mlac_cuda_current(char gpu[64], int *mps)
{
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD), *context = NULL;
    if (!library) {
        dlerror(); /* or its words about this stay with the thread */
        dlerror();
        return false;
    }
    int (*current)(void **);
    *(void **)(void *)&current = dlsym(library, "cuCtxGetCurrent");
    bool found = current && current(&context) == 0 && context; /* it fails where nobody has called cuInit */
    dlclose(library);
    int device;
    if (!found || mlac_need_driver(NULL) != MLA_OK || mlac_driver.context_device(&device) != 0 ||
        name_device(device, gpu) != 0)
        return false;
    int enabled;
    *mps = mlac_driver.device_attribute(&enabled, DEVICE_MPS_ENABLED, device) == 0 ? enabled != 0 : -1;
    return true;
}

/* ---- cuMemAlloc ---- */

static mla_status export_legacy(uint64_t pointer, uint64_t base, size_t size, size_t bytes, struct mlac_export *out,
                                mla_error *error)
{
    struct mlac_ipc_handle handle;
    if (bytes > size - (pointer - base))
        return mlac_fail(error, MLA_BUFFER, "bytes",
                         "%zu bytes pass the end of the allocation, which has %zu from there on", bytes,
                         size - (size_t)(pointer - base));
    int code = mlac_driver.export(&handle, pointer);
    if (code != 0)
        return mlac_driver_fail(error, "pointer", "cuIpcGetMemHandle", code);
    for (unsigned i = 0; i < sizeof handle; i++)
        snprintf(out->handle + i * 2, 3, "%02x", handle.bytes[i]);
    explicit_bzero(&handle, sizeof handle);
    return MLA_OK;
}

/* ---- cuMemCreate ---- */

/* Can this allocation be exported? `object` is one that was retained. */
static mla_status check_object(uint64_t object, mla_error *error)
{
    struct mlac_properties properties = {0};
    int code = mlac_driver.properties(&properties, object);
    if (code != 0)
        return mlac_driver_fail(error, "pointer", "cuMemGetAllocationPropertiesFromHandle", code);
    if (properties.handle_types & HANDLE_TYPE_POSIX_FD)
        return MLA_OK;
    return mlac_fail(error, MLA_BUFFER, "pointer",
                     "its allocator (cuMemCreate with requestedHandleTypes %d) makes memory that cannot be exported as "
                     "a file descriptor; create it with CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, or under PyTorch set "
                     "expandable_segments:False", properties.handle_types);
}

/* One descriptor of the allocation that is mapped at `at`. */
static mla_status export_one(uint64_t at, int *fd, mla_error *error)
{
    uint64_t object;
    int code = mlac_driver.retain(&object, (void *)(uintptr_t)at);
    if (code != 0)
        return mlac_driver_fail(error, "pointer", "cuMemRetainAllocationHandle", code);
    mla_status status = check_object(object, error);
    if (status == MLA_OK) {
        code = mlac_driver.export_fd(fd, object, HANDLE_TYPE_POSIX_FD, 0);
        if (code != 0)
            status = mlac_driver_fail(error, "pointer", "cuMemExportToShareableHandle", code);
    }
    mlac_driver.release(object);
    return status;
}

mla_status mlac_cuda_descriptors(const struct mlac_vmm *vmm, int *fds, mla_error *error)
{
    mla_status status = MLA_OK;
    uint32_t made = 0;
    while (made < vmm->count && (status = export_one(vmm->start + made * vmm->bytes, &fds[made], error)) == MLA_OK)
        made++;
    while (status != MLA_OK && made > 0)
        close(fds[--made]);
    return status;
}

/* The allocations from the first one, [base, base + size), to the one that holds the buffer's last byte. */
static mla_status list_allocations(uint64_t pointer, uint64_t base, size_t size, size_t bytes, struct mlac_vmm *vmm,
                                   mla_error *error)
{
    uint64_t needed = (pointer - base + bytes - 1) / size + 1;
    if (needed > MLAP_MAX_FDS)
        return mlac_fail(error, MLA_BUFFER, "bytes",
                         "they span %llu allocations of %zu bytes (cuMemCreate), and one buffer takes at most %u; "
                         "register parts of at most %llu bytes, or under PyTorch set expandable_segments:False",
                         (unsigned long long)needed, size, MLAP_MAX_FDS,
                         (unsigned long long)(size * MLAP_MAX_FDS - (pointer - base)));
    for (uint64_t i = 1; i < needed; i++) {
        uint64_t next = base + i * size, start = 0;
        size_t length = 0;
        int code = mlac_driver.range(&start, &length, next);
        if (code != 0 || start != next)
            return mlac_fail(error, MLA_BUFFER, "bytes",
                             "%zu bytes pass the end of the memory that is mapped there, which has %llu from there on",
                             bytes, (unsigned long long)(next - pointer));
        if (length != size)
            return mlac_fail(error, MLA_BUFFER, "bytes",
                             "they span allocations (cuMemCreate) of different sizes, %zu and %zu bytes; register the "
                             "%llu bytes up to there and the rest apart",
                             size, length, (unsigned long long)(next - pointer));
    }
    *vmm = (struct mlac_vmm){base, size, (uint32_t)needed};
    return MLA_OK;
}

static mla_status export_vmm(uint64_t pointer, uint64_t base, size_t size, size_t bytes, struct mlac_export *out,
                             mla_error *error)
{
    uint64_t object;
    if (attribute(ATTRIBUTE_MEMPOOL_HANDLE, pointer))
        return mlac_fail(error, MLA_BUFFER, "pointer",
                         "its allocator (cudaMallocAsync, or PyTorch with backend:cudaMallocAsync) makes memory that "
                         "has no handle of its own to share; use cudaMalloc, or PyTorch with backend:native");
    int code = mlac_driver.retain(&object, (void *)(uintptr_t)pointer);
    if (code != 0)
        return mlac_driver_fail(error, "pointer", "its allocator is neither cuMemAlloc nor cuMemCreate: "
                                             "cuMemRetainAllocationHandle", code);
    mla_status status = check_object(object, error);
    mlac_driver.release(object);
    return status == MLA_OK ? list_allocations(pointer, base, size, bytes, &out->vmm, error) : status;
}

/* ---- the door ---- */

static mla_status export(const void *memory, size_t bytes, struct mlac_export *out, mla_error *error)
{
    uint64_t pointer = (uintptr_t)memory, base = 0;
    size_t size = 0;
    mla_status status;
    unsigned type = 0;
    int code = mlac_driver.attribute(&type, ATTRIBUTE_MEMORY_TYPE, pointer);
    if (is_lost(code))
        return mlac_driver_fail(error, "pointer", "cuPointerGetAttribute", code);
    if (code != 0 || type != MEMORY_TYPE_DEVICE)
        return mlac_fail(
            error, MLA_BUFFER, "pointer",
            "it is no GPU memory of this process; host memory goes by mla_buffer_alloc or mla_buffer_import");
    if (attribute(ATTRIBUTE_IS_MANAGED, pointer))
        return mlac_fail(error, MLA_BUFFER, "pointer",
                         "managed memory (cudaMallocManaged) cannot be shared between processes; use cudaMalloc");
    code = mlac_driver.range(&base, &size, pointer);
    if (code != 0)
        return mlac_driver_fail(error, "pointer", "cuMemGetAddressRange", code);
    bool legacy = attribute(ATTRIBUTE_IS_LEGACY_IPC_CAPABLE, pointer);
    status = (legacy ? export_legacy : export_vmm)(pointer, base, size, bytes, out, error);
    out->offset = pointer - base;
    return status == MLA_OK ? name_gpu(pointer, out->gpu, error) : status;
}

mla_status mlac_cuda_export(const void *memory, size_t bytes, struct mlac_export *out, mla_error *error)
{
    *out = (struct mlac_export){0};
    mla_status status = mlac_need_driver(error);
    if (status != MLA_OK)
        return status;
    int mode = MLAC_CAPTURE_RELAXED; /* it is no work of a stream's, which this thread may be capturing */
    mlac_driver.capture_mode(&mode);
    status = export(memory, bytes, out, error);
    mlac_driver.capture_mode(&mode);
    return status;
}

/* Let others run: at first until they yield in turn, as the work is that of one step and nearly done; later for
 * 50 us. */
static void pause_since(int64_t start)
{
    if (mlac_now() - start < 2 * MLAC_MS)
        sched_yield();
    else
        nanosleep(&(struct timespec){.tv_nsec = 50000}, NULL);
}

/* What has become of a stream's work once it is done, or at the deadline: 0, ERROR_NOT_READY or an error. */
int mlac_poll_stream(void *stream, int64_t deadline)
{
    int64_t start = mlac_now();
    int code;
    while ((code = mlac_driver.stream_query(stream)) == ERROR_NOT_READY && mlac_now() < deadline)
        pause_since(start);
    return code;
}

/* What becomes of work in the current context: 0, ERROR_NOT_READY or an error. Asking without giving it any would not
 * do: a context that others' faults have ended may not know of it until it has something to do. */
static int try_work(void)
{
    void *stream, *event;
    int code = mlac_driver.stream_new(&stream, STREAM_NON_BLOCKING);
    if (code != 0)
        return code;
    code = mlac_driver.event_new(&event, EVENT_DISABLE_TIMING);
    if (code == 0) {
        code = mlac_driver.event_record(event, stream);
        if (code == 0)
            code = mlac_poll_stream(stream, mlac_deadline(PROBE_MS));
        mlac_driver.event_free(event);
    }
    mlac_driver.stream_free(stream);
    return code;
}

mla_status mlac_cuda_check(uint64_t pointer, mla_error *error)
{
    void *context = NULL;
    int mode = CAPTURE_RELAXED; /* or what we do might spoil another thread's capture */
    int code = mlac_driver.attribute(&context, ATTRIBUTE_CONTEXT, pointer);
    bool pushed = false;
    if (!is_lost(code) && context) {
        code = mlac_driver.push(context);
        pushed = code == 0;
    }
    if (!is_lost(code)) {
        bool relaxed = mlac_driver.capture_mode(&mode) == 0;
        code = try_work();
        if (relaxed)
            mlac_driver.capture_mode(&mode);
    }
    if (pushed)
        mlac_driver.pop(&context);
    return is_lost(code) ? mlac_driver_fail(error, "", "work given to the context", code) : MLA_OK;
}

MLA_API mla_status mla_stream_drain(void *stream, int timeout_ms, mla_error *error)
{
    if (timeout_ms < MLA_FOREVER)
        return mlac_fail(error, MLA_INVALID, "timeout_ms", "%d is neither MLA_FOREVER nor 0 or more", timeout_ms);
    mla_status status = mlac_need_driver(error);
    if (status != MLA_OK)
        return status;
    int code = mlac_poll_stream(stream, mlac_deadline(timeout_ms));
    if (code == ERROR_NOT_READY)
        return mlac_fail(error, MLA_TIMEOUT, "stream",
                         "the work on stream %p did not complete within %d ms; it goes on: drain the stream again "
                         "before submitting what reads its results", stream, timeout_ms);
    return code == 0 ? MLA_OK : mlac_driver_fail(error, "stream", "cuStreamQuery", code);
}
