/* client_sweep - every memory and socket call that libmla makes fails once, one after another, against a real daemon.
 *
 *     client_sweep memory|socket      preloaded with inject.c, INJECT_PROGRAM=client_sweep
 *
 * One scenario (connect, buffers, plan, decode, submit, wait, close) runs with the n-th call failing, n = 1, 2, ...
 * until a run in which nothing failed. Each run must end in success with the right output or in an error that says
 * something, and must leave as many allocations and descriptors as before. */
#include "mla.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

struct page { /* inject.c */
    uint64_t armed, kind, nth, count, fired;
    int64_t live;
};

enum { HEADS = 2, KEYS = 3, AT_KV = 4096, AT_TABLE = 8192, AT_LENS = 8256, AT_OUT = 12288, BYTES = 16384 };

/* One query whose heads are zero sees KEYS keys of the constant 1: the output is 1 whatever the scale. */
static mla_status scenario(int *right, mla_error *error)
{
    mla_options options;
    mla_options_init(&options);
    options.device = "cpu", options.reconnect_ms = 500;
    mla_client *client = NULL;
    mla_buffer *buffer, *spare;
    mla_plan *plan = NULL;
    mla_ticket ticket;
    *right = 0;
    mla_status status = mla_connect(&client, &options, error);
    if (status) return status;
    status = mla_buffer_alloc(client, BYTES, &buffer, error);
    if (!status) {
        unsigned char *data = mla_buffer_data(buffer);
        for (int i = 0; i < KEYS * 576; i++) ((uint16_t *)(data + AT_KV))[i] = 0x3f80;
        *(int32_t *)(data + AT_LENS) = KEYS;
        mla_batch batch;
        mla_batch_init(&batch);
        batch.batch = 1, batch.heads = HEADS, batch.q_rows = 1, batch.pages = 1, batch.page_size = KEYS,
        batch.max_pages = 1;
        batch.softmax_scale = 1;
        batch.q = (mla_tensor){buffer, 0}, batch.kv = (mla_tensor){buffer, AT_KV},
        batch.out = (mla_tensor){buffer, AT_OUT};
        batch.block_table = (mla_tensor){buffer, AT_TABLE}, batch.seqlens = (mla_tensor){buffer, AT_LENS};
        status = mla_plan_create(client, &batch, &plan, error);
        if (!status) status = mla_decode(client, plan, 5000, NULL, error);
        if (!status) status = mla_submit(client, plan, &ticket, error);
        if (!status) status = mla_wait(client, ticket, 5000, NULL, error);
        if (!status) status = mla_decode_batch(client, &batch, 5000, NULL, error);
        if (!status) status = mla_buffer_alloc(client, 4096, &spare, error);
        if (!status) status = mla_buffer_free(spare, error);
        *right = 1;
        for (int i = 0; i < HEADS * 512; i++) *right &= ((uint16_t *)(data + AT_OUT))[i] == 0x3f80;
        mla_plan_destroy(plan);
    }
    mla_close(client);
    return status;
}

static int count_fds(void)
{
    DIR *folder = opendir("/proc/self/fd");
    int count = 0;
    while (folder && readdir(folder)) count++;
    if (folder) closedir(folder);
    return count;
}

int main(int argc, char **argv)
{
    const char *path = getenv("INJECT_PAGE");
    const int fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    struct page *page = mmap(NULL, sizeof *page, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (argc != 2 || fd < 0 || page == MAP_FAILED) {
        fprintf(stderr, "client_sweep: run it by test_sweep.py\n");
        return 2;
    }
    page->kind = strcmp(argv[1], "memory") ? 2 : 1;
    mla_error error;
    int right, failures = 0;
    if (scenario(&right, &error) || !right) {
        fprintf(stderr, "client_sweep: without injection: %s\n", error.message);
        return 1;
    }

    uint64_t nth = 1, handled = 0;
    for (;; nth++) {
        memset(&error, 0, sizeof error);
        const int64_t live = page->live;
        const int fds = count_fds();
        page->nth = nth, page->count = 0, page->fired = 0;
        __atomic_store_n(&page->armed, 1, __ATOMIC_RELEASE);
        const mla_status status = scenario(&right, &error);
        __atomic_store_n(&page->armed, 0, __ATOMIC_RELEASE);
        const char *wrong = status == MLA_OK && !right       ? "success with a wrong output"
                            : status && !error.message[0]    ? "an error without a sentence"
                            : status && error.code != status ? "an error that does not match its status"
                            : page->live != live             ? "memory leaked"
                            : count_fds() != fds             ? "a descriptor leaked"
                                                             : NULL;
        if (wrong) {
            fprintf(stderr, "client_sweep: %s call %lu: %s (status %s, %s; %+ld allocations)\n", argv[1],
                    (unsigned long)nth, wrong, mla_status_text(status), error.message, (long)(page->live - live));
            failures++;
        }
        if (!page->fired) break;
        handled += status != MLA_OK;
    }
    printf("libmla, %s calls: %lu failed one by one, %lu of them reported, the others recovered from, %d wrong\n",
           argv[1], (unsigned long)nth - 1, (unsigned long)handled, failures);
    return failures || nth < 5;
}
