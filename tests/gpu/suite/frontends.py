"""The Python package on CUDA tensors: the example, the drop-ins, streams under capture. (torch's own caching allocator
is under test in grid; here also tensors of its expandable segments, in a process of their own.)"""
import sys

from .part import Part

SCALE = 0.05
TABLE, LENGTHS = [[3, 0], [1, 2]], [20, 2]

EXPANDABLE = """
import torch, mlad
torch.cuda.set_device({ordinal})
with mlad.Client(device="{device}") as client:
    q = torch.ones(2, 2, 4, 576, device="cuda", dtype=torch.bfloat16)
    kv = torch.ones(64, 64, 576, device="cuda", dtype=torch.bfloat16)
    out = client.decode(q, kv, [[1, 2], [3, 4]], [100, 3], softmax_scale=0.05, return_lse=False)
    assert bool((out == 1).all()), out
    print("right")
"""


def example(part):
    """examples/deepseek_v3.py in a process of its own, where transformers is installed."""
    if not part.tree.example.exists():
        part.not_run("deepseek_v3.py", "it is not here")
        return
    status, output = part.command(sys.executable, "-c", "import transformers.models.deepseek_v3", timeout=60)
    if status != 0:
        part.not_run("deepseek_v3.py", f"transformers has no DeepSeek-V3 here: {output.strip()[-120:]}")
        return
    where = "cuda" if part.is_gpu else "cpu"
    status, output = part.command(sys.executable, part.tree.example, "--device", where, "--tokens",
                                  32 if part.is_gpu else 8, timeout=max(20, part.left - 15), MLAD_DEVICE=part.device)
    part.figures["deepseek_v3.py"] = output.strip().splitlines()[-3:]
    part.check(status == 0 and "ok: " in output, f"deepseek_v3.py ended with {status}: {output[-800:]}")


def expected(torch, q, kv, causal, window=0):
    """(out [B, Sq, H, 512], lse [B, Sq, H] natural, bars) in fp64."""
    from . import reference
    wants = []
    for b, length in enumerate(LENGTHS):
        keys = torch.cat([kv[page] for page in TABLE[b]])[:length].float().double()
        sees = reference.visibility(q.shape[1], length, "causal" if causal else "none", None, window, (1, 0, 1),
                                    q.device)
        wants.append(reference.attention(q[b], keys, sees, softmax_scale=SCALE, out_dtype=torch.bfloat16))
    return wants


def hold(part, wants, out, lse, dtype, what):
    from . import reference
    for b, want in enumerate(wants):
        verdict = reference.judge(want, out[b], lse[b].double(), dtype)
        part.check(verdict.problem is None, f"{what}, request {b}: {verdict.problem}")


def drop_ins(part, torch, where, client):
    from mlad.flash_mla import flash_mla_with_kvcache, get_mla_metadata
    from mlad.tokenspeed_mla import tokenspeed_mla_decode

    def random(shape, dtype):
        if where == "cpu":
            return client.empty(shape, dtype, like="torch").copy_(torch.randn(shape))
        return torch.randn(shape, device=where).to(dtype)
    table = torch.tensor(TABLE, dtype=torch.int32, device=where)
    lengths = torch.tensor(LENGTHS, dtype=torch.int32, device=where)
    q, kv = random((2, 4, 6, 576), torch.bfloat16), random((4, 16, 1, 576), torch.bfloat16)
    for causal in (True, False):
        out, lse = flash_mla_with_kvcache(q, kv, table, lengths, 512, get_mla_metadata()[0], softmax_scale=SCALE,
                                          causal=causal)
        part.check(out.device == q.device and lse.shape == (2, 6, 4), "flash_mla's outputs lie elsewhere")
        lse = lse.transpose(1, 2).masked_fill(lse.transpose(1, 2) == float("inf"), float("-inf"))
        hold(part, expected(torch, q, kv[:, :, 0], causal), out, lse, q.dtype, f"flash_mla, causal={causal}")
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        q, kv = random((2, 4, 6, 576), dtype), random((4, 1, 16, 576), dtype)
        for causal, left in ((True, -1), (False, -1), (True, 5)):
            out, lse = tokenspeed_mla_decode(q, kv, None, 512, 64, table, lengths, 32, SCALE, causal_mask=causal,
                                             window_left=left, return_lse=True)
            lse = lse.double() * torch.log(torch.tensor(2.0, dtype=torch.double))
            hold(part, expected(torch, q, kv[:, 0], causal, left + 1), out, lse, dtype,
                 f"tokenspeed, {dtype}, causal={causal}, window_left={left}")
    part.figures["drop_ins"] = "flash_mla, tokenspeed_mla"


def capture(part, torch, where, client):
    """A decode inside a CUDA graph's capture is refused by name, and the client goes on."""
    import mlad
    q = torch.ones(1, 1, 4, 576, device=where, dtype=torch.bfloat16)
    kv = torch.ones(2, 64, 576, device=where, dtype=torch.bfloat16)
    client.decode(q, kv, [[0, 1]], [70], softmax_scale=SCALE)
    refused = None
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        try:
            client.decode(q, kv, [[0, 1]], [70], softmax_scale=SCALE)
        except mlad.InvalidArgument as error:
            refused = error
        q.add_(0)       # a graph must hold something
    part.check(refused is not None and refused.field == "stream", f"capture was not refused: {refused!r}")
    torch.cuda.synchronize()
    out = client.decode(q, kv, [[0, 1]], [70], softmax_scale=SCALE, return_lse=False)
    part.check(bool((out == 1).all()), "a decode after a capture is wrong")


def expandable(part, torch):
    """Memory of PyTorch's expandable segments (cuMemCreate)."""
    code = EXPANDABLE.format(ordinal=part.ordinal(torch, part.device), device=part.device)
    setting = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    status, output = part.command(sys.executable, "-c", code, timeout=60, **setting)
    part.figures["expandable_segments"] = output.strip().splitlines()[-1:] if status else "right"
    part.check(status == 0 and "right" in output, f"expandable segments: ended with {status}: {output[-600:]}")


def python(part: Part):
    torch, where = part.torch()
    import mlad
    torch.manual_seed(1)
    with mlad.Client(device=part.device, name="gpu-suite python") as client:
        ordinal = part.ordinal(torch, part.device) if part.is_gpu else None
        mlad.set_default_client(client, ordinal)
        drop_ins(part, torch, where, client)
        if part.is_gpu:
            capture(part, torch, where, client)
            expandable(part, torch)
        else:
            part.not_run("capture, expandable segments", f"{part.device} is no GPU")
        mlad.set_default_client(None, ordinal)
    example(part)
