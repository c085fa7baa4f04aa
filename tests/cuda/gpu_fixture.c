/* gpu_fixture.c - see gpu_fixture.h. The words and the trace are files, which the fake driver knows from the
 * environment. */
#include "gpu_fixture.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

const struct mlak_backend *backend;
static char control[] = "/tmp/mlad-fake-XXXXXX", trace[] = "/tmp/mlad-trace-XXXXXX";

void gpu_fixture_begin(const char *words)
{
    close(mkstemp(control));
    close(mkstemp(trace));
    setenv("MLAD_FAKE_CUDA_CONTROL", control, 1);
    setenv("MLAD_FAKE_CUDA_TRACE", trace, 1);
    inject(words);
    backend = mlak_backend(GPU);
}

void gpu_fixture_end(void)
{
    unlink(control);
    unlink(trace);
}

void inject(const char *words)
{
    static unsigned times;
    FILE *file = fopen(control, "w");
    assert_non_null(file);
    fprintf(file, "%s%*s\n", words, (int)++times, ""); /* another size: the file is read again when it changes */
    fclose(file);
}

void *unhang_soon(void *over)
{
    usleep(50000);
    __atomic_store_n((int *)over, 1, __ATOMIC_RELEASE);
    inject("");
    return NULL;
}

/* Lines of the trace that end so. */
static unsigned traced(const char *end)
{
    char line[256];
    unsigned count = 0;
    FILE *file = fopen(trace, "r");
    assert_non_null(file);
    while (fgets(line, sizeof line, file))
        count += strstr(line, end) != NULL;
    fclose(file);
    return count;
}

unsigned succeeded(const char *function)
{
    char end[128];
    snprintf(end, sizeof end, " %s 0\n", function);
    return traced(end);
}

unsigned launched(const char *kernel)
{
    char end[128];
    snprintf(end, sizeof end, " launch %s\n", kernel);
    return traced(end);
}

struct mlak_device *open_device(uint64_t *progress)
{
    struct mlak_fault fault = {0};
    struct mlak_device *device = backend->open(&(struct mlak_options){.device = GPU, .progress = progress}, &fault);
    if (!device)
        fail_msg("%s", fault.message);
    return device;
}

struct made *plain(struct mlak_row rows[2])
{
    struct maker maker = maker_seeded(1);
    struct mlak_batch shape = maker_plain(2, 4, 2);
    memset(rows, 0, 2 * sizeof *rows);
    return made_new(&maker, &shape, (int32_t[]){100, 60}, NULL);
}

void assert_outputs_are_right(struct made *made)
{
    char why[256];
    for (uint32_t b = 0; b < made->batch.batch; b++) {
        struct oracle *oracle = oracle_new(made, b, true);
        if (!oracle_holds(oracle, (struct oracle_bar){.margin_db = 1, .lse = 2e-5}, why))
            fail_msg("%s", why);
        oracle_free(oracle);
    }
}
