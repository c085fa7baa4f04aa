"""Decodes in the order of a client's CUDA stream, over the fake driver of tests/cuda/fake, whose streams run by
themselves: gates wait, workers and clients die while they do.

usage: test_streams.py, with MLAD_BIN, MLACTL_BIN, STREAM_CLIENT, MLAD_SOURCE, LD_LIBRARY_PATH"""
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time

sys.path[:0] = [os.path.join(os.environ["MLAD_SOURCE"], "tests", folder) for folder in ("mlactl", "proto")]
import mlad_client  # noqa: E402
from daemon import Daemon, run  # noqa: E402
from fake_gpu import GPU, SECOND, inject  # noqa: E402
from supervisor_harness import eventually  # noqa: E402

COUNTED = "all rounds are counted, which may be after their client's end"


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


def by_the_socket(out):
    """How many SUBMIT and ARM libmla sent over it."""
    return tuple(int(number) for number in re.search(r"by the socket: SUBMIT (\d+), ARM (\d+)", out).groups())


def eager(daemon):
    assert by_the_socket(Client(daemon, "eager").end()) == (0, 0)


def many_rounds_ahead_of_the_device(daemon):
    assert by_the_socket(Client(daemon, "ahead").end()) == (0, 0)


def steps_are_armed_by_one_entry_or_message(daemon):
    assert by_the_socket(Client(daemon, "step").end()) == (0, 0)
    assert by_the_socket(Client(daemon, "step", MLAD_TRANSPORT="socket").end()) == (12, 12)


def graphs_arm_themselves(daemon):
    assert by_the_socket(Client(daemon, "graph").end()) == (0, 0)


def what_fails_is_nan(daemon):
    Client(daemon, "failures").end()


def a_late_stream_is_served(daemon):
    before = daemon.devices()[GPU]["refused"]
    assert by_the_socket(Client(daemon, "late").end()) == (0, 0)
    assert daemon.devices()[GPU]["refused"] - before >= 4, daemon.devices()[GPU]  # rounds that stopped


def waits_for_the_stream_and_for_the_daemon_are_measured(daemon):
    rounds, layers, pause, slow = 4, 3, 0.5, 0.01

    def phases():
        return {entry["phase"]: entry for entry in daemon.devices()[GPU]["latency"]}
    before, began = phases(), time.monotonic()
    inject("slow=10")  # each kernel of the worker
    Client(daemon, "paced").end()
    inject()
    took = time.monotonic() - began
    eventually(lambda: phases()["serve"]["count"] >= before["serve"]["count"] + rounds * layers, COUNTED)
    after = phases()
    counts = [after[name]["count"] - before[name]["count"] for name in ("gate", "serve")]
    gate, serve = ((after[name]["sum_ns"] - before[name]["sum_ns"]) / 1e9 for name in ("gate", "serve"))
    assert counts == [rounds * layers] * 2, counts
    assert gate >= rounds * pause / 2, gate  # the rest for the entry's way
    assert serve >= rounds * layers * 3 * slow, serve  # prepare, split and combine
    assert gate + serve <= took, (gate, serve, took)  # one behind the other
    for name in "gate", "serve":
        phase = after[name]
        assert 0 < phase["p50_ns"] <= phase["p90_ns"] <= phase["p99_ns"] <= phase["max_ns"], phase
        top, = daemon.json("top", "--once", "--interval", "0.1")["devices"]
        assert top["phases"][name] == {key: phase[key] for key in ("count", "p50_ns", "p99_ns")}, (top, phase)
        count = f'mlad_decode_phase_seconds_count{{device="{GPU}",phase="{name}"}} {phase["count"]}\n'
        assert count in daemon.ctl("metrics").stdout, count
    assert after["gate"]["max_ns"] >= pause / 2 * 1e9
    assert "STREAM ORDER, P50 / P99" in daemon.ctl("top", "--once", "--interval", "0.1").stdout
    assert "serve" in daemon.ctl("status").stdout


def host_order_goes_on_beside_an_armed_round(daemon):
    out = Client(daemon, "beside").end()
    assert out.startswith("rings\n") and by_the_socket(out) == (0, 0), out
    out = Client(daemon, "beside", MLAD_TRANSPORT="socket").end()
    assert out.startswith("socket\n") and by_the_socket(out) == (28, 1), out


def host_order_gives_the_same(daemon):
    out = Client(daemon, "host", order="").end()
    assert "MPS" in out, out
    Client(daemon, "host", order="host").end()


def the_bench_measures_steps_in_stream_order(daemon):
    def served():
        return {entry["phase"]: entry["count"] for entry in daemon.devices()[GPU]["latency"]}["serve"]

    def bench(order, *arguments):
        return daemon.ctl("bench", "step", "--device", GPU, "--layers", 3, "--kv-len", 4, "--heads", 1, "--seconds", 1,
                          *arguments, MLAD_ORDER=order, MLAD_FAKE_CUDA_CONTROL="").stdout
    before = served()
    report = json.loads(bench("stream", "--json"))
    assert (report["order"], report["why"]) == ("stream", "$MLAD_ORDER is stream") and report["steps"] >= 3, report
    expected = before + 3 * 2 * (report["steps"] + 1)
    eventually(lambda: served() >= expected, COUNTED)
    assert served() == expected, (before, served(), report)
    for way in "waited", "ahead", "stream", "graph":
        assert 0 < report[way]["step_p50_ns"] <= report[way]["step_p99_ns"], report
    assert "3, as a graph" in bench("stream")
    before = served()
    report = json.loads(bench("host", "--json"))
    assert (report["order"], report["why"]) == ("host", "$MLAD_ORDER is host") and "stream" not in report, report
    assert served() == before


def refusal(call, *arguments):
    try:
        call(*arguments)
    except mlad_client.Refused as error:
        return error.code, error.field
    raise AssertionError(f"{arguments} was not refused")


def refused_by(call, arguments, code, field):
    said = refusal(call, *arguments)
    assert said == (code, field), (arguments, said)


def refused(client, kind, fields, code, field):
    refused_by(client.call, (kind, fields), code, field)


def tensor(at):
    return {"buffer": 1, "offset": at}


@contextlib.contextmanager
def raw_step(daemon, **options):
    """A client without libmla, beside one whose memory is its buffer 1, its step 7 of two layers, and the memory's
    handle and offset. The memory is zeros: no flag is set, and round 0 of each layer is done."""
    owner = Client(daemon, "memory")
    handle, offset, _ = owner.line().split()
    with mlad_client.Client(daemon.socket, GPU, **options) as client:
        client.call("IMPORT", {"buffer": 1, "handle": handle, "gpu": GPU, "offset": int(offset), "bytes": 1 << 19})
        client.call("PLAN", {"plan": 5, "batch": {
            "batch": 1, "heads": 1, "q_rows": 1, "q_dtype": "bf16", "kv_format": "bf16", "pages": 1, "page_size": 64,
            "max_pages": 1, "softmax_scale": 1.0, "q": tensor(0), "kv": tensor(4096), "block_table": tensor(1 << 17),
            "seqlens": tensor((1 << 17) + 64), "out": tensor((1 << 17) + 4096)}})
        good = {"step": 7, "slots": tensor(1 << 18), "layers": [{"plan": 5}, {"plan": 5}]}
        client.call("STEP", good)
        yield client, good, handle, int(offset)
    owner.go_on()
    owner.end()


def entries_of_the_ring_arm_and_are_refused_like_messages(daemon):
    with raw_step(daemon, rings=True) as (client, _, _, _):
        submit, arm = 1, 2

        def waits(*words):
            return client.wait(client.push(*words))
        done = waits(arm, 7, 0)
        assert done["failed"] == done["kv_tokens"] == 0, done
        assert client.rings.popped == 1, "what succeeds is told by the ring"
        client.call("ARM", {"step": 7, "round": 0})
        assert client.rings.popped == 2
        for words, code, field in (((arm, 8, 0), "not_found", "step"), ((arm, 0, 0), "not_found", "step"),
                                   ((arm, 5, 0), "not_found", "step"), ((submit, 7, 0), "not_found", "plan"),
                                   ((submit, 5, 1), "invalid", "submission.round"),
                                   ((arm, 7, 0, 1), "invalid", "submission.zero"),
                                   ((3, 7, 0), "invalid", "submission.operation"),
                                   ((arm, 7, 1), "timeout", "")):  # nobody sets its flag
            refused_by(waits, words, code, field)
        assert client.rings.popped == 2
        # Entries before a datagram: the step is there for them, and gone for who comes later.
        first = [client.push(arm, 7, 0) for _ in range(20)]
        client.call("STEP_DROP", {"step": 7})
        for sequence in first:
            client.wait(sequence)
        refused_by(waits, (arm, 7, 0), "not_found", "step")


def a_ring_full_of_rounds_is_its_own_session_s_trouble(_):
    daemon = Daemon(GPU, "-o", "max_in_flight=32")  # each that is taken has to time out
    try:
        with raw_step(daemon, rings=True) as (client, _, _, _):
            limit = client.welcome["max_in_flight"]

            def push(times, *words):
                pushed = []
                while len(pushed) < times:
                    with contextlib.suppress(BlockingIOError):  # full: the worker is about to take some
                        pushed.append(client.push(*words))
                return pushed
            pushed = push(limit + 300, 2, 7, 1)  # nobody sets its flag
            said = [refusal(client.wait, sequence) for sequence in pushed]
            assert said[:limit] == [("timeout", "")] * limit, said
            # Where the machine stands still while they are pushed, one that is over makes room for another.
            assert ("busy", "") in said[limit:] and {*said} == {("busy", ""), ("timeout", "")}, said
            push(limit // 2, 2, 7, 2)  # limits are a user's: others have the rest
            Client(daemon, "eager").end()
            push(limit // 2, 2, 7, 3)  # and it ends with as many under way
        await_device(daemon, nothing_is_held)
    finally:
        daemon.stop()


def wrong_steps_are_refused_by_name(daemon):
    with raw_step(daemon) as (client, good, handle, offset):
        client.call("IMPORT", {"buffer": 2, "handle": handle, "gpu": GPU, "offset": offset + (1 << 19), "bytes": 4096,
                               "access": "read"})
        host = client.register(4096)
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


TESTS = [eager, many_rounds_ahead_of_the_device, steps_are_armed_by_one_entry_or_message, graphs_arm_themselves,
         entries_of_the_ring_arm_and_are_refused_like_messages,
         a_ring_full_of_rounds_is_its_own_session_s_trouble,
         what_fails_is_nan, a_late_stream_is_served, waits_for_the_stream_and_for_the_daemon_are_measured,
         host_order_goes_on_beside_an_armed_round, host_order_gives_the_same,
         the_bench_measures_steps_in_stream_order,
         wrong_steps_are_refused_by_name, a_killed_worker_is_a_delay,
         a_client_killed_in_its_own_gate_holds_nothing, a_killed_client_holds_nothing,
         more_clients_than_lanes_fall_back, two_gpus_are_stream_order_by_themselves,
         a_daemon_that_stays_away_leaves_nan]
if __name__ == "__main__":
    named = {test.__name__: test for test in TESTS}
    run([named[name] for name in sys.argv[1:]] or TESTS, Daemon(GPU))  # a name that is none fails
