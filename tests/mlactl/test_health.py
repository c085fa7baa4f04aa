"""The exit codes of `mlactl health`, each in the state that it stands for, and --deep."""
import json
import os
import signal
import socket
import tempfile
import time

from daemon import Daemon, mlactl, run


def not_running_is_3():
    assert mlactl("health").returncode == 3
    with tempfile.TemporaryDirectory() as directory:  # a socket file that a dead daemon left
        path = os.path.join(directory, "s")
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as left:
            left.bind(path)
        result = mlactl("health", "--json", socket=path)
        assert result.returncode == 3 and json.loads(result.stdout)["health"] == "not running"


def a_hung_daemon_is_4():
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "s")
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as hung:
            hung.bind(path)
            hung.listen(1)
            for _ in range(4):  # the later ones find the backlog full
                begun = time.monotonic()
                result = mlactl("health", "--timeout", "0.3", socket=path)
                assert result.returncode == 4 and "0.3 s" in result.stdout, result
                assert time.monotonic() - begun < 5
            assert mlactl("status", "--timeout", "0.3", socket=path).returncode == 4


def nonsense_is_2():
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "s")
        pid = os.fork()
        if pid == 0:
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
                server.bind(path)
                server.listen(1)
                connection, _ = server.accept()
                connection.recv(65536)
                connection.send(b"\x93nonsense")
                os._exit(0)
        while not os.path.exists(path):
            time.sleep(0.01)
        time.sleep(0.1)
        result = mlactl("health", socket=path)
        os.waitpid(pid, 0)
        assert result.returncode == 2 and "cannot read" in result.stdout, result


def ok_is_0():
    daemon = Daemon()
    try:
        result = daemon.ctl("health")
        assert result.returncode == 0 and result.stdout == "ok\n", result
        deep = daemon.json("health", "--deep")
        assert deep["exit"] == 0 and [(entry["device"], entry["result"]) for entry in deep["deep"]] == [("cpu", "ok")]
        assert deep["deep"][0]["kernel_ns"] > 0
        assert daemon.ctl("health", "--deep").stdout.startswith("ok: 1 device ")
    finally:
        daemon.stop()


def degraded_is_1():
    daemon = Daemon()
    try:
        assert daemon.ctl("drain", "cpu").returncode == 0
        result = daemon.ctl("health")
        assert result.returncode == 1 and result.stdout.startswith("degraded: ") and "cpu" in result.stdout, result
        deep = daemon.json("health", "--deep", code=1)
        assert deep["deep"][0]["result"] == "skipped" and deep["reason"]
        assert daemon.ctl("drain", "cpu", "--resume").returncode == 0
        os.kill(daemon.devices()["cpu"]["pid"], signal.SIGKILL)
        deadline = time.monotonic() + 10
        while (result := daemon.ctl("health")).returncode != 1:
            assert time.monotonic() < deadline, "a worker that was killed is no reason for concern?"
        assert "cpu" in result.stdout
        daemon.wait_ready()
        assert daemon.devices()["cpu"]["restarts"] == 1
    finally:
        daemon.stop()


def a_worker_that_hangs_times_out_deep():
    daemon = Daemon()
    pid = daemon.devices()["cpu"]["pid"]
    try:
        os.kill(pid, signal.SIGSTOP)
        begun = time.monotonic()
        result = daemon.ctl("health", "--deep", "--timeout", "1.5")
        assert result.returncode == 4, result
        assert time.monotonic() - begun < 20
    finally:
        try:
            os.kill(pid, signal.SIGCONT)
        except ProcessLookupError:
            pass  # the supervisor was quicker
        daemon.stop()


if __name__ == "__main__":
    run([not_running_is_3, a_hung_daemon_is_4, nonsense_is_2, ok_is_0, degraded_is_1,
         a_worker_that_hangs_times_out_deep])
