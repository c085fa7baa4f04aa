/* cpu_avx2.c - the cpu backend for AVX2, FMA and F16C: the path of cpu_lanes.h in vectors of eight floats. */
#define CPU_WIDTH 8
#include "cpu_lanes.h"

const struct cpu_path mlak_cpu_avx2 = {
    .tile = CPU_TILE_FP32, .pad = 8, .key_ns = 400,
    .pack = lanes_pack, .tile_step = lanes_tile_step, .merge = lanes_merge, .finish = lanes_finish,
};
