/* mlap_tables.c - the lists of mlap_messages.h expanded into constant tables, and look-ups in them.
 * Everything here is read-only data, shared by all threads. */
#include "mlap_tables.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

/* ---- enumerations: mlap_names_<enumeration>, mlap_<enumeration>_text, mlap_<enumeration>_from_text ---- */

#define WIRE_TEXT(M, NAME, text, doc) text,
#define WIRE_DOC(M, NAME, text, doc) doc,
#define NAMES(M, title) \
    static const char *const texts_##M[] = {MLAP_ENUM_##M(WIRE_TEXT, M)}; \
    static const char *const docs_##M[] = {MLAP_ENUM_##M(WIRE_DOC, M)}; \
    static const struct mlap_names names_##M = {#M, title, texts_##M, docs_##M, MLAP_##M##_COUNT};
MLAP_ENUMS(NAMES)

static int from_text(const struct mlap_names *names, const char *text)
{
    for (uint32_t value = 0; value < names->count; value++)
        if (strcmp(names->texts[value], text) == 0)
            return (int)value;
    return -1;
}

#define TEXT_FUNCTIONS(M, title) \
    const char *mlap_##M##_text(enum mlap_##M value) { \
        return (uint32_t)value < MLAP_##M##_COUNT ? texts_##M[value] : "?"; \
    } \
    int mlap_##M##_from_text(const char *text) { return from_text(&names_##M, text); }
MLAP_ENUMS(TEXT_FUNCTIONS)

/* ---- maps: table_<message> ---- */

#define TABLE_OF_BOOL(sub) NULL
#define TABLE_OF_U32(sub) NULL
#define TABLE_OF_U64(sub) NULL
#define TABLE_OF_F64(sub) NULL
#define TABLE_OF_STR(sub) NULL
#define TABLE_OF_ENUM(sub) NULL
#define TABLE_OF_MSG(sub) &table_##sub
#define TABLE_OF_LIST(sub) &table_##sub

#define NAMES_OF_BOOL(sub) NULL
#define NAMES_OF_U32(sub) NULL
#define NAMES_OF_U64(sub) NULL
#define NAMES_OF_F64(sub) NULL
#define NAMES_OF_STR(sub) NULL
#define NAMES_OF_ENUM(sub) &names_##sub
#define NAMES_OF_MSG(sub) NULL
#define NAMES_OF_LIST(sub) NULL

#define COUNT_OF_BOOL(M, name) 0
#define COUNT_OF_U32(M, name) 0
#define COUNT_OF_U64(M, name) 0
#define COUNT_OF_F64(M, name) 0
#define COUNT_OF_STR(M, name) 0
#define COUNT_OF_ENUM(M, name) 0
#define COUNT_OF_MSG(M, name) 0
#define COUNT_OF_LIST(M, name) offsetof(struct mlap_##M, n_##name)

#define NEED_REQ true
#define NEED_OPT false

#define FIELD(M, KIND, member, sub, low, high, NEED, text) \
    {.name = #member, .name_length = sizeof #member - 1, .kind = MLAP_KIND_##KIND, .required = NEED_##NEED, \
     .offset = offsetof(struct mlap_##M, member), .size = sizeof(((struct mlap_##M *)0)->member), \
     .count_offset = COUNT_OF_##KIND(M, member), .min = low, .max = high, .table = TABLE_OF_##KIND(sub), \
     .names = NAMES_OF_##KIND(sub), .doc = text},

#define TABLE(M) \
    static const struct mlap_field fields_##M[] = {MLAP_FIELDS_##M(FIELD, M)}; \
    static const struct mlap_table table_##M = {#M, fields_##M, MLAP_INDEX_##M##_COUNT, sizeof(struct mlap_##M)}; \
    _Static_assert(MLAP_INDEX_##M##_COUNT <= 64, "`present` has 64 bits"); \
    _Static_assert(offsetof(struct mlap_##M, present) == 0, "the codec finds `present` first");
#define MESSAGE_TABLE(TYPE, M, number, fds, FROM, doc) TABLE(M)
MLAP_NESTED(TABLE)
MLAP_MESSAGES(MESSAGE_TABLE)

/* ---- messages by number ---- */

#define MESSAGE(TYPE, M, number, n_fds, FROM, text) [number] = {#TYPE, &table_##M, n_fds, MLAP_FROM_##FROM, text},
static const struct mlap_message messages[MLAP_TYPES_END] = {MLAP_MESSAGES(MESSAGE)};

const struct mlap_message *mlap_message_of(uint32_t type)
{
    return type < MLAP_TYPES_END && messages[type].type != NULL ? &messages[type] : NULL;
}

const char *mlap_type_name(uint32_t type)
{
    const struct mlap_message *message = mlap_message_of(type);
    return message != NULL ? message->type : NULL;
}

int mlap_type_fds(uint32_t type)
{
    const struct mlap_message *message = mlap_message_of(type);
    return message != NULL ? message->fds : -1;
}

bool mlap_fds_fit(uint32_t type, unsigned n_fds)
{
    int most = mlap_type_fds(type);
    return most > 0 ? n_fds >= 1 && n_fds <= (unsigned)most : n_fds == 0;
}

int mlap_type_from(uint32_t type)
{
    const struct mlap_message *message = mlap_message_of(type);
    return message != NULL ? (int)message->from : -1;
}

/* ---- what a field holds, in words ---- */

const char *mlap_describe(const struct mlap_field *field, char text[MLAP_DESCRIPTION])
{
    switch (field->kind) {
    case MLAP_KIND_BOOL:
        snprintf(text, MLAP_DESCRIPTION, "true or false");
        break;
    case MLAP_KIND_U32:
    case MLAP_KIND_U64:
        snprintf(text, MLAP_DESCRIPTION, "an integer from %" PRIu64 " to %" PRIu64, field->min, field->max);
        break;
    case MLAP_KIND_F64:
        snprintf(text, MLAP_DESCRIPTION, "a finite number");
        break;
    case MLAP_KIND_STR:
        snprintf(text, MLAP_DESCRIPTION, "UTF-8 text of %" PRIu64 " to %" PRIu64 " bytes without NUL", field->min,
                 field->max);
        break;
    case MLAP_KIND_ENUM: {
        size_t used = (size_t)snprintf(text, MLAP_DESCRIPTION, "one of ");
        for (uint32_t value = 0; value < field->names->count && used < MLAP_DESCRIPTION; value++)
            used += (size_t)snprintf(text + used, MLAP_DESCRIPTION - used, "%s%s", value == 0 ? "" : ", ",
                                     field->names->texts[value]);
        break;
    }
    case MLAP_KIND_MSG:
        snprintf(text, MLAP_DESCRIPTION, "a map (%s)", field->table->name);
        break;
    case MLAP_KIND_LIST:
        snprintf(text, MLAP_DESCRIPTION, "an array of at most %" PRIu64 " maps (%s)", field->max, field->table->name);
        break;
    }
    return text;
}

/* ---- in order, for the reference pages ---- */

#define TABLE_ADDRESS(M) &table_##M,
#define NAMES_ADDRESS(M, title) &names_##M,
static const struct mlap_table *const nested_tables[] = {MLAP_NESTED(TABLE_ADDRESS)};
static const struct mlap_names *const enumerations[] = {MLAP_ENUMS(NAMES_ADDRESS)};

const struct mlap_table *const *mlap_nested_tables(size_t *count)
{
    *count = sizeof nested_tables / sizeof nested_tables[0];
    return nested_tables;
}

const struct mlap_names *const *mlap_enumerations(size_t *count)
{
    *count = sizeof enumerations / sizeof enumerations[0];
    return enumerations;
}
