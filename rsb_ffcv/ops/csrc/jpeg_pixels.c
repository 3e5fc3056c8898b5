/* From the samples of each component to RGBX pixels. */
#include <string.h>

#include "jpeg.h"
#if RSB_AVX2
#include <immintrin.h>
#endif

typedef uint16_t v8u __attribute__((vector_size(16)));

typedef struct {
    void (*grey_row)(const uint8_t *, uint32_t *, int);
    void (*colour_row)(const uint8_t *, const uint8_t *, const uint8_t *, uint32_t *, int);
    void (*blend_rows)(const uint8_t *, const uint8_t *, uint16_t *, int);
    void (*copy_row)(const uint8_t *, uint16_t *, int);
    void (*widen_row)(const uint16_t *, uint8_t *, int, int, int, int);
} kernels;

#define KERNELS() {HOT(grey_row), HOT(colour_row), HOT(blend_rows), HOT(copy_row), HOT(widen_row)}

#define HOT(name) name##_plain
#define HOT_VECTORS 0
#include "jpeg_pixels_hot.h"
static const kernels PLAIN = KERNELS();
#undef HOT
#undef HOT_VECTORS

#if RSB_AVX2
#pragma GCC push_options
#pragma GCC target("avx2,bmi,bmi2,lzcnt")
#define HOT(name) name##_avx2
#define HOT_VECTORS 1
#include "jpeg_pixels_hot.h"
static const kernels AVX2 = KERNELS();
#undef HOT
#pragma GCC pop_options
#endif

static const kernels *pick_kernels(void) {
#if RSB_AVX2
    if (rsb_has_avx2()) return &AVX2;
#endif
    return &PLAIN;
}

/* Columns first - 1 .. first + n of chroma row `y` (and `other`), as 16-bit sums that widen_row
 * takes; what lies outside of the image repeats its border. */
static void chroma_row(const kernels *k, const component *c, int y, int other, int first, int n,
                       uint16_t *sums) {
    const uint8_t *near = c->plane + (ptrdiff_t)(y - 8 * c->block_y) * c->stride - 8 * c->block_x;
    int low = first > 0 ? first - 1 : 0, high = first + n < c->width ? first + n + 1 : c->width;
    uint16_t *to = sums + low - (first - 1);
    if (other == y)
        k->copy_row(near + low, to, high - low);
    else {
        other = other < 0 ? 0 : other >= c->height ? c->height - 1 : other;
        k->blend_rows(near + low, near + (ptrdiff_t)(other - y) * c->stride + low, to, high - low);
    }
    if (first == 0) sums[0] = sums[1];
    if (high == first + n) sums[n + 1] = sums[n];
}

int rsb_jpeg_pixels(rsb_jpeg *j, rsb_rect area, rsb_scratch *scratch, rsb_window *window) {
    int top = area.top, left = area.left, height = area.height, width = area.width;
    /* chroma columns */
    int first = left / j->h_max, n = (left + width + j->h_max - 1) / j->h_max - first;
    int two = j->v_max == 2;
    const kernels *k = pick_kernels();
    size_t stride = 4 * (size_t)width + RSB_PAD, wide = 2 * (size_t)n + RSB_PAD;
    uint8_t *pixels = rsb_buffer(scratch, RSB_IMAGE, stride * height);
    uint8_t *rows = rsb_buffer(scratch, RSB_ROWS, 3 * wide);
    if (!pixels || !rows) return RSB_NO_MEMORY;
    uint16_t *sums = (uint16_t *)(rows + 2 * wide);
    for (int y = top; y < top + height; y++) {
        const uint8_t *plane[3];
        for (int i = 0; i < j->count; i++) {
            const component *c = &j->part[i];
            if (i == 0 || j->h_max == 1) {
                plane[i] =
                    c->plane + (ptrdiff_t)(y - 8 * c->block_y) * c->stride + left - 8 * c->block_x;
                continue;
            }
            int own = y / j->v_max, other = !two ? own : y % 2 ? own + 1 : own - 1;
            chroma_row(k, c, own, other, first, n, sums);
            uint8_t *out = rows + (i - 1) * wide;
            k->widen_row(sums + 1, out, n, two ? 8 : 1, two ? 7 : 2, two ? 4 : 2);
            plane[i] = out + left % 2;
        }
        uint32_t *out = (uint32_t *)(pixels + stride * (y - top));
        if (j->count == 1)
            k->grey_row(plane[0], out, width);
        else
            k->colour_row(plane[0], plane[1], plane[2], out, width);
    }
    *window = (rsb_window){pixels, (ptrdiff_t)stride, 4, area};
    return RSB_OK;
}
