/* stats.h - what the worker has done so far, and its signs of life.
 *
 * The worker owns one mlad_stats; only the loop thread writes it. The life page belongs to the supervisor, which reads
 * it while we write: relaxed atomics. The backend adds to life->progress itself (mlak_options.progress). */
#ifndef MLAD_STATS_H
#define MLAD_STATS_H

#include "life.h"
#include "mlap.h"

#include <time.h>

/* Nanoseconds on the monotonic clock. */
static inline uint64_t mlad_now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* Log-linear: values below 64 exactly, above in 32 buckets for each power of two, so that a bucket's middle is
 * within 1.6% of all it holds. */
enum { MLAD_HISTOGRAM_BUCKETS = 64 + (64 - 6) * 32 };
struct mlad_histogram {
    uint64_t count, sum, max;
    uint64_t buckets[MLAD_HISTOGRAM_BUCKETS];
};

void mlad_histogram_add(struct mlad_histogram *histogram, uint64_t value);
/* The value that `percent` of all added ones do not exceed; 0 when empty. */
uint64_t mlad_histogram_percentile(const struct mlad_histogram *histogram, unsigned percent);

struct mlad_stats {
    struct mlad_life *life;
    uint64_t decodes;        /* completed, those with failed requests included */
    uint64_t decodes_failed; /* ended in an error, or with failed requests */
    uint64_t refused;        /* messages answered with an error */
    uint64_t busy;           /* of these, decodes answered with BUSY */
    uint64_t dropped;        /* sessions ended for misbehaviour */
    uint64_t kv_tokens, kv_bytes;
    uint64_t launches;                      /* on the device, */
    uint64_t launched_parts, launched_rows; /* of so many decodes' slices and requests, together */
    struct mlad_histogram phases[MLAP_phase_COUNT];
};

void mlad_stats_beat(struct mlad_stats *stats);
void mlad_stats_running(struct mlad_stats *stats, uint32_t running);
void mlad_stats_launched(struct mlad_stats *stats, uint32_t parts, uint32_t rows);
void mlad_stats_decoded(struct mlad_stats *stats, uint64_t kv_tokens, uint64_t kv_bytes);

/* Fill the counters, progress and latencies of a report; the rest is the worker's to fill. */
void mlad_stats_report(const struct mlad_stats *stats, struct mlap_device *device);

#endif
