"""reference.py, the contract in torch, against the oracle that was written from the contract's wording; on the CPU.

usage: test_reference.py, with a Python that has torch; 77 where it has none"""
import random
import sys
from pathlib import Path

try:
    import torch
except ImportError as error:
    print(f"SKIPPED: {error}")
    sys.exit(77)
import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "oracle")]
import oracle  # noqa: E402
from safetensors_io import Tensor  # noqa: E402
from suite import reference  # noqa: E402

TYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F8_E4M3": torch.float8_e4m3fn}


def bits(tensor):
    return tensor.contiguous().view(torch.uint8 if tensor.element_size() == 1 else torch.int16).numpy() \
        .view(np.uint8 if tensor.element_size() == 1 else np.uint16)


def compare(draw, q_name, kv_name, mask, window, dcp, base, sink):
    """One request, by both."""
    q_len, heads, page = draw.choice((1, 3, 6)), draw.choice((1, 3)), draw.choice((1, 5, 16))
    length = draw.randrange(60)
    count = reference.local_count(length, dcp)
    pages = -(-count // page) + 1
    q = torch.randn(q_len, heads, 576).to(TYPES[q_name])
    if kv_name == "U8":
        kv = torch.cat([torch.randn(pages, page, 512).to(torch.float8_e4m3fn).view(torch.uint8),
                        (torch.rand(pages, page, 4) + 0.5).view(torch.uint8),
                        torch.randn(pages, page, 64).bfloat16().view(torch.uint8)], 2)
    else:
        kv = torch.randn(pages, page, 576).to(TYPES[kv_name])
    table = np.arange(pages, dtype=np.int32)[None]
    masks = [draw.getrandbits(64) for _ in range(q_len)]
    tensors = {"q": Tensor(q_name, bits(q)), "kv": Tensor(kv_name, bits(kv)), "block_table": Tensor("I32", table),
               "seqlens": Tensor("I32", np.array([length], np.int32)),
               "tree_mask": Tensor("U64", np.array(masks, np.uint64))}
    scales = {}
    if kv_name == "F8_E4M3":
        scales = {"k_scale": 0.75, "v_scale": 1.5, **({"q_scale": 0.5} if q_name == "F8_E4M3" else {})}
    tensors.update({name: Tensor("F32", np.array([value], np.float32)) for name, value in scales.items()})
    sinks = torch.randn(heads) if sink else None
    if sink:
        tensors["sink"] = Tensor("F32", sinks.numpy())
    batch = oracle.Batch(tensors, {"softmax_scale": "0.1", "mask": mask, "lse_base": base, "dcp_world": str(dcp[0]),
                                   "dcp_rank": str(dcp[1]), "dcp_interleave": str(dcp[2]),
                                   "window": str(window) if window else "none"})
    want = oracle.decode_request(batch, 0)

    signed = torch.tensor([bits - (1 << 64) if bits >> 63 else bits for bits in masks])
    sees = reference.visibility(q_len, length, mask, signed, window, dcp, "cpu")
    assert np.array_equal(sees.numpy(), batch.visibility(0)), (q_len, length, mask, window, dcp)
    keys = reference.dequantised(kv.reshape(-1, kv.shape[2])[:count]) if count else torch.zeros(0, 576).double()
    keys = keys * sees.any(0)[:, None]
    got = reference.attention(q, keys, sees, softmax_scale=0.1, sink=sinks if dcp[1] == 0 else None, base2=base == "2",
                              out_dtype=torch.float16 if q_name == "F16" else torch.bfloat16, **scales)
    assert np.allclose(got.out.numpy(), want.out, rtol=1e-9, atol=1e-12)
    assert np.allclose(got.lse.numpy(), want.lse, rtol=1e-9, atol=1e-12)
    # A value that lies within fp32's rounding of a tie may fall to the other side of it here.
    assert got.bar == want.bar or abs(got.bar - want.bar) < 0.05, (got.bar, want.bar)
    assert reference.judge(got, torch.from_numpy(want.model), got.lse, q.dtype).problem is None


def main():
    torch.set_num_threads(1)
    torch.manual_seed(1)
    draw = random.Random(1)
    cases = 0
    for types in (("BF16", "BF16"), ("F16", "F16"), ("F8_E4M3", "F8_E4M3"), ("BF16", "F8_E4M3"), ("BF16", "U8")):
        for mask in ("none", "causal", "tree"):
            for window in (0, 1, 7):
                for dcp in ((1, 0, 1), (3, 1, 2), (2, 0, 1)):
                    compare(draw, *types, mask, window, dcp, draw.choice("e2"), draw.random() < 0.4)
                    cases += 1
    print(f"ok: {cases} requests, both references agree")


if __name__ == "__main__":
    main()
