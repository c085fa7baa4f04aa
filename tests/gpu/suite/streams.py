"""Decodes in the order of a client's CUDA stream, for real: between two GPUs, and on one under an MPS of our own; who
dies meanwhile; and what it costs over the same kernels in one process."""
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .daemon import Daemon, Failed, wait_for
from .part import Part, Skip
from .sharing import Mps, mps_control

# layers, batch, heads, q_len, kv_len, nanoseconds of the client's own work a layer, replays
SHAPES = ((61, 16, 16, 1, 1024, 5000, 40), (61, 1, 16, 4, 4096, 5000, 40), (61, 64, 16, 1, 4096, 5000, 20))
CASE_SECONDS, BENCH_SECONDS = 60, 60
ALWAYS = ("eager", "ahead", "step", "graph", "failures", "late")


class Scene:
    """A daemon of our own with one device, and clients whose streams are on `gpu`."""

    def __init__(self, part, name, device, gpu, environment=(), **extra):
        self.part, self.name, self.device, self.gpu = part, name, device, gpu
        self.environment, self.extra = dict(environment), extra
        self.figures = part.figures.setdefault(name, {})
        self.daemon = Daemon(part.tree, [device], environment=self.environment)

    def start(self, program, *words):
        libraries = [str(self.part.tree.library.parent), os.environ.get("LD_LIBRARY_PATH", "")]
        given = self.part.tree.environment(MLAD_SOCKET=self.daemon.socket, MLAD_DEVICE=self.device, STREAM_GPU=self.gpu,
                                           **self.environment, **self.extra)
        given["LD_LIBRARY_PATH"] = ":".join(filter(None, [given.get("LD_LIBRARY_PATH"), *libraries]))
        return subprocess.Popen([str(self.part.tree.program(program)), *map(str, words)], env=given, text=True,
                                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def finish(self, process, seconds):
        """(exit status or "hung", what it wrote, its errors)"""
        try:
            out, err = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            return "hung", out, err
        return process.returncode, out, err

    def case(self, name, must=True):
        """Run a case to its end; note its seconds, and that it was right."""
        began = time.monotonic()
        code, out, err = self.finish(self.start("stream-client", name), CASE_SECONDS)
        said = f"{self.name}, {name}: {code} {out[-300:]} {err[-500:]}"
        self.figures[name] = {"seconds": round(time.monotonic() - began, 2), "right": code == 0}
        if code != 0:
            self.figures[name]["said"] = said
        if must:
            self.part.check(code == 0, said)
        return code == 0

    def torch(self):
        """The drop-in on CUDA tensors, in torch's graphs too."""
        given = self.part.tree.environment(True, MLAD_SOCKET=self.daemon.socket, MLAD_DEVICE=self.device,
                                           STREAM_GPU=self.gpu, **self.environment, **self.extra)
        process = subprocess.Popen([sys.executable, str(Path(__file__).with_name("torch_stream.py"))], env=given,
                                   text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        code, out, err = self.finish(process, CASE_SECONDS)
        if "No module named 'torch'" in err:
            self.part.not_run(f"{self.name} torch", "no torch")
        elif self.part.check(code == 0, f"{self.name}, torch: {code} {out[-300:]} {err[-800:]}"):
            found = self.figures["torch"] = json.loads(out)
            self.part.check(found["order"][0] == "stream" and max(found["worst"].values()) < 0.05, f"torch: {found}")

    def bench(self):
        found = []
        for shape in SHAPES:
            if self.part.left < 15:
                self.part.not_run(f"{self.name} {shape}", f"{self.part.left:.0f} s are left")
                break
            code, out, err = self.finish(self.start("stream-bench", *shape), BENCH_SECONDS)
            if self.part.check(code == 0, f"{self.name}, bench {shape}: {code} {out[-300:]} {err[-500:]}"):
                found.append(json.loads(out))
        self.figures["bench"] = found

    def pid(self):
        return self.daemon.status().get("pid", 0)

    def wait_ready(self):
        wait_for("device", 40, lambda: self.daemon.status().get("state") == "ready")

    def start_with_worker_stopped(self, name):
        """(the client, whose stream waits for the worker that is stopped; the worker's pid)"""
        process, worker = self.start("stream-client", name), self.pid()
        self.part.require(process.stdout.readline() == "ready\n", "no client is ready")
        os.kill(worker, signal.SIGSTOP)
        process.stdin.write("\n")
        process.stdin.flush()
        process.stdout.readline()
        return process, worker

    def kill_worker_before_it_answers(self):
        """The stream waits for a worker that is stopped, and then dead."""
        process, worker = self.start_with_worker_stopped("killed")
        time.sleep(0.3)
        os.kill(worker, signal.SIGKILL)
        began = time.monotonic()
        right = process.stdout.readline() == "right\n"
        seconds = time.monotonic() - began
        code, out, err = self.finish(process, CASE_SECONDS)
        self.figures["worker_killed"] = {"right": right and code == 0, "seconds_until_served": round(seconds, 3)}
        self.wait_ready()
        return self.part.check(right and code == 0, f"{self.name}, worker killed: {code} {out[-300:]} {err[-500:]}")

    def kill_workers_in_a_loop(self):
        process, kills = self.start("stream-client", "loop"), 0
        process.stdout.readline()
        while process.poll() is None and self.part.left > 10:
            time.sleep(1.5)
            if process.poll() is None and self.daemon.status().get("state") == "ready":
                os.kill(self.pid(), signal.SIGKILL)
                kills += 1
        code, out, err = self.finish(process, CASE_SECONDS)
        self.figures["workers_killed"] = {"kills": kills, "right": code == 0, "said": out.strip()}
        self.wait_ready()
        self.part.check(code == 0 and kills > 1, f"{self.name}, {kills} workers killed: {code} {out} {err[-500:]}")

    def kill_client_with_a_round_armed(self, must=True):
        """Its flag is never set: nothing of it stays, and others are not delayed."""
        process, worker = self.start("stream-client", "armed"), self.pid()
        self.part.require(process.stdout.readline() == "armed\n", "no client is armed")
        beside = self.case("eager")
        began = time.monotonic()
        process.kill()
        process.wait()
        found = {"right_beside": beside}
        try:
            wait_for("end of its session", 20, lambda: (lambda s: s and not s.get("held_bytes") and
                                                        not s.get("sessions_draining"))(self.daemon.status()))
            found["seconds_until_free"] = round(time.monotonic() - began, 3)
        except Failed as error:
            found["held"] = str(error)
        self.wait_ready()
        found["worker_survived"] = self.pid() == worker
        self.figures["client_killed"] = found
        self.part.check("held" not in found and (found["worker_survived"] or not must), f"{self.name}: {found}")
        self.case("step")


def daemon_that_stays_away(scene):
    """The last scene of a daemon: it and its worker are gone for longer than the client waits."""
    process, worker = scene.start_with_worker_stopped("gone")
    scene.daemon.process.kill()
    scene.daemon.process.wait()
    with contextlib.suppress(ProcessLookupError):       # it may have gone with the daemon
        os.kill(worker, signal.SIGKILL)
    code, out, err = scene.finish(process, CASE_SECONDS)
    scene.figures["daemon_gone"] = {"right": code == 0}
    scene.part.check(code == 0, f"{scene.name}, daemon gone: {code} {out} {err[-500:]}")


def between_gpus(part, gpus):
    scene = Scene(part, "two_gpus", gpus[1], gpus[0])
    scene.daemon.start()
    try:
        for name in ALWAYS:
            scene.case(name)
        scene.torch()
        scene.bench()
        scene.kill_worker_before_it_answers()
        scene.kill_client_with_a_round_armed()
        scene.kill_workers_in_a_loop()
        daemon_that_stays_away(scene)
    finally:
        part.figures["two_gpus"]["log"] = scene.daemon.tail(12)
        scene.daemon.stop(8)


def under_mps(part, gpu):
    control = mps_control()
    if not control:
        part.not_run("mps", "there is no nvidia-cuda-mps-control")
        return
    folder = Path(tempfile.mkdtemp(prefix="mlad-streams-"))
    try:
        with Mps(control, folder) as mps:
            scene = Scene(part, "mps", gpu, gpu, mps.environment)
            try:
                scene.daemon.start()
            except Failed as error:
                part.not_run("mps", f"no device under MPS: {str(error)[-300:]} {mps.logs()[-300:]}")
                return
            try:
                for name in ALWAYS:
                    scene.case(name)
                scene.torch()
                scene.bench()
                scene.kill_client_with_a_round_armed(must=False)    # one fault domain: the worker may not survive it
            finally:
                scene.figures["log"], scene.figures["mps_log"] = scene.daemon.tail(12), mps.logs()[-800:]
                scene.daemon.stop(8)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def timesliced(part, gpu):
    scene = Scene(part, "timesliced", gpu, gpu, CUDA_MPS_PIPE_DIRECTORY="/nonexistent")
    scene.daemon.start()
    try:
        scene.case("host")
        scene.extra["MLAD_ORDER"] = "stream"    # slow, and right all the same
        scene.case("eager")
        scene.case("step")
    finally:
        scene.daemon.stop(8)


def stream(part: Part):
    gpus = [name for name in part.devices if name.startswith("GPU-")]
    if not gpus:
        raise Skip(f"{part.device} is no GPU")
    if not part.tree.program("stream-client").exists():
        raise Skip("this build has no stream-client")
    if len(gpus) > 1:
        between_gpus(part, gpus)
    else:
        part.not_run("two_gpus", "one GPU here")
    under_mps(part, gpus[0])
    timesliced(part, gpus[0])
