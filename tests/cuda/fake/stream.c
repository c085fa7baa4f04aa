/* stream.c - streams, each a thread that runs what is queued in order; events, modules, launches; graphs, which are ops
 * that a stream noted while it was captured. */
#include "fake_cuda.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "mlak_cuda.h"

bool mlak_emulate(const char *kernel, unsigned grid, unsigned block, size_t shared, const void *job)
    __attribute__((weak));
bool mlak_emulates(const char *kernel) __attribute__((weak));
bool mlak_emulate_alone(const char *kernel, const void *parameter) __attribute__((weak));
size_t mlak_emulated_alone(const char *kernel) __attribute__((weak));

enum op_kind { OP_COPY, OP_SET, OP_SET_WORDS, OP_LAUNCH, OP_CALL, OP_EVENT };
struct op {
    struct op *next;
    enum op_kind kind;
    void *to;
    const void *from;
    size_t n, shared;
    unsigned grid, block;
    int value, sticky;
    bool hang;
    const char *kernel;
    void (*call)(void *);
    CUevent event;
    _Alignas(64) unsigned char job[sizeof(struct mlak_cuda_job)];
};
struct fake_stream {
    struct fake_stream *next;
    struct op *first, **last;
    unsigned queued, done;
    bool closing, invalid;              /* invalid: its capture */
    struct fake_graph *capture;         /* NULL: none */
    pthread_t capturer;
    int mode;
};
struct fake_graph { struct op *first, **last, **roots; uint64_t id; }; /* roots: behind the host nodes at its start */
struct fake_event { unsigned pending; bool destroyed; struct timespec at; };
struct fake_function { struct fake_function *next; char name[128]; int shared; size_t parameter; };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* over all of the above */
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static struct fake_stream *streams, *null_stream;
static struct fake_function *functions;

static void graph_free(struct fake_graph *graph)
{
    for (struct op *op = graph ? graph->first : NULL, *next; op; op = next) next = op->next, free(op);
    free(graph);
}

static void run_op(struct op *op)
{
    unsigned slow = op->kind == OP_LAUNCH ? fake_settings().slow : 0;
    while (op->hang && fake_hanging()) usleep(1000);
    if (slow) usleep(slow * 1000);
    if (fake_sticky() && op->kind != OP_EVENT && op->kind != OP_CALL) return;
    switch (op->kind) {
    case OP_COPY: /* kernels may be looking at a word */
        if (op->n == 4) __atomic_store_n((int *)op->to, *(const int *)op->from, __ATOMIC_RELAXED);
        else memmove(op->to, op->from, op->n);
        break;
    case OP_SET: memset(op->to, op->value, op->n); break;
    case OP_SET_WORDS:
        for (size_t i = 0; i < op->n; i++) __atomic_store_n((int *)op->to + i, op->value, __ATOMIC_RELAXED);
        break;
    case OP_CALL: op->call(op->to); break;
    case OP_EVENT: clock_gettime(CLOCK_MONOTONIC, &op->event->at); break;
    case OP_LAUNCH:
        if (op->sticky) fake_set_sticky(op->sticky);
        else if (mlak_emulate_alone(op->kernel, op->job)) break;
        else if (!mlak_emulate(op->kernel, op->grid, op->block, op->shared, op->job))
            fake_set_sticky(FAKE_LAUNCH_FAILED);
        break;
    }
}

static void *stream_main(void *argument)
{
    CUstream s = argument;
    pthread_mutex_lock(&lock);
    while (s->first || !s->closing) {
        struct op *op = s->first;
        if (!op) {
            pthread_cond_wait(&changed, &lock);
            continue;
        }
        pthread_mutex_unlock(&lock);
        run_op(op);
        pthread_mutex_lock(&lock);
        s->first = op->next;
        if (!s->first) s->last = &s->first;
        s->done++;
        if (op->event && --op->event->pending == 0 && op->event->destroyed) free(op->event);
        free(op);
        pthread_cond_broadcast(&changed);
    }
    struct fake_stream **at = &streams;
    while (*at != s) at = &(*at)->next;
    *at = s->next;
    pthread_mutex_unlock(&lock);
    free(s);
    return NULL;
}

/* With the lock. */
static CUstream stream_new(void)
{
    CUstream s = calloc(1, sizeof *s);
    pthread_t thread;
    if (!s) return NULL;
    s->last = &s->first;
    s->next = streams;
    if (pthread_create(&thread, NULL, stream_main, s) != 0) return free(s), NULL;
    pthread_detach(thread);
    return streams = s;
}
static CUstream resolve(CUstream s)
{
    if ((uintptr_t)s > 2) return s;
    if (!null_stream) null_stream = stream_new();
    return null_stream;
}
/* With the lock: a copy of the op at the end of a list. */
static CUresult append(struct op ***last, const struct op *template)
{
    struct op *op = aligned_alloc(64, sizeof *op);
    if (!op) return FAKE_OUT_OF_MEMORY;
    *op = *template;
    op->next = NULL;
    **last = op;
    *last = &op->next;
    return FAKE_OK;
}
/* With the lock. Only what runs is counted as a launch. */
static CUresult run_later(CUstream s, struct op op)
{
    if (op.kind == OP_LAUNCH) {
        op.sticky = fake_next_launch(&op.hang);
        if (!mlak_emulate && !op.sticky && !op.hang) return FAKE_NOT_FOUND;
        if (!mlak_emulate && !op.sticky) op.sticky = FAKE_LAUNCH_FAILED; /* once it no longer hangs */
    }
    CUresult result = append(&s->last, &op);
    if (result) return result;
    if (op.event) op.event->pending++;
    s->queued++;
    pthread_cond_broadcast(&changed);
    return FAKE_OK;
}
/* With the lock: what a capture cannot note ends it. */
static CUresult invalidate(CUstream s, CUresult result) { return s->invalid = true, result; }

static CUresult enqueue(CUstream s, const struct op *op)
{
    pthread_mutex_lock(&lock);
    s = resolve(s);
    CUresult result = !s ? FAKE_OUT_OF_MEMORY : !s->capture ? run_later(s, *op) : s->invalid ? FAKE_CAPTURE_INVALIDATED
                    : op->kind == OP_EVENT ? invalidate(s, FAKE_NOT_SUPPORTED) : append(&s->capture->last, op);
    pthread_mutex_unlock(&lock);
    return result;
}
/* Waiting for a captured stream is an error, and the end of its capture. */
static CUresult not_captured(CUstream s)
{
    return s && s->capture ? invalidate(s, s->invalid ? FAKE_CAPTURE_INVALIDATED : FAKE_CAPTURE_UNSUPPORTED) : FAKE_OK;
}
static _Thread_local int thread_mode; /* streams of any thread are captured here, whatever it is */

bool fake_capturing(void)
{
    bool found = false;
    if (thread_mode == FAKE_CAPTURE_RELAXED) return false;
    pthread_mutex_lock(&lock);
    for (CUstream s = streams; s; s = s->next)
        if (s->capture && s->mode != FAKE_CAPTURE_RELAXED &&
            (s->mode == FAKE_CAPTURE_GLOBAL || pthread_equal(s->capturer, pthread_self()))) found = s->invalid = true;
    pthread_mutex_unlock(&lock);
    return found;
}
CUresult fake_stream_settle(CUstream s)
{
    pthread_mutex_lock(&lock);
    s = resolve(s);
    unsigned until = s ? s->queued : 0;
    CUresult result = not_captured(s);
    while (s && (int)(s->done - until) < 0) pthread_cond_wait(&changed, &lock);
    pthread_mutex_unlock(&lock);
    return result ? result : fake_sticky();
}
CUresult fake_sync_all(void)
{
    pthread_mutex_lock(&lock);
    for (CUstream s = streams; s;) {
        if (s->first) pthread_cond_wait(&changed, &lock), s = streams;
        else s = s->next;
    }
    pthread_mutex_unlock(&lock);
    return fake_sticky();
}

API(cuStreamCreate, (CUstream *out, unsigned flags), (out, flags))
{
    (void)flags;
    if (fake_current_device() < 0) return FAKE_INVALID_CONTEXT;
    pthread_mutex_lock(&lock);
    *out = stream_new();
    pthread_mutex_unlock(&lock);
    return *out ? FAKE_OK : FAKE_OUT_OF_MEMORY;
}
API(cuStreamCreateWithPriority, (CUstream *out, unsigned flags, int priority), (out, flags, priority))
{
    return (void)priority, do_cuStreamCreate(out, flags);
}
API(cuStreamDestroy_v2, (CUstream s), (s))
{
    if ((uintptr_t)s <= 2) return FAKE_INVALID_HANDLE;
    pthread_mutex_lock(&lock);
    graph_free(s->capture);
    s->capture = NULL;
    s->closing = true;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
    return FAKE_OK;
}
API(cuStreamSynchronize, (CUstream s), (s)) { return fake_stream_settle(s); }
API(cuStreamQuery, (CUstream s), (s))
{
    pthread_mutex_lock(&lock);
    s = resolve(s);
    bool busy = s && s->first;
    CUresult result = not_captured(s);
    pthread_mutex_unlock(&lock);
    return result ? result : busy ? FAKE_NOT_READY : fake_sticky();
}
API(cuStreamIsCapturing, (CUstream s, int *status), (s, status))
{
    pthread_mutex_lock(&lock);
    s = resolve(s);
    *status = s && s->capture ? 1 + s->invalid : 0;
    pthread_mutex_unlock(&lock);
    return FAKE_OK;
}
API(cuThreadExchangeStreamCaptureMode, (int *mode), (mode))
{
    int before = thread_mode;
    if (*mode < 0 || *mode > 2) return FAKE_INVALID_VALUE;
    thread_mode = *mode;
    *mode = before;
    return FAKE_OK;
}
API(cuMemcpyHtoDAsync_v2, (CUdeviceptr to, const void *from, size_t n, CUstream s), (to, from, n, s))
{
    return enqueue(s, &(struct op){.kind = OP_COPY, .to = (void *)to, .from = from, .n = n});
}
API(cuMemcpyDtoHAsync_v2, (void *to, CUdeviceptr from, size_t n, CUstream s), (to, from, n, s))
{
    return enqueue(s, &(struct op){.kind = OP_COPY, .to = to, .from = (void *)from, .n = n});
}
API(cuMemsetD8Async, (CUdeviceptr to, unsigned char v, size_t n, CUstream s), (to, v, n, s))
{
    return enqueue(s, &(struct op){.kind = OP_SET, .to = (void *)to, .value = v, .n = n});
}
API(cuMemsetD32Async, (CUdeviceptr to, unsigned v, size_t n, CUstream s), (to, v, n, s))
{
    return enqueue(s, &(struct op){.kind = OP_SET_WORDS, .to = (void *)to, .value = (int)v, .n = n});
}
API(cuLaunchHostFunc, (CUstream s, void (*call)(void *), void *data), (s, call, data))
{
    return enqueue(s, &(struct op){.kind = OP_CALL, .call = call, .to = data});
}

API(cuEventCreate, (CUevent *out, unsigned flags), (out, flags))
{
    return (void)flags, (*out = calloc(1, sizeof **out)) ? FAKE_OK : FAKE_OUT_OF_MEMORY;
}
API(cuEventRecord, (CUevent e, CUstream s), (e, s)) { return enqueue(s, &(struct op){.kind = OP_EVENT, .event = e}); }
API(cuEventQuery, (CUevent e), (e))
{
    pthread_mutex_lock(&lock);
    bool busy = e->pending;
    pthread_mutex_unlock(&lock);
    return busy ? FAKE_NOT_READY : fake_sticky();
}
API(cuEventSynchronize, (CUevent e), (e))
{
    pthread_mutex_lock(&lock);
    while (e->pending) pthread_cond_wait(&changed, &lock);
    pthread_mutex_unlock(&lock);
    return fake_sticky();
}
API(cuEventElapsedTime, (float *ms, CUevent from, CUevent to), (ms, from, to))
{
    pthread_mutex_lock(&lock);
    bool busy = from->pending || to->pending;
    *ms = (float)(to->at.tv_sec - from->at.tv_sec) * 1e3f + (float)(to->at.tv_nsec - from->at.tv_nsec) * 1e-6f;
    pthread_mutex_unlock(&lock);
    return busy ? FAKE_NOT_READY : fake_sticky();
}
API(cuEventDestroy_v2, (CUevent e), (e))
{
    pthread_mutex_lock(&lock);
    e->destroyed = true;
    bool now = e->pending == 0;
    pthread_mutex_unlock(&lock);
    if (now) free(e);
    return FAKE_OK;
}

API(cuModuleLoadData, (CUmodule *out, const void *image), (out, image))
{
    return image ? (*out = (CUmodule)(void *)&functions, FAKE_OK) : FAKE_INVALID_VALUE;
}
API(cuModuleUnload, (CUmodule m), (m)) { return m ? FAKE_OK : FAKE_INVALID_HANDLE; }
API(cuModuleGetFunction, (CUfunction *out, CUmodule m, const char *name), (out, m, name))
{
    size_t alone = mlak_emulated_alone ? mlak_emulated_alone(name) : 0;
    if (!m || (strncmp(name, "mlak_", 5) && !alone) || strlen(name) >= 128) return FAKE_NOT_FOUND;
    if (!strncmp(name, "mlak_cuda_", 10) && mlak_emulates && !mlak_emulates(name) && !alone) return FAKE_NOT_FOUND;
    CUfunction f = calloc(1, sizeof *f);
    if (!f) return FAKE_OUT_OF_MEMORY;
    f->parameter = alone ? alone : sizeof(struct mlak_cuda_job);
    strcpy(f->name, name);
    pthread_mutex_lock(&lock);
    f->next = functions;
    *out = functions = f; /* never freed: a launch may still name it */
    pthread_mutex_unlock(&lock);
    return FAKE_OK;
}
API(cuFuncSetAttribute, (CUfunction f, int which, int value), (f, which, value))
{
    if (which == 8 && (value < 0 || value > fake_settings().smem)) return FAKE_INVALID_VALUE;
    if (which == 8) f->shared = value;
    return FAKE_OK;
}
API(cuFuncGetAttribute, (int *out, int which, CUfunction f), (out, which, f))
{
    *out = which == 0 ? 1024 : which == 4 ? 64 : which == 8 ? f->shared : 0;
    return FAKE_OK;
}
API(cuOccupancyMaxActiveBlocksPerMultiprocessor, (int *out, CUfunction f, int block, size_t shared),
    (out, f, block, shared))
{
    (void)f;
    if (block < 1) return FAKE_INVALID_VALUE;
    return *out = block > 1024 || shared > (size_t)fake_settings().smem ? 0 : 1, FAKE_OK;
}
static CUresult launch(CUfunction f, const unsigned grid[3], const unsigned block[3], unsigned shared, CUstream s,
                       void **parameters, void **extra)
{
    if (!f || !parameters || extra || !grid[0] || grid[1] != 1 || grid[2] != 1 || !block[0] || block[0] > 1024 ||
        block[1] != 1 || block[2] != 1 || (shared > 49152 && shared > (unsigned)f->shared)) return FAKE_INVALID_VALUE;
    struct op op = {.kind = OP_LAUNCH, .kernel = f->name, .grid = grid[0], .block = block[0], .shared = shared};
    memcpy(op.job, parameters[0], f->parameter);
    bool whole = f->parameter == sizeof(struct mlak_cuda_job);
    const struct mlak_cuda_job *job = (void *)op.job;
    char line[200];
    snprintf(line, sizeof line, "launch %s %u%s", f->name, grid[0], whole && job->silent ? " silent" : "");
    fake_note(line);
    return enqueue(s, &op);
}
API(cuLaunchKernel, (CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                     unsigned shared, CUstream s, void **parameters, void **extra),
    (f, gx, gy, gz, bx, by, bz, shared, s, parameters, extra))
{
    return launch(f, (unsigned[]){gx, gy, gz}, (unsigned[]){bx, by, bz}, shared, s, parameters, extra);
}

API(cuLaunchKernelEx, (const struct fake_config *c, CUfunction f, void **parameters, void **extra),
    (c, f, parameters, extra))
{
    return launch(f, c->grid, c->block, c->shared, c->stream, parameters, extra);
}
/* There is no copy engine here, and no kernel that would use one. */
API(cuTensorMapEncodeTiled,
    (void *map, int type, unsigned rank, void *at, const uint64_t *shape, const uint64_t *strides, const unsigned *box,
     const unsigned *steps, int interleave, int swizzle, int promotion, int fill),
    (map, type, rank, at, shape, strides, box, steps, interleave, swizzle, promotion, fill))
{
    return (void)map, (void)type, (void)rank, (void)at, (void)shape, (void)strides, (void)box, (void)steps,
           (void)interleave, (void)swizzle, (void)promotion, (void)fill, FAKE_NOT_SUPPORTED;
}

API(cuStreamBeginCapture_v2, (CUstream s, int mode), (s, mode))
{
    if ((uintptr_t)s <= 1) return FAKE_CAPTURE_UNSUPPORTED; /* the legacy stream */
    if (mode < FAKE_CAPTURE_GLOBAL || mode > FAKE_CAPTURE_RELAXED) return FAKE_INVALID_VALUE;
    struct fake_graph *graph = calloc(1, sizeof *graph);
    if (!graph) return FAKE_OUT_OF_MEMORY;
    static uint64_t captures;
    graph->last = &graph->first;
    pthread_mutex_lock(&lock);
    graph->id = ++captures;
    s = resolve(s);
    CUresult result = !s ? FAKE_OUT_OF_MEMORY : s->capture ? FAKE_ILLEGAL_STATE : FAKE_OK;
    if (!result) s->capture = graph, s->invalid = false, s->capturer = pthread_self(), s->mode = mode;
    pthread_mutex_unlock(&lock);
    if (result) free(graph);
    return result;
}
API(cuStreamGetCaptureInfo_v2, (CUstream s, int *status, uint64_t *id, CUgraph *out, void *const **from, size_t *n),
    (s, status, id, out, from, n))
{
    static void *const none;
    pthread_mutex_lock(&lock);
    s = resolve(s);
    *status = s && s->capture ? 1 + s->invalid : 0;
    if (*status) *id = s->capture->id, *out = s->capture, *from = &none, *n = 0;
    pthread_mutex_unlock(&lock);
    return FAKE_OK;
}
/* Only at a graph's start, one behind the other, while it is captured. */
API(cuGraphAddHostNode, (void **node, CUgraph graph, void *const *from, size_t n, void *const *parameters),
    (node, graph, from, n, parameters))
{
    struct op *op = aligned_alloc(64, sizeof *op);
    if (!op) return FAKE_OUT_OF_MEMORY;
    pthread_mutex_lock(&lock);
    struct op **at = graph->roots ? graph->roots : &graph->first;
    bool last = at == graph->last;
    CUresult result = n == 0 || (n == 1 && (struct op **)from[0] == graph->roots) ? FAKE_OK : FAKE_INVALID_VALUE;
    if (!result) {
        *op = (struct op){.next = *at, .kind = OP_CALL, .call = (void (*)(void *))parameters[0], .to = parameters[1]};
        if (last) op->next = NULL, graph->last = &op->next;
        *at = op;
        *node = graph->roots = &op->next;
    }
    pthread_mutex_unlock(&lock);
    if (result) free(op);
    return result;
}
API(cuStreamEndCapture, (CUstream s, CUgraph *out), (s, out))
{
    pthread_mutex_lock(&lock);
    s = resolve(s);
    struct fake_graph *graph = s ? s->capture : NULL;
    bool ours = graph && (s->mode == FAKE_CAPTURE_RELAXED || pthread_equal(s->capturer, pthread_self()));
    CUresult result = !graph ? FAKE_ILLEGAL_STATE : !ours ? FAKE_CAPTURE_WRONG_THREAD
                    : s->invalid ? FAKE_CAPTURE_INVALIDATED : FAKE_OK;
    if (ours) s->capture = NULL;
    pthread_mutex_unlock(&lock);
    *out = result ? NULL : graph;
    if (result == FAKE_CAPTURE_INVALIDATED) graph_free(graph);
    return result;
}
API(cuGraphDestroy, (CUgraph graph), (graph)) { return graph ? (graph_free(graph), FAKE_OK) : FAKE_INVALID_VALUE; }
/* An executable graph is a copy; so is what its launch queues, and either may be destroyed at any time. */
API(cuGraphInstantiateWithFlags, (CUgraphExec *out, CUgraph graph, unsigned long long flags), (out, graph, flags))
{
    if (!graph || flags) return FAKE_INVALID_VALUE;
    struct fake_graph *exec = calloc(1, sizeof *exec);
    if (!exec) return FAKE_OUT_OF_MEMORY;
    CUresult result = FAKE_OK;
    exec->last = &exec->first;
    for (struct op *op = graph->first; op && !result; op = op->next) result = append(&exec->last, op);
    if (result) graph_free(exec);
    else *out = exec;
    return result;
}
API(cuGraphLaunch, (CUgraphExec exec, CUstream s), (exec, s))
{
    if (!exec) return FAKE_INVALID_VALUE;
    pthread_mutex_lock(&lock);
    s = resolve(s);
    CUresult result = !s ? FAKE_OUT_OF_MEMORY : s->capture ? invalidate(s, FAKE_NOT_SUPPORTED) : FAKE_OK;
    for (struct op *op = exec->first; op && !result; op = op->next) result = run_later(s, *op);
    pthread_mutex_unlock(&lock);
    return result;
}
API(cuGraphExecDestroy, (CUgraphExec exec), (exec)) { return exec ? (graph_free(exec), FAKE_OK) : FAKE_INVALID_VALUE; }
