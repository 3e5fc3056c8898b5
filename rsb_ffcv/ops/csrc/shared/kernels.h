/* The device kernels. Each is a chain of phases: all threads of a block finish a phase before the
 * next one begins. The includer defines KERNEL: name, shared memory, threads of a block and phases.
 * The function <name>_blocks returns the number of blocks that an image needs.
 *
 * Launched in this order; augment once for each layer.
 */
#ifndef RSB_KERNELS_H
#define RSB_KERNELS_H

#include "augment.h"
#include "entropy.h"
#include "idct.h"
#include "pixels.h"
#include "resample.h"

#define RSB_KERNELS(KERNEL, PHASE)                                                               \
    KERNEL(entropy, entropy_block, ENTROPY_THREADS,                                              \
           PHASE(entropy_copy) PHASE(entropy_codes) PHASE(entropy_tables) PHASE(entropy_decode)) \
    KERNEL(idct, idct_block, IDCT_THREADS, PHASE(idct_columns) PHASE(idct_rows))                 \
    KERNEL(pixels, pixels_block, PIXELS_THREADS, PHASE(pixels_convert))                          \
    KERNEL(taps, taps_block, TAPS_THREADS,                                                       \
           PHASE(taps_largest) PHASE(taps_groups) PHASE(taps_write))                             \
    KERNEL(first_pass, resample_block, RESAMPLE_THREADS, PHASE(resample_first))                  \
    KERNEL(second_pass, resample_block, RESAMPLE_THREADS, PHASE(resample_second))                \
    KERNEL(augment, augment_block, AUGMENT_THREADS,                                              \
           PHASE(augment_0) PHASE(augment_1) PHASE(augment_2) PHASE(augment_3) PHASE(augment_4)  \
               PHASE(augment_5))

#endif
