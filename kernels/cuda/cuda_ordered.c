/* cuda_ordered.c - launches in the order of a client's stream: lanes, and CUDA graphs of gate, launch, signal.
 *
 * A lane is a room, and words in device memory by which gates learn that they should give up. An order is captured into
 * graphs that differ only in where they say what came of them, so that a few rounds of it may be in flight; a round's
 * number lies in device memory, written on the stream before its graph. All is one thread's, launch threads beside it;
 * of the device only what never changes is read here, and `waiting`, `ordered` and `lost` written. Nothing waits for
 * the stream, since a gate may hold it for seconds. */
#include "cuda_device.h"
#include "mlak_order.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum {
    LANES = 32,
    UNITS = 4096,        /* layers in flight in a lane, of all its orders */
    FIRST_UNIT = 4,      /* the words of the lane itself lie in the units before */
    UNIT_WORDS = 8,      /* device memory of a unit: a sector */
    INSTANCES = 4,       /* rounds of an order in flight */
    HANG_SECONDS = 30    /* without a sign of life, beyond what a gate waits */
};
_Static_assert(sizeof(struct mlak_cuda_lane) <= FIRST_UNIT * UNIT_WORDS * 4, "the lane's words");

extern const uint8_t mlak_order_image[]; /* the fatbin, cuda_image.c */

struct cuda_ordered {
    CUmodule module;
    CUfunction gate, signal;
    struct mlak_cuda_order_result *results; /* pinned, [LANES][UNITS] */
    uint64_t *lives;                        /* pinned, [LANES] */
    uint32_t *one;                          /* pinned: 1 */
    struct mlak_lane *spare; /* kept: to free memory waits for all that runs */
    uint32_t made, lanes;    /* lanes there are; of them not spare */
};

struct mlak_lane {
    struct mlak_lane *next; /* spare */
    uint32_t number;
    struct cuda_room room;
    CUdeviceptr words; /* of a lane, then of each unit */
    uint64_t life_seen;
    int64_t life_at; /* nanoseconds, monotonic */
    uint32_t in_flight;
    uint32_t wait_ms; /* the longest of its gates */
    bool used[UNITS];
};

struct instance {
    CUgraphExec exec; /* NULL: not made yet */
    uint32_t unit;    /* of its first layer */
    uint32_t round;
};
struct mlak_order {
    struct mlak_lane *lane;
    uint32_t count, wait_ms;
    struct mlak_batch *batches; /* [count] */
    struct mlak_flags *flags;
    struct mlak_layer_time *times; /* [count], of the round that ended last */
    struct instance instances[INSTANCES];
    uint32_t made;          /* of them */
    uint32_t first, flying; /* those in flight, in a ring of `made` */
};

static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* MLAK_MEMORY, unless the context does not live any more. */
static enum mlak_code refused(struct mlak_device *device, const char *call, CUresult result, struct mlak_fault *fault)
{
    CUresult state = device->cu->stream_query(device->control);
    if (state != CUDA_SUCCESS && state != CUDA_ERROR_NOT_READY)
        return cuda_lose(device, call, state, fault);
    return mlak_driver_fail(fault, MLAK_MEMORY, "", call, result);
}

/* ---- once for all lanes ---- */

#define TRY(call, ...)                                                                                                 \
    do {                                                                                                               \
        CUresult result_ = device->cu->call(__VA_ARGS__);                                                              \
        if (result_ != CUDA_SUCCESS)                                                                                   \
            return refused(device, #call, result_, fault);                                                             \
    } while (0)

static enum mlak_code open_ordered(struct mlak_device *device, struct cuda_ordered *all, struct mlak_fault *fault)
{
    const unsigned flags = CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP;
    TRY(module_load, &all->module, mlak_order_image);
    TRY(module_function, &all->gate, all->module, "mlak_cuda_gate");
    TRY(module_function, &all->signal, all->module, "mlak_cuda_signal");
    /* A processor's memory is cut for the kernel that came first: as the split kernels need it. */
    TRY(function_attribute, all->gate, CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100);
    TRY(function_attribute, all->signal, CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100);
    TRY(host_alloc, (void **)&all->results, (size_t)LANES * UNITS * sizeof *all->results, flags);
    TRY(host_alloc, (void **)&all->lives, LANES * sizeof *all->lives, flags);
    TRY(host_alloc, (void **)&all->one, sizeof *all->one, flags);
    *all->one = 1;
    return MLAK_OK;
}

static void close_ordered(const struct mlak_device *device, struct cuda_ordered *all)
{
    if (all->results)
        device->cu->host_free(all->results);
    if (all->lives)
        device->cu->host_free(all->lives);
    if (all->one)
        device->cu->host_free(all->one);
    if (all->module)
        device->cu->module_unload(all->module);
    free(all);
}

static void close_lane(const struct mlak_device *device, struct mlak_lane *lane)
{
    cuda_room_close(device, &lane->room);
    if (lane->words)
        device->cu->free(lane->words);
    free(lane);
}

void cuda_ordered_close(struct mlak_device *device)
{
    struct mlak_lane *lane;
    if (!device->ordered)
        return;
    while ((lane = device->ordered->spare)) {
        device->ordered->spare = lane->next;
        close_lane(device, lane);
    }
    close_ordered(device, device->ordered);
    device->ordered = NULL;
}

static enum mlak_code need_ordered(struct mlak_device *device, struct mlak_fault *fault)
{
    if (device->ordered)
        return MLAK_OK;
    struct cuda_ordered *all = calloc(1, sizeof *all);
    if (!all)
        return mlak_fail(fault, MLAK_MEMORY, "", "no memory for launches in stream order");
    enum mlak_code code = open_ordered(device, all, fault);
    if (code == MLAK_OK)
        device->ordered = all;
    else
        close_ordered(device, all);
    return code;
}

/* ---- lanes ---- */

static struct mlak_cuda_lane *lane_words(const struct mlak_lane *lane)
{
    return (struct mlak_cuda_lane *)lane->words;
}

static enum mlak_code open_lane(struct mlak_device *device, struct mlak_lane *lane, struct mlak_fault *fault)
{
    const size_t words = (size_t)UNITS * UNIT_WORDS;
    const char *call;
    CUresult result = cuda_room_open(device, &lane->room, false, &call);
    if (result != CUDA_SUCCESS)
        return refused(device, call, result, fault);
    TRY(alloc, &lane->words, words * 4);
    TRY(set_words_async, lane->words, 0, words, lane->room.stream);
    return MLAK_OK;
}

/* A lane that was used before: nobody has abandoned it, nothing of it is stopped. */
static enum mlak_code clean_lane(struct mlak_device *device, struct mlak_lane *lane, struct mlak_fault *fault)
{
    TRY(set_words_async, lane->words, 0, sizeof(struct mlak_cuda_lane) / 4, lane->room.stream);
    return MLAK_OK;
}

struct mlak_lane *cuda_lane_new(struct mlak_device *device, struct mlak_fault *fault)
{
    if (cuda_enter(device, fault) != MLAK_OK || need_ordered(device, fault) != MLAK_OK)
        return NULL;
    struct cuda_ordered *all = device->ordered;
    struct mlak_lane *lane = all->spare;
    if (lane) {
        if (clean_lane(device, lane, fault) != MLAK_OK)
            return NULL;
        all->spare = lane->next;
        all->lanes++;
        return lane;
    }
    lane = all->made < LANES ? calloc(1, sizeof *lane) : NULL;
    if (!lane) {
        mlak_fail(fault, MLAK_MEMORY, "", "%s", all->made < LANES ? "no memory for a lane" : "all lanes are in use");
        return NULL;
    }
    lane->number = all->made;
    memset(lane->used, true, FIRST_UNIT * sizeof *lane->used);
    if (open_lane(device, lane, fault) != MLAK_OK) {
        close_lane(device, lane);
        return NULL;
    }
    all->made++;
    all->lanes++;
    return lane;
}

void cuda_lane_abandon(struct mlak_device *device, struct mlak_lane *lane)
{
    device->cu->context_set(device->context);
    /* By the copy engine: the lane's stream may be held by the gate that this is for. */
    device->cu->copy_to_async((CUdeviceptr)&lane_words(lane)->abandoned, device->ordered->one, sizeof(uint32_t),
                              device->control);
}

enum mlak_code cuda_lane_restart(struct mlak_device *device, struct mlak_lane *lane, struct mlak_fault *fault)
{
    enum mlak_code code = cuda_enter(device, fault);
    CUresult result = CUDA_SUCCESS;
    if (code == MLAK_OK)
        result = device->cu->set_words_async((CUdeviceptr)&lane_words(lane)->stopped, 0, 1, lane->room.stream);
    return result == CUDA_SUCCESS ? code : cuda_lose(device, "set_words_async", result, fault);
}

void cuda_lane_free(struct mlak_device *device, struct mlak_lane *lane)
{
    lane->next = device->ordered->spare;
    device->ordered->spare = lane;
    device->ordered->lanes--;
}

/* ---- orders ---- */

static struct mlak_cuda_order_result *results_of(const struct mlak_device *device, const struct mlak_lane *lane,
                                                 uint32_t unit)
{
    return &device->ordered->results[(size_t)lane->number * UNITS + unit];
}

/* The first of `count` units in a row that are free; UNITS without. */
static uint32_t find_units(const struct mlak_lane *lane, uint32_t count)
{
    uint32_t run = 0;
    for (uint32_t at = FIRST_UNIT; at < UNITS; at++) {
        run = lane->used[at] ? 0 : run + 1;
        if (run == count)
            return at + 1 - count;
    }
    return UNITS;
}

static CUresult launch_one(const struct mlak_device *device, CUfunction kernel, unsigned threads,
                           struct mlak_cuda_order *order, CUstream stream)
{
    void *parameters[] = {order};
    return device->cu->launch(kernel, 1, 1, 1, threads, 1, 1, 0, stream, parameters, NULL);
}

/* Gate, launch, signal of layer i. */
static CUresult launch_layer(const struct mlak_device *device, struct mlak_order *order, uint32_t unit, uint32_t i,
                             CUstream stream)
{
    struct mlak_lane *lane = order->lane;
    const struct mlak_batch *batch = &order->batches[i];
    const uint32_t gates = device->ordered->lanes;
    struct mlak_cuda_job job =
        cuda_job(device, &lane->room, gates, &(struct cuda_slice){.batch = batch, .count = batch->batch}, 1);
    CUdeviceptr result, life;
    job.silent = true; /* what comes next on the stream is the signal, and the host looks at that one's word */
    CUresult code = device->cu->host_pointer(&result, results_of(device, lane, unit + i), 0);
    if (code == CUDA_SUCCESS)
        code = device->cu->host_pointer(&life, &device->ordered->lives[lane->number], 0);
    if (code != CUDA_SUCCESS)
        return code;
    struct mlak_cuda_order parameter = {
        .go = order->flags[i].go,
        .done = order->flags[i].done,
        .round = (const uint32_t *)lane->words + (size_t)unit * UNIT_WORDS,
        .lane = lane_words(lane),
        .wait_ns = order->wait_ms * UINT64_C(1000000),
        .ticket = job.ticket,
        .schedule = job.schedule,
        .launched = job.result,
        .rows = job.rows,
        .count = job.count,
        .out = batch->out,
        .out_bytes = mlak_extent(batch, MLAK_T_OUT),
        .lse = batch->lse,
        .lse_bytes = mlak_extent(batch, MLAK_T_LSE),
        .result = (void *)result,
        .life = (void *)life,
    };
    code = launch_one(device, device->ordered->gate, 1, &parameter, stream);
    if (code == CUDA_SUCCESS)
        code = cuda_launch(device, &lane->room, &job, false, stream);
    if (code == CUDA_SUCCESS)
        code = launch_one(device, device->ordered->signal, MLAK_CUDA_SIGNAL_THREADS, &parameter, stream);
    return code;
}

static CUresult capture(const struct mlak_device *device, struct mlak_order *order, uint32_t unit, CUgraph *captured)
{
    const struct mlak_driver *cu = device->cu;
    CUstream stream; /* of its own: however the capture ends, the lane's knows nothing of it */
    CUresult result = cu->stream_new(&stream, CU_STREAM_NON_BLOCKING);
    if (result != CUDA_SUCCESS)
        return result;
    result = cu->capture_begin(stream, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL);
    if (result == CUDA_SUCCESS) {
        for (uint32_t i = 0; i < order->count && result == CUDA_SUCCESS; i++)
            result = launch_layer(device, order, unit, i, stream);
        CUresult end = cu->capture_end(stream, captured);
        if (result == CUDA_SUCCESS)
            result = end;
    }
    cu->stream_free(stream);
    return result;
}

/* One more round of the order may be in flight. */
static enum mlak_code add_instance(struct mlak_device *device, struct mlak_order *order, struct mlak_fault *fault)
{
    struct mlak_lane *lane = order->lane;
    struct instance *instance = &order->instances[order->made];
    uint32_t unit = find_units(lane, order->count);
    if (unit == UNITS)
        return mlak_fail(fault, MLAK_MEMORY, "layers", "the client's steps have %d layers together at most",
                         UNITS - FIRST_UNIT);
    CUgraph captured = NULL;
    CUresult result = capture(device, order, unit, &captured);
    if (result == CUDA_SUCCESS)
        result = device->cu->graph_instantiate(&instance->exec, captured, 0);
    if (captured)
        device->cu->graph_free(captured);
    if (result != CUDA_SUCCESS)
        return refused(device, "graph_instantiate", result, fault);
    memset(lane->used + unit, true, order->count * sizeof *lane->used);
    instance->unit = unit;
    order->made++;
    return MLAK_OK;
}

static enum mlak_code check(const struct mlak_device *device, const struct mlak_batch *const *batches, uint32_t count,
                            struct mlak_fault *fault)
{
    for (uint32_t i = 0; i < count; i++) {
        uint32_t most = cuda_most_requests(device, batches[i]);
        if (batches[i]->batch > most)
            return mlak_fail(fault, MLAK_UNSUPPORTED, "layers",
                             "layer %u has %u requests, and one launch in stream order takes %u%s; split it, or use "
                             "host order", i, batches[i]->batch, most,
                             batches[i]->deterministic ? " of a deterministic batch" : "");
    }
    return MLAK_OK;
}

struct mlak_order *cuda_order_new(struct mlak_device *device, struct mlak_lane *lane,
                                  const struct mlak_batch *const *batches, const struct mlak_flags *flags,
                                  uint32_t count, uint32_t wait_ms, struct mlak_fault *fault)
{
    if (cuda_enter(device, fault) != MLAK_OK || check(device, batches, count, fault) != MLAK_OK)
        return NULL;
    struct mlak_order *order = calloc(1, sizeof *order);
    if (order)
        *order = (struct mlak_order){.lane = lane,
                                     .count = count,
                                     .wait_ms = wait_ms,
                                     .batches = calloc(count, sizeof *order->batches),
                                     .flags = calloc(count, sizeof *order->flags),
                                     .times = calloc(count, sizeof *order->times)};
    if (!order || !order->batches || !order->flags || !order->times) {
        mlak_fail(fault, MLAK_MEMORY, "", "no memory for the step");
    } else {
        for (uint32_t i = 0; i < count; i++)
            order->batches[i] = *batches[i];
        memcpy(order->flags, flags, count * sizeof *flags);
        if (wait_ms > lane->wait_ms)
            lane->wait_ms = wait_ms;
        if (add_instance(device, order, fault) == MLAK_OK)
            return order;
    }
    if (order)
        cuda_order_free(device, order);
    return NULL;
}

void cuda_order_free(struct mlak_device *device, struct mlak_order *order)
{
    device->cu->context_set(device->context);
    for (uint32_t i = 0; i < order->made; i++) {
        device->cu->graph_exec_free(order->instances[i].exec);
        memset(order->lane->used + order->instances[i].unit, false, order->count * sizeof *order->lane->used);
    }
    free(order->batches);
    free(order->flags);
    free(order->times);
    free(order);
}

bool cuda_order_room(struct mlak_device *device, struct mlak_order *order)
{
    if (order->flying < order->made)
        return true;
    /* A new instance belongs at the end of the ring. */
    return order->made < INSTANCES && order->first == 0 && cuda_enter(device, NULL) == MLAK_OK &&
           add_instance(device, order, NULL) == MLAK_OK;
}

enum mlak_code cuda_order_launch(struct mlak_device *device, struct mlak_order *order, uint32_t round,
                                 struct mlak_fault *fault)
{
    struct mlak_lane *lane = order->lane;
    enum mlak_code code = cuda_enter(device, fault);
    if (code != MLAK_OK)
        return code;
    struct instance *instance = &order->instances[(order->first + order->flying) % order->made];
    for (uint32_t i = 0; i < order->count; i++) /* of an earlier round, or of none: not this one */
        __atomic_store_n(&results_of(device, lane, instance->unit + i)->ended, round - 1, __ATOMIC_RELEASE);
    TRY(set_words_async, lane->words + (size_t)instance->unit * UNIT_WORDS * 4, round, 1, lane->room.stream);
    TRY(graph_launch, instance->exec, lane->room.stream);
    instance->round = round;
    order->flying++;
    if (lane->in_flight++ == 0) {
        lane->life_at = now_ns();
        __atomic_fetch_add(&device->waiting, 1, __ATOMIC_RELAXED);
    }
    return MLAK_OK;
}

/* Does the lane still live? Gates give up in time, and kernels end. */
static enum mlak_code check_life(struct mlak_device *device, struct mlak_lane *lane, struct mlak_fault *fault)
{
    uint64_t life = __atomic_load_n(&device->ordered->lives[lane->number], __ATOMIC_RELAXED);
    int64_t now = now_ns();
    if (life != lane->life_seen) {
        lane->life_seen = life;
        lane->life_at = now;
    }
    CUresult state = device->cu->stream_query(lane->room.stream);
    if (state != CUDA_SUCCESS && state != CUDA_ERROR_NOT_READY)
        return cuda_lose(device, "cuStreamQuery", state, fault);
    if (now - lane->life_at > (lane->wait_ms + HANG_SECONDS * INT64_C(1000)) * 1000000)
        return cuda_lose(device, "a launch in stream order shows no sign of life", CUDA_ERROR_LAUNCH_TIMEOUT, fault);
    return MLAK_OK;
}

/* What one layer adds to the outcome. */
static void tell(struct mlak_order *order, uint32_t layer, const struct mlak_cuda_order_result *result,
                 struct mlak_order_outcome *outcome)
{
    const struct mlak_batch *batch = &order->batches[layer];
    struct mlak_fault fault = {0};
    outcome->stopped |= result->outcome == MLAK_ORDER_STOPPED;
    if (result->outcome != MLAK_ORDER_RAN)
        return;
    order->times[outcome->n_times++] = (struct mlak_layer_time){result->gate_ns, result->serve_ns};
    outcome->kv_tokens += result->kv_tokens;
    outcome->failed += result->batch_code ? batch->batch : result->failed;
    if (result->batch_code) {
        mlak_cu_q_fault(result->batch_index, result->batch_value, result->batch_before, batch->q_rows, &fault);
    } else if (result->failed) {
        struct mlak_row row = {.request = result->first,
                               .code = result->code,
                               .detail = {result->detail[0], result->detail[1]},
                               .page_size = batch->page_size,
                               .pages = batch->pages,
                               .max_pages = batch->max_pages,
                               .dcp_world = batch->dcp_world};
        mlak_row_fault(&row, &fault);
    } else {
        return;
    }
    if (outcome->code != MLAK_OK)
        return;
    outcome->code = result->batch_code ? MLAK_BATCH : MLAK_REQUESTS;
    char field[sizeof fault.field];
    snprintf(field, sizeof field, "layers[%u].%.48s", layer, fault.field);
    mlak_fail(&outcome->fault, outcome->code, field, "%s", fault.message);
}

enum mlak_code cuda_order_poll(struct mlak_device *device, struct mlak_order *order, bool *ended,
                               struct mlak_order_outcome *outcome, struct mlak_fault *fault)
{
    struct mlak_lane *lane = order->lane;
    *ended = false;
    if (order->flying == 0)
        return MLAK_OK;
    const struct instance *instance = &order->instances[order->first];
    const struct mlak_cuda_order_result *results = results_of(device, lane, instance->unit);
    if (__atomic_load_n(&results[order->count - 1].ended, __ATOMIC_ACQUIRE) != instance->round) {
        enum mlak_code code = cuda_enter(device, fault);
        return code == MLAK_OK ? check_life(device, lane, fault) : code;
    }
    *ended = true;
    *outcome = (struct mlak_order_outcome){.round = instance->round, .code = MLAK_OK, .times = order->times};
    for (uint32_t i = 0; i < order->count; i++)
        tell(order, i, &results[i], outcome);
    order->first = (order->first + 1) % order->made;
    order->flying--;
    if (--lane->in_flight == 0)
        __atomic_fetch_sub(&device->waiting, 1, __ATOMIC_RELAXED);
    lane->life_at = now_ns();
    return MLAK_OK;
}
