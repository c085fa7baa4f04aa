/* discovery.h - which GPUs the device "all" stands for.
 *
 * The supervisor never loads a driver: it asks `mlad-worker --list` and awaits the answer for a limited time, while
 * its own loop turns. A list that fails, hangs or names nobody is an answer like any other, with its reason. */
#ifndef MLAD_DISCOVERY_H
#define MLAD_DISCOVERY_H

#include "config.h"

#include <stdbool.h>
#include <uv.h>

/* What `mlad-worker --list` exits with where there is no driver or no GPU; stderr says which. */
enum { MLAD_NO_GPU_STATUS = 4 };

struct mlad_discovered {
    uint32_t total; /* GPUs in the list; those beyond MLAD_CONFIG_DEVICES are only counted */
    struct {
        char device[64];
        char model[96];
    } gpu[MLAD_CONFIG_DEVICES];
    char why[256]; /* total is 0: a sentence, printable ASCII */
    bool failed;   /* there was no list: not the same as a machine without a GPU */
};

struct mlad_discovery {
    uv_process_t process;
    uv_timer_t limit;
    int list, complaints; /* where its stdout and stderr can be read */
    uint64_t limit_ms;
    bool asked, runs; /* the answer is owed; there is a process */
    void (*answer)(const struct mlad_discovered *discovered, void *owner);
    void *owner;
};

/* Ask. `answer` is called once, during this call or later, unless mlad_discovery_stop comes before. */
void mlad_discovery_start(struct mlad_discovery *discovery, uv_loop_t *loop, const char *executable, uint64_t limit_ms,
                          void (*answer)(const struct mlad_discovered *discovered, void *owner), void *owner);

/* Forget it, so that the loop can end. Also for one that was never started (zeros) or has answered. */
void mlad_discovery_stop(struct mlad_discovery *discovery);

/* Whether "all" is among the names. */
bool mlad_wants_all(const struct mlad_names *wanted);

/* `wanted` with cpu and the GPUs in the place of "all", nothing twice. Devices that are named have a place for sure;
 * returns the number of GPUs for which none is left. */
uint32_t mlad_discovery_expand(const struct mlad_names *wanted, const struct mlad_discovered *discovered,
                               struct mlad_names *served);

#endif
