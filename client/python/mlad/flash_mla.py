"""Drop-in for the dense decode of FlashMLA: `from mlad.flash_mla import flash_mla_with_kvcache, get_mla_metadata`.

Conventions are those of deepseek-ai/FlashMLA: shapes, natural-log LSE, +inf as the LSE of a row without keys. Arguments
that mlad does not honour are refused by name, and so is what get_mla_metadata was told if the decode is another.
Decodes go to the default client of q's device (mlad.default_client): for CUDA tensors mlad must serve that GPU; CPU
tensors q and k_cache must come from `mlad.default_client().empty(..., like="torch")`.
"""
from .default import client_for
from .errors import invalid, unsupported


class FlashMLASchedMeta:
    """What get_mla_metadata returns: what it was told, to which each decode is held. mlad schedules every launch
    itself, so what was not told may be anything, and differ from call to call."""

    def __init__(self, cache_seqlens=None, num_q_tokens_per_head_k=None, num_heads_q=None, is_fp8_kvcache=None):
        self.requests = None if cache_seqlens is None else tuple(cache_seqlens.shape)
        on_host = cache_seqlens is not None and cache_seqlens.device.type == "cpu"
        self.lengths = cache_seqlens.tolist() if on_host else None
        self.rows, self.heads, self.fp8 = num_q_tokens_per_head_k, num_heads_q, is_fp8_kvcache

    def check(self, q, cache_seqlens, is_fp8_kvcache):
        """Refuse a decode of another batch than get_mla_metadata was told of."""
        batch, q_len, heads = q.shape[:3]
        lengths = cache_seqlens.tolist() if self.lengths and cache_seqlens.device.type == "cpu" else self.lengths
        for name, told, given in (("cache_seqlens", self.requests, (batch,)), ("cache_seqlens", self.lengths, lengths),
                                  ("num_heads_q", self.heads, heads),
                                  ("num_q_tokens_per_head_k", self.rows, q_len * heads),
                                  ("is_fp8_kvcache", self.fp8, bool(is_fp8_kvcache))):
            if told is not None and told != given:
                what = "shape " if name == "cache_seqlens" and told is self.requests else ""
                raise invalid(name, f"get_mla_metadata was told {what}{told}, and in this decode it is {given}; call "
                              "it for this batch, or without arguments for any")


def get_mla_metadata(cache_seqlens=None, num_q_tokens_per_head_k=None, num_heads_k=1, num_heads_q=None,
                     is_fp8_kvcache=None, topk=None):
    """Returns (FlashMLASchedMeta, None). mlad needs none of the arguments of FlashMLA's older interface; what is given
    must be true of every decode that the metadata is used for, or that decode is refused:

    cache_seqlens               int32 [B]; its shape, and where both it and the decode's are CPU tensors its values. The
                                values of CUDA tensors are not read: mlad schedules by those of the decode
    num_q_tokens_per_head_k     Sq * H
    num_heads_q                 H
    is_fp8_kvcache              as in the decode

    num_heads_k other than 1 and topk announce another attention and are refused here."""
    if num_heads_k != 1:
        raise unsupported("num_heads_k", f"MLA has one KV head, not {num_heads_k}")
    if topk is not None:
        raise unsupported("topk", "sparse attention is not available")
    return FlashMLASchedMeta(cache_seqlens, num_q_tokens_per_head_k, num_heads_q, is_fp8_kvcache), None


def flash_mla_with_kvcache(q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata, num_splits=None,
                           softmax_scale=None, causal=False, is_fp8_kvcache=False, indices=None, attn_sink=None,
                           extra_k_cache=None, extra_indices_in_kvcache=None, topk_length=None, extra_topk_length=None):
    """Decode over a paged latent cache.

    q               [B, Sq, H, 576], bf16 or fp16 (fp8 e4m3 is honoured too, with a fp8 cache)
    k_cache         [pages, page_size, 1, 576] of q's type; with is_fp8_kvcache 656-byte rows, uint8 or fp8, for bf16 q
    block_table     int32 [B, max_pages]
    cache_seqlens   int32 [B], the new tokens included
    head_dim_v      512
    softmax_scale   None: 576 ** -0.5
    causal          query token t sees the first K - (Sq - 1) + t keys

    Returns (out [B, Sq, H, 512] of q's type (bf16 for fp8 q), lse fp32 [B, H, Sq]). Sparse attention, attn_sink, extra
    caches are refused. Raises mlad.Error; mlad.RequestsFailed carries out as it is. CUDA tensors are decoded in the
    order of the current stream, and may be captured, where mlad.Client.order() is "stream"."""
    for name, value in (("num_splits", num_splits), ("indices", indices), ("attn_sink", attn_sink),
                        ("extra_k_cache", extra_k_cache), ("extra_indices_in_kvcache", extra_indices_in_kvcache),
                        ("topk_length", topk_length), ("extra_topk_length", extra_topk_length)):
        if value is not None:
            raise unsupported(name, "it is not honoured: this is the dense decode; leave it None")
    if not isinstance(tile_scheduler_metadata, FlashMLASchedMeta):
        raise unsupported("tile_scheduler_metadata", "it must come from mlad.flash_mla.get_mla_metadata()")
    if head_dim_v != 512:
        raise unsupported("head_dim_v", f"it must be 512, not {head_dim_v}")
    if block_table is None or cache_seqlens is None:
        raise unsupported("block_table" if block_table is None else "cache_seqlens", "the dense decode needs it")
    client = client_for(q)
    if q.dim() != 4:
        raise invalid("q", f"its shape must be [B, Sq, H, 576], not {list(q.shape)}")
    tile_scheduler_metadata.check(q, cache_seqlens, is_fp8_kvcache)
    rows656 = k_cache.shape[-1] == 656
    if bool(is_fp8_kvcache) != rows656:
        raise unsupported("is_fp8_kvcache", f"it is {is_fp8_kvcache} and the rows of k_cache have {k_cache.shape[-1]} "
                          "elements; True goes with rows of 656 bytes, False with 576 elements")
    out, lse = client.decode_in_order(q, k_cache, block_table, cache_seqlens, mask="causal" if causal else "none",
                             softmax_scale=q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    lse = lse.transpose(1, 2).contiguous()
    return out, lse.masked_fill_(lse == float("-inf"), float("inf"))
