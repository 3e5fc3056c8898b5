/* The loops of jpeg_planes.c over MCUs, compiled once for every instruction set. */

/* Decodes MCU rows row_start .. row_end, columns column_start .. column_end, into the planes.
 * Without `entries` everything before them is run over; with them, at most SPAN - 1 MCUs of a row.
 * `spans`: entries of a row. */
static int HOT(decode_planes)(rsb_jpeg *j, const scan *s, mcu_area area) {
    const uint8_t *data = s->data, *entries = s->entries;
    const size_t length = s->length;
    const int spans = s->entries_per_row, columns = j->columns;
    const int row_start = area.row_start, row_end = area.row_end;
    const int column_start = area.column_start, column_end = area.column_end;
    unit blocks[6];
    int units = make_units(j, blocks), prediction[3] = {0, 0, 0};
    reader r = {data, 0, 0};
    const uint8_t *limit = data + length;
    int16_t block[80] __attribute__((aligned(32)));
    for (int row = entries ? row_start : 0; row < row_end; row++) {
        /* nothing after the window's last MCU is needed */
        int column = 0, last = row + 1 < row_end ? columns : column_end;
        if (entries) {
            column = column_start / SPAN * SPAN, last = column_end;
            uint32_t bit =
                read_entry(entries, (size_t)row * spans + column_start / SPAN, prediction);
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
                if (final > 9) /* the first ten places lie in the upper left 4 x 4 */
                    HOT(idct_all)(block, blocks[u].quant, out, blocks[u].stride);
                else if (final)
                    HOT(idct_few)(block, blocks[u].quant, out, blocks[u].stride);
                else
                    HOT(idct_flat)(block[0], blocks[u].quant[0], out, blocks[u].stride);
            }
            /* A damaged stream reads on into zeros: at most 6 blocks of 256 bytes before it is
             * noticed here. */
            if (r.next - (r.count >> 3) > limit) return RSB_UNUSUAL;
        }
        for (int u = 0; row >= row_start && u < units; u++) blocks[u].out += blocks[u].down;
    }
    return RSB_OK;
}

/* Where MCU 0, SPAN, 2 SPAN, ... of each row begins. Returns RSB_UNUSUAL for damage. */
static int HOT(find_entries)(rsb_jpeg *j, const scan *s, uint8_t *entries) {
    const uint8_t *data = s->data;
    const size_t length = s->length;
    const int columns = j->columns, rows = j->rows;
    unit blocks[6];
    int units = make_units(j, blocks), prediction[3] = {0, 0, 0};
    reader r = {data, 0, 0};
    for (int row = 0; row < rows; row++)
        for (int column = 0; column < columns; column++) {
            if (column % SPAN == 0)
                entries =
                    write_entry(entries, (uint32_t)(8 * (r.next - data) - r.count), prediction);
            if (HOT(skip_mcu)(&r, blocks, units, prediction) ||
                r.next - (r.count >> 3) > data + length)
                return RSB_UNUSUAL;
        }
    return RSB_OK;
}
