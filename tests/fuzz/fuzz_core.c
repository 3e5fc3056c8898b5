/* Damaged images through the compiled core, under AddressSanitizer and UndefinedBehaviorSanitizer.
 *
 *     fuzz_core <count> <seed> <file>...
 *
 * Each file is a JPEG. An input is one of them with damage: flipped bits, overwritten bytes, copied
 * or inserted ranges, changed lengths of segments, or a cut. It is written to a memory file and
 * loaded with a random box, filter and size, as JPEG or raw, with its own or with other sides, and
 * half of the time with entry points. Every tenth image goes through a random op. Each image also
 * goes through the emulated device kernels, which must give the core's bytes or leave it to the
 * core. The program fails for a sanitizer's report, an unknown status, and different bytes.
 *
 * A seed gives the same inputs on each run: the order of the draws is part of the test.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "device.h"
#include "rsb.h"

enum {
    MAX_ENTRY_BYTES = 8192, /* bytes of entry points of an input */
    MAX_INSERTED = 4096,    /* bytes that damage may insert, besides the size of the file */
    HEADER_BYTES = 700,     /* damage hits these more often */
    STATUS_ROOM = 16,
    FRESH_SCRATCH = 1000 /* inputs for which a scratch is used */
};

/* ---- draws ---- */

static uint64_t state;

static uint32_t word(void) { /* splitmix64 */
    state += 0x9E3779B97F4A7C15u;
    uint64_t z = state;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return (uint32_t)(z >> 32);
}
static uint32_t below(uint32_t n) { return (uint32_t)((uint64_t)word() * n >> 32); }
static double uniform(void) { return word() / 4294967296.0; }

/* ---- files ---- */

typedef struct {
    uint8_t *data;
    size_t size;
    int height, width;
    uint8_t entries[MAX_ENTRY_BYTES];
    size_t entry_bytes;
} seed_file;

static void fail(const char *what) {
    perror(what);
    exit(2);
}

/* Finds the sides in the frame header. */
static void read_sides(seed_file *f) {
    for (size_t at = 2; at + 9 < f->size; at += 2 + (f->data[at + 2] << 8 | f->data[at + 3]))
        if (f->data[at + 1] >= 0xC0 && f->data[at + 1] <= 0xC2) {
            f->height = f->data[at + 5] << 8 | f->data[at + 6];
            f->width = f->data[at + 7] << 8 | f->data[at + 8];
            return;
        }
}

static void read_file(seed_file *f, const char *path) {
    FILE *file = fopen(path, "rb");
    if (!file) fail(path);
    fseek(file, 0, SEEK_END);
    f->size = (size_t)ftell(file);
    rewind(file);
    f->data = malloc(f->size);
    if (fread(f->data, 1, f->size, file) != f->size) fail("fread");
    fclose(file);
    read_sides(f);
}

/* ---- inputs ---- */

/* Damages `size` bytes of `data`, which has `capacity` bytes. Returns the new size. */
static size_t damage(uint8_t *data, size_t size, size_t capacity) {
    for (int n = (int)below(5); n >= 0 && size > 4; n--) {
        size_t range = below(3) || size < HEADER_BYTES ? size : HEADER_BYTES;
        size_t at = below((uint32_t)range);
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
        case 6: /* a segment's length, or the sides */
            for (size_t i = at; i + 9 < size; i++)
                if (data[i] == 0xFF && data[i + 1] >= 0xC0 && data[i + 1] != 0xFF) {
                    data[i + 2 + below(8)] = (uint8_t)(below(2) ? word() : below(3) * 127);
                    break;
                }
            break;
        case 7:
            if (size + length < capacity) {
                memmove(data + at + length, data + at, size - at);
                size += length;
            }
            break;
        }
    }
    return size;
}

/* Writes a damaged file with entry points or without to `data`. Returns its size; `*entered` is the
 * number of bytes of entry points that follow. */
static size_t make_input(const seed_file *f, uint8_t *data, size_t capacity, size_t *entered,
                         rsb_scratch *scratch) {
    memcpy(data, f->data, f->size);
    size_t size = damage(data, f->size, capacity);
    *entered = below(2) ? f->entry_bytes : 0;
    memcpy(data + size, f->entries, *entered);
    for (int n = (int)below(4); *entered && n > 0; n--)
        data[size + below((uint32_t)*entered)] = (uint8_t)word();
    /* entry points of the damaged file, as a writer would make them */
    if (!below(4)) *entered = rsb_jpeg_entries(data, size, data + size, MAX_ENTRY_BYTES, scratch);
    return size;
}

/* A box within the image, except a few that are not. */
static rsb_box random_box(int height, int width) {
    double h = uniform() * height;
    double w = uniform() * width;
    double top = uniform() * (height - h);
    double left = uniform() * (width - w);
    double box[4] = {top, left, h, w};
    if (!below(300)) {
        double value = (double[]){-1, 0.0 / 0.0, 1e300, 0, 1e-300}[below(5)];
        box[below(4)] = value;
    }
    return (rsb_box){box[0], box[1], box[2], box[3]};
}

static rsb_sample make_sample(const seed_file *f, size_t size, size_t entered) {
    rsb_sample sample = {0};
    sample.pointer = below(50) ? 0 : below(100);
    sample.size = below(50) ? size : word() % (2 * size + 1);
    sample.height = f->height;
    sample.width = f->width;
    sample.entry_bytes = (uint32_t)entered;
    if (!below(50)) {
        uint32_t bits = word();
        sample.entry_bytes = bits >> below(32);
    }
    sample.raw = !below(20);
    sample.verify = !below(100);
    sample.filter = (uint8_t)below(2);
    sample.flip = (uint8_t)below(2);
    sample.rows_first = (uint8_t)below(2);
    if (!below(8)) {
        sample.height = 1 + (int)below(70);
        sample.width = 1 + (int)below(70);
    }
    if (!below(200)) {
        int bits = (int)word();
        sample.height = bits >> below(32);
        bits = (int)word();
        sample.width = bits >> below(32);
    }
    if (sample.raw && below(2))
        sample.size = (uint64_t)3 * (uint32_t)sample.height * (uint32_t)sample.width;
    sample.box = random_box(sample.height, sample.width);
    return sample;
}

static rsb_layer random_layer(void) {
    rsb_layer layer = {0};
    layer.op = (int)below(16) - 1;
    layer.filter = (uint8_t)below(4);
    for (int i = 0; i < 6; i++) {
        double share = uniform() - 0.5;
        layer.argument[i] = share * (double[]){2, 10, 300, 1e9}[below(4)];
    }
    if (layer.op == RSB_BLUR) layer.argument[0] = uniform() * 20;
    return layer;
}

/* How the device kernels treated the inputs. */
typedef struct {
    long equal;   /* made by the kernels, with the core's bytes */
    long refused; /* left to the core */
} device_counts;

/* Loads one input and returns its status; -1: the device's result differs. data: memory for a file
 * of `capacity` bytes and its entry points. memory: descriptor of the memory file. */
static int run_input(const seed_file *f, uint8_t *data, size_t capacity, int memory,
                     rsb_scratch *scratch, device_counts *counts) {
    size_t entered;
    size_t size = make_input(f, data, capacity, &entered, scratch);
    size_t all = size + entered;
    if (pwrite(memory, data, all, 0) != (ssize_t)all || ftruncate(memory, (off_t)all))
        fail("memory file");
    rsb_sample sample = make_sample(f, size, entered);
    sample.file = memory;
    int height = 1 + (int)below(80);
    int width = 1 + (int)below(80);
    /* allocations of their own: the sanitizer guards both ends */
    size_t bytes = (size_t)3 * height * width;
    uint8_t *out = malloc(bytes);
    uint8_t *from_device = malloc(bytes);
    rsb_layer layer;
    rsb_layer *used = NULL;
    int status = rsb_load(&sample, out, height, width, scratch);
    int loaded = status;
    if (status == RSB_OK && !below(10)) {
        layer = random_layer();
        used = &layer;
        status = rsb_augment(out, height, width, used, scratch);
    }
    int refused;
    int device = device_load(rsb_emulate, &sample, used, from_device, height, width, (int)below(4),
                             scratch, &refused);
    int same = refused || (device == status && (status || !memcmp(out, from_device, bytes)));
    if (refused && device && device != status) same = 0;
    if (device == RSB_OK) *(refused ? &counts->refused : &counts->equal) += 1;
    free(out);
    free(from_device);
    return same ? loaded : -1;
}

int main(int count, char **arguments) {
    long inputs = count > 3 ? atol(arguments[1]) : 0;
    long statuses[STATUS_ROOM] = {0};
    device_counts counts = {0};
    if (inputs < 1) {
        fprintf(stderr, "usage: fuzz_core <count> <seed> <file>...\n");
        return 2;
    }
    state = strtoull(arguments[2], NULL, 10);
    int files = count - 3;
    size_t largest = 0;
    rsb_scratch *scratch = rsb_scratch_new();
    seed_file *seeds = calloc(files, sizeof *seeds);
    for (int i = 0; i < files; i++) {
        seed_file *f = &seeds[i];
        read_file(f, arguments[3 + i]);
        f->entry_bytes = rsb_jpeg_entries(f->data, f->size, f->entries, MAX_ENTRY_BYTES, scratch);
        largest = f->size > largest ? f->size : largest;
    }
    size_t capacity = 2 * largest + MAX_INSERTED;
    uint8_t *data = malloc(capacity + MAX_ENTRY_BYTES);
    int memory = memfd_create("fuzz", 0);
    for (long input = 0; input < inputs; input++) {
        if (input % FRESH_SCRATCH == 0) { /* damage must also meet fresh buffers */
            rsb_scratch_free(scratch);
            scratch = rsb_scratch_new();
        }
        const seed_file *f = &seeds[below((uint32_t)files)];
        int status = run_input(f, data, capacity, memory, scratch, &counts);
        if (status < 0 || status > RSB_BAD_CALL) {
            fprintf(stderr, "input %ld: status %d\n", input, status);
            return 1;
        }
        statuses[status]++;
    }
    printf("%ld inputs:", inputs);
    for (int i = 0; i <= RSB_BAD_CALL; i++)
        printf(" status %d: %ld%s", i, statuses[i], i < RSB_BAD_CALL ? "," : "\n");
    printf("device: %ld equal, %ld refused\n", counts.equal, counts.refused);
    rsb_scratch_free(scratch);
    for (int i = 0; i < files; i++) free(seeds[i].data);
    free(seeds);
    free(data);
    return 0;
}
