"""Drives mlad-worker as the supervisor and its clients would: a control socket, a life page, sessions.

The caller owns what it makes; Worker is a context manager and leaves no process, descriptor or file behind. A test is
called with PROGRAM DEVICE BEHAVIOUR..., where a behaviour is a function of the test.
"""
import fcntl
import functools
import mmap
import os
import re
import socket
import struct
import subprocess
import sys
import tempfile
import time

import msgpack
import numpy as np

TYPES = dict(HELLO=1, WELCOME=2, OK=3, ERROR=4, REGISTER=5, UNREGISTER=6, PLAN=7, DROP=8, DECODE=9, SUBMIT=10,
             DONE=11, STATUS=12, SESSIONS=16, SESSIONS_REPLY=17, HEALTH=18, DRAIN=20, EVICT=21, IMPORT=22,
             IMPORT_VMM=23, RING_MEMORY=24, KNOCK=25, NEWS=26, CONFIGURE=64, ATTACH=65, READY=66, QUERY=67, REPORT=68)
NAMES = {number: name for name, number in TYPES.items()}
PAGE = mmap.PAGESIZE
PROGRAM, DEVICE = sys.argv[1], sys.argv[2]
LIMITS = dict(max_sessions=64, max_bytes=1 << 30, max_buffers=64, max_plans=64, max_in_flight=64, queue_limit=64,
              max_bytes_per_session=1 << 30, max_in_flight_per_session=1000, log_level=4, draining=False)
PATIENCE = 30.0     # seconds until a wait is a failure; sanitizers are slow


class Refused(Exception):
    """An ERROR, as code and field."""
    def __init__(self, body):
        super().__init__(f"{body['code']} {body['field']!r}: {body['message']}")
        self.code, self.field, self.message = body["code"], body["field"], body["message"]


def expect(code, field, call, *arguments, **named):
    """`call` must be refused with that code and field; returns the sentence."""
    try:
        result = call(*arguments, **named)
    except Refused as error:
        assert (error.code, error.field) == (code, field), f"wanted {code} {field!r}, got {error}"
        assert len(error.message) > 10, error.message
        return error.message
    raise AssertionError(f"wanted {code} {field!r}, got {result}")


def eventually(condition, seconds=PATIENCE):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)


class Peer:
    """One end of a SEQPACKET connection."""
    def __init__(self, sock):
        self.sock, self.sequence = sock, 0
        sock.settimeout(PATIENCE)

    def send_raw(self, data, fds=()):
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))] if fds else []
        self.sock.sendmsg([data], rights)

    def send(self, kind, body=None, fds=(), sequence=None):
        if sequence is None:
            self.sequence += 1
            sequence = self.sequence
        number = TYPES[kind] if isinstance(kind, str) else kind
        self.send_raw(msgpack.packb([1, number, sequence, body or {}]), fds)
        return sequence

    def receive(self):
        """(type, sequence, body), or None at end of file."""
        data = self.sock.recv(65536)
        if not data:
            return None
        version, kind, sequence, body = msgpack.unpackb(data)
        assert version == 1
        return NAMES[kind], sequence, body

    def answer(self, sequence):
        message = self.receive()
        assert message is not None, "end of file"
        assert message[1] == sequence, f"wanted the answer to {sequence}, got {message}"
        if message[0] == "ERROR":
            raise Refused(message[2])
        return message

    def ask(self, kind, body=None, fds=()):
        return self.answer(self.send(kind, body, fds))

    def ended(self):
        """Read to the end of file; the messages before it."""
        messages = []
        while (message := self.receive()) is not None:
            messages.append(message)
        return messages

    def close(self):
        self.sock.close()


def memfd(size, seals=fcntl.F_SEAL_SHRINK, flags=os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC):
    fd = os.memfd_create("test", flags)
    os.ftruncate(fd, size)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


class Memory:
    """A sealed memfd, mapped here."""
    def __init__(self, size):
        self.fd, self.size = memfd(size), size
        self.map = mmap.mmap(self.fd, size)

    def array(self, offset, shape, dtype):
        return np.frombuffer(self.map, dtype, int(np.prod(shape)), offset).reshape(shape)


class Session(Peer):
    def __init__(self, sock, welcome):
        super().__init__(sock)
        self.id, self.limits = welcome["session"], welcome

    def register(self, buffer, fd, size, **fields):
        return self.ask("REGISTER", dict(buffer=buffer, kind="memfd", bytes=size, **fields), [fd])


class Case:
    """A batch in two buffers, inputs and outputs: every request has K keys of one page, and the same q.

    With K = 1, out is the value of the only key, exactly.
    """
    def __init__(self, B=1, H=1, K=1, pages=2, q_len=1):
        self.B, self.H, self.q_len = B, H, q_len
        table = max(1, -(-K // 64))
        rows = B * q_len
        self.offsets = {}
        end = 0
        for name, size in dict(q=rows * H * 1152, kv=pages * 64 * 1152, block_table=4 * B * table, seqlens=4 * B,
                               cu_q=4 * (B + 1)).items():
            self.offsets[name], end = end, (end + size + 63) // 64 * 64
        self.inputs = Memory(-(-end // PAGE) * PAGE)
        self.out_bytes = rows * H * 1024
        lse = (self.out_bytes + 63) // 64 * 64
        self.outputs = Memory(-(-(lse + rows * H * 4) // PAGE) * PAGE)
        values = np.random.default_rng(B * 1000 + K).standard_normal((pages, 64, 576)).astype(np.float32)
        self.kv = self.inputs.array(self.offsets["kv"], (pages, 64, 576), np.uint16)
        self.kv[:] = (values.view(np.uint32) >> 16).astype(np.uint16)
        self.q = self.inputs.array(self.offsets["q"], (rows, H, 576), np.uint16)
        self.q[:] = 0x3C00
        self.block_table = self.inputs.array(self.offsets["block_table"], (B, table), np.int32)
        self.seqlens = self.inputs.array(self.offsets["seqlens"], (B,), np.int32)
        self.seqlens[:] = K
        self.cu_q = self.inputs.array(self.offsets["cu_q"], (B + 1,), np.int32)
        self.cu_q[:] = np.arange(B + 1) * q_len
        self.out = self.outputs.array(0, (rows, H, 512), np.uint16)
        tensor = lambda name: dict(buffer=1, offset=self.offsets[name])
        self.batch = dict(batch=B, heads=H, q_rows=rows, q_dtype="bf16", kv_format="bf16", pages=pages, page_size=64,
                          max_pages=table, softmax_scale=0.04, q=tensor("q"), kv=tensor("kv"),
                          block_table=tensor("block_table"), seqlens=tensor("seqlens"), out=dict(buffer=2, offset=0),
                          lse=dict(buffer=2, offset=lse))

    def register(self, session):
        session.register(1, self.inputs.fd, self.inputs.size, access="read")
        session.register(2, self.outputs.fd, self.outputs.size)
        return self

    def plan(self, session, number=1):
        session.ask("PLAN", dict(plan=number, batch=self.batch))
        return self

    def changed(self, **fields):
        """The descriptor with some fields changed; None removes one."""
        return {name: value for name, value in {**self.batch, **fields}.items() if value is not None}

    def ragged(self):
        return self.changed(cu_q=dict(buffer=1, offset=self.offsets["cu_q"]))

    def right(self):
        """With K = 1: each row of out is the value of the first key of its request's page."""
        rows = np.repeat(self.kv[self.block_table[:, 0], 0, :512], self.q_len, axis=0)
        return np.array_equal(self.out, np.repeat(rows[:, None], self.H, axis=1))


class Worker:
    def __init__(self, program, device="cpu", threads=2, directory=None, ready=True, arguments=(), status=0,
                 **limits):
        self.directory = directory or tempfile.mkdtemp(prefix="mlad-worker-test-")
        self.own_directory, self.status = directory is None, status
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        life = os.memfd_create("life", os.MFD_CLOEXEC)
        os.ftruncate(life, PAGE)
        self.life_map = mmap.mmap(life, PAGE, prot=mmap.PROT_READ)

        def move():
            high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (theirs.fileno(), life)]
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)
            os.close(high[0])
            os.close(high[1])
        self.process = subprocess.Popen(
            [program, "--device", device, "--control", "3", "--life", "4", "--lock", f"{self.directory}/{device}.lock",
             "--threads", str(threads), "--log-level", "4", "--log-target", "stderr", *arguments], preexec_fn=move,
            close_fds=False, env={**os.environ, "ASAN_OPTIONS": "quarantine_size_mb=1",      # memory is measured
                                  "TSAN_OPTIONS": "halt_on_error=1"})             # _exit would hide a report
        theirs.close()
        os.close(life)
        self.device, self.control, self.next_session = device, Peer(ours), 1
        try:
            self.configure(**limits)
        except (BrokenPipeError, ConnectionResetError):     # it could not start
            assert not ready
        if ready:
            self.wait_ready()

    def wait_ready(self):
        kind, sequence, self.ready = self.control.receive()
        assert (kind, sequence) == ("READY", 0), (kind, sequence, self.ready)

    def configure(self, **limits):
        self.control.send("CONFIGURE", {**LIMITS, **limits}, sequence=0)

    def life(self):
        return dict(zip(("beat", "progress", "running", "decodes"), struct.unpack("4Q", self.life_map[:32])))

    def attach(self, uid=1000, client="test", rings=False):
        """A session; with `rings` it has the descriptor of their memory in ring_memory."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        number, self.next_session = self.next_session, self.next_session + 1
        self.control.send("ATTACH", dict(session=number, uid=uid, pid=os.getpid(), hello_seq=77,
                                         hello=dict(client=client, device=self.device, features=int(rings))),
                          [theirs.fileno()], sequence=0)
        theirs.close()
        fds = []
        if rings:
            ours.settimeout(PATIENCE)
            data, fds, _, _ = socket.recv_fds(ours, 65536, 4)
            version, kind, sequence, body = msgpack.unpackb(data)
            assert (kind, sequence, len(fds)) == (TYPES["RING_MEMORY"], 0, 1), (kind, sequence, body, fds)
        kind, _, welcome = Peer(ours).answer(77)
        assert kind == "WELCOME" and welcome["session"] == number and welcome["device"] == self.device
        assert welcome["features"] == int(rings), welcome
        session = Session(ours, welcome)
        session.ring_memory, session.ring_entries = (fds[0], body["entries"]) if rings else (None, 0)
        return session

    def report(self):
        report = self.control.ask("QUERY")[2]["device"]
        assert report["orphaned_bytes"] == 0, report
        return report

    def descriptors(self):
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def mapped(self):
        """Bytes of memfds mapped by the worker, its life page aside."""
        total = 0
        with open(f"/proc/{self.process.pid}/maps") as maps:
            for line in maps:
                found = re.match(r"([0-9a-f]+)-([0-9a-f]+) .*/memfd:test", line)
                if found:
                    total += int(found[2], 16) - int(found[1], 16)
        return total

    def resident(self):
        with open(f"/proc/{self.process.pid}/statm") as statm:
            return int(statm.read().split()[1]) * PAGE

    def __enter__(self):
        return self

    def __exit__(self, kind, value, trace):
        self.control.close()
        try:
            status = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError("the worker outlived its control socket")
        finally:
            if self.own_directory:
                for name in os.listdir(self.directory):
                    os.unlink(f"{self.directory}/{name}")
                os.rmdir(self.directory)
        if kind is None:
            assert status == self.status, f"the worker ended with {status}"


def start(**named):
    return Worker(PROGRAM, named.pop("device", DEVICE), **named)


@functools.cache
def keys_per_second(device, heads):
    """How many keys of one head of one token a device does; a sanitizer makes it 50 times fewer."""
    with start(device=device) as worker:
        session = worker.attach()
        Case(B=4, H=heads, K=128).register(session).plan(session)
        return 4 * heads * 128 / min(done(session, submit(session))["kernel_ns"] / 1e9 for _ in range(3))


def slow(seconds=0.15, B=16, device="reference", heads=8):
    """A batch that keeps the device busy for about that long, so that messages arrive meanwhile."""
    return Case(B=B, H=heads, K=max(1, int(seconds * keys_per_second(device, heads) / B / heads)))


def submit(session, plan=1):
    return session.send("SUBMIT", dict(plan=plan))


def done(session, sequence):
    kind, _, body = session.answer(sequence)
    assert kind == "DONE", kind
    return body


def run(behaviours):
    """Call those that the command line names."""
    for name in sys.argv[3:]:
        begin = time.monotonic()
        behaviours[name]()
        print(f"{name}: {time.monotonic() - begin:.2f} s")
