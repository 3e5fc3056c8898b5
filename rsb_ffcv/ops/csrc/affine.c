/* Pillow's Image.transform(AFFINE) of one RGB image, in place.
 *
 * Which pixels the source image covers is Pillow's decision to the bit. The nearest filter gives
 * Pillow's bytes where Pillow computes in fixed point: positions below 32768, and no other zoom
 * than 1 for maps that neither turn nor shear. Interpolation is in 14-bit fixed point, and differs
 * from Pillow's by one grey level at most.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "augment.h"
#include "shared/pillow.h"
#if RSB_AVX2
#include <immintrin.h>
#endif

typedef struct {
    void (*spread)(const uint8_t *, uint32_t *, int);
    void (*walk)(double, double, double, double, int, int32_t *, int32_t *, int32_t *, int);
    void (*cubic_weights)(const int32_t *, uint32_t *, int);
    void (*bilinear_row)(const uint8_t *, int, const int32_t *, const int32_t *, const int32_t *,
                         uint8_t *, int);
    void (*bicubic_row)(const uint8_t *, int, const int32_t *, const int16_t *, const int16_t *,
                        uint8_t *, int);
} kernels;

#define KERNELS() {HOT(spread), HOT(walk), HOT(cubic_weights), HOT(bilinear_row), HOT(bicubic_row)}

#define HOT_FILE "affine_hot.h"
#include "dispatch.h"

enum {
    BORDER = 2,       /* pixels around the copy of the image, for interpolation */
    PIXEL_BYTES = 4,  /* of the copy: RGBX */
    ROW_ELEMENTS = 7, /* int32 elements that the tables below have for each pixel of a row */
};

/* Copies the image as RGBX pixels, with its border repeated BORDER times on every side. */
static void copy_with_border(const kernels *k, const uint8_t *image, rsb_size size, uint8_t *copy,
                             int stride) {
    for (int y = 0; y < size.height; y++) {
        uint8_t *to = copy + (size_t)stride * (y + BORDER);
        uint8_t *first = to + PIXEL_BYTES * BORDER;
        uint8_t *end = first + PIXEL_BYTES * size.width;
        k->spread(image + (size_t)3 * size.width * y, (uint32_t *)first, size.width);
        for (int i = 0; i < BORDER; i++) {
            memcpy(to + PIXEL_BYTES * i, first, PIXEL_BYTES);
            memcpy(end + PIXEL_BYTES * i, end - PIXEL_BYTES, PIXEL_BYTES);
        }
    }
    uint8_t *top = copy + (size_t)stride * BORDER;
    uint8_t *bottom = top + (size_t)stride * (size.height - 1);
    for (int i = 1; i <= BORDER; i++) {
        memcpy(top - (size_t)stride * i, top, stride);
        memcpy(bottom + (size_t)stride * i, bottom, stride);
    }
}

static int affine_nearest(uint8_t *image, rsb_size size, const double *a, const uint8_t *fill,
                          rsb_scratch *scratch) {
    size_t row_bytes = (size_t)3 * size.width;
    uint8_t *copy = rsb_buffer(scratch, RSB_IMAGE, row_bytes * size.height);
    if (!copy) return RSB_NO_MEMORY;
    memcpy(copy, image, row_bytes * size.height);
    nearest_axis across = make_nearest_axis(a), down = make_nearest_axis(a + 3);
    for (int y = 0; y < size.height; y++) {
        int64_t u = nearest_position(across, 0, y), v = nearest_position(down, 0, y);
        for (int x = 0; x < size.width; x++, u += across.across, v += down.across) {
            const uint8_t *from = fill;
            if (is_on_axis(u, size.width) && is_on_axis(v, size.height))
                from = copy + row_bytes * (size_t)(v >> 16) + 3 * (u >> 16);
            memcpy(image + row_bytes * y + 3 * x, from, 3);
        }
    }
    return RSB_OK;
}

int rsb_affine(uint8_t *image, rsb_size size, const double *a, int filter, const uint8_t *fill,
               rsb_scratch *scratch) {
    if (filter == RSB_NEAREST) return affine_nearest(image, size, a, fill, scratch);
    const kernels *k = pick_kernels();
    int width = size.width, cubic = filter == RSB_BICUBIC;
    int stride = PIXEL_BYTES * (width + 2 * BORDER);
    /* `walk` and the filters have 32 bits for positions in the copy. */
    if ((int64_t)stride * (size.height + 2 * BORDER) > INT32_MAX) return RSB_BAD_CALL;
    uint8_t *copy = rsb_buffer(scratch, RSB_IMAGE, (size_t)stride * (size.height + 2 * BORDER));
    int32_t *rows = (int32_t *)rsb_buffer(scratch, RSB_ROWS, sizeof *rows * ROW_ELEMENTS * width);
    if (!copy || !rows) return RSB_NO_MEMORY;
    copy_with_border(k, image, size, copy, stride);
    int32_t *offset = rows;
    int32_t *fx = rows + width;
    int32_t *fy = rows + 2 * width;
    int16_t *wx = (int16_t *)(rows + 3 * width); /* 4 weights a pixel */
    int16_t *wy = (int16_t *)(rows + 5 * width);
    /* The bicubic filter starts a pixel further up and to the left. */
    const uint8_t *from = copy - (cubic ? stride + PIXEL_BYTES : 0);
    for (int y = 0; y < size.height; y++) {
        uint8_t *out = image + (size_t)3 * width * y;
        int start = 0;
        int end = width;
        while (start < end && !is_inside(a, start, y, size.height, size.width)) start++;
        while (end > start && !is_inside(a, end - 1, y, size.height, size.width)) end--;
        int n = end - start;
        for (int x = 0; x < width; x++)
            if (x < start || x >= end) memcpy(out + 3 * x, fill, 3);
        if (n == 0) continue;
        double u = start + 0.5, v = y + 0.5;
        /* BORDER, less the half pixel between a pixel's centre and its corner */
        k->walk(a[0] * u + a[1] * v + a[2] + 1.5, a[3] * u + a[4] * v + a[5] + 1.5, a[0], a[3],
                stride, offset, fx, fy, n);
        if (cubic) {
            k->cubic_weights(fx, (uint32_t *)wx, n);
            k->cubic_weights(fy, (uint32_t *)wy, n);
            k->bicubic_row(from, stride, offset, wx, wy, out + 3 * start, n);
        } else
            k->bilinear_row(from, stride, offset, fx, fy, out + 3 * start, n);
    }
    return RSB_OK;
}
