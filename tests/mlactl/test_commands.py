"""Every command of mlactl against a real daemon, as text and as JSON."""
import json
import os
import pty
import signal
import stat
import struct
import subprocess
import time

import openmetrics
from daemon import CAPTURE, MLACTL, Daemon, mlactl, run

ESCAPE = "\x1b["


def read_safetensors(path):
    with open(path, "rb") as file:
        length, = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        data = file.read()
    header.pop("__metadata__", None)
    return {name: (t["dtype"], t["shape"], data[slice(*t["data_offsets"])]) for name, t in header.items()}


def write_safetensors(path, metadata, tensors):
    header, data = {"__metadata__": metadata}, b""
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + data)


def two_requests(path, lengths):
    """q_len 1, one head, all ones, one page of 4 tokens each."""
    one = b"\x80\x3f"
    write_safetensors(path, {"softmax_scale": "1"}, {
        "q": ("BF16", [2, 1, 576], one * 1152), "kv": ("BF16", [2, 4, 576], one * 8 * 576),
        "block_table": ("I32", [2, 1], struct.pack("<2i", 0, 1)),
        "seqlens": ("I32", [2], struct.pack("<2i", *lengths))})


def status_shows_devices_and_what_runs(daemon):
    text = daemon.ctl("status").stdout
    for word in ("mlad ", "cpu", "reference", "ready", "LATENCY" if "decodes" in text else "RUNS", "fp8_656",
                 "none causal tree"):
        assert word in text, f"no {word}:\n{text}"
    assert ESCAPE not in text
    assert len(text.splitlines()) < 50, "a wall of text"
    assert max(map(len, text.splitlines())) <= 120, "too wide"
    assert len(daemon.ctl("status", "--capabilities").stdout.splitlines()) > len(text.splitlines()) + 20


def status_json_has_every_figure(daemon):
    status = daemon.json("status", "--sessions")
    assert [device["name"] for device in status["devices"]] == ["cpu", "reference"]
    cpu = status["devices"][0]
    for field in ("state", "reason", "variant", "threads", "pid", "restarts", "uptime_ms", "sessions", "held_bytes",
                  "orphaned_bytes",
                  "queued", "running", "decodes", "kv_tokens", "latency", "capabilities", "session_list"):
        assert field in cpu, field
    assert cpu["orphaned_bytes"] == 0 and cpu["threads"] == 2 and len(cpu["capabilities"]) >= 18
    assert [d["name"] for d in daemon.json("status", "--device", "reference")["devices"]] == ["reference"]
    assert "no device gpu" in daemon.json("status", "--device", "gpu", code=1)["error"]


def colours_need_a_terminal_and_no_NO_COLOR(daemon):
    def on_terminal(**extra):
        master, slave = pty.openpty()
        environment = dict(os.environ, MLAD_SOCKET=daemon.socket, TERM="xterm", **extra)
        process = subprocess.Popen([MLACTL, "health"], stdout=slave, env=environment)
        os.close(slave)
        text = b""
        try:
            while chunk := os.read(master, 4096):
                text += chunk
        except OSError:
            pass  # a terminal's end of file
        os.close(master)
        assert process.wait(20) == 0
        return text.decode()
    os.environ.pop("NO_COLOR", None)
    assert ESCAPE in on_terminal()
    assert ESCAPE not in on_terminal(NO_COLOR="1")
    assert ESCAPE not in daemon.ctl("health").stdout


def decode_writes_the_result(daemon):
    out = os.path.join(daemon.directory, "out.safetensors")
    report = daemon.json("decode", CAPTURE, "-o", out)
    assert report["failed"] == 0 and report["device"] == "cpu" and report["kv_tokens"] == 2142
    assert report["kernel_ns"] > 0
    result = read_safetensors(out)
    assert set(result) == {"out", "lse"}
    assert result["out"][:2] == ("BF16", [20, 16, 512]) and result["lse"][:2] == ("F32", [20, 16])
    text = daemon.ctl("decode", CAPTURE, f"--output={out}", "--device", "reference")
    assert text.returncode == 0 and "GB/s" in text.stdout and "reference" in text.stdout
    exact = read_safetensors(out)
    pairs = zip(struct.unpack("<320f", result["lse"][2]), struct.unpack("<320f", exact["lse"][2]))
    assert all(abs(a - b) <= 4e-5 * max(abs(b), 1) for a, b in pairs)


def decode_lists_requests_that_fail(daemon):
    batch, out = (os.path.join(daemon.directory, name) for name in ("bad.safetensors", "bad-out.safetensors"))
    two_requests(batch, [3, 5])
    report = daemon.json("decode", batch, "-o", out, code=2)
    assert report["failed"] == 1 and report["failures"][0]["request"] == 1
    assert "seqlens[1]" in report["failures"][0]["field"]
    good = read_safetensors(out)
    assert good["out"][2][:1024] == b"\x80\x3f" * 512, "the other request is complete"
    text = daemon.ctl("decode", batch, "-o", out)
    assert text.returncode == 2 and "request 1" in text.stdout


def decode_refuses_and_writes_nothing(daemon):
    batch, out = (os.path.join(daemon.directory, name) for name in ("odd.safetensors", "odd-out.safetensors"))
    write_safetensors(batch, {"softmax_scale": "1", "scale": "2"}, {})
    assert "unknown metadata scale" in daemon.json("decode", batch, "-o", out, code=1)["error"]
    assert "No such file" in daemon.json("decode", batch + "x", "-o", out, code=1)["error"]
    assert "-o OUT" in daemon.json("decode", batch, code=64)["error"]
    two_requests(batch, [1, 1])
    assert "gpu" in daemon.json("decode", batch, "-o", out, "--device", "gpu", "--timeout", 2, code=1)["error"]
    assert not os.path.exists(out)
    unwritable = daemon.json("decode", batch, "-o", "/nonexistent/out", code=1)["error"]
    assert "/nonexistent/out" in unwritable
    assert not [name for name in os.listdir(daemon.directory) if "odd-out" in name], "a temporary stayed behind"


def decode_writes_into_what_is_no_file_and_leaves_it_there(daemon):
    pipe = os.path.join(daemon.directory, "pipe")   # as for /dev/null, which root could rename a result over
    os.mkfifo(pipe)
    with subprocess.Popen(["cat", pipe], stdout=(copy := open(pipe + ".copy", "w+b"))) as reader:
        assert daemon.ctl("decode", CAPTURE, "-o", pipe).returncode == 0
        reader.wait(30)
        copy.seek(0)
        written = copy.read()
    assert stat.S_ISFIFO(os.stat(pipe).st_mode), "the pipe was replaced"
    out = os.path.join(daemon.directory, "same.safetensors")
    assert daemon.ctl("decode", CAPTURE, "-o", out).returncode == 0
    with open(out, "rb") as file:
        assert file.read() == written


def verify_covers_every_capability(daemon):
    report = daemon.json("verify", "--seed", 20, "--save", daemon.directory)
    assert report["failed"] == 0 and report["device"] == "cpu" and report["seed"] == 20
    assert len(report["rows"]) == len(daemon.devices()["cpu"]["capabilities"])
    assert all(row["cases"] >= 1 for row in report["rows"]) and report["cases"] == 2 * len(report["rows"])
    text = daemon.ctl("verify", "--cases", 3, "--seed", 20)
    assert text.returncode == 0 and "not run" in text.stdout and "3 of 3" in text.stdout


def verify_needs_another_device(daemon):
    assert "compared with" in daemon.json("verify", "--device", "reference", code=64)["error"]
    assert "not both" in daemon.json("verify", "--cases", 1, "--seconds", 1, code=64)["error"]
    alone = Daemon("cpu")
    try:
        assert "--devices cpu,reference" in alone.json("verify", code=1)["error"]
    finally:
        alone.stop()


def metrics_are_openmetrics(daemon):
    families = openmetrics.parse(daemon.ctl("metrics").stdout)
    decodes = {labels["device"]: value for _, labels, value in families["mlad_decodes"]["samples"]}
    assert decodes["cpu"] >= 2 and decodes["reference"] >= 1
    assert families["mlad_kv_bytes"]["unit"] == "bytes" and families["mlad_decode_phase_seconds"]["type"] == "summary"
    assert all(family["help"] for family in families.values())
    as_json = {family["name"]: family for family in daemon.json("metrics")}
    assert set(as_json) == set(families)
    assert all(len(as_json[name]["samples"]) == len(families[name]["samples"]) for name in families)


def drain_and_resume(daemon):
    assert daemon.json("drain", "cpu")["device"] == "cpu"
    assert daemon.devices()["cpu"]["state"] == "draining"
    out = os.path.join(daemon.directory, "drained.safetensors")
    refused = daemon.ctl("decode", CAPTURE, "-o", out, "--device", "cpu", "--timeout", 2)
    assert refused.returncode != 0 and not os.path.exists(out)
    assert daemon.ctl("drain", "cpu", "--resume").returncode == 0
    assert daemon.devices()["cpu"]["state"] == "ready"
    assert daemon.ctl("decode", CAPTURE, "-o", out, "--device", "cpu").returncode == 0
    assert "gpu" in daemon.json("drain", "gpu", code=1)["error"]


def evict_ends_a_session(daemon):
    out = os.path.join(daemon.directory, "evicted")
    environment = dict(os.environ, MLAD_SOCKET=daemon.socket)
    client = subprocess.Popen([MLACTL, "verify", "--seconds", "60", "--save", daemon.directory], env=environment,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 20
        while not (sessions := daemon.json("status", "--sessions")["devices"][0]["session_list"]):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert sessions[0]["client"] == "mlactl" and sessions[0]["pid"] == client.pid
        assert "session" in daemon.ctl("status", "--sessions").stdout.lower()
        assert daemon.json("evict", "cpu", sessions[0]["session"])["result"] == "session closed"
        assert client.wait(30) != 0, "an evicted client must not go on"
    finally:
        client.kill()
        client.communicate()
    assert not os.path.exists(out)
    assert "no id" in daemon.json("evict", "cpu", "first", code=64)["error"]
    assert daemon.ctl("evict", "cpu", 999999).returncode == 1


def interrupt_leaves_nothing_behind(daemon):
    environment = dict(os.environ, MLAD_SOCKET=daemon.socket)
    client = subprocess.Popen([MLACTL, "verify", "--seconds", "60"], env=environment, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True)
    time.sleep(1.8)
    client.send_signal(signal.SIGINT)
    _, complaints = client.communicate(timeout=20)
    assert client.returncode == -signal.SIGINT
    assert "verifying cpu" in complaints, "no progress line after a second"
    deadline = time.monotonic() + 10
    while any(device["sessions"] for device in daemon.devices().values()):
        assert time.monotonic() < deadline, "its sessions stay"
        time.sleep(0.05)


def quiet_has_no_progress_line(daemon):
    result = daemon.ctl("verify", "--seconds", 2, "--quiet", "--save", daemon.directory)
    assert result.returncode == 0 and result.stderr == ""


def version_works_without_a_daemon(daemon):
    assert daemon.json("version")["daemon"].startswith("mlad")
    without = mlactl("version", "--json")
    assert without.returncode == 0 and json.loads(without.stdout)["daemon"] is None
    assert "not running" in mlactl("version").stdout


def bad_command_lines_are_named(daemon):
    for arguments, words in ((("statsu",), "did you mean status"), (("frobnicate",), "no command frobnicate"),
                             ((), "give a command"),
                             (("status", "--deep"), "status has no option --deep"), (("status", "x"), "too many"),
                             (("evict", "cpu"), "usage: mlactl evict"), (("verify", "--cases", "0"), "from 1"),
                             (("verify", "--cases"), "needs a value"), (("status", "--json=1"), "takes no value"),
                             (("status", "--timeout", "soon"), "give seconds"),
                             (("status", "--timeout", "nan"), "give seconds")):
        result = mlactl(*arguments)
        assert result.returncode == 64 and words in result.stderr + result.stdout, f"{arguments}: {result}"
    for arguments in (("help",), ("--help",), ("help", "verify"), ("verify", "--help")):
        result = mlactl(*arguments)
        assert result.returncode == 0 and result.stdout.startswith("Usage: mlactl") and not result.stderr


def a_reader_that_leaves_is_no_error(daemon):
    script = f"'{MLACTL}' status --capabilities --socket '{daemon.socket}' | head -n 1; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=30)
    assert result.stdout.splitlines()[-1] == "0" and result.stderr == "", result
    with open("/dev/full", "w") as full:
        result = subprocess.run([MLACTL, "status", "--socket", daemon.socket], stdout=full, stderr=subprocess.PIPE,
                                text=True, timeout=30)
    assert result.returncode == 1 and "No space left" in result.stderr


if __name__ == "__main__":
    run([status_shows_devices_and_what_runs, status_json_has_every_figure, colours_need_a_terminal_and_no_NO_COLOR,
         decode_writes_the_result, decode_lists_requests_that_fail, decode_refuses_and_writes_nothing,
         decode_writes_into_what_is_no_file_and_leaves_it_there, verify_covers_every_capability,
         verify_needs_another_device, metrics_are_openmetrics, drain_and_resume, evict_ends_a_session,
         interrupt_leaves_nothing_behind,
         quiet_has_no_progress_line, version_works_without_a_daemon, bad_command_lines_are_named,
         a_reader_that_leaves_is_no_error],
        Daemon())
