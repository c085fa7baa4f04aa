"""The part `fault` over the fake driver: what it makes of clients that are told device_lost, that go on, and that are
told something else. MPS's control daemon is a stand-in, and a fault is what the fake driver then does to everybody.

usage: test_fault.py BUILD"""
import json
import os
import signal
import sys
import tempfile
import threading
from pathlib import Path

HERE, BUILD = Path(__file__).resolve().parent, Path(sys.argv[1]).resolve()
DEVICE = "GPU-fa4e0000-0000-4000-8000-000000000000"
if not (BUILD / "fake_cuda/libcuda.so.1").exists():
    print("this build has no GPU kernels")
    sys.exit(77)
sys.path.insert(0, str(HERE))
from suite import fault  # noqa: E402
from suite.part import Part  # noqa: E402

CONTROL = """#!/bin/sh
[ "$1" = -d ] && exit 0
read -r command server client
case $command in
get_server_list) echo 1234 ;;
terminate_client) kill -9 "$client" ;;
esac
"""
LOST = "fail=cuStreamQuery:0:700 fail=cuStreamCreate:0:700 fail=cuEventRecord:0:700"
fault.READY_SECONDS = fault.END_SECONDS = fault.SERVED_SECONDS = fault.TRY_SECONDS = 60     # emulated kernels are slow
fault.DECODES = 1
times = 0


def inject(words=""):
    """What goes wrong from now on in every process, in words of tests/cuda/fake/fake_cuda.h."""
    global times
    times += 1      # another size: the file is read again when it changes
    Path(os.environ["MLAD_FAKE_CUDA_CONTROL"]).write_text(words + " " * times + "\n")


def run(folder, words, kill=False):
    """The part's record where a fault does `words` to everybody for a second, and perhaps kills the worker."""
    real = fault.Stage.fault

    def spreading(stage):
        said = real(stage)
        assert said == "fault: cuCtxSynchronize returned 719", said     # the fake driver's word for an unknown kernel
        inject(words)
        threading.Timer(1, inject).start()
        if kill:
            os.kill(stage.daemon.status()["pid"], signal.SIGKILL)
        return said
    fault.Stage.fault = spreading
    try:
        result = folder / "result"
        Part("fault", DEVICE, [DEVICE], None, str(BUILD), 120, {}, str(result)).run(fault.fault)
        return json.loads(result.read_text())
    finally:
        fault.Stage.fault = real
        inject()


with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    (folder / "nvidia-cuda-mps-control").write_text(CONTROL)
    (folder / "nvidia-cuda-mps-control").chmod(0o755)
    os.environ.update(PATH=f"{folder}:{os.environ['PATH']}", LD_LIBRARY_PATH=str(BUILD / "fake_cuda"),
                      MLAD_FAKE_CUDA_CONTROL=str(folder / "words"))
    inject()

    record = run(folder, LOST)
    figures = record["figures"]
    assert record["ok"] and "not_run" not in figures, record
    told = figures["fault_while_decoding"]["client"]
    assert told["outcome"] == "device_lost" and "own CUDA context" in told["account"]["last_error"], told
    assert figures["worker_terminated"]["client"]["account"]["replays"] > 0, figures
    assert all(figures[scene]["worker_restarts"] for scene in figures if isinstance(figures[scene], dict)), figures

    record = run(folder, "", kill=True)
    assert record["ok"] and record["figures"]["fault_while_decoding"]["client"]["outcome"] == "goes on", record

    record = run(folder, "fail=cuIpcOpenMemHandle:0", kill=True)
    assert not record["ok"] and "{'buffer': " in record["failure"], record
