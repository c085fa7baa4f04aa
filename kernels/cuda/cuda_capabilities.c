/* cuda_capabilities.c - what every GPU that the cuda backend opens can do. In each build, also in one without kernels,
 * so that the documentation drawn from it is the same. */
#include "mlak_backends.h"

void mlak_cuda_capabilities(struct mlak_capability rows[MLAK_CONTRACT_ROWS])
{
    mlak_whole_contract(rows, "mma");
}
