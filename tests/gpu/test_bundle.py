"""The bundle is made, its run.py starts in it, and a part runs over the fake driver (on the device cpu where this build
has no GPU kernels).

usage: test_bundle.py BUILD"""
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE, BUILD = Path(__file__).resolve().parent, Path(sys.argv[1]).resolve()
FAKE = BUILD / "fake_cuda"
with_gpu = (FAKE / "libcuda.so.1").exists()
DEVICE = "GPU-fa4e0000-0000-4000-8000-000000000000" if with_gpu else "cpu"


def run(*words, code=0):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLAD_")}
    if with_gpu:
        environment["LD_LIBRARY_PATH"] = str(FAKE)
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=100, env=environment)
    assert done.returncode == code, f"{words} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout


with tempfile.TemporaryDirectory() as folder:
    bundle, out = Path(folder) / "bundle", Path(folder) / "results.json"
    print(run(HERE / "bundle", BUILD, bundle), end="")
    # Away from the source tree, and from libraries of this build.
    moved = bundle.rename(Path(folder) / "moved")
    command = [sys.executable, moved / "tests/gpu/run.py"]
    parts = run(*command, "--list").split()
    assert {"grid", "kills", "fault", "tenants"} <= set(parts), parts
    print(run(*command, "--device", DEVICE, "--only", "kills,two_gpus,soak", "--kills", 10, "--soak-clients", 2,
              "--soak-seconds", 1, "--out", out), end="")
    report = json.loads(out.read_text())
    assert report["ok"] and report["trial"] and report["tree"], report
    assert report["parts"]["kills"]["ok"] and report["parts"]["kills"]["figures"]["clients"]["killed"] == 10, report
    assert report["parts"]["soak"]["figures"]["without MPS"]["decodes"] > 0, report
    assert set(report["skipped"]) == {"two_gpus"} and not report["parts"]["two_gpus"]["ok"], report
    assert run(*command, "--only", "nonsense", code=1) == ""
    if with_gpu:
        print(run(*command, "--device", DEVICE, "--only", "beside", "--small", "--load-seconds", 0.2, "--out", out),
              end="")
        shape = ["--only", "B=1,H=16,q=1,K=512", "--sets", "uniform", "--pairs", 1, "--limit-seconds", 1]
        print(run(sys.executable, moved / "tests/bench/kernels/compare.py", "--device", DEVICE, *shape,
                  "--cold-mb", 0.1, "--ceilings", "3000,790"), end="")
