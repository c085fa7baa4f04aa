/* idmap.h - the ids that a client chose, each to the object it stands for.
 *
 * A session owns one map for its buffers and one for its plans; the map owns only its slots, never the objects. Open
 * addressing with linear probing: a client that picks colliding ids only slows its own look-ups, and its quota bounds
 * by how much. Id 0 is never in a map. */
#ifndef MLAD_IDMAP_H
#define MLAD_IDMAP_H

#include <stdbool.h>
#include <stdint.h>

struct mlad_idslot {
    uint32_t id; /* 0: empty */
    void *object;
};

/* All zero is an empty map. */
struct mlad_idmap {
    struct mlad_idslot *slots;
    uint32_t capacity; /* a power of two, or 0 */
    uint32_t count;
};

void mlad_idmap_deinit(struct mlad_idmap *map);

void *mlad_idmap_get(const struct mlad_idmap *map, uint32_t id);

/* Add an id that is not there yet. False: no memory, and the map is as it was. */
bool mlad_idmap_put(struct mlad_idmap *map, uint32_t id, void *object);

/* Remove and return; NULL if it is not there. */
void *mlad_idmap_take(struct mlad_idmap *map, uint32_t id);

/* Visit every object: start with *position 0, until NULL. The map must not change meanwhile. */
void *mlad_idmap_next(const struct mlad_idmap *map, uint32_t *position);

#endif
