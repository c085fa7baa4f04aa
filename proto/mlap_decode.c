/* mlap_decode.c - bytes to a message's struct: a scan that bounds everything, msgpack-c's unpacker, then the tables.
 *
 * Bytes are hostile. scan() proves that the datagram is one whole msgpack value, nested within bounds, with no count
 * larger than the bytes that are left; only then may msgpack-c allocate (it reserves a container's memory on sight of
 * its count: 5 bytes can ask for 96 GB). After scan(), the unpacker can only fail for want of memory. */
#include "mlap_tables.h"

#include <inttypes.h>
#include <math.h>
#include <msgpack.h>
#include <stdio.h>
#include <string.h>

/* Containers in each other; the deepest message, STATUS_REPLY, has 6: array, body, devices, device, latency, phase.
 * Values in all: every value costs time, the largest message has fewer than half as many. */
enum { MAX_DEPTH = 8, MAX_VALUES = 8192 };

/* ---- the scan ---- */

static uint64_t big_endian(const unsigned char *at, unsigned bytes)
{
    uint64_t value = 0;
    for (unsigned i = 0; i < bytes; i++)
        value = value << 8 | at[i];
    return value;
}

/* What follows a msgpack value's first byte: `size` bytes, or, if `counted`, a big-endian count in `size` bytes, and
 * then `each` values for each one counted, or, if `each` is 0, as many bytes and `plus` more. */
struct shape {
    unsigned size, plus, each;
    bool counted;
};

/* First bytes 0xc0..0xdf, as in the msgpack specification. 0xc1 is never used; see scan(). */
static const struct shape shapes[32] = {
    [0x04] = {1, 0, 0, true}, [0x05] = {2, 0, 0, true}, [0x06] = {4, 0, 0, true},   /* bin */
    [0x07] = {1, 1, 0, true}, [0x08] = {2, 1, 0, true}, [0x09] = {4, 1, 0, true},   /* ext: one byte of type */
    [0x0a] = {4, 0, 0, false}, [0x0b] = {8, 0, 0, false},                           /* float */
    /* unsigned, signed, fixed ext of 1, 2, 4, 8 and 16 bytes */
    [0x0c] = {1, 0, 0, false}, [0x0d] = {2, 0, 0, false}, [0x0e] = {4, 0, 0, false}, [0x0f] = {8, 0, 0, false},
    [0x10] = {1, 0, 0, false}, [0x11] = {2, 0, 0, false}, [0x12] = {4, 0, 0, false}, [0x13] = {8, 0, 0, false},
    [0x14] = {2, 0, 0, false}, [0x15] = {3, 0, 0, false}, [0x16] = {5, 0, 0, false}, [0x17] = {9, 0, 0, false},
    [0x18] = {17, 0, 0, false},
    [0x19] = {1, 0, 0, true}, [0x1a] = {2, 0, 0, true}, [0x1b] = {4, 0, 0, true},   /* str */
    [0x1c] = {2, 0, 1, true}, [0x1d] = {4, 0, 1, true},                             /* array */
    [0x1e] = {2, 0, 2, true}, [0x1f] = {4, 0, 2, true},                             /* map */
};

/* NULL if the bytes are exactly one msgpack value within bounds, else what is wrong with them. */
static const char *scan(const unsigned char *bytes, size_t length)
{
    uint64_t wanted[MAX_DEPTH + 1] = {1};   /* values still to come at each depth */
    unsigned depth = 0;
    size_t at = 0;
    for (unsigned seen = 0;; seen++) {
        while (wanted[depth] == 0) {
            if (depth == 0)
                return at == length ? NULL : "has bytes after its end";
            depth--;
        }
        wanted[depth]--;
        if (seen == MAX_VALUES)
            return "holds too many values";
        if (at == length)
            return "ends too early";
        unsigned first = bytes[at++];
        uint64_t skip = 0, values = 0;
        if (first >= 0x80 && first <= 0x8f) {
            values = 2 * (first & 0x0fu);
        } else if (first >= 0x90 && first <= 0x9f) {
            values = first & 0x0fu;
        } else if (first >= 0xa0 && first <= 0xbf) {
            skip = first & 0x1fu;
        } else if (first == 0xc1) {
            return "holds the byte 0xc1, which msgpack does not use";
        } else if (first >= 0xc0 && first <= 0xdf) {
            struct shape shape = shapes[first - 0xc0];
            if (shape.size > length - at)
                return "ends too early";
            uint64_t count = shape.counted ? big_endian(bytes + at, shape.size) : 0;
            at += shape.size;
            values = count * shape.each;
            skip = shape.each == 0 && shape.counted ? count + shape.plus : 0;
        }
        /* Every value takes a byte at least. */
        if (skip > length - at || values > length - at)
            return "claims to hold more than its length";
        at += skip;
        if (values > 0) {
            if (depth == MAX_DEPTH)
                return "is nested too deeply";
            wanted[++depth] = values;
        }
    }
}

/* ---- where the decoder is, for the error's field ---- */

struct path {
    const struct path *up;       /* NULL: the body itself */
    const struct mlap_message *message;
    const char *name;            /* NULL: entry `index` of the list above */
    size_t name_length;
    uint32_t index;
};

static size_t spell_into(const struct path *path, char *text, size_t capacity)
{
    if (path->up == NULL)
        return 0;
    size_t used = spell_into(path->up, text, capacity);
    if (path->name == NULL) {
        used += (size_t)snprintf(text + used, capacity - used, "[%" PRIu32 "]", path->index);
        return used < capacity ? used : capacity - 1;
    }
    if (used > 0 && used + 1 < capacity)
        text[used++] = '.';
    /* An unknown name may hold anything; a NUL in it must not make it look like another name. */
    for (size_t i = 0; i < path->name_length && used + 1 < capacity; i++)
        text[used++] = path->name[i] != '\0' ? path->name[i] : '?';
    text[used] = '\0';
    return used;
}

struct spelled { char text[sizeof((struct mlap_fault *)0)->field]; };

static struct spelled spell(const struct path *path)
{
    struct spelled spelled = {""};
    spell_into(path, spelled.text, sizeof spelled.text);
    return spelled;
}

static struct path below(const struct path *up, const char *name, size_t name_length, uint32_t index)
{
    return (struct path){up, up->message, name, name_length, index};
}

/* "a string" or the value itself, for the end of a sentence. */
struct shown { char text[64]; };

static struct shown show(const msgpack_object *value)
{
    struct shown shown;
    switch (value->type) {
    case MSGPACK_OBJECT_BOOLEAN:
        snprintf(shown.text, sizeof shown.text, "%s", value->via.boolean ? "true" : "false");
        break;
    case MSGPACK_OBJECT_POSITIVE_INTEGER:
        snprintf(shown.text, sizeof shown.text, "%" PRIu64, value->via.u64);
        break;
    case MSGPACK_OBJECT_NEGATIVE_INTEGER:
        snprintf(shown.text, sizeof shown.text, "%" PRId64, value->via.i64);
        break;
    case MSGPACK_OBJECT_FLOAT32:
    case MSGPACK_OBJECT_FLOAT64:
        snprintf(shown.text, sizeof shown.text, "the float %g", value->via.f64);
        break;
    case MSGPACK_OBJECT_STR: {
        int length = value->via.str.size < 32 ? (int)value->via.str.size : 32;
        snprintf(shown.text, sizeof shown.text, "the %" PRIu32 "-byte text '%.*s'", value->via.str.size, length,
                 value->via.str.ptr);
        break;
    }
    case MSGPACK_OBJECT_ARRAY:
        snprintf(shown.text, sizeof shown.text, "an array of %" PRIu32, value->via.array.size);
        break;
    case MSGPACK_OBJECT_MAP:
        snprintf(shown.text, sizeof shown.text, "a map");
        break;
    case MSGPACK_OBJECT_BIN:
        snprintf(shown.text, sizeof shown.text, "binary data");
        break;
    default:
        snprintf(shown.text, sizeof shown.text, value->type == MSGPACK_OBJECT_NIL ? "nil" : "a msgpack extension");
        break;
    }
    return shown;
}

static enum mlap_code refuse_value(const struct path *at, const struct mlap_field *field, const msgpack_object *value,
                                   struct mlap_fault *fault)
{
    char description[MLAP_DESCRIPTION];
    struct spelled name = spell(at);
    if (strcmp(field->name, "handle") == 0) /* a secret, even half of it or misspelt */
        return mlap_fail(fault, MLAP_code_INVALID, name.text, "%s must be %s", name.text,
                         mlap_describe(field, description));
    return mlap_fail(fault, MLAP_code_INVALID, name.text, "%s must be %s, but is %s", name.text,
                     mlap_describe(field, description), show(value).text);
}

/* ---- values ---- */

static enum mlap_code decode_map(const struct path *at, const struct mlap_table *table, const msgpack_object *from,
                                 char *to, struct mlap_fault *fault);

/* A JSON-minded client writes 1.0 as the integer 1: whole numbers are taken where a double holds them exactly. */
static bool number(const msgpack_object *value, double *number)
{
    const int64_t exact = INT64_C(1) << 53;
    if (value->type == MSGPACK_OBJECT_FLOAT32 || value->type == MSGPACK_OBJECT_FLOAT64)
        *number = value->via.f64;
    else if (value->type == MSGPACK_OBJECT_POSITIVE_INTEGER && value->via.u64 <= (uint64_t)exact)
        *number = (double)value->via.u64;
    else if (value->type == MSGPACK_OBJECT_NEGATIVE_INTEGER && value->via.i64 >= -exact)
        *number = (double)value->via.i64;
    else
        return false;
    return isfinite(*number);
}

/* The enumerator whose text `value` is, or count. */
static uint32_t enumerator(const struct mlap_names *names, const msgpack_object *value)
{
    uint32_t i = 0;
    while (i < names->count && (strlen(names->texts[i]) != value->via.str.size ||
                                memcmp(names->texts[i], value->via.str.ptr, value->via.str.size) != 0))
        i++;
    return i;
}

static enum mlap_code decode_list(const struct path *at, const struct mlap_field *field,
                                  const msgpack_object_array *from, char *body, struct mlap_fault *fault)
{
    memcpy(body + field->count_offset, &from->size, sizeof from->size);
    for (uint32_t i = 0; i < from->size; i++) {
        struct path here = below(at, NULL, 0, i);
        if (from->ptr[i].type != MSGPACK_OBJECT_MAP) {
            struct spelled name = spell(&here);
            return mlap_fail(fault, MLAP_code_INVALID, name.text, "%s must be a map (%s), but is %s", name.text,
                             field->table->name, show(&from->ptr[i]).text);
        }
        enum mlap_code code = decode_map(&here, field->table, &from->ptr[i],
                                         body + field->offset + (size_t)i * field->table->size, fault);
        if (code != MLAP_code_OK)
            return code;
    }
    return MLAP_code_OK;
}

static enum mlap_code decode_value(const struct path *at, const struct mlap_field *field, const msgpack_object *value,
                                   char *body, struct mlap_fault *fault)
{
    char *member = body + field->offset;
    switch (field->kind) {
    case MLAP_KIND_BOOL:
        if (value->type != MSGPACK_OBJECT_BOOLEAN)
            break;
        *(bool *)member = value->via.boolean;
        return MLAP_code_OK;
    case MLAP_KIND_U32:
    case MLAP_KIND_U64: {
        uint64_t wide = value->via.u64;
        if (value->type != MSGPACK_OBJECT_POSITIVE_INTEGER || wide < field->min || wide > field->max)
            break;
        uint32_t narrow = (uint32_t)wide;
        memcpy(member, field->kind == MLAP_KIND_U32 ? (const void *)&narrow : (const void *)&wide, field->size);
        return MLAP_code_OK;
    }
    case MLAP_KIND_F64: {
        double finite;
        if (!number(value, &finite))
            break;
        memcpy(member, &finite, sizeof finite);
        return MLAP_code_OK;
    }
    case MLAP_KIND_STR: {
        const msgpack_object_str *text = &value->via.str;
        if (value->type != MSGPACK_OBJECT_STR || text->size < field->min || text->size > field->max ||
            !mlap_is_text(text->ptr, text->size))
            break;
        memcpy(member, text->ptr, text->size);
        memset(member + text->size, 0, field->size - text->size);
        return MLAP_code_OK;
    }
    case MLAP_KIND_ENUM: {
        uint32_t found = value->type == MSGPACK_OBJECT_STR ? enumerator(field->names, value) : field->names->count;
        if (found == field->names->count)
            break;
        memcpy(member, &found, sizeof found);
        return MLAP_code_OK;
    }
    case MLAP_KIND_MSG:
        if (value->type != MSGPACK_OBJECT_MAP)
            break;
        return decode_map(at, field->table, value, member, fault);
    case MLAP_KIND_LIST:
        if (value->type != MSGPACK_OBJECT_ARRAY || value->via.array.size > field->max)
            break;
        return decode_list(at, field, &value->via.array, body, fault);
    }
    return refuse_value(at, field, value, fault);
}

/* The index of the field called `key`, or n_fields. Senders mostly keep the tables' order: look from `hint` on. */
static uint32_t find_field(const struct mlap_table *table, const msgpack_object_str *key, uint32_t hint)
{
    for (uint32_t tried = 0; tried < table->n_fields; tried++) {
        uint32_t i = hint + tried < table->n_fields ? hint + tried : hint + tried - table->n_fields;
        const struct mlap_field *field = &table->fields[i];
        if (field->name_length == key->size && memcmp(field->name, key->ptr, key->size) == 0)
            return i;
    }
    return table->n_fields;
}

/* Absent fields become zero, so that the body is wholly written; the rest of a list's array is left alone. */
static enum mlap_code finish_map(const struct path *at, const struct mlap_table *table, uint64_t present, char *to,
                                 struct mlap_fault *fault)
{
    for (uint32_t i = 0; i < table->n_fields; i++) {
        const struct mlap_field *field = &table->fields[i];
        if ((present >> i) & 1)
            continue;
        if (field->required) {
            struct path here = below(at, field->name, field->name_length, 0);
            struct spelled name = spell(&here);
            char description[MLAP_DESCRIPTION];
            return mlap_fail(fault, MLAP_code_MISSING_FIELD, name.text, "%s needs the field %s, %s: %s",
                             at->message->type, name.text, mlap_describe(field, description), field->doc);
        }
        memset(to + field->offset, 0, field->size);
    }
    memcpy(to, &present, sizeof present);
    return MLAP_code_OK;
}

static enum mlap_code decode_map(const struct path *at, const struct mlap_table *table, const msgpack_object *from,
                                 char *to, struct mlap_fault *fault)
{
    uint64_t present = 0;
    uint32_t next = 0;
    for (uint32_t k = 0; k < from->via.map.size; k++) {
        const msgpack_object_kv *pair = &from->via.map.ptr[k];
        if (pair->key.type != MSGPACK_OBJECT_STR)
            return mlap_fail(fault, MLAP_code_MALFORMED, spell(at).text, "a field's name must be text, but is %s",
                             show(&pair->key).text);
        uint32_t i = find_field(table, &pair->key.via.str, next);
        struct path here = below(at, pair->key.via.str.ptr, pair->key.via.str.size, 0);
        if (i == table->n_fields) {
            struct spelled name = spell(&here);
            return mlap_fail(fault, MLAP_code_UNKNOWN_FIELD, name.text, "%s has no field %s in protocol version %u",
                             at->message->type, name.text, MLAP_VERSION);
        }
        if ((present >> i) & 1) {
            struct spelled name = spell(&here);
            return mlap_fail(fault, MLAP_code_INVALID, name.text, "%s is given twice", name.text);
        }
        enum mlap_code code = decode_value(&here, &table->fields[i], &pair->val, to, fault);
        if (code != MLAP_code_OK)
            return code;
        present |= UINT64_C(1) << i;
        next = i + 1 < table->n_fields ? i + 1 : 0;
    }
    return finish_map(at, table, present, to, fault);
}

/* ---- the datagram ---- */

/* Fill `header` as far as the array goes; false if it is not [version, type, sequence, map]. */
static bool decode_header(const msgpack_object *datagram, struct mlap_header *header)
{
    if (datagram->type != MSGPACK_OBJECT_ARRAY)
        return false;
    uint32_t *const numbers[3] = {&header->version, &header->type, &header->sequence};
    for (uint32_t i = 0; i < 3; i++) {
        if (i >= datagram->via.array.size)
            return false;
        const msgpack_object *value = &datagram->via.array.ptr[i];
        if (value->type != MSGPACK_OBJECT_POSITIVE_INTEGER || value->via.u64 > UINT32_MAX)
            return false;
        *numbers[i] = (uint32_t)value->via.u64;
    }
    return datagram->via.array.size == 4 && datagram->via.array.ptr[3].type == MSGPACK_OBJECT_MAP;
}

static enum mlap_code decode_datagram(const msgpack_object *datagram, struct mlap_header *header, union mlap_body *body,
                                      struct mlap_fault *fault)
{
    bool whole = decode_header(datagram, header);
    /* A later version may have another shape after its first number. */
    if (header->version != 0 && header->version != MLAP_VERSION)
        return mlap_fail(fault, MLAP_code_VERSION, "", "protocol version %" PRIu32 " is not spoken here; use version "
                         "%u", header->version, MLAP_VERSION);
    if (!whole || header->version == 0)
        return mlap_fail(fault, MLAP_code_MALFORMED, "", "a message is the msgpack array [version, type, sequence, "
                         "{fields}] with version %u and unsigned 32-bit numbers", MLAP_VERSION);
    const struct mlap_message *message = mlap_message_of(header->type);
    if (message == NULL)
        return mlap_fail(fault, MLAP_code_UNKNOWN_TYPE, "", "protocol version %u has no message of type %" PRIu32,
                         MLAP_VERSION, header->type);
    struct path root = {.message = message};
    return decode_map(&root, message->table, &datagram->via.array.ptr[3], (char *)body, fault);
}

enum mlap_code mlap_decode(const void *bytes, size_t length, struct mlap_header *header, union mlap_body *body,
                           struct mlap_fault *fault)
{
    *header = (struct mlap_header){0};
    if (length > MLAP_MAX_MESSAGE)
        return mlap_fail(fault, MLAP_code_MALFORMED, "", "the datagram has %zu bytes; at most %u are allowed", length,
                         MLAP_MAX_MESSAGE);
    const char *defect = scan(bytes, length);
    if (defect != NULL)
        return mlap_fail(fault, MLAP_code_MALFORMED, "", "the datagram %s; a message is exactly one msgpack array",
                         defect);
    msgpack_unpacked unpacked;
    msgpack_unpacked_init(&unpacked);
    enum mlap_code code;
    if (msgpack_unpack_next(&unpacked, bytes, length, NULL) == MSGPACK_UNPACK_SUCCESS)
        code = decode_datagram(&unpacked.data, header, body, fault);
    else
        code = mlap_fail(fault, MLAP_code_MEMORY, "", "no memory to unpack a message of %zu bytes", length);
    msgpack_unpacked_destroy(&unpacked);
    return code;
}
