/* A window of a baseline JPEG, as RGBX pixels.
 *
 * Of the time that libjpeg-turbo spends on the window of a training image, three quarters go into
 * Huffman decoding, most of it for coefficients that nothing will look at. This decoder takes two
 * symbols of known value with one table look-up inside the window, as many as fit into one outside
 * of it, and stops after the window's last row. Its arithmetic (the "islow" inverse DCT, triangle
 * upsampling, YCbCr to RGB) gives libjpeg-turbo's bytes, for coefficients that an encoder can have
 * made from pixels (for others, libjpeg-turbo's own vector code differs from its C code).
 *
 * It knows what files of photographs are made of: 8-bit baseline Huffman, greyscale or YCbCr,
 * 4:4:4, 4:2:2 or 4:2:0, one scan. Everything else, and everything that looks damaged, is left to
 * libjpeg-turbo, which decides.
 */
#include <stdlib.h>
#include <string.h>
#include <turbojpeg.h>

#include "rsb.h"
#if RSB_AVX2
#include <immintrin.h>
#endif

/* bits of the Huffman look-up tables: two symbols often fit, and the tables stay in the L1 cache */
#define LOOK 11
#define LAST 64 /* what an end-of-block symbol adds to the advance of an entry of `pair` */
#define SKIP 12 /* of those that only run over symbols */
#define SPAN 8  /* MCUs from one entry point to the next */
/* what an end-of-block symbol adds to the position, told apart from a run that goes too far */
#define END 128

static const uint8_t NATURAL[64] = {0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,
                                    12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13, 6,  7,  14, 21, 28,
                                    35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51,
                                    58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63};

typedef struct {
    /* as in the file; also the key under which the tables below are kept */
    uint8_t counts[16], symbols[256];
    /* the latter two are built for those that read, and those that run over */
    int ready, has_pairs, has_skips;
    uint16_t symbol[1 << LOOK]; /* length << 8 | symbol; 0: a longer code */
    uint16_t skip[1 << SKIP];   /* as many symbols as fit: advance << 8 | bits; 0: none */
    /* of one or two symbols, from the top: value 2 (6 bits), value 1 (7), advance 1 + 2 (7),
     * advance 1 (6), length (6); 0: none. Of a table of first coefficients: value (16), length. */
    uint32_t pair[1 << LOOK];
    int32_t max_code[18]; /* largest code of each length, left-aligned to 16 bits, plus 1 */
    int32_t offset[17];   /* index of a code's symbol minus the code, by length */
} huffman;

typedef struct {
    int id, h, v, quant, dc, ac;
    int block_x, block_y; /* first block of the plane, in blocks of this component */
    int stride;
    uint8_t *plane;
    int width, height; /* of the whole component, in samples */
} component;

struct rsb_jpeg {
    huffman dc[2], ac[2];
    /* natural position of a coefficient; positions past 63 lead to one spare place */
    uint8_t order[64 + 2 * END];
    int16_t quant[4][64];                /* natural order */
    int quant_known, dc_known, ac_known; /* bit sets */
    int width, height, count, h_max, v_max;
    int columns, rows; /* of MCUs */
    component part[3];
};

typedef struct {
    const uint8_t *next;
    uint64_t bits; /* left-aligned */
    int count;
} reader;

/* One block of an MCU. */
typedef struct {
    const huffman *dc, *ac;
    const int16_t *quant;
    uint8_t *out; /* where the block of the row's first MCU goes */
    int component, stride, across, down;
} unit;

/* ---- tables ---- */

RSB_INLINE int extend(int value, int size) {
    return value < (1 << (size - 1)) ? value - (1 << size) + 1 : value;
}

typedef struct {
    int bits, advance, value;
} step;

/* The symbol with its value that follows the first `used` of the `width` bits of `window`; no bits:
 * it does not fit. */
static step look(const huffman *t, int window, int width, int used, int is_ac) {
    int left = width - used, rest = window & ((1 << left) - 1);
    int entry = t->symbol[left >= LOOK ? rest >> (left - LOOK) : rest << (LOOK - left)],
        length = entry >> 8;
    int size = is_ac ? entry & 15 : entry & 255, run = entry >> 4 & 15;
    if (!length || length + size > left) return (step){0, 0, 0};
    int value = size ? extend(rest >> (left - length - size) & ((1 << size) - 1), size) : 0;
    return (step){length + size, !is_ac ? 0 : size ? run + 1 : run == 15 ? 16 : END, value};
}

static int build_huffman(huffman *t, const uint8_t *counts, const uint8_t *symbols, int total) {
    if (t->ready && !memcmp(t->counts, counts, 16) && !memcmp(t->symbols, symbols, total))
        return RSB_OK;
    memset(t, 0, sizeof *t);
    memcpy(t->counts, counts, 16);
    memcpy(t->symbols, symbols, total);
    int code = 0, index = 0;
    for (int length = 1; length <= 16; length++) {
        t->offset[length] = index - code;
        for (int i = 0; i < counts[length - 1]; i++, code++, index++) {
            if (code >= 1 << length) return RSB_UNUSUAL;
            if (length <= LOOK)
                for (int j = code << (LOOK - length), n = 1 << (LOOK - length); n; j++, n--)
                    t->symbol[j] = (uint16_t)(length << 8 | symbols[index]);
        }
        t->max_code[length] = code << (16 - length);
        code <<= 1;
    }
    t->max_code[17] = 1 << 16;
    t->ready = 1;
    return RSB_OK;
}

static void build_pairs(huffman *t, int is_ac) {
    if (t->has_pairs) return;
    t->has_pairs = 1;
    for (int i = 0; i < 1 << LOOK; i++) {
        step first = look(t, i, LOOK, 0, is_ac), second = {0, 0, 0};
        if (!first.bits) continue;
        if (!is_ac) {
            t->pair[i] = (uint32_t)first.value << 16 | (uint32_t)first.bits;
            continue;
        }
        if (first.value < -64 || first.value > 63) continue;
        if (first.advance < END) second = look(t, i, LOOK, first.bits, 1);
        if (second.value < -32 || second.value > 31) second = (step){0, 0, 0};
        /* An end of block leaves the place after its own, and 63 more, which is none of a block's
         * or not looked at. */
        int ends = first.advance == END || second.advance == END;
        int one = first.advance == END ? 63 : first.advance,
            both = first.advance % END + second.advance % END + ends * LAST;
        t->pair[i] = (uint32_t)second.value << 26 | ((uint32_t)first.value & 127) << 19 |
                     (uint32_t)both << 12 | (uint32_t)one << 6 |
                     (uint32_t)(first.bits + second.bits);
    }
}

static void build_skips(huffman *t) {
    if (t->has_skips) return;
    t->has_skips = 1;
    for (int i = 0; i < 1 << SKIP; i++) {
        int used = 0, advance = 0;
        while (advance < 64) {
            step next = look(t, i, SKIP, used, 1);
            if (!next.bits) break;
            used += next.bits, advance += next.advance;
        }
        t->skip[i] = (uint16_t)(used ? advance << 8 | used : 0);
    }
}

/* ---- headers ---- */

static int read_quant(rsb_jpeg *j, const uint8_t *p, size_t n) {
    while (n) {
        int wide = p[0] >> 4, which = p[0] & 15;
        size_t length = wide ? 129 : 65;
        if (wide > 1 || which > 3 || n < length) return RSB_UNUSUAL;
        for (int i = 0; i < 64; i++) {
            int value = wide ? p[1 + 2 * i] << 8 | p[2 + 2 * i] : p[1 + i];
            if (value == 0 || value > 32767) return RSB_UNUSUAL;
            j->quant[which][NATURAL[i]] = (int16_t)value;
        }
        j->quant_known |= 1 << which;
        p += length, n -= length;
    }
    return RSB_OK;
}

static int read_huffman(rsb_jpeg *j, const uint8_t *p, size_t n) {
    while (n) {
        if (n < 17) return RSB_UNUSUAL;
        int is_ac = p[0] >> 4, which = p[0] & 15;
        size_t total = 0;
        for (int i = 1; i <= 16; i++) total += p[i];
        if (is_ac > 1 || which > 1 || total > 256 || n < 17 + total) return RSB_UNUSUAL;
        if (!is_ac)
            for (size_t i = 0; i < total; i++)
                if (p[17 + i] > 11) return RSB_UNUSUAL;
        if (build_huffman(is_ac ? &j->ac[which] : &j->dc[which], p + 1, p + 17, (int)total))
            return RSB_UNUSUAL;
        *(is_ac ? &j->ac_known : &j->dc_known) |= 1 << which;
        p += 17 + total, n -= 17 + total;
    }
    return RSB_OK;
}

static int read_frame(rsb_jpeg *j, const uint8_t *p, size_t n) {
    if (n < 6 || p[0] != 8 || (p[5] != 1 && p[5] != 3) || n != 6 + 3 * (size_t)p[5])
        return RSB_UNUSUAL;
    j->height = p[1] << 8 | p[2], j->width = p[3] << 8 | p[4], j->count = p[5];
    if (!j->height || !j->width) return RSB_UNUSUAL;
    for (int i = 0; i < j->count; i++) {
        component *c = &j->part[i];
        c->id = p[6 + 3 * i], c->h = p[7 + 3 * i] >> 4, c->v = p[7 + 3 * i] & 15,
        c->quant = p[8 + 3 * i];
        if (c->quant > 3) return RSB_UNUSUAL;
        /* a scan of one component has no interleaving, whatever its factors */
        if (j->count == 1) c->h = c->v = 1;
        if (i && (c->h != 1 || c->v != 1)) return RSB_UNUSUAL;
    }
    int h = j->part[0].h, v = j->part[0].v;
    if (!((h == 1 && v == 1) || (h == 2 && (v == 1 || v == 2)))) return RSB_UNUSUAL;
    /* libjpeg does not smooth chroma of one or two columns */
    if (h == 2 && j->width < 5) return RSB_UNUSUAL;
    j->h_max = h, j->v_max = v;
    for (int i = 0; i < j->count; i++) {
        component *c = &j->part[i];
        c->width = (j->width * c->h + h - 1) / h, c->height = (j->height * c->v + v - 1) / v;
    }
    return RSB_OK;
}

static int read_scan(rsb_jpeg *j, const uint8_t *p, size_t n) {
    if (!j->count || n != 4 + 2 * (size_t)j->count || p[0] != j->count) return RSB_UNUSUAL;
    for (int i = 0; i < j->count; i++) {
        component *c = &j->part[i];
        c->dc = p[2 + 2 * i] >> 4, c->ac = p[2 + 2 * i] & 15;
        if (p[1 + 2 * i] != c->id || c->dc > 1 || c->ac > 1 || !(j->quant_known >> c->quant & 1) ||
            !(j->dc_known >> c->dc & 1) || !(j->ac_known >> c->ac & 1))
            return RSB_UNUSUAL;
    }
    p += 1 + 2 * j->count;
    return p[0] == 0 && p[1] == 63 && p[2] == 0 ? RSB_OK : RSB_UNUSUAL;
}

/* Reads all markers up to the scan; `*scan` is then the offset of the entropy-coded bytes. */
static int read_headers(rsb_jpeg *j, const uint8_t *bytes, size_t size, size_t *scan) {
    int jfif = 0, adobe = -1, status = RSB_OK;
    j->quant_known = j->dc_known = j->ac_known = j->count = 0;
    if (size < 4 || bytes[0] != 0xFF || bytes[1] != 0xD8) return RSB_UNUSUAL;
    for (size_t at = 2;;) {
        if (at + 4 > size || bytes[at] != 0xFF) return RSB_UNUSUAL;
        int marker = bytes[at + 1];
        if (marker == 0xFF) { /* fill */
            at++;
            continue;
        }
        size_t length = (size_t)bytes[at + 2] << 8 | bytes[at + 3];
        if (length < 2 || at + 2 + length > size) return RSB_UNUSUAL;
        const uint8_t *p = bytes + at + 4;
        size_t n = length - 2;
        at += 2 + length;
        if (marker == 0xDB)
            status = read_quant(j, p, n);
        else if (marker == 0xC4)
            status = read_huffman(j, p, n);
        else if (marker == 0xC0 || marker == 0xC1)
            status = j->count ? RSB_UNUSUAL : read_frame(j, p, n);
        else if (marker == 0xE0)
            jfif |= n >= 5 && !memcmp(p, "JFIF", 5);
        else if (marker == 0xEE && n >= 12 && !memcmp(p, "Adobe", 5))
            adobe = p[11];
        else if (marker == 0xDA) {
            /* Which colours three components are: as libjpeg's default_decompress_parms, YCbCr only
             * where it is clear. */
            if (j->count == 3 && !jfif && adobe != 1 &&
                !(adobe < 0 && j->part[0].id == 1 && j->part[1].id == 2 && j->part[2].id == 3))
                return RSB_UNUSUAL;
            *scan = at;
            return read_scan(j, p, n);
        } else if (!((marker >= 0xE1 && marker <= 0xEF) || marker == 0xFE))
            return RSB_UNUSUAL; /* progressive, arithmetic, restart intervals, ... */
        if (status) return status;
    }
}

/* Copies entropy-coded bytes without their stuffed zeros. Returns their number; the marker after
 * them must be EOI. */
static int unstuff(const uint8_t *in, size_t n, uint8_t *out, size_t *length) {
    uint8_t *start = out;
    const uint8_t *end = in + n;
    while (in < end) {
        const uint8_t *mark = memchr(in, 0xFF, end - in);
        if (!mark || mark + 1 >= end) return RSB_UNUSUAL;
        memcpy(out, in, mark - in);
        out += mark - in;
        in = mark + 2;
        if (mark[1] == 0)
            *out++ = 0xFF;
        else if (mark[1] == 0xD9) {
            *length = out - start;
            return RSB_OK;
        } else
            return RSB_UNUSUAL;
    }
    return RSB_UNUSUAL;
}

/* ---- entry points ---- */

/* A decoder of Huffman codes has to run over all that comes before a window. Entry points save most
 * of it: for every SPAN-th MCU of each row, from the first on, the bit at which it begins (uint32,
 * stuffed zeros not counted) and the three predictions of its first coefficients (int16),
 * little-endian. The writer lays them after the image's own bytes. */

static uint32_t read_entry(const uint8_t *entries, size_t which, int *prediction) {
    uint32_t bit;
    int16_t values[3];
    memcpy(&bit, entries + RSB_ENTRY_BYTES * which, 4);
    memcpy(values, entries + RSB_ENTRY_BYTES * which + 4, 6);
    for (int i = 0; i < 3; i++) prediction[i] = values[i];
    return bit;
}

static uint8_t *write_entry(uint8_t *to, uint32_t bit, const int *prediction) {
    int16_t values[3] = {(int16_t)prediction[0], (int16_t)prediction[1], (int16_t)prediction[2]};
    memcpy(to, &bit, 4);
    memcpy(to + 4, values, 6);
    return to + RSB_ENTRY_BYTES;
}

/* The blocks of an MCU, in the file's order; returns their number. */
static int make_units(const rsb_jpeg *j, unit *units) {
    int n = 0;
    for (int i = 0; i < j->count; i++)
        for (int b = 0; b < j->part[i].h * j->part[i].v; b++, n++) {
            const component *c = &j->part[i];
            units[n].dc = &j->dc[c->dc], units[n].ac = &j->ac[c->ac],
            units[n].quant = j->quant[c->quant];
            units[n].component = i, units[n].stride = c->stride;
            units[n].across = 8 * c->h, units[n].down = 8 * c->v * c->stride;
            units[n].out = c->plane + (ptrdiff_t)(b / c->h) * 8 * c->stride + b % c->h * 8;
        }
    return n;
}

typedef int32_t v8 __attribute__((vector_size(32)));
typedef int16_t v8s __attribute__((vector_size(16)));
typedef uint16_t v8u __attribute__((vector_size(16)));

typedef struct {
    int (*decode_planes)(rsb_jpeg *, const uint8_t *, size_t, const uint8_t *, int, int, int, int,
                         int, int);
    int (*find_entries)(rsb_jpeg *, const uint8_t *, size_t, int, int, uint8_t *);
    void (*grey_row)(const uint8_t *, uint32_t *, int);
    void (*colour_row)(const uint8_t *, const uint8_t *, const uint8_t *, uint32_t *, int);
    void (*blend_rows)(const uint8_t *, const uint8_t *, uint16_t *, int);
    void (*copy_row)(const uint8_t *, uint16_t *, int);
    void (*widen_row)(const uint16_t *, uint8_t *, int, int, int, int);
} kernels;

#define KERNELS()                                                           \
    {HOT(decode_planes), HOT(find_entries), HOT(grey_row), HOT(colour_row), \
     HOT(blend_rows),    HOT(copy_row),     HOT(widen_row)}

#define HOT(name) name##_plain
#define HOT_VECTORS 0
#include "jpeg_hot.h"
static const kernels PLAIN = KERNELS();
#undef HOT
#undef HOT_VECTORS

#if RSB_AVX2
#pragma GCC push_options
#pragma GCC target("avx2,bmi,bmi2,lzcnt")
#define HOT(name) name##_avx2
#define HOT_VECTORS 1
#include "jpeg_hot.h"
static const kernels AVX2 = KERNELS();
#undef HOT
#pragma GCC pop_options
#endif

static const kernels *pick_kernels(void) {
#if RSB_AVX2
    if (rsb_has_avx2()) return &AVX2;
#endif
    return &PLAIN;
}

/* ---- pixels ---- */

/* Columns first - 1 .. first + n of chroma row `y` (and `other`), as 16-bit sums that widen_row
 * takes; what lies outside of the image repeats its border. */
static void chroma_row(const kernels *k, const component *c, int y, int other, int first, int n,
                       uint16_t *sums) {
    const uint8_t *near = c->plane + (ptrdiff_t)(y - 8 * c->block_y) * c->stride - 8 * c->block_x;
    int low = first > 0 ? first - 1 : 0, high = first + n < c->width ? first + n + 1 : c->width;
    uint16_t *to = sums + low - (first - 1);
    if (other == y)
        k->copy_row(near + low, to, high - low);
    else {
        other = other < 0 ? 0 : other >= c->height ? c->height - 1 : other;
        k->blend_rows(near + low, near + (ptrdiff_t)(other - y) * c->stride + low, to, high - low);
    }
    if (first == 0) sums[0] = sums[1];
    if (high == first + n) sums[n + 1] = sums[n];
}

static int window_pixels(rsb_jpeg *j, const kernels *k, int top, int left, int height, int width,
                         rsb_scratch *scratch, rsb_window *window) {
    /* chroma columns */
    int first = left / j->h_max, n = (left + width + j->h_max - 1) / j->h_max - first;
    int two = j->v_max == 2;
    size_t stride = 4 * (size_t)width + RSB_PAD, wide = 2 * (size_t)n + RSB_PAD;
    uint8_t *pixels = rsb_buffer(scratch, RSB_IMAGE, stride * height);
    uint8_t *rows = rsb_buffer(scratch, RSB_ROWS, 3 * wide);
    if (!pixels || !rows) return RSB_NO_MEMORY;
    uint16_t *sums = (uint16_t *)(rows + 2 * wide);
    for (int y = top; y < top + height; y++) {
        const uint8_t *plane[3];
        for (int i = 0; i < j->count; i++) {
            const component *c = &j->part[i];
            if (i == 0 || j->h_max == 1) {
                plane[i] =
                    c->plane + (ptrdiff_t)(y - 8 * c->block_y) * c->stride + left - 8 * c->block_x;
                continue;
            }
            int own = y / j->v_max, other = !two ? own : y % 2 ? own + 1 : own - 1;
            chroma_row(k, c, own, other, first, n, sums);
            uint8_t *out = rows + (i - 1) * wide;
            k->widen_row(sums + 1, out, n, two ? 8 : 1, two ? 7 : 2, two ? 4 : 2);
            plane[i] = out + left % 2;
        }
        uint32_t *out = (uint32_t *)(pixels + stride * (y - top));
        if (j->count == 1)
            k->grey_row(plane[0], out, width);
        else
            k->colour_row(plane[0], plane[1], plane[2], out, width);
    }
    *window = (rsb_window){pixels, (ptrdiff_t)stride, 4, left, top, width, height};
    return RSB_OK;
}

/* Reads the headers and copies the entropy-coded bytes without their stuffing. */
static int open_jpeg(const uint8_t *bytes, size_t size, rsb_scratch *scratch, uint8_t **data,
                     size_t *length) {
    rsb_jpeg *j = scratch->jpeg;
    if (!j) {
        if (!(j = scratch->jpeg = calloc(1, sizeof *j))) return RSB_NO_MEMORY;
        for (int i = 0; i < 64 + 2 * END; i++) j->order[i] = i < 64 ? NATURAL[i] : 64;
    }
    size_t scan = 0;
    int status = read_headers(j, bytes, size, &scan);
    if (status) return status;
    j->columns = (j->width + 8 * j->h_max - 1) / (8 * j->h_max),
    j->rows = (j->height + 8 * j->v_max - 1) / (8 * j->v_max);
    /* zeros that a damaged stream may run into */
    *data = rsb_buffer(scratch, RSB_ENTROPY, size - scan + 2048);
    if (!*data) return RSB_NO_MEMORY;
    if ((status = unstuff(bytes + scan, size - scan, *data, length))) return status;
    memset(*data + *length, 0, 2048);
    return RSB_OK;
}

/* The tables that reading coefficients, and running over them, needs. */
static void build_tables(rsb_jpeg *j, int reading, int running) {
    for (int i = 0; i < j->count; i++) {
        build_pairs(&j->dc[j->part[i].dc], 0);
        if (reading) build_pairs(&j->ac[j->part[i].ac], 1);
        if (running) build_skips(&j->ac[j->part[i].ac]);
    }
}

static int fast_window(const uint8_t *bytes, size_t size, size_t entry_bytes, int image_height,
                       int image_width, int top, int left, int height, int width,
                       rsb_scratch *scratch, rsb_window *window) {
    uint8_t *data = NULL;
    size_t length = 0;
    int status = open_jpeg(bytes, size, scratch, &data, &length);
    rsb_jpeg *j = scratch->jpeg;
    if (status) return status;
    if (j->height != image_height || j->width != image_width) return RSB_BAD_SIZE;

    int across = 8 * j->h_max, down = 8 * j->v_max;
    /* the chroma neighbours of the window */
    int margin_x = j->h_max == 2 ? 2 : 0, margin_y = j->v_max == 2 ? 2 : 0;
    int column_start = (left > margin_x ? left - margin_x : 0) / across;
    int column_end = (left + width - 1 + margin_x) / across + 1,
        row_end = (top + height - 1 + margin_y) / down + 1;
    int row_start = (top > margin_y ? top - margin_y : 0) / down;
    column_end = column_end < j->columns ? column_end : j->columns,
    row_end = row_end < j->rows ? row_end : j->rows;
    size_t total = 0, sizes[3];
    for (int i = 0; i < j->count; i++) {
        component *c = &j->part[i];
        c->block_x = column_start * c->h, c->block_y = row_start * c->v;
        c->stride = (column_end - column_start) * c->h * 8 + RSB_PAD;
        total += sizes[i] = (size_t)c->stride * (row_end - row_start) * c->v * 8;
    }
    uint8_t *planes = rsb_buffer(scratch, RSB_PLANES, total);
    if (!planes) return RSB_NO_MEMORY;
    for (int i = 0; i < j->count; planes += sizes[i++]) j->part[i].plane = planes;
    const kernels *k = pick_kernels();
    build_tables(j, 1, row_start || column_start || column_end < j->columns);
    int spans = (j->columns + SPAN - 1) / SPAN,
        entered = entry_bytes == (size_t)RSB_ENTRY_BYTES * spans * j->rows;
    status = k->decode_planes(j, data, length, entered ? bytes + size : NULL, spans, j->columns,
                              row_start, row_end, column_start, column_end);
    return status ? status : window_pixels(j, k, top, left, height, width, scratch, window);
}

/* ---- everything else ---- */

static int turbo_window(const uint8_t *bytes, size_t size, int image_height, int image_width,
                        int top, int left, int height, int width, rsb_scratch *scratch,
                        rsb_window *window) {
    int w = 0, h = 0, sampling, colours;
    /* anew: a damaged file leaves its traces in one that is used again */
    tjhandle turbo = tjInitDecompress();
    if (!turbo) return RSB_NO_MEMORY;
    int status = RSB_OK;
    if (tjDecompressHeader3(turbo, bytes, size, &w, &h, &sampling, &colours) || w < 1 || h < 1)
        status = RSB_BAD_JPEG;
    else if (w != image_width || h != image_height)
        status = RSB_BAD_SIZE;
    else if (colours == TJCS_CMYK || colours == TJCS_YCCK)
        status = RSB_BAD_COLOUR;
    size_t stride = 4 * (size_t)w;
    uint8_t *pixels = NULL;
    if (status == RSB_OK && !(pixels = rsb_buffer(scratch, RSB_IMAGE, stride * h)))
        status = RSB_NO_MEMORY;
    /* A warning is an error here too: it means that pixels were made up. */
    if (status == RSB_OK &&
        tjDecompress2(turbo, bytes, size, pixels, w, (int)stride, h, TJPF_RGBX, TJFLAG_ACCURATEDCT))
        status = RSB_BAD_JPEG;
    tjDestroy(turbo);
    if (status == RSB_OK)
        *window = (rsb_window){pixels + stride * top + 4 * (size_t)left,
                               (ptrdiff_t)stride,
                               4,
                               left,
                               top,
                               width,
                               height};
    return status;
}

int rsb_jpeg_check(const uint8_t *bytes, size_t size, rsb_scratch *scratch) {
    int w = 0, h = 0, sampling, colours;
    tjhandle turbo = tjInitDecompress();
    if (!turbo) return RSB_NO_MEMORY;
    int status =
        tjDecompressHeader3(turbo, bytes, size, &w, &h, &sampling, &colours) || w < 1 || h < 1
            ? RSB_BAD_JPEG
            : RSB_OK;
    if (status == RSB_OK && (int64_t)w * h > RSB_MAX_PIXELS) status = RSB_TOO_LARGE;
    uint8_t *pixels = status == RSB_OK ? rsb_buffer(scratch, RSB_IMAGE, 4 * (size_t)w * h) : NULL;
    if (status == RSB_OK && !pixels) status = RSB_NO_MEMORY;
    int format = colours == TJCS_CMYK || colours == TJCS_YCCK ? TJPF_CMYK : TJPF_RGBX;
    if (status == RSB_OK && tjDecompress2(turbo, bytes, size, pixels, w, 4 * w, h, format, 0))
        status = RSB_BAD_JPEG;
    tjDestroy(turbo);
    return status;
}

size_t rsb_jpeg_entries(const uint8_t *bytes, size_t size, uint8_t *entries, size_t room,
                        rsb_scratch *scratch) {
    uint8_t *data = NULL;
    size_t length = 0;
    if (open_jpeg(bytes, size, scratch, &data, &length) || length > UINT32_MAX / 8) return 0;
    rsb_jpeg *j = scratch->jpeg;
    build_tables(j, 0, 1);
    /* nothing is decoded */
    for (int i = 0; i < j->count; i++) j->part[i].plane = NULL, j->part[i].stride = 0;
    size_t needed = (size_t)RSB_ENTRY_BYTES * ((j->columns + SPAN - 1) / SPAN) * j->rows;
    if (needed > room ||
        pick_kernels()->find_entries(j, data, length, j->columns, j->rows, entries))
        return 0;
    return needed;
}

int rsb_jpeg_window(const uint8_t *bytes, size_t size, size_t entry_bytes, int image_height,
                    int image_width, int top, int left, int height, int width, rsb_scratch *scratch,
                    rsb_window *window) {
    if (top < 0 || left < 0 || height < 1 || width < 1 || top > image_height - height ||
        left > image_width - width)
        return RSB_BAD_CALL;
    if ((int64_t)image_height * image_width > RSB_MAX_PIXELS) return RSB_TOO_LARGE;
    int status = fast_window(bytes, size, entry_bytes, image_height, image_width, top, left, height,
                             width, scratch, window);
    if (status != RSB_UNUSUAL) return status;
    return turbo_window(bytes, size, image_height, image_width, top, left, height, width, scratch,
                        window);
}
