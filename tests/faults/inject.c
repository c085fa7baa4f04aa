/* inject - a preloaded library that makes the n-th call of a kind fail, once, in one program.
 *
 * A page in the file $INJECT_PAGE is shared with the test, which sets kind and nth, then armed; the library counts
 * matching calls while armed, fails the nth and sets fired. `live` is the number of allocations not freed yet. Only the
 * program whose name is $INJECT_PROGRAM is touched, so one daemon's supervisor and worker can be told apart. */
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

enum { KIND_MEMORY = 1, KIND_SOCKET = 2 };

struct page {
    uint64_t armed, kind, nth, count, fired;
    int64_t live;
};

static struct page *page;

__attribute__((constructor)) static void attach(void)
{
    const char *path = getenv("INJECT_PAGE"), *program = getenv("INJECT_PROGRAM");
    if (!path || !program || strcmp(program, program_invocation_short_name)) return;
    const int fd = open(path, O_RDWR | O_CLOEXEC);
    void *at = mmap(NULL, sizeof *page, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (at == MAP_FAILED) abort();
    page = at;
}

/* True if this call is the one to fail. */
static int hit(uint64_t kind)
{
    if (!page || !__atomic_load_n(&page->armed, __ATOMIC_ACQUIRE) || page->kind != kind) return 0;
    if (__atomic_add_fetch(&page->count, 1, __ATOMIC_RELAXED) != page->nth) return 0;
    __atomic_store_n(&page->fired, 1, __ATOMIC_RELEASE);
    return 1;
}

/* ---- memory ---- */

extern void *__libc_malloc(size_t size);
extern void *__libc_calloc(size_t count, size_t size);
extern void *__libc_realloc(void *old, size_t size);
extern void *__libc_memalign(size_t alignment, size_t size);
extern void __libc_free(void *memory);

static void *counted(void *memory, int64_t change)
{
    if (memory && page) __atomic_add_fetch(&page->live, change, __ATOMIC_RELAXED);
    return memory;
}
static int no_memory(void)
{
    if (!hit(KIND_MEMORY)) return 0;
    errno = ENOMEM;
    return 1;
}

void *malloc(size_t size) { return no_memory() ? NULL : counted(__libc_malloc(size), 1); }
void *calloc(size_t count, size_t size) { return no_memory() ? NULL : counted(__libc_calloc(count, size), 1); }
void *realloc(void *old, size_t size) { return no_memory() ? NULL : counted(__libc_realloc(old, size), old ? 0 : 1); }
void *aligned_alloc(size_t alignment, size_t size)
{
    return no_memory() ? NULL : counted(__libc_memalign(alignment, size), 1);
}
int posix_memalign(void **memory, size_t alignment, size_t size)
{
    void *at = aligned_alloc(alignment, size);
    if (!at) return ENOMEM;
    *memory = at;
    return 0;
}
void free(void *memory)
{
    counted(memory, -1);
    __libc_free(memory);
}

/* ---- sockets, descriptors and mappings ---- */

#define FAILING(type, name, error, parameters, arguments) \
    type name parameters { \
        static type(*real) parameters; \
        if (hit(KIND_SOCKET)) { errno = (error); return (type)-1; } \
        if (!real) *(void **)&real = dlsym(RTLD_NEXT, #name); \
        return real arguments; \
    }

FAILING(int, socket, EMFILE, (int domain, int type, int protocol), (domain, type, protocol))
FAILING(int, connect, ENOBUFS, (int fd, const struct sockaddr *address, socklen_t length), (fd, address, length))
FAILING(int, accept4, ENFILE, (int fd, struct sockaddr *address, socklen_t *length, int flags),
        (fd, address, length, flags))
FAILING(ssize_t, sendmsg, ENOBUFS, (int fd, const struct msghdr *message, int flags), (fd, message, flags))
FAILING(ssize_t, recvmsg, ENOMEM, (int fd, struct msghdr *message, int flags), (fd, message, flags))
FAILING(ssize_t, send, ENOBUFS, (int fd, const void *bytes, size_t length, int flags), (fd, bytes, length, flags))
FAILING(ssize_t, recv, ENOMEM, (int fd, void *bytes, size_t length, int flags), (fd, bytes, length, flags))
FAILING(int, memfd_create, EMFILE, (const char *name, unsigned flags), (name, flags))
FAILING(int, ftruncate, EIO, (int fd, off_t length), (fd, length))
FAILING(int, fstat, EIO, (int fd, struct stat *status), (fd, status))
FAILING(void *, mmap, ENOMEM, (void *at, size_t length, int protection, int flags, int fd, off_t offset),
        (at, length, protection, flags, fd, offset))
