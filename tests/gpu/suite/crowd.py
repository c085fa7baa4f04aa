"""Tenants that wait until they are told to work (load_client.c), so that ways to share a GPU are measured in turn; and
the two settings of one GPU in which they do."""
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import tempfile
from pathlib import Path

from .daemon import Daemon, Failed
from .part import Skip
from .sharing import Mps, mps_control

TURNS, TURN_BYTES = 4096, 16        # as load_client.c has them
WITHOUT_MPS = {"CUDA_MPS_PIPE_DIRECTORY": "/nonexistent"}


def client_environment(part, daemon, **extra):
    """For the C clients of the suite, which need libmla, of a daemon."""
    given = part.tree.environment(MLAD_SOCKET=daemon.socket, **extra)
    given["LD_LIBRARY_PATH"] = ":".join(filter(None, [given.get("LD_LIBRARY_PATH"), str(part.tree.library.parent)]))
    return given


def settings(part, device, run, options=(), served=()):
    """run(name, daemon, environment) with a daemon of our own without MPS, then with one under an MPS of our own."""
    without_mps(part, device, run, options, served)
    under_mps(part, device, run, options, served)


def without_mps(part, device, run, options=(), served=()):
    with Daemon(part.tree, [*served, device], options, environment=WITHOUT_MPS) as daemon:
        run("without MPS", daemon, WITHOUT_MPS)


def under_mps(part, device, run, options=(), served=()):
    control = mps_control() if device.startswith("GPU-") else None
    if not control:
        part.not_run("under MPS", "there is no nvidia-cuda-mps-control" if device.startswith("GPU-")
                     else f"{device} is no GPU")
        return
    folder = Path(tempfile.mkdtemp(prefix="mlad-crowd-"))
    try:
        with Mps(control, folder) as mps:
            daemon = Daemon(part.tree, [*served, device], options, environment=mps.environment)
            try:
                daemon.start()
            except Failed as error:     # this machine's doing: containers often forbid it
                part.not_run("under MPS", f"no device: {str(error)[-300:]} {mps.logs()[-300:]}")
                return
            try:
                run("under MPS", daemon, mps.environment)
            finally:
                daemon.stop()
    except Skip as reason:
        part.not_run("under MPS", str(reason))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Tenant:
    """One load-client; it is ready once `told` is read."""

    def __init__(self, crowd, name, words, environment):
        self.name, self.errors = name, crowd.folder / f"errors-{len(crowd.tenants)}"
        with open(self.errors, "wb") as errors:
            self.process = subprocess.Popen([str(crowd.part.tree.program("load-client")), *map(str, words)], text=True,
                                            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                            stderr=errors)

    def tell(self, *words):
        try:
            print(*words, file=self.process.stdin, flush=True)
        except BrokenPipeError:
            pass    # hear() has the reason

    def hear(self):
        line = self.process.stdout.readline()
        if not line:
            raise Failed(f"{self.name} ended with {self.process.wait()}: {self.errors.read_text()[-500:]}")
        return json.loads(line)

    def leave(self):
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()

    def gone(self, seconds):
        """Its exit status; of one that does not go, "hung"."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return "hung"


class Crowd:
    """Groups of tenants of one daemon. All processes are there all the time; those of one turn work."""

    def __init__(self, part, daemon, environment, cold_bytes=0):
        self.part, self.daemon, self.environment, self.cold_bytes = part, daemon, dict(environment), cold_bytes
        self.folder = Path(tempfile.mkdtemp(prefix="mlad-tenants-"))
        (self.folder / "meeting").write_bytes(bytes(TURNS * TURN_BYTES))
        self.groups, self.tenants, self.turns, self.ready = {}, [], 0, {}

    def __enter__(self):
        return self

    def __exit__(self, *failure):
        for tenant in self.tenants:
            tenant.leave()
        patience = 30 if failure[0] is None else 1     # those who wait for one that has died wait on
        codes = {f"{tenant.name}: {tenant.gone(patience)}" for tenant in self.tenants}
        for tenant in self.tenants:
            tenant.process.stdout.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        if failure[0] is None:
            self.part.check(all(code.endswith(": 0") for code in codes), f"tenants left with {codes}")

    def add(self, name, count, kind, shape, depth=1, gpu=None, **extra):
        """`shape`: batch, heads, q_len, keys. `gpu`: where all but the keys lies; the daemon's, if absent."""
        device = self.daemon.devices[-1]
        given = client_environment(self.part, self.daemon, MLAD_DEVICE=device, STREAM_GPU=gpu or device,
                                   LOAD_MEETING=self.folder / "meeting", **self.environment, **extra)
        self.groups[name] = [Tenant(self, name, (kind, *shape, self.cold_bytes, depth), given) for _ in range(count)]
        self.tenants += self.groups[name]

    def wait_ready(self):
        """Of each group, what its first tenant says of itself."""
        self.ready = {name: [tenant.hear() for tenant in group][0] for name, group in self.groups.items()}
        return self.ready

    def turn(self, names, seconds):
        """The groups work, all of them together, for the same seconds. {name: what each of its tenants did}; and how
        many decodes the daemon had in a launch meanwhile, None if it had no launch."""
        working = [tenant for name in names for tenant in self.groups[name]]
        before = self.daemon.status()
        for tenant in working:
            tenant.tell("run", self.turns, len(working), seconds)
        self.turns += 1
        did = {name: [tenant.hear() for tenant in self.groups[name]] for name in names}
        after = self.daemon.status()
        late = max(answer["late_us"] for answers in did.values() for answer in answers)
        if (os.cpu_count() or 1) >= 2 * len(working):   # else their turn at a processor may come late
            self.part.check(late < seconds * 1e6 / 20, f"{names}: a tenant began {late:.0f} us after the others")
        launches = after["launches"] - before["launches"]
        return did, (after["launched_parts"] - before["launched_parts"]) / launches if launches else None

    def outputs(self, name):
        """The bits that the group's tenants get from the same decode, all at once."""
        paths = [self.folder / f"out-{i}" for i in range(len(self.groups[name]))]
        for tenant, path in zip(self.groups[name], paths):
            tenant.tell("out", path)
        for tenant in self.groups[name]:
            tenant.hear()
        return [path.read_bytes() for path in paths]


def spread(values):
    """Of one value a turn."""
    return {"median": round(statistics.median(values), 4), "least": round(min(values), 4),
            "most": round(max(values), 4), "all": [round(value, 4) for value in values]}


def together(answers):
    """The decodes a second of a group in one turn."""
    return sum(answer["per_s"] for answer in answers)


def latencies(turns, *names):
    """Over the turns of a group of one, the spread of each percentile, in microseconds. A turn without a decode has
    none."""
    return {name: spread([answers[0][name] for answers in turns if name in answers[0]]) for name in names}


def require_decodes(part, what, turns):
    """Every tenant of a group had some in all its turns together."""
    for i in range(len(turns[0])):
        part.require(sum(answers[i]["decodes"] for answers in turns), f"{what}: tenant {i} got nothing")
