"""The image of kernels: machine code and PTX of the architectures that README.md names, and of no others.

usage: test_image.py mlak_cuda.fatbin"""
import struct
import sys

PTX, MACHINE_CODE = 1, 2


def entries(image):
    """(kind, architecture) of each entry; the layout is the driver's."""
    magic, _, header, size = struct.unpack_from("<IHHQ", image)
    assert magic == 0xba55ed50, f"{magic:#x} is not a fat binary's"
    at, end = header, header + size
    while at < end:
        kind, _, header, size = struct.unpack_from("<HHIQ", image, at)
        yield kind, struct.unpack_from("<I", image, at + 28)[0]
        at += header + size


with open(sys.argv[1], "rb") as file:
    found = sorted(entries(file.read()))
assert found == [(PTX, 100)] + [(MACHINE_CODE, n) for n in (80, 86, 89, 90, 100, 120)], found
