"""What the fault tests share: a daemon of their own, its processes, its figures, and clients that check what they
decode."""
import atexit
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

import msgpack

children = []  # pids that a failing test must not leave behind


@atexit.register
def kill_children():
    for pid in children:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


MLAD = os.environ["MLAD_BIN"]
DECODE_LOOP = os.environ["DECODE_LOOP_BIN"]
HELLO, STATUS = 1, 12


def check(condition, message):
    if not condition:
        print("FAILED:", message, flush=True)
        sys.exit(1)


def wait_for(what, seconds, probe):
    """Poll until probe() is true; its value."""
    end = time.monotonic() + seconds
    while True:
        value = probe()
        if value:
            return value
        check(time.monotonic() < end, f"no {what} within {seconds} s")
        time.sleep(0.01)


class Daemon:
    """mlad on a listening socket that the test keeps, as systemd would: connections queue while no daemon runs."""

    def __init__(self, devices="cpu,reference", options=(), environment=()):
        self.folder = tempfile.mkdtemp(prefix="mlad-faults-")
        self.socket_path = os.path.join(self.folder, "mlad.sock")
        self.command = [MLAD, "--devices", devices, "--socket", self.socket_path, "--log-level", "error", *options]
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(self.socket_path)
        self.listener.listen(256)
        os.environ["MLAD_SOCKET"] = self.socket_path
        self.environment = dict(os.environ, **dict(environment))
        self.start()

    def start(self):
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.dup2(self.listener.fileno(), 3)
                os.set_inheritable(3, True)
                environment = dict(self.environment, LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
                os.execve(self.command[0], self.command, environment)
            finally:
                os._exit(127)
        children.append(self.pid)

    def status(self):
        """The body of STATUS_REPLY, or None when nobody answers."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as peer:
            peer.settimeout(5)
            try:
                peer.connect(self.socket_path)
                for sequence, (kind, body) in enumerate([(HELLO, {"client": "faults"}), (STATUS, {})], 1):
                    peer.send(msgpack.packb([1, kind, sequence, body]))
                    answer = msgpack.unpackb(peer.recv(65536))
                return answer[3]
            except (OSError, ValueError, msgpack.UnpackException):
                return None  # nobody there, or it died before it had answered

    def device(self, name="cpu"):
        status = self.status()
        devices = status["devices"] if status and "devices" in status else []
        return next((d for d in devices if d["name"] == name), None)

    def ready(self):
        return wait_for("ready device", 30, lambda: (d := self.device()) and d["state"] == "ready" and d)

    def stop(self):
        os.kill(self.pid, signal.SIGTERM)
        _, status = os.waitpid(self.pid, 0)
        self.listener.close()
        shutil.rmtree(self.folder)
        check(os.waitstatus_to_exitcode(status) == 0, f"mlad ended with {os.waitstatus_to_exitcode(status)} on SIGTERM")


class DecodeLoop:
    """A client process that decodes without pause and checks every result (decode_loop.c)."""

    def __init__(self, seed):
        self.process = subprocess.Popen([DECODE_LOOP, str(seed)], stdout=subprocess.PIPE, text=True)
        children.append(self.process.pid)

    def wait_ready(self):
        check(self.process.stdout.readline() == "ready\n", "a client did not start")

    def finish(self):
        self.process.send_signal(signal.SIGTERM)
        out, _ = self.process.communicate(timeout=90)
        return json.loads(out)


def memory_kb(pid, key="VmRSS"):
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key + ":"))


def count_fds(pid):
    return len(os.listdir(f"/proc/{pid}/fd"))


def count_maps(pid):
    with open(f"/proc/{pid}/maps") as file:
        return sum("memfd" in line for line in file)


def report_and_check(loops, kills, what):
    """Every client's own account: no call failed, every output was right; and enough kills met work in flight."""
    results = [loop.finish() for loop in loops]
    total = {key: sum(r[key] for r in results) for key in ("decodes", "hit", "replays", "wrong", "errors")}
    print(f"{what}: {kills} kills, {total['decodes']} decodes, {total['hit']} of them in flight at a kill, "
          f"{total['replays']} replays, {total['wrong']} wrong, {total['errors']} errors")
    check(total["wrong"] == 0, "an output was wrong")
    check(total["errors"] == 0, "a call failed: " + "; ".join(r["last_error"] for r in results))
    check(all(r["decodes"] > kills // 10 for r in results), "a client made hardly any progress")
    check(total["hit"] >= kills // 2, "too few kills met work in flight for the test to mean anything")
