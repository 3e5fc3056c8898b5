/* A packed batch: what the device needs to make the batch's pixels.
 *
 * The host reads, verifies and parses the stored images, and writes into one buffer, the slab: a
 * record (rsb_packed) for each image, its tables, and the bytes of its crop. The kernels decode and
 * resize from there. Each image has a region of scratch memory on the device:
 *
 *     offset 0      first                     second                 taps
 *          +--------------------------+--------------------------+------------+
 *          | coefficients             | planes (samples)         | weights of |
 *          | then: window (RGBX)      | then: narrow (RGBX)      | the resize |
 *          | then: op's copy (RGBX)   | then: row limits         |            |
 *          +--------------------------+--------------------------+------------+
 *
 * window: the decoded pixels that the resize reads. narrow: between the two passes of the resize.
 */
#ifndef RSB_PACKED_H
#define RSB_PACKED_H

#include "jpeg_terms.h"

/* What a row of the batch is. */
enum {
    RSB_PIXELS = 0, /* finished pixels, made by the core */
    RSB_RAW = 1,    /* the stored pixels of the window */
    RSB_JPEG = 2,   /* entropy-coded bytes of the window */
};

/* Readable bytes after the packed bytes. Damaged data makes a kernel read on, by at most an MCU:
 * 6 blocks of 64 coefficients of 31 bits. */
#define RSB_SLAB_PADDING 2048

/* Huffman tables of an image: DC 0, DC 1, AC 0, AC 1 */
enum { MAX_TABLES = 4 };

/* The lists of a DHT segment */
typedef struct {
    uint8_t counts[MAX_CODE_LENGTH], symbols[MAX_SYMBOLS];
} rsb_huffman_lists;

/* An entry point (see jpeg_planes.c), aligned. */
typedef struct {
    uint32_t bit;
    int16_t dc[MAX_COMPONENTS];
    int16_t unused;
} rsb_entry;

/* A component of the image, in the area of MCUs that the window needs. */
typedef struct {
    uint32_t first_block;       /* number of its first block */
    int32_t block_columns;      /* of the area */
    uint32_t plane;             /* offset of its samples in the planes */
    int32_t left, top;          /* the first sample of the plane, in the component */
    int32_t width, height;      /* of the whole component, in samples */
    int32_t h, v;               /* sampling factors */
    int32_t dc, ac;             /* numbers of its tables, 0 .. MAX_TABLES - 1 */
    uint16_t quant[BLOCK_SIZE]; /* in natural order */
} rsb_packed_part;

typedef struct {
    rsb_box box;                             /* the crop */
    rsb_rect window;                         /* pixels that the resize reads */
    int32_t height, width;                   /* of the stored image */
    int32_t kind;                            /* RSB_PIXELS, RSB_RAW or RSB_JPEG */
    uint8_t filter, flip, rows_first, parts; /* parts: number of components */

    /* Offsets in the slab. pixels: of RSB_PIXELS and RSB_RAW, 3 bytes a pixel, without padding. The
     * others: of RSB_JPEG, multiples of 4. */
    uint32_t pixels;
    uint32_t tables;  /* rsb_huffman_lists [MAX_TABLES] */
    uint32_t entries; /* rsb_entry [mcu_rows][segments_per_row + 1]: where each segment begins, and
                         where the last one of the row ends */
    uint32_t order;   /* uint32 [segments]: row << 16 | segment, of similar lengths side by side */
    uint32_t bases;   /* uint32 [mcu_rows]: offset of byte 0 of the scan, modulo 2^32, if the bytes
                         of the row were part of a complete scan */

    /* The area of MCUs. A segment is ENTRY_INTERVAL MCUs of a row, or fewer at the row's end. */
    int32_t mcu_column, mcu_columns, mcu_rows;
    int32_t first_column; /* first MCU of the first segment of a row */
    int32_t segments_per_row, segments;
    uint32_t blocks;      /* number of blocks of all components in the area */
    int32_t h_max, v_max; /* sampling factors of luma */

    /* Scratch memory, in bytes. `scratch` is the offset of the image's region, the others are
     * relative to that. Multiples of 64. */
    uint64_t scratch, scratch_bytes;
    uint64_t second, taps, taps_down; /* taps_down: those of the vertical pass */

    rsb_packed_part part[MAX_COMPONENTS];
} rsb_packed;

/* What a launch of a kernel gets. The blocks of the grid are those of row `first`, then those of
 * the next row: as many for each row as it needs. */
typedef struct {
    const uint8_t *slab; /* begins with the records of all rows */
    uint8_t *scratch;
    uint8_t *out;          /* rows x height x width x 3, at a multiple of 4 */
    int32_t *status;       /* of each row: not 0 where the core must make the row */
    const uint8_t *layers; /* of the kernel `augment`: the first row's rsb_layer */
    int64_t layer_stride;  /* bytes from a row's layer to the next row's */
    /* [rows + 1]: the first block of each row, and the number of all blocks */
    const uint32_t *starts;
    int32_t first, rows, height, width;
} rsb_launch;

/* The place of a block's row in the launch. */
RSB_SHARED int place_of_block(const rsb_launch *a, uint32_t block) {
    int low = 0, high = a->rows; /* starts[low] <= block < starts[high] */
    while (high - low > 1) {
        int middle = (low + high) / 2;
        if (a->starts[middle] <= block)
            low = middle;
        else
            high = middle;
    }
    return low;
}

/* The number of blocks that do `count` items, `each` of them a block. */
RSB_SHARED uint32_t blocks_for(uint64_t count, uint32_t each) {
    return (uint32_t)((count + each - 1) / each);
}

RSB_SHARED const rsb_packed *packed_row(const rsb_launch *a, int row) {
    return (const rsb_packed *)a->slab + row;
}

/* The scratch memory of a row. */
RSB_SHARED uint8_t *scratch_of(const rsb_launch *a, const rsb_packed *p) {
    return a->scratch + p->scratch;
}

/* The pixels of a row of the batch. */
RSB_SHARED uint8_t *out_of(const rsb_launch *a, int row) {
    return a->out + (int64_t)row * a->height * a->width * 3;
}

#endif
