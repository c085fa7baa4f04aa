"""mlad under test: started on a private socket, watched, stopped by its process id."""
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

# A GPU's worker starts slowly at its first use on a machine; under a sanitizer much more so.
READY_SECONDS = 40


class Failed(Exception):
    """A part cannot go on."""


def mlactl(tree, socket, *arguments, timeout=60):
    """Run mlactl; the CompletedProcess, its text captured."""
    return subprocess.run([str(tree.mlactl), *map(str, arguments)], capture_output=True, text=True, timeout=timeout,
                          env=tree.environment(MLAD_SOCKET=socket), stdin=subprocess.DEVNULL)


def device_status(tree, socket, name):
    """What mlactl status says of a device; {} where the daemon does not answer."""
    result = mlactl(tree, socket, "status", "--json", "--device", name, timeout=20)
    try:
        return next(d for d in json.loads(result.stdout)["devices"] if d["name"] == name)
    except (ValueError, KeyError, StopIteration):
        return {}


def wait_for(what, seconds, probe, pause=0.05):
    """Poll until probe() is true; its value."""
    end = time.monotonic() + seconds
    while True:
        value = probe()
        if value:
            return value
        if time.monotonic() > end:
            raise Failed(f"no {what} within {seconds} s")
        time.sleep(pause)


class Daemon:
    """One mlad. `program`: another copy of it; `user`: a uid to run as; `environment`: additions."""

    def __init__(self, tree, devices, options=(), program=None, user=None, environment=(), ready=READY_SECONDS):
        self.tree, self.devices, self.ready_seconds = tree, devices, ready
        self.folder = Path(tempfile.mkdtemp(prefix="mlad-gpu-"))
        self.folder.chmod(0o755)
        self.socket, self.log = self.folder / "s", self.folder / "log"
        self.command = [str(program or tree.mlad), "--devices", ",".join(devices), "--socket", str(self.socket),
                        "--config", "/dev/null", "--log-target", "stderr"]
        for option in options:
            self.command += ["-o", option]
        self.user, self.environment, self.process = user, dict(environment), None
        if user is not None:
            os.chown(self.folder, user, user)

    def start(self):
        identity = {} if self.user is None else {"user": self.user, "group": self.user, "extra_groups": []}
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(self.command, stderr=log, stdout=log, stdin=subprocess.DEVNULL,
                                            env=self.tree.environment(**self.environment), **identity)
        try:
            self.wait_ready()
        except Failed:
            self.stop(keep=True)
            raise
        return self

    def status(self, device=None):
        return device_status(self.tree, self.socket, device or self.devices[-1])

    def wait_ready(self):
        """All devices serve, or Failed with the reason and the log's tail."""
        end = time.monotonic() + self.ready_seconds
        for name in self.devices:
            while True:
                if self.process.poll() is not None:
                    raise Failed(f"mlad ended with {self.process.returncode}; its log ends:\n{self.tail()}")
                state = self.status(name)
                if state.get("state") == "ready":
                    break
                if state.get("state") == "absent" or time.monotonic() > end:
                    raise Failed(f"device {name} is {state.get('state', 'unknown')}: {state.get('reason', 'no answer')}"
                                 f"; mlad's log ends:\n{self.tail()}")
                time.sleep(0.1)

    def tail(self, lines=30):
        try:
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        except OSError as error:
            return str(error)

    def stop(self, seconds=20, keep=False):
        """True if it ended by itself. Its folder goes, unless `keep`."""
        clean = True
        if self.process and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(seconds)
            except subprocess.TimeoutExpired:
                clean = False
                self.process.kill()
                self.process.wait()
        if not keep:
            shutil.rmtree(self.folder, ignore_errors=True)
        return clean and self.process is not None and self.process.returncode == 0

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        self.stop()
