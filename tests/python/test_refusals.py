"""What cannot be honoured is refused by name, and what fails in the daemon arrives as the right exception."""
import os
import unittest

import numpy as np

import mlad

SCALE = 0.05


class Refusals(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.client = mlad.Client(device="cpu", name="test_refusals")
        cls.addClassCleanup(cls.client.close)

    def setUp(self):
        self.q = self.client.empty((2, 2, 3, 576), np.float16)
        self.kv = self.client.empty((4, 16, 576), np.float16)
        self.q[...], self.kv[...] = 1, 1

    def decode(self, **changes):
        given = {"q": self.q, "kv": self.kv, "block_table": [[0, 1], [2, 3]], "seqlens": [20, 30],
                 "softmax_scale": SCALE}
        return self.client.decode(**{**given, **changes})

    def refused(self, field, code="invalid", **changes):
        with self.assertRaises(mlad.InvalidArgument) as caught:
            self.decode(**changes)
        self.assertEqual((caught.exception.code, caught.exception.field), (code, field), caught.exception)
        self.assertIsInstance(caught.exception, ValueError)
        return caught.exception.message

    def test_negative_shapes(self):
        for shape in (-5, (2, -3), (2, 1.5)):
            with self.assertRaises(mlad.InvalidArgument) as caught:
                self.client.empty(shape, np.float16)
            self.assertEqual(caught.exception.field, "shape")

    def test_arguments(self):
        self.decode()
        for field, changes in (
                ("q", {"q": np.ones((2, 2, 3, 576), np.float16)}),
                ("kv", {"kv": np.ones((4, 16, 576), np.float16)}),
                ("q", {"q": self.q[:, :, :, :512]}),
                ("q", {"q": self.q[:, :, ::2]}),
                ("q", {"q": self.q.view(np.uint16)}),
                ("q", {"q": self.q.reshape(4, 3, 576)}),
                ("q", {"q": self.q, "cu_q": [0, 2, 4]}),
                ("q", {"q": "q"}),
                ("kv", {"kv": self.kv[:, :, :512]}),
                ("kv", {"kv": np.broadcast_to(self.kv[:1], (4, 16, 576))}),
                ("kv", {"kv": self.kv[::-1]}),
                ("block_table", {"block_table": np.zeros((2, 2), np.int64)}),
                ("block_table", {"block_table": [[0, 1]]}),
                ("seqlens", {"seqlens": np.zeros((2, 1), np.int32)}),
                ("seqlens", {"seqlens": [2**32 + 7, 30]}),
                ("seqlens", {"seqlens": [20.9, 30]}),
                ("seqlens", {"seqlens": [True, True]}),
                ("seqlens", {"seqlens": [[20], [30, 1]]}),
                ("block_table", {"block_table": [[0, 1.0], [2, 3]]}),
                ("softmax_scale", {"softmax_scale": None}),
                ("softmax_scale", {"softmax_scale": True}),
                ("deterministic", {"deterministic": "no"}),
                ("dcp", {"dcp": 3}),
                ("lse_base", {"lse_base": [1]}),
                ("mask", {"mask": "full"}),
                ("mask", {"mask": np.ones(4, bool)}),
                ("tree_mask", {"mask": np.ones(3, np.uint64)}),
                ("window", {"window": -1}),
                ("window", {"window": 1.5}),
                ("sink", {"sink": np.ones(2, np.float32)}),
                ("k_scale", {"k_scale": np.ones(1)}),
                ("lse_base", {"lse_base": 2}),
                ("dcp", {"dcp": (2, 0)}),
                ("out", {"out": np.ones((2, 2, 3, 512), np.float16)}),
                ("out", {"out": self.client.empty((2, 2, 3, 512), np.float32)}),
                ("lse", {"lse": self.client.empty((2, 2, 3), np.float16)}),
                ("return_lse", {"lse": self.client.empty((2, 2, 3), np.float32), "return_lse": False}),
                ("batch.dcp_rank", {"dcp": (2, 2, 1)}),
                ("batch.softmax_scale", {"softmax_scale": float("nan")}),
                ("batch.row_stride", {"kv": self.client.empty((4, 16, 577), np.float16)[:, :, :576]})):
            with self.subTest(field=field, given=sorted(changes)):
                self.refused(field, **changes)
        with self.assertRaises(TypeError):
            self.decode(causal=True)
        with self.assertRaises(TypeError):
            self.client.decode(self.q, self.kv, [[0, 1], [2, 3]], [20, 30])

    def test_messages_say_what_to_do(self):
        self.assertIn("client.empty", self.refused("q", q=np.ones((2, 2, 3, 576), np.float16)))
        self.assertIn(".view(mlad.bfloat16)", self.refused("q", q=self.q.view(np.uint16)))

    def test_what_the_daemon_refuses(self):
        self.refused("batch.k_scale", k_scale=2.0)
        out = self.q.reshape(-1)[:2 * 2 * 3 * 512].reshape(2, 2, 3, 512)
        self.refused("batch.out", "overlap", out=out)
        with self.assertRaises(mlad.InvalidArgument) as caught:
            self.decode(q=self.q.reshape(4, 3, 576), cu_q=[0, 3, 1])
        self.assertEqual(caught.exception.code, "batch")

    def test_a_plan_shares_all_it_reads(self):
        with self.assertRaises(mlad.InvalidArgument) as caught:
            self.client.plan(self.q, self.kv, np.zeros((2, 2), np.int32), np.zeros(2, np.int32), softmax_scale=SCALE)
        self.assertIn("client.empty", caught.exception.message)

    def test_requests_that_fail(self):
        with self.assertRaises(mlad.RequestsFailed) as caught:
            self.decode(block_table=[[0, 1], [2, 9]])
        error = caught.exception
        self.assertEqual([(f.request, f.field) for f in error.result.failures], [(1, "block_table[1][1]")])
        self.assertTrue(np.all(error.out[0] == 1))

    def test_a_wait_that_ends_first(self):
        pending = self.client.submit(self.q, self.kv, [[0, 1], [2, 3]], [20, 30], softmax_scale=SCALE)
        try:
            pending.wait(0)
        except mlad.Timeout as error:
            self.assertIs(error.pending, pending)
            self.assertIsInstance(error, TimeoutError)
        pending.wait(30)
        self.assertTrue(np.all(pending.out == 1))

    def test_no_daemon(self):
        with self.assertRaises(mlad.NotConnected) as caught:
            mlad.Client(socket="/nonexistent/mlad.sock", device="cpu", reconnect_ms=0)
        self.assertEqual(caught.exception.code, "not_connected")

    def test_a_child_must_not_use_it(self):
        child = os.fork()
        if child == 0:
            try:
                self.decode()
            except mlad.InvalidArgument as error:
                os._exit(0 if error.field == "client" else 2)
            os._exit(1)
        self.assertEqual(os.waitpid(child, 0)[1], 0)
        self.decode()

    def test_registering(self):
        with self.assertRaises(mlad.InvalidArgument) as caught:
            self.client.register(np.ones(4, np.float32))
        self.assertIn("client.empty", caught.exception.message)
        with self.assertRaises(mlad.InvalidArgument):
            self.client.forget(self.q)

        class Device:
            __cuda_array_interface__ = {"shape": (4,), "typestr": "<f4", "data": (4096, False), "version": 3}
        with self.assertRaises(mlad.Error):     # no such GPU memory, or no driver to ask
            self.client.register(Device())


if __name__ == "__main__":
    unittest.main()
