/* What sample.c and pack.c share. */
#ifndef RSB_SAMPLE_H
#define RSB_SAMPLE_H

#include "rsb.h"

#pragma GCC visibility push(hidden)

/* Reads and verifies a sample. `*bytes` are its bytes and entry points, with RSB_PAD readable bytes
 * after the end, in the scratch's RSB_FILE. Returns any status. */
int rsb_read_sample(const rsb_sample *s, rsb_size out_size, rsb_scratch *scratch,
                    const uint8_t **bytes);

/* Decodes, crops and resizes such bytes. Returns any status. */
int rsb_crop(const uint8_t *bytes, const rsb_sample *s, uint8_t *out, rsb_size out_size,
             rsb_scratch *scratch);

#pragma GCC visibility pop

#endif
