"""The protocol is language-neutral: a client that shares no code with mlad decodes a batch, and numpy agrees.

usage: MLAD_BIN=PATH test_python_client.py"""
import os
import signal
import subprocess
import sys
import tempfile
import time

import numpy

from mlad_client import Client, Refused

B, H, Q, PAGE, D, V = 3, 5, 2, 16, 576, 512
LENGTHS = [2, 17, 40]
MAX_PAGES = 3
POOL = 8


def to_bf16(values):
    """Round to the nearest bfloat16, ties to even; uint16."""
    bits = numpy.ascontiguousarray(values, numpy.float32).view(numpy.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(numpy.uint16)


def from_bf16(bits):
    return (bits.astype(numpy.uint32) << 16).view(numpy.float32).astype(numpy.float64)


def reference(q, kv, table, scale):
    """Causal multi-token decode in fp64: (out, lse)."""
    out, lse = numpy.zeros((B, Q, H, V)), numpy.zeros((B, Q, H))
    for b, length in enumerate(LENGTHS):
        keys = kv[table[b]].reshape(-1, D)[:length]
        for t in range(Q):
            seen = keys[: length - (Q - 1) + t]
            scores = scale * q[b, t] @ seen.T
            top = scores.max(axis=1, keepdims=True)
            weights = numpy.exp(scores - top)
            out[b, t] = weights @ seen[:, :V] / weights.sum(axis=1, keepdims=True)
            lse[b, t] = top[:, 0] + numpy.log(weights.sum(axis=1))
    return out, lse


def check_decode(path, device):
    random = numpy.random.default_rng(1)
    q = to_bf16(random.standard_normal((B, Q, H, D)))
    kv = to_bf16(random.standard_normal((POOL, PAGE, D)))
    table = random.permutation(POOL)[: B * MAX_PAGES - 1]
    table = numpy.append(table, 0).reshape(B, MAX_PAGES).astype(numpy.int32)
    scale = D ** -0.5
    right_out, right_lse = reference(from_bf16(q), from_bf16(kv), table, scale)

    with Client(path, device) as client:
        assert client.welcome["device"] == device and client.welcome["features"] == 0, client.welcome
        memory = client.register(1 << 20)
        tensors, end = {}, 0
        for name, array in {"q": q, "kv": kv, "block_table": table, "seqlens": numpy.array(LENGTHS, numpy.int32),
                            "out": numpy.zeros((B, Q, H, V), numpy.uint16),
                            "lse": numpy.zeros((B, Q, H), numpy.float32)}.items():
            tensors[name] = memory.tensor(end)
            memory.data[end:end + array.nbytes] = array.tobytes()
            end += -(-array.nbytes // 64) * 64
        batch = {"batch": B, "heads": H, "q_rows": B * Q, "q_dtype": "bf16", "kv_format": "bf16", "pages": POOL,
                 "page_size": PAGE, "max_pages": MAX_PAGES, "softmax_scale": scale, **tensors}

        plan = client.plan(batch)
        first, second = client.submit(plan), client.submit(plan)
        assert client.wait(second)["failed"] == client.wait(first)["failed"] == 0
        for decode in (lambda: client.wait(client.submit(plan))), (lambda: client.decode(batch)):
            memory.data[tensors["out"]["offset"]:end] = bytes(end - tensors["out"]["offset"])
            done = decode()
            assert done["failed"] == 0 and done["kv_tokens"] == sum(LENGTHS), done
            out = numpy.frombuffer(memory.data, numpy.uint16, B * Q * H * V, tensors["out"]["offset"]).copy()
            lse = numpy.frombuffer(memory.data, numpy.float32, B * Q * H, tensors["lse"]["offset"]).copy()
            error = from_bf16(out).reshape(right_out.shape) - right_out
            snr = 10 * numpy.log10((right_out ** 2).sum((1, 2, 3)) / (error ** 2).sum((1, 2, 3)))
            assert snr.min() > 50, f"{device}: SNR per request {snr} dB"
            lse_error = numpy.abs(lse.reshape(right_lse.shape) - right_lse)
            assert numpy.all(lse_error < 2e-5 * numpy.maximum(abs(right_lse), 1)), lse_error.max()

        expect_refusal("unknown_field", "batch.colour", client.plan, {**batch, "colour": 1})
        expect_refusal("invalid", "batch.heads", client.plan, {**batch, "heads": 129})
        expect_refusal("in_use", "buffer", client.unregister, memory)
        client.drop(plan)
        client.unregister(memory)


def expect_refusal(code, field, call, *arguments):
    try:
        call(*arguments)
    except Refused as refused:
        assert (refused.code, refused.field) == (code, field), refused
        assert refused.message
    else:
        raise AssertionError(f"{code} at {field} was expected")


def check_administration(path):
    with Client(path) as client:
        status = client.call("STATUS")
        assert [device["name"] for device in status["devices"]] == ["cpu", "reference"], status
        assert all(device["decodes"] == 4 for device in status["devices"]), status
        assert client.call("CAPABILITIES", {"device": "cpu"})["rows"]
        assert client.call("HEALTH")["health"] == "ok"
        assert client.call("SESSIONS", {"device": "cpu"})["more"] is False


def connectable(path, mlad, patience=20):
    deadline = time.monotonic() + patience
    while True:
        try:
            Client(path).socket.close()
            return
        except (FileNotFoundError, ConnectionError):
            if mlad.poll() is not None or time.monotonic() > deadline:
                sys.exit("mlad does not serve its socket")
            time.sleep(0.02)


def main():
    with tempfile.TemporaryDirectory(prefix="mlad-python-client-") as folder:
        path = os.path.join(folder, "mlad.sock")
        mlad = subprocess.Popen([os.environ["MLAD_BIN"], "--devices", "cpu,reference", "--socket", path])
        try:
            connectable(path, mlad)
            check_decode(path, "cpu")
            check_decode(path, "reference")
            check_administration(path)
            mlad.send_signal(signal.SIGTERM)
            assert mlad.wait(20) == 0
        finally:
            mlad.kill()
            mlad.wait()


main()
