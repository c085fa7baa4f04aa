"""The contract's grid on the device, against fp64 in torch: every type, mask, edge and option, a random sample."""
import math
import random

from .part import Part

SEED, CASES = 20250, 300


def describe(case):
    return " ".join(f"{name}={value}" for name, value in case.items() if value not in ("", False, 0))


class Tally:
    """Per kind of types: counts, and the case that came closest to its bar."""

    def __init__(self):
        self.kinds = {}

    def add(self, case, verdict):
        entry = self.kinds.setdefault(case["kind"], {"requests": 0, "worst_db": None, "worst_margin_db": None,
                                                     "worst_lse_share": 0.0, "closest": ""})
        entry["requests"] += 1
        if math.isfinite(verdict.lse_share):
            entry["worst_lse_share"] = max(entry["worst_lse_share"], verdict.lse_share)
        if not math.isfinite(verdict.db):
            return
        if entry["worst_margin_db"] is None or verdict.margin < entry["worst_margin_db"]:
            entry["worst_margin_db"], entry["closest"] = verdict.margin, describe(case)
        entry["worst_db"] = verdict.db if entry["worst_db"] is None else min(entry["worst_db"], verdict.db)


def one(part, batch, tally, counts):
    """Decode a batch twice, judge it, and where the case is deterministic decode one request alone."""
    import torch
    case, text = batch.case, describe(batch.case)
    kv, q = batch.kv_bytes.clone(), batch.q.view(torch.uint8).clone()
    failed = batch.decode()
    expected = {batch.fault[0]} if batch.fault else set()
    part.check(failed == expected, f"requests {sorted(failed)} failed, not {sorted(expected)}: {text}")
    counts["faults"] += len(expected)
    for b, verdict in batch.verdicts():
        part.check(verdict.problem is None, f"request {b} (q_len {batch.q_lens[b]}, K {batch.lengths[b]}): "
                   f"{verdict.problem}: {text}")
        tally.add(case, verdict)
    part.check(batch.canaries_intact(), f"a byte outside the outputs was written: {text}")
    part.check(bool((batch.kv_bytes == kv).all()) and bool((batch.q.view(torch.uint8) == q).all()),
               f"an input was written: {text}")
    if expected:
        return
    first = batch.out.view(torch.uint8).clone(), None if batch.lse is None else batch.lse.view(torch.uint8).clone()
    batch.decode()
    same = torch.equal(first[0], batch.out.view(torch.uint8))
    same &= batch.lse is None or torch.equal(first[1], batch.lse.view(torch.uint8))
    part.check(same, f"the same launch gave other bits: {text}")
    counts["twice"] += 1
    if case["deterministic"]:
        b = batch.draw.choice([b for b, q_len in enumerate(batch.q_lens) if q_len])
        part.check(torch.equal(batch.alone(b).contiguous().view(torch.uint8),
                               batch.out[batch.starts[b]:batch.starts[b + 1]].view(torch.uint8)),
                   f"request {b} alone has other bits: {text}")
        counts["alone"] += 1


def grid(part: Part):
    torch, where = part.torch()
    import mlad

    from .batch import Batch
    from .grid_cases import Decks
    decks, draw, tally = Decks(SEED), random.Random(SEED), Tally()
    torch.manual_seed(SEED)
    counts = {"cases": 0, "requests": 0, "faults": 0, "twice": 0, "alone": 0}
    part.figures.update(seed=SEED, counts=counts, kinds=tally.kinds)
    wanted = part.options.get("cases") or CASES
    with mlad.Client(device=part.device, name="gpu-suite grid") as client:
        while counts["cases"] < wanted and part.left:
            case = decks.deal()
            batch = Batch(client, where, draw, case)
            counts["cases"] += 1
            counts["requests"] += len(batch.q_lens)
            try:
                one(part, batch, tally, counts)
            except mlad.Error as error:
                part.check(False, f"{error}: {describe(case)}")
                if error.code in ("not_connected", "worker_lost", "timeout"):
                    break
    part.figures["axes"] = decks.dealt
    part.check(not decks.not_dealt(), f"values that never appeared: {', '.join(decks.not_dealt())}")
    part.figures["planned_cases"] = wanted
    part.check(counts["cases"] >= wanted, f"the time ended after {counts['cases']} of {wanted} cases")
