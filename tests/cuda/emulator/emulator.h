/* emulator.h - runs the kernels of kernels/cuda on a processor, so that their arithmetic, masks and bounds are tested
 * where there is no GPU. The sources are the same; only mlak_ptx.cuh's instructions are replaced (emulated_ptx.h).
 *
 * What it shows: results, and every address that a kernel uses (accesses outside dynamic shared memory abort; client
 * memory is as protected as its owner made it; cp.async copies land only when they are waited for; shared memory of a
 * new block holds NaN). What it cannot show: speed, data races between warps, and the assembler's view of the
 * instructions. */
#ifndef EMULATOR_H
#define EMULATOR_H

#include <stdbool.h>
#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Run `kernel` ("mlak_cuda_prepare") with `grid` blocks of `block` threads, one block after the other, to the end.
 * `job` is a struct mlak_cuda_job. False: there is no such kernel. From any thread; one at a time runs. Aborts, with a
 * sentence on stderr, where a GPU would fault or hang. */
bool mlak_emulate(const char *kernel, unsigned grid, unsigned block, size_t shared_bytes, const void *job);

/* Whether there is such a kernel. */
bool mlak_emulates(const char *kernel);

#ifdef __cplusplus
}
#endif

#endif
