/* Device kernels: the weights of a resize, and its two passes.
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
    RESAMPLE_EACH = 4, /* output pixels of a thread */
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

/* A pass: its weights, and the pixels that it reads. */
typedef struct {
    const int32_t *taps;
    const int16_t *weights;
    int shift, most;
    const uint8_t *from;
    int pixel_bytes;       /* 3 or 4 */
    uint32_t along, aside; /* pixels from a tap to the next, and from a line to the next */
} resample_pass;

RSB_SHARED resample_pass pass_of(const rsb_launch *a, const rsb_packed *p, int down,
                                 const uint8_t *from, int pixel_bytes, int from_width) {
    resample_pass r;
    axis x = axis_of(a, p, down);
    int32_t *taps = taps_of(a, p, down);
    r.taps = taps;
    r.weights = weights_of(taps, &x);
    r.shift = taps[0];
    r.most = taps[1];
    r.from = from;
    r.pixel_bytes = pixel_bytes;
    r.along = down ? (uint32_t)from_width : 1;
    r.aside = down ? 1 : (uint32_t)from_width;
    return r;
}

/* RGBX, or RGB and another byte. Pixels of 4 bytes are aligned. */
RSB_SHARED uint32_t load_pixel(const uint8_t *from, uint32_t which, int pixel_bytes) {
    if (pixel_bytes == 4) return ((const rsb_word *)from)[which];
    from += 3 * (uint64_t)which;
    return (uint32_t)from[0] | (uint32_t)from[1] << 8 | (uint32_t)from[2] << 16;
}

/* Output pixel `i` of the pass, of line `line`. Returns RGBX. */
RSB_SHARED uint32_t pass_pixel(const resample_pass *p, int i, int line) {
    int first = p->taps[TAPS_HEADER + 2 * i], count = p->taps[TAPS_HEADER + 2 * i + 1];
    const int16_t *w = p->weights + i * p->most;
    uint32_t at = (uint32_t)first * p->along + (uint32_t)line * p->aside;
    int r = 1 << (p->shift - 1), g = r, b = r;
    for (int k = 0; k < count; k++, at += p->along) {
        uint32_t pixel = load_pixel(p->from, at, p->pixel_bytes);
        r += (int)(pixel & 255) * w[k];
        g += (int)(pixel >> 8 & 255) * w[k];
        b += (int)(pixel >> 16 & 255) * w[k];
    }
    return (uint32_t)(clamp(r >> p->shift) | clamp(g >> p->shift) << 8 |
                      clamp(b >> p->shift) << 16);
}

RSB_SHARED uint32_t first_pass_blocks(const rsb_packed *p, int height, int width) {
    if (p->kind == RSB_PIXELS) return 0;
    uint64_t rows = (uint64_t)(p->rows_first ? height : p->window.height);
    return blocks_for(rows * (uint64_t)(p->rows_first ? p->window.width : width),
                      RESAMPLE_THREADS * RESAMPLE_EACH);
}

RSB_SHARED uint32_t second_pass_blocks(const rsb_packed *p, int height, int width) {
    (void)p;
    return blocks_for((uint64_t)height * (uint64_t)width, RESAMPLE_THREADS * RESAMPLE_EACH);
}

/* Pixel `k` of a thread. */
RSB_SHARED uint32_t resample_place(int part, int thread, int k) {
    return ((uint32_t)part * RESAMPLE_EACH + (uint32_t)k) * RESAMPLE_THREADS + (uint32_t)thread;
}

/* The first pass, from the window to `narrow`: horizontal, unless p->rows_first. */
RSB_SHARED void resample_first(const rsb_launch *a, resample_block *s, int part, int row,
                               int thread) {
    (void)s;
    const rsb_packed *p = packed_row(a, row);
    int down = p->rows_first, raw = p->kind == RSB_RAW;
    uint32_t height = (uint32_t)(down ? a->height : p->window.height);
    uint32_t width = (uint32_t)(down ? p->window.width : a->width);
    resample_pass pass = pass_of(a, p, down, raw ? a->slab + p->pixels : scratch_of(a, p),
                                 raw ? 3 : 4, p->window.width);
    uint32_t *narrow = (uint32_t *)(scratch_of(a, p) + p->second);
    for (int k = 0; k < RESAMPLE_EACH; k++) {
        uint32_t which = resample_place(part, thread, k);
        if (which >= height * width) return;
        int y = (int)(which / width), x = (int)(which % width);
        narrow[which] = pass_pixel(&pass, down ? y : x, down ? x : y);
    }
}

/* The second pass, from `narrow` to the batch. Copies finished pixels. */
RSB_SHARED void resample_second(const rsb_launch *a, resample_block *s, int part, int row,
                                int thread) {
    (void)s;
    const rsb_packed *p = packed_row(a, row);
    uint32_t width = (uint32_t)a->width, count = (uint32_t)a->height * width;
    uint8_t *out = out_of(a, row);
    if (p->kind == RSB_PIXELS) {
        const uint8_t *pixels = a->slab + p->pixels;
        for (int k = 0; k < RESAMPLE_EACH; k++) {
            uint64_t which = resample_place(part, thread, k);
            if (which >= count) return;
            for (int c = 0; c < 3; c++) out[3 * which + c] = pixels[3 * which + c];
        }
        return;
    }
    int down = !p->rows_first;
    resample_pass pass =
        pass_of(a, p, down, scratch_of(a, p) + p->second, 4, down ? a->width : p->window.width);
    for (int k = 0; k < RESAMPLE_EACH; k++) {
        uint32_t which = resample_place(part, thread, k);
        if (which >= count) return;
        int y = (int)(which / width), x = (int)(which % width);
        uint32_t rgbx = pass_pixel(&pass, down ? y : x, down ? x : y);
        uint8_t *to = out + 3 * (uint64_t)which;
        to[0] = (uint8_t)rgbx;
        to[1] = (uint8_t)(rgbx >> 8);
        to[2] = (uint8_t)(rgbx >> 16);
    }
}

#endif
