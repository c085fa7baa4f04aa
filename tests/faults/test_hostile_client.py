"""Hostile clients scribble over their lengths, page ids, cu_q and masks while the daemon decodes them: the worker
lives, nothing outside their outputs changes, and a well-behaved client beside them sees nothing of it."""
import json
import os
import subprocess
import sys

from harness import Daemon, DecodeLoop, check, children

MUTATIONS = sys.argv[1] if len(sys.argv) > 1 else "100000"
daemon = Daemon()
pid = daemon.ready()["pid"]
witness = DecodeLoop(7)
witness.wait_ready()
hostile = [subprocess.Popen([os.environ["SCRIBBLER_BIN"], MUTATIONS, str(seed)], stdout=subprocess.PIPE, text=True)
           for seed in (1, 2)]
children += [process.pid for process in hostile]
for process in hostile:
    out, _ = process.communicate(timeout=280)
    check(process.returncode == 0, "a hostile client was harmed itself")
    counts = json.loads(out)
    print("hostile client:", counts)
    check(counts["ok"] > 0 and counts["requests"] > 0 and counts["batch"] > 0,
          "the mutations did not reach every outcome")
result = witness.finish()
print("witness:", result)
check(result["wrong"] == 0 and result["errors"] == 0 and result["hit"] == 0 and result["decodes"] > 20,
      "the other client noticed")
device = daemon.device()
check(device["pid"] == pid and device["restarts"] == 0, "the worker died")
daemon.stop()
