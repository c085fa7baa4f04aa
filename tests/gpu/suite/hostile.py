"""A client that rewrites its lengths, page ids, cu_q and masks while they are decoded; the same under memcheck."""
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from .daemon import Daemon, Failed
from .part import Part, Skip
from .programs import sanitizer_path, summary

SECONDS, CHECKED_SECONDS = 6, 10


def account_of(part, process, what, seconds):
    """The line of JSON that a client ends with."""
    try:
        out, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise Failed(f"{what} did not end within {seconds:.0f} s") from None
    lines = [line for line in out.splitlines() if line.startswith("{")]
    part.require(process.returncode == 0 and bool(lines),
                 f"{what} ended with {process.returncode}: {out}{errors[-800:]}")
    return json.loads(lines[-1])


def attack(part, seconds, socket=None, witness_words=("loop",)):
    """Two hostile clients beside one that checks what it gets; their accounts."""
    witness = part.client(*witness_words, socket=socket)
    hostile = []
    try:
        line = witness.stdout.readline()
        part.require(line == "ready\n",
                     f"the other client did not start: {line}{'' if line else witness.stderr.read()}")
        hostile = [part.client("scribble", seconds, seed, socket=socket) for seed in (1, 2)]
        accounts = [account_of(part, process, "a hostile client", seconds * 3 + 60) for process in hostile]
        witness.send_signal(signal.SIGTERM)
        seen = account_of(part, witness, "the other client", 90)
    finally:
        for process in [witness, *hostile]:
            if process.poll() is None:
                process.kill()
                process.wait()
    for account in accounts:
        part.check(not account["harm"], f"a hostile client was harmed itself: {account['harm']}")
        part.check(account["ok"] and account["requests"], f"the mutations did not reach every outcome: {account}")
    part.check(seen["decodes"] > 0 and not (seen["wrong"] or seen["errors"] or seen["replays"]),
               f"the other client noticed: {seen}")
    return {"hostile": accounts, "other": seen}


def hostile(part: Part):
    before = part.status()
    part.figures["plain"] = attack(part, part.options.get("hostile_seconds") or SECONDS)
    after = part.status()
    part.check(before.get("pid") and before["pid"] == after.get("pid") and before["restarts"] == after["restarts"],
               f"the worker died: {before.get('pid')} before, {after.get('pid')} after")
    part.figures["worker"] = {"before": before.get("pid"), "after": after.get("pid")}
    try:
        under_memcheck(part, sanitizer_path())
    except Skip as reason:
        part.not_run("memcheck", str(reason))


def wrapped_tree(tree, tool, folder):
    """A copy of the programs whose GPU workers run under memcheck; (mlad, its log of the sanitizer)."""
    log, programs = folder / "memcheck.log", folder / "tree"
    (programs / "libexec/mlad").mkdir(parents=True)
    (programs / "bin").mkdir()
    shutil.copy2(tree.mlad, programs / "bin/mlad")
    real = programs / "libexec/mlad/mlad-worker.real"
    shutil.copy2(tree.worker, real)
    for name in os.listdir(tree.mlad.parents[1]):
        if name.startswith("lib") and name != "libexec":
            os.symlink(tree.mlad.parents[1] / name, programs / name)
    wrapper = programs / "libexec/mlad/mlad-worker"
    wrapper.write_text(f"""#!/bin/sh
case "$*" in
*GPU-*) exec '{tool}' --tool memcheck --report-api-errors no --log-file '{log}' '{real}' "$@" ;;
*) exec '{real}' "$@" ;;
esac
""")
    wrapper.chmod(0o755)
    return programs / "bin/mlad", log


def under_memcheck(part, tool):
    """A daemon of its own, stopped in the end so that the sanitizer sums up."""
    folder = Path(tempfile.mkdtemp(prefix="mlad-memcheck-"))
    try:
        program, log = wrapped_tree(part.tree, tool, folder)
        daemon = Daemon(part.tree, ["reference", part.device], ["worker_timeout=300s", "hello_timeout=120s"],
                        program=program, ready=90)
        with daemon:
            part.figures["memcheck"] = attack(part, part.options.get("hostile_seconds") or CHECKED_SECONDS,
                                              socket=daemon.socket)
            state = daemon.status()
            part.check(state.get("restarts") == 0, f"the worker died under memcheck; mlad's log ends:\n{daemon.tail()}")
            daemon.stop(60, keep=True)
        end = time.monotonic() + 20
        text = ""
        while summary(text) is None and time.monotonic() < end:
            text = log.read_text(errors="replace") if log.exists() else ""
            time.sleep(0.2)
        part.figures["memcheck"]["errors"] = summary(text)
        part.check(summary(text) == 0, f"memcheck: {text[-1500:] or 'it wrote nothing'}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
