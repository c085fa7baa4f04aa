"""The part `soak` on the device cpu: a short run by run.py, whose figures add up; and what it says when results are not
what they have to be, or memory grows.

usage: test_soak.py BUILD"""
import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE, BUILD = Path(__file__).resolve().parent, Path(sys.argv[1]).resolve()
sys.path.insert(0, str(HERE))
from suite import soak  # noqa: E402
from suite.part import Part  # noqa: E402


def few_seconds(folder):
    out = folder / "results.json"
    words = ["--tree", BUILD, "--device", "cpu", "--only", "soak", "--soak-clients", 6, "--soak-seconds", 4]
    done = subprocess.run([sys.executable, HERE / "run.py", *map(str, words), "--out", out], capture_output=True,
                          text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(out.read_text())["parts"]["soak"]["figures"]
    assert set(figures["not_run"]) == {"under MPS", "without MPS: memory of the GPU"}, figures
    found = figures["without MPS"]
    assert found["clients"] == 6 and found["lives"] == found["killed"] + found["left"] > 8, found
    assert found["killed"] > 0 and found["decodes"] > found["lives"], found
    assert not any(found[key] for key in ("wrong", "lost", "errors", "hung")), found
    assert not any(found["held_after"].values()), found
    flat = found["flat"]
    assert set(flat) == {"daemon_bytes", "worker_bytes", "daemon_fds", "worker_fds"}, flat
    assert all(0 < held["last"] <= held["may_be"] for held in flat.values()), flat


def run(folder, **options):
    """The record of a part in this process."""
    result = folder / "part"
    Part("soak", "cpu", ["cpu"], None, str(BUILD), 100, {"soak_seconds": 1, "soak_clients": 4, **options},
         str(result)).run(soak.soak)
    return json.loads(result.read_text())


def one_wrong_bit_is_seen(folder):
    real = soak.expectations

    def spoiled(*given):
        paths, worst = real(*given)
        bits = bytearray(paths[1].read_bytes())
        bits[-1] ^= 1
        paths[1].write_bytes(bits)
        return paths, worst
    soak.expectations = spoiled
    record = run(folder)
    soak.expectations = real
    assert not record["ok"] and record["figures"]["without MPS"]["wrong"] > 0, record
    assert "'wrong': " in record["failure"], record


def a_worker_that_keeps_memory_is_seen(folder):
    real, kept = soak.process_holds, [0]

    def growing(pid):
        kept[0] += 4 << 20
        return kept[0], 10
    soak.process_holds = growing
    record = run(folder)
    soak.process_holds = real
    assert not record["ok"] and "worker_bytes grew" in record["failure"], record


with tempfile.TemporaryDirectory() as name:
    for test in few_seconds, one_wrong_bit_is_seen, a_worker_that_keeps_memory_is_seen:
        test(Path(name))
        print(test.__name__, flush=True)
