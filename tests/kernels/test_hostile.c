/* test_hostile.c - client memory that lies: `test_hostile MUTATIONS backend [variant]`.
 *
 * Small batches over the whole contract, each tensor between inaccessible pages, NaN around it. Half of the mutations
 * change arrays before a launch: the inputs must then be untouched and the requests that were not mutated must have the
 * bits that they have without mutation. The other half fall into running launches, from a thread that keeps scribbling
 * and, so that they do even where the two share a processor, from a timer's signal to the launching thread: there, only
 * that nothing is touched outside the tensors can be asked, and is. */
#include "test_device.h"

#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/time.h>

#include <cmocka.h>

enum { BATCHES = 24, MOST_REQUESTS = 4 };

static unsigned long mutations;

/* What a client may change at any moment, and what of it a request depends on. */
static const enum mlak_tensor targets[] = {MLAK_T_SEQLENS, MLAK_T_BLOCK_TABLE, MLAK_T_CU_Q,    MLAK_T_TREE_MASK,
                                           MLAK_T_Q_SCALE, MLAK_T_K_SCALE,     MLAK_T_V_SCALE, MLAK_T_BLOCK_TABLE};

/* ---- mutations ---- */

static uint32_t nasty_word(struct maker *maker, uint32_t old)
{
    const uint32_t nasty[] = {0,       1,       64,        65,  0x7fffffff, 0x80000000, 0xffffffff, 0x7fc00000,
                              old + 1, old - 1, old << 16, ~old, maker_below(maker, 6), maker_below(maker, 200),
                              (uint32_t)maker_random(maker)};
    return nasty[maker_below(maker, sizeof nasty / sizeof nasty[0])];
}

/* Change one element of a tensor. Atomic, as kernels/ reads it: a race with a client, none in the sense of C. */
static void mutate(struct maker *maker, struct made *made)
{
    for (;;) {
        enum mlak_tensor target = targets[maker_below(maker, sizeof targets / sizeof targets[0])];
        struct fence *tensor = &made->tensor[target];
        if (tensor->bytes == 0)
            continue;
        if (target == MLAK_T_TREE_MASK) {
            uint64_t *mask = (uint64_t *)(void *)tensor->data + maker_below(maker, (uint32_t)(tensor->bytes / 8));
            __atomic_store_n(mask, maker_random(maker), __ATOMIC_RELAXED);
        } else {
            uint32_t *word = (uint32_t *)(void *)tensor->data + maker_below(maker, (uint32_t)(tensor->bytes / 4));
            __atomic_store_n(word, nasty_word(maker, __atomic_load_n(word, __ATOMIC_RELAXED)), __ATOMIC_RELAXED);
        }
        return;
    }
}

/* ---- a batch, its true contents, and the outputs that belong to them ---- */

struct victim { struct made *made; uint8_t *copy[MLAK_T_COUNT]; };

static bool is_output(int tensor) { return tensor == MLAK_T_OUT || tensor == MLAK_T_LSE; }

static void victim_copy(struct victim *victim, int tensor)
{
    memcpy(victim->copy[tensor], victim->made->tensor[tensor].data, victim->made->tensor[tensor].bytes);
}

static void victim_restore(struct victim *victim)
{
    for (int i = 0; i < MLAK_T_COUNT; i++)
        if (!is_output(i))
            memcpy(victim->made->tensor[i].data, victim->copy[i], victim->made->tensor[i].bytes);
}

static void victim_init(struct victim *victim, uint64_t seed)
{
    struct maker maker = maker_seeded(seed);
    struct mlak_row rows[MOST_REQUESTS];
    struct mlak_fault fault;
    maker.max_batch = MOST_REQUESTS;
    maker.max_heads = 8;
    maker.max_q = 4;
    maker.max_keys = 100;
    struct mlak_batch shape = maker_describe(&maker);
    shape.deterministic = true; /* else a request's bits might follow its batch-mates */
    victim->made = made_new(&maker, &shape, NULL, NULL);
    assert_int_equal(test_device_decode(victim->made, rows, &fault), MLAK_OK);
    for (int i = 0; i < MLAK_T_COUNT; i++) {
        victim->copy[i] = malloc(victim->made->tensor[i].bytes + 1);
        assert_non_null(victim->copy[i]);
        victim_copy(victim, i);
    }
}

static void victim_deinit(struct victim *victim)
{
    for (int i = 0; i < MLAK_T_COUNT; i++)
        free(victim->copy[i]);
    made_free(victim->made);
}

/* Part of a tensor is as it was made. */
static bool unchanged(const struct victim *victim, enum mlak_tensor tensor, size_t from, size_t bytes)
{
    return memcmp(victim->made->tensor[tensor].data + from, victim->copy[tensor] + from, bytes) == 0;
}

static bool request_unchanged(const struct victim *victim, uint32_t b)
{
    const struct mlak_batch *batch = &victim->made->batch;
    for (enum mlak_tensor scale = MLAK_T_Q_SCALE; scale <= MLAK_T_V_SCALE; scale++)
        if (!unchanged(victim, scale, 0, victim->made->tensor[scale].bytes))
            return false;
    if (batch->has_cu_q && !unchanged(victim, MLAK_T_CU_Q, b * 4, 8))
        return false;
    if (batch->has_tree_mask &&
        !unchanged(victim, MLAK_T_TREE_MASK, made_q_start(victim->made, b) * 8ul, made_q_len(victim->made, b) * 8ul))
        return false;
    return unchanged(victim, MLAK_T_SEQLENS, b * 4, 4) &&
           unchanged(victim, MLAK_T_BLOCK_TABLE, (size_t)b * batch->max_pages * 4, batch->max_pages * 4ul);
}

/* Rows of two requests can overlap by a changed cu_q: those of b are its own if no other request's reach them. */
static bool request_alone(const struct victim *victim, uint32_t b)
{
    uint32_t first = made_q_start(victim->made, b), end = first + made_q_len(victim->made, b);
    for (uint32_t other = 0; other < victim->made->batch.batch; other++) {
        uint32_t start = made_q_start(victim->made, other);
        if (other != b && start < end && start + made_q_len(victim->made, other) > first)
            return false;
    }
    return true;
}

/* A fault names something that is really wrong. */
static void assert_fault_is_true(struct victim *victim, const struct mlak_row *row)
{
    const struct mlak_batch *batch = &victim->made->batch;
    int32_t k = made_seqlens(victim->made)[row->request];
    if (row->code == MLAK_ROW_SEQLEN_NEGATIVE)
        assert_true(k < 0);
    else if (row->code == MLAK_ROW_SEQLEN_TOO_LONG)
        assert_true(k > (int64_t)batch->max_pages * batch->page_size);
    else
        assert_true((uint32_t)made_table(victim->made, row->request)[row->detail[0]] >= batch->pages &&
                    made_table(victim->made, row->request)[row->detail[0]] == row->detail[1]);
}

static void lies_before_the_launch(void **state)
{
    (void)state;
    struct maker maker = maker_seeded(101);
    unsigned long compared = 0, failed = 0, refused = 0;
    for (uint64_t seed = 0; seed < BATCHES; seed++) {
        struct victim victim;
        struct victim lied = {0};
        victim_init(&victim, 500 + seed);
        const struct mlak_batch *batch = &victim.made->batch;
        lied.made = victim.made;
        for (int i = 0; i < MLAK_T_COUNT; i++)
            lied.copy[i] = calloc(1, victim.made->tensor[i].bytes + 1);
        for (unsigned long i = 0; i < mutations / 2 / BATCHES;) {
            struct mlak_row rows[MOST_REQUESTS];
            struct mlak_fault fault;
            victim_restore(&victim);
            for (uint32_t n = 1 + maker_below(&maker, 4); n > 0; n--, i++)
                mutate(&maker, victim.made);
            for (int t = 0; t < MLAK_T_COUNT; t++)
                victim_copy(&lied, t);
            enum mlak_code code = test_device_decode(victim.made, rows, &fault);
            for (enum mlak_tensor t = 0; t < MLAK_T_COUNT; t++)
                assert_true(is_output((int)t) || unchanged(&lied, t, 0, victim.made->tensor[t].bytes));
            assert_true(made_intact(victim.made));
            refused += code == MLAK_BATCH;
            for (uint32_t b = 0; code == MLAK_OK && b < batch->batch; b++) {
                size_t first = (size_t)made_q_start(victim.made, b) * batch->heads;
                size_t n = (size_t)made_q_len(victim.made, b) * batch->heads;
                if (rows[b].code) {
                    assert_fault_is_true(&victim, &rows[b]);
                    failed++;
                } else if (request_unchanged(&victim, b) && request_alone(&victim, b)) {
                    assert_true(unchanged(&victim, MLAK_T_OUT, first * MLAK_V * 2, n * MLAK_V * 2));
                    assert_true(!batch->has_lse || unchanged(&victim, MLAK_T_LSE, first * 4, n * 4));
                    compared++;
                }
            }
        }
        for (int i = 0; i < MLAK_T_COUNT; i++)
            free(lied.copy[i]);
        victim_deinit(&victim);
    }
    print_message("%lu mutations before: %lu requests failed, %lu batches refused, %lu requests unharmed\n",
                  mutations / 2, failed, refused, compared);
    assert_true(compared && failed && refused);
}

/* ---- while it runs ---- */

enum { TICK_US = 15 };

struct scribbler { struct made *made; struct maker maker; unsigned long done; bool stop; };

static void scribble(struct scribbler *s)
{
    mutate(&s->maker, s->made);
    __atomic_fetch_add(&s->done, 1, __ATOMIC_RELAXED);
}

static void *scribble_on(void *argument)
{
    struct scribbler *s = argument;
    while (!__atomic_load_n(&s->stop, __ATOMIC_RELAXED)) {
        for (uint32_t pause = maker_below(&s->maker, 2000); pause > 0; pause--)
            (void)__atomic_load_n(&s->stop, __ATOMIC_RELAXED);
        scribble(s);
    }
    return NULL;
}

static struct scribbler *ticking;

static void on_tick(int signal)
{
    (void)signal;
    scribble(ticking);
}

static void tick(struct scribbler *s)
{
    struct itimerval timer = {{0, s ? TICK_US : 0}, {0, s ? TICK_US : 0}};
    if (s)
        ticking = s;
    assert_int_equal(setitimer(ITIMER_REAL, &timer, NULL), 0);
}

/* A thread that takes no signals: the ticks are the launching thread's. */
static pthread_t start_thread(struct scribbler *s)
{
    sigset_t alarm, before;
    pthread_t thread;
    sigemptyset(&alarm);
    sigaddset(&alarm, SIGALRM);
    assert_int_equal(pthread_sigmask(SIG_BLOCK, &alarm, &before), 0);
    assert_int_equal(pthread_create(&thread, NULL, scribble_on, s), 0);
    assert_int_equal(pthread_sigmask(SIG_SETMASK, &before, NULL), 0);
    return thread;
}

/* Put true contents back, word by word as the scribbler writes, so that launches get far enough to be disturbed. */
static void restore_racing(struct victim *victim)
{
    for (unsigned i = 0; i < sizeof targets / sizeof targets[0]; i++) {
        uint32_t *to = (uint32_t *)(void *)victim->made->tensor[targets[i]].data, from;
        for (size_t word = 0; word < victim->made->tensor[targets[i]].bytes / 4; word++) {
            memcpy(&from, victim->copy[targets[i]] + 4 * word, sizeof from);
            __atomic_store_n(&to[word], from, __ATOMIC_RELAXED);
        }
    }
}

static void lies_during_the_launch(void **state)
{
    (void)state;
    unsigned long total = 0, launches = 0, refused = 0, failed = 0;
    assert_int_not_equal((intptr_t)signal(SIGALRM, on_tick), (intptr_t)SIG_ERR);
    for (uint64_t seed = 0; seed < BATCHES; seed++) {
        struct victim victim;
        victim_init(&victim, 500 + seed);
        struct scribbler here = {.made = victim.made, .maker = maker_seeded(700 + seed)};
        struct scribbler there = {.made = victim.made, .maker = maker_seeded(900 + seed)};
        pthread_t thread = start_thread(&there);
        tick(&here);
        do { /* however late: the ticks come in any case */
            struct mlak_row rows[MOST_REQUESTS];
            struct mlak_fault fault;
            if (launches++ % 2 == 0)
                restore_racing(&victim);
            enum mlak_code code = test_device_decode(victim.made, rows, &fault);
            assert_true(code == MLAK_OK || code == MLAK_BATCH);
            refused += code == MLAK_BATCH;
            for (uint32_t b = 0; code == MLAK_OK && b < victim.made->batch.batch; b++)
                failed += rows[b].code != MLAK_ROW_OK;
        } while (__atomic_load_n(&here.done, __ATOMIC_RELAXED) < mutations / 2 / BATCHES);
        tick(NULL);
        __atomic_store_n(&there.stop, true, __ATOMIC_RELAXED);
        pthread_join(thread, NULL);
        total += here.done + there.done;
        assert_true(made_intact(victim.made));
        for (int t = MLAK_T_Q; t <= MLAK_T_KV; t++)
            assert_true(unchanged(&victim, (enum mlak_tensor)t, 0, victim.made->tensor[t].bytes));
        assert_true(unchanged(&victim, MLAK_T_SINK, 0, victim.made->tensor[MLAK_T_SINK].bytes));
        victim_deinit(&victim);
    }
    print_message("%lu mutations during %lu launches: %lu requests failed, %lu batches refused\n", total, launches,
                  failed, refused);
    assert_true(launches > refused && failed);
}

int main(int argc, char **argv)
{
    mutations = argc > 1 ? strtoul(argv[1], NULL, 10) : 0;
    if (mutations < 4 * BATCHES) {
        fprintf(stderr, "usage: %s MUTATIONS backend [variant]; give %d mutations at least\n", argv[0], 4 * BATCHES);
        return 2;
    }
    test_device_open(argc - 1, argv + 1);
    const struct CMUnitTest tests[] = {cmocka_unit_test(lies_before_the_launch),
                                       cmocka_unit_test(lies_during_the_launch)};
    int failures = cmocka_run_group_tests(tests, NULL, NULL);
    test_device_close();
    return failures != 0;
}
