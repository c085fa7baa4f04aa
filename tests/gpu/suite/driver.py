"""As much of the CUDA driver as clients without torch need, by ctypes; and a GPU's memory in use."""
import ctypes
import functools
import subprocess

import numpy as np


class DriverError(Exception):
    pass


@functools.lru_cache(maxsize=None)
def _library():
    return ctypes.CDLL("libcuda.so.1")


def call(name, *arguments):
    status = getattr(_library(), name)(*arguments)
    if status:
        raise DriverError(f"{name} returned {status}")


def use(uuid):
    """Make the GPU's primary context current in this thread."""
    call("cuInit", 0)
    count = ctypes.c_int()
    call("cuDeviceGetCount", ctypes.byref(count))
    for ordinal in range(count.value):
        device, raw, context = ctypes.c_int(), (ctypes.c_ubyte * 16)(), ctypes.c_void_p()
        call("cuDeviceGet", ctypes.byref(device), ordinal)
        call("cuDeviceGetUuid", ctypes.byref(raw), device)
        text = bytes(raw).hex()
        if uuid == f"GPU-{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}":
            call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
            call("cuCtxSetCurrent", context)
            return
    raise DriverError(f"the driver sees no {uuid}")


def version():
    """The CUDA version that the driver speaks, such as "12.8"; None without a driver."""
    number = ctypes.c_int()
    try:
        call("cuDriverGetVersion", ctypes.byref(number))
    except (OSError, AttributeError, DriverError):
        return None
    return f"{number.value // 1000}.{number.value % 1000 // 10}"


class DeviceArray:
    """Memory from cuMemAlloc that mlad's Python package can name. Never freed: for short-lived processes."""

    def __init__(self, shape, dtype):
        self.shape, self.dtype = tuple(shape), np.dtype(dtype)
        self.nbytes = int(np.prod(shape)) * self.dtype.itemsize
        pointer = ctypes.c_uint64()
        call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(self.nbytes))
        self.pointer = pointer.value
        self.__cuda_array_interface__ = {"shape": self.shape, "typestr": self.dtype.str, "version": 3, "strides": None,
                                         "data": (self.pointer, False), "stream": None}

    def write(self, array):
        array = np.ascontiguousarray(array)
        assert array.nbytes == self.nbytes
        call("cuMemcpyHtoD_v2", ctypes.c_uint64(self.pointer), ctypes.c_void_p(array.ctypes.data),
             ctypes.c_size_t(self.nbytes))
        call("cuCtxSynchronize")        # the copy from pageable memory may return before it is done

    def read(self):
        array = np.empty(self.shape, self.dtype)
        call("cuMemcpyDtoH_v2", ctypes.c_void_p(array.ctypes.data), ctypes.c_uint64(self.pointer),
             ctypes.c_size_t(self.nbytes))
        return array


def memory_used(uuid):
    """Bytes in use on a GPU by everybody; None where nobody says."""
    try:
        done = subprocess.run(["nvidia-smi", "-i", uuid, "--query-gpu=memory.used", "--format=csv,noheader,nounits"],
                              capture_output=True, text=True, timeout=20)
        return int(done.stdout.strip()) << 20
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
