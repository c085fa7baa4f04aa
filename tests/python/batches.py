"""Random batches for the package's tests, and the oracle's verdict on what came out."""
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "oracle"))
import floats  # noqa: E402
import oracle  # noqa: E402
from safetensors_io import Tensor  # noqa: E402

import mlad  # noqa: E402

FORMATS = {"bf16": (floats.BF16, mlad.bfloat16), "fp16": (floats.FP16, np.float16),
           "e4m3": (floats.E4M3, mlad.float8_e4m3)}


def bits(dtype, values):
    """N(0,1)-like values as the bits of a type."""
    return floats.encode(FORMATS[dtype][0], values)


def rows656(rng, pages, page_size):
    kv = np.zeros((pages, page_size, 656), np.uint8)
    kv[..., :512] = bits("e4m3", rng.standard_normal((pages, page_size, 512)))
    kv[..., 512:528] = rng.uniform(0.5, 2, (pages, page_size, 4)).astype("<f4").view(np.uint8)
    kv[..., 528:] = bits("bf16", rng.standard_normal((pages, page_size, 64))).view(np.uint8)
    return kv


def verdict(q, q_type, kv, kv_type, out, lse, out_type, block_table, seqlens, *, softmax_scale, **given):
    """None if out and lse (raw bits, [rows, H, ..]) are what the oracle allows, else what is wrong."""
    def flat(a, raw):
        return np.ascontiguousarray(a).view(raw)
    tensors = {"q": Tensor(FORMATS[q_type][0].name, flat(q, FORMATS[q_type][0].bits).reshape(-1, q.shape[-2], 576)),
               "kv": Tensor("U8", kv) if kv_type == "656" else
               Tensor(FORMATS[kv_type][0].name, flat(kv, FORMATS[kv_type][0].bits)),
               "block_table": Tensor("I32", np.asarray(block_table)), "seqlens": Tensor("I32", np.asarray(seqlens))}
    metadata = {"softmax_scale": repr(float(softmax_scale)), "out_dtype": out_type}
    names = {"cu_q": "I32", "tree_mask": "U64", "sink": "F32"}
    for name, value in given.items():
        if name in names:
            tensors[name] = Tensor(names[name], np.asarray(value))
        elif name.endswith("_scale"):
            tensors[name] = Tensor("F32", np.array([value], np.float32))
        else:
            metadata[name] = str(value)
    batch = oracle.Batch(tensors, metadata)
    heads = q.shape[-2]
    results = {"out": Tensor(FORMATS[out_type][0].name, flat(out, np.uint16).reshape(-1, heads, 512)),
               "lse": Tensor("F32", np.asarray(lse).reshape(-1, heads))}
    problems = [v.problem for v in oracle.compare(batch, oracle.decode(batch), results) if v.problem]
    return problems or None
