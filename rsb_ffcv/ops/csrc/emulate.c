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
    int threads;
} kernel;

#define KERNEL(name, memory, threads, phases) {run_##name, threads},
static const kernel KERNELS[] = {RSB_KERNELS(KERNEL, )};
#undef KERNEL

int rsb_emulate(int which, const void *launch, int parts, int rows, int order) {
    const rsb_launch *a = launch;
    int list[MAX_THREADS];
    if (which < 0 || which >= (int)(sizeof KERNELS / sizeof *KERNELS)) return RSB_BAD_CALL;
    order_threads(list, KERNELS[which].threads, order);
    for (int row = 0; row < rows; row++)
        for (int part = 0; part < parts; part++) KERNELS[which].run(a, part, a->first + row, list);
    return RSB_OK;
}
