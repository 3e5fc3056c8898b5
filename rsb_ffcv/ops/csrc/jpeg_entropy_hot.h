/* Entropy decoding: the hot loops of jpeg_planes.c, which includes this file once for each
 * instruction set. HOT(name) gives each copy its own name. jpeg.h describes the lookup tables. */

/* Fills the reader to REFILL_BITS bits or more. Reads 8 bytes. */
RSB_INLINE void HOT(refill)(reader *r) {
    uint64_t word;
    memcpy(&word, r->next, 8);
    r->bits |= __builtin_bswap64(word) >> r->count; /* little-endian processors only: see rsb.h */
    r->next += (63 - r->count) >> 3;
    r->count |= REFILL_BITS;
}

/* Drops n & 63 bits: the lowest 6 bits of an entry of `pair` are its length. */
RSB_INLINE void HOT(drop)(reader *r, int n) {
    r->bits <<= n & 63;
    r->count -= n & 63;
}

/* Reads one code and returns its symbol; -1: no such code. The reader must have 16 bits. */
RSB_INLINE int HOT(read_symbol)(reader *r, const huffman *t) {
    int entry = t->symbol[r->bits >> (64 - LOOKUP_BITS)];
    if (entry) {
        HOT(drop)(r, entry >> 8);
        return entry & 255;
    }
    int32_t window = (int32_t)(r->bits >> (64 - MAX_CODE_LENGTH)), length = LOOKUP_BITS + 1;
    while (length <= MAX_CODE_LENGTH && window >= t->max_code[length]) length++;
    if (length > MAX_CODE_LENGTH) return -1;
    HOT(drop)(r, length);
    return t->symbols[((window >> (MAX_CODE_LENGTH - length)) + t->offset[length]) & 255];
}

/* Reads `size` value bits, 1 .. 15. */
RSB_INLINE int HOT(read_bits)(reader *r, int size) {
    int value = (int)(r->bits >> (64 - size));
    HOT(drop)(r, size);
    return extend(value, size);
}

/* Adds the difference of a block's DC coefficient to the prediction. Returns -1 for damaged data.
 */
RSB_INLINE int HOT(read_dc)(reader *r, const huffman *t, int *prediction) {
    HOT(refill)(r);
    uint32_t entry = t->pair[r->bits >> (64 - LOOKUP_BITS)];
    if (RSB_LIKELY(entry)) {
        *prediction += pair_dc_value(entry);
        HOT(drop)(r, (int)entry);
        return 0;
    }
    int size = HOT(read_symbol)(r, t);
    if (size < 0) return -1;
    if (size) *prediction += HOT(read_bits)(r, size);
    return 0;
}

/* Reads one AC symbol that the tables of several symbols do not have. Its value goes into `block`,
 * unless that is NULL. Returns 1: the block continues, 0: end of block, -1: damaged. */
RSB_INLINE int HOT(read_one)(reader *r, const huffman *t, const uint8_t *order, int16_t *block,
                             int *k) {
    HOT(refill)(r);
    int symbol = HOT(read_symbol)(r, t), size = symbol & 15;
    if (symbol < 0) return -1;
    if (!size && symbol != ZERO_RUN) return symbol ? -1 : 0;
    *k += (symbol >> 4) + 1;
    if (*k > LAST_PLACE) return -1;
    if (size) {
        int value = HOT(read_bits)(r, size);
        if (block) block[order[*k]] = (int16_t)value;
    }
    return *k < LAST_PLACE;
}

/* Reads the AC coefficients of a block into `block`, which is zeroed, in natural order. Returns the
 * zigzag place of the last one, 0 where there is none, or -1 for damaged data. */
static __attribute__((noinline)) int HOT(read_ac)(reader *from, const huffman *t,
                                                  const uint8_t *order, int16_t *block) {
    reader r = *from;
    int k = 0, more = 1;
    while (more > 0) {
        HOT(refill)(&r);
        for (int turn = 0; turn < REFILL_BITS / LOOKUP_BITS; turn++) {
            uint32_t entry = t->pair[r.bits >> (64 - LOOKUP_BITS)];
            if (RSB_UNLIKELY(!entry)) break;
            int after = k + pair_advance_2(entry), first = k + pair_advance_1(entry);
            int ends = pair_ends(entry);
            /* Too far: the second symbol does not belong to this block, or the data is damaged. */
            if (RSB_UNLIKELY(after >= LAST_PLACE) &&
                (ends ? after >= PAIR_END + LAST_PLACE : after != LAST_PLACE))
                break;
            /* This order: an entry of one symbol stores value 2, a 0, at the place of value 1. */
            block[order[after]] = (int16_t)pair_value_2(entry);
            block[order[first]] = (int16_t)pair_value_1(entry);
            HOT(drop)(&r, (int)entry);
            if (RSB_UNLIKELY(after >= LAST_PLACE)) { /* the block is complete */
                *from = r;
                return !ends ? after : pair_advance_1(entry) == LAST_PLACE ? k : first;
            }
            k = after;
        }
        more = HOT(read_one)(&r, t, order, block, &k);
    }
    *from = r;
    return more < 0 ? more : k;
}

/* Skips the AC coefficients of a block. Returns -1 for damaged data. */
RSB_INLINE int HOT(skip_ac)(reader *r, const huffman *t) {
    int k = 0, more = 1;
    while (more > 0) {
        HOT(refill)(r);
        for (int turn = 0; turn < REFILL_BITS / SKIP_BITS; turn++) {
            int entry = t->skip[r->bits >> (64 - SKIP_BITS)], after = k + (entry >> 8);
            if (RSB_UNLIKELY(!entry)) break;
            /* as in read_ac */
            if (RSB_UNLIKELY(after >= LAST_PLACE) &&
                (after >= SKIP_END ? after >= SKIP_END + LAST_PLACE : after != LAST_PLACE))
                break;
            HOT(drop)(r, entry & 255);
            if (RSB_UNLIKELY(after >= LAST_PLACE)) return 0;
            k = after;
        }
        more = HOT(read_one)(r, t, NULL, NULL, &k);
    }
    return more;
}

/* Skips the blocks of an MCU outside of the window. Returns -1 for damaged data. */
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
