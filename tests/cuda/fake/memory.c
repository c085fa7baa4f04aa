/* memory.c - allocations, host memory, copies and pointer attributes. */
#include "memory.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static const uint64_t VA_START = 0x7ea000000000, VA_END = 0x7ee000000000; /* recognisable, and free under sanitizers */
pthread_mutex_t fake_memory_lock = PTHREAD_MUTEX_INITIALIZER;
static struct fake_range *ranges;
static uint64_t last_id, next_va;
static size_t used[FAKE_DEVICES];

#define LOCK() pthread_mutex_lock(&fake_memory_lock)
#define UNLOCK() pthread_mutex_unlock(&fake_memory_lock)

struct fake_range *fake_find(uint64_t a, bool reserved)
{
    for (struct fake_range *r = ranges; r; r = r->next)
        if (a >= r->base && a - r->base < r->size && (r->kind == FAKE_RESERVED) == reserved) return r;
    return NULL;
}

uint64_t fake_next_id(void) { return ++last_id; }
struct fake_range *fake_ranges(void) { return ranges; }

struct fake_range *fake_add(enum fake_kind kind, uint64_t base, size_t size, int device, int fd)
{
    struct fake_range *r = calloc(1, sizeof *r);
    if (!r) return NULL;
    *r = (struct fake_range){.next = ranges, .base = base, .size = size, .id = fake_next_id(), .kind = kind,
                             .device = device, .fd = fd, .refs = 1};
    return ranges = r;
}

void fake_drop(struct fake_range *range)
{
    struct fake_range **at = &ranges;
    while (*at != range) at = &(*at)->next;
    *at = range->next;
    free(range);
}

void fake_file_path(char *out, size_t room, int pid, uint64_t id, int fd)
{
    const char *dir = getenv("MLAD_FAKE_CUDA_DIR");
    if (dir) snprintf(out, room, "%s/%d.%llu", dir, pid, (unsigned long long)id);
    else snprintf(out, room, "/proc/%d/fd/%d", pid, fd);
}

int fake_memory_file(size_t size, uint64_t id)
{
    char path[4096];
    fake_file_path(path, sizeof path, (int)getpid(), id, 0);
    int fd = getenv("MLAD_FAKE_CUDA_DIR") ? open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600)
                                          : memfd_create("fake_cuda", MFD_CLOEXEC);
    if (fd >= 0 && ftruncate(fd, (off_t)size) != 0) close(fd), fd = -1;
    return fd;
}

void *fake_map(int fd, size_t size, int protection)
{
    if (!next_va) next_va = VA_START + ((uint64_t)(getpid() & 15) << 32); /* processes rarely share an address */
    for (int tries = 0; tries < 1000; tries++) {
        if (next_va + size > VA_END) next_va = VA_START;
        void *at = mmap((void *)next_va, size, protection,
                        MAP_FIXED_NOREPLACE | (fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE : MAP_SHARED),
                        fd, 0);
        next_va += ((size + 0x1fffff) & ~(uint64_t)0x1fffff) + 0x200000;
        if (at != MAP_FAILED) return at;
    }
    return NULL;
}

bool fake_charge(size_t size, int device)
{
    size_t limit = fake_settings().memory;
    if (size > limit || used[device] > limit - size) return false;
    used[device] += size;
    return true;
}
void fake_discharge(size_t size, int device) { used[device] -= size; }

static CUresult allocate(CUdeviceptr *out, size_t bytes, enum fake_kind kind)
{
    int device = fake_current_device();
    if (device < 0) return FAKE_INVALID_CONTEXT;
    if (!out || !bytes) return FAKE_INVALID_VALUE;
    LOCK();
    CUresult result = FAKE_OUT_OF_MEMORY;
    if (fake_charge(bytes, device)) {
        int fd = fake_memory_file(bytes, last_id + 1); /* the id that fake_add gives */
        void *at = fd < 0 ? NULL : fake_map(fd, bytes, PROT_READ | PROT_WRITE);
        if (at && fake_add(kind, (uint64_t)at, bytes, device, fd)) *out = (CUdeviceptr)at, result = FAKE_OK;
        else fake_discharge(bytes, device);
    }
    UNLOCK();
    return result;
}
static CUresult release(CUdeviceptr p)
{
    char path[4096];
    LOCK();
    struct fake_range *r = fake_find(p, false);
    bool ok = r && r->base == p && r->kind <= FAKE_MANAGED;
    if (ok) {
        fake_file_path(path, sizeof path, (int)getpid(), r->id, r->fd);
        if (getenv("MLAD_FAKE_CUDA_DIR")) unlink(path);
        munmap((void *)r->base, r->size);
        close(r->fd);
        fake_discharge(r->size, r->device);
        fake_drop(r);
    }
    UNLOCK();
    return ok ? FAKE_OK : FAKE_INVALID_VALUE;
}
API(cuMemAlloc_v2, (CUdeviceptr *p, size_t n), (p, n)) { return allocate(p, n, FAKE_LEGACY); }
API(cuMemFree_v2, (CUdeviceptr p), (p)) { return p ? (fake_sync_all(), release(p)) : FAKE_OK; }
API(cuMemAllocAsync, (CUdeviceptr *p, size_t n, CUstream s), (p, n, s)) { return (void)s, allocate(p, n, FAKE_POOL); }
API(cuMemAllocManaged, (CUdeviceptr *p, size_t n, unsigned flags), (p, n, flags))
{
    return flags == 1 || flags == 2 ? allocate(p, n, FAKE_MANAGED) : FAKE_INVALID_VALUE;
}
API(cuMemFreeAsync, (CUdeviceptr p, CUstream s), (p, s)) { return fake_stream_settle(s), release(p); }
API(cuMemGetInfo_v2, (size_t *available, size_t *total), (available, total))
{
    int device = fake_current_device();
    if (device < 0) return FAKE_INVALID_CONTEXT;
    LOCK();
    *total = fake_settings().memory;
    *available = *total > used[device] ? *total - used[device] : 0;
    UNLOCK();
    return FAKE_OK;
}

API(cuMemHostAlloc, (void **out, size_t n, unsigned flags), (out, n, flags))
{
    (void)flags;
    LOCK();
    *out = n ? mmap(NULL, n, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0) : MAP_FAILED;
    bool ok = *out != MAP_FAILED && fake_add(FAKE_HOST, (uint64_t)*out, n, fake_current_device(), -1);
    UNLOCK();
    return ok ? FAKE_OK : FAKE_OUT_OF_MEMORY;
}
static CUresult forget_host(void *p, enum fake_kind kind, CUresult missing)
{
    LOCK();
    struct fake_range *r = fake_find((uint64_t)p, false);
    bool ok = r && r->base == (uint64_t)p && r->kind == kind;
    if (ok && kind == FAKE_HOST) munmap(p, r->size);
    if (ok) fake_drop(r);
    UNLOCK();
    return ok ? FAKE_OK : missing;
}
API(cuMemFreeHost, (void *p), (p)) { return forget_host(p, FAKE_HOST, FAKE_INVALID_VALUE); }
API(cuMemHostRegister_v2, (void *p, size_t n, unsigned flags), (p, n, flags))
{
    (void)flags;
    if (!p || !n) return FAKE_INVALID_VALUE;
    LOCK();
    bool taken = fake_find((uint64_t)p, false) || fake_find((uint64_t)p + n - 1, false);
    if (!taken) fake_add(FAKE_REGISTERED, (uint64_t)p, n, fake_current_device(), -1);
    UNLOCK();
    return taken ? FAKE_ALREADY_REGISTERED : FAKE_OK;
}
API(cuMemHostUnregister, (void *p), (p)) { return forget_host(p, FAKE_REGISTERED, FAKE_NOT_REGISTERED); }
API(cuMemHostGetDevicePointer_v2, (CUdeviceptr *out, void *p, unsigned flags), (out, p, flags))
{
    LOCK();
    struct fake_range *r = flags ? NULL : fake_find((uint64_t)p, false);
    bool ok = r && (r->kind == FAKE_HOST || r->kind == FAKE_REGISTERED);
    UNLOCK();
    return ok ? (*out = (CUdeviceptr)p, FAKE_OK) : FAKE_INVALID_VALUE;
}

API(cuMemGetAddressRange_v2, (CUdeviceptr *base, size_t *size, CUdeviceptr p), (base, size, p))
{
    if (fake_current_device() < 0) return FAKE_INVALID_CONTEXT;
    LOCK();
    struct fake_range *r = fake_find(p, false);
    if (r && base) *base = r->base;
    if (r && size) *size = r->size;
    UNLOCK();
    return r ? FAKE_OK : FAKE_NOT_FOUND;
}
static CUresult attribute(void *data, int which, CUdeviceptr p, bool *known)
{
    LOCK();
    struct fake_range *found = fake_find(p, false), *whole = fake_find(p, true);
    struct fake_range r = found ? *found : (struct fake_range){0};
    if (found && whole) r.base = whole->base, r.size = whole->size; /* attributes 11 and 12 are the reservation's */
    UNLOCK();
    *known = found != NULL;
    if (!found) return FAKE_INVALID_VALUE;
    bool host = r.kind == FAKE_HOST || r.kind == FAKE_REGISTERED;
    switch (which) {
    case 1: *(CUcontext *)data = r.kind == FAKE_MAPPED ? NULL : fake_context_of(r.device); break;
    case 2: *(int *)data = host ? 1 : 2; break;
    case 3: *(CUdeviceptr *)data = p; break;
    case 4:
        if (!host) return FAKE_INVALID_VALUE;
        *(uint64_t *)data = p;
        break;
    case 6: *(bool *)data = false; break;
    case 8: *(bool *)data = r.kind == FAKE_MANAGED; break;
    case 7: *(uint64_t *)data = r.id; break;
    case 9: *(int *)data = r.device; break;
    case 10: *(bool *)data = r.kind == FAKE_LEGACY; break;
    case 11: *(CUdeviceptr *)data = r.base; break;
    case 12: *(size_t *)data = r.size; break;
    case 13: *(bool *)data = true; break;
    case 14: *(uint64_t *)data = (uint64_t)r.handles; break;
    case 17: *(uint64_t *)data = r.kind == FAKE_POOL ? 1 : 0; break;
    default: return FAKE_INVALID_VALUE;
    }
    return FAKE_OK;
}
API(cuPointerGetAttribute, (void *data, int which, CUdeviceptr p), (data, which, p))
{
    bool known;
    return attribute(data, which, p, &known);
}
/* Unknown pointers are no error here: their values are 0. */
API(cuPointerGetAttributes, (unsigned n, int *which, void **data, CUdeviceptr p), (n, which, data, p))
{
    static const unsigned char sizes[32] = {[1] = 8, [2] = 4, [3] = 8, [4] = 8, [6] = 1, [7] = 8, [8] = 1, [9] = 4,
                                            [10] = 1, [11] = 8, [12] = 8, [13] = 1, [14] = 8, [17] = 8};
    bool known;
    for (unsigned i = 0; i < n; i++) {
        if (which[i] < 1 || which[i] > 31 || !sizes[which[i]]) return FAKE_INVALID_VALUE;
        if (attribute(data[i], which[i], p, &known) == FAKE_OK) continue;
        memset(data[i], 0, sizes[which[i]]);
        if (which[i] == 9) *(int *)data[i] = -2;
    }
    return FAKE_OK;
}

/* Copies of the null stream: after all that was queued. */
static CUresult copy(void *to, const void *from, size_t n)
{
    CUresult result = fake_sync_all();
    if (!result && n) memmove(to, from, n);
    return result;
}
API(cuMemcpy, (CUdeviceptr to, CUdeviceptr from, size_t n), (to, from, n)) { return copy((void *)to, (void *)from, n); }
API(cuMemcpyHtoD_v2, (CUdeviceptr to, const void *from, size_t n), (to, from, n)) { return copy((void *)to, from, n); }
API(cuMemcpyDtoH_v2, (void *to, CUdeviceptr from, size_t n), (to, from, n)) { return copy(to, (void *)from, n); }
API(cuMemcpyDtoD_v2, (CUdeviceptr to, CUdeviceptr from, size_t n), (to, from, n))
{
    return copy((void *)to, (void *)from, n);
}
API(cuMemsetD8_v2, (CUdeviceptr to, unsigned char v, size_t n), (to, v, n))
{
    CUresult result = fake_sync_all();
    if (!result) memset((void *)to, v, n);
    return result;
}
API(cuMemsetD32_v2, (CUdeviceptr to, unsigned v, size_t n), (to, v, n))
{
    CUresult result = fake_sync_all();
    for (size_t i = 0; !result && i < n; i++) ((unsigned *)to)[i] = v;
    return result;
}
