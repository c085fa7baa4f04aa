/* cuda_capabilities.c - what every GPU that the cuda backend opens can do. In each build, also in one without kernels,
 * so that the documentation drawn from it is the same. */
#include "mlak_backends.h"

void mlak_cuda_capabilities(struct mlak_capability rows[MLAK_CONTRACT_ROWS], bool wgmma)
{
    mlak_whole_contract(rows, "mma");
    for (unsigned i = 0; i < MLAK_CONTRACT_ROWS; i++)
        if (wgmma && (rows[i].kv_format == MLAK_KV_BF16 || rows[i].kv_format == MLAK_KV_FP16))
            rows[i].variant = "wgmma";
}
