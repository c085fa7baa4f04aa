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

enum mlak_code test_device_decode(struct made *made, struct mlak_row *rows, struct mlak_fault *fault)
{
    memset(made->tensor[MLAK_T_OUT].data, 0xff, made->tensor[MLAK_T_OUT].bytes);
    memset(made->tensor[MLAK_T_LSE].data, 0xff, made->tensor[MLAK_T_LSE].bytes);
    *fault = (struct mlak_fault){0};
    if (test_device_check(&made->batch, fault) != MLAK_OK)
        fail_msg("%s: %s", fault->field, fault->message);
    if (!test_device_takes_rows())
        return backend->launch_batch(device, &made->batch, 0, made->batch.batch,
                                     memset(rows, 0, made->batch.batch * sizeof *rows), fault);
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
