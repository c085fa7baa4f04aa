"""mlad as a process: its socket, what it tells systemd, its workers' lives, reload and stop.

usage: test_supervisor.py BEHAVIOUR"""
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time

from supervisor_harness import Daemon, MLAD, PATIENCE, eventually, is_alive


class Notifications:
    """A NOTIFY_SOCKET of our own."""

    def __init__(self):
        self.directory = tempfile.TemporaryDirectory(prefix="mlad-notify-")
        self.path = self.directory.name + "/notify"
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(self.path)
        self.socket.settimeout(PATIENCE)
        self.seen = []

    def until(self, wanted):
        """Collect up to the message that holds `wanted`; returns it."""
        while True:
            self.seen.append(self.socket.recv(4096).decode())
            if wanted in self.seen[-1]:
                return self.seen[-1]


def started_fails(daemon, sentence, status=1):
    daemon.wait = False
    daemon.start()
    assert daemon.process.wait(PATIENCE) == status, daemon.process.returncode
    assert sentence in daemon.log(), daemon.log()


# ---- the socket ----

def socket_file_has_its_mode_and_goes_with_us():
    with Daemon(options="socket_mode = 0640") as daemon:
        assert os.stat(daemon.socket_path).st_mode & 0o7777 == 0o640
        worker, = daemon.children()
        assert daemon.stop() == 0
        assert not os.path.exists(daemon.socket_path)
        eventually(lambda: not is_alive(worker), "the worker ends")


def stale_socket_is_replaced():
    with Daemon(wait=False) as daemon:
        daemon.await_log("serving")
        daemon.process.kill()
        daemon.process.wait()
        assert os.path.exists(daemon.socket_path)
        pathlib.Path(daemon.log_path).write_text("", encoding="utf-8")
        daemon.start()
        daemon.await_log("replacing a socket that nobody serves")
        daemon.await_log("serving")
        assert daemon.health()[0] in ("ok", "degraded")


def second_daemon_is_refused_and_the_first_serves_on():
    with Daemon() as first, Daemon(wait=False, socket_path=first.socket_path) as second:
        assert second.process.wait(PATIENCE) == 1
        assert f"another mlad is serving {first.socket_path}" in second.log(), second.log()
        assert first.health() == ("ok", "")


def a_file_in_the_way_is_left_alone():
    with Daemon(wait=False) as daemon:
        daemon.stop(signal.SIGKILL)
        if os.path.exists(daemon.socket_path):
            os.unlink(daemon.socket_path)
        pathlib.Path(daemon.socket_path).write_text("precious", encoding="utf-8")
        started_fails(daemon, "exists and is no socket")
        assert pathlib.Path(daemon.socket_path).read_text(encoding="utf-8") == "precious"


def activation_socket_is_served_and_never_removed():
    with tempfile.TemporaryDirectory() as directory, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        path = directory + "/passed.sock"
        listener.bind(path)
        listener.listen()
        script = 'exec 3<&$FD; [ $FD = 3 ] || eval "exec $FD<&-"; LISTEN_PID=$$ LISTEN_FDS=1 exec "$@"'
        with Daemon(pass_fds=[listener.fileno()], environment={"FD": str(listener.fileno())},
                    exec_through=["/bin/sh", "-c", script, "sh"]) as daemon:
            daemon.socket_path = path
            assert daemon.health() == ("ok", "")
            assert not os.path.exists(daemon.directory + "/mlad.sock")
            assert os.path.exists(directory + "/cpu.lock"), "locks lie by the socket that is served"
            assert daemon.stop() == 0
            assert os.path.exists(path)


def activation_socket_of_the_wrong_kind_is_refused():
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener, tempfile.TemporaryDirectory() as directory:
        listener.bind(directory + "/s")
        listener.listen()
        script = 'exec 3<&$FD; LISTEN_PID=$$ LISTEN_FDS=1 exec "$@"'
        with Daemon(pass_fds=[listener.fileno()], environment={"FD": str(listener.fileno())}, wait=False,
                    exec_through=["/bin/sh", "-c", script, "sh"]) as daemon:
            assert daemon.process.wait(PATIENCE) == 1
            assert "ListenSequentialPacket=" in daemon.log(), daemon.log()


# ---- systemd ----

def systemd_is_told_everything():
    notes = Notifications()
    with Daemon(environment={"NOTIFY_SOCKET": notes.path, "WATCHDOG_USEC": "400000"}) as daemon:
        notes.until("READY=1")
        assert any(note == "STATUS=cpu ready" for note in notes.seen), notes.seen
        began = time.monotonic()
        for _ in range(3):
            notes.until("WATCHDOG=1")
        assert time.monotonic() - began < 3.0
        daemon.process.send_signal(signal.SIGHUP)
        reloading = notes.until("RELOADING=1")
        stamp = int(reloading.partition("MONOTONIC_USEC=")[2])
        assert abs(stamp / 1e6 - time.monotonic()) < PATIENCE, reloading
        notes.until("READY=1")
        os.kill(daemon.status("cpu")["pid"], signal.SIGKILL)
        notes.until("STATUS=cpu restarting")
        notes.until("STATUS=cpu ready")
        daemon.process.terminate()
        notes.until("STOPPING=1")
        assert daemon.process.wait(PATIENCE) == 0


def ready_waits_for_the_workers():
    notes = Notifications()
    with Daemon(environment={"NOTIFY_SOCKET": notes.path}, worker="sleep 1; exit 7", wait=False):
        began = time.monotonic()
        notes.until("READY=1")
        assert time.monotonic() - began > 0.5
        assert notes.seen[-2].startswith("STATUS=cpu restarting"), notes.seen


# ---- reload and stop ----

def reload_changes_policy_quotas_and_level():
    with Daemon() as daemon:
        daemon.configure("allowed_users = 61001\nmax_plans = 1\nlog_level = debug\nqueue_limit = 77\n")
        daemon.process.send_signal(signal.SIGHUP)
        daemon.await_log("configuration read again")
        with daemon.peer() as peer:
            assert peer.hello("cpu")["max_plans"] == 1
        assert daemon.status("cpu")["queue_limit"] == 77
        daemon.await_log("session handed over")     # a debug record


def reload_of_a_bad_file_keeps_the_old():
    with Daemon(options="max_plans = 5") as daemon:
        daemon.configure("max_plans = 6\nmax_plan = 7\n")
        daemon.process.send_signal(signal.SIGHUP)
        daemon.await_log("the new configuration is refused, the old one stays")
        assert "mlad.conf:2: max_plan: unknown option" in daemon.log()
        with daemon.peer() as peer:
            assert peer.hello("cpu")["max_plans"] == 5


def reload_names_what_needs_a_restart():
    with Daemon() as daemon:
        daemon.configure("cpu_threads = 3\nsocket_mode = 0600\nmax_plans = 9")
        daemon.process.send_signal(signal.SIGHUP)
        daemon.await_log('keep their old values options="socket_mode, cpu_threads"')
        with daemon.peer() as peer:
            assert peer.hello("cpu")["max_plans"] == 9


def stop_by_either_signal_is_clean():
    for number in (signal.SIGTERM, signal.SIGINT):
        with Daemon(devices="cpu,reference") as daemon, daemon.admin() as admin, daemon.peer() as silent:
            workers = daemon.children()
            assert len(workers) == 2
            assert daemon.stop(number) == 0
            assert not os.path.exists(daemon.socket_path)
            assert not any(is_alive(pid) for pid in workers)
            admin.is_closed()
            silent.is_closed()
            assert "stopped" in daemon.log()


def stop_does_not_wait_for_a_frozen_worker():
    with Daemon(options="drain_timeout = 500ms") as daemon:
        worker, = daemon.children()
        os.kill(worker, signal.SIGSTOP)
        began = time.monotonic()
        assert daemon.stop() == 0
        assert time.monotonic() - began < 5
        assert not is_alive(worker)


# ---- workers ----

def killed_worker_is_replaced_and_health_says_so():
    with Daemon(devices="cpu,reference") as daemon:
        before = daemon.status("cpu")
        assert before["state"] == "ready" and before["restarts"] == 0 and before["responding"]
        os.kill(before["pid"], signal.SIGKILL)
        daemon.await_log("worker ended device=cpu")
        eventually(lambda: daemon.status("cpu")["state"] == "ready", "cpu is ready again")
        after = daemon.status("cpu")
        assert after["restarts"] == 1 and after["pid"] != before["pid"]
        health, reason = daemon.health()
        assert health == "degraded" and "cpu was restarted" in reason and "signal 9" in reason, (health, reason)
        assert daemon.status("reference")["restarts"] == 0


def frozen_worker_is_killed_and_others_are_not():
    with Daemon(devices="cpu,reference", options="worker_timeout = 1500ms") as daemon:
        frozen = daemon.status("cpu")["pid"]
        os.kill(frozen, signal.SIGSTOP)
        status = daemon.status()    # answered after a second, with what is known
        cpu = next(d for d in status["devices"] if d["name"] == "cpu")
        assert cpu["responding"] is False and cpu["pid"] == frozen, cpu
        assert next(d for d in status["devices"] if d["name"] == "reference")["responding"] is True
        daemon.await_log("the worker was stuck: no sign of life")
        assert not is_alive(frozen)
        eventually(lambda: daemon.status("cpu")["state"] == "ready", "cpu is ready again")
        health, reason = daemon.health()
        assert health == "degraded" and "cpu was restarted" in reason and "stuck" in reason, (health, reason)
        assert daemon.status("reference")["restarts"] == 0


def missing_worker_makes_the_device_absent():
    with Daemon(worker="") as daemon:
        cpu = daemon.status("cpu")
        assert cpu["state"] == "absent" and "no such file" in cpu["reason"] and cpu["pid"] == 0, cpu
        health, reason = daemon.health()
        assert health == "failed" and "cannot be started" in reason, (health, reason)
        with daemon.peer() as peer:
            assert "absent" in peer.refused("unavailable", "HELLO", {"client": "t", "device": "cpu"}, field="device")
        with daemon.admin() as admin:
            admin.refused("unavailable", "CAPABILITIES", {"device": "cpu"})
            admin.refused("unavailable", "SESSIONS", {"device": "cpu"})
            admin.refused("unavailable", "EVICT", {"device": "cpu", "session": 1})
        assert daemon.log().count("device is absent") == 1, "said once, not at each try"


def unknown_device_is_absent_with_the_workers_reason():
    nobody = "GPU-01234567-89ab-cdef-0123-456789abcdef"
    with Daemon(devices=f"cpu,{nobody}") as daemon:
        gpu = daemon.status(nobody)
        assert gpu["state"] == "absent" and gpu["reason"], gpu  # there is no driver, or it knows no such GPU
        assert f'cannot be served device={nobody} field=device why="{gpu["reason"]}"' in daemon.log(), gpu
        assert daemon.health()[0] == "degraded"
        assert daemon.status("cpu")["state"] == "ready"


def dying_worker_is_restarted_ever_more_slowly():
    with Daemon(worker="exit 7", wait=False) as daemon:
        daemon.await_log("worker ended", times=5)
        delays = [int(line.partition("restart_in_ms=")[2].split()[0]) for line in daemon.log().splitlines()
                  if "worker ended" in line]
        assert delays[:5] == [50, 100, 200, 400, 800], delays
        assert "exited with status 7" in daemon.status("cpu")["reason"]


def worker_that_talks_nonsense_is_killed():
    with Daemon(worker="printf nonsense >&3; sleep 60", wait=False) as daemon:
        daemon.await_log("worker sent nonsense; killing it")
        daemon.await_log("worker ended")


def worker_inherits_its_two_descriptors_and_no_others():
    leak = os.open("/dev/null", os.O_RDONLY)
    script = 'exec >&2; echo "notify=$NOTIFY_SOCKET." "$@"; exec ls -l /proc/self/fd'
    notes = Notifications()
    with Daemon(worker=script, pass_fds=[leak], wait=False, options="cpu_threads = 3\ncpu_variant = avx2\n",
                environment={"NOTIFY_SOCKET": notes.path}) as daemon:
        daemon.await_log("worker ended")
        log = daemon.log().partition("worker ended")[0]
        fds = sorted(line.split()[8] for line in log.splitlines() if " -> " in line and "/proc/" not in line)
        assert fds == ["0", "1", "2", "3", "4"], log
        assert "notify=." in log
        assert f"--device cpu --control 3 --life 4 --lock {daemon.directory}/cpu.lock" in log, log
        assert "--threads 3" in log and "--variant avx2" in log, log


def device_whose_lock_is_held_says_so():
    with Daemon() as first:
        with Daemon(options=f"runtime_dir = {first.directory}", wait=False) as second:
            second.await_socket()
            cpu = eventually(lambda: (s := second.status("cpu"))["responding"] and s, "its worker answers")
            assert cpu["state"] == "starting" and "lock" in cpu["reason"], cpu
            assert first.stop() == 0
            second.await_log("serving")


# ---- devices = all ----

def lister(script):
    """A worker that answers --list with `script` and cannot serve any device."""
    return f'if [ "$1" = --list ]; then {script}; fi; exit 7'


def served(daemon):
    return [device["name"] for device in daemon.status()["devices"]]


def all_is_cpu_and_the_gpus_of_the_list():
    gpus = [f"GPU-{i:08x}-0000-4000-8000-000000000000" for i in range(20)]

    def list_of(n):
        return lister("".join(f"echo {gpu} NVIDIA H100 80GB HBM3;" for gpu in gpus[:n]) + "exit 0")
    for devices, n, expected in (("all", 1, ["cpu", gpus[0]]), ("all,reference", 2, ["cpu", *gpus[:2], "reference"]),
                                 (f"reference,{gpus[1]},all,cpu", 2, ["reference", gpus[1], gpus[0], "cpu"])):
        with Daemon(devices, worker=list_of(n)) as daemon:
            assert served(daemon) == expected, (devices, served(daemon))
            assert "note" not in daemon.status()
            assert f"found a GPU device={gpus[0]} model=\"NVIDIA H100 80GB HBM3\"" in daemon.log(), daemon.log()
            daemon.configure("devices = all")       # what was written is compared, not what was found
            daemon.process.send_signal(signal.SIGHUP)
            daemon.await_log("configuration read again")
            assert "need a restart" not in daemon.log(), daemon.log()
    with Daemon("all,reference", worker=list_of(20)) as daemon:
        assert served(daemon) == ["cpu", *gpus[:14], "reference"], served(daemon)
        assert "20 GPUs and leaves out 6" in daemon.status()["note"]


def all_without_gpus_is_cpu_and_a_note():
    for level, script, why in (("notice", "echo rumours >&2; echo no driver >&2; exit 4", "no GPU: no driver"),
                               ("notice", "printf 'caf\\303\\251\\n' >&2; exit 4", "no GPU: caf??"),
                               ("notice", "exit 4", "exited with status 4"),
                               ("warning", "echo usage >&2; exit 2", "exited with status 2: usage"),
                               ("warning", "kill -ABRT $$", "signal 6"),
                               ("warning", "exit 0", "named no GPU"),
                               ("warning", "echo GPU-../../etc/x; echo nonsense; exit 0", "named no GPU")):
        with Daemon("all", worker=lister(script)) as daemon:
            assert served(daemon) == ["cpu"]
            assert why in daemon.status()["note"], daemon.status()["note"]
            line, = (line for line in daemon.log().splitlines() if "no GPU is found" in line)
            assert f" {level} " in line, line
    with Daemon("all", worker="") as daemon:
        assert served(daemon) == ["cpu"] and "cannot be started" in daemon.status()["note"]


def all_does_not_wait_for_a_list_that_hangs():
    notes = Notifications()
    with Daemon("all,reference", worker=lister("echo GPU-00; exec sleep 600"), options="discovery_timeout = 500ms",
                environment={"NOTIFY_SOCKET": notes.path, "WATCHDOG_USEC": "100000"}, wait=False) as daemon:
        daemon.await_socket()           # a connection waits in the queue
        notes.until("READY=1")
        assert notes.seen.count("WATCHDOG=1") >= 3, "no sign of life while the list was awaited"
        notes.socket.close()            # or mlad would wait for a reader
        assert served(daemon) == ["cpu", "reference"]
        assert "no answer within 500 ms (discovery_timeout)" in daemon.status()["note"]
        assert any(note == "STATUS=looking for GPUs" for note in notes.seen), notes.seen
        eventually(lambda: not any(b"sleep" in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
                                   for pid in daemon.children() if is_alive(pid)), "the list is killed")


def all_can_be_stopped_while_the_list_is_awaited():
    with Daemon("all", worker=lister("exec sleep 600"), wait=False) as daemon:
        daemon.await_socket()
        child, = eventually(daemon.children, "the list is asked for")
        daemon.process.send_signal(signal.SIGHUP)
        daemon.await_log("configuration read again")
        began = time.monotonic()
        assert daemon.stop() == 0
        assert time.monotonic() - began < 5
        eventually(lambda: not is_alive(child), "the list ends")
        assert not os.path.exists(daemon.socket_path)


def command_line_modes():
    def run(*arguments):
        return subprocess.run([MLAD, *arguments], capture_output=True, text=True, timeout=PATIENCE, check=False)

    with tempfile.NamedTemporaryFile("w", suffix=".conf") as file:
        file.write("max_plans = 5\n")
        file.flush()
        assert run("--check-config", "--config", file.name).stdout == f"{file.name}: ok\n"
        assert "\nmax_plans = 5\n" in run("--print-config", "--config", file.name).stdout
        assert "\nmax_plans = 6\n" in run("--print-config", "--config", file.name, "-o", "max_plans=6").stdout
        bad = run("--check-config", "--config", file.name, "-o", "max_plans=0")
        assert bad.returncode == 2 and bad.stderr.startswith("mlad: command line: max_plans: 0 is out of bounds"), bad
    missing = run("--config", "/nonexistent/mlad.conf")
    assert missing.returncode == 2 and "/nonexistent/mlad.conf: cannot be read" in missing.stderr, missing
    assert run("--version").stdout.startswith("mlad 0.")
    assert "worker_timeout = 10s" in run("--help").stdout
    for wrong in (["-o", "max_plans"], ["surplus"], ["--nonsense"]):
        assert run(*wrong).returncode == 2, wrong


def documented_configuration_is_current():
    committed = pathlib.Path(os.environ["MLAD_CONF"]).read_text(encoding="utf-8")
    command = [MLAD, "--print-config", "--config", "/dev/null"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert committed == printed, f"deploy/mlad.conf is old; write it anew with {' '.join(command)}"


if __name__ == "__main__":
    globals()[sys.argv[1]]()
