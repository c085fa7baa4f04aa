"""The memory that a client shares with the daemon: segments, found again by the address of what lies in them.

A segment is one registration. Host segments are memfds that this process maps itself, so that an array stays valid when
its client is closed; GPU segments are memory that torch or another library owns. Arrays handed out hold a lease;
when the last one dies its segment returns to a free list, to be handed out again, since registering costs a round trip
and every plan names its buffers. Leases end inside the garbage collector: there they only leave a note, which the next
operation reads.
"""
import bisect
import collections
import ctypes
import fcntl
import mmap
import os
import sys
import weakref

import numpy as np

from . import _libmla, arrays, cuda
from .errors import Error, invalid

PAGE = mmap.PAGESIZE
FREE_BYTES = 256 << 20      # kept for reuse; a segment larger than that is freed at once
_ACCESS = {"readwrite": _libmla.READWRITE, "read": _libmla.READ}


class Segment:
    """One registered range of addresses. `buffer` is libmla's handle."""

    def __init__(self, buffer, base, size, device, access="readwrite", keep=None, gone=None):
        self.buffer, self.base, self.size, self.device, self.access = buffer, base, size, device, access
        self.keep = keep        # what owns the memory, if we do
        self.gone = gone        # asks whether a foreign owner has died


class Lease:
    """The owner of arrays in one segment: numpy and torch keep it alive through the interface that they were made
    from."""

    def __init__(self, segment, returned):
        self.segment = segment
        interface = {"shape": (segment.size,), "typestr": "|u1", "data": (segment.base, False), "version": 3}
        if segment.device is None:
            self.__array_interface__ = interface
        else:
            self.__cuda_array_interface__ = {**interface, "version": 2}
        weakref.finalize(self, returned.append, segment).atexit = False

    def array(self, kind, dtype, shape, offset=0):
        """An array of `kind` in the segment, which keeps the lease."""
        size = int(np.prod(shape, dtype=object)) * arrays.ITEM_BYTES[dtype]
        if self.segment.device is None:
            flat = np.asarray(self)[offset:offset + size]
            if kind == "numpy":
                return flat.view(arrays.numpy_dtype(dtype)).reshape(shape)
            torch = __import__("torch")
            flat = torch.from_numpy(flat)
        else:
            torch = sys.modules["torch"]
            flat = torch.as_tensor(self, device=f"cuda:{self.segment.device}")[offset:offset + size]
        return flat.view(arrays.torch_dtype(torch, dtype)).reshape(shape)


class Memory:
    """All segments of one client. Not thread-safe: the client holds its lock. `drop(segment)` destroys the plans that
    name a segment before it is freed."""

    def __init__(self, handle, drop):
        self.handle, self.drop = handle, drop
        self.bases, self.segments = [], {}          # sorted addresses, and the segment at each
        self.returned = collections.deque()         # segments whose lease ended
        self.free = collections.OrderedDict()       # segment -> None, oldest first
        self.doomed = []                            # to be freed, once no decode names them

    # What exists.

    def locate(self, seen):
        """(segment, offset) of a View that lies in shared memory, else None."""
        at = bisect.bisect_right(self.bases, seen.pointer) - 1
        if at < 0:
            return None
        segment = self.segments[self.bases[at]]
        if (segment.device is None) != (seen.device is None) or (segment.gone and segment.gone()):
            return None
        if seen.pointer + max(seen.span, 1) > segment.base + segment.size:
            return None
        return segment, seen.pointer - segment.base

    def _add(self, segment):
        if segment.base in self.segments:
            self.release(self.segments[segment.base])
        bisect.insort(self.bases, segment.base)
        self.segments[segment.base] = segment
        return segment

    # Memory that we own.

    def lease(self, size, device=None):
        """A Lease on `size` bytes at least: of host memory, or of the GPU with that ordinal. Contents are
        unspecified."""
        self.sweep()
        unit = PAGE if size < 1 << 20 else 1 << 20
        size = max(-(-size // unit) * unit, PAGE)
        if size < 1 << 20:
            size = 1 << (size - 1).bit_length()
        for segment in reversed(self.free):
            if segment.size == size and segment.device == device:
                del self.free[segment]
                return Lease(segment, self.returned)
        make = self._new_host if device is None else self._new_cuda
        return Lease(self._add(make(size, device)), self.returned)

    def _new_host(self, size, _):
        memfd = os.memfd_create("mlad", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(memfd, size)
            fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            mapping = mmap.mmap(memfd, size)
            buffer = ctypes.c_void_p()
            _libmla.call("mla_buffer_import", self.handle, memfd, 0, size, _libmla.READWRITE, ctypes.byref(buffer))
        finally:
            os.close(memfd)
        base = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        return Segment(buffer.value, base, size, None, keep=mapping)

    def _new_cuda(self, size, device):
        torch = sys.modules["torch"]
        owned = torch.empty(size, dtype=torch.uint8, device=f"cuda:{device}")
        buffer = self._import(owned.data_ptr(), size, device, "readwrite")
        return Segment(buffer, owned.data_ptr(), size, device, keep=owned)

    # Memory of others.

    def _import(self, pointer, size, device, access):
        buffer = ctypes.c_void_p()
        with cuda.guard(device):
            _libmla.call("mla_buffer_import_device", self.handle, pointer, size, _ACCESS[access], ctypes.byref(buffer))
        return buffer.value

    def register(self, array, seen, field, access):
        """The segment and offset of a GPU array, registered now if it was not."""
        if access not in _ACCESS:
            raise invalid("access", f'it must be "readwrite" or "read", not {access!r}')
        self.sweep()
        found = self.locate(seen)
        if found:
            if access != found[0].access:
                raise invalid("access", f"{field} is registered for {found[0].access} already; forget it first")
            return found
        if seen.device is None:
            raise invalid(field, "this host memory is not shared with the daemon, and is not copied silently: "
                          "allocate it with client.empty()")
        base, size, gone = cuda.owner(array, seen, field)
        buffer = self._import(base, size, seen.device, access)
        segment = self._add(Segment(buffer, base, size, seen.device, access, gone=gone))
        return segment, seen.pointer - base

    # Letting go.

    def sweep(self):
        """Take back what leases have left, and free what nobody can name any more."""
        while self.returned:
            self.free[self.returned.popleft()] = None
        spare = sum(segment.size for segment in self.free)
        while spare > FREE_BYTES:
            segment, _ = self.free.popitem(last=False)
            spare -= segment.size
            self.release(segment)
        for segment in [s for s in self.segments.values() if s.gone and s.gone()]:
            self.release(segment)
        self.doomed = [segment for segment in self.doomed if not self._free(segment)]

    def release(self, segment):
        """Unregister: now, or as soon as no decode in flight names it."""
        self.drop(segment)
        self.bases.remove(segment.base)
        del self.segments[segment.base]
        if not self._free(segment):
            self.doomed.append(segment)

    def _free(self, segment):
        try:
            _libmla.call("mla_buffer_free", segment.buffer)
        except Error as error:
            if error.code == "in_use":
                return False
            raise
        return True
