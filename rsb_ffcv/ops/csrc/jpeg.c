/* Decodes a window of a JPEG.
 *
 * libjpeg-turbo spends three quarters of the time for the window of a training image in Huffman
 * decoding, mostly for coefficients outside of the window. This decoder reads up to two symbols and
 * their values with one table lookup inside the window, skips as many symbols as fit with one
 * lookup outside of it, and stops after the window's last row. Its arithmetic (the "islow" inverse
 * DCT, triangle upsampling, YCbCr to RGB) gives libjpeg-turbo's bytes, for all coefficients that an
 * encoder makes from pixels. For others, libjpeg-turbo's own vector code differs from its C code.
 *
 * It decodes the usual JPEGs of photographs: 8-bit samples, sequential Huffman coding, greyscale or
 * YCbCr, 4:4:4, 4:2:2 or 4:2:0, one scan, no restart intervals. For all other JPEGs, and for those
 * that look damaged, it returns RSB_UNUSUAL. libjpeg-turbo then decodes them or reports the damage.
 *
 *     jpeg_headers.c   segments, tables, bytes of the scan
 *     jpeg_huffman.c   lookup tables
 *     jpeg_planes.c    Huffman decoding, inverse DCT
 *     jpeg_pixels.c    upsampling, colours
 */
#if !__has_include(<turbojpeg.h>)
#error "turbojpeg.h is missing: install libturbojpeg's headers (Debian: libturbojpeg0-dev)"
#endif
#include <turbojpeg.h>

#include "jpeg.h"

/* Makes the lookup tables for decoding coefficients, or for skipping them. */
static void build_tables(rsb_jpeg *j, int decoding, int skipping) {
    for (int i = 0; i < j->count; i++) {
        rsb_jpeg_build_pairs(&j->dc[j->part[i].dc], 0);
        if (decoding) rsb_jpeg_build_pairs(&j->ac[j->part[i].ac], 1);
        if (skipping) rsb_jpeg_build_skips(&j->ac[j->part[i].ac]);
    }
}

mcu_area rsb_jpeg_mcus(const rsb_jpeg *j, rsb_rect area) {
    int mcu_width = BLOCK_SIDE * j->h_max;
    int mcu_height = BLOCK_SIDE * j->v_max;
    /* upsampling reads the next chroma sample on each side */
    int margin_x = j->h_max == 2 ? 2 : 0;
    int margin_y = j->v_max == 2 ? 2 : 0;
    mcu_area m;
    m.row_start = (area.top > margin_y ? area.top - margin_y : 0) / mcu_height;
    m.row_end = (area.top + area.height - 1 + margin_y) / mcu_height + 1;
    m.row_end = m.row_end < j->rows ? m.row_end : j->rows;
    m.column_start = (area.left > margin_x ? area.left - margin_x : 0) / mcu_width;
    m.column_end = (area.left + area.width - 1 + margin_x) / mcu_width + 1;
    m.column_end = m.column_end < j->columns ? m.column_end : j->columns;
    return m;
}

/* Allocates the planes for the samples of the MCUs `m`. */
static int make_planes(rsb_jpeg *j, mcu_area m, rsb_scratch *scratch) {
    size_t total = 0;
    size_t sizes[MAX_COMPONENTS];
    for (int i = 0; i < j->count; i++) {
        component *c = &j->part[i];
        c->block_x = m.column_start * c->h;
        c->block_y = m.row_start * c->v;
        c->stride = (m.column_end - m.column_start) * c->h * BLOCK_SIDE + RSB_PAD;
        sizes[i] = (size_t)c->stride * (m.row_end - m.row_start) * c->v * BLOCK_SIDE;
        total += sizes[i];
    }
    uint8_t *planes = rsb_buffer(scratch, RSB_PLANES, total);
    if (!planes) return RSB_NO_MEMORY;
    for (int i = 0; i < j->count; i++) {
        j->part[i].plane = planes;
        planes += sizes[i];
    }
    return RSB_OK;
}

/* RSB_UNUSUAL: turbo_window must decode the JPEG. */
static int fast_window(const uint8_t *bytes, size_t size, size_t entry_bytes, rsb_size image,
                       rsb_rect area, rsb_scratch *scratch, rsb_window *window) {
    scan s;
    int status = rsb_jpeg_open(bytes, size, scratch, &s);
    if (status) return status;
    rsb_jpeg *j = scratch->jpeg;
    if (j->height != image.height || j->width != image.width) return RSB_BAD_SIZE;
    mcu_area m = rsb_jpeg_mcus(j, area);
    status = make_planes(j, m, scratch);
    if (status) return status;
    /* skipping is needed only where the window leaves out MCUs that come before its end */
    build_tables(j, 1, m.row_start || m.column_start || m.column_end < j->columns);
    if (entry_bytes == (size_t)RSB_ENTRY_BYTES * s.entries_per_row * j->rows)
        s.entries = bytes + size;
    status = rsb_jpeg_decode_planes(j, &s, m);
    if (status) return status;
    return rsb_jpeg_pixels(j, area, scratch, window);
}

/* A libjpeg-turbo decoder for one image. It is not reused, because a damaged file may leave it in a
 * state that affects the next image. */
typedef struct {
    tjhandle handle;
    int width, height, is_cmyk;
} turbo;

/* Starts a decoder. The caller destroys t->handle, unless it is NULL. */
static int turbo_open(turbo *t, const uint8_t *bytes, size_t size) {
    int subsampling;
    int colours = 0;
    t->width = 0;
    t->height = 0;
    t->handle = tjInitDecompress();
    if (!t->handle) return RSB_NO_MEMORY;
    int failed =
        tjDecompressHeader3(t->handle, bytes, size, &t->width, &t->height, &subsampling, &colours);
    t->is_cmyk = colours == TJCS_CMYK || colours == TJCS_YCCK;
    return failed || t->width < 1 || t->height < 1 ? RSB_BAD_JPEG : RSB_OK;
}

/* Decodes the whole image into `pixels`, 4 bytes a pixel. A warning counts as damage too: it means
 * that libjpeg-turbo filled in missing pixels. */
static int turbo_decode(const turbo *t, const uint8_t *bytes, size_t size, uint8_t *pixels,
                        int format, int flags) {
    int stride = 4 * t->width;
    if (tjDecompress2(t->handle, bytes, size, pixels, t->width, stride, t->height, format, flags))
        return RSB_BAD_JPEG;
    return RSB_OK;
}

static int turbo_window(const uint8_t *bytes, size_t size, rsb_size image, rsb_rect area,
                        rsb_scratch *scratch, rsb_window *window) {
    turbo t;
    int status = turbo_open(&t, bytes, size);
    if (status == RSB_OK && (t.width != image.width || t.height != image.height))
        status = RSB_BAD_SIZE;
    if (status == RSB_OK && t.is_cmyk) status = RSB_BAD_COLOUR;
    size_t stride = 4 * (size_t)t.width;
    uint8_t *pixels = NULL;
    if (status == RSB_OK) {
        pixels = rsb_buffer(scratch, RSB_IMAGE, stride * t.height);
        if (!pixels) status = RSB_NO_MEMORY;
    }
    if (status == RSB_OK)
        status = turbo_decode(&t, bytes, size, pixels, TJPF_RGBX, TJFLAG_ACCURATEDCT);
    if (t.handle) tjDestroy(t.handle);
    if (status == RSB_OK) {
        const uint8_t *first = pixels + stride * area.top + 4 * (size_t)area.left;
        *window = (rsb_window){first, (ptrdiff_t)stride, 4, area};
    }
    return status;
}

int rsb_jpeg_check(const uint8_t *bytes, size_t size, rsb_scratch *scratch) {
    turbo t;
    int status = turbo_open(&t, bytes, size);
    if (status == RSB_OK && (int64_t)t.width * t.height > RSB_MAX_PIXELS) status = RSB_TOO_LARGE;
    uint8_t *pixels = NULL;
    if (status == RSB_OK) {
        pixels = rsb_buffer(scratch, RSB_IMAGE, 4 * (size_t)t.width * t.height);
        if (!pixels) status = RSB_NO_MEMORY;
    }
    if (status == RSB_OK)
        status = turbo_decode(&t, bytes, size, pixels, t.is_cmyk ? TJPF_CMYK : TJPF_RGBX, 0);
    if (t.handle) tjDestroy(t.handle);
    return status;
}

size_t rsb_jpeg_entries(const uint8_t *bytes, size_t size, uint8_t *entries, size_t capacity,
                        rsb_scratch *scratch) {
    scan s;
    if (rsb_jpeg_open(bytes, size, scratch, &s)) return 0;
    if (s.length > UINT32_MAX / 8) return 0; /* an entry point has 32 bits for its position */
    rsb_jpeg *j = scratch->jpeg;
    build_tables(j, 0, 1);
    /* no samples are decoded */
    for (int i = 0; i < j->count; i++) {
        j->part[i].plane = NULL;
        j->part[i].stride = 0;
    }
    size_t needed = (size_t)RSB_ENTRY_BYTES * s.entries_per_row * j->rows;
    if (needed > capacity || rsb_jpeg_find_entries(j, &s, entries)) return 0;
    return needed;
}

int rsb_jpeg_window(const uint8_t *bytes, size_t size, size_t entry_bytes, rsb_size image,
                    rsb_rect area, rsb_scratch *scratch, rsb_window *window) {
    if (area.top < 0 || area.left < 0 || area.height < 1 || area.width < 1 ||
        area.top > image.height - area.height || area.left > image.width - area.width)
        return RSB_BAD_CALL;
    if ((int64_t)image.height * image.width > RSB_MAX_PIXELS) return RSB_TOO_LARGE;
    int status = fast_window(bytes, size, entry_bytes, image, area, scratch, window);
    if (status != RSB_UNUSUAL) return status;
    return turbo_window(bytes, size, image, area, scratch, window);
}
