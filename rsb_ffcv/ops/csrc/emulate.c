/* The device kernels on the CPU: what a device computes, without a device. */
#include "rsb.h"
#include "shared/kernels.h"

enum { MAX_THREADS = 1024 };

/* The order in which the threads of a block run each phase. */
static void order_threads(int *order, int threads, int kind) {
    uint32_t state = (uint32_t)kind * 2654435761u | 1;
    for (int i = 0; i < threads; i++) order[i] = kind == 1 ? threads - 1 - i : i;
    for (int i = threads - 1; kind > 1 && i > 0; i--) {
        state ^= state << 13; /* xorshift32 */
        state ^= state >> 17;
        state ^= state << 5;
        int j = (int)(state % (uint32_t)(i + 1));
        int kept = order[i];
        order[i] = order[j];
        order[j] = kept;
    }
}

#define PHASE(phase) \
    for (int i = 0; i < threads; i++) phase(a, &s, part, row, order[i]);

#define KERNEL(name, memory, size, phases)                                             \
    static void run_##name(const rsb_launch *a, int part, int row, const int *order) { \
        enum { threads = size };                                                       \
        memory s;                                                                      \
        phases                                                                         \
    }
RSB_KERNELS(KERNEL, PHASE)
#undef KERNEL

typedef struct {
    void (*run)(const rsb_launch *, int, int, const int *);
    uint32_t (*blocks)(const rsb_packed *, int, int);
    int threads;
} kernel;

#define KERNEL(name, memory, threads, phases) {run_##name, name##_blocks, threads},
static const kernel KERNELS[] = {RSB_KERNELS(KERNEL, )};
#undef KERNEL

enum { KERNEL_COUNT = sizeof KERNELS / sizeof *KERNELS };

void rsb_block_starts(const void *records, int rows, int height, int width, uint32_t *starts) {
    for (int which = 0; which < KERNEL_COUNT; which++) {
        const rsb_packed *p = records;
        *starts = 0;
        for (int row = 0; row < rows; row++, starts++)
            starts[1] = starts[0] + KERNELS[which].blocks(&p[row], height, width);
        starts++;
    }
}

int rsb_emulate(int which, const void *launch, int order) {
    const rsb_launch *a = launch;
    int list[MAX_THREADS];
    if (which < 0 || which >= KERNEL_COUNT) return RSB_BAD_CALL;
    order_threads(list, KERNELS[which].threads, order);
    for (uint32_t block = 0; block < a->starts[a->rows]; block++) {
        int place = place_of_block(a, block);
        KERNELS[which].run(a, (int)(block - a->starts[place]), a->first + place, list);
    }
    return RSB_OK;
}
