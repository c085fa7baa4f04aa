/* mlap_ring.h - a submission ring and a completion ring in one memfd: the layout, and how to push and pop.
 *
 * PROTOCOL.md, "Rings", has the picture, and says which messages make the memfd and wake a sleeper.
 *
 * Each ring has one producer and one consumer, in different processes that do not trust each other. A side owns one
 * index and keeps the true value in its private `struct mlap_ring`; the other side's index is read, validated and never
 * believed further than the ring's size. Indices run freely through all 32-bit numbers; tail - head is the number of
 * entries waiting. An entry is copied out once, word by word: validate the copy. The mapping must be sealed with
 * F_SEAL_SHRINK. */
#ifndef MLAP_RING_H
#define MLAP_RING_H

#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define MLAP_RINGS_MAGIC 0x52504c4du   /* "MLPR" in memory */
#define MLAP_RINGS_VERSION 2u
#define MLAP_RING_MAX_ENTRIES 4096u    /* a power of two, as every ring's size */
#define MLAP_RING_NEED_WAKEUP 1u       /* in flags: the consumer sleeps, or is about to */

/* One ring's indices: a cache line for each side, since each is written by one side only. */
struct mlap_ring_indices {
    uint32_t head;                     /* consumer: entries taken so far */
    uint32_t flags;                    /* MLAP_RING_NEED_WAKEUP: set by the consumer, cleared by whoever wakes it */
    uint32_t consumer_zero[14];
    uint32_t tail;                     /* producer: entries written so far */
    uint32_t producer_zero[15];
};
_Static_assert(sizeof(struct mlap_ring_indices) == 128, "two cache lines");
_Static_assert(offsetof(struct mlap_ring_indices, tail) == 64, "one line a side");

/* What is asked. Members called `zero` must be 0; a receiver refuses anything else. */
struct mlap_submission {
    uint32_t operation;                /* enum mlap_operation */
    uint32_t sequence;                 /* the ticket, echoed by the completion; not 0 */
    union {
        uint32_t plan;                 /* SUBMIT */
        uint32_t step;                 /* ARM */
    };
    uint32_t round;                    /* ARM; else 0 */
    uint32_t zero[12];
};
enum mlap_operation { MLAP_OPERATION_SUBMIT = 1, MLAP_OPERATION_ARM = 2 };
_Static_assert(sizeof(struct mlap_submission) == 64, "one entry");
_Static_assert(offsetof(struct mlap_submission, zero) == 16, "no implicit padding");

/* What came of it: the figures of DONE. A decode that failed, wholly or in part, is answered over the socket, where
 * there is room to say why: `code` and `failed` are 0. */
struct mlap_completion {
    uint32_t sequence;
    uint32_t code;                     /* enum mlap_code */
    uint64_t receive_ns, queue_ns, kernel_ns, kv_tokens;
    uint32_t failed;
    uint32_t zero[5];
};
_Static_assert(sizeof(struct mlap_completion) == 64, "one entry");
_Static_assert(offsetof(struct mlap_completion, failed) == 40, "no implicit padding");

/* An entry of either ring, as it is moved. */
union mlap_entry {
    struct mlap_submission submission;
    struct mlap_completion completion;
    uint64_t words[8];
};
_Static_assert(sizeof(union mlap_entry) == 64, "one cache line");

/* The head of the memfd; submission entries follow it, then as many completion entries. */
struct mlap_rings {
    uint32_t magic, version;
    uint32_t entries;                  /* in each ring */
    uint32_t zero[13];
    struct mlap_ring_indices submission, completion;
    uint32_t more_zero[48];
};
_Static_assert(sizeof(struct mlap_rings) == 512, "entries start on a cache line");
_Static_assert(offsetof(struct mlap_rings, submission) == 64, "as PROTOCOL.md draws it");
_Static_assert(offsetof(struct mlap_rings, completion) == 192, "as PROTOCOL.md draws it");

/* One side's private view of one ring. Either its producer's or its consumer's, used by one thread at a time. */
struct mlap_ring {
    struct mlap_ring_indices *shared;
    union mlap_entry *entries;
    uint32_t size;
    uint32_t mine;                     /* the index this side owns */
};

/* Bytes of a memfd with `entries` (a power of two up to MLAP_RING_MAX_ENTRIES) in each ring; 0 for other numbers. */
size_t mlap_rings_bytes(uint32_t entries);

/* Write the head of a zeroed mapping of mlap_rings_bytes(entries). Whoever creates the memfd does so once. */
void mlap_rings_init(void *mapping, uint32_t entries);

/* Views of both rings of a fresh mapping of `bytes`, before either side has pushed. 0, or -1 with errno EPROTO: no
 * rings of this version, or `bytes` is too small for them. The mapping stays the caller's and must outlive the views.
 */
int mlap_rings_open(void *mapping, size_t bytes, struct mlap_ring *submission, struct mlap_ring *completion);

/* Producer: append one entry. 0; -1 with errno EAGAIN: full; EPROTO: the consumer's index is nonsense. */
static inline int mlap_ring_push(struct mlap_ring *ring, const union mlap_entry *entry)
{
    uint32_t waiting = ring->mine - __atomic_load_n(&ring->shared->head, __ATOMIC_ACQUIRE);
    if (waiting >= ring->size) {
        errno = waiting == ring->size ? EAGAIN : EPROTO;
        return -1;
    }
    uint64_t *to = ring->entries[ring->mine & (ring->size - 1)].words;
    for (int i = 0; i < 8; i++)
        __atomic_store_n(&to[i], entry->words[i], __ATOMIC_RELAXED);
    __atomic_store_n(&ring->shared->tail, ++ring->mine, __ATOMIC_SEQ_CST);
    return 0;
}

/* Consumer: take one entry. 0; -1 with errno EAGAIN: empty; EPROTO: the producer's index is nonsense. */
static inline int mlap_ring_pop(struct mlap_ring *ring, union mlap_entry *entry)
{
    uint32_t waiting = __atomic_load_n(&ring->shared->tail, __ATOMIC_SEQ_CST) - ring->mine;
    if (waiting == 0 || waiting > ring->size) {
        errno = waiting == 0 ? EAGAIN : EPROTO;
        return -1;
    }
    const uint64_t *from = ring->entries[ring->mine & (ring->size - 1)].words;
    for (int i = 0; i < 8; i++)
        entry->words[i] = __atomic_load_n(&from[i], __ATOMIC_RELAXED);
    __atomic_store_n(&ring->shared->head, ++ring->mine, __ATOMIC_RELEASE);
    return 0;
}

/* Between two looks at a ring that was empty. */
static inline void mlap_ring_pause(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

/* Consumer: is there anything to pop, be it only an error? Cheaper than popping. */
static inline bool mlap_ring_has_news(const struct mlap_ring *ring)
{
    return __atomic_load_n(&ring->shared->tail, __ATOMIC_SEQ_CST) != ring->mine;
}

/* Consumer, before it sleeps: ask for a wake-up, look once more, and sleep only if that finds nothing; afterwards take
 * the asking back. Producer, after pushing: is a wake-up asked for? Then it is the producer's to give, once, and is not
 * asked for any more. Flag and tail are sequentially consistent on both sides: either the consumer sees the entry, or
 * the producer sees the flag. */
static inline void mlap_ring_set_wakeup(struct mlap_ring *ring, bool asked)
{
    __atomic_store_n(&ring->shared->flags, asked ? MLAP_RING_NEED_WAKEUP : 0u, __ATOMIC_SEQ_CST);
}

static inline bool mlap_ring_take_wakeup(const struct mlap_ring *ring)
{
    return (__atomic_load_n(&ring->shared->flags, __ATOMIC_SEQ_CST) & MLAP_RING_NEED_WAKEUP) != 0 &&
           (__atomic_exchange_n(&ring->shared->flags, 0u, __ATOMIC_SEQ_CST) & MLAP_RING_NEED_WAKEUP) != 0;
}

#endif
