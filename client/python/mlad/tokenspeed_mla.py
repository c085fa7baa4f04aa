"""Drop-in for tokenspeed_mla's decode: `from mlad.tokenspeed_mla import tokenspeed_mla_decode`.

Conventions are those of lightseekorg/tokenspeed: the page axis before the head axis of a 4-D cache, base-2 LSE in
[B, q_len, H], bf16 out for fp8 inputs. Every mask is honoured for every type. Arguments that mlad does not honour are
refused by name. Decodes go to the default client of the query's device, as in mlad.flash_mla.
"""
from .default import client_for
from .errors import invalid, unsupported


def tokenspeed_mla_decode(query, kv_cache, workspace_buffer, kv_lora_rank, qk_rope_head_dim, block_tables, seq_lens,
                          max_seq_len, softmax_scale, output_scale=1.0, out=None, is_var_seq=True, causal_mask=True,
                          window_left=-1, enable_pdl=False, return_lse=False, causal_seqs=None, cp_world=1, cp_rank=0,
                          cp_interleave_size=1, enable_packed_q=False, *, min_split_kv=1):
    """Decode over a paged latent cache.

    query               [B, q_len, H, 576], bf16, fp16 or fp8 e4m3
    kv_cache            [pages, page_size, 576] or [pages, 1, page_size, 576], of query's type
    block_tables        int32 [B, max_pages]
    seq_lens            int32 [B], the new tokens included; with cp_world > 1 this rank's share of causal_seqs
    max_seq_len         at least 1 and each of seq_lens
    softmax_scale       the scales of query and keys multiplied in
    output_scale        factor of out, such as the scale of the values; 1 unless the inputs are fp8
    out                 [B, q_len, H, 512] to write to; None: a new one
    window_left         -1, or with causal_mask (or q_len 1) the keys before its own that a query token sees
    is_var_seq          False: all of seq_lens are the same
    causal_seqs         int32 [B], the global lengths, for cp_world > 1
    cp_world, cp_rank, cp_interleave_size   which of the global keys this rank's pages hold

    workspace_buffer, enable_pdl, enable_packed_q and min_split_kv (1..256) tune the launch of the original's kernel and
    change no result; mlad schedules itself, and they have no effect here. max_seq_len and is_var_seq are held against
    seq_lens where that is a CPU tensor; of a CUDA tensor they are taken on trust, and the result is that of seq_lens.

    Returns out, or (out, lse fp32 [B, q_len, H], base 2) with return_lse. Raises mlad.Error. CUDA tensors are
    decoded in the order of the current stream, and may be captured, where mlad.Client.order() is "stream"."""
    del workspace_buffer, enable_pdl, enable_packed_q
    if (kv_lora_rank, qk_rope_head_dim) != (512, 64):
        name = "kv_lora_rank" if kv_lora_rank != 512 else "qk_rope_head_dim"
        raise unsupported(name, f"rows are 512 + 64 wide, not {kv_lora_rank} + {qk_rope_head_dim}")
    client = client_for(query)
    if query.dim() != 4:
        raise invalid("query", f"its shape must be [B, q_len, H, 576], not {list(query.shape)}")
    _check_hints(seq_lens, max_seq_len, is_var_seq, min_split_kv)
    if kv_cache.dtype != query.dtype:
        raise unsupported("kv_cache", f"its dtype is {kv_cache.dtype} and query's {query.dtype}; they must be the same")
    if kv_cache.dim() == 4:
        if kv_cache.shape[1] != 1:
            raise unsupported("kv_cache", f"its shape must be [pages, 1, page_size, 576], not {list(kv_cache.shape)}")
        kv_cache = kv_cache.squeeze(1)
    fp8 = query.element_size() == 1
    if not fp8 and output_scale != 1:
        raise unsupported("output_scale", f"it must be 1 for {query.dtype}, not {output_scale}")
    window = 0
    if window_left != -1:
        if window_left < 0 or not (causal_mask or query.shape[1] == 1):
            raise unsupported("window_left", f"{window_left} is not honoured with causal_mask={causal_mask}: give -1, "
                              "or 0 and more with a causal mask")
        window = window_left + 1
    lengths = seq_lens
    if causal_seqs is not None:
        lengths = causal_seqs
        _check_share(seq_lens, causal_seqs, cp_world, cp_rank, cp_interleave_size)
    elif cp_world != 1:
        raise unsupported("causal_seqs", "the global lengths are needed where cp_world is not 1")
    return client.decode_in_order(query, kv_cache, block_tables, lengths, softmax_scale=softmax_scale, out=out,
                         return_lse=return_lse, mask="causal" if causal_mask else "none", window=window,
                         v_scale=output_scale if fp8 else None, dcp=(cp_world, cp_rank, cp_interleave_size),
                         lse_base="2")


def _check_hints(seq_lens, max_seq_len, is_var_seq, min_split_kv):
    """They have no effect, and must be true; what only the GPU knows is not asked."""
    if isinstance(min_split_kv, bool) or not isinstance(min_split_kv, int) or not 1 <= min_split_kv <= 256:
        raise invalid("min_split_kv", f"it must be an integer of 1..256, not {min_split_kv!r}")
    if not max_seq_len >= 1:
        raise invalid("max_seq_len", f"it must be at least 1, not {max_seq_len}")
    lengths = seq_lens.tolist() if seq_lens.device.type == "cpu" else []
    if lengths and max(lengths) > max_seq_len:
        raise invalid("max_seq_len", f"it is {max_seq_len}, and the longest of seq_lens {max(lengths)}")
    if not is_var_seq and len(set(lengths)) > 1:
        raise invalid("is_var_seq", f"it is {is_var_seq}, and seq_lens has {min(lengths)}..{max(lengths)}")


def _check_share(seq_lens, causal_seqs, world, rank, interleave):
    """The local lengths follow from the global ones; refuse any others, since they would have no effect."""
    if world < 1 or interleave < 1:
        raise unsupported("cp_world" if world < 1 else "cp_interleave_size", "it must be at least 1")
    block = world * interleave
    rest = (causal_seqs % block - rank * interleave).clamp(0, interleave)
    local = causal_seqs.div(block, rounding_mode="floor") * interleave + rest
    if not bool((local == seq_lens).all()):
        raise unsupported("seq_lens", f"they are not rank {rank}'s share of causal_seqs among {world} ranks")
