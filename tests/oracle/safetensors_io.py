"""Safetensors files, read and written with numpy alone: 8 bytes of header length, a JSON header, the tensors' bytes.

A tensor keeps its file's dtype name beside an array of its bits (numpy has no bf16 and no fp8).
"""
import json
import struct
from typing import NamedTuple

import numpy as np

DTYPES = {"BF16": np.uint16, "F16": np.uint16, "F8_E4M3": np.uint8, "U8": np.uint8, "I32": np.int32,
          "U64": np.uint64, "F32": np.float32, "I64": np.int64, "F64": np.float64}


class Tensor(NamedTuple):
    dtype: str
    data: np.ndarray


def tensor(dtype, data):
    """A tensor of that dtype; data that is not yet of the dtype's bits is converted by value."""
    return Tensor(dtype, np.ascontiguousarray(data, DTYPES[dtype]))


def read(path):
    """(tensors by name, metadata) of a file; raises ValueError where the file is not sound."""
    with open(path, "rb") as file:
        raw = file.read()
    if len(raw) < 8:
        raise ValueError(f"{path}: shorter than its header's length")
    size, = struct.unpack_from("<Q", raw)
    if size > len(raw) - 8:
        raise ValueError(f"{path}: header of {size} bytes in a file of {len(raw)}")
    header = json.loads(raw[8:8 + size])
    metadata = header.pop("__metadata__", {})
    body = memoryview(raw)[8 + size:]
    tensors, covered = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        kind = np.dtype(DTYPES[entry["dtype"]])
        count = int(np.prod(entry["shape"], dtype=np.int64))
        if begin != covered or end - begin != count * kind.itemsize or end > len(body):
            raise ValueError(f"{path}: {name} has offsets {begin}..{end} for {count} elements of {entry['dtype']}")
        covered = end
        data = np.frombuffer(bytes(body[begin:end]), kind).reshape(entry["shape"])
        tensors[name] = Tensor(entry["dtype"], data)
    if covered != len(body):
        raise ValueError(f"{path}: {len(body) - covered} bytes belong to no tensor")
    return tensors, metadata


def write(path, tensors, metadata, skew=0):
    """Write a file whose tensor data starts skew bytes past a multiple of 8 (the format promises no alignment)."""
    header, offset = {}, 0
    if metadata:
        header["__metadata__"] = metadata
    for name, (dtype, data) in tensors.items():
        assert data.dtype == DTYPES[dtype], (name, dtype, data.dtype)
        header[name] = {"dtype": dtype, "shape": list(data.shape), "data_offsets": [offset, offset + data.nbytes]}
        offset += data.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8 + skew)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for dtype, data in tensors.values():
            file.write(data.tobytes())
