/* The tables of weights by which a resize multiplies source pixels.
 *
 * Filters, their supports and the taps at the image's borders are those of Pillow's Resample.c.
 */
#include <math.h>
#include <string.h>

#include "taps.h"

enum {
    /* Fractional bits of a weight: as many as leave the largest weight within 15 bits and a sign.
     * Products with 8-bit pixels, of weights that add up to 1, then fit 32 bits. */
    MIN_SHIFT = 14,
    MAX_SHIFT = 20,
};

/* ---- filters ---- */

static double weight(double x, int filter) {
    x = fabs(x);
    if (filter == RSB_BILINEAR) return x < 1 ? 1 - x : 0;
    if (x < 1) return (1.5 * x - 2.5) * x * x + 1; /* Keys' cubic, a = -0.5 */
    if (x < 2) return (((x - 5) * x + 8) * x - 4) * -0.5;
    return 0;
}

/* Source pixels on either side of the centre that an output pixel reads. scale: source pixels for
 * each output pixel. */
static double support(double scale, int filter) {
    return (filter == RSB_BILINEAR ? 1 : 2) * (scale < 1 ? 1 : scale);
}

/* The source pixels of an output pixel whose centre lies at `centre`. */
static range tap_range(double centre, double reach, int size) {
    int low = (int)(centre - reach + 0.5);
    int high = (int)(centre + reach + 0.5);
    low = low < 0 ? 0 : low;
    high = high > size ? size : high;
    return (range){low, high - low};
}

range rsb_axis_range(const axis *a) {
    double scale = a->length / a->out;
    double reach = support(scale, a->filter);
    range first = tap_range(a->start + 0.5 * scale, reach, a->size);
    range last = tap_range(a->start + (a->out - 0.5) * scale, reach, a->size);
    return (range){first.first, last.first + last.count - first.first};
}

/* ---- tables ---- */

static int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

/* The largest number of taps of an output pixel, in whole groups. */
static int max_taps(double scale, int filter) {
    return round_up(2 * (int)ceil(support(scale, filter)) + 1, TAP_GROUP);
}

size_t rsb_taps_bytes(const axis *a) {
    size_t max_count = max_taps(a->length / a->out, a->filter);
    size_t padded_out = (size_t)a->out + TAP_GROUP;
    size_t tap_bytes = sizeof(double) + (1 + SPREAD) * sizeof(int16_t);
    return (padded_out * (2 * sizeof(int) + max_count * tap_bytes) + 127) / 64 * 64;
}

/* Computes the ranges of source pixels, and their weights at exact + i * max_count for output pixel
 * i. Returns the largest weight. */
static double exact_taps(taps *t, double *exact, int max_count, const axis *a, range window,
                         int mirrored) {
    double scale = a->length / a->out;
    double reach = support(scale, a->filter);
    double per_pixel = scale < 1 ? 1 : 1 / scale;
    double largest = 0;
    t->count = 0;
    for (int i = 0; i < a->out; i++) {
        int to = mirrored ? a->out - 1 - i : i;
        double centre = a->start + (i + 0.5) * scale;
        range source = tap_range(centre, reach, a->size);
        double *w = exact + (size_t)to * max_count;
        double sum = 0;
        for (int k = 0; k < source.count; k++) {
            w[k] = weight((source.first + k - centre + 0.5) * per_pixel, a->filter);
            sum += w[k];
        }
        double factor = sum != 0 ? 1 / sum : 0;
        for (int k = 0; k < source.count; k++) {
            w[k] *= factor;
            largest = fabs(w[k]) > largest ? fabs(w[k]) : largest;
        }
        t->first[to] = source.first - window.first;
        t->used[to] = source.count;
        t->count = source.count > t->count ? source.count : t->count;
    }
    return largest;
}

/* How many unused taps output pixel i has before its used ones, so that its group of taps does not
 * extend past the end of the window. */
static int taps_before(const taps *t, int i, range window) {
    int before = t->first[i] + t->count - window.count;
    before = before < 0 ? 0 : before > t->first[i] ? t->first[i] : before;
    return before > t->count - t->used[i] ? t->count - t->used[i] : before;
}

static void spread_weights(int16_t *spread, const int16_t *weights, int count) {
    for (int k = 0; k < count; k += 2) {
        uint32_t pair;
        memcpy(&pair, weights + k, sizeof pair);
        int16_t *to = spread + k / TAP_GROUP * (TAP_GROUP * SPREAD) + k % TAP_GROUP * SPREAD;
        for (int j = 0; j < SPREAD; j++) memcpy(to + 2 * j, &pair, sizeof pair);
    }
}

void rsb_make_taps(taps *t, uint8_t *memory, const axis *a, range window, int across,
                   int mirrored) {
    int max_count = max_taps(a->length / a->out, a->filter);
    size_t padded_out = (size_t)a->out + TAP_GROUP;
    t->spread = (int16_t *)memory;
    double *exact = (double *)(t->spread + SPREAD * padded_out * max_count);
    t->weights = (int16_t *)(exact + padded_out * max_count);
    t->first = (int *)(t->weights + padded_out * max_count);
    t->used = t->first + padded_out;
    double largest = exact_taps(t, exact, max_count, a, window, mirrored);
    if (across) t->count = round_up(t->count, TAP_GROUP);
    t->shift = MIN_SHIFT;
    while (t->shift < MAX_SHIFT && largest * (1 << (t->shift + 1)) < INT16_MAX) t->shift++;
    for (int i = 0; i < a->out; i++) {
        const double *w = exact + (size_t)i * max_count;
        int16_t *to = t->weights + (size_t)i * t->count;
        int before = across ? taps_before(t, i, window) : 0;
        memset(to, 0, t->count * sizeof *to);
        for (int k = 0; k < t->used[i]; k++)
            to[before + k] = (int16_t)lrint(w[k] * (1 << t->shift));
        if (across) spread_weights(t->spread + (size_t)i * t->count * SPREAD, to, t->count);
        t->first[i] -= before;
    }
    /* columns_avx2 also computes up to three pixels past the last one; they are not used */
    for (int i = a->out; across && i < a->out + TAP_GROUP; i++) {
        int16_t *spread = t->spread + (size_t)i * t->count * SPREAD;
        t->first[i] = 0;
        memset(spread, 0, (size_t)t->count * SPREAD * sizeof *spread);
    }
}
