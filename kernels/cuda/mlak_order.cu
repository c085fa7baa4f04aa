/* mlak_order.cu - the kernels around ordered launches: an image of their own, small beside that of mlak_cuda.cu. */
#include "mlak_order.cuh"
