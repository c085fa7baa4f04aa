/* output.c - tables, colours, units, JSON. A table owns its cells; colour escapes never count as width. */
#include "output.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static bool colours;

void output_init(void)
{
    const char *no_color = getenv("NO_COLOR"), *term = getenv("TERM");
    colours = isatty(STDOUT_FILENO) && !(no_color && *no_color) && !(term && strcmp(term, "dumb") == 0);
}

static const char *style_on(enum output_style style)
{
    static const char *const codes[] = {[PLAIN] = "",         [GOOD] = "\033[32m", [WARN] = "\033[33m",
                                        [BAD] = "\033[1;31m", [DIM] = "\033[2m",   [BOLD] = "\033[1m"};
    return colours ? codes[style] : "";
}

static const char *style_off(enum output_style style) { return colours && style != PLAIN ? "\033[0m" : ""; }

void output_print(enum output_style style, const char *format, ...)
{
    va_list list;
    fputs(style_on(style), stdout);
    va_start(list, format);
    vprintf(format, list);
    va_end(list);
    fputs(style_off(style), stdout);
}

void output_json(cJSON *root)
{
    char *text = cJSON_Print(root);
    if (text)
        puts(text);
    cJSON_free(text);
    cJSON_Delete(root);
}

enum { MAX_COLUMNS = 16, CELL = 64 };
struct cell { enum output_style style; char text[CELL]; };
struct table {
    unsigned columns;
    bool right[MAX_COLUMNS];
    size_t count, capacity;
    struct cell *cells; /* the headings first */
};

static struct cell *add_cell(struct table *table)
{
    if (table->count == table->capacity) {
        table->capacity = table->capacity ? 2 * table->capacity : 64;
        table->cells = realloc(table->cells, table->capacity * sizeof *table->cells);
        if (!table->cells)
            abort();
    }
    return &table->cells[table->count++];
}

struct table *table_new(const char *headings)
{
    struct table *table = calloc(1, sizeof *table);
    if (!table)
        abort();
    while (*headings) {
        size_t length = strcspn(headings, "|");
        struct cell *cell = add_cell(table);
        table->right[table->columns++] = *headings == '>';
        size_t skip = *headings == '>';
        cell->style = DIM;
        snprintf(cell->text, CELL, "%.*s", (int)(length - skip), headings + skip);
        headings += length + (headings[length] == '|');
    }
    return table;
}

void table_cell(struct table *table, enum output_style style, const char *format, ...)
{
    struct cell *cell = add_cell(table);
    va_list list;
    va_start(list, format);
    vsnprintf(cell->text, CELL, format, list);
    va_end(list);
    cell->style = style;
}

void table_print(struct table *table)
{
    int width[MAX_COLUMNS] = {0};
    for (size_t i = 0; i < table->count; i++) {
        int length = (int)strlen(table->cells[i].text);
        if (length > width[i % table->columns])
            width[i % table->columns] = length;
    }
    for (size_t i = 0; i < table->count; i++) {
        const struct cell *cell = &table->cells[i];
        size_t column = i % table->columns;
        bool last = column + 1 == table->columns;
        int pad = width[column] - (int)strlen(cell->text);
        printf("  %*s%s%s%s%*s%s", table->right[column] ? pad : 0, "", style_on(cell->style), cell->text,
               style_off(cell->style), table->right[column] || last ? 0 : pad, "", last ? "\n" : "");
    }
    table_free(table);
}

void table_free(struct table *table)
{
    free(table->cells);
    free(table);
}

struct human human_bytes(double bytes)
{
    static const char *const units[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB"};
    unsigned unit = 0;
    for (; bytes >= 1024 && unit < 5; unit++)
        bytes /= 1024;
    struct human text;
    snprintf(text.s, sizeof text.s, unit && bytes < 100 ? "%.1f %s" : "%.0f %s", bytes, units[unit]);
    return text;
}

struct human human_ns(double ns)
{
    static const char *const units[] = {"ns", "us", "ms", "s"};
    unsigned unit = 0;
    for (; ns >= 1000 && unit < 3; unit++)
        ns /= 1000;
    struct human text;
    snprintf(text.s, sizeof text.s, unit && ns < 100 ? "%.1f %s" : "%.0f %s", ns, units[unit]);
    return text;
}

struct human human_age(uint64_t ms)
{
    unsigned long long s = ms / 1000;
    struct human text;
    if (s < 60)
        snprintf(text.s, sizeof text.s, "%llu s", s);
    else if (s < 3600)
        snprintf(text.s, sizeof text.s, "%llu min %llu s", s / 60, s % 60);
    else if (s < 86400)
        snprintf(text.s, sizeof text.s, "%llu h %llu min", s / 3600, s / 60 % 60);
    else
        snprintf(text.s, sizeof text.s, "%llu d %llu h", s / 86400, s / 3600 % 24);
    return text;
}

struct human human_count(uint64_t count)
{
    char digits[24];
    int length = snprintf(digits, sizeof digits, "%llu", (unsigned long long)count);
    struct human text;
    char *to = text.s;
    for (int i = 0; i < length; i++) {
        if (i && (length - i) % 3 == 0)
            *to++ = ',';
        *to++ = digits[i];
    }
    *to = 0;
    return text;
}

struct printable printable(const char *text)
{
    struct printable safe;
    size_t at = 0;
    for (; *text && at + 8 < sizeof safe.s; text++) {
        unsigned char byte = (unsigned char)*text;
        if (byte >= 0x20 && byte < 0x7f)
            safe.s[at++] = (char)byte;
        else
            at += (size_t)snprintf(safe.s + at, sizeof safe.s - at, "\\x%02x", byte);
    }
    memcpy(safe.s + at, *text ? "..." : "", *text ? 4 : 1);
    return safe;
}
