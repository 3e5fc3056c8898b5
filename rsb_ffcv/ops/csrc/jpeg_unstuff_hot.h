/* The loop of jpeg_unstuff.c, compiled once for each instruction set. */

/* Handles the marker byte at *in. Returns 1: a stuffed byte was copied, 0: the end of the scan, or
 * RSB_UNUSUAL. */
static int HOT(pass_marker)(const uint8_t **in, const uint8_t *end, uint8_t **out) {
    if (*in + 1 >= end) return RSB_UNUSUAL;
    int marker = (*in)[1];
    if (marker == EOI) return 0;
    if (marker != 0) return RSB_UNUSUAL;
    *(*out)++ = MARKER;
    *in += 2;
    return 1;
}

static int HOT(unstuff)(const uint8_t *in, size_t n, uint8_t *out, size_t *length) {
    const uint8_t *start = out, *end = in + n;
    int more = 1;
#if HOT_VECTORS
    const __m256i marks = _mm256_set1_epi8((char)MARKER);
    while (more == 1 && end - in >= 32) {
        __m256i bytes = _mm256_loadu_si256((const __m256i *)in);
        uint32_t found = (uint32_t)_mm256_movemask_epi8(_mm256_cmpeq_epi8(bytes, marks));
        _mm256_storeu_si256((__m256i *)out, bytes);
        int step = found ? __builtin_ctz(found) : 32;
        in += step;
        out += step;
        if (found) more = HOT(pass_marker)(&in, end, &out);
    }
#endif
    while (more == 1) {
        const uint8_t *mark = in < end ? memchr(in, MARKER, (size_t)(end - in)) : NULL;
        if (!mark) return RSB_UNUSUAL;
        memcpy(out, in, (size_t)(mark - in));
        out += mark - in;
        in = mark;
        more = HOT(pass_marker)(&in, end, &out);
    }
    *length = (size_t)(out - start);
    return more;
}
