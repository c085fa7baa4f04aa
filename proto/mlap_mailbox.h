/* mlap_mailbox.h - the flags by which a client's stream and the daemon hand a decode over, in GPU memory of the
 * client's that both have mapped.
 *
 * A mailbox is a head and, for each layer of a step, a slot. Each word has one writer:
 *
 *     slot.go     client   the round whose inputs are written
 *     slot.done   daemon   the round whose outputs are written
 *     slot.status daemon   of that round, enum mlap_mail; written with `done`, as one word of 64 bits
 *
 * Rounds count up from 1 and wrap; a is after b if (int32_t)(a - b) > 0. The daemon runs round n of a layer once `go`
 * has reached it, unless `done` has: so arming a round again, with another worker, runs what is missing and nothing
 * twice. Both sides write their word by a release and read the other's by an acquire, at system scope. What else the
 * head and the slots hold is the client's own. */
#ifndef MLAP_MAILBOX_H
#define MLAP_MAILBOX_H

#include <stdint.h>

enum mlap_mail {
    MLAP_MAIL_OK = 0,
    MLAP_MAIL_REQUESTS = 1, /* some requests failed: their rows of out and lse are NaN */
    MLAP_MAIL_BATCH = 2,    /* the whole batch was refused: out and lse are NaN */
    MLAP_MAIL_UNARMED = 3,  /* the client's own from here on: a replay that nobody armed */
    MLAP_MAIL_RELEASED = 4, /* the client's library gave the round up */
    MLAP_MAIL_LATE = 5      /* no answer came in time */
};

/* Words that different processors wait for lie in different sectors of 32 bytes. */
struct mlap_mail_slot {
    uint32_t go, reserved_a[7];
    uint32_t done, status, reserved_b[6];
    uint32_t unarmed, reserved_c[15];
};
struct mlap_mail_head {
    uint32_t round, reserved_a[7];   /* that the client's stream is in */
    uint32_t release, reserved_b[23]; /* up to this round nobody waits any more */
};
#ifdef __cplusplus
static_assert(sizeof(struct mlap_mail_slot) == 128 && sizeof(struct mlap_mail_head) == 128, "part of the protocol");
#else
_Static_assert(sizeof(struct mlap_mail_slot) == 128 && sizeof(struct mlap_mail_head) == 128, "part of the protocol");
#endif

#endif
