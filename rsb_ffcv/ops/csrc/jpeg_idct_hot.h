/* The inverse DCT of jpeg_planes.c, compiled once for each instruction set. */

/* One pass of the "islow" inverse DCT of libjpeg-turbo (jidctint.c), on eight lanes. Constants have
 * 13 fractional bits. `bias` is added to the result. few: r[4] .. r[7] are 0. */
RSB_INLINE void HOT(idct_pass)(v8 r[8], int shift, int bias, int few) {
    if (few) r[4] = r[5] = r[6] = r[7] = (v8){0}; /* lets the compiler drop terms */
    v8 z1 = (r[2] + r[6]) * 4433, even2 = z1 - r[6] * 15137, even3 = z1 + r[2] * 6270;
    v8 middle = (r[0] << 13) + ((bias << shift) + (1 << (shift - 1))),
       even0 = middle + (r[4] << 13);
    v8 even1 = middle - (r[4] << 13);
    v8 a = even0 + even3, d = even0 - even3, b = even1 + even2, c = even1 - even2;
    v8 s73 = r[7] + r[3], s51 = r[5] + r[1], z5 = (s73 + s51) * 9633;
    v8 z71 = (r[7] + r[1]) * -7373, z53 = (r[5] + r[3]) * -20995;
    v8 z3 = s73 * -16069 + z5, z4 = s51 * -3196 + z5;
    v8 t0 = r[7] * 2446 + z71 + z3, t1 = r[5] * 16819 + z53 + z4;
    v8 t2 = r[3] * 25172 + z53 + z3, t3 = r[1] * 12299 + z71 + z4;
    r[0] = (a + t3) >> shift;
    r[7] = (a - t3) >> shift;
    r[1] = (b + t2) >> shift;
    r[6] = (b - t2) >> shift;
    r[2] = (c + t1) >> shift;
    r[5] = (c - t1) >> shift;
    r[3] = (d + t0) >> shift;
    r[4] = (d - t0) >> shift;
}

RSB_INLINE void HOT(transpose)(v8 r[8]) {
    static const v8 lo32 = {0, 8, 1, 9, 4, 12, 5, 13}, hi32 = {2, 10, 3, 11, 6, 14, 7, 15};
    static const v8 lo64 = {0, 1, 8, 9, 4, 5, 12, 13}, hi64 = {2, 3, 10, 11, 6, 7, 14, 15};
    static const v8 lo128 = {0, 1, 2, 3, 8, 9, 10, 11}, hi128 = {4, 5, 6, 7, 12, 13, 14, 15};
    v8 s[8], t[8];
    for (int i = 0; i < 4; i++) {
        s[2 * i] = __builtin_shuffle(r[2 * i], r[2 * i + 1], lo32);
        s[2 * i + 1] = __builtin_shuffle(r[2 * i], r[2 * i + 1], hi32);
    }
    for (int i = 0; i < 8; i += 4) {
        t[i] = __builtin_shuffle(s[i], s[i + 2], lo64);
        t[i + 1] = __builtin_shuffle(s[i], s[i + 2], hi64);
        t[i + 2] = __builtin_shuffle(s[i + 1], s[i + 3], lo64);
        t[i + 3] = __builtin_shuffle(s[i + 1], s[i + 3], hi64);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = __builtin_shuffle(t[i], t[i + 4], lo128);
        r[i + 4] = __builtin_shuffle(t[i], t[i + 4], hi128);
    }
}

/* Dequantizes a block, transforms it, and writes 8 rows of 8 samples. few: all coefficients outside
 * of the upper left 4 x 4 are 0. */
RSB_INLINE void HOT(idct)(const int16_t *block, const int16_t *quant, uint8_t *out, int stride,
                          int few) {
    static const v8 even = {0, 8, 1, 9, 4, 12, 5, 13}, odd = {2, 10, 3, 11, 6, 14, 7, 15};
    v8 r[8];
    for (int i = 0; i < (few ? 4 : 8); i++) {
        v8s coefficients, steps;
        memcpy(&coefficients, block + 8 * i, 16);
        memcpy(&steps, quant + 8 * i, 16);
        r[i] = __builtin_convertvector(coefficients * steps, v8);
    }
    HOT(idct_pass)(r, 11, 0, few);
    HOT(transpose)(r);
    HOT(idct_pass)(r, 18, 128, few);
    for (int i = 0; i < 8; i++) { /* clamps to 0 .. 255 */
        r[i] &= r[i] >= 0;
        r[i] = (r[i] | (r[i] > 255)) & 255;
    }
    /* r[x] is column x, with one lane for each row. A lane of `left` is the first four samples of a
     * row, a lane of `right` the last four. */
    v8 left = r[0] | r[1] << 8 | r[2] << 16 | r[3] << 24,
       right = r[4] | r[5] << 8 | r[6] << 16 | r[7] << 24;
    v8 rows[2] = {__builtin_shuffle(left, right, even), __builtin_shuffle(left, right, odd)};
    for (int i = 0; i < 8; i++)
        memcpy(out + i * stride, (const uint8_t *)&rows[i >> 1 & 1] + 8 * (i >> 2 << 1 | (i & 1)),
               8);
}

static __attribute__((noinline)) void HOT(idct_all)(const int16_t *block, const int16_t *quant,
                                                    uint8_t *out, int stride) {
    HOT(idct)(block, quant, out, stride, 0);
}

static __attribute__((noinline)) void HOT(idct_few)(const int16_t *block, const int16_t *quant,
                                                    uint8_t *out, int stride) {
    HOT(idct)(block, quant, out, stride, 1);
}

/* The same for a block that has only a DC coefficient: all samples are equal. */
RSB_INLINE void HOT(idct_flat)(int dc, int quant, uint8_t *out, int stride) {
    /* what the two passes compute */
    int value = (((int16_t)(dc * quant) * 4 + 16) >> 5) + 128;
    value = value < 0 ? 0 : value > 255 ? 255 : value;
    for (int i = 0; i < 8; i++) memset(out + i * stride, value, 8);
}
