/* The weighted sums of a row that checks compare: Σ w_j y for the weights e, one, hi, lo of abft/checksum.py, and Σ y². */
#ifndef ABFT_ROWSUMS_H
#define ABFT_ROWSUMS_H
#include "vectors.h"

/* Numbers of a result whose memory is asked for ahead: it has left the nearest caches since it was computed. */
enum { AHEAD = 512 };

/* Of one group of so many rows, `ld` numbers apart: sums (rows, `step` apart), squares (rows). A row takes what its chains of additions
   wait, two take hardly more together. lo is e weighted by the lane, so it needs no sum of its own. */
INLINE void sums_of_rows(const void *y, int64_t start, int64_t ld, int rows, int64_t width, const float *signs, int dtype, int full,
                         double *sums, int64_t step, double *squares) {
    vf e[2][PARTS] = {{{0}}}, square[2][PARTS] = {{{0}}}, one[2] = {{0}}, hi[2] = {{0}};
    float digit = -(float)((width + FRAGMENT - 1) / FRAGMENT - 1);
    for (int64_t n = 0; n < width; n += FRAGMENT, digit += 2) {
        const int whole = width - n >= FRAGMENT;
        UNROLL for (int r = 0; r < rows; r++) {
            vf v[PARTS], signed_[PARTS];
            UNROLL for (int i = 0; i < PARTS; i++) {
                const int64_t at = start + r * ld + n + i * LANES;
                if (i == 0) __builtin_prefetch((const char *)y + (at + AHEAD) * (dtype == FP32 ? 4 : 2));
                v[i] = whole ? lanes_of(y, at, dtype) : some_lanes(y, at, width - n - i * LANES, dtype);
                signed_[i] = v[i] * *(const vf *)(signs + n + i * LANES);
                e[r][i] += signed_[i];
                square[r][i] += v[i] * v[i];
            }
            if (full) {
                UNROLL for (int i = 1; i < PARTS; i++) v[0] += v[i], signed_[0] += signed_[i];
                one[r] += v[0];
                hi[r] += signed_[0] * digit;
            }
        }
    }
    static const float lanes[FRAGMENT] = {-15, -13, -11, -9, -7, -5, -3, -1, 1, 3, 5, 7, 9, 11, 13, 15};
    UNROLL for (int r = 0; r < rows; r++) {
        vf lo = e[r][0] * *(const vf *)lanes;
        UNROLL for (int i = 1; i < PARTS; i++) {
            lo += e[r][i] * *(const vf *)(lanes + i * LANES);
            e[r][0] += e[r][i];
            square[r][0] += square[r][i];
        }
        if (full)
            *(d4 *)(sums + r * step) = __builtin_convertvector(sum_four(e[r][0], one[r], hi[r], lo), d4);
        else
            sums[r * step + E] = sum_lanes(e[r][0]);
        squares[r] = sum_lanes(square[r][0]);
    }
}

/* … of one row; returns Σ y². */
INLINE double group_sums(const void *y, int64_t start, int64_t width, const float *signs, int dtype, int full, double *sums) {
    double square;
    sums_of_rows(y, start, 0, 1, width, signs, dtype, full, sums, KINDS, &square);
    return square;
}
#endif
