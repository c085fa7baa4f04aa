/* mlak.h - the backend interface: what a decode is, and who can run it.
 *
 * Knows nothing of sockets, clients or buffers: it is handed pointers that its caller keeps valid. A decode goes
 *     mlak_batch (descriptor, pointers resolved)
 *       -> mlak_check    every field against the contract and the device's capability table
 *       -> mlak_prepare  lengths, masks and scales copied once into rows of the request table
 *       -> launch        the backend runs the rows; a launch may mix rows of many batches
 * or, where the device prepares, in launch_batches, which may mix the requests of many batches too.
 * Everything a row points to may be written by a hostile client at any moment: rows hold copies of what decides
 * addresses and loop bounds; page ids are read once and bounds-checked where they are used. q, KV and sink values are
 * only ever arithmetic.
 *
 * The meaning of every field, and every edge, is the decode contract (CONTRACT.md beside this). */
#ifndef MLAK_H
#define MLAK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    MLAK_D = 576,
    MLAK_V = 512,
    MLAK_ROPE = 64,
    MLAK_MAX_HEADS = 128,
    MLAK_MAX_Q = 64,
    MLAK_MAX_PAGE = 256,
    MLAK_MAX_BATCH = 65536
};

enum mlak_dtype { MLAK_BF16, MLAK_FP16, MLAK_E4M3, MLAK_DTYPE_COUNT };
enum mlak_kv_format { MLAK_KV_BF16, MLAK_KV_FP16, MLAK_KV_E4M3, MLAK_KV_E4M3_656, MLAK_KV_FORMAT_COUNT };
enum mlak_mask { MLAK_MASK_NONE, MLAK_MASK_CAUSAL, MLAK_MASK_TREE, MLAK_MASK_COUNT };
enum mlak_lse_base { MLAK_LSE_E, MLAK_LSE_2 };

/* A scale: `tensor` (one fp32, may change between launches) if not NULL, else `value`. `has_tensor`: the descriptor
 * names a tensor, resolved or not. */
struct mlak_scale { float value; const float *tensor; bool present, has_tensor; };

/* The descriptor of one decode. Strides in bytes; `deterministic` etc. as in the contract. Zero is not a default:
 * the caller resolves defaults (mlak_batch_defaults fills those that depend on nothing else). */
struct mlak_batch {
    uint32_t batch, heads;
    uint64_t q_rows;
    enum mlak_dtype q_dtype, out_dtype;
    enum mlak_kv_format kv_format;
    uint32_t pages, page_size, max_pages;
    uint64_t page_stride, row_stride;
    double softmax_scale;
    struct mlak_scale q_scale, k_scale, v_scale;
    enum mlak_mask mask;
    enum mlak_lse_base lse_base;
    uint32_t dcp_world, dcp_rank, dcp_interleave;
    uint32_t window;                 /* 0: none */
    bool deterministic;
    /* client memory, all NULL while only checking */
    const void *q, *kv;
    const int32_t *block_table, *seqlens, *cu_q;   /* cu_q NULL: uniform */
    const uint64_t *tree_mask;
    const float *sink;
    void *out;
    float *lse;
    bool has_cu_q, has_tree_mask, has_sink, has_lse;   /* what the descriptor names, pointers resolved or not */
};

enum mlak_code {
    MLAK_OK = 0,
    MLAK_INVALID,       /* a field is out of the contract's bounds */
    MLAK_UNSUPPORTED,   /* within the contract; this device has no kernel for it */
    MLAK_BATCH,         /* cu_q is inconsistent: nothing of the batch ran */
    MLAK_REQUESTS,      /* some requests failed, see their rows */
    MLAK_MEMORY,
    MLAK_LOST           /* the device failed and took the work with it */
};
struct mlak_fault { enum mlak_code code; char field[64]; char message[256]; };

/* Fill `fault` (NULL is allowed) with a printf-style sentence and return `code`. Long text is cut. */
enum mlak_code mlak_fail(struct mlak_fault *fault, enum mlak_code code, const char *field, const char *format, ...)
    __attribute__((format(printf, 4, 5)));

/* Bytes that a tensor of the batch spans from its first byte, 0 if the batch has none. 64-bit safe for every batch
 * that mlak_check accepts. */
enum mlak_tensor { MLAK_T_Q, MLAK_T_KV, MLAK_T_BLOCK_TABLE, MLAK_T_SEQLENS, MLAK_T_CU_Q, MLAK_T_TREE_MASK, MLAK_T_SINK,
                   MLAK_T_Q_SCALE, MLAK_T_K_SCALE, MLAK_T_V_SCALE, MLAK_T_OUT, MLAK_T_LSE, MLAK_T_COUNT };
uint64_t mlak_extent(const struct mlak_batch *batch, enum mlak_tensor tensor);
uint32_t mlak_alignment(const struct mlak_batch *batch, enum mlak_tensor tensor);   /* bytes: 16, 8 or 4 */
const char *mlak_tensor_name(enum mlak_tensor tensor);                               /* "block_table" */

/* Bytes of one KV row (1152, 1152, 576, 656), one q element, one out element. */
uint32_t mlak_kv_row_bytes(enum mlak_kv_format format);
uint32_t mlak_dtype_bytes(enum mlak_dtype dtype);

/* Fill dcp 0 of 1 interleave 1, mask causal, base e, out dtype of q, packed strides. Call after q_dtype, kv_format
 * and page_size are set; fields the client gave are set after it. */
void mlak_batch_defaults(struct mlak_batch *batch);

/* ---- capabilities ---- */

enum {
    MLAK_CAN_RAGGED = 1,
    MLAK_CAN_DCP = 2,
    MLAK_CAN_WINDOW = 4,
    MLAK_CAN_SINK = 8,
    MLAK_CAN_LSE_E = 16,
    MLAK_CAN_LSE_2 = 32,
    MLAK_CAN_DETERMINISTIC = 64,
    MLAK_CAN_STRIDED = 128,
    MLAK_CAN_ALL = 255
};
struct mlak_capability {
    const char *variant;             /* "avx512", "reference" */
    enum mlak_dtype q_dtype, out_dtype;
    enum mlak_kv_format kv_format;
    enum mlak_mask mask;
    uint32_t max_heads, max_q_len, max_page_size;
    uint32_t features;               /* MLAK_CAN_* */
};
/* "ragged dcp ..." for a set of features, into `text` of 128 bytes. */
void mlak_features_text(uint32_t features, char text[128]);

/* ---- request table ---- */

/* One request. Written by mlak_prepare, read by kernels; `code`, `detail` may be written by a kernel. */
struct mlak_row {
    const uint8_t *q;                /* [q_len, heads, 576] */
    const uint8_t *kv;               /* page 0, row 0 */
    uint8_t *out;                    /* [q_len, heads, 512] */
    float *lse;                      /* [q_len, heads] or NULL */
    const int32_t *block_table;      /* this request's [max_pages], client memory */
    const float *sink;               /* [heads] or NULL; NULL also on dcp ranks other than 0 */
    uint64_t page_stride, row_stride;
    uint64_t tree_mask[MLAK_MAX_Q];  /* [q_len], copied; zero unless mask is tree */
    uint32_t pages, page_size, max_pages;
    uint32_t heads, q_len;
    int64_t global_len;              /* K, with DCP the global length G */
    int64_t local_len;               /* keys on this rank */
    uint32_t dcp_world, dcp_rank, dcp_interleave, window;
    enum mlak_dtype q_dtype, out_dtype;
    enum mlak_kv_format kv_format;
    enum mlak_mask mask;
    enum mlak_lse_base lse_base;
    bool deterministic;
    float score_scale;               /* softmax_scale * q_scale * k_scale */
    float v_scale;
    uint32_t request;                /* index in its batch */
    uint32_t owner;                  /* the caller's tag */
    int code;          /* enum mlak_row_code, by __atomic_*; not 0: the kernel skips or abandons the row; a caller may
                        * set MLAK_ROW_CANCELLED while it runs */
    int64_t detail[2]; /* PAGE_RANGE: column, page; TOO_LONG: local keys, room; by __atomic_*, before code */
};
enum mlak_row_code {
    MLAK_ROW_OK = 0,
    MLAK_ROW_SEQLEN_NEGATIVE,
    MLAK_ROW_SEQLEN_TOO_LONG,
    MLAK_ROW_PAGE_RANGE,
    MLAK_ROW_CANCELLED
};

/* Fail a row from a kernel: its block_table[column] holds `page`, outside 0..pages-1. From any thread; the first one
 * counts. */
void mlak_row_page_fault(struct mlak_row *row, uint32_t column, int32_t page);

/* The field ("seqlens[3]", "block_table[3][7]") and sentence of a failed row. */
void mlak_row_fault(const struct mlak_row *row, struct mlak_fault *fault);

/* What query token t of a row sees, as local key indices: lo <= c < hi, and for tree masks, of the keys c >= base,
 * only those whose draft bit is set (mlak_tree_sees). Without a tree, base == hi. */
struct mlak_visible { int64_t lo, base, hi; };
struct mlak_visible mlak_visible(const struct mlak_row *row, uint32_t t);
bool mlak_tree_sees(const struct mlak_row *row, uint64_t bits, int64_t c);
/* Keys that any token of the row sees: all lie in [lo, hi); of those >= base, the ones with a bit in `bits`. */
struct mlak_visible mlak_visible_any(const struct mlak_row *row, uint64_t *bits);
/* Number of global keys below g that the row's rank holds. */
int64_t mlak_local_count(const struct mlak_row *row, int64_t g);

/* ---- devices ---- */

struct mlak_device;
struct mlak_graph; /* captured launches of a device */
struct mlak_lane;  /* what runs in one client's stream order */
struct mlak_order; /* launches in a lane, each between two flags */

/* Memory of another process that a device can be given. Offsets and lengths in bytes. */
enum mlak_memory_kind {
    MLAK_MEMORY_HOST,     /* pages mapped in this process at `host`, shared with the client */
    MLAK_MEMORY_CUDA_IPC, /* an allocation named by a legacy CUDA IPC handle */
    MLAK_MEMORY_CUDA_VMM  /* allocations behind POSIX descriptors that the client exported, mapped end to end */
};
struct mlak_memory {
    enum mlak_memory_kind kind;
    void *host;                   /* HOST: page-aligned */
    uint8_t handle[64];           /* CUDA_IPC: a bearer secret, never logged; the caller wipes it */
    const int *fds;               /* CUDA_VMM: [n_fds], stay the caller's */
    uint32_t n_fds;
    char gpu[64];                 /* CUDA_*: "GPU-..." on which the memory lies, as the client says; checked for VMM */
    uint64_t allocation;          /* CUDA_VMM: bytes of each allocation, a multiple of its granularity; up to 2^48 */
    uint64_t offset;              /* CUDA_*: from the start of the (first) allocation to the buffer */
    uint64_t bytes;               /* of the buffer */
    bool writable;
};
struct mlak_mapping {
    void *pointer;                /* where kernels see the buffer's first byte */
    bool host;                    /* host memory */
    bool local;                   /* on the device's own memory, not on a peer's or the host's */
    uint8_t identity[16];         /* same allocation <=> same identity, as far as the driver tells: not of CUDA_VMM */
    uint64_t first;               /* the buffer's first byte within what `identity` names */
    void *owner;                  /* the backend's */
};

/* Where a launch in stream order meets its client's stream: words of client memory, as the device sees them. Rounds are
 * compared as by (int32_t)(a - b). The launch of round n runs once *go has reached n, unless the low half of *done has;
 * then it writes n there, with an enum mlak_mail in the high half. */
struct mlak_flags { uint32_t *go; uint64_t *done; };
enum mlak_mail { MLAK_MAIL_OK, MLAK_MAIL_REQUESTS, MLAK_MAIL_BATCH };

/* How long a layer in stream order took, by the device's clock, whose steps may be as long as a microsecond. */
struct mlak_layer_time {
    uint64_t gate_ns;        /* from when its launch was ready, with all before it done, until it saw `go` */
    uint64_t serve_ns;       /* from then until it had written `done` */
};

/* What came of a round. */
struct mlak_order_outcome {
    uint32_t round;
    bool stopped;            /* not all of it ran: a flag did not come in time, for it or for a round before it */
    uint32_t failed;         /* requests, of all launches */
    uint64_t kv_tokens;      /* of the requests that completed */
    enum mlak_code code;     /* MLAK_OK, MLAK_REQUESTS, MLAK_BATCH */
    struct mlak_fault fault; /* the first of them, "layers[3].seqlens[7]" */
    uint32_t n_times;        /* layers that ran, not those whose `done` had come before or that stopped */
    const struct mlak_layer_time *times; /* [n_times], the order's; until its next call */
};

struct mlak_options {
    uint32_t threads;                /* 0: one per processor this process may run on */
    const char *device;  /* the device's name: a GPU's UUID */
    const char *variant; /* NULL: the best here; else "generic", "avx2", "avx512", "amx": refused if absent */
    uint64_t *progress;              /* NULL, or __atomic_fetch_add'ed after each work item: a sign of life */
};

/* What one batch has of a launch. */
struct mlak_part {
    const struct mlak_batch *batch;  /* checked; pointers are the device's */
    uint32_t first, count;           /* its requests [first, first + count); 1 at least */
    struct mlak_row *rows;           /* [count], zeros to begin with */
    enum mlak_code code;             /* afterwards: MLAK_OK, or MLAK_BATCH and `fault` */
    struct mlak_fault fault;
};

struct mlak_backend {
    const char *name;                /* the device's name: "cpu", "reference" */
    /* Open the device; NULL and `fault` on failure. */
    struct mlak_device *(*open)(const struct mlak_options *options, struct mlak_fault *fault);
    void (*close)(struct mlak_device *device);
    const char *(*variant)(const struct mlak_device *device);
    uint32_t (*threads)(const struct mlak_device *device);
    const struct mlak_capability *(*capabilities)(const struct mlak_device *device, size_t *count);
    /* Run rows[0..count) to completion and return; 0, or MLAK_MEMORY with no row's output specified. One launch at a
     * time per device; called from any one thread, which takes part in the work. Rows whose code is set are skipped.
     * Never reads or writes outside what the rows' extents allow, whatever client memory holds. */
    enum mlak_code (*launch)(struct mlak_device *device, struct mlak_row *rows, uint32_t count);
    /* NULL for devices whose kernels read this process's memory; otherwise all of these are there.
     * import: make memory usable by kernels; MLAK_INVALID, UNSUPPORTED or MEMORY with a field of mlak_memory named, or
     *   MLAK_LOST as of launch_batches, `fault` saying why. From any thread.
     * release: undo it; nothing that names the mapping runs any more.
     * launches: how many calls of launch_batches may run at once, each from a thread of its own; 0: one.
     * launch_batches: mlak_prepare and launch in one, for parts[0..count), whatever batches they are of. `which`, below
     *   `launches`: of those at once, this one, which nobody else calls meanwhile. They do not wait for one another:
     *   what has to see what another leaves behind begins after its end. It fills of each row request, local_len,
     *   page_size, pages, max_pages, dcp_world, code and detail (what mlak_row_fault and accounting read), and abandons
     *   a part when the caller sets every code of its rows to MLAK_ROW_CANCELLED meanwhile. Each call validates each
     *   part's cu_q, on its snapshot; one that is wrong fails its own part. Parts that cannot run together (mergeable)
     *   or are too many follow one another. A deterministic batch has the same bits in whatever company. `layer`: the
     *   parts are a step's next layer; if all that `which` has launched since its first one differed from it, part by
     *   part, in buffers only (mlak_same_step), what the first one read and made of lengths, masks and scales holds,
     *   failed requests stay failed, and only the work on keys is done; else as without `layer`. MLAK_OK, MEMORY, or
     *   MLAK_LOST: the device failed for good, and this process should end. Of launches at once, only the one that
     *   began first adds to mlak_options.progress: one that hangs is not hidden by others.
     * mergeable: may requests of the two checked batches share a launch? NULL with `launch`, of which all may.
     * check: is the device still of use? To be asked now and then while nothing runs: under MPS another process's fault
     *   may end it. Gives it a little work and says what became of the last time's; does not wait. MLAK_OK or
     *   MLAK_LOST.
     * lost: a sentence why, once MLAK_LOST was returned.
     * mps: is this process a client of an MPS server? 1, 0, or -1 where the driver does not say. */
    enum mlak_code (*import)(struct mlak_device *device, const struct mlak_memory *memory,
                             struct mlak_mapping *mapping, struct mlak_fault *fault);
    void (*release)(struct mlak_device *device, struct mlak_mapping *mapping);
    uint32_t launches;
    enum mlak_code (*launch_batches)(struct mlak_device *device, uint32_t which, struct mlak_part *parts,
                                     uint32_t count, bool layer, struct mlak_fault *fault);
    bool (*mergeable)(const struct mlak_device *device, const struct mlak_batch *a, const struct mlak_batch *b);
    enum mlak_code (*check)(struct mlak_device *device, struct mlak_fault *fault);
    const char *(*lost)(const struct mlak_device *device);
    /* Launches in the order of a client's stream, without a word from or to a host. NULL, all of them, for a device
     * that has none; all are called from one thread, which need not be one of launch_batches, and do not wait for what
     * runs.
     * lane_new: room for one client; its launches run one after the other, beside those of other lanes. Takes some 140
     *   MB of the device's memory. A launch that waits holds a queue of the hardware: have few. NULL and `fault`:
     *   MEMORY, LOST.
     * lane_abandon: from now on nothing of the lane is run, and what waits gives up.
     * lane_restart: after an outcome said `stopped`, and all that was launched in the lane has been told: the next
     *   launch runs. MLAK_OK or MLAK_LOST.
     * lane_free: once all that was launched in it has been told, or the device is lost.
     * order_new: launches of batches[0..count), checked, one after the other, the i-th between flags[i]. Limits as of
     *   graph_new. `wait_ms`: how long a flag is waited for. NULL and `fault` as graph_new.
     * order_room: would order_launch take another round? Of one order a few are in flight at a time.
     * order_launch: queue round `round`. MLAK_OK, MEMORY or LOST.
     * order_poll: has the oldest round in flight ended? MLAK_OK with *ended saying so and the outcome, or MLAK_LOST.
     * order_free: with no round in flight. */
    struct mlak_lane *(*lane_new)(struct mlak_device *device, struct mlak_fault *fault);
    void (*lane_abandon)(struct mlak_device *device, struct mlak_lane *lane);
    enum mlak_code (*lane_restart)(struct mlak_device *device, struct mlak_lane *lane, struct mlak_fault *fault);
    void (*lane_free)(struct mlak_device *device, struct mlak_lane *lane);
    struct mlak_order *(*order_new)(struct mlak_device *device, struct mlak_lane *lane,
                                    const struct mlak_batch *const *batches, const struct mlak_flags *flags,
                                    uint32_t count, uint32_t wait_ms, struct mlak_fault *fault);
    bool (*order_room)(struct mlak_device *device, struct mlak_order *order);
    enum mlak_code (*order_launch)(struct mlak_device *device, struct mlak_order *order, uint32_t round,
                                   struct mlak_fault *fault);
    enum mlak_code (*order_poll)(struct mlak_device *device, struct mlak_order *order, bool *ended,
                                 struct mlak_order_outcome *outcome, struct mlak_fault *fault);
    void (*order_free)(struct mlak_device *device, struct mlak_order *order);
    int (*mps)(const struct mlak_device *device);
    /* For programs that bring no client's memory: tests and benchmarks. NULL where `import` is.
     * memory_new: `bytes` of the device's own memory, 256-byte aligned, contents unspecified; NULL and `fault` without.
     * memory_copy: between host and device memory in any direction, done on return; MLAK_OK or MLAK_LOST.
     * graph_new: capture the launches of batches[0..count), checked and whole, into a graph that runs them in this
     *   order. It keeps the descriptors, with the pointers and scales by value; what the pointers name is read at each
     *   replay, and may be other lengths, tables, cu_q and contents each time. A batch has at most 1024 requests, a
     *   deterministic one as many as fit the device's scratch, 16 at least. Nothing runs. NULL and `fault`: INVALID,
     *   UNSUPPORTED (a batch is too large), MEMORY, LOST; the device is as before.
     * graph_replay: run it once, to its end; as mlak_launch_batch of its last batch, into rows[0..batch), zeros to
     *   begin with, but a replay cannot be cancelled. Of the other batches nothing is told. Launches of other work
     *   may come between replays; none of launch_batches' `which` 0 meanwhile. MLAK_OK, BATCH, MEMORY, LOST.
     * graph_free: with no replay under way, before the device is closed. NULL is allowed.
     * time_batches: the nanoseconds on the device that `rounds` (1 at least) replays of such a graph took, one behind
     *   the other after one that does not count: they hold nothing of what the host does to launch. Nothing is told of
     *   rows. `layers`: of a step, which was prepared before (as launch_batches has it); INVALID if they are not. */
    void *(*memory_new)(struct mlak_device *device, uint64_t bytes, struct mlak_fault *fault);
    void (*memory_free)(struct mlak_device *device, void *memory);
    enum mlak_code (*memory_copy)(struct mlak_device *device, void *to, const void *from, uint64_t bytes);
    struct mlak_graph *(*graph_new)(struct mlak_device *device, const struct mlak_batch *batches, uint32_t count,
                                    struct mlak_fault *fault);
    enum mlak_code (*graph_replay)(struct mlak_device *device, struct mlak_graph *graph, struct mlak_row *rows,
                                   struct mlak_fault *fault);
    void (*graph_free)(struct mlak_device *device, struct mlak_graph *graph);
    enum mlak_code (*time_batches)(struct mlak_device *device, const struct mlak_batch *batches, uint32_t count,
                                   bool layers, uint32_t rounds, double *ns, struct mlak_fault *fault);
    /* Estimated nanoseconds that the rows take (for small-work decisions only). NULL with launch_batches. */
    uint64_t (*estimate_ns)(const struct mlak_device *device, const struct mlak_row *rows, uint32_t count);
};

/* By device name: "cpu", "reference", or a GPU's UUID ("GPU-..."); NULL if this build has none. */
const struct mlak_backend *mlak_backend(const char *name);

struct mlak_gpu {
    char device[64]; /* its name as a device: "GPU-..." */
    char model[96];  /* for people: "NVIDIA H100 80GB HBM3" */
};
/* The GPUs that this process sees, in the driver's order, `most` at most; their number. 0: `why` says what is missing.
 * May take seconds: it starts the driver. Whether the kernels run on one is for its open to say. */
uint32_t mlak_gpus(struct mlak_gpu *gpus, uint32_t most, struct mlak_fault *why);

/* launch_batches of one part, as `which` 0. Its result, or the part's. */
enum mlak_code mlak_launch_batch(const struct mlak_backend *backend, struct mlak_device *device,
                                 const struct mlak_batch *batch, uint32_t first, uint32_t count, struct mlak_row *rows,
                                 struct mlak_fault *fault);

/* Whether two checked batches may be layers of one step: they are the same but for the memory of q, kv, sink, out and
 * lse. */
bool mlak_same_step(const struct mlak_batch *a, const struct mlak_batch *b);

/* Check a descriptor against the contract and a device's capabilities. Pointers are not looked at.
 * MLAK_OK, MLAK_INVALID or MLAK_UNSUPPORTED with the field named. */
enum mlak_code mlak_check(const struct mlak_batch *batch, const struct mlak_capability *capabilities, size_t count,
                          struct mlak_fault *fault);

/* Copy requests [first, first + count) of a checked batch with resolved pointers into rows. cu_q is validated and
 * copied whole into `cu_q_copy` ([batch + 1], caller's) when first == 0 and read from there afterwards; may be NULL
 * without cu_q. Rows with a bad length get their code set. MLAK_OK or MLAK_BATCH (`fault` names the entry). */
enum mlak_code mlak_prepare(const struct mlak_batch *batch, int32_t *cu_q_copy, uint32_t first, uint32_t count,
                            struct mlak_row *rows, struct mlak_fault *fault);

/* The fault of entry i of cu_q after entry `before` (0 for the first): MLAK_BATCH, or MLAK_OK for none. */
enum mlak_code mlak_cu_q_fault(uint32_t i, int64_t value, int64_t before, uint64_t q_rows, struct mlak_fault *fault);

#endif
