"""What cannot be honoured is refused by name, and what fails in the daemon arrives as the right exception."""
import os
import threading
import time
import unittest
from unittest import mock

import numpy as np

import mlad
from mlad import _libmla, arrays, cuda

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

    def test_memory_is_registered_with_the_least_right(self):
        def access(array):
            return self.client._memory.locate(arrays.view(array, "x"))[0].access
        self.client = mlad.Client(device="cpu", name="test_refusals")       # none of its memory was used before
        self.addCleanup(self.client.close)
        self.setUp()
        out, lse = self.decode()
        self.assertEqual([access(array) for array in (self.q, self.kv, out, lse)], ["read"] * 2 + ["readwrite"] * 2)
        both = self.client.empty((8192,), np.float16)
        q, out = both[:2 * 576].reshape(2, 1, 1, 576), both[4096:4096 + 1024].reshape(2, 1, 1, 512)
        q[...] = 1
        lse = self.client.empty((2, 1, 1), np.float32)
        self.decode(q=q, lse=lse)
        self.assertEqual(access(both), "read")
        plan = self.client.plan(q, self.kv, *self.metadata(), softmax_scale=SCALE, lse=lse)
        self.decode(q=q, out=out, lse=lse)
        self.assertEqual(access(both), "readwrite")
        self.assertTrue(np.all(out == 1))
        plan.decode(30)             # it names the memory as it was registered before
        self.assertTrue(np.all(plan.out == 1))

    def metadata(self):
        table, seqlens = self.client.empty((2, 2), np.int32), self.client.empty((2,), np.int32)
        table[...], seqlens[...] = [[0, 1], [2, 3]], [20, 30]
        return table, seqlens

    def test_memory_registered_for_reading_is_not_written(self):
        out = self.client.empty((2, 2, 3, 512), np.float16)
        self.client.register(out, access="read")
        self.assertIn('access="read"', self.refused("out", out=out))
        self.client.register(out, access="readwrite")
        self.decode(out=out)
        lse = self.client.empty((2, 2, 3), np.float32)
        self.client.register(lse, access="read")
        self.refused("lse", lse=lse)

    def test_a_stream_that_is_not_ready_ends_the_wait(self):
        waits = []

        def call(name, *arguments):
            waits.append((name, *arguments))
            time.sleep(arguments[1] / 1000)
            raise mlad.Timeout("timeout", "stream", "not yet")
        view = arrays.View("cuda", 0, 4096, (4,), (4,), "f32", 4, True, 7)
        with mock.patch.object(_libmla, "call", call), self.assertRaises(mlad.Timeout) as caught:
            cuda.drain([view], time.monotonic() + 0.5)
        self.assertEqual({wait[:2] for wait in waits}, {("mla_stream_drain", 7)})
        self.assertTrue(0.4 < sum(wait[2] for wait in waits) / 1000 <= 0.5, waits)
        self.assertEqual((caught.exception.field, caught.exception.pending), ("stream", None))
        with mock.patch.object(cuda, "drain") as drain:
            self.decode(timeout=40)
            self.client.plan(self.q, self.kv, *self.metadata(), softmax_scale=SCALE).decode(40)
        for call in drain.call_args_list:
            self.assertTrue(0 < call.args[1] - time.monotonic() < 40)

    def test_waiting_for_a_stream_delays_no_other_thread(self):
        def drain(*_):
            with mock.patch.object(cuda, "drain"):
                thread = threading.Thread(target=self.decode, daemon=True)
                thread.start()
                thread.join(30)
            self.assertFalse(thread.is_alive())
            self.client.register(self.kv, "readwrite")      # the decode must find it where it is now
        with mock.patch.object(cuda, "drain", side_effect=drain) as drains:
            out, _ = self.decode()
        self.assertEqual(drains.call_count, 2)
        self.assertTrue(np.all(out == 1))

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
