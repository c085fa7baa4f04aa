"""Parts that run programs: the kernel tests, mlactl verify and decode, compute-sanitizer, mlad-kernel-bench."""
import json
import math
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from .part import Part, Skip

KERNEL_TESTS = ("test_decode", "test_edges", "test_same", "test_graph")
PORTABLE = "mma"    # the variant of every GPU; some have another one for some types, and prefer it
MODEL_DB = 49       # tests/data/README.md: what a correct bf16 decode reaches
LAUNCHES = 60       # that racecheck looks at
PERTURBED = tuple(f"perturbed_{name}" for name in ("decode", "edges", "same", "merge", "graph", "phases"))
RUNS = 1000         # of the same launch


def run_tests(part, runs):
    """Test programs, all at once, on the device's own memory. `runs`: name -> words of the command, without the device;
    the name's last word is the variant if it is PORTABLE. A program that the device cannot run ends with 77."""
    with tempfile.TemporaryDirectory() as folder:
        begin, running = time.monotonic(), {}
        for name, words in runs.items():
            words = [*words, part.device] + [PORTABLE] * name.endswith(f" {PORTABLE}")
            with open(Path(folder) / name, "w") as output:
                running[name] = subprocess.Popen(list(map(str, words)), stdin=subprocess.DEVNULL, stdout=output,
                                                 stderr=output, env=part.tree.environment())
        for name, process in running.items():
            try:
                process.wait(max(1, part.left))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            output = (Path(folder) / name).read_text(errors="replace")
            passed = re.findall(r"^\[  PASSED  \] (\d+) test", output, re.M)
            part.figures[name] = {"passed": int(passed[-1]) if passed else 0,
                                  "seconds": round(time.monotonic() - begin, 1)}
            part.check(process.returncode == 0 and passed and int(passed[-1]) > 0,
                       f"{name} ended with {process.returncode}: {output[-1500:]}")


def kernels(part: Part):
    """The kernel tests of tests/kernels, with the kernels that the device prefers, and with the portable ones."""
    missing = [name for name in KERNEL_TESTS if not (part.tree.kernels / name).exists()]
    part.require(not missing, f"not built: {', '.join(missing)}")
    run_tests(part, {name + variant: [part.tree.kernels / name] for name in KERNEL_TESTS
                     for variant in ("", f" {PORTABLE}")})


def perturbed(part: Part):
    """What shifts pipelines against each other, and the same launch 1,000 times, with the kernels as they are; then the
    kernel tests with Hopper's kernels out of step."""
    if not part.is_gpu:
        raise Skip("a GPU's kernels are tested")
    plain = {"test_phases": [], "test_same": [RUNS]}
    folder = part.tree.perturbed
    missing = [name for name in plain if not (part.tree.kernels / name).exists()]
    missing += [name for name in PERTURBED if not (folder / name).exists()]
    part.require(not missing, f"not built: {', '.join(missing)}")
    run_tests(part, {name + variant: [part.tree.kernels / name, *words] for name, words in plain.items()
                     for variant in ("", f" {PORTABLE}")})
    status, output = part.command(folder / "perturbed_merge", part.device)
    if status == 77:
        part.not_run("kernels out of step", output[-300:])
        return
    part.check(status == 0, f"perturbed_merge ended with {status}: {output[-1500:]}")
    runs = {name: [folder / name] for name in PERTURBED if name != "perturbed_merge"}
    runs["perturbed_same"].append(RUNS // 10)
    run_tests(part, {**runs, **{f"{name} {PORTABLE}": [folder / name] for name in ("perturbed_decode",
                                                                                  "perturbed_edges")}})


def read_safetensors(path):
    """Tensors as fp64, without the package of that name."""
    import numpy as np
    raw = Path(path).read_bytes()
    size = int.from_bytes(raw[:8], "little")
    tensors = {}
    for name, entry in json.loads(raw[8:8 + size]).items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        data = raw[8 + size + begin:8 + size + end]
        if entry["dtype"] == "BF16":
            array = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            array = np.frombuffer(data, {"F32": "<f4", "I32": "<i4"}[entry["dtype"]])
        tensors[name] = array.astype(np.float64).reshape(entry["shape"])
    return tensors


def verify(part: Part):
    """mlactl verify, and a layer of a real model against what the model itself computed."""
    import numpy as np
    with tempfile.TemporaryDirectory() as folder:
        done = part.mlactl("verify", "--device", part.device, "--cases", part.options.get("verify_cases") or 60,
                           "--seed", 1, "--save", folder, "--json", "--quiet")
        part.require(done.returncode in (0, 1) and done.stdout.startswith("{"),
                     f"mlactl verify ended with {done.returncode}: {done.stdout}{done.stderr}"[:1500])
        report = json.loads(done.stdout)
        cases = sum(row["cases"] for row in report["rows"])
        margins = [row["worst_margin_db"] for row in report["rows"] if "worst_margin_db" in row]
        part.figures.update(cases=cases, rows=len(report["rows"]), worst_margin_db=min(margins, default=None),
                            worst_lse_share=max(row["worst_lse_share"] for row in report["rows"]))
        part.check(done.returncode == 0 and cases > 0 and not report["failures"], str(report["failures"])[:1500])

        out = Path(folder) / "out.safetensors"
        done = part.mlactl("decode", part.tree.data / "deepseek-v3-layer.safetensors", "-o", out, "--device",
                           part.device, "--quiet")
        part.require(done.returncode == 0, f"mlactl decode: {done.stdout}{done.stderr}")
        model = read_safetensors(part.tree.data / "deepseek-v3-layer.expected.safetensors")
        attention = np.einsum("hvl,thl->thv", model["w_uv"], read_safetensors(out)["out"])
    noise = np.sum((model["attention"] - attention) ** 2)
    part.figures["model_db"] = float(10 * np.log10(np.sum(model["attention"] ** 2) / noise))
    part.check(part.figures["model_db"] >= MODEL_DB, f"{part.figures['model_db']:.2f} dB of the model's own result")


# compute-sanitizer.

def sanitizer_path():
    found = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if not found:
        raise Skip("compute-sanitizer is not on the PATH")
    return found


def summary(output):
    """Errors or hazards that compute-sanitizer counted; None where it said nothing."""
    found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)", output)
    return int(found[-1]) if found else None


def sanitizer(part: Part):
    """memcheck over test_edges, then racecheck over the first launches of test_same; of both, the kernels that the
    device prefers and the portable ones."""
    tool = sanitizer_path()
    edges = ["--report-api-errors", "no", part.tree.kernels / "test_edges", part.device]
    same = ["--launch-count", LAUNCHES, part.tree.kernels / "test_same", part.device]
    for name, words, share in (
            ("memcheck", [*edges], 0.4), ("memcheck portable", [*edges, PORTABLE], 0.5),
            ("racecheck", [*same], 0.6), ("racecheck portable", [*same, PORTABLE], 1.0)):
        begin = time.monotonic()
        status, output = part.command(tool, "--tool", name.split()[0], *words, timeout=max(10, part.left * share))
        part.figures[name] = {"summary": summary(output), "status": status,
                              "seconds": round(time.monotonic() - begin, 1)}
        part.check(status == 0 and summary(output) == 0,
                   f"{name} {'did not finish' if status is None else f'ended with {status}'}: {output[-1200:]}")
    part.figures["racecheck_launches"] = f"the first {LAUNCHES}"


# Speed.

def peer_us(shape, device_name):
    """The peer's time on this GPU, or None."""
    return shape.get("h200_us" if "H200" in device_name else "h100_us")


def chosen(shapes):
    """All with a batch of 64 and more, and a dozen of the smaller ones spread over the list; the longest
    last, so that a want of time loses those alone."""
    big = [shape for shape in shapes if shape["batch"] >= 64]
    small = [shape for shape in shapes if shape["batch"] < 64]
    step = max(1, len(small) // 12)
    return sorted(big + small[::step][:12], key=lambda shape: shape["batch"] * shape["kv_len"])


def mean(ratios):
    return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None


def bench(part: Part):
    """mlad-kernel-bench on a peer's shapes, by the kernels that the device prefers and by the portable ones. Right means
    that all ran; how fast stands in the figures."""
    if not part.options.get("peer"):
        raise Skip("no --peer FILE")
    part.require(part.tree.bench.exists(), "mlad-kernel-bench is not built")
    shapes, rows = chosen(json.loads(Path(part.options["peer"]).read_text())), []
    part.require(bool(shapes), "the peer's file holds no shapes")
    name = part.options.get("device_name", "")
    part.figures.update(shapes=rows, planned=len(shapes), ratio_is="the peer's time over ours")
    for shape in shapes:
        keys = ("batch", "heads", "q_len", "kv_len")
        words = [part.tree.bench, "--device", part.device, "--json", "--seconds", "0.1",
                 "--dtype", shape.get("dtype", "bf16"), "--page-size", shape.get("page_size", 64)]
        for key in keys:
            words += [f"--{key.replace('_', '-')}", shape[key]]
        if not part.check(part.left > 3, f"no time for {len(shapes) - len(rows)} of {len(shapes)} shapes"):
            break
        row = {**{key: shape[key] for key in keys}, "peer_us": peer_us(shape, name)}
        for kind, variant in (("", []), ("portable_", ["--variant", PORTABLE])):
            status, output = part.command(*words, *variant)
            found = re.findall(r'^\{"type":"case".*$', output, re.M)
            if part.check(status == 0 and len(found) == 1, f"{shape}: ended with {status}: {output[-300:]}"):
                ours = json.loads(found[0])
                row.update({f"{kind}us": ours["median_us"], f"{kind}min_us": ours["min_us"],
                            f"{kind}kv_gbps": ours["kv_gbps"],
                            f"{kind}ratio": row["peer_us"] / ours["median_us"] if row["peer_us"] else None})
        rows.append(row)
    for kind in ("", "portable_"):
        rated = [row for row in rows if row.get(f"{kind}ratio")]
        is_narrow = [row["batch"] >= 64 and row["heads"] * row["q_len"] <= 32 for row in rated]
        ratios = [row[f"{kind}ratio"] for row in rated]
        narrow = [ratio for ratio, it_is in zip(ratios, is_narrow) if it_is]
        others = [ratio for ratio, it_is in zip(ratios, is_narrow) if not it_is]
        part.figures[f"{kind}means"] = {
            "all": mean(ratios),
            "narrow": {"shapes": len(narrow), "at_least_half": sum(r >= 1 / 2 for r in narrow), "mean": mean(narrow)},
            "others": {"shapes": len(others), "at_least_third": sum(r >= 1 / 3 for r in others), "mean": mean(others)}}
