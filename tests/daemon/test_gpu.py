"""A GPU's device from end to end, over the fake driver of tests/cuda/fake: two processes share GPU memory, the kernels
are emulated, and the driver fails on demand.

usage: test_gpu.py, with MLAD_BIN, MLACTL_BIN, VMM_CLIENT, MLAD_SOURCE, LD_LIBRARY_PATH"""
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time

sys.path[:0] = [os.path.join(os.environ["MLAD_SOURCE"], "tests", folder) for folder in ("mlactl", "proto")]
from daemon import CAPTURE, Daemon, run  # noqa: E402
from fake_gpu import GPU, SECOND, inject  # noqa: E402
from mlad_client import Client, Refused  # noqa: E402

FAKE = os.environ["LD_LIBRARY_PATH"]


def decode(daemon, **extra):
    with tempfile.TemporaryDirectory() as directory:
        result = daemon.ctl("decode", CAPTURE, "-o", os.path.join(directory, "out"), "--device", GPU, "--json",
                            "--timeout", 30, MLAD_FAKE_CUDA_CONTROL="", **extra)
    return result


def every_combination_meets_the_bar(daemon):
    result = daemon.json("verify", "--device", GPU, "--cases", 18)
    assert len(result["rows"]) == 18 and not result["failures"], result


def a_tiny_bench(daemon, *arguments):
    result = daemon.ctl("bench", "--device", GPU, "--batch", 1, "--kv-len", 4, "--seconds", 1, *arguments,
                        MLAD_FAKE_CUDA_CONTROL="")
    assert result.returncode == 0, result
    return result.stdout


def bench_times_the_gpu_and_the_daemon_and_names_no_ceilings(daemon):
    report = json.loads(a_tiny_bench(daemon, "--json"))
    assert set(report) == {"device", "variant", "transport", "load", "batch", "heads", "kv_len", "page_size", "cases",
                           "round_trip"}, report
    assert (report["device"], report["batch"], report["kv_len"]) == (GPU, 1, 4)
    assert [case["q_len"] for case in report["cases"]] == [1, 4]
    for case in report["cases"]:
        assert set(case) == {"q_len", "rounds", "direct_ns", "daemon_ns", "overhead_us", "one_at_a_time_ns",
                             "one_at_a_time_overhead_us", "direct_kv_gb_s", "daemon_kv_gb_s", "direct_tflop_s",
                             "daemon_over_direct"}, case
        assert case["rounds"] >= 5
        for side in ("direct", "daemon"):
            assert abs(case[f"{side}_kv_gb_s"] * case[f"{side}_ns"] - 4 * 1152) < 1, case
        assert abs(case["overhead_us"] * 1000 - (case["daemon_ns"] - case["direct_ns"])) < 1, case
        assert abs(case["direct_tflop_s"] * case["direct_ns"] * 1000 - 2 * 1088 * 16 * case["q_len"] * 4) < 1, case
    assert 0 < report["round_trip"]["decode_p50_ns"] and "ratio_pass" not in report["round_trip"]
    text = a_tiny_bench(daemon)
    assert GPU in text and "one-key decode" in text and "KV GB/S" in text, text
    assert not any(word in text for word in ("ceiling", "CEILING", "pass", "MISS", "threads")), text


def the_kernels_own_bench_names_no_ceilings_either(_):
    program = os.path.join(os.path.dirname(os.environ["MLAD_BIN"]), "../libexec/mlad/mlad-kernel-bench")
    words = [program, "--device", GPU, "--dtype", "bf16", "--q-len", "1", "--batch", "1", "--kv-len", "4", "--copies",
             "16", "--seconds", "0.01"]
    lines = subprocess.run([*words, "--json"], capture_output=True, text=True, check=True).stdout.splitlines()
    ceilings, case = map(json.loads, lines)
    assert set(ceilings) == {"type", "device", "variant", "threads"}, ceilings
    assert case["median_us"] > 0 and "tflops" in case and not {"fraction", "ceiling", "gflops"} & set(case), case
    text = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert "TFLOP/s" in text and "KV GB/s" in text and "eiling" not in text, text


def a_launch_that_hangs_is_a_delay_for_the_client():
    daemon = Daemon(GPU, "-o", "worker_timeout=4s")  # emulated kernels are slow, three deaths end the decode
    try:
        inject("hang=1")
        results = []
        thread = threading.Thread(target=lambda: results.append(decode(daemon)))
        thread.start()
        deadline = time.monotonic() + 30
        while daemon.devices()[GPU]["restarts"] == 0:
            assert time.monotonic() < deadline, daemon.devices()
            time.sleep(0.05)
        assert not results, results  # it was in the hanging launch, and waits for another worker
        assert daemon.ctl("health").returncode == 1, daemon.ctl("health")
        inject()
        thread.join(30)
        assert results and results[0].returncode == 0, results
    finally:
        inject()
        daemon.stop()


def nothing_stays_held(daemon):
    deadline = time.monotonic() + 10
    while daemon.devices()[GPU]["held_bytes"] or daemon.devices()[GPU]["sessions"]:
        assert time.monotonic() < deadline, daemon.devices()[GPU]
        time.sleep(0.05)
    assert daemon.devices()[GPU]["orphaned_bytes"] == 0


def a_failed_import_is_the_clients_error_and_only_that(daemon):
    inject("fail=cuIpcOpenMemHandle:1")
    result = decode(daemon)
    inject()
    assert result.returncode == 1 and "cuIpcOpenMemHandle" in result.stdout, result
    assert decode(daemon).returncode == 0
    assert daemon.devices()[GPU]["restarts"] == 0


def a_sticky_error_is_a_delay_for_the_client(daemon):
    before = daemon.devices()[GPU]["restarts"]
    inject("sticky=5")  # in each process: the first decode's three launches are well, the second one's are not
    assert decode(daemon).returncode == 0
    assert daemon.devices()[GPU]["restarts"] == before
    result = decode(daemon)
    inject()
    assert result.returncode == 0, result
    assert daemon.devices()[GPU]["restarts"] > before
    daemon.wait_ready()
    assert "the GPU failed" in open(daemon.log.name).read()


def a_batch_that_always_loses_the_device_is_given_up(daemon):
    inject("sticky=2")
    result = decode(daemon)
    inject()
    assert result.returncode == 1 and "worker_lost" in result.stdout, result
    daemon.wait_ready()
    assert decode(daemon).returncode == 0


def a_killed_worker_is_a_delay_for_the_client(daemon):
    inject("slow=300")
    worker = daemon.devices()[GPU]["pid"]
    assert worker > 1, "no worker to kill"
    killer = threading.Timer(0.4, os.kill, (worker, signal.SIGKILL))
    killer.start()
    result = decode(daemon)
    killer.join()
    inject()
    assert result.returncode == 0, result
    daemon.wait_ready()


def a_client_killed_in_mid_decode_leaves_nothing(daemon):
    inject("slow=300")
    environment = dict(os.environ, MLAD_SOCKET=daemon.socket, MLAD_FAKE_CUDA_CONTROL="")
    for _ in range(5):
        client = subprocess.Popen([os.environ["MLACTL_BIN"], "decode", CAPTURE, "-o",
                                   os.path.join(daemon.directory, "out"), "--device", GPU], env=environment,
                                  stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(0.3)
        client.kill()
        client.wait()
    inject()
    nothing_stays_held(daemon)
    assert decode(daemon).returncode == 0


# Memory from cuMemCreate, by tests/cuda/vmm_client.c

def vmm_client(daemon, *arguments, **extra):
    """Start it: its driver has nothing injected but `extra`."""
    environment = {**os.environ, "MLAD_SOCKET": daemon.socket, "MLAD_DEVICE": GPU, "MLAD_FAKE_CUDA_CONTROL": "",
                   **extra}
    return subprocess.Popen([os.environ["VMM_CLIENT"], *arguments], env=environment, text=True, stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def worker_holds(daemon):
    """Descriptors of the worker, and ranges of device memory that it has mapped or reserved."""
    pid = daemon.devices()[GPU]["pid"]
    with open(f"/proc/{pid}/maps") as maps:
        ranges = sum("7ea" <= line[:3] <= "7ed" and len(line.split("-")[0]) == 12 for line in maps)
    return len(os.listdir(f"/proc/{pid}/fd")), ranges


def vmm(daemon, *arguments, **extra):
    """Run it; it must succeed and leave nothing in the worker."""
    nothing_stays_held(daemon)
    before = worker_holds(daemon)
    client = vmm_client(daemon, *arguments, **extra)
    output, errors = client.communicate(timeout=60)
    assert client.returncode == 0, (arguments, extra, output, errors)
    nothing_stays_held(daemon)
    deadline = time.monotonic() + 10
    while worker_holds(daemon) != before:
        assert time.monotonic() < deadline, (arguments, extra, before, worker_holds(daemon))
        time.sleep(0.05)
    return output


def a_lost_context_of_the_clients_own_is_said_to_be_lost(daemon):
    vmm(daemon, "lost", MLAD_FAKE_CUDA="sticky=1")


def a_stream_that_hangs_is_waited_for_no_longer_than_asked(daemon):
    with tempfile.NamedTemporaryFile(mode="w", prefix="mlad-fake-") as control:
        control.write("hang=1\n")
        control.flush()
        client = vmm_client(daemon, "stuck", MLAD_FAKE_CUDA_CONTROL=control.name)
        assert client.stdout.readline() == "stuck\n", client.communicate()
        control.truncate(0)
        output, errors = client.communicate(timeout=60)
        assert client.returncode == 0, (output, errors)


def vmm_memory_decodes_as_any_other(daemon):
    vmm(daemon, "decode")


def vmm_outputs_may_not_lie_in_inputs(daemon):
    vmm(daemon, "overlap")


def memory_that_cannot_be_shared_is_refused_with_what_to_change(daemon):
    vmm(daemon, "refusals")


def kv_that_lies_elsewhere_is_refused_with_the_names_of_both_gpus():
    inject("devices=2")
    daemon = Daemon(GPU)
    try:
        vmm(daemon, "elsewhere", MLAD_FAKE_CUDA="devices=2")
    finally:
        daemon.stop()
    inject()


def a_buffer_takes_252_allocations(daemon):
    vmm(daemon, "many")


def any_driver_call_of_a_vmm_registration_may_fail(daemon):
    for call, count in (("cuMemGetAddressRange", 3), ("cuMemRetainAllocationHandle", 4), ("cuPointerGetAttribute", 5),
                        ("cuMemGetAllocationPropertiesFromHandle", 4), ("cuMemExportToShareableHandle", 3),
                        ("cuDeviceGetUuid", 2)):  # the first one is asked at connect, which goes on without
        last_only = call in ("cuPointerGetAttribute", "cuDeviceGetUuid")  # of the attributes, too, others may fail
        for n in range(count, 0, -count if last_only else -1):
            word = "pass the end" if call == "cuMemGetAddressRange" and n > 1 else \
                "cuDeviceGetUuid" if call == "cuPointerGetAttribute" else call
            vmm(daemon, "failing", word, MLAD_FAKE_CUDA=f"fail={call}:{n}")
    for call, count in (("cuMemImportFromShareableHandle", 3), ("cuMemGetAllocationPropertiesFromHandle", 3),
                        ("cuMemAddressReserve", 1), ("cuMemMap", 3), ("cuMemSetAccess", 1)):
        for n in range(1, count + 1):
            inject(f"fail={call}:{n}")
            vmm(daemon, "failing", call)
    inject()


def wrong_descriptors_are_refused_by_name(daemon):
    nothing_stays_held(daemon)
    before = worker_holds(daemon)
    good = dict(buffer=9, gpu=GPU, allocation=2 << 20, offset=0, bytes=2 << 20, address=1 << 32)
    null = os.open("/dev/null", os.O_RDWR)
    with Client(daemon.socket, GPU) as client:
        for changed, count, code, field, word in (
                ({}, 0, "fds", "fd", "carries 1 to 252 file descriptors, but 0 came"),
                ({}, 2, "fds", "fd", "need 1 allocations of 2097152 bytes, but 2 file descriptors came"),
                (dict(offset=1), 1, "fds", "fd", "need 2 allocations"),
                (dict(offset=2 << 20), 1, "invalid", "offset", "past the first allocation"),
                (dict(bytes=2**63 - 1, offset=2**48 - 1, allocation=2**48), 1, "fds", "fd", "need 32769 allocations"),
                (dict(bytes=2**63 - 1, allocation=1), 252, "fds", "fd", "at most 252"),
                (dict(bytes=252, allocation=1), 252, "buffer", "allocation", "cuMemAddressReserve"),
                ({}, 1, "buffer", "fd", "cuMemImportFromShareableHandle"),
                (dict(gpu="GPU-none"), 1, "buffer", "gpu", "sees no GPU GPU-none")):
            try:
                client.call("IMPORT_VMM", {**good, **changed}, [null] * count)
                raise AssertionError(f"{changed} with {count} descriptors was not refused")
            except Refused as error:
                assert (error.code, error.field) == (code, field) and word in error.message, error
    os.close(null)
    nothing_stays_held(daemon)
    assert worker_holds(daemon) == before, (before, worker_holds(daemon))


def vmm_memory_is_exported_again_for_another_worker(daemon):
    client = vmm_client(daemon, "replay")
    assert client.stdout.readline() == "ready\n", client.communicate()
    worker = daemon.devices()[GPU]["pid"]
    assert worker > 1, "no worker to kill"
    os.kill(worker, signal.SIGKILL)
    output, errors = client.communicate("go\n", timeout=60)
    assert client.returncode == 0, (output, errors)
    daemon.wait_ready()
    assert daemon.devices()[GPU]["pid"] != worker
    nothing_stays_held(daemon)


def a_worker_dies_in_mid_decode(daemon, memory, code, worker="", **extra):
    """Of a client whose memory is `memory`, and whose decodes must then end with `code`; what it says in the end.
    `worker`: what goes wrong in the next worker."""
    daemon.wait_ready()
    nothing_stays_held(daemon)
    client = vmm_client(daemon, "death", memory, code, **extra)
    try:
        assert client.stdout.readline() == "ready\n", client.communicate()
        inject("slow=300")
        pid = daemon.devices()[GPU]["pid"]
        client.stdin.write("go\n")
        client.stdin.flush()
        assert client.stdout.readline() == "in flight\n", client.communicate()
        inject(worker)
        os.kill(pid, signal.SIGKILL)
        output, errors = client.communicate("go\n", timeout=60)
    finally:
        client.kill()
        inject()
    assert client.returncode == 0, (memory, code, output, errors)
    nothing_stays_held(daemon)
    return output


def a_death_is_a_delay_whatever_the_memory(daemon):
    for memory in ("legacy", "vmm"):
        a_worker_dies_in_mid_decode(daemon, memory, "ok")


def a_death_that_took_the_clients_context_along_is_device_lost(daemon):
    for memory in ("legacy", "vmm"):
        said = a_worker_dies_in_mid_decode(daemon, memory, "device_lost", MLAD_FAKE_CUDA="sticky=1")
        assert "start the process again" in said and "MPS" in said, said
    with tempfile.NamedTemporaryFile("r") as trace:
        # The driver cannot tell when the session is to be restored (the 13th attribute: three registrations ask for
        # four each), and the worker cannot open the handle: asked again, it can.
        words = "sticky=1 fail=cuPointerGetAttribute:13 fail=cuStreamCreate:2"
        said = a_worker_dies_in_mid_decode(daemon, "legacy", "device_lost", "fail=cuIpcOpenMemHandle:0",
                                           MLAD_FAKE_CUDA=words, MLAD_FAKE_CUDA_TRACE=trace.name)
        calls = [line.split(" ", 1)[1] for line in trace.read().splitlines()]
        assert "cuStreamCreate 999" in calls and "cuPointerGetAttribute 700" in calls, calls
    assert "start the process again" in said, said


def a_death_after_which_memory_cannot_be_opened_is_what_the_worker_says(daemon):
    said = a_worker_dies_in_mid_decode(daemon, "legacy", "buffer", "fail=cuIpcOpenMemHandle:0")
    assert "could not be restored: cuIpcOpenMemHandle" in said, said


def an_import_that_finds_the_gpu_lost_is_a_delay(daemon):
    daemon.wait_ready()
    results = []
    inject("fail=cuIpcOpenMemHandle:1:700 fail=cuStreamQuery:0:700")
    with open(daemon.log.name) as log:
        log.seek(0, os.SEEK_END)
        thread = threading.Thread(target=lambda: results.append(decode(daemon)))
        thread.start()
        deadline, said = time.monotonic() + 30, ""
        while "the device cannot be served" not in said:  # by mlactl we might know of it after the third death only
            assert time.monotonic() < deadline and not results, (said, results)
            said += log.read()
            time.sleep(0.001)
    inject()
    thread.join(60)
    assert results and results[0].returncode == 0, results
    daemon.wait_ready()


def an_idle_worker_whose_gpu_is_lost_is_replaced(daemon):
    daemon.wait_ready()
    nothing_stays_held(daemon)
    before = daemon.devices()[GPU]
    inject("fail=cuEventRecord:0:700")
    deadline = time.monotonic() + 10
    while daemon.devices()[GPU]["restarts"] == before["restarts"]:
        assert time.monotonic() < deadline, daemon.devices()[GPU]
        time.sleep(0.05)
    inject()
    daemon.wait_ready()
    assert daemon.devices()[GPU]["pid"] != before["pid"]
    assert "a sign of life" in open(daemon.log.name).read()


def a_gpu_that_cannot_be_opened_for_a_while_is_a_delay(daemon):
    """As after a fault under MPS, whose server takes nobody until all clients of before are gone."""
    daemon.wait_ready()
    inject("fail=cuDevicePrimaryCtxRetain:0:807")
    os.kill(daemon.devices()[GPU]["pid"], signal.SIGKILL)
    results, first = [], daemon.devices()[GPU]["restarts"]
    thread = threading.Thread(target=lambda: results.append(decode(daemon)))
    thread.start()
    deadline = time.monotonic() + 30
    while daemon.devices()[GPU]["restarts"] < first + 5:  # more than the deaths after which a decode is given up
        assert time.monotonic() < deadline and not results, (daemon.devices()[GPU], results)
        time.sleep(0.05)
    state = daemon.devices()[GPU]
    assert state["state"] in ("absent", "starting") and "cuDevicePrimaryCtxRetain" in state["reason"], state
    assert "cuDevicePrimaryCtxRetain" in daemon.ctl("status").stdout, daemon.ctl("status")
    assert daemon.ctl("health").returncode == 1
    inject()
    thread.join(60)
    assert results and results[0].returncode == 0, results
    assert "was restarted" in daemon.ctl("health").stdout, daemon.ctl("health")


def a_gpu_that_is_not_there_is_absent_with_its_reason():
    for device, words, reason in ((SECOND, "", f"none is {SECOND}"), (GPU, "cc=7.5", "compute capability is 7.5"),
                                  (GPU, "no_driver_device=1", "cuInit")):
        inject(words)
        daemon = object.__new__(Daemon)
        daemon.wait_ready = lambda: None
        daemon.__init__(f"reference,{device}")
        try:
            deadline = time.monotonic() + 10
            while daemon.devices()[device]["state"] != "absent":
                assert time.monotonic() < deadline, daemon.devices()
                time.sleep(0.05)
            assert reason in daemon.devices()[device]["reason"], daemon.devices()[device]
        finally:
            daemon.stop()
    inject()


def the_worker_lists_the_gpus_and_says_why_there_is_none():
    worker = os.path.join(os.path.dirname(os.environ["MLAD_BIN"]), "../libexec/mlad/mlad-worker")
    for words, libraries, status, out, why in (
            ("devices=2", FAKE, 0, f"{GPU} Fake GPU 0\n{SECOND} Fake GPU 1\n", ""),
            ("", FAKE, 0, f"{GPU} Fake GPU 0\n", ""),
            ("fail=cuDeviceGetName:1", FAKE, 0, f"{GPU} unnamed\n", ""),
            ("no_driver_device=1", FAKE, 4, "", "cuInit: no CUDA-capable device is detected"),
            ("fail=cuDeviceGetCount:1", FAKE, 4, "", "cuDeviceGetCount: unknown error"),
            ("fail=cuDeviceGetUuid:1", FAKE, 4, "", "cuDeviceGetUuid_v2: unknown error"),
            ("", "", 4, "", "no NVIDIA driver is installed here")):
        inject(words)
        if not libraries and subprocess.run("ldconfig -p | grep -q libcuda.so.1", shell=True).returncode == 0:
            continue  # this machine has a driver of its own
        result = subprocess.run([worker, "--list"], capture_output=True, text=True, timeout=30,
                                env=dict(os.environ, LD_LIBRARY_PATH=libraries))
        assert (result.returncode, result.stdout) == (status, out) and why in result.stderr, (words, result)
    inject()


def all_is_cpu_and_every_gpu():
    for devices, words, names, note in (
            ("all", "devices=2", ["cpu", GPU, SECOND], None), ("all,reference", "", ["cpu", GPU, "reference"], None),
            ("all", "no_driver_device=1", ["cpu"], "devices = all found no GPU: cuInit: no CUDA-capable device")):
        inject(words)
        daemon = Daemon(devices)  # which waits until all are ready
        try:
            status = daemon.json("status")
            assert [device["name"] for device in status["devices"]] == names, status
            assert note is None and "note" not in status or note in status["note"], status
            assert note is None or note in daemon.ctl("status").stdout, daemon.ctl("status").stdout
            assert daemon.ctl("health").returncode == 0
            for gpu in names[1:]:
                result = daemon.ctl("decode", CAPTURE, "-o", os.path.join(daemon.directory, "out"), "--device", gpu,
                                    MLAD_FAKE_CUDA_CONTROL="", MLAD_FAKE_CUDA="devices=2")
                assert result.returncode == 0, result
        finally:
            daemon.stop()
    inject()


for test in (a_gpu_that_is_not_there_is_absent_with_its_reason, the_worker_lists_the_gpus_and_says_why_there_is_none,
             all_is_cpu_and_every_gpu, kv_that_lies_elsewhere_is_refused_with_the_names_of_both_gpus,
             a_launch_that_hangs_is_a_delay_for_the_client):
    test()
    print("ok   ", test.__name__, flush=True)
run([every_combination_meets_the_bar, bench_times_the_gpu_and_the_daemon_and_names_no_ceilings,
     the_kernels_own_bench_names_no_ceilings_either, nothing_stays_held,
     a_failed_import_is_the_clients_error_and_only_that, a_sticky_error_is_a_delay_for_the_client,
     a_batch_that_always_loses_the_device_is_given_up, a_killed_worker_is_a_delay_for_the_client,
     a_client_killed_in_mid_decode_leaves_nothing, nothing_stays_held,
     a_lost_context_of_the_clients_own_is_said_to_be_lost,
     a_stream_that_hangs_is_waited_for_no_longer_than_asked, vmm_memory_decodes_as_any_other,
     vmm_outputs_may_not_lie_in_inputs,
     memory_that_cannot_be_shared_is_refused_with_what_to_change, a_buffer_takes_252_allocations,
     any_driver_call_of_a_vmm_registration_may_fail, wrong_descriptors_are_refused_by_name,
     vmm_memory_is_exported_again_for_another_worker, a_death_is_a_delay_whatever_the_memory,
     a_death_that_took_the_clients_context_along_is_device_lost,
     a_death_after_which_memory_cannot_be_opened_is_what_the_worker_says,
     an_import_that_finds_the_gpu_lost_is_a_delay, an_idle_worker_whose_gpu_is_lost_is_replaced,
     a_gpu_that_cannot_be_opened_for_a_while_is_a_delay, nothing_stays_held], Daemon(f"reference,{GPU}"))
