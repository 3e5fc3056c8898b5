/* The loops of jpeg_planes.c over MCUs, compiled once for each instruction set. */
#include "jpeg_entropy_hot.h"
#include "jpeg_idct_hot.h"

/* Decodes the MCUs of `area` into the planes. Without entry points it skips all MCUs before each of
 * them; with entry points, at most ENTRY_INTERVAL - 1 MCUs of each row. */
static int HOT(decode_planes)(rsb_jpeg *j, const scan *s, mcu_area area) {
    const uint8_t *data = s->data, *entries = s->entries;
    const size_t length = s->length;
    const int entries_per_row = s->entries_per_row, columns = j->columns;
    const int row_start = area.row_start, row_end = area.row_end;
    const int column_start = area.column_start, column_end = area.column_end;
    unit blocks[MAX_MCU_BLOCKS];
    int units = make_units(j, blocks), prediction[MAX_COMPONENTS] = {0, 0, 0};
    reader r = {data, 0, 0};
    const uint8_t *limit = data + length;
    /* 64 coefficients, and the position that places past the last lead to (see rsb_jpeg.order) */
    int16_t block[BLOCK_SIZE + 16] __attribute__((aligned(32)));
    for (int row = entries ? row_start : 0; row < row_end; row++) {
        /* after the last MCU of the area, decoding stops */
        int column = 0, last = row + 1 < row_end ? columns : column_end;
        if (entries) {
            column = column_start / ENTRY_INTERVAL * ENTRY_INTERVAL;
            last = column_end;
            size_t which = (size_t)row * entries_per_row + column_start / ENTRY_INTERVAL;
            uint32_t bit = rsb_jpeg_entry(entries, which, prediction);
            if (bit / 8 > length) return RSB_UNUSUAL;
            r = (reader){data + bit / 8, 0, 0};
            HOT(refill)(&r);
            HOT(drop)(&r, bit % 8);
        }
        for (; column < last; column++) {
            int inside = row >= row_start && column >= column_start && column < column_end;
            if (!inside && HOT(skip_mcu)(&r, blocks, units, prediction)) return RSB_UNUSUAL;
            for (int u = 0; inside && u < units; u++) {
                int *dc = &prediction[blocks[u].component];
                if (HOT(read_dc)(&r, blocks[u].dc, dc)) return RSB_UNUSUAL;
                for (int z = 0; z < 4; z++) ((v8 *)block)[z] = (v8){0};
                block[0] = (int16_t)*dc;
                int final = HOT(read_ac)(&r, blocks[u].ac, j->order, block);
                if (final < 0) return RSB_UNUSUAL;
                uint8_t *out =
                    blocks[u].out + (ptrdiff_t)(column - column_start) * blocks[u].across;
                if (final > LAST_PLACE_OF_4X4)
                    HOT(idct_all)(block, blocks[u].quant, out, blocks[u].stride);
                else if (final)
                    HOT(idct_few)(block, blocks[u].quant, out, blocks[u].stride);
                else
                    HOT(idct_flat)(block[0], blocks[u].quant[0], out, blocks[u].stride);
            }
            /* Damaged data reads on into the zeros after it: see ENTROPY_PADDING. */
            if (r.next - (r.count >> 3) > limit) return RSB_UNUSUAL;
        }
        for (int u = 0; row >= row_start && u < units; u++) blocks[u].out += blocks[u].down;
    }
    return RSB_OK;
}

/* Writes where each ENTRY_INTERVAL-th MCU of each row begins. */
static int HOT(find_entries)(rsb_jpeg *j, const scan *s, uint8_t *entries) {
    const uint8_t *data = s->data;
    const size_t length = s->length;
    const int columns = j->columns, rows = j->rows;
    unit blocks[MAX_MCU_BLOCKS];
    int units = make_units(j, blocks), prediction[MAX_COMPONENTS] = {0, 0, 0};
    reader r = {data, 0, 0};
    for (int row = 0; row < rows; row++)
        for (int column = 0; column < columns; column++) {
            if (column % ENTRY_INTERVAL == 0)
                entries =
                    write_entry(entries, (uint32_t)(8 * (r.next - data) - r.count), prediction);
            if (HOT(skip_mcu)(&r, blocks, units, prediction) ||
                r.next - (r.count >> 3) > data + length)
                return RSB_UNUSUAL;
        }
    return RSB_OK;
}
