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

static enum mlak_code launch_copy(struct made *made, struct mlak_row *rows, struct mlak_fault *fault)
{
    struct mlak_batch batch = made->batch;
    void *copies[MLAK_T_COUNT] = {NULL};
    for (int i = 0; i < MLAK_T_COUNT; i++) {
        const void **pointer = pointer_of(&batch, (enum mlak_tensor)i);
        if (*pointer == NULL || made->tensor[i].bytes == 0)
            continue;
        copies[i] = backend->memory_new(device, made->tensor[i].bytes, fault);
        if (copies[i] == NULL)
            fail_msg("%s: %s", fault->field, fault->message);
        must_copy(copies[i], made->tensor[i].data, made->tensor[i].bytes);
        *pointer = copies[i];
    }
    enum mlak_code code = backend->launch_batch(device, &batch, 0, batch.batch, rows, fault);
    for (int i = 0; i < MLAK_T_COUNT; i++) {
        if (copies[i] == NULL)
            continue;
        must_copy(made->tensor[i].data, copies[i], made->tensor[i].bytes);
        backend->memory_free(device, copies[i]);
    }
    return code;
}

enum mlak_code test_device_decode(struct made *made, struct mlak_row *rows, struct mlak_fault *fault)
{
    memset(made->tensor[MLAK_T_OUT].data, 0xff, made->tensor[MLAK_T_OUT].bytes);
    memset(made->tensor[MLAK_T_LSE].data, 0xff, made->tensor[MLAK_T_LSE].bytes);
    *fault = (struct mlak_fault){0};
    if (test_device_check(&made->batch, fault) != MLAK_OK)
        fail_msg("%s: %s", fault->field, fault->message);
    if (!test_device_takes_rows()) {
        memset(rows, 0, made->batch.batch * sizeof *rows);
        return backend->memory_new ? launch_copy(made, rows, fault)
                                   : backend->launch_batch(device, &made->batch, 0, made->batch.batch, rows, fault);
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

void test_device_assert_right(struct made *made, uint32_t failed, const char *what)
{
    struct mlak_row *rows = calloc(made->batch.batch, sizeof *rows);
    struct mlak_fault fault;
    char why[256];
    assert_int_equal(test_device_decode(made, rows, &fault), MLAK_OK);
    for (uint32_t b = 0; b < made->batch.batch; b++) {
        if (rows[b].code) {
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
    free(rows);
}
