/* Device kernel: samples to RGBX pixels of the window, one pixel per thread.
 *
 * Chroma is upsampled by the triangle filter of libjpeg-turbo (jdsample.c), as in jpeg_pixels.c.
 */
#ifndef RSB_PIXELS_H
#define RSB_PIXELS_H

#include "packed.h"

enum { PIXELS_THREADS = 256 };

typedef struct {
    int32_t unused;
} pixels_block;

RSB_SHARED int clip_to(int value, int size) {
    return value < 0 ? 0 : value >= size ? size - 1 : value;
}

/* The sample at (x, y) of a component, which must be in the area. */
RSB_SHARED int sample_at(const uint8_t *planes, const rsb_packed_part *c, int y, int x) {
    int64_t stride = (int64_t)c->block_columns * BLOCK_SIDE;
    return planes[c->plane + (y - c->top) * stride + (x - c->left)];
}

/* The value of a component at pixel (x, y) of the image. */
RSB_SHARED int value_at(const rsb_packed *p, const uint8_t *planes, int part, int y, int x) {
    const rsb_packed_part *c = &p->part[part];
    if (part == 0 || p->h_max == 1) return sample_at(planes, c, y, x);
    int own_x = x / 2, other_x = clip_to(x % 2 ? own_x + 1 : own_x - 1, c->width);
    if (p->v_max == 1) {
        int sum = 3 * sample_at(planes, c, y, own_x) + sample_at(planes, c, y, other_x);
        return (sum + 1 + x % 2) >> 2;
    }
    int own_y = y / 2, other_y = clip_to(y % 2 ? own_y + 1 : own_y - 1, c->height);
    int here = 3 * sample_at(planes, c, own_y, own_x) + sample_at(planes, c, other_y, own_x);
    int there = 3 * sample_at(planes, c, own_y, other_x) + sample_at(planes, c, other_y, other_x);
    return (3 * here + there + 8 - x % 2) >> 4;
}

RSB_SHARED void pixels_convert(const rsb_launch *a, pixels_block *s, int part, int row,
                               int thread) {
    (void)s;
    const rsb_packed *p = packed_row(a, row);
    int64_t which = (int64_t)part * PIXELS_THREADS + thread;
    if (p->kind != RSB_JPEG || which >= (int64_t)p->window.height * p->window.width) return;
    int y = p->window.top + (int)(which / p->window.width);
    int x = p->window.left + (int)(which % p->window.width);
    const uint8_t *planes = scratch_of(a, p) + p->second;
    int luma = value_at(p, planes, 0, y, x);
    uint32_t rgbx = (uint32_t)luma * 0x010101u;
    if (p->parts == 3)
        rgbx = rsb_rgbx(luma, value_at(p, planes, 1, y, x), value_at(p, planes, 2, y, x));
    ((uint32_t *)scratch_of(a, p))[which] = rgbx;
}

#endif
