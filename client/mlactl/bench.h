/* bench.h - what `mlactl bench` measures against: the backend called directly, and a bare socket. */
#ifndef MLACTL_BENCH_H
#define MLACTL_BENCH_H

#include "mlactl.h"

#include <stddef.h>

/* The measured shape: bf16, H=16, B=8, K=4096, pages of 64; q_len varies. */
enum { BENCH_HEADS = 16, BENCH_BATCH = 8, BENCH_KEYS = 4096, BENCH_PAGE = 64 };

uint64_t bench_now_ns(void);

/* ---- bench_direct.c: a child process, mlad-kernel-bench --serve, that runs the cpu backend without a daemon ---- */

struct direct;
struct direct_rates {
    double read_gb_s, matmul_gflop_s;
    char matmul[32];
}; /* what this machine can do; the fastest instruction */

/* Start it for one q_len with the worker's threads and variant, and let it measure the ceilings, which takes a second
 * or two. 0 with *direct the caller's until direct_free. */
int direct_new(unsigned threads, const char *variant, unsigned q_len, struct direct **direct, struct ctl_fault *fault);
void direct_free(struct direct *direct);
const struct direct_rates *direct_rates(const struct direct *direct);
/* Run decodes for about so long. */
int direct_run(struct direct *direct, double seconds, double *median_ns, struct ctl_fault *fault);

/* ---- bench_socket.c: a child process that answers datagrams of one size with datagrams of another ---- */

struct pingpong;
int pingpong_new(size_t request_bytes, size_t reply_bytes, struct pingpong **pingpong, struct ctl_fault *fault);
void pingpong_free(struct pingpong *pingpong);
/* One round trip. */
int pingpong_once(struct pingpong *pingpong, double *ns, struct ctl_fault *fault);

#endif
