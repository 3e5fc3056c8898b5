/* Packs stored images for the device kernels: reads, verifies and parses them, and copies the
 * tables and bytes of each crop into a slab. shared/packed.h describes it.
 *
 * The entry points must be there, and in ascending order. All other images, and those for which
 * the slab or the device has no memory, are decoded here.
 */
#include <string.h>

#include "jpeg.h"
#include "sample.h"
#include "shared/packed.h"
#include "taps.h"

enum { ALIGNMENT = 64, LENGTH_CLASSES = 256, BITS_PER_CLASS = 64 };

static uint64_t aligned(uint64_t bytes) { return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

static uint64_t larger(uint64_t a, uint64_t b) { return a > b ? a : b; }

/* What a row may always take: the bytes of its finished pixels. */
static uint64_t reserved(rsb_size out) { return aligned((uint64_t)3 * out.height * out.width); }

/* The offset of `bytes` bytes of the slab, for a row that has taken none yet; 0: there is no room,
 * unless the row takes at most what is reserved for it. */
static uint64_t take(rsb_slab *slab, rsb_size out, uint64_t bytes) {
    uint64_t own = reserved(out);
    bytes = aligned(bytes);
    if (bytes > own) {
        uint64_t more = bytes - own;
        uint64_t before = __atomic_load_n(&slab->committed, __ATOMIC_RELAXED);
        do {
            if (more > slab->capacity || before > slab->capacity - more) return 0;
        } while (!__atomic_compare_exchange_n(&slab->committed, &before, before + more, 1,
                                              __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    }
    return __atomic_fetch_add(&slab->used, bytes, __ATOMIC_RELAXED);
}

/* Sets the image's scratch memory, after the fields that it depends on. first: bytes of the
 * coefficients, second: of the planes. */
static void lay_out(rsb_packed *p, rsb_size out, uint64_t first, uint64_t second) {
    uint64_t rows = p->rows_first ? (uint64_t)out.height : (uint64_t)p->window.height;
    uint64_t columns = p->rows_first ? (uint64_t)p->window.width : (uint64_t)out.width;
    if (p->kind == RSB_JPEG)
        first = larger(first, (uint64_t)4 * p->window.height * p->window.width);
    first = larger(first, (uint64_t)4 * out.height * out.width);
    second = larger(second, larger(4 * rows * columns, (uint64_t)8 * out.height));
    axis across = {p->box.left, p->box.width, p->width, out.width, p->filter};
    axis down = {p->box.top, p->box.height, p->height, out.height, p->filter};
    p->second = aligned(first);
    p->taps = p->second + aligned(second);
    p->taps_down = p->taps + aligned(rsb_packed_taps_bytes(&across));
    p->scratch_bytes = p->taps_down + aligned(rsb_packed_taps_bytes(&down));
}

static int pack_raw(const uint8_t *bytes, const rsb_sample *s, rsb_slab *slab, rsb_packed *p,
                    rsb_size out) {
    if (s->size != (uint64_t)s->height * s->width * 3) return RSB_UNUSUAL;
    size_t row_bytes = (size_t)3 * p->window.width;
    p->kind = RSB_RAW;
    lay_out(p, out, 0, 0);
    if (p->scratch_bytes > slab->scratch) return RSB_UNUSUAL;
    uint64_t at = take(slab, out, row_bytes * p->window.height);
    if (!at) return RSB_UNUSUAL;
    p->pixels = (uint32_t)at;
    for (int y = 0; y < p->window.height; y++)
        memcpy(slab->memory + at + row_bytes * y,
               bytes + 3 * ((size_t)s->width * (p->window.top + y) + p->window.left), row_bytes);
    return RSB_OK;
}

/* Sets the area of MCUs, and the components' blocks and planes. Returns the bytes of all planes. */
static uint64_t set_area(rsb_packed *p, const rsb_jpeg *j, mcu_area m) {
    uint64_t planes = 0;
    p->parts = (uint8_t)j->count;
    p->mcu_column = m.column_start;
    p->mcu_columns = m.column_end - m.column_start;
    p->mcu_rows = m.row_end - m.row_start;
    p->first_column = m.column_start / ENTRY_INTERVAL * ENTRY_INTERVAL;
    p->segments_per_row = (m.column_end - p->first_column + ENTRY_INTERVAL - 1) / ENTRY_INTERVAL;
    p->segments = p->segments_per_row * p->mcu_rows;
    p->h_max = j->h_max;
    p->v_max = j->v_max;
    p->blocks = 0;
    for (int i = 0; i < j->count; i++) {
        const component *c = &j->part[i];
        rsb_packed_part *to = &p->part[i];
        to->first_block = p->blocks;
        to->block_columns = p->mcu_columns * c->h;
        to->plane = (uint32_t)planes;
        to->left = m.column_start * c->h * BLOCK_SIDE;
        to->top = m.row_start * c->v * BLOCK_SIDE;
        to->width = c->width;
        to->height = c->height;
        to->h = c->h;
        to->v = c->v;
        to->dc = c->dc;
        to->ac = MAX_TABLES / 2 + c->ac;
        memcpy(to->quant, j->quant[c->quant], sizeof to->quant);
        uint32_t blocks = (uint32_t)to->block_columns * (uint32_t)(p->mcu_rows * c->v);
        p->blocks += blocks;
        planes += (uint64_t)blocks * BLOCK_SIZE;
    }
    return planes;
}

static void copy_tables(const rsb_jpeg *j, rsb_huffman_lists *to) {
    memset(to, 0, MAX_TABLES * sizeof *to);
    for (int i = 0; i < j->count; i++) {
        int dc = j->part[i].dc, ac = j->part[i].ac;
        memcpy(to[dc].counts, j->dc[dc].counts, sizeof to->counts);
        memcpy(to[dc].symbols, j->dc[dc].symbols, sizeof to->symbols);
        memcpy(to[MAX_TABLES / 2 + ac].counts, j->ac[ac].counts, sizeof to->counts);
        memcpy(to[MAX_TABLES / 2 + ac].symbols, j->ac[ac].symbols, sizeof to->symbols);
    }
}

static rsb_entry entry_at(const scan *s, size_t which) {
    int prediction[MAX_COMPONENTS];
    rsb_entry e = {0};
    e.bit = rsb_jpeg_entry(s->entries, which, prediction);
    for (int i = 0; i < MAX_COMPONENTS; i++) e.dc[i] = (int16_t)prediction[i];
    return e;
}

/* Copies the entry points of the area, with the end of each row. Returns RSB_UNUSUAL where their
 * bits are not in ascending order, or lie after the scan. Otherwise `*bytes` is the number of bytes
 * that the rows have. */
static int copy_entries(const rsb_packed *p, const rsb_jpeg *j, const scan *s, int row_start,
                        rsb_entry *to, uint64_t *bytes) {
    uint32_t end = (uint32_t)(8 * s->length);
    *bytes = 0;
    for (int row = 0; row < p->mcu_rows; row++) {
        size_t which =
            (size_t)(row_start + row) * s->entries_per_row + p->first_column / ENTRY_INTERVAL;
        const rsb_entry *first = to;
        for (int i = 0; i <= p->segments_per_row; i++, which++, to++) {
            if (which < (size_t)s->entries_per_row * j->rows)
                *to = entry_at(s, which);
            else
                *to = (rsb_entry){.bit = end};
            if (to->bit > end || (to > first && to->bit < to[-1].bit)) return RSB_UNUSUAL;
        }
        *bytes += (to[-1].bit + 7) / 8 - first->bit / 8;
    }
    return RSB_OK;
}

/* Lists the segments, those of similar lengths side by side: threads next to each other then take
 * the same time. */
static void sort_segments(const rsb_packed *p, const rsb_entry *entries, uint32_t *order) {
    uint32_t start[LENGTH_CLASSES + 1] = {0};
    for (int pass = 0; pass < 2; pass++) {
        const rsb_entry *e = entries;
        for (int row = 0; row < p->mcu_rows; row++, e++)
            for (int i = 0; i < p->segments_per_row; i++, e++) {
                uint32_t length = (e[1].bit - e->bit) / BITS_PER_CLASS;
                length = length < LENGTH_CLASSES ? length : LENGTH_CLASSES - 1;
                /* the longest first */
                uint32_t which = LENGTH_CLASSES - 1 - length;
                if (pass)
                    order[start[which]++] = (uint32_t)row << 16 | (uint32_t)i;
                else
                    start[which + 1]++;
            }
        for (int i = 0; !pass && i < LENGTH_CLASSES; i++) start[i + 1] += start[i];
    }
}

static int pack_jpeg(const uint8_t *bytes, const rsb_sample *s, rsb_slab *slab, rsb_packed *p,
                     rsb_size out, rsb_scratch *scratch) {
    scan scanned;
    int status = rsb_jpeg_open(bytes, s->size, scratch, &scanned);
    if (status) return status;
    const rsb_jpeg *j = scratch->jpeg;
    if (j->height != s->height || j->width != s->width) return RSB_UNUSUAL;
    if (s->entry_bytes != (size_t)RSB_ENTRY_BYTES * scanned.entries_per_row * j->rows ||
        scanned.length > UINT32_MAX / 8)
        return RSB_UNUSUAL;
    scanned.entries = bytes + s->size;
    mcu_area m = rsb_jpeg_mcus(j, p->window);
    uint64_t planes = set_area(p, j, m);
    p->kind = RSB_JPEG;
    lay_out(p, out, (uint64_t)p->blocks * BLOCK_SIZE * sizeof(int16_t), planes);
    if (p->scratch_bytes > slab->scratch) return RSB_UNUSUAL;

    uint64_t entry_count = (uint64_t)p->mcu_rows * (p->segments_per_row + 1);
    rsb_entry *entries = (rsb_entry *)rsb_buffer(scratch, RSB_ROWS, entry_count * sizeof *entries);
    if (!entries) return RSB_NO_MEMORY;
    uint64_t data;
    status = copy_entries(p, j, &scanned, m.row_start, entries, &data);
    if (status) return status;
    uint64_t tables = MAX_TABLES * sizeof(rsb_huffman_lists);
    uint64_t order = (uint64_t)p->segments * sizeof(uint32_t);
    uint64_t bases = (uint64_t)p->mcu_rows * sizeof(uint32_t);
    uint64_t head = tables + entry_count * sizeof *entries + order + bases;
    uint64_t at = take(slab, out, head + data);
    if (!at) return RSB_UNUSUAL;

    p->tables = (uint32_t)at;
    p->entries = (uint32_t)(p->tables + tables);
    p->order = (uint32_t)(p->entries + entry_count * sizeof *entries);
    p->bases = (uint32_t)(p->order + order);
    copy_tables(j, (rsb_huffman_lists *)(slab->memory + p->tables));
    memcpy(slab->memory + p->entries, entries, entry_count * sizeof *entries);
    sort_segments(p, entries, (uint32_t *)(slab->memory + p->order));
    uint32_t *base = (uint32_t *)(slab->memory + p->bases);
    at += head;
    for (int row = 0; row < p->mcu_rows; row++) {
        const rsb_entry *first = entries + (size_t)row * (p->segments_per_row + 1);
        uint32_t begin = first->bit / 8;
        uint32_t end = (first[p->segments_per_row].bit + 7) / 8;
        base[row] = (uint32_t)at - begin;
        memcpy(slab->memory + at, scanned.data + begin, end - begin);
        at += end - begin;
    }
    return RSB_OK;
}

int rsb_pack(const rsb_sample *s, rsb_slab *slab, int row, int height, int width,
             rsb_scratch *scratch, uint8_t **pixels) {
    rsb_size out = {height, width};
    rsb_packed *p = (rsb_packed *)slab->memory + row;
    const uint8_t *bytes;
    *pixels = NULL;
    int status = rsb_read_sample(s, out, scratch, &bytes);
    if (status) return status;
    rsb_size image = {s->height, s->width};
    p->box = s->box;
    p->window = rsb_reach(s->box, image, out, s->filter);
    p->height = s->height;
    p->width = s->width;
    p->filter = s->filter;
    p->flip = s->flip;
    p->rows_first = s->rows_first;
    status = s->raw ? pack_raw(bytes, s, slab, p, out) : pack_jpeg(bytes, s, slab, p, out, scratch);
    if (status != RSB_UNUSUAL) return status;

    p->kind = RSB_PIXELS;
    p->scratch_bytes = 0;
    p->pixels = (uint32_t)take(slab, out, (uint64_t)3 * height * width);
    *pixels = slab->memory + p->pixels;
    return rsb_crop(bytes, s, *pixels, out, scratch);
}
