"""One part while it runs, in a process of its own: what it was given, what it found, and the file that says so."""
import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path

from .daemon import Failed, device_status, mlactl
from .tree import Tree

SHOWN = 5       # failures that are told in full


class Skip(Exception):
    """The part cannot run here; the text says why."""


class Part:
    """`device` is under test, served by the mlad at `socket`; `devices`: all that are to be tested, the first of them
    `device`. A part fills `figures` and calls check(); without a single check it does not count as run."""

    def __init__(self, name, device, devices, socket, build, seconds, options, result):
        self.name, self.device, self.devices, self.socket = name, device, devices, socket
        self.tree, self.build, self.seconds, self.options = Tree(build), build, seconds, options
        self.end = time.monotonic() + seconds
        self.figures, self.failures, self.checks, self.result = {}, [], 0, result
        self.failed, self.saved = 0, 0.0

    @property
    def left(self):
        """Seconds of the part's own time, a little kept for its end."""
        return max(0.0, self.end - time.monotonic() - 2)

    @property
    def is_gpu(self):
        return self.device.startswith("GPU-")

    def check(self, right, text):
        """Note a fact that must hold; the part goes on."""
        self.checks += 1
        if not right:
            self.failed += 1
            if len(self.failures) < SHOWN:
                self.failures.append(str(text))
        if time.monotonic() - self.saved > 1:
            self.save(finished=False)
        return bool(right)

    def require(self, right, text):
        """The same for what the rest of the part depends on."""
        if not self.check(right, text):
            raise Failed()

    def not_run(self, what, why):
        """Something within the part that this machine does not allow: it is told, and does not count as right."""
        self.figures.setdefault("not_run", {})[what] = why

    def status(self, device=None):
        return device_status(self.tree, self.socket, device or self.device)

    def mlactl(self, *arguments, timeout=None):
        return mlactl(self.tree, self.socket, *arguments, timeout=timeout or max(5, self.left))

    def command(self, *words, timeout=None, **extra):
        """Run a program of the tree; (exit status or None when it ran too long, its output)."""
        environment = self.tree.environment(words[0] == sys.executable, MLAD_SOCKET=self.socket, **extra)
        try:
            done = subprocess.run(list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                  errors="replace", stdin=subprocess.DEVNULL, timeout=timeout or max(5, self.left),
                                  env=environment)
        except subprocess.TimeoutExpired as error:
            output = error.stdout or b""
            return None, output.decode(errors="replace") if isinstance(output, bytes) else output
        return done.returncode, done.stdout

    def client(self, *words, device=None, socket=None, user=None, environment=()):
        """Start a client process without torch (client.py)."""
        identity = {} if user is None else {"user": user, "group": user, "extra_groups": []}
        given = self.tree.environment(True, MLAD_SOCKET=socket or self.socket, MLAD_DEVICE=device or self.device,
                                      OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", **dict(environment))
        return subprocess.Popen([sys.executable, str(self.tree.client), *map(str, words)], text=True, env=given,
                                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **identity)

    def torch(self):
        """(torch, the torch device of the device under test), or Skip."""
        try:
            import torch
        except ImportError as error:
            raise Skip(f"no torch: {error}") from None
        if not self.is_gpu:
            torch.set_num_threads(1)
            return torch, "cpu"
        return torch, f"cuda:{self.ordinal(torch, self.device)}"

    @staticmethod
    def ordinal(torch, uuid):
        """The number that torch gives a GPU."""
        if not torch.cuda.is_available():
            raise Skip("torch sees no GPU")
        for i in range(torch.cuda.device_count()):
            if f"GPU-{torch.cuda.get_device_properties(i).uuid}" == uuid:
                torch.cuda.set_device(i)
                return i
        raise Skip(f"torch does not see {uuid}")

    def save(self, finished=True, skipped=None):
        self.saved = time.monotonic()
        ok = finished and skipped is None and self.failed == 0 and self.checks > 0
        text = "" if ok or skipped else "; ".join(self.failures)
        if self.failed > len(self.failures):
            text += f"; and {self.failed - len(self.failures)} more"
        if finished and not skipped and not self.checks:
            text = text or "nothing was checked"
        record = {"ok": ok, "checks": self.checks, "finished": finished, "figures": self.figures, "failure": text}
        if skipped is not None:
            record["skipped"] = skipped
        temporary = Path(f"{self.result}.new")
        temporary.write_text(json.dumps(record))
        os.replace(temporary, self.result)

    def run(self, function):
        skipped = None
        try:
            function(self)
        except Skip as reason:
            # What was already checked counts: a part that ran halfway is not "skipped".
            if self.checks:
                self.check(False, f"cut short: {reason}")
            else:
                skipped = str(reason)
        except Failed as error:
            if str(error):
                self.check(False, error)
        except Exception as error:
            traceback.print_exc()
            self.check(False, f"{type(error).__name__}: {error}")
        self.save(skipped=skipped)
