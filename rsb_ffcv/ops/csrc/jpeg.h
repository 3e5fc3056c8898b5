/* What the files of the JPEG decoder share: its tables, the state of an image, and the functions by
 * which they call each other. */
#ifndef RSB_JPEG_H
#define RSB_JPEG_H

#include "rsb.h"

/* bits of the Huffman look-up tables: two symbols often fit, and the tables stay in the L1 cache */
#define LOOK 11
#define LAST 64 /* what an end-of-block symbol adds to the advance of an entry of `pair` */
#define SKIP 12 /* of those that only run over symbols */
#define SPAN 8  /* MCUs from one entry point to the next */
/* what an end-of-block symbol adds to the position, told apart from a run that goes too far */
#define END 128

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

RSB_INLINE int extend(int value, int size) {
    return value < (1 << (size - 1)) ? value - (1 << size) + 1 : value;
}

/* MCUs of an image: rows row_start .. row_end - 1, columns column_start .. column_end - 1. */
typedef struct {
    int row_start, row_end, column_start, column_end;
} mcu_area;

/* The entropy-coded bytes of an image, without stuffed zeros. */
typedef struct {
    uint8_t *data;
    size_t length;
    const uint8_t *entries; /* entry points; NULL: none */
    int entries_per_row;
} scan;

/* Functions that only the library's own files call are not exported from it. */
#pragma GCC visibility push(hidden)

/* ---- jpeg_huffman.c ---- */

int rsb_jpeg_build_huffman(huffman *t, const uint8_t *counts, const uint8_t *symbols, int total);
void rsb_jpeg_build_pairs(huffman *t, int is_ac);
void rsb_jpeg_build_skips(huffman *t);

/* ---- jpeg_headers.c ---- */

/* Reads the headers and copies the entropy-coded bytes without their stuffing. */
int rsb_jpeg_open(const uint8_t *bytes, size_t size, rsb_scratch *scratch, scan *s);

/* ---- jpeg_planes.c ---- */

/* Decodes the MCUs of `area` into the planes. */
int rsb_jpeg_decode_planes(rsb_jpeg *j, const scan *s, mcu_area area);
/* Writes the entry points of all MCU rows to `entries`. */
int rsb_jpeg_find_entries(rsb_jpeg *j, const scan *s, uint8_t *entries);

/* ---- jpeg_pixels.c ---- */

/* Converts `area`, of which the planes hold all samples, to RGBX pixels. */
int rsb_jpeg_pixels(rsb_jpeg *j, rsb_rect area, rsb_scratch *scratch, rsb_window *window);

#pragma GCC visibility pop

#endif
