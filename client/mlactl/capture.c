/* capture.c - the schema in two tables: tensors with their element types, metadata with their parsers. */
#include "capture.h"
#include "output.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum { D = 576, V = 512, ROW_656 = 656 };

/* ---- tensors ---- */

static const struct { const char *name; unsigned dtypes; bool required; } schema[CAPTURE_TENSORS] = {
    [CAPTURE_Q] = {"q", 1u << ST_BF16 | 1u << ST_F16 | 1u << ST_F8_E4M3, true},
    [CAPTURE_KV] = {"kv", 1u << ST_BF16 | 1u << ST_F16 | 1u << ST_F8_E4M3 | 1u << ST_U8, true},
    [CAPTURE_BLOCK_TABLE] = {"block_table", 1u << ST_I32, true},
    [CAPTURE_SEQLENS] = {"seqlens", 1u << ST_I32, true},
    [CAPTURE_CU_Q] = {"cu_q", 1u << ST_I32, false},
    [CAPTURE_TREE_MASK] = {"tree_mask", 1u << ST_U64, false},
    [CAPTURE_SINK] = {"sink", 1u << ST_F32, false},
    [CAPTURE_Q_SCALE] = {"q_scale", 1u << ST_F32, false},
    [CAPTURE_K_SCALE] = {"k_scale", 1u << ST_F32, false},
    [CAPTURE_V_SCALE] = {"v_scale", 1u << ST_F32, false},
};

static const enum st_dtype q_types[] = {[MLA_BF16] = ST_BF16, [MLA_FP16] = ST_F16, [MLA_E4M3] = ST_F8_E4M3};
static const enum st_dtype kv_types[] = {
    [MLA_KV_BF16] = ST_BF16, [MLA_KV_FP16] = ST_F16, [MLA_KV_E4M3] = ST_F8_E4M3, [MLA_KV_E4M3_656] = ST_U8};

const char *capture_name(enum capture_tensor tensor) { return schema[tensor].name; }

mla_dtype capture_out_dtype(const mla_batch *batch)
{
    if (batch->out_dtype != MLA_DTYPE_DEFAULT)
        return batch->out_dtype;
    return batch->q_dtype == MLA_E4M3 ? MLA_BF16 : batch->q_dtype;
}

unsigned capture_row_bytes(const mla_batch *batch)
{
    return batch->kv_format == MLA_KV_E4M3_656 ? ROW_656 : D * (unsigned)st_dtype_bytes(kv_types[batch->kv_format]);
}

/* Type and shape of a tensor of `batch`; the one place that knows them. */
static struct st_tensor describe(const mla_batch *batch, enum capture_tensor tensor)
{
    struct st_tensor t = {.name = schema[tensor].name, .rank = 1};
    switch (tensor) {
    case CAPTURE_Q:
        t = (struct st_tensor){t.name, q_types[batch->q_dtype], 3, {batch->q_rows, batch->heads, D}, 0, 0, NULL};
        break;
    case CAPTURE_KV:
        t = (struct st_tensor){t.name, kv_types[batch->kv_format], 3, {batch->pages, batch->page_size, D}, 0, 0, NULL};
        if (batch->kv_format == MLA_KV_E4M3_656)
            t.shape[2] = ROW_656;
        break;
    case CAPTURE_BLOCK_TABLE:
        t = (struct st_tensor){t.name, ST_I32, 2, {batch->batch, batch->max_pages}, 0, 0, NULL};
        break;
    case CAPTURE_SEQLENS:
        t.dtype = ST_I32, t.shape[0] = batch->batch;
        break;
    case CAPTURE_CU_Q:
        t.dtype = ST_I32, t.shape[0] = batch->batch + UINT64_C(1);
        break;
    case CAPTURE_TREE_MASK:
        t.dtype = ST_U64, t.shape[0] = batch->q_rows;
        break;
    case CAPTURE_SINK:
        t.dtype = ST_F32, t.shape[0] = batch->heads;
        break;
    default: /* the scales */
        t.dtype = ST_F32, t.shape[0] = 1;
    }
    t.bytes = st_dtype_bytes(t.dtype);
    for (unsigned d = 0; d < t.rank; d++)
        t.bytes *= t.shape[d]; /* exists in memory or in a file, so it cannot overflow */
    return t;
}

static void shape_text(const struct st_tensor *tensor, char text[96])
{
    size_t at = 0;
    for (unsigned d = 0; d < tensor->rank; d++)
        at += (size_t)snprintf(text + at, 96 - at, "%s%" PRIu64, d ? ", " : "[", tensor->shape[d]);
    snprintf(text + at, 96 - at, "%s", tensor->rank ? "]" : "[]");
}

/* One dimension that defines a field of the batch. */
static int dimension(const struct st_tensor *tensor, unsigned d, uint64_t min, uint64_t max, const char *meaning,
                     uint64_t *value, struct ctl_fault *fault)
{
    if (tensor->shape[d] < min || tensor->shape[d] > max)
        return ctl_fail(fault, "tensor %s: shape[%u], %s, is %" PRIu64 "; it must be %" PRIu64 "..%" PRIu64,
                        tensor->name, d, meaning, tensor->shape[d], min, max);
    *value = tensor->shape[d];
    return 0;
}

static int derive_batch(mla_batch *batch, const struct st_tensor *const found[], struct ctl_fault *fault)
{
    static const unsigned ranks[] = {[CAPTURE_Q] = 3, [CAPTURE_KV] = 3, [CAPTURE_BLOCK_TABLE] = 2};
    for (unsigned i = CAPTURE_Q; i <= CAPTURE_BLOCK_TABLE; i++)
        if (found[i]->rank != ranks[i])
            return ctl_fail(fault, "tensor %s: %u dimensions; it must have %u", found[i]->name, found[i]->rank,
                            ranks[i]);
    for (unsigned i = 0; i < sizeof q_types / sizeof *q_types; i++)
        if (q_types[i] == found[CAPTURE_Q]->dtype)
            batch->q_dtype = (mla_dtype)i;
    for (unsigned i = 0; i < sizeof kv_types / sizeof *kv_types; i++)
        if (kv_types[i] == found[CAPTURE_KV]->dtype)
            batch->kv_format = (mla_kv_format)i;
    uint64_t heads = 0, pages = 0, page_size = 0, requests = 0, max_pages = 0;
    if (dimension(found[CAPTURE_Q], 0, 0, 4194304, "rows of q", &batch->q_rows, fault) ||
        dimension(found[CAPTURE_Q], 1, 1, 128, "heads", &heads, fault) ||
        dimension(found[CAPTURE_KV], 0, 0, INT32_MAX, "pages", &pages, fault) ||
        dimension(found[CAPTURE_KV], 1, 1, 256, "tokens in a page", &page_size, fault) ||
        dimension(found[CAPTURE_BLOCK_TABLE], 0, 1, 65536, "requests", &requests, fault) ||
        dimension(found[CAPTURE_BLOCK_TABLE], 1, 0, 16777216, "pages of a request", &max_pages, fault))
        return -1;
    batch->heads = (uint32_t)heads;
    batch->pages = (uint32_t)pages;
    batch->page_size = (uint32_t)page_size;
    batch->batch = (uint32_t)requests;
    batch->max_pages = (uint32_t)max_pages;
    return 0;
}

static int read_tensors(struct capture *capture, const struct st_file *file, struct ctl_fault *fault)
{
    const struct st_tensor *found[CAPTURE_TENSORS] = {0};
    for (unsigned i = 0; i < file->n_tensors; i++) {
        const struct st_tensor *tensor = &file->tensors[i];
        unsigned which = 0;
        while (which < CAPTURE_TENSORS && strcmp(schema[which].name, tensor->name) != 0)
            which++;
        if (which == CAPTURE_TENSORS)
            return ctl_fail(fault, "unknown tensor %s", printable(tensor->name).s);
        if (!(schema[which].dtypes >> tensor->dtype & 1))
            return ctl_fail(fault, "tensor %s: dtype %s is not allowed for it", tensor->name,
                            st_dtype_name(tensor->dtype));
        found[which] = tensor;
    }
    for (unsigned i = 0; i < CAPTURE_TENSORS; i++)
        if (schema[i].required && !found[i])
            return ctl_fail(fault, "tensor %s is missing", schema[i].name);
    if (derive_batch(&capture->batch, found, fault))
        return -1;
    for (unsigned i = 0; i < CAPTURE_TENSORS; i++) {
        if (!found[i])
            continue;
        struct st_tensor expected = describe(&capture->batch, (enum capture_tensor)i);
        if (found[i]->rank != expected.rank || memcmp(found[i]->shape, expected.shape, sizeof expected.shape) != 0) {
            char is[96], must[96];
            shape_text(found[i], is);
            shape_text(&expected, must);
            return ctl_fail(fault, "tensor %s: its shape is %s; with the other tensors it must be %s", expected.name,
                            is, must);
        }
        capture->data[i] = (struct capture_data){true, found[i]->bytes, found[i]->offset, NULL};
    }
    if (capture->data[CAPTURE_TREE_MASK].present != (capture->batch.mask == MLA_MASK_TREE))
        return ctl_fail(fault, "tensor tree_mask: it must be there exactly when mask is tree");
    if (!found[CAPTURE_CU_Q] && capture->batch.q_rows % capture->batch.batch)
        return ctl_fail(fault, "tensor q: its %" PRIu64 " rows do not divide by %u requests, and there is no cu_q",
                        capture->batch.q_rows, capture->batch.batch);
    return 0;
}

/* ---- metadata ---- */

/* The index of `text` in `words`, which end with NULL. */
static int word(const char *text, const char *const *words, uint32_t *index)
{
    for (*index = 0; words[*index]; ++*index)
        if (strcmp(words[*index], text) == 0)
            return 0;
    return -1;
}

static int decimal(const char *text, uint32_t min, uint32_t max, uint32_t *value)
{
    size_t digits = strspn(text, "0123456789");
    if (digits == 0 || digits > 10 || text[digits])
        return -1;
    unsigned long long number = strtoull(text, NULL, 10);
    *value = (uint32_t)number;
    return number < min || number > max ? -1 : 0;
}

static int parse_softmax_scale(mla_batch *batch, const char *text)
{
    char *end;
    batch->softmax_scale = strtod(text, &end);
    return *text && strspn(text, "0123456789+-.eE") == strlen(text) && !*end && isfinite(batch->softmax_scale) ? 0 : -1;
}

static int parse_mask(mla_batch *batch, const char *text)
{
    uint32_t index;
    int bad = word(text, (const char *const[]){"none", "causal", "tree", NULL}, &index);
    batch->mask = (mla_mask)index;
    return bad;
}

static int parse_lse_base(mla_batch *batch, const char *text)
{
    uint32_t index;
    int bad = word(text, (const char *const[]){"e", "2", NULL}, &index);
    batch->lse_base = (mla_lse_base)index;
    return bad;
}

static int parse_out_dtype(mla_batch *batch, const char *text)
{
    uint32_t index;
    int bad = word(text, (const char *const[]){"bf16", "fp16", NULL}, &index);
    batch->out_dtype = (mla_dtype)index;
    return bad;
}

static int parse_dcp_world(mla_batch *batch, const char *text) { return decimal(text, 1, 4096, &batch->dcp_world); }
static int parse_dcp_rank(mla_batch *batch, const char *text) { return decimal(text, 0, 4095, &batch->dcp_rank); }
static int parse_dcp_interleave(mla_batch *batch, const char *text)
{
    return decimal(text, 1, 1048576, &batch->dcp_interleave);
}

static int parse_window(mla_batch *batch, const char *text)
{
    batch->window = 0;
    return strcmp(text, "none") == 0 ? 0 : decimal(text, 1, INT32_MAX, &batch->window);
}

static int parse_deterministic(mla_batch *batch, const char *text)
{
    uint32_t flag;
    int bad = decimal(text, 0, 1, &flag);
    batch->deterministic = (int)flag;
    return bad;
}

static const struct {
    const char *key;
    int (*parse)(mla_batch *batch, const char *text);
    const char *allowed;
} metadata[] = {
    {"softmax_scale", parse_softmax_scale, "a finite decimal number"},
    {"mask", parse_mask, "none, causal or tree"},
    {"lse_base", parse_lse_base, "e or 2"},
    {"out_dtype", parse_out_dtype, "bf16 or fp16"},
    {"dcp_world", parse_dcp_world, "1..4096"},
    {"dcp_rank", parse_dcp_rank, "0..4095"},
    {"dcp_interleave", parse_dcp_interleave, "1..1048576"},
    {"window", parse_window, "none or 1..2147483647"},
    {"deterministic", parse_deterministic, "0 or 1"},
};
enum { METADATA = sizeof metadata / sizeof *metadata };

static int read_metadata(mla_batch *batch, const struct st_file *file, struct ctl_fault *fault)
{
    for (unsigned i = 0; i < file->n_pairs; i++) {
        const struct st_pair *pair = &file->pairs[i];
        unsigned which = 0;
        while (which < METADATA && strcmp(metadata[which].key, pair->key) != 0)
            which++;
        if (which == METADATA)
            return ctl_fail(fault, "unknown metadata %s", printable(pair->key).s);
        if (metadata[which].parse(batch, pair->value))
            return ctl_fail(fault, "metadata %s: it is \"%s\"; it must be %s", pair->key, printable(pair->value).s,
                            metadata[which].allowed);
    }
    if (isnan(batch->softmax_scale))
        return ctl_fail(fault, "metadata softmax_scale is missing");
    if (batch->dcp_rank >= batch->dcp_world)
        return ctl_fail(fault, "metadata dcp_rank: %u must be below dcp_world, %u", batch->dcp_rank, batch->dcp_world);
    return 0;
}

/* ---- captures ---- */

struct capture *capture_new(void)
{
    struct capture *capture = calloc(1, sizeof *capture);
    if (capture) {
        mla_batch_init(&capture->batch);
        capture->fd = -1;
    }
    return capture;
}

void *capture_add(struct capture *capture, enum capture_tensor tensor)
{
    struct capture_data *data = &capture->data[tensor];
    data->bytes = describe(&capture->batch, tensor).bytes;
    data->memory = calloc(1, data->bytes + 1);
    data->present = data->memory != NULL;
    return data->memory;
}

void capture_free(struct capture *capture)
{
    if (!capture)
        return;
    for (unsigned i = 0; i < CAPTURE_TENSORS; i++)
        free(capture->data[i].memory);
    if (capture->fd >= 0)
        close(capture->fd);
    free(capture);
}

int capture_read(int fd, struct capture **out, struct ctl_fault *fault)
{
    capture_auto struct capture *capture = capture_new();
    if (!capture) {
        close(fd);
        return ctl_fail(fault, "out of memory");
    }
    capture->fd = fd;
    struct st_file *file = NULL;
    int bad =
        st_read(fd, &file, fault) || read_metadata(&capture->batch, file, fault) || read_tensors(capture, file, fault);
    st_free(file);
    if (bad)
        return -1;
    *out = capture;
    capture = NULL;
    return 0;
}

int capture_open(const char *path, struct capture **capture, struct ctl_fault *fault)
{
    int fd =
        open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK); /* a FIFO must not hang us; it is refused below */
    if (fd < 0)
        return ctl_fail(fault, "%s", strerror(errno));
    return capture_read(fd, capture, fault);
}

int capture_load(const struct capture *capture, enum capture_tensor tensor, void *to, struct ctl_fault *fault)
{
    const struct capture_data *data = &capture->data[tensor];
    if (!data->memory)
        return st_load(capture->fd, data->offset, data->bytes, to, fault);
    memcpy(to, data->memory, data->bytes);
    return 0;
}

int capture_write(const struct capture *capture, const char *path, struct ctl_fault *fault)
{
    static const char *const masks[] = {"none", "causal", "tree"}, *const bases[] = {"e", "2"};
    const mla_batch *batch = &capture->batch;
    char scale[40], world[12], rank[12], interleave[12], window[12];
    snprintf(scale, sizeof scale, "%.17g", batch->softmax_scale);
    snprintf(world, sizeof world, "%u", batch->dcp_world);
    snprintf(rank, sizeof rank, "%u", batch->dcp_rank);
    snprintf(interleave, sizeof interleave, "%u", batch->dcp_interleave);
    snprintf(window, sizeof window, "%u", batch->window);
    const struct st_pair pairs[] = {
        {"softmax_scale", scale},
        {"mask", masks[batch->mask]},
        {"lse_base", bases[batch->lse_base]},
        {"dcp_world", world},
        {"dcp_rank", rank},
        {"dcp_interleave", interleave},
        {"window", batch->window ? window : "none"},
        {"deterministic", batch->deterministic ? "1" : "0"},
        {"out_dtype", capture_out_dtype(batch) == MLA_FP16 ? "fp16" : "bf16"},
    };
    struct st_tensor tensors[CAPTURE_TENSORS];
    unsigned count = 0;
    for (unsigned i = 0; i < CAPTURE_TENSORS; i++)
        if (capture->data[i].present) {
            tensors[count] = describe(batch, (enum capture_tensor)i);
            tensors[count++].data = capture->data[i].memory;
        }
    return st_write(path, tensors, count, pairs, sizeof pairs / sizeof *pairs, fault);
}

int capture_write_result(const mla_batch *batch, const void *out, const float *lse, const char *path,
                         struct ctl_fault *fault)
{
    uint64_t rows = batch->q_rows * batch->heads;
    const struct st_tensor tensors[] = {
        {"out", q_types[capture_out_dtype(batch)], 3, {batch->q_rows, batch->heads, V}, 0, rows * V * 2, out},
        {"lse", ST_F32, 2, {batch->q_rows, batch->heads}, 0, rows * 4, lse},
    };
    return st_write(path, tensors, 2, NULL, 0, fault);
}
