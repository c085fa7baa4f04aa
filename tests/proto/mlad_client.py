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

import msgpack

VERSION = 1
MAX_MESSAGE = 65536
TYPES = {"HELLO": 1, "WELCOME": 2, "OK": 3, "ERROR": 4, "REGISTER": 5, "UNREGISTER": 6, "PLAN": 7, "DROP": 8,
         "DECODE": 9, "SUBMIT": 10, "DONE": 11, "STATUS": 12, "STATUS_REPLY": 13, "CAPABILITIES": 14,
         "CAPABILITIES_REPLY": 15, "SESSIONS": 16, "SESSIONS_REPLY": 17, "HEALTH": 18, "HEALTH_REPLY": 19,
         "DRAIN": 20, "EVICT": 21, "IMPORT": 22, "IMPORT_VMM": 23, "STEP": 27,
         "STEP_DROP": 28, "ARM": 29}
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


class Client:
    def __init__(self, path, device=None, name="mlad_client.py", timeout=30):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(timeout)
        self.socket.connect(path)
        self.last, self.answers = 0, {}
        hello = {"client": name} if device is None else {"client": name, "device": device}
        self.welcome = self.call("HELLO", hello)

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
            datagram = self.socket.recv(MAX_MESSAGE)
            if not datagram:
                raise ConnectionResetError("mlad has gone: connect and register again")
            _, kind, number, fields = msgpack.unpackb(datagram)
            if kind == TYPES["ERROR"] and number == 0:
                raise Refused(**fields)   # the session ends
            self.answers[number] = NAMES[kind], fields
        kind, fields = self.answers.pop(sequence)
        if kind == "ERROR":
            raise Refused(**fields)
        return fields

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
