"""A fixed plan decoded again and again while work on CUDA streams changes lengths, tables, queries and keys in device
memory: no length that the host knows goes into a launch."""
from .part import Part

STEPS, BATCH, HEADS, Q, PAGE, COLUMNS, SCALE = 48, 16, 16, 4, 64, 24, 0.0417


def replay(part: Part):
    torch, where = part.torch()
    import mlad

    from . import reference
    on_gpu = where != "cpu"
    torch.manual_seed(3)
    steps, pages = (STEPS, BATCH * COLUMNS) if on_gpu else (4, BATCH * COLUMNS)
    with mlad.Client(device=part.device, name="gpu-suite replay") as client:
        def room(shape, dtype):
            tensor = torch.empty(shape, dtype=dtype, device=where) if on_gpu else client.empty(shape, dtype, "torch")
            if on_gpu:
                client.register(tensor)
            return tensor
        kv = room((pages, PAGE, 576), torch.bfloat16)
        kv.copy_(torch.randn(kv.shape, device=where))
        q, table = room((BATCH, Q, HEADS, 576), torch.bfloat16), room((BATCH, COLUMNS), torch.int32)
        lengths = room((BATCH,), torch.int32)
        plan = client.plan(q, kv, table, lengths, softmax_scale=SCALE)
        streams = [torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()] if on_gpu else [None]
        worst = None
        for step in range(steps):
            new_q = torch.randn(q.shape, device=where).to(q.dtype)
            new_table = torch.randperm(pages, device=where).to(torch.int32).view(BATCH, COLUMNS)
            new_lengths = torch.randint(0, COLUMNS * PAGE + 1, (BATCH,), device=where, dtype=torch.int32)
            if step % 3 == 1:
                new_lengths %= 70
            key = torch.randn((576,), device=where).to(kv.dtype)
            if on_gpu:
                torch.cuda.synchronize()
            with torch.cuda.stream(streams[step % len(streams)]) if on_gpu else torch.no_grad():
                if on_gpu:
                    torch.cuda._sleep(2_000_000)    # about a millisecond: a decode that did not wait would see old data
                q.copy_(new_q)
                table.copy_(new_table)
                lengths.copy_(new_lengths)
                kv[step % pages, step % PAGE] = key
                result = plan.decode(60)
            host = new_lengths.tolist()
            part.check(result.kv_tokens == sum(host), f"step {step}: {result.kv_tokens} KV tokens, not {sum(host)}")
            for b in range(BATCH):
                sees = reference.visibility(Q, host[b], "causal", None, 0, (1, 0, 1), where)
                keys = kv[new_table[b].long()].view(-1, 576)[:host[b]].double()
                want = reference.attention(new_q[b], keys, sees, softmax_scale=SCALE, out_dtype=torch.bfloat16)
                verdict = reference.judge(want, plan.out[b], plan.lse[b], torch.bfloat16)
                part.check(verdict.problem is None, f"step {step}, request {b}, K {host[b]}: {verdict.problem}")
                worst = verdict.margin if worst is None else min(worst, verdict.margin)
        part.figures.update(steps=steps, streams=len(streams), worst_margin_db=worst)
