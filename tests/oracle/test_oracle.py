"""Every generated capture, decoded by mlactl on cpu (each variant that runs here) and on reference, against the oracle.

ORACLE_RANDOM sets how many random captures follow the grid, ORACLE_ONLY picks captures whose name holds that text.
"""
import itertools
import os
import sys
import unittest
from collections import defaultdict
from pathlib import Path

import numpy as np

import cases
import floats
import oracle
import safetensors_io
from cases import Capture, Spec
from daemon import DEVICES, VARIANTS, Absent, Daemon, decode_all
from safetensors_io import Tensor, tensor

RANDOM = int(os.environ.get("ORACLE_RANDOM", "90"))
ONLY = os.environ.get("ORACLE_ONLY", "")
DATA = Path(__file__).resolve().parent.parent / "data"
SHOWN = 12    # failures printed in full
PARTLY = 2    # mlactl decode: written, but some requests failed


class OnDaemon(unittest.TestCase):
    """A daemon for each class of tests."""

    @classmethod
    def setUpClass(cls):
        cls.daemon = Daemon()
        cls.targets = [(cls.daemon, device) for device in DEVICES]

    @classmethod
    def tearDownClass(cls):
        cls.daemon.stop()


class Margins:
    """The worst margin of each device, element type and mask."""

    def __init__(self):
        self.rows = defaultdict(lambda: [0, np.inf, 0.0])

    def add(self, key, verdict):
        row = self.rows[key]
        row[0] += 1
        if np.isfinite(verdict.bar):
            row[1] = min(row[1], verdict.snr - verdict.bar)
        row[2] = max(row[2], verdict.lse_error)

    def print(self):
        print(f"\n{'device':<13}{'types':<10}{'mask':<8}{'requests':>9}{'worst dB over the bar':>24}"
              f"{'worst LSE, of allowed':>24}")
        for key, (count, margin, lse) in sorted(self.rows.items()):
            print("{:<13}{:<10}{:<8}".format(*key) + f"{count:>9}{margin:>24.2f}{lse:>24.3f}")
        sys.stdout.flush()


class Decodes(unittest.TestCase):
    """The cpu device once for each of its variants; which one is the default is a matter of speed, not of meaning."""

    @classmethod
    def setUpClass(cls):
        cls.variants, absent = {}, []
        for variant in VARIANTS:
            try:
                cls.variants[variant] = Daemon(variant)
            except Absent:
                absent.append(variant)
        print(f"\ncpu variants tested: {', '.join(cls.variants)}; absent on this processor: "
              f"{', '.join(absent) or 'none'}")

    @classmethod
    def tearDownClass(cls):
        for daemon in cls.variants.values():
            daemon.stop()

    def test_every_field_edge_and_type(self):
        specs = [spec for spec in cases.all_specs(RANDOM) if ONLY in spec.name]
        kinds = {spec.name: (spec.kind, spec.mask) for spec in specs}
        self.assertEqual(len(kinds), len(specs), "two captures have one name")
        targets = [(daemon, "cpu") for daemon in self.variants.values()] + [(self.variants["generic"], "reference")]
        labels = [f"cpu {variant}" for variant in self.variants] + ["reference"]
        margins, problems, expected = Margins(), [], {}

        def captures():
            for spec in specs:
                capture = cases.build(spec)
                expected[capture.name] = (capture.batch(), oracle.decode(capture.batch()))
                yield capture

        replies = decode_all(captures(), targets)
        for (capture, _, reply), label in zip(replies, itertools.cycle(labels)):
            batch, want = expected[capture.name]
            if reply.status != 0 or reply.tensors is None:
                problems.append(f"{capture.name} on {label}: mlactl ended with {reply.status}: {reply.text}")
                continue
            for verdict in oracle.compare(batch, want, reply.tensors):
                if verdict.problem:
                    problems.append(f"{capture.name} on {label}, request {verdict.request}: {verdict.problem}")
                else:
                    margins.add((label, *kinds[capture.name]), verdict)
            if label == labels[-1]:
                del expected[capture.name]
        margins.print()
        print(f"{len(specs)} captures on {', '.join(labels)}: {len(problems)} problems")
        self.assertFalse(problems, "\n" + "\n".join(problems[:SHOWN]))


class Determinism(OnDaemon):
    def bits(self, capture, device):
        reply = self.daemon.decode(capture, device)
        self.assertEqual(reply.status, 0, reply.text)
        return reply.tensors["out"].data, reply.tensors["lse"].data.view(np.uint32)

    def test_batch_mates_do_not_change_a_request(self):
        for kind in cases.KINDS:
            spec = Spec(f"mates {kind}", kind, 6, q=(4, 1, 4, 3), k=(1500, 40, 513, 1024), page=64, deterministic=True)
            whole = cases.build(spec)
            for device in DEVICES:
                out, lse = self.bits(whole, device)
                first = 0
                for b, q in enumerate(spec.q):
                    alone = dict(whole.tensors)
                    for name, rows in (("q", slice(first, first + q)), ("block_table", slice(b, b + 1)),
                                       ("seqlens", slice(b, b + 1))):
                        alone[name] = Tensor(alone[name].dtype, alone[name].data[rows])
                    alone["cu_q"] = tensor("I32", [0, q])
                    own_out, own_lse = self.bits(Capture(f"alone {kind} {b}", alone, whole.metadata), device)
                    np.testing.assert_array_equal(own_out, out[first:first + q], f"{kind} request {b} on {device}")
                    np.testing.assert_array_equal(own_lse, lse[first:first + q], f"{kind} request {b} on {device}")
                    first += q

    def test_the_same_launch_gives_the_same_bits(self):
        for kind in cases.KINDS:
            capture = cases.build(Spec(f"again {kind}", kind, 6, q=(4, 2), k=(1500, 600), page=64))
            for device in DEVICES:
                once, twice = self.bits(capture, device), self.bits(capture, device)
                np.testing.assert_array_equal(once[0], twice[0])
                np.testing.assert_array_equal(once[1], twice[1])


class Failures(OnDaemon):
    """A request that cannot be served fails alone; a descriptor that the contract does not allow is refused."""

    def broken(self, name, kind="bf16", dcp=(1, 0, 1), window=None, **changes):
        """A batch of four requests with request 1 broken: changes gives cells of an array by name."""
        spec = Spec(name, kind, 4, q=(4, 2, 4, 3), k=(70, 90, 33, 64), page=16, dcp=dcp, window=window, sink="normal")
        capture = cases.build(spec)
        for array, (cell, value) in changes.items():
            capture.tensors[array].data[cell] = value
        return capture

    def test_a_bad_request_fails_alone(self):
        table = lambda column, value: {"block_table": ((1, column), value)}
        length = lambda value: {"seqlens": (1, value)}
        captures = []
        for kind in cases.KINDS:
            captures += [self.broken(f"page far out {kind}", kind, **table(2, 1 << 24)),
                         self.broken(f"page one out {kind}", kind, **table(5, 21)),
                         self.broken(f"page negative {kind}", kind, **table(0, -1)),
                         self.broken(f"page least {kind}", kind, **table(1, -2**31)),
                         self.broken(f"length negative {kind}", kind, **length(-1)),
                         self.broken(f"length least {kind}", kind, **length(-2**31)),
                         self.broken(f"length beyond the table by one {kind}", kind, **length(6 * 16 + 1)),
                         self.broken(f"length largest {kind}", kind, **length(2**31 - 1)),
                         self.broken(f"length beyond under DCP {kind}", kind, (2, 1, 3), **length(2 * 3 * 16 + 4))]
        captures.append(self.broken("page in the window", window=20, **table(5, 99)))
        problems = []
        for capture, device, reply in decode_all(captures, self.targets):
            batch = capture.batch()
            want = oracle.decode(batch)
            self.assertEqual([b for b, result in enumerate(want) if result.failure], [1], capture.name)
            field = "block_table" if "page" in capture.name else "seqlens"
            if [f["request"] for f in reply.failures] != [1] or field not in reply.failures[0]["field"]:
                problems.append(f"{capture.name} on {device}: not request 1's {field} reported but {reply.failures}")
            if reply.status != PARTLY:
                problems.append(f"{capture.name} on {device}: mlactl ended with {reply.status}: {reply.text}")
            elif reply.tensors is None:
                problems.append(f"{capture.name} on {device}: no result file: {reply.text}")
            else:
                problems += [f"{capture.name} on {device}, request {v.request}: {v.problem}"
                             for v in oracle.compare(batch, want, reply.tensors) if v.problem]
        self.assertFalse(problems, "\n" + "\n".join(problems[:SHOWN]))

    def test_a_non_finite_key_stays_in_its_request(self):
        problems = []
        captures = []
        for kind in cases.KINDS:
            capture = cases.build(Spec(f"taint {kind}", kind, 4, q=(4, 2, 4), k=(40, 90, 33), page=16))
            batch = capture.batch()
            capture.tensors["kv"].data[batch.block_table[1, 2], 7] = 0x7fff if batch.kv.dtype == np.uint16 else 0x7f
            captures.append(capture)
        for capture, device, reply in decode_all(captures, self.targets):
            batch = capture.batch()
            want = oracle.decode(batch)
            self.assertEqual([result.tainted for result in want], [False, True, False])
            self.assertEqual(reply.status, 0, f"{capture.name} on {device}: {reply.text}")
            problems += [f"{capture.name} on {device}, request {v.request}: {v.problem}"
                         for v in oracle.compare(batch, want, reply.tensors) if v.problem]
        self.assertFalse(problems, "\n" + "\n".join(problems[:SHOWN]))

    def test_a_bad_cu_q_fails_the_batch(self):
        captures = []
        for name, values in (("start", (1, 6, 10, 13)), ("order", (0, 6, 5, 13)), ("end", (0, 6, 10, 14)),
                             ("negative", (0, -1, 10, 13)), ("step", (0, 65, 67, 70))):
            q = (6, 4, 3) if name != "step" else (64, 3, 3)
            capture = cases.build(Spec(f"cu_q {name}", heads=2, q=q, k=(20, 9, 30), ragged=True))
            capture.tensors["cu_q"] = tensor("I32", values)
            captures.append(capture)
        for capture, device, reply in decode_all(captures, self.targets):
            self.assertNotEqual(reply.status, 0, f"{capture.name} on {device}")
            self.assertIn("cu_q", reply.text, f"{capture.name} on {device}")

    def test_what_the_contract_refuses_is_refused(self):
        """(the field the message must name, kind, tensors put in or, where None, taken out, metadata likewise)"""
        one = tensor("F32", [0.5])
        rows = [("softmax_scale", "bf16", {}, {"softmax_scale": None}), ("q_scale", "bf16", {"q_scale": one}, {}),
                ("k_scale", "fp16", {"k_scale": one}, {}), ("v_scale", "bf16", {"v_scale": one}, {}),
                ("q_scale", "bf16/fp8", {"q_scale": one}, {}), ("q_scale", "bf16/656", {"q_scale": one}, {}),
                ("k_scale", "bf16/656", {"k_scale": one}, {}), ("v_scale", "bf16/656", {"v_scale": one}, {}),
                ("out_dtype", "bf16", {}, {"out_dtype": "fp16"}), ("out_dtype", "fp16", {}, {"out_dtype": "bf16"}),
                ("out_dtype", "bf16/fp8", {}, {"out_dtype": "fp16"}),
                ("out_dtype", "bf16/656", {}, {"out_dtype": "fp16"}),
                ("out_dtype", "bf16", {}, {"out_dtype": "fp32"}), ("mask", "bf16", {}, {"mask": "full"}),
                ("tree_mask", "bf16", {}, {"mask": "tree"}), ("lse_base", "bf16", {}, {"lse_base": "10"}),
                ("window", "bf16", {}, {"window": "0"}), ("window", "bf16", {}, {"window": "-3"}),
                ("dcp_rank", "bf16", {}, {"dcp_world": "2", "dcp_rank": "2"}),
                ("dcp_world", "bf16", {}, {"dcp_world": "0"}),
                ("dcp_interleave", "bf16", {}, {"dcp_interleave": "0"}),
                ("deterministic", "bf16", {}, {"deterministic": "yes"}),
                ("causal_mask", "bf16", {}, {"causal_mask": "1"}), ("scale", "bf16", {"scale": one}, {}),
                ("q", "bf16", {"q": None}, {}), ("kv", "bf16", {"kv": None}, {}),
                ("seqlens", "bf16", {"seqlens": None}, {}),
                ("block_table", "bf16", {"block_table": None}, {}),
                ("sink", "bf16", {"sink": tensor("F32", [0, 0])}, {}),
                ("seqlens", "bf16", {"seqlens": tensor("I32", [20, 20])}, {}),
                ("kv", "bf16", {"kv": Tensor("F16", np.zeros((4, 16, 576), np.uint16))}, {}),
                ("kv", "fp8", {"kv": Tensor("U8", np.zeros((4, 16, 656), np.uint8))}, {})]
        beyond = [("heads", Spec("129 heads", heads=129)), ("page", Spec("pages of 257", page=257)),
                  ("q_rows", Spec("65 query tokens", q=(65,), k=(70,))),
                  ("cu_q[1]", Spec("65 query tokens, ragged", q=(65, 1), k=(70, 3)))]
        captures = [cases.build(spec) for _, spec in beyond]
        fields = {spec.name: (field, spec.name) for field, spec in beyond}
        for i, (field, kind, tensors, metadata) in enumerate(rows):
            good = cases.build(Spec(f"refused {i}", kind))
            put = lambda given, changes: {k: v for k, v in {**given, **changes}.items() if v is not None}
            captures.append(Capture(good.name, put(good.tensors, tensors), put(good.metadata, metadata)))
            fields[good.name] = field, rows[i][1:]
        problems = []
        for capture, device, reply in decode_all(captures, self.targets):
            field, what = fields[capture.name]
            if reply.status == 0 or reply.tensors is not None:
                problems.append(f"{device}: accepted {what}")
            elif field not in reply.text:
                problems.append(f"{device}: does not name {field}: {reply.text}")
        self.assertFalse(problems, "\n" + "\n".join(problems[:SHOWN]))


class RealLayer(OnDaemon):
    def test_deepseek_v3_layer(self):
        """What the model itself computed, to 49 dB; and the oracle's own bar."""
        name = "deepseek-v3-layer"
        capture = Capture(name, *safetensors_io.read(DATA / f"{name}.safetensors"))
        model, _ = safetensors_io.read(DATA / f"{name}.expected.safetensors")
        attention, w_uv = (model[k].data.astype(np.float64) for k in ("attention", "w_uv"))
        batch = capture.batch()
        want = oracle.decode(batch)
        exact = np.einsum("hvl,thl->thv", w_uv, np.concatenate([result.out for result in want]))
        print(f"\nDeepSeek-V3 layer: the oracle {oracle.snr(attention, exact):.2f} dB of the model's own result",
              end="")
        self.assertGreater(oracle.snr(attention, exact), 54)
        for device in DEVICES:
            reply = self.daemon.decode(capture, device)
            self.assertEqual(reply.status, 0, reply.text)
            self.assertEqual([v.problem for v in oracle.compare(batch, want, reply.tensors)], [None] * batch.requests)
            out = floats.decode(batch.out_type, reply.tensors["out"].data)
            quality = oracle.snr(attention, np.einsum("hvl,thl->thv", w_uv, out))
            print(f", {device} {quality:.2f}", end="")
            self.assertGreaterEqual(quality, 49)
        print(" dB", flush=True)


if __name__ == "__main__":
    unittest.main()
