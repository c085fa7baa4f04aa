"""kill -9 of a thousand clients in mid-decode: their bytes, descriptors and mappings are back within a second, and the
worker's memory and descriptor count stay flat."""
import os
import signal
import subprocess
import sys
import time

from harness import Daemon, DecodeLoop, check, children, count_fds, count_maps, memory_kb, wait_for

KILLS = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
AT_ONCE = 8
daemon = Daemon()
device = daemon.ready()
pid = device["pid"]
witness = DecodeLoop(99)  # lives through it all; nothing it decodes may fail or be wrong
witness.wait_ready()
maps = count_maps(pid)
baseline = None
victim = os.environ["VICTIM_BIN"]

slowest, killed = 0.0, 0
while killed < KILLS:
    batch = [subprocess.Popen([victim, str(killed + i)], stdout=subprocess.PIPE, text=True) for i in range(AT_ONCE)]
    children += [process.pid for process in batch]
    for process in batch:
        check(process.stdout.readline() == "decoding\n", "a victim did not start")
    for process in batch:
        process.send_signal(signal.SIGKILL)
    died = time.monotonic()
    for process in batch:
        process.wait()
        process.stdout.close()
    killed += AT_ONCE

    def back():
        d = daemon.device()
        return (d and d["sessions"] == 1 and d["sessions_draining"] == 0 and d["buffers"] == 2
                and count_maps(pid) == maps and d)

    d = wait_for("return of what the clients held", 5, back)
    slowest = max(slowest, time.monotonic() - died)
    check(slowest < 1.0, f"it took {slowest:.2f} s to get back what {AT_ONCE} clients held")
    check(d["orphaned_bytes"] == 0, "orphaned bytes")
    now = (memory_kb(pid), count_fds(pid), d["held_bytes"])
    if killed >= 80 and baseline is None:
        baseline = now

print(f"clients: {killed} killed, everything back after {slowest * 1000:.0f} ms at the slowest; worker memory "
      f"{baseline[0]} -> {now[0]} kB, "
      f"descriptors {baseline[1]} -> {now[1]}, held bytes {baseline[2]} -> {now[2]}")
check(now[0] <= baseline[0] * 1.05 + 2048, "the worker's memory grew")
check(now[1] <= baseline[1] + 1 and now[2] == baseline[2], "descriptors or bytes leaked")
check(daemon.device()["pid"] == pid, "the worker did not survive")
result = witness.finish()
check(result["wrong"] == 0 and result["errors"] == 0 and result["hit"] == 0, f"the surviving client noticed: {result}")
daemon.stop()
