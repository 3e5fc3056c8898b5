/* Device kernel: entropy-coded bytes to coefficients, one segment per thread.
 *
 * The CPU core reads on from segment to segment of a row. Threads begin at each entry point
 * instead. Both give the same coefficients where each segment ends at the bit, and with the DC
 * predictions, of the next entry point. Otherwise, and for every code that the core might treat in
 * another way than this kernel, the row's status becomes 1 and the core makes the row.
 */
#ifndef RSB_ENTROPY_H
#define RSB_ENTROPY_H

#include "packed.h"

enum {
    ENTROPY_THREADS = 128,
    ENTROPY_LOOKUP = 10, /* bits that index `symbol` */
};

typedef struct {
    /* code length << 8 | symbol, by the next ENTROPY_LOOKUP bits; 0: a longer code */
    uint16_t symbol[MAX_TABLES][1 << ENTROPY_LOOKUP];
    /* 1 more than the largest code of each length, left-aligned to MAX_CODE_LENGTH bits */
    int32_t max_code[MAX_TABLES][MAX_CODE_LENGTH + 2];
    int32_t offset[MAX_TABLES][MAX_CODE_LENGTH + 2]; /* index of a code's symbol minus the code */
    rsb_huffman_lists lists[MAX_TABLES];
    int32_t prediction[MAX_COMPONENTS][ENTROPY_THREADS]; /* of the DC value of the next block */
    uint8_t natural[BLOCK_SIZE];
} entropy_block;

RSB_SHARED uint32_t entropy_blocks(const rsb_packed *p, int height, int width) {
    (void)height, (void)width;
    return p->kind == RSB_JPEG ? blocks_for((uint64_t)p->segments, ENTROPY_THREADS) : 0;
}

/* Phase 1: copies the lists. */
RSB_SHARED void entropy_copy(const rsb_launch *a, entropy_block *s, int part, int row, int thread) {
    (void)part;
    const rsb_packed *p = packed_row(a, row);
    const uint8_t *lists = a->slab + p->tables;
    for (int i = thread; i < (int)sizeof s->lists; i += ENTROPY_THREADS)
        ((uint8_t *)s->lists)[i] = lists[i];
    if (thread < BLOCK_SIZE) s->natural[thread] = RSB_NATURAL[thread];
}

/* Phase 2: `max_code` and `offset`, one table per thread. */
RSB_SHARED void entropy_codes(const rsb_launch *a, entropy_block *s, int part, int row,
                              int thread) {
    (void)a, (void)part, (void)row;
    if (thread >= MAX_TABLES) return;
    int code = 0;
    int index = 0;
    for (int length = 1; length <= MAX_CODE_LENGTH; length++) {
        int count = s->lists[thread].counts[length - 1];
        s->offset[thread][length] = index - code;
        code += count;
        index += count;
        s->max_code[thread][length] = code << (MAX_CODE_LENGTH - length);
        code <<= 1;
    }
}

/* The length of the code at the start of MAX_CODE_LENGTH bits, `shortest` or more; more than
 * MAX_CODE_LENGTH: there is none. `max_code` ascends, so counting finds it; a search would wait for
 * each comparison. */
RSB_SHARED int code_length(const entropy_block *s, int table, int bits, int shortest) {
    int length = shortest;
    for (int i = shortest; i <= MAX_CODE_LENGTH; i++) length += bits >= s->max_code[table][i];
    return length;
}

RSB_SHARED int code_symbol(const entropy_block *s, int table, int bits, int length) {
    int code = bits >> (MAX_CODE_LENGTH - length);
    return s->lists[table].symbols[(code + s->offset[table][length]) & 255];
}

/* Phase 3: the lookup tables. */
RSB_SHARED void entropy_tables(const rsb_launch *a, entropy_block *s, int part, int row,
                               int thread) {
    (void)a, (void)part, (void)row;
    for (int i = thread; i < MAX_TABLES << ENTROPY_LOOKUP; i += ENTROPY_THREADS) {
        int table = i >> ENTROPY_LOOKUP;
        int pattern = i & ((1 << ENTROPY_LOOKUP) - 1);
        int bits = pattern << (MAX_CODE_LENGTH - ENTROPY_LOOKUP);
        int length = code_length(s, table, bits, 1);
        int entry = 0;
        if (length <= ENTROPY_LOOKUP) entry = length << 8 | code_symbol(s, table, bits, length);
        s->symbol[table][pattern] = (uint16_t)entry;
    }
}

/* Reads bits, first bit of a byte first. */
typedef struct {
    const rsb_word *next; /* the word after `ahead` */
    uint32_t ahead;       /* the word after those in `bits`: loaded early, as a load takes longer
                             than the symbols of a word */
    uint64_t bits;        /* left-aligned */
    int count;            /* of valid bits */
} bit_reader;

/* Fills the reader to more than 32 bits: a code and its value have at most 31. */
RSB_SHARED void fill(bit_reader *r) {
    if (r->count > 32) return;
    r->bits |= (uint64_t)rsb_swap(r->ahead) << (32 - r->count);
    r->ahead = *r->next++;
    r->count += 32;
}

RSB_SHARED void drop_bits(bit_reader *r, int n) {
    r->bits <<= n;
    r->count -= n;
}

/* The next symbol; -1: no such code. */
RSB_SHARED int next_symbol(bit_reader *r, const entropy_block *s, int table) {
    fill(r);
    int entry = s->symbol[table][(uint32_t)(r->bits >> 32) >> (32 - ENTROPY_LOOKUP)];
    if (entry) {
        drop_bits(r, entry >> 8);
        return entry & 255;
    }
    int bits = (int)(r->bits >> (64 - MAX_CODE_LENGTH));
    int length = code_length(s, table, bits, ENTROPY_LOOKUP + 1);
    if (length > MAX_CODE_LENGTH) return -1;
    drop_bits(r, length);
    return code_symbol(s, table, bits, length);
}

/* Reads `size` value bits, 0 .. 15, and applies EXTEND of the standard. No bits: 0. */
RSB_SHARED int next_value(bit_reader *r, int size) {
    int value = (int)(r->bits >> 1 >> (63 - size));
    drop_bits(r, size);
    return value < 1 << size >> 1 ? value - (1 << size) + 1 : value;
}

/* Reads a block with the tables `dc` and `ac`. Its coefficients are written to `to`, in natural
 * order, unless that is 0. Returns 0, or -1 for data that the core must judge. */
RSB_SHARED int decode_block(bit_reader *r, const entropy_block *s, int dc, int ac,
                            int32_t *prediction, int16_t *to) {
    int size = next_symbol(r, s, dc);
    if (size < 0) return -1;
    int value = *prediction + next_value(r, size);
    *prediction = value;
    if (to) {
        for (int i = 0; i < BLOCK_SIZE / 4; i++) ((rsb_long *)to)[i] = 0;
        to[0] = (int16_t)value;
    }
    for (int place = 0; place < LAST_PLACE;) {
        int symbol = next_symbol(r, s, ac);
        if (symbol < 0) return -1;
        size = symbol & 15;
        if (!size && symbol != ZERO_RUN) return symbol ? -1 : 0;
        place += (symbol >> 4) + 1;
        if (place > LAST_PLACE) return -1;
        value = next_value(r, size); /* of ZERO_RUN: 0 */
        if (to) to[s->natural[place]] = (int16_t)value;
    }
    return 0;
}

/* Phase 4: decodes the thread's segment. */
RSB_SHARED void entropy_decode(const rsb_launch *a, entropy_block *s, int part, int row,
                               int thread) {
    const rsb_packed *p = packed_row(a, row);
    int which = part * ENTROPY_THREADS + thread;
    if (which >= p->segments) return;
    uint32_t place = ((const uint32_t *)(a->slab + p->order))[which];
    int mcu_row = (int)(place >> 16);
    int segment = (int)(place & 0xFFFF);
    const rsb_entry *entry = (const rsb_entry *)(a->slab + p->entries);
    entry += (int64_t)mcu_row * (p->segments_per_row + 1) + segment;
    uint32_t base = ((const uint32_t *)(a->slab + p->bases))[mcu_row];
    uint32_t start = base + entry->bit / 8;

    bit_reader r;
    r.next = (const rsb_word *)a->slab + start / 4;
    r.ahead = *r.next++;
    r.bits = 0;
    r.count = 0;
    fill(&r);
    drop_bits(&r, (int)(8 * (start % 4) + entry->bit % 8));
    for (int i = 0; i < MAX_COMPONENTS; i++) s->prediction[i][thread] = entry[0].dc[i];

    int16_t *coefficients = (int16_t *)scratch_of(a, p);
    int column = p->first_column + segment * ENTRY_INTERVAL;
    int end = p->mcu_column + p->mcu_columns;
    int last = column + ENTRY_INTERVAL;
    int complete = segment + 1 < p->segments_per_row; /* another segment follows */
    if (!complete) last = end;
    int failed = 0;
    for (; column < last && !failed; column++) {
        int inside = column >= p->mcu_column;
        for (int i = 0; i < p->parts && !failed; i++) {
            const rsb_packed_part *c = &p->part[i];
            int dc = c->dc, ac = c->ac;
            for (int y = 0; y < c->v && !failed; y++) {
                int64_t block = c->first_block + (int64_t)(mcu_row * c->v + y) * c->block_columns +
                                (column - p->mcu_column) * c->h;
                int16_t *to = inside ? coefficients + BLOCK_SIZE * block : 0;
                for (int x = 0; x < c->h && !failed; x++) {
                    failed = decode_block(&r, s, dc, ac, &s->prediction[i][thread], to);
                    if (to) to += BLOCK_SIZE;
                }
            }
        }
        /* The position, in bits of the scan. */
        uint32_t read = (uint32_t)((const uint8_t *)(r.next - 1) - a->slab);
        uint32_t bit = 8 * (read - base) - (uint32_t)r.count;
        if (bit > entry[1].bit) failed = 1;
        if (column + 1 == last && complete && !failed)
            failed = bit != entry[1].bit || s->prediction[0][thread] != entry[1].dc[0] ||
                     s->prediction[1][thread] != entry[1].dc[1] ||
                     s->prediction[2][thread] != entry[1].dc[2];
    }
    if (failed) a->status[row] = 1;
}

#endif
