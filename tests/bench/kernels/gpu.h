/* gpu.h - the GPU as mlad-kernel-compare uses it beside a backend: a stream of the primary context, CUDA graphs of
 * calls that are timed by events, an L2 flush, and the SM clock. All from one thread. */
#ifndef COMPARE_GPU_H
#define COMPARE_GPU_H

#include "cuda/cuda_driver.h"

/* Of the driver, in addition to mlak_driver: what every driver has, what graphs need, and what joins calls in one. */
#define GPU_STREAMS(D) \
    D(wait, cuStreamSynchronize, (CUstream)) \
    D(set_bytes, cuMemsetD8Async, (CUdeviceptr, unsigned char, size_t, CUstream))
#define GPU_GRAPHS(D) \
    D(capture, cuStreamBeginCapture_v2, (CUstream, CUstreamCaptureMode)) \
    D(capture_end, cuStreamEndCapture, (CUstream, CUgraph *)) \
    D(instantiate, cuGraphInstantiateWithFlags, (CUgraphExec *, CUgraph, unsigned long long)) \
    D(launch, cuGraphLaunch, (CUgraphExec, CUstream)) \
    D(graph_free, cuGraphDestroy, (CUgraph)) \
    D(exec_free, cuGraphExecDestroy, (CUgraphExec))
#define GPU_JOINS(D) \
    D(capture_info, cuStreamGetCaptureInfo_v3, \
      (CUstream, CUstreamCaptureStatus *, cuuint64_t *, CUgraph *, const CUgraphNode **, const CUgraphEdgeData **, \
       size_t *)) \
    D(capture_depend, cuStreamUpdateCaptureDependencies_v2, \
      (CUstream, CUgraphNode *, const CUgraphEdgeData *, size_t, unsigned)) \
    D(empty_node, cuGraphAddEmptyNode, (CUgraphNode *, CUgraph, const CUgraphNode *, size_t))

struct gpu {
    const struct mlak_driver *cu;
    struct { GPU_STREAMS(MLAK_DRIVER_MEMBER) } more;
    struct { GPU_GRAPHS(MLAK_DRIVER_MEMBER) } graphs;
    struct { GPU_JOINS(MLAK_DRIVER_MEMBER) } joins;
    bool has_graphs, has_joins; /* without graphs calls are launched one by one */
    CUdevice device;
    CUcontext context;
    CUstream stream;
    CUevent events[2];
    CUdeviceptr flushed; /* [flush_bytes] */
    uint64_t l2_bytes, flush_bytes;
    int processors, major, minor;
    char model[96];
    void *nvml, *nvml_device; /* NULL: no clock */
    int (*nvml_clock)(void *, unsigned, unsigned *);
};

/* Open the GPU of that UUID. `flush_bytes`: what a flush overwrites; 0: four times the L2. */
enum mlak_code gpu_open(struct gpu *gpu, const char *uuid, uint64_t flush_bytes, struct mlak_fault *fault);
void gpu_close(struct gpu *gpu);

/* Overwrite memory until nothing else is in the L2; done on return. */
enum mlak_code gpu_flush(struct gpu *gpu, struct mlak_fault *fault);
enum mlak_code gpu_wait(struct gpu *gpu, struct mlak_fault *fault);
unsigned gpu_sm_mhz(const struct gpu *gpu); /* 0: not known */
double gpu_now(void);                       /* nanoseconds of the host's clock */

/* Puts call `index` on the stream, or fills `fault` and returns its code. */
typedef enum mlak_code gpu_enqueue(void *self, uint32_t index, CUstream stream, struct mlak_fault *fault);

/* Calls that follow one another in a graph, joined by full edges whatever they do inside (has_joins). */
struct gpu_calls {
    struct gpu *gpu;
    gpu_enqueue *enqueue;
    void *self;
    uint32_t count, modulus; /* call i is index i % modulus */
    CUgraphExec exec;        /* NULL without graphs */
};
enum mlak_code gpu_calls_init(struct gpu_calls *calls, struct gpu *gpu, gpu_enqueue *enqueue, void *self,
                              uint32_t count, uint32_t modulus, struct mlak_fault *fault);
void gpu_calls_deinit(struct gpu_calls *calls);

/* Run them `rounds` times without a pause, behind one time that does not count, and say how many nanoseconds passed on
 * the device: nothing of what the host does to launch. */
enum mlak_code gpu_calls_time(struct gpu_calls *calls, uint32_t rounds, double *ns, struct mlak_fault *fault);

/* One call, launched on an idle device without a graph: nanoseconds of the host's clock until the host sees its end. */
enum mlak_code gpu_call_alone(struct gpu *gpu, gpu_enqueue *enqueue, void *self, uint32_t index, double *ns,
                              struct mlak_fault *fault);

#endif
