/* One stored image: read, checked, decoded, cropped and resized into its place. */
#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "rsb.h"

/* `bytes` has RSB_PAD readable bytes after its end. */
static int crop(const uint8_t *bytes, const rsb_sample *s, uint8_t *out, int out_height,
                int out_width, rsb_scratch *scratch) {
    int height = s->height, width = s->width, top, left, rows, columns, status;
    rsb_window window;
    if (s->raw) {
        if (s->size != (uint64_t)height * width * 3) return RSB_BAD_SIZE;
        window = (rsb_window){bytes, 3 * (ptrdiff_t)width, 3, 0, 0, width, height};
    } else {
        rsb_reach(s->box[0], s->box[2], height, out_height, s->filter, &top, &rows);
        rsb_reach(s->box[1], s->box[3], width, out_width, s->filter, &left, &columns);
        status = rsb_jpeg_window(bytes, s->size, s->entry_bytes, height, width, top, left, rows,
                                 columns, scratch, &window);
        if (status) return status;
    }
    return rsb_resample(&window, height, width, s->box, s->filter, s->flip, s->rows_first, out,
                        out_height, out_width, scratch);
}

/* Where the sample's bytes have to be put, or NULL with the reason in `status`. */
static uint8_t *room(const rsb_sample *s, int out_height, int out_width, rsb_scratch *scratch,
                     int *status) {
    /* Tolerance: a box computed in floating point may pass the border by a rounding error. Written
     * so that NaN fails. */
    if (!(s->box[0] >= 0 && s->box[1] >= 0 && s->box[2] > 0 && s->box[3] > 0 &&
          s->box[0] + s->box[2] <= s->height + 1e-6 && s->box[1] + s->box[3] <= s->width + 1e-6) ||
        out_height < 1 || out_width < 1 || s->filter > RSB_BICUBIC)
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
    uint64_t size = s->size + s->entry_bytes;
    uint8_t *bytes = room(s, out_height, out_width, scratch, &status);
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
    return crop(bytes, s, out, out_height, out_width, scratch);
}

int rsb_decode(const uint8_t *bytes, const rsb_sample *s, uint8_t *out, int out_height,
               int out_width, rsb_scratch *scratch) {
    int status;
    uint8_t *padded = room(s, out_height, out_width, scratch, &status);
    return padded ? memcpy(padded, bytes, s->size + s->entry_bytes),
           crop(padded, s, out, out_height, out_width, scratch) : status;
}
