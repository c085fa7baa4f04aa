"""GPU faults for real, under an MPS of our own: one of another client's, which is everybody's on that GPU, and one of
the worker's alone. What the driver makes of them is recorded; whom mlad serves, rightly and how soon, is checked."""
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .daemon import Daemon, Failed, wait_for
from .hostile import account_of
from .part import Part, Skip
from .sharing import Mps, account_line, mps_control

READY_SECONDS = 15
END_SECONDS = 12        # until a client that decodes has been told, or goes on
SERVED_SECONDS = 15     # until a client that comes after the fault has right results
TRY_SECONDS = 8         # of one such client; MPS may keep it waiting
DECODES = 20            # of it
SCENE_SECONDS = 10      # less left is too little to begin with


class Stage:
    """An mlad under MPS, and processes beside it."""

    def __init__(self, part, mps, daemon):
        self.part, self.mps, self.daemon = part, mps, daemon

    def within(self, seconds):
        """So many, or what the part has left."""
        return max(1, min(seconds, self.part.left))

    def client(self, *words):
        return self.part.client(*words, socket=self.daemon.socket, environment=self.mps.environment)

    def decoding_client(self):
        process = self.client("loop")
        readable, _, _ = select.select([process.stdout], [], [], self.within(READY_SECONDS))
        line = process.stdout.readline() if readable else "nothing in time; "
        if line != "ready\n":
            end(process)
            self.part.require(False, f"the client did not start: {line}{process.stderr.read()}")
        return process

    def fault(self):
        """Let another process's kernel fault; what the driver told it."""
        program = self.part.tree.client.with_name("faulter.py")
        environment = self.part.tree.environment(True, MLAD_DEVICE=self.part.device, **self.mps.environment)
        try:
            done = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True,
                                  stdin=subprocess.DEVNULL, timeout=self.within(READY_SECONDS))
        except subprocess.TimeoutExpired as late:
            raise Failed(f"the faulting process did not end within {late.timeout:.0f} s") from None
        self.part.require(done.returncode == 0, f"the faulting process: {done.stdout}{done.stderr[-500:]}")
        return done.stdout.strip()

    def health(self):
        """Its exit status and what it says; it decodes on every device."""
        environment = self.part.tree.environment(MLAD_SOCKET=self.daemon.socket, **self.mps.environment)
        done = subprocess.run([self.part.tree.mlactl, "health", "--deep"], env=environment, capture_output=True,
                              text=True, stdin=subprocess.DEVNULL, timeout=self.within(20))
        return done.returncode, (done.stdout + done.stderr).strip()


def end(process):
    if process.poll() is None:
        process.kill()
    process.wait()


def goes_on(before, now, seconds):
    """Does status `now`, so many seconds after `before`, tell of decodes since what happened between them? A worker
    that is the same must have outlived it for a while, since it does not show at once."""
    if now.get("state") != "ready":
        return False
    return now["decodes"] >= 4 if now["pid"] != before["pid"] else now["decodes"] > before["decodes"] and seconds > 3


def fate(stage, process, before):
    """What became of the client that was decoding: right results or device_lost, and no other error; nor a hang."""
    begin, word = time.monotonic(), "goes on"

    def known():
        return process.poll() is not None or goes_on(before, stage.daemon.status(), time.monotonic() - begin)
    try:
        wait_for("decode", stage.within(END_SECONDS), known)
    except Failed as late:
        word = f"neither ended nor went on: {late}"
    seconds = round(time.monotonic() - begin, 2)
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    account = account_of(stage.part, process, f"the decoding client, which {word},", stage.within(END_SECONDS))
    if "device_lost" in account["codes"]:
        word = "device_lost"
    stage.part.check(word in ("goes on", "device_lost"), f"the decoding client {word}: {account}")
    stage.part.check(not account["wrong"] and set(account["codes"]) <= {"device_lost"},
                     f"the decoding client: {account}")
    return {"outcome": word, "seconds": seconds, "account": account}


def served(stage):
    """A new client has right results, within a while; how soon, and what the tries before said."""
    begin, tries = time.monotonic(), []
    while True:
        process = stage.client("check", DECODES)
        try:
            out, errors = process.communicate(timeout=stage.within(TRY_SECONDS))
            account = account_line(out) if process.returncode == 0 else None
        except subprocess.TimeoutExpired as late:
            account, errors = None, f"no result within {late.timeout:.0f} s"
        finally:
            end(process)
        seconds = round(time.monotonic() - begin, 2)
        if account and not account["errors"]:
            stage.part.check(not account["wrong"], f"a new client: {account}")
            return {"seconds": seconds, "tries_before": tries}
        tries.append(str(account or errors.strip()[-300:]))
        if seconds > SERVED_SECONDS or not stage.part.left:
            stage.part.check(False, f"no new client was served within {seconds} s: {tries}")
            raise Failed(stage.daemon.tail(12))
        time.sleep(0.2)


def recovered(stage, before):
    """After a scene: a new client is served, health ends well and nothing is held for the dead."""
    part, found = stage.part, {"new_client": served(stage)}

    def settled():
        now = stage.daemon.status()
        held = any(now.get(name) for name in ("sessions", "held_bytes", "orphaned_bytes"))
        return now.get("state") == "ready" and not held and now
    state = wait_for("end of all sessions", stage.within(10), settled)
    found["worker_restarts"] = state["restarts"] - before["restarts"]
    part.check(found["worker_restarts"] > 0 or state["pid"] == before["pid"], f"a restart was not counted: {state}")
    code, found["health"] = stage.health()
    part.check(code == 0 or code == 1 and "was restarted" in found["health"], f"health {code}: {found['health']}")
    return found


def fault_while_decoding(stage):
    process = stage.decoding_client()
    try:
        before = stage.daemon.status()
        said = stage.fault()
        return {"faulter": said, "client": fate(stage, process, before), **recovered(stage, before)}
    finally:
        end(process)


def fault_while_idle(stage):
    """Nobody's decode tells the worker, and as long as it stays MPS may take nobody."""
    before = stage.daemon.status()
    return {"faulter": stage.fault(), **recovered(stage, before)}


def worker_terminated(stage):
    """MPS ends the worker's work and nobody else's: a sticky error of the worker's own, which is a delay."""
    process = stage.decoding_client()
    try:
        before = stage.daemon.status()
        servers = stage.mps.command("get_server_list").split()
        said = [stage.mps.command(f"terminate_client {server} {before['pid']}") for server in servers]
        found = {"control": said, "client": fate(stage, process, before)}
    finally:
        end(process)
    found.update(recovered(stage, before))
    if found["worker_restarts"] == 0:
        stage.part.not_run("worker_terminated", f"terminate_client left the worker alone: {said}")
    elif found["client"]["outcome"] == "goes on":
        stage.part.check(found["client"]["account"]["replays"] > 0, f"no decode was replayed: {found}")
    return found


def fault(part: Part):
    control = mps_control() if part.is_gpu else None
    if not control:
        raise Skip("there is no nvidia-cuda-mps-control" if part.is_gpu else f"{part.device} is no GPU")
    folder = Path(tempfile.mkdtemp(prefix="mlad-fault-"))
    try:
        with Mps(control, folder) as mps:
            daemon = Daemon(part.tree, ["reference", part.device], environment=mps.environment, ready=READY_SECONDS)
            try:
                daemon.start()
            except Failed as error:
                raise Skip(f"no device under MPS: {str(error)[-300:]} {mps.logs()[-300:]}") from None
            with_daemon(part, mps, daemon)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def with_daemon(part, mps, daemon):
    try:
        for scene in (fault_while_decoding, worker_terminated, fault_while_idle):
            if part.left < SCENE_SECONDS:
                part.not_run(scene.__name__, f"{part.left:.0f} s are left")
                continue
            part.figures[scene.__name__] = scene(Stage(part, mps, daemon))
    except Failed:
        part.figures["log"] = daemon.tail(20)
        raise
    finally:
        part.check(daemon.stop(8), "mlad did not end cleanly on SIGTERM")
        part.figures["mps_log"] = mps.logs()[-1500:]
