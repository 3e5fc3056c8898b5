/* The buffers of one thread. They grow as images need it, and are kept. */
#include <stdlib.h>

#include "rsb.h"

uint8_t *rsb_buffer(rsb_scratch *scratch, int which, size_t bytes) {
    if (scratch->size[which] < bytes || !scratch->buffer[which]) {
        free(scratch->buffer[which]);
        /* a quarter more, so that slightly larger images do not allocate again */
        size_t capacity = (bytes + bytes / 4 + RSB_PAD + 63) / 64 * 64;
        scratch->buffer[which] = aligned_alloc(64, capacity);
        scratch->size[which] = scratch->buffer[which] ? capacity - RSB_PAD : 0;
    }
    return scratch->buffer[which];
}

void rsb_scratch_free(rsb_scratch *scratch) {
    for (int i = 0; i < RSB_BUFFERS; i++) free(scratch->buffer[i]);
    free(scratch->jpeg);
    free(scratch);
}

rsb_scratch *rsb_scratch_new(void) { return calloc(1, sizeof(rsb_scratch)); }
