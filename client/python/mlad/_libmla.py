"""libmla by ctypes: the structures and functions of mla.h, and nothing more.

Structures repeat mla.h field by field (tests/python compares every offset with the compiler's). `call` turns a status
into an exception. The library is looked for once, at the first use: in $MLAD_LIBRARY (a path), in the tree that this
package was installed in, then wherever the loader looks.
"""
import ctypes
import functools
import os
import sys
from ctypes import (CDLL, POINTER, Structure, byref, c_char, c_char_p, c_double, c_float, c_int, c_size_t, c_uint32,
                    c_uint64, c_void_p)

from .errors import raise_status

SONAME = "libmla.so.0"
OK, BUSY, REQUESTS, TIMEOUT, IN_USE = 0, 15, 25, 26, 20
READWRITE, READ = 0, 1
BF16, FP16, E4M3, DTYPE_DEFAULT = 0, 1, 2, 255
KV_BF16, KV_FP16, KV_E4M3, KV_E4M3_656 = 0, 1, 2, 3
MASK_NONE, MASK_CAUSAL, MASK_TREE = 0, 1, 2
LSE_E, LSE_2 = 0, 1
SCALE_NONE, SCALE_VALUE, SCALE_TENSOR = 0, 1, 2


class mla_error(Structure):
    _fields_ = [("code", c_int), ("field", c_char * 64), ("message", c_char * 512)]


class mla_options(Structure):
    _fields_ = [("struct_size", c_size_t), ("socket", c_char_p), ("device", c_char_p), ("name", c_char_p),
                ("reconnect_ms", c_int), ("transport", c_int), ("high_priority", c_int)]


class mla_tensor(Structure):
    _fields_ = [("buffer", c_void_p), ("offset", c_uint64)]


class mla_scale(Structure):
    _fields_ = [("kind", c_int), ("value", c_float), ("tensor", mla_tensor)]


class mla_batch(Structure):
    _fields_ = [("struct_size", c_size_t), ("batch", c_uint32), ("heads", c_uint32), ("q_rows", c_uint64),
                ("q_dtype", c_int), ("out_dtype", c_int), ("kv_format", c_int), ("pages", c_uint32),
                ("page_size", c_uint32), ("max_pages", c_uint32), ("page_stride", c_uint64), ("row_stride", c_uint64),
                ("softmax_scale", c_double), ("q", mla_tensor), ("kv", mla_tensor), ("block_table", mla_tensor),
                ("seqlens", mla_tensor), ("cu_q", mla_tensor), ("tree_mask", mla_tensor), ("sink", mla_tensor),
                ("q_scale", mla_scale), ("k_scale", mla_scale), ("v_scale", mla_scale), ("out", mla_tensor),
                ("lse", mla_tensor), ("mask", c_int), ("lse_base", c_int), ("dcp_world", c_uint32),
                ("dcp_rank", c_uint32), ("dcp_interleave", c_uint32), ("window", c_uint32), ("deterministic", c_int)]


class mla_failure(Structure):
    _fields_ = [("request", c_uint32), ("field", c_char * 64), ("message", c_char * 256)]


class mla_result(Structure):
    _fields_ = [("failed", c_uint32), ("listed", c_uint32), ("failures", mla_failure * 32), ("kv_tokens", c_uint64),
                ("receive_ns", c_uint64), ("queue_ns", c_uint64), ("kernel_ns", c_uint64), ("replays", c_uint32)]


STRUCTURES = (mla_error, mla_options, mla_tensor, mla_scale, mla_batch, mla_failure, mla_result)

ORDER_STREAM, ORDER_HOST = 0, 1
WHY = 256

_client = _buffer = _plan = _step = c_void_p
_error = POINTER(mla_error)
_FUNCTIONS = {
    "mla_status_text": (c_char_p, c_int),
    "mla_version": (c_char_p,),
    "mla_options_init": (None, POINTER(mla_options)),
    "mla_connect": (c_int, POINTER(_client), POINTER(mla_options), _error),
    "mla_close": (None, _client),
    "mla_device": (c_char_p, _client),
    "mla_transport_used": (c_int, _client),
    "mla_client_placement": (c_int, _client, c_char_p),
    "mla_buffer_alloc": (c_int, _client, c_size_t, POINTER(_buffer), _error),
    "mla_buffer_import": (c_int, _client, c_int, c_uint64, c_size_t, c_int, POINTER(_buffer), _error),
    "mla_buffer_import_device": (c_int, _client, c_void_p, c_size_t, c_int, POINTER(_buffer), _error),
    "mla_stream_drain": (c_int, c_void_p, c_int, _error),
    "mla_buffer_data": (c_void_p, _buffer),
    "mla_buffer_size": (c_size_t, _buffer),
    "mla_buffer_free": (c_int, _buffer, _error),
    "mla_batch_init": (None, POINTER(mla_batch)),
    "mla_plan_create": (c_int, _client, POINTER(mla_batch), POINTER(_plan), _error),
    "mla_plan_destroy": (None, _plan),
    "mla_submit": (c_int, _client, _plan, POINTER(c_uint64), _error),
    "mla_submit_batch": (c_int, _client, POINTER(mla_batch), POINTER(c_uint64), _error),
    "mla_poll": (c_int, _client, c_uint64, POINTER(c_int), POINTER(mla_result), _error),
    "mla_wait": (c_int, _client, c_uint64, c_int, POINTER(mla_result), _error),
    "mla_decode": (c_int, _client, _plan, c_int, POINTER(mla_result), _error),
    "mla_decode_batch": (c_int, _client, POINTER(mla_batch), c_int, POINTER(mla_result), _error),
    "mla_fd": (c_int, _client),
    "mla_client_placement": (c_int, _client, c_char_p),
    "mla_client_order": (c_int, _client, c_char_p),
    "mla_submit_stream": (c_int, _plan, c_void_p, _error),
    "mla_plan_status": (c_int, _plan, _error),
    "mla_step_create": (c_int, _client, POINTER(_plan), c_uint32, POINTER(_step), _error),
    "mla_step_launch": (c_int, _step, c_void_p, _error),
    "mla_step_status": (c_int, _step, _error),
    "mla_step_destroy": (None, _step),
}


def _candidates():
    """Paths and names to try, in order. An installed package is three folders below the lib folder of its tree."""
    if os.environ.get("MLAD_LIBRARY"):
        return [os.environ["MLAD_LIBRARY"]]
    lib = os.path.normpath(os.path.join(os.path.dirname(os.path.abspath(__file__)), *[os.pardir] * 3))
    folders = [lib, os.path.join(lib, getattr(sys.implementation, "_multiarch", "")), os.path.join(lib, "../lib64")]
    paths = [os.path.join(folder, SONAME) for folder in folders]
    return [path for path in paths if os.path.exists(path)] + [SONAME]


@functools.lru_cache(maxsize=None)
def library():
    """The loaded libmla. OSError says where it was looked for."""
    tried = []
    for path in _candidates():
        try:
            loaded = CDLL(path, use_errno=True)
        except OSError as error:
            tried.append(str(error))
            continue
        for name, (result, *arguments) in _FUNCTIONS.items():
            function = getattr(loaded, name)
            function.restype, function.argtypes = result, arguments
        return loaded
    raise OSError(f"{SONAME} cannot be loaded ({'; '.join(tried)}); install it, or name it in $MLAD_LIBRARY")


def call(name, *arguments):
    """Call a function that returns an mla_status and takes an mla_error last; raise what it reports."""
    error = mla_error()
    status = getattr(library(), name)(*arguments, byref(error))
    if status != OK:
        fail(error)


def fail(error, result=None):
    """Raise an mla_error."""
    raise_status(library().mla_status_text(error.code).decode(), error.field.decode(errors="replace"),
                 error.message.decode(errors="replace"), result)
