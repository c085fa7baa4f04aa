"""What one decode means, in torch and fp64, vectorised: kernels/CONTRACT.md, and the accuracy bar that it sets.

The same as tests/oracle/oracle.py, which asks key by key and is too slow for a GPU's batches; test_reference.py holds
the two together."""
import math
from typing import NamedTuple, Optional

import torch

SLACK_DB = {torch.bfloat16: 1.0, torch.float16: 1.0, torch.float8_e4m3fn: 2.0}      # by q's type
LSE_BOUND = {torch.bfloat16: 2e-5, torch.float16: 2e-5, torch.float8_e4m3fn: 1e-3}


def local_count(length, dcp):
    """How many of `length` global keys live on the rank."""
    world, rank, interleave = dcp
    block = world * interleave
    return length // block * interleave + min(max(length % block - rank * interleave, 0), interleave)


def visibility(q_len, length, mask, bits, window, dcp, device):
    """[q_len, local keys] of booleans. bits: int64 tree masks [q_len]; window 0: none."""
    world, rank, interleave = dcp
    c = torch.arange(local_count(length, dcp), device=device)
    g = (c // interleave) * world * interleave + rank * interleave + c % interleave
    t = torch.arange(q_len, device=device)[:, None]
    bound = torch.full_like(t, length)
    if mask == "causal":
        bound = (length - (q_len - 1) + t).clamp(0, length)
    sees = g < bound
    if mask == "tree":
        i = g - (length - q_len)
        sees = sees & ((i < 0) | ((bits[:, None] >> i.clamp(0, 63)) & 1 == 1))
    return sees & (g >= bound - window) if window else sees


def dequantised(rows):
    """fp64 of KV rows as they lie in memory: [n, 576] of a float type, or uint8 [n, 656]."""
    if rows.dtype != torch.uint8:
        return rows.float().double()
    scales = rows[:, 512:528].contiguous().view(torch.float32).double()
    latent = rows[:, :512].contiguous().view(torch.float8_e4m3fn).float().double() * scales.repeat_interleave(128, 1)
    return torch.cat([latent, rows[:, 528:].contiguous().view(torch.bfloat16).double()], 1)


class Want(NamedTuple):
    out: torch.Tensor           # [q, H, 512] fp64
    lse: torch.Tensor           # [q, H] fp64, in the base that was asked for
    blind: torch.Tensor         # [q, H]: rows that see no key
    bar: float                  # dB, the slack taken off


def decibels(want, out):
    """10 log10(signal / noise): inf where they agree, -inf where out is not finite."""
    out = out.double()
    if not bool(out.isfinite().all()):
        return -math.inf
    signal, noise = float(want.square().sum()), float((want - out).square().sum())
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def attention(q, keys, sees, *, softmax_scale, out_dtype, q_scale=1.0, k_scale=1.0, v_scale=None, sink=None,
              base2=False):
    """The Want of one request: q [q_len, H, 576] in its own type, keys [n, 576] fp64 (those nobody sees: zeros),
    sees [q_len, n]."""
    q_len, heads, _ = q.shape
    rows_see = sees.repeat_interleave(heads, 0)
    scores = softmax_scale * k_scale * q_scale * (q.float().double().reshape(q_len * heads, 576) @ keys.T)
    scores = scores.masked_fill(~rows_see, -math.inf)
    blind = ~rows_see.any(1)
    top = scores.amax(1) if keys.shape[0] else torch.full((q_len * heads,), -math.inf, dtype=torch.double,
                                                          device=q.device)
    safe = top.masked_fill(blind, 0)
    p = (scores - safe[:, None]).exp()
    lse = top + p.sum(1).log()
    lse = lse.masked_fill(blind, -math.inf)
    if sink is not None:
        lse = torch.logaddexp(lse, sink.double().repeat(q_len))
    weight = (safe - lse.masked_fill(blind, 0)).exp().masked_fill(blind, 0)
    values = keys[:, :512] * (k_scale if v_scale is None else v_scale)
    unit = 256 if q.dtype == torch.float8_e4m3fn else 1
    rounded = (p * unit).float().to(q.dtype).float().double() / unit
    out = weight[:, None] * (p @ values)
    model = (weight[:, None] * (rounded @ values)).to(out_dtype)
    shape = (q_len, heads)
    return Want(out.reshape(*shape, 512), (lse / math.log(2) if base2 else lse).reshape(shape), blind.reshape(shape),
                decibels(out, model) - SLACK_DB[q.dtype])


class Verdict(NamedTuple):
    problem: Optional[str]      # None: right
    db: float
    margin: float               # dB above the bar
    lse_share: float            # of the allowed error


def judge(want, out, lse, q_dtype):
    """The contract's accuracy section and its rows without keys, for one request."""
    quality = decibels(want.out, out)
    finite = want.lse.isfinite()
    error = (lse.double() - want.lse).abs() / (LSE_BOUND[q_dtype] * want.lse.abs().clamp(min=1))
    error = torch.where(finite, error, torch.where(lse.double() == want.lse, 0.0, math.inf)).nan_to_num(nan=math.inf)
    share = float(error.max()) if error.numel() else 0.0
    margin = math.inf if math.isinf(quality) and quality > 0 else quality - want.bar
    problem = None
    if not quality >= want.bar:
        problem = f"out has {quality:.2f} dB, the bar is {want.bar:.2f}"
    elif not share <= 1:
        at = int(error.argmax())
        problem = (f"lse row {at} is {float(lse.reshape(-1)[at]):.7g}, not {float(want.lse.reshape(-1)[at]):.7g} "
                   f"({share:.3g} of the allowed error)")
    elif bool(want.blind.any()) and bool((out[want.blind] != 0).any()):
        problem = "a row that sees no key is not 0"
    return Verdict(problem, quality, margin, share)
