/* One image through the device kernels, for the programs of this folder. */
#ifndef DEVICE_H
#define DEVICE_H

#include <stdlib.h>
#include <string.h>

#include "rsb.h"
#include "shared/kernels.h"

/* Runs a kernel as rsb_emulate does. */
typedef int (*kernel_runner)(int kernel, const void *launch, int order);

enum {
#define KERNEL(name, shared, threads, phases) NUMBER_OF_##name,
    RSB_KERNELS(KERNEL, ) NUMBER_OF_KERNELS
#undef KERNEL
};

/* Runs all kernels on the row that `slab` has. layer: NULL for none. Returns the status that the
 * kernels write. */
static int run_kernels(kernel_runner run, const uint8_t *slab, const rsb_layer *layer, uint8_t *out,
                       int height, int width, int order) {
    const rsb_packed *p = (const rsb_packed *)slab;
    int32_t *status = calloc(1, sizeof *status);
    uint8_t *scratch = aligned_alloc(64, p->scratch_bytes + 64);
    rsb_launch a = {.slab = slab,
                    .scratch = scratch,
                    .out = out,
                    .status = status,
                    .layers = (const uint8_t *)layer,
                    .rows = 1,
                    .height = height,
                    .width = width};
    uint32_t starts[NUMBER_OF_KERNELS][2];
    rsb_block_starts(p, 1, height, width, starts[0]);
    for (int kernel = 0; kernel < NUMBER_OF_KERNELS; kernel++) {
        a.starts = starts[kernel];
        if (layer || kernel != NUMBER_OF_augment) run(kernel, &a, order);
    }
    int result = *status;
    free(status);
    free(scratch);
    return result;
}

/* What the loader does with one image: packs it, and runs the kernels. Returns a status
 * of the core; `*refused` is set where the core must make the row. */
static int device_load(kernel_runner run, const rsb_sample *sample, const rsb_layer *layer,
                       uint8_t *out, int height, int width, int order, rsb_scratch *scratch,
                       int *refused) {
    size_t pixels = ((size_t)3 * height * width + 63) / 64 * 64;
    size_t record = (sizeof(rsb_packed) + 63) / 64 * 64;
    rsb_slab slab = {.capacity = record + pixels + 40000, .scratch = 1 << 24};
    slab.used = record;
    slab.committed = record + pixels;
    uint8_t *pixels_made = NULL;
    *refused = 0;
    /* exactly as large as the loader's: the sanitizer guards both ends */
    slab.memory = aligned_alloc(64, (slab.capacity + RSB_SLAB_PADDING + 63) / 64 * 64);
    memset(slab.memory, 0, sizeof(rsb_packed));
    int status = layer ? rsb_check_layer(layer) : RSB_OK;
    if (status == RSB_OK) status = rsb_pack(sample, &slab, 0, height, width, scratch, &pixels_made);
    if (status == RSB_OK && pixels_made) {
        *refused = 1;
        if (layer) status = rsb_augment(pixels_made, height, width, layer, scratch);
    }
    if (status == RSB_OK)
        *refused |= run_kernels(run, slab.memory, layer, out, height, width, order);
    free(slab.memory);
    return status;
}

#endif
