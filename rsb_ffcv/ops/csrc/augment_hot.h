/* The pixel loops of augment.c, which includes this file once for each instruction set.
 *
 * `n` counts bytes, unless a comment says otherwise; `pixels` counts RGB pixels. The compiler must
 * not fuse products and sums, because the result is Pillow's to the bit. A counter that is
 * multiplied for an index has the width of an address: a narrower one may wrap (-fwrapv), and the
 * compiler does not vectorize such a loop. */

static void HOT(invert)(uint8_t *p, int n) {
    for (int i = 0; i < n; i++) p[i] = (uint8_t)(255 - p[i]);
}

static void HOT(mask)(uint8_t *p, int n, int mask) {
    for (int i = 0; i < n; i++) p[i] = (uint8_t)(p[i] & mask);
}

static void HOT(solarize)(uint8_t *p, int n, int threshold) {
    for (int i = 0; i < n; i++) p[i] = p[i] < threshold ? p[i] : (uint8_t)(255 - p[i]);
}

static void HOT(solarize_add)(uint8_t *p, int n, int add, int threshold) {
    for (int i = 0; i < n; i++) {
        int sum = p[i] + add;
        p[i] = p[i] < threshold ? (uint8_t)(sum > 255 ? 255 : sum < 0 ? 0 : sum) : p[i];
    }
}

static void HOT(blend_constant)(uint8_t *p, int n, int degenerate, float factor) {
    for (int i = 0; i < n; i++) p[i] = (uint8_t)blend_value(degenerate, p[i], factor);
}

static void HOT(blend)(const uint8_t *restrict degenerate, uint8_t *restrict p, int n,
                       float factor) {
    for (int i = 0; i < n; i++) p[i] = (uint8_t)blend_value(degenerate[i], p[i], factor);
}

/* Pillow's RGB to L (Convert.c), each value three times. */
static void HOT(grey)(const uint8_t *restrict p, uint8_t *restrict out, int pixels) {
    for (ptrdiff_t i = 0; i < pixels; i++) {
        int value = grey_value(p[3 * i], p[3 * i + 1], p[3 * i + 2]);
        out[3 * i] = out[3 * i + 1] = out[3 * i + 2] = (uint8_t)value;
    }
}

static int64_t HOT(grey_sum)(const uint8_t *p, int pixels) {
    int64_t total = 0;
    for (ptrdiff_t i = 0; i < pixels;) {
        int32_t part = 0;
        for (ptrdiff_t end = i + 4096 < pixels ? i + 4096 : pixels; i < end; i++)
            part += grey_value(p[3 * i], p[3 * i + 1], p[3 * i + 2]);
        total += part;
    }
    return total;
}

/* One row of Pillow's ImageFilter.SMOOTH (Filter.c): the sum of eight neighbours and five times the
 * middle, divided by 13. The quotient is never halfway between two integers, so that it rounds as
 * Pillow's floating-point sum does. Leaves out the first and the last pixel of the `n` bytes. */
static void HOT(smooth_row)(const uint8_t *restrict above, const uint8_t *restrict row,
                            const uint8_t *restrict below, uint8_t *restrict out, int n) {
    above += 3;
    row += 3;
    below += 3;
    out += 3;
    for (ptrdiff_t i = 0; i < n - 6; i++) { /* all in 16 bits */
        uint16_t sum = (uint16_t)(above[i - 3] + above[i] + above[i + 3] + row[i - 3] + 5 * row[i] +
                                  row[i + 3] + below[i - 3] + below[i] + below[i + 3]);
        sum = (uint16_t)(2 * sum + 13);
        /* / 26, exact up to 6643 */
        out[i] = (uint8_t)((uint16_t)((uint32_t)sum * 20165 >> 16) >> 3);
    }
}

/* One row of a vertical box blur (BoxBlur.c). sum: the sums of the inner rows, which move
 * on by one row. leave, enter: the rows that leave and enter them. low, high: the border rows.
 * inner, edge: weights with 24 fractional bits. */
static void HOT(blur_step)(uint32_t *restrict sum, const uint8_t *leave, const uint8_t *enter,
                           const uint8_t *low, const uint8_t *high, uint8_t *restrict out,
                           uint32_t inner, uint32_t edge, int n) {
    for (int i = 0; i < n; i++) {
        sum[i] += (uint32_t)enter[i] - leave[i];
        out[i] =
            (uint8_t)((sum[i] * inner + (uint32_t)(low[i] + high[i]) * edge + (1u << 23)) >> 24);
    }
}
