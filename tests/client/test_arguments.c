/* test_arguments.c - every argument that libmla checks, and the public name of the field that its error gives. */
#include "peer.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>
#include <fcntl.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

struct fixture { struct peer *peer; struct rig rig; };

static int set_up(void **state)
{
    struct fixture *f = calloc(1, sizeof *f);
    f->peer = peer_new(NULL, NULL);
    rig_init(&f->rig, f->peer);
    *state = f;
    return 0;
}

static int tear_down(void **state)
{
    struct fixture *f = *state;
    rig_free(&f->rig);
    peer_free(f->peer);
    free(f);
    return 0;
}

static void allocated_buffers(void **state)
{
    struct rig *rig = &((struct fixture *)*state)->rig;
    mla_buffer *buffer = NULL;
    assert_fails(MLA_INVALID, "bytes", "not 0", mla_buffer_alloc(rig->client, 0, &buffer, e));
    assert_fails(MLA_INVALID, "bytes", "2^63", mla_buffer_alloc(rig->client, SIZE_MAX, &buffer, e));
    assert_fails(MLA_MEMORY, "bytes", "cannot be had", mla_buffer_alloc(rig->client, INT64_MAX, &buffer, e));
    assert_fails(MLA_INVALID, "client", "NULL", mla_buffer_alloc(NULL, 1, &buffer, e));
    assert_fails(MLA_INVALID, "buffer", "NULL", mla_buffer_alloc(rig->client, 1, NULL, e));
    assert_fails(MLA_INVALID, "buffer", "NULL", mla_buffer_free(NULL, e));
    assert_null(buffer);
    assert_ok(mla_buffer_alloc(rig->client, 5000, &buffer, e));
    assert_int_equal(mla_buffer_size(buffer), 5000);
    uint8_t *data = mla_buffer_data(buffer);
    assert_int_equal((uintptr_t)data % 4096, 0);
    for (int i = 0; i < 5000; i++)
        assert_int_equal(data[i], 0);
    assert_ok(mla_buffer_free(buffer, e));
}

static void imported_buffers(void **state)
{
    struct rig *rig = &((struct fixture *)*state)->rig;
    mla_client *client = rig->client;
    mla_buffer *buffer = NULL;
    int file = open("/dev/null", O_RDWR | O_CLOEXEC);
    assert_fails(MLA_BUFFER, "memfd", "no memfd", mla_buffer_import(client, file, 0, 1, MLA_READ, &buffer, e));
    assert_fails(MLA_BUFFER, "memfd", "no memfd", mla_buffer_import(client, -1, 0, 1, MLA_READ, &buffer, e));
    close(file);
    int fd = memfd_create("test", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    assert_int_equal(ftruncate(fd, 8192), 0);
    assert_fails(MLA_BUFFER, "memfd", "F_SEAL_SHRINK", mla_buffer_import(client, fd, 0, 1, MLA_READ, &buffer, e));
    assert_int_equal(fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK), 0);
    assert_fails(MLA_BUFFER, "bytes", "8193", mla_buffer_import(client, fd, 4096, 4097, MLA_READ, &buffer, e));
    assert_fails(MLA_INVALID, "offset", "page size", mla_buffer_import(client, fd, 1, 1, MLA_READ, &buffer, e));
    assert_fails(MLA_INVALID, "offset", "page size",
                 mla_buffer_import(client, fd, INT64_MAX - 4095, 4096, MLA_READ, &buffer, e));
    assert_fails(MLA_INVALID, "access", "not 2", mla_buffer_import(client, fd, 0, 1, (mla_access)2, &buffer, e));
    assert_fails(MLA_INVALID, "bytes", "not 0", mla_buffer_import(client, fd, 0, 0, MLA_READ, &buffer, e));
    assert_null(buffer);

    assert_int_equal(pwrite(fd, "second page", 11, 4096), 11);
    assert_ok(mla_buffer_import(client, fd, 4096, 4096, MLA_READ, &buffer, e));
    close(fd);      /* it was duplicated */
    assert_string_equal(mla_buffer_data(buffer), "second page");
    assert_ptr_equal(mla_buffer_data(buffer), mla_buffer_data(buffer));
    mla_batch batch = rig->batch;
    batch.out = (mla_tensor){buffer, 0};
    mla_plan *plan;
    assert_fails(MLA_INVALID, "batch.out", "MLA_READ", mla_plan_create(client, &batch, &plan, e));
    batch = rig->batch;
    batch.lse = (mla_tensor){buffer, 0};
    assert_fails(MLA_INVALID, "batch.lse", "MLA_READ", mla_plan_create(client, &batch, &plan, e));
    assert_ok(mla_buffer_free(buffer, e));
}

static void buffers_in_use(void **state)
{
    struct rig *rig = &((struct fixture *)*state)->rig;
    assert_fails(MLA_IN_USE, "buffer", "plans", mla_buffer_free(rig->buffer, e));
    assert_non_null(mla_buffer_data(rig->buffer));
    mla_plan_destroy(rig->plan);
    mla_plan_destroy(NULL);
    assert_ok(mla_buffer_free(rig->buffer, e));
}

#define REFUSED(status, field, words, ...) \
    do { \
        mla_batch batch = rig->batch; \
        __VA_ARGS__; \
        mla_plan *plan; \
        mla_ticket ticket; \
        assert_fails(status, field, words, mla_plan_create(rig->client, &batch, &plan, e)); \
        assert_fails(status, field, words, mla_submit_batch(rig->client, &batch, &ticket, e)); \
        assert_fails(status, field, words, mla_decode_batch(rig->client, &batch, MLA_FOREVER, NULL, e)); \
    } while (0)

static void fields_of_a_batch(void **state)
{
    struct rig *rig = &((struct fixture *)*state)->rig;
    REFUSED(MLA_INVALID, "batch.struct_size", "mla_batch_init", batch.struct_size = 0);
    REFUSED(MLA_INVALID, "batch.batch", "1 to 65536, not 0", batch.batch = 0);
    REFUSED(MLA_INVALID, "batch.batch", "not 65537", batch.batch = 65537);
    REFUSED(MLA_INVALID, "batch.heads", "1 to 128, not 129", batch.heads = 129);
    REFUSED(MLA_INVALID, "batch.heads", "not 0", batch.heads = 0);
    REFUSED(MLA_INVALID, "batch.q_rows", "4194304", batch.q_rows = 4194305);
    REFUSED(MLA_INVALID, "batch.q_rows", "multiple of batch", batch.batch = 2; batch.q_rows = 3);
    REFUSED(MLA_INVALID, "batch.pages", "2147483647", batch.pages = 2147483648u);
    REFUSED(MLA_INVALID, "batch.page_size", "1 to 256", batch.page_size = 0);
    REFUSED(MLA_INVALID, "batch.page_size", "not 257", batch.page_size = 257);
    REFUSED(MLA_INVALID, "batch.max_pages", "16777216", batch.max_pages = 16777217);
    REFUSED(MLA_INVALID, "batch.page_stride", "multiple of 16", batch.page_stride = 8);
    REFUSED(MLA_INVALID, "batch.page_stride", "1099511627776", batch.page_stride = 1ull << 41);
    REFUSED(MLA_INVALID, "batch.row_stride", "multiple of 16", batch.row_stride = 1160);
    REFUSED(MLA_INVALID, "batch.row_stride", "1048576", batch.row_stride = 1u << 21);
    REFUSED(MLA_INVALID, "batch.softmax_scale", "required", batch.softmax_scale = (double)NAN);
    REFUSED(MLA_INVALID, "batch.softmax_scale", "finite", batch.softmax_scale = (double)INFINITY);
    REFUSED(MLA_INVALID, "batch.q_dtype", "3", batch.q_dtype = (mla_dtype)3);
    REFUSED(MLA_INVALID, "batch.q_dtype", "255", batch.q_dtype = MLA_DTYPE_DEFAULT);
    REFUSED(MLA_INVALID, "batch.out_dtype", "-1", batch.out_dtype = (mla_dtype)-1);
    REFUSED(MLA_INVALID, "batch.kv_format", "4", batch.kv_format = (mla_kv_format)4);
    REFUSED(MLA_INVALID, "batch.mask", "3", batch.mask = (mla_mask)3);
    REFUSED(MLA_INVALID, "batch.lse_base", "2", batch.lse_base = (mla_lse_base)2);
    REFUSED(MLA_INVALID, "batch.dcp_world", "1 to 4096", batch.dcp_world = 0);
    REFUSED(MLA_INVALID, "batch.dcp_rank", "below dcp_world", batch.dcp_rank = 1);
    REFUSED(MLA_INVALID, "batch.dcp_rank", "4095", batch.dcp_rank = 4096);
    REFUSED(MLA_INVALID, "batch.dcp_interleave", "1048576", batch.dcp_interleave = 0);
    REFUSED(MLA_INVALID, "batch.window", "2147483647", batch.window = 2147483648u);
    REFUSED(MLA_INVALID, "batch.tree_mask", "exactly when", batch.mask = MLA_MASK_TREE);
    REFUSED(MLA_INVALID, "batch.tree_mask", "exactly when", batch.tree_mask = batch.q);
    REFUSED(MLA_INVALID, "batch.q", "required", batch.q.buffer = NULL);
    REFUSED(MLA_INVALID, "batch.kv", "required", batch.kv.buffer = NULL);
    REFUSED(MLA_INVALID, "batch.block_table", "required", batch.block_table.buffer = NULL);
    REFUSED(MLA_INVALID, "batch.seqlens", "required", batch.seqlens.buffer = NULL);
    REFUSED(MLA_INVALID, "batch.out", "required", batch.out.buffer = NULL);
    REFUSED(MLA_RANGE, "batch.seqlens", "past its buffer", batch.seqlens.offset = 2 * 1024 * 1024);
    REFUSED(MLA_RANGE, "batch.sink", "past its buffer", batch.sink = (mla_tensor){rig->buffer, UINT64_MAX});
    REFUSED(MLA_INVALID, "batch.q_scale", "7", batch.q_scale.kind = (mla_scale_kind)7);
    REFUSED(MLA_INVALID, "batch.k_scale", "finite", batch.k_scale = (mla_scale){MLA_SCALE_VALUE, NAN, {0}});
    REFUSED(MLA_INVALID, "batch.v_scale", "no buffer", batch.v_scale.kind = MLA_SCALE_TENSOR);
}

static void batches_of_another_client(void **state)
{
    struct fixture *f = *state;
    struct rig *rig = &f->rig;
    struct peer *peer = peer_new(NULL, NULL);
    struct rig other;
    rig_init(&other, peer);
    REFUSED(MLA_INVALID, "batch.kv", "another client", batch.kv.buffer = other.buffer);
    mla_ticket ticket;
    assert_fails(MLA_INVALID, "plan", "another client", mla_submit(rig->client, other.plan, &ticket, e));
    rig_free(&other);
    peer_free(peer);
}

/* Refused batches hold no buffer, and everything else about a batch reaches the daemon as it was given. */
static enum act inspect(struct peer *peer, const struct arrival *a)
{
    struct mlap_batch *seen = peer->of_test;
    if (a->header.type == MLAP_DECODE)
        *seen = a->body->decode_.batch;
    return ANSWER;
}

static void fields_reach_the_daemon(void **state)
{
    struct fixture *f = *state;
    struct mlap_batch seen = {0};
    f->peer->of_test = &seen;
    f->peer->script = inspect;
    mla_batch b = f->rig.batch;
    mla_buffer *buffer = f->rig.buffer;
    assert_ok(mla_decode_batch(f->rig.client, &b, 2000, NULL, e));
    assert_false(mlap_has(&seen, batch, out_dtype) || mlap_has(&seen, batch, window) || mlap_has(&seen, batch, cu_q));
    assert_false(mlap_has(&seen, batch, page_stride) || mlap_has(&seen, batch, k_scale) || mlap_has(&seen, batch, lse));

    b.batch = 3, b.heads = 6, b.q_rows = 7, b.q_dtype = MLA_E4M3, b.out_dtype = MLA_FP16, b.kv_format = MLA_KV_E4M3;
    b.pages = 9, b.page_size = 32, b.max_pages = 5, b.page_stride = 32 * 592, b.row_stride = 592,
    b.softmax_scale = 0.25;
    b.cu_q = (mla_tensor){buffer, 4}, b.tree_mask = (mla_tensor){buffer, 8}, b.sink = (mla_tensor){buffer, 12};
    b.q_scale = (mla_scale){MLA_SCALE_VALUE, 0.5f, {0}};
    b.k_scale = (mla_scale){MLA_SCALE_TENSOR, 0, {buffer, 16}};
    b.v_scale = (mla_scale){MLA_SCALE_VALUE, 2.0f, {0}};
    b.lse = (mla_tensor){buffer, 20}, b.mask = MLA_MASK_TREE, b.lse_base = MLA_LSE_2;
    b.dcp_world = 4, b.dcp_rank = 2, b.dcp_interleave = 16, b.window = 100, b.deterministic = 5;
    assert_ok(mla_decode_batch(f->rig.client, &b, 2000, NULL, e));
    assert_int_equal(seen.present, (UINT64_C(1) << MLAP_INDEX_batch_COUNT) - 1);
    assert_true(seen.batch == 3 && seen.heads == 6 && seen.q_rows == 7 && seen.pages == 9 && seen.page_size == 32);
    assert_true(seen.q_dtype == MLAP_dtype_E4M3 && seen.out_dtype == MLAP_dtype_FP16);
    assert_true(seen.kv_format == MLAP_kv_format_E4M3 && seen.max_pages == 5);
    assert_true(seen.page_stride == 32 * 592 && seen.row_stride == 592 && seen.softmax_scale == 0.25);
    assert_true(seen.q.offset == 0 && seen.kv.offset == 4096 && seen.block_table.offset == 2048);
    assert_true(seen.seqlens.offset == 2064 && seen.out.offset == 1024 * 1024 && seen.lse.offset == 20);
    assert_true(seen.cu_q.offset == 4 && seen.tree_mask.offset == 8 && seen.sink.offset == 12);
    assert_true(seen.q_scale.value == 0.5 && seen.k_scale.tensor.offset == 16 && seen.v_scale.value == 2);
    assert_true(seen.mask == MLAP_mask_TREE && seen.lse_base == MLAP_lse_base_TWO && seen.deterministic);
    assert_true(seen.dcp_world == 4 && seen.dcp_rank == 2 && seen.dcp_interleave == 16 && seen.window == 100);
}

static void arguments_of_calls(void **state)
{
    struct rig *rig = &((struct fixture *)*state)->rig;
    mla_client *c = rig->client;
    mla_ticket ticket = 7;
    mla_plan *plan;
    int done;
    assert_fails(MLA_INVALID, "batch", "NULL", mla_plan_create(c, NULL, &plan, e));
    assert_fails(MLA_INVALID, "plan", "NULL", mla_plan_create(c, &rig->batch, NULL, e));
    assert_fails(MLA_INVALID, "client", "NULL", mla_plan_create(NULL, &rig->batch, &plan, e));
    assert_fails(MLA_INVALID, "plan", "NULL", mla_submit(c, NULL, &ticket, e));
    assert_fails(MLA_INVALID, "ticket", "NULL", mla_submit(c, rig->plan, NULL, e));
    assert_fails(MLA_INVALID, "client", "NULL", mla_submit(NULL, rig->plan, &ticket, e));
    assert_fails(MLA_INVALID, "batch", "NULL", mla_submit_batch(c, NULL, &ticket, e));
    assert_fails(MLA_INVALID, "plan", "NULL", mla_decode(c, NULL, 0, NULL, e));
    assert_fails(MLA_INVALID, "timeout_ms", "-2", mla_decode(c, rig->plan, -2, NULL, e));
    assert_fails(MLA_INVALID, "timeout_ms", "-2", mla_wait(c, ticket, -2, NULL, e));
    assert_fails(MLA_INVALID, "done", "NULL", mla_poll(c, ticket, NULL, NULL, e));
    assert_fails(MLA_NOT_FOUND, "ticket", "7777", mla_poll(c, 7777, &done, NULL, e));
    assert_fails(MLA_NOT_FOUND, "ticket", "collected before", mla_wait(c, 0, 0, NULL, e));
    assert_fails(MLA_NOT_FOUND, "ticket", "never", mla_wait(c, 1, 0, NULL, e));     /* a call, and no ticket */
    assert_fails(MLA_NOT_FOUND, "ticket", "never", mla_wait(c, 2, 0, NULL, e));
    assert_int_equal(ticket, 7);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(allocated_buffers, set_up, tear_down),
        cmocka_unit_test_setup_teardown(imported_buffers, set_up, tear_down),
        cmocka_unit_test_setup_teardown(buffers_in_use, set_up, tear_down),
        cmocka_unit_test_setup_teardown(fields_of_a_batch, set_up, tear_down),
        cmocka_unit_test_setup_teardown(batches_of_another_client, set_up, tear_down),
        cmocka_unit_test_setup_teardown(fields_reach_the_daemon, set_up, tear_down),
        cmocka_unit_test_setup_teardown(arguments_of_calls, set_up, tear_down),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
