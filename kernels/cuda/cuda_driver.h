/* cuda_driver.h - the NVIDIA driver's functions that the cuda backend calls, found at run time: the binary also runs
 * where there is no driver. The driver stays loaded until the process ends. */
#ifndef MLAK_CUDA_DRIVER_H
#define MLAK_CUDA_DRIVER_H

#include "mlak.h"

#include <cuda.h>

/* D(member, symbol, (parameters)); all return CUresult. Symbols are those that cuda.h maps the plain names to. */
#define MLAK_DRIVER(D) \
    D(init, cuInit, (unsigned)) \
    D(error_name, cuGetErrorName, (CUresult, const char **)) \
    D(error_text, cuGetErrorString, (CUresult, const char **)) \
    D(device_count, cuDeviceGetCount, (int *)) \
    D(device_get, cuDeviceGet, (CUdevice *, int)) \
    D(device_uuid, cuDeviceGetUuid_v2, (CUuuid *, CUdevice)) \
    D(device_name, cuDeviceGetName, (char *, int, CUdevice)) \
    D(device_attribute, cuDeviceGetAttribute, (int *, CUdevice_attribute, CUdevice)) \
    D(can_access_peer, cuDeviceCanAccessPeer, (int *, CUdevice, CUdevice)) \
    D(context_retain, cuDevicePrimaryCtxRetain, (CUcontext *, CUdevice)) \
    D(context_release, cuDevicePrimaryCtxRelease_v2, (CUdevice)) \
    D(context_set, cuCtxSetCurrent, (CUcontext)) \
    D(context_drain, cuCtxSynchronize, (void)) \
    D(alloc, cuMemAlloc_v2, (CUdeviceptr *, size_t)) \
    D(free, cuMemFree_v2, (CUdeviceptr)) \
    D(set_words_async, cuMemsetD32Async, (CUdeviceptr, unsigned, size_t, CUstream)) \
    D(copy, cuMemcpy, (CUdeviceptr, CUdeviceptr, size_t)) \
    D(copy_to_async, cuMemcpyHtoDAsync_v2, (CUdeviceptr, const void *, size_t, CUstream)) \
    D(host_alloc, cuMemHostAlloc, (void **, size_t, unsigned)) \
    D(host_free, cuMemFreeHost, (void *)) \
    D(host_register, cuMemHostRegister_v2, (void *, size_t, unsigned)) \
    D(host_unregister, cuMemHostUnregister, (void *)) \
    D(host_pointer, cuMemHostGetDevicePointer_v2, (CUdeviceptr *, void *, unsigned)) \
    D(address_range, cuMemGetAddressRange_v2, (CUdeviceptr *, size_t *, CUdeviceptr)) \
    D(ipc_open, cuIpcOpenMemHandle_v2, (CUdeviceptr *, CUipcMemHandle, unsigned)) \
    D(ipc_close, cuIpcCloseMemHandle, (CUdeviceptr)) \
    D(address_reserve, cuMemAddressReserve, (CUdeviceptr *, size_t, size_t, CUdeviceptr, unsigned long long)) \
    D(address_free, cuMemAddressFree, (CUdeviceptr, size_t)) \
    D(import_fd, cuMemImportFromShareableHandle, \
      (CUmemGenericAllocationHandle *, void *, CUmemAllocationHandleType)) \
    D(allocation_properties, cuMemGetAllocationPropertiesFromHandle, \
      (CUmemAllocationProp *, CUmemGenericAllocationHandle)) \
    D(map, cuMemMap, (CUdeviceptr, size_t, size_t, CUmemGenericAllocationHandle, unsigned long long)) \
    D(unmap, cuMemUnmap, (CUdeviceptr, size_t)) \
    D(set_access, cuMemSetAccess, (CUdeviceptr, size_t, const CUmemAccessDesc *, size_t)) \
    D(release, cuMemRelease, (CUmemGenericAllocationHandle)) \
    D(stream_new, cuStreamCreate, (CUstream *, unsigned)) \
    D(stream_free, cuStreamDestroy_v2, (CUstream)) \
    D(stream_query, cuStreamQuery, (CUstream)) \
    D(capture_begin, cuStreamBeginCapture_v2, (CUstream, CUstreamCaptureMode)) \
    D(capture_end, cuStreamEndCapture, (CUstream, CUgraph *)) \
    D(graph_free, cuGraphDestroy, (CUgraph)) \
    D(graph_instantiate, cuGraphInstantiateWithFlags, (CUgraphExec *, CUgraph, unsigned long long)) \
    D(graph_launch, cuGraphLaunch, (CUgraphExec, CUstream)) \
    D(graph_exec_free, cuGraphExecDestroy, (CUgraphExec)) \
    D(event_new, cuEventCreate, (CUevent *, unsigned)) \
    D(event_free, cuEventDestroy_v2, (CUevent)) \
    D(event_record, cuEventRecord, (CUevent, CUstream)) \
    D(event_elapsed, cuEventElapsedTime, (float *, CUevent, CUevent)) \
    D(module_load, cuModuleLoadData, (CUmodule *, const void *)) \
    D(module_unload, cuModuleUnload, (CUmodule)) \
    D(module_function, cuModuleGetFunction, (CUfunction *, CUmodule, const char *)) \
    D(function_attribute, cuFuncSetAttribute, (CUfunction, CUfunction_attribute, int)) \
    D(occupancy, cuOccupancyMaxActiveBlocksPerMultiprocessor, (int *, CUfunction, int, size_t)) \
    D(map_encode, cuTensorMapEncodeTiled, \
      (CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *, const cuuint64_t *, \
       const cuuint32_t *, const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion, \
       CUtensorMapFloatOOBfill)) \
    D(launch_as, cuLaunchKernelEx, (const CUlaunchConfig *, CUfunction, void **, void **)) \
    D(launch, cuLaunchKernel, \
      (CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CUstream, void **, void **))

#define MLAK_DRIVER_MEMBER(member, symbol, parameters) CUresult(*member) parameters;
struct mlak_driver { MLAK_DRIVER(MLAK_DRIVER_MEMBER) };

/* The driver, initialised; NULL and `fault` (MLAK_UNSUPPORTED) where there is none. From any thread. */
const struct mlak_driver *mlak_driver(struct mlak_fault *fault);

/* Fill `fault` with what `call`, a member of the table or any other words, answered; returns `code`. */
enum mlak_code mlak_driver_fail(struct mlak_fault *fault, enum mlak_code code, const char *field, const char *call,
                                CUresult result);

/* "GPU-01234567-89ab-cdef-0123-456789abcdef" */
enum { MLAK_UUID_TEXT = 41 };
void mlak_uuid_text(const CUuuid *uuid, char text[MLAK_UUID_TEXT]);

#endif
