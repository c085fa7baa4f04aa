/* mlak_convert.h - one number between fp32 or fp64 and the storage types bf16, fp16 and fp8 e4m3. Stateless, exact:
 * decoding loses nothing, encoding rounds to nearest even whatever the rounding and denormal modes of the thread are
 * (integer arithmetic throughout; the fp64 forms need the default rounding mode).
 *
 *            sign exponent mantissa  bias  largest  smallest > 0   specials
 *   bf16        1        8        7   127  3.39e38  2^-133         inf, NaN
 *   fp16        1        5       10    15    65504  2^-24          inf, NaN
 *   e4m3        1        4        3     7      448  2^-9           NaN (0x7f, 0xff), no inf */
#ifndef MLAK_CONVERT_H
#define MLAK_CONVERT_H

#include <stdint.h>
#include <string.h>

static inline uint32_t mlak_float_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float mlak_bits_float(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* ---- decode ---- */

static inline float mlak_bf16_to_float(uint16_t code) { return mlak_bits_float((uint32_t)code << 16); }

static inline float mlak_fp16_to_float(uint16_t code)
{
    uint32_t sign = (uint32_t)(code & 0x8000) << 16, exponent = (code >> 10) & 31, mantissa = code & 0x3ff;
    if (exponent == 31)
        return mlak_bits_float(sign | 0x7f800000 | mantissa << 13);
    if (exponent == 0) {
        float magnitude = (float)mantissa * 0x1p-24f;
        return sign ? -magnitude : magnitude;
    }
    return mlak_bits_float(sign | (exponent + 112) << 23 | mantissa << 13);
}

static inline float mlak_e4m3_to_float(uint8_t code)
{
    uint32_t sign = (uint32_t)(code & 0x80) << 24, exponent = (code >> 3) & 15, mantissa = code & 7;
    if ((code & 0x7f) == 0x7f)
        return mlak_bits_float(sign | 0x7fc00000);
    if (exponent == 0) {
        float magnitude = (float)mantissa * 0x1p-9f;
        return sign ? -magnitude : magnitude;
    }
    return mlak_bits_float(sign | (exponent + 120) << 23 | mantissa << 20);
}

/* ---- encode ---- */

/* Drop the low `shift` bits (1..31), to nearest, ties to even. */
static inline uint32_t mlak_round_bits(uint32_t bits, unsigned shift)
{
    uint32_t half = UINT32_C(1) << (shift - 1);
    return (bits + (half - 1) + ((bits >> shift) & 1)) >> shift;
}

static inline uint16_t mlak_float_to_bf16(float value)
{
    uint32_t bits = mlak_float_bits(value);
    if ((bits & 0x7fffffff) > 0x7f800000)
        return (uint16_t)(bits >> 16 | 0x40); /* quiet; keeps a payload from rounding to infinity */
    return (uint16_t)mlak_round_bits(bits, 16);
}

/* A binary format of fewer than 8 exponent bits and of a mantissa of `width` bits: the magnitude's code, `bits` being
 * those of a finite fp32 >= 0. Carries run into the exponent by themselves; overflow is the caller's. */
static inline uint32_t mlak_encode_magnitude(uint32_t bits, unsigned width, uint32_t bias)
{
    uint32_t exponent = bits >> 23, least = 127 - bias + 1; /* fp32 exponent of the format's least normal number */
    if (exponent >= least)
        return mlak_round_bits(bits - ((least - 1) << 23), 23 - width);
    uint32_t shift = 23 - width + (least - exponent); /* subnormal: align the mantissa, its leading 1 included */
    return shift > 25 ? 0 : mlak_round_bits((bits & 0x7fffff) | 0x800000, shift);
}

/* Beyond 65520 (half way to the number after the largest) is infinity. */
static inline uint16_t mlak_float_to_fp16(float value)
{
    uint32_t bits = mlak_float_bits(value), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000)
        return (uint16_t)(sign | 0x7e00);
    if (magnitude >= 0x477ff000)
        return (uint16_t)(sign | 0x7c00);
    return (uint16_t)(sign | mlak_encode_magnitude(magnitude, 10, 15));
}

/* Saturating: everything beyond 448, infinities too, is 448. */
static inline uint8_t mlak_float_to_e4m3(float value)
{
    uint32_t bits = mlak_float_bits(value), sign = (bits >> 24) & 0x80, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000)
        return (uint8_t)(sign | 0x7f);
    if (magnitude >= 0x43e00000)
        return (uint8_t)(sign | 0x7e);
    return (uint8_t)(sign | mlak_encode_magnitude(magnitude, 3, 7));
}

/* fp64 to fp32 rounded to odd: inexact results get an odd last bit, so that rounding once more, to a type of at least
 * two bits less, gives what rounding the fp64 once would have. */
static inline float mlak_double_to_odd(double value)
{
    float nearest = (float)value;
    double back = (double)nearest;
    if (back == value || value != value)
        return nearest;
    uint32_t bits = mlak_float_bits(nearest);
    if ((value < 0 ? -back : back) > (value < 0 ? -value : value))
        bits--; /* towards zero */
    return mlak_bits_float(bits | 1);
}

static inline uint16_t mlak_double_to_bf16(double value) { return mlak_float_to_bf16(mlak_double_to_odd(value)); }
static inline uint16_t mlak_double_to_fp16(double value) { return mlak_float_to_fp16(mlak_double_to_odd(value)); }

#endif
