"""A client of mlad in plain Python, written from PROTOCOL.md alone: no libmla, only sockets, memfds and msgpack.

    with Client("/run/mlad/mlad.sock", "cpu") as client:
        memory = client.register(1 << 20)          # a Buffer; write into memory.data
        plan = client.plan({"batch": 1, ...,  "q": memory.tensor(0)})
        client.wait(client.submit(plan))           # DONE's fields, or raises Refused
"""
import fcntl
import mmap
import os
import socket
import struct

import msgpack

VERSION = 1
MAX_MESSAGE = 65536
TYPES = {"HELLO": 1, "WELCOME": 2, "OK": 3, "ERROR": 4, "REGISTER": 5, "UNREGISTER": 6, "PLAN": 7, "DROP": 8,
         "DECODE": 9, "SUBMIT": 10, "DONE": 11, "STATUS": 12, "STATUS_REPLY": 13, "CAPABILITIES": 14,
         "CAPABILITIES_REPLY": 15, "SESSIONS": 16, "SESSIONS_REPLY": 17, "HEALTH": 18, "HEALTH_REPLY": 19,
         "DRAIN": 20, "EVICT": 21, "IMPORT": 22, "IMPORT_VMM": 23, "RING_MEMORY": 24, "KNOCK": 25, "NEWS": 26,
         "STEP": 27, "STEP_DROP": 28, "ARM": 29}
NAMES = {number: name for name, number in TYPES.items()}


class Refused(Exception):
    """An ERROR: .code is stable, .field the path at fault, .message one sentence."""

    def __init__(self, code, field, message):
        super().__init__(f"{code}: {field + ': ' if field else ''}{message}")
        self.code, self.field, self.message = code, field, message


class Buffer:
    """A sealed memfd: `id` at the daemon, `data` here."""

    def __init__(self, number, size):
        self.id, self.size = number, size
        self.fd = os.memfd_create("mlad-client", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, size)
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        self.data = mmap.mmap(self.fd, size)

    def tensor(self, offset):
        return {"buffer": self.id, "offset": offset}


class Rings:
    """A session's rings. Submissions are pushed; completions are taken before anything sleeps on the socket."""

    def __init__(self, fd, entries):
        self.entries = entries
        self.words = memoryview(mmap.mmap(fd, 512 + 2 * 64 * entries)).cast("I")   # stored and read whole
        assert list(self.words[:3]) == [0x52504C4D, 2, entries], list(self.words[:3])
        self.pushed = self.popped = 0

    def push(self, *words):
        """Append an entry. False: it is full."""
        if (self.pushed - self.words[16]) & 0xFFFFFFFF == self.entries:
            return False
        at = 128 + self.pushed % self.entries * 16
        for i in range(16):
            self.words[at + i] = words[i] if i < len(words) else 0
        self.pushed = (self.pushed + 1) & 0xFFFFFFFF
        self.words[32] = self.pushed
        return True

    def knock(self):
        """After pushing: is a KNOCK asked for?"""
        asked, self.words[17] = self.words[17] & 1, 0
        return asked

    def pop(self):
        """(sequence, DONE's fields), or None."""
        if self.words[64] == self.popped:
            return None
        at = 128 + (self.entries + self.popped % self.entries) * 16
        sequence, code, receive, queue, kernel, tokens, failed = struct.unpack_from("<2I4QI", self.words[at:at + 16])
        assert code == failed == 0
        self.popped = (self.popped + 1) & 0xFFFFFFFF
        self.words[48] = self.popped
        return sequence, {"receive_ns": receive, "queue_ns": queue, "kernel_ns": kernel, "kv_tokens": tokens,
                          "failed": 0, "failures": []}

    def sleep(self, asked):
        self.words[49] = asked


class Client:
    def __init__(self, path, device=None, name="mlad_client.py", timeout=30, rings=False):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(timeout)
        self.socket.connect(path)
        self.last, self.answers, self.rings = 0, {}, None
        hello = {"client": name} if device is None else {"client": name, "device": device}
        self.welcome = self.call("HELLO", {**hello, "features": 1} if rings else hello)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def send(self, kind, fields, fds=()):
        """Send a request; returns its sequence."""
        self.last = self.last % 0xFFFFFFFF + 1
        socket.send_fds(self.socket, [msgpack.packb([VERSION, TYPES[kind], self.last, fields])], fds)
        return self.last

    def wait(self, sequence):
        """The answer of that request, whatever order answers come in."""
        while sequence not in self.answers:
            if self.rings and (completion := self.rings.pop()):
                self.answers[completion[0]] = "DONE", completion[1]
                continue
            if self.rings:
                self.rings.sleep(1)
                if self.rings.words[64] != self.rings.popped:
                    continue
            datagram, fds, _, _ = socket.recv_fds(self.socket, MAX_MESSAGE, 1)
            if not datagram:
                raise ConnectionResetError("mlad has gone: connect and register again")
            _, kind, number, fields = msgpack.unpackb(datagram)
            if kind == TYPES["ERROR"] and number == 0:
                raise Refused(**fields)   # the session ends
            if kind == TYPES["RING_MEMORY"]:
                self.rings = Rings(*fds, fields["entries"])
                os.close(*fds)
            elif kind != TYPES["NEWS"]:
                self.answers[number] = NAMES[kind], fields
        kind, fields = self.answers.pop(sequence)
        if kind == "ERROR":
            raise Refused(**fields)
        return fields

    def push(self, operation, *words):
        """Send an entry by the ring; returns its sequence."""
        self.last = self.last % 0xFFFFFFFF + 1
        if not self.rings.push(operation, self.last, *words):
            raise BlockingIOError("the submission ring is full")
        if self.rings.knock():
            self.socket.send(msgpack.packb([VERSION, TYPES["KNOCK"], 0, {}]))
        return self.last

    def call(self, kind, fields=None, fds=()):
        return self.wait(self.send(kind, fields or {}, fds))

    def register(self, size, access="readwrite"):
        buffer = Buffer(self.last + 1, size)   # any number unique in the session will do
        self.call("REGISTER", {"buffer": buffer.id, "kind": "memfd", "bytes": size, "access": access}, [buffer.fd])
        os.close(buffer.fd)
        return buffer

    def unregister(self, buffer):
        self.call("UNREGISTER", {"buffer": buffer.id})

    def plan(self, batch):
        number = self.last + 1
        self.call("PLAN", {"plan": number, "batch": batch})
        return number

    def drop(self, plan):
        self.call("DROP", {"plan": plan})

    def submit(self, plan):
        return self.send("SUBMIT", {"plan": plan})

    def decode(self, batch):
        return self.call("DECODE", {"batch": batch})
