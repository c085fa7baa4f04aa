/* memory.h - ranges: what is allocated, mapped or registered in this process. */
#ifndef FAKE_MEMORY_H
#define FAKE_MEMORY_H

#include "fake_cuda.h"

enum fake_kind {
    FAKE_LEGACY, FAKE_POOL, FAKE_MANAGED, FAKE_MAPPED, FAKE_IMPORT, FAKE_HOST, FAKE_REGISTERED, FAKE_RESERVED
};

struct fake_range {
    struct fake_range *next;
    uint64_t base, size, id;
    enum fake_kind kind;
    int device, fd;              /* fd: of the memory, or -1 */
    unsigned refs;               /* of an import */
    int owner;                   /* pid of the exporter of an import */
    uint64_t owner_id;
    struct fake_physical *physical; /* of FAKE_MAPPED */
    int handles;                    /* of it: the types it may be exported as */
};

extern pthread_mutex_t fake_memory_lock; /* over the functions below */
struct fake_range *fake_find(uint64_t address, bool reserved);
struct fake_range *fake_add(enum fake_kind kind, uint64_t base, size_t size, int device, int fd);
void fake_drop(struct fake_range *range);
int fake_memory_file(size_t size, uint64_t id);     /* -1: none */
void fake_file_path(char *out, size_t room, int pid, uint64_t id, int fd);
struct fake_range *fake_ranges(void);              /* the newest */
uint64_t fake_next_id(void);
void *fake_map(int fd, size_t size, int protection); /* NULL: failed; fd -1: only reserves */
bool fake_charge(size_t size, int device);          /* false: more than memory= */
void fake_discharge(size_t size, int device);

#endif
