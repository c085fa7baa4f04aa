/* mlap_encode.c - a message's struct to bytes: msgpack-c's packer, driven by the tables.
 * Writes only into the caller's buffer and refuses what the decoder would refuse. */
#include "mlap_tables.h"

#include <errno.h>
#include <math.h>
#include <msgpack.h>
#include <string.h>

struct sink {
    char *bytes;
    size_t length, capacity;
};

/* msgpack-c's write callback; its packers return -1 when this does. */
static int sink_write(void *data, const char *bytes, size_t length)
{
    struct sink *sink = data;
    if (length > sink->capacity - sink->length) {
        errno = EMSGSIZE;
        return -1;
    }
    memcpy(sink->bytes + sink->length, bytes, length);
    sink->length += length;
    return 0;
}

static int refuse(void)
{
    errno = EINVAL;
    return -1;
}

static int encode_map(msgpack_packer *to, const struct mlap_table *table, const char *body);

static int encode_integer(msgpack_packer *to, const struct mlap_field *field, uint64_t value)
{
    return value >= field->min && value <= field->max ? msgpack_pack_uint64(to, value) : refuse();
}

static int encode_value(msgpack_packer *to, const struct mlap_field *field, const char *body)
{
    const char *member = body + field->offset;
    switch (field->kind) {
    case MLAP_KIND_BOOL:
        return *(const bool *)member ? msgpack_pack_true(to) : msgpack_pack_false(to);
    case MLAP_KIND_U32:
        return encode_integer(to, field, *(const uint32_t *)(const void *)member);
    case MLAP_KIND_U64:
        return encode_integer(to, field, *(const uint64_t *)(const void *)member);
    case MLAP_KIND_F64: {
        double value;
        memcpy(&value, member, sizeof value);
        return isfinite(value) ? msgpack_pack_double(to, value) : refuse();
    }
    case MLAP_KIND_STR: {
        size_t length = strnlen(member, field->size);
        if (length < field->min || length > field->max || !mlap_is_text(member, length))
            return refuse();
        return msgpack_pack_str_with_body(to, member, length);
    }
    case MLAP_KIND_ENUM: {
        uint32_t value;
        memcpy(&value, member, sizeof value);
        if (value >= field->names->count)
            return refuse();
        return msgpack_pack_str_with_body(to, field->names->texts[value], strlen(field->names->texts[value]));
    }
    case MLAP_KIND_MSG:
        return encode_map(to, field->table, member);
    case MLAP_KIND_LIST: {
        uint32_t count = *(const uint32_t *)(const void *)(body + field->count_offset);
        if (count > field->max)
            return refuse();
        int result = msgpack_pack_array(to, count);
        for (uint32_t i = 0; i < count && result == 0; i++)
            result = encode_map(to, field->table, member + (size_t)i * field->table->size);
        return result;
    }
    }
    return refuse();
}

static int encode_map(msgpack_packer *to, const struct mlap_table *table, const char *body)
{
    uint64_t present;
    memcpy(&present, body, sizeof present);
    uint32_t count = 0;
    for (uint32_t i = 0; i < table->n_fields; i++) {
        if (table->fields[i].required)
            present |= UINT64_C(1) << i;
        if ((present >> i) & 1)
            count++;
    }
    if (msgpack_pack_map(to, count) != 0)
        return -1;
    for (uint32_t i = 0; i < table->n_fields; i++) {
        const struct mlap_field *field = &table->fields[i];
        if (((present >> i) & 1) == 0)
            continue;
        if (msgpack_pack_str_with_body(to, field->name, field->name_length) != 0 || encode_value(to, field, body) != 0)
            return -1;
    }
    return 0;
}

long mlap_encode(void *buffer, size_t capacity, enum mlap_type type, uint32_t sequence, const void *body)
{
    const struct mlap_message *message = mlap_message_of(type);
    if (message == NULL)
        return refuse();
    struct sink sink = {buffer, 0, capacity < MLAP_MAX_MESSAGE ? capacity : MLAP_MAX_MESSAGE};
    msgpack_packer packer;
    msgpack_packer_init(&packer, &sink, sink_write);
    if (msgpack_pack_array(&packer, 4) != 0 || msgpack_pack_uint32(&packer, MLAP_VERSION) != 0 ||
        msgpack_pack_uint32(&packer, type) != 0 || msgpack_pack_uint32(&packer, sequence) != 0 ||
        encode_map(&packer, message->table, body) != 0)
        return -1;
    return (long)sink.length;
}
