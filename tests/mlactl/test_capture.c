/* The capture reader: what it accepts, and one test for each thing it refuses. Files are made in memory, field by
 * field. */
#include "capture.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cmocka.h>

/* The parts of a good file: two rows of q, one head, two pages of one token. Tests change one. */
struct parts {
    const char *metadata, *q, *kv, *block_table, *seqlens, *more, *tail;
    size_t data;    /* bytes after the header */
};
static const struct parts good = {
    .metadata = "\"softmax_scale\":\"0.5\"",
    .q = "\"q\":{\"dtype\":\"BF16\",\"shape\":[2,1,576],\"data_offsets\":[0,2304]}",
    .kv = "\"kv\":{\"dtype\":\"BF16\",\"shape\":[2,1,576],\"data_offsets\":[2304,4608]}",
    .block_table = "\"block_table\":{\"dtype\":\"I32\",\"shape\":[1,2],\"data_offsets\":[4608,4616]}",
    .seqlens = "\"seqlens\":{\"dtype\":\"I32\",\"shape\":[1],\"data_offsets\":[4616,4620]}",
    .more = "", .tail = "", .data = 4620,
};

static int file_of(const void *header, uint64_t stated, size_t length, size_t data)
{
    int fd = memfd_create("capture", MFD_CLOEXEC);
    assert_true(fd >= 0);
    assert_int_equal(write(fd, &stated, 8), 8);
    assert_int_equal(write(fd, header, length), length);
    assert_int_equal(ftruncate(fd, (off_t)(8 + length + data)), 0);
    return fd;
}

static int read_parts(const struct parts *parts, struct capture **capture, struct ctl_fault *fault)
{
    char header[4096];
    int length = snprintf(header, sizeof header, "{\"__metadata__\":{%s},%s,%s,%s,%s%s}%s", parts->metadata, parts->q,
                          parts->kv, parts->block_table, parts->seqlens, parts->more, parts->tail);
    return capture_read(file_of(header, (uint64_t)length, (size_t)length, parts->data), capture, fault);
}

/* The file is refused and the sentence names `what`. */
static void refused(const struct parts *parts, const char *what)
{
    struct capture *capture = NULL;
    struct ctl_fault fault = {""};
    assert_int_equal(read_parts(parts, &capture, &fault), -1);
    assert_null(capture);
    if (!strstr(fault.text, what))
        fail_msg("\"%s\" does not say \"%s\"", fault.text, what);
}

static struct capture *accepted(const struct parts *parts)
{
    struct capture *capture = NULL;
    struct ctl_fault fault = {""};
    if (read_parts(parts, &capture, &fault))
        fail_msg("refused: %s", fault.text);
    return capture;
}

static struct parts changed(struct parts parts, size_t member, const char *value)
{
    memcpy((char *)&parts + member, &value, sizeof value);
    return parts;
}
static void refused_with(size_t member, const char *value, const char *what)
{
    struct parts parts = changed(good, member, value);
    refused(&parts, what);
}
#define IN(member) offsetof(struct parts, member)

static void defaults_are_those_of_the_schema(void **state)
{
    (void)state;
    struct capture *capture = accepted(&good);
    const mla_batch *batch = &capture->batch;
    assert_int_equal(batch->batch, 1);
    assert_int_equal(batch->heads, 1);
    assert_int_equal(batch->q_rows, 2);
    assert_int_equal(batch->pages, 2);
    assert_int_equal(batch->page_size, 1);
    assert_int_equal(batch->max_pages, 2);
    assert_true(batch->softmax_scale == 0.5);
    assert_int_equal(batch->mask, MLA_MASK_CAUSAL);
    assert_int_equal(batch->lse_base, MLA_LSE_E);
    assert_int_equal(batch->dcp_world, 1);
    assert_int_equal(batch->dcp_rank, 0);
    assert_int_equal(batch->dcp_interleave, 1);
    assert_int_equal(batch->window, 0);
    assert_int_equal(batch->deterministic, 0);
    assert_int_equal(capture_out_dtype(batch), MLA_BF16);
    assert_false(capture->data[CAPTURE_CU_Q].present);
    capture_free(capture);
}

static void every_metadata_key_is_honoured(void **state)
{
    (void)state;
    struct parts parts = changed(
        good, IN(metadata),
        "\"softmax_scale\":\"-1.25e-1\",\"mask\":\"none\",\"lse_base\":\"2\",\"dcp_world\":\"4\",\"dcp_rank\":\"3\","
        "\"dcp_interleave\":\"16\",\"window\":\"7\",\"deterministic\":\"1\",\"out_dtype\":\"fp16\"");
    struct capture *capture = accepted(&parts);
    const mla_batch *batch = &capture->batch;
    assert_true(batch->softmax_scale == -0.125);
    assert_int_equal(batch->mask, MLA_MASK_NONE);
    assert_int_equal(batch->lse_base, MLA_LSE_2);
    assert_int_equal(batch->dcp_world, 4);
    assert_int_equal(batch->dcp_rank, 3);
    assert_int_equal(batch->dcp_interleave, 16);
    assert_int_equal(batch->window, 7);
    assert_int_equal(batch->deterministic, 1);
    assert_int_equal(capture_out_dtype(batch), MLA_FP16);
    capture_free(capture);
}

static void unaligned_data_is_read_right(void **state)
{
    (void)state;
    char header[4096];
    for (unsigned pad = 0; pad < 8; pad++) {
        int length = snprintf(header, sizeof header, "{\"__metadata__\":{%s},%s,%s,%s,%s}%*s", good.metadata, good.q,
                              good.kv, good.block_table, good.seqlens, (int)pad, "");
        int fd = file_of(header, (uint64_t)length, (size_t)length, good.data);
        const int32_t value = 0x01020304;
        assert_int_equal(pwrite(fd, &value, 4, 8 + length + 4616), 4);
        struct capture *capture;
        struct ctl_fault fault;
        int32_t seqlen;
        assert_int_equal(capture_read(fd, &capture, &fault), 0);
        assert_int_equal(capture_load(capture, CAPTURE_SEQLENS, &seqlen, &fault), 0);
        assert_int_equal(seqlen, value);
        capture_free(capture);
    }
}

static void headers_that_are_no_json_object_are_refused(void **state)
{
    (void)state;
    static const char *const bad[] = {"", "[]", "null", "{", "{\"q\":}", "{} x", "{}{}", "nonsense"};
    for (unsigned i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct capture *capture = NULL;
        struct ctl_fault fault;
        int fd = file_of(bad[i], strlen(bad[i]), strlen(bad[i]), 0);
        assert_int_equal(capture_read(fd, &capture, &fault), -1);
        assert_non_null(strstr(fault.text, "header"));
    }
}

static void header_lengths_are_bounded(void **state)
{
    (void)state;
    struct capture *capture = NULL;
    struct ctl_fault fault;
    assert_int_equal(capture_read(file_of("{}", 3, 2, 0), &capture, &fault), -1);
    assert_non_null(strstr(fault.text, "the end of the file"));
    assert_int_equal(capture_read(file_of("{}", UINT64_MAX, 2, 0), &capture, &fault), -1);
    assert_int_equal(capture_read(file_of("{}", 65537, 2, 70000), &capture, &fault), -1);
    assert_non_null(strstr(fault.text, "65536"));
    int fd = memfd_create("short", MFD_CLOEXEC);
    assert_int_equal(write(fd, "1234567", 7), 7);
    assert_int_equal(capture_read(fd, &capture, &fault), -1);
    assert_non_null(strstr(fault.text, "7 bytes"));
}

static void repeated_keys_are_refused(void **state)
{
    (void)state;
    refused_with(IN(seqlens), "\"q\":{}", "twice");
    refused_with(IN(metadata), "\"softmax_scale\":\"1\",\"softmax_scale\":\"2\"", "twice");
    refused_with(IN(q), "\"q\":{\"dtype\":\"BF16\",\"dtype\":\"F16\",\"shape\":[2,1,576],\"data_offsets\":[0,2304]}",
                 "twice");
}

static void nul_in_a_name_is_refused(void **state)
{
    (void)state;
    refused_with(IN(metadata), "\"softmax_scale\\u0000x\":\"1\"", "NUL");
}

static void unknown_names_are_refused_by_name(void **state)
{
    (void)state;
    refused_with(IN(more), ",\"bias\":{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[4620,4620]}",
                 "unknown tensor bias");
    refused_with(IN(more), ",\"Q\":{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[4620,4620]}", "unknown tensor Q");
    refused_with(IN(metadata), "\"softmax_scale\":\"1\",\"scale\":\"1\"", "unknown metadata scale");
    refused_with(IN(q), "\"q\":{\"dtype\":\"BF16\",\"shape\":[2,1,576],\"data_offsets\":[0,2304],\"stride\":1}",
                 "unknown field stride");
    refused_with(IN(more), ",\"a\\u001b[2J\":{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[4620,4620]}",
                 "a\\x1b[2J");
}

static void missing_parts_are_refused_by_name(void **state)
{
    (void)state;
    refused_with(IN(metadata), "\"mask\":\"causal\"", "softmax_scale is missing");
    refused_with(IN(q), "\"q\":{\"shape\":[2,1,576],\"data_offsets\":[0,2304]}", "required");
    struct parts parts = good; /* seqlens gone: block_table takes its bytes */
    parts.block_table = "\"block_table\":{\"dtype\":\"I32\",\"shape\":[1,3],\"data_offsets\":[4608,4620]}";
    parts.seqlens = "\"sink\":{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[4620,4620]}";
    refused(&parts, "tensor seqlens is missing");
}

static void wrong_types_are_refused(void **state)
{
    (void)state;
    refused_with(IN(q), "\"q\":{\"dtype\":\"F32\",\"shape\":[1,1,576],\"data_offsets\":[0,2304]}",
                 "tensor q: dtype F32");
    refused_with(IN(q), "\"q\":{\"dtype\":\"F64\",\"shape\":[1,1,288],\"data_offsets\":[0,2304]}", "dtype F64");
    refused_with(IN(q), "\"q\":{\"dtype\":7,\"shape\":[2,1,576],\"data_offsets\":[0,2304]}", "dtype");
    refused_with(IN(q), "\"q\":[]", "no object");
    refused_with(IN(seqlens), "\"seqlens\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4616,4620]}",
                 "tensor seqlens: dtype F32");
    refused_with(IN(metadata), "\"softmax_scale\":1", "no text");
}

static void wrong_shapes_are_refused(void **state)
{
    (void)state;
    refused_with(IN(q), "\"q\":{\"dtype\":\"BF16\",\"shape\":[1,2,576],\"data_offsets\":[0,2300]}", "span 2300");
    refused_with(IN(q), "\"q\":{\"dtype\":\"BF16\",\"shape\":[2,576],\"data_offsets\":[0,2304]}", "must have 3");
    refused_with(IN(q), "\"q\":{\"dtype\":\"BF16\",\"shape\":[2,1,1,1,576],\"data_offsets\":[0,2304]}", "more than 4");
    refused_with(IN(q), "\"q\":{\"dtype\":\"BF16\",\"shape\":[2,2,288],\"data_offsets\":[0,2304]}", "[2, 2, 576]");
    refused_with(IN(q), "\"q\":{\"dtype\":\"BF16\",\"shape\":[-2,1,576],\"data_offsets\":[0,2304]}", "whole number");
    refused_with(IN(q), "\"q\":{\"dtype\":\"BF16\",\"shape\":[2.5,1,576],\"data_offsets\":[0,2304]}", "whole number");
    refused_with(IN(q), "\"q\":{\"dtype\":\"BF16\",\"shape\":[4294967296,4294967296,1],\"data_offsets\":[0,2304]}",
                 "2^64");
    refused_with(IN(q), "\"q\":{\"dtype\":\"BF16\",\"shape\":[9007199254740992,1024,1],\"data_offsets\":[0,2304]}",
                 "2^64 bytes");
    refused_with(IN(kv), "\"kv\":{\"dtype\":\"BF16\",\"shape\":[0,1,576],\"data_offsets\":[2304,4608]}", "span 2304");
    refused_with(IN(block_table), "\"block_table\":{\"dtype\":\"I32\",\"shape\":[2,1],\"data_offsets\":[4608,4616]}",
                 "tensor seqlens");
    refused_with(IN(kv), "\"kv\":{\"dtype\":\"U8\",\"shape\":[4,1,576],\"data_offsets\":[2304,4608]}", "[4, 1, 656]");
    struct parts parts = {.metadata = good.metadata,
                          .q = "\"q\":{\"dtype\":\"BF16\",\"shape\":[2,0,576],\"data_offsets\":[0,0]}",
                          .kv = "\"kv\":{\"dtype\":\"BF16\",\"shape\":[2,1,576],\"data_offsets\":[0,2304]}",
                          .block_table =
                              "\"block_table\":{\"dtype\":\"I32\",\"shape\":[1,2],\"data_offsets\":[2304,2312]}",
                          .seqlens = "\"seqlens\":{\"dtype\":\"I32\",\"shape\":[1],\"data_offsets\":[2312,2316]}",
                          .more = "",
                          .tail = "",
                          .data = 2316};
    refused(&parts, "heads, is 0");
}

static void offsets_must_cover_the_file(void **state)
{
    (void)state;
    refused_with(IN(kv), "\"kv\":{\"dtype\":\"BF16\",\"shape\":[2,1,576],\"data_offsets\":[0,2304]}", "overlaps");
    refused_with(IN(seqlens), "\"seqlens\":{\"dtype\":\"I32\",\"shape\":[1],\"data_offsets\":[4617,4621]}",
                 "do not lie");
    refused_with(IN(seqlens), "\"seqlens\":{\"dtype\":\"I32\",\"shape\":[1],\"data_offsets\":[4620,4616]}",
                 "do not lie");
    refused_with(IN(seqlens), "\"seqlens\":{\"dtype\":\"I32\",\"shape\":[1],\"data_offsets\":[4616]}",
                 "two whole numbers");
    refused_with(IN(seqlens), "\"seqlens\":{\"dtype\":\"I32\",\"shape\":[1],\"data_offsets\":[-4,0]}",
                 "two whole numbers");
    struct parts parts = good;
    parts.data = 4624;
    refused(&parts, "belong to no tensor");
    parts.seqlens = "\"seqlens\":{\"dtype\":\"I32\",\"shape\":[1],\"data_offsets\":[4620,4624]}";
    refused(&parts, "hole");
    parts.data = 4619;
    parts.seqlens = good.seqlens;
    refused(&parts, "do not lie");
}

static void metadata_values_are_checked(void **state)
{
    (void)state;
    static const char *const bad[][2] = {
        {"softmax_scale", ""},     {"softmax_scale", "nan"}, {"softmax_scale", "inf"},    {"softmax_scale", "0x1p3"},
        {"softmax_scale", "1e999"}, {"softmax_scale", "1 "},  {"softmax_scale", "1,5"},    {"mask", "Causal"},
        {"mask", ""},              {"lse_base", "10"},       {"out_dtype", "fp8"},        {"dcp_world", "0"},
        {"dcp_world", "4097"},     {"dcp_rank", "-1"},       {"dcp_rank", "4096"},        {"dcp_interleave", "0"},
        {"dcp_interleave", "1.0"}, {"window", "0"},          {"window", "99999999999999"}, {"window", "None"},
        {"deterministic", "2"},    {"deterministic", "true"},
    };
    for (unsigned i = 0; i < sizeof bad / sizeof *bad; i++) {
        char metadata[200], what[80];
        snprintf(metadata, sizeof metadata, "%s\"%s\":\"%s\"", i < 7 ? "" : "\"softmax_scale\":\"1\",", bad[i][0],
                 bad[i][1]);
        snprintf(what, sizeof what, "metadata %s: it is", bad[i][0]);
        refused_with(IN(metadata), metadata, what);
    }
    refused_with(IN(metadata), "\"softmax_scale\":\"1\",\"dcp_world\":\"2\",\"dcp_rank\":\"2\"", "below dcp_world");
}

static void tree_mask_goes_with_the_tree(void **state)
{
    (void)state;
    refused_with(IN(metadata), "\"softmax_scale\":\"1\",\"mask\":\"tree\"", "tree_mask");
    struct parts parts =
        changed(good, IN(more), ",\"tree_mask\":{\"dtype\":\"U64\",\"shape\":[2],\"data_offsets\":[4620,4636]}");
    parts.data = 4636;
    refused(&parts, "tree_mask");
    parts.metadata = "\"softmax_scale\":\"1\",\"mask\":\"tree\"";
    capture_free(accepted(&parts));
}

static void uneven_q_needs_cu_q(void **state)
{
    (void)state;
    struct parts parts = {.metadata = good.metadata,
                          .q = "\"q\":{\"dtype\":\"BF16\",\"shape\":[3,1,576],\"data_offsets\":[0,3456]}",
                          .kv = "\"kv\":{\"dtype\":\"BF16\",\"shape\":[0,1,576],\"data_offsets\":[3456,3456]}",
                          .block_table =
                              "\"block_table\":{\"dtype\":\"I32\",\"shape\":[2,0],\"data_offsets\":[3456,3456]}",
                          .seqlens = "\"seqlens\":{\"dtype\":\"I32\",\"shape\":[2],\"data_offsets\":[3456,3464]}",
                          .more = "",
                          .tail = "",
                          .data = 3464};
    refused(&parts, "do not divide");
    parts.more = ",\"cu_q\":{\"dtype\":\"I32\",\"shape\":[3],\"data_offsets\":[3464,3476]}";
    parts.data = 3476;
    capture_free(accepted(&parts));
}

static void what_is_written_reads_back(void **state)
{
    (void)state;
    char path[] = "/tmp/mlactl-test-XXXXXX";
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    close(fd);
    struct capture *capture = capture_new(), *back = NULL;
    mla_batch *batch = &capture->batch;
    batch->q_dtype = MLA_E4M3, batch->kv_format = MLA_KV_E4M3, batch->out_dtype = MLA_FP16, batch->mask = MLA_MASK_TREE;
    batch->lse_base = MLA_LSE_2, batch->batch = 2, batch->heads = 3, batch->q_rows = 5, batch->pages = 4,
    batch->page_size = 7;
    batch->max_pages = 2, batch->softmax_scale = 0.1, batch->dcp_world = 2, batch->dcp_rank = 1, batch->window = 9;
    batch->deterministic = 1;
    for (unsigned i = 0; i < CAPTURE_TENSORS; i++)
        memset(capture_add(capture, (enum capture_tensor)i), (int)i + 1, capture->data[i].bytes);
    struct ctl_fault fault = {""};
    assert_int_equal(capture_write(capture, path, &fault), 0);
    assert_int_equal(capture_open(path, &back, &fault), 0);
    unlink(path);
    assert_memory_equal(&back->batch, batch, sizeof *batch);
    for (unsigned i = 0; i < CAPTURE_TENSORS; i++) {
        assert_int_equal(back->data[i].bytes, capture->data[i].bytes);
        void *bytes = malloc(back->data[i].bytes);
        assert_int_equal(capture_load(back, (enum capture_tensor)i, bytes, &fault), 0);
        assert_memory_equal(bytes, capture->data[i].memory, back->data[i].bytes);
        free(bytes);
    }
    capture_free(capture);
    capture_free(back);
}

static void a_file_that_shrinks_is_an_error(void **state)
{
    (void)state;
    char header[4096];
    int length = snprintf(header, sizeof header, "{\"__metadata__\":{%s},%s,%s,%s,%s}", good.metadata, good.q, good.kv,
                          good.block_table, good.seqlens);
    int fd = file_of(header, (uint64_t)length, (size_t)length, good.data);
    struct capture *capture;
    struct ctl_fault fault;
    int32_t seqlen;
    assert_int_equal(capture_read(fd, &capture, &fault), 0);
    assert_int_equal(ftruncate(fd, length), 0);
    assert_int_equal(capture_load(capture, CAPTURE_SEQLENS, &seqlen, &fault), -1);
    assert_non_null(strstr(fault.text, "shorter"));
    capture_free(capture);
}

static void only_regular_files_are_read(void **state)
{
    (void)state;
    struct capture *capture = NULL;
    struct ctl_fault fault;
    assert_int_equal(capture_open("/dev/null", &capture, &fault), -1);
    assert_non_null(strstr(fault.text, "regular"));
    assert_int_equal(capture_open("/nowhere/at/all", &capture, &fault), -1);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(defaults_are_those_of_the_schema),
        cmocka_unit_test(every_metadata_key_is_honoured),
        cmocka_unit_test(unaligned_data_is_read_right),
        cmocka_unit_test(headers_that_are_no_json_object_are_refused),
        cmocka_unit_test(header_lengths_are_bounded),
        cmocka_unit_test(repeated_keys_are_refused),
        cmocka_unit_test(nul_in_a_name_is_refused),
        cmocka_unit_test(unknown_names_are_refused_by_name),
        cmocka_unit_test(missing_parts_are_refused_by_name),
        cmocka_unit_test(wrong_types_are_refused),
        cmocka_unit_test(wrong_shapes_are_refused),
        cmocka_unit_test(offsets_must_cover_the_file),
        cmocka_unit_test(metadata_values_are_checked),
        cmocka_unit_test(tree_mask_goes_with_the_tree),
        cmocka_unit_test(uneven_q_needs_cu_q),
        cmocka_unit_test(what_is_written_reads_back),
        cmocka_unit_test(a_file_that_shrinks_is_an_error),
        cmocka_unit_test(only_regular_files_are_read),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
