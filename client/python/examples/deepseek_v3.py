"""Speculative decoding of a DeepSeek-V3 model with its attention on mlad: python deepseek_v3.py [--device cuda].

A small model of the architecture (transformers' DeepseekV3ForCausalLM, random weights, the real 512 + 64 latent
dimensions) generates greedily. Each step a drafter proposes three tokens; the target checks them in one pass of four
query tokens, whose attention is one mlad decode per layer over a paged latent cache; rejected tokens are rolled back by
not counting them. The tokens must equal those of the model's own attention, or the exit status is 1.

With --device cpu the cache lies in memory shared with the daemon; with cuda it is torch's, and mlad must serve that
GPU."""
import argparse
import copy
import sys

import torch
import transformers
from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb, apply_rotary_pos_emb_interleave

import mlad

PAGE, DRAFTS = 64, 3
LATENT, ROPE, VOCABULARY = 512, 64, 512


def build(seed, layers, device):
    """The target. Weights and all that is not attention stay fp32, so that the two ways to compute attention are
    compared and not the rounding of everything around them.

    Random logits lead by next to nothing, so that any rounding turns a token. Here each token has a preferred
    successor (the head is the embedding, permuted), which the layers often overrule. With the default seed the closest
    choice leads by several times what rounding queries and cache to fp16 changes, and the causal mask still decides."""
    transformers.set_seed(seed)
    config = transformers.DeepseekV3Config(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=512, moe_intermediate_size=128,
        num_hidden_layers=layers, num_attention_heads=16, num_key_value_heads=16, n_routed_experts=8,
        num_experts_per_tok=2, n_group=2, topk_group=1, first_k_dense_replace=1, q_lora_rank=128, kv_lora_rank=LATENT,
        qk_rope_head_dim=ROPE, qk_nope_head_dim=64, v_head_dim=64, max_position_embeddings=1024,
        initializer_range=0.08, attn_implementation="eager")
    model = transformers.DeepseekV3ForCausalLM(config).to(torch.float32).eval().requires_grad_(False)
    embedding = model.get_input_embeddings().weight
    embedding.normal_()
    model.lm_head.weight.copy_(embedding[torch.randperm(VOCABULARY)] / 16)
    return model.to(device)     # made on the CPU, so that a seed means the same model everywhere


def shared(client, shape, dtype, device):
    """A tensor that decodes can name: on the CPU in the daemon's shared memory, on a GPU any will do."""
    if device == "cpu":
        return client.empty(shape, dtype, like="torch")
    return torch.empty(shape, dtype=dtype, device=device)


class Cache:
    """A paged latent cache of one layer for one sequence, in pages that are deliberately out of order."""

    def __init__(self, client, capacity, dtype, device):
        pages = -(-capacity // PAGE)
        self.kv = shared(client, (pages, PAGE, LATENT + ROPE), dtype, device)
        self.table = torch.arange(pages - 1, -1, -1, dtype=torch.int32, device=device)[None]

    def write(self, start, rows):
        """rows [n, 576] become the keys from `start` on."""
        at = torch.arange(start, start + len(rows), device=rows.device)
        self.kv[self.table[0, at // PAGE].long(), at % PAGE] = rows.to(self.kv.dtype)


class MladAttention(torch.nn.Module):
    """A layer's attention, absorbed: W_UK moves into the query and W_UV behind the output, so that attention runs on
    the latent cache itself. `past` tokens of the sequence are in the cache; the rest are written there now."""

    def __init__(self, attention, client, cache):
        super().__init__()
        self.inner, self.client, self.cache, self.past = attention, client, cache, 0
        kv = cache.kv
        self.query = shared(client, (1, 64, attention.num_heads, LATENT + ROPE), kv.dtype, kv.device.type)
        up = attention.kv_b_proj.weight.view(attention.num_heads, -1, LATENT)
        self.up_k, self.up_v = up.split([attention.qk_nope_head_dim, attention.v_head_dim], dim=1)

    def forward(self, hidden_states, position_embeddings, **_):
        a, tokens = self.inner, hidden_states.shape[1]
        q = a.q_b_proj(a.q_a_layernorm(a.q_a_proj(hidden_states))).view(1, tokens, a.num_heads, -1).transpose(1, 2)
        q_nope, q_rope = q.split([a.qk_nope_head_dim, ROPE], dim=-1)
        latent, k_rope = a.kv_a_proj_with_mqa(hidden_states).split([LATENT, ROPE], dim=-1)
        rotate = apply_rotary_pos_emb_interleave if a.config.rope_interleave else apply_rotary_pos_emb
        q_rope, k_rope = rotate(q_rope, k_rope[:, None], *position_embeddings)

        self.cache.write(self.past, torch.cat([a.kv_a_layernorm(latent)[0], k_rope[0, 0]], dim=-1))
        absorbed = torch.einsum("bhtn,hnl->bthl", q_nope, self.up_k)
        query = torch.cat([absorbed, q_rope.transpose(1, 2)], dim=-1)
        out = torch.cat([self.decode(query[:, at:at + 64], self.past + min(at + 64, tokens))
                         for at in range(0, tokens, 64)], dim=1)     # q_len is 64 at most: a prompt goes in chunks
        values = torch.einsum("bthl,hvl->bthv", out, self.up_v)
        return a.o_proj(values.reshape(1, tokens, -1)), None

    def decode(self, query, length):
        """query [1, q_len, H, 576] -> [1, q_len, H, 512] in fp32; the last query token is the sequence's
        `length`-th."""
        q = self.query[:, :query.shape[1]].copy_(query)
        return self.client.decode(q, self.cache.kv, self.cache.table, [length], softmax_scale=self.inner.scaling,
                                  return_lse=False).float()


class Target:
    """The model with its attention on mlad, as a verifier of drafts."""

    def __init__(self, model, client, capacity, dtype, device):
        self.model, self.past = model, 0
        self.attention = [MladAttention(layer.self_attn, client, Cache(client, capacity, dtype, device))
                          for layer in model.model.layers]

    def step(self, tokens):
        """The logits after each of `tokens`, which follow the `past` ones: [tokens, vocabulary]."""
        device = self.model.device
        ids = torch.tensor([tokens], device=device)
        positions = torch.arange(self.past, self.past + len(tokens), device=device)[None]
        for layer, attention in zip(self.model.model.layers, self.attention):
            attention.past = self.past
            layer.self_attn = attention
        try:
            return self.model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
        finally:
            for layer, attention in zip(self.model.model.layers, self.attention):
                layer.self_attn = attention.inner


def truncated(model, layers):
    """The drafter: the model's first layers alone, with their own attention. Any drafter will do: the target
    decides."""
    drafter = copy.deepcopy(model)
    drafter.model.layers = drafter.model.layers[:layers]
    drafter.config.num_hidden_layers = layers
    return drafter


def speculate(target, drafter, prompt, count):
    """`count` greedy tokens after prompt, and their logits; (tokens, logits, steps, drafts accepted)."""
    rows = [target.step(prompt)[-1:]]
    tokens = prompt + rows[0].argmax(-1).tolist()
    target.past = len(prompt)
    steps = accepted = 0
    while len(tokens) < len(prompt) + count:
        drafts = generate(drafter, tokens, DRAFTS)[0]
        logits = target.step(tokens[-1:] + drafts)
        verdicts = logits.argmax(-1).tolist()
        right = 0
        while right < DRAFTS and drafts[right] == verdicts[right]:
            right += 1
        tokens += verdicts[:right + 1]      # the drafts that hold, and the target's own next token
        rows.append(logits[:right + 1])
        target.past += right + 1            # rows of rejected tokens lie beyond: the next step writes over them
        steps, accepted = steps + 1, accepted + right
    return tokens[len(prompt):len(prompt) + count], torch.cat(rows)[:count], steps, accepted


def generate(model, prompt, count):
    """`count` greedy tokens after prompt by the model's own attention, and their logits."""
    tokens, rows = list(prompt), []
    for _ in range(count):
        rows.append(model(input_ids=torch.tensor([tokens], device=model.device), use_cache=False).logits[0, -1])
        tokens.append(int(rows[-1].argmax()))
    return tokens[len(prompt):], torch.stack(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    # All else is fp32. What is compared are choices, of tokens and of experts, which rounding turns where they are
    # close: bf16 rounds 8 times coarser than fp16 and does so now and then.
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16", help="of queries and cache")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--prompt", type=int, default=70, help="tokens in the prompt")
    parser.add_argument("--seed", type=int, default=2)
    given = parser.parse_args()

    dtype = getattr(torch, given.dtype)
    model = build(given.seed, given.layers, given.device)
    prompt = torch.randint(2, VOCABULARY, (given.prompt,), generator=torch.Generator().manual_seed(given.seed)).tolist()
    client = mlad.default_client(torch.cuda.current_device() if given.device == "cuda" else None)
    drafter = truncated(model, given.layers - 1)
    target = Target(model, client, given.prompt + given.tokens + DRAFTS + 1, dtype, given.device)
    tokens, logits, steps, accepted = speculate(target, drafter, prompt, given.tokens)
    expected, right = generate(model, prompt, given.tokens)

    same = next((i for i, pair in enumerate(zip(tokens, expected)) if pair[0] != pair[1]), given.tokens)
    top = right.topk(2).values
    change, lead = float((logits - right)[:same + 1].abs().max()), float((top[:, 0] - top[:, 1]).min())
    print(f"{client.device}, {given.dtype}: {given.tokens} tokens in {steps} steps, "
          f"{accepted} of {steps * DRAFTS} drafts accepted")
    print(f"logits differ by {change:.4f} at most; the closest choice has a lead of {lead:.4f}")
    if same < given.tokens:
        print(f"FAILED: token {same} is {tokens[same]}, and {expected[same]} by the model's own attention")
        return 1
    print("ok: the tokens equal those of the model's own attention")
    return 0


if __name__ == "__main__":
    sys.exit(main())
