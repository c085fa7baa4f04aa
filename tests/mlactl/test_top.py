"""`mlactl top` and the subcommands of `mlactl bench`: consistent with themselves, with the daemon, with a terminal."""
import contextlib
import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import termios
import time

from daemon import MLACTL, MLAD, Daemon, mlactl, run

PHASES = {"receive", "queue", "kernel", "reply"}


def start(daemon, *arguments, **extra):
    environment = dict(os.environ, MLAD_SOCKET=daemon.socket)
    return subprocess.Popen([MLACTL, *arguments], env=environment, text=True, **extra)


@contextlib.contextmanager
def load(daemon):
    """Somebody at work for a while; ended by its process id."""
    worker = start(daemon, "bench", "step", "--layers", "4", "--kv-len", "64", "--seconds", "60", "-q",
                   stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 20
        before = daemon.devices()["cpu"]["decodes"]
        while daemon.devices()["cpu"]["decodes"] < before + 20:
            assert time.monotonic() < deadline, "no load"
            time.sleep(0.05)
        yield worker
    finally:
        worker.kill()
        worker.wait()


def rates_are_those_of_the_daemons_counters(daemon):
    with load(daemon) as worker:
        before, then = daemon.devices()["cpu"], time.monotonic()
        look = daemon.json("top", "--once", "--interval", "1", "--device", "cpu")
        after, seconds = daemon.devices()["cpu"], time.monotonic() - then
        device, = look["devices"]
        client, = (c for c in device["clients"] if c["pid"] == worker.pid)
    assert 1 <= look["seconds"] <= seconds, look
    for counter, rate in (("decodes", "decodes_per_s"), ("kv_tokens", "kv_tokens_per_s")):
        assert 0 < device[rate] * look["seconds"] <= after[counter] - before[counter], (counter, device, before, after)
        assert abs(client[rate] - device[rate]) <= 0.2 * device[rate], (rate, client, device)
    assert abs(device["kv_tokens_per_s"] - 64 * device["decodes_per_s"]) < 1, device
    assert (client["placement"], client["order"]) == ("host", "host"), client
    assert set(device["phases"]) >= PHASES
    for name, phase in device["phases"].items():
        assert (phase["count"] > 0) == (name in PHASES) and phase["p50_ns"] <= phase["p99_ns"], device
    for name, counted in (("rows_per_launch", "launched_rows"), ("parts_per_launch", "launched_parts")):
        assert (device[name] is not None) == (counted in after), (name, device)
        assert device[name] is None or device[name] >= 1, device


def a_client_that_left_and_one_that_is_idle_have_no_rate(daemon):
    device, = daemon.json("top", "--once", "--interval", "0.2", "--device", "cpu")["devices"]
    assert device["decodes_per_s"] == 0 and device["kv_tokens_per_s"] == 0 and device["rows_per_launch"] is None
    text = daemon.ctl("top", "--once", "--interval", "0.2").stdout
    assert "DECODES/S" in text and "P50 / P99" in text and "cpu" in text and "reference" in text and "\x1b" not in text
    assert "STREAM ORDER" not in text  # nothing has run in it


def what_is_asked_must_make_sense(daemon):
    assert "--interval 0: give seconds" in daemon.json("top", "--interval", "0", code=64)["error"]
    assert "no device gpu" in daemon.json("top", "--once", "--device", "gpu", code=1)["error"]
    assert mlactl("top", "--once").returncode == 3
    for words, why in ((("tenants", "--layers", "3"), "takes no --layers"), (("--heads", "3"), "takes no --heads"),
                       (("tenant",), "there are device"), (("step", "--layers", "0"), "--layers 0"),
                       (("tenants", "--heads", "129"), "--heads 129")):
        assert why in daemon.json("bench", *words, code=64)["error"], words


def it_goes_on_when_the_daemon_is_started_again():
    daemon = Daemon("cpu")
    try:
        watcher = start(daemon, "top", "--interval", "0.1", "--json", stdout=subprocess.PIPE)
        assert "devices" in json.loads(watcher.stdout.readline())
        daemon.process.terminate()
        daemon.process.wait(20)
        while "error" not in (line := json.loads(watcher.stdout.readline())):
            pass
        assert "not running" in line["error"] or "closed" in line["error"], line
        daemon.process = subprocess.Popen([MLAD, "--devices", "cpu", "--socket", daemon.socket, "--config", "/dev/null",
                                           "--log-target", "stderr"], stderr=daemon.log)
        while "devices" not in (line := json.loads(watcher.stdout.readline())):
            pass
        watcher.send_signal(signal.SIGINT)
        assert watcher.wait(10) == 0
        watcher.stdout.close()
    finally:
        daemon.stop()


def on_terminal(daemon, leave):
    """What it shows until `leave(process, master)` has made it end."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 30, 120, 0, 0))
    before = termios.tcgetattr(slave)
    watcher = start(daemon, "top", "--interval", "0.2", stdin=slave, stdout=slave)
    text = b""
    while text.count(b"\x1b[H") < 3:
        text += os.read(master, 65536)
    assert not termios.tcgetattr(slave)[3] & termios.ICANON
    leave(watcher, master)
    code = watcher.wait(10)
    os.set_blocking(master, False)
    with contextlib.suppress(BlockingIOError):
        text += os.read(master, 65536)
    assert termios.tcgetattr(slave) == before, "the terminal is not as it was"
    os.close(slave)
    os.close(master)
    assert code == 0 and text.endswith(b"\x1b[?25h"), (code, text[-200:])
    return text


def a_terminal_is_left_as_it_was(daemon):
    text = on_terminal(daemon, lambda process, master: os.write(master, b"xq"))
    assert b"DECODES/S" in text and b"over 0." in text
    on_terminal(daemon, lambda process, master: process.send_signal(signal.SIGTERM))


def tenants_add_up(daemon):
    before = daemon.devices()["cpu"]["decodes"]
    report = daemon.json("bench", "tenants", "--tenants", "3", "--kv-len", "4", "--heads", "2", "--seconds", "1")
    assert (report["device"], report["tenants"], report["batch"], report["heads"], report["q_len"],
            report["kv_len"]) == ("cpu", 3, 1, 2, 4, 4), report
    for load_name in ("alone", "together"):
        part = report[load_name]
        assert 0 < part["tenant_least_per_s"] <= part["tenant_most_per_s"], report
        assert 0 < part["batch_p50_ns"] <= part["batch_p99_ns"], report
    assert report["alone"]["tenant_least_per_s"] == report["alone"]["tenant_most_per_s"]
    decodes = daemon.devices()["cpu"]["decodes"] - before
    alone, together = report["alone"], report["together"]
    slices = 5 / 11  # of a second, in which each way is measured, or more
    assert decodes >= slices * (alone["tenant_least_per_s"] + 3 * together["tenant_least_per_s"]), (decodes, report)
    # A median of rounds, beside means of them: at most twice what it would be of the means, however the rounds differ.
    assert 0 < together["batches_per_s"] <= 2 * 3 * together["tenant_most_per_s"] + 1e-3, report
    assert abs(report["together_over_alone"] * report["alone"]["batches_per_s"] - together["batches_per_s"]) < 1e-3
    counted = "launched_parts" in daemon.devices()["cpu"]
    assert (report["parts_per_launch"] is not None) == counted, report
    text = daemon.ctl("bench", "tenants", "--tenants", "2", "--kv-len", "4", "--seconds", "1").stdout
    assert "BATCHES/S" in text and "2 tenants:" in text, text


def tenants_that_fail_end_the_bench(daemon):
    result = daemon.ctl("bench", "tenants", "--tenants", "65", "--kv-len", "1", "--seconds", "1")
    # max_sessions is 64; with buffers of one that just went, max_buffers may come first
    refused = "max_sessions" in result.stderr or "max_buffers" in result.stderr
    assert result.returncode == 1 and refused and "failed" in result.stderr, result


def latency_parts_make_the_call(daemon):
    report = daemon.json("bench", "latency", "--seconds", "1")
    assert report["count"] >= 100
    for part in ("call", "receive", "queue", "kernel", "rest"):
        values = [report[part][name] for name in ("p50_ns", "p90_ns", "p99_ns", "p999_ns", "max_ns")]
        assert values == sorted(values) and values[0] > 0, (part, values)
    assert sum(report[part]["p50_ns"] for part in ("receive", "queue", "kernel")) < report["call"]["p50_ns"]
    assert "receive" in daemon.ctl("bench", "latency", "--seconds", "1").stdout


def a_step_is_its_layers(daemon):
    before = daemon.devices()["cpu"]["decodes"]
    report = daemon.json("bench", "step", "--layers", "70", "--kv-len", "4", "--heads", "1", "--seconds", "1")
    decodes = daemon.devices()["cpu"]["decodes"] - before
    assert decodes == 70 * 2 * (report["steps"] + 1), (decodes, report)  # the one warms
    assert report["order"] == "host" and report["layers"] == 70
    for way in ("waited", "ahead"):
        part = report[way]
        assert 0 < part["step_p50_ns"] <= part["step_p99_ns"], report
        assert 0 < part["kernel_per_layer_ns"] < part["step_p99_ns"] / 70, report
    assert "submitted ahead" in daemon.ctl("bench", "step", "--layers", "2", "--kv-len", "4", "--seconds", "1").stdout


if __name__ == "__main__":
    it_goes_on_when_the_daemon_is_started_again()
    print("ok    it_goes_on_when_the_daemon_is_started_again", flush=True)
    run([rates_are_those_of_the_daemons_counters, a_client_that_left_and_one_that_is_idle_have_no_rate,
         what_is_asked_must_make_sense, a_terminal_is_left_as_it_was, tenants_add_up, tenants_that_fail_end_the_bench,
         latency_parts_make_the_call, a_step_is_its_layers], Daemon())
