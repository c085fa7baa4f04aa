"""Makes capture files: a systematic grid over the contract's fields and edges, then seeded random batches.

Everything that no query may reach is poison: key slots that no row sees hold NaN, infinities and huge values, and
block-table entries of pages that nobody needs hold nonsense ids. Pages are shuffled, and some belong to nobody.
"""
import itertools
from dataclasses import dataclass
from typing import Optional

import numpy as np

import floats
import oracle
from floats import BF16, E4M3, FP16
from safetensors_io import Tensor, tensor

# name: type of q, type of kv (None: 656-byte rows), scales a capture may carry, out types
KINDS = {
    "bf16": (BF16, BF16, (), ("bf16",)),
    "fp16": (FP16, FP16, (), ("fp16",)),
    "fp8": (E4M3, E4M3, ("q_scale", "k_scale", "v_scale"), ("bf16", "fp16")),
    "bf16/fp8": (BF16, E4M3, ("k_scale", "v_scale"), ("bf16",)),
    "bf16/656": (BF16, None, (), ("bf16",)),
}
MASKS = ("none", "causal", "tree")
BOGUS_PAGES = (-1, -2**31, 2**31 - 1, 1 << 20, -7)


@dataclass
class Spec:
    """What varies between captures. Lengths are global (they differ from the local ones under DCP)."""
    name: str
    kind: str = "bf16"
    heads: int = 3
    q: tuple = (4,)              # query tokens of each request
    k: tuple = (20,)             # keys of each request
    page: int = 16
    mask: str = "causal"
    window: Optional[int] = None
    dcp: tuple = (1, 0, 1)       # world, rank, interleave
    sink: Optional[str] = None   # None, "normal", "large" or "infinite" (some heads -inf)
    base2: bool = False
    scales: tuple = ()           # names of the scale tensors present
    out: Optional[str] = None    # out_dtype, where stated
    deterministic: Optional[bool] = None
    softmax_scale: float = 0.0417
    ragged: Optional[bool] = None    # carry cu_q; None: only where the lengths differ
    extra_columns: int = 0           # unused columns of the block table
    spare_pages: int = 3
    shared_pages: bool = False       # all requests read one list of pages
    poison: bool = True          # without it, every slot and every table entry is an ordinary one
    value: str = "normal"            # "normal", "zero", or "offset" (a mean that does not vanish)
    skew: int = 0                    # alignment of the file's data, modulo 8
    explicit: bool = False           # write the metadata that equal their defaults
    seed: int = 0


class Capture:
    """A capture ready to be written, and the batch the oracle makes of it."""

    def __init__(self, name, tensors, metadata, skew=0):
        self.name, self.tensors, self.metadata, self.skew = name, tensors, metadata, skew

    def batch(self):
        return oracle.Batch(self.tensors, self.metadata)


def build(spec):
    """The capture of a spec; the same spec gives the same bytes."""
    rng = np.random.default_rng([spec.seed, *spec.name.encode()])
    q_type, kv_type, allowed, _ = KINDS[spec.kind]
    assert set(spec.scales) <= set(allowed) and len(spec.q) == len(spec.k), spec
    rows, requests = sum(spec.q), len(spec.q)
    scales = {name: np.float32(rng.uniform(0.02, 0.2)) for name in spec.scales}

    local = [oracle.local_count(G, *spec.dcp) if G > 0 else 0 for G in spec.k]
    wanted = [-(-n // spec.page) for n in local]
    total = (max(wanted, default=0) if spec.shared_pages else sum(wanted)) + spec.spare_pages
    ids = [int(x) for x in rng.permutation(total)]
    columns = max(wanted, default=0) + spec.extra_columns
    block_table = rng.choice(spec.poison * BOGUS_PAGES + tuple(range(total)), (requests, columns)).astype(np.int32)

    metadata = make_metadata(spec)
    tensors = {"block_table": Tensor("I32", block_table),
               "seqlens": tensor("I32", spec.k),
               "q": Tensor(q_type.name, floats.encode(
                   q_type, draw(rng, spec, (rows, spec.heads, 576)) / scales.get("q_scale", 1)))}
    if spec.ragged or (spec.ragged is None and len(set(spec.q)) > 1):
        tensors["cu_q"] = tensor("I32", np.concatenate([[0], np.cumsum(spec.q)]))
    if spec.mask == "tree":
        tensors["tree_mask"] = Tensor("U64", rng.integers(0, 2**64, rows, np.uint64))
    if spec.sink:
        sink = rng.standard_normal(spec.heads) + (6 if spec.sink == "large" else 0)
        if spec.sink == "infinite":
            sink[::2] = -np.inf
        tensors["sink"] = tensor("F32", sink)
    tensors.update({name: tensor("F32", [value]) for name, value in scales.items()})

    # Real keys only where some row sees them, unless the spec asks for no poison.
    tensors["kv"] = make_kv(rng, spec, kv_type, total, scales.get("k_scale", 1))
    batch = oracle.Batch(tensors, metadata)
    used = np.zeros((total, spec.page), bool)
    for b in range(requests):
        mine = ids[:wanted[b]] if spec.shared_pages else [ids.pop() for _ in range(wanted[b])]
        seen = np.flatnonzero(batch.visibility(b).any(axis=0)) if local[b] else []
        for c in (seen if spec.poison else range(local[b])):
            block_table[b, c // spec.page] = mine[c // spec.page]
            used[mine[c // spec.page], c % spec.page] = True
    if spec.poison:
        poison(rng, tensors["kv"], used)
    return Capture(spec.name, tensors, metadata, spec.skew)


def make_metadata(spec):
    stated = {"mask": spec.mask, "lse_base": "2" if spec.base2 else "e", "dcp_world": str(spec.dcp[0]),
              "dcp_rank": str(spec.dcp[1]), "dcp_interleave": str(spec.dcp[2]), "window": str(spec.window or "none"),
              "deterministic": str(int(bool(spec.deterministic))), "out_dtype": spec.out or KINDS[spec.kind][3][0]}
    absent = {"mask": "causal", "lse_base": "e", "dcp_world": "1", "dcp_rank": "0", "dcp_interleave": "1",
              "window": "none", "deterministic": "0", "out_dtype": KINDS[spec.kind][3][0]}
    if not spec.explicit:
        stated = {name: text for name, text in stated.items() if text != absent[name]}
    return {"softmax_scale": repr(spec.softmax_scale), **stated}


def draw(rng, spec, shape):
    if spec.value == "zero":
        return np.zeros(shape)
    return rng.standard_normal(shape) + (0.5 if spec.value == "offset" else 0)


def make_kv(rng, spec, kv_type, pages, k_scale):
    values = draw(rng, spec, (pages, spec.page, 576))
    if kv_type is not None:
        return Tensor(kv_type.name, floats.encode(kv_type, values / k_scale))
    rows = np.empty((pages, spec.page, 656), np.uint8)
    groups = values[..., :512].reshape(pages, spec.page, 4, 128)
    scales = (np.maximum(np.abs(groups).max(axis=-1), 1e-3) / 448 * rng.uniform(1, 3)).astype("<f4")
    rows[..., :512] = floats.encode(E4M3, groups / scales[..., None]).reshape(pages, spec.page, 512)
    rows[..., 512:528] = scales.view(np.uint8)
    rows[..., 528:] = floats.encode(BF16, values[..., 512:]).view(np.uint8)
    return Tensor("U8", rows)


def poison(rng, kv, used):
    """Overwrite every slot that is not in use with NaN, infinities and the largest values, by whole rows."""
    bits = {"BF16": (0x7fc0, 0x7f80, 0xff80, 0x7f7f, 0xffff), "F16": (0x7e00, 0x7c00, 0xfc00, 0x7bff, 0xffff),
            "F8_E4M3": (0x7f, 0xff, 0x7e), "U8": (0x7f, 0xff)}[kv.dtype]
    unused = ~used
    kv.data[unused] = rng.choice(np.array(bits, kv.data.dtype), (int(unused.sum()), 1))


# The grid.

def edges(q):
    return tuple(sorted({0, 1, 2, max(q - 1, 0), q, q + 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 200}))


def grid():
    """Every field and every edge, one at a time, with the others turning."""
    kinds, masks = itertools.cycle(KINDS), itertools.cycle(MASKS)
    for kind, mask, q in itertools.product(KINDS, MASKS, (1, 2, 4, 8)):
        k = edges(q)
        yield Spec(f"edges {kind} {mask} q={q}", kind, q=(q,) * len(k), k=k, mask=mask,
                   page=(16, 64, 1, 32)[(q + len(kind)) % 4], heads=(2, 3)[q % 2])
    for kind, heads in itertools.product(KINDS, (1, 3, 6, 12, 16, 24, 48, 128)):
        yield Spec(f"heads {kind} {heads}", kind, heads, q=(3, 0, 1, 5), k=(70, 9, 33, 4), mask=next(masks), page=32,
                   extra_columns=2)
    for kind, page in itertools.product(KINDS, (1, 2, 3, 7, 16, 32, 64, 100, 256)):
        yield Spec(f"pages {kind} {page}", kind, 4, q=(2, 2, 2), k=(page, page + 1, min(3 * page + 2, 300)),
                   mask=next(masks), page=page, spare_pages=2, extra_columns=page % 2)
    for world, interleave in itertools.product((1, 2, 3, 4), (1, 2, 3, 4, 5)):
        for rank in {0, world - 1, interleave % world}:
            yield Spec(f"dcp {world},{rank},{interleave}", next(kinds), 3, q=(4, 4, 4, 4, 4, 2, 8),
                       k=(0, 3, 4, 5, 41, 60, 77), mask=next(masks), page=(4, 16, 7)[interleave % 3],
                       dcp=(world, rank, interleave), sink=(None, "normal")[interleave % 2], explicit=rank == 0,
                       window=(None, None, 9)[(world + interleave) % 3])
    for i, (window, mask) in enumerate(itertools.product((1, 2, 3, 15, 16, 17, 63, 64, 65, 100, 300), MASKS)):
        yield Spec(f"window {window} {mask}", next(kinds), 3, q=(4, 1, 6, 4), k=(130, 17, 5, 64), mask=mask, page=16,
                   window=window, dcp=((1, 0, 1), (2, 1, 1), (3, 0, 4))[i % 3])
    for kind, sink, base2 in itertools.product(KINDS, ("normal", "large", "infinite"), (False, True)):
        yield Spec(f"sink {sink} {kind} base {'2' if base2 else 'e'}", kind, 5, q=(4, 4, 4, 4), k=(0, 2, 40, 129),
                   mask=next(masks), sink=sink, base2=base2)
    for kind, base2 in itertools.product(KINDS, (False, True)):
        for n in range(len(KINDS[kind][2]) + 1):
            for scales in itertools.combinations(KINDS[kind][2], n):
                for out in KINDS[kind][3]:
                    yield Spec(f"scales {kind} {'+'.join(scales)} {out} {base2}", kind, 4, q=(3, 3, 3), k=(2, 31, 100),
                               mask=next(masks), scales=scales, out=out, base2=base2)
    for kind, mask in itertools.product(KINDS, MASKS):
        yield Spec(f"long q {kind} {mask}", kind, 2, q=(33, 64, 0, 1, 63), k=(40, 65, 3, 20, 62), mask=mask, page=64)
        yield Spec(f"deterministic {kind} {mask}", kind, 4, q=(4, 2), k=(300, 40), mask=mask, page=64,
                   deterministic=True)
        yield Spec(f"long k {kind} {mask}", kind, 3, q=(2, 5), k=(700, 1500), mask=mask, page=64)
    yield from specials()


def specials():
    for kind in KINDS:
        out = KINDS[kind][3][-1]
        yield Spec(f"padding {kind}", kind, 4, q=(1,) * 6, k=(0,) * 6, out=out)
        yield Spec(f"no query rows but one {kind}", kind, 4, q=(0, 0, 1, 0), k=(5, 0, 7, 300), out=out)
        yield Spec(f"no query rows at all {kind}", kind, 4, q=(0, 0), k=(5, 0), ragged=True)
        yield Spec(f"no keys, columns or pages {kind}", kind, 4, q=(2, 1), k=(0, 0), spare_pages=0, sink="normal")
        yield Spec(f"explicit cu_q {kind}", kind, 4, q=(2, 2), k=(9, 70), ragged=True, explicit=True)
        yield Spec(f"K below q {kind}", kind, 3, q=(8, 5, 7, 64), k=(3, 1, 0, 10), mask="tree", window=2)
        yield Spec(f"shared pages {kind}", kind, 4, q=(4, 4, 2), k=(90, 61, 33), shared_pages=True)
        yield Spec(f"sharp softmax {kind}", kind, 4, q=(4, 4), k=(50, 200), softmax_scale=0.5)
        yield Spec(f"flat softmax {kind}", kind, 4, q=(4, 4), k=(50, 200), softmax_scale=1e-6, value="offset")
        yield Spec(f"zero values {kind}", kind, 4, q=(4, 4), k=(50, 3), value="zero", sink="normal")
        yield Spec(f"values with a mean {kind}", kind, 4, q=(3, 4), k=(51, 129), value="offset", mask="none")
        for skew in (1, 2, 4):
            yield Spec(f"unaligned by {skew} {kind}", kind, 3, q=(2, 1), k=(20, 5), skew=skew, mask="tree",
                       sink="normal")
    yield Spec("many requests", "bf16", 2, q=(1, 2, 0, 1) * 40, k=tuple(i % 37 for i in range(160)), page=16)
    yield Spec("one head one token one key", "bf16", 1, q=(1,), k=(1,), page=1, spare_pages=0)


def random_spec(seed):
    """One random point of the contract, sized so that fp64 in numpy stays quick."""
    rng = np.random.default_rng(seed)

    def pick(*options):
        return options[int(rng.integers(len(options)))]

    kind = pick(*KINDS)
    heads = pick(1, 2, 3, 5, 6, 8, 12, 16, 24, 48, 96, 128, int(rng.integers(1, 129)))
    requests = int(rng.integers(1, 9))
    if rng.random() < 0.4:
        q = (int(rng.integers(1, 9)),) * requests
    else:
        q = tuple(pick(0, 1, 2, 3, 4, 5, 6, 7, 8, int(rng.integers(65))) for _ in range(requests))
    if sum(q) == 0:
        q = (1,) + q[1:]
    budget = 60000 // (heads * sum(q)) + 4
    k = tuple(int(min(pick(*edges(n), int(rng.integers(0, 1500))), max(budget, n + 1))) for n in q)
    world = pick(1, 1, 2, 3, 4)
    scales = tuple(name for name in KINDS[kind][2] if rng.random() < 0.5)
    return Spec(f"random {seed}", kind, heads, q, k, pick(1, 2, 3, 7, 16, 32, 64, 100, 256), pick(*MASKS),
                pick(None, None, int(rng.integers(1, 301)), int(rng.integers(1, 12))),
                (world, int(rng.integers(world)), int(rng.integers(1, 6))), pick(None, "normal", "large"),
                pick(False, True), scales, pick(None, *KINDS[kind][3]), pick(None, True),
                float(np.exp(rng.uniform(np.log(0.01), np.log(0.12)))), pick(None, True), int(rng.integers(0, 4)),
                int(rng.integers(1, 5)), False, True, pick("normal", "normal", "offset"), int(rng.integers(0, 8)),
                pick(False, True))


def all_specs(random_count=90):
    yield from grid()
    for seed in range(random_count):
        yield random_spec(seed)
