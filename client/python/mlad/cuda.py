"""What depends on CUDA: whose memory an array lies in, and waiting for the work that writes it."""
import contextlib
import sys
import time
import weakref

from . import _libmla
from .errors import Timeout, unsupported

SLICE_MS = 200          # a wait returns to Python that often, so that signals are handled


def guard(device):
    """Make a GPU (its ordinal; None or -1: no matter) current, as far as torch is there to do so."""
    torch = sys.modules.get("torch")
    if torch is None or device is None or device < 0:
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def owner(array, seen, field):
    """(address, bytes, gone) of the memory to register for a GPU array; gone() asks whether its owner has died.

    Of a torch tensor that is its whole storage. Of another library's array it is the extent of that array, which is let
    go when the object dies, or by client.forget if it cannot be watched."""
    if seen.kind == "torch":
        from torch.multiprocessing.reductions import StorageWeakRef
        storage = array.untyped_storage()
        return storage.data_ptr(), storage.nbytes(), StorageWeakRef(storage).expired
    if min(seen.strides, default=0) < 0:
        raise unsupported(field, "an array with negative strides cannot be shared")
    try:
        reference = weakref.ref(array)
    except TypeError:
        return seen.pointer, seen.span, None
    return seen.pointer, seen.span, lambda: reference() is None


def capturing(device):
    """Is the current stream of a GPU being captured into a CUDA graph?"""
    torch = sys.modules["torch"]
    with guard(device):
        return torch.cuda.is_current_stream_capturing()


def current_stream(device):
    """The handle of the current stream of a GPU."""
    return sys.modules["torch"].cuda.current_stream(device).cuda_stream


def refuse_capture(device):
    """Refuse while the current stream of a GPU is being captured into a CUDA graph."""
    if capturing(device):
        raise unsupported("stream", f"the current stream of cuda:{device} is being captured into a CUDA graph, which "
                          "this call waits for; use decode_in_order, or call it outside the graph")


def drain(views, deadline=None):
    """Wait, until `deadline` (of time.monotonic; None: for ever), for all work of this process that may still write
    these arrays: the current stream of every GPU among torch's, and the stream that each __cuda_array_interface__
    names."""
    for device in {seen.device for seen in views if seen.kind == "torch" and seen.device is not None}:
        torch = sys.modules["torch"]
        with guard(device):
            _wait(torch.cuda.current_stream(device).cuda_stream, deadline)
    for stream in {seen.stream for seen in views if seen.kind == "cuda" and seen.stream is not None}:
        _wait(stream, deadline)


def _wait(stream, deadline):
    while True:
        left = SLICE_MS if deadline is None else max(0, deadline - time.monotonic()) * 1000
        try:
            return _libmla.call("mla_stream_drain", stream, int(min(left, SLICE_MS)))
        except Timeout:
            if deadline is not None and time.monotonic() >= deadline:
                raise Timeout("timeout", "stream", f"the work on CUDA stream {stream:#x} did not complete in time, so "
                              "nothing was submitted; wait for the stream, or decode again") from None
