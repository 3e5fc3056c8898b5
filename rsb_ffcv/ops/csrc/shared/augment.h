/* Device kernel: one operation of RandAugment, TrivialAugment, 3-Augment or ColorJitter on each
 * image of the batch, one block of threads per image. The results are those of augment.c.
 *
 *     phase    autocontrast, equalize    contrast         others of single values
 *     0        clear the counts          sums of greys
 *     1        count                     add up
 *     2        used values, by group
 *     3        tables                    tables           tables
 *     4        look up                   look up          look up
 *
 *     phase    color, hue    sharpness    affine              blur
 *     0        pixels        to copy      to copy, limits     box, across
 *     1                      pixels       pixels              box, across
 *     2                                                       box, across
 *     3 .. 5                                                  box, down
 *
 * The time is that of memory accesses that wait for each other. Threads therefore load and store
 * whole words, four pixels of three bytes at a time, and the copy has a word for each pixel.
 */
#ifndef RSB_AUGMENT_KERNEL_H
#define RSB_AUGMENT_KERNEL_H

#include "packed.h"
#include "pillow.h"

enum {
    AUGMENT_THREADS = 512,
    AUGMENT_GROUPS = 32,  /* of threads, in the sum of greys */
    AUGMENT_COLUMNS = 32, /* threads side by side on a row of pixels: a warp */
    AUGMENT_ROWS = AUGMENT_THREADS / AUGMENT_COLUMNS,
    VALUES = 256,
    VALUE_GROUPS = 16, /* of values, in a histogram */
    GROUP_VALUES = VALUES / VALUE_GROUPS,
};

/* Of a group of values: the number of pixels, and the smallest and largest value that they have. */
typedef struct {
    uint32_t pixels;
    int32_t low, high; /* VALUES, -1: none */
} value_group;

typedef struct {
    uint32_t counts[3][VALUES];
    value_group groups[3][VALUE_GROUPS];
    uint8_t tables[3][VALUES];
    uint32_t sums[AUGMENT_THREADS];
    uint64_t of_group[AUGMENT_GROUPS];
} augment_block;

/* An image, the operation, and memory for a second image. */
typedef struct {
    const rsb_layer *layer;
    uint8_t *image, *copy;
    int32_t *limits; /* of each row, of an affine op: see affine_limits */
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

RSB_SHARED uint32_t augment_blocks(const rsb_packed *p, int height, int width) {
    (void)height, (void)width;
    return p->kind == RSB_PIXELS ? 0 : 1;
}

/* ---- pixels ---- */

/* A pixel in a register or in the copy is RGBX: a word whose highest byte may have any value. */
RSB_SHARED int channel(uint32_t pixel, int c) { return (int)(pixel >> 8 * c & 0xFF); }

RSB_SHARED uint32_t pixel_of(int r, int g, int b) {
    return (uint32_t)r | (uint32_t)g << 8 | (uint32_t)b << 16;
}

RSB_SHARED void store_pixel(const augment_task *t, int i, uint32_t pixel) {
    uint8_t *to = t->image + 3 * i;
    to[0] = (uint8_t)pixel;
    to[1] = (uint8_t)(pixel >> 8);
    to[2] = (uint8_t)(pixel >> 16);
}

/* Pixels that a thread loads at once: four, which are three words of the image. Where the number of
 * pixels is no multiple of four, rows of the batch do not begin at words: one. */
typedef struct {
    uint32_t at[4];
} pixel_group;

RSB_SHARED int group_size(const augment_task *t) { return t->pixels % 4 ? 1 : 4; }

RSB_SHARED int groups_of(const augment_task *t) { return t->pixels / group_size(t); }

RSB_SHARED pixel_group load_group(const augment_task *t, int i) {
    pixel_group g;
    if (group_size(t) == 1) {
        const uint8_t *from = t->image + 3 * i;
        g.at[0] = pixel_of(from[0], from[1], from[2]);
        g.at[1] = g.at[2] = g.at[3] = 0;
        return g;
    }
    const rsb_word *from = (const rsb_word *)t->image + 3 * i;
    uint32_t a = from[0], b = from[1], c = from[2];
    g.at[0] = a;
    g.at[1] = a >> 24 | b << 8;
    g.at[2] = b >> 16 | c << 16;
    g.at[3] = c >> 8;
    return g;
}

RSB_SHARED void store_group(const augment_task *t, int i, pixel_group g) {
    if (group_size(t) == 1) {
        store_pixel(t, i, g.at[0]);
        return;
    }
    rsb_word *to = (rsb_word *)t->image + 3 * i;
    to[0] = (g.at[0] & 0xFFFFFF) | g.at[1] << 24;
    to[1] = (g.at[1] >> 8 & 0xFFFF) | g.at[2] << 16;
    to[2] = (g.at[2] >> 16 & 0xFF) | g.at[3] << 8;
}

/* Stores the group in the copy, which begins at a multiple of 64 bytes. */
RSB_SHARED void copy_group(const augment_task *t, int i, pixel_group g) {
    if (group_size(t) == 1) {
        ((rsb_word *)t->copy)[i] = g.at[0];
        return;
    }
    rsb_long *to = (rsb_long *)t->copy + 2 * i;
    to[0] = g.at[0] | (uint64_t)g.at[1] << 32;
    to[1] = g.at[2] | (uint64_t)g.at[3] << 32;
}

/* Copies the image, two groups at a time, so that neither load waits for the other. */
RSB_SHARED void copy_image(const augment_task *t, int thread) {
    int groups = groups_of(t);
    for (int i = thread; i < groups; i += 2 * AUGMENT_THREADS) {
        int j = i + AUGMENT_THREADS;
        pixel_group first = load_group(t, i), second = load_group(t, j < groups ? j : i);
        copy_group(t, i, first);
        if (j < groups) copy_group(t, j, second);
    }
}

/* ---- color, hue ---- */

RSB_SHARED uint32_t coloured_pixel(uint32_t pixel, float factor) {
    int r = channel(pixel, 0), g = channel(pixel, 1), b = channel(pixel, 2);
    int grey = grey_value(r, g, b);
    return pixel_of(blend_value(grey, r, factor), blend_value(grey, g, factor),
                    blend_value(grey, b, factor));
}

RSB_SHARED uint32_t shifted_pixel(uint32_t pixel, int shift) {
    uint8_t p[3];
    for (int c = 0; c < 3; c++) p[c] = (uint8_t)channel(pixel, c);
    shift_hue(p, shift);
    return pixel_of(p[0], p[1], p[2]);
}

RSB_SHARED void change_pixels(const augment_task *t, int thread) {
    double x = t->layer->argument[0];
    int is_hue = t->layer->op == RSB_HUE, groups = groups_of(t);
    for (int i = thread; i < groups; i += AUGMENT_THREADS) {
        pixel_group g = load_group(t, i);
        /* The group turns, so that a loop that is not unrolled needs no index. */
        for (int k = 0; k < 4; k++) {
            uint32_t pixel = g.at[0];
            g.at[0] = g.at[1];
            g.at[1] = g.at[2];
            g.at[2] = g.at[3];
            g.at[3] =
                is_hue ? shifted_pixel(pixel, (int)(x * 255)) : coloured_pixel(pixel, (float)x);
        }
        store_group(t, i, g);
    }
}

/* ---- operations of single values: a table for each channel ---- */

/* Autocontrast and equalize: phases 0 .. 2. */
RSB_SHARED void histogram_phase(const augment_task *t, augment_block *s, int thread, int phase) {
    if (phase == 0)
        for (int i = thread; i < 3 * VALUES; i += AUGMENT_THREADS)
            s->counts[i / VALUES][i % VALUES] = 0;
    if (phase == 1) {
        int groups = groups_of(t), size = group_size(t);
        for (int i = thread; i < groups; i += AUGMENT_THREADS) {
            pixel_group g = load_group(t, i);
            for (int k = 0; k < 4; k++)
                for (int c = 0; c < 3; c++)
                    if (k < size) RSB_ADD(&s->counts[c][channel(g.at[k], c)], 1u);
        }
    }
    if (phase == 2 && thread < 3 * VALUE_GROUPS) {
        int c = thread / VALUE_GROUPS, group = thread % VALUE_GROUPS;
        value_group used = {0, VALUES, -1};
        for (int v = group * GROUP_VALUES; v < (group + 1) * GROUP_VALUES; v++) {
            uint32_t count = s->counts[c][v];
            used.pixels += count;
            if (!count) continue;
            used.low = used.low < v ? used.low : v;
            used.high = v;
        }
        s->groups[c][group] = used;
    }
}

/* Contrast: phases 0 and 1. */
RSB_SHARED void sum_phase(const augment_task *t, augment_block *s, int thread, int phase) {
    if (phase == 0) {
        uint32_t sum = 0;
        int groups = groups_of(t), size = group_size(t);
        for (int i = thread; i < groups; i += AUGMENT_THREADS) {
            pixel_group g = load_group(t, i);
            for (int k = 0; k < 4; k++) {
                uint32_t p = g.at[k];
                uint32_t grey = (uint32_t)grey_value(channel(p, 0), channel(p, 1), channel(p, 2));
                sum += k < size ? grey : 0;
            }
        }
        s->sums[thread] = sum;
    }
    if (phase == 1 && thread < AUGMENT_GROUPS) {
        uint64_t sum = 0;
        for (int i = thread; i < AUGMENT_THREADS; i += AUGMENT_GROUPS) sum += s->sums[i];
        s->of_group[thread] = sum;
    }
}

RSB_SHARED int mean_grey(const augment_task *t, const augment_block *s) {
    uint64_t sum = 0;
    for (int i = 0; i < AUGMENT_GROUPS; i++) sum += s->of_group[i];
    return (int)((double)sum / t->pixels + 0.5);
}

/* The values of a channel. below: the number of pixels of smaller values than `v`. */
RSB_SHARED used_values used_in(const augment_block *s, int c, int v, uint32_t *below) {
    used_values found = {VALUES, -1, 0};
    uint32_t sum = 0;
    for (int i = 0; i < VALUE_GROUPS; i++) {
        value_group group = s->groups[c][i];
        sum += i < v / GROUP_VALUES ? group.pixels : 0;
        found.low = found.low < group.low ? found.low : group.low;
        found.high = found.high > group.high ? found.high : group.high;
    }
    for (int i = v / GROUP_VALUES * GROUP_VALUES; i < v; i++) sum += s->counts[c][i];
    found.last = s->counts[c][found.high];
    *below = sum;
    return found;
}

/* What value `v` of channel `c` becomes. */
RSB_SHARED int changed_value(const augment_task *t, const augment_block *s, int c, int v) {
    double x = t->layer->argument[0];
    switch (t->layer->op) {
    case RSB_AUTOCONTRAST: {
        uint32_t below;
        return autocontrast_value(used_in(s, c, v, &below), v);
    }
    case RSB_EQUALIZE: {
        uint32_t below;
        used_values used = used_in(s, c, v, &below);
        return equalize_value(used, (uint32_t)t->pixels, below, v);
    }
    case RSB_INVERT: return 255 - v;
    case RSB_POSTERIZE: return v & posterize_mask(x);
    case RSB_SOLARIZE: return solarize_value(v, (int)ceil(x));
    case RSB_SOLARIZE_ADD: return solarize_add_value(v, (int)x);
    case RSB_CONTRAST: return blend_value(mean_grey(t, s), v, (float)x);
    case RSB_BRIGHTNESS: return blend_value(0, v, (float)x);
    default: return v;
    }
}

/* Phases 3 and 4. */
RSB_SHARED void table_phase(const augment_task *t, augment_block *s, int thread, int phase) {
    if (phase == 3)
        for (int i = thread; i < 3 * VALUES; i += AUGMENT_THREADS)
            s->tables[i / VALUES][i % VALUES] =
                (uint8_t)changed_value(t, s, i / VALUES, i % VALUES);
    if (phase == 4) {
        int groups = groups_of(t);
        for (int i = thread; i < groups; i += AUGMENT_THREADS) {
            pixel_group g = load_group(t, i);
            for (int k = 0; k < 4; k++)
                g.at[k] =
                    pixel_of(s->tables[0][channel(g.at[k], 0)], s->tables[1][channel(g.at[k], 1)],
                             s->tables[2][channel(g.at[k], 2)]);
            store_group(t, i, g);
        }
    }
}

/* ---- sharpness ---- */

/* Pillow's ImageFilter.SMOOTH (Filter.c): the sum of eight neighbours and five times the middle,
 * divided by 13. Then the blend. */
RSB_SHARED int sharpened_value(uint32_t sum, int value, float factor) {
    return blend_value((int)((2 * sum + 13) / 26), value, factor);
}

/* Pixel `i` of the copy, which has neighbours on all sides. */
RSB_SHARED uint32_t sharpened_pixel(const augment_task *t, int i, float factor) {
    const rsb_word *p = (const rsb_word *)t->copy + i;
    uint32_t middle = p[0];
    /* Red and blue share a word: a sum has 12 bits. */
    uint32_t red_blue = 4 * (middle & 0xFF00FF), green = 4 * (middle >> 8 & 0xFF);
    for (int r = -1; r <= 1; r++)
        for (int k = -1; k <= 1; k++) {
            uint32_t pixel = p[r * t->width + k];
            red_blue += pixel & 0xFF00FF;
            green += pixel >> 8 & 0xFF;
        }
    return pixel_of(sharpened_value(red_blue & 0xFFFF, channel(middle, 0), factor),
                    sharpened_value(green, channel(middle, 1), factor),
                    sharpened_value(red_blue >> 16, channel(middle, 2), factor));
}

RSB_SHARED void sharpen_phase(const augment_task *t, int thread, int phase) {
    if (t->height < 3 || t->width < 3) return;
    if (phase == 0) copy_image(t, thread);
    if (phase == 1) { /* the border does not change */
        float factor = (float)t->layer->argument[0];
        for (int y = 1 + thread / AUGMENT_COLUMNS; y < t->height - 1; y += AUGMENT_ROWS)
            for (int x = 1 + thread % AUGMENT_COLUMNS; x < t->width - 1; x += AUGMENT_COLUMNS)
                store_pixel(t, y * t->width + x, sharpened_pixel(t, y * t->width + x, factor));
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

#ifdef __CUDACC_RTC__

/* Bytes of two pixels side by side: red, red, green, green; blue, blue, ... */
RSB_SHARED uint32_t red_green(uint32_t first, uint32_t second) {
    return __byte_perm(first, second, 0x5140);
}
RSB_SHARED uint32_t blue(uint32_t first, uint32_t second) {
    return __byte_perm(first, second, 0x6262);
}

/* sum + the products of two weights, signed halves of a word, and the lower bytes of a word, or the
 * upper ones */
RSB_SHARED int add_lower(uint32_t weights, uint32_t bytes, int sum) {
    asm("dp2a.lo.s32.u32 %0, %1, %2, %0;" : "+r"(sum) : "r"(weights), "r"(bytes));
    return sum;
}
RSB_SHARED int add_upper(uint32_t weights, uint32_t bytes, int sum) {
    asm("dp2a.hi.s32.u32 %0, %1, %2, %0;" : "+r"(sum) : "r"(weights), "r"(bytes));
    return sum;
}

#else

RSB_SHARED uint32_t red_green(uint32_t first, uint32_t second) {
    return (first & 0xFF) | (second & 0xFF) << 8 | (first & 0xFF00) << 8 | (second & 0xFF00) << 16;
}
RSB_SHARED uint32_t blue(uint32_t first, uint32_t second) {
    return (first >> 16 & 0xFF) | (second >> 8 & 0xFF00);
}
RSB_SHARED int add_lower(uint32_t weights, uint32_t bytes, int sum) {
    return sum + (int16_t)weights * (int)(bytes & 0xFF) +
           (int16_t)(weights >> 16) * (int)(bytes >> 8 & 0xFF);
}
RSB_SHARED int add_upper(uint32_t weights, uint32_t bytes, int sum) {
    return add_lower(weights, bytes >> 16, sum);
}

#endif

/* Two weights of 14 fractional bits, -16384 .. 16384, in a word. */
RSB_SHARED uint32_t two_weights(int first, int second) {
    return ((uint32_t)first & 0xFFFF) | (uint32_t)second << 16;
}

/* A sum for each channel. */
typedef struct {
    int r, g, b;
} channel_sums;

RSB_SHARED channel_sums add_two(channel_sums s, uint32_t weights, uint32_t first, uint32_t second) {
    uint32_t bytes = red_green(first, second);
    s.r = add_lower(weights, bytes, s.r);
    s.g = add_upper(weights, bytes, s.g);
    s.b = add_lower(weights, blue(first, second), s.b);
    return s;
}

/* A position in the image. fx, fy: 14 fractional bits. */
typedef struct {
    int x, y, fx, fy;
} fixed_position;

/* The copy's pixel at (x, y), with the border of the image repeated. */
RSB_SHARED uint32_t copied_pixel(const augment_task *t, int y, int x) {
    y = y < 0 ? 0 : y >= t->height ? t->height - 1 : y;
    x = x < 0 ? 0 : x >= t->width ? t->width - 1 : x;
    return ((const rsb_word *)t->copy)[y * t->width + x];
}

/* Interpolation is in fixed point, and truncates, as in affine.c. */
RSB_SHARED uint32_t bilinear_pixel(const augment_task *t, fixed_position p) {
    uint32_t across = two_weights(16384 - p.fx, p.fx);
    channel_sums none = {0, 0, 0};
    channel_sums a =
        add_two(none, across, copied_pixel(t, p.y, p.x), copied_pixel(t, p.y, p.x + 1));
    channel_sums b =
        add_two(none, across, copied_pixel(t, p.y + 1, p.x), copied_pixel(t, p.y + 1, p.x + 1));
    int up = 16384 - p.fy, down = p.fy;
    return pixel_of(((a.r >> 7) * up + (b.r >> 7) * down) >> 21,
                    ((a.g >> 7) * up + (b.g >> 7) * down) >> 21,
                    ((a.b >> 7) * up + (b.b >> 7) * down) >> 21);
}

/* is_inner: whether no tap lies outside the image. Then their addresses take few instructions,
 * which is what the operation's time depends on. */
RSB_SHARED uint32_t bicubic_pixel(const augment_task *t, fixed_position p, int is_inner) {
    uint32_t left = two_weights(cubic_weight(p.fx, 0), cubic_weight(p.fx, 1));
    uint32_t right = two_weights(cubic_weight(p.fx, 2), cubic_weight(p.fx, 3));
    channel_sums none = {0, 0, 0}, sum = none;
    int x = p.x - 1, y = p.y - 1;
    const rsb_word *inner = (const rsb_word *)t->copy + (is_inner ? y * t->width + x : 0);
    for (int r = 0; r < 4; r++) {
        uint32_t taps[4];
        for (int k = 0; k < 4; k++)
            taps[k] = is_inner ? inner[r * t->width + k] : copied_pixel(t, y + r, x + k);
        channel_sums line = add_two(add_two(none, left, taps[0], taps[1]), right, taps[2], taps[3]);
        int down = cubic_weight(p.fy, r);
        sum.r += (line.r >> 8) * down;
        sum.g += (line.g >> 8) * down;
        sum.b += (line.b >> 8) * down;
    }
    return pixel_of(clamp(sum.r >> 20), clamp(sum.g >> 20), clamp(sum.b >> 20));
}

RSB_SHARED uint32_t interpolated_pixel(const augment_task *t, fixed_position p, int cubic) {
    if (!cubic) return bilinear_pixel(t, p);
    if (p.x >= 1 && p.x + 2 < t->width && p.y >= 1 && p.y + 2 < t->height)
        return bicubic_pixel(t, p, 1);
    return bicubic_pixel(t, p, 0);
}

/* Where the centre of output pixel (x, y) lies on an axis of the image: the expression of
 * is_inside, to the bit. m: the axis' coefficients. */
RSB_SHARED double axis_position(const double *m, int x, int y) {
    double u = x + 0.5, v = y + 0.5;
    return m[0] * u + m[1] * v + m[2];
}

/* Whether the image lies ahead of a pixel on an axis, as the row is followed to the right, or
 * behind it. Rounding keeps the order of positions: pixels which the image lies ahead of are the
 * first ones of a row, and those which it lies behind of, the last ones. */
RSB_SHARED int is_ahead(const double *m, int x, int y, int size) {
    double at = axis_position(m, x, y);
    return m[0] < 0 ? !(at < size) : !(at >= 0.0);
}
RSB_SHARED int is_behind(const double *m, int x, int y, int size) {
    double at = axis_position(m, x, y);
    return m[0] < 0 ? !(at >= 0.0) : !(at < size);
}

/* The pixels of each row which the image covers: from limits[2 y] to before limits[2 y + 1]. */
RSB_SHARED void affine_limits(const augment_task *t, int thread) {
    const double *m = t->layer->argument;
    for (int i = thread; i < 2 * t->height; i += AUGMENT_THREADS) {
        int y = i / 2, low = 0, high = t->width;
        while (low < high) { /* the first pixel that is covered, or not covered any more */
            int x = low + (high - low) / 2;
            int before = i % 2 == 0
                             ? is_ahead(m, x, y, t->width) || is_ahead(m + 3, x, y, t->height)
                             : !is_behind(m, x, y, t->width) && !is_behind(m + 3, x, y, t->height);
            if (before)
                low = x + 1;
            else
                high = x;
        }
        t->limits[i] = low;
    }
}

/* Every AUGMENT_COLUMNS-th pixel of a row. */
RSB_SHARED void affine_row(const augment_task *t, int y, int column) {
    const double *m = t->layer->argument;
    int cubic = t->layer->filter == RSB_BICUBIC;
    uint32_t fill = pixel_of(t->layer->fill[0], t->layer->fill[1], t->layer->fill[2]);
    int start = t->limits[2 * y], end = t->limits[2 * y + 1];
    /* BORDER of affine.c, less the half pixel between a pixel's centre and its corner */
    double row_x = axis_position(m, start, y) + 1.5, row_y = axis_position(m + 3, start, y) + 1.5;
    double step_x = m[0], step_y = m[3];
    double steps = column - start; /* no conversion for each pixel: these are slow */
    for (int x = column; x < t->width; x += AUGMENT_COLUMNS, steps += AUGMENT_COLUMNS) {
        uint32_t pixel = fill;
        if (x >= start && x < end) {
            /* A position is positive, and has at most 31 bits before the point. Exact: only the
             * bits after the 14th are lost. */
            int64_t from_x = (int64_t)((row_x + step_x * steps) * 16384.0);
            int64_t from_y = (int64_t)((row_y + step_y * steps) * 16384.0);
            fixed_position p;
            p.x = (int)(from_x >> 14) - 2;
            p.y = (int)(from_y >> 14) - 2;
            p.fx = (int)(from_x & 16383);
            p.fy = (int)(from_y & 16383);
            pixel = interpolated_pixel(t, p, cubic);
        }
        store_pixel(t, y * t->width + x, pixel);
    }
}

/* The same with the nearest filter. */
RSB_SHARED void nearest_row(const augment_task *t, int y, int column) {
    const double *m = t->layer->argument;
    uint32_t fill = pixel_of(t->layer->fill[0], t->layer->fill[1], t->layer->fill[2]);
    nearest_axis across = make_nearest_axis(m), down = make_nearest_axis(m + 3);
    int64_t u = nearest_position(across, column, y), v = nearest_position(down, column, y);
    for (int x = column; x < t->width; x += AUGMENT_COLUMNS) {
        uint32_t pixel = fill;
        if (is_on_axis(u, t->width) && is_on_axis(v, t->height))
            pixel = ((const rsb_word *)t->copy)[(int)(v >> 16) * t->width + (int)(u >> 16)];
        store_pixel(t, y * t->width + x, pixel);
        u += AUGMENT_COLUMNS * across.across;
        v += AUGMENT_COLUMNS * down.across;
    }
}

RSB_SHARED void affine_phase(const augment_task *t, int thread, int phase) {
    int is_nearest = t->layer->filter == RSB_NEAREST;
    if (phase == 0) {
        if (!is_nearest) affine_limits(t, thread);
        copy_image(t, thread);
        return;
    }
    if (phase != 1) return;
    for (int y = thread / AUGMENT_COLUMNS; y < t->height; y += AUGMENT_ROWS) {
        if (is_nearest)
            nearest_row(t, y, thread % AUGMENT_COLUMNS);
        else
            affine_row(t, y, thread % AUGMENT_COLUMNS);
    }
}

/* ---- all operations ---- */

RSB_SHARED void augment_phase(const rsb_launch *a, augment_block *s, int row, int thread,
                              int phase) {
    augment_task t = task_of(a, row);
    switch (t.layer->op) {
    case RSB_IDENTITY: return;
    case RSB_COLOR:
    case RSB_HUE:
        if (phase == 0) change_pixels(&t, thread);
        return;
    case RSB_SHARPNESS: sharpen_phase(&t, thread, phase); return;
    case RSB_BLUR: blur_phase(&t, thread, phase); return;
    case RSB_AFFINE: affine_phase(&t, thread, phase); return;
    case RSB_AUTOCONTRAST:
    case RSB_EQUALIZE: histogram_phase(&t, s, thread, phase); break;
    case RSB_CONTRAST: sum_phase(&t, s, thread, phase); break;
    default: break;
    }
    table_phase(&t, s, thread, phase);
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
