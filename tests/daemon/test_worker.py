"""Decodes by mlad-worker as its clients see them, and what is refused: one function a behaviour.

    test_worker.py PROGRAM DEVICE BEHAVIOUR...
"""
import fcntl
import os
import socket
import tempfile

import numpy as np

from worker_harness import DEVICE, LIMITS, PAGE, Case, Memory, done, eventually, expect, memfd, run, slow, start, submit


# Decodes

def decodes_in_place():
    with start() as worker:
        session = worker.attach()
        case = Case(B=5, H=3, pages=5).register(session)
        case.block_table[:, 0] = [4, 2, 0, 1, 3]
        case.plan(session)
        body = done(session, submit(session))
        assert case.right()
        assert (body["failed"], body["failures"], body["kv_tokens"]) == (0, [], 5), body
        case.block_table[:, 0] = [0, 0, 1, 1, 2]      # read at each launch
        case.out[:] = 0
        done(session, submit(session))
        assert case.right()
        case.out[:] = 0
        assert session.ask("DECODE", dict(batch=case.ragged()))[0] == "DONE"
        assert case.right()
        report = worker.report()
        assert (report["decodes"], report["kv_tokens"], report["kv_bytes"]) == (3, 15, 15 * 1152), report
        assert [phase["count"] for phase in report["latency"]] == [3, 3, 3, 3, 0, 0], report
        assert worker.life()["decodes"] == 3 and worker.life()["running"] == 0 and worker.life()["progress"] > 0


def computes_attention():
    """One numeric check that q, keys, scale and lse are handed on; the oracle does the rest."""
    with start() as worker:
        session = worker.attach()
        case = Case(B=1, H=2, K=100).register(session)
        case.block_table[0] = [1, 0]
        floats = lambda array: (array.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        case.q[0, 1] = case.kv[0, 5]
        session.ask("DECODE", dict(batch=case.changed(lse_base="2")))
        keys = floats(case.kv)[[1, 0]].reshape(128, 576)[:100]
        scores = 0.04 * floats(case.q)[0] @ keys.T
        weights = np.exp(scores)
        want = weights @ keys[:, :512] / weights.sum(1, keepdims=True)
        got = floats(case.out)[0]
        assert np.abs(got - want).max() < 0.02 * np.abs(want).max(), np.abs(got - want).max()
        lse = case.outputs.array(case.batch["lse"]["offset"], (1, 2), np.float32)
        assert np.allclose(lse, np.log2(weights.sum(1)), rtol=1e-4), lse


def big_batches_run_in_slices():
    with start() as worker:
        session = worker.attach()
        case = Case(B=2500, pages=7).register(session)
        case.block_table[:, 0] = np.arange(2500) % 7
        assert session.ask("DECODE", dict(batch=case.ragged()))[0] == "DONE" and case.right()
        case.seqlens[1100:1200] = -3
        case.block_table[2400, 0] = 7
        case.plan(session)
        body = done(session, submit(session))
        assert body["failed"] == 101 and len(body["failures"]) == 32, body["failed"]
        assert [(f["request"], f["field"]) for f in body["failures"]] == \
            [(i, f"seqlens[{i}]") for i in range(1100, 1132)]
        assert body["kv_tokens"] == 2500 - 101
        case.seqlens[1100:1200] = 1
        (failure,) = done(session, submit(session))["failures"]
        assert (failure["request"], failure["field"]) == (2400, "block_table[2400][0]"), failure
        assert worker.report()["decodes_failed"] == 2


# Refusals

def refusals_name_their_field():
    with start() as worker:
        session = worker.attach()
        case = Case().register(session).plan(session)
        fd, size = case.inputs.fd, case.inputs.size
        refused = 0

        def refuse(code, field, kind, body, fds=()):
            nonlocal refused
            refused += 1
            return expect(code, field, session.ask, kind, body, fds)

        register = dict(buffer=9, kind="memfd", bytes=size)
        refuse("exists", "buffer", "REGISTER", {**register, "buffer": 1}, [fd])
        refuse("invalid", "buffer", "REGISTER", {**register, "buffer": 0}, [fd])
        refuse("invalid", "kind", "REGISTER", {**register, "kind": "cuda"}, [fd])
        refuse("invalid", "offset", "REGISTER", {**register, "offset": 64, "bytes": 64}, [fd])
        refuse("invalid", "access", "REGISTER", {**register, "access": "write"}, [fd])
        refuse("missing_field", "bytes", "REGISTER", dict(buffer=9, kind="memfd"), [fd])
        refuse("unknown_field", "color", "REGISTER", {**register, "color": 1}, [fd])
        refuse("buffer", "bytes", "REGISTER", {**register, "bytes": size + 1}, [fd])
        refuse("fds", "fd", "REGISTER", register)
        refuse("fds", "fd", "SUBMIT", dict(plan=1), [fd])
        handle = "0123456789abcdef" * 8
        gpu = dict(buffer=9, handle=handle, gpu="GPU-0", offset=0, bytes=64)
        for code, field, changed in (("unsupported", "gpu", {}), ("invalid", "handle", dict(handle=handle[:-1])),
                                     ("invalid", "handle", dict(handle=handle + "0")),
                                     ("exists", "buffer", dict(buffer=1)),
                                     ("invalid", "bytes", dict(bytes=0))):
            assert "89abcdef" not in refuse(code, field, "IMPORT", {**gpu, **changed})  # the handle is a secret
        refuse("fds", "fd", "IMPORT", gpu, [fd])
        vmm = dict(buffer=9, gpu="GPU-0", allocation=1 << 21, offset=0, bytes=64, address=0)
        refuse("unsupported", "gpu", "IMPORT_VMM", vmm, [fd])
        refuse("exists", "buffer", "IMPORT_VMM", {**vmm, "buffer": 1}, [fd])
        refuse("invalid", "allocation", "IMPORT_VMM", {**vmm, "allocation": 0}, [fd])
        refuse("missing_field", "address", "IMPORT_VMM", {k: v for k, v in vmm.items() if k != "address"}, [fd])
        assert "1 to 252" in refuse("fds", "fd", "IMPORT_VMM", vmm)
        assert "2 came" in refuse("fds", "fd", "REGISTER", register, [fd, fd])
        refuse("not_found", "plan", "SUBMIT", dict(plan=2))
        refuse("not_found", "plan", "DROP", dict(plan=2))
        refuse("exists", "plan", "PLAN", dict(plan=1, batch=case.batch))
        refuse("not_found", "buffer", "UNREGISTER", dict(buffer=3))
        assert "plan 1" in refuse("in_use", "buffer", "UNREGISTER", dict(buffer=2))
        refuse("unknown_type", "", "DONE",
               dict(receive_ns=0, queue_ns=0, kernel_ns=0, kv_tokens=0, failed=0, failures=[]))
        refuse("unknown_type", "", "CONFIGURE", LIMITS)
        refuse("unknown_type", "", 99, {})
        refuse("state", "", "HELLO", dict(client="again"))
        refuse("state", "", "STATUS", {})
        refuse("state", "", "DRAIN", dict(device=DEVICE))

        def refuse_batch(code, field, **fields):
            refuse(code, field, "PLAN", dict(plan=5, batch=case.changed(**fields)))
            return refuse(code, field, "DECODE", dict(batch=case.changed(**fields)))

        at = lambda buffer, offset: dict(buffer=buffer, offset=offset)
        refuse_batch("not_found", "batch.q.buffer", q=at(7, 0))
        refuse_batch("invalid", "batch.heads", heads=129)
        refuse_batch("invalid", "batch.kv_format", kv_format="fp16")
        refuse_batch("invalid", "batch.q_rows", batch=2, q_rows=3)
        refuse_batch("invalid", "batch.row_stride", row_stride=1160)
        refuse_batch("invalid", "batch.page_stride", page_stride=64 * 1152 - 16)
        refuse_batch("invalid", "batch.dcp_rank", dcp_world=2, dcp_rank=2)
        refuse_batch("invalid", "batch.tree_mask", mask="tree")
        refuse_batch("invalid", "batch.q_scale", q_scale=dict(value=1.0))
        refuse_batch("invalid", "batch.k_scale", k_scale=dict(value=1.0, tensor=at(1, 0)), q_dtype="fp8_e4m3",
                     kv_format="fp8_e4m3")
        refuse_batch("invalid", "batch.k_scale", k_scale={})
        refuse_batch("not_found", "batch.v_scale.tensor.buffer", v_scale=dict(tensor=at(8, 0)), q_dtype="fp8_e4m3",
                     kv_format="fp8_e4m3")
        refuse_batch("missing_field", "batch.softmax_scale", softmax_scale=None)
        refuse_batch("unknown_field", "batch.scale", scale=1.0)
        refuse_batch("invalid", "batch.softmax_scale", softmax_scale=float("nan"))
        refuse_batch("invalid", "batch.q.offset", q=at(1, 8))
        refuse_batch("invalid", "batch.lse.offset", lse=at(2, 2050))
        sentence = refuse_batch("range", "batch.q", q=at(1, size - 16))
        assert "1152" in sentence and " 16 " in sentence, sentence
        refuse_batch("range", "batch.kv", pages=3000)
        refuse_batch("range", "batch.seqlens", seqlens=at(1, (1 << 63) - 4))
        refuse_batch("invalid", "batch.out.buffer", out=at(1, 0))
        refuse_batch("overlap", "batch.lse", lse=at(2, 0))
        assert session.ask("SUBMIT", dict(plan=1))[0] == "DONE" and case.right()
        report = worker.report()
        assert (report["refused"], report["sessions"], report["dropped"], report["plans"]) == (refused, 1, 0, 1), report


def outputs_never_overlap_inputs():
    """Also when one memfd is registered twice, as different parts."""
    with start() as worker:
        session = worker.attach()
        case = Case()
        whole = Memory(case.inputs.size + PAGE)
        session.register(1, whole.fd, whole.size)
        session.register(2, whole.fd, PAGE)
        session.register(3, whole.fd, PAGE, offset=case.inputs.size)
        at = lambda offset, buffer=1: dict(buffer=buffer, offset=offset)
        plan = lambda number, **fields: session.ask("PLAN", dict(plan=number, batch=case.changed(**fields)))
        end = case.inputs.size
        expect("overlap", "batch.out", plan, 1, out=at(0, 2), lse=at(1024, 3))
        expect("overlap", "batch.lse", plan, 1, out=at(0, 3), lse=at(16, 2))
        expect("overlap", "batch.lse", plan, 1, out=at(0, 3), lse=at(end + 1020))
        plan(1, out=at(0, 3), lse=at(end + 1024))       # neighbours


def content_errors_are_named():
    with start() as worker:
        session = worker.attach()
        case = Case(B=4).register(session)
        decode = lambda: session.ask("DECODE", dict(batch=case.ragged()))
        for values, field in (([1, 1, 2, 3, 4], "cu_q[0]"), ([0, 1, 3, 2, 4], "cu_q[3]"), ([0, 1, 2, 3, 5], "cu_q[4]")):
            case.cu_q[:] = values
            expect("batch", field, decode)
        case.cu_q[:] = range(5)
        case.seqlens[:] = [1, -1, 65, 1]
        case.block_table[3] = -5
        failures = decode()[2]["failures"]
        assert [(f["request"], f["field"]) for f in failures] == \
            [(1, "seqlens[1]"), (2, "seqlens[2]"), (3, "block_table[3][0]")], failures
        assert worker.report()["decodes_failed"] == 4


def broken_messages_end_only_their_session():
    with start() as worker:
        other = worker.attach()
        case = Case().register(other).plan(other)
        pipe = os.pipe()
        good = bytes([0x94, 1, 10, 5, 0x81, 0xA4]) + b"plan" + bytes([1])
        broken = {
            b"\xc1": ("malformed", 0),
            good + b"\0": ("malformed", None),
            good[:-1]: ("malformed", None),
            b"\x94\x01\x0a\x05\xdf\xff\xff\xff\xff": ("malformed", None),   # a map of 2^32 - 1 pairs
            b"\x94\x02\x0a\x05\x80": ("version", 5),
            b"\x94\x01\x0a\x00\x80": (None, 0),                             # sequence 0
            b"\0" * 70000: ("malformed", 0),
        }
        for data, (code, sequence) in broken.items():
            session = worker.attach()
            session.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 18)
            session.send_raw(data)
            (message,) = session.ended()
            assert message[0] == "ERROR", message
            assert code is None or message[2]["code"] == code, (data[:20], message)
            assert sequence is None or message[1] == sequence, (data[:20], message)
        session = worker.attach()
        session.send_raw(good, [pipe[0]] * 253)                             # one descriptor too many for any message
        assert session.ended()[0][2]["code"] == "malformed"
        assert worker.report()["dropped"] == len(broken) + 1
        assert other.ask("SUBMIT", dict(plan=1))[0] == "DONE" and case.right()
        eventually(lambda: worker.report()["sessions"] == 1)
        os.close(pipe[0])
        os.close(pipe[1])


def unusable_memory_is_refused():
    with start() as worker:
        session = worker.attach()
        base = worker.descriptors()

        def refuse(code, field, word, fd, size=PAGE, **fields):
            sentence = expect(code, field, session.register, 1, fd, size, **fields)
            assert word in sentence, sentence
            os.close(fd)

        read_end, write_end = os.pipe()
        refuse("buffer", "fd", "pipe", read_end)
        os.close(write_end)
        refuse("buffer", "fd", "pipe", socket.socket().detach())
        refuse("buffer", "fd", "pipe", os.open("/dev/zero", os.O_RDWR))
        with tempfile.TemporaryFile(dir=worker.directory) as file:
            file.truncate(PAGE)
            # a directory on tmpfs makes an ordinary file whose seals nobody can add
            sentence = expect("buffer", "fd", session.register, 1, file.fileno(), PAGE)
            assert "memfd" in sentence, sentence
        refuse("buffer", "fd", "F_SEAL_SHRINK", memfd(PAGE, seals=0))
        refuse("buffer", "fd", "F_SEAL_SHRINK", memfd(PAGE, seals=fcntl.F_SEAL_GROW))
        refuse("buffer", "bytes", str(PAGE), memfd(PAGE), size=PAGE + 1)
        refuse("buffer", "bytes", str(PAGE), memfd(PAGE), size=PAGE, offset=PAGE)
        refuse("buffer", "bytes", str(PAGE), memfd(PAGE), size=(1 << 63) - 1, offset=(1 << 63) - PAGE)
        refuse("invalid", "offset", "page size", memfd(2 * PAGE), offset=PAGE // 2)
        refuse("buffer", "access", "read", memfd(PAGE, seals=fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_WRITE))
        refuse("buffer", "access", "read", memfd(PAGE, seals=fcntl.F_SEAL_SHRINK | 0x10))     # F_SEAL_FUTURE_WRITE
        whole = memfd(PAGE)
        refuse("buffer", "access", "read", os.open(f"/proc/self/fd/{whole}", os.O_RDONLY))
        read_only = os.open(f"/proc/self/fd/{whole}", os.O_RDONLY)
        session.register(8, read_only, PAGE, access="read")
        os.close(read_only)
        os.close(whole)
        try:
            huge = memfd(2 << 20, flags=os.MFD_ALLOW_SEALING | os.MFD_HUGETLB)
        except OSError:
            print("no huge pages here: that refusal was not tested")
        else:
            refuse("buffer", "fd", "HUGETLB", huge)
        sealed = memfd(PAGE, seals=fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_WRITE)
        session.register(9, sealed, PAGE, access="read")
        os.close(sealed)
        assert worker.report()["held_bytes"] == 2 * PAGE == worker.mapped()
        assert worker.descriptors() == base


# Limits

def quotas_are_per_user():
    limits = dict(max_sessions=2, max_buffers=2, max_bytes=3 * PAGE, max_plans=1)
    with start(**limits) as worker:
        one, two, stranger = worker.attach(), worker.attach(), worker.attach(uid=2)
        assert {name: one.limits[name] for name in ("max_buffers", "max_bytes", "max_plans")} == \
            {name: limits[name] for name in ("max_buffers", "max_bytes", "max_plans")}
        assert "max_sessions" in expect("quota", "", worker.attach)
        fd = memfd(4 * PAGE)
        one.register(1, fd, PAGE)
        two.register(1, fd, PAGE)
        assert "max_buffers" in expect("quota", "buffer", one.register, 2, fd, PAGE)
        two.ask("UNREGISTER", dict(buffer=1))
        assert "max_bytes" in expect("quota", "bytes", one.register, 2, fd, 3 * PAGE)
        one.register(2, fd, 2 * PAGE)
        stranger.register(1, fd, 3 * PAGE)
        worker.configure(**{**limits, "max_buffers": 9, "max_bytes": 1 << 30, "max_sessions": 3})
        case = Case()
        three = worker.attach()
        case.register(three).plan(three)
        assert "max_plans" in expect("quota", "plan", three.ask, "PLAN", dict(plan=2, batch=case.batch))
        three.ask("DROP", dict(plan=1))
        case.plan(three)
        three.close()           # gives everything back
        eventually(lambda: worker.report()["buffers"] == 3)
        case.register(two).plan(two)
        os.close(fd)


def too_much_in_flight_is_busy():
    with start(device="reference", max_in_flight=3) as worker:
        session, other = worker.attach(), worker.attach(uid=2)
        case = slow().register(session).plan(session)
        case.register(other).plan(other)
        first = [submit(session) for _ in range(3)]
        fourth = submit(session)
        assert "max_in_flight" in expect("busy", "", session.answer, fourth)
        worker.configure(max_in_flight=9, queue_limit=2)
        worker.report()         # the new limits are in force once the answer is here
        assert "queue_limit" in expect("busy", "", other.answer, submit(other))
        for sequence in first:
            done(session, sequence)
        done(other, submit(other))
        report = worker.report()
        assert (report["busy"], report["queued"], report["running"]) == (2, 0, 0), report


def a_session_leaves_room_for_others_of_its_user():
    with start(device="reference", max_in_flight=3, max_in_flight_per_session=2) as worker:
        greedy, other = worker.attach(), worker.attach()
        assert greedy.limits["max_in_flight"] == 2, greedy.limits
        case = slow().register(greedy).plan(greedy)
        case.register(other).plan(other)
        first = [submit(greedy) for _ in range(2)]
        assert "max_in_flight_per_session" in expect("busy", "", greedy.answer, submit(greedy))
        done(other, submit(other))
        for sequence in first:
            done(greedy, sequence)
        worker.configure(max_bytes_per_session=4096)
        worker.report()
        assert "max_bytes_per_session" in expect("quota", "bytes", slow().register, worker.attach())
        fd, third = memfd(2 * PAGE), worker.attach()
        worker.configure(max_bytes_per_session=2 * PAGE)
        worker.report()
        third.register(1, fd, PAGE)
        assert "max_bytes_per_session" in expect("quota", "bytes", third.register, 2, fd, 2 * PAGE)  # with the first
        third.register(2, fd, PAGE)
        worker.attach().register(1, fd, 2 * PAGE)
        os.close(fd)


def flood_does_not_starve_others():
    with start(device="reference", max_in_flight=200, queue_limit=200) as worker:
        flooder, other = worker.attach(), worker.attach()
        slow(0.005).register(flooder).plan(flooder)
        case = slow(0.005).register(other).plan(other)
        flood = [submit(flooder) for _ in range(100)]
        done(other, submit(other))
        waiting = worker.report()["queued"]
        assert waiting >= 80, f"the other session waited for {100 - waiting} of the flooder's decodes"
        tiny = worker.attach()
        for _ in range(3):      # nor do its small messages
            expect("not_found", "plan", tiny.ask, "SUBMIT", dict(plan=1))
        for sequence in flood:
            done(flooder, sequence)
        assert case.out.any()


# Many clients at once

def busy(worker):
    """A session with a plan that takes long enough for others to submit theirs meanwhile."""
    session = worker.attach(client="busy")
    slow(0.1, device=DEVICE, heads=128 if DEVICE == "cpu" else 8).register(session).plan(session)
    return session


def tenants(worker, n):
    """Sessions with deterministic plans of different shapes, and what they compute alone."""
    made = []
    for i in range(n):
        session, case = worker.attach(), Case(B=1 + i % 3, H=4 + i, K=100 + 30 * i)
        case.batch["deterministic"] = True
        case.register(session).plan(session)
        done(session, submit(session))
        made.append((session, case, case.out.copy()))
    return made


def clients_share_launches():
    with start() as worker:
        blocker, clients = busy(worker), tenants(worker, 8)
        alone = worker.report()
        assert alone["launches"] == alone["launched_parts"] == 8, alone
        assert alone["launched_rows"] == sum(case.B for _, case, _ in clients), alone
        rounds = 5
        for _ in range(rounds):
            for _, case, _ in clients:
                case.out[:] = 0
            first = submit(blocker)
            sent = [submit(session) for session, _, _ in clients]
            done(blocker, first)
            for (session, case, expected), sequence in zip(clients, sent):
                body = done(session, sequence)
                assert body["kv_tokens"] == case.B * case.seqlens[0] and body["failed"] == 0, body
                assert np.array_equal(case.out, expected), "in company, the bits are others"
        together = worker.report()
        parts, launches = (together[name] - alone[name] for name in ("launched_parts", "launches"))
        assert parts >= rounds * 9 and parts > 1.5 * launches, (parts, launches)


def dependent_decodes_run_in_order():
    """What one decode leaves behind is what the session's next one finds, however many wait."""
    with start() as worker:
        blocker = busy(worker)
        session, first, second = worker.attach(), Case(B=3, H=4, K=200), Case(B=3, H=4, K=190)
        first.register(session).plan(session, 1)
        second.q[:] = 0x3D00
        session.register(3, second.inputs.fd, second.inputs.size, access="read")
        session.register(4, second.outputs.fd, second.outputs.size)
        inputs = {name: dict(value, buffer=3) for name, value in second.batch.items()
                  if isinstance(value, dict) and value["buffer"] == 1}
        outputs = {name: dict(second.batch[name], buffer=4) for name in ("out", "lse")}
        session.ask("PLAN", dict(plan=2, batch=dict(second.batch, **inputs)))               # writes where plan 1 does
        session.ask("PLAN", dict(plan=3, batch=dict(second.batch, **inputs, **outputs)))    # has memory of its own
        expected = []
        for plan, case in ((1, first), (2, first), (3, second)):
            done(session, submit(session, plan))
            expected.append(case.out.copy())
        assert np.array_equal(expected[1], expected[2]) and not np.array_equal(expected[0], expected[1])
        for plans, wanted, most in (((1, 2, 1, 2), 1, 1), ((2, 1, 2, 1), 0, 1), ((2, 2, 1, 1), 0, 1), ((1, 3, 1, 3), 0, 2)):
            before = worker.report()
            last = submit(blocker)
            eventually(lambda: worker.report()["launches"] > before["launches"])    # or the first ones are with it
            sent = [submit(session, plan) for plan in plans]
            for sequence in sent:
                assert done(session, sequence)["failed"] == 0
            done(blocker, last)
            assert np.array_equal(first.out, expected[wanted]), plans
            after = worker.report()
            launches = after["launches"] - before["launches"]
            assert launches == 1 + len(plans) // most, (plans, launches)


def clients_that_die_in_company_harm_nobody():
    with start() as worker:
        blocker, clients = busy(worker), tenants(worker, 6)
        for turn in range(12):
            victim = tenants(worker, 1)[0][0]
            for _, case, _ in clients:
                case.out[:] = 0
            first = submit(blocker)
            sent = [submit(session) for session, _, _ in clients[:3]]
            for _ in range(3):
                submit(victim)
            sent += [submit(session) for session, _, _ in clients[3:]]
            if turn % 2:
                done(blocker, first)
            victim.close()
            if turn % 2 == 0:
                done(blocker, first)
            for (session, case, expected), sequence in zip(clients, sent):
                assert done(session, sequence)["failed"] == 0
                assert np.array_equal(case.out, expected)
        eventually(lambda: (worker.report()["sessions"], worker.report()["sessions_draining"]) == (7, 0))
        report = worker.report()
        assert (report["queued"], report["running"], report["buffers"], report["plans"]) == (0, 0, 14, 7), report


def client_that_never_reads_is_dropped():
    with start() as worker:
        other = worker.attach()
        case = Case().register(other).plan(other)
        before = worker.resident()
        for kind, body in (("SUBMIT", dict(plan=7)), ("SUBMIT", dict(plan=1))):
            session = worker.attach()
            if body["plan"] == 1:
                case.register(session).plan(session)
            dropped = worker.report()["dropped"]
            try:
                for sent in range(200000):
                    session.send(kind, body)
                raise AssertionError("200,000 unread answers and still there")
            except (BrokenPipeError, ConnectionResetError):
                pass
            eventually(lambda: worker.report()["dropped"] == dropped + 1)
            assert other.ask("SUBMIT", dict(plan=1))[0] == "DONE"
            session.close()
        eventually(lambda: worker.report()["sessions"] == 1)
        grown = worker.resident() - before
        assert grown < 16 << 20, f"{grown} bytes more"


run(globals())
