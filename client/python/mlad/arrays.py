"""One description of any array that a decode can name: numpy, torch (host or CUDA), or __cuda_array_interface__.

torch is never imported here: a torch tensor can only come from a program that has.
"""
import sys
from typing import NamedTuple, Optional, Tuple

import numpy as np

from .errors import invalid

# numpy has neither type. These are uint16 and uint8 whose dtype says what the bits mean: `array.view(mlad.bfloat16)`.
# Arrays of ml_dtypes' bfloat16 and float8_e4m3fn are understood as well.
bfloat16 = np.dtype(np.uint16, metadata={"mlad": "bf16"})
float8_e4m3 = np.dtype(np.uint8, metadata={"mlad": "e4m3"})

ITEM_BYTES = {"bf16": 2, "fp16": 2, "e4m3": 1, "u8": 1, "i32": 4, "i64": 8, "u64": 8, "f32": 4}
_NUMPY_NAMES = {"bfloat16": "bf16", "float16": "fp16", "float8_e4m3fn": "e4m3", "uint8": "u8", "int32": "i32",
                "int64": "i64", "uint64": "u64", "float32": "f32"}
_NUMPY_TYPES = {"bf16": bfloat16, "fp16": np.float16, "e4m3": float8_e4m3, "u8": np.uint8, "i32": np.int32,
                "i64": np.int64, "u64": np.uint64, "f32": np.float32}
_TORCH_NAMES = {"bf16": "bfloat16", "fp16": "float16", "e4m3": "float8_e4m3fn", "u8": "uint8", "i32": "int32",
                "i64": "int64", "u64": "uint64", "f32": "float32"}


class View(NamedTuple):
    """Where an array's elements are. It does not keep the array alive."""
    kind: str                   # "numpy", "torch" or "cuda" (only __cuda_array_interface__)
    device: Optional[int]       # the GPU's ordinal in this process (-1: unknown), None for host memory
    pointer: int                # the first element
    shape: Tuple[int, ...]
    strides: Tuple[int, ...]    # bytes
    dtype: str                  # a key of ITEM_BYTES, or the library's own name of another type
    item: int                   # bytes of one element
    writable: bool
    stream: Optional[int]       # of a __cuda_array_interface__: what to wait for (None: nothing)

    @property
    def size(self):
        return int(np.prod(self.shape, dtype=object))

    @property
    def span(self):
        """Bytes from the first element to the end of the last."""
        if not self.size:
            return 0
        return sum((n - 1) * stride for n, stride in zip(self.shape, self.strides)) + self.item

    def packed(self):
        """Are the elements one after the other, last axis fastest?"""
        step = self.item
        for n, stride in zip(reversed(self.shape), reversed(self.strides)):
            if n > 1 and stride != step:
                return self.size == 0
            step *= n
        return True


def torch_of(array):
    """The torch module if `array` is one of its tensors, else None."""
    torch = sys.modules.get("torch")
    return torch if torch is not None and isinstance(array, torch.Tensor) else None


def _numpy_name(dtype):
    if dtype.metadata and "mlad" in dtype.metadata:
        return dtype.metadata["mlad"]
    return _NUMPY_NAMES.get(dtype.name, dtype.name) if dtype.isnative else str(dtype)


def dtype_name(dtype, field="dtype"):
    """The name in ITEM_BYTES of a numpy or torch dtype, or of a name such as "bfloat16"."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(dtype, torch.dtype):
        text = str(dtype).rpartition(".")[2]
        name = next((ours for ours, theirs in _TORCH_NAMES.items() if theirs == text), text)
    elif isinstance(dtype, str) and dtype in _TORCH_NAMES.values():
        name = next(ours for ours, theirs in _TORCH_NAMES.items() if theirs == dtype)
    else:
        name = _numpy_name(np.dtype(dtype))
    if name not in ITEM_BYTES:
        raise invalid(field, f"{dtype} is none of {', '.join(_TORCH_NAMES.values())}")
    return name


def numpy_dtype(name):
    return np.dtype(_NUMPY_TYPES[name])


def torch_dtype(torch, name):
    return getattr(torch, _TORCH_NAMES[name])


def view(array, field):
    """The View of an array; `field` names it in errors."""
    torch = torch_of(array)
    if torch is not None:
        if array.layout != torch.strided or array.device.type not in ("cpu", "cuda"):
            raise invalid(field, f"a {array.layout} tensor on {array.device} cannot be shared")
        text = str(array.dtype).rpartition(".")[2]
        name = next((ours for ours, theirs in _TORCH_NAMES.items() if theirs == text), text)
        item = array.element_size()
        device = array.device.index if array.device.type == "cuda" else None
        strides = tuple(s * item for s in array.stride())
        return View("torch", device, array.data_ptr(), tuple(array.shape), strides, name, item, True, None)
    if isinstance(array, np.ndarray):
        return View("numpy", None, array.ctypes.data, array.shape, array.strides, _numpy_name(array.dtype),
                    array.itemsize, array.flags.writeable, None)
    interface = getattr(array, "__cuda_array_interface__", None)
    if interface is None:
        raise invalid(field, f"a {type(array).__name__} is neither a numpy array, a torch tensor nor an object with "
                      "__cuda_array_interface__")
    if interface.get("mask") is not None:
        raise invalid(field, "its __cuda_array_interface__ has a mask, which cannot be honoured")
    declared = getattr(array, "dtype", None)
    dtype = declared if isinstance(declared, np.dtype) else np.dtype(interface["typestr"])
    shape, strides = tuple(interface["shape"]), interface.get("strides")
    if strides is None:
        strides = tuple(int(np.prod(shape[i + 1:], dtype=object)) * dtype.itemsize for i in range(len(shape)))
    pointer, read_only = interface["data"]
    # Without "stream" (version 2) the producer may have used the default stream; None promises that nothing is to be
    # awaited.
    return View("cuda", -1, pointer, shape, tuple(strides), _numpy_name(dtype), dtype.itemsize, not read_only,
                interface.get("stream", 0))


def require(seen, field, dtypes, *shapes):
    """Check a View's dtype and shape (None: any length), naming `field` and what would be right."""
    if seen.dtype not in dtypes:
        hint = ""
        if seen.dtype == "uint16" and "bf16" in dtypes:
            hint = "; a uint16 array says that it is bf16 by .view(mlad.bfloat16)"
        if seen.dtype == "u8" and "e4m3" in dtypes:
            hint = "; a uint8 array says that it is fp8 by .view(mlad.float8_e4m3)"
        raise invalid(field, f"its dtype must be {' or '.join(dtypes)}, not {seen.dtype}{hint}")
    for shape in shapes:
        if len(shape) == len(seen.shape) and all(want in (None, got) for want, got in zip(shape, seen.shape)):
            return
    text = " or ".join("[" + ", ".join("any" if n is None else str(n) for n in shape) + "]" for shape in shapes)
    raise invalid(field, f"its shape must be {text}, not {list(seen.shape)}")
