/* test_peer.c - a peer for the test of mlad-kernel-compare over the fake driver, whose memory the processor can read:
 * the reference backend as a host function on the stream. WRONG: it does not look at the last key of any request. */
#include "peer.h"

#include "mlak.h"

#include <dlfcn.h>
#include <stdlib.h>

typedef int launch_host_function(struct CUstream_st *, void (*)(void *), void *);

struct call { struct mlak_batch batch; struct mlak_device *device; const int *prepared; };
struct test_peer {
    struct mlak_device *device;
    launch_host_function *launch;
    int prepared;
    struct call calls[];
};

static const struct mlak_backend *reference(void) { return mlak_backend("reference"); }

static void close_peer(void *self)
{
    struct test_peer *peer = self;
    reference()->close(peer->device);
    free(peer);
}

static const char *open_peer(const struct mlad_peer_batch *batches, uint32_t count, void **self)
{
    if (batches[0].heads == 3)
        return "three heads are not taken";
    struct test_peer *peer = calloc(1, sizeof *peer + count * sizeof peer->calls[0]);
    if (!peer)
        return "no memory";
    peer->device = reference()->open(&(struct mlak_options){.threads = 1}, NULL);
    *(void **)(void *)&peer->launch = dlsym(dlopen("libcuda.so.1", RTLD_NOW), "cuLaunchHostFunc");
    for (uint32_t i = 0; i < count; i++) {
        const struct mlad_peer_batch *from = &batches[i];
        struct mlak_batch *to = &peer->calls[i].batch;
        *to = (struct mlak_batch){.q_dtype = MLAK_BF16, .kv_format = MLAK_KV_BF16, .page_size = from->page_size};
        mlak_batch_defaults(to);
        to->batch = from->batch;
        to->heads = from->heads;
        to->q_rows = (uint64_t)from->batch * from->q_len;
        to->pages = from->pages;
        to->max_pages = from->max_pages;
        to->softmax_scale = (double)from->softmax_scale;
        to->q = from->q;
        to->kv = from->kv;
        to->block_table = from->block_table;
        to->seqlens = from->seqlens;
        to->out = from->out;
        to->lse = from->lse;
        to->has_lse = true;
        peer->calls[i].device = peer->device;
        peer->calls[i].prepared = &peer->prepared;
    }
    *self = peer;
    return NULL;
}

static void set_prepared(void *prepared) { *(int *)prepared = 1; }

static const char *prepare(void *self, struct CUstream_st *stream)
{
    struct test_peer *peer = self;
    return peer->launch(stream, set_prepared, &peer->prepared) ? "cuLaunchHostFunc failed" : NULL;
}

static void decode(void *data)
{
    struct call *call = data;
    if (!*call->prepared)
        return; /* nothing is written: the outputs stay NaN */
    struct mlak_row *rows = calloc(call->batch.batch, sizeof *rows);
    mlak_prepare(&call->batch, NULL, 0, call->batch.batch, rows, NULL);
#ifdef WRONG
    for (uint32_t i = 0; i < call->batch.batch; i++) {
        rows[i].global_len--;
        rows[i].local_len--;
    }
#endif
    reference()->launch(call->device, rows, call->batch.batch);
    free(rows);
}

static const char *enqueue(void *self, uint32_t batch, struct CUstream_st *stream)
{
    struct test_peer *peer = self;
    return peer->launch(stream, decode, &peer->calls[batch]) ? "cuLaunchHostFunc failed" : NULL;
}

__attribute__((visibility("default"))) const struct mlad_peer *mlad_peer(void)
{
    static const struct mlad_peer peer = {MLAD_PEER_ABI, "reference", open_peer, prepare, enqueue, close_peer};
    return &peer;
}
