/* The tables of weights by which a resize multiplies source pixels. */
#ifndef RSB_TAPS_H
#define RSB_TAPS_H

#include "rsb.h"
#include "shared/filters.h"

/* Taps per vector load and multiply-add. Horizontal passes round the number of taps up to a
 * multiple of it. */
#define TAP_GROUP 4

/* int16 elements of `spread` for each tap */
#define SPREAD 4

/* What output pixel i reads: `count` source pixels from first[i] on, with the weights at
 * weights + i * count. Weights have `shift` fractional bits.
 *
 * In vertical passes, only the first used[i] of the weights are set. In horizontal passes, all are;
 * those of unused taps are 0.
 *
 * spread (horizontal passes only) has the weights as the vector code loads them: each pair of taps
 * four times, so that one 256-bit register holds a group.
 *
 *     element  0   1   2   3   4   5   6   7   8   9  ...  14  15
 *            +---+---+---+---+---+---+---+---+---+---+---+---+---+
 *     weight | 0 | 1 | 0 | 1 | 0 | 1 | 0 | 1 | 2 | 3 |...| 2 | 3 |    read by columns_groups
 *            +---+---+---+---+---+---+---+---+---+---+---+---+---+
 */
typedef struct {
    int count, shift;
    int *first, *used;
    int16_t *weights, *spread;
} taps;

#pragma GCC visibility push(hidden)

/* The source pixels that all output pixels of an axis read. */
range rsb_axis_range(const axis *a);

/* Bytes that the tables of an axis take. */
size_t rsb_taps_bytes(const axis *a);

/* Fills `t`, whose arrays lie in `memory` (rsb_taps_bytes long, 64-byte aligned). Positions are
 * relative to `window`, the source pixels that are there. across: in groups of TAP_GROUP, with
 * `spread`. mirrored: the first output pixel becomes the last. */
void rsb_make_taps(taps *t, uint8_t *memory, const axis *a, range window, int across, int mirrored);

#pragma GCC visibility pop

#endif
