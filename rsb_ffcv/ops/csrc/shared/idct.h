/* Device kernel: coefficients to samples, eight threads per block.
 *
 * The "islow" inverse DCT of libjpeg-turbo (jidctint.c), as in jpeg_idct_hot.h.
 */
#ifndef RSB_IDCT_H
#define RSB_IDCT_H

#include "packed.h"

enum {
    IDCT_THREADS = 256,
    IDCT_BLOCKS = IDCT_THREADS / BLOCK_SIDE, /* blocks of coefficients per block of threads */
    IDCT_STRIDE = BLOCK_SIDE + 1,            /* avoids bank conflicts */
};

typedef struct {
    int32_t value[IDCT_BLOCKS][BLOCK_SIDE * IDCT_STRIDE];
} idct_block;

RSB_SHARED uint32_t idct_blocks(const rsb_packed *p, int height, int width) {
    (void)height, (void)width;
    return p->kind == RSB_JPEG ? blocks_for(p->blocks, IDCT_BLOCKS) : 0;
}

/* One pass on eight values. Constants have 13 fractional bits. `bias` is added to the result.
 * Coefficients of damaged images may overflow: the arithmetic is unsigned, and wraps. */
RSB_SHARED void idct_pass(uint32_t r[8], int shift, uint32_t bias) {
    uint32_t z1 = (r[2] + r[6]) * 4433u;
    uint32_t even2 = z1 - r[6] * 15137u, even3 = z1 + r[2] * 6270u;
    uint32_t middle = (r[0] << 13) + ((bias << shift) + (1u << (shift - 1)));
    uint32_t even0 = middle + (r[4] << 13), even1 = middle - (r[4] << 13);
    uint32_t a = even0 + even3, d = even0 - even3, b = even1 + even2, c = even1 - even2;
    uint32_t s73 = r[7] + r[3], s51 = r[5] + r[1], z5 = (s73 + s51) * 9633u;
    uint32_t z71 = 0u - (r[7] + r[1]) * 7373u, z53 = 0u - (r[5] + r[3]) * 20995u;
    uint32_t z3 = z5 - s73 * 16069u, z4 = z5 - s51 * 3196u;
    uint32_t t0 = r[7] * 2446u + z71 + z3, t1 = r[5] * 16819u + z53 + z4;
    uint32_t t2 = r[3] * 25172u + z53 + z3, t3 = r[1] * 12299u + z71 + z4;
    r[0] = (uint32_t)((int32_t)(a + t3) >> shift);
    r[7] = (uint32_t)((int32_t)(a - t3) >> shift);
    r[1] = (uint32_t)((int32_t)(b + t2) >> shift);
    r[6] = (uint32_t)((int32_t)(b - t2) >> shift);
    r[2] = (uint32_t)((int32_t)(c + t1) >> shift);
    r[5] = (uint32_t)((int32_t)(c - t1) >> shift);
    r[3] = (uint32_t)((int32_t)(d + t0) >> shift);
    r[4] = (uint32_t)((int32_t)(d - t0) >> shift);
}

/* The component of block `which` of the image. */
RSB_SHARED const rsb_packed_part *part_of_block(const rsb_packed *p, uint32_t which) {
    if (p->parts == 1 || which < p->part[1].first_block) return &p->part[0];
    return which < p->part[2].first_block ? &p->part[1] : &p->part[2];
}

/* Phase 1: dequantizes and transforms a column. */
RSB_SHARED void idct_columns(const rsb_launch *a, idct_block *s, int part, int row, int thread) {
    const rsb_packed *p = packed_row(a, row);
    int slot = thread / BLOCK_SIDE, x = thread % BLOCK_SIDE;
    uint32_t which = (uint32_t)part * IDCT_BLOCKS + slot;
    if (which >= p->blocks) return;
    const uint16_t *quant = part_of_block(p, which)->quant + x;
    const int16_t *from = (const int16_t *)scratch_of(a, p) + (int64_t)which * BLOCK_SIZE + x;
    uint32_t r[8];
    for (int y = 0; y < BLOCK_SIDE; y++) {
        int i = y * BLOCK_SIDE;
        /* 16 bits, as in the core */
        r[y] = (uint32_t)(int16_t)((uint32_t)from[i] * quant[i]);
    }
    idct_pass(r, 11, 0);
    for (int y = 0; y < BLOCK_SIDE; y++) s->value[slot][y * IDCT_STRIDE + x] = (int32_t)r[y];
}

/* Phase 2: transforms a row, and writes eight samples. */
RSB_SHARED void idct_rows(const rsb_launch *a, idct_block *s, int part, int row, int thread) {
    const rsb_packed *p = packed_row(a, row);
    int slot = thread / BLOCK_SIDE, y = thread % BLOCK_SIDE;
    uint32_t which = (uint32_t)part * IDCT_BLOCKS + slot;
    if (which >= p->blocks) return;
    const rsb_packed_part *c = part_of_block(p, which);
    uint32_t r[8];
    for (int x = 0; x < BLOCK_SIDE; x++) r[x] = (uint32_t)s->value[slot][y * IDCT_STRIDE + x];
    idct_pass(r, 18, 128);
    uint32_t left = 0, right = 0;
    for (int x = 0; x < 4; x++) {
        left |= (uint32_t)clamp((int32_t)r[x]) << (8 * x);
        right |= (uint32_t)clamp((int32_t)r[x + 4]) << (8 * x);
    }
    int number = (int)(which - c->first_block);
    int block_y = number / c->block_columns, block_x = number % c->block_columns;
    int64_t stride = (int64_t)c->block_columns * BLOCK_SIDE;
    rsb_word *to = (rsb_word *)(scratch_of(a, p) + p->second + c->plane +
                                (block_y * BLOCK_SIDE + y) * stride + block_x * BLOCK_SIDE);
    to[0] = left;
    to[1] = right;
}

#endif
