/* mlap_tables.h - the X-macro lists of mlap_messages.h as constant tables, for the files of proto/ only.
 *
 * The encoder, the decoder and the reference pages walk these tables; none of them knows a message by name. */
#ifndef MLAP_TABLES_H
#define MLAP_TABLES_H

#include "mlap.h"

enum mlap_kind { MLAP_KIND_BOOL, MLAP_KIND_U32, MLAP_KIND_U64, MLAP_KIND_F64, MLAP_KIND_STR, MLAP_KIND_ENUM,
                 MLAP_KIND_MSG, MLAP_KIND_LIST };

/* An enumeration: texts[value] and docs[value] for value < count. */
struct mlap_names {
    const char *name, *doc;
    const char *const *texts, *const *docs;
    uint32_t count;
};

struct mlap_field {
    const char *name;
    uint32_t name_length;
    enum mlap_kind kind;
    bool required;
    uint32_t offset, size;            /* of the member in its struct; of a LIST: of the whole array */
    uint32_t count_offset;            /* LIST: of n_<name> */
    uint64_t min, max;
    const struct mlap_table *table;   /* MSG, LIST: the nested map */
    const struct mlap_names *names;   /* ENUM */
    const char *doc;
};

/* A map: struct mlap_<name> of `size` bytes, whose first member is `uint64_t present`. */
struct mlap_table {
    const char *name;
    const struct mlap_field *fields;
    uint32_t n_fields, size;
};

struct mlap_message {
    const char *type;                 /* "REGISTER" */
    const struct mlap_table *table;
    int fds;
    enum mlap_from from;
    const char *doc;
};

/* NULL if no message has that number. All numbers are below MLAP_TYPES_END. */
enum { MLAP_TYPES_END = MLAP_REPORT + 1 };
const struct mlap_message *mlap_message_of(uint32_t type);

/* "an integer from 1 to 128", "one of bf16, fp16, fp8_e4m3"; returns `text`. */
enum { MLAP_DESCRIPTION = 480 };
const char *mlap_describe(const struct mlap_field *field, char text[MLAP_DESCRIPTION]);

/* Is it UTF-8 without NUL? */
bool mlap_is_text(const char *bytes, size_t length);

/* Every table and enumeration in the order of the lists, for the reference pages; count by reference. */
const struct mlap_table *const *mlap_nested_tables(size_t *count);
const struct mlap_names *const *mlap_enumerations(size_t *count);

#endif
