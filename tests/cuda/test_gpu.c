/* test_gpu.c - the host side of the cuda backend over the fake driver: memory of other processes, and what goes wrong
 * on a GPU. Results are judged by tests/kernels' programs, which run on the same device. */
#include "gpu_fixture.h"

#include <dlfcn.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cmocka.h>

#define OTHER_GPU "GPU-fa4e0000-0000-4000-8000-000000000001"

/* The driver's function, as a client of it has it. */
#define DRIVER(name, ...)                                                                                              \
    int (*name)(__VA_ARGS__);                                                                                          \
    *(void **)(void *)&name = dlsym(dlopen("libcuda.so.1", RTLD_NOW), #name);                                          \
    assert_non_null(name)

static size_t free_bytes(void)
{
    size_t left, all;
    DRIVER(cuMemGetInfo_v2, size_t *, size_t *);
    assert_int_equal(cuMemGetInfo_v2(&left, &all), 0);
    return left;
}

/* ---- memory ---- */

struct exported {
    uint64_t pointer;
    struct mlak_memory memory;
};

static struct exported export(size_t bytes)
{
    struct exported e = {.memory = {.kind = MLAK_MEMORY_CUDA_IPC, .gpu = GPU, .bytes = bytes, .writable = true}};
    DRIVER(cuMemAlloc_v2, uint64_t *, size_t);
    DRIVER(cuIpcGetMemHandle, void *, uint64_t);
    assert_int_equal(cuMemAlloc_v2(&e.pointer, bytes), 0);
    assert_int_equal(cuIpcGetMemHandle(e.memory.handle, e.pointer), 0);
    return e;
}

static void unexport(struct exported *e)
{
    DRIVER(cuMemFree_v2, uint64_t);
    assert_int_equal(cuMemFree_v2(e->pointer), 0);
}

static void an_allocation_is_opened_once(void **state)
{
    (void)state;
    inject("own_ipc=1");
    struct mlak_device *device = open_device(NULL);
    struct exported e = export(1 << 20);
    struct mlak_fault fault;
    struct mlak_mapping whole, part;
    assert_int_equal(backend->import(device, &e.memory, &whole, &fault), MLAK_OK);
    e.memory.offset = 4096;
    e.memory.bytes = 100;
    assert_int_equal(backend->import(device, &e.memory, &part, &fault), MLAK_OK);
    assert_ptr_equal(part.pointer, (uint8_t *)whole.pointer + 4096);
    assert_memory_equal(part.identity, whole.identity, sizeof part.identity);
    assert_true(whole.local && !whole.host && part.first == 4096);
    *(volatile uint32_t *)part.pointer = 42; /* the same memory, and still there once the other buffer has gone */
    backend->release(device, &whole);
    assert_int_equal(*(volatile uint32_t *)part.pointer, 42);
    backend->release(device, &part);
    unexport(&e);
    backend->close(device);
}

static void refuse(struct mlak_device *device, struct mlak_memory memory, const char *field, const char *word)
{
    struct mlak_fault fault = {0};
    struct mlak_mapping mapping;
    assert_int_not_equal(backend->import(device, &memory, &mapping, &fault), MLAK_OK);
    assert_string_equal(fault.field, field);
    if (!strstr(fault.message, word))
        fail_msg("no \"%s\" in: %s", word, fault.message);
}

static void unusable_memory_is_refused_by_name(void **state)
{
    (void)state;
    inject("own_ipc=1 devices=2 peer=0");
    struct mlak_device *device = open_device(NULL);
    struct exported e = export(1 << 16);
    struct mlak_memory bad = e.memory;
    bad.offset = 1;
    bad.bytes = 1 << 16;
    refuse(device, bad, "bytes", "pass the end of the allocation");
    bad = e.memory;
    bad.offset = UINT64_MAX - 10;
    refuse(device, bad, "bytes", "pass the end of the allocation");
    bad = e.memory;
    strcpy(bad.gpu, OTHER_GPU);
    refuse(device, bad, "gpu", "cannot access");
    strcpy(bad.gpu, "GPU-nonsense");
    refuse(device, bad, "gpu", "sees no GPU");
    bad = e.memory;
    memset(bad.handle, 0x5a, sizeof bad.handle);
    refuse(device, bad, "handle", "cuIpcOpenMemHandle");
    bad = (struct mlak_memory){.kind = MLAK_MEMORY_CUDA_VMM, .fds = (int[]){0}, .n_fds = 1, .gpu = GPU,
                               .allocation = 1 << 21, .bytes = 1};
    refuse(device, bad, "fd", "cuMemImportFromShareableHandle");
    inject("own_ipc=1 devices=2 peer=1");
    bad = e.memory;
    strcpy(bad.gpu, OTHER_GPU);
    struct mlak_mapping mapping; /* where a handle's memory lies is the client's word, which it may not change */
    assert_int_equal(backend->import(device, &bad, &mapping, NULL), MLAK_OK);
    assert_false(mapping.local);
    backend->release(device, &mapping);
    assert_int_equal(backend->import(device, &e.memory, &mapping, NULL), MLAK_OK);
    assert_true(mapping.local);
    refuse(device, bad, "gpu", "was registered before");
    bad.offset = 1;
    strcpy(bad.gpu, GPU);
    assert_int_equal(backend->import(device, &bad, &(struct mlak_mapping){0}, NULL), MLAK_INVALID);
    backend->release(device, &mapping);
    unexport(&e);
    backend->close(device);
}

static void host_memory_is_registered(void **state)
{
    (void)state;
    inject("");
    struct mlak_device *device = open_device(NULL);
    void *page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    struct mlak_memory memory = {.kind = MLAK_MEMORY_HOST, .host = page, .bytes = 4096, .writable = true};
    struct mlak_mapping mapping;
    struct mlak_fault fault;
    assert_int_equal(backend->import(device, &memory, &mapping, &fault), MLAK_OK);
    assert_true(mapping.host && !mapping.local);
    backend->release(device, &mapping);
    inject("fail=cuMemHostRegister:1");
    refuse(device, memory, "host", "cuMemHostRegister");
    munmap(page, 4096);
    backend->close(device);
}

/* ---- what goes wrong ---- */

static void each_call_that_fails_is_named(void **state)
{
    (void)state;
    static const char *const calls[] = {
        "cuDeviceGetCount", "cuDevicePrimaryCtxRetain", "cuModuleLoadData", "cuModuleGetFunction", "cuFuncSetAttribute",
        "cuMemAlloc",       "cuMemHostAlloc",           "cuStreamCreate"};
    inject("");
    backend->close(open_device(NULL)); /* what the driver keeps for itself is taken now */
    size_t before = free_bytes();
    for (unsigned i = 0; i < sizeof calls / sizeof calls[0]; i++) {
        char words[64];
        struct mlak_fault fault = {0};
        snprintf(words, sizeof words, "fail=%s:1", calls[i]);
        inject(words);
        assert_null(backend->open(&(struct mlak_options){.device = GPU}, &fault));
        if (!strstr(fault.message, "999"))
            fail_msg("%s: %s", calls[i], fault.message);
        inject("");
        assert_int_equal(free_bytes(), before);
    }
}

static void a_refused_launch_is_only_that(void **state)
{
    (void)state;
    struct mlak_row rows[2];
    struct made *made = plain(rows);
    struct mlak_fault fault = {0};
    inject("");
    struct mlak_device *device = open_device(NULL);
    for (int n = 1; n <= 3; n++) {
        char words[64];
        snprintf(words, sizeof words, "fail=cuLaunchKernelEx:%d:701", n);
        inject(words);
        assert_int_equal(mlak_launch_batch(backend, device, &made->batch, 0, 2, rows, &fault), MLAK_MEMORY);
        inject("");
        assert_int_equal(mlak_launch_batch(backend, device, &made->batch, 0, 2, rows, &fault), MLAK_OK);
        assert_int_equal(rows[0].local_len, 100);
        memset(rows, 0, sizeof rows);
    }
    backend->close(device);
    made_free(made);
}

struct cancel {
    struct mlak_row *row;
};
static void *cancel_soon(void *context)
{
    struct cancel *cancel = context;
    usleep(50000);
    __atomic_store_n(&cancel->row->code, MLAK_ROW_CANCELLED, __ATOMIC_RELAXED);
    usleep(50000);
    inject(""); /* the launch goes on, and sees that nobody wants it */
    return NULL;
}

static void a_launch_that_hangs_shows_no_progress_and_can_be_cancelled(void **state)
{
    (void)state;
    uint64_t progress = 0;
    struct mlak_row rows[2];
    struct made *made = plain(rows);
    struct mlak_fault fault = {0};
    pthread_t thread;
    inject("");
    struct mlak_device *device = open_device(&progress);
    assert_int_equal(mlak_launch_batch(backend, device, &made->batch, 0, 2, rows, &fault), MLAK_OK);
    uint64_t before = progress;
    assert_true(before > 0);
    inject("hang=1");
    memset(rows, 0, sizeof rows);
    memset(made->tensor[MLAK_T_OUT].data, 0xff, made->tensor[MLAK_T_OUT].bytes);
    assert_int_equal(pthread_create(&thread, NULL, cancel_soon, &(struct cancel){&rows[0]}), 0);
    assert_int_equal(mlak_launch_batch(backend, device, &made->batch, 0, 2, rows, &fault), MLAK_OK);
    pthread_join(thread, NULL);
    assert_int_equal(rows[0].code, MLAK_ROW_CANCELLED);
    assert_int_equal(progress, before); /* not an item of it ran */
    for (size_t i = 0; i < made->tensor[MLAK_T_OUT].bytes; i++)
        assert_int_equal(made->tensor[MLAK_T_OUT].data[i], 0xff);
    backend->close(device);
    made_free(made);
}

static void a_part_can_be_cancelled_and_the_other_is_right(void **state)
{
    (void)state;
    struct mlak_row rows[2][2];
    struct made *made[2] = {plain(rows[0]), plain(rows[1])};
    struct mlak_fault fault = {0};
    pthread_t thread;
    inject("");
    struct mlak_device *device = open_device(NULL);
    inject("hang=1");
    struct mlak_part parts[2];
    for (unsigned i = 0; i < 2; i++) {
        memset(made[i]->tensor[MLAK_T_OUT].data, 0xff, made[i]->tensor[MLAK_T_OUT].bytes);
        parts[i] = (struct mlak_part){.batch = &made[i]->batch, .count = 2, .rows = rows[i]};
    }
    assert_int_equal(pthread_create(&thread, NULL, cancel_soon, &(struct cancel){&rows[0][0]}), 0);
    assert_int_equal(backend->launch_batches(device, 0, parts, 2, false, &fault), MLAK_OK);
    pthread_join(thread, NULL);
    assert_int_equal(rows[0][0].code, MLAK_ROW_CANCELLED);
    for (size_t i = 0; i < made[0]->tensor[MLAK_T_OUT].bytes; i++)
        assert_int_equal(made[0]->tensor[MLAK_T_OUT].data[i], 0xff);
    assert_int_equal(parts[1].code, MLAK_OK);
    assert_int_equal(rows[1][0].code, MLAK_ROW_OK);
    assert_outputs_are_right(made[1]);
    backend->close(device);
    made_free(made[0]);
    made_free(made[1]);
}

static void a_refused_launch_leaves_nothing_running(void **state)
{
    (void)state;
    struct mlak_row rows[2];
    struct made *made = plain(rows);
    struct mlak_fault fault = {0};
    pthread_t thread;
    int over = 0;
    inject("");
    struct mlak_device *device = open_device(NULL);
    inject("hang=1 fail=cuLaunchKernelEx:3:701"); /* prepare hangs, split waits for it, combine is refused */
    assert_int_equal(pthread_create(&thread, NULL, unhang_soon, &over), 0);
    assert_int_equal(mlak_launch_batch(backend, device, &made->batch, 0, 2, rows, &fault), MLAK_MEMORY);
    assert_int_equal(__atomic_load_n(&over, __ATOMIC_ACQUIRE), 1);
    pthread_join(thread, NULL);
    assert_int_equal(mlak_launch_batch(backend, device, &made->batch, 0, 2, rows, &fault), MLAK_OK);
    backend->close(device);
    made_free(made);
}

/* ---- two launches at once ---- */

/* One that has a thread of its own. */
struct launch {
    struct mlak_device *device;
    uint32_t which;
    struct mlak_row rows[2];
    struct made *made;
    struct mlak_part part;
    enum mlak_code code;
    int over; /* by __atomic_* */
    pthread_t thread;
};

static void *launch_there(void *context)
{
    struct launch *launch = context;
    struct mlak_fault fault;
    launch->code = backend->launch_batches(launch->device, launch->which, &launch->part, 1, false, &fault);
    __atomic_store_n(&launch->over, 1, __ATOMIC_RELEASE);
    return NULL;
}

static bool is_over(struct launch *launch)
{
    return __atomic_load_n(&launch->over, __ATOMIC_ACQUIRE);
}

/* As launch `which`, of a plain batch; its kernels are with the driver on return. */
static void begin_launch(struct launch *launch, struct mlak_device *device, uint32_t which)
{
    const unsigned before = succeeded("cuLaunchKernelEx");
    *launch = (struct launch){.device = device, .which = which, .made = plain(launch->rows)};
    launch->part = (struct mlak_part){.batch = &launch->made->batch, .count = 2, .rows = launch->rows};
    memset(launch->made->tensor[MLAK_T_OUT].data, 0xff, launch->made->tensor[MLAK_T_OUT].bytes);
    assert_int_equal(pthread_create(&launch->thread, NULL, launch_there, launch), 0);
    while (succeeded("cuLaunchKernelEx") < before + 3)
        usleep(1000);
}

static void end_launch(struct launch *launch, enum mlak_code code)
{
    pthread_join(launch->thread, NULL);
    assert_int_equal(launch->code, code);
    if (code == MLAK_OK && launch->rows[0].code == MLAK_ROW_OK) {
        assert_int_equal(launch->part.code, MLAK_OK);
        assert_int_equal(launch->rows[0].local_len, 100);
        assert_outputs_are_right(launch->made);
    }
    made_free(launch->made);
}

static void a_launch_goes_past_one_that_hangs_and_does_not_hide_it(void **state)
{
    (void)state;
    uint64_t progress = 0;
    struct launch hung, other;
    inject("");
    struct mlak_device *device = open_device(&progress);
    assert_true(backend->launches >= 2);
    inject("hang=1");
    begin_launch(&hung, device, 1);
    for (unsigned i = 0; i < 3; i++) {
        begin_launch(&other, device, 0);
        end_launch(&other, MLAK_OK);
    }
    assert_false(is_over(&hung));
    assert_int_equal(__atomic_load_n(&progress, __ATOMIC_RELAXED), 0); /* or a watchdog would wait for ever */
    inject("");
    end_launch(&hung, MLAK_OK);
    assert_true(progress > 0);
    progress = 0;
    begin_launch(&other, device, 0);
    end_launch(&other, MLAK_OK);
    assert_true(progress > 0);
    backend->close(device);
}

static void a_launch_can_be_cancelled_beside_another(void **state)
{
    (void)state;
    struct launch launches[2];
    for (unsigned gone = 0; gone < 2; gone++) {
        inject("");
        struct mlak_device *device = open_device(NULL);
        inject("slow=100"); /* neither has begun when the word comes */
        for (unsigned i = 0; i < 2; i++)
            begin_launch(&launches[i], device, i);
        for (unsigned row = 0; row < 2; row++)
            __atomic_store_n(&launches[gone].rows[row].code, MLAK_ROW_CANCELLED, __ATOMIC_RELAXED);
        pthread_join(launches[gone].thread, NULL);
        assert_int_equal(launches[gone].rows[0].code, MLAK_ROW_CANCELLED);
        const struct made *made = launches[gone].made;
        for (size_t i = 0; i < made->tensor[MLAK_T_OUT].bytes; i++)
            assert_int_equal(made->tensor[MLAK_T_OUT].data[i], 0xff);
        made_free(launches[gone].made);
        end_launch(&launches[!gone], MLAK_OK);
        assert_int_equal(launches[!gone].rows[0].code, MLAK_ROW_OK);
        backend->close(device);
    }
}

/* A device on which `launch` has begun, as its second, and whatever else `words` say goes wrong from then on. */
static struct mlak_device *open_beside(struct launch *launch, const char *words)
{
    inject("");
    struct mlak_device *device = open_device(NULL);
    inject(words);
    begin_launch(launch, device, 1);
    return device;
}

static void a_refused_launch_leaves_another_alone(void **state)
{
    (void)state;
    struct mlak_row rows[2];
    struct made *made = plain(rows);
    struct launch hung;
    struct mlak_fault fault = {0};
    struct mlak_device *device = open_beside(&hung, "hang=1 fail=cuLaunchKernelEx:6:701");
    assert_int_equal(mlak_launch_batch(backend, device, &made->batch, 0, 2, rows, &fault), MLAK_MEMORY);
    assert_false(is_over(&hung)); /* nor did the refused one wait for it */
    inject("");
    end_launch(&hung, MLAK_OK);
    backend->close(device);
    made_free(made);
}

/* The driver goes on, but has said something that no launch comes back from. */
static void a_device_that_one_launch_lost_is_lost_to_the_other(void **state)
{
    (void)state;
    struct launch launch;
    DRIVER(cuCtxSynchronize, void);
    struct mlak_device *device = open_beside(&launch, "hang=1 fail=cuStreamQuery:1:700");
    pthread_join(launch.thread, NULL);
    assert_int_equal(launch.code, MLAK_LOST);
    inject("");
    assert_int_equal(cuCtxSynchronize(), 0); /* it did run to its end */
    made_free(launch.made);
    struct mlak_row rows[2];
    struct made *made = plain(rows);
    struct mlak_fault fault = {0};
    assert_int_equal(mlak_launch_batch(backend, device, &made->batch, 0, 2, rows, &fault), MLAK_LOST);
    assert_string_equal(fault.message, backend->lost(device));
    backend->close(device);
    made_free(made);
}

/* Last: what is lost stays lost in this process. */
static void a_sticky_error_loses_the_device_and_all_that_runs(void **state)
{
    (void)state;
    struct mlak_row rows[2];
    struct made *made = plain(rows);
    struct launch hung;
    struct mlak_fault fault = {0};
    struct mlak_device *device = open_beside(&hung, "hang=1 sticky=5");
    assert_int_equal(mlak_launch_batch(backend, device, &made->batch, 0, 2, rows, &fault), MLAK_LOST);
    end_launch(&hung, MLAK_LOST);
    assert_non_null(strstr(backend->lost(device), "700"));
    for (uint32_t which = 0; which < 2; which++) {
        struct mlak_part part = {.batch = &made->batch, .count = 2, .rows = rows};
        assert_int_equal(backend->launch_batches(device, which, &part, 1, false, &fault), MLAK_LOST);
    }
    inject("");
    backend->close(device);
    made_free(made);
}

int main(void)
{
    gpu_fixture_begin("devices=2");
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(an_allocation_is_opened_once),
        cmocka_unit_test(unusable_memory_is_refused_by_name),
        cmocka_unit_test(host_memory_is_registered),
        cmocka_unit_test(each_call_that_fails_is_named),
        cmocka_unit_test(a_refused_launch_is_only_that),
        cmocka_unit_test(a_refused_launch_leaves_nothing_running),
        cmocka_unit_test(a_launch_that_hangs_shows_no_progress_and_can_be_cancelled),
        cmocka_unit_test(a_part_can_be_cancelled_and_the_other_is_right),
        cmocka_unit_test(a_launch_goes_past_one_that_hangs_and_does_not_hide_it),
        cmocka_unit_test(a_launch_can_be_cancelled_beside_another),
        cmocka_unit_test(a_refused_launch_leaves_another_alone),
        cmocka_unit_test(a_device_that_one_launch_lost_is_lost_to_the_other),
        cmocka_unit_test(a_sticky_error_loses_the_device_and_all_that_runs),
    };
    int failures = cmocka_run_group_tests(tests, NULL, NULL);
    gpu_fixture_end();
    return failures != 0;
}
