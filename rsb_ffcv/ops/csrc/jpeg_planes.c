/* From entropy-coded bytes to the samples of each component: Huffman decoding and inverse DCT.
 *
 * Coefficients outside of the window are skipped, not decoded. To reach a window, a decoder of
 * Huffman codes has to skip everything before it. Entry points avoid most of that. There is one for
 * each ENTRY_INTERVAL-th MCU of each row, from the first MCU on. The writer stores them after the
 * image's own bytes:
 *
 *     byte 0       4       6       8       10
 *         +-------+-------+-------+-------+
 *         |  bit  | DC 0  | DC 1  | DC 2  |     little-endian
 *         +-------+-------+-------+-------+
 *
 * bit: uint32, where the MCU begins, in bits from the start of the entropy-coded bytes without
 * stuffed zeros. DC: int16, the predictions of the DC coefficients of each component.
 */
#include <string.h>

#include "jpeg.h"

enum {
    REFILL_BITS = 56, /* what a reader has at least after `refill` */
    /* places 0 .. 9 of the zigzag order lie in the upper left 4 x 4 coefficients */
    LAST_PLACE_OF_4X4 = 9,
};

/* Reads bits, first bit of a byte first. */
typedef struct {
    const uint8_t *next; /* the byte after those in `bits` */
    uint64_t bits;       /* left-aligned */
    int count;           /* of valid bits */
} reader;

/* A block of an MCU. */
typedef struct {
    const huffman *dc, *ac;
    const int16_t *quant;
    uint8_t *out; /* where the block of the row's first MCU goes */
    int component, stride;
    int across, down; /* bytes from an MCU's block to the next MCU's, and to the next row's */
} unit;

uint32_t rsb_jpeg_entry(const uint8_t *entries, size_t which, int *prediction) {
    uint32_t bit;
    int16_t values[MAX_COMPONENTS];
    const uint8_t *entry = entries + RSB_ENTRY_BYTES * which;
    memcpy(&bit, entry, sizeof bit);
    memcpy(values, entry + sizeof bit, sizeof values);
    for (int i = 0; i < MAX_COMPONENTS; i++) prediction[i] = values[i];
    return bit;
}

/* Returns the end of what it wrote. */
static uint8_t *write_entry(uint8_t *to, uint32_t bit, const int *prediction) {
    int16_t values[MAX_COMPONENTS] = {(int16_t)prediction[0], (int16_t)prediction[1],
                                      (int16_t)prediction[2]};
    memcpy(to, &bit, sizeof bit);
    memcpy(to + sizeof bit, values, sizeof values);
    return to + RSB_ENTRY_BYTES;
}

/* Lists the blocks of an MCU in the order of the scan. Returns their number. */
static int make_units(const rsb_jpeg *j, unit *units) {
    int n = 0;
    for (int i = 0; i < j->count; i++)
        for (int b = 0; b < j->part[i].h * j->part[i].v; b++) {
            const component *c = &j->part[i];
            ptrdiff_t row = (ptrdiff_t)(b / c->h) * BLOCK_SIDE;
            int column = b % c->h * BLOCK_SIDE;
            units[n++] = (unit){.dc = &j->dc[c->dc],
                                .ac = &j->ac[c->ac],
                                .quant = j->quant[c->quant],
                                .out = c->plane + row * c->stride + column,
                                .component = i,
                                .stride = c->stride,
                                .across = BLOCK_SIDE * c->h,
                                .down = BLOCK_SIDE * c->v * c->stride};
        }
    return n;
}

typedef int32_t v8 __attribute__((vector_size(32)));
typedef int16_t v8s __attribute__((vector_size(16)));

typedef struct {
    int (*decode_planes)(rsb_jpeg *, const scan *, mcu_area);
    int (*find_entries)(rsb_jpeg *, const scan *, uint8_t *);
} kernels;

#define KERNELS() {HOT(decode_planes), HOT(find_entries)}

#define HOT_FILE "jpeg_planes_hot.h"
#include "dispatch.h"

int rsb_jpeg_decode_planes(rsb_jpeg *j, const scan *s, mcu_area area) {
    return pick_kernels()->decode_planes(j, s, area);
}

int rsb_jpeg_find_entries(rsb_jpeg *j, const scan *s, uint8_t *entries) {
    return pick_kernels()->find_entries(j, s, entries);
}
