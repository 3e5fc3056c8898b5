/* Entropy decoding: the hot loops of jpeg_planes.c, which includes this file once for every
 * instruction set that it is compiled for. HOT(name) gives each copy its own name. */

RSB_INLINE void HOT(refill)(reader *r) { /* at least 56 bits */
    uint64_t word;
    memcpy(&word, r->next, 8);
    r->bits |= __builtin_bswap64(word) >> r->count; /* little-endian machines only: see rsb.h */
    r->next += (63 - r->count) >> 3;
    r->count |= 56;
}

RSB_INLINE void HOT(drop)(reader *r, int n) {
    r->bits <<= n & 63;
    r->count -= n & 63;
}

/* One symbol, code and all; needs 16 bits. -1: no such code. */
RSB_INLINE int HOT(read_symbol)(reader *r, const huffman *t) {
    int entry = t->symbol[r->bits >> (64 - LOOK)];
    if (entry) {
        HOT(drop)(r, entry >> 8);
        return entry & 255;
    }
    int32_t window = (int32_t)(r->bits >> 48), length = LOOK + 1;
    while (length <= 16 && window >= t->max_code[length]) length++;
    if (length > 16) return -1;
    HOT(drop)(r, length);
    return t->symbols[((window >> (16 - length)) + t->offset[length]) & 255];
}

RSB_INLINE int HOT(read_bits)(reader *r, int size) { /* size 1 .. 15 */
    int value = (int)(r->bits >> (64 - size));
    HOT(drop)(r, size);
    return extend(value, size);
}

RSB_INLINE int HOT(read_dc)(reader *r, const huffman *t, int *prediction) {
    HOT(refill)(r);
    uint32_t entry = t->pair[r->bits >> (64 - LOOK)];
    if (RSB_LIKELY(entry)) {
        *prediction += (int32_t)entry >> 16;
        HOT(drop)(r, (int)entry);
        return 0;
    }
    int size = HOT(read_symbol)(r, t);
    if (size < 0) return -1;
    if (size) *prediction += HOT(read_bits)(r, size);
    return 0;
}

/* One step of read_ac without the tables of several symbols. Returns -1: damaged, 0: end of block,
 * 1: go on. */
RSB_INLINE int HOT(read_one)(reader *r, const huffman *t, const uint8_t *order, int16_t *block,
                             int *k) {
    HOT(refill)(r);
    int symbol = HOT(read_symbol)(r, t), size = symbol & 15;
    if (symbol < 0) return -1;
    if (!size && symbol != 0xF0) return symbol ? -1 : 0;
    *k += (symbol >> 4) + 1;
    if (*k > 63) return -1;
    if (size) {
        int value = HOT(read_bits)(r, size);
        if (block) block[order[*k]] = (int16_t)value;
    }
    return *k < 63;
}

/* The AC coefficients of a block, into `block` (zeroed). Returns the place of the last in zigzag
 * order, 0 where there is none, or -1: damaged. */
static __attribute__((noinline)) int HOT(read_ac)(reader *from, const huffman *t,
                                                  const uint8_t *order, int16_t *block) {
    reader r = *from;
    int k = 0, more = 1;
    while (more > 0) {
        HOT(refill)(&r);
        for (int turn = 0; turn < 5; turn++) { /* 5 x LOOK bits of the 56 */
            uint32_t entry = t->pair[r.bits >> (64 - LOOK)];
            if (RSB_UNLIKELY(!entry)) break;
            int after = k + (int)(entry >> 12 & 127), first = k + (int)(entry >> 6 & 63),
                last = (int)(entry >> 12 & LAST);
            /* Past the end: fine where the block ends with it; else the second symbol was none of
             * this block. */
            if (RSB_UNLIKELY(after > 62) && (last ? after >= LAST + 63 : after != 63)) break;
            /* of one symbol both have the same place: the next wins */
            block[order[after]] = (int16_t)((int32_t)entry >> 26);
            block[order[first]] = (int16_t)((int32_t)(entry << 6) >> 25);
            HOT(drop)(&r, (int)entry);
            if (RSB_UNLIKELY(after > 62)) {
                *from = r;
                return !last ? after : (entry >> 6 & 63) == 63 ? k : first;
            }
            k = after;
        }
        more = HOT(read_one)(&r, t, order, block, &k);
    }
    *from = r;
    return more < 0 ? more : k;
}

/* Runs over the AC coefficients of a block. Returns -1: damaged. */
RSB_INLINE int HOT(skip_ac)(reader *r, const huffman *t) {
    int k = 0, more = 1;
    while (more > 0) {
        HOT(refill)(r);
        for (int turn = 0; turn < 4; turn++) { /* 4 x SKIP bits of the 56 */
            int entry = t->skip[r->bits >> (64 - SKIP)], after = k + (entry >> 8);
            if (RSB_UNLIKELY(!entry)) break;
            if (RSB_UNLIKELY(after > 62) && (after >= END ? after >= END + 63 : after != 63)) break;
            HOT(drop)(r, entry & 255);
            if (RSB_UNLIKELY(after > 62)) return 0;
            k = after;
        }
        more = HOT(read_one)(r, t, NULL, NULL, &k);
    }
    return more;
}

/* Runs over all blocks of an MCU that lies outside of the window. Returns -1: damaged. */
static __attribute__((noinline)) int HOT(skip_mcu)(reader *from, const unit *units, int count,
                                                   int *predictions) {
    reader r = *from;
    for (int u = 0; u < count; u++)
        if (HOT(read_dc)(&r, units[u].dc, &predictions[units[u].component]) ||
            HOT(skip_ac)(&r, units[u].ac) < 0)
            return -1;
    *from = r;
    return 0;
}
