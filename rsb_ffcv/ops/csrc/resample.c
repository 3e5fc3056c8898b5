/* Pillow's antialiased resize of a box, in 16-bit fixed point, rounded to 8 bits between its two
 * passes.
 *
 * Pillow's weights have 22 fractional bits. These have as many as fit into 16-bit integers (14 or
 * more), so that one instruction multiplies and adds two taps. The result differs by one grey level
 * in some values; by two in about one value of a million with the bicubic filter, and in one of
 * several thousand when a few source pixels are enlarged to many.
 */
#include <string.h>

#include "taps.h"
#if RSB_AVX2
#include <immintrin.h>
#endif

RSB_INLINE uint8_t clip(int32_t value) {
    return value < 0 ? 0 : value > 255 ? 255 : (uint8_t)value;
}

/* Bytes of a row of a buffer: RSB_PAD more than it holds, 64-byte aligned. */
static size_t padded(size_t bytes) { return (bytes + RSB_PAD + 63) / 64 * 64; }

/* ---- portable ---- */

/* One row of source pixels to `n` RGB pixels. */
static void columns_plain(const taps *t, const uint8_t *in, int pixel_bytes, uint8_t *out, int n) {
    for (int i = 0; i < n; i++) {
        const uint8_t *p = in + (ptrdiff_t)t->first[i] * pixel_bytes;
        const int16_t *c = t->weights + (size_t)i * t->count;
        int32_t r = 1 << (t->shift - 1), g = r, b = r;
        for (int k = 0; k < t->count; k++, p += pixel_bytes) {
            r += p[0] * c[k];
            g += p[1] * c[k];
            b += p[2] * c[k];
        }
        out[3 * i] = clip(r >> t->shift);
        out[3 * i + 1] = clip(g >> t->shift);
        out[3 * i + 2] = clip(b >> t->shift);
    }
}

/* One output row of `n` bytes, from `count` source rows with the weights `c`. */
static void row_plain(const int16_t *c, int count, int shift, const uint8_t *in, ptrdiff_t stride,
                      uint8_t *out, int n) {
    for (int x = 0; x < n; x++) {
        int32_t sum = 1 << (shift - 1);
        for (int k = 0; k < count; k++) sum += in[k * stride + x] * c[k];
        out[x] = clip(sum >> shift);
    }
}

/* ---- AVX2 ---- */

#if RSB_AVX2

/* One or two rows of source pixels to `n` RGB pixels each. Two rows share the loads of weights. */
__attribute__((target("avx2"), always_inline)) static inline void
columns_groups(const taps *t, const uint8_t *in, ptrdiff_t stride, int rows, int pixel_bytes,
               int groups, uint8_t *out, ptrdiff_t out_stride, int n) {
    const char s = (char)pixel_bytes, z = -1;
    const __m256i pairs =
        _mm256_setr_epi8(0, z, s, z, 1, z, s + 1, z, 2, z, s + 2, z, z, z, z, z, 2 * s, z, 3 * s, z,
                         2 * s + 1, z, 3 * s + 1, z, 2 * s + 2, z, 3 * s + 2, z, z, z, z, z);
    const __m256i rgb = _mm256_setr_epi8(0, 1, 2, 4, 5, 6, z, z, z, z, z, z, z, z, z, z, 0, 1, 2, 4,
                                         5, 6, z, z, z, z, z, z, z, z, z, z);
    const __m256i half = _mm256_set1_epi32(1 << (t->shift - 1));
    const __m128i shift = _mm_cvtsi32_si128(t->shift);
    /* sum[row][pixel]: low half from the first pair of taps, high half from the second; r, g, b,
     * unused */
    __m256i sum[2][4];
    /* Writes 14 bytes for 12, and reads taps for 4 pixels: the rows and the tables are padded. */
    for (int i = 0; i < n; i += 4) {
#pragma GCC unroll 4 /* as all loops over `sum`, so that it stays in registers */
        for (int j = 0; j < 4; j++) {
            const uint8_t *p = in + (ptrdiff_t)t->first[i + j] * pixel_bytes;
            const __m256i *w = (const __m256i *)t->spread + (ptrdiff_t)(i + j) * groups;
            __m256i first = _mm256_setzero_si256(), second = first;
            for (int g = 0; g < groups; g++, p += TAP_GROUP * pixel_bytes) {
                __m256i four = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)p));
                first = _mm256_add_epi32(first,
                                         _mm256_madd_epi16(_mm256_shuffle_epi8(four, pairs), w[g]));
                if (rows == 1) continue;
                four = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(p + stride)));
                second = _mm256_add_epi32(
                    second, _mm256_madd_epi16(_mm256_shuffle_epi8(four, pairs), w[g]));
            }
            sum[0][j] = first;
            sum[1][j] = second;
        }
#pragma GCC unroll 2
        for (int r = 0; r < rows; r++) {
#pragma GCC unroll 2
            /* pixels j and j + 2: packing then puts neighbours side by side */
            for (int j = 0; j < 2; j++) {
                __m256i both =
                    _mm256_add_epi32(_mm256_permute2x128_si256(sum[r][j], sum[r][j + 2], 0x20),
                                     _mm256_permute2x128_si256(sum[r][j], sum[r][j + 2], 0x31));
                sum[r][j] = _mm256_sra_epi32(_mm256_add_epi32(both, half), shift);
            }
            __m256i words = _mm256_packs_epi32(sum[r][0], sum[r][1]);
            __m256i bytes = _mm256_shuffle_epi8(_mm256_packus_epi16(words, words), rgb);
            _mm_storel_epi64((__m128i *)(out + r * out_stride + 3 * i),
                             _mm256_castsi256_si128(bytes));
            _mm_storel_epi64((__m128i *)(out + r * out_stride + 3 * i + 6),
                             _mm256_extracti128_si256(bytes, 1));
        }
    }
}

__attribute__((target("avx2"))) static void columns_avx2(const taps *t, const uint8_t *in,
                                                         ptrdiff_t stride, int rows,
                                                         int pixel_bytes, uint8_t *out,
                                                         ptrdiff_t out_stride, int n) {
    int groups = t->count / TAP_GROUP;
    int y = 0;
    for (; y + 2 <= rows; y += 2, in += 2 * stride, out += 2 * out_stride)
        /* The constants let the compiler unroll the loop over groups, for most training crops. */
        if (groups == 1 && pixel_bytes == 4)
            columns_groups(t, in, stride, 2, 4, 1, out, out_stride, n);
        else if (groups == 2 && pixel_bytes == 4)
            columns_groups(t, in, stride, 2, 4, 2, out, out_stride, n);
        else if (groups == 3 && pixel_bytes == 4)
            columns_groups(t, in, stride, 2, 4, 3, out, out_stride, n);
        else
            columns_groups(t, in, stride, 2, pixel_bytes, groups, out, out_stride, n);
    if (y < rows) columns_groups(t, in, stride, 1, pixel_bytes, groups, out, out_stride, n);
}

__attribute__((target("avx2"))) static void row_avx2(const int16_t *c, int count, int shift,
                                                     const uint8_t *in, ptrdiff_t stride,
                                                     uint8_t *out, int n) {
    /* Only a reduction of more than 16 times (bicubic) or 32 times (bilinear) has more taps;
     * row_plain handles it. */
    enum { MAX_TAPS = 64 };
    int32_t pair[MAX_TAPS / 2]; /* weight of an odd row << 16 | weight of the even row before it */
    int x = 0;
    if (count <= MAX_TAPS) {
        const __m256i half = _mm256_set1_epi32(1 << (shift - 1));
        const __m128i by = _mm_cvtsi32_si128(shift);
        for (int k = 0; k < count; k += 2)
            pair[k / 2] = (uint16_t)c[k] | (k + 1 < count ? (int32_t)c[k + 1] * 65536 : 0);
        for (; x + 16 <= n; x += 16) {
            __m256i low = half, high = half;
            const uint8_t *p = in + x;
            /* with an odd count, the last row is read twice, the second time with weight 0 */
            for (int k = 0; k < count; k += 2, p += 2 * stride) {
                __m256i w = _mm256_set1_epi32(pair[k / 2]);
                __m256i a = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)p));
                __m256i b = _mm256_cvtepu8_epi16(
                    _mm_loadu_si128((const __m128i *)(k + 1 < count ? p + stride : p)));
                low = _mm256_add_epi32(low, _mm256_madd_epi16(_mm256_unpacklo_epi16(a, b), w));
                high = _mm256_add_epi32(high, _mm256_madd_epi16(_mm256_unpackhi_epi16(a, b), w));
            }
            __m256i words =
                _mm256_packs_epi32(_mm256_sra_epi32(low, by), _mm256_sra_epi32(high, by));
            _mm_storeu_si128((__m128i *)(out + x),
                             _mm_packus_epi16(_mm256_castsi256_si128(words),
                                              _mm256_extracti128_si256(words, 1)));
        }
    }
    row_plain(c, count, shift, in + x, stride, out + x, n - x);
}

#endif

/* Rows of source pixels to rows of `n` RGB pixels. Writes up to 15 bytes past the end of each. */
static void resample_columns(const taps *t, const uint8_t *in, ptrdiff_t stride, int rows,
                             int pixel_bytes, uint8_t *out, ptrdiff_t out_stride, int n) {
#if RSB_AVX2
    if (rsb_has_avx2()) {
        columns_avx2(t, in, stride, rows, pixel_bytes, out, out_stride, n);
        return;
    }
#endif
    for (int y = 0; y < rows; y++)
        columns_plain(t, in + y * stride, pixel_bytes, out + y * out_stride, n);
}

/* Output row `y`, of `n` bytes, from the rows of `in`. */
static void resample_row(const taps *t, int y, const uint8_t *in, ptrdiff_t stride, uint8_t *out,
                         int n) {
    const int16_t *c = t->weights + (size_t)y * t->count;
    in += t->first[y] * stride;
#if RSB_AVX2
    if (rsb_has_avx2()) {
        row_avx2(c, t->used[y], t->shift, in, stride, out, n);
        return;
    }
#endif
    row_plain(c, t->used[y], t->shift, in, stride, out, n);
}

/* ---- a window ---- */

static axis axis_across(rsb_box box, rsb_size image, rsb_size out_size, int filter) {
    return (axis){box.left, box.width, image.width, out_size.width, filter};
}

static axis axis_down(rsb_box box, rsb_size image, rsb_size out_size, int filter) {
    return (axis){box.top, box.height, image.height, out_size.height, filter};
}

rsb_rect rsb_reach(rsb_box box, rsb_size image, rsb_size out_size, int filter) {
    axis across = axis_across(box, image, out_size, filter);
    axis down = axis_down(box, image, out_size, filter);
    range columns = rsb_axis_range(&across);
    range rows = rsb_axis_range(&down);
    return (rsb_rect){rows.first, columns.first, rows.count, columns.count};
}

/* The two passes of a resize, and the source pixels they start from. */
typedef struct {
    taps across, down;
    const uint8_t *in;
    ptrdiff_t stride;
    int pixel_bytes;
    int rows, columns; /* of source pixels */
} passes;

/* Vertically first, two output rows at a time. */
static int resample_rows_first(const passes *p, uint8_t *out, rsb_size out_size,
                               rsb_scratch *scratch) {
    size_t out_bytes = 3 * (size_t)out_size.width;
    size_t in_bytes = (size_t)p->columns * p->pixel_bytes;
    size_t line_stride = padded(in_bytes);
    size_t narrow_stride = padded(out_bytes);
    uint8_t *line = rsb_buffer(scratch, RSB_NARROW, 2 * (line_stride + narrow_stride));
    if (!line) return RSB_NO_MEMORY;
    uint8_t *narrow = line + 2 * line_stride;
    for (int y = 0; y < out_size.height; y += 2) {
        int rows = y + 1 < out_size.height ? 2 : 1;
        for (int r = 0; r < rows; r++)
            resample_row(&p->down, y + r, p->in, p->stride, line + line_stride * r, in_bytes);
        resample_columns(&p->across, line, line_stride, rows, p->pixel_bytes, narrow, narrow_stride,
                         out_size.width);
        for (int r = 0; r < rows; r++)
            memcpy(out + out_bytes * (y + r), narrow + narrow_stride * r, out_bytes);
    }
    return RSB_OK;
}

/* Horizontally first. */
static int resample_columns_first(const passes *p, uint8_t *out, rsb_size out_size,
                                  rsb_scratch *scratch) {
    size_t out_bytes = 3 * (size_t)out_size.width;
    size_t stride = padded(out_bytes);
    uint8_t *narrow = rsb_buffer(scratch, RSB_NARROW, stride * p->rows);
    if (!narrow) return RSB_NO_MEMORY;
    resample_columns(&p->across, p->in, p->stride, p->rows, p->pixel_bytes, narrow, stride,
                     out_size.width);
    for (int y = 0; y < out_size.height; y++)
        resample_row(&p->down, y, narrow, stride, out + out_bytes * y, out_bytes);
    return RSB_OK;
}

int rsb_resample(const rsb_window *window, rsb_size image, rsb_box box, int filter, int flip,
                 int rows_first, uint8_t *out, rsb_size out_size, rsb_scratch *scratch) {
    axis across = axis_across(box, image, out_size, filter);
    axis down = axis_down(box, image, out_size, filter);
    range columns = rsb_axis_range(&across);
    range rows = rsb_axis_range(&down);
    const rsb_rect *area = &window->area;
    if (rows.first < area->top || columns.first < area->left ||
        rows.first + rows.count > area->top + area->height ||
        columns.first + columns.count > area->left + area->width)
        return RSB_BAD_CALL;

    size_t across_bytes = rsb_taps_bytes(&across);
    uint8_t *tables = rsb_buffer(scratch, RSB_TABLES, across_bytes + rsb_taps_bytes(&down));
    if (!tables) return RSB_NO_MEMORY;
    passes p;
    rsb_make_taps(&p.across, tables, &across, columns, 1, flip);
    rsb_make_taps(&p.down, tables + across_bytes, &down, rows, 0, 0);
    p.in = window->pixels + (rows.first - area->top) * window->stride +
           (ptrdiff_t)(columns.first - area->left) * window->pixel_bytes;
    p.stride = window->stride;
    p.pixel_bytes = window->pixel_bytes;
    p.rows = rows.count;
    p.columns = columns.count;
    return rows_first ? resample_rows_first(&p, out, out_size, scratch)
                      : resample_columns_first(&p, out, out_size, scratch);
}
