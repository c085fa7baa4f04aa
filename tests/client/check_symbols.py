"""check_symbols.py LIBRARY MAP HEADER: the shared library exports what the map lists and the header declares, no more.
"""
import re
import subprocess
import sys

library, map_path, header_path = sys.argv[1:]
listing = subprocess.run(["nm", "-D", "--defined-only", library], check=True, capture_output=True, text=True).stdout
exported = {line.split()[2] for line in listing.splitlines() if line.split()[1] != "A"}
with open(map_path) as file:
    listed = set(re.findall(r"^\s+(\w+);$", file.read(), re.M))
with open(header_path) as file:
    declared = set(re.findall(r"^MLA_API [^;(]*?\b(\w+)\(", file.read(), re.M))
mapped = {f"{name}@@LIBMLA_0.1" for name in listed}
wrong = [f"{name}: only in {where}" for a, b, where in (
    (exported, mapped, "the library"), (mapped, exported, "the map, not the library"),
    (listed, declared, "the map, not the header"), (declared, listed, "the header, not the map"))
    for name in sorted(a - b)]
soname = subprocess.run(["objdump", "-p", library], check=True, capture_output=True, text=True).stdout
if not re.search(r"SONAME +libmla\.so\.0$", soname, re.M):
    wrong.append("the soname is not libmla.so.0")
print(*wrong, f"{len(declared)} functions", sep="\n")
sys.exit(bool(wrong) or not declared)
