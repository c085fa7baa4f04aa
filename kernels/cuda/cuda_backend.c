/* cuda_backend.c - a GPU as a device: opens it, gives it other processes' memory, and says when it is lost.
 *
 * A driver error that leaves the context unusable is MLAK_LOST: only a new process recovers. */
#include "cuda_device.h"
#include "mlak_backends.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { LEAST_SLOTS = 1024 }; /* of a room: 135 MB; deterministic batches take 64 a request */

extern const uint8_t mlak_cuda_image[]; /* the fatbin, cuda_image.S */

/* ---- open and close ---- */

#define TRY(call, field, ...)                                                                                          \
    do {                                                                                                               \
        CUresult result_ = device->cu->call(__VA_ARGS__);                                                              \
        if (result_ != CUDA_SUCCESS)                                                                                   \
            return mlak_driver_fail(fault, result_ == CUDA_ERROR_OUT_OF_MEMORY ? MLAK_MEMORY : MLAK_UNSUPPORTED,       \
                                    field, #call, result_);                                                            \
    } while (0)

static enum mlak_code find_gpu(struct mlak_device *device, const char *name, struct mlak_fault *fault)
{
    int count = 0, major = 0, minor = 0;
    bool found = false;
    TRY(device_count, "device", &count);
    for (int i = 0; i < count && !found; i++) {
        CUuuid uuid;
        char text[MLAK_UUID_TEXT];
        TRY(device_get, "device", &device->gpu, i);
        TRY(device_uuid, "device", &uuid, device->gpu);
        mlak_uuid_text(&uuid, text);
        found = strcmp(text, name) == 0;
    }
    if (!found)
        return mlak_fail(fault, MLAK_UNSUPPORTED, "device", "the driver sees %d GPUs, and none is %.48s", count, name);
    TRY(device_attribute, "device", &major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device->gpu);
    TRY(device_attribute, "device", &minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device->gpu);
    device->wgmma = major == 9 && minor == 0;
    device->early = major >= 9;
    if (major < 8)
        return mlak_fail(fault, MLAK_UNSUPPORTED, "device",
                         "the GPU's compute capability is %d.%d; the kernels need 8.0 or higher", major, minor);
    return MLAK_OK;
}

static enum mlak_code load_kernels(struct mlak_device *device, struct mlak_fault *fault)
{
    static const char *const types[MLAK_CUDA_TYPES] = MLAK_CUDA_TYPE_NAMES;
    int shared = 0, processors = 0, resident = 0;
    TRY(module_load, "kernels", &device->module, mlak_cuda_image);
    TRY(module_function, "kernels", &device->prepare, device->module, "mlak_cuda_prepare");
    TRY(function_attribute, "kernels", device->prepare, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
        MLAK_CUDA_PREPARE_SHARED);
    TRY(module_function, "kernels", &device->combine, device->module, "mlak_cuda_combine");
    TRY(function_attribute, "kernels", device->combine, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
        MLAK_CUDA_COMBINE_SHARED);
    TRY(device_attribute, "device", &shared, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, device->gpu);
    TRY(device_attribute, "device", &processors, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, device->gpu);
    if (shared < MLAK_CUDA_SPLIT_SHARED_1)
        return mlak_fail(fault, MLAK_UNSUPPORTED, "device",
                         "the GPU gives a block %d bytes of shared memory; the kernels need %d", shared,
                         MLAK_CUDA_SPLIT_SHARED_1);
    device->split_shared = shared >= MLAK_CUDA_SPLIT_SHARED_2 ? MLAK_CUDA_SPLIT_SHARED_2 : MLAK_CUDA_SPLIT_SHARED_1;
    device->most_shared = (unsigned)shared;
    for (unsigned i = 0; i < MLAK_CUDA_TYPES; i++) {
        char name[64];
        snprintf(name, sizeof name, "mlak_cuda_split_%s", types[i]);
        TRY(module_function, "kernels", &device->split[i], device->module, name);
        TRY(function_attribute, "kernels", device->split[i], CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
            (int)device->split_shared);
        if (shared < MLAK_CUDA_SPLIT_SHARED_WIDE)
            continue;
        snprintf(name, sizeof name, "mlak_cuda_split_wide_%s", types[i]);
        TRY(module_function, "kernels", &device->wide[i], device->module, name);
        TRY(function_attribute, "kernels", device->wide[i], CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
            MLAK_CUDA_SPLIT_SHARED_WIDE);
    }
    for (unsigned i = 0; device->wgmma && i < MLAK_CUDA_WGMMA_TYPES; i++) {
        char name[64];
        snprintf(name, sizeof name, "mlak_cuda_split_wgmma_%s", types[i]);
        CUresult found = device->cu->module_function(&device->split_wgmma[i], device->module, name);
        if (found == CUDA_ERROR_NOT_FOUND) { /* the image has no machine code for Hopper: the portable kernels do */
            device->wgmma = false;
            break;
        }
        if (found != CUDA_SUCCESS)
            return mlak_driver_fail(fault, MLAK_UNSUPPORTED, "kernels", "module_function", found);
        TRY(function_attribute, "kernels", device->split_wgmma[i], CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
            MLAK_CUDA_SPLIT_SHARED_WGMMA);
    }
    TRY(occupancy, "kernels", &resident, device->split[0], MLAK_CUDA_THREADS, device->split_shared);
    device->split_grid = (unsigned)(processors * (resident > 0 ? resident : 1));
    if (device->split_grid > MLAK_CUDA_PREPARE_THREADS)
        device->split_grid = MLAK_CUDA_PREPARE_THREADS;
    device->max_slots = device->split_grid * 2 < LEAST_SLOTS ? LEAST_SLOTS : device->split_grid * 2;
    device->combine_grid = (unsigned)processors * 2; /* all at once: see its registers */
    return MLAK_OK;
}

static enum mlak_code take_memory(struct mlak_device *device, struct mlak_fault *fault)
{
    for (unsigned i = 0; i < CUDA_LAUNCHES; i++) {
        const char *call;
        CUresult result = cuda_room_open(device, &device->rooms[i], true, &call);
        if (result != CUDA_SUCCESS)
            return mlak_driver_fail(fault, result == CUDA_ERROR_OUT_OF_MEMORY ? MLAK_MEMORY : MLAK_UNSUPPORTED,
                                    "memory", call, result);
    }
    return MLAK_OK;
}

static enum mlak_code open_device(struct mlak_device *device, const struct mlak_options *options,
                                  struct mlak_fault *fault)
{
    const char *variant = options->variant;
    if (variant && strcmp(variant, "mma") != 0 && strcmp(variant, "wgmma") != 0)
        return mlak_fail(fault, MLAK_UNSUPPORTED, "variant", "a GPU has no variant %.64s; leave it out", variant);
    enum mlak_code code = find_gpu(device, options->device ? options->device : "", fault);
    if (code != MLAK_OK)
        return code;
    if (variant && strcmp(variant, "mma") == 0)
        device->wgmma = false;
    TRY(context_retain, "device", &device->context, device->gpu);
    TRY(context_set, "device", device->context);
    cuda_memory_init(&device->memory, device->cu, device->gpu);
    device->memory_ready = true;
    code = load_kernels(device, fault);
    if (code == MLAK_OK && variant && strcmp(variant, "wgmma") == 0 && !device->wgmma)
        return mlak_fail(fault, MLAK_UNSUPPORTED, "variant", "wgmma needs compute capability 9.0; leave it out");
    if (code == MLAK_OK)
        code = take_memory(device, fault);
    if (code != MLAK_OK)
        return code;
    TRY(stream_new, "device", &device->control, CU_STREAM_NON_BLOCKING);
    TRY(event_new, "device", &device->sign, CU_EVENT_DISABLE_TIMING);
    return MLAK_OK;
}

static void cuda_close(struct mlak_device *device)
{
    const struct mlak_driver *cu = device->cu;
    if (device->context)
        cu->context_set(device->context);
    cuda_ordered_close(device);
    for (unsigned i = 0; i < CUDA_LAUNCHES; i++)
        cuda_room_close(device, &device->rooms[i]);
    if (device->control)
        cu->stream_free(device->control);
    if (device->sign)
        cu->event_free(device->sign);
    if (device->module)
        cu->module_unload(device->module);
    if (device->memory_ready)
        cuda_memory_deinit(&device->memory);
    if (device->context)
        cu->context_release(device->gpu);
    pthread_mutex_destroy(&device->losing);
    free(device);
}

static struct mlak_device *cuda_open(const struct mlak_options *options, struct mlak_fault *fault)
{
    const struct mlak_driver *cu = mlak_driver(fault);
    struct mlak_device *device = cu ? calloc(1, sizeof *device) : NULL;
    if (!device) {
        if (cu)
            mlak_fail(fault, MLAK_MEMORY, "", "no memory for the device");
        return NULL;
    }
    device->cu = cu;
    device->progress = options->progress;
    pthread_mutex_init(&device->losing, NULL);
    if (open_device(device, options, fault) != MLAK_OK) {
        cuda_close(device);
        return NULL;
    }
    mlak_cuda_capabilities(device->capabilities, device->wgmma);
    return device;
}

static const char *cuda_variant(const struct mlak_device *device)
{
    return device->wgmma ? "wgmma" : "mma";
}

static uint32_t cuda_threads(const struct mlak_device *device)
{
    (void)device;
    return 0; /* none of ours compute */
}

static const struct mlak_capability *cuda_capabilities(const struct mlak_device *device, size_t *count)
{
    *count = MLAK_CONTRACT_ROWS;
    return device->capabilities;
}

/* ---- loss ---- */

static enum mlak_code lost_fault(struct mlak_fault *fault, const char *call, CUresult result)
{
    struct mlak_fault own;
    mlak_driver_fail(&own, MLAK_LOST, "device", call, result);
    return mlak_fail(fault, MLAK_LOST, "device", "the GPU failed: %.200s", own.message);
}

enum mlak_code cuda_lose(struct mlak_device *device, const char *call, CUresult result, struct mlak_fault *fault)
{
    struct mlak_fault own;
    lost_fault(&own, call, result);
    pthread_mutex_lock(&device->losing);
    if (!device->is_lost)
        snprintf(device->lost, sizeof device->lost, "%s", own.message);
    __atomic_store_n(&device->is_lost, true, __ATOMIC_RELEASE);
    pthread_mutex_unlock(&device->losing);
    if (fault)
        *fault = own;
    return MLAK_LOST;
}

enum mlak_code cuda_enter(struct mlak_device *device, struct mlak_fault *fault)
{
    if (__atomic_load_n(&device->is_lost, __ATOMIC_ACQUIRE))
        return mlak_fail(fault, MLAK_LOST, "device", "%s", device->lost);
    CUresult result = device->cu->context_set(device->context);
    return result == CUDA_SUCCESS ? MLAK_OK : cuda_lose(device, "cuCtxSetCurrent", result, fault);
}

static const char *cuda_lost(const struct mlak_device *device)
{
    return device->lost;
}

static enum mlak_code cuda_check(struct mlak_device *device, struct mlak_fault *fault)
{
    CUresult result = device->cu->context_set(device->context);
    if (result == CUDA_SUCCESS)
        result = device->cu->stream_query(device->control);
    if (result == CUDA_SUCCESS)
        result = device->cu->event_record(device->sign, device->control);
    bool lives = result == CUDA_SUCCESS || result == CUDA_ERROR_NOT_READY;
    return lives ? MLAK_OK : lost_fault(fault, "a sign of life", result);
}

/* ---- memory ---- */

static enum mlak_code cuda_import(struct mlak_device *device, const struct mlak_memory *memory,
                                  struct mlak_mapping *mapping, struct mlak_fault *fault)
{
    CUresult result = device->cu->context_set(device->context);
    if (result != CUDA_SUCCESS)
        return lost_fault(fault, "cuCtxSetCurrent", result);
    enum mlak_code code = cuda_memory_import(&device->memory, memory, mapping, fault);
    if (code == MLAK_OK)
        return code;
    /* Is it the memory, or is the context lost? */
    struct mlak_fault lost;
    if (cuda_check(device, &lost) == MLAK_OK)
        return code;
    if (fault)
        *fault = lost;
    return MLAK_LOST;
}

static void cuda_release(struct mlak_device *device, struct mlak_mapping *mapping)
{
    device->cu->context_set(device->context);
    cuda_memory_release(&device->memory, mapping);
}

/* ---- for tests and benchmarks ---- */

static void *cuda_memory_new(struct mlak_device *device, uint64_t bytes, struct mlak_fault *fault)
{
    CUdeviceptr at = 0;
    CUresult result = device->cu->context_set(device->context);
    if (result == CUDA_SUCCESS)
        result = device->cu->alloc(&at, bytes);
    if (result != CUDA_SUCCESS)
        mlak_driver_fail(fault, MLAK_MEMORY, "memory", "alloc", result);
    return (void *)at;
}

static void cuda_memory_free(struct mlak_device *device, void *memory)
{
    device->cu->context_set(device->context);
    device->cu->free((CUdeviceptr)memory);
}

static enum mlak_code cuda_memory_copy(struct mlak_device *device, void *to, const void *from, uint64_t bytes)
{
    CUresult result = device->cu->context_set(device->context);
    if (result == CUDA_SUCCESS)
        result = device->cu->copy((CUdeviceptr)to, (CUdeviceptr)from, bytes);
    if (result == CUDA_SUCCESS)
        result = device->cu->context_drain(); /* a copy from pageable memory may return before it has landed */
    return result == CUDA_SUCCESS ? MLAK_OK : cuda_lose(device, "copy", result, NULL);
}

static int cuda_mps(const struct mlak_device *device)
{
    const CUdevice_attribute mps_enabled = 133; /* CU_DEVICE_ATTRIBUTE_MPS_ENABLED; older toolkits lack it */
    int enabled;
    return device->cu->device_attribute(&enabled, mps_enabled, device->gpu) == CUDA_SUCCESS ? enabled != 0 : -1;
}

const struct mlak_backend mlak_cuda_backend = {
    .name = "cuda",
    .open = cuda_open,
    .close = cuda_close,
    .variant = cuda_variant,
    .threads = cuda_threads,
    .capabilities = cuda_capabilities,
    .import = cuda_import,
    .release = cuda_release,
    .launches = CUDA_LAUNCHES,
    .launch_batches = cuda_launch_batches,
    .mergeable = cuda_mergeable,
    .check = cuda_check,
    .lost = cuda_lost,
    .lane_new = cuda_lane_new,
    .lane_abandon = cuda_lane_abandon,
    .lane_restart = cuda_lane_restart,
    .lane_free = cuda_lane_free,
    .order_new = cuda_order_new,
    .order_room = cuda_order_room,
    .order_launch = cuda_order_launch,
    .order_poll = cuda_order_poll,
    .mps = cuda_mps,
    .order_free = cuda_order_free,
    .memory_new = cuda_memory_new,
    .memory_free = cuda_memory_free,
    .memory_copy = cuda_memory_copy,
    .graph_new = cuda_graph_new,
    .graph_replay = cuda_graph_replay,
    .graph_free = cuda_graph_free,
    .time_batches = cuda_time_batches,
};
