/* Device kernel: samples to RGBX pixels of the window.
 *
 * Chroma is upsampled by the triangle filter of libjpeg-turbo (jdsample.c), as in jpeg_pixels.c.
 */
#ifndef RSB_PIXELS_H
#define RSB_PIXELS_H

#include "packed.h"

enum {
    PIXELS_THREADS = 256,
    PIXELS_EACH = 4, /* pixels of a thread: their loads overlap */
};

typedef struct {
    int32_t unused;
} pixels_block;

RSB_SHARED uint32_t window_pixels(const rsb_packed *p) {
    return (uint32_t)p->window.height * (uint32_t)p->window.width;
}

RSB_SHARED uint32_t pixels_blocks(const rsb_packed *p, int height, int width) {
    (void)height, (void)width;
    return p->kind == RSB_JPEG ? blocks_for(window_pixels(p), PIXELS_THREADS * PIXELS_EACH) : 0;
}

RSB_SHARED int clip_to(int value, int size) {
    return value < 0 ? 0 : value >= size ? size - 1 : value;
}

/* The sample at (x, y) of a component, which must be in the area. */
RSB_SHARED int sample_at(const uint8_t *planes, const rsb_packed_part *c, int y, int x) {
    int64_t stride = (int64_t)c->block_columns * BLOCK_SIDE;
    return planes[c->plane + (y - c->top) * stride + (x - c->left)];
}

/* The value of a chroma component at pixel (x, y) of the image. h_max, v_max: sampling factors of
 * luma. */
RSB_SHARED int chroma_at(const uint8_t *planes, const rsb_packed_part *c, int h_max, int v_max,
                         int y, int x) {
    if (h_max == 1) return sample_at(planes, c, y, x);
    int own_x = x / 2, other_x = clip_to(x % 2 ? own_x + 1 : own_x - 1, c->width);
    if (v_max == 1) {
        int sum = 3 * sample_at(planes, c, y, own_x) + sample_at(planes, c, y, other_x);
        return (sum + 1 + x % 2) >> 2;
    }
    int own_y = y / 2, other_y = clip_to(y % 2 ? own_y + 1 : own_y - 1, c->height);
    int here = 3 * sample_at(planes, c, own_y, own_x) + sample_at(planes, c, other_y, own_x);
    int there = 3 * sample_at(planes, c, own_y, other_x) + sample_at(planes, c, other_y, other_x);
    return (3 * here + there + 8 - x % 2) >> 4;
}

/* Pixels that follow each other, in one store. */
typedef struct {
    uint32_t rgbx[PIXELS_EACH];
} __attribute__((aligned(4 * PIXELS_EACH))) rgbx_group;

/* Converts the pixels first .. first + PIXELS_EACH - 1 of the window. Those after the last one are
 * padding. colour, h_max, v_max: of the image; the callers give constants, so that the loads of all
 * pixels can begin together. */
RSB_SHARED void convert_group(const rsb_launch *a, const rsb_packed *p, uint32_t first, int colour,
                              int h_max, int v_max) {
    const uint8_t *planes = scratch_of(a, p) + p->second;
    int y = (int)(first / (uint32_t)p->window.width), x = (int)(first % (uint32_t)p->window.width);
    rgbx_group made;
    for (int i = 0; i < PIXELS_EACH; i++) {
        int down = p->window.top + (y < p->window.height ? y : p->window.height - 1);
        int across = p->window.left + x;
        int luma = sample_at(planes, &p->part[0], down, across);
        made.rgbx[i] = (uint32_t)luma * 0x010101u;
        if (colour)
            made.rgbx[i] =
                rsb_rgbx(luma, chroma_at(planes, &p->part[1], h_max, v_max, down, across),
                         chroma_at(planes, &p->part[2], h_max, v_max, down, across));
        x++;
        if (x == p->window.width) {
            x = 0;
            y++;
        }
    }
    *(rgbx_group *)(scratch_of(a, p) + 4 * (uint64_t)first) = made;
}

RSB_SHARED void pixels_convert(const rsb_launch *a, pixels_block *s, int part, int row,
                               int thread) {
    (void)s;
    const rsb_packed *p = packed_row(a, row);
    uint32_t first = ((uint32_t)part * PIXELS_THREADS + (uint32_t)thread) * PIXELS_EACH;
    if (first >= window_pixels(p)) return;
    if (p->parts != MAX_COMPONENTS)
        convert_group(a, p, first, 0, 1, 1);
    else if (p->h_max == 1)
        convert_group(a, p, first, 1, 1, 1);
    else if (p->v_max == 1)
        convert_group(a, p, first, 1, 2, 1);
    else
        convert_group(a, p, first, 1, 2, 2);
}

#endif
