/* Compiles the hot loops of HOT_FILE for portable and for AVX2 code, and selects one at run time.
 *
 * A .c file includes this header once, after it has defined HOT_FILE (the header with the loops),
 * the type `kernels` (a pointer to each loop) and KERNELS() (the pointers, as HOT(name)). In
 * HOT_FILE, HOT(name) is the name of a function, and HOT_VECTORS is 1 for AVX2 code.
 */
#define HOT(name) name##_plain
#define HOT_VECTORS 0
#include HOT_FILE
static const kernels PLAIN = KERNELS();
#undef HOT
#undef HOT_VECTORS

#if RSB_AVX2
#pragma GCC push_options
#pragma GCC target("avx2,bmi,bmi2")
#define HOT(name) name##_avx2
#define HOT_VECTORS 1
#include HOT_FILE
static const kernels AVX2 = KERNELS();
#undef HOT
#undef HOT_VECTORS
#pragma GCC pop_options
#endif

static const kernels *pick_kernels(void) {
#if RSB_AVX2
    if (rsb_has_avx2()) return &AVX2;
#endif
    return &PLAIN;
}
