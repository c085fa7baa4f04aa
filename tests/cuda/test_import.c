/* test_import.c - memory that really is another process's, on the fake driver: a child allocates and
 * exports, this process imports. */
#include "fake/fake_cuda.h"
#include "mlak.h"

#include <dlfcn.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#define GPU "GPU-fa4e0000-0000-4000-8000-000000000000"
#define PEER "GPU-fa4e0000-0000-4000-8000-000000000001"
enum { BYTES = 2 << 20, MARK = 0x1234567 };

static const struct mlak_backend *backend;
static struct mlak_device *device;
static char control[] = "/tmp/mlad-fake-XXXXXX";
static pid_t child;
static struct {
    uint8_t handle[64], peer_handle[64];
    int fd, peer_fd;
} exported;

/* Another size each time: the file is read again when it changes. */
static void inject(const char *words)
{
    static int times;
    FILE *file = fopen(control, "w");
    assert_non_null(file);
    fprintf(file, "devices=2 %s%*s\n", words, ++times, "");
    fclose(file);
}

#define DRIVER(name, ...)                                                                                              \
    int (*name)(__VA_ARGS__);                                                                                          \
    *(void **)(void *)&name = dlsym(dlopen("libcuda.so.1", RTLD_NOW), #name);                                          \
    if (!name)                                                                                                         \
    abort()
#define MUST(call)                                                                                                     \
    do {                                                                                                               \
        if ((call) != 0)                                                                                               \
            abort();                                                                                                   \
    } while (0)

/* ---- the other process ---- */

static void export_of(int ordinal, uint8_t handle[64], int *fd)
{
    DRIVER(cuInit, unsigned);
    DRIVER(cuDevicePrimaryCtxRetain, CUcontext *, int);
    DRIVER(cuCtxSetCurrent, CUcontext);
    DRIVER(cuMemAlloc_v2, CUdeviceptr *, size_t);
    DRIVER(cuIpcGetMemHandle, void *, CUdeviceptr);
    DRIVER(cuMemCreate, CUhandle *, size_t, const CUmemAllocationProp *, unsigned long long);
    DRIVER(cuMemExportToShareableHandle, void *, CUhandle, int, unsigned long long);
    const CUmemAllocationProp properties = {.type = 1, .handles = 1, .location = {.type = 1, .id = ordinal}};
    CUcontext context;
    CUdeviceptr pointer;
    CUhandle object;
    MUST(cuInit(0));
    MUST(cuDevicePrimaryCtxRetain(&context, ordinal));
    MUST(cuCtxSetCurrent(context));
    MUST(cuMemAlloc_v2(&pointer, BYTES));
    *(volatile int *)(uintptr_t)pointer = MARK; /* the fake's device memory is a processor's too */
    MUST(cuIpcGetMemHandle(handle, pointer));
    MUST(cuMemCreate(&object, BYTES, &properties, 0));
    MUST(cuMemExportToShareableHandle(fd, object, 1, 0));
}

union descriptors {
    char room[CMSG_SPACE(2 * sizeof(int))];
    struct cmsghdr align;
};

static void be_the_other_process(int socket)
{
    union descriptors space = {{0}};
    export_of(0, exported.handle, &exported.fd);
    export_of(1, exported.peer_handle, &exported.peer_fd);
    struct iovec data = {&exported, sizeof exported};
    struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1, .msg_control = &space, .msg_controllen = sizeof space};
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(2 * sizeof(int));
    memcpy(CMSG_DATA(header), (int[]){exported.fd, exported.peer_fd}, 2 * sizeof(int));
    if (sendmsg(socket, &message, 0) < 0)
        abort();
    for (;;)
        pause();
}

static int start(void **state)
{
    (void)state;
    int sockets[2];
    union descriptors space;
    struct iovec data = {&exported, sizeof exported};
    struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1, .msg_control = &space, .msg_controllen = sizeof space};
    inject("");
    MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, sockets));
    if ((child = fork()) == 0)
        be_the_other_process(sockets[0]);
    close(sockets[0]);
    if (recvmsg(sockets[1], &message, MSG_WAITALL) != (ssize_t)sizeof exported)
        return -1;
    memcpy(&exported.fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof(int));
    memcpy(&exported.peer_fd, CMSG_DATA(CMSG_FIRSTHDR(&message)) + sizeof(int), sizeof(int));
    close(sockets[1]);
    device = backend->open(&(struct mlak_options){.device = GPU}, NULL);
    return device ? 0 : -1;
}

static int stop(void **state)
{
    (void)state;
    inject("");
    backend->close(device);
    kill(child, SIGKILL);
    return waitpid(child, NULL, 0) == child ? 0 : -1;
}

/* ---- this one ---- */

static struct mlak_memory by_ipc(bool peer)
{
    struct mlak_memory memory = {.kind = MLAK_MEMORY_CUDA_IPC, .bytes = BYTES, .writable = true};
    memcpy(memory.handle, peer ? exported.peer_handle : exported.handle, 64);
    strcpy(memory.gpu, peer ? PEER : GPU);
    return memory;
}

static struct mlak_memory by_vmm(bool peer)
{
    struct mlak_memory memory = {.kind = MLAK_MEMORY_CUDA_VMM, .bytes = BYTES, .allocation = BYTES, .writable = true};
    memory.fd = peer ? exported.peer_fd : exported.fd;
    strcpy(memory.gpu, peer ? PEER : GPU);
    return memory;
}

static void import(struct mlak_memory memory, struct mlak_mapping *mapping)
{
    struct mlak_fault fault = {0};
    if (backend->import(device, &memory, mapping, &fault) != MLAK_OK)
        fail_msg("%s: %s", fault.field, fault.message);
}

static void refuse(struct mlak_memory memory, enum mlak_code code, const char *field, const char *word)
{
    struct mlak_fault fault = {0};
    struct mlak_mapping mapping;
    assert_int_equal(backend->import(device, &memory, &mapping, &fault), code);
    assert_string_equal(fault.field, field);
    if (!strstr(fault.message, word))
        fail_msg("no \"%s\" in: %s", word, fault.message);
}

static void another_process_memory_is_the_same_memory(void **state)
{
    (void)state;
    struct mlak_mapping ipc, one, two;
    import(by_ipc(false), &ipc);
    assert_int_equal(*(volatile int *)ipc.pointer, MARK);
    backend->release(device, &ipc);
    import(by_vmm(false), &one);
    import(by_vmm(false), &two);
    *(volatile int *)one.pointer = 42;
    assert_int_equal(*(volatile int *)two.pointer, 42);
    assert_true(one.local && !one.host);
    backend->release(device, &one);
    assert_int_equal(*(volatile int *)two.pointer, 42);
    backend->release(device, &two);
}

/* A descriptor of a peer's memory is only refused here: the fake driver does not know where such memory lies. */
static void memory_of_a_peer_is_not_local(void **state)
{
    (void)state;
    struct mlak_mapping mapping;
    import(by_ipc(true), &mapping);
    assert_false(mapping.local);
    backend->release(device, &mapping);
    inject("peer=0");
    refuse(by_ipc(true), MLAK_UNSUPPORTED, "gpu", "cannot access");
    refuse(by_vmm(true), MLAK_UNSUPPORTED, "gpu", "cannot access");
    inject("");
}

static void a_buffer_lies_inside_its_allocation(void **state)
{
    (void)state;
    struct mlak_memory memory = by_vmm(false);
    memory.offset = 1;
    refuse(memory, MLAK_INVALID, "bytes", "pass the end");
    memory = by_vmm(false);
    memory.allocation = 2 * BYTES; /* more than there is: the driver knows */
    memory.bytes = 2 * BYTES;
    refuse(memory, MLAK_INVALID, "allocation", "cuMemMap");
    memory = by_vmm(false);
    strcpy(memory.gpu, PEER);
    refuse(memory, MLAK_INVALID, "gpu", "does not lie on");
}

static void each_call_of_an_import_may_fail(void **state)
{
    (void)state;
    static const struct {
        bool vmm;
        const char *call;
    } calls[] = {{false, "cuIpcOpenMemHandle"},
                 {false, "cuMemGetAddressRange"},
                 {false, "cuPointerGetAttribute"},
                 {true, "cuMemImportFromShareableHandle"},
                 {true, "cuMemGetAllocationPropertiesFromHandle"},
                 {true, "cuMemAddressReserve"},
                 {true, "cuMemMap"},
                 {true, "cuMemSetAccess"}};
    for (unsigned i = 0; i < sizeof calls / sizeof calls[0]; i++) {
        char words[96];
        struct mlak_fault fault = {0};
        struct mlak_mapping mapping;
        struct mlak_memory memory = calls[i].vmm ? by_vmm(false) : by_ipc(false);
        snprintf(words, sizeof words, "fail=%s:1", calls[i].call);
        inject(words);
        assert_int_equal(backend->import(device, &memory, &mapping, &fault), MLAK_INVALID);
        if (!strstr(fault.message, calls[i].call))
            fail_msg("%s: %s", calls[i].call, fault.message);
        inject("");
        import(memory, &mapping); /* and then it works */
        backend->release(device, &mapping);
    }
}

int main(void)
{
    close(mkstemp(control));
    setenv("MLAD_FAKE_CUDA_CONTROL", control, 1);
    backend = mlak_backend(GPU);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(another_process_memory_is_the_same_memory),
        cmocka_unit_test(memory_of_a_peer_is_not_local),
        cmocka_unit_test(a_buffer_lies_inside_its_allocation),
        cmocka_unit_test(each_call_of_an_import_may_fail),
    };
    int failures = cmocka_run_group_tests(tests, start, stop);
    unlink(control);
    return failures != 0;
}
