"""kill -9 of the supervisor while four clients decode, the socket kept as systemd keeps it: no call fails, every output
is right, and no worker outlives its supervisor."""
import os
import random
import signal
import sys
import time

from harness import Daemon, DecodeLoop, check, report_and_check, wait_for

KILLS = int(sys.argv[1]) if len(sys.argv) > 1 else 200
random.seed(2)
daemon = Daemon()
daemon.ready()
loops = [DecodeLoop(seed) for seed in range(4)]
for loop in loops:
    loop.wait_ready()

for kill in range(KILLS):
    device = wait_for("progress", 30,
                      lambda: (d := daemon.device()) and d["state"] == "ready" and d["decodes"] >= 24 and d)
    time.sleep(random.random() * 0.02)
    os.kill(daemon.pid, signal.SIGKILL)
    os.waitpid(daemon.pid, 0)
    daemon.start()
    # The next life needs the device lock, so it cannot become ready while the old worker lives.
    wait_for("new worker", 30, lambda: (d := daemon.device()) and d["state"] == "ready" and d["pid"] != device["pid"])
    check(not os.path.exists(f"/proc/{device['pid']}/exe")
          or open(f"/proc/{device['pid']}/stat").read().split()[2] == "Z",
          "the old worker is still alive")

report_and_check(loops, KILLS, "supervisor")
daemon.stop()
