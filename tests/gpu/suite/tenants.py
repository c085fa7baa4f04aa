"""Many small tenants of one GPU, through the daemon and as processes that run kernels themselves; a small one beside a
big one; two engines' GPUs that share a third for attention. Each with what it is compared with, in turn."""
import statistics
from pathlib import Path

import numpy as np

from .crowd import Crowd, latencies, require_decodes, settings, spread, together, under_mps, without_mps
from .part import Part, Skip

TENANTS, ROUNDS, ENGINE_ROUNDS, TURN_SECONDS = 8, 5, 3, 1.0
SMALL_TENANTS, SMALL_ROUNDS = 3, 2
START_SECONDS = 20      # for tenants to start and to leave
# batch, heads, q_len, keys; those of --small are for an emulated GPU
SHAPES = {"tenants": ((1, 16, 4, 4096), (4, 16, 4, 4096)), "beside": ((1, 16, 4, 4096), (64, 16, 4, 8192)),
          "engines": ((16, 16, 1, 1024), (1, 16, 4, 4096), (64, 16, 1, 4096))}
SMALL = {"tenants": ((1, 1, 1, 64), (2, 1, 1, 64)), "beside": ((1, 1, 1, 64), (2, 1, 1, 128)),
         "engines": ((1, 1, 1, 64),)}
LAYERS, SMALL_LAYERS = 61, 3
# What the daemon should reach over processes of their own, by setting and batch.
TARGETS = {("without MPS", 1): 5.0, ("under MPS", 1): 2.5, ("without MPS", 4): 2.3}
MOST_DIFFERENCE = 0.125     # of an element, over the root mean square: as mlad-kernel-compare has it


def shapes(part):
    return (SMALL if part.options.get("small") else SHAPES)[part.name]


def rounds_of(part):
    return SMALL_ROUNDS if part.options.get("small") else ENGINE_ROUNDS if part.name == "engines" else ROUNDS


def has_time(part, what, turns):
    """For so many turns, and for tenants to start and leave."""
    if part.left > START_SECONDS + turns * seconds(part):
        return True
    part.not_run(what, f"{part.left:.0f} s are left; give it more by --limit {part.name}=SECONDS")
    return False


def seconds(part):
    return part.options.get("load_seconds") or TURN_SECONDS


def cold_bytes(part):
    return 1 if part.options.get("small") else 0


def need_client(part):
    if not part.is_gpu:
        raise Skip(f"{part.device} is no GPU")
    if not part.tree.program("load-client").exists():
        raise Skip("this build has no load-client")


def named(shape):
    return "B={} H={} q={} K={}".format(*shape)


def same_results(part, what, crowd):
    """All tenants decode the same: their outputs differ by rounding alone."""
    want, size = None, 1.0
    for name in crowd.groups:
        for bits in crowd.outputs(name):
            out = (np.frombuffer(bits, np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
            if want is None:
                want, size = out, float(np.sqrt(np.mean(out ** 2)))
            apart = float(np.max(np.abs(out - want))) / size
            if not part.check(apart <= MOST_DIFFERENCE, f"{what}: the results of {name} differ by {apart}"):
                break       # NaN too


# ---- many small ones ----

def tenants_figures(crowd, rounds):
    """Of the turns of each group."""
    found = {}
    for name, turns in rounds.items():
        answers = [answer for turn, _ in turns for answer in turn]
        found[name] = {
            "per_s": spread([together(turn) for turn, _ in turns]),
            "tenant_least_per_s": min(answer["per_s"] for answer in answers),
            "tenant_most_per_s": max(answer["per_s"] for answer in answers),
            **{key: statistics.median(answer[key] for answer in answers if key in answer)
               for key in ("p50_us", "p99_us")},
            "latest_start_us": max(answer["late_us"] for answer in answers)}
        if name.startswith("daemon"):
            found[name]["decodes_per_launch"] = round(statistics.median(merged for _, merged in turns), 3)
    if "peer" in crowd.ready:
        found["peer"]["name"] = crowd.ready["peer"]["peer"]
    return found


def compare_tenants(part, name, daemon, environment):
    count = SMALL_TENANTS if part.options.get("small") else TENANTS
    for shape in shapes(part):
        what = f"{name}, {named(shape)}"
        if not has_time(part, what, 4 * rounds_of(part)):
            break
        with Crowd(part, daemon, environment, cold_bytes(part)) as crowd:
            crowd.add("daemon", count, "daemon", shape, depth=2)
            crowd.add("daemon, one at a time", count, "daemon", shape)
            crowd.add("ours", count, "ours", shape)
            if part.options.get("peer_library"):
                crowd.add("peer", count, "peer", shape, LOAD_PEER=part.options["peer_library"])
            copies = {ready["copies"] for ready in crowd.wait_ready().values()}
            same_results(part, what, crowd)
            rounds = {group: [] for group in crowd.groups}
            for _ in range(rounds_of(part)):
                for group, turns in rounds.items():
                    did, merged = crowd.turn([group], seconds(part))
                    turns.append((did[group], merged))
            for group, turns in rounds.items():
                require_decodes(part, f"{what}, {group}", [turn for turn, _ in turns])
            found = tenants_figures(crowd, rounds)
        processes = [group for group in ("ours", "peer") if group in found]
        fastest = max(processes, key=lambda group: found[group]["per_s"]["median"])
        over = {group: spread([a / b for a, b in zip(found[group]["per_s"]["all"], found[fastest]["per_s"]["all"])])
                for group in found if group.startswith("daemon")}
        target = None if part.options.get("small") else TARGETS.get((name, shape[0]))
        part.figures.setdefault(name, {})[named(shape)] = {
            "tenants": count, "seconds_of_a_turn": seconds(part), "copies": max(copies), **found,
            "compared_with": f"processes with the kernels of {fastest}", "ratio": over["daemon"],
            "ratio_one_at_a_time": over["daemon, one at a time"], "target": target,
            "reached": None if target is None else over["daemon"]["median"] >= target}


def tenants(part: Part):
    """Eight tenants in turn: by the daemon with two decodes in flight each, by the daemon with one, and as processes
    that run our kernels, or a peer's, and wait for each decode."""
    need_client(part)
    if part.options.get("peer_library"):
        part.require(Path(part.options["peer_library"]).exists(), f"no peer: {part.options['peer_library']}")
    else:
        part.not_run("peer", "no --peer-library FILE.so")
    settings(part, part.device, lambda *given: compare_tenants(part, *given))


# ---- a small one beside a big one ----

def compare_beside(part, name, daemon, environment):
    small, big = shapes(part)
    with Crowd(part, daemon, environment, cold_bytes(part)) as crowd:
        crowd.add("small", 1, "daemon", small)
        crowd.add("big", 1, "daemon", big, depth=2)     # one runs, one waits
        crowd.wait_ready()
        alone, big_alone, small_beside, big_beside, merged = [], [], [], [], []
        for _ in range(rounds_of(part)):
            alone.append(crowd.turn(["small"], seconds(part))[0]["small"])
            big_alone.append(crowd.turn(["big"], seconds(part))[0]["big"])
            did, parts = crowd.turn(["small", "big"], seconds(part))
            small_beside.append(did["small"])
            big_beside.append(did["big"])
            merged.append(parts)
    for turns in (alone, big_alone, small_beside, big_beside):
        require_decodes(part, name, turns)
    launch = latencies(big_alone, "kernel_p50_us", "kernel_p99_us")
    quick, slow = (latencies(turns, "p50_us", "p99_us", "most_us") for turns in (alone, small_beside))
    most = quick["p99_us"]["median"] + launch["kernel_p50_us"]["median"]
    part.figures[name] = {
        "small": named(small), "big": named(big), "seconds_of_a_turn": seconds(part), "alone": quick, "beside": slow,
        "big_launch": launch, "big_alone_per_s": spread([together(turn) for turn in big_alone]),
        "big_beside_per_s": spread([together(turn) for turn in big_beside]),
        "decodes_per_launch": statistics.median(merged), "beside_p99_us": slow["p99_us"]["median"],
        "target_us": most, "reached": slow["p99_us"]["median"] <= most}


def beside(part: Part):
    """A small tenant alone, a big one alone, both: the small one's p99 should grow by one of the other's launches at
    most."""
    need_client(part)
    settings(part, part.device, lambda *given: compare_beside(part, *given))


# ---- two engines ----

def compare_engines(part, name, daemon, environment, engines):
    layers = SMALL_LAYERS if part.options.get("small") else LAYERS
    for shape in shapes(part):
        for order, depth in (("host", 1), ("stream", layers)):
            if not has_time(part, f"{name}, {named(shape)}, {order} order", 3 * rounds_of(part)):
                return
            with Crowd(part, daemon, environment, cold_bytes(part)) as crowd:
                for i, gpu in enumerate(engines):
                    crowd.add(f"engine {i}", 1, "daemon" if order == "host" else order, shape, depth, gpu)
                ready = crowd.wait_ready()
                if order == "stream" and any(said["order"] != "stream" for said in ready.values()):
                    part.not_run(f"{name}, stream order", "; ".join(said["why"] for said in ready.values()))
                    continue
                same_results(part, f"{name}, {named(shape)}, {order} order", crowd)
                rounds = {group: [] for group in (*crowd.groups, "both")}
                for _ in range(rounds_of(part)):
                    for group, turns in rounds.items():
                        turns.append(crowd.turn(list(crowd.groups) if group == "both" else [group], seconds(part)))
            found = {"layers_of_a_latency": depth, "placements": {g: said["placement"] for g, said in ready.items()}}
            for group in crowd.groups:
                for key, turns in (("alone", rounds[group]), ("merged", rounds["both"])):
                    answers = [did[group] for did, _ in turns]
                    require_decodes(part, f"{name}, {order} order, {group}, {key}", answers)
                    found.setdefault(group, {})[key] = {"per_s": spread([together(turn) for turn in answers]),
                                                        **latencies(answers, "p50_us", "p99_us")}
            both = [sum(map(together, did.values())) for did, _ in rounds["both"]]
            alone = zip(*([together(did[group]) for did, _ in rounds[group]] for group in crowd.groups))
            found["merged_per_s"] = spread(both)
            found["merged_over_one_alone"] = spread([a / max(each) for a, each in zip(both, alone)])
            if order == "host":
                found["decodes_per_launch"] = statistics.median(merged for _, merged in rounds["both"])
            part.figures.setdefault(name, {}).setdefault(named(shape), {})[f"{order} order"] = found


def engines(part: Part):
    """Two clients whose queries and outputs are on GPUs of their own and their keys on the daemon's GPU: each alone,
    then both. A decode here is a layer."""
    need_client(part)
    gpus = [name for name in part.devices if name.startswith("GPU-")]
    if len(gpus) < 2:
        raise Skip(f"{len(gpus)} GPU here")
    attention, clients = gpus[min(2, len(gpus) - 1)], gpus[:2]
    part.figures["arrangement"] = {
        "attention": attention, "engines": clients,
        "note": "a GPU for each" if len(gpus) > 2 else "two GPUs: the second engine's is the attention GPU"}

    def run(name, daemon, environment):
        compare_engines(part, name, daemon, environment, clients)
    without_mps(part, attention, run)
    if len(gpus) == 2:
        under_mps(part, attention, run)
