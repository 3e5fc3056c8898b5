// The device kernels (ops/csrc/shared/kernels.h) for NVRTC.
#include "kernels.h"

#define PHASE(phase)                              \
    phase(&a, &s, part, row, (int)threadIdx.x);   \
    __syncthreads();

// `row` and `part` are the same for all threads: in shared memory they take no registers. 1024
// resident threads of a multiprocessor leave 64 registers for each; the compiler may use them all.
#define KERNEL(name, memory, threads, phases)                                                \
    extern "C" __global__ void __launch_bounds__(threads, 1024 / threads)                    \
        rsb_##name(const rsb_launch a) {                                                     \
        __shared__ memory s;                                                                 \
        __shared__ int row, part;                                                            \
        if (threadIdx.x == 0) {                                                              \
            int place = place_of_block(&a, blockIdx.x);                                      \
            row = a.first + place;                                                           \
            part = (int)(blockIdx.x - a.starts[place]);                                      \
        }                                                                                    \
        __syncthreads();                                                                     \
        phases                                                                               \
    }

RSB_KERNELS(KERNEL, PHASE)
