"""A small checker of the OpenMetrics text format: every line, the order of families, and the rules of each type."""
import re

NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
LABELS = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\["\\n])*)"(,|$)')
SUFFIXES = {"counter": ("_total", "_created"), "gauge": ("",), "info": ("_info",), "stateset": ("",),
            "summary": ("", "_sum", "_count", "_created")}


def parse_labels(text):
    labels, at = {}, 0
    while at < len(text):
        match = LABELS.match(text, at)
        assert match, f"labels {text!r}"
        assert match[1] not in labels, f"label {match[1]} twice"
        labels[match[1]] = match[2]
        at = match.end()
    return labels


def parse(text):
    """{family: {"type", "unit", "help", "samples": [(name, labels, value)]}}; AssertionError where the format is
    broken."""
    assert text.endswith("# EOF\n"), "no # EOF at the end"
    families, family, seen = {}, None, set()
    for line in text.splitlines()[:-1]:
        meta = re.fullmatch(rf"# (TYPE|UNIT|HELP) ({NAME}) (.*)", line)
        if meta:
            kind, name, value = meta.groups()
            if kind == "TYPE":
                assert name not in families, f"family {name} twice"
                assert value in SUFFIXES, f"type {value}"
                family = families[name] = {"name": name, "type": value, "unit": "", "help": "", "samples": []}
            else:
                assert family and family["name"] == name and not family["samples"], f"{kind} of {name} out of place"
                assert not family[kind.lower()], f"{kind} of {name} twice"
                family[kind.lower()] = value
                assert kind != "UNIT" or name.endswith("_" + value), f"{name} does not end with its unit {value}"
            continue
        sample = re.fullmatch(rf"({NAME})(?:\{{(.*)\}})? (-?[0-9.]+(?:e[+-]?[0-9]+)?)", line)
        assert sample, f"line {line!r}"
        assert family, "a sample before any family"
        name, labels, value = sample[1], parse_labels(sample[2] or ""), float(sample[3])
        names = [family["name"] + suffix for suffix in SUFFIXES[family["type"]]]
        assert name in names, f"{name} is not of family {family['name']}"
        key = (name, tuple(sorted(labels.items())))
        assert key not in seen, f"sample {key} twice"
        seen.add(key)
        if family["type"] == "counter" or name.endswith("_count"):
            assert value >= 0
        if family["type"] == "stateset":
            assert family["name"] in labels and value in (0, 1)
        if family["type"] == "summary" and name == family["name"]:
            assert 0 <= float(labels["quantile"]) <= 1
        family["samples"].append((name, labels, value))
    return families
