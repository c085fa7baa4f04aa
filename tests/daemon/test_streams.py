"""Decodes in the order of a client's CUDA stream, over the fake driver of tests/cuda/fake, whose streams run by
themselves: gates wait, workers and clients die while they do.

usage: test_streams.py, with MLAD_BIN, MLACTL_BIN, STREAM_CLIENT, MLAD_SOURCE, LD_LIBRARY_PATH"""
import contextlib
import os
import signal
import subprocess
import sys
import time

sys.path[:0] = [os.path.join(os.environ["MLAD_SOURCE"], "tests", folder) for folder in ("mlactl", "proto")]
import mlad_client  # noqa: E402
from daemon import Daemon, run  # noqa: E402
from fake_gpu import GPU, SECOND, inject  # noqa: E402


class Client:
    def __init__(self, daemon, case, order="stream", **extra):
        environment = {**os.environ, "MLAD_SOCKET": daemon.socket, "MLAD_DEVICE": GPU, "MLAD_ORDER": order,
                       "MLAD_FAKE_CUDA_CONTROL": "", **extra}
        self.process = subprocess.Popen([os.environ["STREAM_CLIENT"], case], env=environment, text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def line(self):
        return self.process.stdout.readline().strip()

    def go_on(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def end(self):
        out, err = self.process.communicate(timeout=120)
        assert self.process.returncode == 0 and out.endswith("done\n"), (out, err)
        return out


def eager(daemon):
    Client(daemon, "eager").end()


def many_rounds_ahead_of_the_device(daemon):
    Client(daemon, "ahead").end()


def steps_are_armed_by_one_message(daemon):
    Client(daemon, "step").end()


def graphs_arm_themselves(daemon):
    Client(daemon, "graph").end()


def what_fails_is_nan(daemon):
    Client(daemon, "failures").end()


def a_late_stream_is_served(daemon):
    before = daemon.devices()[GPU]["refused"]
    Client(daemon, "late").end()
    assert daemon.devices()[GPU]["refused"] - before >= 4, daemon.devices()[GPU]  # rounds that stopped


def host_order_goes_on_beside_an_armed_round(daemon):
    assert Client(daemon, "beside").end().startswith("rings\n")
    assert Client(daemon, "beside", MLAD_TRANSPORT="socket").end().startswith("socket\n")


def host_order_gives_the_same(daemon):
    out = Client(daemon, "host", order="").end()
    assert "MPS" in out, out
    Client(daemon, "host", order="host").end()


def refused(client, kind, fields, code, field):
    try:
        client.call(kind, fields)
    except mlad_client.Refused as error:
        assert (error.code, error.field) == (code, field), (fields, error)
    else:
        raise AssertionError(f"{kind} {fields} was not refused")


def wrong_steps_are_refused_by_name(daemon):
    owner = Client(daemon, "memory")
    handle, offset, _ = owner.line().split()
    offset = int(offset)
    with mlad_client.Client(daemon.socket, GPU) as client:
        client.call("IMPORT", {"buffer": 1, "handle": handle, "gpu": GPU, "offset": offset, "bytes": 1 << 19})
        client.call("IMPORT", {"buffer": 2, "handle": handle, "gpu": GPU, "offset": offset + (1 << 19), "bytes": 4096,
                               "access": "read"})
        host = client.register(4096)

        def tensor(at):
            return {"buffer": 1, "offset": at}
        client.call("PLAN", {"plan": 5, "batch": {
            "batch": 1, "heads": 1, "q_rows": 1, "q_dtype": "bf16", "kv_format": "bf16", "pages": 1, "page_size": 64,
            "max_pages": 1, "softmax_scale": 1.0, "q": tensor(0), "kv": tensor(4096), "block_table": tensor(1 << 17),
            "seqlens": tensor((1 << 17) + 64), "out": tensor((1 << 17) + 4096)}})
        good = {"step": 7, "slots": tensor(1 << 18), "layers": [{"plan": 5}, {"plan": 5}]}
        client.call("STEP", good)
        for changes, code, field in (
                ({}, "exists", "step"),
                ({"step": 8, "layers": []}, "invalid", "layers"),
                ({"step": 8, "layers": [{"plan": 6}]}, "not_found", "layers"),
                ({"step": 8, "slots": {"buffer": 9, "offset": 0}}, "not_found", "slots.buffer"),
                ({"step": 8, "slots": {"buffer": 2, "offset": 0}}, "invalid", "slots.buffer"),
                ({"step": 8, "slots": host.tensor(0)}, "invalid", "slots.buffer"),
                ({"step": 8, "slots": tensor(64)}, "invalid", "slots.offset"),
                ({"step": 8, "slots": tensor((1 << 19) - 128)}, "range", "slots"),
                ({"step": 8, "slots": tensor(1 << 30)}, "range", "slots")):
            refused(client, "STEP", {**good, **changes}, code, field)
        refused(client, "ARM", {"step": 8, "round": 1}, "not_found", "step")
        refused(client, "STEP_DROP", {"step": 8}, "not_found", "step")
        refused(client, "UNREGISTER", {"buffer": 1}, "in_use", "buffer")
        refused(client, "ARM", {"step": 7, "round": 1}, "timeout", "")  # nobody sets its flag
        client.call("DROP", {"plan": 5})  # the step has it still
        client.call("STEP_DROP", {"step": 7})
        client.call("UNREGISTER", {"buffer": 1})
    owner.go_on()
    owner.end()
    cpu = Daemon("cpu")
    try:
        with mlad_client.Client(cpu.socket, "cpu") as client:
            refused(client, "STEP", {"step": 1, "slots": {"buffer": 1, "offset": 0}, "layers": [{"plan": 1}]},
                    "unsupported", "step")
    finally:
        cpu.stop()


def a_killed_worker_is_a_delay(daemon):
    worker = daemon.devices()[GPU]["pid"]
    client = Client(daemon, "killed")
    assert client.line() == "ready"
    inject("hang=8")  # five kernels a layer: within the second
    client.go_on()
    assert client.line() == "waiting"
    time.sleep(0.5)
    os.kill(worker, signal.SIGKILL)
    inject()
    assert client.line() == "right", client.process.stderr.read()
    client.end()
    assert daemon.devices()[GPU]["pid"] != worker
    daemon.wait_ready()


def await_device(daemon, what):
    began = time.monotonic()
    while not what(daemon.devices()[GPU]):
        assert time.monotonic() < began + 20, daemon.devices()[GPU]
        time.sleep(0.02)


def nothing_is_held(device):
    return not device["held_bytes"] and not device["sessions_draining"] and not device["orphaned_bytes"]


def a_client_killed_in_its_own_gate_holds_nothing(daemon):
    worker = daemon.devices()[GPU]["pid"]
    client = Client(daemon, "gone")
    assert client.line() == "ready", client.process.stderr.read()
    inject("hang=2")  # behind the worker's gate: the client's stream has come, and waits for an answer
    try:
        client.go_on()
        assert client.line() == "waiting"
        time.sleep(0.3)
        assert client.process.poll() is None
        Client(daemon, "eager").end()
        client.process.kill()
        client.process.wait()
        await_device(daemon, lambda device: device["sessions_draining"] == 1)  # its memory is still in use
        Client(daemon, "eager").end()
        assert daemon.devices()[GPU]["sessions_draining"] == 1
    finally:
        inject()
    await_device(daemon, nothing_is_held)
    Client(daemon, "step").end()
    assert daemon.devices()[GPU]["pid"] == worker


def a_killed_client_holds_nothing(daemon):
    client = Client(daemon, "armed")
    assert client.line() == "armed", client.process.stderr.read()
    assert daemon.devices()[GPU]["sessions"] == 1
    Client(daemon, "eager").end()  # beside its gate
    client.process.kill()
    client.process.wait()
    await_device(daemon, nothing_is_held)
    Client(daemon, "step").end()


def more_clients_than_lanes_fall_back(daemon):
    inject("memory=4000000000")
    armed = [Client(daemon, "armed") for _ in range(8)]
    for client in armed:
        assert client.line() == "armed", client.process.stderr.read()
    Client(daemon, "eager").end()  # in host order
    for client in armed:
        client.process.kill()
        client.process.wait()
    inject()


def two_gpus_are_stream_order_by_themselves(_):
    inject("devices=2")
    daemon = Daemon(SECOND)
    try:
        for case in "eager", "graph", "step":
            Client(daemon, case, "", MLAD_DEVICE=SECOND, STREAM_GPU=GPU, MLAD_FAKE_CUDA="devices=2").end()
    finally:
        inject()
        daemon.stop()


def a_daemon_that_stays_away_leaves_nan(_):
    daemon = Daemon(GPU)
    try:
        client = Client(daemon, "gone")
        assert client.line() == "ready", client.process.stderr.read()
        inject("hang=2")
        client.go_on()
        assert client.line() == "waiting"
        time.sleep(0.3)
        worker = daemon.devices()[GPU]["pid"]
        daemon.process.kill()
        daemon.process.wait()
        with contextlib.suppress(ProcessLookupError):  # it may have gone with the daemon
            os.kill(worker, signal.SIGKILL)
        client.end()
    finally:
        inject()
        daemon.stop()


TESTS = [eager, many_rounds_ahead_of_the_device, steps_are_armed_by_one_message, graphs_arm_themselves,
         what_fails_is_nan, a_late_stream_is_served,
         host_order_goes_on_beside_an_armed_round, host_order_gives_the_same,
         wrong_steps_are_refused_by_name, a_killed_worker_is_a_delay,
         a_client_killed_in_its_own_gate_holds_nothing, a_killed_client_holds_nothing,
         more_clients_than_lanes_fall_back, two_gpus_are_stream_order_by_themselves,
         a_daemon_that_stays_away_leaves_nan]
if __name__ == "__main__":
    names = sys.argv[1:]
    run([test for test in TESTS if not names or test.__name__ in names], Daemon(GPU))
