"""`mlactl bench` measures all three things and is consistent with itself. What it measures depends on the machine."""
from daemon import Daemon, run


def every_figure_is_there(daemon):
    report = daemon.json("bench", "--seconds", 1)
    ceilings = report["ceilings"]
    assert ceilings["read_gb_s"] > 0 and ceilings["matmul_gflop_s"] > 0 and ceilings["matmul"]
    assert (report["device"], report["batch"], report["kv_len"]) == ("cpu", 8, 4096) and report["threads"] > 0
    assert [case["q_len"] for case in report["cases"]] == [1, 4]
    for case in report["cases"]:
        assert case["rounds"] >= 5 and case["daemon_ns"] > 0 and case["one_at_a_time_ns"] > 0
        assert case["of_ceiling_pass"] == (case["of_ceiling"] >= 0.5)
        assert case["daemon_over_direct_pass"] == (case["daemon_over_direct"] >= 0.97)
        assert abs(case["daemon_kv_gb_s"] * case["daemon_ns"] - 8 * 4096 * 1152) < 1e6
    trip = report["round_trip"]
    assert trip["count"] >= 100 and 0 < trip["decode_p50_ns"] <= trip["decode_p99_ns"] and trip["raw_p50_ns"] > 0
    assert report["transport"] == "rings" and 0 < trip["socket_p50_ns"] <= trip["socket_p99_ns"]
    assert trip["ratio_pass"] == (trip["decode_p50_ns"] / trip["raw_p50_ns"] <= 2)


def the_table_marks_the_targets(daemon):
    text = daemon.ctl("bench", "--seconds", 1, "--transport", "socket").stdout
    assert text.count("pass") + text.count("MISS") == 5, text
    assert "ceilings: read" in text and text.count("one-key decode, socket") == 1 and "rings" not in text


def the_transport_must_be_one(daemon):
    assert "rings or socket" in daemon.json("bench", "--transport", "pigeon", code=64)["error"]


def only_cpu_and_gpus_are_measured(daemon):
    other = Daemon("reference")
    try:
        assert "cpu or a GPU" in other.json("bench", "--device", "reference", code=1)["error"]
        assert "cpu" in other.json("bench", "--device", "cpu", code=1)["error"]
    finally:
        other.stop()


if __name__ == "__main__":
    run([every_figure_is_there, the_table_marks_the_targets, the_transport_must_be_one,
         only_cpu_and_gpus_are_measured], Daemon("cpu"))
