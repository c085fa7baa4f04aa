/* stats.c - see stats.h. */
#include "stats.h"

static unsigned bucket_of(uint64_t value)
{
    if (value < 64)
        return (unsigned)value;
    unsigned exponent = 63u - (unsigned)__builtin_clzll(value); /* >= 6 */
    return 64 + (exponent - 6) * 32 + (unsigned)(value >> (exponent - 5) & 31);
}

static uint64_t bucket_middle(unsigned bucket)
{
    if (bucket < 64)
        return bucket;
    unsigned exponent = 6 + (bucket - 64) / 32;
    uint64_t width = UINT64_C(1) << (exponent - 5);
    return (UINT64_C(32) + (bucket - 64) % 32) * width + width / 2;
}

void mlad_histogram_add(struct mlad_histogram *histogram, uint64_t value)
{
    histogram->count++;
    histogram->sum += value;
    if (value > histogram->max)
        histogram->max = value;
    histogram->buckets[bucket_of(value)]++;
}

uint64_t mlad_histogram_percentile(const struct mlad_histogram *histogram, unsigned percent)
{
    uint64_t rank = histogram->count / 100 * percent + (histogram->count % 100 * percent + 99) / 100;
    uint64_t below = 0;
    for (unsigned i = 0; i < MLAD_HISTOGRAM_BUCKETS; i++) {
        below += histogram->buckets[i];
        if (below >= rank && below > 0) {
            uint64_t middle = bucket_middle(i);
            return middle < histogram->max ? middle : histogram->max;
        }
    }
    return 0;
}

void mlad_stats_beat(struct mlad_stats *stats)
{
    __atomic_fetch_add(&stats->life->beat, 1, __ATOMIC_RELAXED);
}

void mlad_stats_running(struct mlad_stats *stats, uint32_t running)
{
    __atomic_store_n(&stats->life->running, running, __ATOMIC_RELAXED);
}

void mlad_stats_launched(struct mlad_stats *stats, uint32_t parts, uint32_t rows)
{
    stats->launches++;
    stats->launched_parts += parts;
    stats->launched_rows += rows;
}

void mlad_stats_decoded(struct mlad_stats *stats, uint64_t kv_tokens, uint64_t kv_bytes)
{
    stats->decodes++;
    stats->kv_tokens += kv_tokens;
    stats->kv_bytes += kv_bytes;
    __atomic_store_n(&stats->life->decodes, stats->decodes, __ATOMIC_RELAXED);
}

void mlad_stats_report(const struct mlad_stats *stats, struct mlap_device *device)
{
    device->progress = __atomic_load_n(&stats->life->progress, __ATOMIC_RELAXED);
    device->decodes = stats->decodes;
    device->decodes_failed = stats->decodes_failed;
    device->refused = stats->refused;
    device->busy = stats->busy;
    device->dropped = stats->dropped;
    device->kv_tokens = stats->kv_tokens;
    device->kv_bytes = stats->kv_bytes;
    device->launches = stats->launches;
    device->launched_parts = stats->launched_parts;
    device->launched_rows = stats->launched_rows;
    device->n_latency = MLAP_phase_COUNT;
    for (unsigned i = 0; i < MLAP_phase_COUNT; i++) {
        const struct mlad_histogram *histogram = &stats->phases[i];
        device->latency[i] = (struct mlap_latency){
            .phase = (enum mlap_phase)i,
            .count = histogram->count,
            .sum_ns = histogram->sum,
            .p50_ns = mlad_histogram_percentile(histogram, 50),
            .p90_ns = mlad_histogram_percentile(histogram, 90),
            .p99_ns = mlad_histogram_percentile(histogram, 99),
            .max_ns = histogram->max,
        };
    }
}
_Static_assert(MLAP_phase_COUNT <= MLAP_MAX_PHASES, "a report lists every phase");
