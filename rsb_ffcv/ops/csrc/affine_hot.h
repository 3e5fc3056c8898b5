/* The pixel loops of affine.c, which includes this file once for each instruction set. As in
 * augment_hot.h, products and sums must not be fused. */

/* RGB to RGBX: a little-endian word of red, green, blue and 0. */
static void HOT(spread)(const uint8_t *restrict p, uint32_t *restrict out, int pixels) {
    for (ptrdiff_t i = 0; i < pixels; i++)
        out[i] = p[3 * i] | (uint32_t)p[3 * i + 1] << 8 | (uint32_t)p[3 * i + 2] << 16;
}

/* Source positions of `n` output pixels of a row. x and y are the position of the first one in the
 * copy with a border, dx and dy the steps. offset: bytes from the start of the copy to the pixel at
 * or above and left of the position. fx, fy: distance to that pixel, with 14 fractional bits. */
static void HOT(walk)(double x, double y, double dx, double dy, int stride,
                      int32_t *restrict offset, int32_t *restrict fx, int32_t *restrict fy, int n) {
    for (int i = 0; i < n; i++) {
        double u = x + dx * i, v = y + dy * i;
        int32_t iu = (int32_t)u, iv = (int32_t)v;
        offset[i] = 4 * iu + iv * stride;
        fx[i] = (int32_t)((u - iu) * 16384.0);
        fy[i] = (int32_t)((v - iv) * 16384.0);
    }
}

/* Four weights of Pillow's bicubic filter (Geometry.c, a = -1) for each of `n` fractions of 14
 * bits. A weight is signed and has 14 fractional bits; two elements of `out` hold those of a
 * fraction:
 *
 *      31            16 15             0
 *     +----------------+----------------+
 *     |    weight 1    |    weight 0    |     element 2 i
 *     |    weight 3    |    weight 2    |     element 2 i + 1
 *     +----------------+----------------+
 */
static void HOT(cubic_weights)(const int32_t *restrict fraction, uint32_t *restrict out, int n) {
    for (ptrdiff_t i = 0; i < n; i++) {
        float d = (float)fraction[i] * (1.0f / 16384.0f), d2 = d * d, d3 = d2 * d;
        int first = (int)((2 * d2 - d - d3) * 16384.0f - 0.5f),
            second = (int)((1 - 2 * d2 + d3) * 16384.0f + 0.5f);
        int fourth = (int)((d3 - d2) * 16384.0f - 0.5f), third = 16384 - first - second - fourth;
        out[2 * i] = (uint32_t)(first & 0xFFFF) | (uint32_t)second << 16;
        out[2 * i + 1] = (uint32_t)(third & 0xFFFF) | (uint32_t)fourth << 16;
    }
}

/* `n` pixels of a row, by bilinear interpolation in the RGBX copy. Results are truncated, not
 * rounded, as Pillow does. */
static void HOT(bilinear_row)(const uint8_t *from, int stride, const int32_t *offset,
                              const int32_t *fx, const int32_t *fy, uint8_t *out, int n) {
    int i = 0;
#if HOT_VECTORS
    const __m128i pairs = _mm_setr_epi8(0, -1, 4, -1, 1, -1, 5, -1, 2, -1, 6, -1, -1, -1, -1, -1);
    const __m128i tidy = _mm_setr_epi8(0, 4, 8, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
    for (; i < n - 1; i++) { /* writes 4 bytes for 3, so that it cannot do the last pixel */
        const uint8_t *p = from + offset[i];
        __m128i wx = _mm_set1_epi32((16384 - fx[i]) | fx[i] << 16),
                wy = _mm_set1_epi32((16384 - fy[i]) | fy[i] << 16);
        __m128i a = _mm_shuffle_epi8(_mm_loadl_epi64((const __m128i *)p), pairs);
        __m128i b = _mm_shuffle_epi8(_mm_loadl_epi64((const __m128i *)(p + stride)), pairs);
        a = _mm_srli_epi32(_mm_madd_epi16(a, wx), 7);
        b = _mm_srli_epi32(_mm_madd_epi16(b, wx), 7);
        __m128i both = _mm_or_si128(a, _mm_slli_epi32(b, 16));
        __m128i value = _mm_shuffle_epi8(_mm_srli_epi32(_mm_madd_epi16(both, wy), 21), tidy);
        int32_t rgb = _mm_cvtsi128_si32(value);
        memcpy(out + 3 * i, &rgb, 4);
    }
#endif
    for (; i < n; i++) {
        const uint8_t *p = from + offset[i], *q = p + stride;
        for (int c = 0; c < 3; c++) {
            int a = (p[c] * (16384 - fx[i]) + p[c + 4] * fx[i]) >> 7,
                b = (q[c] * (16384 - fx[i]) + q[c + 4] * fx[i]) >> 7;
            out[3 * i + c] = (uint8_t)((a * (16384 - fy[i]) + b * fy[i]) >> 21);
        }
    }
}

/* The same by the bicubic filter, over 4 x 4 pixels. wx, wy: 4 weights a pixel. */
static void HOT(bicubic_row)(const uint8_t *from, int stride, const int32_t *offset,
                             const int16_t *wx, const int16_t *wy, uint8_t *out, int n) {
    int i = 0;
#if HOT_VECTORS
    /* A register holds two rows, one in each half. `left` selects the left two of four pixels, and
     * `right` the right two, with the values of one colour side by side. */
    const __m256i left = _mm256_setr_epi8(0, -1, 4, -1, 1, -1, 5, -1, 2, -1, 6, -1, -1, -1, -1, -1,
                                          0, -1, 4, -1, 1, -1, 5, -1, 2, -1, 6, -1, -1, -1, -1, -1);
    const __m256i right =
        _mm256_setr_epi8(8, -1, 12, -1, 9, -1, 13, -1, 10, -1, 14, -1, -1, -1, -1, -1, 8, -1, 12,
                         -1, 9, -1, 13, -1, 10, -1, 14, -1, -1, -1, -1, -1);
    const __m256i alternate = _mm256_setr_epi8(0, 1, 4, 5, 0, 1, 4, 5, 0, 1, 4, 5, 0, 1, 4, 5, 2, 3,
                                               6, 7, 2, 3, 6, 7, 2, 3, 6, 7, 2, 3, 6, 7);
    for (; i < n - 1; i++) {
        const uint8_t *p = from + offset[i];
        int32_t pair[2];
        memcpy(pair, wx + 4 * i, 8);
        __m256i wl = _mm256_set1_epi32(pair[0]), wr = _mm256_set1_epi32(pair[1]), sum[2];
        for (int r = 0; r < 2; r++) { /* rows 0 and 1, rows 2 and 3 */
            __m256i rows = _mm256_loadu2_m128i((const __m128i *)(p + (2 * r + 1) * stride),
                                               (const __m128i *)(p + 2 * r * stride));
            sum[r] = _mm256_add_epi32(_mm256_madd_epi16(_mm256_shuffle_epi8(rows, left), wl),
                                      _mm256_madd_epi16(_mm256_shuffle_epi8(rows, right), wr));
        }
        __m256i upper = _mm256_and_si256(_mm256_srai_epi32(sum[0], 8), _mm256_set1_epi32(0xFFFF));
        __m256i lower = _mm256_slli_epi32(_mm256_srai_epi32(sum[1], 8), 16);
        __m256i down = _mm256_shuffle_epi8(
            _mm256_broadcastq_epi64(_mm_loadl_epi64((const __m128i *)(wy + 4 * i))), alternate);
        __m256i sums = _mm256_madd_epi16(_mm256_or_si256(upper, lower), down);
        __m128i value =
            _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
        value = _mm_srai_epi32(value, 20);
        value = _mm_packus_epi16(_mm_packs_epi32(value, value), value);
        int32_t rgb = _mm_cvtsi128_si32(value);
        memcpy(out + 3 * i, &rgb, 4);
    }
#endif
    for (; i < n; i++)
        for (int c = 0; c < 3; c++) {
            int sum = 0;
            for (int r = 0; r < 4; r++) {
                const uint8_t *p = from + offset[i] + r * stride + c;
                int row = p[0] * wx[4 * i] + p[4] * wx[4 * i + 1] + p[8] * wx[4 * i + 2] +
                          p[12] * wx[4 * i + 3];
                sum += (row >> 8) * wy[4 * i + r];
            }
            sum >>= 20;
            out[3 * i + c] = (uint8_t)(sum < 0 ? 0 : sum > 255 ? 255 : sum);
        }
}
