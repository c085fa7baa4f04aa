"""Where things are: in a bundle (tests/gpu/bundle) or in the source tree with a build tree."""
import hashlib
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
LIBRARIES = ROOT / "lib"


class Tree:
    """Paths of the programs under test. `build` is None inside a bundle."""

    def __init__(self, build=None):
        self.build = Path(build).resolve() if build else None
        programs = self.build or ROOT
        self.mlad, self.mlactl = programs / "bin/mlad", programs / "bin/mlactl"
        self.bench = programs / "libexec/mlad/mlad-kernel-bench"
        self.worker = programs / "libexec/mlad/mlad-worker"
        self.kernels = programs / "tests/kernels"
        self.perturbed = programs / "tests/cuda/perturbed"
        self.data = ROOT / "tests/data"
        self.package = ROOT / ("client/python" if self.build else "lib/mlad/python")
        self.example = ROOT / "client/python/examples/deepseek_v3.py"
        self.library = next((path for path in programs.glob("lib*/**/libmla.so.0")), programs / "lib/libmla.so.0")
        self.client = Path(__file__).with_name("client.py")

    def program(self, program):
        """A client of this suite: stream-client, stream-bench, load-client, soak-client."""
        folder = "tests/cuda" if program == "stream-client" else "tests/gpu"
        return (self.build / folder if self.build else ROOT / "tests/gpu") / program

    def missing(self):
        return [str(path) for path in (self.mlad, self.mlactl, self.worker, self.library, self.package)
                if not path.exists()]

    def environment(self, python=False, **extra):
        """For the processes of the suite. What a bundle's libraries need in turn is found by LD_LIBRARY_PATH alone;
        Python goes without, since its own libraries may be others of the same names."""
        given = dict(os.environ, PYTHONPATH=str(self.package), MLAD_LIBRARY=str(self.library),
                     PYTHONDONTWRITEBYTECODE="1", PYTHONUNBUFFERED="1")
        if not self.build and not python:
            paths = [str(LIBRARIES), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
            given["LD_LIBRARY_PATH"] = ":".join(dict.fromkeys(":".join(paths).split(":")))
        given.update({name: str(value) for name, value in extra.items()})
        return given

    def identity(self):
        """The hash of the source tree that the programs were built from, as far as that can be known."""
        if (ROOT / "tree.txt").exists():
            return (ROOT / "tree.txt").read_text().strip()
        return source_identity(ROOT)


def source_identity(root):
    """git's hash of the tree, and of what differs from it."""
    def git(*words):
        return subprocess.run(["git", "-C", str(root), *words], capture_output=True, check=True).stdout
    try:
        tree, changes = git("rev-parse", "HEAD^{tree}").decode().strip(), git("diff", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{tree} with changes {hashlib.sha256(changes).hexdigest()[:16]}" if changes else tree


if __name__ == "__main__":
    print(source_identity(sys.argv[1] if len(sys.argv) > 1 else ROOT))
