/* From the samples of each component to RGBX pixels: upsampling of chroma, and colours. */
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

#define HOT_FILE "jpeg_pixels_hot.h"
#include "dispatch.h"

/* The sample at row `y` of the image and column 0 of a component whose planes may start elsewhere.
 */
static const uint8_t *sample_row(const component *c, int y) {
    ptrdiff_t row = y - BLOCK_SIDE * c->block_y;
    return c->plane + row * c->stride - BLOCK_SIDE * c->block_x;
}

/* Columns of a chroma component: first .. first + count - 1. */
typedef struct {
    int first, count;
} chroma_columns;

/* Writes the 16-bit sums that widen_row takes: of `columns` and one more on either side, of chroma
 * row `y` and its neighbour `other`. Outside of the image, the border is repeated. */
static void chroma_row(const kernels *k, const component *c, int y, int other,
                       chroma_columns columns, uint16_t *sums) {
    int first = columns.first;
    int end = columns.first + columns.count;
    int low = first > 0 ? first - 1 : 0;
    int high = end < c->width ? end + 1 : c->width;
    const uint8_t *near = sample_row(c, y) + low;
    uint16_t *to = sums + low - (first - 1);
    if (other == y)
        k->copy_row(near, to, high - low);
    else {
        other = other < 0 ? 0 : other >= c->height ? c->height - 1 : other;
        k->blend_rows(near, near + (ptrdiff_t)(other - y) * c->stride, to, high - low);
    }
    if (first == 0) sums[0] = sums[1];
    if (high == end) sums[columns.count + 1] = sums[columns.count];
}

/* Constants of widen_row, from libjpeg-turbo's jdsample.c. */
typedef struct {
    int low, high, shift;
} rounding;

int rsb_jpeg_pixels(rsb_jpeg *j, rsb_rect area, rsb_scratch *scratch, rsb_window *window) {
    const kernels *k = pick_kernels();
    int v_doubled = j->v_max == 2;
    rounding round = v_doubled ? (rounding){8, 7, 4} : (rounding){1, 2, 2};
    chroma_columns columns;
    columns.first = area.left / j->h_max;
    columns.count = (area.left + area.width + j->h_max - 1) / j->h_max - columns.first;
    size_t stride = 4 * (size_t)area.width + RSB_PAD;
    size_t row_bytes = 2 * (size_t)columns.count + RSB_PAD;
    uint8_t *pixels = rsb_buffer(scratch, RSB_IMAGE, stride * area.height);
    /* an upsampled row of each chroma component, and the sums, of 2 bytes each */
    uint8_t *rows = rsb_buffer(scratch, RSB_ROWS, 3 * row_bytes);
    if (!pixels || !rows) return RSB_NO_MEMORY;
    uint16_t *sums = (uint16_t *)(rows + 2 * row_bytes);
    for (int y = area.top; y < area.top + area.height; y++) {
        const uint8_t *plane[MAX_COMPONENTS];
        for (int i = 0; i < j->count; i++) {
            const component *c = &j->part[i];
            if (i == 0 || j->h_max == 1) { /* not subsampled */
                plane[i] = sample_row(c, y) + area.left;
                continue;
            }
            int own = y / j->v_max;
            int other = !v_doubled ? own : y % 2 ? own + 1 : own - 1;
            uint8_t *upsampled = rows + (i - 1) * row_bytes;
            chroma_row(k, c, own, other, columns, sums);
            k->widen_row(sums + 1, upsampled, columns.count, round.low, round.high, round.shift);
            plane[i] = upsampled + area.left % 2;
        }
        uint32_t *out = (uint32_t *)(pixels + stride * (y - area.top));
        if (j->count == 1)
            k->grey_row(plane[0], out, area.width);
        else
            k->colour_row(plane[0], plane[1], plane[2], out, area.width);
    }
    *window = (rsb_window){pixels, (ptrdiff_t)stride, 4, area};
    return RSB_OK;
}
