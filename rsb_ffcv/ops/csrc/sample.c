/* One stored image: read, checked, decoded, cropped and resized into its place. */
#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "rsb.h"

/* `bytes` has RSB_PAD readable bytes after its end. */
static int crop(const uint8_t *bytes, const rsb_sample *s, uint8_t *out, rsb_size out_size,
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

/* Where the sample's bytes have to be put, or NULL with the reason in `status`. */
static uint8_t *room(const rsb_sample *s, rsb_size out_size, rsb_scratch *scratch, int *status) {
    const rsb_box *box = &s->box;
    /* Tolerance: a box computed in floating point may pass the border by a rounding error. Written
     * so that NaN fails. */
    if (!(box->top >= 0 && box->left >= 0 && box->height > 0 && box->width > 0 &&
          box->top + box->height <= s->height + 1e-6 &&
          box->left + box->width <= s->width + 1e-6) ||
        out_size.height < 1 || out_size.width < 1 || s->filter > RSB_BICUBIC)
        *status = RSB_BAD_CALL;
    else if ((int64_t)s->height * s->width > RSB_MAX_PIXELS ||
             s->size > 3 * (uint64_t)RSB_MAX_PIXELS)
        *status = RSB_TOO_LARGE;
    else {
        uint8_t *bytes = rsb_buffer(scratch, RSB_FILE, s->size + s->entry_bytes);
        *status = bytes ? RSB_OK : RSB_NO_MEMORY;
        return bytes;
    }
    return NULL;
}

int rsb_load(int file, const rsb_sample *s, uint8_t *out, int out_height, int out_width,
             rsb_scratch *scratch) {
    int status;
    rsb_size out_size = {out_height, out_width};
    uint64_t size = s->size + s->entry_bytes;
    uint8_t *bytes = room(s, out_size, scratch, &status);
    if (!bytes) return status;
    /* Read, not mapped: a file that shrinks or a disk that fails then gives a status instead of a
     * signal. */
    for (uint64_t got = 0; got < size;) {
        ssize_t n = pread(file, bytes + got, size - got, (off_t)(s->pointer + got));
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return RSB_BAD_READ;
        got += (uint64_t)n;
    }
    if (s->verify && rsb_checksum(bytes, size) != s->checksum) return RSB_BAD_CHECKSUM;
    return crop(bytes, s, out, out_size, scratch);
}

int rsb_decode(const uint8_t *bytes, const rsb_sample *s, uint8_t *out, int out_height,
               int out_width, rsb_scratch *scratch) {
    int status;
    rsb_size out_size = {out_height, out_width};
    uint8_t *padded = room(s, out_size, scratch, &status);
    if (!padded) return status;
    memcpy(padded, bytes, s->size + s->entry_bytes);
    return crop(padded, s, out, out_size, scratch);
}
