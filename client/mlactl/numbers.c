/* numbers.c - one description of each format, one generic conversion. */
#include "numbers.h"

#include <math.h>
#include <stdbool.h>
#include <string.h>

static const struct { int bits, mantissa, min_exponent; } formats[] = {
    [MLA_BF16] = {16, 7, -126}, [MLA_FP16] = {16, 10, -14}, [MLA_E4M3] = {8, 3, -6}};

static int exponent(mla_dtype type, double x)
{
    int e = x == 0 ? formats[type].min_exponent : ilogb(x);
    return e < formats[type].min_exponent ? formats[type].min_exponent : e;
}

double number_ulp(mla_dtype type, double x) { return ldexp(1, exponent(type, x) - formats[type].mantissa); }

double number_round(mla_dtype type, double x)
{
    double ulp = number_ulp(type, x);
    return nearbyint(x / ulp) * ulp;
}

uint16_t number_encode(mla_dtype type, double x)
{
    int mantissa = formats[type].mantissa, min = formats[type].min_exponent;
    double value = fabs(number_round(type, x));
    uint32_t magnitude;
    if (value < ldexp(1, min)) {
        magnitude = (uint32_t)ldexp(value, mantissa - min);
    } else {
        int e = ilogb(value);
        magnitude = (uint32_t)(e - min + 1) << mantissa | ((uint32_t)ldexp(value, mantissa - e) - (1u << mantissa));
    }
    return (uint16_t)((signbit(x) ? 1u << (formats[type].bits - 1) : 0) | magnitude);
}

double number_decode(mla_dtype type, uint16_t bits)
{
    int mantissa = formats[type].mantissa, min = formats[type].min_exponent;
    uint32_t sign = (uint32_t)bits >> (formats[type].bits - 1),
             magnitude = bits & ((1u << (formats[type].bits - 1)) - 1);
    uint32_t biased = magnitude >> mantissa, fraction = magnitude & ((1u << mantissa) - 1);
    uint32_t largest = (1u << (formats[type].bits - 1 - mantissa)) - 1;
    double value;
    if (type == MLA_E4M3 ? magnitude == 0x7f : biased == largest) /* e4m3 has one NaN and no infinity */
        value = fraction ? NAN : INFINITY;
    else if (biased == 0)
        value = ldexp(fraction, min - mantissa);
    else
        value = ldexp(fraction + (1u << mantissa), (int)biased - 1 + min - mantissa);
    return sign ? -value : value;
}

double number_at(mla_dtype type, const void *array, uint64_t i)
{
    if (type == MLA_E4M3)
        return number_decode(type, ((const uint8_t *)array)[i]);
    uint16_t bits;
    memcpy(&bits, (const uint8_t *)array + 2 * i, sizeof bits);
    return number_decode(type, bits);
}

void number_put(mla_dtype type, void *array, uint64_t i, double x)
{
    uint16_t bits = number_encode(type, x);
    if (type == MLA_E4M3)
        ((uint8_t *)array)[i] = (uint8_t)bits;
    else
        memcpy((uint8_t *)array + 2 * i, &bits, sizeof bits);
}
