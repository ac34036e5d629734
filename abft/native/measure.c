/* What abft/statistics/envelope.py wants to know of an output, in one pass: of the finite elements their sum, the sum of their squares
 * and their largest magnitude; how many are not finite. Sums are fp64, where no square of an fp32 number overflows. */
#include "vectors.h"

typedef int32_t i16 __attribute__((vector_size(64)));

INLINE void add(v16 v, d8 *sum, d8 *squares, v16 *most, i16 *wild) {
    const i16 bits = (i16)v & 0x7fffffff, finite = bits < 0x7f800000;
    const v16 magnitude = (v16)(bits & finite);
    const v16 kept = (v16)((i16)v & finite);
    *wild += ~finite & 1;
    const i16 more = magnitude > *most;
    *most = (v16)(((i16)magnitude & more) | ((i16)*most & ~more));
    for (int half = 0; half < 2; half++) {
        const d8 wide = __builtin_convertvector(((const v8 *)&kept)[half], d8);
        *sum += wide;
        *squares += wide * wide;
    }
}

INLINE void all_of(const void *y, int64_t n, int dtype, double *out) {
    d8 sum = {0}, squares = {0};
    v16 most = {0};
    i16 wild = {0};
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) add(sixteen_of(y, i, dtype), &sum, &squares, &most, &wild);
    if (i < n) add(some_of(y, i, n - i, dtype), &sum, &squares, &most, &wild);
    memset(out, 0, 4 * sizeof(double));
    for (int lane = 0; lane < 8; lane++) out[0] += sum[lane], out[1] += squares[lane];
    for (int lane = 0; lane < 16; lane++) {
        if (most[lane] > out[2]) out[2] = most[lane];
        out[3] += wild[lane];
    }
}

/* out: sum, sum of squares, largest magnitude, how many are not finite. y (n) adjacent. */
void abft_measure(const void *y, int64_t n, int dtype, double *out) {
    if (dtype == FP32)
        all_of(y, n, FP32, out);
    else if (dtype == BF16)
        all_of(y, n, BF16, out);
    else
        all_of(y, n, FP16, out);
}
