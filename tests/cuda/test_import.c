/* test_import.c - memory that really is another process's, on the fake driver: a child allocates and
 * exports, this process imports. */
#include "fake/fake_cuda.h"
#include "mlak.h"

#include <dirent.h>
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
    memory.fds = peer ? &exported.peer_fd : &exported.fd;
    memory.n_fds = 1;
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

static void memory_of_a_peer_is_not_local(void **state)
{
    (void)state;
    struct mlak_mapping mapping;
    import(by_ipc(true), &mapping);
    assert_false(mapping.local);
    backend->release(device, &mapping);
    import(by_vmm(true), &mapping);
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
    memory.fds = (int[]){exported.fd, exported.peer_fd}; /* the second one lies elsewhere */
    memory.n_fds = 2;
    refuse(memory, MLAK_INVALID, "gpu", "does not lie on");
    memory.fds = (int[]){exported.fd, STDIN_FILENO};
    refuse(memory, MLAK_INVALID, "fd", "cuMemImportFromShareableHandle");
    memory = by_vmm(false);
    strcpy(memory.gpu, PEER);
    refuse(memory, MLAK_INVALID, "gpu", "does not lie on");
}

static void allocations_are_mapped_end_to_end(void **state)
{
    (void)state;
    struct mlak_mapping twice, once;
    struct mlak_memory memory = by_vmm(false);
    memory.fds = (int[]){exported.fd, exported.fd}; /* the same one twice, which shows where each begins */
    memory.n_fds = 2;
    memory.offset = 4096;
    memory.bytes = 2 * BYTES - 4096;
    import(memory, &twice);
    import(by_vmm(false), &once);
    *(volatile int *)((uint8_t *)once.pointer + 8192) = 77;
    assert_int_equal(*(volatile int *)((uint8_t *)twice.pointer + 4096), 77);
    assert_int_equal(*(volatile int *)((uint8_t *)twice.pointer + 4096 + BYTES), 77);
    backend->release(device, &once);
    backend->release(device, &twice);
}

static void what_is_registered_read_only_is_mapped_so(void **state)
{
    (void)state;
    struct mlak_mapping mapping;
    struct mlak_memory memory = by_vmm(false);
    int status = 0;
    memory.writable = false;
    import(memory, &mapping);
    pid_t writer = fork();
    if (writer == 0) {
        signal(SIGSEGV, SIG_DFL);
        *(volatile int *)mapping.pointer = 1;
        _exit(0);
    }
    assert_int_equal(waitpid(writer, &status, 0), writer);
    assert_true(WIFSIGNALED(status) || WEXITSTATUS(status) != 0);
    backend->release(device, &mapping);
}

static unsigned open_descriptors(void)
{
    unsigned count = 0;
    DIR *folder = opendir("/proc/self/fd");
    assert_non_null(folder);
    while (readdir(folder))
        count++;
    closedir(folder);
    return count;
}

/* Device memory that this process has mapped or reserved: the fake driver's addresses begin with 7ea to 7ed. */
static unsigned mapped_ranges(void)
{
    unsigned count = 0;
    char line[512];
    FILE *maps = fopen("/proc/self/maps", "r");
    assert_non_null(maps);
    while (fgets(line, sizeof line, maps))
        count += strncmp(line, "7ea", 3) >= 0 && strncmp(line, "7ee", 3) < 0;
    fclose(maps);
    return count;
}

static void each_call_of_an_import_may_fail(void **state)
{
    (void)state;
    static const struct {
        bool vmm;
        const char *call;
        int n; /* which one */
    } calls[] = {{false, "cuIpcOpenMemHandle", 1},
                 {false, "cuMemGetAddressRange", 1},
                 {true, "cuMemImportFromShareableHandle", 1},
                 {true, "cuMemImportFromShareableHandle", 3},
                 {true, "cuMemGetAllocationPropertiesFromHandle", 2},
                 {true, "cuMemAddressReserve", 1},
                 {true, "cuMemMap", 1},
                 {true, "cuMemMap", 3},
                 {true, "cuMemSetAccess", 1}};
    unsigned before = open_descriptors(), maps = mapped_ranges();
    for (unsigned i = 0; i < sizeof calls / sizeof calls[0]; i++) {
        char words[96];
        struct mlak_fault fault = {0};
        struct mlak_mapping mapping;
        struct mlak_memory memory = calls[i].vmm ? by_vmm(false) : by_ipc(false);
        const int thrice[] = {exported.fd, exported.fd, exported.fd};
        if (calls[i].vmm) {
            memory.fds = thrice;
            memory.n_fds = 3;
        }
        snprintf(words, sizeof words, "fail=%s:%d", calls[i].call, calls[i].n);
        inject(words);
        assert_int_equal(backend->import(device, &memory, &mapping, &fault), MLAK_INVALID);
        if (!strstr(fault.message, calls[i].call))
            fail_msg("%s: %s", calls[i].call, fault.message);
        inject("");
        assert_int_equal(mapped_ranges(), maps); /* nothing stays mapped or reserved */
        import(memory, &mapping);                /* and then it works */
        backend->release(device, &mapping);
        assert_int_equal(open_descriptors(), before);
        assert_int_equal(mapped_ranges(), maps);
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
        cmocka_unit_test(allocations_are_mapped_end_to_end),
        cmocka_unit_test(what_is_registered_read_only_is_mapped_so),
        cmocka_unit_test(each_call_of_an_import_may_fail),
    };
    int failures = cmocka_run_group_tests(tests, start, stop);
    unlink(control);
    return failures != 0;
}
