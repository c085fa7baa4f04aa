/* cpu_backend.c - the `cpu` device: picks the instruction set, cuts a launch into work items and runs them on its pool.
 *
 * Owns the pool, one scratch for each thread, the tables of groups and items of a slice, and the arena of partial
 * results. A launch runs in slices that fit these, whatever it asks for; only the arena grows, to CPU_ARENA_FLOATS at
 * most. */
#include "cpu.h"
#include "mlak_backends.h"
#include "mlak_pool.h"

#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

enum {
    CPU_GROUPS = 4096,           /* of a slice */
    CPU_ITEMS = 16384,           /* likewise */
    CPU_ARENA_FLOATS = 16 << 20, /* 64 MiB; more than CPU_MAX_SPLITS partials of a group */
    CPU_BLOCK_NS = 2000,         /* to pack and to finish a block, about */
    CPU_ALONE_NS = 15000,        /* launches estimated below it run on the caller: waking a thread costs as much */
};

struct cpu_variant {
    const char *name;
    bool (*present)(void);
    const struct cpu_path *fp32, *bf16;   /* bf16: NULL, or for bf16 and fp8 with one scale */
};

struct cpu_item { uint32_t group, split; };

struct mlak_device {
    const struct cpu_variant *variant;
    const struct cpu_path *bf16;          /* of the variant, if this processor has it */
    struct mlak_pool *pool;
    struct cpu_scratch *scratch;          /* [threads] */
    struct cpu_group *groups;             /* [CPU_GROUPS] */
    struct cpu_item *items;               /* [CPU_ITEMS] */
    float *arena;
    size_t arena_floats;
    struct mlak_capability capabilities[MLAK_CONTRACT_ROWS];
};

/* ---- instruction sets ---- */

static bool always(void) { return true; }

#if defined(__x86_64__)
/* clang 14 does not know "f16c" in __builtin_cpu_supports. */
static bool has_f16c(void)
{
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

static bool has_avx2(void)
{
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
}

static bool has_avx512(void)
{
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

static bool has_bf16(void)
{
    return has_avx512() && __builtin_cpu_supports("avx512bf16");
}

/* The kernel hands out AMX state on request only, once for the whole process. */
static bool has_amx(void)
{
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18, AMX_BF16 = 1 << 22, AMX_TILE = 1 << 24 };
    uint32_t a, b, c, d;
    return has_bf16() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & AMX_BF16) && (d & AMX_TILE) &&
           syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}
#endif

static const struct cpu_variant variants[] = { /* best first */
#if defined(__x86_64__)
    {"amx", has_amx, &mlak_cpu_avx512, &mlak_cpu_amx},
    {"avx512", has_avx512, &mlak_cpu_avx512, &mlak_cpu_avx512_bf16},
    {"avx2", has_avx2, &mlak_cpu_avx2, NULL},
#endif
    {"generic", always, &mlak_cpu_generic, NULL},
};
enum { VARIANTS = sizeof variants / sizeof variants[0] };

static const struct cpu_variant *choose_variant(const char *name, struct mlak_fault *fault)
{
    for (uint32_t i = 0; i < VARIANTS; i++) {
        if (name != NULL && strcmp(name, variants[i].name) != 0)
            continue;
        if (variants[i].present())
            return &variants[i];
        if (name != NULL) {
            mlak_fail(fault, MLAK_UNSUPPORTED, "variant",
                      "this processor or kernel lacks what %s needs; leave the variant out", name);
            return NULL;
        }
    }
    mlak_fail(fault, MLAK_UNSUPPORTED, "variant", "there is no %s in this build; use amx, avx512, avx2 or generic",
              name);
    return NULL;
}

static const struct cpu_path *path_of(const struct mlak_device *device, const struct mlak_row *row)
{
    bool bf16 = row->kv_format == MLAK_KV_BF16 || row->kv_format == MLAK_KV_E4M3;
    return device->bf16 != NULL && bf16 ? device->bf16 : device->variant->fp32;
}

/* ---- the device ---- */

static void cpu_close(struct mlak_device *device)
{
    if (device == NULL)
        return;
    mlak_pool_free(device->pool);
    free(device->scratch);
    free(device->groups);
    free(device->items);
    free(device->arena);
    free(device);
}

static struct mlak_device *cpu_open(const struct mlak_options *options, struct mlak_fault *fault)
{
    const struct cpu_variant *variant = choose_variant(options->variant, fault);
    if (variant == NULL)
        return NULL;
    struct mlak_device *device = calloc(1, sizeof *device);
    if (device != NULL && (device->pool = mlak_pool_new(options->threads)) != NULL) {
        device->scratch = aligned_alloc(64, sizeof *device->scratch * mlak_pool_threads(device->pool));
        device->groups = calloc(CPU_GROUPS, sizeof *device->groups);
        device->items = calloc(CPU_ITEMS, sizeof *device->items);
    }
    if (device == NULL || device->scratch == NULL || device->groups == NULL || device->items == NULL) {
        cpu_close(device);
        mlak_fail(fault, MLAK_MEMORY, "threads", "no memory or threads for the cpu device; ask for fewer threads");
        return NULL;
    }
    device->variant = variant;
    for (uint32_t i = 0; i < mlak_pool_threads(device->pool); i++)
        device->scratch[i].progress = options->progress;
#if defined(__x86_64__)
    device->bf16 = has_bf16() ? variant->bf16 : NULL;
#endif
    mlak_whole_contract(device->capabilities, variant->name);
    return device;
}

static const char *cpu_variant(const struct mlak_device *device) { return device->variant->name; }
static uint32_t cpu_threads(const struct mlak_device *device) { return mlak_pool_threads(device->pool); }

static const struct mlak_capability *cpu_capabilities(const struct mlak_device *device, size_t *count)
{
    *count = MLAK_CONTRACT_ROWS;
    return device->capabilities;
}

static uint32_t row_groups(const struct mlak_row *row)
{
    return (row->q_len * row->heads + CPU_ROWS - 1) / CPU_ROWS;
}

/* Work of a row, in nanoseconds of one thread; and how many items it makes. */
static uint64_t row_ns(const struct mlak_device *device, const struct mlak_row *row, uint64_t *items)
{
    const struct cpu_path *path = path_of(device, row);
    uint64_t bits, blocks = (row->q_len * row->heads + CPU_LANES - 1) / CPU_LANES;
    if (__atomic_load_n(&row->code, __ATOMIC_RELAXED) != MLAK_ROW_OK || blocks == 0)
        return 0;
    struct mlak_visible any = mlak_visible_any(row, &bits);
    uint64_t keys = any.hi > any.lo ? (uint64_t)(any.hi - any.lo) : 0;
    *items += (keys / CPU_SPLIT + 1) * row_groups(row);
    return blocks * (CPU_BLOCK_NS + keys * path->key_ns);
}

static uint64_t total_ns(const struct mlak_device *device, const struct mlak_row *rows, uint32_t count, uint64_t *items)
{
    uint64_t total = 0;
    for (uint32_t i = 0; i < count; i++)
        total += row_ns(device, &rows[i], items);
    return total;
}

static uint64_t cpu_estimate_ns(const struct mlak_device *device, const struct mlak_row *rows, uint32_t count)
{
    uint64_t items = 0, total = total_ns(device, rows, count, &items), threads = mlak_pool_threads(device->pool);
    if (total < CPU_ALONE_NS)
        return total;
    return total / (items < threads ? items : threads);
}

/* ---- launch ---- */

struct slice { uint32_t groups, items; size_t floats; };

/* Add as many of the row's groups from `group` on as fit, and return their number. Items are ordered so that the groups
 * that read the same keys run next to each other. */
static uint32_t add_groups(struct mlak_device *device, struct slice *slice, struct mlak_row *row, uint32_t group)
{
    struct cpu_group plan = {.row = row, .path = path_of(device, row)};
    mlak_cpu_plan_group(&plan);
    uint32_t rows = row->q_len * row->heads, left = row_groups(row) - group;
    size_t floats = plan.splits == 1 ? 0 : plan.splits * cpu_part_floats(CPU_ROWS);
    size_t fit = floats == 0 ? left : (CPU_ARENA_FLOATS - slice->floats) / floats;
    uint32_t count = fit < left ? (uint32_t)fit : left;
    if (count > CPU_GROUPS - slice->groups)
        count = CPU_GROUPS - slice->groups;
    if (count > (CPU_ITEMS - slice->items) / plan.splits)
        count = (CPU_ITEMS - slice->items) / plan.splits;
    for (uint32_t i = 0; i < count; i++) {
        plan.first = (group + i) * CPU_ROWS;
        plan.rows = rows - plan.first < CPU_ROWS ? rows - plan.first : CPU_ROWS;
        plan.remaining = plan.splits;
        plan.parts_offset = slice->floats;
        slice->floats += plan.splits == 1 ? 0 : plan.splits * cpu_part_floats(plan.rows);
        device->groups[slice->groups + i] = plan;
    }
    for (uint32_t split = 0; split < plan.splits; split++)
        for (uint32_t i = 0; i < count; i++)
            device->items[slice->items++] = (struct cpu_item){.group = slice->groups + i, .split = split};
    slice->groups += count;
    return count;
}

static void work(void *context, uint32_t index, uint32_t thread)
{
    struct mlak_device *device = context;
    struct cpu_item item = device->items[index];
    mlak_cpu_run_item(&device->groups[item.group], item.split, &device->scratch[thread]);
}

static bool run_slice(struct mlak_device *device, const struct slice *slice, bool alone)
{
    if (slice->floats > device->arena_floats) {
        free(device->arena);
        device->arena = aligned_alloc(64, slice->floats * sizeof *device->arena);
        device->arena_floats = device->arena != NULL ? slice->floats : 0;
        if (device->arena == NULL)
            return false;
    }
    for (uint32_t i = 0; i < slice->groups; i++)
        if (device->groups[i].splits > 1)
            device->groups[i].parts = device->arena + device->groups[i].parts_offset;
    if (alone)
        for (uint32_t i = 0; i < slice->items; i++)
            work(device, i, 0);
    else
        mlak_pool_run(device->pool, slice->items, work, device);
    return true;
}

static enum mlak_code cpu_launch(struct mlak_device *device, struct mlak_row *rows, uint32_t count)
{
    struct slice slice = {0};
    uint64_t items = 0;
    bool alone = total_ns(device, rows, count, &items) < CPU_ALONE_NS;
    for (uint32_t i = 0; i < count; i++) {
        if (__atomic_load_n(&rows[i].code, __ATOMIC_RELAXED) != MLAK_ROW_OK)
            continue;
        for (uint32_t group = 0; group < row_groups(&rows[i]);) {
            uint32_t added = add_groups(device, &slice, &rows[i], group);
            group += added;
            if (added > 0)
                continue;
            if (!run_slice(device, &slice, alone))
                return MLAK_MEMORY;
            slice = (struct slice){0};
        }
    }
    return run_slice(device, &slice, alone) ? MLAK_OK : MLAK_MEMORY;
}

const struct mlak_backend mlak_cpu_backend = {
    .name = "cpu", .open = cpu_open, .close = cpu_close, .variant = cpu_variant, .threads = cpu_threads,
    .capabilities = cpu_capabilities, .launch = cpu_launch, .estimate_ns = cpu_estimate_ns,
};
