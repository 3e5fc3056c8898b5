/* Scalar arithmetic of Pillow's image operations, on single values, tables and pixels. */
#ifndef RSB_PILLOW_H
#define RSB_PILLOW_H

#include "base.h"

/* ---- tables of 256 values ---- */

/* The values of a channel that occur: the smallest and the largest one, and the number of pixels of
 * the largest. */
typedef struct {
    int low, high;
    uint32_t last;
} used_values;

RSB_SHARED used_values find_used(const uint32_t *counts) {
    used_values u = {0, 255, 0};
    while (u.low < 255 && !counts[u.low]) u.low++;
    while (u.high > 0 && !counts[u.high]) u.high--;
    u.last = counts[u.high];
    return u;
}

RSB_SHARED int autocontrast_value(used_values u, int v) {
    double scale = u.high > u.low ? 255.0 / (u.high - u.low) : 1;
    double offset = u.high > u.low ? -u.low * scale : 0;
    return clamp((int)(v * scale + offset));
}

/* pixels: of the image. below: of them, those of smaller values than `v`. */
RSB_SHARED int equalize_value(used_values u, uint32_t pixels, uint32_t below, int v) {
    uint32_t step = (pixels - u.last) / 255;
    if (u.low == u.high || !step) return v;
    uint32_t value = (step / 2 + below) / step;
    return value > 255 ? 255 : (int)value;
}

RSB_SHARED void autocontrast_table(const uint32_t *counts, uint8_t *table) {
    used_values used = find_used(counts);
    for (int v = 0; v < 256; v++) table[v] = (uint8_t)autocontrast_value(used, v);
}

RSB_SHARED void equalize_table(const uint32_t *counts, uint8_t *table) {
    used_values used = find_used(counts);
    uint32_t pixels = 0, below = 0;
    for (int v = 0; v < 256; v++) pixels += counts[v];
    for (int v = 0; v < 256; v++) {
        table[v] = (uint8_t)equalize_value(used, pixels, below, v);
        below += counts[v];
    }
}

/* ---- values ---- */

/* The bits that posterize keeps. */
RSB_SHARED int posterize_mask(double bits) {
    if (bits <= 0) return 0;
    return bits < 8 ? 0xFF00 >> (int)bits & 0xFF : 255;
}

RSB_SHARED int solarize_value(int value, int threshold) {
    return value < threshold ? value : 255 - value;
}

/* solarize_add: adds to values below 128. */
RSB_SHARED int solarize_add_value(int value, int add) {
    return value < 128 ? clamp(value + add) : value;
}

/* Image.convert("L"). */
RSB_SHARED int grey_value(int r, int g, int b) {
    return (19595 * r + 38470 * g + 7471 * b + 0x8000) >> 16;
}

/* Image.blend(degenerate, image, factor): Blend.c. */
RSB_SHARED int blend_value(int degenerate, int value, float factor) {
    float mixed = (float)degenerate + factor * (float)(value - degenerate);
    mixed = mixed < 0.0f ? 0.0f : mixed;
    return (int)(mixed > 255.0f ? 255.0f : mixed);
}

/* ---- Gaussian blur ---- */

enum {
    BLUR_PASSES = 3,
    WEIGHT_BITS = 24, /* fractional bits of the weights of a box */
};

/* A box whose border pixels have less weight than the inner ones, because its radius is not whole.
 * Each output pixel reads 2 reach + 1 inner pixels, and one of the border on either side. */
typedef struct {
    int reach;
    uint32_t inner, edge; /* weights */
} box;

/* Pillow's gaussian_blur_radius (BoxBlur.c): of BLUR_PASSES boxes that together have variance
 * sigma ^ 2. */
RSB_SHARED float box_radius(float sigma) {
    float variance = sigma * sigma / BLUR_PASSES;
    float length = (float)sqrt(12.0 * variance + 1.0);
    float whole = (float)floor((length - 1.0) / 2.0);
    float part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance);
    part /= 6 * (variance - (whole + 1) * (whole + 1));
    return whole + part;
}

RSB_SHARED box make_box(float radius) {
    box b;
    b.reach = (int)radius;
    b.inner = (uint32_t)((1 << WEIGHT_BITS) / (radius * 2 + 1));
    b.edge = ((1u << WEIGHT_BITS) - (b.reach * 2 + 1) * b.inner) / 2;
    return b;
}

/* ---- hue ---- */

/* Pillow's rgb2hsv_row and hsv2rgb (Convert.c), with `shift` added to the hue, of which 256 are the
 * whole circle. Types and casts are Pillow's, because they decide how values are rounded. Changes
 * the three bytes of a pixel. */
RSB_SHARED void shift_hue(uint8_t *p, int shift) {
    int r = p[0], g = p[1], b = p[2];
    int high = r > g ? (r > b ? r : b) : (g > b ? g : b);
    int low = r < g ? (r < b ? r : b) : (g < b ? g : b);
    uint8_t hue = 0;
    uint8_t saturation = 0;
    if (low != high) {
        float spread = (float)(high - low), s = spread / (float)high, h;
        float rc = (float)(high - r) / spread;
        float gc = (float)(high - g) / spread;
        float bc = (float)(high - b) / spread;
        h = r == high ? bc - gc : g == high ? (float)(2.0 + rc - bc) : (float)(4.0 + gc - rc);
        h = (float)fmod(h / 6.0 + 1.0, 1.0);
        hue = (uint8_t)(int)(h * 255.0);
        saturation = (uint8_t)(int)(s * 255.0);
    }
    hue = (uint8_t)(hue + shift);
    if (!saturation) {
        p[0] = p[1] = p[2] = (uint8_t)high;
        return;
    }
    int sector = (int)floor((float)hue * 6.0 / 255.0) % 6;
    float f = (float)((float)hue * 6.0 / 255.0 - floor((float)hue * 6.0 / 255.0));
    float fs = (float)((float)saturation / 255.0);
    uint8_t v = (uint8_t)high;
    uint8_t w = (uint8_t)(int)round((float)v * (1.0 - fs));
    uint8_t q = (uint8_t)(int)round((float)v * (1.0 - fs * f));
    uint8_t t = (uint8_t)(int)round((float)v * (1.0 - fs * (1.0 - f)));
    p[0] = sector == 0 || sector == 5 ? v : sector == 1 ? q : sector == 4 ? t : w;
    p[1] = sector == 1 || sector == 2 ? v : sector == 0 ? t : sector == 3 ? q : w;
    p[2] = sector == 3 || sector == 4 ? v : sector == 2 ? t : sector == 5 ? q : w;
}

/* ---- Image.transform(AFFINE) ---- */

#define MAX_COEFFICIENT 1e6 /* beyond it, `is_inside` and positions may round differently */

/* An axis of the nearest filter, to the bit: Geometry.c's affine_fixed. A position in the image has
 * 16 fractional bits, and lies in the pixel that its whole part counts. */
typedef struct {
    int64_t first, across, down; /* of the centre of output pixel (0, 0); steps to the next pixel */
} nearest_axis;

/* beyond it, positions do not fit in 64 bits; Pillow's have 32 */
#define MAX_NEAREST_COEFFICIENT 32768

RSB_SHARED int64_t fixed_point(double v) { return (int64_t)floor(v * 65536.0 + 0.5); }

/* m: the axis' coefficients. */
RSB_SHARED nearest_axis make_nearest_axis(const double *m) {
    nearest_axis n = {fixed_point(m[2] + m[0] * 0.5 + m[1] * 0.5), fixed_point(m[0]),
                      fixed_point(m[1])};
    return n;
}

RSB_SHARED int64_t nearest_position(nearest_axis n, int x, int y) {
    return n.first + n.across * x + n.down * y;
}

/* Whether a position lies in an axis of `size` pixels. */
RSB_SHARED int is_on_axis(int64_t position, int size) {
    return position >= 0 && position >> 16 < size;
}

/* Whether the centre of output pixel (x, y) lies within the source image: Geometry.c, to the bit.
 */
RSB_SHARED int is_inside(const double *a, int x, int y, int height, int width) {
    double u = x + 0.5, v = y + 0.5;
    double from_x = a[0] * u + a[1] * v + a[2], from_y = a[3] * u + a[4] * v + a[5];
    return from_x >= 0.0 && from_x < width && from_y >= 0.0 && from_y < height;
}

/* Weight `i`, 0 .. 3, of Pillow's bicubic filter (Geometry.c, a = -1) for a fraction of 14 bits. A
 * weight has 14 fractional bits. */
RSB_SHARED int cubic_weight(int fraction, int i) {
    float d = (float)fraction * (1.0f / 16384.0f), d2 = d * d, d3 = d2 * d;
    int first = (int)((2 * d2 - d - d3) * 16384.0f - 0.5f);
    int second = (int)((1 - 2 * d2 + d3) * 16384.0f + 0.5f);
    int fourth = (int)((d3 - d2) * 16384.0f - 0.5f);
    return i == 0 ? first : i == 1 ? second : i == 3 ? fourth : 16384 - first - second - fourth;
}

#endif
