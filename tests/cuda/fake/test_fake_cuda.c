/* test_fake_cuda.c - the fake driver itself. argv[1]: the library. */
#include "fake_cuda.h"

#include <dlfcn.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>
#include <cmocka.h>

/* The functions are called by name, whatever their types. */
#pragma GCC diagnostic ignored "-Wstrict-prototypes"
static const char *library;
static char control[] = "/tmp/fake_cuda_XXXXXX";

#define CU(name, ...) ((CUresult (*)())dlsym(lib, #name))(__VA_ARGS__)
static void *lib;
static void start(void)
{
    CUcontext c;
    lib = dlopen(library, RTLD_NOW);
    if (!lib || CU(cuInit, 0) || CU(cuDevicePrimaryCtxRetain, &c, 0) || CU(cuCtxSetCurrent, c)) _exit(99);
}
static void words(const char *text)
{
    FILE *f = fopen(control, "we");
    assert_non_null(f);
    fputs(text, f);
    fclose(f);
}

/* Forked before this process loads the library: the exporter ends while the memory is mapped here. */
static void test_share(void **state)
{
    int out[2], in[2];
    struct { CUipcMemHandle legacy; CUresult pool, own; } m;
    CUdeviceptr p, q;
    char text[8] = "";
    assert_int_equal(pipe(out) | pipe(in), 0);
    pid_t child = fork();
    if (!child) {
        start();
        CUipcMemHandle unused;
        if (CU(cuMemAlloc_v2, &p, (size_t)100000) || CU(cuMemcpyHtoD_v2, p, "hello", (size_t)6)) _exit(1);
        if (CU(cuMemAllocAsync, &q, (size_t)4096, NULL) || CU(cuIpcGetMemHandle, &m.legacy, p)) _exit(2);
        m.pool = CU(cuIpcGetMemHandle, &unused, q);
        CUresult (*open_handle)(CUdeviceptr *, CUipcMemHandle, unsigned) = dlsym(lib, "cuIpcOpenMemHandle_v2");
        m.own = open_handle(&q, m.legacy, 1);
        if (write(out[1], &m, sizeof m) != sizeof m || read(in[0], text, 1) != 1) _exit(3);
        _exit(((char *)p)[0] == 'J' ? 0 : 4);
    }
    assert_int_equal(read(out[0], &m, sizeof m), sizeof m);
    assert_int_equal(m.pool, FAKE_INVALID_VALUE);
    assert_int_equal(m.own, FAKE_INVALID_CONTEXT);
    start();
    CUresult (*open_handle)(CUdeviceptr *, CUipcMemHandle, unsigned) = dlsym(lib, "cuIpcOpenMemHandle_v2");
    assert_int_equal(open_handle(&p, m.legacy, 1), 0);
    assert_int_equal(open_handle(&q, m.legacy, 1), 0);
    assert_true(p == q);
    ((char *)p)[0] = 'J';
    assert_int_equal(write(in[1], "x", 1), 1);
    int status;
    waitpid(child, &status, 0);
    assert_int_equal(status, 0);
    assert_int_equal(CU(cuMemcpyDtoH_v2, text, p, (size_t)6), 0);
    assert_string_equal(text, "Jello");
    assert_int_equal(CU(cuIpcCloseMemHandle, p), 0);
    assert_int_equal(((char *)p)[1], 'e');
    assert_int_equal(CU(cuIpcCloseMemHandle, p), 0);
    assert_int_equal(CU(cuIpcCloseMemHandle, p), FAKE_INVALID_VALUE);
    (void)state;
}

static void test_vmm(void **state)
{
    size_t n = 2 << 20;
    CUmemAllocationProp prop = {.type = 1, .handles = 1, .location = {1, 0}};
    CUmemAccessDesc rw = {{1, 0}, 3}, ro = {{1, 0}, 1};
    CUdeviceptr a, b;
    CUhandle h, g;
    CUipcMemHandle legacy;
    int fd;
    assert_int_equal(CU(cuMemCreate, &h, n, &prop, 0ull), 0);
    assert_int_equal(CU(cuMemAddressReserve, &a, n, (size_t)0, 0ull, 0ull), 0);
    assert_int_equal(CU(cuMemAddressReserve, &b, n, (size_t)0, 0ull, 0ull), 0);
    assert_int_equal(CU(cuMemMap, a, n, (size_t)0, h, 0ull), 0);
    assert_int_equal(CU(cuMemSetAccess, a, n, &rw, (size_t)1), 0);
    assert_int_equal(CU(cuIpcGetMemHandle, &legacy, a), FAKE_INVALID_VALUE);
    assert_int_equal(CU(cuMemExportToShareableHandle, &fd, h, 1, 0ull), 0);
    assert_int_equal(CU(cuMemImportFromShareableHandle, &g, (void *)(intptr_t)fd, 1), 0);
    close(fd);
    assert_int_equal(CU(cuMemMap, b, n, (size_t)0, g, 0ull), 0);
    assert_int_equal(CU(cuMemSetAccess, b, n, &ro, (size_t)1), 0);
    *(int *)a = 42;
    assert_int_equal(*(int *)b, 42);
    pid_t child = fork();
    if (!child) signal(11, SIG_DFL), *(volatile int *)b = 1, _exit(0); /* read-only: dies */
    int status;
    waitpid(child, &status, 0);
    assert_int_not_equal(status, 0);
    assert_int_equal(CU(cuMemUnmap, b, n) | CU(cuMemUnmap, a, n) | CU(cuMemRelease, g) | CU(cuMemRelease, h), 0);
    assert_int_equal(CU(cuMemAddressFree, a, n) | CU(cuMemAddressFree, b, n), 0);
    (void)state;
}

static void nap(void *flag) { usleep(50000), *(int *)flag = 7; }
static void test_streams(void **state)
{
    CUstream s;
    CUevent e;
    CUdeviceptr p;
    int value = 0, back = 0;
    assert_int_equal(CU(cuStreamCreate, &s, 1) | CU(cuEventCreate, &e, 0) | CU(cuMemAlloc_v2, &p, (size_t)4), 0);
    assert_int_equal(CU(cuLaunchHostFunc, s, nap, &value), 0);
    assert_int_equal(CU(cuMemcpyHtoDAsync_v2, p, &value, (size_t)4, s), 0);
    assert_int_equal(CU(cuMemcpyDtoHAsync_v2, &back, p, (size_t)4, s) | CU(cuEventRecord, e, s), 0);
    assert_int_equal(CU(cuEventQuery, e), FAKE_NOT_READY);
    assert_int_equal(CU(cuEventSynchronize, e), 0);
    assert_int_equal(back, 7);
    assert_int_equal(CU(cuEventDestroy_v2, e) | CU(cuStreamDestroy_v2, s) | CU(cuMemFree_v2, p), 0);
    (void)state;
}

static void count_up(void *number) { ++*(int *)number; }
static void *end_elsewhere(void *stream)
{
    void *graph;
    return (void *)(intptr_t)CU(cuStreamEndCapture, (CUstream)stream, &graph);
}
static void test_graphs(void **state)
{
    CUstream s, other;
    CUgraph graph;
    CUgraphExec exec;
    CUdeviceptr p;
    pthread_t thread;
    void *elsewhere;
    int runs = 0, status = -1;
    assert_int_equal(CU(cuStreamCreate, &s, 1) | CU(cuStreamCreate, &other, 1) | CU(cuMemAlloc_v2, &p, (size_t)4), 0);
    assert_int_equal(CU(cuStreamEndCapture, s, &graph), FAKE_ILLEGAL_STATE);
    /* What is captured does not run; it does whenever the graph is launched, which outlives what it came from. */
    assert_int_equal(CU(cuStreamBeginCapture_v2, s, 1), 0);
    assert_int_equal(CU(cuStreamBeginCapture_v2, s, 1), FAKE_ILLEGAL_STATE);
    assert_int_equal(CU(cuStreamIsCapturing, s, &status) | (status != 1), 0);
    assert_int_equal(CU(cuLaunchHostFunc, s, count_up, &runs), 0);
    assert_int_equal(CU(cuMemcpyHtoDAsync_v2, p, &runs, (size_t)4, s) | CU(cuLaunchHostFunc, s, count_up, &runs), 0);
    assert_int_equal(CU(cuStreamQuery, other) | CU(cuStreamEndCapture, s, &graph), 0);
    assert_int_equal(CU(cuStreamIsCapturing, s, &status) | status | CU(cuStreamSynchronize, s) | runs, 0);
    assert_int_equal(CU(cuGraphInstantiateWithFlags, &exec, graph, 0ull) | CU(cuGraphDestroy, graph), 0);
    assert_int_equal(CU(cuGraphLaunch, exec, s) | CU(cuGraphLaunch, exec, s), 0);
    assert_int_equal(CU(cuGraphExecDestroy, exec) | CU(cuStreamSynchronize, s), 0);
    assert_int_equal(runs, 4);
    assert_int_equal(*(int *)p, 3); /* in order, of the second replay */
    /* A look at the stream, and what may wait for the device, end a capture; the stream is well after it. */
    for (int i = 0; i < 3; i++) {
        CUdeviceptr q;
        assert_int_equal(CU(cuStreamBeginCapture_v2, s, 1), 0);
        CUresult result = i == 0 ? CU(cuStreamQuery, s) : i == 1 ? CU(cuStreamSynchronize, s)
                                                                 : CU(cuMemAlloc_v2, &q, (size_t)4);
        assert_int_equal(result, FAKE_CAPTURE_UNSUPPORTED);
        assert_int_equal(CU(cuStreamIsCapturing, s, &status) | (status != 2), 0);
        assert_int_equal(CU(cuLaunchHostFunc, s, count_up, &runs), FAKE_CAPTURE_INVALIDATED);
        assert_int_equal(CU(cuStreamEndCapture, s, &graph), FAKE_CAPTURE_INVALIDATED);
        assert_null(graph);
        assert_int_equal(CU(cuStreamQuery, s), 0);
    }
    assert_int_equal(CU(cuStreamBeginCapture_v2, s, 1), 0);
    assert_int_equal(pthread_create(&thread, NULL, end_elsewhere, s) | pthread_join(thread, &elsewhere), 0);
    assert_int_equal((intptr_t)elsewhere, FAKE_CAPTURE_WRONG_THREAD);
    assert_int_equal(CU(cuStreamDestroy_v2, s) | CU(cuMemFree_v2, p) | CU(cuStreamDestroy_v2, other), 0);
    assert_int_equal(runs, 4);
    (void)state;
}

static void test_injection(void **state)
{
    CUdeviceptr p;
    CUstream s;
    CUmodule m;
    CUfunction f;
    static char job[4096];
    void *parameters[] = {job};
    words("fail=cuMemAlloc:2:2");
    assert_int_equal(CU(cuMemAlloc_v2, &p, (size_t)4), 0);
    assert_int_equal(CU(cuMemAlloc_v2, &p, (size_t)4), FAKE_OUT_OF_MEMORY);
    words("memory=1000 hang=1 sticky=1");
    assert_int_equal(CU(cuMemAlloc_v2, &p, (size_t)5000), FAKE_OUT_OF_MEMORY);
    assert_int_equal(CU(cuStreamCreate, &s, 1) | CU(cuModuleLoadData, &m, "x"), 0);
    assert_int_equal(CU(cuModuleGetFunction, &f, m, "other"), FAKE_NOT_FOUND);
    assert_int_equal(CU(cuModuleGetFunction, &f, m, "mlak_x"), 0);
    assert_int_equal(CU(cuLaunchKernel, f, 1, 1, 1, 32, 1, 1, 0, s, parameters, NULL), 0);
    usleep(20000);
    assert_int_equal(CU(cuStreamQuery, s), FAKE_NOT_READY);
    words("");
    assert_int_equal(CU(cuStreamSynchronize, s), FAKE_ILLEGAL_ADDRESS);
    assert_int_equal(CU(cuMemAlloc_v2, &p, (size_t)4), FAKE_ILLEGAL_ADDRESS);
    (void)state;
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_share), cmocka_unit_test(test_vmm),
                                       cmocka_unit_test(test_streams), cmocka_unit_test(test_graphs),
                                       cmocka_unit_test(test_injection)};
    if (argc < 2 || close(mkstemp(control)) != 0) return 2;
    library = argv[1];
    setenv("MLAD_FAKE_CUDA_CONTROL", control, 1);
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    unlink(control);
    return failed;
}
