/* One stored image: read, checked, decoded, cropped and resized into its place; and the buffers
 * that it takes. */
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "rsb.h"

uint8_t *rsb_buffer(rsb_scratch *scratch, int which, size_t bytes) {
    if (scratch->size[which] < bytes || !scratch->buffer[which]) {
        free(scratch->buffer[which]);
        size_t room = (bytes + bytes / 4 + RSB_PAD + 63) / 64 * 64;
        scratch->buffer[which] = aligned_alloc(64, room);
        scratch->size[which] = scratch->buffer[which] ? room - RSB_PAD : 0;
    }
    return scratch->buffer[which];
}

void rsb_scratch_free(rsb_scratch *scratch) {
    for (int i = 0; i < RSB_BUFFERS; i++) free(scratch->buffer[i]);
    free(scratch->jpeg);
    free(scratch);
}

rsb_scratch *rsb_scratch_new(void) { return calloc(1, sizeof(rsb_scratch)); }

/* ---- checksum: XXH64 with seed 0 (Yann Collet's specification of xxHash) ---- */

#define P1 0x9E3779B185EBCA87u
#define P2 0xC2B2AE3D27D4EB4Fu
#define P3 0x165667B19E3779F9u
#define P4 0x85EBCA77C2B2AE63u
#define P5 0x27D4EB2F165667C5u

RSB_INLINE uint64_t rotate(uint64_t x, int r) { return x << r | x >> (64 - r); }
RSB_INLINE uint64_t word64(const uint8_t *p) {
    uint64_t word;
    memcpy(&word, p, 8);
    return word;
}
RSB_INLINE uint64_t mix(uint64_t lane, uint64_t word) { return rotate(lane + word * P2, 31) * P1; }
RSB_INLINE uint64_t merge(uint64_t hash, uint64_t lane) { return (hash ^ mix(0, lane)) * P1 + P4; }

uint64_t rsb_checksum(const uint8_t *bytes, size_t size) {
    const uint8_t *p = bytes, *end = bytes + size;
    uint64_t hash = P5;
    if (size >= 32) {
        uint64_t a = P1 + P2, b = P2, c = 0, d = 0 - P1;
        for (; end - p >= 32; p += 32)
            a = mix(a, word64(p)), b = mix(b, word64(p + 8)), c = mix(c, word64(p + 16)),
            d = mix(d, word64(p + 24));
        hash = rotate(a, 1) + rotate(b, 7) + rotate(c, 12) + rotate(d, 18);
        hash = merge(merge(merge(merge(hash, a), b), c), d);
    }
    hash += size;
    for (; end - p >= 8; p += 8) hash = rotate(hash ^ mix(0, word64(p)), 27) * P1 + P4;
    if (end - p >= 4) {
        uint32_t half;
        memcpy(&half, p, 4);
        hash = rotate(hash ^ half * P1, 23) * P2 + P3;
        p += 4;
    }
    for (; p < end; p++) hash = rotate(hash ^ *p * P5, 11) * P1;
    hash = (hash ^ hash >> 33) * P2;
    hash = (hash ^ hash >> 29) * P3;
    return hash ^ hash >> 32;
}

/* ---- the image ---- */

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
