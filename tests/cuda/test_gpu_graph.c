/* test_gpu_graph.c - graphs of the cuda backend over the fake driver: what is refused, what fails, what is timed.
 * `test_gpu_graph [lost]`: the last of them loses the device, and is run alone. What replays compute is judged by
 * tests/kernels/test_graph.c, which runs on the same device. */
#include "gpu_fixture.h"

#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

static void assert_all_is_given_back(void)
{
    static const char *const pairs[][2] = {{"cuStreamCreate", "cuStreamDestroy_v2"},
                                           {"cuStreamEndCapture", "cuGraphDestroy"},
                                           {"cuGraphInstantiateWithFlags", "cuGraphExecDestroy"},
                                           {"cuEventCreate", "cuEventDestroy_v2"}};
    for (unsigned i = 0; i < sizeof pairs / sizeof pairs[0]; i++)
        assert_int_equal(succeeded(pairs[i][0]), succeeded(pairs[i][1]));
}

static void assert_plain_launch_is_right(struct mlak_device *device, struct made *made)
{
    struct mlak_row rows[2] = {0};
    struct mlak_fault fault = {0};
    inject("");
    memset(made->tensor[MLAK_T_OUT].data, 0xff, made->tensor[MLAK_T_OUT].bytes);
    if (mlak_launch_batch(backend, device, &made->batch, 0, 2, rows, &fault) != MLAK_OK)
        fail_msg("%s", fault.message);
    assert_outputs_are_right(made);
}

static void assert_replay_is_right(struct mlak_device *device, struct mlak_graph *graph, struct made *made)
{
    struct mlak_row rows[2] = {0};
    struct mlak_fault fault = {0};
    memset(made->tensor[MLAK_T_OUT].data, 0xff, made->tensor[MLAK_T_OUT].bytes);
    if (backend->graph_replay(device, graph, rows, &fault) != MLAK_OK)
        fail_msg("%s", fault.message);
    assert_int_equal(rows[0].local_len, made_seqlens(made)[0]);
    assert_outputs_are_right(made);
}

static void assert_names(enum mlak_code code, const struct mlak_fault *fault, const char *function)
{
    assert_int_equal(code, MLAK_MEMORY);
    if (!strstr(fault->message, function) || !strstr(fault->message, "999"))
        fail_msg("no %s in: %s", function, fault->message);
}

static void a_capture_that_fails_is_only_that(void **state)
{
    (void)state;
    static const struct { const char *function; int n; } fails[] = {
        {"cuStreamCreate", 1}, {"cuStreamBeginCapture", 1}, {"cuLaunchKernelEx", 1},     {"cuLaunchKernelEx", 2},
        {"cuLaunchKernelEx", 6}, {"cuStreamEndCapture", 1},   {"cuGraphInstantiateWithFlags", 1},
    };
    struct mlak_row rows[2];
    struct made *made = plain(rows);
    const struct mlak_batch batches[2] = {made->batch, made->batch};
    inject("");
    struct mlak_device *device = open_device(NULL);
    for (unsigned i = 0; i < sizeof fails / sizeof fails[0]; i++) {
        char words[64];
        struct mlak_fault fault = {0};
        snprintf(words, sizeof words, "fail=%s:%d", fails[i].function, fails[i].n);
        inject(words);
        assert_null(backend->graph_new(device, batches, 2, &fault));
        assert_names(fault.code, &fault, fails[i].function);
        assert_plain_launch_is_right(device, made);
        struct mlak_graph *graph = backend->graph_new(device, batches, 2, &fault);
        assert_non_null(graph);
        assert_replay_is_right(device, graph, made);
        backend->graph_free(device, graph);
    }
    backend->close(device);
    assert_all_is_given_back();
    made_free(made);
}

static void only_the_last_of_a_graph_is_told_to_the_host(void **state)
{
    (void)state;
    const char *const combine = "mlak_cuda_combine 8", *const silent = "mlak_cuda_combine 8 silent";
    struct mlak_row rows[2];
    struct made *made = plain(rows);
    const struct mlak_batch batches[3] = {made->batch, made->batch, made->batch};
    struct mlak_fault fault = {0};
    inject("");
    unsigned told = launched(combine), not_told = launched(silent);
    struct mlak_device *device = open_device(NULL);
    struct mlak_graph *graph = backend->graph_new(device, batches, 3, &fault);
    assert_non_null(graph);
    assert_int_equal(launched(combine), told + 1);
    assert_int_equal(launched(silent), not_told + 2);
    assert_replay_is_right(device, graph, made);
    backend->graph_free(device, graph);
    backend->close(device);
    made_free(made);
}

static void capturing_runs_nothing(void **state)
{
    (void)state;
    struct mlak_row rows[2];
    struct made *made = plain(rows);
    struct mlak_fault fault = {0};
    inject("sticky=1"); /* the first kernel to run would be the last */
    struct mlak_device *device = open_device(NULL);
    struct mlak_graph *graph = backend->graph_new(device, &made->batch, 1, &fault);
    assert_non_null(graph);
    inject("");
    for (int i = 0; i < 3; i++)
        assert_replay_is_right(device, graph, made);
    backend->graph_free(device, graph);
    backend->close(device);
    made_free(made);
}

static void a_replay_that_is_refused_is_only_that(void **state)
{
    (void)state;
    struct mlak_row rows[2];
    struct made *made = plain(rows);
    struct mlak_fault fault = {0};
    inject("");
    struct mlak_device *device = open_device(NULL);
    struct mlak_graph *graph = backend->graph_new(device, &made->batch, 1, &fault);
    assert_non_null(graph);
    inject("fail=cuGraphLaunch:1");
    assert_names(backend->graph_replay(device, graph, rows, &fault), &fault, "cuGraphLaunch");
    assert_plain_launch_is_right(device, made);
    assert_replay_is_right(device, graph, made);
    backend->graph_free(device, graph);
    backend->close(device);
    assert_all_is_given_back();
    made_free(made);
}

static void what_cannot_be_captured_is_refused_by_name(void **state)
{
    (void)state;
    struct mlak_row rows[2];
    struct made *made = plain(rows);
    struct mlak_fault fault = {0};
    double ns;
    inject("");
    struct mlak_device *device = open_device(NULL);
    struct mlak_batch batches[2] = {made->batch, made->batch};
    assert_null(backend->graph_new(device, batches, 0, &fault));
    assert_int_equal(fault.code, MLAK_INVALID);
    assert_string_equal(fault.field, "count");
    batches[1].batch = 1025;
    assert_null(backend->graph_new(device, batches, 2, &fault));
    assert_int_equal(fault.code, MLAK_UNSUPPORTED);
    assert_string_equal(fault.field, "batch");
    assert_non_null(strstr(fault.message, "batch 1 of the graph has 1025 requests"));
    batches[1].batch = 17; /* of a device with the least scratch */
    batches[1].deterministic = true;
    batches[1].q_rows = 17;
    batches[1].max_pages = 1 << 16; /* long enough to be split as often as may be */
    assert_null(backend->graph_new(device, batches, 2, &fault));
    assert_non_null(strstr(fault.message, "takes 16 of a deterministic batch"));
    assert_int_equal(backend->time_batches(device, batches, 2, false, 1, &ns, &fault), MLAK_UNSUPPORTED);
    assert_int_equal(backend->time_batches(device, batches, 1, false, 0, &ns, &fault), MLAK_INVALID);
    assert_string_equal(fault.field, "rounds");
    backend->close(device);
    made_free(made);
}

static void times_are_those_of_replays(void **state)
{
    (void)state;
    struct mlak_row rows[2];
    struct made *made = plain(rows);
    const struct mlak_batch batches[2] = {made->batch, made->batch};
    struct mlak_fault fault = {0};
    double ns = 0;
    inject("slow=2"); /* ms a kernel: 2 batches of 3 take 12, three times, and once before */
    struct mlak_device *device = open_device(NULL);
    unsigned kernels = succeeded("cuLaunchKernelEx"), graphs = succeeded("cuGraphLaunch");
    assert_int_equal(backend->time_batches(device, batches, 2, false, 3, &ns, &fault), MLAK_OK);
    assert_int_equal(succeeded("cuLaunchKernelEx"), kernels + 6);
    assert_int_equal(succeeded("cuGraphLaunch"), graphs + 4);
    assert_true(ns >= 36e6);
    assert_outputs_are_right(made);
    kernels = succeeded("cuLaunchKernelEx"); /* of a step's layers: two for each, and three before */
    assert_int_equal(backend->time_batches(device, batches, 2, true, 3, &ns, &fault), MLAK_OK);
    assert_int_equal(succeeded("cuLaunchKernelEx"), kernels + 7);
    assert_true(ns >= 24e6);
    assert_outputs_are_right(made);
    struct mlak_batch other[2] = {made->batch, made->batch};
    other[1].window = 3;
    assert_int_equal(backend->time_batches(device, other, 2, true, 3, &ns, &fault), MLAK_INVALID);
    assert_string_equal(fault.field, "layers");
    static const struct { const char *function; int n; } fails[] = {
        {"cuEventCreate", 1}, {"cuEventCreate", 2}, {"cuGraphLaunch", 1},     {"cuEventRecord", 1},
        {"cuGraphLaunch", 3}, {"cuEventRecord", 2}, {"cuEventElapsedTime", 1}, {"cuLaunchKernelEx", 5},
    };
    for (unsigned i = 0; i < sizeof fails / sizeof fails[0]; i++) {
        char words[64];
        snprintf(words, sizeof words, "fail=%s:%d", fails[i].function, fails[i].n);
        inject(words);
        assert_names(backend->time_batches(device, batches, 2, false, 3, &ns, &fault), &fault, fails[i].function);
        assert_plain_launch_is_right(device, made);
    }
    backend->close(device);
    assert_all_is_given_back();
    made_free(made);
}

static void refused_timing_leaves_nothing_running(void **state)
{
    (void)state;
    struct mlak_row rows[2];
    struct made *made = plain(rows);
    struct mlak_fault fault = {0};
    pthread_t thread;
    double ns;
    int over = 0;
    inject("");
    struct mlak_device *device = open_device(NULL);
    inject("hang=1 fail=cuEventRecord:2");
    assert_int_equal(pthread_create(&thread, NULL, unhang_soon, &over), 0);
    assert_names(backend->time_batches(device, &made->batch, 1, false, 2, &ns, &fault), &fault, "cuEventRecord");
    assert_int_equal(__atomic_load_n(&over, __ATOMIC_ACQUIRE), 1);
    pthread_join(thread, NULL);
    backend->close(device);
    made_free(made);
}

static void assert_lost(struct mlak_device *device, struct made *made, struct mlak_graph *graph)
{
    struct mlak_row rows[2] = {0};
    struct mlak_fault fault = {0};
    double ns;
    assert_non_null(strstr(backend->lost(device), "700"));
    assert_int_equal(mlak_launch_batch(backend, device, &made->batch, 0, 2, rows, &fault), MLAK_LOST);
    assert_non_null(strstr(fault.message, "700"));
    assert_int_equal(backend->graph_replay(device, graph, rows, &fault), MLAK_LOST);
    assert_null(backend->graph_new(device, &made->batch, 1, &fault));
    assert_int_equal(fault.code, MLAK_LOST);
    assert_int_equal(backend->time_batches(device, &made->batch, 1, false, 1, &ns, &fault), MLAK_LOST);
}

static void a_sticky_error_loses_the_device(void **state)
{
    (void)state;
    struct mlak_row rows[2];
    struct made *made = plain(rows);
    struct mlak_fault fault = {0};
    inject("");
    struct mlak_device *device = open_device(NULL);
    struct mlak_graph *graph = backend->graph_new(device, &made->batch, 1, &fault);
    assert_non_null(graph);
    assert_replay_is_right(device, graph, made); /* its completion word must not stand for the next one */
    memset(rows, 0, sizeof rows);
    inject("sticky=3");
    assert_int_equal(backend->graph_replay(device, graph, rows, &fault), MLAK_LOST);
    assert_lost(device, made, graph);
    backend->graph_free(device, graph);
    backend->close(device);
    made_free(made);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(only_the_last_of_a_graph_is_told_to_the_host),
        cmocka_unit_test(capturing_runs_nothing),
        cmocka_unit_test(a_capture_that_fails_is_only_that),
        cmocka_unit_test(a_replay_that_is_refused_is_only_that),
        cmocka_unit_test(what_cannot_be_captured_is_refused_by_name),
        cmocka_unit_test(times_are_those_of_replays),
        cmocka_unit_test(refused_timing_leaves_nothing_running),
    };
    const struct CMUnitTest last[] = {cmocka_unit_test(a_sticky_error_loses_the_device)};
    gpu_fixture_begin("");
    int failures = argc > 1 && strcmp(argv[1], "lost") == 0 ? cmocka_run_group_tests(last, NULL, NULL)
                                                            : cmocka_run_group_tests(tests, NULL, NULL);
    gpu_fixture_end();
    return failures != 0;
}
