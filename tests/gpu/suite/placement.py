"""Which placement a client on the daemon's GPU is told to have, without MPS and with it, and what tenants get out of
each."""
import json
import shutil
import subprocess
import tempfile
from pathlib import Path

from .daemon import Daemon, Failed, mlactl, wait_for
from .part import Part, Skip
from .sharing import Mps, mps_control

BUSY = ("bench", "step", "--layers", "8", "--kv-len", "256", "--seconds", "3", "--quiet")


def seen(part, socket, words, environment):
    """The session of a client whose tensors lie on the device, as `mlactl status` lists it while it works."""
    given = part.tree.environment(MLAD_SOCKET=socket, MLAD_DEVICE=part.device, **environment)
    client = subprocess.Popen([*words, str(part.tree.mlactl), *BUSY], env=given, stdin=subprocess.DEVNULL,
                              stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def session():
        if client.poll() is not None:
            raise Failed(f"the client ended with {client.returncode}: {client.stderr.read()[-500:]}")
        listed = json.loads(mlactl(part.tree, socket, "status", "--sessions", "--json", "--device",
                                   part.device).stdout)["devices"][0]["session_list"]
        return next((s for s in listed if s["pid"] == client.pid and s["decodes"] > 0), None)

    try:
        return wait_for("session at work", 40, session)
    finally:
        try:
            client.communicate(timeout=30)  # it leaves by itself: under MPS a client that is killed may cost others
        except subprocess.TimeoutExpired:
            client.kill()
            client.communicate()


def scene(part, name, socket, words, environment, expected):
    """One client, and then tenants in the same environment."""
    session = seen(part, socket, words, environment)
    part.figures[name] = {key: session[key] for key in ("placement", "order", "why")}
    part.check(session["placement"] == expected, f"{name}: {session['placement']}, not {expected}: {session['why']}")
    given = part.tree.environment(MLAD_SOCKET=socket, MLAD_DEVICE=part.device, **environment)
    done = subprocess.run([*words, str(part.tree.mlactl), "bench", "tenants", "--seconds", "4", "--json", "--quiet"],
                          env=given, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    if part.check(done.returncode == 0, f"{name}: bench tenants: {done.stdout[-300:]}{done.stderr[-300:]}"):
        part.figures[name]["tenants"] = json.loads(done.stdout)


def placement(part: Part):
    """Each placement that one GPU can have."""
    nowhere = {"CUDA_MPS_PIPE_DIRECTORY": "/nonexistent"}
    folder = Path(tempfile.mkdtemp(prefix="mlad-placement-"))
    try:
        with Daemon(part.tree, [part.device], environment=nowhere) as daemon:
            scene(part, "without MPS", daemon.socket, (), nowhere, "shared_timesliced" if part.is_gpu else "host")
            refused = mlactl(part.tree, daemon.socket, "run", "--", "true")
            part.check(refused.returncode == 1 and "MPS" in refused.stderr, f"run without MPS: {refused}")
        control = mps_control() if part.is_gpu else None
        if not control:
            part.not_run("MPS", "there is no nvidia-cuda-mps-control" if part.is_gpu else f"{part.device} is no GPU")
            return
        with Mps(control, folder) as mps, Daemon(part.tree, [part.device], environment=mps.environment) as daemon:
            scene(part, "under MPS", daemon.socket, (part.tree.mlactl, "run", "--"), nowhere, "shared_mps")
            part.figures["doctor"] = json.loads(mlactl(part.tree, daemon.socket, "doctor", "--json").stdout)
            own = [f for f in part.figures["doctor"]["findings"] if f["check"] == "mps"]
            part.check(any(mps.environment["CUDA_MPS_PIPE_DIRECTORY"] in f["finding"] for f in own), f"doctor: {own}")
    except Skip as reason:
        part.not_run("MPS", str(reason))
    except Failed as error:
        # No context under MPS at all is this machine's doing (containers often forbid it).
        if "under MPS" in part.figures or "without MPS" not in part.figures:
            raise
        part.not_run("MPS", str(error)[-500:])
    finally:
        shutil.rmtree(folder, ignore_errors=True)
