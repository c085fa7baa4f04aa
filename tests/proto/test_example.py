"""PROTOCOL.md tells the truth: its worked example is what another msgpack encoder makes of the messages it names."""
import json
import re
import sys

import msgpack


def main(page):
    with open(page, encoding="utf-8") as file:
        text = file.read()
    section = text.split("## An example, byte by byte")[1].split("\n## ")[0]
    examples = re.findall(r"`(\[1, \d+, .*?\])`, (\d+) bytes:\n(.*?)(?=\n\n[A-Z]|\Z)", section, re.DOTALL)
    if len(examples) < 2:
        sys.exit("the worked examples of PROTOCOL.md were not found")
    for message, length, table in examples:
        shown = bytes.fromhex("".join(re.findall(r"^\| `([0-9a-f ]+)` \|", table, re.MULTILINE)))
        right = msgpack.packb(json.loads(message))
        if shown != right or int(length) != len(right):
            sys.exit(f"{message} is {len(right)} bytes, {right.hex(' ')}; PROTOCOL.md shows {length}, {shown.hex(' ')}")


main(sys.argv[1])
