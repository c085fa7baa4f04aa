"""The oracle must be able to fail: break one thing in what mlactl is handed, compare with the unbroken batch.

Contexts are short, since a wrong mask nearly vanishes among many keys. Every row of the table is one thing broken
for one element type; the comparison must object to each, and to none of the unbroken captures.
"""
import dataclasses
import unittest

import numpy as np

import cases
import oracle
from cases import Capture, Spec
from daemon import Daemon, decode_all
from safetensors_io import Tensor


def base(kind, name, **changes):
    """Four requests of short context, nothing poisoned: a bound that is off by one meets an ordinary key."""
    spec = Spec(name, kind, 4, q=(4, 3, 4, 2), k=(20, 7, 40, 33), page=8, poison=False, extra_columns=2, explicit=True,
                scales=cases.KINDS[kind][2])
    return cases.build(dataclasses.replace(spec, **changes))


def metadata(**changes):
    def broken(capture):
        return Capture(capture.name, capture.tensors, {**capture.metadata, **changes}, capture.skew)
    return broken


def changed(name, change):
    """The capture with a copy of one tensor changed in place."""
    def broken(capture):
        old = capture.tensors[name]
        data = old.data.copy()
        change(data)
        return Capture(capture.name, {**capture.tensors, name: Tensor(old.dtype, data)}, capture.metadata, capture.skew)
    return broken


def without(name):
    return lambda capture: Capture(capture.name, {k: v for k, v in capture.tensors.items() if k != name},
                                   capture.metadata)


def times(factor):
    def change(data):
        data *= np.asarray(factor, data.dtype)
    return change


def plus(cell, amount):
    def change(data):
        data[cell] += amount
    return change


def flip(cell, bit):
    def change(data):
        data[cell] ^= data.dtype.type(bit)
    return change


def swap(a, b):
    def change(data):
        data[a], data[b] = data[b].copy(), data[a].copy()
    return change


def flip_needed_tree_bit(data):
    data[0] ^= np.uint64(1 << 2)


WINDOW, SINK, DCP = {"window": 5}, {"sink": "normal"}, {"dcp": (2, 0, 2)}
EVERY_KIND = (
    # what is broken, the unbroken capture, how
    ("mask causal -> none", {}, metadata(mask="none")),
    ("mask none -> causal", {"mask": "none"}, metadata(mask="causal")),
    ("mask tree -> causal", {"mask": "tree"}, lambda c: metadata(mask="causal")(without("tree_mask")(c))),
    ("mask tree -> none", {"mask": "tree"}, lambda c: metadata(mask="none")(without("tree_mask")(c))),
    ("one tree bit flipped", {"mask": "tree"}, changed("tree_mask", flip_needed_tree_bit)),
    ("one length + 1", {}, changed("seqlens", plus(2, 1))),
    ("one length - 1", {}, changed("seqlens", plus(2, -1))),
    ("one length + 1, no mask", {"mask": "none"}, changed("seqlens", plus(2, 1))),
    ("two page ids swapped", {"mask": "none"}, changed("block_table", swap((2, 0), (1, 0)))),
    ("a page id of another request", {}, changed("block_table", lambda d: d.__setitem__((2, 1), d[0, 1]))),
    ("softmax_scale x 1.02", {}, metadata(softmax_scale=repr(0.0417 * 1.02))),
    ("LSE base e -> 2", {}, metadata(lse_base="2")),
    ("LSE base 2 -> e", {"base2": True}, metadata(lse_base="e")),
    ("window + 1", WINDOW, metadata(window="6")),
    ("window - 1", WINDOW, metadata(window="4")),
    ("window dropped", WINDOW, metadata(window="none")),
    ("window + 1, tree", {**WINDOW, "mask": "tree"}, metadata(window="6")),
    ("sink dropped", SINK, without("sink")),
    ("sink in base 2 units", SINK, changed("sink", times(np.log2(np.e)))),
    ("sink times softmax_scale", SINK, changed("sink", times(0.0417))),
    ("sink of another rank", {**SINK, **DCP, "k": (16, 8, 32, 28), "mask": "none"}, metadata(dcp_rank="1")),
    ("dcp_rank", DCP, metadata(dcp_rank="1")),
    ("dcp_world", {"dcp": (3, 0, 1)}, metadata(dcp_world="2")),
    ("dcp_interleave", DCP, metadata(dcp_interleave="1")),
    ("cu_q shifted by one", {}, changed("cu_q", plus(2, -1))),
    ("cu_q dropped", {"q": (4, 4, 2, 2)}, without("cu_q")),
    ("two query tokens swapped", {}, changed("q", swap(1, 2))),
    ("two heads swapped", {}, changed("q", swap((0, 1), (0, 2)))),
)
SOME_KINDS = (
    ("q_scale x 1.02", ("fp8",), {}, changed("q_scale", times(1.02))),
    ("k_scale x 1.02", ("fp8", "bf16/fp8"), {}, changed("k_scale", times(1.02))),
    ("v_scale x 1.05", ("fp8", "bf16/fp8"), {}, changed("v_scale", times(1.05))),
    ("v_scale dropped", ("fp8", "bf16/fp8"), {}, without("v_scale")),
    ("q_scale dropped", ("fp8",), {}, without("q_scale")),
    ("k_scale dropped", ("fp8", "bf16/fp8"), {}, without("k_scale")),
    ("k_scale serves v, but v_scale is given", ("fp8", "bf16/fp8"), {},
     lambda c: Capture(c.name, {**c.tensors, "v_scale": c.tensors["k_scale"]}, c.metadata)),
    ("out_dtype bf16 -> fp16", ("fp8",), {}, metadata(out_dtype="fp16")),
    ("the first group's scale of every row x 1.05", ("bf16/656",), {},
     changed("kv", lambda d: times(1.05)(d[..., 512:516].view("<f4")))),
    ("two groups' scales swapped", ("bf16/656",), {}, changed("kv", lambda d: swap((..., slice(512, 516)),
                                                                                  (..., slice(524, 528)))(d))),
    ("the sign of one rope value", ("bf16/656",), {}, changed("kv", flip((..., 657 - 2), 0x80))),
    ("one bit of one seen key", ("bf16", "fp16"), {}, None),
)


def flip_one_key(capture):
    batch = capture.batch()
    return changed("kv", flip((batch.block_table[2, 1], 3, 100), 0x8000))(capture)


class Power(unittest.TestCase):
    def test_each_broken_thing_is_flagged(self):
        rows = [(what, kind, changes, how) for what, changes, how in EVERY_KIND for kind in cases.KINDS]
        rows += [(what, kind, changes, how or flip_one_key) for what, kinds, changes, how in SOME_KINDS
                 for kind in kinds]
        unbroken, broken, names = [], [], []
        for what, kind, changes, how in rows:
            capture = base(kind, f"{what} {kind}", **changes)
            unbroken.append(capture)
            broken.append(how(capture))
            names.append((what, kind))
        missed, objected = [], []
        daemon = Daemon()
        self.addCleanup(daemon.stop)
        sound = list(decode_all(unbroken, [(daemon, "cpu")]))
        replies = list(decode_all(broken, [(daemon, "cpu")]))
        print(f"\n{'broken on purpose':<46}{'types':<10}what the comparison said")
        for (what, kind), capture, (_, _, right), (_, _, wrong) in zip(names, unbroken, sound, replies):
            batch = capture.batch()
            want = oracle.decode(batch)
            self.assertEqual((right.status, wrong.status), (0, 0), f"{what}: {right.text}{wrong.text}")
            objected += [f"{what} ({kind}) unbroken: {v.problem}" for v in oracle.compare(batch, want, right.tensors)
                         if v.problem]
            said = [v for v in oracle.compare(batch, want, wrong.tensors) if v.problem]
            print(f"{what:<46}{kind:<10}{said[0].problem if said else 'NOTHING'}")
            if not said:
                missed.append(f"{what} ({kind})")
        print(f"{len(rows)} captures broken, {len(rows) - len(missed)} flagged", flush=True)
        self.assertFalse(objected, "\n" + "\n".join(objected))
        self.assertFalse(missed, "\nnot flagged: " + "; ".join(missed))


if __name__ == "__main__":
    unittest.main()
