/* The lookup tables of Huffman codes. jpeg.h describes their entries. */
#include <string.h>

#include "jpeg.h"

/* A symbol with its value, as it is found in a bit pattern. */
typedef struct {
    int bits;    /* of the code and the value; 0: it does not fit into the pattern */
    int advance; /* SKIP_END: end of block */
    int value;
} step;

static const step NO_STEP = {0, 0, 0};

/* The symbol that follows the first `used` of the `width` bits of `pattern`. */
static step find_symbol(const huffman *t, int pattern, int width, int used, int is_ac) {
    int left = width - used;
    int rest = pattern & ((1 << left) - 1);
    int index = left >= LOOKUP_BITS ? rest >> (left - LOOKUP_BITS) : rest << (LOOKUP_BITS - left);
    int entry = t->symbol[index];
    int length = entry >> 8;
    int size = is_ac ? entry & 15 : entry & 255; /* number of value bits */
    int run = entry >> 4 & 15;                   /* zeros before an AC coefficient */
    if (!length || length + size > left) return NO_STEP;
    step found = {length + size, 0, 0};
    if (size) found.value = extend(rest >> (left - length - size) & ((1 << size) - 1), size);
    if (is_ac && size)
        found.advance = run + 1;
    else if (is_ac)
        found.advance = run == 15 ? 16 : SKIP_END;
    return found;
}

int rsb_jpeg_set_huffman(huffman *t, const uint8_t *counts, const uint8_t *symbols, int total) {
    if (t->ready && !memcmp(t->counts, counts, sizeof t->counts) &&
        !memcmp(t->symbols, symbols, total))
        return RSB_OK;
    t->ready = 0;
    int code = 0;
    for (int length = 1; length <= MAX_CODE_LENGTH; length++) {
        code += counts[length - 1];
        if (code > 1 << length) return RSB_UNUSUAL;
        code <<= 1;
    }
    memcpy(t->counts, counts, sizeof t->counts);
    memset(t->symbols, 0, sizeof t->symbols);
    memcpy(t->symbols, symbols, total);
    t->ready = 1;
    t->has_symbols = 0;
    t->has_pairs = 0;
    t->has_skips = 0;
    return RSB_OK;
}

/* Makes `symbol`, `max_code` and `offset`, unless they are made already. */
static void build_symbols(huffman *t) {
    if (t->has_symbols) return;
    t->has_symbols = 1;
    memset(t->symbol, 0, sizeof t->symbol);
    int code = 0;
    int index = 0;
    for (int length = 1; length <= MAX_CODE_LENGTH; length++) {
        t->offset[length] = index - code;
        for (int i = 0; i < t->counts[length - 1]; i++, code++, index++) {
            if (length > LOOKUP_BITS) continue;
            /* all patterns that begin with the code */
            int first = code << (LOOKUP_BITS - length);
            int patterns = 1 << (LOOKUP_BITS - length);
            for (int j = first; j < first + patterns; j++)
                t->symbol[j] = (uint16_t)(length << 8 | t->symbols[index]);
        }
        t->max_code[length] = code << (MAX_CODE_LENGTH - length);
        code <<= 1;
    }
    t->max_code[MAX_CODE_LENGTH + 1] = 1 << MAX_CODE_LENGTH;
}

static int fits(int value, int bits) {
    return value >= -(1 << (bits - 1)) && value < 1 << (bits - 1);
}

static uint32_t dc_entry(step only) {
    return (uint32_t)only.value << PAIR_DC_VALUE | (uint32_t)only.bits;
}

static uint32_t ac_entry(step first, step second) {
    int first_ends = first.advance == SKIP_END;
    int second_ends = second.advance == SKIP_END;
    /* read_ac stores both values, of an end of block too. The places that these advances lead to
     * lie past the block, except place 63 of an empty block: it gets the 0 that it has already. */
    int one = first_ends ? LAST_PLACE : first.advance;
    int both = (first_ends ? 0 : first.advance) + (second_ends ? 0 : second.advance);
    if (first_ends || second_ends) both += PAIR_END;
    int value_1_mask = (1 << (PAIR_VALUE_2 - PAIR_VALUE_1)) - 1;
    return (uint32_t)second.value << PAIR_VALUE_2 |
           (uint32_t)(first.value & value_1_mask) << PAIR_VALUE_1 |
           (uint32_t)both << PAIR_ADVANCE_2 | (uint32_t)one << PAIR_ADVANCE_1 |
           (uint32_t)(first.bits + second.bits);
}

void rsb_jpeg_build_pairs(huffman *t, int is_ac) {
    if (t->has_pairs) return;
    t->has_pairs = 1;
    build_symbols(t);
    memset(t->pair, 0, sizeof t->pair);
    for (int i = 0; i < 1 << LOOKUP_BITS; i++) {
        step first = find_symbol(t, i, LOOKUP_BITS, 0, is_ac);
        if (!first.bits) continue;
        if (!is_ac) {
            t->pair[i] = dc_entry(first);
            continue;
        }
        if (!fits(first.value, PAIR_VALUE_2 - PAIR_VALUE_1)) continue;
        step second = NO_STEP;
        if (first.advance != SKIP_END) second = find_symbol(t, i, LOOKUP_BITS, first.bits, 1);
        if (!fits(second.value, 32 - PAIR_VALUE_2)) second = NO_STEP;
        t->pair[i] = ac_entry(first, second);
    }
}

void rsb_jpeg_build_skips(huffman *t) {
    if (t->has_skips) return;
    t->has_skips = 1;
    build_symbols(t);
    for (int i = 0; i < 1 << SKIP_BITS; i++) {
        int used = 0;
        int advance = 0;
        while (advance < BLOCK_SIZE) { /* until an end of block, or a run that is too long */
            step next = find_symbol(t, i, SKIP_BITS, used, 1);
            if (!next.bits) break;
            used += next.bits;
            advance += next.advance;
        }
        t->skip[i] = (uint16_t)(used ? advance << 8 | used : 0);
    }
}
