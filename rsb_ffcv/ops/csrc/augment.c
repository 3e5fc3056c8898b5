/* The pixel operations of RandAugment, TrivialAugment, 3-Augment and ColorJitter, on one RGB image,
 * in place.
 *
 * Matched are Pillow's functions as timm and torchvision call them: ImageOps.autocontrast,
 * equalize, invert, posterize and solarize, ImageEnhance's four, hue through Image.convert("HSV"),
 * GaussianBlur and Image.transform(AFFINE). Those that work on single pixels or on histograms, the
 * sharpening and the blur give Pillow's bytes; the affine ones differ by one grey level at most,
 * because they interpolate in 14-bit fixed point.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "rsb.h"
#if RSB_AVX2
#include <immintrin.h>
#endif

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
    void (*spread)(const uint8_t *, uint32_t *, int);
    void (*walk)(double, double, double, double, int, int32_t *, int32_t *, int32_t *, int);
    void (*cubic_weights)(const int32_t *, uint32_t *, int);
    void (*bilinear_row)(const uint8_t *, int, const int32_t *, const int32_t *, const int32_t *,
                         uint8_t *, int);
    void (*bicubic_row)(const uint8_t *, int, const int32_t *, const int16_t *, const int16_t *,
                        uint8_t *, int);
    void (*blur_step)(uint32_t *, const uint8_t *, const uint8_t *, const uint8_t *,
                      const uint8_t *, uint8_t *, uint32_t, uint32_t, int);
} kernels;

#define KERNELS()                                                                                \
    {HOT(invert), HOT(mask),          HOT(solarize),     HOT(solarize_add), HOT(blend_constant), \
     HOT(blend),  HOT(grey),          HOT(grey_sum),     HOT(smooth_row),   HOT(spread),         \
     HOT(walk),   HOT(cubic_weights), HOT(bilinear_row), HOT(bicubic_row),  HOT(blur_step)}

#define HOT(name) name##_plain
#define HOT_VECTORS 0
#include "augment_hot.h"
static const kernels PLAIN = KERNELS();
#undef HOT
#undef HOT_VECTORS

#if RSB_AVX2
#pragma GCC push_options
#pragma GCC target("avx2,bmi,bmi2")
#define HOT(name) name##_avx2
#define HOT_VECTORS 1
#include "augment_hot.h"
static const kernels AVX2 = KERNELS();
#undef HOT
#pragma GCC pop_options
#endif

/* ---- histograms ---- */

static void histogram(const uint8_t *p, int pixels, uint32_t counts[3][256]) {
    /* two tables take turns: equal neighbours would wait for each other's increment */
    uint32_t more[3][256];
    memset(counts, 0, 3 * sizeof *counts);
    memset(more, 0, sizeof more);
    int i = 0;
    for (; i < pixels - 1; i += 2)
        for (int c = 0; c < 3; c++) counts[c][p[3 * i + c]]++, more[c][p[3 * i + 3 + c]]++;
    if (i < pixels)
        for (int c = 0; c < 3; c++) counts[c][p[3 * i + c]]++;
    for (int c = 0; c < 3; c++)
        for (int v = 0; v < 256; v++) counts[c][v] += more[c][v];
}

static void look_up(uint8_t *p, int pixels, uint8_t tables[3][256]) {
    for (int i = 0; i < pixels; i++)
        for (int c = 0; c < 3; c++) p[3 * i + c] = tables[c][p[3 * i + c]];
}

static void autocontrast_table(const uint32_t *counts, uint8_t *table) {
    int low = 0, high = 255;
    while (low < 255 && !counts[low]) low++;
    while (high > 0 && !counts[high]) high--;
    double scale = high > low ? 255.0 / (high - low) : 1, offset = high > low ? -low * scale : 0;
    for (int v = 0; v < 256; v++) {
        int value = (int)(v * scale + offset);
        table[v] = (uint8_t)(value < 0 ? 0 : value > 255 ? 255 : value);
    }
}

static void equalize_table(const uint32_t *counts, uint8_t *table) {
    uint64_t total = 0, last = 0;
    int used = 0;
    for (int v = 0; v < 256; v++)
        if (counts[v]) total += last = counts[v], used++;
    uint64_t step = (total - last) / 255, n = step / 2;
    for (int v = 0; v < 256; v++) {
        uint64_t value = used > 1 && step ? n / step : (uint64_t)v;
        table[v] = (uint8_t)(value > 255 ? 255 : value);
        n += counts[v];
    }
}

/* ---- neighbourhoods ---- */

static int sharpen(const kernels *k, uint8_t *image, int height, int width, float factor,
                   rsb_scratch *scratch) {
    int n = 3 * width;
    /* all border, which Pillow copies: nothing to blend with */
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

/* Three box blurs of fractional radius in either direction. */
static int blur(const kernels *k, uint8_t *image, int height, int width, float sigma,
                rsb_scratch *scratch) {
    float variance = sigma * sigma / 3, length = (float)sqrt(12.0 * variance + 1.0);
    float whole = (float)floor((length - 1.0) / 2.0);
    float part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance);
    part /= 6 * (variance - (whole + 1) * (whole + 1));
    float radius = whole + part;
    if (radius == 0) return RSB_OK;
    int reach = (int)radius;
    uint32_t inner = (uint32_t)((1 << 24) / (radius * 2 + 1)),
             edge = ((1u << 24) - (reach * 2 + 1) * inner) / 2;
    size_t bytes = (size_t)3 * width * height;
    int longer = 3 * (width > height ? width : height);
    uint8_t *turned = rsb_buffer(scratch, RSB_IMAGE, 2 * bytes);
    uint32_t *sum = (uint32_t *)rsb_buffer(scratch, RSB_ROWS, sizeof *sum * longer);
    if (!turned || !sum) return RSB_NO_MEMORY;
    uint8_t *other = turned + bytes;
    /* Columns of the transposed image are rows: the same loop serves both directions, and
     * vectorizes across columns. */
    for (int direction = 0; direction < 2; direction++) {
        int rows = direction ? height : width, n = 3 * (direction ? width : height);
        uint8_t *a = direction ? image : turned, *b = other;
        if (!direction)
            for (int y = 0; y < height; y++)
                for (int x = 0; x < width; x++)
                    memcpy(turned + 3 * ((size_t)x * height + y),
                           image + 3 * ((size_t)y * width + x), 3);
        for (int pass = 0; pass < 3; pass++) {
            for (int i = 0; i < n; i++) { /* what a box around row -1 covers, the border repeated */
                sum[i] = (uint32_t)a[i] * (reach + 1);
                for (int y = 0; y < reach; y++)
                    sum[i] += a[(size_t)(y < rows ? y : rows - 1) * n + i];
            }
            for (int y = 0; y < rows; y++) {
                int leave = y - reach - 1, enter = y + reach, high = y + reach + 1;
                leave = leave < 0 ? 0 : leave, enter = enter < rows ? enter : rows - 1,
                high = high < rows ? high : rows - 1;
                k->blur_step(sum, a + (size_t)leave * n, a + (size_t)enter * n,
                             a + (size_t)leave * n, a + (size_t)high * n, b + (size_t)y * n, inner,
                             edge, n);
            }
            uint8_t *swap = a;
            a = b, b = swap;
        }
        if (direction)
            memcpy(image, a, bytes);
        else
            for (int y = 0; y < height; y++)
                for (int x = 0; x < width; x++)
                    memcpy(image + 3 * ((size_t)y * width + x), a + 3 * ((size_t)x * height + y),
                           3);
    }
    return RSB_OK;
}

/* ---- hue ---- */

/* Convert.c: rgb2hsv_row, then hsv2rgb */
static void shift_hue(uint8_t *p, int pixels, int shift) {
    for (int i = 0; i < pixels; i++, p += 3) {
        int r = p[0], g = p[1], b = p[2];
        int high = r > g ? (r > b ? r : b) : (g > b ? g : b),
            low = r < g ? (r < b ? r : b) : (g < b ? g : b);
        uint8_t hue = 0, saturation = 0;
        if (low != high) {
            float range = (float)(high - low), s = range / (float)high, h;
            float rc = (float)(high - r) / range, gc = (float)(high - g) / range,
                  bc = (float)(high - b) / range;
            h = r == high ? bc - gc : g == high ? (float)(2.0 + rc - bc) : (float)(4.0 + gc - rc);
            h = (float)fmod(h / 6.0 + 1.0, 1.0);
            hue = (uint8_t)(int)(h * 255.0), saturation = (uint8_t)(int)(s * 255.0);
        }
        hue = (uint8_t)(hue + shift);
        if (!saturation) {
            p[0] = p[1] = p[2] = (uint8_t)high;
            continue;
        }
        int sector = (int)floor((float)hue * 6.0 / 255.0);
        float f = (float)((float)hue * 6.0 / 255.0 - (float)sector),
              fs = (float)((float)saturation / 255.0);
        uint8_t v = (uint8_t)high, low_value = (uint8_t)(int)round((float)v * (1.0 - fs));
        uint8_t q = (uint8_t)(int)round((float)v * (1.0 - fs * f)),
                t = (uint8_t)(int)round((float)v * (1.0 - fs * (1.0 - f)));
        const uint8_t rgb[6][3] = {{v, t, low_value}, {q, v, low_value}, {low_value, v, t},
                                   {low_value, q, v}, {t, low_value, v}, {v, low_value, q}};
        memcpy(p, rgb[sector % 6], 3);
    }
}

/* ---- geometry ---- */

/* as Geometry.c finds it, to the bit */
RSB_INLINE int inside(const double *a, int x, int y, rsb_size size) {
    double u = x + 0.5, v = y + 0.5;
    double from_x = a[0] * u + a[1] * v + a[2], from_y = a[3] * u + a[4] * v + a[5];
    return from_x >= 0.0 && from_x < size.width && from_y >= 0.0 && from_y < size.height;
}

static int affine(const kernels *k, uint8_t *image, int height, int width, const double *a,
                  int cubic, const uint8_t *fill, rsb_scratch *scratch) {
    for (int i = 0; i < 6; i++) /* beyond, positions that `inside` and `walk` round may lie apart */
        if (!(fabs(a[i]) <= 1e6)) return RSB_BAD_CALL;
    rsb_size size = {height, width};
    /* a copy with two pixels of border on every side, 4 bytes a pixel */
    int stride = 4 * (width + 4);
    uint8_t *copy = rsb_buffer(scratch, RSB_IMAGE, (size_t)stride * (height + 4));
    int32_t *rows = (int32_t *)rsb_buffer(scratch, RSB_ROWS, sizeof *rows * 7 * width);
    if (!copy || !rows) return RSB_NO_MEMORY;
    for (int y = 0; y < height; y++) {
        uint8_t *to = copy + (size_t)stride * (y + 2);
        const uint8_t *from = image + (size_t)3 * width * y;
        k->spread(from, (uint32_t *)to + 2, width);
        memcpy(to, to + 8, 4), memcpy(to + 4, to + 8, 4);
        memcpy(to + 4 * (width + 2), to + 4 * (width + 1), 4),
            memcpy(to + 4 * (width + 3), to + 4 * (width + 1), 4);
    }
    for (int border = 0; border < 2; border++) {
        memcpy(copy + (size_t)stride * border, copy + (size_t)stride * 2, stride);
        memcpy(copy + (size_t)stride * (height + 2 + border), copy + (size_t)stride * (height + 1),
               stride);
    }
    int32_t *offset = rows, *fx = rows + width, *fy = rows + 2 * width;
    int16_t *wx = (int16_t *)(rows + 3 * width), *wy = (int16_t *)(rows + 5 * width);
    /* the cubic starts a pixel further up and to the left */
    const uint8_t *from = copy - (cubic ? stride + 4 : 0);
    for (int y = 0; y < height; y++) {
        uint8_t *out = image + (size_t)3 * width * y;
        int start = 0, end = width;
        while (start < end && !inside(a, start, y, size)) start++;
        while (end > start && !inside(a, end - 1, y, size)) end--;
        for (int x = 0; x < width; x++)
            if (x < start || x >= end) memcpy(out + 3 * x, fill, 3);
        if (start == end) continue;
        double u = start + 0.5, v = y + 0.5;
        k->walk(a[0] * u + a[1] * v + a[2] + 1.5, a[3] * u + a[4] * v + a[5] + 1.5, a[0], a[3],
                stride, offset, fx, fy, end - start);
        if (cubic) {
            k->cubic_weights(fx, (uint32_t *)wx, end - start);
            k->cubic_weights(fy, (uint32_t *)wy, end - start);
            k->bicubic_row(from, stride, offset, wx, wy, out + 3 * start, end - start);
        } else
            k->bilinear_row(from, stride, offset, fx, fy, out + 3 * start, end - start);
    }
    return RSB_OK;
}

int rsb_augment(uint8_t *image, int height, int width, const void *draw, rsb_scratch *scratch) {
    const rsb_layer *layer = draw;
    const kernels *k = &PLAIN;
    const double *a = layer->argument;
    uint32_t counts[3][256];
    uint8_t tables[3][256], *grey;
#if RSB_AVX2
    if (rsb_has_avx2()) k = &AVX2;
#endif
    if (height < 1 || width < 1 || (int64_t)height * width > RSB_MAX_PIXELS) return RSB_BAD_CALL;
    if (!(fabs(a[0]) <= 65536)) return RSB_BAD_CALL; /* far beyond any op's range; NaN too */
    int pixels = height * width, n = 3 * pixels;
    switch (layer->op) {
    case RSB_IDENTITY: return RSB_OK;
    case RSB_AUTOCONTRAST:
    case RSB_EQUALIZE:
        histogram(image, pixels, counts);
        for (int c = 0; c < 3; c++)
            (layer->op == RSB_EQUALIZE ? equalize_table : autocontrast_table)(counts[c], tables[c]);
        look_up(image, pixels, tables);
        return RSB_OK;
    case RSB_INVERT: k->invert(image, n); return RSB_OK;
    case RSB_POSTERIZE:
        k->mask(image, n, a[0] <= 0 ? 0 : a[0] < 8 ? -1 << (8 - (int)a[0]) : 255);
        return RSB_OK;
    case RSB_SOLARIZE: k->solarize(image, n, (int)ceil(a[0])); return RSB_OK;
    case RSB_SOLARIZE_ADD: k->solarize_add(image, n, (int)a[0], 128); return RSB_OK;
    case RSB_COLOR:
        grey = rsb_buffer(scratch, RSB_IMAGE, n);
        if (!grey) return RSB_NO_MEMORY;
        k->grey(image, grey, pixels);
        k->blend(grey, image, n, (float)a[0]);
        return RSB_OK;
    case RSB_CONTRAST:
        k->blend_constant(image, n, (int)((double)k->grey_sum(image, pixels) / pixels + 0.5),
                          (float)a[0]);
        return RSB_OK;
    case RSB_BRIGHTNESS: k->blend_constant(image, n, 0, (float)a[0]); return RSB_OK;
    case RSB_SHARPNESS: return sharpen(k, image, height, width, (float)a[0], scratch);
    case RSB_BLUR: return blur(k, image, height, width, (float)a[0], scratch);
    case RSB_HUE: shift_hue(image, pixels, (int)(a[0] * 255)); return RSB_OK;
    case RSB_AFFINE:
        return affine(k, image, height, width, a, layer->filter == RSB_BICUBIC, layer->fill,
                      scratch);
    default: return RSB_BAD_CALL;
    }
}
