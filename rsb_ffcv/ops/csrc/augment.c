/* The pixel operations of RandAugment, TrivialAugment, 3-Augment and ColorJitter, on one RGB image,
 * in place.
 *
 * They match Pillow's functions as timm and torchvision call them: ImageOps.autocontrast, equalize,
 * invert, posterize and solarize, the four of ImageEnhance, hue through Image.convert("HSV"),
 * GaussianBlur and Image.transform(AFFINE). The affine operation (affine.c) with an interpolating
 * filter differs from Pillow by one grey level at most. All others give Pillow's bytes.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "augment.h"
#include "shared/pillow.h"

typedef struct {
    void (*invert)(uint8_t *, int);
    void (*mask)(uint8_t *, int, int);
    void (*solarize)(uint8_t *, int, int);
    void (*solarize_add)(uint8_t *, int, int, int);
    void (*blend_constant)(uint8_t *, int, int, float);
    void (*blend)(const uint8_t *, uint8_t *, int, float);
    void (*grey)(const uint8_t *, uint8_t *, int);
    int64_t (*grey_sum)(const uint8_t *, int);
    void (*smooth_row)(const uint8_t *, const uint8_t *, const uint8_t *, uint8_t *, int);
    void (*blur_step)(uint32_t *, const uint8_t *, const uint8_t *, const uint8_t *,
                      const uint8_t *, uint8_t *, uint32_t, uint32_t, int);
} kernels;

#define KERNELS()                                                                   \
    {HOT(invert), HOT(mask), HOT(solarize), HOT(solarize_add), HOT(blend_constant), \
     HOT(blend),  HOT(grey), HOT(grey_sum), HOT(smooth_row),   HOT(blur_step)}

#define HOT_FILE "augment_hot.h"
#include "dispatch.h"

/* ---- histograms ---- */

static void histogram(const uint8_t *p, int pixels, uint32_t counts[3][256]) {
    /* Neighbours are often equal. Two tables in turn, so that the second increment does not wait
     * for the first. */
    uint32_t more[3][256];
    memset(counts, 0, 3 * sizeof *counts);
    memset(more, 0, sizeof more);
    int i = 0;
    for (; i < pixels - 1; i += 2)
        for (int c = 0; c < 3; c++) {
            counts[c][p[3 * i + c]]++;
            more[c][p[3 * i + 3 + c]]++;
        }
    if (i < pixels)
        for (int c = 0; c < 3; c++) counts[c][p[3 * i + c]]++;
    for (int c = 0; c < 3; c++)
        for (int v = 0; v < 256; v++) counts[c][v] += more[c][v];
}

static void look_up(uint8_t *p, int pixels, uint8_t tables[3][256]) {
    for (int i = 0; i < pixels; i++)
        for (int c = 0; c < 3; c++) p[3 * i + c] = tables[c][p[3 * i + c]];
}

/* ---- neighbourhoods ---- */

static int sharpen(const kernels *k, uint8_t *image, int height, int width, float factor,
                   rsb_scratch *scratch) {
    int n = 3 * width;
    /* Pillow copies the border, so that an image of border only does not change. */
    if (height < 3 || width < 3) return RSB_OK;
    uint8_t *smooth = rsb_buffer(scratch, RSB_IMAGE, (size_t)n * height);
    if (!smooth) return RSB_NO_MEMORY;
    memcpy(smooth, image, (size_t)n * height);
    for (int y = 1; y < height - 1; y++) {
        const uint8_t *row = image + (size_t)n * y;
        k->smooth_row(row - n, row, row + n, smooth + (size_t)n * y, n);
    }
    k->blend(smooth, image, n * height, factor);
    return RSB_OK;
}

/* One vertical box blur of `rows` rows of `n` bytes. sum: `n` sums, overwritten. */
static void blur_columns(const kernels *k, const box *b, const uint8_t *in, uint8_t *out, int rows,
                         int n, uint32_t *sum) {
    for (int i = 0; i < n; i++) { /* what a box around row -1 covers, with the border repeated */
        sum[i] = (uint32_t)in[i] * (b->reach + 1);
        for (int y = 0; y < b->reach; y++) sum[i] += in[(size_t)(y < rows ? y : rows - 1) * n + i];
    }
    for (int y = 0; y < rows; y++) {
        int above = y - b->reach - 1; /* leaves the inner rows, and is the upper border */
        int enter = y + b->reach;
        int below = y + b->reach + 1;
        above = above < 0 ? 0 : above;
        enter = enter < rows ? enter : rows - 1;
        below = below < rows ? below : rows - 1;
        k->blur_step(sum, in + (size_t)above * n, in + (size_t)enter * n, in + (size_t)above * n,
                     in + (size_t)below * n, out + (size_t)y * n, b->inner, b->edge, n);
    }
}

/* Rows of RGB pixels become columns. */
static void transpose(const uint8_t *in, uint8_t *out, int rows, int columns) {
    for (int y = 0; y < rows; y++)
        for (int x = 0; x < columns; x++)
            memcpy(out + 3 * ((size_t)x * rows + y), in + 3 * ((size_t)y * columns + x), 3);
}

static int blur(const kernels *k, uint8_t *image, int height, int width, float sigma,
                rsb_scratch *scratch) {
    float radius = box_radius(sigma);
    if (radius == 0) return RSB_OK;
    box b = make_box(radius);
    size_t bytes = (size_t)3 * width * height;
    int longer = 3 * (width > height ? width : height);
    uint8_t *turned = rsb_buffer(scratch, RSB_IMAGE, 2 * bytes);
    uint32_t *sum = (uint32_t *)rsb_buffer(scratch, RSB_ROWS, sizeof *sum * longer);
    if (!turned || !sum) return RSB_NO_MEMORY;
    uint8_t *other = turned + bytes;
    /* Horizontally first, as columns of the transposed image: the same loop then serves both
     * directions, and its vectors lie along a row. An odd number of passes ends in `other`. */
    transpose(image, turned, height, width);
    blur_columns(k, &b, turned, other, width, 3 * height, sum);
    blur_columns(k, &b, other, turned, width, 3 * height, sum);
    blur_columns(k, &b, turned, other, width, 3 * height, sum);
    transpose(other, image, width, height);
    blur_columns(k, &b, image, other, height, 3 * width, sum);
    blur_columns(k, &b, other, image, height, 3 * width, sum);
    blur_columns(k, &b, image, other, height, 3 * width, sum);
    memcpy(image, other, bytes);
    return RSB_OK;
}

/* ---- all operations ---- */

static void map_histogram(uint8_t *image, int pixels,
                          void (*make_table)(const uint32_t *counts, uint8_t *table)) {
    uint32_t counts[3][256];
    uint8_t tables[3][256];
    histogram(image, pixels, counts);
    for (int c = 0; c < 3; c++) make_table(counts[c], tables[c]);
    look_up(image, pixels, tables);
}

static int saturate(const kernels *k, uint8_t *image, int pixels, float factor,
                    rsb_scratch *scratch) {
    int n = 3 * pixels;
    uint8_t *grey = rsb_buffer(scratch, RSB_IMAGE, n);
    if (!grey) return RSB_NO_MEMORY;
    k->grey(image, grey, pixels);
    k->blend(grey, image, n, factor);
    return RSB_OK;
}

/* far beyond the range of every operation */
#define MAX_ARGUMENT 65536

int rsb_check_layer(const rsb_layer *layer) {
    if (layer->op < RSB_IDENTITY || layer->op > RSB_AFFINE) return RSB_BAD_CALL;
    double most = MAX_ARGUMENT;
    if (layer->op == RSB_AFFINE) {
        if (layer->filter > RSB_NEAREST) return RSB_BAD_CALL;
        most = layer->filter == RSB_NEAREST ? MAX_NEAREST_COEFFICIENT : MAX_COEFFICIENT;
    }
    for (int i = 0; i < (layer->op == RSB_AFFINE ? 6 : 1); i++) {
        if (!(fabs(layer->argument[i]) <= most)) return RSB_BAD_CALL; /* NaN too */
    }
    return !(fabs(layer->argument[0]) <= MAX_ARGUMENT) ? RSB_BAD_CALL : RSB_OK;
}

int rsb_augment(uint8_t *image, int height, int width, const void *draw, rsb_scratch *scratch) {
    const rsb_layer *layer = draw;
    const kernels *k = pick_kernels();
    double a = layer->argument[0];
    if (height < 1 || width < 1 || (int64_t)height * width > RSB_MAX_PIXELS) return RSB_BAD_CALL;
    if (rsb_check_layer(layer)) return RSB_BAD_CALL;
    rsb_size size = {height, width};
    int pixels = height * width;
    int n = 3 * pixels;
    switch (layer->op) {
    case RSB_IDENTITY: return RSB_OK;
    case RSB_AUTOCONTRAST: map_histogram(image, pixels, autocontrast_table); return RSB_OK;
    case RSB_EQUALIZE: map_histogram(image, pixels, equalize_table); return RSB_OK;
    case RSB_INVERT: k->invert(image, n); return RSB_OK;
    case RSB_POSTERIZE: k->mask(image, n, posterize_mask(a)); return RSB_OK;
    case RSB_SOLARIZE: k->solarize(image, n, (int)ceil(a)); return RSB_OK;
    case RSB_SOLARIZE_ADD: k->solarize_add(image, n, (int)a, 128); return RSB_OK;
    case RSB_COLOR: return saturate(k, image, pixels, (float)a, scratch);
    case RSB_CONTRAST: {
        int mean = (int)((double)k->grey_sum(image, pixels) / pixels + 0.5);
        k->blend_constant(image, n, mean, (float)a);
        return RSB_OK;
    }
    case RSB_BRIGHTNESS: k->blend_constant(image, n, 0, (float)a); return RSB_OK;
    case RSB_SHARPNESS: return sharpen(k, image, height, width, (float)a, scratch);
    case RSB_BLUR: return blur(k, image, height, width, (float)a, scratch);
    case RSB_HUE:
        for (int i = 0; i < pixels; i++) shift_hue(image + (size_t)3 * i, (int)(a * 255));
        return RSB_OK;
    case RSB_AFFINE:
        return rsb_affine(image, size, layer->argument, layer->filter, layer->fill, scratch);
    default: return RSB_BAD_CALL; /* rsb_check_layer excludes it */
    }
}
