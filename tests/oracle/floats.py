"""The number formats of a capture, bit by bit: bf16, fp16 and fp8 e4m3fn.

Each format rounds fp64 to its nearest value (ties to even), and turns its own bits to and from fp64. Nothing is
rounded twice: the way from fp64 to a format never passes through a third one.
"""
from typing import NamedTuple

import numpy as np


class Format(NamedTuple):
    name: str           # the dtype's name in a safetensors file
    bits: type          # the unsigned integer that holds one value
    mantissa: int       # explicit mantissa bits
    min_exponent: int   # exponent of the smallest normal value
    largest: float      # largest finite value
    saturates: bool     # e4m3fn has no infinity: finite values beyond the range become the largest


BF16 = Format("BF16", np.uint16, 7, -126, 255 * 2.0**120, False)
FP16 = Format("F16", np.uint16, 10, -14, 65504.0, False)
E4M3 = Format("F8_E4M3", np.uint8, 3, -6, 448.0, True)
BY_NAME = {f.name: f for f in (BF16, FP16, E4M3)}


def round_to(fmt, x):
    """The fp64 values of x rounded to fmt's nearest value, ties to even; still fp64."""
    x = np.asarray(x, np.float64)
    with np.errstate(invalid="ignore"):
        exponent = np.frexp(x)[1] - 1
        ulp = np.maximum(exponent, fmt.min_exponent) - fmt.mantissa
        y = np.ldexp(np.rint(np.ldexp(x, -ulp)), ulp)
    too_large = np.abs(y) > fmt.largest
    if fmt.saturates:
        y = np.where(too_large & np.isfinite(x), np.copysign(fmt.largest, x), y)
        return np.where(np.isinf(x), np.nan, y)
    return np.where(too_large, np.copysign(np.inf, x), y)


def _e4m3_value(byte):
    """The value of one e4m3fn byte, by its definition: sign, 4 exponent bits with bias 7, 3 mantissa bits."""
    sign = -1.0 if byte & 0x80 else 1.0
    exponent, mantissa = byte >> 3 & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return np.nan
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (8 + mantissa) * 2.0**(exponent - 10)


_E4M3_VALUES = np.array([_e4m3_value(byte) for byte in range(256)])


def decode(fmt, bits):
    """fp64 values of an array of fmt's bits."""
    bits = np.asarray(bits)
    assert bits.dtype == fmt.bits, (bits.dtype, fmt.name)
    with np.errstate(invalid="ignore"):    # signalling NaN
        if fmt is BF16:
            return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        if fmt is FP16:
            return bits.view(np.float16).astype(np.float64)
    return _E4M3_VALUES[bits]


def encode(fmt, x):
    """The bits of x rounded to fmt."""
    y = round_to(fmt, x)
    with np.errstate(invalid="ignore", over="ignore"):
        if fmt is BF16:
            return (y.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        if fmt is FP16:
            return y.astype(np.float16).view(np.uint16)
    magnitude = np.searchsorted(_E4M3_VALUES[:0x7f], np.abs(np.nan_to_num(y))).astype(np.uint8)
    magnitude[np.isnan(y)] = 0x7f
    return magnitude | (np.signbit(y).astype(np.uint8) << 7)
