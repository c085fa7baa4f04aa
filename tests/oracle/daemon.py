"""A private mlad with the devices cpu and reference, and captures decoded on it by mlactl."""
import itertools
import json
import os
import shutil
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Optional

import safetensors_io

DEVICES = ("cpu", "reference")
VARIANTS = ("generic", "avx2", "avx512", "amx")    # of the device cpu; which of them run depends on the processor
POOL = 3    # mlactl processes at a time


class Absent(Exception):
    """The processor cannot run the variant."""


class Reply(NamedTuple):
    status: int                 # mlactl's exit status
    text: str                   # what it said
    failures: list              # the requests that failed, as {"request", "field", "message"}
    tensors: Optional[dict]     # the result file's, where it was written


class Daemon:
    """Owns the process, its socket and a folder for capture files, until stop()."""

    def __init__(self, variant="auto"):
        self.folder = Path(tempfile.mkdtemp(prefix="mlad-oracle-"))
        self.names = itertools.count()
        command = [os.environ["MLAD_BIN"], "--devices", ",".join(DEVICES), "-o", f"cpu_variant={variant}",
                   "--socket", self.folder / "mlad.sock"]
        with open(self.folder / "mlad.log", "wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            self.wait_healthy()
        except BaseException:
            self.stop()
            raise

    def wait_healthy(self):
        end = time.monotonic() + 20
        while True:
            health = self.mlactl("health")
            if health.returncode == 0:
                return
            if "cpu is absent" in health.stdout + health.stderr:
                raise Absent
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError("mlad is not healthy:\n" + health.stdout + health.stderr + self.log())
            time.sleep(0.05)

    def log(self):
        return (self.folder / "mlad.log").read_text(errors="replace")[-8000:]

    def stop(self):
        """End the process and remove the folder; an orderly end has status 0."""
        self.process.terminate()
        try:
            status = self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        log = self.log()
        shutil.rmtree(self.folder)
        if status:
            raise RuntimeError(f"mlad ended with status {status}:\n{log}")

    def mlactl(self, *arguments):
        command = [os.environ["MLACTL_BIN"], *map(str, arguments), "--quiet", "--socket", self.folder / "mlad.sock"]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    def decode(self, capture, device):
        """The reply to one capture. Safe from several threads."""
        name = next(self.names)
        path, out = (self.folder / f"{name}{end}.safetensors" for end in ("", ".out"))
        safetensors_io.write(path, capture.tensors, capture.metadata, capture.skew)
        done = self.mlactl("decode", path, "-o", out, "--device", device, "--json")
        path.unlink()
        tensors = None
        if out.exists():
            tensors, _ = safetensors_io.read(out)
            out.unlink()
        said = json.loads(done.stdout) if done.stdout.startswith("{") else {}
        return Reply(done.returncode, (done.stdout + done.stderr).strip(), said.get("failures", []), tensors)


def decode_all(captures, targets):
    """(capture, device, reply) of every capture on every target (daemon, device), in order, a few ahead of the
    consumer."""
    waiting = []
    with ThreadPoolExecutor(POOL) as pool:
        for capture in captures:
            waiting += [(capture, device, pool.submit(daemon.decode, capture, device)) for daemon, device in targets]
            while len(waiting) > 4 * POOL:
                capture_then, device_then, reply = waiting.pop(0)
                yield capture_then, device_then, reply.result()
        for capture, device, reply in waiting:
            yield capture, device, reply.result()
