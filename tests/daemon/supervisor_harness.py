"""Runs one mlad in a private directory, as systemd or a shell would, and talks to its socket in bytes.

Daemon is a context manager: it leaves no process and no file behind, and fails the test if mlad left a child of its
own or did not end well.
"""
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import tempfile
import time

import msgpack

TYPES = dict(HELLO=1, WELCOME=2, OK=3, ERROR=4, REGISTER=5, UNREGISTER=6, PLAN=7, DROP=8, DECODE=9, SUBMIT=10,
             DONE=11, STATUS=12, STATUS_REPLY=13, CAPABILITIES=14, CAPABILITIES_REPLY=15, SESSIONS=16,
             SESSIONS_REPLY=17, HEALTH=18, HEALTH_REPLY=19, DRAIN=20, EVICT=21, IMPORT=22, CONFIGURE=64, ATTACH=65,
             READY=66, QUERY=67, REPORT=68)
NAMES = {number: name for name, number in TYPES.items()}
PATIENCE = 30.0     # seconds until a wait is a failure; sanitizers are slow
MLAD = os.environ["MLAD_BIN"]


def eventually(condition, what, seconds=PATIENCE):
    """Wait until `condition()` is true; returns its value."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"never: {what}"
        time.sleep(0.02)
    return value


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


class Gone(Exception):
    """The daemon closed the connection."""


class Peer:
    """A connection; answers are (type name, sequence, fields)."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(PATIENCE)
        self.socket.connect(path)
        self.sequence = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def send_bytes(self, data, fds=()):
        socket.send_fds(self.socket, [data], fds)

    def send(self, kind, fields=None, fds=(), sequence=None, version=1):
        if sequence is None:
            self.sequence += 1
            sequence = self.sequence
        self.send_bytes(msgpack.packb([version, TYPES.get(kind, kind), sequence, fields or {}]), fds)
        return sequence

    def receive(self):
        try:
            data = self.socket.recv(65536)
        except ConnectionResetError as error:
            raise Gone from error
        if not data:
            raise Gone
        _, kind, sequence, fields = msgpack.unpackb(data)
        return NAMES[kind], sequence, fields

    def ask(self, kind, fields=None, **more):
        """Send and return the type and fields of the answer."""
        sequence = self.send(kind, fields, **more)
        kind, answered, fields = self.receive()
        assert answered == sequence, (kind, answered, sequence, fields)
        return kind, fields

    def get(self, kind, fields=None):
        """Send and return the fields of an answer that is no error."""
        kind, fields = self.ask(kind, fields)
        assert kind != "ERROR", fields
        return fields

    def refused(self, code, kind, fields=None, field=None, **more):
        """Send what must be refused with `code`; returns the sentence."""
        kind, fields = self.ask(kind, fields, **more)
        assert kind == "ERROR" and fields["code"] == code, (kind, fields)
        assert field is None or fields["field"] == field, fields
        assert len(fields["message"]) > 10, fields
        return fields["message"]

    def ended(self, code):
        """The session must end with an unasked ERROR of that code; returns the sentence."""
        kind, sequence, fields = self.receive()
        assert (kind, sequence, fields["code"]) == ("ERROR", 0, code), (kind, sequence, fields)
        self.is_closed()
        return fields["message"]

    def is_closed(self):
        try:
            answer = self.receive()
        except Gone:
            return
        raise AssertionError(f"still open: {answer}")

    def hello(self, device=None):
        return self.get("HELLO", {"client": "test"} | ({"device": device} if device else {}))


class Daemon:
    """`options` go into the configuration file; a worker that is no mlad-worker goes into `worker`."""

    def __init__(self, devices="cpu", options="", arguments=(), worker=None, environment=None, pass_fds=(), wait=True,
                 socket_path=None, exec_through=()):
        self.directory = tempfile.mkdtemp(prefix="mlad-test-")
        os.chmod(self.directory, 0o755)
        self.socket_path = socket_path or self.directory + "/mlad.sock"
        self.config_path = self.directory + "/mlad.conf"
        self.log_path = self.directory + "/log"
        self.binary = self.install(worker) if worker is not None else MLAD
        self.devices, self.arguments, self.wait = devices, arguments, wait
        self.environment = {**os.environ, **(environment or {})}
        self.pass_fds, self.exec_through = pass_fds, exec_through
        self.configure(options)
        self.process = None

    def install(self, worker):
        """A tree of its own: our mlad, and `worker` (a shell script, or "" for none) for its mlad-worker."""
        for folder in ("bin", "libexec/mlad"):
            os.makedirs(f"{self.directory}/tree/{folder}")
        binary = shutil.copy(MLAD, f"{self.directory}/tree/bin/mlad")
        if worker:
            path = pathlib.Path(f"{self.directory}/tree/libexec/mlad/mlad-worker")
            path.write_text("#!/bin/sh\n" + worker, encoding="utf-8")
            path.chmod(0o755)
        return binary

    def configure(self, options):
        pathlib.Path(self.config_path).write_text(options, encoding="utf-8")

    def start(self):
        command = [*self.exec_through, self.binary, "--config", self.config_path, "--devices", self.devices,
                   "--socket", self.socket_path, "--log-target", "stderr", *self.arguments]
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                            env=self.environment, pass_fds=self.pass_fds)
        if self.wait:
            self.await_log("serving")
        return self

    def __enter__(self):
        return self.start()

    def __exit__(self, kind, *_):
        workers, failed = self.children() if self.process else [], None
        if self.process and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            if self.process.returncode != 0:    # a sanitizer's verdict, too
                kind = kind or AssertionError
                failed = f"mlad ended with {self.process.returncode}"
        if kind:
            print(self.log())
        left = [pid for pid in workers if is_alive(pid)]
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.directory, ignore_errors=True)
        assert not left, f"workers outlived mlad: {left}"
        assert not failed, failed

    def log(self):
        return pathlib.Path(self.log_path).read_text(encoding="utf-8")

    def await_log(self, text, times=1):
        def found():
            assert self.process.poll() is None, f"mlad exited with {self.process.returncode}:\n{self.log()}"
            return self.log().count(text) >= times
        eventually(found, f"'{text}' in the log")

    def await_socket(self):
        """Until a connection is possible; workers may still start."""
        def listening():
            try:
                self.peer().socket.close()
                return True
            except (FileNotFoundError, ConnectionRefusedError):
                return False
        eventually(listening, "it listens")

    def stop(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        return self.process.wait(PATIENCE)

    def children(self):
        try:
            with open(f"/proc/{self.process.pid}/task/{self.process.pid}/children", encoding="ascii") as file:
                return [int(pid) for pid in file.read().split()]
        except FileNotFoundError:
            return []

    def peer(self):
        return Peer(self.socket_path)

    def admin(self):
        peer = self.peer()
        peer.hello()
        return peer

    def status(self, device=None):
        with self.admin() as peer:
            status = peer.get("STATUS")
        return next(d for d in status["devices"] if d["name"] == device) if device else status

    def health(self):
        with self.admin() as peer:
            fields = peer.get("HEALTH")
        return fields["health"], fields["reason"]
