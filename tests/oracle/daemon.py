"""A private mlad with the devices cpu and reference, and captures decoded on it by mlactl."""
import itertools
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Optional

import safetensors_io

DEVICES = ("cpu", "reference")
POOL = 3    # mlactl processes at a time


class Reply(NamedTuple):
    status: int                 # mlactl's exit status
    text: str                   # what it said
    failures: list              # the requests that failed, as {"request", "field", "message"}
    tensors: Optional[dict]     # the result file's, where it was written


class Daemon:
    """Context manager: owns the process, its socket and a folder for capture files."""

    def __enter__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="mlad-oracle-"))
        self.log = open(self.folder / "mlad.log", "w+b")
        command = [os.environ["MLAD_BIN"], "--devices", ",".join(DEVICES), "--socket", self.folder / "mlad.sock"]
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log)
        end = time.monotonic() + 20
        while self.mlactl("health").returncode != 0:
            if self.process.poll() is not None or time.monotonic() > end:
                self.__exit__(RuntimeError, None, None)
                raise RuntimeError("mlad did not become healthy")
            time.sleep(0.05)
        self.pool = ThreadPoolExecutor(POOL)
        self.names = itertools.count()
        return self

    def __exit__(self, kind, value, trace):
        if hasattr(self, "pool"):
            self.pool.shutdown()
        self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        self.log.seek(0)
        text = self.log.read().decode(errors="replace")
        if kind or status:
            print(text[-8000:])
        self.log.close()
        shutil.rmtree(self.folder)
        if status and not kind:
            raise RuntimeError(f"mlad ended with status {status}")

    def mlactl(self, *arguments):
        return subprocess.run([os.environ["MLACTL_BIN"], *map(str, arguments), "--quiet", "--socket", self.folder / "mlad.sock"],
                              capture_output=True, text=True, timeout=60)

    def decode_file(self, path, device, out):
        done = self.mlactl("decode", path, "-o", out, "--device", device, "--json")
        tensors = None
        if out.exists():
            tensors, _ = safetensors_io.read(out)
            out.unlink()
        said = json.loads(done.stdout) if done.stdout.startswith("{") else {}
        return Reply(done.returncode, done.stdout + done.stderr, said.get("failures", []), tensors)

    def decode(self, capture, device):
        """The reply to one capture. Safe from several threads."""
        stem = str(next(self.names))
        path = self.folder / (stem + ".safetensors")
        safetensors_io.write(path, capture.tensors, capture.metadata, capture.skew)
        try:
            return self.decode_file(path, device, self.folder / (stem + ".out.safetensors"))
        finally:
            path.unlink()

    def decode_all(self, captures, devices=DEVICES):
        """(capture, device, reply) of every capture on every device, in order, a few ahead of the consumer."""
        waiting = []
        for capture in captures:
            waiting += [(capture, device, self.pool.submit(self.decode, capture, device)) for device in devices]
            while len(waiting) > 4 * POOL:
                capture_then, device_then, reply = waiting.pop(0)
                yield capture_then, device_then, reply.result()
        for capture, device, reply in waiting:
            yield capture, device, reply.result()
