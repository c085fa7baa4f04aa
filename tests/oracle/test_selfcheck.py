"""The oracle checked without a daemon: its formats exhaustively, its arithmetic on cases done by hand."""
import itertools
import math
import tempfile
import unittest
from fractions import Fraction
from pathlib import Path

import numpy as np

import cases
import floats
import oracle
import safetensors_io
from cases import Spec
from floats import BF16, E4M3, FP16
from safetensors_io import Tensor, tensor


def nearest(values, x):
    """The one of the sorted finite values nearest to x, found by looking at all; a tie goes to the even index."""
    distances = [abs(Fraction(float(v)) - Fraction(float(x))) for v in values]
    least = min(distances)
    candidates = [i for i, d in enumerate(distances) if d == least]
    return values[min(candidates, key=lambda i: i % 2)]


class Formats(unittest.TestCase):
    def test_every_value_survives_its_own_format(self):
        for fmt, count in ((BF16, 1 << 16), (FP16, 1 << 16), (E4M3, 256)):
            bits = np.arange(count).astype(fmt.bits)
            values = floats.decode(fmt, bits)
            finite = np.isfinite(values)
            np.testing.assert_array_equal(floats.round_to(fmt, values[finite]), values[finite])
            np.testing.assert_array_equal(floats.encode(fmt, values[finite]), bits[finite])

    def test_known_e4m3_values(self):
        known = {0x00: 0.0, 0x01: 2.0**-9, 0x07: 7 * 2.0**-9, 0x08: 2.0**-6, 0x38: 1.0, 0x3c: 1.5, 0x7e: 448.0,
                 0xb8: -1.0}
        for byte, value in known.items():
            self.assertEqual(floats.decode(E4M3, np.uint8([byte]))[0], value)
        self.assertTrue(np.isnan(floats.decode(E4M3, np.uint8([0x7f, 0xff]))).all())

    def test_e4m3_rounds_to_nearest_even_and_saturates(self):
        values = list(floats.decode(E4M3, np.arange(0x7f).astype(np.uint8)))
        between = [(a + b) / 2 for a, b in itertools.pairwise(values)]
        nudged = [m * (1 + s * 2.0**-40) for m in between for s in (-1, 1)]
        for x in between + nudged + [300.1, 1e-9, 448.0]:
            self.assertEqual(floats.round_to(E4M3, x), nearest(values, x), x)
            self.assertEqual(floats.round_to(E4M3, -x), -nearest(values, x), x)
        self.assertEqual(floats.round_to(E4M3, 1e6), 448.0)
        self.assertTrue(np.isnan(floats.round_to(E4M3, np.inf)))

    def test_fp16_rounds_as_numpy_does(self):
        rng = np.random.default_rng(1)
        x = rng.standard_normal(200000) * np.exp2(rng.uniform(-30, 17, 200000))
        with np.errstate(over="ignore"):
            np.testing.assert_array_equal(floats.encode(FP16, x), x.astype(np.float16).view(np.uint16))

    def test_bf16_rounds_to_nearest_even(self):
        for x, want in ((1 + 2**-8, 1.0), (1 + 3 * 2**-8, 1 + 2**-6), (1 + 2**-8 + 2**-40, 1 + 2**-7), (1e39, np.inf),
                        (2.0**-133, 2.0**-133), (2.0**-134, 0.0), (-3 * 2.0**-134, -2.0**-132)):
            self.assertEqual(floats.round_to(BF16, x), want, x)


class Files(unittest.TestCase):
    def test_a_file_reads_back_at_any_alignment(self):
        for skew in range(8):
            with tempfile.TemporaryDirectory() as folder:
                capture = cases.build(Spec("io", "bf16/656", mask="tree"))
                path = Path(folder, "capture.safetensors")
                safetensors_io.write(path, capture.tensors, capture.metadata, skew)
                tensors, metadata = safetensors_io.read(path)
                self.assertEqual(metadata, capture.metadata)
                self.assertEqual(int.from_bytes(path.read_bytes()[:8], "little") % 8, skew)
                for name, (dtype, data) in capture.tensors.items():
                    self.assertEqual(tensors[name].dtype, dtype)
                    np.testing.assert_array_equal(tensors[name].data, data)


def seen(q, G, mask, bits=None, window=None, world=1, rank=0, interleave=1):
    table = oracle.visibility(q, G, mask, bits, window, world, rank, interleave)
    return ["".join("x" if cell else "." for cell in row) for row in table]


class Visibility(unittest.TestCase):
    """Drawn by hand from the contract."""

    def test_causal(self):
        self.assertEqual(seen(3, 5, "causal"), ["xxx..", "xxxx.", "xxxxx"])

    def test_causal_with_fewer_keys_than_tokens(self):
        self.assertEqual(seen(4, 2, "causal"), ["..", "..", "x.", "xx"])

    def test_none(self):
        self.assertEqual(seen(2, 3, "none"), ["xxx", "xxx"])

    def test_tree(self):
        self.assertEqual(seen(3, 5, "tree", (0b001, 0b011, 0b101)), ["xxx..", "xxxx.", "xxx.x"])

    def test_tree_bits_beyond_q_are_ignored(self):
        self.assertEqual(seen(2, 4, "tree", (0b11111101, 0b10)), ["xxx.", "xx.x"])

    def test_tree_with_fewer_keys_than_tokens(self):
        """Keys K-q+i are -1, 0 and 1 for i = 0, 1 and 2."""
        self.assertEqual(seen(3, 2, "tree", (0b001, 0b010, 0b110)), ["..", "x.", "xx"])

    def test_window(self):
        self.assertEqual(seen(2, 5, "causal", window=2), ["..xx.", "...xx"])
        self.assertEqual(seen(2, 5, "none", window=2), ["...xx", "...xx"])
        self.assertEqual(seen(2, 5, "tree", (0b01, 0b10), window=2), ["...x.", "....x"])

    def test_ranks_hold_interleaved_keys(self):
        held = [[oracle.global_index(c, 2, rank, 2) for c in range(oracle.local_count(7, 2, rank, 2))]
                for rank in (0, 1)]
        self.assertEqual(held, [[0, 1, 4, 5], [2, 3, 6]])
        self.assertEqual(seen(2, 7, "causal", None, None, 2, 1, 2), ["xx.", "xxx"])

    def test_every_key_lives_on_one_rank(self):
        for world, interleave, G in itertools.product((1, 2, 3, 4), (1, 2, 5), range(45)):
            held = [oracle.global_index(c, world, rank, interleave) for rank in range(world)
                    for c in range(oracle.local_count(G, world, rank, interleave))]
            self.assertEqual(sorted(held), list(range(G)))


def tiny(metadata=None, q_row=1.0, keys=(0.0, 1.0), mask="none", **tensors):
    """One token, one head; key j has its first value keys[j], and its values 1..511 equal to j + 1."""
    q = np.zeros((1, 1, 576))
    q[0, 0, 0] = q_row
    kv = np.zeros((1, len(keys), 576))
    for j, key in enumerate(keys):
        kv[0, j, 0], kv[0, j, 1:512] = key, j + 1
    kind = tensors.pop("kind", BF16)
    given = {"q": Tensor(kind.name, floats.encode(kind, q)), "kv": Tensor(kind.name, floats.encode(kind, kv)),
             "block_table": tensor("I32", [[0]]), "seqlens": tensor("I32", [len(keys)]), **tensors}
    return oracle.Batch(given, {"softmax_scale": "2.0", "mask": mask, **(metadata or {})})


class Arithmetic(unittest.TestCase):
    def test_two_keys_by_hand(self):
        """Scores 0 and 2: weights 1 and e^2."""
        result = oracle.decode_request(tiny(), 0)
        total = 1 + math.exp(2)
        self.assertAlmostEqual(result.lse[0, 0], math.log(total), 12)
        self.assertAlmostEqual(result.out[0, 0, 5], (1 + 2 * math.exp(2)) / total, 12)
        self.assertAlmostEqual(result.out[0, 0, 0], math.exp(2) / total, 12)

    def test_lse_in_base_2(self):
        result = oracle.decode_request(tiny({"lse_base": "2"}), 0)
        self.assertAlmostEqual(result.lse[0, 0], math.log2(1 + math.exp(2)), 12)

    def test_scales(self):
        scales = {"q_scale": tensor("F32", [0.5]), "k_scale": tensor("F32", [2.0])}
        scores = math.exp(2 * 0.5 * 2)
        result = oracle.decode_request(tiny(kind=E4M3, **scales), 0)
        self.assertAlmostEqual(result.out[0, 0, 9], 2.0 * (1 + 2 * scores) / (1 + scores), 12)  # v_scale = k_scale
        result = oracle.decode_request(tiny(kind=E4M3, v_scale=tensor("F32", [0.25]), **scales), 0)
        self.assertAlmostEqual(result.out[0, 0, 9], 0.25 * (1 + 2 * scores) / (1 + scores), 12)
        self.assertAlmostEqual(result.lse[0, 0], math.log(1 + scores), 12)

    def test_sink(self):
        """A sink of log 3 adds 3 to the sum, whatever softmax_scale is, on rank 0 only."""
        sink = tensor("F32", [math.log(3)])
        total = 4 + math.exp(2)
        result = oracle.decode_request(tiny(sink=sink), 0)
        self.assertAlmostEqual(result.lse[0, 0], math.log(total), 6)
        self.assertAlmostEqual(result.out[0, 0, 5], (1 + 2 * math.exp(2)) / total, 6)
        second = {"dcp_world": "2", "dcp_rank": "1"}
        batch = tiny(second, keys=(0.0,), sink=sink)
        batch.seqlens = np.int32([2])
        self.assertAlmostEqual(oracle.decode_request(batch, 0).lse[0, 0], 0.0, 12)

    def test_no_visible_key(self):
        for sink, base, want in ((None, "e", -math.inf), (2.0, "e", 2.0), (2.0, "2", 2.0 / math.log(2))):
            extra = {} if sink is None else {"sink": tensor("F32", [sink])}
            batch = tiny({"lse_base": base}, **extra)
            batch.seqlens = np.int32([0])
            result = oracle.decode_request(batch, 0)
            self.assertTrue(np.all(result.out == 0))
            self.assertAlmostEqual(result.lse[0, 0], want, 12) if sink else self.assertEqual(result.lse[0, 0], want)

    def test_656_byte_rows(self):
        row = np.zeros((1, 1, 656), np.uint8)
        row[0, 0, :512] = 0x38                                                     # 1.0
        row[0, 0, 512:528] = np.array([1, 2, 3, 4], "<f4").view(np.uint8)
        row[0, 0, 528:] = np.full(64, 0x4040, "<u2").view(np.uint8)                # 3.0
        batch = tiny(kv=Tensor("U8", row), seqlens=tensor("I32", [1]))
        np.testing.assert_array_equal(batch.key(0, 0)[[0, 127, 128, 511, 512, 575]], [1, 1, 2, 4, 3, 3])
        np.testing.assert_array_equal(oracle.decode_request(batch, 0).out[0, 0, ::128], [1, 2, 3, 4])

    def test_requests_that_must_fail(self):
        for name, value, why in (("block_table", [[1]], "page id 1"), ("block_table", [[-1]], "page id -1"),
                                 ("seqlens", [-1], "negative"), ("seqlens", [3], "table")):
            batch = tiny(**{name: tensor("I32", value)})
            self.assertIn(why, oracle.decode_request(batch, 0).failure)

    def test_an_unneeded_page_may_be_any_id(self):
        batch = tiny({"window": "1"}, keys=(0.0,))
        batch.block_table, batch.seqlens = np.int32([[-5, 0]]), np.int32([2])
        self.assertIsNone(oracle.decode_request(batch, 0).failure)


class Identities(unittest.TestCase):
    def test_causal_is_the_tree_of_lower_triangular_bits(self):
        for q, k in ((1, 5), (4, 20), (8, 3), (64, 70)):
            causal = cases.build(Spec("identity", q=(q,), k=(k,), poison=False))
            tree = dict(causal.tensors, tree_mask=tensor("U64", [(2 << t) - 1 for t in range(q)]))
            a = oracle.decode(causal.batch())[0]
            b = oracle.decode(oracle.Batch(tree, dict(causal.metadata, mask="tree")))[0]
            np.testing.assert_array_equal(a.out, b.out)
            np.testing.assert_array_equal(a.lse, b.lse)

    def test_merged_ranks_equal_the_undivided_result(self):
        """Merging is sum_r exp(lse_r - lse) out_r: what a framework does with the partial results."""
        for mask, window, world, interleave in itertools.product(cases.MASKS, (None, 7), (2, 3), (1, 4)):
            spec = Spec("merge", q=(3, 4), k=(45, 2), page=1, mask=mask, window=window, sink="normal", poison=False)
            whole = cases.build(spec)
            parts = []
            for rank in range(world):
                columns = [[oracle.global_index(c, world, rank, interleave) for c in
                            range(oracle.local_count(45, world, rank, interleave))]] * 2
                table = np.array([[row[g] for g in held] for row, held in
                                  zip(whole.tensors["block_table"].data, columns)], np.int32)
                metadata = dict(whole.metadata, dcp_world=str(world), dcp_rank=str(rank),
                                dcp_interleave=str(interleave))
                parts.append(oracle.decode(oracle.Batch(dict(whole.tensors, block_table=Tensor("I32", table)),
                                                        metadata)))
            for b, want in enumerate(oracle.decode(whole.batch())):
                lse = np.logaddexp.reduce([part[b].lse for part in parts])
                out = sum(np.exp(part[b].lse - lse)[..., None] * part[b].out for part in parts)
                np.testing.assert_allclose(lse, want.lse, rtol=1e-12)
                np.testing.assert_allclose(out, want.out, rtol=1e-9, atol=1e-12)

    def test_poison_is_everywhere_and_never_reached(self):
        """The generated files do hold poison, and the exact result of each is finite."""
        for kind in cases.KINDS:
            batch = cases.build(Spec("poison", kind, q=(4, 4), k=(20, 33), window=6)).batch()
            rows = np.array([[batch.key(page, slot) for slot in range(batch.page_size)] for page in range(batch.pages)])
            self.assertGreater(np.sum(~np.isfinite(rows).all(axis=2)), 20)
            for result in oracle.decode(batch):
                self.assertTrue(result.failure is None and not result.tainted and np.isfinite(result.out).all())


class Judgement(unittest.TestCase):
    def test_the_bar_is_where_the_contract_says(self):
        """The dB of the model on N(0,1) inputs, as the contract states them: 53.8..55.4, 72, 37."""
        for kind, low, high in (("bf16", 53.2, 55.4), ("fp16", 71.0, 73.3), ("fp8", 35.5, 39.5)):
            spec = Spec("bar", kind, 16, q=(4, 4), k=(256, 2048), page=64, softmax_scale=192**-0.5)
            batch = cases.build(spec).batch()
            for result in oracle.decode(batch):
                self.assertTrue(low <= result.bar + oracle.SLACK_DB[batch.q_type] <= high, (kind, result.bar))

    def test_verdicts(self):
        batch = cases.build(Spec("verdict")).batch()
        expected = oracle.decode(batch)
        want = expected[0]

        def judge(out, lse):
            return oracle.compare(batch, expected, {"out": Tensor("BF16", floats.encode(BF16, out)),
                                                    "lse": tensor("F32", lse)})[0].problem

        self.assertIsNone(judge(want.out, want.lse))
        self.assertIsNone(judge(want.model, want.lse))
        self.assertIn("dB", judge(want.out * 1.01, want.lse))
        self.assertIn("dB", judge(np.where(want.out == want.out.max(), np.nan, want.out), want.lse))
        self.assertIn("lse", judge(want.out, want.lse + 1e-3))
        self.assertIn("lse", judge(want.out, want.lse * np.nan))
        short = {"out": tensor("BF16", np.zeros((4, 3, 511))), "lse": tensor("F32", want.lse)}
        self.assertIn("out is", oracle.compare(batch, expected, short)[0].problem)

    def test_nothing_visible_must_be_exactly_zero(self):
        batch = cases.build(Spec("nothing", k=(0,))).batch()
        expected = oracle.decode(batch)
        out, lse = np.zeros((4, 3, 512), np.uint16), np.full((4, 3), -np.inf)
        result = {"out": Tensor("BF16", out), "lse": tensor("F32", lse)}
        self.assertIsNone(oracle.compare(batch, expected, result)[0].problem)
        out[3, 2, 511] = 1
        self.assertIsNotNone(oracle.compare(batch, expected, result)[0].problem)


if __name__ == "__main__":
    unittest.main()
