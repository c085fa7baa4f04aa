"""A client process without torch: numpy, libmla, and the driver by ctypes. MLAD_SOCKET and MLAD_DEVICE say where.

    client.py check N       decode N times, compare with the device `reference`; one line of JSON
    client.py loop          prints "ready", decodes until SIGTERM, each result compared; one line of JSON
    client.py victim [all]  prints "decoding", keeps eight decodes in flight until it is killed
    client.py scribble S    a hostile one: lengths, page ids, cu_q and masks change at random while it decodes for S
                            seconds; one line of JSON

On a GPU the KV cache lies there (cuMemAlloc), with "all" q and the outputs too; all else in shared host memory."""
import json
import os
import random
import signal
import sys
import threading
import time

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import driver  # noqa: E402
import mlad  # noqa: E402

DEVICE = os.environ["MLAD_DEVICE"]
BATCH, HEADS, PAGES, PAGE, COLUMNS = 6, 16, 96, 64, 16
CU_Q = np.array([0, 1, 5, 5, 13, 15, 18], np.int32)
LENGTHS = np.array([1000, 517, 64, 1, 130, 777], np.int32)
SCALE, LEAST_DB, CANARY = 576 ** -0.5, 50, 4096
on_gpu = DEVICE.startswith("GPU-")


def bf16(values):
    """Rounded towards zero, which is as good as any for random inputs."""
    return (np.asarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def floats(bits):
    return (np.asarray(bits).view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def shared(client, values, dtype=None):
    array = client.empty(values.shape, values.dtype if dtype is None else dtype)
    array.view(values.dtype)[...] = values
    return array


def placed(client, values, dtype, device):
    """On the GPU if `device`, else in shared host memory."""
    if not device:
        return shared(client, values, dtype)
    array = driver.DeviceArray(values.shape, dtype)
    array.write(values)
    return array


def host(array):
    return array.read() if isinstance(array, driver.DeviceArray) else array


class Batch:
    """A ragged bf16 batch, deterministic, whose results `reference` confirmed."""

    def __init__(self, seed, everything=False):
        rng = np.random.default_rng(seed)
        self.q = bf16(rng.standard_normal((int(CU_Q[-1]), HEADS, 576)))
        self.kv = bf16(rng.standard_normal((PAGES, PAGE, 576)))
        self.table = rng.permutation(PAGES).astype(np.int32).reshape(BATCH, COLUMNS)
        self.everything = everything

    def plan(self, client, device):
        q = placed(client, self.q, mlad.bfloat16, device and self.everything)
        out = placed(client, np.zeros(q.shape[:2] + (512,), np.uint16), mlad.bfloat16, device and self.everything)
        kv = placed(client, self.kv, mlad.bfloat16, device)
        table, lengths, cu_q = (shared(client, array) for array in (self.table, LENGTHS, CU_Q))
        return client.plan(q, kv, table, lengths, cu_q=cu_q, out=out, softmax_scale=SCALE, deterministic=True,
                           return_lse=False)

    def confirm(self, out):
        """Decibels of an output against the device `reference`."""
        with mlad.Client(device="reference", name="gpu-suite reference") as client:
            plan = self.plan(client, False)
            plan.decode(120)
            want = floats(plan.out)
        noise = np.sum((floats(out) - want) ** 2)
        return float(10 * np.log10(np.sum(want ** 2) / noise)) if noise else 999.0


def decode_and_compare(client, batch, going_on):
    """Decode while going_on(n); an account of it."""
    plan = batch.plan(client, on_gpu)
    plan.decode(120)
    first = host(plan.out).copy()
    account = {"decodes": 0, "wrong": 0, "errors": 0, "codes": {}, "replays": 0, "last_error": "",
               "db": batch.confirm(first)}
    if not account["db"] >= LEAST_DB:
        account["wrong"] += 1
    print("ready", flush=True)
    blank = np.full(first.shape, 0xffff, np.uint16)
    while going_on(account["decodes"]):
        account["decodes"] += 1
        if isinstance(plan.out, driver.DeviceArray):
            plan.out.write(blank)
        else:
            plan.out.view(np.uint16)[...] = blank
        try:
            account["replays"] += plan.decode(120).replays
        except mlad.Error as error:
            account["errors"] += 1
            account["codes"][error.code] = account["codes"].get(error.code, 0) + 1
            account["last_error"] = str(error)
            if account["errors"] > 20:
                break
            continue
        if not np.array_equal(host(plan.out).view(np.uint16), first.view(np.uint16)):
            account["wrong"] += 1
    return account


def check(client, count, *words):
    print(json.dumps(decode_and_compare(client, Batch(5, "all" in words), lambda n: n < int(count))), flush=True)


def loop(client, *words):
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    print(json.dumps(decode_and_compare(client, Batch(7, "all" in words), lambda n: not stop.is_set())), flush=True)


def victim(client, *words):
    plans = [Batch(seed, "all" in words).plan(client, on_gpu) for seed in range(2)]
    flight = [plans[i % 2].submit() for i in range(8)]
    print("decoding", flush=True)
    while True:
        for i, pending in enumerate(flight):
            pending.wait()
            flight[i] = plans[i % 2].submit()


# The hostile one.

EXTREMES = [-1, 2**31 - 1, -2**31, 2**31 - 64, 65536, -65536, 1 << 30]


def nasty(draw, legal):
    """One in eight is an extreme, one in eight near the bounds, the others are legal."""
    kind = draw.randrange(8)
    if kind == 0:
        return draw.choice(EXTREMES)
    return legal + draw.randrange(3) - 1 if kind == 1 else draw.randrange(legal)


def mutations(draw, table, lengths, cu_q, tree, wild, count):
    """`count` random writes, drawn ahead so that writing them is quick. wild 0: legal ones; 1: any but to cu_q, whose
    least mistake fails the whole batch before it starts; 2: any."""
    rows, out = len(tree), []
    for _ in range(count):
        what = draw.randrange(16 if wild == 2 else 15)
        if what < 7:
            out.append((table, draw.randrange(len(table)), nasty(draw, PAGES) if wild else draw.randrange(PAGES)))
        elif what < 12:
            most = PAGE * COLUMNS
            out.append((lengths, draw.randrange(BATCH), nasty(draw, most) if wild else draw.randrange(most)))
        elif what < 15:
            out.append((tree, draw.randrange(rows), draw.getrandbits(64)))
        else:
            out.append((cu_q, draw.randrange(BATCH + 1), nasty(draw, rows)))
    return out


def scribble(client, seconds, seed="1"):
    draw, end = random.Random(int(seed)), time.monotonic() + float(seconds)
    batch = Batch(int(seed))
    rows = BATCH * 6
    q = shared(client, bf16(np.random.default_rng(3).standard_normal((rows, HEADS, 576))), mlad.bfloat16)
    kv = placed(client, batch.kv, mlad.bfloat16, on_gpu)
    table, lengths = client.empty((BATCH, COLUMNS), np.int32), client.empty(BATCH, np.int32)
    cu_q, tree = client.empty(BATCH + 1, np.int32), client.empty(rows, np.uint64)
    out_bytes, lse_bytes = rows * HEADS * 1024, rows * HEADS * 4
    room = client.empty(3 * CANARY + out_bytes + lse_bytes, np.uint8)
    room[...] = 0xa5
    at = CANARY + out_bytes + CANARY
    out = room[CANARY:CANARY + out_bytes].view(mlad.bfloat16).reshape(rows, HEADS, 512)
    lse = room[at:at + lse_bytes].view(np.float32).reshape(rows, HEADS)
    canaries = [room[:CANARY], room[CANARY + out_bytes:at], room[at + lse_bytes:]]
    inputs = q.view(np.uint16).copy()
    tree[...] = 1
    plans = [client.plan(q, kv, table, lengths, cu_q=cu_q, out=out, lse=lse, mask=mask, softmax_scale=SCALE)
             for mask in ("none", "causal", tree)]
    writes = [mutations(draw, table.reshape(-1), lengths, cu_q, tree, wild, 8000) for wild in range(3)]
    account, stop = {"ok": 0, "requests": 0, "batch": 0, "harm": ""}, threading.Event()
    made, wild = [0], [0]       # shared with the thread

    def keep_writing():
        while made[0] % 16 or not stop.wait(1e-5):
            array, index, value = writes[wild[0]][made[0] % 8000]
            array[index] = value
            made[0] += 1
    table[...], lengths[...], cu_q[...] = 0, 1, 0
    thread = threading.Thread(target=keep_writing, daemon=True)
    thread.start()
    turn = 0
    while time.monotonic() < end and not account["harm"]:
        # Made legal first, else nearly every batch fails before it starts.
        wild[0] = turn % 3
        cu_q[...] = np.arange(BATCH + 1) * 6
        lengths[...] = [draw.randrange(PAGE * COLUMNS) for _ in range(BATCH)]
        table[...] = batch.table
        try:
            plans[turn // 3 % 3].decode(60)
            account["ok"] += 1
        except mlad.RequestsFailed:
            account["requests"] += 1
        except mlad.Error as error:
            if error.code != "batch":
                account["harm"] = str(error)
            account["batch"] += 1
        turn += 1
        if not all((canary == 0xa5).all() for canary in canaries):
            account["harm"] = "a byte outside the outputs was written"
    stop.set()
    thread.join()
    if not np.array_equal(q.view(np.uint16), inputs) or not np.array_equal(host(kv).view(np.uint16), batch.kv):
        account["harm"] = account["harm"] or "an input was written"
    print(json.dumps({**account, "decodes": turn, "mutations": made[0]}), flush=True)


def main():
    if on_gpu:
        driver.use(DEVICE)
        print("the driver has given a context", file=sys.stderr, flush=True)
    try:
        with mlad.Client(name="gpu-suite " + sys.argv[1], reconnect_ms=60000) as client:
            {"check": check, "loop": loop, "victim": victim, "scribble": scribble}[sys.argv[1]](client, *sys.argv[2:])
    except (mlad.Error, driver.DriverError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
