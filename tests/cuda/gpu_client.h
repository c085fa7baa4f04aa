/* gpu_client.h - what the clients of tests/daemon's GPU tests share: checks that end the program, the driver's functions
 * by name, and the batch that they decode. */
#ifndef GPU_CLIENT_H
#define GPU_CLIENT_H

#include "../require.h"
#include "fake/fake_cuda.h"
#include "mla.h"

#include <dlfcn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { HEADS = 4, ROWS = 4, PAGES = 8, PAGE = 64, COLUMNS = 4 };

/* Call a function of the driver that must succeed. */
#define CU(name, types, ...)                                                                                           \
    do {                                                                                                               \
        CUresult(*name##_) types;                                                                                      \
        *(void **)(void *)&name##_ = dlsym(dlopen("libcuda.so.1", RTLD_NOW), #name);                                   \
        REQUIRE(name##_, "the driver has no " #name);                                                                  \
        CUresult result_ = name##_(__VA_ARGS__);                                                                       \
        if (result_ != 0) {                                                                                            \
            fprintf(stderr, "%d: %s: %d\n", __LINE__, #name, result_);                                                 \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

/* The primary context of a GPU becomes the thread's. */
static inline void use_gpu(int ordinal)
{
    CUcontext context;
    CU(cuInit, (unsigned), 0);
    CU(cuDevicePrimaryCtxRetain, (CUcontext *, int), &context, ordinal);
    CU(cuCtxSetCurrent, (CUcontext), context);
}

/* bf16 between -1 and 1. */
static inline void draw(uint16_t *values, size_t count, uint32_t *state)
{
    for (size_t i = 0; i < count; i++) {
        *state = *state * 1664525 + 1013904223;
        float value = (float)(*state >> 8) / (1 << 23) - 1;
        uint32_t bits;
        memcpy(&bits, &value, sizeof bits);
        values[i] = (uint16_t)(bits >> 16);
    }
}

/* Two requests in 8 pages of 64; tensors are the caller's to name. */
static inline void shape_batch(mla_batch *batch)
{
    mla_batch_init(batch);
    batch->batch = 2;
    batch->heads = HEADS;
    batch->q_rows = ROWS;
    batch->pages = PAGES;
    batch->page_size = PAGE;
    batch->max_pages = COLUMNS;
    batch->softmax_scale = 1 / sqrt(192);
}

#endif
