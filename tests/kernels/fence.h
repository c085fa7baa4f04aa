/* fence.h - memory with an inaccessible page on either side, so that a single byte read or written outside it traps.
 * What is left over of its own pages holds 0xff (NaN in every element type) and is checked for writes. */
#ifndef FENCE_H
#define FENCE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct fence {
    uint8_t *data;                  /* `bytes` of 0xff to begin with */
    size_t bytes;
    uint8_t *map;                   /* the fence before, `inside` bytes, the fence after */
    size_t inside;
};

/* `right`: data ends at the fence after it, as near as `alignment` (a power of 2) lets it; else it begins at the one
 * before. Aborts without memory. */
void fence_init(struct fence *fence, size_t bytes, size_t alignment, bool right);
void fence_deinit(struct fence *fence);
/* Nothing was written around the data. */
bool fence_intact(const struct fence *fence);

#endif
