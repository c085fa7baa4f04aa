/* fence.c - see fence.h. The mapping is the fence's own. */
#include "fence.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { PAGE = 4096 };

void fence_init(struct fence *fence, size_t bytes, size_t alignment, bool right)
{
    fence->bytes = bytes;
    fence->inside = bytes ? (bytes + PAGE - 1) / PAGE * PAGE : PAGE;
    fence->map = mmap(NULL, fence->inside + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (fence->map == MAP_FAILED || mprotect(fence->map + PAGE, fence->inside, PROT_READ | PROT_WRITE) != 0)
        abort();
    memset(fence->map + PAGE, 0xff, fence->inside);
    fence->data = fence->map + PAGE + (right ? (fence->inside - bytes) / alignment * alignment : 0);
}

void fence_deinit(struct fence *fence)
{
    if (fence->map)
        munmap(fence->map, fence->inside + 2 * PAGE);
    *fence = (struct fence){0};
}

bool fence_intact(const struct fence *fence)
{
    for (const uint8_t *byte = fence->map + PAGE; byte < fence->data; byte++)
        if (*byte != 0xff)
            return false;
    for (const uint8_t *byte = fence->data + fence->bytes; byte < fence->map + PAGE + fence->inside; byte++)
        if (*byte != 0xff)
            return false;
    return true;
}
