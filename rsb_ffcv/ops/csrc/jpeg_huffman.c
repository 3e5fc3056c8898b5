/* The look-up tables of Huffman codes. */
#include <string.h>

#include "jpeg.h"

typedef struct {
    int bits, advance, value;
} step;

/* The symbol with its value that follows the first `used` of the `width` bits of `window`; no bits:
 * it does not fit. */
static step look(const huffman *t, int window, int width, int used, int is_ac) {
    int left = width - used, rest = window & ((1 << left) - 1);
    int entry = t->symbol[left >= LOOK ? rest >> (left - LOOK) : rest << (LOOK - left)],
        length = entry >> 8;
    int size = is_ac ? entry & 15 : entry & 255, run = entry >> 4 & 15;
    if (!length || length + size > left) return (step){0, 0, 0};
    int value = size ? extend(rest >> (left - length - size) & ((1 << size) - 1), size) : 0;
    return (step){length + size, !is_ac ? 0 : size ? run + 1 : run == 15 ? 16 : END, value};
}

int rsb_jpeg_build_huffman(huffman *t, const uint8_t *counts, const uint8_t *symbols, int total) {
    if (t->ready && !memcmp(t->counts, counts, 16) && !memcmp(t->symbols, symbols, total))
        return RSB_OK;
    memset(t, 0, sizeof *t);
    memcpy(t->counts, counts, 16);
    memcpy(t->symbols, symbols, total);
    int code = 0, index = 0;
    for (int length = 1; length <= 16; length++) {
        t->offset[length] = index - code;
        for (int i = 0; i < counts[length - 1]; i++, code++, index++) {
            if (code >= 1 << length) return RSB_UNUSUAL;
            if (length <= LOOK)
                for (int j = code << (LOOK - length), n = 1 << (LOOK - length); n; j++, n--)
                    t->symbol[j] = (uint16_t)(length << 8 | symbols[index]);
        }
        t->max_code[length] = code << (16 - length);
        code <<= 1;
    }
    t->max_code[17] = 1 << 16;
    t->ready = 1;
    return RSB_OK;
}

void rsb_jpeg_build_pairs(huffman *t, int is_ac) {
    if (t->has_pairs) return;
    t->has_pairs = 1;
    for (int i = 0; i < 1 << LOOK; i++) {
        step first = look(t, i, LOOK, 0, is_ac), second = {0, 0, 0};
        if (!first.bits) continue;
        if (!is_ac) {
            t->pair[i] = (uint32_t)first.value << 16 | (uint32_t)first.bits;
            continue;
        }
        if (first.value < -64 || first.value > 63) continue;
        if (first.advance < END) second = look(t, i, LOOK, first.bits, 1);
        if (second.value < -32 || second.value > 31) second = (step){0, 0, 0};
        /* An end of block leaves the place after its own, and 63 more, which is none of a block's
         * or not looked at. */
        int ends = first.advance == END || second.advance == END;
        int one = first.advance == END ? 63 : first.advance,
            both = first.advance % END + second.advance % END + ends * LAST;
        t->pair[i] = (uint32_t)second.value << 26 | ((uint32_t)first.value & 127) << 19 |
                     (uint32_t)both << 12 | (uint32_t)one << 6 |
                     (uint32_t)(first.bits + second.bits);
    }
}

void rsb_jpeg_build_skips(huffman *t) {
    if (t->has_skips) return;
    t->has_skips = 1;
    for (int i = 0; i < 1 << SKIP; i++) {
        int used = 0, advance = 0;
        while (advance < 64) {
            step next = look(t, i, SKIP, used, 1);
            if (!next.bits) break;
            used += next.bits, advance += next.advance;
        }
        t->skip[i] = (uint16_t)(used ? advance << 8 | used : 0);
    }
}
