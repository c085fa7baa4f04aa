"""What the samples of mlad-kernel-compare say: medians, paired ratios with intervals, floors, geometric means."""
import math
import random
import statistics

import shapes as shapes_of

D, V, BYTES = 576, 512, 2       # of q, k; of v, out; of an element
ROUNDS, SEED = 1000, 7          # of the bootstrap


def interval(values):
    """95% interval of the median by ranks, whatever the distribution; None for fewer than 6 values. For n values the
    k-th smallest and k-th largest, with the largest k for which 2 P(Binomial(n, 1/2) < k) is at most 0.05."""
    values, n = sorted(values), len(values)
    k, below = 0, 1
    while 2 * below <= 0.05 * 2 ** n and k < n:
        k += 1
        below += math.comb(n, k)
    return None if k == 0 else [values[k - 1], values[n - k]]


def geometric_mean(values):
    return math.exp(sum(map(math.log, values)) / len(values))


def mean_interval(lists, rounds=ROUNDS):
    """95% interval of the geometric mean of the lists' medians, each list drawn anew from itself, with replacement."""
    chance = random.Random(SEED)
    means = sorted(geometric_mean([statistics.median(chance.choices(values, k=len(values))) for values in lists])
                   for _ in range(rounds))
    return [means[int(0.025 * rounds)], means[int(0.975 * rounds)]]


def floor_us(shape, read_gbps, tflops):
    """The least time: every key, query and output moved once, or every product made at full rate. All tokens count as
    seeing all keys. Also which of the two binds."""
    length = shape["seqlens"]
    keys = sum(length) if len(length) > 1 else length[0] * shape["batch"]
    tokens = shape["batch"] * shape["q_len"]
    moved = BYTES * (keys * D + tokens * shape["heads"] * (D + V)) / (read_gbps * 1e3)
    made = 2 * keys * shape["q_len"] * shape["heads"] * (D + V) / (tflops * 1e6)
    return max(moved, made), "memory" if moved >= made else "matmul"


def summary(shape, line, run):
    """One shape's numbers, in us, from its line of samples."""
    floor, bound = floor_us(shape, run["read_gbps"], run["tflops"])
    found = {"floor_us": floor, "bound": bound}
    for who in ("ours", "peer"):
        for kind in ("", "_layer", "_alone", "_prepare"):
            samples = line.get(f"{who}{kind}_ns")
            if samples:
                found[f"{who}{kind}_us"] = statistics.median(samples) / 1e3
        if f"{who}_us" in found:
            found[f"{who}_of_floor"] = found[f"{who}_us"] / floor
    for kind in ("", "_alone"):
        if line.get(f"peer{kind}_ns"):
            ratios = [peer / ours for ours, peer in zip(line[f"ours{kind}_ns"], line[f"peer{kind}_ns"])]
            found[f"ratio{kind}"], found[f"ratio{kind}_interval"] = statistics.median(ratios), interval(ratios)
            found[f"ratios{kind}"] = ratios
    if line.get("peer_ns") and line.get("ours_layer_ns"):   # a peer's decode has no prepare in it either
        found["ratio_layer"] = statistics.median(
            peer / ours for ours, peer in zip(line["ours_layer_ns"], line["peer_ns"]))
    card = next((card for card in ("h100", "h200") if card.upper() in run.get("model", "")), None)
    recorded = shape.get("recorded", {}).get(f"{card}_us")
    if recorded and "peer_us" in found:
        found["peer_of_recorded"] = found["peer_us"] / recorded
    return found


def group(entries):
    """Geometric means of the shapes that agree."""
    found = {"shapes": len(entries)}
    for key in ("ours_of_floor", "peer_of_floor", "ratio", "ratio_layer", "ratio_alone", "peer_of_recorded"):
        values = [entry[key] for entry in entries if key in entry]
        if values:
            found[key] = geometric_mean(values)
    for key in ("ratio", "ratio_alone"):
        lists = [entry[key.replace("ratio", "ratios")] for entry in entries if key in entry]
        if lists and min(map(len, lists)) > 1:
            found[f"{key}_interval"] = mean_interval(lists)
    return found


def build(shapes, lines):
    """The whole report from the program's lines. Shapes without a line failed; they and those that do not agree are in
    no mean."""
    run = next((line for line in lines if line["type"] == "run"), None)
    if run is None:
        raise ValueError("the program said nothing of its run")

    def key(entry):
        seqlens = entry["seqlens"]
        return entry["batch"], entry["heads"], entry["q_len"], tuple(seqlens if len(set(seqlens)) > 1 else seqlens[:1])

    of_shape = {key(line): line for line in lines if line["type"] != "run"}
    done, skipped, failed = [], [], []
    for shape in shapes:
        line = of_shape.get(key(shape), {"type": "failed"})
        if line["type"] == "shape":
            entry = {"name": shapes_of.name(shape), **shape, **line, **summary(shape, line, run)}
            done.append(entry)
            if line.get("agree") is False:
                failed.append(f"{entry['name']}: ours and the peer's outputs differ")
        elif line["type"] == "skipped":
            skipped.append({"name": shapes_of.name(shape), "why": line["why"]})
        else:
            failed.append(f"{shapes_of.name(shape)}: no result")
    right = [entry for entry in done if entry.get("agree", True)]
    even, uneven = ([e for e in right if bool(e.get("ragged")) is ragged] for ragged in (False, True))
    groups = {f"B={batch}": [e for e in even if e["batch"] == batch] for batch in sorted({e["batch"] for e in even})}
    groups = {**groups, "all": even, "ragged": uneven}
    slower = [e["name"] for e in right if (e.get("ratio_interval") or [1, 1])[1] < 0.98]
    report = {"run": run, "shapes": done,
              "groups": {name: group(entries) for name, entries in groups.items() if entries},
              "slower": slower, "skipped": skipped, "failed": failed}
    for entry in done:
        for kind in ("ratios", "ratios_alone"):
            entry.pop(kind, None)
    return report


def span(pair):
    return f"{pair[0]:.3f}..{pair[1]:.3f}" if pair else "-"


def table(report):
    """For people."""
    run = report["run"]
    mhz = [clock for entry in report["shapes"] for clock in entry["sm_mhz"]]
    rows = [f"{run['model']}, ours: {run['ours']}, peer: {run['peer'] or 'none'}; ceilings "
            f"{'measured' if run['ceilings_measured'] else 'given'}: {run['read_gbps']:.0f} GB/s, "
            f"{run['tflops']:.0f} TFLOP/s; " + (f"SM clock {min(mhz)}..{max(mhz)} MHz" if mhz else "SM clock not known")
            + ("" if run["graphs"] else "; no CUDA graphs: launches count")
            + ("" if run["full_edges"] or not run["graphs"] else "; the peer's calls are joined as it captured them"),
            f"{'us a decode':34} {'floor':>8} {'ours':>9} {'peer':>9} {'ours/fl':>8} {'peer/fl':>8} "
            f"{'peer/ours':>9} {'95% interval':>15} {'alone: ours':>11} {'peer':>9} {'prepare':>8} "
            f"{'our layer':>9} {'peer/':>7}"]

    def cell(entry, key, width, form=".2f"):
        return f"{entry[key]:{width}{form}}" if key in entry else f"{'-':>{width}}"

    for e in report["shapes"]:
        rows.append(f"{e['name']:34} {e['floor_us']:8.2f} {cell(e, 'ours_us', 9)} {cell(e, 'peer_us', 9)} "
                    f"{cell(e, 'ours_of_floor', 8)} {cell(e, 'peer_of_floor', 8)} {cell(e, 'ratio', 9, '.3f')} "
                    f"{span(e.get('ratio_interval')):>15} {cell(e, 'ours_alone_us', 11)} {cell(e, 'peer_alone_us', 9)} "
                    f"{cell(e, 'peer_prepare_us', 8)} {cell(e, 'ours_layer_us', 9)} "
                    f"{cell(e, 'ratio_layer', 7, '.3f')}{'' if e.get('agree', True) else '  OUTPUTS DIFFER'}")
    rows.append("geometric means")
    for name, g in report["groups"].items():
        label = f"{name} ({g['shapes']} shapes)"
        rows.append(f"{label:34} {'':8} {'':9} {'':9} {cell(g, 'ours_of_floor', 8)} {cell(g, 'peer_of_floor', 8)} "
                    f"{cell(g, 'ratio', 9, '.3f')} {span(g.get('ratio_interval')):>15}"
                    + (f" as layers {g['ratio_layer']:.3f}" if "ratio_layer" in g else "")
                    + (f" alone {g['ratio_alone']:.3f}" if "ratio_alone" in g else "")
                    + (f"; peer {g['peer_of_recorded']:.3f} of what was recorded" if "peer_of_recorded" in g else ""))
    rows += [f"slower than the peer, beyond doubt: {name}" for name in report["slower"]]
    rows += [f"skipped: {entry['name']}: {entry['why']}" for entry in report["skipped"]]
    rows += [f"FAILED: {text}" for text in report["failed"]]
    return "\n".join(rows)
