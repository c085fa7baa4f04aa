/* cpu_avx512.c - the cpu backend for AVX-512 (F, BW, DQ, VL): the path of cpu_lanes.h in vectors of sixteen floats. It
 * runs the element types that bf16 products would round, and all of them on a processor without AVX512_BF16. */
#define CPU_WIDTH 16
#include "cpu_lanes.h"

const struct cpu_path mlak_cpu_avx512 = {
    .tile = CPU_TILE_FP32, .pad = 8, .key_ns = 330,
    .pack = lanes_pack, .tile_step = lanes_tile_step, .merge = lanes_merge, .finish = lanes_finish,
};
