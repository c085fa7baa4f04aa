/* ceilings.c - see ceilings.h. Every rate is the best of a few short rounds, all threads at once: a ceiling is not to
 * be lowered by what else the machine did. The loops keep enough independent accumulators to hide the latency. */
#include "ceilings.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#if defined(__x86_64__)
#include <immintrin.h>
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

enum { ROUNDS = 8, LOOPS = 400000, SUMS = 16 };

double bench_now(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e9 + (double)now.tv_nsec;
}

const char *ceiling_name(enum ceiling ceiling)
{
    static const char *const names[CEILING_COUNT] = {
        "read", "sse mul+add", "avx2 fma", "avx512 fma", "vdpbf16ps", "tdpbf16ps",
    };
    return names[ceiling];
}

typedef uint64_t words __attribute__((vector_size(64), may_alias));

/* Each function does the work of one thread and returns how many operations it was. */
struct round {
    double (*work)(const struct round *round, uint32_t item);
    const uint8_t *bytes;
    size_t size;
    uint32_t threads;
    double *done;                       /* [threads] */
};

static double read_bytes(const struct round *round, uint32_t item)
{
    size_t share = round->size / round->threads / 1024 * 1024;
    const uint8_t *from = round->bytes + share * item;
    words sum[4] = {0};
    for (size_t i = 0; i < share; i += 256)
        for (size_t j = 0; j < 4; j++) {
            __builtin_prefetch(from + i + j * 64 + 4096);
            sum[j] ^= *(const words *)(from + i + j * 64);
        }
    __asm__ volatile("" : : "m"(sum) : "memory");
    return (double)share;
}

#if defined(__x86_64__)
static double sse(const struct round *round, uint32_t item)
{
    enum { ADDS = 8 };
    (void)round, (void)item;
    __m128 sum[ADDS], factor = _mm_set1_ps(0.5f);
    for (int j = 0; j < ADDS; j++)
        sum[j] = _mm_setzero_ps();
    for (int i = 0; i < LOOPS; i++) {
        __asm__ volatile("" : "+x"(factor));
        _Pragma("GCC unroll 8") for (int j = 0; j < ADDS; j++)
            sum[j] = _mm_mul_ps(_mm_add_ps(sum[j], factor), factor);
    }
    for (int j = 1; j < ADDS; j++)
        sum[0] += sum[j];
    __asm__ volatile("" : : "x"(sum[0]));
    return 8.0 * ADDS * LOOPS;
}

__attribute__((target("avx2,fma"))) static double avx2(const struct round *round, uint32_t item)
{
    enum { FMAS = 12 };
    (void)round, (void)item;
    __m256 sum[FMAS], factor = _mm256_set1_ps(0.5f);
    for (int j = 0; j < FMAS; j++)
        sum[j] = _mm256_setzero_ps();
    for (int i = 0; i < LOOPS; i++) {
        __asm__ volatile("" : "+x"(factor));
        _Pragma("GCC unroll 12") for (int j = 0; j < FMAS; j++)
            sum[j] = _mm256_fmadd_ps(factor, factor, sum[j]);
    }
    for (int j = 1; j < FMAS; j++)
        sum[0] += sum[j];
    __asm__ volatile("" : : "x"(sum[0]));
    return 16.0 * FMAS * LOOPS;
}

__attribute__((target("avx512f"))) static double avx512(const struct round *round, uint32_t item)
{
    (void)round, (void)item;
    __m512 sum[SUMS], factor = _mm512_set1_ps(0.5f);
    for (int j = 0; j < SUMS; j++)
        sum[j] = _mm512_setzero_ps();
    for (int i = 0; i < LOOPS; i++) {
        __asm__ volatile("" : "+v"(factor));
        _Pragma("GCC unroll 16") for (int j = 0; j < SUMS; j++)
            sum[j] = _mm512_fmadd_ps(factor, factor, sum[j]);
    }
    for (int j = 1; j < SUMS; j++)
        sum[0] += sum[j];
    __asm__ volatile("" : : "v"(sum[0]));
    return 32.0 * SUMS * LOOPS;
}

__attribute__((target("avx512f,avx512bf16"))) static double bf16(const struct round *round, uint32_t item)
{
    (void)round, (void)item;
    __m512 sum[SUMS];
    __m512bh factor = (__m512bh)_mm512_set1_epi32(0x3f003f00);
    for (int j = 0; j < SUMS; j++)
        sum[j] = _mm512_setzero_ps();
    for (int i = 0; i < LOOPS; i++) {
        __asm__ volatile("" : "+v"(factor));
        _Pragma("GCC unroll 16") for (int j = 0; j < SUMS; j++)
            sum[j] = _mm512_dpbf16_ps(sum[j], factor, factor);
    }
    for (int j = 1; j < SUMS; j++)
        sum[0] += sum[j];
    __asm__ volatile("" : : "v"(sum[0]));
    return 64.0 * SUMS * LOOPS;
}

__attribute__((target("amx-tile,amx-bf16"))) static double amx(const struct round *round, uint32_t item)
{
    enum { LOOPS_AMX = LOOPS / 16 };
    static const struct { uint8_t palette, rest[15]; uint16_t row_bytes[16]; uint8_t rows[16]; } config = {
        .palette = 1, .row_bytes = {64, 64, 64, 64, 64, 64, 64, 64}, .rows = {16, 16, 16, 16, 16, 16, 16, 16}};
    (void)round, (void)item;
    _tile_loadconfig(&config);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
    for (int i = 0; i < LOOPS_AMX; i++) {
        _tile_dpbf16ps(0, 4, 5);
        _tile_dpbf16ps(1, 4, 5);
        _tile_dpbf16ps(2, 4, 5);
        _tile_dpbf16ps(3, 4, 5);
    }
    _tile_release();
    return 4.0 * 2 * 16 * 16 * 32 * LOOPS_AMX;
}

static bool has_amx(void)
{
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18, AMX_BF16 = 1 << 22, AMX_TILE = 1 << 24 };
    uint32_t a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & AMX_BF16) && (d & AMX_TILE) &&
           syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}
#endif

static void run_item(void *context, uint32_t item, uint32_t thread)
{
    const struct round *round = context;
    (void)thread;
    round->done[item] = round->work(round, item);
}

static double best_rate(struct mlak_pool *pool, struct round *round)
{
    double best = 0;
    for (int i = 0; i < ROUNDS; i++) {
        double total = 0, start = bench_now();
        mlak_pool_run(pool, round->threads, run_item, round);
        double elapsed = bench_now() - start;
        for (uint32_t t = 0; t < round->threads; t++)
            total += round->done[t];
        best = total / elapsed > best ? total / elapsed : best;
    }
    return best;
}

bool ceilings_measure(struct ceilings *ceilings, struct mlak_pool *pool, size_t cache_bytes)
{
    struct round round = {.threads = mlak_pool_threads(pool), .size = cache_bytes * 4};
    uint8_t *bytes = aligned_alloc(4096, round.size + 8192);
    round.done = calloc(round.threads, sizeof *round.done);
    bool good = bytes != NULL && round.done != NULL;
    *ceilings = (struct ceilings){0};
    if (good) {
        memset(bytes, 1, round.size + 8192);
        round.bytes = bytes;
        round.work = read_bytes;
        ceilings->rate[CEILING_READ] = best_rate(pool, &round);
#if defined(__x86_64__)
        double (*const work[CEILING_COUNT])(const struct round *, uint32_t) = {
            [CEILING_SSE] = sse,
            [CEILING_AVX2] = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? avx2 : NULL,
            [CEILING_AVX512] = __builtin_cpu_supports("avx512f") ? avx512 : NULL,
            [CEILING_BF16] = __builtin_cpu_supports("avx512bf16") ? bf16 : NULL,
            [CEILING_AMX] = has_amx() ? amx : NULL,
        };
        for (int i = CEILING_SSE; i < CEILING_COUNT; i++) {
            round.work = work[i];
            ceilings->rate[i] = work[i] != NULL ? best_rate(pool, &round) : 0;
        }
#endif
    }
    free(round.done);
    free(bytes);
    return good;
}
