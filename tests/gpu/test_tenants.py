"""The parts `tenants`, `beside`, `engines` and `soak` over the fake driver with two GPUs: what they measure is there,
in both settings, and what is wrong fails them. MPS's control daemon is a stand-in; where it is used, the driver says
so.

usage: test_tenants.py BUILD"""
import json
import os
import sys
import tempfile
from pathlib import Path

HERE, BUILD = Path(__file__).resolve().parent, Path(sys.argv[1]).resolve()
GPUS = [f"GPU-fa4e0000-0000-4000-8000-00000000000{i}" for i in range(2)]
PEERS = BUILD / "tests/bench/kernels"
if not (BUILD / "fake_cuda/libcuda.so.1").exists():
    print("this build has no GPU kernels")
    sys.exit(77)
sys.path.insert(0, str(HERE))
from suite import crowd, soak, tenants  # noqa: E402
from suite.part import Part  # noqa: E402


class Mps(crowd.Mps):
    def __init__(self, *given):
        super().__init__(*given)
        self.environment["MLAD_FAKE_CUDA"] = "devices=2 mps=1"


def run(folder, name, function, **options):
    """The part's record."""
    options = {"small": True, "load_seconds": 0.25, **options}
    Part(name, GPUS[0], GPUS, None, str(BUILD), 200, options, str(folder / name)).run(function)
    return json.loads((folder / name).read_text())


def tenants_are_compared_with_the_faster_processes(folder):
    record = run(folder, "tenants", tenants.tenants, peer_library=str(PEERS / "libtest_peer_right.so"))
    assert record["ok"] and "not_run" not in record["figures"], record
    for setting in "without MPS", "under MPS":
        (shape, found), = record["figures"][setting].items()
        assert found["tenants"] == 3 and found["target"] is None and found["peer"]["name"] == "reference", found
        rates = {name: found[name]["per_s"]["median"] for name in ("daemon", "daemon, one at a time", "ours", "peer")}
        assert min(rates.values()) > 0 and rates["peer"] > rates["ours"], rates     # it emulates no GPU
        assert found["compared_with"].endswith("of peer"), found
        pairs = zip(found["ratio"]["all"], found["daemon"]["per_s"]["all"], found["peer"]["per_s"]["all"])
        assert all(abs(ratio - ours / theirs) < 1e-3 for ratio, ours, theirs in pairs), found
        assert found["daemon"]["decodes_per_launch"] > 1, found


def a_peer_that_computes_something_else_is_told(folder):
    tenants.settings = crowd.without_mps
    record = run(folder, "tenants", tenants.tenants, peer_library=str(PEERS / "libtest_peer_wrong.so"))
    assert not record["ok"] and "results of peer differ" in record["failure"], record


def a_small_one_waits_for_a_big_one(folder):
    tenants.settings = crowd.without_mps
    record = run(folder, "beside", tenants.beside)
    assert record["ok"] and list(record["figures"]) == ["without MPS"], record
    found = record["figures"]["without MPS"]
    most = found["alone"]["p99_us"]["median"] + found["big_launch"]["kernel_p50_us"]["median"]
    assert abs(found["target_us"] - most) < 1 and found["big_launch"]["kernel_p50_us"]["median"] > 0, found
    assert found["reached"] == (found["beside"]["p99_us"]["median"] <= most), found
    assert found["beside"]["p50_us"]["median"] > found["alone"]["p50_us"]["median"], found


def two_engines_share_a_gpu_in_either_order(folder):
    record = run(folder, "engines", tenants.engines)
    figures = record["figures"]
    assert record["ok"] and set(figures["not_run"]) == {"without MPS, stream order"}, record
    assert figures["arrangement"]["attention"] == GPUS[1] and "two GPUs" in figures["arrangement"]["note"], figures
    for setting, orders in (("without MPS", ["host order"]), ("under MPS", ["host order", "stream order"])):
        (shape, found), = figures[setting].items()
        assert list(found) == orders, found
        for order in orders:
            assert list(found[order]["placements"].values())[0] == "own_gpu", found
            for engine in "engine 0", "engine 1":
                assert min(found[order][engine][key]["per_s"]["most"] for key in ("alone", "merged")) > 0, found


def clients_come_and_go(folder):
    record = run(folder, "soak", soak.soak, soak_clients=3, soak_seconds=2, soak_mps_clients=2, soak_mps_seconds=1)
    assert record["ok"], record
    plain, quiet = (record["figures"][setting] for setting in ("without MPS", "under MPS"))
    assert plain["killed"] and not quiet["killed"] and plain["left"] and quiet["left"], record
    assert plain["decodes"] and quiet["decodes"] and not plain["wrong"] + quiet["wrong"], record


with tempfile.TemporaryDirectory() as name:
    (Path(name) / "nvidia-cuda-mps-control").write_text("#!/bin/sh\nexit 0\n")
    (Path(name) / "nvidia-cuda-mps-control").chmod(0o755)
    os.environ.update(PATH=f"{name}:{os.environ['PATH']}", LD_LIBRARY_PATH=str(BUILD / "fake_cuda"),
                      MLAD_FAKE_CUDA="devices=2")
    crowd.Mps = Mps
    tenants.SMALL["tenants"] = tenants.SMALL["tenants"][:1]
    for test in (tenants_are_compared_with_the_faster_processes, a_peer_that_computes_something_else_is_told,
                 a_small_one_waits_for_a_big_one, two_engines_share_a_gpu_in_either_order, clients_come_and_go):
        test(Path(name))
        print(test.__name__, flush=True)
