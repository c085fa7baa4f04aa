"""kill -9 of clients in mid-decode, then of the worker under a client that decodes on."""
import os
import random
import signal
import time

from . import driver
from .daemon import wait_for
from .hostile import account_of
from .part import Part

CLIENTS, AT_ONCE = 100, 10    # and a fifth as many kills of the worker
SLACK_BYTES = 32 << 20      # what a driver may keep for itself


def held(state):
    return {key: state.get(key) for key in ("sessions", "sessions_draining", "buffers", "held_bytes", "orphaned_bytes")}


def settled(part, sessions):
    """The device holds nothing of the dead; its status."""
    def back():
        state = part.status()
        now = held(state)
        return now["sessions"] == sessions and not now["sessions_draining"] and not now["orphaned_bytes"] and state
    return wait_for(f"return to {sessions} sessions", 15, back)


def kill_round(part, first):
    """Start clients, half of them with all tensors on the GPU, and kill them as they decode; how many were killed."""
    batch = [part.client("victim", *(["all"] if (first + i) % 2 and part.is_gpu else [])) for i in range(AT_ONCE)]
    try:
        for process in batch:
            line = process.stdout.readline()
            part.require(line == "decoding\n", f"a client did not start: {line}{'' if line else process.stderr.read()}")
        time.sleep(random.random() * 0.05)
    finally:
        for process in batch:
            process.kill()
        for process in batch:
            process.wait()
            process.stdout.close()
            process.stderr.close()
    return len(batch)


def kill_clients(part, wanted):
    pid, slowest = part.status()["pid"], 0.0
    kill_round(part, 0)         # what the worker keeps for good is counted from here
    before = settled(part, 0)
    memory = memory_settled(part, None)
    killed = 0
    while killed < wanted:
        killed += kill_round(part, killed)
        begin = time.monotonic()
        settled(part, 0)
        slowest = max(slowest, time.monotonic() - begin)
    after, memory_after = settled(part, 0), memory_settled(part, memory)
    part.figures["clients"] = {"killed": killed, "slowest_return_s": round(slowest, 3), "before": held(before),
                               "after": held(after), "gpu_memory_before": memory, "gpu_memory_after": memory_after}
    part.check(killed >= wanted, f"{killed} clients were killed, not {wanted}")
    part.check(after["pid"] == pid, "the worker did not survive")
    part.check(after["held_bytes"] == before["held_bytes"] and after["buffers"] == before["buffers"],
               f"something stays held: {held(before)} before, {held(after)} after")
    check_memory(part, memory, memory_after, "clients")


def memory_settled(part, goal):
    """Bytes in use on the GPU, once they are near `goal` or have had time to be; None where nobody tells."""
    if not part.is_gpu:
        return None
    end = time.monotonic() + 5
    while True:
        used = driver.memory_used(part.device)
        if used is None or goal is not None and used <= goal + SLACK_BYTES or time.monotonic() > end:
            return used
        if goal is None:
            end = min(end, time.monotonic() + 1)
        time.sleep(0.2)


def check_memory(part, before, after, who):
    if before is None or after is None:
        part.not_run(f"GPU memory after the kills of {who}", "nvidia-smi does not tell")
        return
    part.check(after <= before + SLACK_BYTES, f"GPU memory: {before >> 20} MiB before the kills of {who}, "
               f"{after >> 20} MiB after")


def kill_workers(part, wanted):
    witness = part.client("loop")
    kills = 0
    try:
        line = witness.stdout.readline()
        part.require(line == "ready\n", f"the client did not start: {line}{'' if line else witness.stderr.read()}")
        memory = memory_settled(part, None)
        first = part.status()["restarts"]
        while kills < wanted and part.left > 5:
            # Each life completes some work, so that no decode meets three deaths in a row by our own haste.
            state = wait_for("progress", 30, lambda: (s := part.status()).get("state") == "ready" and
                             s["decodes"] >= 4 and s)
            time.sleep(random.random() * 0.02)
            os.kill(state["pid"], signal.SIGKILL)
            kills += 1
            wait_for("new worker", 30, lambda: part.status().get("pid") not in (None, 0, state["pid"]))
        wait_for("progress", 30, lambda: (s := part.status()).get("state") == "ready" and s["decodes"] >= 4)
        memory_after = memory_settled(part, memory)
        part.check(kills >= wanted, f"time for {kills} kills of the worker only, not {wanted}")
        part.check(part.status()["restarts"] - first == kills, "restarts are not counted")
        witness.send_signal(signal.SIGTERM)
        account = account_of(part, witness, "the client", 60)
    finally:
        if witness.poll() is None:
            witness.kill()
            witness.wait()
    part.figures["workers"] = {"killed": kills, "client": account, "gpu_memory_before": memory,
                               "gpu_memory_after": memory_after}
    part.check(not account["wrong"] and not account["errors"], f"the client noticed: {account}")
    part.check(account["replays"] > 0, "no kill met a decode in flight")
    check_memory(part, memory, memory_after, "workers")


def kills(part: Part):
    random.seed(1)
    kill_clients(part, part.options.get("kills") or CLIENTS)
    kill_workers(part, max(1, (part.options.get("kills") or CLIENTS) // 5))
    settled(part, 0)


