"""A PyTorch process whose decodes run in the order of its stream, eagerly and from CUDA graphs; one line of JSON.

usage: torch_stream.py, with MLAD_SOCKET, MLAD_DEVICE, on which the keys lie, STREAM_GPU, where all else does"""
import json
import os

import mlad
import torch
from mlad.flash_mla import flash_mla_with_kvcache, get_mla_metadata

LAYERS, ROUNDS, SCALE = 4, 5, 192 ** -0.5
ordinals = {f"GPU-{torch.cuda.get_device_properties(i).uuid}": i for i in range(torch.cuda.device_count())}
kv_at, here = ordinals[os.environ["MLAD_DEVICE"]], ordinals[os.environ["STREAM_GPU"]]
torch.cuda.set_device(here)
torch.manual_seed(5)
client = mlad.Client(name="gpu-suite torch stream")
mlad.set_default_client(client, here)

table = torch.arange(8, dtype=torch.int32, device="cuda").view(2, 4)
lengths = torch.tensor([200, 131], dtype=torch.int32, device="cuda")
caches = [torch.randn(8, 64, 1, 576, dtype=torch.bfloat16, device=f"cuda:{kv_at}") for _ in range(LAYERS)]
queries = torch.randn(ROUNDS, 2, 1, 16, 576, dtype=torch.bfloat16, device="cuda")
q = torch.empty_like(queries[0])
torch.cuda.synchronize(kv_at)


def model():
    """Each layer's query is made by a kernel from the one before, and its output read by one."""
    total, x = torch.zeros(2, 1, 16, 512, device="cuda"), q
    for kv in caches:
        x = x * 1
        out, _ = flash_mla_with_kvcache(x, kv, table, lengths, 512, get_mla_metadata()[0], softmax_scale=SCALE,
                                        causal=True)
        total = total + out.float()
    return total


def expected(k):
    total = torch.zeros(2, 1, 16, 512, device="cuda")
    for kv in caches:
        out = client.decode(queries[k], kv, table, lengths, softmax_scale=SCALE, return_lse=False)
        total += out.float()
    return total


wanted = [expected(k) for k in range(ROUNDS)]
worst = {"eager": 0.0, "graph": 0.0}
for k in range(ROUNDS):
    q.copy_(queries[k])
    worst["eager"] = max(worst["eager"], float((model() - wanted[k]).abs().max().nan_to_num(1e9)))
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    result = model()
for k in range(ROUNDS):
    q.copy_(queries[k])
    graph.replay()
    worst["graph"] = max(worst["graph"], float((result - wanted[k]).abs().max().nan_to_num(1e9)))
torch.cuda.synchronize()
print(json.dumps({"order": client.order(), "worst": worst, "largest": float(wanted[0].abs().max())}), flush=True)
