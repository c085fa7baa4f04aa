/* The yardstick of `mlactl verify`: number formats bit for bit, the model against closed forms, and that the judge does
 * refuse an answer in which a mask, a bound, a scale or the LSE base is wrong. */
#include "cases.h"
#include "model.h"
#include "numbers.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

static void every_value_survives_encoding(void **state)
{
    (void)state;
    static const struct {
        mla_dtype type;
        uint32_t count;
    } formats[] = {{MLA_BF16, 65536}, {MLA_FP16, 65536}, {MLA_E4M3, 256}};
    for (unsigned f = 0; f < 3; f++)
        for (uint32_t bits = 0; bits < formats[f].count; bits++) {
            double value = number_decode(formats[f].type, (uint16_t)bits);
            if (isfinite(value))
                assert_int_equal(number_encode(formats[f].type, value), bits);
        }
}

static void known_values_decode_right(void **state)
{
    (void)state;
    assert_true(number_decode(MLA_BF16, 0x3f80) == 1);
    assert_true(number_decode(MLA_BF16, 0xc049) == -3.140625);
    assert_true(number_decode(MLA_FP16, 0x3c00) == 1);
    assert_true(number_decode(MLA_FP16, 0x0001) == 0x1p-24);
    assert_true(number_decode(MLA_FP16, 0x7bff) == 65504);
    assert_true(number_decode(MLA_E4M3, 0x38) == 1);
    assert_true(number_decode(MLA_E4M3, 0x7e) == 448);
    assert_true(number_decode(MLA_E4M3, 0x01) == 0x1p-9);
    assert_true(isnan(number_decode(MLA_E4M3, 0xff)) && isnan(number_decode(MLA_BF16, 0xffff)) &&
                isnan(number_decode(MLA_FP16, 0xffff)));
    assert_true(isinf(number_decode(MLA_BF16, 0x7f80)));
}

static void ties_round_to_even(void **state)
{
    (void)state;
    assert_true(number_round(MLA_BF16, 1 + 0x1p-8) == 1);
    assert_true(number_round(MLA_BF16, 1 + 3 * 0x1p-8) == 1 + 0x1p-6);
    assert_true(number_round(MLA_E4M3, 0x1p-10) == 0);
    assert_true(number_round(MLA_E4M3, 3 * 0x1p-10) == 0x1p-8);
}

/* Sums of what each rank of a context-parallel group holds, for every length up to a few turns. */
static void ranks_hold_each_key_once(void **state)
{
    (void)state;
    mla_batch batch;
    mla_batch_init(&batch);
    for (batch.dcp_world = 1; batch.dcp_world <= 5; batch.dcp_world++)
        for (batch.dcp_interleave = 1; batch.dcp_interleave <= 4; batch.dcp_interleave++)
            for (int64_t length = 0; length < 50; length++) {
                uint64_t held = 0;
                int64_t total = 0;
                for (batch.dcp_rank = 0; batch.dcp_rank < batch.dcp_world; batch.dcp_rank++) {
                    int64_t local = model_local_len(&batch, length);
                    for (int64_t c = 0; c < local; c++)
                        held |= UINT64_C(1) << model_global_key(&batch, c);
                    total += local;
                }
                assert_int_equal(total, length);
                assert_true(held == (UINT64_C(1) << length) - 1);
            }
}

/* A case of one type and mask, with its model's own answer rounded as a perfect device would give it. */
struct answer { struct capture *capture; struct model *model; void *out; float *lse; };

static void round_model(struct answer *answer, const struct model *model)
{
    const mla_batch *batch = &answer->capture->batch;
    for (uint64_t i = 0; i < batch->q_rows * batch->heads * 512; i++)
        number_put(capture_out_dtype(batch), answer->out, i, model->out[i]);
    for (uint64_t i = 0; i < batch->q_rows * batch->heads; i++)
        answer->lse[i] = (float)model->lse[i];
}

static struct answer answer_to(struct capture *capture)
{
    const mla_batch *batch = &capture->batch;
    uint64_t rows = batch->q_rows * batch->heads;
    struct answer answer = {capture, model_new(capture), calloc(rows * 512 + 1, 2), calloc(rows + 1, 4)};
    assert_true(answer.model && answer.out && answer.lse);
    round_model(&answer, answer.model);
    return answer;
}

static void free_answer(struct answer *answer)
{
    capture_free(answer->capture);
    model_free(answer->model);
    free(answer->out);
    free(answer->lse);
}

static unsigned count_refused(const struct answer *answer)
{
    unsigned refused = 0;
    for (uint32_t b = 0; b < answer->capture->batch.batch; b++) {
        struct model_request request = model_request(answer->capture, b);
        refused += !model_judge(answer->model, &request, answer->out, answer->lse).good;
    }
    return refused;
}

static const struct mlap_capability rows[] = {
    {.q_dtype = MLAP_dtype_BF16, .kv_format = MLAP_kv_format_BF16, .out_dtype = MLAP_dtype_BF16},
    {.q_dtype = MLAP_dtype_FP16, .kv_format = MLAP_kv_format_FP16, .out_dtype = MLAP_dtype_FP16},
    {.q_dtype = MLAP_dtype_E4M3, .kv_format = MLAP_kv_format_E4M3, .out_dtype = MLAP_dtype_BF16},
    {.q_dtype = MLAP_dtype_E4M3, .kv_format = MLAP_kv_format_E4M3, .out_dtype = MLAP_dtype_FP16},
    {.q_dtype = MLAP_dtype_BF16, .kv_format = MLAP_kv_format_E4M3, .out_dtype = MLAP_dtype_BF16},
    {.q_dtype = MLAP_dtype_BF16, .kv_format = MLAP_kv_format_E4M3_656, .out_dtype = MLAP_dtype_BF16},
};
enum { ROWS = sizeof rows / sizeof *rows, SEEDS = 12 };

static struct capture *make_case(uint64_t seed, unsigned row, enum mlap_mask mask)
{
    struct mlap_capability capability = rows[row];
    struct run_layout layout;
    char text[200];
    capability.mask = mask;
    capability.max_heads = 3; /* small: this is a unit test */
    capability.max_q_len = 8;
    capability.max_page_size = 256;
    strcpy(capability.features, "ragged dcp window sink lse_e lse_2 deterministic strided");
    struct capture *capture = case_new(seed, &capability, &layout, text);
    assert_non_null(capture);
    return capture;
}

static void a_perfect_answer_passes(void **state)
{
    (void)state;
    for (uint64_t seed = 0; seed < SEEDS; seed++) {
        struct answer answer = answer_to(make_case(seed, (unsigned)seed % ROWS, (enum mlap_mask)(seed % 3)));
        assert_int_equal(count_refused(&answer), 0);
        free_answer(&answer);
    }
}

/* Change the capture's batch, let the model answer that other question, and judge it by the bar of the right one. Some
 * of the requests must be refused, in nearly every batch where the change matters: a key may by chance weigh next to
 * nothing. */
typedef bool breaker(struct capture *capture);

static void must_be_refused(breaker *breaks, enum mlap_mask mask)
{
    unsigned asked = 0, refused = 0;
    for (uint64_t seed = 100; seed < 100 + 2 * SEEDS; seed++) {
        struct capture *capture = make_case(seed, (unsigned)seed % ROWS, mask);
        struct answer answer = answer_to(capture);
        mla_batch right = capture->batch;
        if (breaks(capture)) {
            struct model *wrong = model_new(capture);
            assert_non_null(wrong);
            round_model(&answer, wrong);
            model_free(wrong);
            capture->batch = right;
            asked++;
            refused += count_refused(&answer) > 0;
        }
        free_answer(&answer);
    }
    assert_true(asked >= 4);
    if (refused * 4 < asked * 3)
        fail_msg("only %u of %u broken answers were refused", refused, asked);
}

static uint32_t longest_visible(const struct capture *capture)
{
    uint32_t most = 0;
    for (uint32_t b = 0; b < capture->batch.batch; b++) {
        struct model_request request = model_request(capture, b);
        uint32_t seen = 0;
        for (int64_t c = 0; c < request.local_len; c++)
            seen += model_seen(&request, c);
        most = seen > most && request.q_len > 1 ? seen : most;
    }
    return most;
}

/* Every token sees what any token's mask names. */
static bool ignore_tree(struct capture *capture)
{
    uint64_t *masks = capture->data[CAPTURE_TREE_MASK].memory;
    bool matters = false;
    if (capture->batch.window || longest_visible(capture) < 2)
        return false;
    for (uint32_t b = 0; b < capture->batch.batch; b++) {
        struct model_request request = model_request(capture, b);
        uint64_t all = 0, used = request.q_len >= 64 ? UINT64_MAX : (UINT64_C(1) << request.q_len) - 1;
        for (uint32_t t = 0; t < request.q_len; t++)
            all |= masks[request.first_row + t];
        for (uint32_t t = 0; t < request.q_len; t++) {
            matters |= request.local_len > 0 && capture->batch.dcp_world == 1 &&
                       (masks[request.first_row + t] & used) != (all & used) && request.global_len >= request.q_len;
            masks[request.first_row + t] |= all;
        }
    }
    return matters;
}

static bool other_base(struct capture *capture)
{
    capture->batch.lse_base = capture->batch.lse_base == MLA_LSE_E ? MLA_LSE_2 : MLA_LSE_E;
    return longest_visible(capture) >= 4;
}

static bool scale_off_by_a_hundredth(struct capture *capture)
{
    capture->batch.softmax_scale *= 1.01;
    return longest_visible(capture) >= 16;
}

static bool bound_one_short(struct capture *capture)
{
    int32_t *lengths = capture->data[CAPTURE_SEQLENS].memory;
    bool matters = false;
    if (capture->batch.window || capture->batch.dcp_world > 1)
        return false;
    for (uint32_t b = 0; b < capture->batch.batch; b++) {
        struct model_request request = model_request(capture, b);
        matters |= request.q_len > 0 && lengths[b] >= 1;
        lengths[b] -= lengths[b] > 0;
    }
    return matters;
}

static void a_wrong_mask_is_refused(void **state) { (void)state; must_be_refused(ignore_tree, MLAP_mask_TREE); }
static void a_wrong_base_is_refused(void **state) { (void)state; must_be_refused(other_base, MLAP_mask_CAUSAL); }
static void a_wrong_scale_is_refused(void **state)
{
    (void)state;
    must_be_refused(scale_off_by_a_hundredth, MLAP_mask_NONE);
}
static void a_wrong_bound_is_refused(void **state) { (void)state; must_be_refused(bound_one_short, MLAP_mask_NONE); }

static void one_nan_is_refused(void **state)
{
    (void)state;
    for (uint64_t seed = 0; seed < SEEDS; seed++) {
        struct answer answer = answer_to(make_case(seed, 0, MLAP_mask_CAUSAL));
        uint64_t elements = answer.capture->batch.q_rows * answer.capture->batch.heads * 512;
        if (elements) {
            ((uint16_t *)answer.out)[elements / 2] = 0xffff;
            assert_int_equal(count_refused(&answer), 1);
        }
        free_answer(&answer);
    }
}

static void the_same_seed_makes_the_same_batch(void **state)
{
    (void)state;
    struct capture *a = make_case(7, 5, MLAP_mask_TREE), *b = make_case(7, 5, MLAP_mask_TREE);
    assert_memory_equal(&a->batch, &b->batch, sizeof a->batch);
    for (unsigned i = 0; i < CAPTURE_TENSORS; i++)
        if (a->data[i].present)
            assert_memory_equal(a->data[i].memory, b->data[i].memory, a->data[i].bytes);
    capture_free(a);
    capture_free(b);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_value_survives_encoding), cmocka_unit_test(known_values_decode_right),
        cmocka_unit_test(ties_round_to_even),            cmocka_unit_test(ranks_hold_each_key_once),
        cmocka_unit_test(a_perfect_answer_passes),       cmocka_unit_test(a_wrong_mask_is_refused),
        cmocka_unit_test(a_wrong_base_is_refused),       cmocka_unit_test(a_wrong_scale_is_refused),
        cmocka_unit_test(a_wrong_bound_is_refused),      cmocka_unit_test(one_nan_is_refused),
        cmocka_unit_test(the_same_seed_makes_the_same_batch),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
