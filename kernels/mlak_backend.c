/* mlak_backend.c - the table of backends, and the capability table of those that implement the whole contract. */
#include "mlak_backends.h"

#include <string.h>

const struct mlak_backend *mlak_backend(const char *name)
{
    const struct mlak_backend *const backends[] = {&mlak_cpu_backend, &mlak_reference_backend};
    for (unsigned i = 0; i < sizeof backends / sizeof backends[0]; i++)
        if (strcmp(backends[i]->name, name) == 0)
            return backends[i];
    return strncmp(name, "GPU-", 4) == 0 ? &mlak_cuda_backend : NULL;
}

enum mlak_code mlak_launch_batch(const struct mlak_backend *backend, struct mlak_device *device,
                                 const struct mlak_batch *batch, uint32_t first, uint32_t count, struct mlak_row *rows,
                                 struct mlak_fault *fault)
{
    struct mlak_part part = {.batch = batch, .first = first, .count = count, .rows = rows};
    enum mlak_code code = backend->launch_batches(device, 0, &part, 1, false, fault);
    if (code != MLAK_OK || part.code == MLAK_OK)
        return code;
    if (fault)
        *fault = part.fault;
    return part.code;
}

void mlak_whole_contract(struct mlak_capability rows[MLAK_CONTRACT_ROWS], const char *variant)
{
    static const struct { enum mlak_dtype q; enum mlak_kv_format kv; enum mlak_dtype out; } types[] = {
        {MLAK_BF16, MLAK_KV_BF16, MLAK_BF16},     {MLAK_FP16, MLAK_KV_FP16, MLAK_FP16},
        {MLAK_E4M3, MLAK_KV_E4M3, MLAK_BF16},     {MLAK_E4M3, MLAK_KV_E4M3, MLAK_FP16},
        {MLAK_BF16, MLAK_KV_E4M3, MLAK_BF16},     {MLAK_BF16, MLAK_KV_E4M3_656, MLAK_BF16},
    };
    _Static_assert(sizeof types / sizeof types[0] * MLAK_MASK_COUNT == MLAK_CONTRACT_ROWS,
                   "rows of the whole contract");
    for (unsigned i = 0; i < MLAK_CONTRACT_ROWS; i++)
        rows[i] = (struct mlak_capability){
            .variant = variant,
            .q_dtype = types[i / MLAK_MASK_COUNT].q,
            .kv_format = types[i / MLAK_MASK_COUNT].kv,
            .out_dtype = types[i / MLAK_MASK_COUNT].out,
            .mask = (enum mlak_mask)(i % MLAK_MASK_COUNT),
            .max_heads = MLAK_MAX_HEADS,
            .max_q_len = MLAK_MAX_Q,
            .max_page_size = MLAK_MAX_PAGE,
            .features = MLAK_CAN_ALL,
        };
}
