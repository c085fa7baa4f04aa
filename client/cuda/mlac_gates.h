/* mlac_gates.h - what streams.h and the kernels of mlac_gates.cu agree on. */
#ifndef MLAC_GATES_H
#define MLAC_GATES_H

#include "mlap_mailbox.h"

enum { MLAC_GATE_THREADS = 128 };

/* Pinned host memory of a step: what its stream has noted of rounds that went wrong. Only ever added to. */
struct mlac_notes {
    uint32_t count;
    uint32_t what, layer, round; /* of the last one: enum mlap_mail */
};

/* The parameter of all three kernels, by value: nothing of it changes from replay to replay. */
struct mlac_gate {
    struct mlap_mail_head *head;
    struct mlap_mail_slot *slot; /* of the layer */
    void *out, *lse;             /* [out_bytes], [lse_bytes] */
    uint64_t out_bytes, lse_bytes;
    struct mlac_notes *notes;
    uint64_t wait_ns;            /* a gate gives up after it */
    uint32_t layer;
    uint32_t advance;            /* signal: begin a round first */
};

#endif
