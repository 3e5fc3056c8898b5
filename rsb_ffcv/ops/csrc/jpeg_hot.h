/* The hot loops of jpeg.c, which includes this file once for every instruction set that it is
 * compiled for. HOT(name) gives each copy its own name. */

/* ---- entropy decoding ---- */

RSB_INLINE void HOT(refill)(reader *r) { /* at least 56 bits */
    uint64_t word;
    memcpy(&word, r->next, 8);
    r->bits |= __builtin_bswap64(word) >> r->count; /* little-endian machines only: see rsb.h */
    r->next += (63 - r->count) >> 3;
    r->count |= 56;
}

RSB_INLINE void HOT(drop)(reader *r, int n) {
    r->bits <<= n & 63;
    r->count -= n & 63;
}

/* One symbol, code and all; needs 16 bits. -1: no such code. */
RSB_INLINE int HOT(read_symbol)(reader *r, const huffman *t) {
    int entry = t->symbol[r->bits >> (64 - LOOK)];
    if (entry) {
        HOT(drop)(r, entry >> 8);
        return entry & 255;
    }
    int32_t window = (int32_t)(r->bits >> 48), length = LOOK + 1;
    while (length <= 16 && window >= t->max_code[length]) length++;
    if (length > 16) return -1;
    HOT(drop)(r, length);
    return t->symbols[((window >> (16 - length)) + t->offset[length]) & 255];
}

RSB_INLINE int HOT(read_bits)(reader *r, int size) { /* size 1 .. 15 */
    int value = (int)(r->bits >> (64 - size));
    HOT(drop)(r, size);
    return extend(value, size);
}

RSB_INLINE int HOT(read_dc)(reader *r, const huffman *t, int *prediction) {
    HOT(refill)(r);
    uint32_t entry = t->pair[r->bits >> (64 - LOOK)];
    if (RSB_LIKELY(entry)) {
        *prediction += (int32_t)entry >> 16;
        HOT(drop)(r, (int)entry);
        return 0;
    }
    int size = HOT(read_symbol)(r, t);
    if (size < 0) return -1;
    if (size) *prediction += HOT(read_bits)(r, size);
    return 0;
}

/* One step of read_ac without the tables of several symbols. Returns -1: damaged, 0: end of block,
 * 1: go on. */
RSB_INLINE int HOT(read_one)(reader *r, const huffman *t, const uint8_t *order, int16_t *block,
                             int *k) {
    HOT(refill)(r);
    int symbol = HOT(read_symbol)(r, t), size = symbol & 15;
    if (symbol < 0) return -1;
    if (!size && symbol != 0xF0) return symbol ? -1 : 0;
    *k += (symbol >> 4) + 1;
    if (*k > 63) return -1;
    if (size) {
        int value = HOT(read_bits)(r, size);
        if (block) block[order[*k]] = (int16_t)value;
    }
    return *k < 63;
}

/* The AC coefficients of a block, into `block` (zeroed). Returns the place of the last in zigzag
 * order, 0 where there is none, or -1: damaged. */
static __attribute__((noinline)) int HOT(read_ac)(reader *from, const huffman *t,
                                                  const uint8_t *order, int16_t *block) {
    reader r = *from;
    int k = 0, more = 1;
    while (more > 0) {
        HOT(refill)(&r);
        for (int turn = 0; turn < 5; turn++) { /* 5 x LOOK bits of the 56 */
            uint32_t entry = t->pair[r.bits >> (64 - LOOK)];
            if (RSB_UNLIKELY(!entry)) break;
            int after = k + (int)(entry >> 12 & 127), first = k + (int)(entry >> 6 & 63),
                last = (int)(entry >> 12 & LAST);
            /* Past the end: fine where the block ends with it; else the second symbol was none of
             * this block. */
            if (RSB_UNLIKELY(after > 62) && (last ? after >= LAST + 63 : after != 63)) break;
            /* of one symbol both have the same place: the next wins */
            block[order[after]] = (int16_t)((int32_t)entry >> 26);
            block[order[first]] = (int16_t)((int32_t)(entry << 6) >> 25);
            HOT(drop)(&r, (int)entry);
            if (RSB_UNLIKELY(after > 62)) {
                *from = r;
                return !last ? after : (entry >> 6 & 63) == 63 ? k : first;
            }
            k = after;
        }
        more = HOT(read_one)(&r, t, order, block, &k);
    }
    *from = r;
    return more < 0 ? more : k;
}

/* Runs over the AC coefficients of a block. Returns -1: damaged. */
RSB_INLINE int HOT(skip_ac)(reader *r, const huffman *t) {
    int k = 0, more = 1;
    while (more > 0) {
        HOT(refill)(r);
        for (int turn = 0; turn < 4; turn++) { /* 4 x SKIP bits of the 56 */
            int entry = t->skip[r->bits >> (64 - SKIP)], after = k + (entry >> 8);
            if (RSB_UNLIKELY(!entry)) break;
            if (RSB_UNLIKELY(after > 62) && (after >= END ? after >= END + 63 : after != 63)) break;
            HOT(drop)(r, entry & 255);
            if (RSB_UNLIKELY(after > 62)) return 0;
            k = after;
        }
        more = HOT(read_one)(r, t, NULL, NULL, &k);
    }
    return more;
}

/* Runs over all blocks of an MCU that lies outside of the window. Returns -1: damaged. */
static __attribute__((noinline)) int HOT(skip_mcu)(reader *from, const unit *units, int count,
                                                   int *predictions) {
    reader r = *from;
    for (int u = 0; u < count; u++)
        if (HOT(read_dc)(&r, units[u].dc, &predictions[units[u].component]) ||
            HOT(skip_ac)(&r, units[u].ac) < 0)
            return -1;
    *from = r;
    return 0;
}

/* ---- inverse DCT ---- */

/* One pass over eight lanes (jidctint.c of libjpeg-turbo, "islow": 13-bit constants); `bias` is
 * added to the result. */
RSB_INLINE void HOT(idct_pass)(v8 r[8], int shift, int bias, int few) {
    if (few) r[4] = r[5] = r[6] = r[7] = (v8){0}; /* for the compiler to see */
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
    r[0] = (a + t3) >> shift, r[7] = (a - t3) >> shift, r[1] = (b + t2) >> shift,
    r[6] = (b - t2) >> shift;
    r[2] = (c + t1) >> shift, r[5] = (c - t1) >> shift, r[3] = (d + t0) >> shift,
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
        t[i] = __builtin_shuffle(s[i], s[i + 2], lo64),
        t[i + 1] = __builtin_shuffle(s[i], s[i + 2], hi64);
        t[i + 2] = __builtin_shuffle(s[i + 1], s[i + 3], lo64),
              t[i + 3] = __builtin_shuffle(s[i + 1], s[i + 3], hi64);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = __builtin_shuffle(t[i], t[i + 4], lo128);
        r[i + 4] = __builtin_shuffle(t[i], t[i + 4], hi128);
    }
}

/* few: only the upper left 4 x 4 coefficients may be other than 0. */
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
    for (int i = 0; i < 8; i++) { /* to 0 .. 255 */
        r[i] &= r[i] >= 0;
        r[i] = (r[i] | (r[i] > 255)) & 255;
    }
    /* r[x] has column x, one lane a row: four columns make four bytes of each row, two of those the
     * row. */
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

RSB_INLINE void HOT(idct_flat)(int dc, int quant, uint8_t *out, int stride) {
    /* what both passes do to a lone first coefficient */
    int value = (((int16_t)(dc * quant) * 4 + 16) >> 5) + 128;
    value = value < 0 ? 0 : value > 255 ? 255 : value;
    for (int i = 0; i < 8; i++) memset(out + i * stride, value, 8);
}

/* Decodes MCU rows row_start .. row_end, columns column_start .. column_end, into the planes.
 * Without `entries` everything before them is run over; with them, at most SPAN - 1 MCUs of a row.
 * `spans`: entries of a row. */
static int HOT(decode_planes)(rsb_jpeg *j, const uint8_t *data, size_t length,
                              const uint8_t *entries, int spans, int columns, int row_start,
                              int row_end, int column_start, int column_end) {
    unit blocks[6];
    int units = make_units(j, blocks), prediction[3] = {0, 0, 0};
    reader r = {data, 0, 0};
    const uint8_t *limit = data + length;
    int16_t block[80] __attribute__((aligned(32)));
    for (int row = entries ? row_start : 0; row < row_end; row++) {
        /* nothing after the window's last MCU is needed */
        int column = 0, last = row + 1 < row_end ? columns : column_end;
        if (entries) {
            column = column_start / SPAN * SPAN, last = column_end;
            uint32_t bit =
                read_entry(entries, (size_t)row * spans + column_start / SPAN, prediction);
            if (bit / 8 > length) return RSB_UNUSUAL;
            r = (reader){data + bit / 8, 0, 0};
            HOT(refill)(&r);
            HOT(drop)(&r, bit % 8);
        }
        for (; column < last; column++) {
            int inside = row >= row_start && column >= column_start && column < column_end;
            if (!inside && HOT(skip_mcu)(&r, blocks, units, prediction)) return RSB_UNUSUAL;
            for (int u = 0; inside && u < units; u++) {
                int *dc = &prediction[blocks[u].component];
                if (HOT(read_dc)(&r, blocks[u].dc, dc)) return RSB_UNUSUAL;
                for (int z = 0; z < 4; z++) ((v8 *)block)[z] = (v8){0};
                block[0] = (int16_t)*dc;
                int final = HOT(read_ac)(&r, blocks[u].ac, j->order, block);
                if (final < 0) return RSB_UNUSUAL;
                uint8_t *out =
                    blocks[u].out + (ptrdiff_t)(column - column_start) * blocks[u].across;
                if (final > 9) /* the first ten places lie in the upper left 4 x 4 */
                    HOT(idct_all)(block, blocks[u].quant, out, blocks[u].stride);
                else if (final)
                    HOT(idct_few)(block, blocks[u].quant, out, blocks[u].stride);
                else
                    HOT(idct_flat)(block[0], blocks[u].quant[0], out, blocks[u].stride);
            }
            /* A damaged stream reads on into zeros: at most 6 blocks of 256 bytes before it is
             * noticed here. */
            if (r.next - (r.count >> 3) > limit) return RSB_UNUSUAL;
        }
        for (int u = 0; row >= row_start && u < units; u++) blocks[u].out += blocks[u].down;
    }
    return RSB_OK;
}

/* Where MCU 0, SPAN, 2 SPAN, ... of each row begins. Returns RSB_UNUSUAL for damage. */
static int HOT(find_entries)(rsb_jpeg *j, const uint8_t *data, size_t length, int columns, int rows,
                             uint8_t *entries) {
    unit blocks[6];
    int units = make_units(j, blocks), prediction[3] = {0, 0, 0};
    reader r = {data, 0, 0};
    for (int row = 0; row < rows; row++)
        for (int column = 0; column < columns; column++) {
            if (column % SPAN == 0)
                entries =
                    write_entry(entries, (uint32_t)(8 * (r.next - data) - r.count), prediction);
            if (HOT(skip_mcu)(&r, blocks, units, prediction) ||
                r.next - (r.count >> 3) > data + length)
                return RSB_UNUSUAL;
        }
    return RSB_OK;
}

/* ---- colours ---- */

static void HOT(grey_row)(const uint8_t *restrict y, uint32_t *restrict out, int n) {
    for (int i = 0; i < n; i++) out[i] = y[i] * 0x010101u;
}

/* jdcolor.c of libjpeg-turbo: 16-bit fixed point. */
static void HOT(colour_row)(const uint8_t *restrict y, const uint8_t *restrict cb,
                            const uint8_t *restrict cr, uint32_t *restrict out, int n) {
    int i = 0;
#if HOT_VECTORS
    /* The whole part of each factor is taken out and the rest multiplied by the doubled colour, so
     * that 16-bit lanes hold it: floor((floor(2 x f / 2^16) + 1) / 2) rounds x f / 2^16. */
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
    for (; i < n; i++) {
        int u = cb[i] - 128, v = cr[i] - 128;
        int r = y[i] + ((91881 * v + 32768) >> 16), b = y[i] + ((116130 * u + 32768) >> 16);
        int g = y[i] + ((-22554 * u - 46802 * v + 32768) >> 16);
        r = r < 0     ? 0
            : r > 255 ? 255
                      : r,
        g = g < 0     ? 0
            : g > 255 ? 255
                      : g,
        b = b < 0     ? 0
            : b > 255 ? 255
                      : b;
        out[i] = (uint32_t)(r | g << 8 | b << 16);
    }
}

/* 3/4 of `near` and 1/4 of `far`, times 4: the first half of the triangle filter (jdsample.c),
 * between rows. */
static void HOT(blend_rows)(const uint8_t *restrict near, const uint8_t *restrict far,
                            uint16_t *restrict out, int n) {
    for (int i = 0; i < n; i++) out[i] = (uint16_t)(3 * near[i] + far[i]);
}

static void HOT(copy_row)(const uint8_t *restrict near, uint16_t *restrict out, int n) {
    for (int i = 0; i < n; i++) out[i] = near[i];
}

/* The second half, between columns: `n` samples become 2 n. in[-1] and in[n] are read; may write 32
 * bytes more. */
static void HOT(widen_row)(const uint16_t *restrict in, uint8_t *restrict out, int n, int low,
                           int high, int shift) {
    for (int i = 0; i < n; i += 8) {
        v8u before, here, after;
        memcpy(&before, in + i - 1, 16), memcpy(&here, in + i, 16), memcpy(&after, in + i + 1, 16);
        here *= 3;
        before = (here + before + (uint16_t)low) >> shift,
        after = (here + after + (uint16_t)high) >> shift;
        v8u pairs = before | after << 8;
        memcpy(out + 2 * i, &pairs, 16);
    }
}
