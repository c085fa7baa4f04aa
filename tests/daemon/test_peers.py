"""Connections that the supervisor holds: who gets in, what is refused and how, what an operator may do.

usage: test_peers.py BEHAVIOUR"""
import contextlib
import os
import pathlib
import signal
import sys
import time

import msgpack
from supervisor_harness import Daemon, MLAD, PATIENCE, eventually

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "proto"))
from mlad_client import Client, Refused  # noqa: E402  (a client that shares no code with mlad)

STRANGER = 61001
AM_ROOT = os.geteuid() == 0
ADMIN_RESERVE = 16      # connections that admin users have beyond the limits
REAL_WORKER = str(pathlib.Path(MLAD).parent.parent / "libexec/mlad/mlad-worker")
NOT_RUN = 77            # SKIP_RETURN_CODE


@contextlib.contextmanager
def another_user(uid=STRANGER):
    """Connections made inside come from `uid`. Needs root."""
    if not AM_ROOT:
        sys.exit(NOT_RUN)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)


def descriptors(pid):
    return len(os.listdir(f"/proc/{pid}/fd"))


# ---- before HELLO ----

def silent_client_is_dropped():
    with Daemon(options="hello_timeout = 300ms") as daemon, daemon.peer() as peer:
        began = time.monotonic()
        assert "hello_timeout" in peer.ended("timeout")
        assert time.monotonic() - began > 0.25
        assert daemon.status()["connections"] == 1      # the one that asks


def refused_messages_do_not_extend_the_time_for_hello():
    with Daemon(options="hello_timeout = 500ms") as daemon, daemon.peer() as peer:
        end = time.monotonic() + PATIENCE
        try:
            while time.monotonic() < end:
                peer.send("STATUS")
                kind, sequence, fields = peer.receive()
                if sequence == 0:
                    assert fields["code"] == "timeout", fields
                    return
                assert fields["code"] == "state", fields
                time.sleep(0.05)
        except BrokenPipeError:
            assert peer.receive()[2]["code"] == "timeout"
            return
        raise AssertionError("it may chatter for ever")


def everything_but_hello_comes_too_early():
    with Daemon() as daemon, daemon.peer() as peer:
        for kind, fields in (("STATUS", {}), ("DRAIN", {"device": "cpu"}), ("UNREGISTER", {"buffer": 1})):
            assert "HELLO" in peer.refused("state", kind, fields)
        peer.hello()
        peer.refused("state", "HELLO", {"client": "again"})
        assert peer.get("HEALTH")["health"] == "ok"


def device_that_is_not_served_is_named_and_another_may_be_tried():
    with Daemon(devices="cpu,reference") as daemon, daemon.peer() as peer:
        assert "cpu, reference" in peer.refused("no_device", "HELLO", {"client": "t", "device": "gpu"}, field="device")
        assert peer.hello("reference")["device"] == "reference"


# ---- bad messages ----

def harmless_mistakes_are_named_and_the_session_goes_on():
    with Daemon() as daemon, daemon.admin() as peer:
        before = descriptors(daemon.process.pid)
        peer.refused("unknown_field", "STATUS", {"surprise": 1}, field="surprise")
        peer.refused("missing_field", "CAPABILITIES", {}, field="device")
        peer.refused("invalid", "CAPABILITIES", {"device": 7}, field="device")
        peer.refused("invalid", "CAPABILITIES", {"device": ""}, field="device")
        peer.refused("invalid", "EVICT", {"device": "cpu", "session": 0}, field="session")
        peer.refused("unknown_type", 999)
        peer.refused("unknown_type", "WELCOME", {
            "daemon": "x", "session": 1, "device": "", "features": 0, "max_message": 1, "max_buffers": 0,
            "max_bytes": 0,
            "max_plans": 0, "max_in_flight": 0})
        peer.refused("unknown_type", "QUERY")
        peer.refused("no_device", "CAPABILITIES", {"device": "gpu"}, field="device")
        peer.refused("not_found", "EVICT", {"device": "cpu", "session": 12345}, field="session")
        peer.refused("state", "UNREGISTER", {"buffer": 1})
        with open("/dev/null", "rb") as null:
            for count in (1, 2, 200):
                peer.refused("fds", "STATUS", fds=[null.fileno()] * count)
            peer.refused("state", "REGISTER", {"buffer": 1, "kind": "memfd", "bytes": 4096}, fds=[null.fileno()])
        peer.refused("fds", "REGISTER", {"buffer": 1, "kind": "memfd", "bytes": 4096})
        assert peer.get("HEALTH")["health"] == "ok"
        assert descriptors(daemon.process.pid) == before, "a descriptor was kept"


def mistakes_that_confuse_end_the_session_and_only_that():
    with Daemon() as daemon, daemon.admin() as witness, open("/dev/null", "rb") as null:
        before = descriptors(daemon.process.pid)
        cases = [
            ("malformed", lambda p: p.send_bytes(b"nonsense")),
            ("malformed", lambda p: p.send_bytes(msgpack.packb([1, 12, 1, {}]) + b"\0")),
            ("malformed", lambda p: p.send_bytes(b"\xdd\xff\xff\xff\xff")),
            ("version", lambda p: p.send("STATUS", version=2)),
            ("malformed", lambda p: p.send("STATUS", sequence=0)),
            ("malformed", lambda p: p.send_bytes(b"x" * 65537)),
        ]
        for code, mistake in cases:
            for speak_first in (False, True):
                with daemon.peer() as peer:
                    if speak_first:
                        peer.hello()
                    mistake(peer)
                    peer.ended(code)
        assert witness.get("HEALTH")["health"] == "ok"
        eventually(lambda: descriptors(daemon.process.pid) == before, "all descriptors are back")


def last_words_are_heard_behind_a_flood():
    with Daemon() as daemon:
        for _ in range(50):     # unread input at close would turn our end into ECONNRESET before the ERROR is read
            with daemon.peer() as peer:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    for _ in range(40):
                        peer.send_bytes(b"nonsense")
                peer.ended("malformed")


# ---- bounds ----

def connections_are_bounded():
    with Daemon(options="max_connections = 8\nmax_connections_per_user = 5\nallowed_users = *\n") as daemon:
        def fill(limit, sentence):
            held = [daemon.peer() for _ in range(limit)]
            for peer in held:
                peer.hello()
            surplus = daemon.peer()
            assert sentence in surplus.ended("busy")
            return held
        if not AM_ROOT:
            fill(5 + ADMIN_RESERVE, "max_connections_per_user")
            return
        with another_user():
            held = fill(5, "max_connections_per_user")
        with another_user(STRANGER + 1):
            held += fill(3, "max_connections connections")
        assert daemon.status()["connections"] == 9      # an operator still gets through
        held.pop().socket.close()
        eventually(lambda: daemon.status()["connections"] == 8, "the place is free")
        with another_user(), daemon.peer() as peer:
            peer.ended("busy")
        with another_user(STRANGER + 1), daemon.peer() as peer:
            peer.hello()


def client_that_does_not_read_is_dropped():
    with Daemon() as daemon, daemon.admin() as witness, daemon.admin() as peer:
        peer.socket.settimeout(2)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(100000):
                peer.send("CAPABILITIES", {"device": "cpu"})
            raise AssertionError("it was never dropped")
        daemon.await_log("it does not read its answers")
        assert witness.get("STATUS")["connections"] == 1


def requests_of_a_session_are_bounded():
    with Daemon(options="worker_timeout = 60s") as daemon, daemon.admin() as peer:
        worker = daemon.status("cpu")["pid"]
        os.kill(worker, signal.SIGSTOP)     # keeps them waiting
        sent = [peer.send("STATUS") for _ in range(6)]
        answers = [peer.receive() for _ in range(6)]
        os.kill(worker, signal.SIGCONT)
        busy = [s for kind, s, fields in answers if kind == "ERROR" and fields["code"] == "busy"]
        assert busy == sent[4:], answers


# ---- who may what ----

def strangers_are_denied_told_why_and_counted():
    with Daemon() as daemon:
        with another_user():
            for device in (None, "cpu"):
                with daemon.peer() as peer:
                    sentence = peer.refused("denied", "HELLO", {"client": "t"} | ({"device": device} if device else {}))
                    assert "user 61001" in sentence and "allowed_users" in sentence, sentence
                    peer.is_closed()
        assert daemon.status()["denied"] == 2
        daemon.configure("allowed_users = 61001")
        daemon.process.send_signal(signal.SIGHUP)
        daemon.await_log("configuration read again")
        with another_user(), daemon.peer() as peer:
            peer.hello("cpu")


def users_see_and_operators_act():
    with Daemon(options="allowed_users = *\nadmin_users = 61002") as daemon:
        with another_user(), daemon.peer() as peer:
            peer.hello()
            assert peer.get("STATUS")["devices"][0]["name"] == "cpu"
            assert peer.get("HEALTH")["health"] == "ok"
            assert peer.get("CAPABILITIES", {"device": "cpu"})["rows"]
            for kind, fields in (("DRAIN", {"device": "cpu"}), ("EVICT", {"device": "cpu", "session": 1})):
                sentence = peer.refused("denied", kind, fields)
                assert "admin_users" in sentence and "61001" in sentence, sentence
        assert daemon.status("cpu")["state"] == "ready"
        with another_user(STRANGER + 1), daemon.peer() as peer:
            peer.hello()
            peer.get("DRAIN", {"device": "cpu"})
        assert daemon.status("cpu")["state"] == "draining"


def high_priority_is_for_those_who_are_listed():
    hello = {"client": "test", "device": "cpu", "priority": "high"}
    with Daemon(options="allowed_users = *\nhigh_priority_users = 61002") as daemon:
        with another_user(), daemon.peer() as peer:
            sentence = peer.refused("denied", "HELLO", hello)
            assert "high_priority_users" in sentence, sentence
            peer.get("HELLO", {**hello, "priority": "normal"})
        with another_user(STRANGER + 1), daemon.peer() as peer:
            peer.get("HELLO", hello)
        with daemon.peer() as peer:
            peer.get("HELLO", hello)


def sessions_are_listed_in_pages_others_only_to_admins():
    with Daemon(options="allowed_users = *\nmax_sessions = 200") as daemon, contextlib.ExitStack() as stack:
        def session():
            peer = stack.enter_context(daemon.peer())
            return peer.hello("cpu")["session"]
        ours = [session() for _ in range(70)]
        with another_user():
            theirs = [session() for _ in range(3)]
            with daemon.peer() as peer:
                peer.hello()
                page = peer.get("SESSIONS", {"device": "cpu"})
                assert [s["session"] for s in page["sessions"]] == theirs and not page["more"], page
        with daemon.admin() as admin:
            first = admin.get("SESSIONS", {"device": "cpu"})
            assert [s["session"] for s in first["sessions"]] == ours[:64] and first["more"]
            second = admin.get("SESSIONS", {"device": "cpu", "after": ours[63]})
            assert [s["session"] for s in second["sessions"]] == ours[64:] + theirs and not second["more"]
            assert {s["uid"] for s in second["sessions"]} == {0, STRANGER}


def evicted_session_is_told():
    with Daemon() as daemon, daemon.admin() as admin, daemon.peer() as victim, daemon.peer() as other:
        session = victim.hello("cpu")["session"]
        other.hello("cpu")
        admin.get("EVICT", {"device": "cpu", "session": session})
        victim.ended("evicted")
        admin.refused("not_found", "EVICT", {"device": "cpu", "session": session})
        assert len(admin.get("SESSIONS", {"device": "cpu"})["sessions"]) == 1


# ---- drain ----

def drain_survives_the_worker_and_ends_on_resume():
    with Daemon() as daemon, daemon.admin() as admin:
        admin.get("DRAIN", {"device": "cpu"})
        os.kill(daemon.status("cpu")["pid"], signal.SIGKILL)
        eventually(lambda: (s := daemon.status("cpu"))["restarts"] == 1 and s["state"] == "draining", "it drains again")
        health, reason = daemon.health()
        assert health == "degraded" and "draining" in reason, (health, reason)
        with Client(daemon.socket_path, "cpu") as client:
            plan, _ = small_plan(client)
            try:
                client.wait(client.submit(plan))
                raise AssertionError("it took new work")
            except Refused as error:
                assert error.code == "draining", error
            admin.get("DRAIN", {"device": "cpu", "resume": True})
            client.wait(client.submit(plan))
        assert daemon.status("cpu")["state"] == "ready"


def small_plan(client, keys=1):
    """A plan over zeroed tensors, and its buffer."""
    pages = (keys + 63) // 64
    memory = client.register((1 << 20) + pages * 64 * 1152)
    memory.data[0x10000:0x10004] = keys.to_bytes(4, "little")
    table = b"".join(page.to_bytes(4, "little") for page in range(pages))
    memory.data[0x20000:0x20000 + len(table)] = table
    return client.plan({
        "batch": 1, "heads": 16, "q_rows": 1, "q_dtype": "bf16", "kv_format": "bf16", "pages": pages, "page_size": 64,
        "max_pages": pages, "softmax_scale": 0.1, "q": memory.tensor(0), "seqlens": memory.tensor(0x10000),
        "block_table": memory.tensor(0x20000), "out": memory.tensor(0x40000), "kv": memory.tensor(1 << 20)}), memory


def long_plan(client):
    """One that takes the device `reference` most of a second, in a sanitized build too."""
    keys = 512
    plan, _ = small_plan(client, keys)
    began = time.monotonic()
    client.wait(client.submit(plan))
    return small_plan(client, min(16384, int(keys * 0.7 / (time.monotonic() - began))))


def drain_is_answered_when_nothing_is_in_flight():
    with Daemon(devices="reference") as daemon, daemon.admin() as admin, \
            Client(daemon.socket_path, "reference") as client:
        plan, _ = long_plan(client)
        tickets = [client.submit(plan) for _ in range(3)]
        eventually(lambda: (s := daemon.status("reference"))["running"] + s["queued"] == 3, "all are in flight")
        drain = admin.send("DRAIN", {"device": "reference"})
        health = admin.send("HEALTH")
        assert admin.receive()[1] == health, "the drain is answered later, other requests before"
        assert admin.receive()[:2] == ("OK", drain)
        client.socket.setblocking(False)    # all answers have been sent by now
        for ticket in tickets:
            client.wait(ticket)


def stop_lets_decodes_in_flight_finish_and_reads_nothing_more():
    with Daemon(devices="reference", options="drain_timeout = 30s") as daemon:
        with Client(daemon.socket_path, "reference") as client:
            plan, _ = long_plan(client)
            tickets = [client.submit(plan) for _ in range(2)]
            eventually(lambda: (s := daemon.status("reference"))["running"] + s["queued"] == 2, "both are in flight")
            daemon.process.terminate()
            daemon.await_log("stopping")
            eventually(lambda: not os.path.exists(daemon.socket_path), "no new connections")
            late = client.submit(plan)
            for ticket in tickets:
                assert client.wait(ticket)["failed"] == 0
            try:
                client.wait(late)
                raise AssertionError("it was answered, with an error or without")
            except ConnectionResetError:
                pass    # which a client takes as: connect again, submit again
        assert daemon.process.wait(PATIENCE) == 0


# ---- devices that start ----

def connection_waits_for_its_device():
    with Daemon(worker=f'sleep 4; exec {REAL_WORKER} "$@"', wait=False, options="hello_timeout = 25s") as daemon:
        daemon.await_socket()
        with daemon.peer() as impatient:
            impatient.send("HELLO", {"client": "t", "device": "cpu"})
            eventually(lambda: daemon.status()["connections"] == 2, "it is held")
        with daemon.peer() as peer:
            assert daemon.status("cpu")["state"] == "starting"
            peer.send("HELLO", {"client": "t", "device": "cpu"})
            peer.send("STATUS")     # sent early: the worker's to read
            assert peer.receive()[0] == "WELCOME"
            assert peer.receive()[2]["code"] == "state"
        eventually(lambda: daemon.status()["connections"] == 1, "who left while waiting is forgotten")


def connection_waits_no_longer_than_hello_timeout():
    with Daemon(worker="sleep 60", wait=False, options="hello_timeout = 300ms\ndrain_timeout = 0") as daemon:
        daemon.await_socket()
        with daemon.peer() as peer:
            peer.refused("unavailable", "HELLO", {"client": "t", "device": "cpu"}, field="device")
            peer.is_closed()


if __name__ == "__main__":
    globals()[sys.argv[1]]()
