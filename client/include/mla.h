/* mla.h - libmla, the client library of the mlad decode daemon.
 *
 * mlad runs multi-head latent attention decodes on buffers that its clients share with it; results appear in place.
 * A program connects to one device, makes buffers, describes a batch once as a plan (or each time), submits and waits:
 *
 *     mla_client *c;  mla_buffer *b;  mla_plan *p;  mla_error e;
 *     mla_connect(&c, NULL, &e);
 *     mla_buffer_alloc(c, bytes, &b, &e);            fill mla_buffer_data(b)
 *     mla_batch d;  mla_batch_init(&d);              describe the tensors inside b
 *     mla_plan_create(c, &d, &p, &e);
 *     mla_decode(c, p, MLA_FOREVER, NULL, &e);       out and lse are written
 *
 * Errors. A function that can fail returns an mla_status, MLA_OK being 0, and fills *error (which may be NULL) with the
 * code, the path of the field at fault and one sentence. On failure outputs are untouched unless stated.
 *
 * Threads. Every function may be called from any thread at any time, on the same client too, except that a client,
 * plan, step or buffer must not be used during or after its own destruction. Of the threads that wait on a client, one
 * receives for all; the library starts a thread of its own only for clients that use stream order. After fork() the
 * child must not use the parent's clients, not even to close them; until it calls exec (every descriptor is
 * close-on-exec) or exits, it holds their connections open.
 *
 * Recovery. When the device's worker or the whole daemon dies, the library reconnects, registers and plans again and
 * submits again what had not completed: a caller sees a delay and no error. This is safe because a decode only reads
 * its inputs, which must not change until it has completed, and its outputs overlap nothing. It gives up with
 * MLA_NOT_CONNECTED after mla_options.reconnect_ms without a daemon: all that waits then fails, buffers and plans are
 * kept, and the next call tries again. Work that was in flight at three deaths in a row fails with MLA_WORKER_LOST. A
 * client that was evicted, or whose buffers or plans are refused by the new session, is dead: every call reports why;
 * close it. */
#ifndef MLA_H
#define MLA_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define MLA_VERSION_MAJOR 0
#define MLA_VERSION_MINOR 1
#define MLA_VERSION_PATCH 0

#if defined(__GNUC__)
#define MLA_API __attribute__((visibility("default")))
#else
#define MLA_API
#endif

/* Stable codes; mla_status_text gives each one's name ("busy"). README.md, "Errors", says what to do about each. */
typedef enum mla_status {
    MLA_OK = 0,
    MLA_VERSION = 1,        /* client and daemon share no protocol version */
    MLA_MALFORMED = 2,
    MLA_UNKNOWN_TYPE = 3,
    MLA_UNKNOWN_FIELD = 4,
    MLA_MISSING_FIELD = 5,
    MLA_INVALID = 6,        /* an argument is out of bounds; error.field names it */
    MLA_FDS = 7,
    MLA_STATE = 8,
    MLA_DENIED = 9,         /* the daemon's policy refuses this user */
    MLA_NO_DEVICE = 10,
    MLA_UNAVAILABLE = 11,   /* retried by the library; seen only once reconnect_ms ran out */
    MLA_DRAINING = 12,      /* an operator drains the device */
    MLA_EVICTED = 13,       /* an operator ended the session: the client is dead, close it */
    MLA_QUOTA = 14,
    MLA_BUSY = 15,          /* the queue is full, nothing was queued: collect a completion, then try again */
    MLA_MEMORY = 16,
    MLA_BUFFER = 17,        /* the descriptor is no sealed memfd */
    MLA_EXISTS = 18,
    MLA_NOT_FOUND = 19,
    MLA_IN_USE = 20,        /* something still names it, such as a plan a buffer */
    MLA_RANGE = 21,         /* a tensor does not lie inside its buffer */
    MLA_OVERLAP = 22,       /* an output overlaps an input or the other output */
    MLA_UNSUPPORTED = 23,   /* the device's capability table has no row for the batch */
    MLA_BATCH = 24,         /* cu_q is inconsistent: nothing was computed */
    MLA_REQUESTS = 25,      /* some requests failed, see mla_result; the others are complete */
    MLA_TIMEOUT = 26,       /* the wait ended first; the decode (or a stream's work) goes on */
    MLA_DEVICE_LOST = 27,
    MLA_WORKER_LOST = 28,
    MLA_NOT_CONNECTED = 29,
    MLA_INTERNAL = 30
} mla_status;

typedef struct mla_error {
    mla_status code;
    char field[64];         /* "batch.seqlens", "" where no field is at fault */
    char message[512];      /* one sentence: what is wrong and what to do */
} mla_error;

MLA_API const char *mla_status_text(mla_status code);
MLA_API const char *mla_version(void);              /* "0.1.0", of the library that is loaded */

#define MLA_FOREVER (-1)

/* ---- connection ---- */

typedef struct mla_client mla_client;

/* How plans are submitted and completions come: by rings in memory shared with the daemon, which costs no system call
 * while both sides are busy, or as messages on the socket. */
typedef enum mla_transport {
    MLA_TRANSPORT_AUTO = 0,     /* $MLAD_TRANSPORT (rings or socket), else as MLA_TRANSPORT_RINGS */
    MLA_TRANSPORT_SOCKET = 1,
    MLA_TRANSPORT_RINGS = 2     /* rings, or the socket where the daemon, or memory here, has none to offer */
} mla_transport;

typedef struct mla_options {
    size_t struct_size;         /* set by mla_options_init */
    const char *socket;         /* NULL: $MLAD_SOCKET, else /run/mlad/mlad.sock */
    const char *device;         /* NULL: $MLAD_DEVICE, else the first device served that is not `reference` */
    const char *name;           /* shown by mlactl status; NULL: the program's name */
    int reconnect_ms; /* how long to try to reach a daemon that is away, also in mla_connect; default 30000, 0: try
                       * once. A daemon that accepted the connection has 5 seconds to open the session anyway. */
    mla_transport transport;    /* default MLA_TRANSPORT_AUTO */
    int high_priority;          /* 1: decodes go before those of normal clients that wait, never for long; the daemon's
                                 * high_priority_users must list the user, else mla_connect fails with MLA_DENIED */
} mla_options;

MLA_API void mla_options_init(mla_options *options);

/* Connect. `options` may be NULL; it is copied. The client is the caller's until mla_close. */
MLA_API mla_status mla_connect(mla_client **client, const mla_options *options, mla_error *error);

/* Close: decodes in flight are abandoned (their outputs may still be written until the daemon has noticed); frees the
 * client, its plans and its buffers with their mappings. NULL is allowed. */
MLA_API void mla_close(mla_client *client);

/* The device's name, valid until mla_close. */
MLA_API const char *mla_device(const mla_client *client);

/* What the present session uses, MLA_TRANSPORT_RINGS or MLA_TRANSPORT_SOCKET; the latter too while the daemon is away.
 * A reconnect may change it. */
MLA_API mla_transport mla_transport_used(mla_client *client);

/* How the GPU work of this process and the worker's meet; mlad-placements(7) says what each costs. */
typedef enum mla_placement {
    MLA_PLACEMENT_SHARED_MPS = 0,       /* on one GPU under one MPS server: side by side */
    MLA_PLACEMENT_OWN_GPU = 1,          /* this process works on another GPU than the worker, or on none */
    MLA_PLACEMENT_SHARED_TIMESLICED = 2, /* on one GPU without that: in turns, some 300 us a call */
    MLA_PLACEMENT_HOST = 3              /* the device is no GPU */
} mla_placement;

#define MLA_WHY 256

/* The placement, and in `why` (NULL allowed) one sentence why. It is known from the GPU context that was current in the
 * thread of mla_connect, else from the GPU memory that was registered since; so ask once buffers are made. While the
 * daemon is away: that of the last session. */
MLA_API mla_placement mla_client_placement(mla_client *client, char why[MLA_WHY]);

/* ---- buffers: memory shared with the daemon ---- */

typedef struct mla_buffer mla_buffer;
typedef enum mla_access { MLA_READWRITE = 0, MLA_READ = 1 } mla_access;

/* Allocate `bytes` (1..) of zeroed, page-aligned memory, mapped here and registered with the daemon. */
MLA_API mla_status mla_buffer_alloc(mla_client *client, size_t bytes, mla_buffer **buffer, mla_error *error);

/* Register `bytes` of the caller's memfd from `offset` (a multiple of the page size). The memfd must be sealed with
 * F_SEAL_SHRINK and reach to offset + bytes; `memfd` is duplicated and stays the caller's. With MLA_READ the
 * daemon maps it read-only and no output may lie in it. mla_buffer_data maps it here on first use. */
MLA_API mla_status mla_buffer_import(mla_client *client, int memfd, uint64_t offset, size_t bytes, mla_access access,
                                     mla_buffer **buffer, mla_error *error);

/* Register `bytes` of this process's GPU memory from `pointer`, for a client of a GPU's device: the KV cache on that
 * GPU itself, all else there, in host memory or on a GPU that it can access. The memory must come from cudaMalloc
 * (cuMemAlloc), or from cuMemCreate with POSIX file descriptors (PyTorch's expandable segments): then it may span up to
 * 252 allocations of one size. What cannot be shared is refused with what to change. It stays the caller's and must
 * outlive the buffer, mapped where it is, because a new worker has to be given it again; work of this process that
 * writes it must have finished before a decode that reads it is submitted (mla_stream_drain), since the daemon follows
 * no stream. Call it from a thread in which the GPU's context is current (cudaSetDevice). Takes 150 to 200 us, and 250
 * us for each allocation of cuMemCreate: not for the decode path. */
MLA_API mla_status mla_buffer_import_device(mla_client *client, void *pointer, size_t bytes, mla_access access,
                                            mla_buffer **buffer, mla_error *error);
/* Wait at most timeout_ms (MLA_FOREVER; 0 only looks) for all work on a CUDA stream of this process (a cudaStream_t;
 * NULL: the default one). From any thread; it polls, takes no client's lock and delays no other call. MLA_TIMEOUT, with
 * field "stream": the work goes on, and nothing that reads its results may be submitted yet. MLA_DEVICE_LOST: the
 * process's own GPU context is lost, which under MPS another process may cause. MLA_NO_DEVICE: this process has no
 * driver. MLA_BUFFER: what else the driver says of the stream. */
MLA_API mla_status mla_stream_drain(void *stream, int timeout_ms, mla_error *error);

/* Its first byte here; NULL for GPU memory, and if an import cannot be mapped. */
MLA_API void *mla_buffer_data(mla_buffer *buffer);
MLA_API size_t mla_buffer_size(const mla_buffer *buffer);

/* Unregister, unmap and free. MLA_IN_USE while a plan or a decode in flight, abandoned ones too, names it (then it
 * stays). */
MLA_API mla_status mla_buffer_free(mla_buffer *buffer, mla_error *error);

/* ---- batches ---- */

typedef enum mla_dtype { MLA_BF16 = 0, MLA_FP16 = 1, MLA_E4M3 = 2, MLA_DTYPE_DEFAULT = 255 } mla_dtype;
typedef enum mla_kv_format { MLA_KV_BF16 = 0, MLA_KV_FP16 = 1, MLA_KV_E4M3 = 2, MLA_KV_E4M3_656 = 3 } mla_kv_format;
typedef enum mla_mask { MLA_MASK_NONE = 0, MLA_MASK_CAUSAL = 1, MLA_MASK_TREE = 2 } mla_mask;
typedef enum mla_lse_base { MLA_LSE_E = 0, MLA_LSE_2 = 1 } mla_lse_base;

typedef struct mla_tensor {
    mla_buffer *buffer;         /* NULL: the tensor is absent */
    uint64_t offset;            /* bytes from the start of the buffer to the first element */
} mla_tensor;

/* Where a scale comes from: absent, a number, or one fp32 in a buffer (read once per launch). */
typedef enum mla_scale_kind { MLA_SCALE_NONE = 0, MLA_SCALE_VALUE = 1, MLA_SCALE_TENSOR = 2 } mla_scale_kind;
typedef struct mla_scale {
    mla_scale_kind kind;
    float value;
    mla_tensor tensor;
} mla_scale;

/* One decode. Contents of seqlens, block_table, cu_q, tree_mask, sink and scale tensors may change between submissions
 * of the same plan. kernels/CONTRACT.md is the contract; every field is honoured or refused. */
typedef struct mla_batch {
    size_t struct_size;         /* set by mla_batch_init */
    uint32_t batch;             /* B >= 1 */
    uint32_t heads;             /* H 1..128 */
    uint64_t q_rows;            /* sum of q_len over requests; without cu_q a multiple of B */
    mla_dtype q_dtype;          /* default MLA_BF16 */
    mla_dtype out_dtype;        /* default MLA_DTYPE_DEFAULT: that of q, bf16 for fp8 q */
    mla_kv_format kv_format;    /* default MLA_KV_BF16 */
    uint32_t pages;             /* pages in the pool */
    uint32_t page_size;         /* tokens in a page, 1..256; default 64 */
    uint32_t max_pages;         /* columns of block_table */
    uint64_t page_stride;       /* bytes, multiple of 16; 0: packed */
    uint64_t row_stride;        /* bytes, multiple of 16; 0: packed */
    double softmax_scale;       /* required (finite); mla_batch_init sets NaN */
    mla_tensor q;               /* [q_rows, H, 576], 16-byte aligned */
    mla_tensor kv;              /* [pages, page_size, row] */
    mla_tensor block_table;     /* int32 [B, max_pages] */
    mla_tensor seqlens;         /* int32 [B], new tokens included; with DCP the global lengths */
    mla_tensor cu_q;            /* int32 [B+1], optional: ragged q_len 0..64 */
    mla_tensor tree_mask;       /* uint64 [q_rows], exactly with MLA_MASK_TREE */
    mla_tensor sink;            /* fp32 [H], optional */
    mla_scale q_scale, k_scale, v_scale;
    mla_tensor out;             /* [q_rows, H, 512] of out_dtype */
    mla_tensor lse;             /* fp32 [q_rows, H], optional */
    mla_mask mask;              /* default MLA_MASK_CAUSAL */
    mla_lse_base lse_base;      /* default MLA_LSE_E */
    uint32_t dcp_world, dcp_rank, dcp_interleave;   /* default 1, 0, 1 */
    uint32_t window;            /* keys, 0: none */
    int deterministic;          /* nonzero: a request's bits do not depend on its batch-mates */
} mla_batch;

MLA_API void mla_batch_init(mla_batch *batch);

/* ---- plans and decodes ---- */

typedef struct mla_plan mla_plan;

/* Validate a batch once. The plan keeps its buffers in use until mla_plan_destroy. */
MLA_API mla_status mla_plan_create(mla_client *client, const mla_batch *batch, mla_plan **plan, mla_error *error);
/* Free the plan; decodes of it in flight complete and must still be collected. NULL is allowed. */
MLA_API void mla_plan_destroy(mla_plan *plan);

/* A decode in flight, from submit until collected by mla_poll or mla_wait. Never 0, never used again by the client. */
typedef uint64_t mla_ticket;

typedef struct mla_failure {
    uint32_t request;           /* index in the batch */
    char field[64];             /* "block_table[3][7]" */
    char message[256];
} mla_failure;

/* What came of a decode. */
typedef struct mla_result {
    uint32_t failed;            /* requests that failed; their rows are unspecified, all others complete */
    uint32_t listed;            /* entries of failures: the first 32 at most, in order; none if memory ran out here */
    mla_failure failures[32];
    uint64_t kv_tokens;         /* KV tokens of the batch */
    uint64_t receive_ns, queue_ns, kernel_ns;   /* in the daemon: to queued, to launched, to complete */
    uint32_t replays;           /* times it was submitted again after a death */
} mla_result;

/* Submit and return at once, unless the socket is full (hundreds of decodes that the daemon has not read) or the daemon
 * is away; then it waits for that. Inputs must stay unchanged until the decode has completed. What the daemon says to
 * it, MLA_BUSY too, is reported by the collection of the ticket, since the answer is not waited for. */
MLA_API mla_status mla_submit(mla_client *client, mla_plan *plan, mla_ticket *ticket, mla_error *error);
/* The same for a batch that is used once. */
MLA_API mla_status mla_submit_batch(mla_client *client, const mla_batch *batch, mla_ticket *ticket, mla_error *error);

/* Has it completed? *done 0: not yet, MLA_OK. *done 1: the ticket is collected, the decode's own status is returned and
 * `result` (may be NULL) filled. Never blocks, except that reconnecting to a dead daemon takes what the socket calls
 * take. */
MLA_API mla_status mla_poll(mla_client *client, mla_ticket ticket, int *done, mla_result *result, mla_error *error);

/* Wait for it at most timeout_ms (MLA_FOREVER; 0 polls). MLA_TIMEOUT: not complete, the ticket stays. Otherwise
 * collected. */
MLA_API mla_status mla_wait(mla_client *client, mla_ticket ticket, int timeout_ms, mla_result *result,
                            mla_error *error);

/* Submit a plan, or a batch, and wait. With MLA_TIMEOUT the decode is abandoned: its outputs may still be written and
 * its inputs read, and its buffers stay in use, until the daemon is done with it. */
MLA_API mla_status mla_decode(mla_client *client, mla_plan *plan, int timeout_ms, mla_result *result, mla_error *error);
MLA_API mla_status mla_decode_batch(mla_client *client, const mla_batch *batch, int timeout_ms, mla_result *result,
                                    mla_error *error);

/* ---- in the order of a CUDA stream ---- */

/* Whether decodes can take their place in a CUDA stream as kernels do, with no wait of a host: what the stream did
 * before happens before them, and they before what it does after. That needs a placement in which both sides'
 * kernels run side by side (MLA_PLACEMENT_SHARED_MPS, MLA_PLACEMENT_OWN_GPU), and out and lse on a GPU.
 * $MLAD_ORDER, "stream" or "host", decides without looking at the placement. `why` (NULL allowed): one sentence. */
typedef enum mla_order { MLA_ORDER_STREAM = 0, MLA_ORDER_HOST = 1 } mla_order;
MLA_API mla_order mla_client_order(mla_client *client, char why[MLA_WHY]);

/* Decode `plan` in the order of `stream` (a cudaStream_t; NULL: the default one) and return at once. Call it in a
 * thread in which the stream's context is current; all streams of a client are of one context. The first call of a
 * client takes milliseconds, and the first of a plan too.
 *
 * In MLA_ORDER_HOST, or when too many clients use stream order already, it does the same from the host: it waits
 * until the stream has come here, decodes, and returns then, with the decode's own status.
 *
 * While the stream is being captured, the decode becomes part of the graph: of a plan that is in a step, for rounds
 * that mla_step_launch arms; of any other, with a host node that arms it at the start of each replay. Without stream
 * order that fails with MLA_UNSUPPORTED or MLA_BUSY, and the capture is left as it was.
 *
 * Submissions of one client run in the order of the calls, whatever their streams: streams that wait for each
 * other's decodes the other way round wait until those are given up.
 *
 * What goes wrong afterwards is not seen by the stream but in out and lse, which then hold NaN (the rows of the
 * requests that failed; all, if the decode was given up), never what they held before; mla_plan_status and
 * mla_step_status say why. A worker's death is a delay. A decode is given up when the daemon refuses it, is away
 * for mla_options.reconnect_ms, or has not answered 5 seconds later. */
MLA_API mla_status mla_submit_stream(mla_plan *plan, void *stream, mla_error *error);

/* The first error since the last call of decodes of the plan by mla_submit_stream, those of a step excepted, or
 * MLA_OK. Never blocks; tells of a decode some milliseconds after it has ended. */
MLA_API mla_status mla_plan_status(mla_plan *plan, mla_error *error);

/* A step: plans (1..256) that a stream runs one after the other, such as a model's layers. One ring entry arms them
 * all. A plan is in one step at most, and stays until the step is destroyed. */
typedef struct mla_step mla_step;
MLA_API mla_status mla_step_create(mla_client *client, mla_plan *const *plans, uint32_t count, mla_step **step,
                                   mla_error *error);

/* Before each replay of a graph into which all plans of the step were captured, in their order and each once, by
 * mla_submit_stream: arm one round of it. `stream` is that of the replay, which must be the client's next work on
 * it, and follow within reconnect_ms. While the stream is being captured: arm a round at each replay, by a host
 * node. A replay that was not armed leaves NaN in the outputs. */
MLA_API mla_status mla_step_launch(mla_step *step, void *stream, mla_error *error);

/* As mla_plan_status, for the step's rounds. MLA_STATE: a replay was not armed. */
MLA_API mla_status mla_step_status(mla_step *step, mla_error *error);

/* Free it, once rounds in flight have ended; its stream must have come past them, and no graph with its plans may be
 * replayed any more. NULL is allowed. The plans stay. */
MLA_API void mla_step_destroy(mla_step *step);

/* A descriptor that polls readable when mla_poll may have news for some ticket, or has to be called for a reconnect to
 * go on; then poll each. Silent while no ticket is uncollected. It stays the same over reconnects and belongs to the
 * client: never read or close it. -1 with errno if this process cannot have it. */
MLA_API int mla_fd(mla_client *client);

#ifdef __cplusplus
}
#endif

#endif
