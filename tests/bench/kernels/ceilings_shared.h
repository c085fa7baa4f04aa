/* ceilings_shared.h - what ceilings.cu and ceilings.c agree on. */
#ifndef COMPARE_CEILINGS_SHARED_H
#define COMPARE_CEILINGS_SHARED_H

enum {
    CEILING_TILE = 16384,       /* bytes of a bulk copy */
    CEILING_TILES = 13,         /* in flight in a block */
    CEILING_READ_SHARED = CEILING_TILE * CEILING_TILES + 1024,
    CEILING_MATMUL_THREADS = 256,
    CEILING_MATMUL_SHARED = 2 * 8192 + 32768 + 1024, /* A [2][64, 64], B [256, 64], and room to align them */
    CEILING_MATMULS = 16        /* m64n256k16 of a warpgroup in each round */
};

#endif
