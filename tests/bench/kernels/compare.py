#!/usr/bin/env python3
"""Compare our kernels with a peer's (README.md): choose shapes, run mlad-kernel-compare, judge what it measured.

    python3 compare.py --peer libpeer.so --shapes flashmla.json --out results.json --plot results.svg

The exit status is 0 if every shape that was measured agrees with the peer, and one was."""
import argparse
import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import plot     # noqa: E402
import report   # noqa: E402
import shapes   # noqa: E402


def options(words):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", metavar="FILE", help="a list of {batch, heads, q_len, kv_len}; else a grid")
    parser.add_argument("--sets", default="uniform,ragged", help="uniform (FILE or the grid), ragged, or both")
    parser.add_argument("--only", default="", metavar="B=1/10,H=16",
                        help="of these, those with such B, H, q and K (of ragged batches the mean)")
    parser.add_argument("--peer", metavar="FILE.so", help="a library to peer.h")
    parser.add_argument("--device", help="a GPU's UUID; else the first of nvidia-smi -L")
    parser.add_argument("--limit-seconds", default="120")
    parser.add_argument("--pairs", help="of samples for each shape, at least (7)")
    parser.add_argument("--most-pairs", help="and at most (101)")
    parser.add_argument("--cold-mb", help="MB of KV between two reads of the same (four times the L2)")
    parser.add_argument("--own-edges", action="store_true",
                        help="join the peer's calls as it captures them, by programmatic edges too, not by full ones")
    parser.add_argument("--ceilings", metavar="GBPS,TFLOPS", help="instead of measuring them")
    parser.add_argument("--program", type=Path, help="mlad-kernel-compare; else beside this file, or in build/release")
    parser.add_argument("--out", type=Path, help="the report as JSON, with all samples")
    parser.add_argument("--plot", type=Path, help="the report as SVG")
    parser.add_argument("--again", type=Path, metavar="REPORT",
                        help="run nothing: show, and plot, a report that --out wrote")
    return parser.parse_args(words)


def program(given):
    beside = HERE / "mlad-kernel-compare"
    built = HERE.parents[2] / "build/release/tests/bench/kernels/mlad-kernel-compare"
    found = next((path for path in (given, beside, built) if path and path.exists()), None)
    return found or sys.exit("compare.py: no mlad-kernel-compare is here: build it, or name it by --program")


def first_gpu():
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
        return next(word.rstrip(")") for word in listed.split() if word.startswith("GPU-"))
    except (OSError, subprocess.CalledProcessError, StopIteration):
        sys.exit("compare.py: nvidia-smi lists no GPU: name one by --device")


def chosen(given):
    sets = given.sets.split(",")
    if not set(sets) <= {"uniform", "ragged"}:
        raise ValueError(f"--sets {given.sets}: give uniform, ragged or both")
    found = []
    if "uniform" in sets:
        found += shapes.from_file(given.shapes) if given.shapes else shapes.grid()
    if "ragged" in sets:
        found += shapes.ragged()
    found = shapes.only(found, given.only)
    if not found:
        raise ValueError("no shape is left: loosen --only")
    return found


def measure(given, wanted):
    """The program's lines. What it says of failures goes to our standard error, as it comes."""
    command = [program(given.program), "--device", given.device or first_gpu(), "--limit-seconds", given.limit_seconds]
    for name in ("peer", "pairs", "most_pairs", "cold_mb", "ceilings"):
        if getattr(given, name):
            command += [f"--{name.replace('_', '-')}", getattr(given, name)]
    if given.own_edges:
        command.append("--own-edges")
    done = subprocess.run(command, input="".join(shapes.line(shape) + "\n" for shape in wanted), text=True,
                          stdout=subprocess.PIPE)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    if done.returncode and not lines:
        sys.exit(done.returncode)
    return lines


def main(words):
    given = options(words)
    try:
        if given.again:
            found = json.loads(given.again.read_text())
        else:
            wanted = chosen(given)
            found = report.build(wanted, measure(given, wanted))
    except (ValueError, OSError) as problem:
        sys.exit(f"compare.py: {problem}")
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n")
    if given.plot:
        given.plot.write_text(plot.svg(found))
    print(report.table(found))
    return 1 if found["failed"] or not found["shapes"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
