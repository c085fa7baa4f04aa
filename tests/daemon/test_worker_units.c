/* test_worker_units.c - the worker's objects one by one: id maps, histograms, quotas, buffers, plans; and each
 * allocation failing in turn. What needs a running worker is in test_worker.py and test_worker_lives.py. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "plan.h"
#include "stats.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { PAGE_BYTES = 4096 };

/* ---- allocations that fail on demand (linked with --wrap) ---- */

static long allocations_left = -1; /* -1: no end */

static bool refuse_allocation(void)
{
    if (allocations_left > 0)
        allocations_left--;
    return allocations_left == 0;
}

void *__real_malloc(size_t size);
void *__wrap_malloc(size_t size);
void *__wrap_malloc(size_t size)
{
    return refuse_allocation() ? NULL : __real_malloc(size);
}

void *__real_calloc(size_t count, size_t size);
void *__wrap_calloc(size_t count, size_t size);
void *__wrap_calloc(size_t count, size_t size)
{
    return refuse_allocation() ? NULL : __real_calloc(count, size);
}

/* ---- id maps ---- */

static void idmap_agrees_with_an_array(void **state)
{
    (void)state;
    enum { IDS = 700 };
    static int objects[IDS];
    static bool present[IDS];
    struct mlad_idmap map = {0};
    uint32_t seed = 1, count = 0;
    for (int turn = 0; turn < 100000; turn++) {
        seed = seed * 1664525u + 1013904223u;
        uint32_t at = (seed >> 8) % IDS;
        uint32_t id = at % 2 ? at : at << 20 | 1u << 31; /* dense and sparse ones */
        if (id == 0)
            continue;
        assert_ptr_equal(mlad_idmap_get(&map, id), present[at] ? &objects[at] : NULL);
        if (present[at]) {
            assert_ptr_equal(mlad_idmap_take(&map, id), &objects[at]);
            count--;
        } else {
            assert_true(mlad_idmap_put(&map, id, &objects[at]));
            count++;
        }
        present[at] = !present[at];
        assert_int_equal(map.count, count);
    }
    uint32_t position = 0, seen = 0;
    int *object;
    while ((object = mlad_idmap_next(&map, &position))) {
        assert_true(present[object - objects]);
        seen++;
    }
    assert_int_equal(seen, count);
    assert_null(mlad_idmap_get(&map, 0));
    mlad_idmap_deinit(&map);
}

/* ---- histograms ---- */

static void histogram_is_within_three_percent(void **state)
{
    (void)state;
    static struct mlad_histogram histogram;
    for (unsigned shift = 0; shift < 64; shift++) {
        for (uint64_t part = 16; part < 32; part++) {
            uint64_t value = shift < 5 ? part << shift >> 4 : part << (shift - 4) | (UINT64_C(1) << (shift - 4)) / 3;
            histogram = (struct mlad_histogram){0};
            mlad_histogram_add(&histogram, value);
            histogram.max = UINT64_MAX; /* which would hide an error */
            double got = (double)mlad_histogram_percentile(&histogram, 50);
            assert_true(got <= 1.03 * (double)value && got >= 0.97 * (double)value);
        }
    }
}

static void histogram_percentiles_follow_ranks(void **state)
{
    (void)state;
    static struct mlad_histogram histogram;
    assert_int_equal(mlad_histogram_percentile(&histogram, 99), 0);
    for (uint64_t value = 1; value <= 1000; value++)
        mlad_histogram_add(&histogram, value * 1000);
    const struct {
        unsigned percent;
        double value;
    } wanted[] = {{50, 500e3}, {90, 900e3}, {99, 990e3}, {100, 1000e3}};
    for (size_t i = 0; i < sizeof wanted / sizeof wanted[0]; i++) {
        double got = (double)mlad_histogram_percentile(&histogram, wanted[i].percent);
        assert_true(got >= 0.97 * wanted[i].value && got <= 1.03 * wanted[i].value);
    }
    assert_true(histogram.max == 1000000 && histogram.count == 1000 && histogram.sum == UINT64_C(500500000));
}

/* ---- quotas ---- */

static void quota_counts_and_names_its_limits(void **state)
{
    (void)state;
    struct mlad_quota quota = {
        .limits = {.max_sessions = 2, .max_buffers = 2, .max_bytes = 100, .max_plans = 1,
                   .max_in_flight = 2, .max_bytes_per_session = 70, .max_in_flight_per_session = 1}};
    struct mlad_user *one, *again, *other;
    struct mlap_fault fault;
    assert_int_equal(mlad_quota_enter(&quota, 1, &one, &fault), MLAP_code_OK);
    assert_int_equal(mlad_quota_enter(&quota, 1, &again, &fault), MLAP_code_OK);
    assert_ptr_equal(one, again);
    assert_int_equal(mlad_quota_enter(&quota, 1, &again, &fault), MLAP_code_QUOTA);
    assert_non_null(strstr(fault.message, "max_sessions"));
    assert_int_equal(mlad_quota_enter(&quota, 2, &other, &fault), MLAP_code_OK);

    assert_int_equal(mlad_user_take_buffer(one, 0, 71, &fault), MLAP_code_QUOTA);
    assert_non_null(strstr(fault.message, "max_bytes_per_session"));
    assert_int_equal(mlad_user_take_buffer(one, 0, 60, &fault), MLAP_code_OK);
    assert_int_equal(mlad_user_take_buffer(one, 60, 11, &fault), MLAP_code_QUOTA);
    assert_string_equal(fault.field, "bytes");
    assert_int_equal(mlad_user_take_buffer(one, 80, 1, &fault), MLAP_code_QUOTA); /* a limit that was lowered since */
    assert_int_equal(mlad_user_take_buffer(one, 0, 41, &fault), MLAP_code_QUOTA);
    assert_string_equal(fault.field, "bytes");
    assert_int_equal(mlad_user_take_buffer(one, 0, UINT64_MAX, &fault), MLAP_code_QUOTA);
    assert_int_equal(mlad_user_take_buffer(one, 0, 40, &fault), MLAP_code_OK);
    assert_int_equal(mlad_user_take_buffer(one, 0, 0, &fault), MLAP_code_QUOTA);
    assert_non_null(strstr(fault.message, "max_buffers"));
    quota.limits.max_bytes = 50; /* below what is held */
    mlad_user_give_buffer(one, 40);
    assert_int_equal(mlad_user_take_buffer(one, 0, 1, &fault), MLAP_code_QUOTA);
    assert_int_equal(mlad_user_take_buffer(other, 0, 50, &fault), MLAP_code_OK);
    assert_int_equal(mlad_user_take_plan(one, &fault), MLAP_code_OK);
    assert_int_equal(mlad_user_take_plan(one, &fault), MLAP_code_QUOTA);
    assert_int_equal(mlad_user_take_decode(one, 0, &fault), MLAP_code_OK);
    assert_int_equal(mlad_user_take_decode(one, 1, &fault), MLAP_code_BUSY);
    assert_non_null(strstr(fault.message, "max_in_flight_per_session"));
    assert_int_equal(mlad_user_take_decode(one, 0, &fault), MLAP_code_OK);
    assert_int_equal(mlad_user_take_decode(one, 0, &fault), MLAP_code_BUSY);
    assert_null(strstr(fault.message, "per_session"));
    mlad_user_give_decode(one);
    assert_int_equal(mlad_user_take_decode(one, 0, &fault), MLAP_code_OK);

    mlad_quota_leave(&quota, one);
    mlad_quota_leave(&quota, other);
    mlad_quota_leave(&quota, one);
    assert_null(quota.users);
}

/* ---- buffers and plans ---- */

struct world {
    struct mlad_quota quota;
    struct mlad_holder holder;
    struct mlad_idmap buffers;
    struct mlad_capabilities capabilities;
    int memfd;
    uint32_t unmapped, last_answer;
};

static void note_unmapped(struct mlad_holder *holder, uint32_t answer)
{
    struct world *world = (struct world *)((char *)holder - offsetof(struct world, holder));
    world->unmapped++;
    world->last_answer = answer;
}

static int sealed_memfd(off_t bytes, int seals)
{
    int fd = memfd_create("test", MFD_ALLOW_SEALING | MFD_CLOEXEC);
    assert_true(fd >= 0);
    assert_int_equal(ftruncate(fd, bytes), 0);
    assert_int_equal(fcntl(fd, F_ADD_SEALS, seals), 0);
    return fd;
}

static struct mlad_buffer *import(struct world *world, uint32_t id, uint64_t offset, uint64_t bytes,
                                  enum mlap_access access)
{
    struct mlap_register request = {.buffer = id, .offset = offset, .bytes = bytes, .access = access};
    struct mlad_buffer *buffer;
    struct mlap_fault fault;
    assert_int_equal(mlad_buffer_import(&world->holder, world->memfd, &request, &buffer, &fault), MLAP_code_OK);
    assert_true(mlad_idmap_put(&world->buffers, id, buffer));
    return buffer;
}

/* Buffers 1 (read, pages 0..63 of a memfd), 2 (readwrite, pages 64..127), 3 (readwrite, all of it). */
static int set_up(void **state)
{
    struct world *world = calloc(1, sizeof *world);
    static const struct mlak_capability rows[] = {{.variant = "test",
                                                   .q_dtype = MLAK_BF16,
                                                   .out_dtype = MLAK_BF16,
                                                   .kv_format = MLAK_KV_BF16,
                                                   .mask = MLAK_MASK_CAUSAL,
                                                   .max_heads = 16,
                                                   .max_q_len = 64,
                                                   .max_page_size = 256,
                                                   .features = MLAK_CAN_ALL}};
    struct mlap_fault fault;
    world->quota.limits = (struct mlad_limits){
        .max_sessions = 1, .max_bytes = 1 << 30, .max_bytes_per_session = 1 << 30, .max_buffers = 8};
    world->capabilities = (struct mlad_capabilities){rows, 1};
    mlad_quota_enter(&world->quota, 1, &world->holder.user, &fault);
    world->holder.unmapped = note_unmapped;
    world->memfd = sealed_memfd(128 * PAGE_BYTES, F_SEAL_SHRINK);
    import(world, 1, 0, 64 * PAGE_BYTES, MLAP_access_READ);
    import(world, 2, 64 * PAGE_BYTES, 64 * PAGE_BYTES, MLAP_access_READWRITE);
    import(world, 3, 0, 128 * PAGE_BYTES, MLAP_access_READWRITE);
    *state = world;
    return 0;
}

static int tear_down(void **state)
{
    struct world *world = *state;
    uint32_t position = 0;
    struct mlad_buffer *buffer;
    while ((buffer = mlad_idmap_next(&world->buffers, &position)))
        mlad_buffer_unref(buffer);
    mlad_idmap_deinit(&world->buffers);
    int leaked = mlad_buffer_mapped_bytes() != 0 || world->holder.bytes != 0 || world->holder.user->bytes != 0 ||
                 world->holder.user->buffers != 0;
    mlad_quota_leave(&world->quota, world->holder.user);
    close(world->memfd);
    free(world);
    return leaked;
}

static struct mlap_batch small_batch(void)
{
    return (struct mlap_batch){
        .batch = 2,
        .heads = 4,
        .q_rows = 2,
        .pages = 2,
        .page_size = 16,
        .max_pages = 1,
        .softmax_scale = 0.1,
        .q = {.buffer = 1, .offset = 0},      /* 2 * 4 * 1152 = 9216 bytes */
        .kv = {.buffer = 1, .offset = 16384}, /* 2 * 16 * 1152 = 36864 bytes */
        .block_table = {.buffer = 1, .offset = 61440},
        .seqlens = {.buffer = 1, .offset = 61448},
        .out = {.buffer = 2, .offset = 0}, /* 2 * 4 * 1024 = 8192 bytes */
    };
}

static void add_lse(struct mlap_batch *batch, uint32_t buffer, uint64_t offset)
{
    batch->lse = (struct mlap_tensor){.buffer = buffer, .offset = offset}; /* 32 bytes */
    mlap_set(batch, batch, lse);
}

static void refused(struct world *world, const struct mlap_batch *batch, enum mlap_code code, const char *field)
{
    struct mlap_fault fault;
    struct mlad_plan *plan;
    assert_int_equal(mlad_plan_new(batch, 1, &world->buffers, &world->capabilities, &plan, &fault), code);
    assert_int_equal(fault.code, code);
    assert_string_equal(fault.field, field);
    assert_true(strlen(fault.message) > 10);
}

static struct mlad_plan *accepted(struct world *world, const struct mlap_batch *batch)
{
    struct mlap_fault fault = {0};
    struct mlad_plan *plan = NULL;
    if (mlad_plan_new(batch, 1, &world->buffers, &world->capabilities, &plan, &fault) != MLAP_code_OK)
        fail_msg("%s: %s", fault.field, fault.message);
    return plan;
}

static void buffers_refuse_what_could_fail_later(void **state)
{
    struct world *world = *state;
    int ends[2];
    assert_int_equal(pipe(ends), 0);
    const struct {
        int fd;
        uint64_t offset, bytes;
        enum mlap_access access;
        enum mlap_code code;
        const char *field;
    } cases[] = {
        {-1, 0, PAGE_BYTES, MLAP_access_READ, MLAP_code_BUFFER, "fd"},
        {ends[0], 0, PAGE_BYTES, MLAP_access_READ, MLAP_code_BUFFER, "fd"},
        {open("/proc/self/exe", O_RDONLY | O_CLOEXEC), 0, PAGE_BYTES, MLAP_access_READ, MLAP_code_BUFFER, "fd"},
        {sealed_memfd(PAGE_BYTES, F_SEAL_GROW), 0, PAGE_BYTES, MLAP_access_READ, MLAP_code_BUFFER, "fd"},
        {sealed_memfd(PAGE_BYTES, F_SEAL_SHRINK | F_SEAL_WRITE), 0, PAGE_BYTES, MLAP_access_READWRITE, MLAP_code_BUFFER,
         "access"},
        {sealed_memfd(PAGE_BYTES, F_SEAL_SHRINK), 0, PAGE_BYTES + 1, MLAP_access_READ, MLAP_code_BUFFER, "bytes"},
        {sealed_memfd(PAGE_BYTES, F_SEAL_SHRINK), 1, 1, MLAP_access_READ, MLAP_code_INVALID, "offset"},
        {sealed_memfd(PAGE_BYTES, F_SEAL_SHRINK), INT64_MAX / PAGE_BYTES * PAGE_BYTES, INT64_MAX, MLAP_access_READ,
         MLAP_code_BUFFER, "bytes"},
        {sealed_memfd((off_t)2 << 30, F_SEAL_SHRINK), 0, UINT64_C(2) << 30, MLAP_access_READ, MLAP_code_QUOTA, "bytes"},
    };
    uint64_t mapped = mlad_buffer_mapped_bytes();
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct mlap_register request = {
            .buffer = 9, .offset = cases[i].offset, .bytes = cases[i].bytes, .access = cases[i].access};
        struct mlad_buffer *buffer;
        struct mlap_fault fault;
        assert_int_equal(mlad_buffer_import(&world->holder, cases[i].fd, &request, &buffer, &fault), cases[i].code);
        assert_string_equal(fault.field, cases[i].field);
        if (cases[i].fd >= 0)
            close(cases[i].fd);
    }
    close(ends[1]);
    assert_int_equal(mlad_buffer_mapped_bytes(), mapped);
    assert_int_equal(world->holder.buffers, 3);
}

static void retired_buffer_stays_until_its_plan_goes(void **state)
{
    struct world *world = *state;
    struct mlap_batch batch = small_batch();
    struct mlad_plan *plan = accepted(world, &batch);
    struct mlad_buffer *buffer = mlad_idmap_take(&world->buffers, 2);
    assert_true(mlad_plan_names(plan, buffer));
    mlad_buffer_retire(buffer, 77);
    assert_int_equal(world->unmapped, 0);
    memset(plan->batch.out, 1, mlak_extent(&plan->batch, MLAK_T_OUT)); /* still mapped */
    mlad_plan_unref(plan);
    assert_int_equal(world->unmapped, 1);
    assert_int_equal(world->last_answer, 77);
}

static void large_buffers_are_unmapped_off_the_loop(void **state)
{
    struct world *world = *state;
    uv_loop_t loop;
    assert_int_equal(uv_loop_init(&loop), 0);
    world->holder.loop = &loop;
    uint64_t bytes = 5 * (uint64_t)MLAD_UNMAP_PIECE + PAGE_BYTES, mapped = mlad_buffer_mapped_bytes();
    int fd = sealed_memfd((off_t)bytes, F_SEAL_SHRINK);
    struct mlap_register request = {.buffer = 9, .bytes = bytes};
    struct mlad_buffer *buffer;
    struct mlap_fault fault;
    assert_int_equal(mlad_buffer_import(&world->holder, fd, &request, &buffer, &fault), MLAP_code_OK);
    close(fd);
    uint8_t *data = buffer->data;
    memset(data, 1, bytes);
    mlad_buffer_retire(buffer, 5);
    assert_int_equal(world->unmapped, 0);
    assert_true(mlad_buffer_mapped_bytes() == mapped + bytes); /* charged until it is unmapped */
    uv_run(&loop, UV_RUN_DEFAULT);
    assert_int_equal(world->unmapped, 1);
    assert_int_equal(world->last_answer, 5);
    assert_true(mlad_buffer_mapped_bytes() == mapped);
    unsigned char resident;
    for (uint64_t at = 0; at < bytes; at += MLAD_UNMAP_PIECE)
        assert_int_equal(mincore(data + at, PAGE_BYTES, &resident), -1);
    assert_int_equal(uv_loop_close(&loop), 0);
}

static void plans_resolve_pointers_and_defaults(void **state)
{
    struct world *world = *state;
    struct mlap_batch batch = small_batch();
    add_lse(&batch, 2, 8192);
    struct mlad_plan *plan = accepted(world, &batch);
    const struct mlad_buffer *in = mlad_idmap_get(&world->buffers, 1), *out = mlad_idmap_get(&world->buffers, 2);
    assert_ptr_equal(plan->batch.q, in->data);
    assert_ptr_equal(plan->batch.kv, in->data + 16384);
    assert_ptr_equal(plan->batch.seqlens, in->data + 61448);
    assert_ptr_equal(plan->batch.out, out->data);
    assert_ptr_equal(plan->batch.lse, out->data + 8192);
    assert_null(plan->batch.cu_q);
    assert_int_equal(plan->batch.mask, MLAK_MASK_CAUSAL);
    assert_int_equal(plan->batch.row_stride, 1152);
    assert_int_equal(plan->batch.page_stride, 16 * 1152);
    assert_int_equal(plan->batch.dcp_world, 1);
    mlad_plan_unref(plan);
}

static void plans_end_exactly_where_their_buffer_does(void **state)
{
    struct world *world = *state;
    const uint64_t end = 64 * PAGE_BYTES;
    struct mlap_batch batch = small_batch();
    batch.out.offset = end - 8192;
    mlad_plan_unref(accepted(world, &batch));
    batch.out.offset += 16;
    refused(world, &batch, MLAP_code_RANGE, "batch.out");
    batch.out.offset = UINT64_C(0x7ffffffffffffff0);
    refused(world, &batch, MLAP_code_RANGE, "batch.out");
    batch = small_batch();
    batch.kv.offset = end - 36864;
    batch.block_table.offset = 9216;
    batch.seqlens.offset = 9224;
    mlad_plan_unref(accepted(world, &batch));
    batch.page_stride = 16 * 1152 + 16;
    mlap_set(&batch, batch, page_stride);
    refused(world, &batch, MLAP_code_RANGE, "batch.kv");
    batch.pages = INT32_MAX;
    batch.page_stride = UINT64_C(1) << 40;
    refused(world, &batch, MLAP_code_INVALID, "batch.page_stride"); /* its extent passes 63 bits */
    batch = small_batch();
    batch.seqlens.offset = end - 8;
    mlad_plan_unref(accepted(world, &batch));
    batch.seqlens.offset = end - 4;
    refused(world, &batch, MLAP_code_RANGE, "batch.seqlens");
}

static void plans_refuse_misaligned_and_read_only_outputs(void **state)
{
    struct world *world = *state;
    struct mlap_batch batch = small_batch();
    batch.q.offset = 8;
    refused(world, &batch, MLAP_code_INVALID, "batch.q.offset");
    batch = small_batch();
    batch.seqlens.offset += 2;
    refused(world, &batch, MLAP_code_INVALID, "batch.seqlens.offset");
    batch = small_batch();
    batch.out = (struct mlap_tensor){.buffer = 1, .offset = 131072};
    refused(world, &batch, MLAP_code_INVALID, "batch.out.buffer");
    batch = small_batch();
    batch.kv.buffer = 4;
    refused(world, &batch, MLAP_code_NOT_FOUND, "batch.kv.buffer");
}

static void plans_refuse_overlap_through_any_registration(void **state)
{
    struct world *world = *state;
    struct mlap_batch batch = small_batch();
    batch.out = (struct mlap_tensor){.buffer = 3, .offset = 0}; /* q, by another name */
    refused(world, &batch, MLAP_code_OVERLAP, "batch.out");
    batch.out.offset = 9216; /* between q and kv: touches neither */
    batch.kv.offset = 17408;
    mlad_plan_unref(accepted(world, &batch));
    batch.kv.offset = 17392;
    refused(world, &batch, MLAP_code_OVERLAP, "batch.out");
    batch = small_batch();
    add_lse(&batch, 3, 64 * PAGE_BYTES + 8192 - 4);
    refused(world, &batch, MLAP_code_OVERLAP, "batch.lse");
    add_lse(&batch, 3, 64 * PAGE_BYTES + 8192);
    mlad_plan_unref(accepted(world, &batch));
    add_lse(&batch, 3, 61448 - 28);
    refused(world, &batch, MLAP_code_OVERLAP, "batch.lse");
}

static void plans_cite_the_capability_table(void **state)
{
    struct world *world = *state;
    struct mlap_batch batch = small_batch();
    batch.heads = 32;
    refused(world, &batch, MLAP_code_UNSUPPORTED, "batch.heads");
    batch = small_batch();
    batch.mask = MLAP_mask_NONE;
    mlap_set(&batch, batch, mask);
    refused(world, &batch, MLAP_code_UNSUPPORTED, "batch.mask");
    batch = small_batch();
    mlap_set(&batch, batch, v_scale);
    refused(world, &batch, MLAP_code_INVALID, "batch.v_scale");
}

static void every_allocation_may_fail(void **state)
{
    struct world *world = *state;
    struct mlap_batch batch = small_batch();
    struct mlap_register request = {.buffer = 5, .bytes = PAGE_BYTES, .access = MLAP_access_READ};
    uint64_t bytes = world->holder.bytes;
    bool whole = false;
    for (long n = 1; !whole; n++) {
        struct mlad_buffer *buffer = NULL;
        struct mlad_plan *plan = NULL;
        struct mlad_quota quota = {.limits = {.max_sessions = 1}};
        struct mlad_user *user = NULL;
        struct mlad_idmap map = {0};
        struct mlap_fault fault;
        allocations_left = n;
        enum mlap_code codes[] = {
            mlad_buffer_import(&world->holder, world->memfd, &request, &buffer, &fault),
            mlad_plan_new(&batch, 2, &world->buffers, &world->capabilities, &plan, &fault),
            mlad_quota_enter(&quota, 1, &user, &fault),
        };
        whole = true;
        for (uint32_t id = 1; id < 40; id++)
            whole &= mlad_idmap_put(&map, id, world);
        allocations_left = -1;
        for (size_t i = 0; i < sizeof codes / sizeof codes[0]; i++) {
            assert_true(codes[i] == MLAP_code_OK || codes[i] == MLAP_code_MEMORY);
            whole &= codes[i] == MLAP_code_OK;
        }
        for (uint32_t id = 1; id < 40; id++)
            assert_true(mlad_idmap_get(&map, id) == NULL || mlad_idmap_get(&map, id) == world);
        mlad_idmap_deinit(&map);
        if (buffer)
            mlad_buffer_unref(buffer);
        if (plan)
            mlad_plan_unref(plan);
        if (user)
            mlad_quota_leave(&quota, user);
        assert_int_equal(world->holder.bytes, bytes);
        assert_true(n < 20);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(idmap_agrees_with_an_array),
        cmocka_unit_test(histogram_is_within_three_percent),
        cmocka_unit_test(histogram_percentiles_follow_ranks),
        cmocka_unit_test(quota_counts_and_names_its_limits),
        cmocka_unit_test_setup_teardown(buffers_refuse_what_could_fail_later, set_up, tear_down),
        cmocka_unit_test_setup_teardown(retired_buffer_stays_until_its_plan_goes, set_up, tear_down),
        cmocka_unit_test_setup_teardown(large_buffers_are_unmapped_off_the_loop, set_up, tear_down),
        cmocka_unit_test_setup_teardown(plans_resolve_pointers_and_defaults, set_up, tear_down),
        cmocka_unit_test_setup_teardown(plans_end_exactly_where_their_buffer_does, set_up, tear_down),
        cmocka_unit_test_setup_teardown(plans_refuse_misaligned_and_read_only_outputs, set_up, tear_down),
        cmocka_unit_test_setup_teardown(plans_refuse_overlap_through_any_registration, set_up, tear_down),
        cmocka_unit_test_setup_teardown(plans_cite_the_capability_table, set_up, tear_down),
        cmocka_unit_test_setup_teardown(every_allocation_may_fail, set_up, tear_down),
    };
    return cmocka_run_group_tests_name("worker units", tests, NULL, NULL);
}
