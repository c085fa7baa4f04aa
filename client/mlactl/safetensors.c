/* safetensors.c - see the header. cJSON parses the header and owns its strings; numbers are checked to be whole and
 * exact (below 2^53) before they are believed. */
#include "safetensors.h"
#include "output.h"
#include "progress.h"

#include <cjson/cJSON.h>
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static const struct { const char *name; size_t bytes; } dtypes[ST_DTYPES] = {
    [ST_BF16] = {"BF16", 2}, [ST_F16] = {"F16", 2}, [ST_F8_E4M3] = {"F8_E4M3", 1}, [ST_U8] = {"U8", 1},
    [ST_I32] = {"I32", 4},   [ST_U64] = {"U64", 8}, [ST_F32] = {"F32", 4},
};

const char *st_dtype_name(enum st_dtype dtype) { return dtypes[dtype].name; }
size_t st_dtype_bytes(enum st_dtype dtype) { return dtypes[dtype].bytes; }

static int whole_number(const cJSON *item, uint64_t *value)
{
    if (!cJSON_IsNumber(item) || !(item->valuedouble >= 0 && item->valuedouble <= 0x1p53))
        return -1;
    *value = (uint64_t)item->valuedouble;
    return (double)*value == item->valuedouble ? 0 : -1;
}

/* A repeated key lets two readers of one file disagree. */
static int refuse_repeats(const cJSON *object, struct ctl_fault *fault)
{
    for (const cJSON *a = object->child; a; a = a->next)
        for (const cJSON *b = a->next; b; b = b->next)
            if (strcmp(a->string, b->string) == 0)
                return ctl_fail(fault, "header: the key %s is there twice", printable(a->string).s);
    return 0;
}

static int parse_shape(struct st_tensor *tensor, const cJSON *shape, struct ctl_fault *fault)
{
    const char *name = tensor->name;
    uint64_t elements = 1;
    if (!cJSON_IsArray(shape))
        return ctl_fail(fault, "tensor %s: shape is no array", printable(name).s);
    for (const cJSON *item = shape->child; item; item = item->next) {
        if (tensor->rank == ST_MAX_RANK)
            return ctl_fail(fault, "tensor %s: more than %d dimensions", printable(name).s, ST_MAX_RANK);
        if (whole_number(item, &tensor->shape[tensor->rank]))
            return ctl_fail(fault, "tensor %s: shape[%u] is no whole number", printable(name).s, tensor->rank);
        if (__builtin_mul_overflow(elements, tensor->shape[tensor->rank], &elements))
            return ctl_fail(fault, "tensor %s: the shape has more than 2^64 elements", printable(name).s);
        tensor->rank++;
    }
    if (__builtin_mul_overflow(elements, st_dtype_bytes(tensor->dtype), &tensor->bytes))
        return ctl_fail(fault, "tensor %s: the shape has more than 2^64 bytes", printable(name).s);
    return 0;
}

static int parse_tensor(struct st_tensor *tensor, const cJSON *item, uint64_t data_start, uint64_t data_bytes,
                        struct ctl_fault *fault)
{
    tensor->name = item->string;
    if (!cJSON_IsObject(item))
        return ctl_fail(fault, "tensor %s: its entry is no object", printable(tensor->name).s);
    if (refuse_repeats(item, fault))
        return -1;
    const cJSON *dtype = NULL, *shape = NULL, *offsets = NULL;
    for (const cJSON *field = item->child; field; field = field->next) {
        const cJSON **known = strcmp(field->string, "dtype") == 0        ? &dtype
                              : strcmp(field->string, "shape") == 0      ? &shape
                              : strcmp(field->string, "data_offsets") == 0 ? &offsets
                                                                         : NULL;
        if (!known)
            return ctl_fail(fault, "tensor %s: unknown field %s", printable(tensor->name).s,
                            printable(field->string).s);
        *known = field;
    }
    if (!dtype || !shape || !offsets)
        return ctl_fail(fault, "tensor %s: dtype, shape and data_offsets are required", printable(tensor->name).s);
    const char *type = cJSON_IsString(dtype) ? dtype->valuestring : "(no text)";
    for (tensor->dtype = 0; tensor->dtype < ST_DTYPES; tensor->dtype++)
        if (strcmp(type, dtypes[tensor->dtype].name) == 0)
            break;
    if (tensor->dtype == ST_DTYPES)
        return ctl_fail(fault, "tensor %s: dtype %s has no place in a capture", printable(tensor->name).s,
                        printable(type).s);
    if (parse_shape(tensor, shape, fault))
        return -1;
    uint64_t begin, end;
    if (!cJSON_IsArray(offsets) || cJSON_GetArraySize(offsets) != 2 || whole_number(offsets->child, &begin) ||
        whole_number(offsets->child->next, &end))
        return ctl_fail(fault, "tensor %s: data_offsets must be two whole numbers", printable(tensor->name).s);
    if (begin > end || end > data_bytes)
        return ctl_fail(fault, "tensor %s: data_offsets [%llu, %llu] do not lie in the file's %llu data bytes",
                        printable(tensor->name).s, (unsigned long long)begin, (unsigned long long)end,
                        (unsigned long long)data_bytes);
    if (end - begin != tensor->bytes)
        return ctl_fail(fault, "tensor %s: data_offsets span %llu bytes, its shape needs %llu",
                        printable(tensor->name).s, (unsigned long long)(end - begin),
                        (unsigned long long)tensor->bytes);
    tensor->offset = data_start + begin;
    return 0;
}

static int by_offset(const void *a, const void *b)
{
    const struct st_tensor *left = a, *right = b;
    if (left->offset != right->offset)
        return left->offset < right->offset ? -1 : 1;
    return (left->bytes > right->bytes) - (left->bytes < right->bytes); /* empty ones first */
}

static int check_cover(const struct st_file *file, uint64_t data_start, uint64_t data_bytes, struct ctl_fault *fault)
{
    uint64_t at = data_start;
    for (unsigned i = 0; i < file->n_tensors; i++) {
        const struct st_tensor *tensor = &file->tensors[i];
        if (tensor->offset != at)
            return ctl_fail(fault, "tensor %s: its data %s", printable(tensor->name).s,
                            tensor->offset < at ? "overlaps that of another" : "leaves a hole before it");
        at += tensor->bytes;
    }
    if (at != data_start + data_bytes)
        return ctl_fail(fault, "the file has %llu bytes that belong to no tensor",
                        (unsigned long long)(data_start + data_bytes - at));
    return 0;
}

static int parse_metadata(struct st_file *file, const cJSON *metadata, struct ctl_fault *fault)
{
    if (!cJSON_IsObject(metadata))
        return ctl_fail(fault, "__metadata__ is no object");
    if (refuse_repeats(metadata, fault))
        return -1;
    file->pairs = calloc((size_t)cJSON_GetArraySize(metadata) + 1, sizeof *file->pairs);
    if (!file->pairs)
        return ctl_fail(fault, "out of memory");
    for (const cJSON *item = metadata->child; item; item = item->next) {
        if (!cJSON_IsString(item))
            return ctl_fail(fault, "__metadata__.%s is no text", printable(item->string).s);
        file->pairs[file->n_pairs++] = (struct st_pair){item->string, item->valuestring};
    }
    return 0;
}

static int parse_header(struct st_file *file, const char *text, size_t length, uint64_t data_bytes,
                        struct ctl_fault *fault)
{
    /* A NUL, spelled either way, would end a name early here and not elsewhere. */
    if (memchr(text, 0, length) || memmem(text, length, "\\u0000", 6))
        return ctl_fail(fault, "header: it holds a NUL");
    const char *end = NULL;
    file->header = cJSON_ParseWithLengthOpts(text, length, &end, 0);
    if (!cJSON_IsObject(file->header))
        return ctl_fail(fault, "header: no JSON object");
    while (end < text + length && *end == ' ')
        end++;
    if (end != text + length)
        return ctl_fail(fault, "header: something follows the JSON object");
    if (refuse_repeats(file->header, fault))
        return -1;
    file->tensors = calloc((size_t)cJSON_GetArraySize(file->header) + 1, sizeof *file->tensors);
    if (!file->tensors)
        return ctl_fail(fault, "out of memory");
    uint64_t data_start = 8 + length;
    for (const cJSON *item = file->header->child; item; item = item->next)
        if (strcmp(item->string, "__metadata__") == 0
                ? parse_metadata(file, item, fault)
                : parse_tensor(&file->tensors[file->n_tensors++], item, data_start, data_bytes, fault))
            return -1;
    qsort(file->tensors, file->n_tensors, sizeof *file->tensors, by_offset);
    return check_cover(file, data_start, data_bytes, fault);
}

int st_load(int fd, uint64_t offset, uint64_t bytes, void *to, struct ctl_fault *fault)
{
    for (uint64_t done = 0; done < bytes;) {
        ssize_t got = pread(fd, (char *)to + done, bytes - done, (off_t)(offset + done));
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return ctl_fail(fault, "%s", got ? strerror(errno) : "the file became shorter while it was read");
        done += (uint64_t)got;
    }
    return 0;
}

int st_read(int fd, struct st_file **out, struct ctl_fault *fault)
{
    struct stat info;
    uint64_t length;
    if (fstat(fd, &info) < 0)
        return ctl_fail(fault, "%s", strerror(errno));
    if (!S_ISREG(info.st_mode))
        return ctl_fail(fault, "not a regular file");
    uint64_t size = (uint64_t)info.st_size;
    if (size < 8)
        return ctl_fail(fault, "%llu bytes are no .safetensors file", (unsigned long long)size);
    if (st_load(fd, 0, 8, &length, fault))
        return -1;
    length = le64toh(length);
    if (length > ST_MAX_HEADER || length > size - 8)
        return ctl_fail(fault, "header: its length of %llu bytes is past %s", (unsigned long long)length,
                        length > ST_MAX_HEADER ? "the limit of 65536" : "the end of the file");
    ctl_autofree char *text = malloc(length + 1);
    struct st_file *file = calloc(1, sizeof *file);
    if (!text || !file || st_load(fd, 8, length, text, fault) ||
        parse_header(file, text, length, size - 8 - length, fault)) {
        if (!text || !file)
            ctl_fail(fault, "out of memory");
        st_free(file);
        return -1;
    }
    *out = file;
    return 0;
}

void st_free(struct st_file *file)
{
    if (!file)
        return;
    cJSON_Delete(file->header);
    free(file->tensors);
    free(file->pairs);
    free(file);
}

/* The header for tensors laid out one after the other, padded so that data starts at a multiple of 64. NULL: no memory.
 */
static char *format_header(const struct st_tensor *tensors, unsigned n_tensors, const struct st_pair *pairs,
                           unsigned n_pairs)
{
    cJSON *root = cJSON_CreateObject();
    if (n_pairs) {
        cJSON *metadata = cJSON_AddObjectToObject(root, "__metadata__");
        for (unsigned i = 0; i < n_pairs; i++)
            cJSON_AddStringToObject(metadata, pairs[i].key, pairs[i].value);
    }
    uint64_t at = 0;
    for (unsigned i = 0; i < n_tensors; i++) {
        cJSON *entry = cJSON_AddObjectToObject(root, tensors[i].name);
        cJSON_AddStringToObject(entry, "dtype", st_dtype_name(tensors[i].dtype));
        cJSON *shape = cJSON_AddArrayToObject(entry, "shape");
        for (unsigned d = 0; d < tensors[i].rank; d++)
            cJSON_AddItemToArray(shape, cJSON_CreateNumber((double)tensors[i].shape[d]));
        cJSON *offsets = cJSON_AddArrayToObject(entry, "data_offsets");
        cJSON_AddItemToArray(offsets, cJSON_CreateNumber((double)at));
        at += tensors[i].bytes;
        cJSON_AddItemToArray(offsets, cJSON_CreateNumber((double)at));
    }
    char *json = cJSON_PrintUnformatted(root), *padded = NULL;
    cJSON_Delete(root);
    if (json) {
        int length = (int)strlen(json);
        int pad = (64 - (8 + length) % 64) % 64;
        if (asprintf(&padded, "%s%*s", json, pad, "") < 0)
            padded = NULL;
    }
    cJSON_free(json);
    return padded;
}

static int write_all(FILE *to, const char *header, const struct st_tensor *tensors, unsigned n_tensors)
{
    uint64_t length = htole64(strlen(header));
    if (fwrite(&length, sizeof length, 1, to) != 1 || fputs(header, to) < 0)
        return -1;
    for (unsigned i = 0; i < n_tensors; i++)
        if (tensors[i].bytes && fwrite(tensors[i].data, 1, tensors[i].bytes, to) != tensors[i].bytes)
            return -1;
    return fflush(to) ? -1 : 0;
}

/* What a rename would destroy: /dev/null, a FIFO. */
static bool is_special(const char *path)
{
    struct stat st;
    return stat(path, &st) == 0 && !S_ISREG(st.st_mode) && !S_ISDIR(st.st_mode);
}

static int write_in_place(const char *path, const char *header, const struct st_tensor *tensors, unsigned n_tensors,
                          struct ctl_fault *fault)
{
    int fd = open(path, O_WRONLY | O_CLOEXEC | O_NOCTTY);
    FILE *to = fd < 0 ? NULL : fdopen(fd, "wb");
    bool good = to && write_all(to, header, tensors, n_tensors) == 0;
    int saved = errno;
    if (to)
        fclose(to);
    else if (fd >= 0)
        close(fd);
    return good ? 0 : ctl_fail(fault, "%s: %s", path, strerror(saved));
}

int st_write(const char *path, const struct st_tensor *tensors, unsigned n_tensors, const struct st_pair *pairs,
             unsigned n_pairs, struct ctl_fault *fault)
{
    ctl_autofree char *header = format_header(tensors, n_tensors, pairs, n_pairs);
    ctl_autofree char *temporary = NULL;
    if (!header || asprintf(&temporary, "%s.XXXXXX", path) < 0)
        return ctl_fail(fault, "out of memory");
    if (is_special(path))
        return write_in_place(path, header, tensors, n_tensors, fault);
    int fd = mkostemp(temporary, O_CLOEXEC);
    if (fd < 0)
        return ctl_fail(fault, "%s: %s", path, strerror(errno));
    progress_guard(temporary);
    mode_t mask = umask(0);
    umask(mask);
    FILE *to = fdopen(fd, "wb");
    bool good = to && fchmod(fd, 0666 & ~mask) == 0 && write_all(to, header, tensors, n_tensors) == 0;
    int saved = errno;
    if (to ? fclose(to) : close(fd)) {
        saved = good ? errno : saved;
        good = false;
    }
    if (good && rename(temporary, path) < 0) {
        saved = errno;
        good = false;
    }
    if (!good)
        unlink(temporary);
    progress_guard(NULL);
    return good ? 0 : ctl_fail(fault, "%s: %s", path, strerror(saved));
}
