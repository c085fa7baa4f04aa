/* test_device.c - see test_device.h. One device a process, opened by main. */
#include "test_device.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static const struct mlak_backend *backend;
static struct mlak_device *device;

void test_device_open(int argc, char **argv)
{
    struct mlak_options options = {
        .threads = 2, .device = argc > 1 ? argv[1] : NULL, .variant = argc > 2 ? argv[2] : NULL};
    struct mlak_fault fault = {0};
    backend = argc > 1 ? test_backend(argv[1]) : NULL;
    if (!backend) {
        fprintf(stderr, "usage: %s backend [variant]; this build has no such backend\n", argv[0]);
        exit(2);
    }
    device = backend->open(&options, &fault);
    if (device)
        return;
    fprintf(stderr, "%s: %s\n", fault.field, fault.message);
    exit(fault.code == MLAK_UNSUPPORTED ? 77 : 1);
}

void test_device_close(void) { backend->close(device); }

bool test_device_exact(void) { return strcmp(backend->name, "reference") == 0; }

/* An fp64 backend is off by rounding ties only. Others have the contract's bar. */
struct oracle_bar test_device_bar(enum mlak_dtype q_dtype)
{
    if (test_device_exact())
        return (struct oracle_bar){.margin_db = 0.01, .lse = 1e-7};
    return q_dtype == MLAK_E4M3 ? (struct oracle_bar){.margin_db = 2, .lse = 1e-3}
                                : (struct oracle_bar){.margin_db = 1, .lse = 2e-5};
}

bool test_device_takes_rows(void) { return backend->launch != NULL; }

enum mlak_code test_device_launch(struct mlak_row *rows, uint32_t count)
{
    return backend->launch(device, rows, count);
}

enum mlak_code test_device_check(const struct mlak_batch *batch, struct mlak_fault *fault)
{
    size_t count;
    const struct mlak_capability *capabilities = backend->capabilities(device, &count);
    return mlak_check(batch, capabilities, count, fault);
}

/* ---- a device with memory of its own: its copy of a batch ---- */

static const void **pointer_of(struct mlak_batch *batch, enum mlak_tensor tensor)
{
    switch (tensor) {
    case MLAK_T_Q: return &batch->q;
    case MLAK_T_KV: return &batch->kv;
    case MLAK_T_BLOCK_TABLE: return (const void **)&batch->block_table;
    case MLAK_T_SEQLENS: return (const void **)&batch->seqlens;
    case MLAK_T_CU_Q: return (const void **)&batch->cu_q;
    case MLAK_T_TREE_MASK: return (const void **)&batch->tree_mask;
    case MLAK_T_SINK: return (const void **)&batch->sink;
    case MLAK_T_Q_SCALE: return (const void **)&batch->q_scale.tensor;
    case MLAK_T_K_SCALE: return (const void **)&batch->k_scale.tensor;
    case MLAK_T_V_SCALE: return (const void **)&batch->v_scale.tensor;
    case MLAK_T_OUT: return (const void **)&batch->out;
    default: return (const void **)&batch->lse;
    }
}

static void must_copy(void *to, const void *from, size_t bytes)
{
    if (backend->memory_copy(device, to, from, bytes) != MLAK_OK)
        fail_msg("%s", backend->lost(device));
}

struct copy {
    struct mlak_batch batch;
    void *at[MLAK_T_COUNT];
};

static struct copy copy_new(struct made *made)
{
    struct copy copy = {.batch = made->batch};
    struct mlak_fault fault;
    for (int i = 0; i < MLAK_T_COUNT; i++) {
        const void **pointer = pointer_of(&copy.batch, (enum mlak_tensor)i);
        if (*pointer == NULL || made->tensor[i].bytes == 0)
            continue;
        copy.at[i] = backend->memory_new(device, made->tensor[i].bytes, &fault);
        if (copy.at[i] == NULL)
            fail_msg("%s: %s", fault.field, fault.message);
        *pointer = copy.at[i];
    }
    return copy;
}

static void copy_fill(const struct copy *copy, const struct made *made)
{
    for (int i = 0; i < MLAK_T_COUNT; i++)
        if (copy->at[i] != NULL)
            must_copy(copy->at[i], made->tensor[i].data, made->tensor[i].bytes);
}

static void copy_read(const struct copy *copy, struct made *made)
{
    for (int i = 0; i < MLAK_T_COUNT; i++)
        if (copy->at[i] != NULL)
            must_copy(made->tensor[i].data, copy->at[i], made->tensor[i].bytes);
}

static void copy_free(struct copy *copy)
{
    for (int i = 0; i < MLAK_T_COUNT; i++)
        if (copy->at[i] != NULL)
            backend->memory_free(device, copy->at[i]);
}

static enum mlak_code launch_copy(struct made *made, struct mlak_row *rows, struct mlak_fault *fault)
{
    struct copy copy = copy_new(made);
    copy_fill(&copy, made);
    enum mlak_code code = mlak_launch_batch(backend, device, &copy.batch, 0, copy.batch.batch, rows, fault);
    copy_read(&copy, made);
    copy_free(&copy);
    return code;
}

static void wipe_outputs(struct made *made)
{
    memset(made->tensor[MLAK_T_OUT].data, 0xff, made->tensor[MLAK_T_OUT].bytes);
    memset(made->tensor[MLAK_T_LSE].data, 0xff, made->tensor[MLAK_T_LSE].bytes);
}

enum mlak_code test_device_decode(struct made *made, struct mlak_row *rows, struct mlak_fault *fault)
{
    wipe_outputs(made);
    *fault = (struct mlak_fault){0};
    if (test_device_check(&made->batch, fault) != MLAK_OK)
        fail_msg("%s: %s", fault->field, fault->message);
    if (!test_device_takes_rows()) {
        memset(rows, 0, made->batch.batch * sizeof *rows);
        return backend->memory_new ? launch_copy(made, rows, fault)
                                   : mlak_launch_batch(backend, device, &made->batch, 0, made->batch.batch, rows,
                                                       fault);
    }
    int32_t *cu_q = malloc((made->batch.batch + UINT64_C(1)) * sizeof *cu_q);
    enum mlak_code code = mlak_prepare(&made->batch, cu_q, 0, made->batch.batch, rows, fault);
    free(cu_q);
    return code ? code : test_device_launch(rows, made->batch.batch);
}

void test_device_run(struct made *made, struct mlak_row *rows)
{
    struct mlak_fault fault;
    assert_int_equal(test_device_decode(made, rows, &fault), MLAK_OK);
    assert_true(made_intact(made));
}

/* Of a device that prepares batches: as parts, whose memory is the device's where it has its own. */
static void launch_parts(const struct copy *copies, uint32_t count, struct mlak_row *const *rows,
                         enum mlak_code *codes)
{
    struct mlak_part *parts = calloc(count, sizeof *parts);
    struct mlak_fault fault;
    for (uint32_t i = 0; i < count; i++)
        parts[i] = (struct mlak_part){.batch = &copies[i].batch, .count = copies[i].batch.batch, .rows = rows[i]};
    assert_int_equal(backend->launch_batches(device, 0, parts, count, false, &fault), MLAK_OK);
    for (uint32_t i = 0; i < count; i++)
        codes[i] = parts[i].code;
    free(parts);
}

/* Of one that takes rows: of all that can be prepared, one behind the other. */
static void launch_rows(struct made *const *made, uint32_t count, struct mlak_row *const *rows, enum mlak_code *codes)
{
    uint32_t all = 0, at = 0;
    struct mlak_fault fault;
    for (uint32_t i = 0; i < count; i++)
        all += made[i]->batch.batch;
    struct mlak_row *table = calloc(all, sizeof *table);
    for (uint32_t i = 0; i < count; i++) {
        uint32_t n = made[i]->batch.batch;
        int32_t *cu_q = malloc((n + UINT64_C(1)) * sizeof *cu_q);
        bool unwanted = rows[i][0].code == MLAK_ROW_CANCELLED;
        codes[i] = mlak_prepare(&made[i]->batch, cu_q, 0, n, table + at, &fault);
        for (uint32_t b = 0; b < n && unwanted; b++)
            table[at + b].code = MLAK_ROW_CANCELLED;
        at += codes[i] == MLAK_OK ? n : 0;
        free(cu_q);
    }
    assert_int_equal(backend->launch(device, table, at), MLAK_OK);
    at = 0;
    for (uint32_t i = 0; i < count; at += codes[i] == MLAK_OK ? made[i]->batch.batch : 0, i++)
        if (codes[i] == MLAK_OK)
            memcpy(rows[i], table + at, made[i]->batch.batch * sizeof *table);
    free(table);
}

/* Outputs, to the device or from it. */
static void copy_outputs(const struct copy *copy, const struct made *made, bool to)
{
    static const enum mlak_tensor outputs[] = {MLAK_T_OUT, MLAK_T_LSE};
    for (unsigned i = 0; i < 2; i++) {
        void *at = copy->at[outputs[i]], *own = made->tensor[outputs[i]].data;
        if (at)
            must_copy(to ? at : own, to ? own : at, made->tensor[outputs[i]].bytes);
    }
}

void test_device_decode_again(struct made *const *made, uint32_t count, struct mlak_row *const *rows,
                              enum mlak_code *codes, unsigned times, void (*after)(void *context, unsigned time),
                              void *context)
{
    struct copy *copies = calloc(count, sizeof *copies);
    for (uint32_t i = 0; i < count; i++) {
        struct mlak_fault fault;
        if (test_device_check(&made[i]->batch, &fault) != MLAK_OK)
            fail_msg("%s: %s", fault.field, fault.message);
        copies[i].batch = made[i]->batch;
        wipe_outputs(made[i]);
        if (backend->memory_new) {
            copies[i] = copy_new(made[i]);
            copy_fill(&copies[i], made[i]);
        }
    }
    for (unsigned time = 0; time < times; time++) {
        for (uint32_t i = 0; i < count && time > 0; i++) {
            wipe_outputs(made[i]);
            copy_outputs(&copies[i], made[i], true);
        }
        if (test_device_takes_rows())
            launch_rows(made, count, rows, codes);
        else
            launch_parts(copies, count, rows, codes);
        for (uint32_t i = 0; i < count; i++)
            copy_outputs(&copies[i], made[i], false);
        if (after && time + 1 < times)
            after(context, time);
    }
    for (uint32_t i = 0; i < count; i++) {
        copy_read(&copies[i], made[i]);
        copy_free(&copies[i]);
    }
    free(copies);
    if (after)
        after(context, times - 1);
}

void test_device_decode_together(struct made *const *made, uint32_t count, struct mlak_row *const *rows,
                                 enum mlak_code *codes)
{
    test_device_decode_again(made, count, rows, codes, 1, NULL, NULL);
}

void test_device_decode_step(struct made *const *made, uint32_t count, struct mlak_row *rows)
{
    static const enum mlak_tensor read_once[] = {MLAK_T_SEQLENS, MLAK_T_CU_Q, MLAK_T_TREE_MASK};
    struct copy first = copy_new(made[0]);
    copy_fill(&first, made[0]);
    for (uint32_t i = 0; i < count; i++) {
        struct copy own = copy_new(made[i]);
        struct mlak_fault fault;
        wipe_outputs(made[i]);
        copy_fill(&own, made[i]);
        struct mlak_batch batch = own.batch;
        batch.block_table = first.batch.block_table;
        batch.seqlens = first.batch.seqlens;
        batch.cu_q = first.batch.cu_q;
        batch.tree_mask = first.batch.tree_mask;
        memset(rows, 0, batch.batch * sizeof *rows);
        struct mlak_part part = {.batch = &batch, .count = batch.batch, .rows = rows};
        assert_int_equal(backend->launch_batches(device, 0, &part, 1, i > 0, &fault), MLAK_OK);
        assert_int_equal(part.code, MLAK_OK);
        for (uint32_t b = 0; b < batch.batch; b++)
            assert_int_equal(rows[b].code, MLAK_ROW_OK);
        copy_read(&own, made[i]);
        copy_free(&own);
        for (unsigned t = 0; t < sizeof read_once / sizeof read_once[0]; t++) {
            size_t bytes = made[0]->tensor[read_once[t]].bytes;
            void *wrong = malloc(bytes + 1);
            memset(wrong, 0xff, bytes);
            if (first.at[read_once[t]])
                must_copy(first.at[read_once[t]], wrong, bytes);
            free(wrong);
        }
    }
    copy_free(&first);
}

void test_device_judge(struct made *made, const struct mlak_row *rows, uint32_t failed, const char *what)
{
    char why[256];
    for (uint32_t b = 0; b < made->batch.batch; b++) {
        if (rows && rows[b].code) {
            struct mlak_fault fault;
            mlak_row_fault(&rows[b], &fault);
            if (failed-- == 0)
                fail_msg("%s: %s: %s", what, fault.field, fault.message);
            continue;
        }
        struct oracle *oracle = oracle_new(made, b, !test_device_exact());
        bool holds = oracle_holds(oracle, test_device_bar(made->batch.q_dtype), why);
        oracle_free(oracle);
        if (!holds)
            fail_msg("%s: %s", what, why);
    }
    assert_int_equal(failed, 0);
    if (!made_intact(made))
        fail_msg("%s: written outside the outputs", what);
}

void test_device_assert_right(struct made *made, uint32_t failed, const char *what)
{
    struct mlak_row *rows = calloc(made->batch.batch, sizeof *rows);
    struct mlak_fault fault;
    assert_int_equal(test_device_decode(made, rows, &fault), MLAK_OK);
    test_device_judge(made, rows, failed, what);
    free(rows);
}

/* ---- graphs ---- */

struct test_graph {
    struct mlak_graph *graph;
    uint32_t count;
    struct copy copies[]; /* [count] */
};

bool test_device_captures(void) { return backend->graph_new != NULL; }

struct test_graph *test_graph_new(struct made *const *made, uint32_t count)
{
    struct test_graph *graph = calloc(1, sizeof *graph + count * sizeof graph->copies[0]);
    struct mlak_batch *batches = calloc(count, sizeof *batches);
    struct mlak_fault fault;
    graph->count = count;
    for (uint32_t i = 0; i < count; i++) {
        if (test_device_check(&made[i]->batch, &fault) != MLAK_OK)
            fail_msg("%s: %s", fault.field, fault.message);
        graph->copies[i] = copy_new(made[i]);
        batches[i] = graph->copies[i].batch;
    }
    graph->graph = backend->graph_new(device, batches, count, &fault);
    if (!graph->graph)
        fail_msg("%s: %s", fault.field, fault.message);
    free(batches);
    return graph;
}

enum mlak_code test_graph_replay(struct test_graph *graph, struct made *const *made, struct mlak_row *rows,
                                 struct mlak_fault *fault)
{
    for (uint32_t i = 0; i < graph->count; i++) {
        wipe_outputs(made[i]);
        copy_fill(&graph->copies[i], made[i]);
    }
    *fault = (struct mlak_fault){0};
    memset(rows, 0, made[graph->count - 1]->batch.batch * sizeof *rows);
    enum mlak_code code = backend->graph_replay(device, graph->graph, rows, fault);
    for (uint32_t i = 0; i < graph->count; i++)
        copy_read(&graph->copies[i], made[i]);
    return code;
}

void test_graph_free(struct test_graph *graph)
{
    backend->graph_free(device, graph->graph);
    for (uint32_t i = 0; i < graph->count; i++)
        copy_free(&graph->copies[i]);
    free(graph);
}
