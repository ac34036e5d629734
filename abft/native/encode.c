/* The panel of a matrix W (n, k) in one pass: abft/checksum.py, encode, for one part per checksum.
 *
 *     s_j[g, k] = Σ_{n in g} w_j[n] W[n, k]                 in fp64: sums of equal numbers round the same way every time
 *     ν²[g, k]  = Σ_{n in g} W[n, k]² + Σ_j (s_j / w̄_j)²
 *     sketch_i  = ν · coefficient_i[k]
 *
 * Two orders of memory: W's rows adjacent in n (an activation or a transposed weight), or adjacent in k (a weight).
 */
#include "vectors.h"

enum { WIDE = 32 };

/* Where W's columns of checksums go, and by what they are weighted. */
typedef struct {
    int64_t n, k, width, groups, kinds, shared_sketch, ingress, dtype, step;
    const float *weights;      /* (kinds, padded width) w_j[n] of a group, padded by zeros to FRAGMENT */
    const float *last_weights; /* of the last group, if it is narrower */
    const float *coefficients; /* (SKETCHES, k), rows `step` apart */
    const double *signs;       /* (padded width) w_e, for sums along a row */
    const double *last_signs;
    double share[KINDS];       /* 1 / w̄_j² */
} abft_layout;

/* Panel columns (C, k) at column k: sums (groups, kinds), squares (groups) → checksums, sketches, ingress. */
INLINE void put(const abft_layout *l, float *out, int64_t k, const double *sums, int64_t step, const double *squares) {
    const int64_t sketches = l->groups * l->kinds;
    double nu2 = 0;
    for (int64_t g = 0; g < l->groups; g++) {
        if (!l->shared_sketch) nu2 = 0;
        nu2 += squares[g * step];
        for (int64_t j = 0; j < l->kinds; j++) {
            const double s = sums[(g * l->kinds + j) * step];
            out[(g * l->kinds + j) * l->k + k] = (float)s;
            nu2 += s * s * l->share[j];
        }
        if (!l->shared_sketch || g == l->groups - 1) {
            const int64_t first = sketches + (l->shared_sketch ? 0 : g * SKETCHES);
            const float nu = (float)sqrt(nu2);
            for (int i = 0; i < SKETCHES; i++) out[(first + i) * l->k + k] = nu * l->coefficients[i * l->step + k];
        }
    }
    if (l->ingress) {
        const float c = l->coefficients[k];
        out[(sketches + SKETCHES * (l->shared_sketch ? 1 : l->groups)) * l->k + k] = (float)((c > 0) - (c < 0));
    }
}

INLINE d8 low(v16 v) { return __builtin_convertvector(((v8 *)&v)[0], d8); }
INLINE d8 high(v16 v) { return __builtin_convertvector(((v8 *)&v)[1], d8); }

INLINE double total(d8 v) {
    const d4 half = ((d4 *)&v)[0] + ((d4 *)&v)[1];
    return (half[0] + half[2]) + (half[1] + half[3]);
}

/* Sums (groups, kinds) and squares (groups) of n adjacent numbers. e is kept by lane, so lo is its lanes, weighted. */
INLINE void sum_row(const abft_layout *l, const void *x, int64_t first, double *sums, double *squares, int dtype) {
    const d8 lane0 = {-15, -13, -11, -9, -7, -5, -3, -1}, lane1 = {1, 3, 5, 7, 9, 11, 13, 15};
    for (int64_t g = 0; g < l->groups; g++) {
        const int64_t start = g * l->width, width = l->n - start < l->width ? l->n - start : l->width;
        const double *signs = width < l->width ? l->last_signs : l->signs;
        double digit = -(double)((width + FRAGMENT - 1) / FRAGMENT - 1);
        d8 e0 = {0}, e1 = {0}, one = {0}, hi = {0}, square = {0};
        for (int64_t n = 0; n < width; n += FRAGMENT, digit += 2) {
            const int64_t at = first + start + n;
            const v16 v = width - n < FRAGMENT ? some_of(x, at, width - n, dtype) : sixteen_of(x, at, dtype);
            const d8 a = low(v), b = high(v), signed_a = a * *(const d8 *)(signs + n), signed_b = b * *(const d8 *)(signs + n + 8);
            e0 += signed_a, e1 += signed_b;
            square += a * a + b * b;
            if (l->kinds == KINDS) {
                one += a + b;
                hi += (signed_a + signed_b) * digit;
            }
        }
        sums[g * l->kinds + E] = total(e0 + e1);
        if (l->kinds == KINDS) {
            sums[g * l->kinds + ONE] = total(one);
            sums[g * l->kinds + HI] = total(hi);
            sums[g * l->kinds + LO] = total(e0 * lane0 + e1 * lane1);
        }
        squares[g] = total(square);
    }
}

INLINE void encode_rows(const abft_layout *l, const void *x, int64_t ld, float *out, double *room, int64_t from, int64_t to, int dtype) {
    double *sums = room, *squares = room + l->groups * l->kinds;
    for (int64_t k = from; k < to; k++) {
        sum_row(l, x, k * ld, sums, squares, dtype);
        put(l, out, k, sums, 1, squares);
    }
}

INLINE void encode_columns(const abft_layout *l, const void *x, int64_t ld, float *out, double *room, int64_t from, int64_t to, int dtype) {
    double *sums = room, *squares = room + l->groups * l->kinds * WIDE;
    for (int64_t block = from; block < to; block++) {
        const int64_t k0 = block * WIDE, count = l->k - k0 < WIDE ? l->k - k0 : WIDE;
        for (int64_t g = 0; g < l->groups; g++) {
            const int64_t start = g * l->width, width = l->n - start < l->width ? l->n - start : l->width;
            const int64_t padded = (width + FRAGMENT - 1) / FRAGMENT * FRAGMENT;
            const float *w = width < l->width ? l->last_weights : l->weights;
            d8 sum[KINDS][WIDE / 8] = {{{0}}}, square[WIDE / 8] = {{0}};
            for (int64_t n = 0; n < width; n++) {
                const int64_t at = (start + n) * ld + k0;
                UNROLL for (int half = 0; half < WIDE / 16; half++) {
                    const int64_t left = count - 16 * half;
                    const v16 v = left < 16 ? some_of(x, at + 16 * half, left, dtype) : sixteen_of(x, at + 16 * half, dtype);
                    const d8 a = low(v), b = high(v);
                    square[2 * half] += a * a, square[2 * half + 1] += b * b;
                    UNROLL for (int64_t j = 0; j < l->kinds; j++) {
                        const double weight = (double)w[j * padded + n];
                        sum[j][2 * half] += weight * a, sum[j][2 * half + 1] += weight * b;
                    }
                }
            }
            for (int i = 0; i < WIDE; i++) {
                for (int64_t j = 0; j < l->kinds; j++) sums[(g * l->kinds + j) * WIDE + i] = sum[j][i / 8][i % 8];
                squares[g * WIDE + i] = square[i / 8][i % 8];
            }
        }
        for (int64_t i = 0; i < count; i++) put(l, out, k0 + i, sums + i, WIDE, squares + i);
    }
}

/* out (C, k) = the panel of W, whose rows (rows_adjacent: columns) are `ld` numbers apart. 0, or 1 if memory is short. */
int abft_encode(const abft_layout *l, const void *w, int64_t ld, int rows_adjacent, float *out, int threads) {
    const int64_t units = rows_adjacent ? l->k : (l->k + WIDE - 1) / WIDE;
    const int64_t each = l->groups * (l->kinds + 1) * (rows_adjacent ? 1 : WIDE);
    int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(|| : failed)
    {
        const int64_t thread = thread_number(), team = thread_count();
        double *room = (double *)scratch(2, 2 * each);
        if (room) {
            const int64_t from = units * thread / team, to = units * (thread + 1) / team;
            const abft_layout full = *l;
#define WITH(KIND_COUNT, DTYPE)                                                                                              \
    {                                                                                                                        \
        abft_layout known = full;                                                                                            \
        known.kinds = KIND_COUNT;                                                                                            \
        rows_adjacent ? encode_rows(&known, w, ld, out, room, from, to, DTYPE)                                               \
                      : encode_columns(&known, w, ld, out, room, from, to, DTYPE);                                           \
    }
            if (l->kinds == KINDS) {
                if (l->dtype == FP32) WITH(KINDS, FP32) else if (l->dtype == BF16) WITH(KINDS, BF16) else WITH(KINDS, FP16)
            } else {
                if (l->dtype == FP32) WITH(1, FP32) else if (l->dtype == BF16) WITH(1, BF16) else WITH(1, FP16)
            }
        } else
            failed = 1;
    }
    return failed;
}

/* What a bias (n) adds: its sums (groups, kinds), and to the squared noise (groups): one more k with input 1. */
void abft_bias(const abft_layout *l, const void *bias, float *sums, float *noise2) {
    double *room = (double *)scratch(2, 2 * l->groups * (l->kinds + 1)), *squares = room + l->groups * l->kinds;
    for (int64_t g = 0; g < l->groups; g++) noise2[g] = NAN; /* without memory nothing is judged by this */
    if (!room) return;
    if (l->dtype == FP32)
        sum_row(l, bias, 0, room, squares, FP32);
    else if (l->dtype == BF16)
        sum_row(l, bias, 0, room, squares, BF16);
    else
        sum_row(l, bias, 0, room, squares, FP16);
    for (int64_t g = 0; g < l->groups; g++) {
        double noise = squares[g];
        for (int64_t j = 0; j < l->kinds; j++) {
            const double s = room[g * l->kinds + j];
            sums[g * l->kinds + j] = (float)s;
            noise += s * s * l->share[j];
        }
        noise2[g] = (float)noise;
    }
}
