/* bench.h - what the parts of `mlactl bench` share, and what they measure against: the backend called directly, and a
 * bare socket. */
#ifndef MLACTL_BENCH_H
#define MLACTL_BENCH_H

#include "output.h"
#include "run.h"

#include <stddef.h>

/* What is decoded: bf16, 16 heads, pages of 64. The copies of the batch are used in turn, so that KV is in no cache: a
 * model's layers do not find theirs there either. */
enum { BENCH_HEADS = 16, BENCH_PAGE = 64 };
struct bench_shape { unsigned batch, keys, q_len, copies; };

uint64_t bench_now_ns(void);

/* bench_tenants.c, bench_latency.c, bench_step.c; the plain bench is bench.c's. */
int bench_tenants(const struct ctl *ctl);
int bench_latency(const struct ctl *ctl);
int bench_step(const struct ctl *ctl);

/* ---- bench_load.c ---- */

enum { BENCH_COPIES = 16 };
struct bench_batch { unsigned requests, heads, q_len, keys; };

/* The options --batch, --heads, --q-len and --kv-len over what *batch holds; CTL_USAGE after complaining. */
int bench_sizes(const struct ctl *ctl, struct bench_batch *batch);
void bench_sizes_json(cJSON *root, const char *device, const struct bench_batch *batch);
void bench_sizes_text(const char *device, const struct bench_batch *batch);

/* How many copies of its KV exceed the device's last-level cache twice, BENCH_COPIES at most. */
unsigned bench_copies(const char *device, const struct bench_batch *batch);

/* A run of random contents, the caller's until run_free. These four complain and return an exit code. */
int bench_bind(const struct ctl *ctl, mla_client *client, const struct bench_batch *batch, struct run **run);
/* `result` may be NULL. */
int bench_decode(const struct ctl *ctl, struct run *run, double *wall_ns, mla_result *result);
int bench_submit(const struct ctl *ctl, struct run *run, mla_ticket *ticket);
int bench_collect(const struct ctl *ctl, mla_client *client, mla_ticket ticket, mla_result *result);

/* The value below which `share` of them lie; sorts them. count > 0. */
double bench_percentile(double *values, unsigned count, double share);

/* ---- bench_direct.c: a child process, mlad-kernel-bench --serve, that calls the backend without a daemon ---- */

struct direct;
struct direct_rates {
    double read_gb_s, matmul_gflop_s;
    char matmul[32];
}; /* what this machine can do; the fastest instruction. All zero of a GPU */

/* Start it for one shape with the worker's variant and threads (0: a GPU's), and let it measure the ceilings, which
 * takes a second or two. 0 with *direct the caller's until direct_free. */
int direct_new(const char *device, const char *variant, unsigned threads, const struct bench_shape *shape,
               struct direct **direct, struct ctl_fault *fault);
void direct_free(struct direct *direct);
const struct direct_rates *direct_rates(const struct direct *direct);
/* Run decodes for about so long; a GPU's are timed by its own events. */
int direct_run(struct direct *direct, double seconds, double *median_ns, struct ctl_fault *fault);

/* ---- bench_socket.c: a child process that answers datagrams of one size with datagrams of another ---- */

struct pingpong;
int pingpong_new(size_t request_bytes, size_t reply_bytes, struct pingpong **pingpong, struct ctl_fault *fault);
void pingpong_free(struct pingpong *pingpong);
/* One round trip. */
int pingpong_once(struct pingpong *pingpong, double *ns, struct ctl_fault *fault);

#endif
