/* The filters of a resize: their supports, and the taps at the image's borders, are those of
 * Pillow's Resample.c. */
#ifndef RSB_FILTERS_H
#define RSB_FILTERS_H

#include "base.h"

enum {
    /* Fractional bits of a weight: as many as leave the largest weight within 15 bits and a sign.
     * Products with 8-bit pixels, of weights that add up to 1, then fit 32 bits. */
    MIN_SHIFT = 14,
    MAX_SHIFT = 20,
    MAX_WEIGHT = 32767,
    /* int32 elements before the device's tables of an axis: the shift, and the most taps of an
     * output pixel */
    TAPS_HEADER = 4,
};

/* Pixels along one axis: first .. first + count - 1. */
typedef struct {
    int first, count;
} range;

/* One axis of a resize: [start, start + length) of `size` source pixels becomes `out` pixels. */
typedef struct {
    double start, length;
    int size, out, filter;
} axis;

RSB_SHARED double weight(double x, int filter) {
    x = fabs(x);
    if (filter == RSB_BILINEAR) return x < 1 ? 1 - x : 0;
    if (x < 1) return (1.5 * x - 2.5) * x * x + 1; /* Keys' cubic, a = -0.5 */
    if (x < 2) return (((x - 5) * x + 8) * x - 4) * -0.5;
    return 0;
}

/* Source pixels on either side of the centre that an output pixel reads. scale: source pixels for
 * each output pixel. */
RSB_SHARED double support(double scale, int filter) {
    return (filter == RSB_BILINEAR ? 1 : 2) * (scale < 1 ? 1 : scale);
}

/* The source pixels of an output pixel whose centre lies at `centre`. */
RSB_SHARED range tap_range(double centre, double reach, int size) {
    int low = (int)(centre - reach + 0.5);
    int high = (int)(centre + reach + 0.5);
    low = low < 0 ? 0 : low;
    high = high > size ? size : high;
    range found;
    found.first = low;
    found.count = high - low;
    return found;
}

/* The weight of source pixel `k`, before the weights of an output pixel are divided by their sum.
 */
RSB_SHARED double raw_weight(const axis *a, double scale, double centre, int k) {
    double per_pixel = scale < 1 ? 1 : 1 / scale;
    return weight((k - centre + 0.5) * per_pixel, a->filter);
}

/* The largest number of taps of an output pixel. */
RSB_SHARED int max_taps(const axis *a) {
    return 2 * (int)ceil(support(a->length / a->out, a->filter)) + 1;
}

/* Bytes of the tables of an axis on the device (see resample.h). */
RSB_SHARED uint64_t rsb_packed_taps_bytes(const axis *a) {
    uint64_t out = (uint64_t)a->out;
    return 4 * (TAPS_HEADER + 2 * out) + 2 * out * (uint64_t)max_taps(a);
}

/* Fractional bits of the weights of an axis, from the largest of them. */
RSB_SHARED int weight_shift(double largest) {
    int shift = MIN_SHIFT;
    while (shift < MAX_SHIFT && largest * (1 << (shift + 1)) < MAX_WEIGHT) shift++;
    return shift;
}

#endif
