/* fake_cuda.h - a libcuda.so.1 for tests: device memory is shared host memory, kernels are emulated. The ABI is CUDA
 * 13's, declared here so that no toolkit is needed.
 *
 * Environment: MLAD_FAKE_CUDA_DIR      folder for device memory as files; without it memfds, reached through /proc
 *              MLAD_FAKE_CUDA_TRACE    file to append "pid function result" to, one line a call, and before that of a
 *                                      kernel "pid launch kernel grid", and "silent" if its job is that
 *              MLAD_FAKE_CUDA_CONTROL  file of the words below, read again when its mtime or size changes
 *              MLAD_FAKE_CUDA          the same words, separated by blanks, read once
 * Words (blank or newline between them; codes default to 999, CUDA_ERROR_UNKNOWN):
 *     fail=FUNCTION:N[:CODE]  the N-th call from now fails, 0: every call; _v2 of the name is left out
 *     sticky=N[:CODE]         the N-th launch from now, and all that follows in its process, fails (default 700)
 *     hang=N                  the N-th launch from now does not complete until the word is gone
 *                             (of a graph each kernel is a launch whenever the graph is launched, none when captured)
 *     slow=MS                 each launch takes so much longer
 *     devices=K               1..8, default 1      peer=0|1           default 1
 *     no_driver_device=1      cuInit: no device    cc=MAJOR.MINOR     default 9.0
 *     smem=BYTES              opt-in shared memory
 *     processors=N            1..132, default 4
 *     memory=BYTES            of each device, counted per process; default 1 GiB
 *     own_ipc=1               a process may open its own IPC handle
 *     mps=0|1                 what the driver says of MPS; default 0 */
#ifndef FAKE_CUDA_H
#define FAKE_CUDA_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef int CUresult, CUdevice;
typedef unsigned long long CUdeviceptr, CUhandle;
typedef struct fake_context *CUcontext;
typedef struct fake_stream *CUstream;
typedef struct fake_event *CUevent;
typedef struct fake_module *CUmodule;
typedef struct fake_function *CUfunction;
typedef struct fake_graph *CUgraph, *CUgraphExec;
typedef struct { char bytes[16]; } CUuuid;
typedef struct { char reserved[64]; } CUipcMemHandle;
typedef struct { int type, id; } CUmemLocation;
typedef struct { CUmemLocation location; int flags; } CUmemAccessDesc;
typedef struct {
    int type, handles;
    CUmemLocation location;
    void *win32;
    struct { unsigned char compression, rdma; unsigned short usage; unsigned char reserved[4]; } flags;
} CUmemAllocationProp;
_Static_assert(sizeof(CUmemAllocationProp) == 32, "ABI of cuda.h");
struct fake_config { /* CUlaunchConfig */
    unsigned grid[3], block[3], shared;
    CUstream stream;
    const void *attributes;
    unsigned count;
};

enum { /* the results in use, numbers of cuda.h */
    FAKE_OK = 0, FAKE_INVALID_VALUE = 1, FAKE_OUT_OF_MEMORY = 2, FAKE_NOT_INITIALIZED = 3, FAKE_NO_DEVICE = 100,
    FAKE_INVALID_DEVICE = 101, FAKE_INVALID_CONTEXT = 201, FAKE_MAP_FAILED = 205, FAKE_PEER_UNSUPPORTED = 217,
    FAKE_INVALID_HANDLE = 400, FAKE_ILLEGAL_STATE = 401, FAKE_NOT_FOUND = 500, FAKE_NOT_READY = 600,
    FAKE_ILLEGAL_ADDRESS = 700, FAKE_PEER_ENABLED = 704, FAKE_ALREADY_REGISTERED = 712, FAKE_NOT_REGISTERED = 713,
    FAKE_LAUNCH_FAILED = 719, FAKE_NOT_SUPPORTED = 801, FAKE_CAPTURE_UNSUPPORTED = 900,
    FAKE_CAPTURE_INVALIDATED = 901, FAKE_CAPTURE_WRONG_THREAD = 908, FAKE_UNKNOWN = 999, FAKE_DEVICES = 8
};
enum { FAKE_CAPTURE_GLOBAL, FAKE_CAPTURE_THREAD_LOCAL, FAKE_CAPTURE_RELAXED };

struct fake_context { int device; unsigned refs; };
struct fake_settings {
    int devices, peer, no_device, major, minor, smem, processors, own_ipc, mps;
    unsigned slow;
    size_t memory;
};

struct fake_settings fake_settings(void);
CUresult fake_enter(const char *function);          /* an injected failure, the sticky error, or FAKE_OK */
CUresult fake_leave(const char *function, CUresult result);
void fake_note(const char *line);                   /* into the trace */
int fake_next_launch(bool *hang);                   /* counts a launch: the sticky code it ends with, or 0 */
bool fake_hanging(void);                            /* the word hang is still there */
void fake_set_sticky(int code);
int fake_sticky(void);
bool fake_capturing(void);                          /* a capture forbids this thread what is unsafe; now invalid */
int fake_current_device(void);                      /* -1: no current context */
CUcontext fake_context_of(int device);              /* the primary one */
CUresult fake_stream_settle(CUstream stream);       /* all queued has run */
CUresult fake_sync_all(void);
int fake_owner_device(CUdeviceptr pointer);

/* An exported function: injection before the body, a trace line after it. */
#define API(name, params, args) \
    static CUresult do_##name params; \
    CUresult name params; \
    __attribute__((visibility("default"))) CUresult name params \
    { \
        CUresult result = fake_enter(#name); \
        if (result == FAKE_OK) result = do_##name args; \
        return fake_leave(#name, result); \
    } \
    static CUresult do_##name params

#endif
