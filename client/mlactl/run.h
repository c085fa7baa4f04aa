/* run.h - a capture on a device: its tensors in buffers shared with the daemon, its plan, its outputs.
 *
 * A run owns its buffers and plan; the client is the caller's and outlives it. */
#ifndef MLACTL_RUN_H
#define MLACTL_RUN_H

#include "capture.h"

/* Ways to lay a batch out that a file does not record; all zero: packed, scales in a buffer. */
struct run_layout {
    uint32_t row_gap, page_gap;     /* bytes between KV rows and pages, multiples of 16 */
    bool host_scales;               /* scales as numbers in the descriptor */
};

/* Memory that the daemon sees, and how this process sees it. */
struct run_memory {
    mla_buffer *buffer;
    uint8_t *host;                  /* the buffer's own memory, or for a GPU's device a copy of it */
    void *gpu;                      /* NULL: the device reads host memory */
    size_t bytes;
};

struct run {
    mla_client *client;
    mla_batch batch;                /* with its tensors bound */
    struct run_memory inputs, outputs;
    mla_plan *plan;
    void *out;                      /* in `outputs` */
    float *lse;
    uint64_t out_bytes, lse_bytes;
    int32_t *seqlens;               /* in `inputs` */
};

/* Connect to `device` (NULL: libmla's choice) after making sure that a daemon answers. CTL_OK, or the exit code after
 * complaining. */
int run_connect(const struct ctl *ctl, const char *device, mla_client **client);
int run_connect_by(const struct ctl *ctl, const char *device, mla_transport transport, mla_client **client);

/* Bind, register and plan. 0 with *run the caller's until run_free; -1 with `error`. */
int run_new(mla_client *client, const struct capture *capture, const struct run_layout *layout, struct run **run,
            mla_error *error);
void run_free(struct run *run);

/* Decode once: mla_decode, and out and lse are there to be read. Anything else that decodes run->plan must not look at
 * them: on a GPU they are brought back here. */
mla_status run_decode(struct run *run, int timeout_ms, mla_result *result, mla_error *error);

/* Fill out and lse with 0xff bytes (NaN), so that what a decode leaves unwritten shows. */
void run_poison_outputs(struct run *run);

/* True if every byte around out and lse is as run_new left it. */
bool run_surroundings_intact(const struct run *run);

/* The exit code that tells of a libmla status. */
int run_exit_code(mla_status status);

static inline void run_freep(struct run **run) { run_free(*run); }
#define run_auto __attribute__((cleanup(run_freep)))
static inline void run_closep(mla_client **client) { mla_close(*client); }
#define client_auto __attribute__((cleanup(run_closep)))

#endif
