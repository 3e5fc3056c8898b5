/* The tables of weights by which a resize multiplies source pixels.
 */
#include <math.h>
#include <string.h>

#include "taps.h"

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
static int padded_taps(const axis *a) { return round_up(max_taps(a), TAP_GROUP); }

size_t rsb_taps_bytes(const axis *a) {
    size_t max_count = padded_taps(a);
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
    double largest = 0;
    t->count = 0;
    for (int i = 0; i < a->out; i++) {
        int to = mirrored ? a->out - 1 - i : i;
        double centre = a->start + (i + 0.5) * scale;
        range source = tap_range(centre, reach, a->size);
        double *w = exact + (size_t)to * max_count;
        double sum = 0;
        for (int k = 0; k < source.count; k++) {
            w[k] = raw_weight(a, scale, centre, source.first + k);
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
    int max_count = padded_taps(a);
    size_t padded_out = (size_t)a->out + TAP_GROUP;
    t->spread = (int16_t *)memory;
    double *exact = (double *)(t->spread + SPREAD * padded_out * max_count);
    t->weights = (int16_t *)(exact + padded_out * max_count);
    t->first = (int *)(t->weights + padded_out * max_count);
    t->used = t->first + padded_out;
    double largest = exact_taps(t, exact, max_count, a, window, mirrored);
    if (across) t->count = round_up(t->count, TAP_GROUP);
    t->shift = weight_shift(largest);
    for (int i = 0; i < a->out; i++) {
        const double *w = exact + (size_t)i * max_count;
        int16_t *to = t->weights + (size_t)i * t->count;
        int before = across ? taps_before(t, i, window) : 0;
        memset(to, 0, t->count * sizeof *to);
        for (int k = 0; k < t->used[i]; k++)
            to[before + k] = (int16_t)rsb_round(w[k] * (1 << t->shift));
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
