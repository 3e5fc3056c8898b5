/* Random numbers by address: see ops/draws.py. Philox4x32-10 and what is made of its words. */
#ifndef RSB_DRAWS_H
#define RSB_DRAWS_H

#include <math.h>

#include "rsb.h"

/* The op of an address, numbered as in ops/draws.py; those that are drawn here. */
enum { RSB_DRAW_CROP = 1, RSB_DRAW_FLIP = 2, RSB_DRAW_RAND_AUGMENT = 3, RSB_DRAW_ERASE = 5, RSB_DRAW_JITTER = 10 };

typedef struct {
    uint64_t seed;
    uint32_t epoch, slot, op;
} rsb_address;

RSB_INLINE void rsb_philox4(rsb_address at, uint32_t block, uint32_t words[4]) {
    uint32_t k0 = (uint32_t)at.seed, k1 = (uint32_t)(at.seed >> 32);
    uint32_t c0 = at.slot, c1 = at.epoch, c2 = at.op, c3 = block;
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = UINT64_C(0xD2511F53) * c0, p1 = UINT64_C(0xCD9E8D57) * c2;
        c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
        c1 = (uint32_t)p1;
        c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c3 = (uint32_t)p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

RSB_INLINE uint32_t rsb_word(rsb_address at, uint32_t k) {
    uint32_t words[4];
    rsb_philox4(at, k / 4, words);
    return words[k % 4];
}

/* In [0, 1), a multiple of 2 ** -32. */
RSB_INLINE double rsb_uniform_at(rsb_address at, uint32_t k) { return rsb_word(at, k) * 0x1p-32; }

/* In [0, n), 1 <= n < 2 ** 31. Bias at most n / 2 ** 32. */
RSB_INLINE int64_t rsb_below_at(rsb_address at, uint32_t k, uint64_t n) { return (int64_t)((rsb_word(at, k) * n) >> 32); }

/* Standard normal, from draws k and k + 1 (Box-Muller). */
RSB_INLINE double rsb_normal_at(rsb_address at, uint32_t k) {
    double u = (rsb_word(at, k) + 1.0) * 0x1p-32; /* (0, 1]: its log is finite */
    return sqrt(-2.0 * log(u)) * cos(2.0 * M_PI * rsb_uniform_at(at, k + 1));
}

#endif
