/* A window of a baseline JPEG, as RGBX pixels.
 *
 * Of the time that libjpeg-turbo spends on the window of a training image, three quarters go into
 * Huffman decoding, most of it for coefficients that nothing will look at. This decoder takes two
 * symbols of known value with one table look-up inside the window, as many as fit into one outside
 * of it, and stops after the window's last row. Its arithmetic (the "islow" inverse DCT, triangle
 * upsampling, YCbCr to RGB) gives libjpeg-turbo's bytes, for coefficients that an encoder can have
 * made from pixels (for others, libjpeg-turbo's own vector code differs from its C code).
 *
 * It knows what files of photographs are made of: 8-bit baseline Huffman, greyscale or YCbCr,
 * 4:4:4, 4:2:2 or 4:2:0, one scan. Everything else, and everything that looks damaged, is left to
 * libjpeg-turbo, which decides.
 */
#include <turbojpeg.h>

#include "jpeg.h"

/* The tables that reading coefficients, and running over them, needs. */
static void build_tables(rsb_jpeg *j, int reading, int running) {
    for (int i = 0; i < j->count; i++) {
        rsb_jpeg_build_pairs(&j->dc[j->part[i].dc], 0);
        if (reading) rsb_jpeg_build_pairs(&j->ac[j->part[i].ac], 1);
        if (running) rsb_jpeg_build_skips(&j->ac[j->part[i].ac]);
    }
}

/* The MCUs that the pixels of `area` depend on. */
static mcu_area mcus_of(const rsb_jpeg *j, rsb_rect area) {
    int mcu_width = 8 * j->h_max;
    int mcu_height = 8 * j->v_max;
    /* the chroma neighbours of the window */
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

static int make_planes(rsb_jpeg *j, mcu_area m, rsb_scratch *scratch) {
    size_t total = 0, sizes[3];
    for (int i = 0; i < j->count; i++) {
        component *c = &j->part[i];
        c->block_x = m.column_start * c->h;
        c->block_y = m.row_start * c->v;
        c->stride = (m.column_end - m.column_start) * c->h * 8 + RSB_PAD;
        sizes[i] = (size_t)c->stride * (m.row_end - m.row_start) * c->v * 8;
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

static int fast_window(const uint8_t *bytes, size_t size, size_t entry_bytes, rsb_size image,
                       rsb_rect area, rsb_scratch *scratch, rsb_window *window) {
    scan s;
    int status = rsb_jpeg_open(bytes, size, scratch, &s);
    if (status) return status;
    rsb_jpeg *j = scratch->jpeg;
    if (j->height != image.height || j->width != image.width) return RSB_BAD_SIZE;
    mcu_area m = mcus_of(j, area);
    status = make_planes(j, m, scratch);
    if (status) return status;
    build_tables(j, 1, m.row_start || m.column_start || m.column_end < j->columns);
    if (entry_bytes == (size_t)RSB_ENTRY_BYTES * s.entries_per_row * j->rows)
        s.entries = bytes + size;
    status = rsb_jpeg_decode_planes(j, &s, m);
    if (status) return status;
    return rsb_jpeg_pixels(j, area, scratch, window);
}

/* ---- everything else ---- */

static int turbo_window(const uint8_t *bytes, size_t size, rsb_size image, rsb_rect area,
                        rsb_scratch *scratch, rsb_window *window) {
    int w = 0, h = 0, sampling, colours;
    /* anew: a damaged file leaves its traces in one that is used again */
    tjhandle turbo = tjInitDecompress();
    if (!turbo) return RSB_NO_MEMORY;
    int status = RSB_OK;
    if (tjDecompressHeader3(turbo, bytes, size, &w, &h, &sampling, &colours) || w < 1 || h < 1)
        status = RSB_BAD_JPEG;
    else if (w != image.width || h != image.height)
        status = RSB_BAD_SIZE;
    else if (colours == TJCS_CMYK || colours == TJCS_YCCK)
        status = RSB_BAD_COLOUR;
    size_t stride = 4 * (size_t)w;
    uint8_t *pixels = NULL;
    if (status == RSB_OK && !(pixels = rsb_buffer(scratch, RSB_IMAGE, stride * h)))
        status = RSB_NO_MEMORY;
    /* A warning is an error here too: it means that pixels were made up. */
    if (status == RSB_OK &&
        tjDecompress2(turbo, bytes, size, pixels, w, (int)stride, h, TJPF_RGBX, TJFLAG_ACCURATEDCT))
        status = RSB_BAD_JPEG;
    tjDestroy(turbo);
    if (status == RSB_OK)
        *window = (rsb_window){pixels + stride * area.top + 4 * (size_t)area.left,
                               (ptrdiff_t)stride, 4, area};
    return status;
}

int rsb_jpeg_check(const uint8_t *bytes, size_t size, rsb_scratch *scratch) {
    int w = 0, h = 0, sampling, colours;
    tjhandle turbo = tjInitDecompress();
    if (!turbo) return RSB_NO_MEMORY;
    int status =
        tjDecompressHeader3(turbo, bytes, size, &w, &h, &sampling, &colours) || w < 1 || h < 1
            ? RSB_BAD_JPEG
            : RSB_OK;
    if (status == RSB_OK && (int64_t)w * h > RSB_MAX_PIXELS) status = RSB_TOO_LARGE;
    uint8_t *pixels = status == RSB_OK ? rsb_buffer(scratch, RSB_IMAGE, 4 * (size_t)w * h) : NULL;
    if (status == RSB_OK && !pixels) status = RSB_NO_MEMORY;
    int format = colours == TJCS_CMYK || colours == TJCS_YCCK ? TJPF_CMYK : TJPF_RGBX;
    if (status == RSB_OK && tjDecompress2(turbo, bytes, size, pixels, w, 4 * w, h, format, 0))
        status = RSB_BAD_JPEG;
    tjDestroy(turbo);
    return status;
}

size_t rsb_jpeg_entries(const uint8_t *bytes, size_t size, uint8_t *entries, size_t room,
                        rsb_scratch *scratch) {
    scan s;
    if (rsb_jpeg_open(bytes, size, scratch, &s) || s.length > UINT32_MAX / 8) return 0;
    rsb_jpeg *j = scratch->jpeg;
    build_tables(j, 0, 1);
    /* nothing is decoded */
    for (int i = 0; i < j->count; i++) {
        j->part[i].plane = NULL;
        j->part[i].stride = 0;
    }
    size_t needed = (size_t)RSB_ENTRY_BYTES * s.entries_per_row * j->rows;
    if (needed > room || rsb_jpeg_find_entries(j, &s, entries)) return 0;
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
