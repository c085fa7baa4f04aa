/* mlak_backends.h - the backends of this build, one object each, and what they share. For kernels/ only: others ask
 * mlak_backend() by name. */
#ifndef MLAK_BACKENDS_H
#define MLAK_BACKENDS_H

#include "mlak.h"

extern const struct mlak_backend mlak_reference_backend;    /* mlak_reference.c */
extern const struct mlak_backend mlak_cpu_backend;          /* cpu/ */

extern const struct mlak_backend mlak_cuda_backend;         /* cuda/, every GPU's */

/* The contract's rows: every combination of element types with every mask. */
enum { MLAK_CONTRACT_ROWS = 18 };

/* Fill the capability table of a backend that refuses nothing; `variant` stays the caller's. */
void mlak_whole_contract(struct mlak_capability rows[MLAK_CONTRACT_ROWS], const char *variant);

/* cuda_capabilities.c: the table of every GPU that the cuda backend opens. */
void mlak_cuda_capabilities(struct mlak_capability rows[MLAK_CONTRACT_ROWS], bool wgmma);

#endif
