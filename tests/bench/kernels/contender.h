/* contender.h - the two that are compared: our backend, and a peer's library. Both decode the same work; each has a set
 * of outputs of its own. */
#ifndef COMPARE_CONTENDER_H
#define COMPARE_CONTENDER_H

#include "gpu.h"
#include "peer.h"
#include "work.h"

struct contender {
    /* Get ready for a shape. `calls`: in a graph, at least the copies of the KV; taken in turn. */
    enum mlak_code (*begin)(struct contender *self, struct work *work, uint32_t calls, struct mlak_fault *fault);
    /* Decode the first copy, to the end. */
    enum mlak_code (*decode)(struct contender *self, struct mlak_fault *fault);
    /* `calls` decodes one behind the other, `rounds` times: nanoseconds on the device. */
    enum mlak_code (*back_to_back)(struct contender *self, uint32_t rounds, double *ns, struct mlak_fault *fault);
    /* The same of decodes that are layers of one step, prepared before. NULL: those of back_to_back are. */
    enum mlak_code (*layers)(struct contender *self, uint32_t rounds, double *ns, struct mlak_fault *fault);
    /* One decode of a copy on an idle device, launched without a graph: nanoseconds until the host knows its end. */
    enum mlak_code (*alone)(struct contender *self, uint32_t copy, double *ns, struct mlak_fault *fault);
    /* What is done once a step, back to back: nanoseconds of one. NULL: not to be told apart, and in every decode. */
    enum mlak_code (*prepare)(struct contender *self, double *ns, struct mlak_fault *fault);
    void (*end)(struct contender *self); /* after begin, whether that succeeded or not */
};

struct ours {
    struct contender contender;
    struct gpu *gpu;
    const struct mlak_backend *backend;
    struct mlak_device *device;
    struct work *work;
    uint32_t calls;
    struct mlak_batch *batches; /* [calls] */
    struct mlak_row *rows;      /* [batch] */
};
void ours_init(struct ours *ours, struct gpu *gpu, const struct mlak_backend *backend, struct mlak_device *device);

struct peer {
    struct contender contender;
    struct gpu *gpu;
    const struct mlad_peer *library;
    struct work *work;
    void *self; /* the library's */
    struct gpu_calls decodes;
};
/* Load a library, which stays loaded. MLAK_OK, or INVALID with what is wrong with it. */
enum mlak_code peer_init(struct peer *peer, struct gpu *gpu, const char *path, struct mlak_fault *fault);

#endif
