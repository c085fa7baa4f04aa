#!/usr/bin/env python3
"""Decode batches on a running mlad from this process, and check every one: `deploy/quickstart run` starts it.

First a real batch, one layer of DeepSeek-V3, against what the model itself computed. Then a speculative-decode step
of full size: several layers over one paged KV cache layout, each request with its last accepted token and drafts to
verify, against the fp64 device `reference`. Every batch is a capture file, so that any of them can be replayed by
hand: `mlactl decode FILE -o OUT --device cpu`.
"""
import argparse
import json
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

HEADS, WIDTH, LATENT, PAGE = 16, 576, 512, 64
CONTEXTS = (37, 130, 512, 777, 1024, 1900, 3001, 4096, 6000, 8192)
DRAFTS = (("uniform", (4,) * 10), ("ragged", (4, 1, 2, 6, 3, 1, 5, 4, 2, 8)))
LAYERS = 3           # of the uniform step; the ragged step is one layer
MODEL_FLOOR = 49     # dB, real layer: bf16 decode against the model's own fp32
BATCH_FLOOR = 52     # dB, worst request: rounding P and out to bf16 leaves 53 or more

DTYPES = {"BF16": "<u2", "I32": "<i4", "F32": "<f4"}


def write_capture(path, tensors, metadata):
    """A .safetensors file: header length, JSON header, data. tensors: name -> (dtype, array)."""
    header, offset = {"__metadata__": metadata}, 0
    for name, (dtype, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": data.shape, "data_offsets": (offset, offset + data.nbytes)}
        offset += data.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, data in tensors.values():
            data.tofile(file)


def read_tensors(path):
    """name -> fp32 or int32 array; bf16 is widened."""
    raw = Path(path).read_bytes()
    size, = struct.unpack_from("<Q", raw)
    tensors = {}
    for name, entry in json.loads(raw[8:8 + size]).items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            data = np.frombuffer(raw[8 + size + begin:8 + size + end], DTYPES[entry["dtype"]]).reshape(entry["shape"])
            tensors[name] = (data.astype(np.uint32) << 16).view(np.float32) if entry["dtype"] == "BF16" else data
    return tensors


def bf16(values):
    """fp32 rounded to bf16, nearest even, as bits."""
    bits = values.view(np.uint32)
    return ((bits + 0x7fff + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def decibels(reference, out):
    reference, out = reference.astype(np.float64), out.astype(np.float64)
    noise = np.sum((reference - out)**2)
    if not np.isfinite(noise):
        return -np.inf
    return 10 * np.log10(np.sum(reference**2) / noise) if noise else np.inf


def make_layer(path, rng, q_lens, page_ids):
    """One layer's batch: KV of its own in the step's pages, causal among the draft tokens."""
    wanted = [-(-k // PAGE) for k in CONTEXTS]
    block_table = np.full((len(CONTEXTS), max(wanted)), -1, np.int32)
    for b, (n, first) in enumerate(zip(wanted, np.cumsum([0] + wanted))):
        block_table[b, :n] = page_ids[first:first + n]
    tensors = {"q": ("BF16", bf16(rng.standard_normal((sum(q_lens), HEADS, WIDTH), np.float32))),
               "kv": ("BF16", bf16(rng.standard_normal((len(page_ids), PAGE, WIDTH), np.float32))),
               "block_table": ("I32", block_table),
               "seqlens": ("I32", np.array(CONTEXTS, np.int32))}
    if len(set(q_lens)) > 1:
        tensors["cu_q"] = ("I32", np.cumsum([0, *q_lens]).astype(np.int32))
    write_capture(path, tensors, {"softmax_scale": repr(192**-0.5), "mask": "causal"})


class Row:
    """The table, a line at a time as results come."""
    columns = (("batch", 22), ("requests", 10), ("tokens", 8), ("context", 12), ("SNR dB", 9), ("worst dB", 10),
               ("latency ms", 12), ("KV GB/s", 9))

    @classmethod
    def head(cls):
        print("".join(f"{name:>{width}}" if i else f"{name:<{width}}" for i, (name, width) in enumerate(cls.columns)))

    @classmethod
    def show(cls, *cells):
        print("".join(f"{cell:>{width}}" if i else f"{cell:<{width}}"
                      for i, (cell, (_, width)) in enumerate(zip(cells, cls.columns))), flush=True)


def main():
    parser = argparse.ArgumentParser(
        description="Decode a real and a full-size batch on a running mlad, and check both.")
    parser.add_argument("--mlactl", default="mlactl", help="the mlactl to run")
    parser.add_argument("--socket", required=True, help="the daemon's socket; it serves the devices cpu and reference")
    parser.add_argument("--data", type=Path, required=True, help="the folder of deepseek-v3-layer.safetensors")
    options = parser.parse_args()

    def decode(path, device):
        """The result's tensors, and mlactl's figures."""
        out = path.with_name(f"{path.stem}.{device}.out.safetensors")
        command = [options.mlactl, "decode", path, "-o", out, "--device", device, "--socket", options.socket, "--json",
                   "--quiet"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"mlactl decode of {path.name} on {device} ended with {done.returncode}: "
                     f"{done.stdout}{done.stderr}")
        return read_tensors(out), json.loads(done.stdout)

    bad = []
    with tempfile.TemporaryDirectory(prefix="mlad-demo-") as folder:
        folder = Path(folder)

        print("\nA real batch: one layer of DeepSeek-V3 (16 heads, bf16, pages of 64), against the model's own "
              "attention output")
        capture = folder / "deepseek-v3-layer.safetensors"
        capture.write_bytes((options.data / capture.name).read_bytes())
        given, model = read_tensors(capture), read_tensors(options.data / "deepseek-v3-layer.expected.safetensors")
        Row.head()
        for device in ("cpu", "reference"):
            result, figures = decode(capture, device)
            attention = np.einsum("hvl,thl->thv", model["w_uv"], result["out"])
            per_request = np.split(np.arange(len(attention)), len(given["seqlens"]))
            each = [decibels(model["attention"][rows], attention[rows]) for rows in per_request]
            total = decibels(model["attention"], attention)
            show(f"layer 3 on {device}", given, total, min(each), figures)
            if not total >= MODEL_FLOOR:
                bad.append(f"the real layer on {device}: {total:.1f} dB, {MODEL_FLOOR} wanted")

        print(f"\nA speculative-decode step: {HEADS} heads, bf16, causal, pages of {PAGE} shuffled, against the fp64 "
              "device `reference`")
        Row.head()
        rng = np.random.default_rng(1)
        page_ids = rng.permutation(sum(-(-k // PAGE) for k in CONTEXTS))
        for name, q_lens in DRAFTS:
            for layer in range(LAYERS if name == "uniform" else 1):
                path = folder / f"{name}-{layer}.safetensors"
                make_layer(path, rng, q_lens, page_ids)
                result, figures = decode(path, "cpu")
                exact, _ = decode(path, "reference")
                ends = np.cumsum(q_lens)
                each = [decibels(exact["out"][end - q:end], result["out"][end - q:end]) for q, end in zip(q_lens, ends)]
                label = f"q_len 4, layer {layer}" if name == "uniform" else f"ragged q_len {min(q_lens)}..{max(q_lens)}"
                show(label, read_tensors(path), decibels(exact["out"], result["out"]), min(each), figures)
                if not min(each) >= BATCH_FLOOR:
                    bad.append(f"{label}: a request has {min(each):.1f} dB, {BATCH_FLOOR} wanted")
                path.unlink()
    if bad:
        sys.exit("\nwrong results: " + "; ".join(bad))
    print("\nall batches right")


def show(name, given, total, worst, figures):
    context = f"{given['seqlens'].min()}..{given['seqlens'].max()}"
    Row.show(name, len(given["seqlens"]), len(given["q"]), context, f"{total:.2f}", f"{worst:.2f}",
             f"{figures['wall_ns'] / 1e6:.2f}", f"{figures['kv_gb_per_s']:.2f}")


if __name__ == "__main__":
    main()
