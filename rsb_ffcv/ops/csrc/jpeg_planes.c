/* From entropy-coded bytes to the samples of each component. */
#include <string.h>

#include "jpeg.h"

typedef struct {
    const uint8_t *next;
    uint64_t bits; /* left-aligned */
    int count;
} reader;

/* One block of an MCU. */
typedef struct {
    const huffman *dc, *ac;
    const int16_t *quant;
    uint8_t *out; /* where the block of the row's first MCU goes */
    int component, stride, across, down;
} unit;

/* A decoder of Huffman codes has to run over all that comes before a window. Entry points save most
 * of it: for every SPAN-th MCU of each row, from the first on, the bit at which it begins (uint32,
 * stuffed zeros not counted) and the three predictions of its first coefficients (int16),
 * little-endian. The writer lays them after the image's own bytes. */

static uint32_t read_entry(const uint8_t *entries, size_t which, int *prediction) {
    uint32_t bit;
    int16_t values[3];
    memcpy(&bit, entries + RSB_ENTRY_BYTES * which, 4);
    memcpy(values, entries + RSB_ENTRY_BYTES * which + 4, 6);
    for (int i = 0; i < 3; i++) prediction[i] = values[i];
    return bit;
}

static uint8_t *write_entry(uint8_t *to, uint32_t bit, const int *prediction) {
    int16_t values[3] = {(int16_t)prediction[0], (int16_t)prediction[1], (int16_t)prediction[2]};
    memcpy(to, &bit, 4);
    memcpy(to + 4, values, 6);
    return to + RSB_ENTRY_BYTES;
}

/* The blocks of an MCU, in the file's order; returns their number. */
static int make_units(const rsb_jpeg *j, unit *units) {
    int n = 0;
    for (int i = 0; i < j->count; i++)
        for (int b = 0; b < j->part[i].h * j->part[i].v; b++, n++) {
            const component *c = &j->part[i];
            units[n].dc = &j->dc[c->dc], units[n].ac = &j->ac[c->ac],
            units[n].quant = j->quant[c->quant];
            units[n].component = i, units[n].stride = c->stride;
            units[n].across = 8 * c->h, units[n].down = 8 * c->v * c->stride;
            units[n].out = c->plane + (ptrdiff_t)(b / c->h) * 8 * c->stride + b % c->h * 8;
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

#define HOT(name) name##_plain
#define HOT_VECTORS 0
#include "jpeg_entropy_hot.h"
#include "jpeg_idct_hot.h"
#include "jpeg_planes_hot.h"
static const kernels PLAIN = KERNELS();
#undef HOT
#undef HOT_VECTORS

#if RSB_AVX2
#pragma GCC push_options
#pragma GCC target("avx2,bmi,bmi2,lzcnt")
#define HOT(name) name##_avx2
#define HOT_VECTORS 1
#include "jpeg_entropy_hot.h"
#include "jpeg_idct_hot.h"
#include "jpeg_planes_hot.h"
static const kernels AVX2 = KERNELS();
#undef HOT
#pragma GCC pop_options
#endif

static const kernels *pick_kernels(void) {
#if RSB_AVX2
    if (rsb_has_avx2()) return &AVX2;
#endif
    return &PLAIN;
}

int rsb_jpeg_decode_planes(rsb_jpeg *j, const scan *s, mcu_area area) {
    return pick_kernels()->decode_planes(j, s, area);
}

int rsb_jpeg_find_entries(rsb_jpeg *j, const scan *s, uint8_t *entries) {
    return pick_kernels()->find_entries(j, s, entries);
}
