/* idmap.c - see idmap.h. At most three quarters of the slots are in use, so every probe ends. */
#include "idmap.h"

#include <stdlib.h>

static uint32_t home(const struct mlad_idmap *map, uint32_t id)
{
    return (id * UINT32_C(2654435769) ^ id >> 15) & (map->capacity - 1);
}

/* The slot that holds `id`, or the empty one where it would go. */
static struct mlad_idslot *find(const struct mlad_idmap *map, uint32_t id)
{
    uint32_t at = home(map, id);
    while (map->slots[at].id != 0 && map->slots[at].id != id)
        at = (at + 1) & (map->capacity - 1);
    return &map->slots[at];
}

static bool grow(struct mlad_idmap *map)
{
    struct mlad_idmap larger = {.capacity = map->capacity ? map->capacity * 2 : 16, .count = map->count};
    larger.slots = calloc(larger.capacity, sizeof *larger.slots);
    if (!larger.slots)
        return false;
    for (uint32_t i = 0; i < map->capacity; i++) {
        if (map->slots[i].id)
            *find(&larger, map->slots[i].id) = map->slots[i];
    }
    free(map->slots);
    *map = larger;
    return true;
}

void mlad_idmap_deinit(struct mlad_idmap *map)
{
    free(map->slots);
    *map = (struct mlad_idmap){0};
}

void *mlad_idmap_get(const struct mlad_idmap *map, uint32_t id)
{
    if (map->count == 0 || id == 0)
        return NULL;
    return find(map, id)->object;
}

bool mlad_idmap_put(struct mlad_idmap *map, uint32_t id, void *object)
{
    if (map->count + 1 > map->capacity / 4 * 3 && !grow(map))
        return false;
    *find(map, id) = (struct mlad_idslot){.id = id, .object = object};
    map->count++;
    return true;
}

void *mlad_idmap_take(struct mlad_idmap *map, uint32_t id)
{
    if (!mlad_idmap_get(map, id))
        return NULL;
    struct mlad_idslot *hole = find(map, id);
    void *object = hole->object;
    uint32_t mask = map->capacity - 1;
    uint32_t at = (uint32_t)(hole - map->slots);
    uint32_t empty = at;
    /* Close the gap: move back each follower whose home does not lie behind the gap. */
    for (;;) {
        at = (at + 1) & mask;
        if (map->slots[at].id == 0)
            break;
        if (((at - home(map, map->slots[at].id)) & mask) >= ((at - empty) & mask)) {
            map->slots[empty] = map->slots[at];
            empty = at;
        }
    }
    map->slots[empty] = (struct mlad_idslot){0};
    map->count--;
    return object;
}

void *mlad_idmap_next(const struct mlad_idmap *map, uint32_t *position)
{
    while (*position < map->capacity) {
        const struct mlad_idslot *slot = &map->slots[(*position)++];
        if (slot->id)
            return slot->object;
    }
    return NULL;
}
