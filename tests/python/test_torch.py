"""torch CPU tensors, and the drop-ins for FlashMLA and tokenspeed, against a softmax written out in fp64."""
import unittest

from need import need

torch = need("torch")
import mlad  # noqa: E402
from mlad.flash_mla import flash_mla_with_kvcache, get_mla_metadata  # noqa: E402
from mlad.tokenspeed_mla import tokenspeed_mla_decode  # noqa: E402

SCALE = 0.05
INF = float("inf")


def attention(q, kv, table, lengths, causal, window=None):
    """q [B, Sq, H, 576], kv [pages, P, 576] -> out [B, Sq, H, 512], lse [B, Sq, H], natural; -inf without keys."""
    q, kv = q.double(), kv.double()
    out, lse = torch.zeros(*q.shape[:3], 512, dtype=torch.double), torch.full(q.shape[:3], -INF, dtype=torch.double)
    for b, length in enumerate(lengths):
        keys = torch.cat([kv[page] for page in table[b]])[:length]
        for t in range(q.shape[1]):
            end = max(length - (q.shape[1] - 1) + t, 0) if causal else length
            seen = keys[max(0, end - window) if window else 0:end]
            if len(seen):
                scores = SCALE * q[b, t] @ seen.T
                lse[b, t] = torch.logsumexp(scores, -1)
                out[b, t] = scores.softmax(-1) @ seen[:, :512]
    return out, lse


class Torch(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.client = mlad.Client(device="cpu", name="test_torch")
        mlad.set_default_client(cls.client)
        cls.addClassCleanup(cls.client.close)

    def setUp(self):
        torch.manual_seed(1)
        self.table = torch.tensor([[3, 0], [1, 2]], dtype=torch.int32)
        self.lengths = torch.tensor([20, 2], dtype=torch.int32)

    def random(self, shape, dtype):
        tensor = self.client.empty(shape, dtype, like="torch")
        self.assertEqual((tuple(tensor.shape), tensor.dtype), (shape, dtype))
        return tensor.copy_(torch.randn(shape))

    def close_to(self, out, lse, want_out, want_lse, loose=1.0):
        # 40 dB: the oracle's bars are finer, and test_decode.py holds the decodes to them
        noise = (out.double() - want_out).square().sum() / want_out.square().sum()
        self.assertLess(float(noise), 1e-4 * loose)
        finite = want_lse.isfinite()
        self.assertTrue(torch.equal(finite, lse.isfinite()))
        self.assertTrue(torch.allclose(lse[finite].double(), want_lse[finite], atol=1e-3, rtol=1e-3))

    def test_decode(self):
        for dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn):
            with self.subTest(dtype):
                q, kv = self.random((2, 4, 6, 576), dtype), self.random((4, 16, 576), dtype)
                out, lse = self.client.decode(q, kv, self.table, self.lengths, softmax_scale=SCALE)
                self.assertEqual(out.dtype, torch.bfloat16 if dtype.itemsize == 1 else dtype)
                self.close_to(out, lse, *attention(q, kv, self.table, self.lengths, True), loose=10)

    def test_tree_masks_of_either_sign(self):
        q, kv = self.random((2, 4, 6, 576), torch.float16), self.random((4, 16, 576), torch.float16)
        causal = torch.tensor([1, 3, 7, 15] * 2) | (1 << 40)       # bits from q_len on mean nothing
        out, lse = self.client.decode(q, kv, self.table, self.lengths, softmax_scale=SCALE, mask=causal)
        same = self.client.decode(q, kv, self.table, self.lengths, softmax_scale=SCALE, mask=causal.view(torch.uint64))
        self.assertTrue(torch.equal(out, same[0]) and torch.equal(lse, same[1]))
        self.close_to(out, lse, *attention(q, kv, self.table, self.lengths, True))

    def test_host_memory_is_not_copied_silently(self):
        kv = self.random((4, 16, 576), torch.float16)
        with self.assertRaises(mlad.InvalidArgument) as caught:
            self.client.decode(torch.randn(2, 4, 6, 576).half(), kv, self.table, self.lengths, softmax_scale=SCALE)
        self.assertIn("client.empty", str(caught.exception))

    def test_a_storage_is_registered_whole_and_watched(self):
        from mlad import arrays, cuda
        tensor = torch.empty(10, 4)
        view = tensor[3:]
        base, size, gone = cuda.owner(view, arrays.view(view, "x"), "x")
        self.assertEqual((base, size), (tensor.data_ptr(), 160))
        del tensor
        self.assertFalse(gone())
        del view
        self.assertTrue(gone())

    def flash(self, q, kv, **changes):
        given = {"block_table": self.table, "cache_seqlens": self.lengths, "head_dim_v": 512,
                 "tile_scheduler_metadata": get_mla_metadata()[0], "softmax_scale": SCALE, "causal": True}
        return flash_mla_with_kvcache(q, kv, **{**given, **changes})

    def test_flash_mla(self):
        q, kv = self.random((2, 4, 6, 576), torch.bfloat16), self.random((4, 16, 1, 576), torch.bfloat16)
        for causal in (True, False):
            out, lse = self.flash(q, kv, causal=causal)
            self.assertEqual((tuple(out.shape), tuple(lse.shape)), ((2, 4, 6, 512), (2, 6, 4)))
            want_out, want_lse = attention(q, kv[:, :, 0], self.table, self.lengths, causal)
            self.assertTrue(torch.equal(lse == INF, (want_lse == -INF).transpose(1, 2)))
            self.close_to(out, lse, want_out, want_lse.transpose(1, 2), loose=10)
        default = self.flash(q, kv, softmax_scale=None)[0]
        self.assertTrue(torch.equal(default, self.flash(q, kv, softmax_scale=576 ** -0.5)[0]))

    def test_flash_mla_refuses_what_it_does_not_honour(self):
        q, kv = self.random((2, 4, 6, 576), torch.bfloat16), self.random((4, 16, 1, 576), torch.bfloat16)
        some = torch.zeros(6)
        for name, value in (("num_splits", some), ("indices", some), ("attn_sink", some), ("extra_k_cache", some),
                            ("extra_indices_in_kvcache", some), ("topk_length", some), ("extra_topk_length", some),
                            ("head_dim_v", 128), ("tile_scheduler_metadata", some), ("is_fp8_kvcache", True),
                            ("block_table", None), ("cache_seqlens", None)):
            with self.subTest(name), self.assertRaises(mlad.InvalidArgument) as caught:
                self.flash(q, kv, **{name: value})
            self.assertEqual(caught.exception.field, name)
        for given in ({"topk": 8}, {"num_heads_k": 2}):
            with self.assertRaises(mlad.InvalidArgument):
                get_mla_metadata(**given)

    def test_flash_mla_holds_a_decode_to_its_metadata(self):
        q, kv = self.random((2, 4, 6, 576), torch.bfloat16), self.random((4, 16, 1, 576), torch.bfloat16)
        true = {"cache_seqlens": self.lengths, "num_q_tokens_per_head_k": 24, "num_heads_k": 1, "num_heads_q": 6,
                "is_fp8_kvcache": False}
        meta = get_mla_metadata(*true.values())[0]
        self.assertTrue(torch.equal(self.flash(q, kv, tile_scheduler_metadata=meta)[0], self.flash(q, kv)[0]))
        for name, value in (("cache_seqlens", self.lengths[:1]), ("cache_seqlens", self.lengths + 1),
                            ("num_q_tokens_per_head_k", 6), ("num_heads_q", 24), ("is_fp8_kvcache", True)):
            for given in ({name: value}, {**true, name: value}):
                meta = get_mla_metadata(**given)[0]
                with self.subTest(given), self.assertRaises(mlad.InvalidArgument) as caught:
                    self.flash(q, kv, tile_scheduler_metadata=meta)
                self.assertEqual(caught.exception.field, name)
        lengths = self.lengths.clone()
        meta = get_mla_metadata(lengths)[0]
        lengths += 1            # what it was told does not change
        self.flash(q, kv, tile_scheduler_metadata=meta)

    def tokenspeed(self, query, kv_cache, **changes):
        given = {"workspace_buffer": None, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "block_tables": self.table,
                 "seq_lens": self.lengths, "max_seq_len": 32, "softmax_scale": SCALE, "return_lse": True}
        return tokenspeed_mla_decode(query, kv_cache, **{**given, **changes})

    def test_tokenspeed(self):
        for dtype in (torch.bfloat16, torch.float8_e4m3fn):
            q, kv = self.random((2, 4, 6, 576), dtype), self.random((4, 1, 16, 576), dtype)
            for causal, left in ((True, -1), (False, -1), (True, 5)):
                with self.subTest(dtype=dtype, causal=causal, left=left):
                    out, lse = self.tokenspeed(q, kv, causal_mask=causal, window_left=left)
                    want_out, want_lse = attention(q, kv[:, 0], self.table, self.lengths, causal, left + 1)
                    self.close_to(out, lse * torch.log(torch.tensor(2.0)), want_out, want_lse, loose=10)
            self.assertEqual(self.tokenspeed(q, kv, return_lse=False).dtype, torch.bfloat16)
        half = self.tokenspeed(q, kv, output_scale=0.5)[0]
        self.assertTrue(torch.equal(half * 2, self.tokenspeed(q, kv)[0]))

    def test_tokenspeed_context_parallel(self):
        q, kv = self.random((2, 4, 6, 576), torch.float16), self.random((4, 16, 576), torch.float16)
        whole = self.tokenspeed(q, kv)
        total = torch.tensor([20, 2], dtype=torch.int32)
        shares = {0: [10, 1], 1: [10, 1]}
        parts = []
        for rank, share in shares.items():
            local = kv.clone()
            for b in range(2):
                keys = torch.cat([kv[page] for page in self.table[b]])[rank::2]
                local[self.table[b, 0].item(), :] = keys[:16]
            shared = self.client.empty(kv.shape, kv.dtype, like="torch").copy_(local)
            parts.append(self.tokenspeed(q, shared, seq_lens=torch.tensor(share, dtype=torch.int32), causal_seqs=total,
                                         cp_world=2, cp_rank=rank))
        lse = torch.logaddexp2(parts[0][1], parts[1][1])
        merged = sum(out.float() * torch.exp2(part - lse).nan_to_num()[..., None] for out, part in parts)
        self.close_to(merged, lse, whole[0].double(), whole[1].double())

    def test_tokenspeed_refuses_what_it_does_not_honour(self):
        q, kv = self.random((2, 4, 6, 576), torch.float16), self.random((4, 16, 576), torch.float16)
        for name, given in (("kv_lora_rank", {"kv_lora_rank": 256}), ("qk_rope_head_dim", {"qk_rope_head_dim": 0}),
                            ("output_scale", {"output_scale": 2.0}), ("window_left", {"window_left": -2}),
                            ("window_left", {"window_left": 3, "causal_mask": False}), ("causal_seqs", {"cp_world": 2}),
                            ("seq_lens", {"cp_world": 2, "causal_seqs": self.lengths}),
                            ("max_seq_len", {"max_seq_len": 0}), ("max_seq_len", {"max_seq_len": 19}),
                            ("is_var_seq", {"is_var_seq": False}), ("min_split_kv", {"min_split_kv": 0}),
                            ("min_split_kv", {"min_split_kv": 257}), ("query", {"query": q[0]}),
                            ("kv_cache", {"kv_cache": kv[:, None].expand(4, 2, 16, 576)})):
            with self.subTest(name), self.assertRaises(mlad.InvalidArgument) as caught:
                self.tokenspeed(**{"query": q, "kv_cache": kv, **given})
            self.assertEqual(caught.exception.field, name)
        same = torch.tensor([20, 20], dtype=torch.int32)
        self.tokenspeed(q, kv, seq_lens=same, is_var_seq=False, max_seq_len=20, min_split_kv=256)


if __name__ == "__main__":
    unittest.main()
