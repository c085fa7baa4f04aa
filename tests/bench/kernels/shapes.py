"""The shapes that are compared: dictionaries of batch, heads, q_len, kv_len (of a ragged batch: the mean that was drawn
from) and seqlens, of one length or one for each request."""
import itertools
import json
import random
import statistics

SEED = 2024
FIELDS = {"B": "batch", "H": "heads", "q": "q_len", "K": "kv_len"}


def uniform(batch, heads, q_len, kv_len):
    return {"batch": batch, "heads": heads, "q_len": q_len, "kv_len": kv_len, "seqlens": [kv_len]}


def grid():
    lists = (1, 10, 16, 64, 128), (16, 128), (1, 2, 4), (512, 2048, 8192)
    return [uniform(*numbers) for numbers in itertools.product(*lists)]


def ragged():
    """Lengths of a normal distribution, sigma half the mean, q_len at least; the same for all heads and q_len."""
    found = []
    for batch, mean in itertools.product((32, 128), (2048, 8192)):
        chance, normal = random.Random(SEED), statistics.NormalDist(mean, mean / 2)
        lengths = [normal.inv_cdf(1 - chance.random()) for _ in range(batch)]
        for heads, q_len in itertools.product((16, 128), (1, 4)):
            found.append({"batch": batch, "heads": heads, "q_len": q_len, "kv_len": mean, "ragged": True,
                          "seqlens": [max(q_len, round(length)) for length in lengths]})
    return found


def from_file(path):
    """A list of {batch, heads, q_len, kv_len}, optionally with the times that a peer took: h100_us, h200_us."""
    found = []
    for entry in json.loads(open(path).read()):
        shape = uniform(*(int(entry[name]) for name in FIELDS.values()))
        recorded = {name: entry[name] for name in ("h100_us", "h200_us") if name in entry}
        found.append({**shape, **({"recorded": recorded} if recorded else {})})
    return found


def only(shapes, text):
    """Those that a filter such as "B=1/10,H=16,K=512" lets through."""
    wanted = {}
    for part in text.split(",") if text else []:
        name, _, values = part.partition("=")
        if name not in FIELDS or not all(value.isdigit() for value in values.split("/")):
            raise ValueError(f"--only {text}: give B, H, q or K and numbers, such as B=1/10,H=16")
        wanted[FIELDS[name]] = {int(value) for value in values.split("/")}
    return [shape for shape in shapes if all(shape[name] in values for name, values in wanted.items())]


def line(shape):
    return " ".join(map(str, [shape["batch"], shape["heads"], shape["q_len"], *shape["seqlens"]]))


def name(shape):
    return (f"B={shape['batch']} H={shape['heads']} q={shape['q_len']} K={shape['kv_len']}"
            + (" ragged" if shape.get("ragged") else ""))
