"""test_install.py CMAKE BUILD: the installed package finds the library of its own tree, also after the tree was
moved."""
import os
import shutil
import subprocess
import sys
import tempfile

cmake, build = sys.argv[1:]
with tempfile.TemporaryDirectory(prefix="mla-python-") as top:
    first, moved = os.path.join(top, "first"), os.path.join(top, "moved here")
    for component in ("libmla", "python"):
        subprocess.run([cmake, "--install", build, "--prefix", first, "--component", component], check=True,
                       stdout=subprocess.DEVNULL)
    shutil.move(first, moved)
    environment = {k: v for k, v in os.environ.items() if k not in ("MLAD_LIBRARY", "LD_LIBRARY_PATH")}
    environment["PYTHONPATH"] = os.path.join(moved, "lib/mlad/python")
    program = ("import mlad, mlad.flash_mla, mlad.tokenspeed_mla\nassert mlad.library_version() == '0.1.0'\n"
               "print([l.split(' ', 5)[-1].strip() for l in open('/proc/self/maps') if 'libmla.so' in l][0])")
    where = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True,
                           check=True).stdout
    assert where.startswith(moved), where
print("ok")
