// The device kernels (ops/csrc/shared/kernels.h) for NVRTC. Block (x, y) works on part x of row y.
#include "kernels.h"

#define PHASE(phase)                                                \
    phase(&a, &s, blockIdx.x, a.first + blockIdx.y, threadIdx.x);   \
    __syncthreads();

#define KERNEL(name, memory, threads, phases)                                                \
    extern "C" __global__ void __launch_bounds__(threads) rsb_##name(const rsb_launch a) {   \
        __shared__ memory s;                                                                 \
        phases                                                                               \
    }

RSB_KERNELS(KERNEL, PHASE)
