"""with_daemon.py MLAD COMMAND...: run COMMAND with $MLAD_SOCKET naming a fresh mlad, which is stopped afterwards."""
import os
import subprocess
import sys
import tempfile

with tempfile.TemporaryDirectory(prefix="mla-test-") as folder:
    socket = os.path.join(folder, "s")
    daemon = subprocess.Popen([sys.argv[1], "--devices", "cpu", "--socket", socket])
    try:
        # No wait for the socket: libmla tries until it is there.
        status = subprocess.run(sys.argv[2:], env={**os.environ, "MLAD_SOCKET": socket}, timeout=50).returncode
    finally:
        daemon.terminate()
        stopped = daemon.wait(20)
sys.exit(status or stopped)
