"""A private mlad for one test file: started in a temporary directory, stopped by its process id, log shown when a test
fails."""
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time

MLAD, MLACTL, SOURCE = (os.environ[name] for name in ("MLAD_BIN", "MLACTL_BIN", "MLAD_SOURCE"))
CAPTURE = os.path.join(SOURCE, "tests/data/deepseek-v3-layer.safetensors")


def mlactl(*arguments, socket="/nonexistent/mlad.sock", timeout=60, **extra):
    """Run mlactl; the CompletedProcess, text captured."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MLAD_", "NO_COLOR"))}
    environment.update(MLAD_SOCKET=socket, **extra)
    return subprocess.run([MLACTL, *map(str, arguments)], capture_output=True, text=True, timeout=timeout,
                          env=environment)


class Daemon:
    def __init__(self, devices="cpu,reference", *options):
        self.directory = tempfile.mkdtemp(prefix="mlactl-")
        self.socket = os.path.join(self.directory, "s")
        self.log = open(os.path.join(self.directory, "log"), "w+")
        self.process = subprocess.Popen([MLAD, "--devices", devices, "--socket", self.socket, "--config", "/dev/null",
                                         "--log-target", "stderr", "-o", "cpu_threads=2", *options], stderr=self.log)
        deadline = time.monotonic() + 30
        while self.ctl("health", "--timeout", 1).returncode == 3:
            assert self.process.poll() is None, "mlad ended"
            assert time.monotonic() < deadline, "mlad does not listen"
            time.sleep(0.05)
        self.wait_ready()

    def ctl(self, *arguments, **extra):
        return mlactl(*arguments, socket=self.socket, **extra)

    def json(self, *arguments, code=0):
        result = self.ctl(*arguments, "--json")
        said = f"{result.stdout}{result.stderr}"
        assert result.returncode == code, f"{arguments}: exit {result.returncode}, not {code}: {said}"
        return json.loads(result.stdout)

    def devices(self):
        return {device["name"]: device for device in self.json("status")["devices"]}

    def wait_ready(self):
        deadline = time.monotonic() + 30
        while any(device["state"] != "ready" for device in self.devices().values()):
            assert time.monotonic() < deadline, "a device does not become ready"
            time.sleep(0.05)

    def end(self):
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def stop(self):
        """Fails where a sanitizer has spoken, of mlad or of a worker, whose exit status is nobody's here."""
        self.end()
        spoke = re.search("ThreadSanitizer:|AddressSanitizer:|runtime error:", self.read_log())
        if spoke:
            self.show_log()
        self.log.close()
        shutil.rmtree(self.directory)
        assert not spoke, "a sanitizer has something to say of mlad or its workers"

    def read_log(self):
        with open(self.log.name) as log:  # of its own: mlad writes where self.log stands
            return log.read()

    def show_log(self):
        sys.stderr.write("--- log of mlad\n" + self.read_log())


def run(tests, daemon=None):
    """Run every function, print its name and verdict, exit with 1 if any failed."""
    failed = 0
    for test in tests:
        try:
            test(daemon) if daemon else test()
            print("ok   ", test.__name__, flush=True)
        except Exception as error:  # a failing test must not hide the next
            failed += 1
            print("FAIL ", test.__name__, f"{type(error).__name__}: {error}", flush=True)
    if daemon:
        if failed:
            daemon.end()
            daemon.show_log()
        try:
            daemon.stop()
        except AssertionError as error:
            failed += 1
            print("FAIL ", error, flush=True)
    sys.exit(failed > 0)
