/* model.h - the decode contract in scalar double precision, and the accuracy bar that follows from it.
 *
 * Written from the contract alone, as a third opinion beside the device under test and the device `reference`. Works on
 * captures in memory. */
#ifndef MLACTL_MODEL_H
#define MLACTL_MODEL_H

#include "capture.h"

/* One request of a capture. */
struct model_request {
    const struct capture *capture;
    uint32_t index, q_len;
    uint64_t first_row;             /* its first row of q, out, lse and tree_mask */
    int64_t global_len, local_len;
    const int32_t *block_table;
};
struct model_request model_request(const struct capture *capture, uint32_t index);

/* Keys of a global sequence that this rank holds, and the global index of its local key c. */
int64_t model_local_len(const mla_batch *batch, int64_t global_len);
int64_t model_global_key(const mla_batch *batch, int64_t c);
/* Whether query token t, or any of them, sees local key c. */
bool model_sees(const struct model_request *request, uint32_t t, int64_t c);
bool model_seen(const struct model_request *request, int64_t c);

/* Exact results of a batch, and per request what a correct device may be off by. */
struct model {
    double *out;                    /* [q_rows, H, 512] */
    double *lse;                    /* [q_rows, H], in the batch's base */
    struct model_bar { double signal, noise; } *bars;   /* [B]: sum out^2; the largest allowed sum (out - device)^2 */
    double lse_bar;                 /* of max(|lse|, 1) */
};
/* NULL: no memory. Every needed page id must be right. */
struct model *model_new(const struct capture *capture);
void model_free(struct model *model);

struct judgement {
    bool good;
    double snr_db, bar_db;          /* infinite for a perfect answer */
    double lse_share;               /* largest LSE error as a share of what is allowed */
    char why[160];                  /* of what is not good */
};
/* Judge what a device made of one request. */
struct judgement model_judge(const struct model *model, const struct model_request *request, const void *out,
                             const float *lse);

#endif
