#!/usr/bin/env python3
"""Test mlad on the GPUs of this machine; one command, one JSON. From a bundle (tests/gpu/bundle), or with --tree BUILD
from the source tree. README.md beside this file says what the parts are and what the JSON holds."""
import argparse
import datetime
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.dont_write_bytecode = True
sys.path.insert(0, str(Path(__file__).resolve().parent))
from suite.daemon import Daemon, Failed  # noqa: E402
from suite.part import Part  # noqa: E402
from suite.tree import Tree  # noqa: E402

# name -> module and most seconds, in the order of the run
PARTS = {
    "kernels": ("programs", 90), "perturbed": ("programs", 120), "grid": ("grid", 60), "verify": ("programs", 60),
    "replay": ("replay", 45),
    "python": ("frontends", 90), "hostile": ("hostile", 120), "kills": ("kills", 120), "uids": ("sharing", 60),
    "placement": ("placement", 90), "fault": ("fault", 40), "two_gpus": ("sharing", 60), "stream": ("streams", 300),
    "bench": ("programs", 180), "sanitizer": ("programs", 120),
}
KILLS_WORKERS = {"kills"}       # the only part that may leave another worker behind


def nvidia_smi(*words):
    try:
        return subprocess.run(["nvidia-smi", *words], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def find_gpus():
    """[(uuid, name)] as nvidia-smi -L tells them; MIG slices are left out."""
    return [(uuid, name) for name, uuid in re.findall(r"^GPU \d+: (.*) \(UUID: (GPU-[0-9a-f-]+)\)", nvidia_smi("-L"),
                                                      re.M)]


def describe_host(gpus):
    from suite import driver
    versions = sorted(set(nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader").split()))
    return {"device": gpus[0][1] if gpus else None, "uuid": gpus[0][0] if gpus else None,
            "gpus": [{"uuid": uuid, "name": name} for uuid, name in gpus],
            "driver_version": versions[0] if versions else None, "cuda_version": driver.version(),
            "processors": os.cpu_count(), "python": sys.version.split()[0],
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")}


def parse():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", default="results.json", help="where the JSON goes")
    parser.add_argument("--only", help="these parts, separated by commas")
    parser.add_argument("--skip", help="all but these parts")
    parser.add_argument("--list", action="store_true", help="name the parts and end")
    parser.add_argument("--seconds-budget", type=float, help="for all parts together; what does not fit is skipped")
    parser.add_argument("--limit", help="most seconds of parts, such as bench=300,grid=100")
    parser.add_argument("--tree", help="the build tree, from the source tree")
    parser.add_argument("--device", help="devices instead of the GPUs that nvidia-smi names, separated by commas; the "
                        "first is tested. cpu or reference try the suite itself where there is no GPU")
    parser.add_argument("--peer", help="JSON of another library's times, for bench")
    for name, what in (("cases", "of grid"), ("verify-cases", "of verify"), ("kills", "of clients"),
                       ("hostile-seconds", "of each attack")):
        parser.add_argument(f"--{name}", type=int, help=f"{what}; fewer for a trial")
    parser.add_argument("--run-part", help=argparse.SUPPRESS)      # the child's: a file that says what to run
    return parser.parse_args()


def run_part(path):
    """In the child: one part."""
    given = json.loads(Path(path).read_text())
    part = Part(**given)
    part.run(getattr(importlib.import_module(f"suite.{PARTS[part.name][0]}"), part.name))


class Suite:
    """The daemon under test and the parts' records."""

    def __init__(self, options, gpus):
        self.options, self.tree, self.gpus = options, Tree(options.tree), gpus
        self.devices = options.device.split(",") if options.device else [uuid for uuid, _ in gpus][:8]
        served = list(dict.fromkeys(["cpu", "reference", *self.devices[::-1]]))     # waits for the last one
        threads = [] if self.devices[0].startswith("GPU-") else ["cpu_threads=2"]
        self.daemon = Daemon(self.tree, served, threads)
        self.end = time.monotonic() + (options.seconds_budget or 1e9)
        self.limits = {name: seconds for name, (_, seconds) in PARTS.items()}
        for word in filter(None, (options.limit or "").split(",")):
            name, _, seconds = word.partition("=")
            self.limits[name] = float(seconds)
        self.records = {}

    def child(self, name, folder, seconds):
        """Run a part; what its file says, or what can be said without it."""
        result, description = Path(folder) / f"{name}.result", Path(folder) / f"{name}.part"
        keys = ("peer", "cases", "verify_cases", "kills", "hostile_seconds")
        options = {key: getattr(self.options, key) for key in keys}
        if options["peer"]:
            options["peer"] = str(Path(options["peer"]).resolve())
        options["device_name"] = self.gpus[0][1] if self.gpus else self.devices[0]
        description.write_text(json.dumps({
            "name": name, "device": self.devices[0], "devices": self.devices, "socket": str(self.daemon.socket),
            "build": self.options.tree and str(Path(self.options.tree).resolve()), "seconds": seconds,
            "options": options, "result": str(result)}))
        log = Path(folder) / f"{name}.log"
        with open(log, "wb") as output:
            child = subprocess.Popen([sys.executable, __file__, "--run-part", str(description)], stdout=output,
                                     stderr=output, stdin=subprocess.DEVNULL, start_new_session=True,
                                     env=self.tree.environment(True, MLAD_SOCKET=self.daemon.socket,
                                                               MLAD_DEVICE=self.devices[0]))
            try:
                child.wait(seconds + 15)
            except subprocess.TimeoutExpired:
                pass
            finally:
                try:
                    os.killpg(child.pid, signal.SIGKILL)    # it, and whatever it started and left
                except ProcessLookupError:
                    pass
                child.wait()
        record = json.loads(result.read_text()) if result.exists() else {"figures": {}, "checks": 0}
        if not record.get("finished"):
            tail = log.read_text(errors="replace")[-1500:]
            record.update(ok=False, failure=f"{record.get('failure', '')}; not finished within {seconds:.0f} s, or it "
                          f"died; its output ends: {tail}".lstrip("; "))
        record.pop("finished", None)
        return record

    def after(self, name, before, record):
        """The daemon must be as it was before the part; if not, another one is started for the next."""
        try:
            if self.daemon.process.poll() is not None:
                raise Failed(f"mlad ended with {self.daemon.process.returncode}")
            self.daemon.wait_ready()
            restarts = self.daemon.status(self.devices[0])["restarts"]
            if name not in KILLS_WORKERS and restarts != before:
                raise Failed(f"the worker died {restarts - before} times")
        except (Failed, KeyError, subprocess.TimeoutExpired) as error:
            record["failure"] = (record.get("failure", "") + f"; {error}; mlad's log ends:\n{self.daemon.tail()}"
                                 ).lstrip("; ")
            record["ok"] = False
            record.pop("skipped", None)
            self.daemon.stop()
            self.daemon = Daemon(self.tree, self.daemon.devices, self.daemon.command[-1:]
                                 if self.daemon.command[-2] == "-o" else [])
            self.daemon.start()

    def run(self, names, folder, save):
        """Fill `records`; print a line for each part as it ends, and save()."""
        for name in names:
            left = self.end - time.monotonic()
            begin = time.monotonic()
            if self.options.seconds_budget and left < 10:
                record = {"ok": False, "skipped": f"the budget of {self.options.seconds_budget:g} s is spent",
                          "figures": {}, "failure": "", "checks": 0}
                self.records[name] = record
            else:
                before = self.daemon.status(self.devices[0]).get("restarts", 0)
                self.records[name] = record = self.child(name, folder, min(self.limits[name], left))
                record["seconds"] = round(time.monotonic() - begin, 1)
                self.after(name, before, record)
            record["seconds"] = round(time.monotonic() - begin, 1)
            self.tell(name, record)
            save()

    @staticmethod
    def tell(name, record):
        word = "ok" if record["ok"] else "skipped" if "skipped" in record else "FAILED"
        rest = record.get("skipped") or record.get("failure", "")
        not_run = "; ".join(f"not run: {what}: {why}" for what, why in record["figures"].get("not_run", {}).items())
        line = " ".join((rest or not_run).split())
        print(f"{name:10} {word:8} {record['seconds']:6.1f} s  {line[:600]}", flush=True)


def main():
    options = parse()
    if options.list:
        print("\n".join(PARTS))
        return 0
    if options.run_part:
        run_part(options.run_part)
        return 0
    names = options.only.split(",") if options.only else [n for n in PARTS if n not in (options.skip or "").split(",")]
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        sys.exit(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    begin, gpus = time.monotonic(), find_gpus()
    report = {**describe_host(gpus), "tree": Tree(options.tree).identity(), "ok": False, "parts": {}}
    if options.device:
        report.update(device=options.device, uuid=options.device, trial="devices named by hand")
    elif not gpus:
        sys.exit("nvidia-smi -L names no GPU; --device cpu tries the suite itself")
    missing = Tree(options.tree).missing()
    if missing:
        sys.exit(f"not there: {', '.join(missing)}; run from a bundle, or give --tree BUILD")

    suite = Suite(options, gpus)

    def save():
        report.update(parts=suite.records, seconds=round(time.monotonic() - begin, 1))
        Path(options.out).write_text(json.dumps(report, indent=1) + "\n")
    try:
        suite.daemon.start()
        with tempfile.TemporaryDirectory(prefix="mlad-gpu-parts-") as folder:
            suite.run(names, folder, save)
    except Failed as error:
        report["failure"] = f"mlad is not up: {error}"
        print(report["failure"], flush=True)
    finally:
        clean = suite.daemon.stop()
    for name in names:
        suite.records.setdefault(name, {"ok": False, "skipped": "mlad was not up", "figures": {}, "failure": "",
                                        "checks": 0, "seconds": 0})
    records = suite.records.values()
    report["skipped"] = {name: record["skipped"] for name, record in suite.records.items() if "skipped" in record}
    report["failed"] = [name for name, record in suite.records.items()
                        if not record["ok"] and name not in report["skipped"]]
    if not clean:
        report["failed"].append("mlad did not end cleanly on SIGTERM")
    report["ok"] = not report["failed"] and "failure" not in report and any(record["ok"] for record in records)
    save()
    print(f"{'ok' if report['ok'] else 'FAILED'}: {sum(r['ok'] for r in records)} parts right, "
          f"{len(report['failed'])} failed, {len(report['skipped'])} skipped, {report['seconds']} s; {options.out}")
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
