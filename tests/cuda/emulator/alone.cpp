/* alone.cpp - kernels of one block that wait for other processes: each runs on its caller's thread, as one thread, and
 * sanitizers may watch it; and publish, by which they know of the other kernels' order with the host. */
#include "emulator.h"

#include <cstddef>
#include <cstring>

#define MLAK_EMULATE
#define MLAC_EMULATE
#include "mlac_gates.cu"
#include "mlak_order.cu"

void publish(uint64_t *pointer, uint64_t value)
{
    __atomic_store_n(pointer, value, __ATOMIC_RELEASE);
}

#define KERNELS(K)                                                                                                     \
    K(mlak_cuda_gate, mlak_cuda_order) K(mlak_cuda_signal, mlak_cuda_order) K(mlac_arm, mlac_gate)                     \
    K(mlac_signal, mlac_gate) K(mlac_gate, mlac_gate)

size_t mlak_emulated_alone(const char *kernel)
{
#define SIZE(name, parameter)                                                                                          \
    if (strcmp(kernel, #name) == 0)                                                                                    \
        return sizeof(struct parameter);
    KERNELS(SIZE)
    return 0;
}

bool mlak_emulate_alone(const char *kernel, const void *argument)
{
#define RUN(name, parameter)                                                                                           \
    if (strcmp(kernel, #name) == 0) {                                                                                  \
        struct parameter own;                                                                                          \
        memcpy(&own, argument, sizeof own);                                                                            \
        (name)(own);                                                                                                   \
        return true;                                                                                                   \
    }
    KERNELS(RUN)
    return false;
}
