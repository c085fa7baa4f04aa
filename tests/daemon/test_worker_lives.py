"""How mlad-worker, its sessions and their memory live and end: one function a behaviour.

    test_worker_lives.py PROGRAM DEVICE BEHAVIOUR...
"""
import fcntl
import os
import tempfile
import time

from worker_harness import DEVICE, PAGE, Case, Memory, done, eventually, expect, memfd, run, slow, start, submit


def ids_are_reused_and_work_in_flight_completes():
    with start(device="reference") as worker:
        session = worker.attach()
        case = slow().register(session).plan(session)
        work = submit(session)
        drop = session.send("DROP", dict(plan=1))
        first = session.send("UNREGISTER", dict(buffer=1))
        second = session.send("UNREGISTER", dict(buffer=2))
        fresh = Memory(PAGE)
        again = session.send("REGISTER", dict(buffer=1, kind="memfd", bytes=PAGE), [fresh.fd])
        session.answer(drop)
        session.answer(again)                       # the id is free at once
        assert worker.report()["buffers"] == 3      # the memory stays until the decode is complete
        assert done(session, work)["failed"] == 0
        assert {session.receive()[1] for _ in range(2)} == {first, second}
        assert case.out.all(axis=2).any()
        report = worker.report()
        assert (report["buffers"], report["held_bytes"], worker.mapped()) == (1, PAGE, PAGE), report
        session.ask("UNREGISTER", dict(buffer=1))
        case.register(session).plan(session)
        done(session, submit(session))


def dead_clients_leave_nothing():
    with start(device="reference") as worker:
        other = worker.attach()
        mine = Case().register(other).plan(other)
        held = worker.report()["held_bytes"]
        descriptors, mapped = worker.descriptors(), worker.mapped()
        case = slow(0.02)
        for turn in range(40):
            session = worker.attach()
            case.register(session).plan(session)
            for _ in range(turn % 4):
                submit(session)
            session.close()
            if turn == 10:
                resident = worker.resident()
        assert other.ask("SUBMIT", dict(plan=1))[0] == "DONE" and mine.right()

        def gone():
            report = worker.report()
            return report["sessions"] == 1 and report["sessions_draining"] == 0 and report["held_bytes"] == held
        eventually(gone)
        report = worker.report()
        assert (report["queued"], report["running"], report["buffers"], report["plans"]) == (0, 0, 2, 1), report
        assert worker.descriptors() == descriptors and worker.mapped() == mapped
        assert worker.life()["running"] == 0
        grown = worker.resident() - resident
        assert grown < 4 << 20, f"{grown} bytes more"


def freeing_big_memory_stops_nobody():
    """What a dead client leaves is freed by us; the loop must not wait for that."""
    with start() as worker:
        session, other = worker.attach(), worker.attach(uid=2)
        Case().register(other).plan(other)
        size = 1 << 28
        fd = memfd(size)
        for offset in range(0, size, 1 << 24):
            os.pwrite(fd, b"\1" * (1 << 24), offset)
        session.register(1, fd, size)
        os.close(fd)
        session.close()
        eventually(lambda: worker.report()["sessions"] == 1)
        longest = 0
        while worker.report()["sessions_draining"]:
            begin = time.monotonic()
            done(other, submit(other))
            longest = max(longest, time.monotonic() - begin)
        assert longest < 0.2, f"another session waited {longest:.3f} s while memory was freed"
        assert worker.mapped() < 1 << 20 and worker.report()["held_bytes"] < 1 << 20


def ended_session_drains():
    """Its running slice is abandoned; until that has ended its memory is shown as draining, not as held."""
    with start(device="reference") as worker:
        case = slow(3, B=1)                             # one request cannot be sliced

        def seen_draining():
            """End a session in mid-slice. Whether the list came before the slice's end; both are right."""
            session = worker.attach()
            case.register(session).plan(session)
            submit(session)
            eventually(lambda: worker.report()["running"] == 1)
            begin, seen = time.monotonic(), False
            session.close()
            eventually(lambda: worker.report()["sessions"] == 0)
            for entry in worker.control.ask("SESSIONS", dict(device=DEVICE))[2]["sessions"]:
                assert entry["draining"] and (entry["bytes"] > 0 or not entry["in_flight"]), entry
                seen = entry["in_flight"] == 1
            assert worker.report()["held_bytes"] == 0
            eventually(lambda: worker.report()["sessions_draining"] == 0)
            assert worker.mapped() == 0 and worker.report()["decodes"] == 0
            assert time.monotonic() - begin < 1.5, "the slice ran on for nobody"
            return seen
        eventually(seen_draining)                       # the slice wins about one time in ten


def drain_waits_and_refuses():
    with start(device="reference") as worker:
        session = worker.attach()
        case = slow(0.5).register(session).plan(session)    # longer than all that is to happen meanwhile
        control, work = worker.control, submit(session)
        eventually(lambda: worker.report()["running"] == 1)
        drain = control.send("DRAIN", dict(device="reference"))
        assert worker.report()["state"] == "draining"       # the worker may read the session's socket first
        expect("draining", "", session.answer, submit(session))
        assert worker.life()["running"] == 1
        assert done(session, work)["failed"] == 0
        control.answer(drain)
        report = worker.report()
        assert report["state"] == "draining" and report["reason"], report
        session.ask("DROP", dict(plan=1))           # what is no work goes on
        control.ask("DRAIN", dict(device="reference"))
        control.ask("DRAIN", dict(device="reference", resume=True))
        assert worker.report()["state"] == "ready"
        case.plan(session)
        work = submit(session)
        eventually(lambda: worker.report()["running"] == 1)
        drain = control.send("DRAIN", dict(device="reference"))
        resume = control.send("DRAIN", dict(device="reference", resume=True))
        expect("state", "", control.answer, drain)
        control.answer(resume)
        done(session, work)


def evicted_session_hears_why():
    with start(device="reference") as worker:
        session, other = worker.attach(), worker.attach()
        slow().register(session).plan(session)
        mine = Case().register(other).plan(other)
        for _ in range(5):
            submit(session)
        eventually(lambda: worker.report()["running"] == 1)
        worker.control.ask("EVICT", dict(device="reference", session=session.id))
        *_, last = session.ended()
        assert last[0] == "ERROR" and last[1] == 0 and last[2]["code"] == "evicted", last
        expect("not_found", "session", worker.control.ask, "EVICT", dict(device="reference", session=session.id))
        assert other.ask("SUBMIT", dict(plan=1))[0] == "DONE" and mine.right()
        eventually(lambda: worker.report()["sessions_draining"] == 0)
        assert worker.report()["sessions"] == 1


def sessions_are_listed_in_pages():
    with start(max_sessions=100) as worker:
        sessions = [worker.attach(uid=number % 3, client=f"client-{number}") for number in range(70)]
        list_after = lambda **after: worker.control.ask("SESSIONS", dict(device=DEVICE, **after))[2]
        page = list_after()
        assert [entry["session"] for entry in page["sessions"]] == list(range(1, 65)) and page["more"]
        assert page["sessions"][4]["client"] == "client-4" and page["sessions"][4]["uid"] == 1
        page = list_after(after=64)
        assert [entry["session"] for entry in page["sessions"]] == list(range(65, 71)) and not page["more"]
        for session in sessions:
            session.close()
        eventually(lambda: worker.report()["sessions"] == 0)


def control_end_ends_it_in_mid_launch():
    worker = start(device="reference")
    with worker:
        session = worker.attach()
        slow(20, B=1).register(session).plan(session)
        submit(session)
        eventually(lambda: worker.life()["running"] == 1)
        begin = time.monotonic()
    assert time.monotonic() - begin < 3
    assert session.ended() == []


def beat_and_progress_grow():
    with start(device="reference") as worker:
        session = worker.attach()
        slow(0.8).register(session).plan(session)
        work, before = submit(session), worker.life()
        eventually(lambda: worker.life()["beat"] >= before["beat"] + 3)
        eventually(lambda: worker.life()["progress"] > before["progress"])
        done(session, work)


def held_lock_delays_ready():
    with tempfile.TemporaryDirectory(prefix="mlad-worker-test-") as directory:
        holder = os.open(f"{directory}/{DEVICE}.lock", os.O_RDWR | os.O_CREAT)
        fcntl.flock(holder, fcntl.LOCK_EX)
        with start(directory=directory, ready=False) as worker:
            beat = worker.life()["beat"]
            eventually(lambda: worker.life()["beat"] > beat + 2)
            report = worker.report()
            assert report["state"] == "starting" and "lock" in report["reason"], report
            fcntl.flock(holder, fcntl.LOCK_UN)
            worker.wait_ready()
            assert worker.report()["state"] == "ready"
            try:
                fcntl.flock(holder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                raise AssertionError("the worker does not hold its lock")
            except BlockingIOError:
                pass
        fcntl.flock(holder, fcntl.LOCK_EX)
        with start(directory=directory, ready=False) as worker:     # its control socket ends while it waits
            eventually(lambda: worker.life()["beat"] > 0)
        os.close(holder)


def unservable_device_is_explained():
    for device, arguments, field in (("abacus", [], "device"), (DEVICE, ["--variant", "mmx"], "variant")):
        with start(device=device, ready=False, arguments=arguments, status=3) as worker:
            (message,) = worker.control.ended()
            assert message[:2] == ("ERROR", 0) and message[2]["field"] == field, message


def control_faults_are_answered():
    with start() as worker:
        expect("unknown_type", "", worker.control.ask, "SUBMIT", dict(plan=1))
        expect("missing_field", "session", worker.control.ask, "EVICT", dict(device=DEVICE))
        expect("fds", "fd", worker.control.ask, "ATTACH",
               dict(session=1, uid=1, pid=1, hello_seq=1, hello=dict(client="x")))
        worker.control.send_raw(b"\xc1")
        assert worker.report()["state"] == "ready"


run(globals())
