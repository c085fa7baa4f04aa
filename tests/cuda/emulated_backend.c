/* emulated_backend.c - the kernels of kernels/cuda as a backend, `emulated KIND[:SEED]`, for the test programs of
 * tests/kernels; with a seed, in disorder (emulator.h).
 *
 * Launches what cuda hardware would be launched with: prepare, split, combine; few items a device, so that short
 * batches are split too. Scratch is filled with NaN before each launch, and lies between inaccessible pages. */
#include "emulator.h"
#include "fence.h"
#include "mlak_backends.h"
#include "mlak_cuda.h"
#include "test_device.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { GRID = 7 };

struct mlak_device {
    size_t shared; /* that a block may have: of one stage, two, two and 32 rows, or Hopper's 64 */
    bool wgmma;
    uint64_t ticket;
    struct mlak_capability capabilities[MLAK_CONTRACT_ROWS];
    struct mlak_cuda_result result;
};

static struct mlak_device *emulated_open(const struct mlak_options *options, struct mlak_fault *fault)
{
    static struct mlak_device device;
    static const size_t shared[] = {MLAK_CUDA_SPLIT_SHARED_1, MLAK_CUDA_SPLIT_SHARED_2, MLAK_CUDA_SPLIT_SHARED_WIDE,
                                    MLAK_CUDA_SPLIT_SHARED_WGMMA};
    int kind = options->variant ? options->variant[0] - '1' : 1;
    const char *seed = options->variant && options->variant[0] ? options->variant + 1 : "";
    if (kind < 0 || kind > 3 || (seed[0] && (seed[0] != ':' || atoi(seed + 1) < 1))) {
        mlak_fail(fault, MLAK_INVALID, "variant", "%s is no kind of device; give 1 to 4, or such as 4:1",
                  options->variant);
        return NULL;
    }
    mlak_emulate_disorder(seed[0] ? (uint64_t)atoi(seed + 1) : 0);
    device.shared = shared[kind];
    device.wgmma = kind == 3;
    mlak_cuda_capabilities(device.capabilities, device.wgmma);
    return &device;
}

static void emulated_close(struct mlak_device *device)
{
    (void)device;
}

static const struct mlak_capability *emulated_capabilities(const struct mlak_device *device, size_t *count)
{
    *count = MLAK_CONTRACT_ROWS;
    return device->capabilities;
}

static const char *split_kernel(const struct mlak_cuda_job *job, char name[64])
{
    static const char *const types[MLAK_CUDA_TYPES] = MLAK_CUDA_TYPE_NAMES;
    const char *rows = job->rows_per_item == MLAK_CUDA_M ? "wgmma_" : job->rows_per_item == 32 ? "wide_" : "";
    snprintf(name, 64, "mlak_cuda_split_%s%s", rows, types[mlak_cuda_types_of(&job->source.batch)]);
    return name;
}

static void run(const char *kernel, unsigned grid, unsigned block, size_t shared, const struct mlak_cuda_job *job)
{
    if (!mlak_emulate(kernel, grid, block, shared, job)) {
        fprintf(stderr, "no kernel %s\n", kernel);
        abort();
    }
}

/* What the part's rows say once the launch is over. */
static void tell(const struct mlak_cuda_row_result *results, const struct mlak_part *part)
{
    const struct mlak_batch *batch = part->batch;
    for (uint32_t i = 0; i < part->count; i++)
        part->rows[i] = (struct mlak_row){.request = part->first + i,
                                          .local_len = results[i].local_len,
                                          .code = results[i].code,
                                          .detail = {results[i].detail[0], results[i].detail[1]},
                                          .page_size = batch->page_size,
                                          .pages = batch->pages,
                                          .max_pages = batch->max_pages,
                                          .dcp_world = batch->dcp_world};
}

static bool emulated_mergeable(const struct mlak_device *device, const struct mlak_batch *a, const struct mlak_batch *b)
{
    return mlak_cuda_mergeable(a, b, device->shared, device->wgmma);
}

static void fill_source(const struct mlak_device *device, struct mlak_cuda_source *source, const struct mlak_part *part)
{
    source->batch = *part->batch;
    source->first = part->first;
    source->count = part->count;
    if (mlak_cuda_rows(part->batch, device->shared, device->wgmma) == MLAK_CUDA_M)
        source->box_rows = mlak_cuda_box_rows(part->batch);
    for (uint32_t chunks = 1; chunks <= 2 && source->box_rows > 0; chunks++)
        emulated_map(&source->keys[chunks - 1], part->batch, source->box_rows, chunks);
}

/* Parts that one launch takes: mergeable, of MLAK_CUDA_MAX_SOURCES and MLAK_CUDA_MAX_REQUESTS at most. */
static void launch(struct mlak_device *device, struct mlak_part *parts, uint32_t n)
{
    enum { ROWS, REQUESTS, STARTS, MERGES, CU_Q, PARTS, RESULTS, SOURCES, FENCES };
    const struct mlak_batch *batch = parts[0].batch;
    const bool deterministic = batch->deterministic;
    uint64_t folded = 0, entries = 0;
    struct mlak_cuda_job job = {
        .n_sources = n,
        .rows_per_item = mlak_cuda_rows(batch, device->shared, device->wgmma),
        .grid = GRID,
        .ticket = ++device->ticket,
        .result = &device->result,
    };
    for (uint32_t i = 0; i < n; i++) {
        batch = parts[i].batch;
        job.count += parts[i].count;
        job.max_slots += parts[i].count * mlak_cuda_slots(batch, job.rows_per_item);
        folded += batch->q_rows * batch->heads * parts[i].count / batch->batch;
        entries += batch->has_cu_q ? batch->batch + 1 : 0;
    }
    job.max_slots = deterministic ? job.max_slots : 2 * GRID;
    job.abreast = mlak_cuda_abreast(folded, job.count, deterministic, job.rows_per_item, GRID);
    const size_t sizes[FENCES] = {
        [ROWS] = job.count * sizeof(struct mlak_row),
        [REQUESTS] = job.count * sizeof(struct mlak_cuda_request),
        [STARTS] = GRID * sizeof(struct mlak_cuda_start),
        [MERGES] = mlak_cuda_most_merges(job.max_slots, job.count) * sizeof(struct mlak_cuda_merge),
        [CU_Q] = entries * sizeof(int32_t),
        [PARTS] = (size_t)job.max_slots * MLAK_CUDA_PART_FLOATS * sizeof(float),
        [RESULTS] = job.count * sizeof(struct mlak_cuda_row_result),
        [SOURCES] = n * sizeof(struct mlak_cuda_source),
    };
    struct fence fences[FENCES];
    for (unsigned i = 0; i < FENCES; i++)
        fence_init(&fences[i], sizes[i], i == SOURCES ? 64 : 8, true);
    struct mlak_cuda_schedule schedule = {0};
    struct mlak_cuda_source *sources = (void *)fences[SOURCES].data;
    memset(sources, 0, sizes[SOURCES]);
    job.sources = n == 1 ? NULL : sources;
    job.rows = (void *)fences[ROWS].data;
    job.requests = (void *)fences[REQUESTS].data;
    job.starts = (void *)fences[STARTS].data;
    job.merges = (void *)fences[MERGES].data;
    job.schedule = &schedule;
    job.cu_q = (void *)fences[CU_Q].data;
    job.parts = (void *)fences[PARTS].data;
    job.row_results = (void *)fences[RESULTS].data;
    for (uint32_t i = 0; i < n; i++) {
        fill_source(device, &sources[i], &parts[i]);
        sources[i].row = i ? sources[i - 1].row + parts[i - 1].count : 0;
        sources[i].cu_q = i ? sources[i - 1].cu_q : 0;
        if (i && parts[i - 1].batch->has_cu_q)
            sources[i].cu_q += parts[i - 1].batch->batch + 1;
    }
    job.source = sources[0];
    for (uint32_t i = 0; i < n; i++) /* given up before it began */
        schedule.cancelled[i] = parts[i].rows[0].code == MLAK_ROW_CANCELLED ? job.ticket : 0;

    bool wgmma = job.rows_per_item == MLAK_CUDA_M;
    char name[64];
    run("mlak_cuda_prepare", 1, mlak_cuda_prepare_threads(&job), MLAK_CUDA_PREPARE_SHARED, &job);
    run(split_kernel(&job, name), GRID, wgmma ? MLAK_CUDA_WGMMA_THREADS : MLAK_CUDA_THREADS, device->shared, &job);
    run("mlak_cuda_combine", GRID, MLAK_CUDA_THREADS, MLAK_CUDA_COMBINE_SHARED, &job);

    if (device->result.done != job.ticket || schedule.blocks_done != 0 || schedule.slots > job.max_slots) {
        fprintf(stderr, "the launch did not end as it should: ticket %llu of %llu, %u blocks, %u slots of %u\n",
                (unsigned long long)device->result.done, (unsigned long long)job.ticket, schedule.blocks_done,
                schedule.slots, job.max_slots);
        abort();
    }
    for (uint32_t i = 0; i < n; i++) {
        const struct mlak_cuda_source_result *result = &device->result.sources[i];
        parts[i].code = (enum mlak_code)result->code;
        if (parts[i].code != MLAK_OK)
            mlak_cu_q_fault(result->index, result->value, result->before, parts[i].batch->q_rows, &parts[i].fault);
        else
            tell(job.row_results + sources[i].row, &parts[i]);
    }
    for (unsigned i = 0; i < FENCES; i++) {
        if (!fence_intact(&fences[i])) {
            fprintf(stderr, "written around scratch %u\n", i);
            abort();
        }
        fence_deinit(&fences[i]);
    }
}

static enum mlak_code emulated_launch_batches(struct mlak_device *device, uint32_t which, struct mlak_part *parts,
                                              uint32_t n, bool layer, struct mlak_fault *fault)
{
    (void)which;
    (void)layer;
    (void)fault;
    for (uint32_t at = 0, end; at < n; at = end) {
        for (end = at + 1; end < n && end - at < MLAK_CUDA_MAX_SOURCES &&
                           emulated_mergeable(device, parts[at].batch, parts[end].batch);)
            end++;
        launch(device, parts + at, end - at);
    }
    return MLAK_OK;
}

const struct mlak_backend *test_backend(const char *name)
{
    static const struct mlak_backend emulated = {
        .name = "emulated",
        .open = emulated_open,
        .close = emulated_close,
        .capabilities = emulated_capabilities,
        .launch_batches = emulated_launch_batches,
        .mergeable = emulated_mergeable,
    };
    return strcmp(name, emulated.name) == 0 ? &emulated : NULL;
}
