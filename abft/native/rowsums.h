/* The weighted sums of a row that checks compare: Σ w_j y for the weights e, one, hi, lo of abft/checksum.py, and Σ y². */
#ifndef ABFT_ROWSUMS_H
#define ABFT_ROWSUMS_H
#include "vectors.h"

/* Σ w_j y and Σ y² of one row of a group. lo is e weighted by the lane, so it needs no sum of its own. */
INLINE double group_sums(const void *y, int64_t start, int64_t width, const float *signs, int dtype, int full, double *sums) {
    v16 e = {0}, one = {0}, hi = {0}, squares = {0};
    float digit = -(float)((width + FRAGMENT - 1) / FRAGMENT - 1);
    for (int64_t n = 0; n < width; n += FRAGMENT, digit += 2) {
        v16 v = width - n < FRAGMENT ? some_of(y, start + n, width - n, dtype) : sixteen_of(y, start + n, dtype);
        v16 signed_ = v * *(const v16 *)(signs + n);
        e += signed_;
        squares += v * v;
        if (full) {
            one += v;
            hi += signed_ * digit;
        }
    }
    if (full) {
        const v16 lane = {-15, -13, -11, -9, -7, -5, -3, -1, 1, 3, 5, 7, 9, 11, 13, 15};
        *(d4 *)sums = __builtin_convertvector(sums16(e, one, hi, e * lane), d4);
    } else
        sums[E] = sum16(e);
    return sum16(squares);
}
#endif
