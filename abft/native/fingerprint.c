/* Fingerprints of the bits of W (n, k): abft/bits.py. Of every 16-bit half of every column k, modulo 2³²
 *
 *     plain = Σ_n half[n, k]        weighted = Σ_n (n + 1) half[n, k]
 *
 * Without multiplications: with P_n = Σ_{i <= n} half[i], Σ_n P_n = Σ_n (N - n) half[n] = (N + 1) plain - weighted.
 */
#include "vectors.h"

INLINE vu words_of(const void *p, int64_t i, int64_t count, int bytes) {
    if (count >= LANES) {
        if (bytes == 4) return *(const vu *)((const uint32_t *)p + i);
        return __builtin_convertvector(*(const vs *)((const uint16_t *)p + i), vu);
    }
    uint32_t out[LANES] __attribute__((aligned(64))) = {0};
    for (int lane = 0; lane < count; lane++) out[lane] = bytes == 4 ? ((const uint32_t *)p)[i + lane] : ((const uint16_t *)p)[i + lane];
    return *(const vu *)out;
}

/* The sums of one register's halves so far, and the sums of those. */
typedef struct {
    vu sum[2], sums[2];
} halves;

INLINE void add(halves *h, vu v, int bytes) {
    h->sum[0] += v & 0xffff;
    h->sums[0] += h->sum[0];
    if (bytes == 4) {
        h->sum[1] += v >> 16;
        h->sums[1] += h->sum[1];
    }
}

enum { SOON = 16 };

/* Columns adjacent in memory: FRAGMENT of them at a time, down the rows. */
INLINE void down(const void *w, int64_t n, int64_t k, int64_t ld, uint32_t *plain, uint32_t *weighted, int64_t k0, int bytes) {
    const int64_t count = k - k0 < FRAGMENT ? k - k0 : FRAGMENT;
    halves h[PARTS] = {{{{0}}}};
    for (int64_t i = 0; i < n; i++) {
        const int64_t at = i * ld + k0;
        __builtin_prefetch((const char *)w + (at + SOON * ld) * bytes);
        if (count == FRAGMENT) {
            UNROLL for (int part = 0; part < PARTS; part++) add(&h[part], words_of(w, at + part * LANES, LANES, bytes), bytes);
        } else {
            UNROLL for (int part = 0; part < PARTS; part++) add(&h[part], words_of(w, at + part * LANES, count - part * LANES, bytes), bytes);
        }
    }
    for (int half = 0; half < bytes / 2; half++)
        for (int lane = 0; lane < count; lane++) {
            const uint32_t sum = h[lane / LANES].sum[half][lane % LANES], sums = h[lane / LANES].sums[half][lane % LANES];
            plain[half * k + k0 + lane] = sum;
            weighted[half * k + k0 + lane] = (uint32_t)(n + 1) * sum - sums;
        }
}

/* Rows adjacent: along one column, LANES rows at a time. Row LANES · b + j is in lane j of step b. */
INLINE void along(const void *w, int64_t n, int64_t k, int64_t ld, uint32_t *plain, uint32_t *weighted, int64_t column, int bytes) {
    const uint32_t steps = (uint32_t)((n + LANES - 1) / LANES);
    halves h = {{{0}}};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) add(&h, words_of(w, column * ld + i, LANES, bytes), bytes);
    if (i < n) add(&h, words_of(w, column * ld + i, n - i, bytes), bytes);
    for (int half = 0; half < bytes / 2; half++) {
        uint32_t p = 0, q = 0;
        for (uint32_t lane = 0; lane < LANES; lane++) {
            const uint32_t sum = h.sum[half][lane];
            p += sum;
            q += (lane + 1) * sum + LANES * (steps * sum - h.sums[half][lane]);
        }
        plain[half * k + column] = p;
        weighted[half * k + column] = q;
    }
}

/* plain and weighted (bytes / 2, k) of w, whose rows (rows_adjacent: columns) are `ld` numbers of `bytes` (2, 4) apart. */
int abft_fingerprint(const void *w, int64_t n, int64_t k, int64_t ld, int rows_adjacent, int bytes, uint32_t *plain, uint32_t *weighted,
                     int threads) {
    const int64_t units = rows_adjacent ? k : (k + FRAGMENT - 1) / FRAGMENT;
    if (bytes != 2 && bytes != 4) return 1;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t unit = 0; unit < units; unit++) {
        if (rows_adjacent)
            bytes == 4 ? along(w, n, k, ld, plain, weighted, unit, 4) : along(w, n, k, ld, plain, weighted, unit, 2);
        else
            bytes == 4 ? down(w, n, k, ld, plain, weighted, FRAGMENT * unit, 4) : down(w, n, k, ld, plain, weighted, FRAGMENT * unit, 2);
    }
    return 0;
}

/* The sum of n numbers of 32 bits with a sign. */
int64_t abft_total(const int32_t *words, int64_t n) {
    int64_t sum[4] = {0}, i = 0;
    for (; i + 4 <= n; i += 4)
        UNROLL for (int j = 0; j < 4; j++) sum[j] += words[i + j];
    for (; i < n; i++) sum[0] += words[i];
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}
