/* One stored image: read, verified, decoded, cropped and resized into the batch. */
#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "sample.h"

/* A box computed in floating point may extend past the border by a rounding error. Pixels. */
#define BOX_TOLERANCE 1e-6

int rsb_crop(const uint8_t *bytes, const rsb_sample *s, uint8_t *out, rsb_size out_size,
             rsb_scratch *scratch) {
    rsb_size image = {s->height, s->width};
    rsb_window window;
    if (s->raw) {
        if (s->size != (uint64_t)image.height * image.width * 3) return RSB_BAD_SIZE;
        window =
            (rsb_window){bytes, 3 * (ptrdiff_t)image.width, 3, {0, 0, image.height, image.width}};
    } else {
        rsb_rect area = rsb_reach(s->box, image, out_size, s->filter);
        int status = rsb_jpeg_window(bytes, s->size, s->entry_bytes, image, area, scratch, &window);
        if (status) return status;
    }
    return rsb_resample(&window, image, s->box, s->filter, s->flip, s->rows_first, out, out_size,
                        scratch);
}

/* Whether the box lies within the image. Written so that NaN fails. */
static int box_is_inside(const rsb_box *box, int height, int width) {
    return box->top >= 0 && box->left >= 0 && box->height > 0 && box->width > 0 &&
           box->top + box->height <= height + BOX_TOLERANCE &&
           box->left + box->width <= width + BOX_TOLERANCE;
}

/* Checks the parameters. Returns a buffer for the sample's bytes, or NULL with the reason in
 * `status`. */
static uint8_t *buffer_for(const rsb_sample *s, rsb_size out_size, rsb_scratch *scratch,
                           int *status) {
    *status = RSB_OK;
    if (!box_is_inside(&s->box, s->height, s->width) || out_size.height < 1 || out_size.width < 1 ||
        s->filter > RSB_BICUBIC)
        *status = RSB_BAD_CALL;
    else if ((int64_t)s->height * s->width > RSB_MAX_PIXELS ||
             s->size > 3 * (uint64_t)RSB_MAX_PIXELS)
        *status = RSB_TOO_LARGE;
    if (*status) return NULL;
    uint8_t *bytes = rsb_buffer(scratch, RSB_FILE, s->size + s->entry_bytes);
    if (!bytes) *status = RSB_NO_MEMORY;
    return bytes;
}

int rsb_read_sample(const rsb_sample *s, rsb_size out_size, rsb_scratch *scratch,
                    const uint8_t **read) {
    int status;
    uint64_t size = s->size + s->entry_bytes;
    uint8_t *bytes = buffer_for(s, out_size, scratch, &status);
    if (!bytes) return status;
    /* The file is read, not mapped: if it shrinks, or the disk fails, there is a status and no
     * signal. */
    for (uint64_t got = 0; got < size;) {
        ssize_t n = pread(s->file, bytes + got, size - got, (off_t)(s->pointer + got));
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return RSB_BAD_READ;
        got += (uint64_t)n;
    }
    *read = bytes;
    return s->verify && rsb_checksum(bytes, size) != s->checksum ? RSB_BAD_CHECKSUM : RSB_OK;
}

int rsb_load(const rsb_sample *s, uint8_t *out, int out_height, int out_width,
             rsb_scratch *scratch) {
    const uint8_t *bytes;
    rsb_size out_size = {out_height, out_width};
    int status = rsb_read_sample(s, out_size, scratch, &bytes);
    return status ? status : rsb_crop(bytes, s, out, out_size, scratch);
}

int rsb_decode(const uint8_t *bytes, const rsb_sample *s, uint8_t *out, int out_height,
               int out_width, rsb_scratch *scratch) {
    int status;
    rsb_size out_size = {out_height, out_width};
    uint8_t *padded = buffer_for(s, out_size, scratch, &status);
    if (!padded) return status;
    memcpy(padded, bytes, s->size + s->entry_bytes);
    return rsb_crop(padded, s, out, out_size, scratch);
}

int rsb_load_memory(const rsb_sample *s, uint8_t *out, int out_height, int out_width,
                    rsb_scratch *scratch) {
    return rsb_decode((const uint8_t *)(uintptr_t)s->pointer, s, out, out_height, out_width,
                      scratch);
}

int rsb_keep(const rsb_sample *s, uint8_t *out, int out_height, int out_width,
             rsb_scratch *scratch) {
    (void)s, (void)out, (void)out_height, (void)out_width, (void)scratch;
    return RSB_OK;
}
