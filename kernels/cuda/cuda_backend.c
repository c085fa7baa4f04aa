/* cuda_backend.c - a GPU as a device: opens it, gives it other processes' memory, launches the three kernels of
 * mlak_cuda.h and waits for their completion word.
 *
 * Owns a stream, the scratch of one launch in device memory, and pinned memory that the kernels write results into. One
 * launch at a time: what the requests of many parts have in common is copied to the device before it; of one, it goes
 * with the kernels' parameter. A launch that ends in a driver error which leaves the context unusable is MLAK_LOST:
 * only a new
 * process recovers. Waiting never blocks in the driver, so a launch that hangs shows no progress and is the
 * supervisor's to end. */
#include "cuda_device.h"
#include "mlak_backends.h"

#include <sched.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum {
    LEAST_SLOTS = 1024, /* of scratch: 135 MB; deterministic batches take 64 a request */
    SPIN = 2000, /* looks at the completion word before the thread gives way */
    NAP_NS = 20000,
    LOOKS_A_QUERY = 64 /* looks at the completion word for each question to the driver */
};

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
    device->combine_grid = (unsigned)processors * 2; /* all at once: see its registers */
    return MLAK_OK;
}

static enum mlak_code take_memory(struct mlak_device *device, struct mlak_fault *fault)
{
    enum { ROWS = MLAK_CUDA_MAX_REQUESTS };
    struct mlak_cuda_job *job = &device->job;
    job->grid = device->split_grid;
    job->max_slots = job->grid * 2 < LEAST_SLOTS ? LEAST_SLOTS : job->grid * 2;
    TRY(alloc, "memory", &device->rows, ROWS * sizeof(struct mlak_row));
    TRY(alloc, "memory", &device->requests, ROWS * sizeof(struct mlak_cuda_request));
    TRY(alloc, "memory", &device->starts, job->grid * sizeof(struct mlak_cuda_start));
    TRY(alloc, "memory", &device->merges,
        mlak_cuda_most_merges(job->max_slots, MLAK_CUDA_MAX_REQUESTS) * sizeof(struct mlak_cuda_merge));
    TRY(alloc, "memory", &device->schedule, sizeof(struct mlak_cuda_schedule));
    TRY(alloc, "memory", &device->cu_q, (MLAK_MAX_BATCH + 1) * sizeof(int32_t)); /* or of all sources of a launch */
    _Static_assert(MLAK_MAX_BATCH + 1 >= MLAK_CUDA_MAX_REQUESTS + MLAK_CUDA_MAX_SOURCES, "an entry more each");
    TRY(alloc, "memory", &device->sources, MLAK_CUDA_MAX_SOURCES * sizeof(struct mlak_cuda_source));
    TRY(alloc, "memory", &device->parts, (size_t)job->max_slots * MLAK_CUDA_PART_FLOATS * sizeof(float));
    TRY(set_bytes, "memory", device->schedule, 0, sizeof(struct mlak_cuda_schedule));
    TRY(context_drain, "memory"); /* launches go by a stream that does not wait for it */
    const unsigned flags = CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP;
    TRY(host_alloc, "memory", (void **)&device->result, sizeof *device->result, flags);
    TRY(host_alloc, "memory", (void **)&device->cancelled, MLAK_CUDA_MAX_SOURCES * sizeof *device->cancelled, flags);
    TRY(host_alloc, "memory", (void **)&device->staged, MLAK_CUDA_MAX_SOURCES * sizeof *device->staged, flags);
    TRY(host_alloc, "memory", (void **)&device->row_results, ROWS * sizeof *device->row_results, flags);
    memset(device->result, 0, sizeof *device->result);
    memset(device->cancelled, 0, MLAK_CUDA_MAX_SOURCES * sizeof *device->cancelled); /* no launch has this ticket */
    job->sources = (void *)device->sources;
    job->rows = (void *)device->rows;
    job->requests = (void *)device->requests;
    job->starts = (void *)device->starts;
    job->merges = (void *)device->merges;
    job->schedule = (void *)device->schedule;
    job->cu_q = (void *)device->cu_q;
    job->parts = (void *)device->parts;
    CUdeviceptr seen;
    TRY(host_pointer, "memory", &seen, device->result, 0);
    job->result = (void *)seen;
    TRY(host_pointer, "memory", &seen, device->row_results, 0);
    job->row_results = (void *)seen;
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
    TRY(stream_new, "device", &device->stream, CU_STREAM_NON_BLOCKING);
    TRY(stream_new, "device", &device->control, CU_STREAM_NON_BLOCKING);
    TRY(event_new, "device", &device->sign, CU_EVENT_DISABLE_TIMING);
    return MLAK_OK;
}

static void cuda_close(struct mlak_device *device)
{
    const struct mlak_driver *cu = device->cu;
    const CUdeviceptr scratch[] = {device->rows, device->requests, device->starts, device->merges, device->schedule,
                                   device->cu_q, device->parts,    device->sources};
    if (device->context)
        cu->context_set(device->context);
    cuda_ordered_close(device);
    if (device->stream)
        cu->stream_free(device->stream);
    if (device->control)
        cu->stream_free(device->control);
    if (device->sign)
        cu->event_free(device->sign);
    if (device->row_results)
        cu->host_free(device->row_results);
    if (device->staged)
        cu->host_free(device->staged);
    if (device->cancelled)
        cu->host_free(device->cancelled);
    if (device->result)
        cu->host_free(device->result);
    for (unsigned i = 0; i < sizeof scratch / sizeof scratch[0]; i++)
        if (scratch[i])
            cu->free(scratch[i]);
    if (device->module)
        cu->module_unload(device->module);
    if (device->memory_ready)
        cuda_memory_deinit(&device->memory);
    if (device->context)
        cu->context_release(device->gpu);
    free(device->prepared);
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
    device->prepared = calloc(MLAK_CUDA_MAX_SOURCES, sizeof *device->prepared);
    if ((device->prepared ? open_device(device, options, fault)
                          : mlak_fail(fault, MLAK_MEMORY, "", "no memory for the device")) != MLAK_OK) {
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

/* ---- launch ---- */

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
    snprintf(device->lost, sizeof device->lost, "%s", own.message);
    if (fault)
        *fault = own;
    return MLAK_LOST;
}

enum mlak_code cuda_enter(struct mlak_device *device, struct mlak_fault *fault)
{
    if (device->lost[0])
        return mlak_fail(fault, MLAK_LOST, "device", "%s", device->lost);
    CUresult result = device->cu->context_set(device->context);
    return result == CUDA_SUCCESS ? MLAK_OK : cuda_lose(device, "cuCtxSetCurrent", result, fault);
}

static void pass_progress_on(struct mlak_device *device)
{
    uint64_t now = __atomic_load_n(&device->result->progress, __ATOMIC_RELAXED);
    if (now != device->progress_seen && device->progress)
        __atomic_fetch_add(device->progress, 1, __ATOMIC_RELAXED);
    device->progress_seen = now;
}

/* Tell a source of the launch to stop as soon as may be. If the driver does not take the word, it runs to its end. */
static void cancel(struct mlak_device *device, uint64_t ticket, uint32_t source)
{
    if (device->cancelled[source] == ticket)
        return;
    device->cancelled[source] = ticket;
    device->cu->copy_to_async(device->schedule + offsetof(struct mlak_cuda_schedule, cancelled) +
                                  source * sizeof ticket,
                              &device->cancelled[source], sizeof ticket, device->control);
}

CUresult cuda_settle(struct mlak_device *device)
{
    CUresult state;
    while ((state = device->cu->stream_query(device->stream)) == CUDA_ERROR_NOT_READY) {
        pass_progress_on(device);
        nanosleep(&(struct timespec){.tv_nsec = NAP_NS}, NULL);
    }
    pass_progress_on(device);
    return state;
}

enum mlak_code cuda_refused(struct mlak_device *device, const char *call, CUresult result, struct mlak_fault *fault)
{
    if (cuda_settle(device) != CUDA_SUCCESS)
        return cuda_lose(device, call, result, fault);
    return mlak_driver_fail(fault, MLAK_MEMORY, "", call, result);
}

/* Let the copy engine know the keys, if the pages can be cut into boxes of at least 8 rows of a tile. What the driver
 * does not take as a tensor is left to cp.async. */
static void map_keys(const struct mlak_device *device, struct mlak_cuda_source *source)
{
    const struct mlak_batch *batch = &source->batch;
    uint32_t rows = mlak_cuda_box_rows(batch);
    if (rows == 0)
        return;
    const CUtensorMapDataType type =
        batch->kv_format == MLAK_KV_FP16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    const cuuint64_t shape[] = {64, batch->page_size, MLAK_D / 64, batch->pages};
    const cuuint64_t strides[] = {batch->row_stride, 128, batch->page_stride}; /* bytes; of elements: 2 */
    const cuuint32_t steps[] = {1, 1, 1, 1};
    for (uint32_t chunks = 1; chunks <= 2; chunks++) {
        const cuuint32_t box[] = {64, rows, chunks, 1};
        CUtensorMap *map = (CUtensorMap *)(void *)&source->keys[chunks - 1];
        if (device->cu->map_encode(map, type, 4, (void *)(uintptr_t)batch->kv, shape, strides, box, steps,
                                   CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                   CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) !=
            CUDA_SUCCESS)
            return;
    }
    source->box_rows = rows;
}

/* Source `index` of a job of this device that has not been launched yet. */
static struct mlak_cuda_source *source_of(const struct mlak_device *device, struct mlak_cuda_job *job, uint32_t index)
{
    return job->n_sources == 1 ? &job->source : &device->staged[index];
}

unsigned cuda_grid_beside(const struct mlak_device *device, uint32_t gates)
{
    unsigned most = device->split_grid / 4, left_out = gates < most ? gates : most;
    if (device->wgmma && left_out > 0) /* clusters of two need an even grid */
        left_out += (device->split_grid - left_out) % 2;
    return device->split_grid - left_out;
}

struct mlak_cuda_job cuda_job_in(const struct mlak_device *device, struct mlak_cuda_job *room,
                                 const struct cuda_slice *slices, uint32_t count)
{
    struct mlak_cuda_job job = *room;
    uint64_t folded = 0;
    uint32_t cu_q = 0;
    job.n_sources = count;
    job.ticket = ++room->ticket;
    job.rows_per_item = mlak_cuda_rows(slices[0].batch, device->most_shared, device->wgmma);
    for (uint32_t i = 0; i < count; i++) {
        const struct mlak_batch *batch = slices[i].batch;
        struct mlak_cuda_source *source = source_of(device, &job, i);
        *source = (struct mlak_cuda_source){
            .batch = *batch, .first = slices[i].first, .count = slices[i].count, .row = job.count, .cu_q = cu_q};
        job.count += slices[i].count;
        folded += batch->q_rows * batch->heads * slices[i].count / batch->batch;
        cu_q += batch->has_cu_q ? batch->batch + 1 : 0;
        if (job.rows_per_item == MLAK_CUDA_M)
            map_keys(device, source);
    }
    if (count > 1)
        job.source = device->staged[0];
    job.abreast = mlak_cuda_abreast(folded, job.count, slices[0].batch->deterministic, job.rows_per_item, job.grid);
    job.cluster = mlak_cuda_cluster(job.rows_per_item, job.abreast, job.grid);
    return job;
}

struct mlak_cuda_job cuda_job(struct mlak_device *device, const struct cuda_slice *slices, uint32_t count)
{
    device->job.grid = cuda_grid_beside(device, __atomic_load_n(&device->waiting, __ATOMIC_RELAXED));
    return cuda_job_in(device, &device->job, slices, count);
}

bool cuda_follow(const struct mlak_device *device, struct mlak_cuda_job *job)
{
    if (device->n_prepared != job->n_sources || device->prepared_grid != job->grid)
        return false;
    for (uint32_t i = 0; i < job->n_sources; i++) {
        struct mlak_cuda_source *source = source_of(device, job, i);
        const struct mlak_cuda_source *prepared = &device->prepared[i];
        const struct mlak_batch *to = &source->batch, *from = &prepared->batch;
        if (!mlak_same_step(to, from) || source->first != prepared->first || source->count != prepared->count ||
            source->box_rows != prepared->box_rows)
            return false;
        source->moved = (struct mlak_cuda_moved){.q = (uintptr_t)to->q - (uintptr_t)from->q,
                                                 .kv = (uintptr_t)to->kv - (uintptr_t)from->kv,
                                                 .out = (uintptr_t)to->out - (uintptr_t)from->out,
                                                 .lse = (uintptr_t)to->lse - (uintptr_t)from->lse,
                                                 .sink = (uintptr_t)to->sink - (uintptr_t)from->sink};
        if (to->dcp_rank > 0) /* then rows have none, whatever the batch has */
            source->moved.sink = 0;
    }
    return true;
}

CUresult cuda_launch(const struct mlak_device *device, struct mlak_cuda_job *job, bool prepared, CUstream stream)
{
    void *parameters[] = {job};
    enum mlak_cuda_types types = mlak_cuda_types_of(&job->source.batch);
    bool wgmma = job->rows_per_item == MLAK_CUDA_M, wide = job->rows_per_item == 32;
    const struct {
        CUfunction kernel;
        unsigned grid, block, shared;
    } kernels[] = {
        {device->prepare, 1, mlak_cuda_prepare_threads(job), MLAK_CUDA_PREPARE_SHARED},
        {wgmma ? device->split_wgmma[types] : wide ? device->wide[types] : device->split[types], job->grid,
         wgmma ? MLAK_CUDA_WGMMA_THREADS : MLAK_CUDA_THREADS,
         wgmma  ? MLAK_CUDA_SPLIT_SHARED_WGMMA
         : wide ? MLAK_CUDA_SPLIT_SHARED_WIDE
                : device->split_shared},
        {device->combine, device->combine_grid, MLAK_CUDA_THREADS, MLAK_CUDA_COMBINE_SHARED},
    };
    /* A kernel's blocks may start while the one before it ends, and wait for it themselves. */
    const CUlaunchAttribute early = {.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
                                     .value.programmaticStreamSerializationAllowed = 1};
    const CUlaunchAttribute cluster = {.id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION,
                                       .value.clusterDim = {job->cluster, 1, 1}};
    CUresult result = CUDA_SUCCESS;
    if (job->n_sources > 1)
        result = device->cu->copy_to_async(device->sources, device->staged, job->n_sources * sizeof *device->staged,
                                           stream);
    for (unsigned first = prepared, i = first; i < sizeof kernels / sizeof kernels[0] && result == CUDA_SUCCESS; i++) {
        CUlaunchAttribute attributes[2];
        unsigned count = 0;
        if (i > first && device->early)
            attributes[count++] = early;
        if (i == 1 && job->cluster > 1)
            attributes[count++] = cluster;
        result = device->cu->launch_as(&(CUlaunchConfig){.gridDimX = kernels[i].grid,
                                                         .gridDimY = 1,
                                                         .gridDimZ = 1,
                                                         .blockDimX = kernels[i].block,
                                                         .blockDimY = 1,
                                                         .blockDimZ = 1,
                                                         .sharedMemBytes = kernels[i].shared,
                                                         .hStream = stream,
                                                         .attrs = attributes,
                                                         .numAttrs = count},
                                       kernels[i].kernel, parameters, NULL);
    }
    return result;
}

enum mlak_code cuda_await(struct mlak_device *device, uint64_t ticket, const struct cuda_slice *slices, uint32_t count,
                          struct mlak_fault *fault)
{
    struct mlak_cuda_result *result = device->result;
    for (uint64_t looks = 1; __atomic_load_n(&result->done, __ATOMIC_ACQUIRE) != ticket; looks++) {
        uint32_t source = count ? (uint32_t)(looks % count) : 0;
        if (count && __atomic_load_n(&slices[source].rows[0].code, __ATOMIC_RELAXED) == MLAK_ROW_CANCELLED)
            cancel(device, ticket, source);
        pass_progress_on(device);
        if (looks % LOOKS_A_QUERY == 0) {
            CUresult state = device->cu->stream_query(device->stream);
            bool done = __atomic_load_n(&result->done, __ATOMIC_ACQUIRE) == ticket;
            if (state == CUDA_SUCCESS && !done)
                return cuda_lose(device, "the launch ended without its completion word", CUDA_ERROR_UNKNOWN, fault);
            if (state != CUDA_SUCCESS && state != CUDA_ERROR_NOT_READY)
                return cuda_lose(device, "cuStreamQuery", state, fault);
        }
        if (looks > SPIN)
            nanosleep(&(struct timespec){.tv_nsec = NAP_NS}, NULL);
        else
            sched_yield();
    }
    pass_progress_on(device);
    bool whole = count == 0;
    for (uint32_t i = 0; i < count; i++)
        whole |= device->cancelled[i] != ticket;
    if (device->progress && whole) /* a whole launch may have too few items to tell of one */
        __atomic_fetch_add(device->progress, 1, __ATOMIC_RELAXED);
    return MLAK_OK;
}

/* What the slice's rows say once the launch is over; a row that the caller cancelled stays so. */
static void tell(const struct mlak_cuda_row_result *results, const struct cuda_slice *slice)
{
    const struct mlak_batch *batch = slice->batch;
    for (uint32_t i = 0; i < slice->count; i++) {
        struct mlak_row *row = &slice->rows[i];
        row->request = slice->first + i;
        row->local_len = results[i].local_len;
        row->detail[0] = results[i].detail[0];
        row->detail[1] = results[i].detail[1];
        row->page_size = batch->page_size;
        row->pages = batch->pages;
        row->max_pages = batch->max_pages;
        row->dcp_world = batch->dcp_world;
        int untouched = MLAK_ROW_OK;
        __atomic_compare_exchange_n(&row->code, &untouched, results[i].code, false, __ATOMIC_RELEASE, __ATOMIC_RELAXED);
    }
}

enum mlak_code cuda_outcome(const struct mlak_device *device, uint32_t index, uint32_t at,
                            const struct cuda_slice *slice, struct mlak_fault *fault)
{
    const struct mlak_cuda_source_result *result = &device->result->sources[index];
    if (result->code != MLAK_OK)
        return mlak_cu_q_fault(result->index, result->value, result->before, slice->batch->q_rows, fault);
    tell(device->row_results + at, slice);
    return MLAK_OK;
}

static enum mlak_code launch_slices(struct mlak_device *device, const struct cuda_slice *slices, uint32_t count,
                                    bool layer, struct mlak_fault *fault)
{
    struct mlak_cuda_job job = cuda_job(device, slices, count);
    bool follows = layer && cuda_follow(device, &job);
    if (!follows)
        device->n_prepared = 0;
    CUresult result = cuda_launch(device, &job, follows, device->stream);
    if (result != CUDA_SUCCESS) {
        for (uint32_t i = 0; i < count; i++)
            cancel(device, job.ticket, i);
        return cuda_refused(device, "launch_as", result, fault);
    }
    for (uint32_t i = 0; i < count && !follows; i++)
        device->prepared[i] = *source_of(device, &job, i);
    if (!follows)
        device->prepared_grid = job.grid;
    enum mlak_code code = cuda_await(device, job.ticket, slices, count, fault);
    if (code != MLAK_OK)
        return code;
    if (!follows)
        device->n_prepared = count;
    for (uint32_t i = 0; i < count; i++) /* nothing was prepared for a source that was given up before it began */
        if (device->cancelled[i] == job.ticket)
            device->n_prepared = 0;
    for (uint32_t i = 0, at = 0; i < count; at += slices[i].count, i++) {
        struct mlak_part *part = slices[i].part;
        if (cuda_outcome(device, i, at, &slices[i], &part->fault) != MLAK_OK)
            part->code = MLAK_BATCH;
    }
    return MLAK_OK;
}

/* Requests of the batch that fit into a launch beside others that need `slots` of its scratch. */
static uint32_t room_for(const struct mlak_device *device, const struct mlak_batch *batch, uint32_t slots)
{
    uint32_t own = mlak_cuda_slots(batch, mlak_cuda_rows(batch, device->most_shared, device->wgmma));
    uint32_t room = batch->deterministic && own ? (device->job.max_slots - slots) / own : MLAK_CUDA_MAX_REQUESTS;
    return room < MLAK_CUDA_MAX_REQUESTS ? room : MLAK_CUDA_MAX_REQUESTS;
}

uint32_t cuda_most_requests(const struct mlak_device *device, const struct mlak_batch *batch)
{
    return room_for(device, batch, 0);
}

static bool cuda_mergeable(const struct mlak_device *device, const struct mlak_batch *a, const struct mlak_batch *b)
{
    return mlak_cuda_mergeable(a, b, device->most_shared, device->wgmma);
}

/* The next launch's slices, from request *done of the first part on: what of the parts can run together, in order;
 * *taken parts are whole then, and *done requests of the one after them. */
static uint32_t take_slices(const struct mlak_device *device, struct mlak_part *parts, uint32_t n, uint32_t *taken,
                            uint32_t *done, struct cuda_slice slices[MLAK_CUDA_MAX_SOURCES])
{
    uint32_t count = 0, requests = 0, slots = 0, at = 0;
    for (; at < n && count < MLAK_CUDA_MAX_SOURCES; at++, *done = 0) {
        struct mlak_part *part = &parts[at];
        const struct mlak_batch *batch = part->batch;
        if (part->code != MLAK_OK ||
            __atomic_load_n(&part->rows[*done].code, __ATOMIC_RELAXED) == MLAK_ROW_CANCELLED)
            continue; /* nobody wants the rest */
        uint32_t room = room_for(device, batch, slots), left = part->count - *done;
        uint32_t take = room < MLAK_CUDA_MAX_REQUESTS - requests ? room : MLAK_CUDA_MAX_REQUESTS - requests;
        take = left < take ? left : take;
        bool whole = part->first + *done == 0 && take == batch->batch;
        bool alone = batch->has_cu_q && !whole; /* it needs the whole snapshot */
        if (count > 0 && (take == 0 || alone || !cuda_mergeable(device, slices[0].batch, batch)))
            break;
        slices[count++] = (struct cuda_slice){batch, part->first + *done, take, part->rows + *done, part};
        requests += take;
        slots += take * mlak_cuda_slots(batch, mlak_cuda_rows(batch, device->most_shared, device->wgmma));
        if (take == left && !alone)
            continue;
        if (take < left)
            *done += take;
        else
            at++, *done = 0;
        break;
    }
    *taken = at;
    return count;
}

static enum mlak_code cuda_launch_batches(struct mlak_device *device, struct mlak_part *parts, uint32_t n, bool layer,
                                          struct mlak_fault *fault)
{
    struct cuda_slice slices[MLAK_CUDA_MAX_SOURCES];
    enum mlak_code code = cuda_enter(device, fault);
    for (uint32_t i = 0; i < n; i++)
        parts[i].code = MLAK_OK;
    for (uint32_t at = 0, done = 0, taken; at < n && code == MLAK_OK; at += taken) {
        uint32_t count = take_slices(device, parts + at, n - at, &taken, &done, slices);
        if (count > 0)
            code = launch_slices(device, slices, count, layer, fault);
    }
    return code;
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
