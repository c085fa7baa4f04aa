"""Which placement a client has, as libmla, `mlactl status` and `mlactl doctor` tell, and `mlactl run`, over the fake
driver of tests/cuda/fake.

usage: test_placement.py, with MLAD_BIN, MLACTL_BIN, PLACEMENT_CLIENT, MLAD_SOURCE, LD_LIBRARY_PATH"""
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile

sys.path.insert(0, os.path.join(os.environ["MLAD_SOURCE"], "tests", "mlactl"))
from daemon import MLACTL, Daemon, run  # noqa: E402

GPU, SECOND = "GPU-fa4e0000-0000-4000-8000-000000000000", "GPU-fa4e0000-0000-4000-8000-000000000001"
CLIENT = os.environ["PLACEMENT_CLIENT"]
FOLDER = tempfile.mkdtemp(prefix="mlad-mps-")
PIPES, LOGS, OTHER, NONE = (os.path.join(FOLDER, name) for name in ("pipes", "logs", "other", "none"))


@contextlib.contextmanager
def serving(words, **environment):
    os.environ.update(MLAD_FAKE_CUDA=words, **environment)
    try:
        daemon = Daemon(GPU)
    finally:
        for name in ("MLAD_FAKE_CUDA", *environment):
            del os.environ[name]
    try:
        yield daemon
    except BaseException:
        daemon.show_log()
        raise
    finally:
        daemon.stop()


def under_mps():
    return serving("devices=2 mps=1", CUDA_MPS_PIPE_DIRECTORY=PIPES, CUDA_MPS_LOG_DIRECTORY=LOGS)


def client(daemon, *words, command=(CLIENT,), fake="devices=2", pipes=NONE):
    """What libmla says and, while the client lives, what the daemon says."""
    environment = {**os.environ, "MLAD_SOCKET": daemon.socket, "MLAD_DEVICE": GPU, "MLAD_FAKE_CUDA": fake,
                   "CUDA_MPS_PIPE_DIRECTORY": pipes}
    process = subprocess.Popen([*command, *words], env=environment, text=True, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE)
    said = process.stdout.readline().strip()
    session, = daemon.json("status", "--sessions")["devices"][0]["session_list"]
    table = daemon.ctl("status", "--sessions").stdout
    process.communicate(timeout=30)
    assert process.returncode == 0, words
    assert f"{session['placement']}: {session['why']}" == said, (session, said)
    assert session["order"] == "host" and f"is {said.split(':')[0]}: {session['why']}" in table, table
    return said


def without_mps_a_shared_gpu_is_timesliced():
    with serving("devices=2", CUDA_MPS_PIPE_DIRECTORY=NONE) as daemon:
        for words in (("context", "0"), ("memory", "0")):
            said = client(daemon, *words)
            assert said.startswith("shared_timesliced: the worker is not under MPS"), said
        # A driver that does not tell which GPU it is does no harm: memory tells later.
        said = client(daemon, "context", "0", fake="fail=cuDeviceGetUuid:1")
        assert said == "own_gpu: the client is known to use host memory only", said
        assert "mps" not in daemon.devices()[GPU]


def another_gpu_or_none_is_the_workers_own():
    with under_mps() as daemon:
        for words in (("context", "1"), ("memory", "1"), ("memory", "0", "1"), ("memory", "1", "0")):
            said = client(daemon, *words)
            assert said == f"own_gpu: the client works on {SECOND}", said
        assert client(daemon, "host") == "own_gpu: the client is known to use host memory only"


def one_mps_is_shared_and_two_are_not():
    with under_mps() as daemon:
        assert daemon.devices()[GPU]["mps"] == PIPES and daemon.devices()[GPU]["mps_log"] == LOGS
        # What the driver says counts where there is a context; else the pipe that the client would find.
        assert client(daemon, "context", "0", fake="mps=1", pipes=PIPES).startswith("shared_mps: ")
        assert client(daemon, "context", "0", fake="mps=0", pipes=PIPES).startswith("shared_timesliced: ")
        assert client(daemon, "memory", "0", pipes=PIPES).startswith("shared_mps: ")
        said = client(daemon, "memory", "0")
        assert said.startswith("shared_timesliced: ") and "start it by mlactl run" in said, said
        said = client(daemon, "memory", "0", pipes=OTHER)
        assert said.startswith("shared_timesliced: ") and "an MPS of its own" in said, said


def run_starts_a_client_under_the_workers_mps():
    with under_mps() as daemon:
        said = client(daemon, "memory", "0", command=(MLACTL, "run", "--device", GPU, "--", CLIENT))
        assert said.startswith("shared_mps: "), said
        show = 'echo "$CUDA_MPS_PIPE_DIRECTORY $CUDA_MPS_LOG_DIRECTORY $MLAD_SOCKET $0 $1"'
        result = daemon.ctl("run", "sh", "-c", show, "--json", "-q")
        assert result.stdout.split() == [PIPES, LOGS, daemon.socket, "--json", "-q"], result
        assert daemon.ctl("run", "--", "sh", "-c", "exit 7").returncode == 7
        missing = daemon.ctl("run", "--json", "/nonexistent/engine")
        assert missing.returncode == 1 and "cannot be started" in json.loads(missing.stdout)["error"], missing
        assert daemon.ctl("run", "--device", "cpu", "true").returncode == 1  # not served
    assert daemon.ctl("run", "true").returncode == 3  # the daemon has gone


def run_says_what_to_do_where_there_is_no_mps():
    with serving("", CUDA_MPS_PIPE_DIRECTORY=NONE) as daemon:
        result = daemon.ctl("run", "--", "true")
        assert result.returncode == 1 and "is not under MPS" in result.stderr and "mlad-mps.service" in result.stderr
        assert daemon.ctl("run", "--without-mps", "--", "true").returncode == 0


def findings(daemon, code=0, **environment):
    result = daemon.ctl("doctor", "--json", **environment)
    assert result.returncode == code, result
    report = json.loads(result.stdout)
    for verdict, count in (("warn", report["warnings"]), ("fail", report["failures"])):
        assert sum(f["verdict"] == verdict for f in report["findings"]) == count, report
    for finding in report["findings"]:
        assert bool(finding["remedy"]) == (finding["verdict"] != "ok"), finding
    text = daemon.ctl("doctor", **environment)
    assert text.returncode == code and len(text.stdout.splitlines()) == len(report["findings"]), text
    return [(f["verdict"], f["finding"], f["remedy"]) for f in report["findings"] if f["check"] == "mps"]


def doctor_says_how_to_get_under_one_mps():
    with serving("", CUDA_MPS_PIPE_DIRECTORY=NONE) as daemon:
        (verdict, finding, remedy), = findings(daemon, CUDA_MPS_PIPE_DIRECTORY=NONE)
        assert verdict == "warn" and "is not under MPS" in finding and "mlad-mps.service" in remedy, finding
        (verdict, finding, remedy), = findings(daemon, CUDA_MPS_PIPE_DIRECTORY=PIPES)
        assert "a control daemon is there" in finding and "start mlad again" in remedy, (finding, remedy)
    with under_mps() as daemon:
        here, control = findings(daemon, CUDA_MPS_PIPE_DIRECTORY=NONE)
        assert here[0] == "warn" and PIPES in here[1] and NONE in here[1] and "mlactl run" in here[2], here
        assert control[0] == "warn" and "does not run" in control[1], control
        with open(os.path.join(PIPES, "nvidia-cuda-mps-control.pid"), "w") as file:
            file.write(f"{os.getpid()}\n")
        here, control = findings(daemon, CUDA_MPS_PIPE_DIRECTORY=PIPES)
        assert here[0] == control[0] == "ok" and f"user {os.geteuid()}" in control[1], control
        several = subprocess.Popen(["sh", "-c", "read x", "-multiuser-server"], stdin=subprocess.PIPE)
        with open(os.path.join(PIPES, "nvidia-cuda-mps-control.pid"), "w") as file:
            file.write(f"{several.pid}\n")
        _, control = findings(daemon, CUDA_MPS_PIPE_DIRECTORY=PIPES)
        several.communicate()
        assert control[0] == "ok" and "-multiuser-server" in control[1], control
        os.unlink(os.path.join(PIPES, "control"))
        try:
            _, control = findings(daemon, code=1, CUDA_MPS_PIPE_DIRECTORY=PIPES)
            assert control[0] == "fail" and "no pipe" in control[1], control
        finally:
            os.mkfifo(os.path.join(PIPES, "control"))


def doctor_without_a_daemon_says_so():
    daemon = Daemon(GPU)
    daemon.stop()
    assert findings(daemon, code=3) == []


for directory in (PIPES, OTHER):
    os.mkdir(directory)
    os.mkfifo(os.path.join(directory, "control"))
try:
    run([without_mps_a_shared_gpu_is_timesliced, another_gpu_or_none_is_the_workers_own,
         one_mps_is_shared_and_two_are_not, run_starts_a_client_under_the_workers_mps,
         run_says_what_to_do_where_there_is_no_mps, doctor_says_how_to_get_under_one_mps,
         doctor_without_a_daemon_says_so])
finally:
    shutil.rmtree(FOLDER)
