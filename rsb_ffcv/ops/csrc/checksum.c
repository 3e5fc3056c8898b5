/* XXH64 with seed 0, from Yann Collet's specification of xxHash, whose names are used here. */
#include <string.h>

#include "rsb.h"

#define PRIME64_1 0x9E3779B185EBCA87u
#define PRIME64_2 0xC2B2AE3D27D4EB4Fu
#define PRIME64_3 0x165667B19E3779F9u
#define PRIME64_4 0x85EBCA77C2B2AE63u
#define PRIME64_5 0x27D4EB2F165667C5u

RSB_INLINE uint64_t rotate(uint64_t x, int r) { return x << r | x >> (64 - r); }

RSB_INLINE uint64_t word64(const uint8_t *p) {
    uint64_t word;
    memcpy(&word, p, 8);
    return word;
}

/* "round" of the specification */
RSB_INLINE uint64_t mix(uint64_t lane, uint64_t word) {
    return rotate(lane + word * PRIME64_2, 31) * PRIME64_1;
}

/* "mergeAccumulator" */
RSB_INLINE uint64_t merge(uint64_t hash, uint64_t lane) {
    return (hash ^ mix(0, lane)) * PRIME64_1 + PRIME64_4;
}

uint64_t rsb_checksum(const uint8_t *bytes, size_t size) {
    const uint8_t *p = bytes;
    const uint8_t *end = bytes + size;
    uint64_t hash = PRIME64_5;
    if (size >= 32) {
        uint64_t a = PRIME64_1 + PRIME64_2;
        uint64_t b = PRIME64_2;
        uint64_t c = 0;
        uint64_t d = 0 - PRIME64_1;
        for (; end - p >= 32; p += 32) {
            a = mix(a, word64(p));
            b = mix(b, word64(p + 8));
            c = mix(c, word64(p + 16));
            d = mix(d, word64(p + 24));
        }
        hash = rotate(a, 1) + rotate(b, 7) + rotate(c, 12) + rotate(d, 18);
        hash = merge(merge(merge(merge(hash, a), b), c), d);
    }
    hash += size;
    for (; end - p >= 8; p += 8)
        hash = rotate(hash ^ mix(0, word64(p)), 27) * PRIME64_1 + PRIME64_4;
    if (end - p >= 4) {
        uint32_t half;
        memcpy(&half, p, 4);
        hash = rotate(hash ^ half * PRIME64_1, 23) * PRIME64_2 + PRIME64_3;
        p += 4;
    }
    for (; p < end; p++) hash = rotate(hash ^ *p * PRIME64_5, 11) * PRIME64_1;
    hash = (hash ^ hash >> 33) * PRIME64_2;
    hash = (hash ^ hash >> 29) * PRIME64_3;
    return hash ^ hash >> 32;
}
