/* Damaged images through the compiled core, under AddressSanitizer and UndefinedBehaviorSanitizer.
 *
 *     fuzz_core <count> <seed> <file>...
 *
 * Each file is a JPEG. One after another is damaged (bits flipped, bytes overwritten, stretches
 * copied, cut, lengths of segments changed), written to a memory file between two guard patterns,
 * and loaded with a random box, filter and size, as JPEG or raw, with its true or with other sides,
 * half of them with entry points; every tenth picture goes through random ops as well. A finding is
 * a report of a sanitizer, a status that does not exist, or a changed byte after the output.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "rsb.h"

static uint64_t state;
static uint32_t word(void) { /* splitmix64 */
    uint64_t z = state += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u, z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return (uint32_t)(z >> 32);
}
static uint32_t below(uint32_t n) { return (uint32_t)((uint64_t)word() * n >> 32); }
static double uniform(void) { return word() / 4294967296.0; }

static size_t damage(uint8_t *data, size_t size, size_t room) {
    for (int n = (int)below(5); n >= 0 && size > 4; n--) {
        /* headers more often */
        size_t at = below(3) ? below((uint32_t)size) : below((uint32_t)(size < 700 ? size : 700));
        size_t length = 1 + below(40);
        switch (below(8)) {
        case 0: data[at] ^= (uint8_t)(1 << below(8)); break;
        case 1: data[at] = (uint8_t)word(); break;
        case 2:
            for (size_t i = at; i < size && i < at + length; i++) data[i] = (uint8_t)word();
            break;
        case 3:
            memset(data + at, below(2) ? 0xFF : 0, at + length < size ? length : size - at);
            break;
        case 4: size = at; break;
        case 5:
            memmove(data + at, data + below((uint32_t)size),
                    size - at < length ? 0 : length * (at + 2 * length < size));
            break;
        case 6: /* a segment's length, or the picture's sides */
            for (size_t i = at; i + 9 < size; i++)
                if (data[i] == 0xFF && data[i + 1] >= 0xC0 && data[i + 1] != 0xFF) {
                    data[i + 2 + below(8)] = (uint8_t)(below(2) ? word() : below(3) * 127);
                    break;
                }
            break;
        case 7:
            if (size + length < room)
                memmove(data + at + length, data + at, size - at), size += length;
            break;
        }
    }
    return size;
}

int main(int count, char **arguments) {
    long inputs = count > 3 ? atol(arguments[1]) : 0, statuses[16] = {0};
    if (inputs < 1) return fprintf(stderr, "usage: fuzz_core <count> <seed> <file>...\n"), 2;
    state = strtoull(arguments[2], NULL, 10);
    int files = count - 3;
    uint8_t **seeds = calloc(files, sizeof *seeds);
    size_t *sizes = calloc(files, sizeof *sizes), largest = 0;
    int (*sides)[2] = calloc(files, sizeof *sides);
    for (int i = 0; i < files; i++) {
        FILE *file = fopen(arguments[3 + i], "rb");
        if (!file) return perror(arguments[3 + i]), 2;
        fseek(file, 0, SEEK_END);
        sizes[i] = (size_t)ftell(file);
        rewind(file);
        seeds[i] = malloc(sizes[i]);
        if (fread(seeds[i], 1, sizes[i], file) != sizes[i]) return perror("fread"), 2;
        fclose(file);
        largest = sizes[i] > largest ? sizes[i] : largest;
        for (size_t at = 2; at + 9 < sizes[i]; at += 2 + (seeds[i][at + 2] << 8 | seeds[i][at + 3]))
            if (seeds[i][at + 1] >= 0xC0 && seeds[i][at + 1] <= 0xC2) {
                sides[i][0] = seeds[i][at + 5] << 8 | seeds[i][at + 6],
                sides[i][1] = seeds[i][at + 7] << 8 | seeds[i][at + 8];
                break;
            }
    }
    enum { ENTRIES = 8192 };
    size_t room = 2 * largest + 4096;
    uint8_t *data = malloc(room + ENTRIES), (*entries)[ENTRIES] = calloc(files, ENTRIES);
    size_t *entry_sizes = calloc(files, sizeof *entry_sizes);
    int memory = memfd_create("fuzz", 0);
    rsb_scratch *scratch = rsb_scratch_new();
    for (int i = 0; i < files; i++)
        entry_sizes[i] = rsb_jpeg_entries(seeds[i], sizes[i], entries[i], ENTRIES, scratch);
    for (long input = 0; input < inputs; input++) {
        /* fresh buffers meet damage too */
        if (input % 1000 == 0) rsb_scratch_free(scratch), scratch = rsb_scratch_new();
        int which = (int)below((uint32_t)files);
        memcpy(data, seeds[which], sizes[which]);
        size_t size = damage(data, sizes[which], room), entered = below(2) ? entry_sizes[which] : 0,
               all = size + entered;
        memcpy(data + size, entries[which], entered);
        for (int n = (int)below(4); entered && n > 0; n--)
            data[size + below((uint32_t)entered)] = (uint8_t)word();
        if (!below(4)) { /* those of what the damage left, as a writer would make them */
            entered = rsb_jpeg_entries(data, size, data + size, ENTRIES, scratch),
            all = size + entered;
        }
        if (pwrite(memory, data, all, 0) != (ssize_t)all || ftruncate(memory, (off_t)all))
            return perror("memory file"), 2;
        rsb_sample sample = {.pointer = below(50) ? 0 : below(100),
                             .size = below(50) ? size : word() % (2 * size + 1),
                             .height = sides[which][0],
                             .width = sides[which][1],
                             .entry_bytes = (uint32_t)(below(50) ? entered : word() >> below(32)),
                             .raw = !below(20),
                             .verify = !below(100),
                             .filter = (uint8_t)below(2),
                             .flip = (uint8_t)below(2),
                             .rows_first = (uint8_t)below(2)};
        if (!below(8)) sample.height = 1 + (int)below(70), sample.width = 1 + (int)below(70);
        if (!below(200))
            sample.height = (int)word() >> below(32), sample.width = (int)word() >> below(32);
        if (sample.raw && below(2))
            sample.size = (uint64_t)3 * (uint32_t)sample.height * (uint32_t)sample.width;
        double h = uniform() * sample.height, w = uniform() * sample.width;
        double box[4] = {uniform() * (sample.height - h), uniform() * (sample.width - w), h, w};
        if (!below(300)) box[below(4)] = (double[]){-1, 0.0 / 0.0, 1e300, 0, 1e-300}[below(5)];
        memcpy(&sample.box, box, sizeof box);
        int out_height = 1 + (int)below(80), out_width = 1 + (int)below(80);
        size_t bytes = (size_t)3 * out_height * out_width;
        uint8_t *out = malloc(bytes); /* its own allocation: the sanitizer guards both ends */
        int status = rsb_load(memory, &sample, out, out_height, out_width, scratch);
        if (status < 0 || status > RSB_BAD_CALL)
            return fprintf(stderr, "input %ld: status %d\n", input, status), 1;
        if (status == RSB_OK && !below(10)) {
            rsb_layer layer = {.op = (int)below(16) - 1, .filter = (uint8_t)below(3)};
            for (int i = 0; i < 6; i++)
                layer.argument[i] = (uniform() - 0.5) * (double[]){2, 10, 300, 1e9}[below(4)];
            if (layer.op == RSB_BLUR) layer.argument[0] = uniform() * 20;
            rsb_augment(out, out_height, out_width, &layer, scratch);
        }
        statuses[status]++;
        free(out);
    }
    printf("%ld inputs:", inputs);
    for (int i = 0; i <= RSB_BAD_CALL; i++)
        printf(" status %d: %ld%s", i, statuses[i], i < RSB_BAD_CALL ? "," : "\n");
    rsb_scratch_free(scratch);
    for (int i = 0; i < files; i++) free(seeds[i]);
    free(seeds), free(sizes), free(sides), free(data), free(entries), free(entry_sizes);
    return 0;
}
