"""What one decode means: the project's contract in numpy and fp64, by brute force.

Written from the contract's wording and from nothing else; the daemon's code was not consulted. Which keys a token
sees is asked key by key of visible(), a predicate on global indices; the rest is textbook softmax. Beside each
request's exact result stands its accuracy bar: the SNR of the same arithmetic with only P and `out` rounded.
"""
from functools import lru_cache
from typing import NamedTuple, Optional

import numpy as np

import floats
from floats import BF16, E4M3, FP16

LATENT, WIDTH, ROW656 = 512, 576, 656
SLACK_DB = {BF16: 1.0, FP16: 1.0, E4M3: 2.0}      # by q's type
LSE_BOUND = {BF16: 2e-5, FP16: 2e-5, E4M3: 1e-3}


# Which keys a token sees.

def clamp(x, low, high):
    return max(low, min(x, high))


def local_count(G, world, rank, interleave):
    """How many of G global keys live on this rank."""
    block = world * interleave
    return G // block * interleave + clamp(G % block - rank * interleave, 0, interleave)


def global_index(c, world, rank, interleave):
    """The global index of the rank's key at local index c."""
    return (c // interleave) * world * interleave + rank * interleave + c % interleave


def visible(g, t, q, G, mask, bits, window):
    """Whether query token t of q sees the global key g of G. bits: the token's tree mask. window: None or >= 1."""
    if g < 0 or g >= G:
        return False
    bound = G
    if mask == "causal":
        bound = clamp(G - (q - 1) + t, 0, G)
        if not g < bound:
            return False
    if mask == "tree" and not g < G - q:
        i = g - (G - q)
        if not bits >> i & 1:
            return False
    return window is None or g >= bound - window


@lru_cache(maxsize=4096)
def visibility(q, G, mask, bits, window, world, rank, interleave):
    """[q, local keys] of booleans. bits: one tree mask for each token, or None."""
    local = [global_index(c, world, rank, interleave) for c in range(local_count(G, world, rank, interleave))]
    table = np.zeros((q, len(local)), bool)
    for t in range(q):
        for c, g in enumerate(local):
            table[t, c] = visible(g, t, q, G, mask, bits[t] if bits else 0, window)
    return table


# A batch, as a capture file states it.

class Batch:
    """One capture's tensors and metadata, with the contract's defaults filled in."""

    def __init__(self, tensors, metadata):
        def array(name):
            return tensors[name].data if name in tensors else None

        def scale(name, otherwise):
            return float(tensors[name].data[0]) if name in tensors else otherwise

        self.q_type = floats.BY_NAME[tensors["q"].dtype]
        self.q, self.kv = array("q"), array("kv")
        self.rows656 = tensors["kv"].dtype == "U8"
        self.kv_type = E4M3 if self.rows656 else floats.BY_NAME[tensors["kv"].dtype]
        self.block_table, self.seqlens = array("block_table"), array("seqlens")
        self.tree_mask, self.sink = array("tree_mask"), array("sink")
        self.requests, self.heads = len(self.seqlens), self.q.shape[1]
        self.pages, self.page_size = self.kv.shape[:2]
        cu_q = array("cu_q")
        if cu_q is None:
            uniform = self.q.shape[0] // self.requests
            cu_q = np.arange(self.requests + 1) * uniform
        self.cu_q = [int(x) for x in cu_q]
        self.q_scale, self.k_scale = scale("q_scale", 1.0), scale("k_scale", 1.0)
        self.v_scale = scale("v_scale", self.k_scale)
        self.softmax_scale = float(metadata["softmax_scale"])
        self.mask = metadata.get("mask", "causal")
        self.base2 = metadata.get("lse_base", "e") == "2"
        self.dcp = tuple(int(metadata.get("dcp_" + k, d)) for k, d in (("world", 1), ("rank", 0), ("interleave", 1)))
        window = metadata.get("window", "none")
        self.window = None if window == "none" else int(window)
        default_out = {BF16: "bf16", FP16: "fp16", E4M3: "bf16"}[self.q_type]
        self.out_type = {"bf16": BF16, "fp16": FP16}[metadata.get("out_dtype", default_out)]

    def q_len(self, b):
        return self.cu_q[b + 1] - self.cu_q[b]

    def visibility(self, b):
        bits = None
        if self.mask == "tree":
            bits = tuple(int(x) for x in self.tree_mask[self.cu_q[b]:self.cu_q[b + 1]])
        return visibility(self.q_len(b), int(self.seqlens[b]), self.mask, bits, self.window, *self.dcp)

    def key(self, page, slot):
        """One key of 576 values, dequantised except for the scales that hold for a whole tensor."""
        row = self.kv[page, slot]
        if not self.rows656:
            return floats.decode(self.kv_type, row)
        scales = row[512:528].copy().view("<f4").astype(np.float64)
        latent = floats.decode(E4M3, row[:512]) * np.repeat(scales, 128)
        return np.concatenate([latent, floats.decode(BF16, row[528:].copy().view("<u2"))])


class Result(NamedTuple):
    failure: Optional[str]               # why the request must fail; the rest is None then
    out: Optional[np.ndarray] = None     # [q, H, 512] fp64
    lse: Optional[np.ndarray] = None     # [q, H] fp64
    model: Optional[np.ndarray] = None   # out of the arithmetic that sets the bar
    bar: Optional[float] = None          # dB, the slack already taken off
    tainted: bool = False                # sees a non-finite key: any value may come out


def snr(reference, out):
    """10 log10(signal / noise), inf where they agree, -inf where out is not finite."""
    if not np.all(np.isfinite(out)):
        return -np.inf
    signal, noise = np.sum(reference**2), np.sum((reference - out)**2)
    if noise == 0:
        return np.inf
    return 10 * np.log10(signal / noise) if signal > 0 else -np.inf


def decode_request(batch, b):
    """The meaning of request b: its exact result, and the bar."""
    q, G, H = batch.q_len(b), int(batch.seqlens[b]), batch.heads
    if G < 0:
        return Result("negative length")
    local = local_count(G, *batch.dcp)
    if local > batch.block_table.shape[1] * batch.page_size:
        return Result("length beyond the block table")

    sees = batch.visibility(b)
    keys = np.zeros((local, WIDTH))   # a key that nobody sees stays zero: it must not matter
    for c in np.flatnonzero(sees.any(axis=0)):
        page = int(batch.block_table[b, c // batch.page_size])
        if page < 0 or page >= batch.pages:
            return Result(f"page id {page} out of range")
        keys[c] = batch.key(page, c % batch.page_size)

    queries = floats.decode(batch.q_type, batch.q[batch.cu_q[b]:batch.cu_q[b + 1]]).reshape(q * H, WIDTH)
    if not (np.isfinite(keys).all() and np.isfinite(queries).all()):
        return Result(None, tainted=True)
    row_sees = np.repeat(sees, H, axis=0)
    scores = batch.softmax_scale * batch.k_scale * batch.q_scale * (queries @ keys.T)
    scores = np.where(row_sees, scores, -np.inf)
    top = np.max(scores, axis=1, initial=-np.inf)
    seeing = np.isfinite(top)
    p = np.exp(scores - np.where(seeing, top, 0.0)[:, None])      # relative to the row's maximum
    sink = np.full(q * H, -np.inf)
    if batch.sink is not None and batch.dcp[1] == 0:
        sink = np.tile(batch.sink.astype(np.float64), q)
    with np.errstate(divide="ignore"):
        lse = np.logaddexp(top + np.log(np.sum(p, axis=1)), sink)
    weight = np.where(seeing, np.exp(np.where(seeing, top, 0.0) - np.where(seeing, lse, 0.0)), 0.0)

    values = keys[:, :LATENT] * batch.v_scale
    out = weight[:, None] * (p @ values)
    if batch.q_type is E4M3:
        rounded_p = floats.round_to(E4M3, p * 256) / 256
    else:
        rounded_p = floats.round_to(batch.q_type, p)
    model = floats.round_to(batch.out_type, weight[:, None] * (rounded_p @ values))
    shape = (q, H, LATENT)
    return Result(None, out.reshape(shape), (lse / np.log(2) if batch.base2 else lse).reshape(q, H),
                  model.reshape(shape), snr(out, model) - SLACK_DB[batch.q_type])


def decode(batch):
    return [decode_request(batch, b) for b in range(batch.requests)]


# The comparison.

class Verdict(NamedTuple):
    request: int
    problem: Optional[str]   # None: right
    snr: float = np.inf
    bar: float = np.inf
    lse_error: float = 0.0   # as a fraction of what is allowed


def compare(batch, expected, tensors):
    """One verdict for each request of a result file; requests that must fail and tainted ones are left out."""
    out, lse = tensors["out"], tensors["lse"]
    shape = (batch.q.shape[0], batch.heads, LATENT)
    if out.dtype != batch.out_type.name or out.data.shape != shape:
        return [Verdict(-1, f"out is {out.dtype} {out.data.shape}, not {batch.out_type.name} {shape}")]
    if lse.dtype != "F32" or lse.data.shape != shape[:2]:
        return [Verdict(-1, f"lse is {lse.dtype} {lse.data.shape}")]
    verdicts = []
    for b, want in enumerate(expected):
        rows = slice(batch.cu_q[b], batch.cu_q[b + 1])
        if want.failure is None and not want.tainted:
            verdicts.append(judge(b, batch, want, floats.decode(batch.out_type, out.data[rows]),
                                  lse.data[rows].astype(np.float64)))
    return verdicts


def judge(b, batch, want, out, lse):
    """The contract's accuracy section, for one request."""
    quality = snr(want.out, out)
    finite = np.isfinite(want.lse)
    allowed = LSE_BOUND[batch.q_type] * np.maximum(np.abs(want.lse), 1)
    with np.errstate(invalid="ignore"):
        error = np.where(finite, np.abs(lse - want.lse) / allowed, np.where(lse == want.lse, 0.0, np.inf))
    error = np.where(np.isnan(error), np.inf, error)
    worst = float(np.max(error, initial=0.0))
    problem = None
    if not quality >= want.bar:
        problem = f"out has {quality:.2f} dB, the bar is {want.bar:.2f}"
    elif not worst <= 1:
        t, h = np.unravel_index(np.argmax(error), error.shape)
        problem = f"lse[{t},{h}] is {lse[t, h]:.7g}, not {want.lse[t, h]:.7g} ({worst:.3g} of the allowed error)"
    return Verdict(b, problem, quality, want.bar, worst)
