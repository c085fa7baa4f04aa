/* emulated_backend.c - the kernels of kernels/cuda as a backend, `emulated KIND`, for the test programs of
 * tests/kernels.
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
    if (kind < 0 || kind > 3 || (options->variant && options->variant[1])) {
        mlak_fail(fault, MLAK_INVALID, "variant", "%s is no kind of device; give 1 to 4", options->variant);
        return NULL;
    }
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
    snprintf(name, 64, "mlak_cuda_split_%s%s", rows, types[mlak_cuda_types_of(&job->batch)]);
    return name;
}

static void run(const char *kernel, unsigned grid, unsigned block, size_t shared, const struct mlak_cuda_job *job)
{
    if (!mlak_emulate(kernel, grid, block, shared, job)) {
        fprintf(stderr, "no kernel %s\n", kernel);
        abort();
    }
}

/* What the rows say once the launch is over. */
static void tell(const struct mlak_cuda_job *job, struct mlak_row *rows)
{
    const struct mlak_batch *batch = &job->batch;
    for (uint32_t i = 0; i < job->count; i++) {
        const struct mlak_cuda_row_result *result = &job->row_results[i];
        rows[i] = (struct mlak_row){.request = job->first + i,
                                    .local_len = result->local_len,
                                    .code = result->code,
                                    .detail = {result->detail[0], result->detail[1]},
                                    .page_size = batch->page_size,
                                    .pages = batch->pages,
                                    .max_pages = batch->max_pages,
                                    .dcp_world = batch->dcp_world};
    }
}

static enum mlak_code emulated_launch_batch(struct mlak_device *device, const struct mlak_batch *batch, uint32_t first,
                                            uint32_t count, struct mlak_row *rows, struct mlak_fault *fault)
{
    enum { ROWS, REQUESTS, STARTS, CU_Q, PARTS, RESULTS, FENCES };
    uint32_t slots = batch->deterministic ? MLAK_CUDA_FIXED_SLOTS * count : 2 * GRID;
    const size_t sizes[FENCES] = {
        [ROWS] = count * sizeof(struct mlak_row),
        [REQUESTS] = count * sizeof(struct mlak_cuda_request),
        [STARTS] = GRID * sizeof(struct mlak_cuda_start),
        [CU_Q] = (batch->batch + (size_t)1) * sizeof(int32_t),
        [PARTS] = (size_t)slots * MLAK_CUDA_PART_FLOATS * sizeof(float),
        [RESULTS] = count * sizeof(struct mlak_cuda_row_result),
    };
    struct fence fences[FENCES];
    struct mlak_cuda_schedule schedule = {0};
    for (unsigned i = 0; i < FENCES; i++)
        fence_init(&fences[i], sizes[i], 8, true);
    struct mlak_cuda_job job = {
        .batch = *batch,
        .first = first,
        .count = count,
        .rows_per_item = mlak_cuda_rows(batch, device->shared, device->wgmma),
        .grid = GRID,
        .max_slots = slots,
        .ticket = ++device->ticket,
        .rows = (void *)fences[ROWS].data,
        .requests = (void *)fences[REQUESTS].data,
        .starts = (void *)fences[STARTS].data,
        .schedule = &schedule,
        .cu_q = (void *)fences[CU_Q].data,
        .parts = (void *)fences[PARTS].data,
        .result = &device->result,
        .row_results = (void *)fences[RESULTS].data,
    };
    job.abreast = mlak_cuda_abreast(batch, job.rows_per_item, GRID);
    job.cluster = 1;
    bool wgmma = job.rows_per_item == MLAK_CUDA_M;
    if (wgmma)
        job.box_rows = mlak_cuda_box_rows(batch);
    for (uint32_t chunks = 1; chunks <= 2 && job.box_rows > 0; chunks++)
        emulated_map(&job.keys[chunks - 1], batch, job.box_rows, chunks);
    char name[64];
    run("mlak_cuda_prepare", 1, MLAK_CUDA_PREPARE_THREADS, MLAK_CUDA_PREPARE_SHARED, &job);
    run(split_kernel(&job, name), GRID, wgmma ? MLAK_CUDA_WGMMA_THREADS : MLAK_CUDA_THREADS, device->shared, &job);
    run("mlak_cuda_combine", GRID, MLAK_CUDA_THREADS, MLAK_CUDA_COMBINE_SHARED, &job);

    enum mlak_code code = (enum mlak_code)device->result.batch_code;
    if (device->result.done != job.ticket || schedule.blocks_done != 0 || schedule.slots > slots) {
        fprintf(stderr, "the launch did not end as it should: ticket %llu of %llu, %u blocks, %u slots of %u\n",
                (unsigned long long)device->result.done, (unsigned long long)job.ticket, schedule.blocks_done,
                schedule.slots, slots);
        abort();
    }
    if (code != MLAK_OK)
        mlak_cu_q_fault(device->result.batch_index, device->result.batch_value, device->result.batch_before,
                        batch->q_rows, fault);
    else
        tell(&job, rows);
    for (unsigned i = 0; i < FENCES; i++) {
        if (!fence_intact(&fences[i])) {
            fprintf(stderr, "written around scratch %u\n", i);
            abort();
        }
        fence_deinit(&fences[i]);
    }
    return code;
}

const struct mlak_backend *test_backend(const char *name)
{
    static const struct mlak_backend emulated = {
        .name = "emulated",
        .open = emulated_open,
        .close = emulated_close,
        .capabilities = emulated_capabilities,
        .launch_batch = emulated_launch_batch,
    };
    return strcmp(name, emulated.name) == 0 ? &emulated : NULL;
}
