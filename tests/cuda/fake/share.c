/* share.c - memory of other processes: legacy IPC handles and the virtual memory functions.
 * A legacy handle names the exporter's memfd through /proc (or its file); once opened it outlives the exporter.
 * The memfd of a VMM allocation has its device in its name; what is refused is as by a real driver (580.159, H100). */
#include "memory.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

struct ipc { uint64_t magic, id, size; int pid, fd; };
struct fake_physical { struct fake_physical *next; int fd, device, refs, handles; size_t size; };

static const uint64_t MAGIC = 0x4d4c414446414b45;
static const size_t GRANULE = 2 << 20;
static struct fake_physical *physicals; /* refs: handles and mappings */

#define LOCK() pthread_mutex_lock(&fake_memory_lock)
#define UNLOCK() pthread_mutex_unlock(&fake_memory_lock)

API(cuIpcGetMemHandle, (CUipcMemHandle *out, CUdeviceptr p), (out, p))
{
    LOCK();
    struct fake_range *r = fake_find(p, false);
    bool ok = r && r->kind == FAKE_LEGACY;
    struct ipc ipc = {.magic = MAGIC, .pid = (int)getpid()};
    if (ok) ipc.id = r->id, ipc.size = r->size, ipc.fd = r->fd;
    UNLOCK();
    memset(out, 0, sizeof *out);
    memcpy(out, &ipc, sizeof ipc);
    return ok ? FAKE_OK : FAKE_INVALID_VALUE;
}
static struct fake_range *find_import(const struct ipc *ipc);
API(cuIpcOpenMemHandle_v2, (CUdeviceptr *out, CUipcMemHandle handle, unsigned flags), (out, handle, flags))
{
    struct ipc ipc;
    char path[4096];
    struct stat st;
    memcpy(&ipc, &handle, sizeof ipc);
    if (fake_current_device() < 0) return FAKE_INVALID_CONTEXT;
    if (flags > 1 || ipc.magic != MAGIC) return FAKE_INVALID_VALUE;
    if (ipc.pid == getpid() && !fake_settings().own_ipc) return FAKE_INVALID_CONTEXT;
    LOCK();
    struct fake_range *r = find_import(&ipc);
    if (r) r->refs++;
    else {
        fake_file_path(path, sizeof path, ipc.pid, ipc.id, ipc.fd);
        int fd = open(path, O_RDWR | O_CLOEXEC);
        bool whole = fd >= 0 && fstat(fd, &st) == 0 && (uint64_t)st.st_size == ipc.size;
        void *at = whole ? fake_map(fd, ipc.size, PROT_READ | PROT_WRITE) : NULL;
        if (fd >= 0) close(fd);
        if (at && (r = fake_add(FAKE_IMPORT, (uint64_t)at, ipc.size, fake_current_device(), -1)))
            r->owner = ipc.pid, r->owner_id = ipc.id;
    }
    if (r) *out = r->base;
    UNLOCK();
    return r ? FAKE_OK : FAKE_INVALID_VALUE;
}
static struct fake_range *find_import(const struct ipc *ipc)
{
    for (struct fake_range *r = fake_ranges(); r; r = r->next)
        if (r->kind == FAKE_IMPORT && r->owner == ipc->pid && r->owner_id == ipc->id) return r;
    return NULL;
}
API(cuIpcCloseMemHandle, (CUdeviceptr p), (p))
{
    LOCK();
    struct fake_range *r = fake_find(p, false);
    bool ok = r && r->kind == FAKE_IMPORT && r->base == p;
    if (ok && --r->refs == 0) munmap((void *)r->base, r->size), fake_drop(r);
    UNLOCK();
    return ok ? FAKE_OK : FAKE_INVALID_VALUE;
}

/* With the lock. */
static struct fake_physical *physical_new(int fd, size_t size, int device, int handles)
{
    struct fake_physical *p = calloc(1, sizeof *p);
    if (p) *p = (struct fake_physical){.next = physicals, .fd = fd, .device = device, .refs = 1,
                                         .handles = handles, .size = size}, physicals = p;
    return p;
}
static struct fake_physical *known(CUhandle h)
{
    for (struct fake_physical *p = physicals; p; p = p->next)
        if ((CUhandle)(uintptr_t)p == h) return p;
    return NULL;
}
static void unref(struct fake_physical *p)
{
    struct fake_physical **at = &physicals;
    if (--p->refs) return;
    while (*at != p) at = &(*at)->next;
    *at = p->next;
    close(p->fd);
    free(p);
}

API(cuMemGetAllocationGranularity, (size_t *out, const CUmemAllocationProp *prop, int option), (out, prop, option))
{
    return (void)option, prop ? (*out = GRANULE, FAKE_OK) : FAKE_INVALID_VALUE;
}
API(cuMemAddressReserve, (CUdeviceptr *out, size_t size, size_t alignment, CUdeviceptr hint, uint64_t flags),
    (out, size, alignment, hint, flags))
{
    (void)alignment, (void)hint;
    if (!size || size % GRANULE || flags) return FAKE_INVALID_VALUE;
    LOCK();
    void *at = fake_map(-1, size, PROT_NONE);
    bool ok = at && fake_add(FAKE_RESERVED, (uint64_t)at, size, 0, -1);
    UNLOCK();
    return ok ? (*out = (CUdeviceptr)at, FAKE_OK) : FAKE_OUT_OF_MEMORY;
}
API(cuMemAddressFree, (CUdeviceptr p, size_t size), (p, size))
{
    LOCK();
    struct fake_range *r = fake_find(p, true);
    bool ok = r && r->base == p && r->size == size && !fake_find(p, false);
    if (ok) munmap((void *)p, size), fake_drop(r);
    UNLOCK();
    return ok ? FAKE_OK : FAKE_INVALID_VALUE;
}
API(cuMemCreate, (CUhandle *out, size_t size, const CUmemAllocationProp *prop, uint64_t flags),
    (out, size, prop, flags))
{
    if (!size || size % GRANULE || flags || !prop || prop->type != 1 || prop->location.type != 1)
        return FAKE_INVALID_VALUE;
    if (size > fake_settings().memory) return FAKE_OUT_OF_MEMORY;
    char name[32];
    snprintf(name, sizeof name, "fake_cuda.%d", prop->location.id);
    int fd = memfd_create(name, MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, (off_t)size) != 0) return FAKE_OUT_OF_MEMORY;
    LOCK();
    *out = (CUhandle)(uintptr_t)physical_new(fd, size, prop->location.id, prop->handles);
    UNLOCK();
    return FAKE_OK;
}
API(cuMemRelease, (CUhandle h), (h))
{
    LOCK();
    struct fake_physical *p = known(h);
    if (p) unref(p);
    UNLOCK();
    return p ? FAKE_OK : FAKE_INVALID_VALUE;
}
API(cuMemMap, (CUdeviceptr at, size_t size, size_t offset, CUhandle h, uint64_t flags), (at, size, offset, h, flags))
{
    LOCK();
    struct fake_physical *p = known(h);
    struct fake_range *r = fake_find(at, true), *m = NULL;
    if (p && size != p->size) { UNLOCK(); return FAKE_NOT_SUPPORTED; }
    bool ok = p && r && !offset && !flags && size <= r->size - (at - r->base) && !fake_find(at, false) &&
              mmap((void *)at, size, PROT_NONE, MAP_SHARED | MAP_FIXED, p->fd, 0) != MAP_FAILED;
    if (ok && (m = fake_add(FAKE_MAPPED, at, size, p->device, -1))) m->physical = p, m->handles = p->handles, p->refs++;
    UNLOCK();
    return m ? FAKE_OK : FAKE_INVALID_VALUE;
}
/* With the lock: is it one mapping after another, each whole? */
static bool whole_mappings(uint64_t at, size_t size)
{
    while (size) {
        struct fake_range *r = fake_find(at, false);
        if (!r || r->kind != FAKE_MAPPED || r->base != at || r->size > size) return false;
        at += r->size, size -= r->size;
    }
    return true;
}
API(cuMemUnmap, (CUdeviceptr at, size_t size), (at, size))
{
    LOCK();
    bool ok = whole_mappings(at, size);
    while (ok && size) {
        struct fake_range *r = fake_find(at, false);
        mmap((void *)at, r->size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
        unref(r->physical);
        at += r->size, size -= r->size;
        fake_drop(r);
    }
    UNLOCK();
    return ok ? FAKE_OK : FAKE_INVALID_VALUE;
}
API(cuMemSetAccess, (CUdeviceptr at, size_t size, const CUmemAccessDesc *d, size_t n), (at, size, d, n))
{
    LOCK();
    bool ok = size && d && n && whole_mappings(at, size);
    int protection = !ok || !d[0].flags ? PROT_NONE : d[0].flags == 1 ? PROT_READ : PROT_READ | PROT_WRITE;
    if (ok) ok = mprotect((void *)at, size, protection) == 0;
    UNLOCK();
    return ok ? FAKE_OK : FAKE_INVALID_VALUE;
}
API(cuMemExportToShareableHandle, (void *out, CUhandle h, int type, uint64_t flags), (out, h, type, flags))
{
    LOCK();
    struct fake_physical *p = known(h);
    int fd = p && type == 1 && p->handles & type && !flags ? fcntl(p->fd, F_DUPFD_CLOEXEC, 3) : -1;
    UNLOCK();
    return fd < 0 ? FAKE_INVALID_VALUE : (*(int *)out = fd, FAKE_OK);
}
API(cuMemImportFromShareableHandle, (CUhandle *out, void *os, int type), (out, os, type))
{
    struct stat st;
    char path[64], file[64] = "";
    int device;
    int fd = type == 1 ? fcntl((int)(intptr_t)os, F_DUPFD_CLOEXEC, 3) : -1;
    if (fd < 0) return FAKE_INVALID_VALUE;
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    bool ours = readlink(path, file, sizeof file - 1) > 0 && sscanf(file, "/memfd:fake_cuda.%d", &device) == 1;
    if (!ours || fstat(fd, &st))
        return close(fd), FAKE_UNKNOWN;
    LOCK();
    *out = (CUhandle)(uintptr_t)physical_new(fd, (size_t)st.st_size, device, type);
    UNLOCK();
    return FAKE_OK;
}
API(cuMemRetainAllocationHandle, (CUhandle *out, void *at), (out, at))
{
    LOCK();
    struct fake_range *r = fake_find((uint64_t)at, false);
    bool ok = r && r->kind == FAKE_MAPPED;
    if (ok) r->physical->refs++, *out = (CUhandle)(uintptr_t)r->physical;
    UNLOCK();
    return ok ? FAKE_OK : FAKE_INVALID_VALUE;
}
API(cuMemGetAllocationPropertiesFromHandle, (CUmemAllocationProp *out, CUhandle h), (out, h))
{
    LOCK();
    struct fake_physical *p = known(h);
    if (p) *out = (CUmemAllocationProp){.type = 1, .handles = p->handles, .location = {1, p->device}};
    UNLOCK();
    return p ? FAKE_OK : FAKE_INVALID_VALUE;
}
