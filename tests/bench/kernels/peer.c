/* peer.c - a library that peer.h describes as a contender. */
#include "contender.h"

#include <dlfcn.h>
#include <stdlib.h>

enum { PREPARES = 32 /* in a graph, to time one */ };

#define SELF(contender) ((struct peer *)(void *)(contender)) /* it is the first member */

static enum mlak_code says(const struct peer *peer, const char *function, const char *error, struct mlak_fault *fault)
{
    return error ? mlak_fail(fault, MLAK_UNSUPPORTED, "peer", "%s's %s: %s", peer->library->name, function, error)
                 : MLAK_OK;
}

static enum mlak_code enqueue_prepare(void *self, uint32_t index, CUstream stream, struct mlak_fault *fault)
{
    struct peer *peer = self;
    (void)index;
    return says(peer, "prepare", peer->library->prepare(peer->self, stream), fault);
}

static enum mlak_code enqueue_decode(void *self, uint32_t index, CUstream stream, struct mlak_fault *fault)
{
    struct peer *peer = self;
    return says(peer, "enqueue", peer->library->enqueue(peer->self, index, stream), fault);
}

static enum mlak_code open_shape(struct peer *self, struct mlak_fault *fault)
{
    const struct work *work = self->work;
    struct mlad_peer_batch *batches = calloc(work->copies, sizeof *batches);
    if (!batches)
        return mlak_fail(fault, MLAK_MEMORY, "shape", "no memory");
    for (uint32_t i = 0; i < work->copies; i++) {
        const struct mlak_batch *batch = &work->batches[i];
        batches[i] = (struct mlad_peer_batch){
            .batch = batch->batch, .heads = batch->heads, .q_len = work->shape->q_len, .pages = batch->pages,
            .page_size = batch->page_size, .max_pages = batch->max_pages, .softmax_scale = (float)batch->softmax_scale,
            .q = batch->q, .kv = batch->kv, .block_table = batch->block_table, .seqlens = batch->seqlens,
            .out = work->out[1], .lse = work->lse[1]};
    }
    const char *error = self->library->open(batches, work->copies, &self->self);
    free(batches);
    if (error)
        self->self = NULL;
    return says(self, "open", error, fault);
}

static enum mlak_code begin(struct contender *contender, struct work *work, uint32_t calls, struct mlak_fault *fault)
{
    struct peer *self = SELF(contender);
    self->work = work;
    CUresult result = self->gpu->cu->context_set(self->gpu->context);
    if (result != CUDA_SUCCESS)
        return mlak_driver_fail(fault, MLAK_LOST, "device", "cuCtxSetCurrent", result);
    enum mlak_code code = open_shape(self, fault);
    if (code == MLAK_OK)
        code = enqueue_prepare(self, 0, self->gpu->stream, fault);
    if (code == MLAK_OK) /* what the first launch of a kernel loads is not for a capture */
        code = enqueue_decode(self, 0, self->gpu->stream, fault);
    if (code == MLAK_OK)
        code = gpu_wait(self->gpu, fault);
    if (code == MLAK_OK)
        code = gpu_calls_init(&self->decodes, self->gpu, enqueue_decode, self, calls, work->copies, fault);
    return code;
}

static enum mlak_code decode(struct contender *contender, struct mlak_fault *fault)
{
    double ns;
    struct peer *self = SELF(contender);
    return gpu_call_alone(self->gpu, enqueue_decode, self, 0, &ns, fault);
}

static enum mlak_code back_to_back(struct contender *contender, uint32_t rounds, double *ns, struct mlak_fault *fault)
{
    return gpu_calls_time(&SELF(contender)->decodes, rounds, ns, fault);
}

static enum mlak_code alone(struct contender *contender, uint32_t copy, double *ns, struct mlak_fault *fault)
{
    struct peer *self = SELF(contender);
    return gpu_call_alone(self->gpu, enqueue_decode, self, copy, ns, fault);
}

static enum mlak_code prepare(struct contender *contender, double *ns, struct mlak_fault *fault)
{
    struct gpu_calls calls;
    struct peer *self = SELF(contender);
    enum mlak_code code = gpu_calls_init(&calls, self->gpu, enqueue_prepare, self, PREPARES, 1, fault);
    if (code != MLAK_OK)
        return code;
    code = gpu_calls_time(&calls, 1, ns, fault);
    *ns /= PREPARES;
    gpu_calls_deinit(&calls);
    return code;
}

static void end(struct contender *contender)
{
    struct peer *self = SELF(contender);
    gpu_calls_deinit(&self->decodes);
    if (self->self)
        self->library->close(self->self);
    self->self = NULL;
}

enum mlak_code peer_init(struct peer *peer, struct gpu *gpu, const char *path, struct mlak_fault *fault)
{
    mlad_peer_function *function = NULL;
    *peer = (struct peer){.contender = {begin, decode, back_to_back, NULL, alone, prepare, end}, .gpu = gpu};
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!library)
        return mlak_fail(fault, MLAK_INVALID, "peer", "%.200s; name a library by its path", dlerror());
    *(void **)(void *)&function = dlsym(library, "mlad_peer");
    peer->library = function ? function() : NULL;
    if (!peer->library)
        return mlak_fail(fault, MLAK_INVALID, "peer", "%.150s exports no mlad_peer; build it to peer.h", path);
    if (peer->library->abi != MLAD_PEER_ABI)
        return mlak_fail(fault, MLAK_INVALID, "peer", "%.120s is built to version %d of peer.h, and this program to %d",
                         path, peer->library->abi, MLAD_PEER_ABI);
    return MLAK_OK;
}
