/* The device kernels that share memory, each thread of a block as a thread of its own, under
 * ThreadSanitizer.
 *
 *     threads <file>...
 *
 * Each file is a JPEG. The program fails where the pixels are not those of rsb_emulate;
 * ThreadSanitizer reports accesses that only the order of the threads separates.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

#include "device.h"
#include "rsb.h"

enum { STACK_BYTES = 1 << 17, ENTRY_ROOM = 65536 };

typedef struct {
    const rsb_launch *launch;
    void *memory; /* of the block */
    pthread_barrier_t *barrier;
    void (*phases)(const rsb_launch *, void *, int, int, int, pthread_barrier_t *);
    int part, row, thread;
} task;

#define PHASE(phase)                \
    phase(a, s, part, row, thread); \
    pthread_barrier_wait(barrier);

#define KERNEL(name, shared, threads, phases)                                                      \
    static void phases_of_##name(const rsb_launch *a, void *memory, int part, int row, int thread, \
                                 pthread_barrier_t *barrier) {                                     \
        shared *s = memory;                                                                        \
        phases                                                                                     \
    }
RSB_KERNELS(KERNEL, PHASE)
#undef KERNEL

typedef struct {
    void (*phases)(const rsb_launch *, void *, int, int, int, pthread_barrier_t *);
    int threads;
    size_t memory;
} kernel;

#define KERNEL(name, shared, threads, phases) {phases_of_##name, threads, sizeof(shared)},
static const kernel KERNELS[] = {RSB_KERNELS(KERNEL, )};
#undef KERNEL

static void *run_thread(void *argument) {
    task *t = argument;
    t->phases(t->launch, t->memory, t->part, t->row, t->thread, t->barrier);
    return NULL;
}

static void run_block(const kernel *k, const rsb_launch *a, int part, int row) {
    pthread_t *threads = calloc(k->threads, sizeof *threads);
    task *tasks = calloc(k->threads, sizeof *tasks);
    void *memory = aligned_alloc(64, (k->memory + 63) / 64 * 64);
    pthread_barrier_t barrier;
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    pthread_barrier_init(&barrier, NULL, k->threads);
    for (int i = 0; i < k->threads; i++) {
        tasks[i] = (task){a, memory, &barrier, k->phases, part, row, i};
        if (pthread_create(&threads[i], &attributes, run_thread, &tasks[i])) {
            perror("pthread_create");
            exit(2);
        }
    }
    for (int i = 0; i < k->threads; i++) pthread_join(threads[i], NULL);
    pthread_barrier_destroy(&barrier);
    pthread_attr_destroy(&attributes);
    free(threads);
    free(tasks);
    free(memory);
}

static int decode_in_threads; /* not only the operation */

static int run_threads(int which, const void *launch, int order) {
    int decodes = which == NUMBER_OF_entropy || which == NUMBER_OF_idct || which == NUMBER_OF_taps;
    if (which != NUMBER_OF_augment && !(decodes && decode_in_threads))
        return rsb_emulate(which, launch, order);
    const rsb_launch *a = launch;
    for (uint32_t block = 0; block < a->starts[1]; block++)
        run_block(&KERNELS[which], a, (int)block, 0);
    return RSB_OK;
}

int main(int count, char **arguments) {
    rsb_scratch *scratch = rsb_scratch_new();
    int made = 0;
    for (int i = 1; i < count; i++) {
        static uint8_t data[1 << 20];
        FILE *opened = fopen(arguments[i], "rb");
        if (!opened) {
            perror(arguments[i]);
            return 2;
        }
        size_t size = fread(data, 1, sizeof data - ENTRY_ROOM, opened);
        fclose(opened);
        size_t entered = rsb_jpeg_entries(data, size, data + size, ENTRY_ROOM, scratch);
        int file = memfd_create("image", 0);
        if (write(file, data, size + entered) != (ssize_t)(size + entered)) return 2;
        rsb_sample sample = {.size = size, .file = file, .entry_bytes = (uint32_t)entered};
        for (size_t at = 2; at + 9 < size; at += 2 + (data[at + 2] << 8 | data[at + 3]))
            if (data[at + 1] >= 0xC0 && data[at + 1] <= 0xC2) {
                sample.height = data[at + 5] << 8 | data[at + 6];
                sample.width = data[at + 7] << 8 | data[at + 8];
                break;
            }
        sample.box = (rsb_box){0.3, 0.2, sample.height - 0.6, sample.width - 0.4};
        sample.filter = i % 2;
        sample.rows_first = i / 2 % 2;
        for (int op = RSB_IDENTITY; op <= RSB_AFFINE; op++) {
            static uint8_t pixels[2][3 * 16 * 24];
            rsb_layer layer = {.op = op, .filter = i % 3, .argument = {0.8, 0.2, 1, -0.2, 0.8, 2}};
            int refused[2], status[2];
            kernel_runner runners[] = {rsb_emulate, run_threads};
            decode_in_threads = op == RSB_IDENTITY;
            for (int which = 0; which < 2; which++)
                status[which] = device_load(runners[which], &sample, &layer, pixels[which], 16, 24,
                                            0, scratch, &refused[which]);
            if (status[0] || status[1] || refused[0] != refused[1] ||
                memcmp(pixels[0], pixels[1], sizeof pixels[0])) {
                fprintf(stderr, "%s, op %d: the results differ\n", arguments[i], op);
                return 1;
            }
            made += !refused[0];
        }
        close(file);
    }
    printf("%d images equal\n", made);
    rsb_scratch_free(scratch);
    return 0;
}
