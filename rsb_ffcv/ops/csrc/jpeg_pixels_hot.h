/* Upsampling and colour conversion: the pixel loops of jpeg_pixels.c, which includes this file once
 * for each instruction set. An RGBX pixel is a little-endian word:
 *
 *      31     24 23     16 15      8 7       0
 *     +---------+---------+---------+---------+
 *     |    0    |  blue   |  green  |   red   |
 *     +---------+---------+---------+---------+
 */

static void HOT(grey_row)(const uint8_t *restrict y, uint32_t *restrict out, int n) {
    for (int i = 0; i < n; i++) out[i] = y[i] * 0x010101u;
}

/* YCbCr to RGB as in jdcolor.c of libjpeg-turbo: constants have 16 fractional bits. */
static void HOT(colour_row)(const uint8_t *restrict y, const uint8_t *restrict cb,
                            const uint8_t *restrict cr, uint32_t *restrict out, int n) {
    int i = 0;
#if HOT_VECTORS
    /* The factors of red and blue exceed 16 bits. Their nearest integers, 1 and 2, are therefore
     * added separately, and the rest f is multiplied with the doubled chroma value x:
     * floor((floor(2 x f / 2^16) + 1) / 2) rounds x f / 2^16. */
    const __m256i middle = _mm256_set1_epi16(128), one = _mm256_set1_epi16(1),
                  half = _mm256_set1_epi32(32768);
    const __m256i green = _mm256_set1_epi32((uint16_t)-22554 | 18734 << 16),
                  zero = _mm256_setzero_si256();
    for (; i + 16 <= n; i += 16) {
        __m256i l = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(y + i)));
        __m256i u = _mm256_sub_epi16(
            _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(cb + i))), middle);
        __m256i v = _mm256_sub_epi16(
            _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(cr + i))), middle);
        __m256i u2 = _mm256_add_epi16(u, u), v2 = _mm256_add_epi16(v, v);
        __m256i r = _mm256_add_epi16(_mm256_mulhi_epi16(v2, _mm256_set1_epi16(26345)), one);
        __m256i b = _mm256_add_epi16(_mm256_mulhi_epi16(u2, _mm256_set1_epi16(-14942)), one);
        r = _mm256_add_epi16(_mm256_add_epi16(l, v), _mm256_srai_epi16(r, 1));
        b = _mm256_add_epi16(_mm256_add_epi16(l, u2), _mm256_srai_epi16(b, 1));
        __m256i g0 = _mm256_add_epi32(_mm256_madd_epi16(_mm256_unpacklo_epi16(u, v), green), half);
        __m256i g1 = _mm256_add_epi32(_mm256_madd_epi16(_mm256_unpackhi_epi16(u, v), green), half);
        __m256i g = _mm256_packs_epi32(_mm256_srai_epi32(g0, 16), _mm256_srai_epi32(g1, 16));
        g = _mm256_add_epi16(g, _mm256_sub_epi16(l, v));
        __m256i rb = _mm256_packus_epi16(r, b), g_ = _mm256_packus_epi16(g, zero);
        __m256i rg = _mm256_unpacklo_epi8(rb, g_), b_ = _mm256_unpackhi_epi8(rb, g_);
        __m256i low = _mm256_unpacklo_epi16(rg, b_), high = _mm256_unpackhi_epi16(rg, b_);
        _mm256_storeu_si256((__m256i *)(out + i), _mm256_permute2x128_si256(low, high, 0x20));
        _mm256_storeu_si256((__m256i *)(out + i + 8), _mm256_permute2x128_si256(low, high, 0x31));
    }
#endif
    for (; i < n; i++) out[i] = rsb_rgbx(y[i], cb[i], cr[i]);
}

/* Triangle filter of libjpeg-turbo (jdsample.c), between rows: 3/4 of `near` and 1/4 of `far`,
 * times 4. */
static void HOT(blend_rows)(const uint8_t *restrict near, const uint8_t *restrict far,
                            uint16_t *restrict out, int n) {
    for (int i = 0; i < n; i++) out[i] = (uint16_t)(3 * near[i] + far[i]);
}

/* For chroma that is not subsampled vertically. */
static void HOT(copy_row)(const uint8_t *restrict near, uint16_t *restrict out, int n) {
    for (int i = 0; i < n; i++) out[i] = near[i];
}

/* Triangle filter between columns: `n` sums become 2 n samples. low and high are the rounding terms
 * of the left and the right sample, shift the fractional bits of the result. Reads in[-1] and
 * in[n]; may write 32 bytes past the end. */
static void HOT(widen_row)(const uint16_t *restrict in, uint8_t *restrict out, int n, int low,
                           int high, int shift) {
    for (int i = 0; i < n; i += 8) {
        v8u before, here, after;
        memcpy(&before, in + i - 1, 16);
        memcpy(&here, in + i, 16);
        memcpy(&after, in + i + 1, 16);
        here *= 3;
        before = (here + before + (uint16_t)low) >> shift;
        after = (here + after + (uint16_t)high) >> shift;
        v8u pairs = before | after << 8; /* a lane: the left sample, then the right one */
        memcpy(out + 2 * i, &pairs, 16);
    }
}
