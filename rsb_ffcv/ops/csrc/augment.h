/* The operations of rsb_augment that have their own files. */
#ifndef RSB_AUGMENT_H
#define RSB_AUGMENT_H

#include "rsb.h"

#pragma GCC visibility push(hidden)

/* a: Pillow's six coefficients. filter: RSB_BILINEAR, RSB_BICUBIC or RSB_NEAREST. fill: RGB of the
 * pixels that the source image does not cover. Returns RSB_BAD_CALL for an image whose copy (RGBX,
 * with a border) takes 2 GiB or more, or RSB_NO_MEMORY. */
int rsb_affine(uint8_t *image, rsb_size size, const double *a, int filter, const uint8_t *fill,
               rsb_scratch *scratch);

#pragma GCC visibility pop

#endif
