/* ceilings.h - what a Hopper GPU can do at most, measured: reads of its memory, and matrix products. */
#ifndef COMPARE_CEILINGS_H
#define COMPARE_CEILINGS_H

#include "gpu.h"

struct gpu_ceilings { double read_gbps, tflops; };

/* Both, in about 0.3 s. `memory` of the device is read, `bytes` of it. MLAK_UNSUPPORTED where it is no sm_90. */
enum mlak_code gpu_ceilings_measure(struct gpu_ceilings *ceilings, struct gpu *gpu, const void *memory, uint64_t bytes,
                                    struct mlak_fault *fault);

#endif
