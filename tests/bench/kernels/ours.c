/* ours.c - the backend under test as a contender. */
#include "contender.h"

#include <stdlib.h>
#include <string.h>

#define SELF(contender) ((struct ours *)(void *)(contender)) /* it is the first member */

static enum mlak_code begin(struct contender *contender, struct work *work, uint32_t calls, struct mlak_fault *fault)
{
    struct ours *self = SELF(contender);
    self->work = work;
    self->calls = calls;
    self->batches = calloc(calls, sizeof *self->batches);
    self->rows = calloc(work->shape->batch, sizeof *self->rows);
    if (!self->batches || !self->rows)
        return mlak_fail(fault, MLAK_MEMORY, "shape", "no memory");
    for (uint32_t i = 0; i < calls; i++)
        self->batches[i] = work->batches[i % work->copies];
    return MLAK_OK;
}

static enum mlak_code launch(struct ours *self, uint32_t copy, struct mlak_fault *fault)
{
    uint32_t count = self->work->shape->batch;
    memset(self->rows, 0, count * sizeof *self->rows);
    return mlak_launch_batch(self->backend, self->device, &self->work->batches[copy], 0, count, self->rows, fault);
}

static enum mlak_code decode(struct contender *contender, struct mlak_fault *fault)
{
    struct ours *self = SELF(contender);
    enum mlak_code code = launch(self, 0, fault);
    for (uint32_t i = 0; i < self->work->shape->batch && code == MLAK_OK; i++)
        if (self->rows[i].code != MLAK_ROW_OK) {
            mlak_row_fault(&self->rows[i], fault);
            code = fault->code = MLAK_REQUESTS;
        }
    return code;
}

static enum mlak_code back_to_back(struct contender *contender, uint32_t rounds, double *ns, struct mlak_fault *fault)
{
    struct ours *self = SELF(contender);
    return self->backend->time_batches(self->device, self->batches, self->calls, false, rounds, ns, fault);
}

static enum mlak_code layers(struct contender *contender, uint32_t rounds, double *ns, struct mlak_fault *fault)
{
    struct ours *self = SELF(contender);
    return self->backend->time_batches(self->device, self->batches, self->calls, true, rounds, ns, fault);
}

static enum mlak_code alone(struct contender *contender, uint32_t copy, double *ns, struct mlak_fault *fault)
{
    double start = gpu_now();
    enum mlak_code code = launch(SELF(contender), copy, fault);
    *ns = gpu_now() - start;
    return code;
}

static void end(struct contender *contender)
{
    struct ours *self = SELF(contender);
    free(self->batches);
    free(self->rows);
    self->batches = NULL;
    self->rows = NULL;
}

void ours_init(struct ours *ours, struct gpu *gpu, const struct mlak_backend *backend, struct mlak_device *device)
{
    *ours = (struct ours){.contender = {begin, decode, back_to_back, layers, alone, NULL, end},
                          .gpu = gpu, .backend = backend,
                          .device = device};
}
