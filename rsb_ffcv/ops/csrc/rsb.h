/* The compiled core of the loader: what one image goes through between the file's bytes and the
 * batch.
 *
 * Plain C, no global state, no Python. Every function that can fail returns an RSB_* status.
 * Whatever comes from a file is checked before it is used as a length, an offset or an index.
 * Integer arithmetic throughout the decoder and the resampler, so that the portable code and the
 * vector code give the same bytes.
 */
#ifndef RSB_H
#define RSB_H

#include <stddef.h>
#include <stdint.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "written for little-endian processors"
#endif

#define RSB_INLINE static inline __attribute__((always_inline))
#define RSB_LIKELY(x) __builtin_expect(!!(x), 1)
#define RSB_UNLIKELY(x) __builtin_expect(!!(x), 0)

enum {
    RSB_OK = 0,
    RSB_BAD_JPEG = 1, /* not a JPEG, or damaged */
    RSB_BAD_SIZE = 2, /* its own size is not the one in the file's metadata */
    RSB_BAD_CHECKSUM = 3,
    RSB_BAD_READ = 4,   /* the file ends, or cannot be read, where the image should be */
    RSB_BAD_COLOUR = 5, /* neither greyscale nor RGB nor YCbCr */
    RSB_TOO_LARGE = 6,  /* more pixels than RSB_MAX_PIXELS */
    RSB_NO_MEMORY = 7,
    RSB_BAD_CALL = 8, /* a box outside the image, an unknown op: a mistake of the caller */
    RSB_UNUSUAL = 9,  /* internal: a JPEG that the fast decoder leaves to libjpeg-turbo */
};

#define RSB_MAX_PIXELS (1 << 28)
/* readable bytes after every scratch buffer: vector loads may run past the end */
#define RSB_PAD 64

/* Buffers of one thread, grown and kept: after the first images nothing is allocated. */
enum {
    RSB_FILE,
    RSB_ENTROPY,
    RSB_PLANES,
    RSB_ROWS,
    RSB_TABLES,
    RSB_NARROW,
    RSB_IMAGE,
    RSB_BUFFERS
};
typedef struct rsb_jpeg rsb_jpeg;
typedef struct {
    uint8_t *buffer[RSB_BUFFERS];
    size_t size[RSB_BUFFERS];
    rsb_jpeg *jpeg;
} rsb_scratch;

/* `bytes` bytes and RSB_PAD readable ones after them, 64-byte aligned, or NULL. What was there
 * before is lost. */
uint8_t *rsb_buffer(rsb_scratch *scratch, int which, size_t bytes);

/* The sides of an image, in pixels. */
typedef struct {
    int height, width;
} rsb_size;

/* A rectangle of whole pixels of an image. */
typedef struct {
    int top, left, height, width;
} rsb_rect;

/* A crop box, in pixels of the image. Its borders may lie between pixels. */
typedef struct {
    double top, left, height, width;
} rsb_box;

/* A rectangle of decoded pixels. `pixels` points to the pixel at (area.top, area.left). A pixel has
 * 3 (RGB) or 4 (RGBX) bytes; a row starts `stride` bytes after the row above. At least 16 bytes
 * after the last pixel are readable. */
typedef struct {
    const uint8_t *pixels;
    ptrdiff_t stride;
    int pixel_bytes;
    rsb_rect area;
} rsb_window;

/* Decodes the pixels `area` of a JPEG whose sides are `image`. The result is equal to
 * libjpeg-turbo's with the accurate DCT and fancy upsampling. */
int rsb_jpeg_window(const uint8_t *bytes, size_t size, size_t entry_bytes, rsb_size image,
                    rsb_rect area, rsb_scratch *scratch, rsb_window *window);

/* Whether libjpeg-turbo decodes a JPEG of any colours to its end without a warning. */
int rsb_jpeg_check(const uint8_t *bytes, size_t size, rsb_scratch *scratch);

#define RSB_ENTRY_BYTES 10

/* Writes the JPEG's entry points (see jpeg.c) to `entries`, which has `room` bytes, and returns how
 * many bytes they take: 0 where the fast decoder leaves the JPEG to libjpeg-turbo, which has no use
 * for them. */
size_t rsb_jpeg_entries(const uint8_t *bytes, size_t size, uint8_t *entries, size_t room,
                        rsb_scratch *scratch);

enum { RSB_BILINEAR = 0, RSB_BICUBIC = 1 };

/* The pixels of an image that resampling `box` to `out_size` reads. */
rsb_rect rsb_reach(rsb_box box, rsb_size image, rsb_size out_size, int filter);

/* Pillow's resize(box=...) of the window of an image, antialiased, to `out_size` RGB pixels;
 * mirrored where `flip`; vertically first where `rows_first`. */
int rsb_resample(const rsb_window *window, rsb_size image, rsb_box box, int filter, int flip,
                 int rows_first, uint8_t *out, rsb_size out_size, rsb_scratch *scratch);

/* ops of rsb_augment, with their arguments */
enum {
    RSB_IDENTITY = 0,
    RSB_AUTOCONTRAST = 1,
    RSB_EQUALIZE = 2,
    RSB_INVERT = 3,
    RSB_POSTERIZE = 4,    /* bits kept, 0 .. 8 */
    RSB_SOLARIZE = 5,     /* threshold from which values are inverted */
    RSB_SOLARIZE_ADD = 6, /* what values below 128 gain */
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
    uint8_t filter, fill[3]; /* of RSB_AFFINE: interpolation, and the colour of what it uncovers */
    double argument[6];
} rsb_layer;

/* Applies the layer that `draw` points to, in place, to height x width RGB pixels. */
int rsb_augment(uint8_t *image, int height, int width, const void *draw, rsb_scratch *scratch);

/* ---- batches ---- */

/* Where an image stands in the file, and what is to become of it. */
typedef struct {
    uint64_t pointer, size; /* bytes */
    uint64_t checksum;      /* XXH64 of the stored bytes, where `verify` is set */
    rsb_box box;            /* the crop */
    int32_t height, width;  /* of the stored image */
    /* of the entry points that follow the image's `size` bytes; the checksum is of both */
    uint32_t entry_bytes;
    uint8_t raw, verify, filter, flip, rows_first, unused[3];
} rsb_sample;

/* A kernel that reads one image from the file into `out`. */
typedef int (*rsb_decoder)(int file, const rsb_sample *sample, uint8_t *out, int height, int width,
                           rsb_scratch *scratch);

/* A kernel that changes one image in place; `draw` is its row of the batch's random parameters. */
typedef int (*rsb_kernel)(uint8_t *image, int height, int width, const void *draw,
                          rsb_scratch *scratch);
typedef struct {
    rsb_kernel kernel;
    const uint8_t *draws;
    int64_t stride;
} rsb_step;

enum { RSB_WAITING = -1, RSB_RUNNING = -2 }; /* of a row's status, before it is one of the above */

typedef struct rsb_job {
    int32_t file, rows, height, width, num_steps;
    rsb_decoder decoder;
    const rsb_sample *samples;
    const rsb_step *steps;
    uint8_t *out;       /* rows x height x width x 3 */
    int32_t *status;    /* rows */
    int32_t next, done; /* of the pool, as is what follows */
    struct rsb_job *after;
} rsb_job;

/* The decoder of raw and JPEG images: reads, checks, crops and resizes. */
int rsb_load(int file, const rsb_sample *sample, uint8_t *out, int height, int width,
             rsb_scratch *scratch);

/* The same of `bytes` in memory, without the checksum. */
int rsb_decode(const uint8_t *bytes, const rsb_sample *sample, uint8_t *out, int height, int width,
               rsb_scratch *scratch);
rsb_scratch *rsb_scratch_new(void);
void rsb_scratch_free(rsb_scratch *scratch);
uint64_t rsb_checksum(const uint8_t *bytes, size_t size);

/* Hot loops are compiled twice on x86-64, and the processor decides when the library runs.
 * RSB_PORTABLE leaves the second out: both give the same bytes, which a test holds. */
#if defined(__x86_64__) && !defined(RSB_PORTABLE)
#define RSB_AVX2 1
RSB_INLINE int rsb_has_avx2(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2");
}
#else
#define RSB_AVX2 0
#endif

#endif
