/* Decoding without memory: an error of its own, and nothing leaked. msgpack-c's allocator is replaced by one that can
 * fail. */
#include "cmocka_all.h"
#include "mlap.h"

#include <msgpack.h>
#include <stdlib.h>
#include <string.h>

static long allowed;   /* allocations until they fail */
static bool refused;

static bool refuse(void)
{
    refused = refused || allowed == 0;
    return allowed-- <= 0;
}

/* These two are what msgpack-c's unpacker gets its memory from; the program's own stand before the library's. */
__attribute__((visibility("default"))) msgpack_zone *msgpack_zone_new(size_t chunk_size)
{
    msgpack_zone *zone = refuse() ? NULL : malloc(sizeof *zone);
    if (zone != NULL && (refuse() || !msgpack_zone_init(zone, chunk_size))) {
        free(zone);
        return NULL;
    }
    return zone;
}

__attribute__((visibility("default"))) void *msgpack_zone_malloc_expand(msgpack_zone *zone, size_t size)
{
    msgpack_zone_chunk_list *list = &zone->chunk_list;
    struct msgpack_zone_chunk { struct msgpack_zone_chunk *next; } *chunk;
    if (refuse() || (chunk = malloc(sizeof *chunk + size)) == NULL)
        return NULL;
    /* The rest of the current chunk is given up, as in the library. */
    chunk->next = (void *)list->head;
    list->head = (void *)chunk;
    list->ptr = (char *)(chunk + 1) + size;
    list->free = 0;
    return chunk + 1;
}

static void each_allocation_may_fail(void **state)
{
    (void)state;
    static char bytes[MLAP_MAX_MESSAGE];
    static union mlap_body body;
    static struct mlap_capabilities_reply reply = {.device = "cpu", .n_rows = MLAP_MAX_CAPABILITIES};
    for (size_t i = 0; i < MLAP_MAX_CAPABILITIES; i++)
        reply.rows[i] = (struct mlap_capability){.variant = "v", .max_heads = 1, .max_q_len = 1, .max_page_size = 1};
    long length = mlap_encode(bytes, sizeof bytes, MLAP_CAPABILITIES_REPLY, 5, &reply);
    assert_true(length > 0);
    long failures = 0;
    do {
        struct mlap_header header;
        struct mlap_fault fault;
        allowed = failures;
        refused = false;
        enum mlap_code code = mlap_decode(bytes, (size_t)length, &header, &body, &fault);
        assert_int_equal(code, refused ? MLAP_code_MEMORY : MLAP_code_OK);
        failures += refused;
    } while (refused);
    assert_true(failures > 5);
    assert_int_equal(body.capabilities_reply_.n_rows, MLAP_MAX_CAPABILITIES);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(each_allocation_may_fail)};
    return cmocka_run_group_tests_name("memory", tests, NULL, NULL);
}
