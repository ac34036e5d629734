/* The panel of a matrix W (n, k) in one pass: abft/checksum.py, encode, for one part per checksum.
 *
 *     s_j[g, k] = Σ_{n in g} w_j[n] W[n, k]                 in fp64: sums of equal numbers round the same way every time
 *     ν²[g, k]  = Σ_{n in g} W[n, k]² + Σ_j (s_j / w̄_j)²
 *     sketch_i  = ν · coefficient_i[k]
 *
 * Two orders of memory: W's rows adjacent in n (an activation or a transposed weight), or adjacent in k (a weight).
 */
#include "vectors.h"

/* Columns whose sums fill the registers; rows whose memory is asked for ahead. HALF: fp64 numbers of a register. */
enum { WIDE = LANES == 16 ? 32 : LANES, SOON = 16, HALF = LANES / 2, DOUBLES = FRAGMENT / HALF };

/* Where W's columns of checksums go, and by what they are weighted. */
typedef struct {
    int64_t n, k, width, groups, kinds, shared_sketch, ingress, dtype, step;
    const double *weights;     /* (kinds, padded width) w_j[n] of a group, padded by zeros to FRAGMENT */
    const double *last_weights; /* of the last group, if it is narrower */
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

INLINE vd half_of(vf v, int which) { return __builtin_convertvector(((const vh *)&v)[which], vd); }

INLINE double total(const vd *v) {
    double sum = 0;
    for (int i = 0; i < HALF; i++) sum += (*v)[i];
    return sum;
}

/* Sums (groups, kinds) and squares (groups) of n adjacent numbers. e is kept by lane, so lo is its lanes, weighted. */
INLINE void sum_row(const abft_layout *l, const void *x, int64_t first, double *sums, double *squares, int dtype) {
    static const double lanes[FRAGMENT] = {-15, -13, -11, -9, -7, -5, -3, -1, 1, 3, 5, 7, 9, 11, 13, 15};
    for (int64_t g = 0; g < l->groups; g++) {
        const int64_t start = g * l->width, width = l->n - start < l->width ? l->n - start : l->width;
        const double *signs = width < l->width ? l->last_signs : l->signs;
        double digit = -(double)((width + FRAGMENT - 1) / FRAGMENT - 1);
        vd e[DOUBLES] = {{0}}, one = {0}, hi = {0}, square[2] = {{0}};
        for (int64_t n = 0; n < width; n += FRAGMENT, digit += 2) {
            vd plain = {0}, weighted = {0};
            UNROLL for (int part = 0; part < PARTS; part++) {
                const int64_t at = n + part * LANES;
                const vf v = width - n >= FRAGMENT ? lanes_of(x, first + start + at, dtype)
                                                   : some_lanes(x, first + start + at, width - at, dtype);
                UNROLL for (int half = 0; half < 2; half++) {
                    const vd a = half_of(v, half), signed_ = a * *(const vd *)(signs + at + half * HALF);
                    e[2 * part + half] += signed_;
                    square[half] += a * a;
                    if (l->kinds == KINDS) plain += a, weighted += signed_;
                }
            }
            if (l->kinds == KINDS) {
                one += plain;
                hi += weighted * digit;
            }
        }
        vd lo = {0}, all = {0};
        UNROLL for (int i = 0; i < DOUBLES; i++) all += e[i], lo += e[i] * *(const vd *)(lanes + i * HALF);
        sums[g * l->kinds + E] = total(&all);
        if (l->kinds == KINDS) {
            sums[g * l->kinds + ONE] = total(&one);
            sums[g * l->kinds + HI] = total(&hi);
            sums[g * l->kinds + LO] = total(&lo);
        }
        square[0] += square[1];
        squares[g] = total(&square[0]);
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
            const double *w = width < l->width ? l->last_weights : l->weights;
            vd sum[KINDS + 1][WIDE / HALF] = {{{0}}};
#define ROW(LOAD, ...)                                                                                                     \
    UNROLL for (int part = 0; part < WIDE / LANES; part++) {                                                               \
        const vf v = LOAD(x, at + part * LANES, ##__VA_ARGS__, dtype);                                                     \
        UNROLL for (int half = 0; half < 2; half++) {                                                                      \
            const vd a = half_of(v, half);                                                                                 \
            sum[l->kinds][2 * part + half] += a * a;                                                                       \
            UNROLL for (int64_t j = 0; j < l->kinds; j++) sum[j][2 * part + half] += a * w[j * padded + n];                \
        }                                                                                                                  \
    }
            for (int64_t n = 0; n < width; n++) {
                const int64_t at = (start + n) * ld + k0;
                __builtin_prefetch((const char *)x + (at + SOON * ld) * (dtype == FP32 ? 4 : 2));
                if (count == WIDE) {
                    ROW(lanes_of)
                } else {
                    ROW(some_lanes, count - part * LANES)
                }
            }
#undef ROW
            for (int i = 0; i < WIDE; i++) {
                for (int64_t j = 0; j < l->kinds; j++) sums[(g * l->kinds + j) * WIDE + i] = sum[j][i / HALF][i % HALF];
                squares[g * WIDE + i] = sum[l->kinds][i / HALF][i % HALF];
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
