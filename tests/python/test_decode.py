"""Decodes through the package against the oracle: every type, every option, plans, and memory that outlives its
client."""
import gc
import os
import unittest

import numpy as np

import mlad
from batches import FORMATS, bits, rows656, verdict

SCALE = 0.05


def shared(client, values, dtype=None):
    array = client.empty(values.shape, values.dtype if dtype is None else dtype)
    array.view(values.dtype)[...] = values
    return array


class Decode(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.client = mlad.Client(device="cpu", name="test_decode")
        cls.addClassCleanup(cls.client.close)

    def setUp(self):
        self.rng = np.random.default_rng(1)

    def check(self, q_type="bf16", kv_type="bf16", out_type=None, q_len=4, heads=6, seqlens=(70, 3, 0), cu_q=None,
              page_size=16, extra=(), oracle=(), change=None, four=False):
        """Decode a random batch; `extra` goes to decode(), `oracle` states the same for the oracle."""
        extra, oracle = dict(extra), dict(oracle)
        requests, pages = len(seqlens), 16
        shape = (cu_q[-1], heads, 576) if cu_q is not None else (requests, q_len, heads, 576)
        q = shared(self.client, bits(q_type, self.rng.standard_normal(shape)), FORMATS[q_type][1])
        if kv_type == "656":
            raw = rows656(self.rng, pages, page_size)
            kv = shared(self.client, raw)
        else:
            raw = bits(kv_type, self.rng.standard_normal((pages, page_size, 576)))
            kv = shared(self.client, raw, FORMATS[kv_type][1])
        table = self.rng.permutation(pages).astype(np.int32)[:requests * 5].reshape(requests, 5)
        seqlens = np.array(seqlens, np.int32)
        if cu_q is not None:
            oracle["cu_q"] = extra["cu_q"] = np.array(cu_q, np.int32)
        out_type = out_type or ("fp16" if q_type == "fp16" else "bf16")
        out, lse = self.client.decode(q, kv[:, :, None] if four else kv, table, seqlens, softmax_scale=SCALE, **extra)
        self.assertEqual((out.shape, lse.shape), (shape[:-1] + (512,), shape[:-1]))
        self.assertEqual(out.dtype.metadata, FORMATS[out_type][1].metadata if out_type == "bf16" else None)
        self.assertIsNone(verdict(q, q_type, raw, kv_type, out, lse, out_type, table, seqlens, softmax_scale=SCALE,
        **oracle))

    def test_types(self):
        for q, kv in (("bf16", "bf16"), ("fp16", "fp16"), ("e4m3", "e4m3"), ("bf16", "e4m3"), ("bf16", "656")):
            with self.subTest(q=q, kv=kv):
                self.check(q, kv)

    def test_options(self):
        sink = self.rng.standard_normal(6).astype(np.float32)
        tree = self.rng.integers(0, 16, 12, np.uint64) | np.uint64(1)
        for name, extra, oracle in (
                ("none", {"mask": "none"}, {"mask": "none"}),
                ("tree", {"mask": tree}, {"mask": "tree", "tree_mask": tree}),
                ("tree by request", {"mask": tree.reshape(3, 4)}, {"mask": "tree", "tree_mask": tree}),
                ("window", {"window": 5}, {"window": 5}),
                ("base 2", {"lse_base": "2"}, {"lse_base": "2"}),
                ("sink", {"sink": sink}, {"sink": sink}),
                ("deterministic", {"deterministic": True}, {"deterministic": 1}),
                ("dcp", {"dcp": (2, 1, 4)}, {"dcp_world": 2, "dcp_rank": 1, "dcp_interleave": 4})):
            with self.subTest(name):
                self.check(extra=extra, oracle=oracle)
        self.check(cu_q=(0, 1, 6, 6))
        self.check(four=True)

    def test_scales(self):
        scales = {"q_scale": 0.5, "k_scale": 1.5, "v_scale": 0.25}
        self.check("e4m3", "e4m3", extra=scales, oracle=scales)
        arrays = {name: np.array([value], np.float32) for name, value in scales.items()}
        self.check("e4m3", "e4m3", extra=arrays, oracle=scales)

    def test_strides_of_pages_and_rows(self):
        raw = bits("fp16", self.rng.standard_normal((4, 16, 576)))
        wide = self.client.empty((6, 20, 640), np.float16)
        wide.view(np.uint16)[...] = 0x7e00      # NaN around what is used
        kv = wide[1:5, 2:18, 64:]
        kv.view(np.uint16)[...] = raw
        q = shared(self.client, bits("fp16", self.rng.standard_normal((1, 2, 3, 576))), np.float16)
        table, seqlens = np.array([[3, 0, 2]], np.int32), np.array([40], np.int32)
        out = self.client.empty((1, 2, 3, 512), np.float16)
        same, lse = self.client.decode(q, kv, table, seqlens, softmax_scale=SCALE, out=out)
        self.assertIs(same, out)
        self.assertIsNone(verdict(q, "fp16", raw, "fp16", out, lse, "fp16", table, seqlens, softmax_scale=SCALE))

    def test_a_plan_is_decoded_again_with_new_contents(self):
        q = self.client.empty((1, 2, 3, 576), np.float16)
        kv = shared(self.client, bits("fp16", self.rng.standard_normal((4, 16, 576))), np.float16)
        table = shared(self.client, np.array([[1, 2, 3]], np.int32))
        seqlens = self.client.empty(1, np.int32)
        with self.client.plan(q, kv, table, seqlens, softmax_scale=SCALE) as plan:
            for length in (5, 40):
                seqlens[0] = length
                q.view(np.uint16)[...] = bits("fp16", self.rng.standard_normal(q.shape))
                pending = plan.submit()
                result = pending.wait(30)
                self.assertTrue(pending.done())
                self.assertEqual((result.failed, result.kv_tokens), (0, length))
                self.assertIsNone(verdict(q, "fp16", kv, "fp16", plan.out, plan.lse, "fp16", table, seqlens,
                                          softmax_scale=SCALE))
            self.assertEqual(plan.decode(30).kv_tokens, 40)
        with self.assertRaises(mlad.InvalidArgument):
            plan.submit()

    def test_submissions_in_flight_and_dropped(self):
        q = self.client.empty((1, 1, 3, 576), np.float16)
        kv = self.client.empty((4, 16, 576), np.float16)
        q[...], kv[...] = 1, 1
        pending = [self.client.submit(q, kv, [[0, 1]], [20], softmax_scale=SCALE) for _ in range(8)]
        self.assertTrue(all(np.all(p.out == 1) for p in pending if p.wait(30)))
        self.client.submit(q, kv, [[0, 1]], [20], softmax_scale=SCALE)     # nobody collects it
        self.client.decode(q, kv, [[0, 1]], [20], softmax_scale=SCALE)
        self.client.empty(1, np.int32)
        self.assertEqual(len(self.client._orphans), 0)

    def test_equal_decodes_share_a_plan_and_memory_returns(self):
        q = self.client.empty((1, 1, 3, 576), np.float16)
        kv = self.client.empty((4, 16, 576), np.float16)
        q[...], kv[...] = 1, 1
        self.client.decode(q, kv, [[0, 1]], [20], softmax_scale=SCALE)
        gc.collect()
        self.client.empty(1, np.int32)
        plans, segments = len(self.client._plans), len(self.client._memory.segments)
        for length in range(1, 30):
            self.client.decode(q, kv, [[0, 1]], [length], softmax_scale=SCALE)
        self.assertLessEqual(len(self.client._plans), plans + 2)
        self.assertLessEqual(len(self.client._memory.segments), segments + 1)

    def test_plans_are_bounded(self):
        import mlad.client
        q = self.client.empty((1, 1, 1, 576), np.float16)
        kv = self.client.empty((1, 16, 576), np.float16)
        q[...], kv[...] = 1, 1
        for window in range(1, mlad.client.PLANS + 20):
            self.client.decode(q, kv, [[0]], [9], softmax_scale=SCALE, window=window)
        self.assertEqual(len(self.client._plans), mlad.client.PLANS)

    def test_arrays_outlive_the_client(self):
        with mlad.Client(device="cpu") as client:
            array = client.empty((1000,), "float32")
            array[...] = 7
            large = client.empty((300 << 20,), np.uint8)
            del large
            client.empty(1, np.uint8)
            self.assertTrue(all(s.size < 1 << 28 for s in client._memory.segments.values()))
        self.assertEqual(array.sum(), 7000)
        with self.assertRaises(mlad.InvalidArgument):
            client.empty(1, np.uint8)

    def test_identity(self):
        self.assertEqual(self.client.device, "cpu")
        self.assertEqual(self.client.placement, ("host", "the device is no GPU"))
        os.fstat(self.client.fileno())
        self.assertEqual(mlad.library_version(), "0.1.0")


if __name__ == "__main__":
    unittest.main()
