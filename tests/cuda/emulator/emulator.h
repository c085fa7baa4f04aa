/* emulator.h - runs the kernels of kernels/cuda on a processor, so that their arithmetic, masks and bounds are tested
 * where there is no GPU. The sources are the same; only the instructions of mlak_ptx.cuh and mlak_ptx_sm90.cuh are
 * replaced (emulated_ptx.h, emulated_ptx_sm90.h).
 *
 * What it shows: results, and every address that a kernel uses (accesses outside dynamic shared memory abort; client
 * memory is as protected as its owner made it; copies land only when they are waited for, and a warpgroup's products
 * are computed then; shared memory of a new block holds NaN); and who waits for whom, where all wait; in disorder, also
 * most hand-overs that hold by the order of turns alone. What it cannot show: speed, most missing fences, and the
 * assembler's view of the instructions. */
#ifndef EMULATOR_H
#define EMULATOR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct mlak_batch;
struct mlak_cuda_map;

/* What a tensor map holds here, in its first words: a batch's keys as struct mlak_cuda_job says. Strides in bytes. */
struct emulated_map {
    uint64_t kv, row_stride, page_stride, page_size, pages, box_rows, box_chunks;
};

#ifdef __cplusplus
extern "C" {
#endif

/* Run `kernel` ("mlak_cuda_prepare") with `grid` blocks of `block` threads, one block after the other, to the end.
 * `job` is a struct mlak_cuda_job. False: there is no such kernel. From any thread; one at a time runs. Aborts, with a
 * sentence on stderr, where a GPU would fault or hang. */
bool mlak_emulate(const char *kernel, unsigned grid, unsigned block, size_t shared_bytes, const void *job);

/* Whether there is such a kernel. */
bool mlak_emulates(const char *kernel);

/* Kernels that wait for other processes, the gates of stream order: bytes of its parameter, 0 if it is none of them; and
 * run it, on this thread and beside all else. False: there is no such kernel. */
size_t mlak_emulated_alone(const char *kernel);
bool mlak_emulate_alone(const char *kernel, const void *parameter);

/* From now on kernels run in disorder, another one with each seed: before and after each wait and arrival a thread may
 * give way, some warpgroups sit out most turns for a while, warps and lanes take turns in any order, copies land at any
 * time and in any order that is theirs, and products are computed as early or as late as can be. 0: in order again. */
void mlak_emulate_disorder(uint64_t seed);

/* The map of a batch's keys, for boxes of `rows` rows of `chunks` chunks. */
void emulated_map(struct mlak_cuda_map *map, const struct mlak_batch *batch, uint32_t rows, uint32_t chunks);

#ifdef __cplusplus
}
#endif

#endif
