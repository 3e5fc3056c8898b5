/* What the CPU core and the device kernels share: integer types, and how a function, a constant and
 * a block's memory are declared. gcc compiles these headers as C, NVRTC as CUDA C++. Signed
 * overflow is undefined in both: arithmetic that may wrap is unsigned.
 */
#ifndef RSB_BASE_H
#define RSB_BASE_H

#ifdef __CUDACC_RTC__

typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;

#define RSB_SHARED static __device__ __forceinline__
#define RSB_CONSTANT static __device__ const
#define RSB_ADD(address, value) atomicAdd(address, value)

/* the nearest integer, ties to even, of a double within the range of int */
RSB_SHARED int rsb_round(double x) { return __double2int_rn(x); }

/* the bytes of a word in reverse order */
RSB_SHARED uint32_t rsb_swap(uint32_t word) { return __byte_perm(word, 0, 0x0123); }

#else

#include <math.h>
#include <stdint.h>

#define RSB_SHARED static inline __attribute__((always_inline, unused))
#define RSB_CONSTANT static const __attribute__((unused))
#define RSB_ADD(address, value) __atomic_fetch_add(address, value, __ATOMIC_RELAXED)

RSB_SHARED int rsb_round(double x) { return (int)lrint(x); }
RSB_SHARED uint32_t rsb_swap(uint32_t word) { return __builtin_bswap32(word); }

#endif

/* Words that are loaded from bytes, or stored to them. */
typedef uint32_t rsb_word __attribute__((may_alias));
typedef uint64_t rsb_long __attribute__((may_alias));

/* The nearest value of a pixel. */
RSB_SHARED int clamp(int value) { return value < 0 ? 0 : value > 255 ? 255 : value; }

/* A rectangle of whole pixels of an image. */
typedef struct {
    int top, left, height, width;
} rsb_rect;

/* A crop box, in pixels of the image. Its borders may lie between pixels. */
typedef struct {
    double top, left, height, width;
} rsb_box;

enum { RSB_BILINEAR = 0, RSB_BICUBIC = 1, RSB_NEAREST = 2 /* of RSB_AFFINE only */ };

/* The ops of rsb_augment, with their arguments. ops/native.py has the same numbers. */
enum {
    RSB_IDENTITY = 0,
    RSB_AUTOCONTRAST = 1,
    RSB_EQUALIZE = 2,
    RSB_INVERT = 3,
    RSB_POSTERIZE = 4,    /* bits kept, 0 .. 8 */
    RSB_SOLARIZE = 5,     /* threshold from which values are inverted */
    RSB_SOLARIZE_ADD = 6, /* amount that is added to values below 128 */
    /* this and the next three: Pillow's enhancement factor, 1 changes nothing */
    RSB_COLOR = 7,
    RSB_CONTRAST = 8,
    RSB_BRIGHTNESS = 9,
    RSB_SHARPNESS = 10,
    RSB_BLUR = 11,   /* sigma in pixels */
    RSB_HUE = 12,    /* share of the colour circle, -0.5 .. 0.5 */
    RSB_AFFINE = 13, /* Pillow's six coefficients, from output to input pixels */
};
typedef struct {
    int32_t op;
    uint8_t filter, fill[3]; /* of RSB_AFFINE: the filter, and RGB of pixels it does not cover */
    double argument[6];
} rsb_layer;

#endif
