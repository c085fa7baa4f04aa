"""kill -9 of the worker, again and again, while four clients decode: no call fails and every output is right."""
import os
import random
import signal
import sys
import time

from harness import Daemon, DecodeLoop, check, report_and_check, wait_for

KILLS = int(sys.argv[1]) if len(sys.argv) > 1 else 200
random.seed(1)
daemon = Daemon()
daemon.ready()
loops = [DecodeLoop(seed) for seed in range(4)]
for loop in loops:
    loop.wait_ready()

for kill in range(KILLS):
    # Let the present life complete some work, so that no decode meets three deaths in a row by the test's own haste.
    device = wait_for("progress", 30,
                      lambda: (d := daemon.device()) and d["state"] == "ready" and d["decodes"] >= 24 and d)
    time.sleep(random.random() * 0.02)
    os.kill(device["pid"], signal.SIGKILL)
    wait_for("new worker", 30, lambda: (d := daemon.device()) and d["pid"] not in (0, device["pid"]))

check(daemon.ready()["restarts"] == KILLS, "restarts are not counted")
report_and_check(loops, KILLS, "worker")
daemon.stop()
