/* mlak-capabilities: print what runs where as a Markdown table, for README.md, from the tables that backends hold out
 * to mlak_check. A build tool, not installed. Rows that differ in one thing alone become one: masks, then out types,
 * then devices. The cpu's variants must agree, as far as this processor runs them: the README has one row for all. */
#include "mlak_backends.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_LINES = 3 * MLAK_CONTRACT_ROWS };

static const char *const dtypes[MLAK_DTYPE_COUNT] = {"bf16", "fp16", "fp8 e4m3"};
static const char *const formats[MLAK_KV_FORMAT_COUNT] = {"bf16", "fp16", "fp8 e4m3, one scale",
                                                          "656-byte rows (e4m3, a scale per 128, bf16 rope)"};
static const char *const masks[MLAK_MASK_COUNT] = {"none", "causal", "tree"};
static const char all[] = "\"all\": ragged q, context parallelism (DCP), sliding window, attention sink, LSE in base e "
                          "or 2, deterministic mode, strided pages and rows.";
_Static_assert(MLAK_CAN_ALL == 255, "the sentence above names every feature");

/* A line of the table: its cells. Those that may be merged are lists. */
enum cell { DEVICE, Q, KV, OUT, MASKS, HEADS, Q_LEN, PAGE, ALSO, CELLS };
static const char *const titles[CELLS] = {"device", "q", "KV", "out", "masks", "H", "q_len", "page", "also"};
static struct line { char cell[CELLS][160]; } lines[MOST_LINES];
static unsigned n_lines;

/* ---- rows to lines ---- */

static void add_row(const char *device, const struct mlak_capability *row)
{
    struct line *line = &lines[n_lines++];
    char features[128];
    mlak_features_text(row->features, features);
    snprintf(line->cell[DEVICE], sizeof line->cell[0], "%s", device);
    snprintf(line->cell[Q], sizeof line->cell[0], "%s", dtypes[row->q_dtype]);
    snprintf(line->cell[KV], sizeof line->cell[0], "%s", formats[row->kv_format]);
    snprintf(line->cell[OUT], sizeof line->cell[0], "%s", dtypes[row->out_dtype]);
    snprintf(line->cell[MASKS], sizeof line->cell[0], "%s", masks[row->mask]);
    snprintf(line->cell[HEADS], sizeof line->cell[0], "1..%u", row->max_heads);
    snprintf(line->cell[Q_LEN], sizeof line->cell[0], "0..%u", row->max_q_len);
    snprintf(line->cell[PAGE], sizeof line->cell[0], "1..%u", row->max_page_size);
    snprintf(line->cell[ALSO], sizeof line->cell[0], "%s", row->features == MLAK_CAN_ALL ? "all" : features);
}

static bool same_but(const struct line *a, const struct line *b, enum cell merged)
{
    for (enum cell c = 0; c < CELLS; c++)
        if (c != merged && strcmp(a->cell[c], b->cell[c]) != 0)
            return false;
    return true;
}

/* Lines that differ in that cell alone become the first of them, its cell a list. */
static void merge(enum cell cell, const char *separator)
{
    for (unsigned i = 0; i < n_lines; i++)
        for (unsigned j = i + 1; j < n_lines; j++) {
            if (!same_but(&lines[i], &lines[j], cell))
                continue;
            char list[2 * sizeof lines[0].cell[0] + 8];
            snprintf(list, sizeof list, "%s%s%s", lines[i].cell[cell], separator, lines[j].cell[cell]);
            snprintf(lines[i].cell[cell], sizeof lines[0].cell[0], "%.159s", list);
            memmove(&lines[j], &lines[j + 1], (n_lines - j - 1) * sizeof lines[0]);
            n_lines--;
            j--;
        }
}

/* ---- what the backends say ---- */

/* The rows of a device that needs no hardware of its own; false if this machine lacks the variant. */
static bool ask(const char *name, const char *variant, struct mlak_capability rows[MLAK_CONTRACT_ROWS], size_t *count)
{
    const struct mlak_backend *backend = mlak_backend(name);
    struct mlak_fault fault;
    struct mlak_device *device =
        backend->open(&(struct mlak_options){.threads = 1, .device = name, .variant = variant}, &fault);
    if (!device && fault.code == MLAK_UNSUPPORTED)
        return false;
    const struct mlak_capability *own = device ? backend->capabilities(device, count) : NULL;
    if (!own || *count > MLAK_CONTRACT_ROWS) {
        fprintf(stderr, "mlak-capabilities: %s: %s\n", name, own ? "more rows than the contract" : fault.message);
        exit(1);
    }
    memcpy(rows, own, *count * sizeof rows[0]);
    backend->close(device);
    return true;
}

static void add_cpu(void)
{
    static const char *const variants[] = {"generic", "avx2", "avx512", "amx"};
    struct mlak_capability rows[MLAK_CONTRACT_ROWS], others[MLAK_CONTRACT_ROWS];
    size_t count = 0, n = 0;
    if (!ask("cpu", variants[0], rows, &count))
        exit(1);
    for (unsigned v = 1; v < sizeof variants / sizeof variants[0]; v++) {
        if (!ask("cpu", variants[v], others, &n))
            continue;
        for (size_t i = 0; i < n; i++)
            others[i].variant = rows[0].variant;
        if (n != count || memcmp(rows, others, n * sizeof rows[0]) != 0) {
            fprintf(stderr, "mlak-capabilities: cpu's variants generic and %s differ in what they can do\n",
                    variants[v]);
            exit(1);
        }
    }
    for (size_t i = 0; i < count; i++)
        add_row("cpu", &rows[i]);
}

static void add_reference(void)
{
    struct mlak_capability rows[MLAK_CONTRACT_ROWS];
    size_t count = 0;
    if (!ask("reference", NULL, rows, &count))
        exit(1);
    for (size_t i = 0; i < count; i++)
        add_row("reference", &rows[i]);
}

static void add_gpu(void)
{
    struct mlak_capability rows[MLAK_CONTRACT_ROWS];
    mlak_cuda_capabilities(rows, false);
    for (size_t i = 0; i < MLAK_CONTRACT_ROWS; i++)
        add_row("GPU", &rows[i]);
}

int main(void)
{
    add_cpu();
    add_reference();
    add_gpu();
    merge(MASKS, ", ");
    merge(OUT, " or ");
    merge(DEVICE, ", ");
    for (enum cell c = 0; c < CELLS; c++)
        printf("| %s ", titles[c]);
    puts("|");
    for (enum cell c = 0; c < CELLS; c++)
        fputs("|---", stdout);
    puts("|");
    for (unsigned i = 0; i < n_lines; i++) {
        for (enum cell c = 0; c < CELLS; c++)
            printf("| %s ", lines[i].cell[c]);
        puts("|");
    }
    printf("\n%s\n", all);
    return fflush(stdout) ? 1 : 0;
}
