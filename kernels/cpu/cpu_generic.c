/* cpu_generic.c - the cpu backend in plain C, for any processor: the path of cpu_lanes.h in vectors of four floats,
 * which the compiler maps to what the baseline has. */
#define CPU_WIDTH 4
#include "cpu_lanes.h"

const struct cpu_path mlak_cpu_generic = {
    .tile = CPU_TILE_FP32, .pad = 8, .key_ns = 1600,
    .pack = lanes_pack, .tile_step = lanes_tile_step, .merge = lanes_merge, .finish = lanes_finish,
};
