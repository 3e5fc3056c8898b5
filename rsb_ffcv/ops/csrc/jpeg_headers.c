/* The headers of a JPEG, from SOI to the scan, and the bytes of the scan.
 *
 * Everything that the fast decoder does not handle, or that looks damaged, is rejected with
 * RSB_UNUSUAL; libjpeg-turbo decodes it or reports it.
 */
#include <stdlib.h>
#include <string.h>

#include "jpeg.h"

enum {
    SOF0 = 0xC0, /* baseline */
    SOF1 = 0xC1, /* extended sequential, Huffman coding */
    DHT = 0xC4,  /* Huffman tables */
    SOI = 0xD8,
    SOS = 0xDA,  /* start of scan */
    DQT = 0xDB,  /* quantization tables */
    APP0 = 0xE0, /* JFIF */
    APP1 = 0xE1,
    APP14 = 0xEE, /* Adobe */
    APP15 = 0xEF,
    COM = 0xFE, /* comment */
};
enum {
    MAX_DC_SIZE = 11,     /* value bits of a DC difference with 8-bit samples */
    ADOBE_TRANSFORM = 11, /* offset of the colour transform in an APP14 segment */
    ADOBE_UNKNOWN = -1,   /* no APP14 segment */
    ADOBE_YCBCR = 1,
    /* Zeros after the entropy-coded bytes. Decoding damaged data may continue into them: at most
     * MAX_MCU_BLOCKS blocks of 256 bytes before decode_planes and find_entries check. */
    ENTROPY_PADDING = 2048,
};

RSB_INLINE int word16(const uint8_t *p) { return p[0] << 8 | p[1]; }

/* The read_* functions take the `n` bytes of a segment after its length. */

static int read_quant(rsb_jpeg *j, const uint8_t *p, size_t n) {
    while (n) {
        int wide = p[0] >> 4; /* 16-bit values */
        int which = p[0] & 15;
        size_t length = 1 + (wide ? 2 * BLOCK_SIZE : BLOCK_SIZE);
        if (wide > 1 || which > 3 || n < length) return RSB_UNUSUAL;
        for (int i = 0; i < BLOCK_SIZE; i++) {
            int value = wide ? word16(p + 1 + 2 * i) : p[1 + i];
            if (value == 0 || value > INT16_MAX) return RSB_UNUSUAL;
            j->quant[which][RSB_NATURAL[i]] = (int16_t)value;
        }
        j->quant_known |= 1 << which;
        p += length;
        n -= length;
    }
    return RSB_OK;
}

static int read_huffman(rsb_jpeg *j, const uint8_t *p, size_t n) {
    while (n) {
        if (n < 1 + MAX_CODE_LENGTH) return RSB_UNUSUAL;
        int is_ac = p[0] >> 4;
        int which = p[0] & 15;
        const uint8_t *counts = p + 1;
        const uint8_t *symbols = counts + MAX_CODE_LENGTH;
        size_t total = 0;
        for (int i = 0; i < MAX_CODE_LENGTH; i++) total += counts[i];
        size_t length = 1 + MAX_CODE_LENGTH + total;
        if (is_ac > 1 || which > 1 || total > sizeof j->ac->symbols || n < length)
            return RSB_UNUSUAL;
        for (size_t i = 0; !is_ac && i < total; i++)
            if (symbols[i] > MAX_DC_SIZE) return RSB_UNUSUAL;
        huffman *table = is_ac ? &j->ac[which] : &j->dc[which];
        if (rsb_jpeg_set_huffman(table, counts, symbols, (int)total)) return RSB_UNUSUAL;
        *(is_ac ? &j->ac_known : &j->dc_known) |= 1 << which;
        p += length;
        n -= length;
    }
    return RSB_OK;
}

static int read_frame(rsb_jpeg *j, const uint8_t *p, size_t n) {
    if (n < 6) return RSB_UNUSUAL;
    int precision = p[0];
    int count = p[5];
    if (precision != 8 || (count != 1 && count != 3) || n != 6 + 3 * (size_t)count)
        return RSB_UNUSUAL;
    j->height = word16(p + 1);
    j->width = word16(p + 3);
    j->count = count;
    if (!j->height || !j->width) return RSB_UNUSUAL;
    for (int i = 0; i < count; i++) {
        const uint8_t *entry = p + 6 + 3 * i;
        component *c = &j->part[i];
        c->id = entry[0];
        c->h = entry[1] >> 4;
        c->v = entry[1] & 15;
        c->quant = entry[2];
        if (c->quant > 3) return RSB_UNUSUAL;
        if (count == 1) { /* a scan of one component is not interleaved, whatever its factors */
            c->h = 1;
            c->v = 1;
        }
        if (i && (c->h != 1 || c->v != 1)) return RSB_UNUSUAL;
    }
    int h = j->part[0].h;
    int v = j->part[0].v;
    if (!((h == 1 && v == 1) || (h == 2 && (v == 1 || v == 2)))) return RSB_UNUSUAL;
    /* libjpeg does not smooth chroma of one or two columns */
    if (h == 2 && j->width < 5) return RSB_UNUSUAL;
    j->h_max = h;
    j->v_max = v;
    for (int i = 0; i < count; i++) {
        component *c = &j->part[i];
        c->width = (j->width * c->h + h - 1) / h;
        c->height = (j->height * c->v + v - 1) / v;
    }
    return RSB_OK;
}

static int read_scan(rsb_jpeg *j, const uint8_t *p, size_t n) {
    if (!j->count || n != 4 + 2 * (size_t)j->count || p[0] != j->count) return RSB_UNUSUAL;
    for (int i = 0; i < j->count; i++) {
        const uint8_t *entry = p + 1 + 2 * i;
        component *c = &j->part[i];
        c->dc = entry[1] >> 4;
        c->ac = entry[1] & 15;
        if (entry[0] != c->id || c->dc > 1 || c->ac > 1 || !(j->quant_known >> c->quant & 1) ||
            !(j->dc_known >> c->dc & 1) || !(j->ac_known >> c->ac & 1))
            return RSB_UNUSUAL;
    }
    /* all coefficients, in one scan: first and last place, and no successive approximation */
    p += 1 + 2 * j->count;
    return p[0] == 0 && p[1] == LAST_PLACE && p[2] == 0 ? RSB_OK : RSB_UNUSUAL;
}

/* Whether three components are YCbCr. This follows libjpeg's default_decompress_parms, but excludes
 * files for which libjpeg has to guess. */
static int is_ycbcr(const rsb_jpeg *j, int jfif, int adobe) {
    if (jfif || adobe == ADOBE_YCBCR) return 1;
    return adobe == ADOBE_UNKNOWN && j->part[0].id == 1 && j->part[1].id == 2 && j->part[2].id == 3;
}

/* Reads all segments up to the start of the scan, whose bytes begin at `*start`. */
static int read_headers(rsb_jpeg *j, const uint8_t *bytes, size_t size, size_t *start) {
    int jfif = 0;
    int adobe = ADOBE_UNKNOWN;
    j->quant_known = 0;
    j->dc_known = 0;
    j->ac_known = 0;
    j->count = 0;
    if (size < 4 || bytes[0] != MARKER || bytes[1] != SOI) return RSB_UNUSUAL;
    for (size_t at = 2;;) {
        if (at + 4 > size || bytes[at] != MARKER) return RSB_UNUSUAL;
        int marker = bytes[at + 1];
        if (marker == MARKER) { /* a fill byte */
            at++;
            continue;
        }
        size_t length = (size_t)word16(bytes + at + 2);
        if (length < 2 || at + 2 + length > size) return RSB_UNUSUAL;
        const uint8_t *p = bytes + at + 4;
        size_t n = length - 2;
        at += 2 + length;
        int status = RSB_OK;
        if (marker == DQT)
            status = read_quant(j, p, n);
        else if (marker == DHT)
            status = read_huffman(j, p, n);
        else if (marker == SOF0 || marker == SOF1)
            status = j->count ? RSB_UNUSUAL : read_frame(j, p, n);
        else if (marker == APP0)
            jfif |= n >= 5 && !memcmp(p, "JFIF", 5);
        else if (marker == APP14 && n > ADOBE_TRANSFORM && !memcmp(p, "Adobe", 5))
            adobe = p[ADOBE_TRANSFORM];
        else if (marker == SOS) {
            if (j->count == 3 && !is_ycbcr(j, jfif, adobe)) return RSB_UNUSUAL;
            *start = at;
            return read_scan(j, p, n);
        } else if (!((marker >= APP1 && marker <= APP15) || marker == COM))
            status = RSB_UNUSUAL; /* progressive, arithmetic, restart intervals, ... */
        if (status) return status;
    }
}

static rsb_jpeg *new_jpeg(void) {
    rsb_jpeg *j = calloc(1, sizeof *j);
    if (!j) return NULL;
    for (size_t i = 0; i < sizeof j->order; i++)
        j->order[i] = i < BLOCK_SIZE ? RSB_NATURAL[i] : BLOCK_SIZE;
    return j;
}

int rsb_jpeg_open(const uint8_t *bytes, size_t size, rsb_scratch *scratch, scan *s) {
    if (!scratch->jpeg) scratch->jpeg = new_jpeg();
    rsb_jpeg *j = scratch->jpeg;
    if (!j) return RSB_NO_MEMORY;
    size_t start = 0;
    int status = read_headers(j, bytes, size, &start);
    if (status) return status;
    int mcu_width = BLOCK_SIDE * j->h_max;
    int mcu_height = BLOCK_SIDE * j->v_max;
    j->columns = (j->width + mcu_width - 1) / mcu_width;
    j->rows = (j->height + mcu_height - 1) / mcu_height;
    s->data = rsb_buffer(scratch, RSB_ENTROPY, size - start + ENTROPY_PADDING);
    if (!s->data) return RSB_NO_MEMORY;
    status = rsb_jpeg_unstuff(bytes + start, size - start, s->data, &s->length);
    if (status) return status;
    memset(s->data + s->length, 0, ENTROPY_PADDING);
    s->entries = NULL;
    s->entries_per_row = (j->columns + ENTRY_INTERVAL - 1) / ENTRY_INTERVAL;
    return RSB_OK;
}
