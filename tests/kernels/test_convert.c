/* test_convert.c - scalar conversions against independent arithmetic (ldexp, oracle.c), every code of every type. */
#include "mlak_convert.h"
#include "oracle.h"

#include <float.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>

#include <cmocka.h>

static const struct { enum mlak_dtype dtype; uint32_t codes; } types[] = {
    {MLAK_BF16, 65536}, {MLAK_FP16, 65536}, {MLAK_E4M3, 256},
};

static float decode(enum mlak_dtype dtype, uint32_t code)
{
    return dtype == MLAK_BF16   ? mlak_bf16_to_float((uint16_t)code)
           : dtype == MLAK_FP16 ? mlak_fp16_to_float((uint16_t)code)
                                : mlak_e4m3_to_float((uint8_t)code);
}

static uint32_t encode(enum mlak_dtype dtype, float value)
{
    return dtype == MLAK_BF16   ? mlak_float_to_bf16(value)
           : dtype == MLAK_FP16 ? mlak_float_to_fp16(value)
                                : mlak_float_to_e4m3(value);
}

static uint32_t encode_double(enum mlak_dtype dtype, double value)
{
    return dtype == MLAK_BF16 ? mlak_double_to_bf16(value) : mlak_double_to_fp16(value);
}

static bool same(double a, double b) { return (isnan(a) && isnan(b)) || (a == b && signbit(a) == signbit(b)); }

/* `value` rounds as the independent arithmetic says. e4m3 saturates, infinity included. */
static void assert_rounds(enum mlak_dtype dtype, float value)
{
    double want = (double)oracle_round(dtype, (long double)value);
    if (dtype == MLAK_E4M3 && isinf(value))
        want = copysign(448, want);
    double got = oracle_decode(dtype, encode(dtype, value));
    if (!same(got, want))
        fail_msg("type %d: %a rounds to %a, not %a", dtype, (double)value, got, want);
}

static void every_code_decodes(void **state)
{
    (void)state;
    for (unsigned i = 0; i < 3; i++)
        for (uint32_t code = 0; code < types[i].codes; code++)
            if (!same((double)decode(types[i].dtype, code), oracle_decode(types[i].dtype, code)))
                fail_msg("type %d: code %x", types[i].dtype, code);
}

static void every_code_survives_a_round_trip(void **state)
{
    (void)state;
    for (unsigned i = 0; i < 3; i++)
        for (uint32_t code = 0; code < types[i].codes; code++) {
            float value = decode(types[i].dtype, code);
            uint32_t back = encode(types[i].dtype, value);
            if (isnan(value) ? !isnan(decode(types[i].dtype, back)) : back != code)
                fail_msg("type %d: code %x comes back as %x", types[i].dtype, code, back);
        }
}

/* Half way between neighbours, and one fp32 step to either side. */
static void ties_round_to_even(void **state)
{
    (void)state;
    for (unsigned i = 0; i < 3; i++)
        for (uint32_t code = 0; code + 1 < types[i].codes; code++) {
            float low = decode(types[i].dtype, code), high = decode(types[i].dtype, code + 1);
            if (!isfinite(low) || !isfinite(high) || signbit(low) != signbit(high))
                continue;
            float middle = (float)(((double)low + (double)high) / 2);
            assert_rounds(types[i].dtype, middle);
            assert_rounds(types[i].dtype, nextafterf(middle, low));
            assert_rounds(types[i].dtype, nextafterf(middle, high));
        }
}

static void any_float_rounds_to_nearest(void **state)
{
    (void)state;
    struct maker maker = maker_seeded(1);
    static const float special[] = {
        0.0f,      -0.0f, INFINITY, -INFINITY, NAN, FLT_MAX, -FLT_MAX, FLT_MIN,         0x1p-149f, -0x1p-149f,
        65519.99f, 65520, 448,      463.9f,    464, 480,     0x1p-10f, 0x1.000002p-10f, 0x1p-25f,  0x1.000002p-25f};
    for (unsigned i = 0; i < 3; i++) {
        for (unsigned j = 0; j < sizeof special / sizeof special[0]; j++)
            assert_rounds(types[i].dtype, special[j]);
        for (unsigned j = 0; j < 200000; j++)
            assert_rounds(types[i].dtype, mlak_bits_float((uint32_t)maker_random(&maker)));
    }
}

/* Rounding fp64 to fp32 and then further would turn a number just off a tie into the tie. */
static void doubles_round_once(void **state)
{
    (void)state;
    for (unsigned i = 0; i < 2; i++)
        for (uint32_t code = 0; code + 1 < types[i].codes; code += 3) {
            double low = oracle_decode(types[i].dtype, code), high = oracle_decode(types[i].dtype, code + 1);
            if (!isfinite(low) || !isfinite(high) || signbit(low) != signbit(high))
                continue;
            double middle = (low + high) / 2;
            assert_int_equal(encode_double(types[i].dtype, nextafter(middle, low)), code);
            assert_int_equal(encode_double(types[i].dtype, nextafter(middle, high)), code + 1);
            assert_int_equal(encode_double(types[i].dtype, middle), code & 1 ? code + 1 : code);
        }
    assert_int_equal(mlak_double_to_bf16(1e300), 0x7f80);
    assert_int_equal(mlak_double_to_fp16(-1e300), 0xfc00);
    assert_int_equal(mlak_double_to_bf16(-1e-300), 0x8000);
    assert_true(isnan(mlak_bf16_to_float(mlak_double_to_bf16((double)NAN))));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_code_decodes),          cmocka_unit_test(every_code_survives_a_round_trip),
        cmocka_unit_test(ties_round_to_even),          cmocka_unit_test(any_float_rounds_to_nearest),
        cmocka_unit_test(doubles_round_once),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
