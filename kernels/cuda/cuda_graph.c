/* cuda_graph.c - launches captured into a CUDA graph, replayed, and timed.
 *
 * A graph owns its executable form alone; scratch and results are those of the device's first room, so that replays and
 * launches in it take turns. Parameters are captured by value, a ticket among them: every replay ends with the same
 * completion word, which is wiped before each. */
#include "cuda_device.h"

#include <stdlib.h>

struct mlak_graph {
    CUgraphExec exec;
    struct mlak_batch first, last;
    uint64_t ticket; /* of `last` */
};

static struct cuda_room *own_room(struct mlak_device *device)
{
    return &device->rooms[0];
}

static struct cuda_slice whole(const struct mlak_batch *batch, struct mlak_row *rows)
{
    return (struct cuda_slice){.batch = batch, .count = batch->batch, .rows = rows};
}

static enum mlak_code check(struct mlak_device *device, const struct mlak_batch *batches, uint32_t count,
                            struct mlak_fault *fault)
{
    enum mlak_code code = cuda_enter(device, fault);
    if (code == MLAK_OK && count == 0)
        code = mlak_fail(fault, MLAK_INVALID, "count", "a graph of no batches; give one at least");
    for (uint32_t i = 0; i < count && code == MLAK_OK; i++) {
        uint32_t most = cuda_most_requests(device, &batches[i]);
        if (batches[i].batch > most)
            code = mlak_fail(fault, MLAK_UNSUPPORTED, "batch",
                             "batch %u of the graph has %u requests, and one launch takes %u%s; split it", i,
                             batches[i].batch, most, batches[i].deterministic ? " of a deterministic batch" : "");
    }
    return code;
}

/* On a stream of its own: however the capture ends, the device's stream knows nothing of it. `layers`: of a step that
 * was prepared. `call`: the one that answered. */
static CUresult capture(struct mlak_device *device, const struct mlak_batch *batches, uint32_t count, bool layers,
                        CUgraph *captured, uint64_t *ticket, const char **call)
{
    const struct mlak_driver *cu = device->cu;
    struct cuda_room *room = own_room(device);
    CUstream stream;
    *call = "stream_new";
    CUresult result = cu->stream_new(&stream, CU_STREAM_NON_BLOCKING);
    if (result != CUDA_SUCCESS)
        return result;
    *call = "capture_begin";
    result = cu->capture_begin(stream, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL);
    if (result == CUDA_SUCCESS) {
        *call = "launch_as";
        for (uint32_t i = 0; i < count && result == CUDA_SUCCESS; i++) {
            const struct cuda_slice slice = whole(&batches[i], NULL);
            struct mlak_cuda_job job = cuda_job(device, room, cuda_gates(device), &slice, 1);
            job.silent = i + 1 < count; /* as in a client's stream: the last one's word says that all are over */
            if (i == 0 && layers) {
                room->prepared[0] = job.source;
                room->n_prepared = 1;
                room->prepared_grid = job.grid;
            }
            result = layers && !cuda_follow(room, &job) ? CUDA_ERROR_INVALID_VALUE
                                                        : cuda_launch(device, room, &job, layers, stream);
            *ticket = job.ticket;
        }
        if (layers)
            room->n_prepared = 0; /* it is not yet */
        CUresult end = cu->capture_end(stream, captured); /* of a capture that failed, too */
        if (result == CUDA_SUCCESS) {
            *call = "capture_end";
            result = end;
        }
    }
    cu->stream_free(stream);
    return result;
}

static struct mlak_graph *graph_new(struct mlak_device *device, const struct mlak_batch *batches, uint32_t count,
                                    bool layers, struct mlak_fault *fault)
{
    if (check(device, batches, count, fault) != MLAK_OK)
        return NULL;
    struct mlak_graph *graph = calloc(1, sizeof *graph);
    if (!graph) {
        mlak_fail(fault, MLAK_MEMORY, "", "no memory for the graph");
        return NULL;
    }
    const char *call;
    CUgraph captured = NULL;
    CUresult result = capture(device, batches, count, layers, &captured, &graph->ticket, &call);
    if (result == CUDA_SUCCESS) {
        call = "graph_instantiate";
        result = device->cu->graph_instantiate(&graph->exec, captured, 0);
    }
    if (captured)
        device->cu->graph_free(captured);
    if (result != CUDA_SUCCESS) {
        cuda_refused(device, own_room(device), call, result, fault);
        free(graph);
        return NULL;
    }
    graph->first = batches[0];
    graph->last = batches[count - 1];
    return graph;
}

struct mlak_graph *cuda_graph_new(struct mlak_device *device, const struct mlak_batch *batches, uint32_t count,
                                  struct mlak_fault *fault)
{
    return graph_new(device, batches, count, false, fault);
}

void cuda_graph_free(struct mlak_device *device, struct mlak_graph *graph)
{
    if (!graph)
        return;
    device->cu->context_set(device->context);
    device->cu->graph_exec_free(graph->exec);
    free(graph);
}

/* No launch has ticket 0. */
static void wipe_completion_word(const struct cuda_room *room)
{
    __atomic_store_n(&room->result->done, 0, __ATOMIC_RELEASE);
}

enum mlak_code cuda_graph_replay(struct mlak_device *device, struct mlak_graph *graph, struct mlak_row *rows,
                                 struct mlak_fault *fault)
{
    enum mlak_code code = cuda_enter(device, fault);
    if (code != MLAK_OK)
        return code;
    struct cuda_room *room = own_room(device);
    wipe_completion_word(room);
    room->n_prepared = 0;
    CUresult result = device->cu->graph_launch(graph->exec, room->stream);
    if (result != CUDA_SUCCESS)
        return cuda_refused(device, room, "graph_launch", result, fault);
    /* Without a slice to cancel: a cancelled ticket would stop every replay to come. */
    code = cuda_await(device, room, graph->ticket, NULL, 0, fault);
    const struct cuda_slice slice = whole(&graph->last, rows);
    return code == MLAK_OK ? cuda_outcome(room, 0, 0, &slice, fault) : code;
}

/* The call, unless one before it was refused. */
#define THEN(name, ...)                                                                                                \
    do {                                                                                                               \
        if (result == CUDA_SUCCESS) {                                                                                  \
            call = #name;                                                                                              \
            result = device->cu->name(__VA_ARGS__);                                                                    \
        }                                                                                                              \
    } while (0)

static enum mlak_code time_replays(struct mlak_device *device, const struct mlak_graph *graph, uint32_t rounds,
                                   bool layers, double *ns, struct mlak_fault *fault)
{
    struct cuda_room *room = own_room(device);
    CUevent events[2] = {NULL, NULL};
    float milliseconds = 0;
    const char *call = "";
    CUresult result = CUDA_SUCCESS;
    room->n_prepared = 0;
    THEN(event_new, &events[0], CU_EVENT_DEFAULT);
    THEN(event_new, &events[1], CU_EVENT_DEFAULT);
    wipe_completion_word(room);
    if (result == CUDA_SUCCESS && layers) {
        const struct cuda_slice slice = whole(&graph->first, NULL);
        struct mlak_cuda_job job = cuda_job(device, room, cuda_gates(device), &slice, 1);
        call = "launch_as";
        result = cuda_launch(device, room, &job, false, room->stream);
    }
    THEN(graph_launch, graph->exec, room->stream); /* hides the host's part in those that count */
    THEN(event_record, events[0], room->stream);
    for (uint32_t i = 0; i < rounds; i++)
        THEN(graph_launch, graph->exec, room->stream);
    THEN(event_record, events[1], room->stream);
    if (result == CUDA_SUCCESS) {
        call = "stream_query";
        result = cuda_settle(device, room);
    }
    bool silent = result == CUDA_SUCCESS && __atomic_load_n(&room->result->done, __ATOMIC_ACQUIRE) != graph->ticket;
    THEN(event_elapsed, &milliseconds, events[0], events[1]);
    *ns = (double)milliseconds * 1e6;
    enum mlak_code code = result == CUDA_SUCCESS ? MLAK_OK : cuda_refused(device, room, call, result, fault);
    for (unsigned i = 0; i < 2; i++)
        if (events[i])
            device->cu->event_free(events[i]);
    if (silent)
        return cuda_lose(device, "the replays ended without their completion word", CUDA_ERROR_UNKNOWN, fault);
    return code;
}

enum mlak_code cuda_time_batches(struct mlak_device *device, const struct mlak_batch *batches, uint32_t count,
                                 bool layers, uint32_t rounds, double *ns, struct mlak_fault *fault)
{
    struct mlak_fault own = {0};
    *ns = 0;
    if (rounds == 0)
        return mlak_fail(fault, MLAK_INVALID, "rounds", "no replay to time; give one at least");
    for (uint32_t i = 1; i < count && layers; i++)
        if (!mlak_same_step(&batches[0], &batches[i]))
            return mlak_fail(fault, MLAK_INVALID, "layers",
                             "batch %u differs from the first in more than the memory of q, kv, sink, out and lse", i);
    struct mlak_graph *graph = graph_new(device, batches, count, layers, &own);
    enum mlak_code code = graph ? time_replays(device, graph, rounds, layers, ns, &own) : own.code;
    cuda_graph_free(device, graph);
    if (fault)
        *fault = own;
    return code;
}
