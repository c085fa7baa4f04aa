/* mlap_ring.c - making and opening the rings' memfd. The mapping belongs to the caller; nothing is allocated. */
#include "mlap_ring.h"

static bool size_is_legal(uint32_t entries)
{
    return entries > 0 && entries <= MLAP_RING_MAX_ENTRIES && (entries & (entries - 1)) == 0;
}

size_t mlap_rings_bytes(uint32_t entries)
{
    return size_is_legal(entries) ? sizeof(struct mlap_rings) + 2 * (size_t)entries * sizeof(union mlap_entry) : 0;
}

void mlap_rings_init(void *mapping, uint32_t entries)
{
    struct mlap_rings *rings = mapping;
    rings->magic = MLAP_RINGS_MAGIC;
    rings->version = MLAP_RINGS_VERSION;
    rings->entries = entries;
}

int mlap_rings_open(void *mapping, size_t bytes, struct mlap_ring *submission, struct mlap_ring *completion)
{
    struct mlap_rings *rings = mapping;
    /* Once: the peer may change it. */
    uint32_t entries = bytes >= sizeof *rings ? __atomic_load_n(&rings->entries, __ATOMIC_RELAXED) : 0;
    if (!size_is_legal(entries) || bytes < mlap_rings_bytes(entries) || rings->magic != MLAP_RINGS_MAGIC ||
        rings->version != MLAP_RINGS_VERSION) {
        errno = EPROTO;
        return -1;
    }
    union mlap_entry *first = (union mlap_entry *)(rings + 1);
    *submission = (struct mlap_ring){&rings->submission, first, entries, 0};
    *completion = (struct mlap_ring){&rings->completion, first + entries, entries, 0};
    return 0;
}
