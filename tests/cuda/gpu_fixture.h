/* gpu_fixture.h - the cuda backend over the fake driver, whose calls fail on demand, for programs of this folder. */
#ifndef GPU_FIXTURE_H
#define GPU_FIXTURE_H

#include "oracle.h"

#define GPU "GPU-fa4e0000-0000-4000-8000-000000000000"

extern const struct mlak_backend *backend;

/* Before and after all tests of a program; `words` as of inject. */
void gpu_fixture_begin(const char *words);
void gpu_fixture_end(void);

/* What goes wrong from now on: words of fake_cuda.h. */
void inject(const char *words);
/* A thread's main function: inject("") soon, and the int is 1 by then. */
void *unhang_soon(void *over);
/* Calls of the driver's function, by its whole name, that have succeeded in this process. */
unsigned succeeded(const char *function);
/* Kernels launched or captured in this process: "mlak_cuda_combine 8 silent", as in the driver's trace. */
unsigned launched(const char *kernel);

/* Fails the running test if it cannot be opened. */
struct mlak_device *open_device(uint64_t *progress);
/* A batch of two requests with 100 and 60 keys, and zeros as its rows. */
struct made *plain(struct mlak_row rows[2]);
void assert_outputs_are_right(struct made *made);

#endif
