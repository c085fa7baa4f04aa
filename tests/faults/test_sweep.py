"""Every memory and socket call fails once, one after another: in libmla (client_sweep.c), in the worker and in the
supervisor while a client uses them. Nothing crashes, nothing leaks, the next client is served."""
import fcntl
import mmap
import os
import socket
import struct
import subprocess
import sys
import tempfile

import msgpack

from harness import Daemon, check, count_fds, count_maps, wait_for

INJECT_LIBRARY, CLIENT_SWEEP = os.environ["INJECT_LIBRARY"], os.environ["CLIENT_SWEEP_BIN"]
KINDS = {"memory": 1, "socket": 2}
HELLO, ERROR, REGISTER, UNREGISTER, PLAN, DROP, SUBMIT = 1, 4, 5, 6, 7, 8, 10
STATUS, CAPABILITIES, SESSIONS, HEALTH = 12, 14, 16, 18
PAGE = 4096


class Page:
    """inject.c's page."""

    def __init__(self):
        self.file = tempfile.NamedTemporaryFile(prefix="mlad-inject-")
        self.file.truncate(PAGE)
        self.map = mmap.mmap(self.file.fileno(), PAGE)

    def arm(self, kind, nth):
        struct.pack_into("<5Q", self.map, 0, 0, KINDS[kind], nth, 0, 0)
        struct.pack_into("<Q", self.map, 0, 1)

    def disarm(self):
        struct.pack_into("<Q", self.map, 0, 0)
        return struct.unpack_from("<Q", self.map, 32)[0] == 1  # fired

    def live(self):
        return struct.unpack_from("<q", self.map, 40)[0]


def environment(page, program):
    return {"LD_PRELOAD": INJECT_LIBRARY, "INJECT_PAGE": page.file.name, "INJECT_PROGRAM": program}


class Refused(Exception):
    pass


def ask(peer, kind, sequence, body, fds=()):
    socket.send_fds(peer, [msgpack.packb([1, kind, sequence, body])], fds)
    data = peer.recv(65536)
    if not data:
        raise Refused("closed")
    answer = msgpack.unpackb(data)
    if answer[1] == ERROR:
        check(answer[3]["message"], "an error without a sentence")
        raise Refused(answer[3]["code"])
    return answer[3]


def memfd(size):
    fd = os.memfd_create("sweep", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.truncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    return fd


def use_device(path):
    """Connect, register, plan, decode a batch with a known answer, unregister. Raises Refused or OSError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as peer:
        peer.settimeout(3)
        peer.connect(path)
        fd = memfd(4 * PAGE)
        try:
            with mmap.mmap(fd, 4 * PAGE) as data:
                data[PAGE:PAGE + 3 * 1152] = struct.pack("<H", 0x3F80) * (3 * 576)
                struct.pack_into("<i", data, 2 * PAGE, 0)
                struct.pack_into("<i", data, 2 * PAGE + 64, 3)
                at = lambda offset: {"buffer": 1, "offset": offset}
                ask(peer, HELLO, 1, {"client": "sweep", "device": "cpu"})
                ask(peer, REGISTER, 2, {"buffer": 1, "kind": "memfd", "bytes": 4 * PAGE}, [fd])
                ask(peer, PLAN, 3, {"plan": 1, "batch": {
                    "batch": 1, "heads": 2, "q_rows": 1, "q_dtype": "bf16", "kv_format": "bf16", "pages": 1,
                    "page_size": 3, "max_pages": 1, "softmax_scale": 1.0, "q": at(0), "kv": at(PAGE),
                    "block_table": at(2 * PAGE), "seqlens": at(2 * PAGE + 64),
                    "out": at(3 * PAGE)}})
                ask(peer, SUBMIT, 4, {"plan": 1})
                check(data[3 * PAGE:3 * PAGE + 2048] == struct.pack("<H", 0x3F80) * 1024,
                      "a decode said done and is wrong")
                ask(peer, DROP, 5, {"plan": 1})
                ask(peer, UNREGISTER, 6, {"buffer": 1})
        finally:
            os.close(fd)


def use_supervisor(path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as peer:
        peer.settimeout(3)
        peer.connect(path)
        ask(peer, HELLO, 1, {"client": "sweep"})
        ask(peer, STATUS, 2, {})
        ask(peer, CAPABILITIES, 3, {"device": "cpu"})
        ask(peer, SESSIONS, 4, {"device": "cpu"})
        ask(peer, HEALTH, 5, {})
    use_device(path)


def settled(daemon, fd_counts):
    """Nothing is held any more, in the worker's own account and in the kernel's."""
    device = daemon.device()
    return (device and device["state"] == "ready"
            and device["sessions"] + device["sessions_draining"] + device["held_bytes"] == 0
            and count_maps(device["pid"]) <= fd_counts["maps"] and count_fds(device["pid"]) <= fd_counts["worker"]
            and count_fds(daemon.pid) <= fd_counts["supervisor"] + 1 and device)


def sweep_daemon(program, kind, use):
    page = Page()
    daemon = Daemon(devices="cpu", environment=environment(page, program), options=("-o", "cpu_threads=1"))
    pid = daemon.ready()["pid"]
    for _ in range(20):
        use(daemon.socket_path)
    counts = {"worker": count_fds(pid), "supervisor": count_fds(daemon.pid), "maps": count_maps(pid)}
    wait_for("rest", 5, lambda: settled(daemon, counts))
    live, refused, nth, quiet = page.live(), 0, 0, 0
    while quiet < 3:  # timers may take the n-th call before the client does: three quiet rounds end the sweep
        nth += 1
        page.arm(kind, nth)
        try:
            use(daemon.socket_path)
        except (Refused, OSError, ValueError):
            refused += 1
        quiet = 0 if page.disarm() else quiet + 1
        device = wait_for(f"rest after call {nth}", 10, lambda: settled(daemon, counts))
        check(device["pid"] == pid, f"{program}: {kind} call {nth} killed the worker")
        use(daemon.socket_path)  # the next client is served
    wait_for("rest", 10, lambda: settled(daemon, counts))
    growth = page.live() - live
    print(f"{program}, {kind} calls: {nth - quiet} failed one by one, {refused} reported, {growth:+d} allocations "
          "afterwards")
    check(growth <= 8, "memory leaked")  # what libraries keep for good after their first failure
    check(nth - quiet >= 5, "the sweep reached hardly any call")
    daemon.stop()


def sweep_client(kind):
    page = Page()
    daemon = Daemon(devices="cpu")
    daemon.ready()
    result = subprocess.run([CLIENT_SWEEP, kind], env=dict(os.environ, **environment(page, "client_sweep")),
                            timeout=300)
    check(result.returncode == 0, f"client_sweep {kind}: exit status {result.returncode}")
    daemon.stop()


target, kind = sys.argv[1], sys.argv[2]
if target == "libmla":
    sweep_client(kind)
else:
    sweep_daemon(target, kind, use_device if target == "mlad-worker" else use_supervisor)
