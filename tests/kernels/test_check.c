/* test_check.c - mlak_check: every field at its bounds and beyond, each refusal naming the field; sizes and names. */
#include "batch_maker.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

/* A device that refuses nothing. */
static struct mlak_capability everything[MAKER_TYPES * MLAK_MASK_COUNT];

static int fill_capabilities(void **state)
{
    (void)state;
    for (unsigned i = 0; i < MAKER_TYPES * MLAK_MASK_COUNT; i++) {
        struct mlak_batch types = {.page_size = 1};
        maker_set_types(&types, i / MLAK_MASK_COUNT);
        everything[i] = (struct mlak_capability){"test", types.q_dtype, types.out_dtype, types.kv_format,
                                                 (enum mlak_mask)(i % MLAK_MASK_COUNT), MLAK_MAX_HEADS, MLAK_MAX_Q,
                                                 MLAK_MAX_PAGE, MLAK_CAN_ALL};
    }
    return 0;
}

static struct mlak_batch sound(void)
{
    struct mlak_batch b = {
        .page_size = 64, .batch = 3, .heads = 16, .q_rows = 12, .pages = 10, .max_pages = 4, .softmax_scale = 0.1};
    mlak_batch_defaults(&b);
    return b;
}

static struct mlak_batch sound_types(uint32_t types)
{
    struct mlak_batch b = sound();
    maker_set_types(&b, types);
    return b;
}

enum { BF16, FP16, FP8, FP8_FP16, BF16_FP8, BF16_656 };         /* maker_set_types */

static void assert_takes(const struct mlak_batch *b)
{
    struct mlak_fault fault = {0};
    if (mlak_check(b, everything, MAKER_TYPES * MLAK_MASK_COUNT, &fault) != MLAK_OK)
        fail_msg("refused: %s: %s", fault.field, fault.message);
}

static void assert_refuses(const struct mlak_batch *b, const char *field)
{
    struct mlak_fault fault = {0};
    assert_int_equal(mlak_check(b, everything, MAKER_TYPES * MLAK_MASK_COUNT, &fault), MLAK_INVALID);
    assert_int_equal(fault.code, MLAK_INVALID);
    assert_string_equal(fault.field, field);
    assert_true(strlen(fault.message) > 15 && strlen(fault.message) < sizeof fault.message - 1);
    assert_int_equal(mlak_check(b, everything, MAKER_TYPES * MLAK_MASK_COUNT, NULL), MLAK_INVALID);
}

#define TAKES(change) do { struct mlak_batch b = sound(); change; assert_takes(&b); } while (0)
#define REFUSES(field, change) do { struct mlak_batch b = sound(); change; assert_refuses(&b, field); } while (0)

static void bounds_of_numbers(void **state)
{
    (void)state;
    TAKES((void)b);
    TAKES((b.batch = 1, b.q_rows = 64));
    TAKES((b.batch = 65536, b.q_rows = 65536 * 64));
    REFUSES("batch", b.batch = 0);
    REFUSES("batch", (b.batch = 65537, b.q_rows = 0));
    TAKES(b.heads = 1);
    TAKES(b.heads = 128);
    REFUSES("heads", b.heads = 0);
    REFUSES("heads", b.heads = 129);
    TAKES(b.page_size = 1);
    TAKES((b.page_size = 256, b.page_stride = 256 * b.row_stride));
    REFUSES("page_size", b.page_size = 0);
    REFUSES("page_size", b.page_size = 257);
    TAKES(b.pages = 0);
    TAKES(b.max_pages = 0);
    TAKES(b.pages = INT32_MAX);
    REFUSES("pages", b.pages = INT32_MAX + 1u);
    TAKES((b.dcp_world = 4096, b.dcp_rank = 4095, b.dcp_interleave = 1 << 20));
    REFUSES("dcp_world", b.dcp_world = 0);
    REFUSES("dcp_world", b.dcp_world = 4097);
    REFUSES("dcp_rank", b.dcp_rank = 1);
    REFUSES("dcp_rank", (b.dcp_world = 4, b.dcp_rank = 4));
    REFUSES("dcp_interleave", b.dcp_interleave = 0);
    REFUSES("dcp_interleave", b.dcp_interleave = (1 << 20) + 1);
    TAKES(b.window = UINT32_MAX);
}

static void rows_of_q(void **state)
{
    (void)state;
    TAKES(b.q_rows = 0);
    TAKES(b.q_rows = 3 * 64);
    REFUSES("q_rows", b.q_rows = 3 * 65);
    REFUSES("q_rows", b.q_rows = 13);
    TAKES((b.q_rows = 13, b.has_cu_q = true));
    TAKES((b.q_rows = 4194304, b.has_cu_q = true));
    REFUSES("q_rows", (b.q_rows = 4194305, b.has_cu_q = true));
    REFUSES("q_rows", b.q_rows = UINT64_MAX / 3 * 3);
}

static void enumerators(void **state)
{
    (void)state;
    REFUSES("q_dtype", b.q_dtype = MLAK_DTYPE_COUNT);
    REFUSES("q_dtype", b.q_dtype = (enum mlak_dtype)-1);
    REFUSES("kv_format", b.kv_format = MLAK_KV_FORMAT_COUNT);
    REFUSES("out_dtype", b.out_dtype = MLAK_DTYPE_COUNT);
    REFUSES("mask", b.mask = MLAK_MASK_COUNT);
    REFUSES("lse_base", b.lse_base = (enum mlak_lse_base)2);
    TAKES(b.lse_base = MLAK_LSE_2);
    TAKES(b.mask = MLAK_MASK_NONE);
    TAKES(b.deterministic = true);
}

/* Of all 3 x 4 x 3 combinations, the contract's table has six. */
static void combinations_of_element_types(void **state)
{
    (void)state;
    unsigned taken = 0;
    for (unsigned q = 0; q < MLAK_DTYPE_COUNT; q++)
        for (unsigned kv = 0; kv < MLAK_KV_FORMAT_COUNT; kv++)
            for (unsigned out = 0; out < MLAK_DTYPE_COUNT; out++) {
                struct mlak_batch b = sound();
                struct mlak_fault fault;
                b.q_dtype = (enum mlak_dtype)q;
                b.kv_format = (enum mlak_kv_format)kv;
                b.out_dtype = (enum mlak_dtype)out;
                taken += mlak_check(&b, everything, MAKER_TYPES * MLAK_MASK_COUNT, &fault) == MLAK_OK;
            }
    assert_int_equal(taken, MAKER_TYPES);
    for (uint32_t types = 0; types < MAKER_TYPES; types++) {
        struct mlak_batch b = sound_types(types);
        assert_takes(&b);
    }
    REFUSES("kv_format", b.kv_format = MLAK_KV_FP16);
    REFUSES("kv_format", (b = sound_types(FP16), b.kv_format = MLAK_KV_E4M3));
    REFUSES("kv_format", (b = sound_types(FP8), b.kv_format = MLAK_KV_E4M3_656));
    REFUSES("out_dtype", b.out_dtype = MLAK_FP16);
    REFUSES("out_dtype", (b = sound_types(FP8), b.out_dtype = MLAK_E4M3));
}

static void masks_and_their_tensor(void **state)
{
    (void)state;
    TAKES((b.mask = MLAK_MASK_TREE, b.has_tree_mask = true));
    REFUSES("tree_mask", b.mask = MLAK_MASK_TREE);
    REFUSES("tree_mask", b.has_tree_mask = true);
    REFUSES("tree_mask", (b.mask = MLAK_MASK_NONE, b.has_tree_mask = true));
}

static void strides(void **state)
{
    (void)state;
    TAKES((b.row_stride = 1168, b.page_stride = 64 * 1168));
    TAKES((b.row_stride = 1168, b.page_stride = 63 * 1168 + 1152));
    TAKES(b.page_stride += 16);
    REFUSES("row_stride", b.row_stride += 8);
    REFUSES("row_stride", b.row_stride -= 16);
    REFUSES("row_stride", b.row_stride = 0);
    REFUSES("row_stride", b.row_stride = UINT64_MAX - 15);
    REFUSES("row_stride", b.row_stride = UINT64_C(1) << 62);
    REFUSES("page_stride", b.page_stride += 8);
    REFUSES("page_stride", b.page_stride -= 16);
    REFUSES("page_stride", b.page_stride = 0);
    REFUSES("page_stride", b.page_stride = UINT64_MAX - 15);
    REFUSES("page_stride", (b.pages = 3, b.page_stride = UINT64_C(1) << 62));
    TAKES((b.pages = 1, b.page_stride = UINT64_C(1) << 62));
    REFUSES("row_stride", (b = sound_types(BF16_656), b.row_stride = 640));
}

static void scales(void **state)
{
    (void)state;
    const struct mlak_scale value = {.value = 2, .present = true},
                            tensor = {.value = NAN, .present = true, .has_tensor = true};
    const struct mlak_scale nan = {.value = NAN, .present = true}, big = {.value = 1e30f, .present = true};
    TAKES((b = sound_types(FP8), b.q_scale = value, b.k_scale = value, b.v_scale = tensor));
    TAKES((b = sound_types(BF16_FP8), b.k_scale = tensor, b.v_scale = value));
    REFUSES("q_scale", b.q_scale = value);
    REFUSES("k_scale", b.k_scale = tensor);
    REFUSES("v_scale", b.v_scale = value);
    REFUSES("q_scale", (b = sound_types(FP16), b.q_scale = tensor));
    REFUSES("q_scale", (b = sound_types(BF16_FP8), b.q_scale = value));
    REFUSES("k_scale", (b = sound_types(BF16_656), b.k_scale = value));
    REFUSES("v_scale", (b = sound_types(BF16_656), b.v_scale = tensor));
    REFUSES("q_scale", (b = sound_types(FP8), b.q_scale = nan));
    REFUSES("k_scale", (b = sound_types(FP8), b.k_scale = nan));
    REFUSES("v_scale", (b = sound_types(FP8_FP16), b.v_scale = nan));
    REFUSES("softmax_scale", (b = sound_types(FP8), b.q_scale = big, b.k_scale = big));
    TAKES(b.softmax_scale = 0);
    TAKES(b.softmax_scale = -1);
    REFUSES("softmax_scale", b.softmax_scale = (double)NAN);
    REFUSES("softmax_scale", b.softmax_scale = (double)INFINITY);
    REFUSES("softmax_scale", b.softmax_scale = -1e39);
}

static void sizes_and_names_of_tensors(void **state)
{
    (void)state;
    struct mlak_batch b = sound_types(BF16_656);
    static const uint64_t plain[MLAK_T_COUNT] = {
        12 * 16 * 1152, 10 * 64 * 656, 48, 12, 0, 0, 0, 0, 0, 0, 12 * 16 * 1024, 0};
    for (int i = 0; i < MLAK_T_COUNT; i++)
        assert_int_equal(mlak_extent(&b, (enum mlak_tensor)i), plain[i]);
    b = sound_types(FP8);
    b.has_cu_q = b.has_tree_mask = b.has_sink = b.has_lse = true;
    b.q_scale = b.k_scale = b.v_scale = (struct mlak_scale){.present = true, .has_tensor = true};
    b.row_stride = 592;
    b.page_stride = 40000;
    static const uint64_t all[MLAK_T_COUNT] = {12 * 16 * 576, 9 * 40000 + 63 * 592 + 576, 48, 12, 16, 96, 64, 4, 4, 4,
                                               12 * 16 * 1024, 12 * 16 * 4};
    static const uint32_t alignment[MLAK_T_COUNT] = {16, 16, 4, 4, 4, 8, 4, 4, 4, 4, 16, 4};
    for (int i = 0; i < MLAK_T_COUNT; i++) {
        assert_int_equal(mlak_extent(&b, (enum mlak_tensor)i), all[i]);
        assert_int_equal(mlak_alignment(&b, (enum mlak_tensor)i), alignment[i]);
    }
    b.v_scale.has_tensor = false;
    assert_int_equal(mlak_extent(&b, MLAK_T_V_SCALE), 0);
    assert_string_equal(mlak_tensor_name(MLAK_T_Q), "q");
    assert_string_equal(mlak_tensor_name(MLAK_T_BLOCK_TABLE), "block_table");
    assert_string_equal(mlak_tensor_name(MLAK_T_V_SCALE), "v_scale");
    assert_string_equal(mlak_tensor_name(MLAK_T_LSE), "lse");
    assert_int_equal(mlak_kv_row_bytes(MLAK_KV_BF16), 1152);
    assert_int_equal(mlak_kv_row_bytes(MLAK_KV_FP16), 1152);
    assert_int_equal(mlak_kv_row_bytes(MLAK_KV_E4M3), 576);
    assert_int_equal(mlak_kv_row_bytes(MLAK_KV_E4M3_656), 656);
}

/* Beyond 32 bits everywhere at once. */
static void large_sizes(void **state)
{
    (void)state;
    struct mlak_batch b = sound();
    b.batch = 65536;
    b.heads = 128;
    b.q_rows = 65536 * 64;
    b.pages = INT32_MAX;
    b.max_pages = 16777216;
    b.has_lse = true;
    assert_takes(&b);
    assert_true(mlak_extent(&b, MLAK_T_Q) == UINT64_C(4194304) * 128 * 1152);
    assert_true(mlak_extent(&b, MLAK_T_KV) == UINT64_C(2147483647) * 64 * 1152);
    assert_true(mlak_extent(&b, MLAK_T_BLOCK_TABLE) == UINT64_C(65536) * 16777216 * 4);
    assert_true(mlak_extent(&b, MLAK_T_OUT) == UINT64_C(4194304) * 128 * 1024);
    assert_true(mlak_extent(&b, MLAK_T_LSE) == UINT64_C(4194304) * 128 * 4);
    b.pages = 0;
    assert_true(mlak_extent(&b, MLAK_T_KV) == 0);
}

static void assert_unsupported(const struct mlak_batch *b, struct mlak_capability row, const char *field,
                               const char *cites)
{
    struct mlak_fault fault = {0};
    assert_int_equal(mlak_check(b, &row, 1, &fault), MLAK_UNSUPPORTED);
    assert_string_equal(fault.field, field);
    assert_non_null(strstr(fault.message, "capability table"));
    if (!strstr(fault.message, cites))
        fail_msg("\"%s\" does not cite \"%s\"", fault.message, cites);
}

/* A device that lacks something names the first thing that it lacks. */
static void what_a_device_lacks(void **state)
{
    (void)state;
    const struct mlak_capability whole = everything[BF16 * MLAK_MASK_COUNT + MLAK_MASK_CAUSAL];
    struct mlak_capability row = whole;
    struct mlak_batch b = sound();
    struct mlak_fault fault;
    assert_int_equal(mlak_check(&b, &row, 1, &fault), MLAK_OK);
    assert_int_equal(mlak_check(&b, &row, 0, &fault), MLAK_UNSUPPORTED);
    row = everything[FP16 * MLAK_MASK_COUNT];
    assert_unsupported(&b, row, "kv_format", "q bf16, kv bf16");
    row = everything[BF16 * MLAK_MASK_COUNT];
    assert_unsupported(&b, row, "mask", "mask causal");
    row = whole;
    row.max_heads = 15;
    assert_unsupported(&b, row, "heads", "15 heads");
    row = whole;
    row.max_q_len = 3;
    assert_unsupported(&b, row, "q_rows", "q_len 3");
    row = whole;
    row.max_page_size = 63;
    assert_unsupported(&b, row, "page_size", "page size 63");

    struct mlak_batch uses[] = {b, b, b, b, b, b, b, b, b};
    static const char *const names[] = {"ragged", "dcp",           "window",  "sink",   "lse_e",
                                        "lse_2",  "deterministic", "strided", "strided"};
    uses[0].has_cu_q = true;
    uses[1].dcp_world = 2;
    uses[2].window = 1;
    uses[3].has_sink = true;
    uses[4].has_lse = true;
    uses[5].has_lse = true;
    uses[5].lse_base = MLAK_LSE_2;
    uses[6].deterministic = true;
    uses[7].page_stride += 16;
    uses[8].row_stride += 16;
    uses[8].page_stride += 16 * 64;
    for (unsigned i = 0; i < 9; i++) {
        row = whole;
        row.features &= ~(1u << (i < 8 ? i : 7));
        assert_int_equal(mlak_check(&b, &row, 1, &fault), MLAK_OK);
        assert_unsupported(&uses[i], row, "features", names[i]);
    }
}

static void names_of_features(void **state)
{
    (void)state;
    char text[128];
    mlak_features_text(MLAK_CAN_ALL, text);
    assert_string_equal(text, "ragged dcp window sink lse_e lse_2 deterministic strided");
    mlak_features_text(MLAK_CAN_DCP | MLAK_CAN_LSE_2, text);
    assert_string_equal(text, "dcp lse_2");
    mlak_features_text(0, text);
    assert_string_equal(text, "");
}

/* What the maker draws is what the contract allows. */
static void drawn_descriptors_are_taken(void **state)
{
    (void)state;
    struct maker maker = maker_seeded(5);
    maker.max_heads = MLAK_MAX_HEADS;
    maker.max_q = MLAK_MAX_Q;
    for (unsigned i = 0; i < 2000; i++) {
        struct mlak_batch b = maker_describe(&maker);
        assert_takes(&b);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(bounds_of_numbers),          cmocka_unit_test(rows_of_q),
        cmocka_unit_test(enumerators),                cmocka_unit_test(combinations_of_element_types),
        cmocka_unit_test(masks_and_their_tensor),     cmocka_unit_test(strides),
        cmocka_unit_test(scales),                     cmocka_unit_test(sizes_and_names_of_tensors),
        cmocka_unit_test(large_sizes),                cmocka_unit_test(what_a_device_lacks),
        cmocka_unit_test(names_of_features),          cmocka_unit_test(drawn_descriptors_are_taken),
    };
    return cmocka_run_group_tests(tests, fill_capabilities, NULL);
}
