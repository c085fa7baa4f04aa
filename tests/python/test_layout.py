"""test_layout.py PROGRAM: the ctypes structures have the compiler's sizes, fields and offsets; every function
exists."""
import ctypes
import re
import subprocess
import sys
from pathlib import Path

from mlad import _libmla

expected = subprocess.run([sys.argv[1]], capture_output=True, text=True, check=True).stdout.split("\n")[:-1]
ours = []
for structure in _libmla.STRUCTURES:
    ours.append(f"{structure.__name__} - {ctypes.sizeof(structure)}")
    ours += [f"{structure.__name__} {name} {getattr(structure, name).offset}" for name, *_ in structure._fields_]
assert ours == expected, set(ours) ^ set(expected)

header = (Path(__file__).parents[2] / "client/include/mla.h").read_text()
declared = re.findall(r"^MLA_API [^;(]*?\b(\w+)\(", header, re.M)
assert sorted(declared) == sorted(_libmla._FUNCTIONS), set(declared) ^ set(_libmla._FUNCTIONS)
for structure in _libmla.STRUCTURES:
    body = re.search(r"typedef struct " + structure.__name__ + r" \{(.*?)\n\}", header, re.S).group(1)
    body = re.sub(r"/\*.*?\*/", "", body, flags=re.S)
    names = [re.sub(r".*[ *]|\[.*", "", name.strip()) for name in re.split("[;,]", body) if name.strip()]
    assert names == [name for name, *_ in structure._fields_], structure.__name__
codes = dict(re.findall(r"^ +MLA_(\w+) = (\d+)", header, re.M))
assert all(int(codes[name]) == getattr(_libmla, name) for name in ("OK", "BUSY", "REQUESTS", "TIMEOUT", "IN_USE"))
assert f"MLA_WHY {256}\n" in header
_libmla.library()
print("ok")
