/* output.h - how results look: tables, colours, human units, JSON.
 *
 * Colours are used when stdout is a terminal and neither NO_COLOR nor TERM=dumb is set. */
#ifndef MLACTL_OUTPUT_H
#define MLACTL_OUTPUT_H

#include <cjson/cJSON.h>
#include <stdbool.h>
#include <stdint.h>

enum output_style { PLAIN, GOOD, WARN, BAD, DIM, BOLD };

void output_init(void);

/* printf in a style. */
void output_print(enum output_style style, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Print and delete a JSON value. */
void output_json(cJSON *root);

/* A table: headings are separated by '|'; one that starts with '>' is right-aligned. Cells are added from left to
 * right, top to bottom; table_print prints with two spaces of indent and frees it. */
struct table;
struct table *table_new(const char *headings);
void table_cell(struct table *table, enum output_style style, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
void table_print(struct table *table);
void table_free(struct table *table);

/* Numbers for people. Used as human_bytes(n).s within one expression. */
struct human { char s[32]; };
struct human human_bytes(double bytes);             /* "37.7 MiB" */
struct human human_ns(double ns);                   /* "12.3 us" */
struct human human_age(uint64_t ms);                /* "3 h 12 min" */
struct human human_count(uint64_t count);           /* "1,234,567" */

/* The text with everything but printable ASCII shown as \xNN, for names from files. */
struct printable { char s[96]; };
struct printable printable(const char *text);

#endif
