/* driver.h - the CUDA driver's functions that libmla calls, found at run time, for cuda.c and streams.h. Declared here
 * with the driver's ABI. */
#ifndef MLAC_DRIVER_H
#define MLAC_DRIVER_H

#include "mla.h"

struct mlac_ipc_handle {
    unsigned char bytes[64];
};
struct mlac_uuid {
    unsigned char bytes[16];
};
struct mlac_properties { /* CUmemAllocationProp */
    int type, handle_types, location[2];
    void *windows;
    unsigned char flags[8];
};
_Static_assert(sizeof(struct mlac_properties) == 32, "the driver's");
struct mlac_host_node { /* CUDA_HOST_NODE_PARAMS */
    void (*call)(void *);
    void *data;
};

/* D(member, symbol, parameters); all return a CUresult, 0 for success. */
#define MLAC_DRIVER(D)                                                                                                 \
    D(init, cuInit, (unsigned))                                                                                        \
    D(error_text, cuGetErrorString, (int, const char **))                                                              \
    D(device_get, cuDeviceGet, (int *, int))                                                                           \
    D(device_uuid, cuDeviceGetUuid_v2, (struct mlac_uuid *, int))                                                      \
    D(device_attribute, cuDeviceGetAttribute, (int *, int, int))                                                       \
    D(context_device, cuCtxGetDevice, (int *))                                                                         \
    D(context, cuCtxGetCurrent, (void **))                                                                             \
    D(attribute, cuPointerGetAttribute, (void *, int, uint64_t))                                                       \
    D(range, cuMemGetAddressRange_v2, (uint64_t *, size_t *, uint64_t))                                                \
    D(export, cuIpcGetMemHandle, (struct mlac_ipc_handle *, uint64_t))                                                 \
    D(retain, cuMemRetainAllocationHandle, (uint64_t *, void *))                                                       \
    D(release, cuMemRelease, (uint64_t))                                                                               \
    D(properties, cuMemGetAllocationPropertiesFromHandle, (struct mlac_properties *, uint64_t))                        \
    D(export_fd, cuMemExportToShareableHandle, (void *, uint64_t, int, unsigned long long))                            \
    D(push, cuCtxPushCurrent_v2, (void *))                                                                             \
    D(pop, cuCtxPopCurrent_v2, (void **))                                                                              \
    D(capture_mode, cuThreadExchangeStreamCaptureMode, (int *))                                                        \
    D(stream_new, cuStreamCreate, (void **, unsigned))                                                                 \
    D(stream_query, cuStreamQuery, (void *))                                                                           \
    D(stream_free, cuStreamDestroy_v2, (void *))                                                                       \
    D(event_new, cuEventCreate, (void **, unsigned))                                                                   \
    D(event_record, cuEventRecord, (void *, void *))                                                                   \
    D(event_free, cuEventDestroy_v2, (void *))                                                                         \
    D(capture_info, cuStreamGetCaptureInfo_v2, (void *, int *, uint64_t *, void **, void *const **, size_t *))         \
    D(graph_host_node, cuGraphAddHostNode,                                                                             \
      (void **, void *, void *const *, size_t, const struct mlac_host_node *))                                         \
    D(module_load, cuModuleLoadData, (void **, const void *))                                                          \
    D(module_unload, cuModuleUnload, (void *))                                                                         \
    D(module_function, cuModuleGetFunction, (void **, void *, const char *))                                           \
    D(function_attribute, cuFuncSetAttribute, (void *, int, int))                                                      \
    D(launch, cuLaunchKernel,                                                                                          \
      (void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void *, void **, void **))        \
    D(alloc, cuMemAlloc_v2, (uint64_t *, size_t))                                                                      \
    D(free, cuMemFree_v2, (uint64_t))                                                                                  \
    D(host_alloc, cuMemHostAlloc, (void **, size_t, unsigned))                                                         \
    D(host_free, cuMemFreeHost, (void *))                                                                              \
    D(host_pointer, cuMemHostGetDevicePointer_v2, (uint64_t *, void *, unsigned))                                      \
    D(set_words, cuMemsetD32Async, (uint64_t, unsigned, size_t, void *))

enum { MLAC_CAPTURE_RELAXED = 2, MLAC_STREAM_NON_BLOCKING = 1 };

extern struct mlac_driver {
    const char *missing; /* why there is no driver; NULL: there is */
#define MLAC_DRIVER_MEMBER(member, symbol, parameters) int(*member) parameters;
    MLAC_DRIVER(MLAC_DRIVER_MEMBER)
} mlac_driver;

/* MLA_OK: mlac_driver is there to be called. From any thread. */
mla_status mlac_need_driver(mla_error *error);
/* What a failed call means: MLA_DEVICE_LOST or MLA_BUFFER, with `field`. */
mla_status mlac_driver_fail(mla_error *error, const char *field, const char *call, int code);
/* Wait until a stream's work is done, at most until `deadline`: 0, 600 (CUDA_ERROR_NOT_READY) or an error. */
int mlac_poll_stream(void *stream, int64_t deadline);

#endif
