"""need.py MODULE SCRIPT ARGUMENTS...: run SCRIPT if MODULE can be imported, else say so and exit with 77, "skipped"."""
import importlib
import os
import runpy
import sys


def need(module):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        print(f"SKIPPED: {error}")
        sys.stdout.flush()
        os._exit(77)


if __name__ == "__main__":
    need(sys.argv[1])
    sys.argv = sys.argv[2:]
    runpy.run_path(sys.argv[0], run_name="__main__")
