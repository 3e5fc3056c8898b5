/* The headers of a JPEG, from SOI to the scan. Everything but what the fast decoder can read is
 * refused with RSB_UNUSUAL. */
#include <stdlib.h>
#include <string.h>

#include "jpeg.h"

static const uint8_t NATURAL[64] = {0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,
                                    12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13, 6,  7,  14, 21, 28,
                                    35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51,
                                    58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63};

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
        if (rsb_jpeg_build_huffman(is_ac ? &j->ac[which] : &j->dc[which], p + 1, p + 17,
                                   (int)total))
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

int rsb_jpeg_open(const uint8_t *bytes, size_t size, rsb_scratch *scratch, scan *s) {
    rsb_jpeg *j = scratch->jpeg;
    if (!j) {
        if (!(j = scratch->jpeg = calloc(1, sizeof *j))) return RSB_NO_MEMORY;
        for (int i = 0; i < 64 + 2 * END; i++) j->order[i] = i < 64 ? NATURAL[i] : 64;
    }
    size_t start = 0;
    int status = read_headers(j, bytes, size, &start);
    if (status) return status;
    j->columns = (j->width + 8 * j->h_max - 1) / (8 * j->h_max);
    j->rows = (j->height + 8 * j->v_max - 1) / (8 * j->v_max);
    /* zeros that a damaged stream may run into */
    s->data = rsb_buffer(scratch, RSB_ENTROPY, size - start + 2048);
    if (!s->data) return RSB_NO_MEMORY;
    if ((status = unstuff(bytes + start, size - start, s->data, &s->length))) return status;
    memset(s->data + s->length, 0, 2048);
    s->entries = NULL;
    s->entries_per_row = (j->columns + SPAN - 1) / SPAN;
    return RSB_OK;
}
