/* Decoding of a region with libjpeg-turbo, which benchmarks/loader.py measures as an upper limit:
 * it skips the rows above and below the region, crops the columns beside it, and drops the pixels.
 * It uses the accurate DCT and fancy upsampling, and gives RGB. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include <jpeglib.h>

typedef struct {
    int64_t top, left, height, width; /* pixels */
} region;

#define MAX_WIDTH 65536 /* a JPEG has 16 bits for it */

/* Decodes region i of the JPEG of sizes[i] bytes at data + pointers[i], for i = first .. end - 1.
 * Returns 0; libjpeg ends the process for a damaged JPEG. */
int decode_regions(const uint8_t *data, const int64_t *pointers, const int64_t *sizes,
                   const region *regions, int first, int end) {
    uint8_t *row = malloc(3 * MAX_WIDTH);
    for (int i = first; i < end; i++) {
        struct jpeg_decompress_struct info;
        struct jpeg_error_mgr errors;
        info.err = jpeg_std_error(&errors);
        jpeg_create_decompress(&info);
        jpeg_mem_src(&info, data + pointers[i], (unsigned long)sizes[i]);
        jpeg_read_header(&info, TRUE);
        info.out_color_space = JCS_RGB;
        jpeg_start_decompress(&info);
        JDIMENSION left = (JDIMENSION)regions[i].left;
        JDIMENSION width = (JDIMENSION)regions[i].width;
        jpeg_crop_scanline(&info, &left, &width);
        if (regions[i].top) jpeg_skip_scanlines(&info, (JDIMENSION)regions[i].top);
        for (int y = 0; y < regions[i].height; y++) jpeg_read_scanlines(&info, &row, 1);
        jpeg_abort_decompress(&info);
        jpeg_destroy_decompress(&info);
    }
    free(row);
    return 0;
}
