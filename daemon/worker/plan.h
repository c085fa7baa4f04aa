/* plan.h - a descriptor that has passed every check: what runs, in which memory.
 *
 * Made from the wire's descriptor and the session's buffers. Its mlak_batch has resolved pointers, and every tensor
 * lies inside its buffer, is aligned, and no output shares a byte with an input or the other output. It keeps a
 * reference to each of its buffers, so the pointers hold as long as the plan does. References to the plan: its id, if
 * it has one, and each decode of it in flight. Loop thread only, except that a launch thread reads what `batch`
 * points to while a decode of it runs. */
#ifndef MLAD_PLAN_H
#define MLAD_PLAN_H

#include "buffer.h"
#include "idmap.h"
#include "mlak.h"

struct mlad_plan {
    struct mlak_batch batch;
    struct mlad_buffer *buffers[MLAK_T_COUNT]; /* NULL: the batch has no such tensor */
    uint64_t offsets[MLAK_T_COUNT], lengths[MLAK_T_COUNT]; /* bytes, in those buffers */
    uint32_t id;                               /* 0: a DECODE's, used once */
    uint32_t refs;
};

struct mlad_capabilities {
    const struct mlak_capability *rows;
    size_t count;
};

/* Validate. `buffers` maps ids to struct mlad_buffer. The new plan has one reference. */
enum mlap_code mlad_plan_new(const struct mlap_batch *wire, uint32_t id, const struct mlad_idmap *buffers,
                             const struct mlad_capabilities *capabilities, struct mlad_plan **plan,
                             struct mlap_fault *fault);

void mlad_plan_ref(struct mlad_plan *plan);
void mlad_plan_unref(struct mlad_plan *plan);

bool mlad_plan_names(const struct mlad_plan *plan, const struct mlad_buffer *buffer);

/* Whether one writes what the other reads or writes, so that their decodes must run in order, not together. */
bool mlad_plan_depends(const struct mlad_plan *a, const struct mlad_plan *b);

#endif
