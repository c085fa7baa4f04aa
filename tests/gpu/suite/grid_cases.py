"""Random cases over the whole contract, such that every value of every axis appears: each axis is a deck of cards that
is dealt to its end before it is shuffled again."""
import random

KINDS = {       # q, kv, out
    "bf16": ("bfloat16", "bfloat16", "bfloat16"),
    "fp16": ("float16", "float16", "float16"),
    "e4m3": ("float8_e4m3fn", "float8_e4m3fn", "bfloat16"),
    "e4m3 to fp16": ("float8_e4m3fn", "float8_e4m3fn", "float16"),
    "bf16 e4m3": ("bfloat16", "float8_e4m3fn", "bfloat16"),
    "bf16 656": ("bfloat16", "656", "bfloat16"),
}
AXES = {
    "kind": list(KINDS),
    "mask": ["none", "causal", "tree"],
    "heads": [1, 3, 6, 9, 12, 16, 24, 48, 63, 64, 96, 126, 128],
    "page": [1, 2, 3, 16, 17, 32, 64, 100, 128, 256, "random"],
    "ragged": [False, True],
    "q_len": [1, 2, 3, 4, 5, 8, 16, 33, 64],
    "lengths": ["short", "edges", "middle", "long", "zero"],
    "batch": [1, 2, 3, 5, 8, 40],
    "window": [0, 0, 1, 7, 64, 200, 5000],
    "sink": [False, True],
    "dcp": [(1, 0, 1), (1, 0, 1), (2, 0, 1), (2, 1, 1), (4, 3, 1), (3, 1, 16), (8, 7, 64)],
    "base": ["e", "2"],
    "deterministic": [False, True],
    "scales": ["none", "values", "tensors"],
    "strides": ["packed", "rows", "pages and rows"],
    "metadata": ["device", "copied", "host"],
    "lse": [True, True, True, False],
    "bogus": ["minus one", "greatest", "least", "first beyond", "valid"],
    "fault": ["", "", "", "", "", "page", "negative", "beyond"],
    "softmax_scale": [0.0417, 0.072, 0.2],
}


class Decks:
    def __init__(self, seed):
        self.draw, self.decks = random.Random(seed), {name: [] for name in AXES}
        self.dealt = {name: {} for name in AXES}

    def deal(self):
        """The axes of the next case."""
        case = {}
        for name, values in AXES.items():
            if not self.decks[name]:
                self.decks[name] = self.draw.sample(values, len(values))
            case[name] = self.decks[name].pop()
            key = str(case[name])
            self.dealt[name][key] = self.dealt[name].get(key, 0) + 1
        if case["page"] == "random":
            case["page"] = self.draw.randrange(1, 257)
        return case

    def not_dealt(self):
        return [f"{name}={value}" for name, values in AXES.items() for value in map(str, values)
                if value not in self.dealt[name]]


def q_lens(draw, case):
    most = case["q_len"]
    if not case["ragged"]:
        return [most] * case["batch"]
    lens = [draw.choice((0, 1, most, draw.randrange(most + 1))) for _ in range(case["batch"])]
    if not any(lens):
        lens[-1] = most
    return lens


def lengths(draw, case, q, cap):
    """Global lengths; about one in six is 0, one in six below q."""
    world, result = case["dcp"][0], []
    for q_len in q:
        kind = draw.randrange(6)
        if kind == 0 or case["lengths"] == "zero" and kind < 4:
            length = 0
        elif kind == 1:
            length = draw.randrange(q_len + 1)
        elif case["lengths"] == "edges":
            unit = draw.choice((16, 32, 64, 128, case["page"]))
            length = max(0, unit * draw.randrange(1, 6) + draw.randrange(-1, 2)) * world
        else:
            most = {"short": 200, "zero": 200, "middle": 1500, "long": 6000}[case["lengths"]]
            length = draw.randrange(most + 1) * (world if most < 1000 else 1)
        result.append(min(length, cap * world))
    return result
