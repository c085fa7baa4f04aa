/* cuda_launch.c - launches: the room that each has for itself, the three kernels of mlak_cuda.h with what they are
 * given, and the wait for their completion word.
 *
 * What the requests of many parts have in common is copied to the device before a launch; of one, it goes with the
 * kernels' parameter. Waiting never blocks in the driver, so a launch that hangs shows no progress and is the
 * supervisor's to end. */
#include "cuda_device.h"

#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum {
    SPIN = 2000, /* looks at the completion word before the thread gives way */
    NAP_NS = 20000,
    LOOKS_A_QUERY = 64 /* looks at the completion word for each question to the driver */
};

/* ---- rooms ---- */

/* The call, whose refusal is the answer. */
#define TRY(name, ...)                                                                                                 \
    do {                                                                                                               \
        CUresult result_ = device->cu->name(__VA_ARGS__);                                                              \
        *call = #name;                                                                                                 \
        if (result_ != CUDA_SUCCESS)                                                                                   \
            return result_;                                                                                            \
    } while (0)
/* Device memory for a member of the job, of `count` of what it points to. */
#define NEW(member, count)                                                                                             \
    do {                                                                                                               \
        CUdeviceptr at_;                                                                                               \
        TRY(alloc, &at_, (count) * sizeof *job->member);                                                               \
        job->member = (void *)at_;                                                                                     \
    } while (0)
#define CLEAR(member) TRY(set_words_async, (CUdeviceptr)job->member, 0, sizeof *job->member / 4, room->stream)

/* What a thread that waits for the room's launches looks at. */
static CUresult open_results(const struct mlak_device *device, struct cuda_room *room, const char **call)
{
    const unsigned flags = CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP;
    struct mlak_cuda_job *job = &room->job;
    CUdeviceptr seen;
    NEW(sources, MLAK_CUDA_MAX_SOURCES);
    TRY(host_alloc, (void **)&room->result, sizeof *room->result, flags);
    TRY(host_alloc, (void **)&room->row_results, MLAK_CUDA_MAX_REQUESTS * sizeof *room->row_results, flags);
    TRY(host_alloc, (void **)&room->cancelled, MLAK_CUDA_MAX_SOURCES * sizeof *room->cancelled, flags);
    TRY(host_alloc, (void **)&room->staged, MLAK_CUDA_MAX_SOURCES * sizeof *room->staged, flags);
    memset(room->result, 0, sizeof *room->result);
    memset(room->cancelled, 0, MLAK_CUDA_MAX_SOURCES * sizeof *room->cancelled); /* no launch has this ticket */
    TRY(host_pointer, &seen, room->result, 0);
    job->result = (void *)seen;
    TRY(host_pointer, &seen, room->row_results, 0);
    job->row_results = (void *)seen;
    *call = "calloc";
    room->prepared = calloc(MLAK_CUDA_MAX_SOURCES, sizeof *room->prepared);
    return room->prepared ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

CUresult cuda_room_open(const struct mlak_device *device, struct cuda_room *room, bool awaited, const char **call)
{
    enum { ROWS = MLAK_CUDA_MAX_REQUESTS };
    struct mlak_cuda_job *job = &room->job;
    job->max_slots = device->max_slots;
    TRY(stream_new, &room->stream, CU_STREAM_NON_BLOCKING);
    NEW(rows, ROWS);
    NEW(requests, ROWS);
    NEW(starts, device->split_grid);
    NEW(merges, mlak_cuda_most_merges(job->max_slots, ROWS));
    NEW(schedule, 1);
    NEW(cu_q, MLAK_MAX_BATCH + 1); /* or of all sources of a launch */
    _Static_assert(MLAK_MAX_BATCH + 1 >= MLAK_CUDA_MAX_REQUESTS + MLAK_CUDA_MAX_SOURCES, "an entry more each");
    NEW(parts, (size_t)job->max_slots * MLAK_CUDA_PART_FLOATS);
    CLEAR(schedule);
    if (awaited)
        return open_results(device, room, call);
    NEW(row_results, ROWS);
    NEW(result, 1);
    CLEAR(result);
    return CUDA_SUCCESS;
}
_Static_assert(sizeof(struct mlak_cuda_schedule) % 4 == 0 && sizeof(struct mlak_cuda_result) % 4 == 0, "cleared by "
               "words");

void cuda_room_close(const struct mlak_device *device, struct cuda_room *room)
{
    const struct mlak_driver *cu = device->cu;
    const struct mlak_cuda_job *job = &room->job;
    void *const pinned[] = {room->result, room->row_results, room->cancelled, room->staged};
    const void *const scratch[] = {job->rows, job->requests, job->starts, job->merges, job->schedule, job->cu_q,
                                   job->parts, job->sources, room->result ? NULL : job->result,
                                   room->row_results ? NULL : job->row_results};
    if (room->stream)
        cu->stream_free(room->stream);
    for (unsigned i = 0; i < sizeof pinned / sizeof pinned[0]; i++)
        if (pinned[i])
            cu->host_free(pinned[i]);
    for (unsigned i = 0; i < sizeof scratch / sizeof scratch[0]; i++)
        if (scratch[i])
            cu->free((CUdeviceptr)scratch[i]);
    free(room->prepared);
}

/* ---- a launch ---- */

/* Of launches that run at once, only the one that began first is a sign of life: one that hangs is not hidden by others
 * that come and go beside it. */
static void show_life(const struct mlak_device *device, const struct cuda_room *room)
{
    for (unsigned i = 0; i < CUDA_LAUNCHES; i++) {
        uint64_t began = __atomic_load_n(&device->rooms[i].began, __ATOMIC_RELAXED);
        if (began && began < room->began)
            return;
    }
    if (device->progress)
        __atomic_fetch_add(device->progress, 1, __ATOMIC_RELAXED);
}

static void pass_progress_on(const struct mlak_device *device, struct cuda_room *room)
{
    uint64_t now = __atomic_load_n(&room->result->progress, __ATOMIC_RELAXED);
    if (now != room->progress_seen)
        show_life(device, room);
    room->progress_seen = now;
}

/* Tell a source of the launch to stop as soon as may be. If the driver does not take the word, it runs to its end. */
static void cancel(const struct mlak_device *device, struct cuda_room *room, uint64_t ticket, uint32_t source)
{
    if (room->cancelled[source] == ticket)
        return;
    room->cancelled[source] = ticket;
    device->cu->copy_to_async((CUdeviceptr)&room->job.schedule->cancelled[source], &room->cancelled[source],
                              sizeof ticket, device->control);
}

CUresult cuda_settle(const struct mlak_device *device, struct cuda_room *room)
{
    CUresult state;
    while ((state = device->cu->stream_query(room->stream)) == CUDA_ERROR_NOT_READY) {
        pass_progress_on(device, room);
        nanosleep(&(struct timespec){.tv_nsec = NAP_NS}, NULL);
    }
    pass_progress_on(device, room);
    return state;
}

enum mlak_code cuda_refused(struct mlak_device *device, struct cuda_room *room, const char *call, CUresult result,
                            struct mlak_fault *fault)
{
    if (cuda_settle(device, room) != CUDA_SUCCESS)
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

/* Source `index` of a job of this room that has not been launched yet. */
static struct mlak_cuda_source *source_of(const struct cuda_room *room, struct mlak_cuda_job *job, uint32_t index)
{
    return job->n_sources == 1 ? &job->source : &room->staged[index];
}

/* Blocks of a split kernel while `gates` kernels wait, each on a processor that it may hold: a block that finds no
 * processor free would run after the others instead of with them. */
static unsigned grid_beside(const struct mlak_device *device, uint32_t gates)
{
    unsigned most = device->split_grid / 4, left_out = gates < most ? gates : most;
    return device->split_grid - left_out;
}

struct mlak_cuda_job cuda_job(const struct mlak_device *device, struct cuda_room *room, uint32_t gates,
                              const struct cuda_slice *slices, uint32_t count)
{
    struct mlak_cuda_job job = room->job;
    uint64_t folded = 0;
    uint32_t cu_q = 0;
    job.n_sources = count;
    job.ticket = ++room->job.ticket;
    job.grid = grid_beside(device, gates);
    job.rows_per_item = mlak_cuda_rows(slices[0].batch, device->most_shared, device->wgmma);
    for (uint32_t i = 0; i < count; i++) {
        const struct mlak_batch *batch = slices[i].batch;
        struct mlak_cuda_source *source = source_of(room, &job, i);
        *source = (struct mlak_cuda_source){
            .batch = *batch, .first = slices[i].first, .count = slices[i].count, .row = job.count, .cu_q = cu_q};
        job.count += slices[i].count;
        folded += batch->q_rows * batch->heads * slices[i].count / batch->batch;
        cu_q += batch->has_cu_q ? batch->batch + 1 : 0;
        if (job.rows_per_item == MLAK_CUDA_M)
            map_keys(device, source);
    }
    if (count > 1)
        job.source = room->staged[0];
    job.abreast = mlak_cuda_abreast(folded, job.count, slices[0].batch->deterministic, job.rows_per_item, job.grid);
    return job;
}

uint32_t cuda_gates(const struct mlak_device *device)
{
    return __atomic_load_n(&device->waiting, __ATOMIC_RELAXED);
}

bool cuda_follow(const struct cuda_room *room, struct mlak_cuda_job *job)
{
    if (room->n_prepared != job->n_sources || room->prepared_grid != job->grid)
        return false;
    for (uint32_t i = 0; i < job->n_sources; i++) {
        struct mlak_cuda_source *source = source_of(room, job, i);
        const struct mlak_cuda_source *prepared = &room->prepared[i];
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

CUresult cuda_launch(const struct mlak_device *device, const struct cuda_room *room, struct mlak_cuda_job *job,
                     bool prepared, CUstream stream)
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
    CUlaunchAttribute early = {.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
                               .value.programmaticStreamSerializationAllowed = 1};
    CUresult result = CUDA_SUCCESS;
    if (job->n_sources > 1)
        result = device->cu->copy_to_async((CUdeviceptr)job->sources, room->staged,
                                           job->n_sources * sizeof *room->staged, stream);
    for (unsigned first = prepared, i = first; i < sizeof kernels / sizeof kernels[0] && result == CUDA_SUCCESS; i++) {
        result = device->cu->launch_as(&(CUlaunchConfig){.gridDimX = kernels[i].grid,
                                                         .gridDimY = 1,
                                                         .gridDimZ = 1,
                                                         .blockDimX = kernels[i].block,
                                                         .blockDimY = 1,
                                                         .blockDimZ = 1,
                                                         .sharedMemBytes = kernels[i].shared,
                                                         .hStream = stream,
                                                         .attrs = &early,
                                                         .numAttrs = i > first && device->early},
                                       kernels[i].kernel, parameters, NULL);
    }
    return result;
}

enum mlak_code cuda_await(struct mlak_device *device, struct cuda_room *room, uint64_t ticket,
                          const struct cuda_slice *slices, uint32_t count, struct mlak_fault *fault)
{
    const struct mlak_cuda_result *result = room->result;
    for (uint64_t looks = 1; __atomic_load_n(&result->done, __ATOMIC_ACQUIRE) != ticket; looks++) {
        uint32_t source = count ? (uint32_t)(looks % count) : 0;
        if (count && __atomic_load_n(&slices[source].rows[0].code, __ATOMIC_RELAXED) == MLAK_ROW_CANCELLED)
            cancel(device, room, ticket, source);
        pass_progress_on(device, room);
        if (looks % LOOKS_A_QUERY == 0) {
            CUresult state = device->cu->stream_query(room->stream);
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
    pass_progress_on(device, room);
    bool whole = count == 0;
    for (uint32_t i = 0; i < count; i++)
        whole |= room->cancelled[i] != ticket;
    if (whole) /* it may have too few items to tell of one */
        show_life(device, room);
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

enum mlak_code cuda_outcome(const struct cuda_room *room, uint32_t index, uint32_t at, const struct cuda_slice *slice,
                            struct mlak_fault *fault)
{
    const struct mlak_cuda_source_result *result = &room->result->sources[index];
    if (result->code != MLAK_OK)
        return mlak_cu_q_fault(result->index, result->value, result->before, slice->batch->q_rows, fault);
    tell(room->row_results + at, slice);
    return MLAK_OK;
}

static enum mlak_code launch_slices(struct mlak_device *device, struct cuda_room *room, const struct cuda_slice *slices,
                                    uint32_t count, bool layer, struct mlak_fault *fault)
{
    struct mlak_cuda_job job = cuda_job(device, room, cuda_gates(device), slices, count);
    bool follows = layer && cuda_follow(room, &job);
    if (!follows)
        room->n_prepared = 0;
    CUresult result = cuda_launch(device, room, &job, follows, room->stream);
    if (result != CUDA_SUCCESS) {
        for (uint32_t i = 0; i < count; i++)
            cancel(device, room, job.ticket, i);
        return cuda_refused(device, room, "launch_as", result, fault);
    }
    for (uint32_t i = 0; i < count && !follows; i++)
        room->prepared[i] = *source_of(room, &job, i);
    if (!follows)
        room->prepared_grid = job.grid;
    enum mlak_code code = cuda_await(device, room, job.ticket, slices, count, fault);
    if (code != MLAK_OK)
        return code;
    if (!follows)
        room->n_prepared = count;
    for (uint32_t i = 0; i < count; i++) /* nothing was prepared for a source that was given up before it began */
        if (room->cancelled[i] == job.ticket)
            room->n_prepared = 0;
    for (uint32_t i = 0, at = 0; i < count; at += slices[i].count, i++) {
        struct mlak_part *part = slices[i].part;
        if (cuda_outcome(room, i, at, &slices[i], &part->fault) != MLAK_OK)
            part->code = MLAK_BATCH;
    }
    return MLAK_OK;
}

/* Requests of the batch that fit into a launch beside others that need `slots` of its scratch. */
static uint32_t room_for(const struct mlak_device *device, const struct mlak_batch *batch, uint32_t slots)
{
    uint32_t own = mlak_cuda_slots(batch, mlak_cuda_rows(batch, device->most_shared, device->wgmma));
    uint32_t room = batch->deterministic && own ? (device->max_slots - slots) / own : MLAK_CUDA_MAX_REQUESTS;
    return room < MLAK_CUDA_MAX_REQUESTS ? room : MLAK_CUDA_MAX_REQUESTS;
}

uint32_t cuda_most_requests(const struct mlak_device *device, const struct mlak_batch *batch)
{
    return room_for(device, batch, 0);
}

bool cuda_mergeable(const struct mlak_device *device, const struct mlak_batch *a, const struct mlak_batch *b)
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

enum mlak_code cuda_launch_batches(struct mlak_device *device, uint32_t which, struct mlak_part *parts, uint32_t n,
                                   bool layer, struct mlak_fault *fault)
{
    struct cuda_slice slices[MLAK_CUDA_MAX_SOURCES];
    struct cuda_room *room = &device->rooms[which];
    enum mlak_code code = cuda_enter(device, fault);
    for (uint32_t i = 0; i < n; i++)
        parts[i].code = MLAK_OK;
    __atomic_store_n(&room->began, __atomic_add_fetch(&device->begun, 1, __ATOMIC_RELAXED), __ATOMIC_RELAXED);
    for (uint32_t at = 0, done = 0, taken; at < n && code == MLAK_OK; at += taken) {
        uint32_t count = take_slices(device, parts + at, n - at, &taken, &done, slices);
        if (count > 0)
            code = launch_slices(device, room, slices, count, layer, fault);
    }
    __atomic_store_n(&room->began, 0, __ATOMIC_RELAXED);
    return code;
}
