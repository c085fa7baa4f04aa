"""From Python arguments to an mla_batch: every argument is checked, placed in shared memory, or refused by its name.

What the daemon's kernels refuse (combinations of types, overlaps, extents) is left to the daemon, whose error names the
field of the batch.
"""
import numpy as np

from . import _libmla, arrays, cuda
from .errors import invalid

LATENT, WIDTH, ROW656 = 512, 576, 656
NOT_SHARED = ("a plan reads it at each submission, so it must be contiguous and shared with the daemon: allocate it "
              "with client.empty(), or register it")
_Q_TYPES = {"bf16": _libmla.BF16, "fp16": _libmla.FP16, "e4m3": _libmla.E4M3}
_KV_FORMATS = {"bf16": _libmla.KV_BF16, "fp16": _libmla.KV_FP16, "e4m3": _libmla.KV_E4M3}
_MASKS = {"none": _libmla.MASK_NONE, "causal": _libmla.MASK_CAUSAL}
_LSE_BASES = {"e": _libmla.LSE_E, "2": _libmla.LSE_2}


def _template():
    """mla_batch_init's batch, once, so that equal batches have equal bytes."""
    if not hasattr(_template, "bytes"):
        batch = _libmla.mla_batch()
        _libmla.library().mla_batch_init(batch)
        _template.bytes = bytes(batch)
    return _template.bytes


class Description:
    """A batch and what it rests on.

    `views`: the arrays, for waiting on their streams. `placed`: the segments that it names, each with its buffer.
    `keep`: objects that must outlive a decode of it. `out`, `lse`: the outputs (lse may be None)."""

    def __init__(self, memory, copy_metadata, in_order=False):
        """in_order: a CUDA stream runs it later, so nothing is copied now, and it may be captured."""
        self.memory, self.copy_metadata, self.in_order = memory, copy_metadata, in_order
        self.batch = _libmla.mla_batch.from_buffer_copy(_template())
        self.views, self.keep, self.copies = [], [], []
        self.places, self.placed = [], []
        self.out = self.lse = None

    @property
    def key(self):
        return bytes(self.batch)

    def see(self, array, field):
        seen = arrays.view(array, field)
        if seen.kind == "torch" and seen.device is not None and not self.in_order:
            cuda.refuse_capture(seen.device)
        self.views.append(seen)
        self.keep.append(array)
        return seen

    def place(self, tensor, array, seen, field, access="read"):
        """Have settle() fill the mla_tensor of an array in shared memory."""
        if access == "readwrite" and not seen.writable:
            raise invalid(field, "it is written and must not be read-only")
        self.places.append((tensor, array, seen, field, access))

    def settle(self):
        """Share the memory of all that was placed; outputs first, so that memory which is read as well is registered
        for both at once."""
        for tensor, array, seen, field, access in sorted(self.places, key=lambda place: place[-1] == "read"):
            segment, tensor.offset = self.memory.find(array, seen, field, access)
            tensor.buffer = segment.buffer
            self.placed.append((segment, segment.buffer))

    def holds(self):
        """Is all memory that it names still registered as it was? Another thread may forget it, an array of the same
        memory may have replaced it."""
        return all(segment.buffer == buffer for segment, buffer in self.placed)

    @property
    def segments(self):
        return [segment for segment, _ in self.placed]

    def output(self, tensor, array, field, dtypes, shape):
        """Check and place an output; its View."""
        seen = self.see(array, field)
        arrays.require(seen, field, dtypes, shape)
        if not seen.packed():
            raise invalid(field, f"it must be contiguous; its strides are {list(seen.strides)} bytes")
        self.place(tensor, array, seen, field, "readwrite")
        return seen

    def small(self, array, field, dtypes, *shapes):
        """Check metadata and place it, or copy it into shared memory later where it is not there already."""
        if isinstance(array, (list, tuple)) and "i32" in dtypes:
            array = _integers(array, field)
        seen = self.see(array, field)
        arrays.require(seen, field, dtypes, *shapes)
        on_gpu = seen.kind == "cuda" or (self.in_order and seen.kind == "torch" and seen.device is not None)
        if seen.packed() and (on_gpu or self.memory.locate(seen)):
            self.place(getattr(self.batch, field), array, seen, field)
        elif not self.copy_metadata:
            raise invalid(field, NOT_SHARED)
        elif seen.kind == "cuda":
            raise invalid(field, "it must be contiguous")
        else:
            self.copies.append((field, array))
        return seen

    def copy(self):
        """Copy the metadata that is not shared yet; after the streams that write it were waited for."""
        if not self.copies:
            return
        bits = [(field, _bytes(array)) for field, array in self.copies]
        starts = np.cumsum([0] + [-(-len(b) // 64) * 64 for _, b in bits])
        lease = self.memory.lease(int(starts[-1]))
        shared = lease.array("numpy", "u8", (lease.segment.size,))
        buffer = self.memory.share(lease.segment, "read", "metadata")
        self.keep.append(lease)
        self.placed.append((lease.segment, buffer))
        for (field, b), start in zip(bits, starts):
            shared[start:start + len(b)] = b
            target = getattr(self.batch, field)
            if isinstance(target, _libmla.mla_scale):
                target.kind, target.tensor = _libmla.SCALE_TENSOR, _libmla.mla_tensor(buffer, int(start))
            else:
                setattr(self.batch, field, _libmla.mla_tensor(buffer, int(start)))


def _integers(values, field):
    """A list of integers as int32; what int32 cannot hold is refused, not wrapped or cut."""
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise invalid(field, f"it must be a list of integers, or of lists of one length: {error}") from None
    if array.size == 0:
        return array.astype(np.int32)
    if array.dtype.kind not in "iu":
        raise invalid(field, f"it must hold integers, not {array.dtype}")
    limits = np.iinfo(np.int32)
    if int(array.min()) < limits.min or int(array.max()) > limits.max:
        raise invalid(field, f"it must hold int32; it has {int(array.min())}..{int(array.max())}")
    return array.astype(np.int32)


def _bytes(array):
    """The contents of a numpy or torch array as flat numpy bytes."""
    torch = arrays.torch_of(array)
    if torch is not None:
        array = array.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _count(value, field, low=0):
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not low <= value < 1 << 32:
        raise invalid(field, f"it must be an integer of at least {low}, not {value!r}")
    return int(value)


def describe(memory, copy_metadata, q, kv, block_table, seqlens, *, softmax_scale, out=None, lse=None, return_lse=True,
             mask="causal", cu_q=None, window=0, sink=None, q_scale=None, k_scale=None, v_scale=None, dcp=None,
             lse_base="e", deterministic=False, in_order=False):
    """The Description of one decode; Client.decode documents the arguments."""
    d = Description(memory, copy_metadata, in_order)
    b = d.batch

    b.batch = requests = _requests(d, seqlens)
    q_seen = d.see(q, "q")
    shape = (None, None, WIDTH) if cu_q is not None else (requests, None, None, WIDTH)
    arrays.require(q_seen, "q", _Q_TYPES, shape)
    if not q_seen.packed():
        raise invalid("q", f"it must be contiguous; its strides are {list(q_seen.strides)} bytes")
    d.place(b.q, q, q_seen, "q")
    b.q_dtype = _Q_TYPES[q_seen.dtype]
    rows, b.heads = q_seen.shape[:-1], q_seen.shape[-2]
    b.q_rows = int(np.prod(rows[:-1], dtype=object))

    _cache(d, kv)
    b.max_pages = d.small(block_table, "block_table", ("i32",), (requests, None)).shape[1]
    if cu_q is not None:
        d.small(cu_q, "cu_q", ("i32",), (requests + 1,))
    if isinstance(mask, str):
        if mask not in _MASKS:
            raise invalid("mask", f'it must be "causal", "none" or a tree mask of uint64, not {mask!r}')
        b.mask = _MASKS[mask]
    else:
        b.mask = _libmla.MASK_TREE
        _tree(d, mask, rows[:-1])
    if sink is not None:
        d.small(sink, "sink", ("f32",), (b.heads,))
    for field, scale in (("q_scale", q_scale), ("k_scale", k_scale), ("v_scale", v_scale)):
        if scale is not None:
            _scale(d, scale, field)

    if isinstance(softmax_scale, bool) or not isinstance(softmax_scale, (int, float, np.integer, np.floating)):
        raise invalid("softmax_scale", f"it must be a number, not {softmax_scale!r}")
    b.softmax_scale = float(softmax_scale)
    b.window = _count(window, "window")
    dcp = (1, 0, 1) if dcp is None else dcp
    if not isinstance(dcp, (tuple, list)) or len(dcp) != 3:
        raise invalid("dcp", f"it must be (world, rank, interleave), not {dcp}")
    world, rank, interleave = dcp
    b.dcp_world, b.dcp_rank = _count(world, "dcp", 1), _count(rank, "dcp")
    b.dcp_interleave = _count(interleave, "dcp", 1)
    if not isinstance(lse_base, str) or lse_base not in _LSE_BASES:
        raise invalid("lse_base", f'it must be "e" or "2", not {lse_base!r}')
    if not isinstance(deterministic, (bool, np.bool_)):
        raise invalid("deterministic", f"it must be True or False, not {deterministic!r}")
    b.lse_base, b.deterministic = _LSE_BASES[lse_base], int(deterministic)

    if out is None:
        out = _output(d, q, q_seen, "out", "fp16" if q_seen.dtype == "fp16" else "bf16", rows + (LATENT,))
    b.out_dtype = _Q_TYPES[d.output(b.out, out, "out", ("bf16", "fp16"), rows + (LATENT,)).dtype]
    if lse is not None and not return_lse:
        raise invalid("return_lse", "it is False and lse is given")
    if lse is None and return_lse:
        lse = _output(d, q, q_seen, "lse", "f32", rows)
    if lse is not None:
        d.output(b.lse, lse, "lse", ("f32",), rows)
    d.out, d.lse = out, lse
    d.settle()
    return d


def _requests(d, seqlens):
    return d.small(seqlens, "seqlens", ("i32",), (None,)).shape[0]


def _cache(d, kv):
    """kv [pages, page_size, row] or [pages, page_size, 1, row], its page and row strides taken as they are."""
    b, seen = d.batch, d.see(kv, "kv")
    row = seen.shape[-1] if seen.shape else 0
    if row == ROW656:
        arrays.require(seen, "kv", ("u8", "e4m3"), (None, None, ROW656), (None, None, 1, ROW656))
        b.kv_format = _libmla.KV_E4M3_656
    else:
        arrays.require(seen, "kv", _KV_FORMATS, (None, None, WIDTH), (None, None, 1, WIDTH))
        b.kv_format = _KV_FORMATS[seen.dtype]
    if seen.strides[-1] != seen.item:
        raise invalid("kv", f"the elements of a row must be adjacent; its strides are {list(seen.strides)} bytes")
    b.pages, b.page_size = seen.shape[:2]
    # 0 is mla.h's "packed", so it must not come from an array that repeats a page or a row.
    for name, axis in (("page_stride", 0), ("row_stride", 1)):
        if seen.shape[axis] > 1:
            if seen.strides[axis] <= 0:
                raise invalid("kv", f"its {name} must be positive, not {seen.strides[axis]} bytes")
            setattr(b, name, seen.strides[axis])
    d.place(b.kv, kv, seen, "kv")


def _tree(d, mask, rows):
    """uint64, or torch's int64 with the same bits: [rows], or [B, q_len] as q has it."""
    total = (int(np.prod(rows, dtype=object)),)
    seen = arrays.view(mask, "mask")
    if seen.dtype not in ("u64", "i64"):
        raise invalid("mask", f"a tree mask must be uint64 (or int64 with the same bits), not {seen.dtype}")
    d.small(mask, "tree_mask", ("u64", "i64"), total, rows)


def _scale(d, scale, field):
    """A number, or an array of one fp32."""
    target = getattr(d.batch, field)
    if isinstance(scale, (int, float, np.floating)) and not isinstance(scale, bool):
        target.kind, target.value = _libmla.SCALE_VALUE, float(scale)
        return
    seen = d.see(scale, field)
    arrays.require(seen, field, ("f32",), (), (1,))
    if d.memory.locate(seen) or seen.kind == "cuda":
        target.kind = _libmla.SCALE_TENSOR
        d.place(target.tensor, scale, seen, field)
    elif d.copy_metadata:
        d.copies.append((field, scale))
    else:
        raise invalid(field, NOT_SHARED)


def _output(d, q, q_seen, field, dtype, shape):
    """A new output of q's kind on q's device."""
    if q_seen.kind == "cuda":
        raise invalid(field, "it is required where q is neither a numpy array nor a torch tensor")
    size = int(np.prod(shape, dtype=object)) * arrays.ITEM_BYTES[dtype]
    return d.memory.lease(size, q_seen.device).array(q_seen.kind, dtype, shape)
