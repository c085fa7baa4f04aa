"""Many clients for a long time, coming and going, each result compared with the bits that it has to have; and what
daemon, worker and GPU hold meanwhile and afterwards."""
import mmap
import os
import random
import shutil
import signal
import statistics
import struct
import subprocess
import tempfile
import time
from pathlib import Path

from . import driver
from .crowd import client_environment, under_mps, without_mps
from .daemon import Failed, wait_for
from .part import Part, Skip

VARIANTS, SLOTS, SLOT = 4, 16384, struct.Struct("<7Q200s")      # as soak_client.c has them
COUNTS = ("decodes", "wrong", "errors", "lost", "busy", "replays")
READY, LEFT = 1, 2
LEAST_DB = 50                   # of what `reference` computes
CLIENTS, SECONDS, MPS_CLIENTS, MPS_SECONDS = 64, 60, 32, 30
LIFE_SECONDS = 16               # of a client on average; a quarter of the whole, if that is less
QUIET_SECONDS = 60              # without a result (twice that for the first one), or until it has gone: it hangs
END_SECONDS = 30                # for clients to start and to go
PAUSE, SAMPLE_SECONDS, GPU_SAMPLE_SECONDS = 0.02, 1.0, 5.0
MOST_UNTOLD = 16                # clients that end by themselves or hang; then it is enough
# What the last minute may hold more than the first (of a short run, the quarters): a share, and bytes of its own of
# each of the daemon's processes, descriptors, and bytes of the GPU, which are mostly the clients' contexts.
GROWTH, DAEMON_BYTES, WORKER_BYTES, FDS, GPU_BYTES = 1.1, 1 << 20, 16 << 20, 32, 512 << 20
IDLE_GPU_BYTES = 64 << 20       # of the GPU when all have gone, more than before they came
OPTIONS = ("max_sessions=1024", "max_connections_per_user=512", "max_in_flight=4096")


def decibels(bits, wanted):
    import numpy as np
    out, want = ((np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
                 for raw in (bits, wanted))
    noise = np.sum((out - want) ** 2)
    return float(10 * np.log10(np.sum(want ** 2) / noise)) if noise else 999.0


def expectations(part, daemon, environment, folder, wanted):
    """Files of the bits that each variant has to have: what a client alone gets; and how near they are, in decibels, to
    what `reference` gets, which is in `wanted` from then on."""
    def decode(variant, device, path):
        given = client_environment(part, daemon, MLAD_DEVICE=device, **environment)
        done = subprocess.run([str(part.tree.program("soak-client")), "expect", str(variant), str(path)], env=given,
                              capture_output=True, text=True, timeout=QUIET_SECONDS)
        part.require(done.returncode == 0, f"variant {variant} on {device}: {done.stderr[-500:]}")
        return path.read_bytes()

    paths = [folder / f"variant-{i}" for i in range(VARIANTS)]
    for i in range(VARIANTS):
        wanted[i] = wanted.get(i) or decode(i, "reference", folder / "reference")
    worst = min(decibels(decode(i, daemon.devices[-1], path), wanted[i]) for i, path in enumerate(paths))
    part.require(worst >= LEAST_DB, f"a client alone is within {worst:.1f} dB of `reference` only")
    return paths, worst


def process_holds(pid):
    """(bytes of its own, descriptors) of a process; zeros of one that has ended."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
        own = int(text.partition("RssAnon:")[2].split()[0]) << 10
        return own, len(os.listdir(f"/proc/{pid}/fd"))
    except (OSError, IndexError):
        return 0, 0


class Life:
    """One client; its account is in its slot, whatever becomes of it."""

    def __init__(self, soak, index):
        self.index, self.errors, self.begun = index, soak.folder / f"errors-{index}", time.monotonic()
        self.seen, self.decodes, self.state, self.killed = self.begun, 0, 0, False
        variant = index % VARIANTS
        words = [soak.part.tree.program("soak-client"), "loop", variant, soak.expected[variant], soak.slots_path, index]
        words += ["all"] if index // VARIANTS % 4 == 3 else []
        with open(self.errors, "wb") as errors:
            self.process = subprocess.Popen(list(map(str, words)), env=soak.given, stdin=subprocess.DEVNULL,
                                            stdout=errors, stderr=errors)

    def said(self):
        return self.errors.read_text(errors="replace")[-300:] if self.errors.exists() else ""


class Soak:
    """`kill`: clients are killed too; else all leave when they are asked to."""

    def __init__(self, part, name, daemon, environment, folder, wanted, kill):
        self.part, self.name, self.daemon, self.kill = part, name, daemon, kill
        self.environment = dict(environment)
        self.folder = Path(folder)
        self.slots_path = self.folder / "slots"
        self.slots_path.write_bytes(bytes(SLOTS * SLOT.size))
        with open(self.slots_path, "r+b") as file:
            self.slots = mmap.mmap(file.fileno(), SLOTS * SLOT.size)
        self.given = client_environment(part, daemon, MLAD_DEVICE=daemon.devices[-1], **self.environment)
        self.expected, self.decibels = expectations(part, daemon, environment, self.folder, wanted)
        self.alive, self.leaving, self.lives, self.killed, self.left = [], [], 0, 0, 0
        self.samples, self.gpu_samples, self.hung, self.untold = [], [], 0, 0

    def slot(self, index):
        state, *counts, text = SLOT.unpack_from(self.slots, index * SLOT.size)
        return state, dict(zip(COUNTS, counts)), text.rstrip(b"\0").decode(errors="replace")

    def start(self):
        self.alive.append(Life(self, self.lives))
        self.lives += 1

    def end_one(self):
        """One that is at work, at random: killed, or asked to leave."""
        ready = [life for life in self.alive if life.state == READY and life.decodes]
        if not ready:
            return False
        life = random.choice(ready)
        self.alive.remove(life)
        self.send_off(life, self.kill and random.random() < 0.5)
        return True

    def send_off(self, life, kill):
        life.killed, life.seen = kill, time.monotonic()
        life.process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
        self.leaving.append(life)

    def look(self):
        """Who has ended, and who hangs."""
        now = time.monotonic()
        if self.untold + self.hung > MOST_UNTOLD:
            raise Failed(f"{self.name}: {self.untold} clients ended by themselves, {self.hung} hang")
        for life in list(self.alive):
            life.state, counts, _ = self.slot(life.index)
            if counts["decodes"] != life.decodes:
                life.decodes, life.seen = counts["decodes"], now
            if life.process.poll() is not None:
                self.alive.remove(life)
                self.untold += 1
                self.part.check(False, f"{self.name}, client {life.index} ended with {life.process.returncode}: "
                                f"{self.slot(life.index)[1:]} {life.said()}")
                self.start()
            elif now - life.seen > QUIET_SECONDS * (1 if life.decodes else 2):
                self.alive.remove(life)
                self.hang(life, "has no results")
                self.start()
        for life in list(self.leaving):
            if life.process.poll() is not None:
                self.leaving.remove(life)
                self.gone(life)
            elif now - life.seen > QUIET_SECONDS:
                self.leaving.remove(life)
                self.hang(life, "does not go")

    def gone(self, life):
        """It has ended; as it was told to?"""
        state, counts, text = self.slot(life.index)
        code = life.process.returncode
        self.killed += life.killed
        self.left += not life.killed
        self.part.check(code == -signal.SIGKILL if life.killed else code == 0 and state == LEFT,
                        f"{self.name}, client {life.index} ended with {code}: {life.said()}")
        self.part.check(not counts["wrong"] and not counts["lost"] and not counts["errors"],
                        f"{self.name}, client {life.index}: {counts}: {text or life.said()}")
        life.errors.unlink(missing_ok=True)

    def hang(self, life, why):
        self.hung += 1
        self.part.check(False, f"{self.name}, client {life.index} {why} for {QUIET_SECONDS} s: {self.slot(life.index)}")
        life.process.kill()
        life.process.wait()

    def sample(self, begun):
        state = self.daemon.status()
        daemon, worker = process_holds(self.daemon.process.pid), process_holds(state.get("pid", 0))
        self.samples.append({"at": time.monotonic() - begun, "sessions": state.get("sessions", 0),
                             "held_bytes": state.get("held_bytes", 0), "daemon_bytes": daemon[0],
                             "daemon_fds": daemon[1], "worker_bytes": worker[0], "worker_fds": worker[1]})

    def run(self, clients, seconds):
        life_seconds = min(LIFE_SECONDS, seconds / 4)
        for _ in range(clients):
            self.start()
        wait_for(f"{clients} clients at work", 2 * QUIET_SECONDS,
                 lambda: self.look() or all(life.decodes for life in self.alive))
        begun = time.monotonic()
        next_end, next_sample, next_gpu = begun, begun, begun
        while (now := time.monotonic()) < begun + seconds:
            self.look()
            if now >= next_end and self.lives < SLOTS and self.end_one():
                self.start()
                next_end = max(now - 1, next_end) + life_seconds / clients
            if now >= next_sample:
                self.sample(begun)
                next_sample = now + min(SAMPLE_SECONDS, seconds / 32)
            if now >= next_gpu and self.part.is_gpu:
                used = driver.memory_used(self.daemon.devices[-1])
                if used is not None:
                    self.gpu_samples.append({"at": now - begun, "gpu_bytes": used})
                next_gpu = now + GPU_SAMPLE_SECONDS
            time.sleep(PAUSE)
        self.stop()

    def stop(self):
        for life in self.alive:
            self.send_off(life, False)
        self.alive = []
        while self.leaving:
            self.look()
            time.sleep(PAUSE)

    def abandon(self):
        for life in self.alive + self.leaving:
            life.process.kill()
            life.process.wait()

    def totals(self):
        totals = dict.fromkeys(COUNTS, 0)
        idle = 0
        for index in range(self.lives):
            _, counts, _ = self.slot(index)
            idle += not counts["decodes"]
            for key in COUNTS:
                totals[key] += counts[key]
        return {**totals, "clients_without_a_decode": idle}


def window(samples, key, begin, end):
    values = [sample[key] for sample in samples if begin <= sample["at"] <= end]
    return statistics.median(values) if values else None


def check_flat(part, name, soak, seconds):
    """What is held in the last minute beside what was held in the first."""
    share, found = min(60.0, seconds / 4), {}
    rooms = {"daemon_bytes": DAEMON_BYTES, "worker_bytes": WORKER_BYTES, "daemon_fds": FDS, "worker_fds": FDS}
    for samples, rooms in ((soak.samples, rooms), (soak.gpu_samples, {"gpu_bytes": GPU_BYTES})):
        for key, room in rooms.items():
            first, last = window(samples, key, 0, share), window(samples, key, seconds - share, seconds + 60)
            if first is None or last is None:
                continue
            found[key] = {"first": first, "last": last, "may_be": first * GROWTH + room}
            part.check(last <= first * GROWTH + room, f"{name}: {key} grew from {first:.0f} to {last:.0f}")
    return found


def idle_gpu(part, daemon, most=None):
    """Bytes in use on the GPU once they are `most` at most, or have had time to be; None where nobody tells."""
    end = time.monotonic() + 10
    while True:
        used = driver.memory_used(daemon.devices[-1]) if part.is_gpu else None
        if used is None or most is None or used <= most or time.monotonic() > end:
            return used
        time.sleep(0.5)


def nothing_held(part, name, daemon):
    """Sessions, buffers and bytes are all back; what is left if not."""
    keys = ("sessions", "sessions_draining", "buffers", "held_bytes", "orphaned_bytes")

    def held():
        state = daemon.status()
        return {key: state.get(key) for key in keys}
    try:
        wait_for("return to nothing", 20, lambda: not any(held().values()) and daemon.status())
    except Failed:
        pass
    left = held()
    part.check(all(value == 0 for value in left.values()), f"{name}: after all have gone: {left}")
    return left


def soak_in(part, name, daemon, environment, wanted, clients, seconds, kill):
    """Clients for so long in one setting."""
    with tempfile.TemporaryDirectory(prefix="mlad-soak-") as folder:
        soak = Soak(part, name, daemon, environment, folder, wanted, kill)
        before, restarts = idle_gpu(part, daemon), daemon.status()["restarts"]
        begun = time.monotonic()
        figures = part.figures[name] = {"clients": clients, "seconds": seconds, "worst_db": round(soak.decibels, 1)}
        try:
            soak.run(clients, seconds)
        finally:
            soak.abandon()
            figures.update(lives=soak.lives, killed=soak.killed, left=soak.left, hung=soak.hung,
                           ended_by_themselves=soak.untold, **soak.totals(),
                           took=round(time.monotonic() - begun, 1))
        figures["flat"] = check_flat(part, name, soak, seconds)
        figures["held_after"] = nothing_held(part, name, daemon)
        after = idle_gpu(part, daemon, before and before + IDLE_GPU_BYTES)
        figures["gpu_idle"] = {"before": before, "after": after}
        if before is None or after is None:
            part.not_run(f"{name}: memory of the GPU", "nvidia-smi does not tell" if part.is_gpu else "no GPU")
        else:
            part.check(after <= before + IDLE_GPU_BYTES,
                       f"{name}: {before >> 20} MiB of the GPU in use before, {after >> 20} MiB after")
        part.check(daemon.status().get("restarts") == restarts, f"{name}: the worker died: {daemon.tail(8)}")
        part.check(figures["decodes"] > figures["lives"] > clients, f"{name}: too little happened: {figures}")
        part.check(not kill or soak.killed > 0, f"{name}: nobody was killed")


def soak(part: Part):
    """Without MPS with clients killed and joining; under MPS with clients that leave when they are asked to: there a
    client that is killed in mid-kernel costs the others their contexts."""
    if not part.tree.program("soak-client").exists():
        raise Skip("this build has no soak-client")
    random.seed(1)
    given, wanted = part.options, {}

    def number(key, default):
        return default if given.get(key) is None else given[key]

    def plain(name, daemon, environment):
        soak_in(part, name, daemon, environment, wanted, number("soak_clients", CLIENTS),
                number("soak_seconds", SECONDS), True)

    def quiet(name, daemon, environment):
        seconds = min(number("soak_mps_seconds", MPS_SECONDS), part.left - END_SECONDS)
        if seconds < 1:
            part.not_run(name, f"{part.left:.0f} s are left")
            return
        soak_in(part, name, daemon, environment, wanted, number("soak_mps_clients", MPS_CLIENTS), seconds, False)
    if number("soak_seconds", SECONDS):
        without_mps(part, part.device, plain, OPTIONS, ["reference"])
    if number("soak_mps_seconds", MPS_SECONDS):
        under_mps(part, part.device, quiet, OPTIONS, ["reference"])
