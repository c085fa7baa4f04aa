/* mlak_order.h - what the host side (cuda_ordered.c) and the kernels (mlak_order.cuh) of ordered launches agree on.
 *
 * A launch in a client's stream order is five kernels on a stream of its own:
 *     mlak_cuda_gate    1 thread: waits until the client's stream says that the inputs are written. Writes nothing to
 *                       the host, which the end of a kernel would wait for
 *     prepare, split, combine      as of any launch (mlak_cuda.h)
 *     mlak_cuda_signal  1 block: NaN into what failed; tells the client's stream, then the host
 * A gate that gives up makes the launch behind it cancelled before it begins: nothing of it runs, nothing is
 * signalled. All launches of a lane behind one that gave up do so too, until the host has seen it. */
#ifndef MLAK_ORDER_H
#define MLAK_ORDER_H

#include "mlak_cuda.h"

enum { MLAK_CUDA_SIGNAL_THREADS = 256 };

enum mlak_cuda_order_outcome {
    MLAK_ORDER_RAN,
    MLAK_ORDER_SERVED, /* the round had been signalled before: it was armed again */
    MLAK_ORDER_STOPPED /* not run: its gate gave up, or one before it */
};

/* Device memory, in sectors of their own. */
struct mlak_cuda_lane {
    uint32_t stopped, reserved_a[7];
    uint32_t abandoned, reserved_b[7]; /* the host's: nobody waits for anything of the lane */
    unsigned long long life;       /* grows with each launch of the lane */
    uint32_t outcome, reserved_c[5]; /* enum mlak_cuda_order_outcome, of the gate that was last */
    uint64_t gate_ns, went; /* how long that gate waited, and when it saw its flag, nanoseconds */
    uint64_t reserved_d[2];
};

/* Pinned host memory, of one layer: what came of its last round. */
struct mlak_cuda_order_result {
    uint32_t ended;   /* = the round, once all else is visible */
    uint32_t outcome; /* enum mlak_cuda_order_outcome */
    int32_t batch_code; /* 0, or MLAK_BATCH */
    uint32_t batch_index;
    int64_t batch_value, batch_before; /* as in struct mlak_cuda_result */
    uint32_t failed, first; /* requests that failed, and the first of them */
    int32_t code;           /* of that one's row */
    uint32_t reserved;
    int64_t detail[2];
    unsigned long long kv_tokens;
    uint64_t gate_ns, serve_ns; /* of MLAK_ORDER_RAN: see struct mlak_layer_time */
    uint64_t reserved_b[4];
};

/* The parameter of gate and signal. */
struct mlak_cuda_order {
    uint32_t *go;                  /* client memory, see struct mlak_flags */
    uint64_t *done;
    const uint32_t *round;         /* the one to run */
    struct mlak_cuda_lane *lane;
    uint64_t wait_ns;              /* a gate gives up after it */
    uint64_t ticket;               /* of the launch between them */
    struct mlak_cuda_schedule *schedule;
    const struct mlak_cuda_result *launched; /* device memory here */
    const struct mlak_row *rows;   /* [count] */
    uint32_t count;
    void *out;                     /* [out_bytes], and lse: as the client's descriptor has them */
    uint64_t out_bytes, lse_bytes;
    void *lse;
    struct mlak_cuda_order_result *result;
    uint64_t *life;                /* pinned: lane->life */
};

#endif
