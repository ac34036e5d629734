/* Fingerprints of the bits of W (n, k): abft/bits.py. Of every 16-bit half of every column k, modulo 2³²
 *
 *     plain = Σ_n half[n, k]        weighted = Σ_n (n + 1) half[n, k]
 *
 * Without multiplications: with P_n = Σ_{i <= n} half[i], Σ_n P_n = Σ_n (N - n) half[n] = (N + 1) plain - weighted.
 */
#include "vectors.h"

typedef u16x32 u32; /* sixteen of them */

INLINE u32 words_of(const void *p, int64_t i, int64_t count, int bytes) {
    u32 out = {0};
    if (count >= 16) {
        if (bytes == 4) return *(const u32 *)((const uint32_t *)p + i);
        return __builtin_convertvector(*(const u16x16 *)((const uint16_t *)p + i), u32);
    }
    for (int lane = 0; lane < count; lane++) out[lane] = bytes == 4 ? ((const uint32_t *)p)[i + lane] : ((const uint16_t *)p)[i + lane];
    return out;
}

/* Columns adjacent in memory: sixteen of them at a time, down the rows. */
INLINE void down(const void *w, int64_t n, int64_t k, int64_t ld, uint32_t *plain, uint32_t *weighted, int64_t k0, int bytes) {
    const int64_t count = k - k0 < 16 ? k - k0 : 16;
    u32 sum[2] = {{0}}, sums[2] = {{0}};
    for (int64_t i = 0; i < n; i++) {
        const u32 v = words_of(w, i * ld + k0, count, bytes);
        sum[0] += v & 0xffff;
        sums[0] += sum[0];
        if (bytes == 4) {
            sum[1] += v >> 16;
            sums[1] += sum[1];
        }
    }
    for (int half = 0; half < bytes / 2; half++)
        for (int lane = 0; lane < count; lane++) {
            plain[half * k + k0 + lane] = sum[half][lane];
            weighted[half * k + k0 + lane] = (uint32_t)(n + 1) * sum[half][lane] - sums[half][lane];
        }
}

/* Rows adjacent: along one column, sixteen rows at a time. Row 16 b + j is in lane j of step b. */
INLINE void along(const void *w, int64_t n, int64_t k, int64_t ld, uint32_t *plain, uint32_t *weighted, int64_t column, int bytes) {
    const uint32_t steps = (uint32_t)((n + 15) / 16);
    u32 sum[2] = {{0}}, sums[2] = {{0}};
    for (int64_t i = 0; i < n; i += 16) {
        const u32 v = words_of(w, column * ld + i, n - i, bytes);
        sum[0] += v & 0xffff;
        sums[0] += sum[0];
        if (bytes == 4) {
            sum[1] += v >> 16;
            sums[1] += sum[1];
        }
    }
    for (int half = 0; half < bytes / 2; half++) {
        uint32_t p = 0, q = 0;
        for (uint32_t lane = 0; lane < 16; lane++) {
            p += sum[half][lane];
            q += (lane + 1) * sum[half][lane] + 16 * (steps * sum[half][lane] - sums[half][lane]);
        }
        plain[half * k + column] = p;
        weighted[half * k + column] = q;
    }
}

/* plain and weighted (bytes / 2, k) of w, whose rows (rows_adjacent: columns) are `ld` numbers of `bytes` (2, 4) apart. */
int abft_fingerprint(const void *w, int64_t n, int64_t k, int64_t ld, int rows_adjacent, int bytes, uint32_t *plain, uint32_t *weighted,
                     int threads) {
    const int64_t units = rows_adjacent ? k : (k + 15) / 16;
    if (bytes != 2 && bytes != 4) return 1;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t unit = 0; unit < units; unit++) {
        if (rows_adjacent)
            bytes == 4 ? along(w, n, k, ld, plain, weighted, unit, 4) : along(w, n, k, ld, plain, weighted, unit, 2);
        else
            bytes == 4 ? down(w, n, k, ld, plain, weighted, 16 * unit, 4) : down(w, n, k, ld, plain, weighted, 16 * unit, 2);
    }
    return 0;
}
