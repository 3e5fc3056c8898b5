/* Device kernels: the weights of a resize, and its two passes. One output pixel per thread.
 *
 * The result is that of resample.c, where the formats of weights and sums are explained.
 */
#ifndef RSB_RESAMPLE_H
#define RSB_RESAMPLE_H

#include "filters.h"
#include "packed.h"

enum {
    TAPS_THREADS = 256,
    TAPS_GROUPS = 16, /* of threads, in the search for the largest weight */
    RESAMPLE_THREADS = 256,
};

/* The vertical axis of a resize, or the horizontal one. */
RSB_SHARED axis axis_of(const rsb_launch *a, const rsb_packed *p, int down) {
    axis found;
    found.start = down ? p->box.top : p->box.left;
    found.length = down ? p->box.height : p->box.width;
    found.size = down ? p->height : p->width;
    found.out = down ? a->height : a->width;
    found.filter = p->filter;
    return found;
}

/* The tables of an axis: the header, `first` and `count` of each output pixel, and its weights. */
RSB_SHARED int32_t *taps_of(const rsb_launch *a, const rsb_packed *p, int down) {
    return (int32_t *)(scratch_of(a, p) + (down ? p->taps_down : p->taps));
}

RSB_SHARED int16_t *weights_of(int32_t *taps, const axis *x) {
    return (int16_t *)(taps + TAPS_HEADER + 2 * x->out);
}

typedef struct {
    double largest[TAPS_THREADS], of_group[TAPS_GROUPS];
} taps_block;

/* One for each axis. */
RSB_SHARED uint32_t taps_blocks(const rsb_packed *p, int height, int width) {
    (void)height, (void)width;
    return p->kind == RSB_PIXELS ? 0 : 2;
}

/* The sum of the weights of an output pixel's taps. */
RSB_SHARED double weight_sum(const axis *x, double scale, double centre, range source) {
    double sum = 0;
    for (int k = 0; k < source.count; k++) sum += raw_weight(x, scale, centre, source.first + k);
    return sum;
}

RSB_SHARED double reach_of(const axis *x, double scale) { return support(scale, x->filter); }

/* Block x = 0: the horizontal axis, 1: the vertical one. Phase 1: each thread's largest weight. */
RSB_SHARED void taps_largest(const rsb_launch *a, taps_block *s, int down, int row, int thread) {
    const rsb_packed *p = packed_row(a, row);
    axis x = axis_of(a, p, down);
    double scale = x.length / x.out, largest = 0;
    for (int i = thread; i < x.out; i += TAPS_THREADS) {
        double centre = x.start + (i + 0.5) * scale;
        range source = tap_range(centre, reach_of(&x, scale), x.size);
        double sum = weight_sum(&x, scale, centre, source);
        double factor = sum != 0 ? 1 / sum : 0;
        for (int k = 0; k < source.count; k++) {
            double w = fabs(raw_weight(&x, scale, centre, source.first + k) * factor);
            largest = w > largest ? w : largest;
        }
    }
    s->largest[thread] = largest;
}

/* Phase 2: each group's largest weight. */
RSB_SHARED void taps_groups(const rsb_launch *a, taps_block *s, int down, int row, int thread) {
    (void)a, (void)down, (void)row;
    if (thread >= TAPS_GROUPS) return;
    double largest = 0;
    for (int i = thread; i < TAPS_THREADS; i += TAPS_GROUPS)
        largest = s->largest[i] > largest ? s->largest[i] : largest;
    s->of_group[thread] = largest;
}

/* Phase 3: the tables. */
RSB_SHARED void taps_write(const rsb_launch *a, taps_block *s, int down, int row, int thread) {
    const rsb_packed *p = packed_row(a, row);
    double largest = 0;
    for (int i = 0; i < TAPS_GROUPS; i++)
        largest = s->of_group[i] > largest ? s->of_group[i] : largest;
    int shift = weight_shift(largest);
    axis x = axis_of(a, p, down);
    int32_t *taps = taps_of(a, p, down);
    int16_t *weights = weights_of(taps, &x);
    int most = max_taps(&x);
    int start = down ? p->window.top : p->window.left;
    if (thread == 0) {
        taps[0] = shift;
        taps[1] = most;
    }
    double scale = x.length / x.out;
    for (int i = thread; i < x.out; i += TAPS_THREADS) {
        int to = !down && p->flip ? x.out - 1 - i : i;
        double centre = x.start + (i + 0.5) * scale;
        range source = tap_range(centre, reach_of(&x, scale), x.size);
        double sum = weight_sum(&x, scale, centre, source);
        double factor = sum != 0 ? 1 / sum : 0;
        taps[TAPS_HEADER + 2 * to] = source.first - start;
        taps[TAPS_HEADER + 2 * to + 1] = source.count;
        for (int k = 0; k < source.count; k++) {
            double w = raw_weight(&x, scale, centre, source.first + k) * factor;
            weights[(int64_t)to * most + k] = (int16_t)rsb_round(w * (1 << shift));
        }
    }
}

typedef struct {
    int32_t unused;
} resample_block;

/* Pixels of 3 or 4 bytes. stride: bytes from a row to the next. */
typedef struct {
    const uint8_t *at;
    int64_t stride;
    int pixel_bytes;
} source_pixels;

/* RGBX, or RGB and another byte. Pixels of 4 bytes are aligned. */
RSB_SHARED uint32_t load_pixel(const uint8_t *at, int pixel_bytes) {
    if (pixel_bytes == 4) return *(const rsb_word *)at;
    return (uint32_t)at[0] | (uint32_t)at[1] << 8 | (uint32_t)at[2] << 16;
}

/* One output pixel of a pass: output pixel `i` of `out` of the axis, in row (or column) `other` of
 * the source. Returns RGBX. */
RSB_SHARED uint32_t pass_pixel(const int32_t *taps, int out, source_pixels from, int down, int i,
                               int other) {
    int shift = taps[0], most = taps[1];
    int first = taps[TAPS_HEADER + 2 * i], count = taps[TAPS_HEADER + 2 * i + 1];
    const int16_t *w = (const int16_t *)(taps + TAPS_HEADER + 2 * out) + (int64_t)i * most;
    int64_t step = down ? from.stride : from.pixel_bytes;
    const uint8_t *at = from.at + first * step + other * (down ? from.pixel_bytes : from.stride);
    int r = 1 << (shift - 1), g = r, b = r;
    for (int k = 0; k < count; k++, at += step) {
        uint32_t pixel = load_pixel(at, from.pixel_bytes);
        r += (int)(pixel & 255) * w[k];
        g += (int)(pixel >> 8 & 255) * w[k];
        b += (int)(pixel >> 16 & 255) * w[k];
    }
    return (uint32_t)(clamp(r >> shift) | clamp(g >> shift) << 8 | clamp(b >> shift) << 16);
}

RSB_SHARED uint32_t first_pass_blocks(const rsb_packed *p, int height, int width) {
    if (p->kind == RSB_PIXELS) return 0;
    uint64_t rows = (uint64_t)(p->rows_first ? height : p->window.height);
    return blocks_for(rows * (uint64_t)(p->rows_first ? p->window.width : width), RESAMPLE_THREADS);
}

RSB_SHARED uint32_t second_pass_blocks(const rsb_packed *p, int height, int width) {
    (void)p;
    return blocks_for((uint64_t)height * (uint64_t)width, RESAMPLE_THREADS);
}

/* The first pass, from the window to `narrow`: horizontal, unless p->rows_first. */
RSB_SHARED void resample_first(const rsb_launch *a, resample_block *s, int part, int row,
                               int thread) {
    (void)s;
    const rsb_packed *p = packed_row(a, row);
    uint32_t which = (uint32_t)part * RESAMPLE_THREADS + (uint32_t)thread;
    uint32_t height = (uint32_t)(p->rows_first ? a->height : p->window.height);
    uint32_t width = (uint32_t)(p->rows_first ? p->window.width : a->width);
    if (which >= height * width) return;
    source_pixels from;
    from.pixel_bytes = p->kind == RSB_RAW ? 3 : 4;
    from.stride = (int64_t)p->window.width * from.pixel_bytes;
    from.at = p->kind == RSB_RAW ? a->slab + p->pixels : scratch_of(a, p);
    int y = (int)(which / width), x = (int)(which % width);
    uint32_t *narrow = (uint32_t *)(scratch_of(a, p) + p->second);
    int down = p->rows_first;
    narrow[which] = pass_pixel(taps_of(a, p, down), down ? a->height : a->width, from, down,
                               down ? y : x, down ? x : y);
}

/* The second pass, from `narrow` to the batch. Copies finished pixels. */
RSB_SHARED void resample_second(const rsb_launch *a, resample_block *s, int part, int row,
                                int thread) {
    (void)s;
    const rsb_packed *p = packed_row(a, row);
    uint32_t which = (uint32_t)part * RESAMPLE_THREADS + (uint32_t)thread;
    uint32_t width = (uint32_t)a->width;
    if (which >= (uint32_t)a->height * width) return;
    uint8_t *to = out_of(a, row) + 3 * (uint64_t)which;
    if (p->kind == RSB_PIXELS) {
        for (int c = 0; c < 3; c++) to[c] = a->slab[p->pixels + 3 * (uint64_t)which + c];
        return;
    }
    source_pixels from;
    from.pixel_bytes = 4;
    from.stride = 4 * (int64_t)(p->rows_first ? p->window.width : a->width);
    from.at = scratch_of(a, p) + p->second;
    int y = (int)(which / width), x = (int)(which % width);
    int down = !p->rows_first;
    uint32_t rgbx = pass_pixel(taps_of(a, p, down), down ? a->height : a->width, from, down,
                               down ? y : x, down ? x : y);
    to[0] = (uint8_t)rgbx;
    to[1] = (uint8_t)(rgbx >> 8);
    to[2] = (uint8_t)(rgbx >> 16);
}

#endif
