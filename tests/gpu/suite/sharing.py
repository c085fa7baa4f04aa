"""Who may share a GPU with the daemon: other users, MPS, other GPUs."""
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from .daemon import Daemon, Failed
from .part import Part, Skip

DAEMON_UID, CLIENT_UID = 12345, 23456
DECODES = 20


def public_copy(tree, folder):
    """The programs where any user may run them; their mlad."""
    programs = folder / "tree"
    for path in (tree.mlad, tree.worker):
        target = programs / path.relative_to(tree.mlad.parents[1])
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)
    for name in os.listdir(tree.mlad.parents[1]):
        if name.startswith("lib") and name != "libexec":
            shutil.copytree(tree.mlad.parents[1] / name, programs / name, symlinks=True,
                            ignore=shutil.ignore_patterns("*.a", "cmake", "pkgconfig", "python"))
    shutil.copytree(tree.package, folder / "package")
    client = folder / "client"
    client.mkdir()
    for name in ("client.py", "driver.py"):
        shutil.copy2(tree.client.with_name(name), client / name)
    for path in [folder, *folder.rglob("*")]:
        if not path.is_symlink():
            path.chmod(path.stat().st_mode | (0o755 if path.is_dir() else 0o444))
    return programs / "bin/mlad"


class Shared:
    """Environments and commands of the copy, which no user is kept from."""

    def __init__(self, part, folder):
        self.part, self.folder = part, folder
        self.mlad = public_copy(part.tree, folder)
        programs = folder / "tree"
        library = next(programs.glob("lib*/**/libmla.so.0"))
        self.paths = ":".join(filter(None, [str(programs / "lib"), os.environ.get("LD_LIBRARY_PATH", "")]))
        self.environment = {"PYTHONPATH": str(folder / "package"), "MLAD_LIBRARY": str(library), "HOME": "/tmp"}

    def daemon(self, user, extra):
        options = ["allowed_users=*"]
        return Daemon(self.part.tree, ["reference", self.part.device], options, program=self.mlad, user=user,
                      environment={**self.environment, "LD_LIBRARY_PATH": self.paths, **extra})

    def decode(self, socket, user, everything, extra):
        """Decode as a user; ("right", account), ("wrong", account), ("refused", why), ("no start", why) where the user
        may not run this Python, ("waits", where) where the driver gives the client no context of its own (MPS serves
        one user at a time), or ("hangs", why)."""
        client = self.part.tree.client
        self.part.tree.client = self.folder / "client/client.py"
        try:
            process = self.part.client("check", DECODES, *(["all"] if everything else []), socket=socket, user=user,
                                       environment={**self.environment, **extra})
        except OSError as error:
            return "no start", str(error)
        finally:
            self.part.tree.client = client
        try:
            out, errors = process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            errors = process.communicate()[1] or ""
            if "has given a context" in errors:
                return "hangs", "no result within 30 s"
            return "waits", "the driver gave the client no context within 30 s: it never came to ask mlad for anything"
        if process.returncode != 0 and ("ModuleNotFoundError" in errors or "PermissionError" in errors):
            return "no start", errors.strip()[-300:]
        if process.returncode != 0:
            return "refused", (errors or out).strip()[-300:]
        account = account_line(out)
        return ("wrong" if account["wrong"] or account["errors"] else "right"), account


def account_line(out):
    return json.loads([line for line in out.splitlines() if line.startswith("{")][-1])


def try_users(part, shared, what, user, clients, extra):
    """A daemon of `user`, clients of others; {name: (outcome, account)}. A wrong result is a failure, and so is one
    that says nothing; whether other users are served is a finding."""
    findings = part.figures.setdefault(what, {})
    try:
        with shared.daemon(user, extra) as daemon:
            for name, (uid, everything) in clients.items():
                outcome, account = shared.decode(daemon.socket, uid, everything, extra)
                findings[name] = {"outcome": outcome, "said": account}
                if outcome == "no start":
                    part.not_run(f"{what}, {name}", account)
                    continue
                if outcome == "waits":
                    part.check("MPS" in what and "other user" in name, f"{what}, {name}: {account}")
                    continue
                part.check(outcome in ("right", "refused"), f"{what}, {name}: {outcome}: {account}")
                part.check(outcome != "refused" or bool(account), f"{what}, {name}: refused without a word")
            part.check(daemon.status().get("state") == "ready", f"{what}: the device is {daemon.status().get('state')}")
    except Failed as error:
        findings["daemon"] = str(error)[-1500:]
        return False
    return True


def mps_control():
    """The path of nvidia-cuda-mps-control, or None."""
    found = shutil.which("nvidia-cuda-mps-control")
    if found:
        return found
    try:
        done = subprocess.run(["find", "/usr", "/opt", "/bin", "/run", "-name", "nvidia-cuda-mps-control"],
                              capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return next(iter(done.stdout.split()), None)


class Mps:
    """An MPS of our own, by folders of its own; the GPU's settings stay as they are."""

    def __init__(self, control, folder, *options):
        self.control, self.options = control, options
        self.folder = folder / ("mps" + "".join(options))
        self.folder.mkdir(mode=0o755)
        pipes, logs = self.folder / "mps-pipes", self.folder / "mps-logs"
        for path in (pipes, logs):
            path.mkdir()
            path.chmod(0o777)
        self.environment = {"CUDA_MPS_PIPE_DIRECTORY": str(pipes), "CUDA_MPS_LOG_DIRECTORY": str(logs)}

    def __enter__(self):
        done = subprocess.run([self.control, "-d", *self.options], env={**os.environ, **self.environment},
                              capture_output=True, text=True, timeout=20)
        if done.returncode:
            raise Skip(f"MPS does not start: {done.stdout}{done.stderr}")
        time.sleep(0.5)
        return self

    def command(self, words):
        """Tell the control daemon; its answer."""
        try:
            done = subprocess.run([self.control], input=words + "\n", env={**os.environ, **self.environment},
                                  text=True, capture_output=True, timeout=20)
        except subprocess.TimeoutExpired:
            return ""
        return (done.stdout + done.stderr).strip()

    def __exit__(self, *_):
        self.command("quit")

    def logs(self):
        return "\n".join(path.read_text(errors="replace")[-600:]
                         for path in sorted((self.folder / "mps-logs").iterdir()) if path.is_file())


def uids(part: Part):
    """Clients of the daemon's user and of another one, with and without MPS."""
    if os.geteuid() != 0:
        raise Skip("needs root, to be two users")
    folder = Path(tempfile.mkdtemp(prefix="mlad-users-"))
    try:
        shared = Shared(part, folder)
        clients = {"same user, kv": (DAEMON_UID, False), "same user, all tensors": (DAEMON_UID, True),
                   "other user, kv": (CLIENT_UID, False), "other user, all tensors": (CLIENT_UID, True),
                   "root, kv": (0, False)}
        if not part.is_gpu:
            clients = {name: given for name, given in clients.items() if not given[1]}
        if try_users(part, shared, "without MPS", DAEMON_UID, clients, {}):
            same = part.figures["without MPS"]["same user, kv"]
            part.check(same["outcome"] in ("right", "no start"), f"without MPS, same user: {same['said']}")
        else:
            part.check(False, f"a daemon of uid {DAEMON_UID}: {part.figures['without MPS']['daemon']}")
        under_mps(part, shared, clients, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def under_mps(part, shared, clients, folder):
    """As root: MPS serves the users of one server at a time, so that others are recorded, not required."""
    control = mps_control() if part.is_gpu else None
    if not control:
        part.not_run("MPS", "there is no nvidia-cuda-mps-control" if part.is_gpu else f"{part.device} is no GPU")
        return
    for what, options in (("under MPS", ()), ("under MPS for several users", ("-multiuser-server",))):
        try:
            with Mps(control, folder, *options) as mps:
                names = {"same user, kv": (None, False), "same user, all tensors": (None, True),
                         "other user, kv": (CLIENT_UID, False)}
                if try_users(part, shared, what, None, names, mps.environment):
                    for name in ("same user, kv", "same user, all tensors"):
                        found = part.figures[what][name]
                        part.check(found["outcome"] in ("right", "no start"), f"{what}, {name}: {found['said']}")
                else:
                    # No context under MPS at all is this machine's doing (containers often forbid it), not mlad's.
                    why = part.figures[what]["daemon"][-300:]
                    part.not_run(what, f"no device: {why} {mps.logs()[-300:]}")
        except Skip as reason:
            part.not_run(what, str(reason))


def two_gpus(part: Part):
    """One daemon with two GPUs: each verified, and a client whose q and outputs lie on the other one."""
    gpus = [name for name in part.devices if name.startswith("GPU-")][:2]
    if len(gpus) < 2:
        raise Skip(f"{len(gpus)} GPU here")
    for uuid in gpus:
        done = part.mlactl("verify", "--device", uuid, "--cases", 18, "--seed", 2, "--quiet", "--save", "/tmp")
        part.check(done.returncode == 0, f"mlactl verify on {uuid}: {done.stdout[-600:]}{done.stderr[-300:]}")
    torch, _ = part.torch()
    import mlad
    from . import reference
    here, there = (part.ordinal(torch, uuid) for uuid in gpus)
    for served, kv_at, q_at in ((gpus[0], here, there), (gpus[1], there, here)):
        torch.manual_seed(4)
        table = torch.arange(8, dtype=torch.int32).view(2, 4)
        q, lengths = torch.randn(2, 4, 16, 576).to(torch.bfloat16), [200, 33]
        kv = torch.randn(8, 64, 576).to(torch.bfloat16)
        torch.cuda.set_device(q_at)
        remote = q.to(f"cuda:{q_at}")
        with mlad.Client(device=served, name="gpu-suite two GPUs") as client:
            try:
                out, lse = client.decode(remote, kv.to(f"cuda:{kv_at}"), table, lengths, softmax_scale=0.05, timeout=60)
            except mlad.Error as error:
                if torch.cuda.can_device_access_peer(kv_at, q_at):
                    part.check(False, f"q on cuda:{q_at}, kv on cuda:{kv_at}: {error}")
                else:
                    part.not_run(f"q on cuda:{q_at}, kv on cuda:{kv_at}", f"no peer access: {error}")
                continue
            for b, length in enumerate(lengths):
                keys = kv[table[b].long()].view(-1, 576)[:length].double()
                sees = reference.visibility(4, length, "causal", None, 0, (1, 0, 1), "cpu")
                want = reference.attention(q[b], keys, sees, softmax_scale=0.05, out_dtype=torch.bfloat16)
                verdict = reference.judge(want, out[b].cpu(), lse[b].cpu(), torch.bfloat16)
                part.check(verdict.problem is None and out.get_device() == q_at,
                           f"q on cuda:{q_at}, kv on cuda:{kv_at}, request {b}: {verdict.problem}, out on {out.device}")
    part.figures["gpus"] = gpus
