/* bench_case.h - one decode shape, its batches in memory, and the time that launches of it take. */
#ifndef BENCH_CASE_H
#define BENCH_CASE_H

#include "ceilings.h"
#include "mlak.h"

/* copies: of the batch, used in turn; 0: as many as together exceed the last-level cache twice. */
struct shape { uint32_t batch, heads, q_len, kv_len, page_size, types, copies; };

/* The names of the element types: bf16 fp16 e4m3 bf16_e4m3 bf16_656. NULL beyond the last. */
const char *shape_types_name(uint32_t types);

/* Time of a launch in nanoseconds, and what it did. On a GPU a sample is the mean of the launches of all copies,
 * captured into a CUDA graph and replayed without a pause, as its own events tell (time_batches in mlak.h): nothing of
 * the host is in it. Elsewhere it is one launch. */
struct timing { uint32_t launches; double median, least, p90; double bytes, flop; };

/* A case owns its buffers, the copies of the batch among them: there are several because a model's layers do not find
 * their KV in a cache either. */
struct bench_case;

struct bench_case *bench_case_new(const struct shape *shape, const struct mlak_backend *backend,
                                  struct mlak_device *device, size_t cache_bytes, struct mlak_fault *fault);
void bench_case_free(struct bench_case *bench);

/* Launch for about `seconds`, at least three times, after one that is not counted. MLAK_OK, or why not. */
enum mlak_code bench_case_run(struct bench_case *bench, double seconds, struct timing *timing);

/* The ceiling that binds: the largest of bytes over read rate and FLOP over the rate of the kernel's instruction; and
 * the time in nanoseconds that it allows. */
enum ceiling binding_ceiling(const struct ceilings *ceilings, const char *variant, uint32_t types,
                             const struct timing *timing, double *least);

#endif
