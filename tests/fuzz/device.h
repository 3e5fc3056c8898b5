/* One image through the device kernels, for the programs of this folder. */
#ifndef DEVICE_H
#define DEVICE_H

#include <stdlib.h>
#include <string.h>

#include "rsb.h"
#include "shared/kernels.h"

/* Runs a kernel as rsb_emulate does. */
typedef int (*kernel_runner)(int kernel, const void *launch, int parts, int rows, int order);

static uint64_t blocks_of(uint64_t count, uint64_t threads) {
    return (count + threads - 1) / threads;
}

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
                    .height = height,
                    .width = width};
    uint64_t window = (uint64_t)p->window.height * p->window.width;
    uint64_t narrow =
        p->rows_first ? (uint64_t)height * p->window.width : (uint64_t)p->window.height * width;
    int jpeg = p->kind == RSB_JPEG;
    int packed = p->kind != RSB_PIXELS;
    uint64_t parts[] = {
        jpeg ? blocks_of(p->segments, ENTROPY_THREADS) : 0,
        jpeg ? blocks_of(p->blocks, IDCT_BLOCKS) : 0,
        jpeg ? blocks_of(window, PIXELS_THREADS) : 0,
        packed ? 2 : 0,
        packed ? blocks_of(narrow, RESAMPLE_THREADS) : 0,
        blocks_of((uint64_t)height * width, RESAMPLE_THREADS),
        layer ? 1 : 0,
    };
    for (int kernel = 0; kernel < (int)(sizeof parts / sizeof *parts); kernel++)
        if (parts[kernel]) run(kernel, &a, (int)parts[kernel], 1, order);
    int result = *status;
    free(status);
    free(scratch);
    return result;
}

/* What the loader does with one image of `file`: packs it, and runs the kernels. Returns a status
 * of the core; `*refused` is set where the core must make the row. */
static int device_load(kernel_runner run, int file, const rsb_sample *sample,
                       const rsb_layer *layer, uint8_t *out, int height, int width, int order,
                       rsb_scratch *scratch, int *refused) {
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
    if (status == RSB_OK)
        status = rsb_pack(file, sample, &slab, 0, height, width, scratch, &pixels_made);
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
