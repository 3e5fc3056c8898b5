/* What the files of the JPEG decoder share: the tables, the state of an image, and the functions by
 * which the files call each other. Terms are those of the JPEG standard (ITU-T T.81). */
#ifndef RSB_JPEG_H
#define RSB_JPEG_H

#include "rsb.h"
#include "shared/jpeg_terms.h"

enum {
    EOI = 0xD9,         /* marker: end of image */
    MARKER = 0xFF,      /* the first byte of a marker; a zero follows it in entropy-coded bytes */
    MAX_MCU_BLOCKS = 6, /* 4:2:0: four of luma, two of chroma */
    /* Bits that index the lookup tables of values. Two symbols often fit, and the tables stay in
     * the L1 cache. */
    LOOKUP_BITS = 11,
    /* bits that index the lookup table for skipping */
    SKIP_BITS = 12,
    /* What an end-of-block symbol adds to the advance in an entry of `skip`: more than the places
     * of a block, so that it differs from a run that is too long. */
    SKIP_END = 128,
    /* the same in an entry of `pair` */
    PAIR_END = 64,
};

/* A Huffman table and the lookup tables made from it.
 *
 * "Advance" is how far a symbol moves the place of the current coefficient in zigzag order: the
 * zeros that it encodes, and 1 for its own coefficient. The bits of a symbol are its code and the
 * value bits that follow. In all tables, an entry 0 means that the code is longer than the index,
 * or that a value does not fit; read_symbol or read_one then decodes a single symbol.
 *
 * symbol: the next code. Index: LOOKUP_BITS bits of the stream.
 *
 *      15             8 7              0
 *     +----------------+----------------+
 *     |  code length   |     symbol     |     read by read_symbol, find_symbol
 *     +----------------+----------------+
 *
 * skip: as many AC symbols as fit. Index: SKIP_BITS bits of the stream. Bit 15 is set where the
 * last of them is an end of block (SKIP_END).
 *
 *      15             8 7              0
 *     +----------------+----------------+
 *     | sum of advances| bits of all    |     read by skip_ac
 *     +----------------+----------------+
 *
 * pair, of an AC table: one or two symbols. Index: LOOKUP_BITS bits of the stream. Values are
 * signed. E is set where one of the symbols is an end of block (PAIR_END). advance 1 is LAST_PLACE
 * where the first symbol is an end of block. With one symbol, value 2 is 0 and both advances are
 * the same.
 *
 *      31        26 25          19 18 17         12 11        6 5          0
 *     +------------+--------------+--+-------------+-----------+------------+
 *     |  value 2   |   value 1    |E | advance 1+2 | advance 1 |bits of both|   read by read_ac
 *     +------------+--------------+--+-------------+-----------+------------+
 *
 * pair, of a DC table: one symbol.
 *
 *      31                                16 15               6 5          0
 *     +------------------------------------+------------------+------------+
 *     |  difference to the prediction      |        0         |    bits    |    read by read_dc
 *     +------------------------------------+------------------+------------+
 */
typedef struct {
    /* The lists of a DHT segment. The tables below are kept while the next image has the same. */
    uint8_t counts[MAX_CODE_LENGTH], symbols[256];
    int ready;                             /* the lists are set */
    int has_symbols, has_pairs, has_skips; /* which of the tables below are made */
    uint16_t symbol[1 << LOOKUP_BITS];
    uint16_t skip[1 << SKIP_BITS];
    uint32_t pair[1 << LOOKUP_BITS];
    /* 1 more than the largest code of each length, left-aligned to MAX_CODE_LENGTH bits */
    int32_t max_code[MAX_CODE_LENGTH + 2];
    int32_t offset[MAX_CODE_LENGTH + 1]; /* index of a code's symbol minus the code, by length */
} huffman;

/* The lowest bit of each field of `pair` */
enum {
    PAIR_ADVANCE_1 = 6,
    PAIR_ADVANCE_2 = 12,
    PAIR_VALUE_1 = 19,
    PAIR_VALUE_2 = 26,
    PAIR_DC_VALUE = 16,
};

/* The fields of `pair`. pair_advance_2 includes bit E, so that it is PAIR_END or more at an end of
 * block. */
RSB_INLINE int pair_advance_1(uint32_t entry) { return (int)(entry >> PAIR_ADVANCE_1 & 63); }
RSB_INLINE int pair_advance_2(uint32_t entry) { return (int)(entry >> PAIR_ADVANCE_2 & 127); }
RSB_INLINE int pair_ends(uint32_t entry) { return (int)(entry >> PAIR_ADVANCE_2 & PAIR_END); }
RSB_INLINE int pair_value_2(uint32_t entry) { return (int32_t)entry >> PAIR_VALUE_2; }
RSB_INLINE int pair_value_1(uint32_t entry) {
    return (int32_t)(entry << (32 - PAIR_VALUE_2)) >> (PAIR_VALUE_1 + 32 - PAIR_VALUE_2);
}
RSB_INLINE int pair_dc_value(uint32_t entry) { return (int32_t)entry >> PAIR_DC_VALUE; }

typedef struct {
    int id, h, v;         /* identifier and sampling factors */
    int quant, dc, ac;    /* numbers of its tables */
    int block_x, block_y; /* first block of the plane, in blocks of this component */
    int stride;           /* bytes */
    uint8_t *plane;       /* the decoded samples */
    int width, height;    /* of the whole component, in samples */
} component;

struct rsb_jpeg {
    huffman dc[2], ac[2];
    /* Natural position of each place in zigzag order. Places after the last one map to
     * position BLOCK_SIZE, which is not used. */
    uint8_t order[BLOCK_SIZE + 2 * SKIP_END];
    int16_t quant[4][BLOCK_SIZE];        /* quantization tables, in natural order */
    int quant_known, dc_known, ac_known; /* a bit for each table that the file has defined */
    int width, height;
    int count;         /* of components: 1 or 3 */
    int h_max, v_max;  /* sampling factors of luma */
    int columns, rows; /* of MCUs */
    component part[MAX_COMPONENTS];
};

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

/* These functions are not exported from the library. */
#pragma GCC visibility push(hidden)

/* ---- jpeg_huffman.c ---- */

/* Sets the lists of a DHT segment: `counts` of the codes of length 1 .. 16, and their `total`
 * symbols. Returns RSB_UNUSUAL where there are more codes of a length than its bits allow. */
int rsb_jpeg_set_huffman(huffman *t, const uint8_t *counts, const uint8_t *symbols, int total);

/* Makes `pair`, unless it is made already. */
void rsb_jpeg_build_pairs(huffman *t, int is_ac);

/* Makes `skip` of an AC table, unless it is made already. */
void rsb_jpeg_build_skips(huffman *t);

/* ---- jpeg_headers.c ---- */

/* Reads the headers into scratch->jpeg and the entropy-coded bytes into `s`. Returns RSB_UNUSUAL
 * for a file that the fast decoder does not handle, or RSB_NO_MEMORY. */
int rsb_jpeg_open(const uint8_t *bytes, size_t size, rsb_scratch *scratch, scan *s);

/* ---- jpeg_unstuff.c ---- */

/* Copies the `n` bytes from the start of a scan without stuffed zeros, up to the marker EOI, and
 * sets their `length`. Returns RSB_UNUSUAL for any other marker, and where there is none. Writes up
 * to 31 bytes past the end. */
int rsb_jpeg_unstuff(const uint8_t *in, size_t n, uint8_t *out, size_t *length);

/* ---- jpeg.c ---- */

/* The MCUs that the pixels of `area` depend on. */
mcu_area rsb_jpeg_mcus(const rsb_jpeg *j, rsb_rect area);

/* ---- jpeg_planes.c ---- */

/* Entry point `which`: its bit, and the predictions of MAX_COMPONENTS components. */
uint32_t rsb_jpeg_entry(const uint8_t *entries, size_t which, int *prediction);

/* Decodes the MCUs of `area` into the planes. Returns RSB_UNUSUAL for damaged data. */
int rsb_jpeg_decode_planes(rsb_jpeg *j, const scan *s, mcu_area area);

/* Writes the entry points of all MCU rows, RSB_ENTRY_BYTES each, to `entries`. Returns RSB_UNUSUAL
 * for damaged data. */
int rsb_jpeg_find_entries(rsb_jpeg *j, const scan *s, uint8_t *entries);

/* ---- jpeg_pixels.c ---- */

/* Converts `area`, whose samples are in the planes, to RGBX pixels. Returns RSB_NO_MEMORY where
 * there is none. */
int rsb_jpeg_pixels(rsb_jpeg *j, rsb_rect area, rsb_scratch *scratch, rsb_window *window);

#pragma GCC visibility pop

#endif
