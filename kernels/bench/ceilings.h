/* ceilings.h - what this machine can do at most, measured in this process on the threads that the device will use:
 * bytes read from memory, and floating-point operations of each instruction that a kernel is built on. */
#ifndef CEILINGS_H
#define CEILINGS_H

#include "mlak_pool.h"

#include <stdbool.h>
#include <stddef.h>

/* Rates in operations per nanosecond (= G/s): bytes for the first, FLOP for the rest; 0: not on this processor. */
enum ceiling { CEILING_READ, CEILING_SSE, CEILING_AVX2, CEILING_AVX512, CEILING_BF16, CEILING_AMX, CEILING_COUNT };
struct ceilings { double rate[CEILING_COUNT]; };

const char *ceiling_name(enum ceiling ceiling);

/* Takes about a second. `cache_bytes`: of the last-level cache; the buffer read is four times as large. False without
 * memory. */
bool ceilings_measure(struct ceilings *ceilings, struct mlak_pool *pool, size_t cache_bytes);

/* Nanoseconds of CLOCK_MONOTONIC. */
double bench_now(void);

#endif
