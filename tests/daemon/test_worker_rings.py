"""Rings by mlad-worker as their client sees them, an honest one and others: one function a behaviour. Wherever a client
breaks something, another one beside it decodes on and is right.

    test_worker_rings.py PROGRAM DEVICE BEHAVIOUR...
"""
import contextlib
import fcntl
import mmap
import os
import random
import struct
import threading
import time

import numpy as np

from worker_harness import DEVICE, PATIENCE, Case, done, eventually, expect, run, slow, start, submit

SUBMISSION, COMPLETION, ENTRIES_AT, ENTRY = 0x40, 0xc0, 0x200, 64    # as PROTOCOL.md draws them
HEAD, FLAGS, TAIL = 0, 4, 0x40
NEED_WAKEUP = 1


class Rings:
    """The client's side of a session's rings, without any manners."""
    def __init__(self, session):
        self.session, self.entries = session, session.ring_entries
        self.bytes = ENTRIES_AT + 2 * self.entries * ENTRY
        self.map = mmap.mmap(session.ring_memory, self.bytes)
        self.words = np.frombuffer(self.map, np.uint32)     # stored whole: struct.pack_into writes zeros first
        os.close(session.ring_memory)
        self.pushed = self.popped = 0

    def word(self, at, value=None):
        if value is None:
            return int(self.words[at // 4])
        self.words[at // 4] = value & 0xffffffff

    def place(self, entry, index=None):
        index = self.pushed if index is None else index
        at = ENTRIES_AT + index % self.entries * ENTRY
        self.map[at:at + ENTRY] = entry

    def push(self, sequence, plan=1, operation=1, zero=b"", knock=True):
        self.place(struct.pack("<3I", operation, sequence, plan) + zero.ljust(52, b"\0"))
        self.pushed += 1
        self.word(SUBMISSION + TAIL, self.pushed)
        if knock and self.word(SUBMISSION + FLAGS) & NEED_WAKEUP:
            self.knock()
        return sequence

    def knock(self):
        self.word(SUBMISSION + FLAGS, 0)
        self.session.send("KNOCK", sequence=0)

    def waiting(self):
        return (self.word(COMPLETION + TAIL) - self.popped) & 0xffffffff

    def pop(self):
        """The next completion, waited for."""
        eventually(self.waiting)
        at = ENTRIES_AT + (self.entries + self.popped % self.entries) * ENTRY
        sequence, code, receive, queue, kernel, tokens, failed = struct.unpack_from("<2I4QI", self.map, at)
        assert code == failed == 0 and self.map[at + 44:at + ENTRY] == bytes(20)
        self.popped += 1
        self.word(COMPLETION + HEAD, self.popped)
        return dict(sequence=sequence, receive_ns=receive, queue_ns=queue, kernel_ns=kernel, kv_tokens=tokens)


def ringed(worker, case=None, **named):
    session = worker.attach(rings=True, **named)
    case = (case or Case(B=3, pages=3)).register(session).plan(session)
    return session, Rings(session), case


class Neighbour:
    """Another client of the worker; its decodes must go on and be right."""
    def __init__(self, worker):
        self.session, self.rings, self.case = ringed(worker, Case(B=4, H=2, pages=4), uid=2000)
        self.case.block_table[:, 0] = [3, 1, 0, 2]
        self.number = 0

    def right(self, times=3):
        for _ in range(times):
            self.case.out[:] = 0
            self.number += 1
            self.rings.push(self.number)
            assert self.rings.pop()["sequence"] == self.number
            assert self.case.right()


@contextlib.contextmanager
def with_neighbour(**named):
    with start(**named) as worker:
        neighbour = Neighbour(worker)
        neighbour.right()
        yield worker, neighbour
        neighbour.right()
        assert worker.report()["sessions"] >= 1


def last_words(session, field, sequences=()):
    """The session must end with a sentence about that field; what else came before it answers `sequences`."""
    messages = [message for message in session.ended() if message[0] != "NEWS"]
    assert messages and messages[-1][:2] == ("ERROR", 0), messages
    body = messages[-1][2]
    assert (body["code"], body["field"]) == ("malformed", field) and len(body["message"]) > 10, body
    assert [message[1] for message in messages[:-1]] == list(sequences), messages


# Honest clients

def decodes_by_the_rings():
    with start() as worker:
        session, rings, case = ringed(worker, Case(B=5, H=3, pages=5))
        for i in range(2 * rings.entries if DEVICE == "cpu" else 20):  # around the ring, awake and asleep
            case.block_table[:, 0] = [(i + j) % 5 for j in range(5)]
            case.out[:] = 0
            rings.push(1000 + i)
            completion = rings.pop()
            assert (completion["sequence"], completion["kv_tokens"]) == (1000 + i, 5), completion
            assert completion["kernel_ns"] > 0 and case.right()
            if i % 50 == 0:
                eventually(lambda: rings.word(SUBMISSION + FLAGS) == NEED_WAKEUP)
        report = worker.report()
        assert report["decodes"] == report["latency"][0]["count"] == i + 1, report
        assert worker.control.ask("SESSIONS", dict(device=DEVICE))[2]["sessions"][0]["rings"] is True
        # Completions come by the ring however they were asked for, and wake who asks for it.
        rings.word(COMPLETION + FLAGS, NEED_WAKEUP)
        submit(session)
        assert session.receive()[:2] == ("NEWS", 0)
        assert rings.pop()["sequence"] == session.sequence
        assert rings.word(COMPLETION + FLAGS) == 0
        session.send("DECODE", dict(batch=case.batch))
        assert rings.pop()["sequence"] == session.sequence


def rings_are_made_only_for_who_asks():
    with start() as worker:
        before = worker.descriptors()
        plain = worker.attach()
        session, rings, _ = ringed(worker)
        listed = worker.control.ask("SESSIONS", dict(device=DEVICE))[2]["sessions"]
        assert [entry["rings"] for entry in listed] == [False, True]
        assert worker.descriptors() == before + 2, "the rings' memory needs no descriptor once it is mapped"
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        copy = worker.attach(rings=True).ring_memory
        assert fcntl.fcntl(copy, fcntl.F_GET_SEALS) == seals
        os.close(copy)
        Case().register(plain).plan(plain)
        done(plain, submit(plain))
        plain.send("KNOCK", sequence=0)     # there is nothing to knock for
        assert plain.ended()[-1][2]["code"] == "malformed"
        rings.push(1)
        rings.pop()


def failures_come_by_the_socket():
    with start() as worker:
        session, rings, case = ringed(worker)
        case.block_table[1, 0] = 77
        rings.push(5)
        body = done(session, 5)
        assert body["failed"] == 1 and body["failures"][0]["field"] == "block_table[1][0]", body
        case.block_table[1, 0] = 1
        rings.push(6)
        assert rings.pop()["sequence"] == 6 and rings.waiting() == 0
        session.ask("PLAN", dict(plan=2, batch=case.ragged()))
        case.cu_q[1] = 50
        rings.push(7, plan=2)
        expect("batch", "cu_q[1]", session.answer, 7)


def entries_come_before_datagrams():
    """A datagram that was sent after an entry was pushed is read after it: here the plan's end."""
    with start() as worker:
        session, rings, case = ringed(worker)
        for round in range(1, 200):
            rings.push(2 * round, knock=False)
            rings.push(2 * round + 1, knock=False)
            session.ask("DROP", dict(plan=1))
            assert [rings.pop()["sequence"] for _ in range(2)] == [2 * round, 2 * round + 1]
            case.plan(session)


def too_many_entries_are_busy():
    with start(max_in_flight=4) as worker:
        session, rings, case = ringed(worker, slow(0.5))
        for sequence in range(1, 11):
            rings.push(sequence)
        for sequence in range(5, 11):
            expect("busy", "", session.answer, sequence)
        assert [rings.pop()["sequence"] for _ in range(4)] == [1, 2, 3, 4]


def drained_device_refuses_entries():
    with start() as worker:
        session, rings, case = ringed(worker)
        worker.control.ask("DRAIN", dict(device=DEVICE))
        rings.push(1)
        expect("draining", "", session.answer, 1)
        worker.control.ask("DRAIN", dict(device=DEVICE, resume=True))
        rings.push(2)
        assert rings.pop()["sequence"] == 2
        worker.control.ask("EVICT", dict(device=DEVICE, session=session.id))
        assert session.ended()[-1][2]["code"] == "evicted"
        rings.push(3, knock=False)      # nobody minds


def ended_session_drops_what_it_pushed():
    with with_neighbour() as (worker, neighbour):
        session, rings, case = ringed(worker, slow(1.0))
        for sequence in range(1, 9):
            rings.push(sequence)
        eventually(lambda: worker.report()["running"] == 1)
        session.close()
        eventually(lambda: worker.report()["sessions"] == 1)
        neighbour.right(1)
        eventually(lambda: worker.report()["sessions_draining"] == 0)


def dead_ring_clients_leave_nothing():
    with start() as worker:
        neighbour = Neighbour(worker)
        neighbour.right()
        mappings = lambda: open(f"/proc/{worker.process.pid}/maps").read().count("mlad-rings")
        descriptors = worker.descriptors()
        assert mappings() == 1
        for i in range(40):
            session, rings, _ = ringed(worker)
            for sequence in range(1, 1 + i % 20):
                rings.push(sequence, knock=i % 2)
            session.close()
        neighbour.right()
        eventually(lambda: worker.descriptors() == descriptors)
        assert mappings() == 1


# Others

def bad_entries_are_refused_by_sequence():
    with with_neighbour() as (worker, neighbour):
        session, rings, case = ringed(worker)
        expect("invalid", "submission.operation", session.answer, rings.push(3, operation=0))
        expect("invalid", "submission.operation", session.answer, rings.push(4, operation=3))
        expect("invalid", "submission.operation", session.answer, rings.push(4, operation=0xffffffff))
        expect("invalid", "submission.round", session.answer, rings.push(5, zero=b"\1"))
        for operation in 1, 2:
            for at in range(4, 52, 4):
                expect("invalid", "submission.zero", session.answer,
                       rings.push(5, operation=operation, zero=bytes(at) + b"\1"))
        for step in 0, 1, 0xffffffff:   # of which there are none here; 1 is a plan
            expect("not_found", "step", session.answer, rings.push(6, step, operation=2, zero=b"\1"))
        expect("not_found", "plan", session.answer, rings.push(6, plan=2))
        expect("not_found", "plan", session.answer, rings.push(7, plan=0))
        rings.push(8)
        assert rings.pop()["sequence"] == 8 and case.right()
        rings.push(0)
        last_words(session, "submission.sequence")


def nonsense_ends_only_its_session():
    def tail(value):
        def spoil(session, rings):
            rings.word(SUBMISSION + TAIL, value)
            rings.knock()
            last_words(session, "submission.tail")
        return spoil

    def run_back(session, rings):
        rings.push(1)
        rings.pop()
        rings.word(SUBMISSION + TAIL, 0)
        rings.knock()
        last_words(session, "submission.tail")

    def take_what_was_not_there(value):
        def spoil(session, rings):
            rings.word(COMPLETION + HEAD, value)
            rings.push(1)
            kind, sequence, body = session.receive()    # by the socket, since the ring cannot be trusted
            assert (kind, sequence) == ("DONE", 1)
            last_words(session, "completion.head")
        return spoil

    def scribble(session, rings):
        """All of the memory at random, again and again; what comes of it is this session's alone."""
        noise, end = random.Random(7), time.monotonic() + 1
        while time.monotonic() < end:
            at = noise.randrange(rings.bytes // 4) * 4
            try:
                rings.map[at:at + 4] = noise.randbytes(4)
                session.send("KNOCK", sequence=0)
            except OSError:
                break

    def garbage_flags(session, rings):
        for flags in (0xffffffff, 0xfffffffe, 0x80000000, 0):
            rings.word(SUBMISSION + FLAGS, flags)
            rings.word(COMPLETION + FLAGS, flags)
            session.send("KNOCK", sequence=0)
            rings.push(9, knock=False)
            rings.pop()

    def stale_entries(session, rings):
        """A tail that is ahead, but within the ring: entries that nobody wrote."""
        rings.word(SUBMISSION + TAIL, rings.entries)
        rings.knock()
        last_words(session, "submission.sequence")

    with with_neighbour() as (worker, neighbour):
        spoilers = [tail(0xffffffff), tail(0x80000000), run_back, take_what_was_not_there(1),
                    take_what_was_not_there(0x80000000), scribble, garbage_flags, stale_entries]
        dropped = worker.report()["dropped"]
        for spoil in spoilers:
            session, rings, _ = ringed(worker)
            spoil(session, rings)
            neighbour.right()
            session.close()
        assert worker.report()["dropped"] >= dropped + 6


def completions_are_not_lost_when_the_ring_is_full():
    with with_neighbour() as (worker, neighbour):
        session, rings, _ = ringed(worker)
        total = rings.entries + 20
        for sequence in range(1, total + 1):    # one at a time, none of them taken
            rings.push(sequence)
            if sequence > rings.entries:
                done(session, sequence)
            else:
                eventually(lambda: rings.waiting() == sequence)
            if sequence % 64 == 0:
                neighbour.right(1)
        assert [rings.pop()["sequence"] for _ in range(rings.entries)] == list(range(1, rings.entries + 1))
        rings.push(5000)
        assert rings.pop()["sequence"] == 5000


def knocking_is_harmless():
    with with_neighbour() as (worker, neighbour):
        session, rings, _ = ringed(worker)
        for _ in range(2000):
            session.send("KNOCK", sequence=0)
        rings.push(1)
        assert rings.pop()["sequence"] == 1
        session.send("KNOCK", dict(plan=1), sequence=0)
        assert session.ended()[-1][:2] == ("ERROR", 0)


def rewritten_entries_are_read_once():
    """Entries that change while they are read: each is judged by what was copied, and so is run or refused."""
    with with_neighbour() as (worker, neighbour):
        session, rings, case = ringed(worker)
        stop = threading.Event()
        good, bad = struct.pack("<3I", 1, 1, 1).ljust(ENTRY, b"\0"), struct.pack("<3I", 9, 1, 9).ljust(ENTRY, b"\1")
        arm = struct.pack("<4I", 2, 1, 1, 9).ljust(ENTRY, b"\0")

        def rewrite():
            while not stop.is_set():
                for entry in (good, bad, arm):
                    for index in (rings.pushed - 1, rings.pushed):
                        rings.place(entry, index)
        thread = threading.Thread(target=rewrite)
        thread.start()
        try:
            end = time.monotonic() + 2
            while time.monotonic() < end:
                rings.push(1)
                session.sock.settimeout(0.001)
                try:
                    while True:
                        kind, sequence, body = session.receive()
                        assert kind in ("ERROR", "NEWS") and (kind == "NEWS" or body["code"] in (
                            "invalid", "not_found", "malformed", "busy")), (kind, sequence, body)
                except TimeoutError:
                    pass
                session.sock.settimeout(PATIENCE)
                rings.popped = rings.word(COMPLETION + TAIL)
                rings.word(COMPLETION + HEAD, rings.popped)
        finally:
            stop.set()
            thread.join()
        neighbour.right()


run(globals())
