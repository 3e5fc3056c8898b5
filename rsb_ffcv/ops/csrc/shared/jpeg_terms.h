/* Constants and scalar arithmetic of JPEG decoding. Terms are those of the standard (ITU-T T.81).
 */
#ifndef RSB_JPEG_TERMS_H
#define RSB_JPEG_TERMS_H

#include "base.h"

enum {
    BLOCK_SIDE = 8,  /* samples */
    BLOCK_SIZE = 64, /* coefficients */
    LAST_PLACE = 63, /* of a block, in zigzag order */
    MAX_COMPONENTS = 3,
    MAX_CODE_LENGTH = 16,
    MAX_SYMBOLS = 256,
    /* MCUs from one entry point to the next */
    ENTRY_INTERVAL = 8,
    ZERO_RUN = 0xF0, /* the AC symbol ZRL: 16 zeros */
};

/* natural position of each place in zigzag order */
RSB_CONSTANT uint8_t RSB_NATURAL[BLOCK_SIZE] = {
    0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,  12, 19, 26, 33, 40, 48,
    41, 34, 27, 20, 13, 6,  7,  14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23,
    30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63};

/* EXTEND of the standard: the signed value of `size` value bits. */
RSB_SHARED int extend(int value, int size) {
    return value < (1 << (size - 1)) ? value - (1 << size) + 1 : value;
}

/* YCbCr to RGB as in jdcolor.c of libjpeg-turbo: constants have 16 fractional bits. Returns a
 * little-endian word of red, green, blue and 0. */
RSB_SHARED uint32_t rsb_rgbx(int y, int cb, int cr) {
    int u = cb - 128, v = cr - 128;
    int r = y + ((91881 * v + 32768) >> 16), b = y + ((116130 * u + 32768) >> 16);
    int g = y + ((-22554 * u - 46802 * v + 32768) >> 16);
    return (uint32_t)(clamp(r) | clamp(g) << 8 | clamp(b) << 16);
}

#endif
