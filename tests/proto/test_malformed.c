/* Refusals: each class of malformed input gets its code, the path of the field, and a sentence.
 *
 * Two halves: datagrams written out by hand, and a walk over every field of every golden message that puts each kind of
 * wrong value in its place and expects exactly that path back. */
#include "cmocka_all.h"
#include "golden.h"
#include "mlap_tables.h"

#include <math.h>
#include <msgpack.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static unsigned char bytes[MLAP_MAX_MESSAGE + 1];
static union mlap_body body;

static void expect(const void *datagram, size_t length, enum mlap_code code, const char *field)
{
    struct mlap_header header;
    struct mlap_fault fault = {.code = MLAP_code_OK, .field = "", .message = ""};
    enum mlap_code got = mlap_decode(datagram, length, &header, &body, &fault);
    if (got != code || strcmp(fault.field, field) != 0)
        fail_msg("expected %s at '%s', got %s at '%s': %s", mlap_code_text(code), field, mlap_code_text(got),
                 fault.field, fault.message);
    if (code == MLAP_code_OK)
        return;
    /* Whatever was refused can be told to its sender. */
    struct mlap_error error = {.code = fault.code};
    memcpy(error.field, fault.field, sizeof error.field);
    memcpy(error.message, fault.message, sizeof error.message);
    static char reply[MLAP_MAX_MESSAGE];
    assert_true(error.message[0] != '\0' && mlap_encode(reply, sizeof reply, MLAP_ERROR, 1, &error) > 0);
}

/* ---- by hand ---- */

static const struct { const char *notation; enum mlap_code code; const char *field; } datagrams[] = {
    /* no message at all */
    {"", MLAP_code_MALFORMED, ""},
    {"c1", MLAP_code_MALFORMED, ""},
    {"80", MLAP_code_MALFORMED, ""},
    {"01", MLAP_code_MALFORMED, ""},
    {"a5'hello'", MLAP_code_MALFORMED, ""},
    {"90", MLAP_code_MALFORMED, ""},
    {"93 01 03 01", MLAP_code_MALFORMED, ""},
    {"95 01 03 01 80 c0", MLAP_code_MALFORMED, ""},
    {"94 01 03 01 80 00", MLAP_code_MALFORMED, ""},
    {"94 01 03 01 90", MLAP_code_MALFORMED, ""},
    {"94 01 03 01 c0", MLAP_code_MALFORMED, ""},
    {"94 01 03 ff 80", MLAP_code_MALFORMED, ""},
    {"94 01 03 cf0000000100000000 80", MLAP_code_MALFORMED, ""},
    {"94 01 a1'3' 01 80", MLAP_code_MALFORMED, ""},
    {"94 a1'1' 03 01 80", MLAP_code_MALFORMED, ""},
    {"94 00 03 01 80", MLAP_code_MALFORMED, ""},
    {"94 01 0a 01 81 01 02", MLAP_code_MALFORMED, ""},
    {"94 01 0a 01 81 c404'plan' 07", MLAP_code_MALFORMED, ""},
    /* another version, whatever its shape, and types that do not exist */
    {"94 02 0a 01 81 a4'plan' 07", MLAP_code_VERSION, ""},
    {"92 02 c0", MLAP_code_VERSION, ""},
    {"94 ceffffffff 03 01 80", MLAP_code_VERSION, ""},
    {"94 01 00 01 80", MLAP_code_UNKNOWN_TYPE, ""},
    {"94 01 1e 01 80", MLAP_code_UNKNOWN_TYPE, ""},
    {"94 01 ceffffffff 01 80", MLAP_code_UNKNOWN_TYPE, ""},
    /* bodies */
    {"94 01 03 01 80", MLAP_code_OK, ""},
    {"94 01 0a 01 80", MLAP_code_MISSING_FIELD, "plan"},
    {"94 01 03 01 81 a4'plan' 07", MLAP_code_UNKNOWN_FIELD, "plan"},
    {"94 01 0a 01 82 a4'plan' 07 a4'Plan' 07", MLAP_code_UNKNOWN_FIELD, "Plan"},
    {"94 01 0a 01 82 a4'plan' 07 a5'plan' 00 07", MLAP_code_UNKNOWN_FIELD, "plan?"},
    {"94 01 0a 01 82 a4'plan' 07 a4 80818283 07", MLAP_code_UNKNOWN_FIELD, "????"},
    {"94 01 0a 01 82 a4'plan' 07 a0 07", MLAP_code_UNKNOWN_FIELD, ""},
    {"94 01 0a 01 82 a4'plan' 07 a4'plan' 07", MLAP_code_INVALID, "plan"},
    {"94 01 0a 01 81 a4'plan' ce00000000", MLAP_code_INVALID, "plan"},
    {"94 01 0a 01 81 a4'plan' cf0000000100000000", MLAP_code_INVALID, "plan"},
    {"94 01 0a 01 81 a4'plan' d3ffffffffffffffff", MLAP_code_INVALID, "plan"},
    {"94 01 0a 01 81 a4'plan' ca40000000", MLAP_code_INVALID, "plan"},
    {"94 01 0a 01 81 a4'plan' d40000", MLAP_code_INVALID, "plan"},
    {"94 01 01 01 81 a6'client' a0", MLAP_code_INVALID, "client"},
    {"94 01 01 01 81 a6'client' a3'a' 00 'b'", MLAP_code_INVALID, "client"},
    {"94 01 01 01 81 a6'client' a2 c080", MLAP_code_INVALID, "client"},
    {"94 01 01 01 81 a6'client' a3 eda080", MLAP_code_INVALID, "client"},
    {"94 01 01 01 81 a6'client' a4 f4908080", MLAP_code_INVALID, "client"},
    {"94 01 01 01 81 a6'client' a2 e282", MLAP_code_INVALID, "client"},
    {"94 01 01 01 81 a6'client' a4 f09f9880", MLAP_code_OK, ""},
    {"94 01 01 01 82 a6'client' a1'c' a6'device' c0", MLAP_code_INVALID, "device"},
    {"94 01 04 01 83 a4'code' a4'Busy' a5'field' a0 a7'message' a0", MLAP_code_INVALID, "code"},
};

static void hand_written_datagrams(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof datagrams / sizeof datagrams[0]; i++) {
        print_message("%s\n", datagrams[i].notation);
        expect(bytes, golden_bytes(datagrams[i].notation, bytes), datagrams[i].code, datagrams[i].field);
    }
}

static void header_is_filled_as_far_as_it_goes(void **state)
{
    (void)state;
    struct mlap_header header;
    mlap_decode(bytes, golden_bytes("94 01 0a cd012c 80", bytes), &header, &body, NULL);
    assert_int_equal(header.type, MLAP_SUBMIT);
    assert_int_equal(header.sequence, 300);
    mlap_decode(bytes, golden_bytes("94 01 0a c0 80", bytes), &header, &body, NULL);
    assert_int_equal(header.type, MLAP_SUBMIT);
    assert_int_equal(header.sequence, 0);
}

static void sentences_say_what_is_allowed(void **state)
{
    (void)state;
    struct mlap_header header;
    struct mlap_fault fault;
    size_t length = golden_bytes("94 01 05 01 83 a6'buffer' 01 a4'kind' a4'cuda' a5'bytes' 01", bytes);
    mlap_decode(bytes, length, &header, &body, &fault);
    assert_string_equal(fault.message, "kind must be one of memfd, but is the 4-byte text 'cuda'");
    length = golden_bytes("94 01 0a 01 81 a4'plan' 00", bytes);
    mlap_decode(bytes, length, &header, &body, &fault);
    assert_string_equal(fault.message, "plan must be an integer from 1 to 4294967295, but is 0");
    length = golden_bytes("94 01 07 01 82 a4'plan' 01 a5'batch' 81 a5'heads' cc81", bytes);
    mlap_decode(bytes, length, &header, &body, &fault);
    assert_string_equal(fault.field, "batch.heads");
    assert_string_equal(fault.message, "batch.heads must be an integer from 1 to 128, but is 129");
}

/* ---- bombs: small datagrams that ask for much, large ones that nest ---- */

static void counts_beyond_the_datagram_are_refused(void **state)
{
    (void)state;
    static const char *const bombs[] = {
        "ddffffffff", "dfffffffff", "dbffffffff", "c6ffffffff", "c9ffffffff 00", "dcffff", "deffff", "daffff",
        "df80000000", "94 01 0a 01 df7fffffff", "94 01 0a 01 81 a4'plan' ddffffffff", "94 01 0a 01 81 dbffffffff 07",
        "94 01 0b 01 81 a8'failures' dd0fffffff 80",
    };
    for (size_t i = 0; i < sizeof bombs / sizeof bombs[0]; i++)
        expect(bytes, golden_bytes(bombs[i], bytes), MLAP_code_MALFORMED, "");
}

static void nesting_is_bounded(void **state)
{
    (void)state;
    for (size_t length = 10; length <= MLAP_MAX_MESSAGE; length *= 4) {
        memset(bytes, 0x91, length);   /* arrays of one, each in the other */
        bytes[length - 1] = 0xc0;
        expect(bytes, length, MLAP_code_MALFORMED, "");
    }
    /* Arrays of 65,000 that would each be legal alone. */
    for (size_t i = 0; i + 3 <= MLAP_MAX_MESSAGE; i += 3)
        memcpy(bytes + i, "\xdc\x7d\x00", 3);
    expect(bytes, MLAP_MAX_MESSAGE, MLAP_code_MALFORMED, "");
}

static void wide_values_are_refused_with_their_field(void **state)
{
    (void)state;
    size_t length = golden_bytes("94 01 0a 01 81 a4'plan' dc1f00", bytes);
    memset(bytes + length, 0xc0, 0x1f00);
    expect(bytes, length + 0x1f00, MLAP_code_INVALID, "plan");
    /* More values than any message has cost more time than they are worth. */
    length = golden_bytes("94 01 0a 01 81 a4'plan' dcff00", bytes);
    memset(bytes + length, 0xc0, 0xff00);
    expect(bytes, length + 0xff00, MLAP_code_MALFORMED, "");
    length = golden_bytes("94 01 01 01 81 a6'client' daff00", bytes);
    memset(bytes + length, 'x', 0xff00);
    expect(bytes, length + 0xff00, MLAP_code_INVALID, "client");
    /* A field's name of 65 kB is quoted only in part. */
    length = golden_bytes("94 01 03 01 81 daff00", bytes);
    memset(bytes + length, 'x', 0xff01);
    char name[64];
    memset(name, 'x', sizeof name - 1);
    name[sizeof name - 1] = '\0';
    expect(bytes, length + 0xff01, MLAP_code_UNKNOWN_FIELD, name);
    memset(bytes, 0, sizeof bytes);
    expect(bytes, MLAP_MAX_MESSAGE + 1, MLAP_code_MALFORMED, "");
}

/* ---- the walk ---- */

struct walk {
    const msgpack_object *datagram;
    size_t tried;
};

/* Pack the datagram as it now is, and expect that answer. */
static void try_it(struct walk *walk, enum mlap_code code, const char *field)
{
    msgpack_sbuffer buffer;
    msgpack_sbuffer_init(&buffer);
    msgpack_packer packer;
    msgpack_packer_init(&packer, &buffer, msgpack_sbuffer_write);
    assert_int_equal(msgpack_pack_object(&packer, *walk->datagram), 0);
    expect(buffer.data, buffer.size, code, field);
    msgpack_sbuffer_destroy(&buffer);
    walk->tried++;
}

static msgpack_object unsigned_object(uint64_t value)
{
    return (msgpack_object){.type = MSGPACK_OBJECT_POSITIVE_INTEGER, .via.u64 = value};
}

static msgpack_object text_object(const char *text, size_t length)
{
    return (msgpack_object){.type = MSGPACK_OBJECT_STR, .via.str = {(uint32_t)length, text}};
}

static msgpack_object float_object(double value)
{
    return (msgpack_object){.type = MSGPACK_OBJECT_FLOAT64, .via.f64 = value};
}

static void try_value(struct walk *walk, msgpack_object *place, msgpack_object value, enum mlap_code code,
                      const char *field)
{
    msgpack_object right = *place;
    *place = value;
    try_it(walk, code, code == MLAP_code_OK ? "" : field);
    *place = right;
}

static void try_text(struct walk *walk, msgpack_object *place, const struct mlap_field *field, const char *path)
{
    static const char *const bad[] = {"\xff", "\xc0\xaf", "\xed\xbf\xbf", "\xe2\x82", "\xf5\x80\x80\x80"};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++)
        try_value(walk, place, text_object(bad[i], strlen(bad[i])), MLAP_code_INVALID, path);
    char longest[600];
    memset(longest, 'x', sizeof longest);
    try_value(walk, place, text_object(longest, field->max), MLAP_code_OK, path);
    try_value(walk, place, text_object(longest, field->max + 1), MLAP_code_INVALID, path);
    longest[0] = '\0';
    try_value(walk, place, text_object(longest, 1), MLAP_code_INVALID, path);
    try_value(walk, place, text_object("", 0), field->min == 0 ? MLAP_code_OK : MLAP_code_INVALID, path);
    try_value(walk, place, (msgpack_object){.type = MSGPACK_OBJECT_BIN, .via.bin = {1, "x"}}, MLAP_code_INVALID, path);
}

static void try_list(struct walk *walk, msgpack_object *place, const struct mlap_field *field, const char *path)
{
    msgpack_object *many = calloc(field->max + 1, sizeof *many);   /* nil */
    char first[128];
    snprintf(first, sizeof first, "%s[0]", path);
    msgpack_object list = {.type = MSGPACK_OBJECT_ARRAY, .via.array = {(uint32_t)field->max + 1, many}};
    try_value(walk, place, list, MLAP_code_INVALID, path);
    list.via.array.size = (uint32_t)field->max;
    try_value(walk, place, list, MLAP_code_INVALID, first);
    list.via.array.size = 0;
    try_value(walk, place, list, MLAP_code_OK, path);
    free(many);
}

static void try_wrong_values(struct walk *walk, msgpack_object *place, const struct mlap_field *field,
                             const char *path)
{
    try_value(walk, place, (msgpack_object){.type = MSGPACK_OBJECT_NIL}, MLAP_code_INVALID, path);
    bool integer = field->kind == MLAP_KIND_U32 || field->kind == MLAP_KIND_U64;
    if (integer) {
        try_value(walk, place, unsigned_object(field->min), MLAP_code_OK, path);
        try_value(walk, place, unsigned_object(field->max), MLAP_code_OK, path);
        if (field->min > 0)
            try_value(walk, place, unsigned_object(field->min - 1), MLAP_code_INVALID, path);
        if (field->max < UINT64_MAX)
            try_value(walk, place, unsigned_object(field->max + 1), MLAP_code_INVALID, path);
        msgpack_object negative = {.type = MSGPACK_OBJECT_NEGATIVE_INTEGER, .via.i64 = -1};
        try_value(walk, place, negative, MLAP_code_INVALID, path);
        try_value(walk, place, float_object((double)field->min + 1), MLAP_code_INVALID, path);
    }
    if (field->kind == MLAP_KIND_F64) {
        const double bad[] = {NAN, INFINITY, -INFINITY};
        for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++)
            try_value(walk, place, float_object(bad[i]), MLAP_code_INVALID, path);
    } else {
        try_value(walk, place, float_object(0.5), MLAP_code_INVALID, path);
    }
    if (field->kind == MLAP_KIND_STR)
        try_text(walk, place, field, path);
    else
        try_value(walk, place, text_object("nonsense", 8), MLAP_code_INVALID, path);
    if (field->kind == MLAP_KIND_LIST)
        try_list(walk, place, field, path);
    else
        try_value(walk, place, (msgpack_object){.type = MSGPACK_OBJECT_ARRAY}, MLAP_code_INVALID, path);
    if (field->kind != MLAP_KIND_MSG)
        try_value(walk, place, (msgpack_object){.type = MSGPACK_OBJECT_MAP}, MLAP_code_INVALID, path);
    if (!integer && field->kind != MLAP_KIND_F64)
        try_value(walk, place, unsigned_object(1), MLAP_code_INVALID, path);
}

/* The key of pair `i` changed, the pair gone, the pair twice. */
static void try_keys(struct walk *walk, msgpack_object *map, uint32_t i, bool required, const char *path,
                     const char *prefix)
{
    msgpack_object_kv *pair = &map->via.map.ptr[i];
    char unknown[128];
    snprintf(unknown, sizeof unknown, "%szzz", prefix);
    try_value(walk, &pair->key, text_object("zzz", 3), MLAP_code_UNKNOWN_FIELD, unknown);
    size_t up = strlen(prefix) - (*prefix != '\0');
    snprintf(unknown, sizeof unknown, "%.*s", (int)up, prefix);
    try_value(walk, &pair->key, unsigned_object(1), MLAP_code_MALFORMED, unknown);

    const msgpack_object whole = *map;
    uint32_t size = whole.via.map.size;
    msgpack_object_kv *pairs = malloc((size + 1) * sizeof *pairs);
    memcpy(pairs, whole.via.map.ptr, size * sizeof *pairs);
    map->via.map.ptr = pairs;
    map->via.map.size = size + 1;
    pairs[size] = pairs[i];
    try_it(walk, MLAP_code_INVALID, path);
    map->via.map.size = size - 1;
    pairs[i] = pairs[size - 1];
    try_it(walk, required ? MLAP_code_MISSING_FIELD : MLAP_code_OK, required ? path : "");
    free(pairs);
    *map = whole;
}

static void walk_map(struct walk *walk, const struct mlap_table *table, msgpack_object *map, const char *prefix)
{
    assert_int_equal(map->via.map.size, table->n_fields);
    for (uint32_t i = 0; i < table->n_fields; i++) {
        const struct mlap_field *field = &table->fields[i];
        msgpack_object *value = &map->via.map.ptr[i].val;
        char path[96], below[128];
        snprintf(path, sizeof path, "%s%s", prefix, field->name);
        try_keys(walk, map, i, field->required, path, prefix);
        try_wrong_values(walk, value, field, path);
        if (field->kind == MLAP_KIND_MSG) {
            snprintf(below, sizeof below, "%s.", path);
            walk_map(walk, field->table, value, below);
        }
        for (uint32_t k = 0; field->kind == MLAP_KIND_LIST && k < value->via.array.size; k++) {
            snprintf(below, sizeof below, "%s[%u].", path, k);
            walk_map(walk, field->table, &value->via.array.ptr[k], below);
        }
    }
}

static void every_field_refuses_every_wrong_value_by_its_path(void **state)
{
    (void)state;
    struct walk walk = {.tried = 0};
    for (size_t i = 0; i < n_golden; i++) {
        msgpack_unpacked unpacked;
        msgpack_unpacked_init(&unpacked);
        size_t length = golden_bytes(golden[i].notation, bytes);
        assert_int_equal(msgpack_unpack_next(&unpacked, (char *)bytes, length, NULL), MSGPACK_UNPACK_SUCCESS);
        walk.datagram = &unpacked.data;
        walk_map(&walk, mlap_message_of(golden[i].type)->table, &unpacked.data.via.array.ptr[3], "");
        msgpack_unpacked_destroy(&unpacked);
    }
    print_message("%zu datagrams\n", walk.tried);
    assert_true(walk.tried > 4000);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(hand_written_datagrams),
        cmocka_unit_test(header_is_filled_as_far_as_it_goes),
        cmocka_unit_test(sentences_say_what_is_allowed),
        cmocka_unit_test(counts_beyond_the_datagram_are_refused),
        cmocka_unit_test(nesting_is_bounded),
        cmocka_unit_test(wide_values_are_refused_with_their_field),
        cmocka_unit_test(every_field_refuses_every_wrong_value_by_its_path),
    };
    return cmocka_run_group_tests_name("malformed", tests, NULL, NULL);
}
