/* Copies entropy-coded bytes without the zero that follows each 0xFF. */
#include <string.h>

#include "jpeg.h"
#if RSB_AVX2
#include <immintrin.h>
#endif

typedef struct {
    int (*unstuff)(const uint8_t *, size_t, uint8_t *, size_t *);
} kernels;

#define KERNELS() {HOT(unstuff)}

#define HOT_FILE "jpeg_unstuff_hot.h"
#include "dispatch.h"

int rsb_jpeg_unstuff(const uint8_t *in, size_t n, uint8_t *out, size_t *length) {
    return pick_kernels()->unstuff(in, n, out, length);
}
