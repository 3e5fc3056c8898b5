/* The compiled core of the loader: everything between an image's bytes in the file and its pixels
 * in the batch.
 *
 * It is plain C, without global state and without Python's C interface. A function that can fail
 * returns RSB_OK or another status of the enumeration below. The code checks every value from a
 * file before it uses the value as a length, an offset or an index. Pixels are uint8, in rows of
 * interleaved RGB from top to bottom. The decoder and the resampler compute pixels in integers, so
 * that the portable code and the vector code give the same bytes.
 */
#ifndef RSB_H
#define RSB_H

#include <stddef.h>
#include <stdint.h>

#include "shared/base.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "written for little-endian processors"
#endif

#define RSB_INLINE static inline __attribute__((always_inline))
#define RSB_LIKELY(x) __builtin_expect(!!(x), 1)
#define RSB_UNLIKELY(x) __builtin_expect(!!(x), 0)

/* Statuses. ops/native.py has the same numbers. */
enum {
    RSB_OK = 0,
    RSB_BAD_JPEG = 1, /* not a JPEG, or damaged */
    RSB_BAD_SIZE = 2, /* its sides, or the bytes of raw pixels, do not match the sample's */
    RSB_BAD_CHECKSUM = 3,
    RSB_BAD_READ = 4,   /* the file ends within the image, or reading fails */
    RSB_BAD_COLOUR = 5, /* neither greyscale nor RGB nor YCbCr */
    RSB_TOO_LARGE = 6,  /* more pixels than RSB_MAX_PIXELS */
    RSB_NO_MEMORY = 7,
    RSB_BAD_CALL = 8, /* an argument out of range: a box outside the image, an unknown op, ... */
    RSB_UNUSUAL = 9,  /* internal: the fast decoder does not handle this JPEG */
};

/* of an image */
#define RSB_MAX_PIXELS (1 << 28)
/* Readable bytes after each scratch buffer, because vector loads may read past the end. */
#define RSB_PAD 64

/* The buffers of a thread. They are kept: after the first images, nothing is allocated. */
enum {
    RSB_FILE,    /* the stored bytes */
    RSB_ENTROPY, /* entropy-coded bytes without stuffed zeros */
    RSB_PLANES,  /* samples of each component */
    RSB_ROWS,    /* a few rows: upsampled chroma, sums of a blur, positions of an affine op */
    RSB_TABLES,  /* weights of a resize */
    RSB_NARROW,  /* between the two passes of a resize */
    RSB_IMAGE,   /* a whole image, or its window */
    RSB_BUFFERS  /* their number */
};
typedef struct rsb_jpeg rsb_jpeg;
typedef struct {
    uint8_t *buffer[RSB_BUFFERS];
    size_t size[RSB_BUFFERS];
    rsb_jpeg *jpeg;
} rsb_scratch;

/* A new scratch, or NULL. One thread at a time may use it. */
rsb_scratch *rsb_scratch_new(void);
void rsb_scratch_free(rsb_scratch *scratch);

/* Buffer `which`, with `bytes` bytes and RSB_PAD readable ones after them, 64-byte aligned. NULL
 * where there is no memory. Its contents are undefined. */
uint8_t *rsb_buffer(rsb_scratch *scratch, int which, size_t bytes);

/* The sides of an image, in pixels. */
typedef struct {
    int height, width;
} rsb_size;

/* A rectangle of decoded pixels. `pixels` points to the pixel at (area.top, area.left). A pixel has
 * 3 (RGB) or 4 (RGBX) bytes; a row starts `stride` bytes after the row above. At least 16 bytes
 * after the last pixel are readable. */
typedef struct {
    const uint8_t *pixels;
    ptrdiff_t stride;
    int pixel_bytes;
    rsb_rect area;
} rsb_window;

/* Decodes the pixels `area` of a JPEG of `size` bytes whose sides are `image`. The result is equal
 * to libjpeg-turbo's with the accurate DCT and fancy upsampling. `entry_bytes` bytes of entry
 * points follow the JPEG; they are not used unless that is the number that rsb_jpeg_entries gives.
 * The window is valid until the scratch is used again. Returns RSB_OK, RSB_BAD_JPEG, RSB_BAD_SIZE,
 * RSB_BAD_COLOUR, RSB_TOO_LARGE, RSB_NO_MEMORY or RSB_BAD_CALL (the area is not in the image). */
int rsb_jpeg_window(const uint8_t *bytes, size_t size, size_t entry_bytes, rsb_size image,
                    rsb_rect area, rsb_scratch *scratch, rsb_window *window);

/* Decodes a JPEG of any colours with libjpeg-turbo and discards the pixels. Returns RSB_OK,
 * RSB_BAD_JPEG (also for a warning), RSB_TOO_LARGE or RSB_NO_MEMORY. */
int rsb_jpeg_check(const uint8_t *bytes, size_t size, rsb_scratch *scratch);

/* bytes of an entry point */
#define RSB_ENTRY_BYTES 10

/* Writes the JPEG's entry points (see jpeg_planes.c) to `entries`, which has `capacity` bytes.
 * Returns the number of bytes written. It is 0 if they do not fit, and for a JPEG that the fast
 * decoder does not handle, because libjpeg-turbo cannot use them. */
size_t rsb_jpeg_entries(const uint8_t *bytes, size_t size, uint8_t *entries, size_t capacity,
                        rsb_scratch *scratch);

/* The pixels of an image that rsb_resample of `box` to `out_size` reads. */
rsb_rect rsb_reach(rsb_box box, rsb_size image, rsb_size out_size, int filter);

/* Pillow's antialiased resize(box=...) of an image to `out_size` RGB pixels. The window must have
 * the pixels of rsb_reach. filter: RSB_BILINEAR or RSB_BICUBIC. flip: mirrors left and right.
 * rows_first: resizes vertically first. Returns RSB_OK, RSB_NO_MEMORY or RSB_BAD_CALL (pixels are
 * missing from the window). */
int rsb_resample(const rsb_window *window, rsb_size image, rsb_box box, int filter, int flip,
                 int rows_first, uint8_t *out, rsb_size out_size, rsb_scratch *scratch);

/* Applies the rsb_layer `draw` in place to an image of height x width x 3 bytes. Returns RSB_OK,
 * RSB_NO_MEMORY or RSB_BAD_CALL (an unknown op, or an argument out of range). */
int rsb_augment(uint8_t *image, int height, int width, const void *draw, rsb_scratch *scratch);

/* ---- batches ---- */

/* Where an image is in the file, and how to crop and resize it. SAMPLE in ops/native.py has the
 * same layout, as LAYER and STEP have those of rsb_layer and rsb_step. */
typedef struct {
    uint64_t pointer, size; /* bytes */
    uint64_t checksum;      /* XXH64 of the stored bytes, where `verify` is set */
    rsb_box box;            /* the crop */
    int32_t height, width;  /* of the stored image */
    int32_t file;           /* descriptor of the open file */
    /* of the entry points that follow the image's `size` bytes; the checksum includes them */
    uint32_t entry_bytes;
    uint8_t raw;                      /* RGB pixels, not a JPEG */
    uint8_t verify;                   /* compares the checksum */
    uint8_t filter, flip, rows_first; /* of rsb_resample */
    uint8_t unused[3];
} rsb_sample;

/* Makes one image of height x width x 3 bytes in `out`. Returns a status. */
typedef int (*rsb_decoder)(const rsb_sample *sample, uint8_t *out, int height, int width,
                           rsb_scratch *scratch);

/* Changes one image of height x width x 3 bytes in place. draw: the image's row of the batch's
 * random parameters. Returns a status. */
typedef int (*rsb_kernel)(uint8_t *image, int height, int width, const void *draw,
                          rsb_scratch *scratch);

/* A kernel, with its draws for the batch. */
typedef struct {
    rsb_kernel kernel;
    const uint8_t *draws;
    int64_t stride; /* bytes from a row's draws to the next row's */
} rsb_step;

/* A row's status before the pool has finished it */
enum { RSB_WAITING = -1, RSB_RUNNING = -2 };

/* Where the images of a batch are packed for the device kernels (shared/packed.h). */
typedef struct {
    uint8_t *memory;    /* begins with the zeroed record of each row; 64-byte aligned */
    uint64_t capacity;  /* bytes, without RSB_SLAB_PADDING that follow them */
    uint64_t scratch;   /* device memory that one image may take, in bytes */
    uint64_t used;      /* bytes at the start of `memory` */
    uint64_t committed; /* `used`, and the bytes that the rows that are not packed yet may need */
} rsb_slab;

/* A batch: `rows` samples are decoded, and the kernels of `num_steps` steps applied to each. */
typedef struct rsb_job {
    int32_t rows, height, width, num_steps;
    rsb_decoder decoder;
    const rsb_sample *samples; /* rows */
    const rsb_step *steps;     /* num_steps */
    uint8_t *out;              /* rows x height x width x 3 */
    int32_t *status;           /* rows */
    /* NULL, or where the rows are packed for the device. `out` is not used then. All kernels must
     * be rsb_augment, which the device applies. Rows that it cannot make are finished here, and
     * have the kind RSB_PIXELS. */
    rsb_slab *slab;
    /* NULL, or rows x (num_steps + 3) elements, to measure: nanoseconds of CLOCK_MONOTONIC before
     * the decoder, after it, and after each step; and the thread's id. 0: not reached. */
    int64_t *times;
    /* The pool sets what follows. */
    int32_t next;          /* first row that no thread has taken */
    int32_t done;          /* rows that are finished */
    struct rsb_job *after; /* in the queue */
} rsb_job;

/* The decoder of raw and JPEG images: reads, verifies, crops and resizes. Returns any status. */
int rsb_load(const rsb_sample *sample, uint8_t *out, int height, int width, rsb_scratch *scratch);

/* The same for an image in memory: `pointer`, `checksum` and `verify` are not used. */
int rsb_decode(const uint8_t *bytes, const rsb_sample *sample, uint8_t *out, int height, int width,
               rsb_scratch *scratch);

/* The same as a decoder, where `pointer` is an address in memory. */
int rsb_load_memory(const rsb_sample *sample, uint8_t *out, int height, int width,
                    rsb_scratch *scratch);

/* The decoder of images that are in `out` already. */
int rsb_keep(const rsb_sample *sample, uint8_t *out, int height, int width, rsb_scratch *scratch);

/* Reads one image as rsb_load does, and packs it as row `row` of the slab. Where the device cannot
 * make its pixels, they are made here: `*pixels` is then their place in the slab, otherwise NULL.
 * Returns any status. */
int rsb_pack(const rsb_sample *sample, rsb_slab *slab, int row, int height, int width,
             rsb_scratch *scratch, uint8_t **pixels);

/* RSB_OK or RSB_BAD_CALL: what rsb_augment returns for this layer if there is memory. */
int rsb_check_layer(const rsb_layer *layer);

/* Counts the blocks of threads that each device kernel needs for rows of a packed batch. starts:
 * [kernels][rows + 1]: the first block of each row, and the number of all blocks. */
void rsb_block_starts(const void *records, int rows, int height, int width, uint32_t *starts);

/* Runs a device kernel, by its number in the list of shared/kernels.h, on the CPU. order: of the
 * threads in each phase: 0: ascending, 1: descending, others: the seed of a random one. The result
 * does not depend on it. Returns RSB_BAD_CALL for another number. */
int rsb_emulate(int kernel, const void *launch, int order);

/* XXH64 of `size` bytes, with seed 0. */
uint64_t rsb_checksum(const uint8_t *bytes, size_t size);

/* ---- threads ---- */

typedef struct rsb_pool rsb_pool;

/* Starts `threads` threads, each with its own scratch. NULL if there is no memory, or if the system
 * cannot start a thread. */
rsb_pool *rsb_pool_new(int threads);

/* Puts a job into the queue: behind all others, or before them if `urgent`. The job and everything
 * it points to must exist until rsb_pool_wait returns 0 for it, or rsb_pool_stop returns. */
void rsb_pool_submit(rsb_pool *pool, rsb_job *job, int urgent);

/* Waits until all rows of the job are done, but not longer than `milliseconds`. Returns the number
 * of rows that are not done, or -1 if the pool was stopped. */
int rsb_pool_wait(rsb_pool *pool, rsb_job *job, int milliseconds);

/* The number of rows that have been done since rsb_pool_new. */
uint64_t rsb_pool_progress(rsb_pool *pool);

/* Removes the rows of the job that no thread has taken. The caller must still wait for the others.
 */
void rsb_pool_cancel(rsb_pool *pool, rsb_job *job);

/* Ends all threads, each after its current row. rsb_pool_wait returns -1 in all threads that call
 * it. */
void rsb_pool_stop(rsb_pool *pool);

/* Stops the pool and frees it. */
void rsb_pool_free(rsb_pool *pool);

/* On x86-64, hot loops are compiled twice, and the processor's features select one at run time.
 * With RSB_PORTABLE defined there is only the portable one. Both give the same bytes; a test checks
 * that. */
#if defined(__x86_64__) && !defined(RSB_PORTABLE)
#define RSB_AVX2 1
RSB_INLINE int rsb_has_avx2(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") &&
           __builtin_cpu_supports("bmi2");
}
#else
#define RSB_AVX2 0
#endif

#endif
