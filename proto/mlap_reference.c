/* mlap-reference: print the message pages of PROTOCOL.md as Markdown, from the tables. A build tool, not installed. */
#include "mlap_tables.h"

#include <inttypes.h>
#include <stdio.h>

static const char *kind_text(const struct mlap_field *field)
{
    static const char *const kinds[] = {"bool", "uint", "uint", "float", "str", "str", "map", "array"};
    return kinds[field->kind];
}

/* What may stand in the field; an enumeration or nested map by its name, which has a section of its own. */
static void print_domain(FILE *to, const struct mlap_field *field)
{
    char description[MLAP_DESCRIPTION];
    if (field->kind == MLAP_KIND_ENUM)
        fprintf(to, "[%s](#%s)", field->names->name, field->names->name);
    else if (field->kind == MLAP_KIND_MSG)
        fprintf(to, "[%s](#%s)", field->table->name, field->table->name);
    else if (field->kind == MLAP_KIND_LIST)
        fprintf(to, "at most %" PRIu64 " [%s](#%s)", field->max, field->table->name, field->table->name);
    else
        fputs(mlap_describe(field, description), to);
}

static void print_table(FILE *to, const struct mlap_table *table)
{
    if (table->n_fields == 0) {
        fputs("No fields: the body is the empty map.\n", to);
        return;
    }
    fputs("| field | msgpack | value | | meaning |\n|---|---|---|---|---|\n", to);
    for (uint32_t i = 0; i < table->n_fields; i++) {
        const struct mlap_field *field = &table->fields[i];
        fprintf(to, "| `%s` | %s | ", field->name, kind_text(field));
        print_domain(to, field);
        fprintf(to, " | %s | %s |\n", field->required ? "required" : "optional", field->doc);
    }
}

static void print_messages(FILE *to, const char *title, enum mlap_from from)
{
    fprintf(to, "## %s\n\n", title);
    for (uint32_t type = 0; type < MLAP_TYPES_END; type++) {
        const struct mlap_message *message = mlap_message_of(type);
        if (message == NULL || message->from != from)
            continue;
        fprintf(to, "### %s (%u)\n\n%s%s\n\n", message->type, type, message->doc,
                message->fds == 1 ? " Carries one file descriptor." : "");
        if (message->fds > 1)
            fprintf(to, "Carries 1 to %d file descriptors.\n\n", message->fds);
        print_table(to, message->table);
        fputc('\n', to);
    }
}

static void print_nested(FILE *to)
{
    size_t count;
    const struct mlap_table *const *tables = mlap_nested_tables(&count);
    fputs("## Nested maps\n\n", to);
    for (size_t i = 0; i < count; i++) {
        fprintf(to, "### %s\n\n", tables[i]->name);
        print_table(to, tables[i]);
        fputc('\n', to);
    }
}

static void print_enumerations(FILE *to)
{
    size_t count;
    const struct mlap_names *const *enumerations = mlap_enumerations(&count);
    fputs("## Enumerations\n\nOn the wire an enumerator is its text.\n", to);
    for (size_t i = 0; i < count; i++) {
        fprintf(to, "\n### %s\n\n%s.\n\n| text | meaning |\n|---|---|\n", enumerations[i]->name, enumerations[i]->doc);
        for (uint32_t value = 0; value < enumerations[i]->count; value++)
            fprintf(to, "| `%s` | %s |\n", enumerations[i]->texts[value], enumerations[i]->docs[value]);
    }
}

int main(void)
{
    print_messages(stdout, "Messages from the client", MLAP_FROM_CLIENT);
    print_messages(stdout, "Messages from the daemon", MLAP_FROM_DAEMON);
    print_messages(stdout, "Messages inside the daemon (refused from a client)", MLAP_FROM_INTERNAL);
    print_nested(stdout);
    print_enumerations(stdout);
    return fflush(stdout) == 0 ? 0 : 1;
}
