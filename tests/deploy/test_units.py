"""What the units of mlad and of its MPS have to agree on.

usage: test_units.py FOLDER, which holds both"""
import os
import sys


def read(name):
    """Values of each key, in order; sections do not matter here."""
    unit = {}
    with open(os.path.join(sys.argv[1], name), encoding="utf-8") as file:
        for line in file:
            key, found, value = line.strip().partition("=")
            if found and not key.startswith("#"):
                unit.setdefault(key, []).append(value)
    return unit


def environment(unit):
    return dict(word.split("=", 1) for line in unit["Environment"] for word in line.split())


mlad, mps = read("mlad.service"), read("mlad-mps.service")
assert environment(mlad) == environment(mps), "one pipe directory, one log directory"
assert set(environment(mps)) == {"CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"}
pipes, logs = environment(mps)["CUDA_MPS_PIPE_DIRECTORY"], environment(mps)["CUDA_MPS_LOG_DIRECTORY"]
assert f"/run/{mps['RuntimeDirectory'][0]}" == pipes and f"/var/log/{mps['LogsDirectory'][0]}" == logs
assert mps["PIDFile"][0].startswith(pipes + "/")
assert mps["User"] == mlad["User"], "MPS serves one user at a time"
assert any("mlad-mps.service" in line.split() for line in mlad["After"]), "a context joins MPS when it is made"
assert "mlad-mps.service" not in " ".join(mlad.get("Wants", []) + mlad.get("Requires", [])), "MPS is a choice"
assert mps["WantedBy"] == ["mlad.service"]
assert mps["DeviceAllow"] == mlad["DeviceAllow"], "the same GPUs"
assert "PrivateTmp" not in mps and "PrivateIPC" not in mps, "clients share memory with the server"
