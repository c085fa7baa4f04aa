/* test_pool.c - the compute pool: every item once, by a thread of the pool, before the call returns. */
#include "mlak_pool.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>

#include <cmocka.h>

enum { MOST = 3000 };
struct tally { uint32_t runs[MOST], threads; uint32_t strangers; };

static void count_item(void *context, uint32_t item, uint32_t thread)
{
    struct tally *tally = context;
    __atomic_fetch_add(&tally->runs[item], 1, __ATOMIC_RELAXED);
    if (thread >= tally->threads)
        __atomic_fetch_add(&tally->strangers, 1, __ATOMIC_RELAXED);
}

static void every_item_runs_once(void **state)
{
    (void)state;
    static struct tally tally;
    for (uint32_t threads = 1; threads <= 5; threads += 2) {
        struct mlak_pool *pool = mlak_pool_new(threads);
        assert_non_null(pool);
        assert_int_equal(mlak_pool_threads(pool), threads);
        for (uint32_t round = 0; round < 2000; round++) {
            uint32_t count = round % 100 == 99 ? MOST : round % 7;
            memset(&tally, 0, sizeof tally);
            tally.threads = threads;
            mlak_pool_run(pool, count, count_item, &tally);
            for (uint32_t i = 0; i < (count < MOST ? count + 1 : MOST); i++)
                assert_int_equal(tally.runs[i], i < count);
            assert_int_equal(tally.strangers, 0);
        }
        mlak_pool_free(pool);
    }
}

static void a_pool_of_all_processors(void **state)
{
    (void)state;
    struct mlak_pool *pool = mlak_pool_new(0);
    assert_non_null(pool);
    assert_true(mlak_pool_threads(pool) >= 1);
    mlak_pool_free(pool);
    mlak_pool_free(NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(every_item_runs_once),
                                       cmocka_unit_test(a_pool_of_all_processors)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
