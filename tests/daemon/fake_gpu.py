"""The fake driver of tests/cuda/fake, for test programs that import this before they start a daemon: where its GPUs are,
and what goes wrong."""
import atexit
import os
import tempfile

GPU, SECOND = "GPU-fa4e0000-0000-4000-8000-000000000000", "GPU-fa4e0000-0000-4000-8000-000000000001"
CONTROL = tempfile.NamedTemporaryFile(prefix="mlad-fake-", mode="w", delete=False)
os.environ["MLAD_FAKE_CUDA_CONTROL"] = CONTROL.name
atexit.register(os.unlink, CONTROL.name)
times = 0


def inject(words=""):
    """What goes wrong from now on, in words of tests/cuda/fake/fake_cuda.h."""
    global times
    times += 1  # another size: the file is read again when it changes
    with open(CONTROL.name, "w") as file:
        file.write(words + " " * times + "\n")
