"""The memory that a client shares with the daemon: segments, found again by the address of what lies in them.

A segment is one registration, made when a decode first uses it and with the least right that will do: for reading, or
for both once an output lies in it (it is then registered anew). Host segments are memfds that this process maps itself,
so that an array stays valid when its client is closed; GPU segments are memory that torch or another library owns.
Arrays handed out hold a lease; when the last one dies its segment returns to a free list, to be handed out again, since
registering costs a round trip and every plan names its buffers. Leases end inside the garbage collector: there they
only leave a note, which the next operation reads.
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
    """One range of addresses. `buffer` is libmla's handle and `access` what it is registered for; None at first."""

    def __init__(self, base, size, device, keep=None, gone=None, memfd=None):
        self.buffer = self.access = None
        self.base, self.size, self.device = base, size, device
        self.read_only = False  # by the caller's word: never to be registered for writing
        self.keep = keep        # what owns the memory, if we do
        self.gone = gone        # asks whether a foreign owner has died
        self.memfd = memfd      # of host memory: ours, to register it anew
        if memfd is not None:
            weakref.finalize(self, os.close, memfd)


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
    name a segment's buffer before that is freed."""

    def __init__(self, handle, drop):
        self.handle, self.drop = handle, drop
        self.bases, self.segments = [], {}          # sorted addresses, and the segment at each
        self.returned = collections.deque()         # segments whose lease ended
        self.free = collections.OrderedDict()       # segment -> None, oldest first
        self.doomed = []                            # buffers to be freed, once no decode names them

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
                segment.read_only = False
                return Lease(segment, self.returned)
        make = self._new_host if device is None else self._new_cuda
        return Lease(self._add(make(size, device)), self.returned)

    def _new_host(self, size, _):
        memfd = os.memfd_create("mlad", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(memfd, size)
            fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            mapping = mmap.mmap(memfd, size)
        except BaseException:
            os.close(memfd)
            raise
        base = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        return Segment(base, size, None, keep=mapping, memfd=memfd)

    def _new_cuda(self, size, device):
        torch = sys.modules["torch"]
        owned = torch.empty(size, dtype=torch.uint8, device=f"cuda:{device}")
        return Segment(owned.data_ptr(), size, device, keep=owned)

    # Registering.

    def share(self, segment, access, field):
        """The buffer of a segment, registered for `access` at least."""
        if segment.access not in (access, "readwrite"):
            if segment.read_only and access == "readwrite":
                raise invalid(field, 'it is written, and its memory is registered with access="read"; give it other '
                              'memory, or register it with access="readwrite"')
            self._register(segment, access)
        return segment.buffer

    def _register(self, segment, access):
        buffer = self._import(segment, access)
        if segment.buffer is not None:
            self._retire(segment)
        segment.buffer, segment.access = buffer, access

    def _import(self, segment, access):
        buffer, right = ctypes.c_void_p(), _ACCESS[access]
        if segment.device is None:
            _libmla.call("mla_buffer_import", self.handle, segment.memfd, 0, segment.size, right, ctypes.byref(buffer))
        else:
            with cuda.guard(segment.device):
                _libmla.call("mla_buffer_import_device", self.handle, segment.base, segment.size, right,
                             ctypes.byref(buffer))
        return buffer.value

    def find(self, array, seen, field, access):
        """The segment of an array and the offset in it, registered for `access` at least."""
        found = self.locate(seen)
        if found:
            self.share(found[0], access, field)
            return found
        if seen.device is None:
            raise invalid(field, "this host memory is not shared with the daemon, and is not copied silently: "
                          "allocate it with client.empty()")
        base, size, gone = cuda.owner(array, seen, field)
        segment, before = Segment(base, size, seen.device, gone=gone), self.segments.get(base)
        if before and not (before.gone and before.gone()):      # the same memory, less of it
            segment.read_only = before.read_only
            access = "readwrite" if before.access == "readwrite" else access
        self.share(segment, access, field)
        return self._add(segment), seen.pointer - base

    def register(self, array, seen, field, access=None):
        """Share an array now. access "read": and refuse to have it written; "readwrite": for both; None: for reading,
        until an output lies in it."""
        if access is not None and access not in _ACCESS:
            raise invalid("access", f'it must be "readwrite", "read" or None, not {access!r}')
        self.sweep()
        found = self.locate(seen)
        if found and access:
            found[0].read_only = False
        segment, _ = self.find(array, seen, field, access or "read")
        if access == "read":
            segment.read_only = True
            if segment.access != access:
                self._register(segment, access)

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
        self.doomed = [buffer for buffer in self.doomed if not self._free(buffer)]

    def release(self, segment):
        """Let a segment go."""
        self.bases.remove(segment.base)
        del self.segments[segment.base]
        if segment.buffer is not None:
            self._retire(segment)

    def _retire(self, segment):
        """Unregister: now, or as soon as no decode in flight names it."""
        self.drop(segment)
        buffer, segment.buffer, segment.access = segment.buffer, None, None
        if not self._free(buffer):
            self.doomed.append(buffer)

    def _free(self, buffer):
        try:
            _libmla.call("mla_buffer_free", buffer)
        except Error as error:
            if error.code == "in_use":
                return False
            raise
        return True
