/* Device kernel: one operation of RandAugment, TrivialAugment, 3-Augment or ColorJitter on each
 * image of the batch, one block of threads per image. The results are those of augment.c.
 *
 *     phase    autocontrast, equalize   contrast         sharpness   blur          affine
 *     0        clear the counts         sum of greys     to copy     box, across   copy, row limits
 *     1        count                    add up           back        box, across   pixels
 *     2        tables                   blend                        box, across
 *     3        look up                                               box, down
 *     4, 5                                                           box, down
 *
 * All others change each pixel by itself, in phase 0.
 */
#ifndef RSB_AUGMENT_KERNEL_H
#define RSB_AUGMENT_KERNEL_H

#include "packed.h"
#include "pillow.h"

enum {
    AUGMENT_THREADS = 512,
    AUGMENT_GROUPS = 32,
};

typedef struct {
    uint32_t counts[3][256];
    uint8_t tables[3][256];
    uint64_t sums[AUGMENT_THREADS], of_group[AUGMENT_GROUPS];
} augment_block;

/* An image, the operation, and memory for a second image. */
typedef struct {
    const rsb_layer *layer;
    uint8_t *image, *copy;
    int32_t *limits; /* first and last covered pixel of each row of an affine op */
    int height, width, pixels;
} augment_task;

RSB_SHARED augment_task task_of(const rsb_launch *a, int row) {
    const rsb_packed *p = packed_row(a, row);
    augment_task t;
    t.layer = (const rsb_layer *)(a->layers + row * a->layer_stride);
    t.image = out_of(a, row);
    t.copy = scratch_of(a, p);
    t.limits = (int32_t *)(scratch_of(a, p) + p->second);
    t.height = a->height;
    t.width = a->width;
    t.pixels = a->height * a->width;
    return t;
}

/* ---- each pixel by itself ---- */

RSB_SHARED int changed_value(const rsb_layer *layer, int value) {
    double x = layer->argument[0];
    switch (layer->op) {
    case RSB_INVERT: return 255 - value;
    case RSB_POSTERIZE: return value & posterize_mask(x);
    case RSB_SOLARIZE: return solarize_value(value, (int)ceil(x));
    case RSB_SOLARIZE_ADD: return solarize_add_value(value, (int)x);
    case RSB_BRIGHTNESS: return blend_value(0, value, (float)x);
    default: return value;
    }
}

RSB_SHARED void change_pixels(const augment_task *t, int thread) {
    for (int i = thread; i < t->pixels; i += AUGMENT_THREADS) {
        uint8_t *p = t->image + 3 * (int64_t)i;
        if (t->layer->op == RSB_HUE)
            shift_hue(p, (int)(t->layer->argument[0] * 255));
        else if (t->layer->op == RSB_COLOR) {
            int grey = grey_value(p[0], p[1], p[2]);
            for (int c = 0; c < 3; c++)
                p[c] = (uint8_t)blend_value(grey, p[c], (float)t->layer->argument[0]);
        } else
            for (int c = 0; c < 3; c++) p[c] = (uint8_t)changed_value(t->layer, p[c]);
    }
}

/* ---- autocontrast, equalize ---- */

RSB_SHARED void histogram_phase(const augment_task *t, augment_block *s, int thread, int phase) {
    if (phase == 0)
        for (int i = thread; i < 3 * 256; i += AUGMENT_THREADS) s->counts[i / 256][i % 256] = 0;
    if (phase == 1)
        for (int i = thread; i < t->pixels; i += AUGMENT_THREADS)
            for (int c = 0; c < 3; c++) RSB_ADD(&s->counts[c][t->image[3 * (int64_t)i + c]], 1u);
    if (phase == 2 && thread < 3) {
        if (t->layer->op == RSB_EQUALIZE)
            equalize_table(s->counts[thread], s->tables[thread]);
        else
            autocontrast_table(s->counts[thread], s->tables[thread]);
    }
    if (phase == 3)
        for (int i = thread; i < t->pixels; i += AUGMENT_THREADS)
            for (int c = 0; c < 3; c++) {
                uint8_t *p = t->image + 3 * (int64_t)i + c;
                *p = s->tables[c][*p];
            }
}

/* ---- contrast ---- */

RSB_SHARED void contrast_phase(const augment_task *t, augment_block *s, int thread, int phase) {
    uint64_t sum = 0;
    if (phase == 0) {
        for (int i = thread; i < t->pixels; i += AUGMENT_THREADS) {
            const uint8_t *p = t->image + 3 * (int64_t)i;
            sum += (uint32_t)grey_value(p[0], p[1], p[2]);
        }
        s->sums[thread] = sum;
    }
    if (phase == 1 && thread < AUGMENT_GROUPS) {
        for (int i = thread; i < AUGMENT_THREADS; i += AUGMENT_GROUPS) sum += s->sums[i];
        s->of_group[thread] = sum;
    }
    if (phase == 2) {
        for (int i = 0; i < AUGMENT_GROUPS; i++) sum += s->of_group[i];
        int mean = (int)((double)sum / t->pixels + 0.5);
        for (int i = thread; i < t->pixels; i += AUGMENT_THREADS)
            for (int c = 0; c < 3; c++) {
                uint8_t *p = t->image + 3 * (int64_t)i + c;
                *p = (uint8_t)blend_value(mean, *p, (float)t->layer->argument[0]);
            }
    }
}

/* ---- sharpness ---- */

/* Pillow's ImageFilter.SMOOTH (Filter.c): the sum of eight neighbours and five times the middle,
 * divided by 13. The border does not change. */
RSB_SHARED int smooth_value(const augment_task *t, int y, int x, int c) {
    const uint8_t *p = t->image + 3 * ((int64_t)y * t->width + x) + c;
    if (y == 0 || x == 0 || y == t->height - 1 || x == t->width - 1) return *p;
    int64_t n = 3 * (int64_t)t->width;
    int sum = p[-n - 3] + p[-n] + p[-n + 3] + p[-3] + 5 * p[0] + p[3] + p[n - 3] + p[n] + p[n + 3];
    return (2 * sum + 13) / 26;
}

RSB_SHARED void sharpen_phase(const augment_task *t, int thread, int phase) {
    if (t->height < 3 || t->width < 3 || phase > 1) return;
    for (int i = thread; i < t->pixels; i += AUGMENT_THREADS)
        for (int c = 0; c < 3; c++) {
            uint8_t *image = t->image + 3 * (int64_t)i + c, *copy = t->copy + 3 * (int64_t)i + c;
            if (phase == 0)
                *copy = (uint8_t)blend_value(smooth_value(t, i / t->width, i % t->width, c), *image,
                                             (float)t->layer->argument[0]);
            else
                *image = *copy;
        }
}

/* ---- blur ---- */

/* A box blur of a line of `n` bytes, `step` bytes apart. */
RSB_SHARED void blur_line(const box *b, const uint8_t *from, uint8_t *to, int n, int64_t step) {
    uint32_t sum = (uint32_t)from[0] * (uint32_t)(b->reach + 1);
    for (int i = 0; i < b->reach; i++) sum += from[(i < n ? i : n - 1) * step];
    for (int i = 0; i < n; i++) {
        int above = i - b->reach - 1, enter = i + b->reach, below = i + b->reach + 1;
        above = above < 0 ? 0 : above;
        enter = enter < n ? enter : n - 1;
        below = below < n ? below : n - 1;
        uint32_t low = from[above * step], high = from[below * step];
        sum += (uint32_t)from[enter * step] - low;
        to[i * step] = (uint8_t)((sum * b->inner + (low + high) * b->edge + (1u << 23)) >> 24);
    }
}

RSB_SHARED void blur_phase(const augment_task *t, int thread, int phase) {
    float radius = box_radius((float)t->layer->argument[0]);
    if (radius == 0) return;
    box b = make_box(radius);
    /* The image is in `image` before even phases. */
    const uint8_t *from = phase % 2 ? t->copy : t->image;
    uint8_t *to = phase % 2 ? t->image : t->copy;
    int across = phase < BLUR_PASSES;
    int64_t row_bytes = 3 * (int64_t)t->width;
    int lines = 3 * (across ? t->height : t->width);
    for (int i = thread; i < lines; i += AUGMENT_THREADS) {
        int64_t start = across ? i / 3 * row_bytes + i % 3 : i;
        blur_line(&b, from + start, to + start, across ? t->width : t->height,
                  across ? 3 : row_bytes);
    }
}

/* ---- affine ---- */

/* The copy's pixel at (x, y), with the border of the image repeated. */
RSB_SHARED const uint8_t *copied_pixel(const augment_task *t, int y, int x) {
    y = y < 0 ? 0 : y >= t->height ? t->height - 1 : y;
    x = x < 0 ? 0 : x >= t->width ? t->width - 1 : x;
    return t->copy + 3 * ((int64_t)y * t->width + x);
}

/* Interpolation is in fixed point, and truncates, as in affine.c. fx, fy: 14 fractional bits. */
RSB_SHARED int bilinear_value(const augment_task *t, int y, int x, int fy, int fx, int c) {
    int a = (copied_pixel(t, y, x)[c] * (16384 - fx) + copied_pixel(t, y, x + 1)[c] * fx) >> 7;
    int b =
        (copied_pixel(t, y + 1, x)[c] * (16384 - fx) + copied_pixel(t, y + 1, x + 1)[c] * fx) >> 7;
    return (a * (16384 - fy) + b * fy) >> 21;
}

RSB_SHARED int bicubic_value(const augment_task *t, int y, int x, int fy, int fx, int c) {
    int sum = 0;
    for (int r = 0; r < 4; r++) {
        int line = 0;
        for (int k = 0; k < 4; k++)
            line += copied_pixel(t, y - 1 + r, x - 1 + k)[c] * cubic_weight(fx, k);
        sum += (line >> 8) * cubic_weight(fy, r);
    }
    return clamp(sum >> 20);
}

RSB_SHARED void affine_limits(const augment_task *t, int thread) {
    const double *m = t->layer->argument;
    for (int y = thread; y < t->height; y += AUGMENT_THREADS) {
        int start = 0;
        int end = t->width;
        while (start < end && !is_inside(m, start, y, t->height, t->width)) start++;
        while (end > start && !is_inside(m, end - 1, y, t->height, t->width)) end--;
        t->limits[2 * y] = start;
        t->limits[2 * y + 1] = end;
    }
}

RSB_SHARED void affine_pixel(const augment_task *t, int y, int x) {
    const double *m = t->layer->argument;
    uint8_t *to = t->image + 3 * ((int64_t)y * t->width + x);
    int start = t->limits[2 * y];
    if (x < start || x >= t->limits[2 * y + 1]) {
        for (int c = 0; c < 3; c++) to[c] = t->layer->fill[c];
        return;
    }
    double u = start + 0.5, v = y + 0.5;
    /* BORDER of affine.c, less the half pixel between a pixel's centre and its corner */
    double from_x = m[0] * u + m[1] * v + m[2] + 1.5, from_y = m[3] * u + m[4] * v + m[5] + 1.5;
    from_x = from_x + m[0] * (x - start);
    from_y = from_y + m[3] * (x - start);
    int ix = (int)from_x, iy = (int)from_y;
    int fx = (int)((from_x - ix) * 16384.0), fy = (int)((from_y - iy) * 16384.0);
    for (int c = 0; c < 3; c++)
        to[c] = (uint8_t)(t->layer->filter == RSB_BICUBIC
                              ? bicubic_value(t, iy - 2, ix - 2, fy, fx, c)
                              : bilinear_value(t, iy - 2, ix - 2, fy, fx, c));
}

RSB_SHARED void affine_phase(const augment_task *t, int thread, int phase) {
    if (phase == 0) {
        for (int i = thread; i < 3 * t->pixels; i += AUGMENT_THREADS) t->copy[i] = t->image[i];
        affine_limits(t, thread);
    }
    if (phase == 1)
        for (int i = thread; i < t->pixels; i += AUGMENT_THREADS)
            affine_pixel(t, i / t->width, i % t->width);
}

/* ---- all operations ---- */

RSB_SHARED void augment_phase(const rsb_launch *a, augment_block *s, int row, int thread,
                              int phase) {
    if (packed_row(a, row)->kind == RSB_PIXELS) return;
    augment_task t = task_of(a, row);
    switch (t.layer->op) {
    case RSB_IDENTITY: return;
    case RSB_AUTOCONTRAST:
    case RSB_EQUALIZE: histogram_phase(&t, s, thread, phase); return;
    case RSB_CONTRAST: contrast_phase(&t, s, thread, phase); return;
    case RSB_SHARPNESS: sharpen_phase(&t, thread, phase); return;
    case RSB_BLUR: blur_phase(&t, thread, phase); return;
    case RSB_AFFINE: affine_phase(&t, thread, phase); return;
    default:
        if (phase == 0) change_pixels(&t, thread);
    }
}

#define AUGMENT_PHASE(n)                                                                  \
    RSB_SHARED void augment_##n(const rsb_launch *a, augment_block *s, int part, int row, \
                                int thread) {                                             \
        (void)part;                                                                       \
        augment_phase(a, s, row, thread, n);                                              \
    }
AUGMENT_PHASE(0)
AUGMENT_PHASE(1)
AUGMENT_PHASE(2)
AUGMENT_PHASE(3)
AUGMENT_PHASE(4)
AUGMENT_PHASE(5)

#endif
