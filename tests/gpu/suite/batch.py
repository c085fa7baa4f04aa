"""A batch in the memory of the device under test, made so that nothing but what the contract names can be right.

The pool is NaN but for the keys that a query token sees; page ids that no token needs are nonsense; outputs begin as
NaN between canaries. On a GPU the tensors are torch's; on the device `cpu` they lie in memory shared with the
daemon."""
import torch

from . import reference
from .grid_cases import KINDS, lengths, q_lens

CANARY, POISON, GUARD = 4096, 0xff, 0xa5
ROWS_TIMES_KEYS = 12_000_000        # bounds the fp64 reference's score matrix


class Batch:
    """`case`: the axes (grid_cases.py). `decode()` gives (out, lse, failures); `problems()` judges them."""

    def __init__(self, client, where, draw, case, q=None, given_lengths=None):
        self.client, self.where, self.draw, self.case = client, where, draw, case
        q_name, kv_name, out_name = KINDS[case["kind"]]
        self.q_dtype, self.out_dtype = getattr(torch, q_name), getattr(torch, out_name)
        self.rows656 = kv_name == "656"
        self.kv_dtype = torch.uint8 if self.rows656 else getattr(torch, kv_name)
        self.q_lens = q_lens(draw, case) if q is None else q
        rows = max(self.q_lens) * case["heads"]
        self.lengths = lengths(draw, case, self.q_lens, ROWS_TIMES_KEYS // max(rows, 1)) \
            if given_lengths is None else given_lengths
        self.starts = [sum(self.q_lens[:b]) for b in range(len(self.q_lens) + 1)]
        self.masks = self._tree() if case["mask"] == "tree" else None
        self.fault = self._fault()
        self._scales()
        self.sink = torch.randn(case["heads"], device=where) * 2 if case["sink"] else None
        self._pool()
        self.q = self.room((self.starts[-1], case["heads"], 576), self.q_dtype)
        self.bytes(self.q).copy_(self.random(self.q.shape, self.q_dtype))
        self.out_room, self.out = self.guarded((self.starts[-1], case["heads"], 512), self.out_dtype)
        self.lse_room, self.lse = self.guarded((self.starts[-1], case["heads"]), torch.float32) \
            if case["lse"] else (None, None)

    # Memory.

    def room(self, shape, dtype):
        if self.where == "cpu":
            return self.client.empty(shape, dtype, like="torch")
        return torch.empty(shape, dtype=dtype, device=self.where)

    @staticmethod
    def bytes(tensor):
        return tensor.view(torch.uint8) if tensor.dim() else tensor

    def random(self, shape, dtype):
        """Bytes of N(0, 1) values of a type."""
        return torch.randn(shape, device=self.where).to(dtype).view(torch.uint8)

    def guarded(self, shape, dtype):
        """(bytes with canaries at both ends, the tensor between them)."""
        size = torch.Size(shape).numel() * dtype.itemsize
        room = self.room((size + 2 * CANARY,), torch.uint8).fill_(GUARD)
        return room, room[CANARY:CANARY + size].view(dtype).view(shape)

    def metadata(self, values, dtype, kind=None):
        """A small tensor where the case says: registered on the device, merely there, or in shared host memory."""
        tensor = torch.as_tensor(values, dtype=dtype)
        kind = kind or self.case["metadata"]
        if kind == "host" or kind == "device" and self.where == "cpu":
            return self.client.empty(tensor.shape, dtype, like="torch").copy_(tensor)
        tensor = tensor.to(self.where)
        if kind == "device":
            self.client.register(tensor)
        return tensor

    # Contents.

    def _tree(self):
        """Tree masks: mostly random, the token itself always, and bits beyond q_len, which mean nothing."""
        masks = []
        for q_len in self.q_lens:
            for t in range(q_len):
                bits = self.draw.getrandbits(64) | 1 << t
                masks.append(bits - (1 << 64) if bits >> 63 else bits)
        return torch.tensor(masks, dtype=torch.int64)

    def _fault(self):
        """(request, what) that must fail alone, or None."""
        what = self.case["fault"]
        able = [b for b, q in enumerate(self.q_lens) if q]
        if what == "page":
            able = [b for b in able if bool(self.sees(b).any())]
        return (self.draw.choice(able), what) if what and able else None

    def _scales(self):
        self.scales = {}
        names = {"e4m3": ("q_scale", "k_scale", "v_scale"), "e4m3 to fp16": ("q_scale", "k_scale"),
                 "bf16 e4m3": ("k_scale", "v_scale"), "bf16 656": ()}.get(self.case["kind"], ())
        if self.case["scales"] != "none":
            self.scales = {name: self.draw.choice((0.5, 0.75, 1.25, 1.5)) for name in names}

    def bits(self, b):
        return None if self.masks is None else self.masks[self.starts[b]:self.starts[b + 1]]

    def sees(self, b, where="cpu"):
        bits = self.bits(b)
        return reference.visibility(self.q_lens[b], self.lengths[b], self.case["mask"],
                                    None if bits is None else bits.to(where), self.case["window"], self.case["dcp"],
                                    where)

    def _pool(self):
        """The pages, their table, and where each request's seen keys lie in them."""
        size, dcp = self.case["page"], self.case["dcp"]
        counts = [-(-reference.local_count(length, dcp) // size) for length in self.lengths]
        columns = max(counts) + self.draw.randrange(4)
        pages = max(sum(counts) + self.draw.randrange(5), 1)
        self._kv(pages, size)
        order = list(range(pages))
        self.draw.shuffle(order)
        junk = {"minus one": -1, "greatest": 2**31 - 1, "least": -2**31, "first beyond": pages,
                "valid": order[-1]}[self.case["bogus"]]
        table = torch.full((len(counts), max(columns, 1)), junk, dtype=torch.int64)
        self.seen = []          # local indices, pages, slots
        for b, count in enumerate(counts):
            mine = torch.tensor([order.pop() for _ in range(count)], dtype=torch.int64)
            local = self.sees(b).any(0).nonzero()[:, 0] if self.q_lens[b] else torch.zeros(0, dtype=torch.int64)
            needed = (local // size).unique()
            table[b, needed] = mine[needed]
            places = [local, mine[local // size], local % size]
            self.seen.append([index.to(self.where) for index in places])
            if len(local):
                self.kv_bytes[self.seen[b][1], self.seen[b][2]] = self._rows(len(local))
        stated = list(self.lengths)
        if self.fault:
            b, what = self.fault
            if what == "page":
                table[b, self.seen[b][0][0].item() // size] = self.draw.choice((-1, pages, 2**31 - 1, -2**31))
            else:
                beyond = (table.shape[1] * size + 1) * dcp[0] + dcp[0] * dcp[2] * 2
                stated[b] = -1 if what == "negative" else beyond
        self.table, self.stated = table, stated

    def _kv(self, pages, size):
        """The pool, all NaN; `kv` is what decodes are given, `kv_bytes` the same as bytes."""
        width = 656 if self.rows656 else 576 * self.kv_dtype.itemsize
        more = {"packed": (0, 0, 0), "rows": (0, 0, 64), "pages and rows": (1, 3, 64)}[self.case["strides"]]
        wide = self.room((pages + more[0], size + more[1], width + more[2]), torch.uint8).fill_(POISON)
        self.kv_bytes = wide[more[0]:, more[1]:, more[2]:]
        self.kv = self.kv_bytes if self.rows656 else self.kv_bytes.view(self.kv_dtype)

    def _rows(self, count):
        if not self.rows656:
            return self.random((count, 576), self.kv_dtype)
        scales = torch.rand((count, 4), device=self.where) * 1.5 + 0.5
        return torch.cat([self.random((count, 512), torch.float8_e4m3fn), scales.view(torch.uint8),
                          self.random((count, 64), torch.bfloat16)], 1)

    # Decodes and judgement.

    def options(self, only=None):
        """What decode() is given; `only`: that request alone."""
        case, requests = self.case, range(len(self.q_lens)) if only is None else [only]
        first, last = self.starts[requests[0]], self.starts[requests[-1] + 1]
        q, uniform = self.q[first:last], not case["ragged"]
        shape = (len(requests), -1, case["heads"])
        options = dict(softmax_scale=case["softmax_scale"], window=case["window"], dcp=case["dcp"],
                       lse_base=case["base"], deterministic=case["deterministic"], mask=case["mask"])
        if self.masks is not None:
            options["mask"] = self.metadata(self.masks[first:last], torch.int64)
        if self.sink is not None:
            options["sink"] = self.metadata(self.sink, torch.float32)
        for name, value in self.scales.items():
            options[name] = value if case["scales"] == "values" else self.metadata([value], torch.float32)
        if uniform:
            q = q.view(*shape, 576)
        else:
            options["cu_q"] = self.metadata([self.starts[b] - first for b in (*requests, requests[-1] + 1)],
                                            torch.int32)
        table = self.metadata(self.table[list(requests)], torch.int32)
        stated = self.metadata([self.stated[b] for b in requests], torch.int32)
        return (q, self.kv, table, stated), options

    def outputs(self, first, last):
        """The guarded outputs' rows, shaped as q is."""
        shape = (self.case["batch"], -1, self.case["heads"])
        out, lse = self.out[first:last], None if self.lse is None else self.lse[first:last]
        if not self.case["ragged"]:
            out, lse = out.view(*shape, 512), None if lse is None else lse.view(shape)
        return out, lse

    def decode(self):
        """Into the guarded outputs; the set of requests that failed."""
        import mlad
        self.out.view(torch.uint8).fill_(POISON)
        arguments, options = self.options()
        out, lse = self.outputs(0, self.starts[-1])
        if lse is None:
            options["return_lse"] = False
        else:
            self.lse.view(torch.uint8).fill_(POISON)
            options["lse"] = lse
        try:
            self.client.decode(*arguments, out=out, timeout=60, **options)
        except mlad.RequestsFailed as error:
            return {failure.request for failure in error.result.failures}
        return set()

    def alone(self, b):
        """out of request b in a batch of its own."""
        arguments, options = self.options(only=b)
        out = self.room(arguments[0].shape[:-1] + (512,), self.out_dtype)
        self.client.decode(*arguments, out=out, timeout=60, return_lse=False, **options)
        return out.reshape(self.q_lens[b], self.case["heads"], 512)

    def want(self, b):
        keys = torch.zeros((reference.local_count(self.lengths[b], self.case["dcp"]), 576), dtype=torch.double,
                           device=self.where)
        local, page, slot = self.seen[b]
        if len(local):
            rows = self.kv_bytes[page, slot]
            keys[local] = reference.dequantised(rows if self.rows656 else rows.view(self.kv_dtype))
        sink = self.sink if self.case["dcp"][1] == 0 else None
        return reference.attention(self.q[self.starts[b]:self.starts[b + 1]], keys, self.sees(b, self.where),
                                   softmax_scale=self.case["softmax_scale"], out_dtype=self.out_dtype, sink=sink,
                                   base2=self.case["base"] == "2", **self.scales)

    def verdicts(self):
        """(request, Verdict) of each that must be right and has rows."""
        for b, q_len in enumerate(self.q_lens):
            if q_len and not (self.fault and self.fault[0] == b):
                rows = slice(self.starts[b], self.starts[b + 1])
                want = self.want(b)
                lse = want.lse if self.lse is None else self.lse[rows]
                yield b, reference.judge(want, self.out[rows], lse, self.q_dtype)

    def canaries_intact(self):
        return all(bool((room[:CANARY] == GUARD).all()) and bool((room[-CANARY:] == GUARD).all())
                   for room in (self.out_room, self.lse_room) if room is not None)
