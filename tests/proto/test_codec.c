/* Messages to bytes and back: golden bytes, random round trips, cut and damaged datagrams, text of enumerators. */
#include "cmocka_all.h"
#include "golden.h"
#include "mlap_tables.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static unsigned char bytes[MLAP_MAX_MESSAGE], again[MLAP_MAX_MESSAGE];
static union mlap_body body, second;

static void golden_has_every_message(void **state)
{
    (void)state;
    for (uint32_t type = 0; type < 2 * MLAP_TYPES_END; type++) {
        size_t found = 0;
        for (size_t i = 0; i < n_golden; i++)
            found += golden[i].type == type;
        assert_int_equal(found, mlap_type_name(type) != NULL);
    }
}

static void encoding_gives_golden_bytes(void **state)
{
    (void)state;
    for (size_t i = 0; i < n_golden; i++) {
        size_t length = golden_bytes(golden[i].notation, bytes);
        assert_int_equal(mlap_encode(again, sizeof again, golden[i].type, golden[i].sequence, golden[i].body), length);
        assert_memory_equal(again, bytes, length);
    }
}

static void golden_bytes_decode_to_every_field(void **state)
{
    (void)state;
    for (size_t i = 0; i < n_golden; i++) {
        size_t length = golden_bytes(golden[i].notation, bytes);
        struct mlap_header header;
        memset(&body, 0, sizeof body);
        assert_int_equal(mlap_decode(bytes, length, &header, &body, NULL), MLAP_code_OK);
        assert_int_equal(header.version, MLAP_VERSION);
        assert_int_equal(header.type, golden[i].type);
        assert_int_equal(header.sequence, golden[i].sequence);
        assert_memory_equal(&body, golden[i].body, golden[i].size);
    }
}

/* ---- random bodies within their bounds, drawn from the tables ---- */

static uint64_t random_state;

static uint64_t random_bits(void)
{
    random_state = random_state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    return random_state >> 33 ^ random_state << 31;
}

static uint64_t random_within(uint64_t min, uint64_t max)
{
    switch (random_bits() % 4) {
    case 0: return min;
    case 1: return max;
    default: return max - min == UINT64_MAX ? random_bits() : min + random_bits() % (max - min + 1);
    }
}

static void fill_map(const struct mlap_table *table, char *to)
{
    uint64_t present = 0;
    for (uint32_t i = 0; i < table->n_fields; i++) {
        const struct mlap_field *field = &table->fields[i];
        if (!field->required && random_bits() % 2 != 0)
            continue;
        present |= UINT64_C(1) << i;
        char *member = to + field->offset;
        uint64_t value = random_within(field->min, field->max);
        switch (field->kind) {
        case MLAP_KIND_BOOL:
            *member = random_bits() % 2 != 0;
            break;
        case MLAP_KIND_U32:
        case MLAP_KIND_U64:
            memcpy(member, &value, field->size);   /* little-endian */
            break;
        case MLAP_KIND_F64: {
            double number = ldexp((double)random_bits() - 0x1p63, (int)(random_bits() % 1000) - 500);
            memcpy(member, &number, sizeof number);
            break;
        }
        case MLAP_KIND_STR:
            for (uint64_t k = 0; k < value; k++)
                member[k] = (char)(1 + random_bits() % 127);
            break;
        case MLAP_KIND_ENUM: {
            uint32_t enumerator = (uint32_t)(random_bits() % field->names->count);
            memcpy(member, &enumerator, sizeof enumerator);
            break;
        }
        case MLAP_KIND_MSG:
            fill_map(field->table, member);
            break;
        case MLAP_KIND_LIST: {
            uint32_t count = (uint32_t)value;
            memcpy(to + field->count_offset, &count, sizeof count);
            for (uint32_t k = 0; k < count; k++)
                fill_map(field->table, member + k * field->table->size);
            break;
        }
        }
    }
    memcpy(to, &present, sizeof present);
}

static void random_bodies_survive_the_round_trip(void **state)
{
    (void)state;
    random_state = 1;
    for (uint32_t type = 0; type < MLAP_TYPES_END; type++) {
        const struct mlap_message *message = mlap_message_of(type);
        for (int round = 0; message != NULL && round < 100; round++) {
            memset(&body, 0, sizeof body);
            memset(&second, 0, sizeof second);
            fill_map(message->table, (char *)&body);
            uint32_t sequence = (uint32_t)random_bits();
            long length = mlap_encode(bytes, sizeof bytes, type, sequence, &body);
            assert_true(length > 0);
            struct mlap_header header;
            assert_int_equal(mlap_decode(bytes, (size_t)length, &header, &second, NULL), MLAP_code_OK);
            assert_int_equal(header.type, type);
            assert_int_equal(header.sequence, sequence);
            assert_memory_equal(&second, &body, message->table->size);
        }
    }
}

static void absent_fields_are_zero_in_a_used_body(void **state)
{
    (void)state;
    struct mlap_header header;
    size_t length = golden_bytes("94 01 01 05 81 a6'client' a1'x'", bytes);
    memset(&body, 0xff, sizeof body);
    assert_int_equal(mlap_decode(bytes, length, &header, &body, NULL), MLAP_code_OK);
    assert_true(mlap_has(&body.hello_, hello, client));
    assert_false(mlap_has(&body.hello_, hello, device));
    assert_string_equal(body.hello_.client, "x");
    assert_string_equal(body.hello_.device, "");
    assert_int_equal(body.hello_.features, 0);
}

static void field_order_and_number_width_are_free(void **state)
{
    (void)state;
    struct mlap_header header;
    size_t length = golden_bytes("dc0004 cf0000000000000001 cc04 ce00000009 df00000003 d907'message' da0000 "
                                 "a4'code' db00000004'busy' a5'field' a0", bytes);
    assert_int_equal(mlap_decode(bytes, length, &header, &body, NULL), MLAP_code_OK);
    assert_int_equal(body.error_.code, MLAP_code_BUSY);
    length = golden_bytes("94 01 05 09 83 a6'buffer' d100ff a4'kind' a5'memfd' a5'bytes' d300000000000000ff", bytes);
    assert_int_equal(mlap_decode(bytes, length, &header, &body, NULL), MLAP_code_OK);
    assert_int_equal(body.register_.buffer, 255);
    assert_int_equal(body.register_.bytes, 255);
}

static const char tensor[] = "82 a6'buffer' 01 a6'offset' 00";

/* softmax_scale of a DECODE, given as the msgpack value in `notation`. */
static double decode_scale(const char *notation)
{
    char text[1024];
    snprintf(text, sizeof text, "94 01 09 01 81 a5'batch' 8e a5'batch' 01 a5'heads' 01 a6'q_rows' 01 a7'q_dtype' "
             "a4'bf16' a9'kv_format' a4'bf16' a5'pages' 01 a9'page_size' 01 a9'max_pages' 01 a1'q' %s a2'kv' %s "
             "ab'block_table' %s a7'seqlens' %s a3'out' %s ad'softmax_scale' %s",
             tensor, tensor, tensor, tensor, tensor, notation);
    size_t length = golden_bytes(text, bytes);
    struct mlap_header header;
    return mlap_decode(bytes, length, &header, &body, NULL) == MLAP_code_OK ? body.decode_.batch.softmax_scale : NAN;
}

static void whole_numbers_and_single_precision_are_floats_too(void **state)
{
    (void)state;
    assert_true(decode_scale("cb3fe0000000000000") == 0.5);
    assert_true(decode_scale("ca3f000000") == 0.5);
    assert_true(decode_scale("02") == 2.0);
    assert_true(decode_scale("ff") == -1.0);
    assert_true(decode_scale("cf0020000000000000") == 0x1p53);
    assert_true(isnan(decode_scale("cf0020000000000001")));   /* not exact in a double */
    assert_true(isnan(decode_scale("ca7f800000")));           /* infinity */
    assert_true(isnan(decode_scale("cb7ff8000000000000")));   /* NaN */
}

/* ---- damage ---- */

static void every_truncation_is_malformed(void **state)
{
    (void)state;
    for (size_t i = 0; i < n_golden; i++) {
        size_t length = golden_bytes(golden[i].notation, bytes);
        for (size_t cut = 0; cut < length; cut++) {
            /* Exactly as long as it is, so that a sanitizer sees a read past the end. */
            unsigned char *part = malloc(cut + (cut == 0));
            memcpy(part, bytes, cut);
            struct mlap_header header;
            assert_int_equal(mlap_decode(part, cut, &header, &body, NULL), MLAP_code_MALFORMED);
            free(part);
        }
        bytes[length] = 0xc0;
        struct mlap_header header;
        assert_int_equal(mlap_decode(bytes, length + 1, &header, &body, NULL), MLAP_code_MALFORMED);
    }
}

static void damaged_bytes_decode_to_a_legal_message_or_an_error(void **state)
{
    (void)state;
    static const unsigned char damages[] = {0x01, 0x02, 0x04, 0x08, 0x10, 0x20, 0x40, 0x80, 0x55, 0xff};
    size_t accepted = 0, refused = 0;
    for (size_t i = 0; i < n_golden; i++) {
        size_t length = golden_bytes(golden[i].notation, bytes);
        for (size_t at = 0; at < length; at++) {
            unsigned char whole = bytes[at];
            for (size_t k = 0; k < sizeof damages; k++) {
                bytes[at] = whole ^ damages[k];
                struct mlap_header header;
                struct mlap_fault fault = {.code = MLAP_code_OK};
                enum mlap_code code = mlap_decode(bytes, length, &header, &body, &fault);
                assert_int_equal(code, fault.code);
                if (code == MLAP_code_OK) {
                    accepted++;
                    assert_true(mlap_encode(again, sizeof again, header.type, header.sequence, &body) > 0);
                } else {
                    refused++;
                    assert_true(fault.message[0] != '\0');
                }
            }
            bytes[at] = whole;
        }
    }
    assert_true(accepted > 1000 && refused > 10000);
}

/* ---- the encoder's refusals ---- */

static void encoder_refuses_what_a_decoder_would(void **state)
{
    (void)state;
    struct mlap_register reg = {.buffer = 0, .bytes = 1};
    errno = 0;
    assert_int_equal(mlap_encode(bytes, sizeof bytes, MLAP_REGISTER, 1, &reg), -1);
    assert_int_equal(errno, EINVAL);
    reg.buffer = 1;
    reg.kind = MLAP_buffer_kind_COUNT;
    assert_int_equal(mlap_encode(bytes, sizeof bytes, MLAP_REGISTER, 1, &reg), -1);
    struct mlap_error error = {.code = MLAP_code_BUSY, .message = "\xff"};
    assert_int_equal(mlap_encode(bytes, sizeof bytes, MLAP_ERROR, 1, &error), -1);
    memset(error.message, 'x', sizeof error.message);   /* no end */
    assert_int_equal(mlap_encode(bytes, sizeof bytes, MLAP_ERROR, 1, &error), -1);
    struct mlap_done *done = &body.done_;
    memset(done, 0, sizeof *done);
    done->n_failures = MLAP_MAX_FAILURES_LISTED + 1;
    assert_int_equal(mlap_encode(bytes, sizeof bytes, MLAP_DONE, 1, done), -1);
    const struct golden *plan = &golden[MLAP_PLAN - 1];
    memcpy(&body, plan->body, plan->size);
    body.plan_.batch.softmax_scale = NAN;
    assert_int_equal(mlap_encode(bytes, sizeof bytes, MLAP_PLAN, 1, &body), -1);
    assert_int_equal(errno, EINVAL);
    errno = 0;
    assert_int_equal(mlap_encode(bytes, sizeof bytes, 63, 1, &body), -1);
    assert_int_equal(errno, EINVAL);
}

static void encoder_stays_within_its_buffer(void **state)
{
    (void)state;
    for (size_t i = 0; i < n_golden; i++) {
        size_t length = golden_bytes(golden[i].notation, bytes);
        for (size_t room = 0; room <= length; room++) {
            char *buffer = malloc(room + (room == 0));
            errno = 0;
            long result = mlap_encode(buffer, room, golden[i].type, golden[i].sequence, golden[i].body);
            free(buffer);
            assert_int_equal(result, room == length ? (long)length : -1);
            assert_int_equal(errno, room == length ? 0 : EMSGSIZE);
        }
    }
}

/* ---- names ---- */

static void enumerators_have_texts_and_back(void **state)
{
    (void)state;
#define CHECK_ENUM(M, doc) \
    for (int value = 0; value < MLAP_##M##_COUNT; value++) \
        assert_int_equal(mlap_##M##_from_text(mlap_##M##_text((enum mlap_##M)value)), value); \
    assert_int_equal(mlap_##M##_from_text("no such text"), -1); \
    assert_string_equal(mlap_##M##_text(MLAP_##M##_COUNT), "?");
    MLAP_ENUMS(CHECK_ENUM)
    assert_string_equal(mlap_code_text(MLAP_code_BUSY), "busy");
    assert_int_equal(mlap_dtype_from_text("fp8_e4m3"), MLAP_dtype_E4M3);
}

static void type_facts(void **state)
{
    (void)state;
    assert_string_equal(mlap_type_name(MLAP_REGISTER), "REGISTER");
    assert_int_equal(mlap_type_fds(MLAP_REGISTER), 1);
    assert_int_equal(mlap_type_fds(MLAP_SUBMIT), 0);
    assert_int_equal(mlap_type_fds(MLAP_IMPORT_VMM), MLAP_MAX_FDS);
    assert_true(mlap_fds_fit(MLAP_SUBMIT, 0) && !mlap_fds_fit(MLAP_SUBMIT, 1));
    assert_true(!mlap_fds_fit(MLAP_REGISTER, 0) && mlap_fds_fit(MLAP_REGISTER, 1) && !mlap_fds_fit(MLAP_REGISTER, 2));
    assert_true(!mlap_fds_fit(MLAP_IMPORT_VMM, 0) && mlap_fds_fit(MLAP_IMPORT_VMM, 1) &&
                mlap_fds_fit(MLAP_IMPORT_VMM, MLAP_MAX_FDS) && !mlap_fds_fit(MLAP_IMPORT_VMM, MLAP_MAX_FDS + 1));
    assert_int_equal(mlap_type_from(MLAP_SUBMIT), MLAP_FROM_CLIENT);
    assert_int_equal(mlap_type_from(MLAP_DONE), MLAP_FROM_DAEMON);
    assert_int_equal(mlap_type_from(MLAP_ATTACH), MLAP_FROM_INTERNAL);
    assert_null(mlap_type_name(0));
    assert_int_equal(mlap_type_fds(UINT32_MAX), -1);
    assert_int_equal(mlap_type_from(30), -1);
}

static void a_fault_can_always_be_sent(void **state)
{
    (void)state;
    struct mlap_fault fault;
    char wide[2000] = "";
    for (size_t i = 0; i < 600; i++)
        memcpy(wide + 3 * i, "\xe2\x82\xac", 4);   /* cut in mid-character by both limits */
    assert_int_equal(mlap_fail(&fault, MLAP_code_INVALID, wide, "a%s", wide), MLAP_code_INVALID);
    assert_true(mlap_is_text(fault.field, strlen(fault.field)) && mlap_is_text(fault.message, strlen(fault.message)));
    mlap_fail(&fault, MLAP_code_INVALID, "f", "a\x01\n\x80 \xc3\xbc \xed\xa0\x80");
    assert_string_equal(fault.message, "a??? \xc3\xbc ???");
    assert_int_equal(mlap_fail(NULL, MLAP_code_BUSY, "", "%s", ""), MLAP_code_BUSY);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(golden_has_every_message),
        cmocka_unit_test(encoding_gives_golden_bytes),
        cmocka_unit_test(golden_bytes_decode_to_every_field),
        cmocka_unit_test(random_bodies_survive_the_round_trip),
        cmocka_unit_test(absent_fields_are_zero_in_a_used_body),
        cmocka_unit_test(field_order_and_number_width_are_free),
        cmocka_unit_test(whole_numbers_and_single_precision_are_floats_too),
        cmocka_unit_test(every_truncation_is_malformed),
        cmocka_unit_test(damaged_bytes_decode_to_a_legal_message_or_an_error),
        cmocka_unit_test(encoder_refuses_what_a_decoder_would),
        cmocka_unit_test(encoder_stays_within_its_buffer),
        cmocka_unit_test(enumerators_have_texts_and_back),
        cmocka_unit_test(type_facts),
        cmocka_unit_test(a_fault_can_always_be_sent),
    };
    return cmocka_run_group_tests_name("codec", tests, NULL, NULL);
}
