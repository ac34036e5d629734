/* What attention's forward and backward share: products, packing, the exponentials, the comparison of sums. */
#ifndef ABFT_ATTENTION_H
#define ABFT_ATTENTION_H
#include "vectors.h"

enum { CHUNK = 128, PANEL = 16, COLUMN_OF_ONES = KINDS, BLOCK = 64, BLOCK_SCORES = 96 * 1024, AHEAD = 16 };
enum { NO_MASK, SEEN, ADDED }; /* a mask: bool (true: seen), or fp32, added to the scores */
enum { IN_SCORES = 1, IN_PROBABILITIES, IN_SUM, IN_OUT, IN_DP, IN_DELTA, IN_DX, IN_DQ, IN_DK, IN_DV };
/* Sixteen lanes are PARTS registers. TALL: rows of an accumulator of up to three registers' columns, that fits in all of them.
   PANEL_VECTORS: those of a panel that hold anything: at most eight columns. */
#ifdef __AVX512F__
enum { TALL = 8, PANEL_VECTORS = 1 };
#else
enum { TALL = 4, PANEL_VECTORS = 8 / LANES };
#endif
typedef int32_t mn __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint8_t bn __attribute__((vector_size(LANES), aligned(1), may_alias));
enum { WIDE = LANES / 2 }; /* doubles of a register */
typedef int64_t m4 __attribute__((vector_size(32)));
#define EACH_PART(I) UNROLL for (int I = 0; I < PARTS; I++)

/* How sums over a group of columns are weighted and judged: bound² = accumulate2 · (Σ y² + c² + noise) + absolute2. */
typedef struct {
    int64_t width;
    const float *weights; /* (KINDS, padded width) */
    double accumulate2[KINDS], absolute2[KINDS], share[KINDS];
} abft_group;

typedef struct {
    int64_t row, product; /* row: of all heads' queries, or keys; product: IN_SCORES, IN_PROBABILITIES, IN_OUT, IN_DP, IN_DX … IN_DV */
    double residual, bound;
} abft_place;

typedef struct {
    int64_t batch, heads, members, length, keys, width, depth; /* q (batch, heads, members, length, width), v (…, keys, depth) */
    int64_t dtype, mask_kind, checked, causal, offset, window;
    int64_t qs[4], ks[3], vs[3], os[4], ms[4]; /* steps, in numbers; a row's numbers are adjacent */
    const void *q, *k, *v, *mask;
    float *out, *maxima, *sums; /* maxima, sums (batch, heads, members, length) */
    double scale, softmax_bound, range, largest2;
    abft_group keys_group, last_keys, columns;
    int64_t strike, strike_row, strike_column; /* for tests: where `strike_value` takes a number's place */
    double strike_value;
    double worst2[2]; /* found: (residual / bound)² of S; of the softmax and O */
    int64_t count;    /* … and how many rows are suspect */
    abft_place *places; /* (rows) */
} abft_attended;

static const int32_t COUNTED[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

INLINE vf pick(mn where, vf a, vf b) { return (vf)(((mn)a & where) | ((mn)b & ~where)); }

INLINE int64_t sixteens(int64_t n) { return (n + 15) / 16 * 16; }
INLINE int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }

/* The larger number; b where one of them is none. */
INLINE vf larger(vf a, vf b) {
#if defined(__AVX512F__)
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX__)
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return pick(a > b, a, b);
#endif
}

/* a · b + c, rounded once wherever a processor can. */
INLINE vf fma_of(vf a, vf b, vf c) {
#if defined(__AVX512F__)
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

INLINE vf at(const float *p) { return *(const vf *)p; }
INLINE vf first_numbers(const float *p, int64_t count) {
    vf out = {0};
    if (count > 0) memcpy(&out, p, (count < LANES ? count : LANES) * sizeof(float));
    return out;
}
INLINE vf size_of_each(vf x) { return (vf)((vu)x & 0x7fffffffu); }

/* Sixteen lanes added to four. */
INLINE v4 folded(const vf *parts) {
#if defined(__AVX512F__)
    const v8 a = (v8)_mm512_castps512_ps256((__m512)parts[0]) + (v8)_mm256_castpd_ps(_mm512_extractf64x4_pd((__m512d)parts[0], 1));
    return (v4)_mm256_castps256_ps128((__m256)a) + (v4)_mm256_extractf128_ps((__m256)a, 1);
#elif defined(__AVX__)
    const v8 a = parts[0] + parts[1];
    return (v4)_mm256_castps256_ps128((__m256)a) + (v4)_mm256_extractf128_ps((__m256)a, 1);
#else
    v16 whole;
    EACH_PART(i) memcpy((float *)&whole + i * LANES, parts + i, sizeof(vf));
    return fold(whole);
#endif
}

/* … and to one, in the order of sum16. */
INLINE double total_of(const vf *parts) {
    const v4 b = folded(parts);
    return (double)((b[0] + b[2]) + (b[1] + b[3]));
}

/* The sums of four. */
INLINE d4 totals_of(const vf *a, const vf *b, const vf *c, const vf *d) {
    const v4 p = folded(a), q = folded(b), r = folded(c), s = folded(d);
#ifdef __AVX__
    return (d4)_mm256_cvtps_pd(_mm_hadd_ps(_mm_hadd_ps((__m128)p, (__m128)q), _mm_hadd_ps((__m128)r, (__m128)s)));
#else
    return (d4){(p[0] + p[1]) + (p[2] + p[3]), (q[0] + q[1]) + (q[2] + q[3]), (r[0] + r[1]) + (r[2] + r[3]), (s[0] + s[1]) + (s[2] + s[3])};
#endif
}

INLINE float largest_of(const vf *parts) {
    vf most = parts[0];
    for (int i = 1; i < PARTS; i++) most = larger(most, parts[i]);
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)most);
#elif defined(__AVX__)
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128((__m256)most), _mm256_extractf128_ps((__m256)most, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
#else
    float m = most[0];
    for (int i = 1; i < LANES; i++) m = most[i] > m ? most[i] : m;
    return m;
#endif
}

/* Vectors whose exponentials are computed beside each other: of one alone every step would wait for the step before. */
enum { ABREAST = PARTS > 1 ? PARTS : 4, STRIDE = ABREAST * LANES };
#define EACH(I, COUNT) UNROLL for (int I = 0; I < (COUNT); I++)

/* A constant for all of them: read once, it stays in its register. */
INLINE vf same(float number) {
    vf out = number - (vf){0};
    HOLD(out);
    return out;
}

/* y = y · x + a constant */
INLINE void next_power(vf *y, const vf *x, float constant, int count) {
    const vf c = same(constant);
    EACH(i, count) y[i] = fma_of(y[i], x[i], c);
}

/* x = r + n ln 2: z becomes 2ⁿ, x what n · high leaves of it. */
INLINE void reduce(vf *x, vf *n, vf *z, float least, float high, int count) {
    const vf magic = same(12582912.0f); /* 1.5 · 2²³: adding it rounds to an integer, whose bits are the lowest */
    const vf none = same(least), log2e = same(1.44269504088896341f), minus = same(-high);
    EACH(i, count) x[i] = larger(none, x[i]);
    EACH(i, count) z[i] = fma_of(x[i], log2e, magic);
    EACH(i, count) n[i] = z[i] - magic;
    EACH(i, count) x[i] = fma_of(n[i], minus, x[i]);
    const vu one = (vu)same(1.0f);
    EACH(i, count) z[i] = (vf)(((vu)z[i] << 23) + one);
}

/* x = exp(x), of what is at most 88, within 2 ulp; 0 below exp(-87.7). ln 2 in two parts: Cephes' expf (S. Moshier); the polynomial is
   fitted to 5 · 10⁻⁹ of exp on ±ln 2 / 2. */
INLINE void exp_of(vf *x, int count) {
    vf z[ABREAST], y[ABREAST];
    reduce(x, y, z, -88.0f, 0.693359375f, count); /* the power of two of -88 is 0 */
    const vf low = same(2.12194440e-4f), first = same(1.3814598592e-3f), second = same(8.3687169665e-3f);
    EACH(i, count) x[i] = fma_of(y[i], low, x[i]);
    EACH(i, count) y[i] = fma_of(x[i], first, second);
    next_power(y, x, 4.1668388053e-2f, count);
    next_power(y, x, 0.16666520631f, count);
    next_power(y, x, 0.49999993448f, count);
    next_power(y, x, 1.0f, count);
    next_power(y, x, 1.0f, count);
    EACH(i, count) x[i] = y[i] * z[i];
}

/* The roots of exp(2y), of what is at most 0: another polynomial (fitted to 1.2 · 10⁻⁷ of exp on ±ln 2 / 2, 1 at 0), of another
   argument. Below exp(-87)² a square is that: nothing beside a sum of 1. */
INLINE void root_of_exp(vf *y, int count) {
    vf p[ABREAST], z[ABREAST];
    reduce(y, p, z, -87.0f, 0.69314718056f, count);
    const vf first = same(8.3099640906e-3f), second = same(4.1895508766e-2f);
    EACH(i, count) p[i] = fma_of(y[i], first, second);
    next_power(p, y, 1.6667307913e-1f, count);
    next_power(p, y, 4.9999168515e-1f, count);
    next_power(p, y, 9.9999982119e-1f, count);
    next_power(p, y, 1.0f, count);
    EACH(i, count) y[i] = p[i] * z[i];
}

/* --- products --------------------------------------------------------------------------------------------- */

/* c (TALL, N vectors) = a (TALL, depth) · b (depth, …), or added to what is there. Of the vectors the first `of_c` lie in c, the others
   in `panel`. */
#define MULTIPLY(NAME, N)                                                                                                  \
    INLINE void NAME(const float *a, int64_t lda, const float *b, int64_t ldb, int64_t depth, float *c, int64_t ldc, int64_t of_c, \
                     float *panel, int first) {                                                                            \
        vf sum[TALL][N];                                                                                                   \
        UNROLL for (int r = 0; r < TALL; r++) UNROLL for (int j = 0; j < N; j++) sum[r][j] = (vf){0};                      \
        for (int64_t k = 0; k < depth; k++) {                                                                              \
            vf p[N];                                                                                                       \
            UNROLL for (int j = 0; j < N; j++) {                                                                           \
                p[j] = at(b + k * ldb + j * LANES);                                                                        \
                HOLD(p[j]);                                                                                                \
            }                                                                                                              \
            UNROLL for (int r = 0; r < TALL; r++) UNROLL for (int j = 0; j < N; j++) sum[r][j] += a[r * lda + k] * p[j];   \
        }                                                                                                                  \
        UNROLL for (int j = 0; j < N; j++) {                                                                               \
            float *column = j < of_c ? c + j * LANES : panel + (j - of_c) * LANES;                                         \
            const int64_t step = j < of_c ? ldc : PANEL;                                                                   \
            UNROLL for (int r = 0; r < TALL; r++) {                                                                        \
                vf *to = (vf *)(column + r * step);                                                                        \
                if (!first) sum[r][j] += *to;                                                                              \
                *to = sum[r][j];                                                                                           \
            }                                                                                                              \
        }                                                                                                                  \
    }
MULTIPLY(multiply_1, 1)
MULTIPLY(multiply_2, 2)
MULTIPLY(multiply_3, 3)

/* Vectors of the next tile of `left` of them: three, and two where three would leave one alone, whose sums would wait for each other. */
INLINE int tile_of(int64_t left) { return left >= 5 || left == 3 ? 3 : left == 1 ? 1 : 2; }

/* c (rows, n) = a (rows, depth) · b (depth, n), and panel (rows, PANEL) = a · the columns behind b's n. rows: a multiple of 8, n of 16. */
static __attribute__((noinline)) void product(const float *a, int64_t lda, int64_t rows, const float *b, int64_t ldb, int64_t n, int64_t depth,
                                              float *c, int64_t ldc, float *panel, int first) {
    const int64_t of_c = n / LANES, all = of_c + (panel ? PANEL_VECTORS : 0);
    for (int64_t k0 = 0; k0 < depth; k0 += CHUNK, first = 0) {
        const int64_t deep = at_most(CHUNK, depth - k0);
        for (int64_t r = 0; r < rows; r += TALL) {
            const float *left = a + r * lda + k0, *right = b + k0 * ldb;
            float *to = c + r * ldc, *sums = panel ? panel + r * PANEL : NULL;
            for (int64_t j = 0, tile; j < all; j += tile) {
                tile = tile_of(all - j);
                if (tile == 3)
                    multiply_3(left, lda, right + j * LANES, ldb, deep, to + j * LANES, ldc, of_c - j, sums, first);
                else if (tile == 2)
                    multiply_2(left, lda, right + j * LANES, ldb, deep, to + j * LANES, ldc, of_c - j, sums, first);
                else
                    multiply_1(left, lda, right + j * LANES, ldb, deep, to + j * LANES, ldc, of_c - j, sums, first);
            }
        }
    }
}

/* Rows of a head lie far apart, a page or more: nobody but us knows which is next. */
INLINE void soon(const void *p, int64_t i, int dtype) { __builtin_prefetch((const char *)p + i * (dtype == FP32 ? 4 : 2)); }


/* Squares of less than this in sum may have underflowed, and would leave the bound too small: they are summed again in fp64. */
#define TINY 1e-30

/* Σ (a b)² and, without a b, Σ a². */
static __attribute__((noinline, cold)) double in_full(const float *a, const float *b, int64_t count) {
    double sum = 0;
    for (int64_t n = 0; n < count; n++) {
        const double z = (double)a[n] * (b ? b[n] : 1.0);
        sum += z * z;
    }
    return sum;
}

/* Σ w_j y and Σ y² of a row, with what else is to be added to its squares: as rowsums.h's, in registers. */
INLINE double sums_of_group(const void *y, int64_t start, int64_t width, const float *signs, int dtype, const vf *others, double *sums) {
    vf e[PARTS], one[PARTS], hi[PARTS], squares[PARTS], low[PARTS];
    EACH_PART(i) {
        e[i] = one[i] = hi[i] = (vf){0};
        squares[i] = others ? others[i] : (vf){0};
        for (int j = 0; j < LANES; j++) low[i][j] = 2 * (i * LANES + j) - 15;
    }
    float digit = -(float)((width + FRAGMENT - 1) / FRAGMENT - 1);
    for (int64_t n = 0; n < width; n += FRAGMENT, digit += 2)
        EACH_PART(i) {
            const vf v = lanes_at_most(y, start + n + i * LANES, width - n - i * LANES, dtype);
            const vf signed_ = v * at(signs + n + i * LANES);
            e[i] += signed_;
            one[i] += v;
            hi[i] = fma_of(signed_, digit - (vf){0}, hi[i]);
            squares[i] = fma_of(v, v, squares[i]);
        }
    EACH_PART(i) low[i] *= e[i];
    *(d4 *)sums = totals_of(e, one, hi, low);
    return total_of(squares);
}

/* --- what is multiplied by, packed with its panel ------------------------------------------------------------- */

/* Weighted sums over keys of 2 · WIDE columns, in fp64; `hi` is e weighted by the key's sixteen. */
INLINE void sums_over_keys(const float *columns, int64_t ld, int64_t keys, const float *weights, int64_t table, double (*sums)[16]) {
    const int64_t last = (keys + FRAGMENT - 1) / FRAGMENT - 1;
    vd total[KINDS + 1][2];
    for (int j = 0; j <= KINDS; j++) total[j][0] = total[j][1] = (vd){0};
    for (int64_t n0 = 0; n0 < keys; n0 += FRAGMENT) {
        vd e[2] = {{0}, {0}}, one[2] = {{0}, {0}}, lo[2] = {{0}, {0}}, squares[2] = {{0}, {0}};
        for (int64_t n = n0; n < at_most(n0 + FRAGMENT, keys); n++) {
            const double sign = weights[n], low = weights[LO * table + n];
            UNROLL for (int i = 0; i < 2; i++) {
                const vd x = __builtin_convertvector(*(const vh *)(columns + n * ld + i * WIDE), vd);
                e[i] += sign * x;
                one[i] += x;
                lo[i] += low * x;
                squares[i] += x * x;
            }
        }
        UNROLL for (int i = 0; i < 2; i++) {
            total[E][i] += e[i];
            total[ONE][i] += one[i];
            total[HI][i] += (double)(2 * (n0 / FRAGMENT) - last) * e[i];
            total[LO][i] += lo[i];
            total[KINDS][i] += squares[i];
        }
    }
    for (int j = 0; j <= KINDS; j++) memcpy(sums[j], total[j], sizeof(total[j]));
}

/* to (columns, ld) = the first so many columns of from (rows, 16); rows: a multiple of 16. */
INLINE void turn(const float *from, int64_t rows, int64_t columns, float *to, int64_t ld) {
#ifdef __AVX__
    for (int64_t e = 0; e < columns; e += 8)
        for (int64_t n = 0; n < rows; n += 8) {
            __m256 a[8], b[8];
            UNROLL for (int i = 0; i < 8; i++) a[i] = _mm256_loadu_ps(from + (n + i) * 16 + e);
            UNROLL for (int i = 0; i < 8; i += 2) {
                b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
                b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
            }
            UNROLL for (int i = 0; i < 8; i += 4) UNROLL for (int j = 0; j < 2; j++) {
                a[i + 2 * j] = _mm256_shuffle_ps(b[i + j], b[i + 2 + j], 0x44);
                a[i + 2 * j + 1] = _mm256_shuffle_ps(b[i + j], b[i + 2 + j], 0xee);
            }
            UNROLL for (int i = 0; i < 4; i++) {
                b[i] = _mm256_permute2f128_ps(a[i], a[i + 4], 0x20);
                b[i + 4] = _mm256_permute2f128_ps(a[i], a[i + 4], 0x31);
            }
            UNROLL for (int i = 0; i < 8; i++)
                if (e + i < columns) _mm256_storeu_ps(to + (e + i) * ld + n, b[i]);
        }
#else
    for (int64_t e = 0; e < columns; e++)
        for (int64_t n = 0; n < rows; n++) to[e * ld + n] = from[n * 16 + e];
#endif
}

/* Some keys, transposed: packed (width, ld) with their weighted sums behind `padded` keys; nu (padded width): the noise of each column. */
INLINE void pack_keys(const void *k, int64_t step, int64_t keys, int64_t width, const abft_group *g, float *packed, int64_t padded,
                      int64_t ld, float *nu, int checked, int dtype) {
    for (int64_t e0 = 0; e0 < width; e0 += 16) {
        const int64_t some = at_most(16, width - e0);
        float columns[CHUNK][16] __attribute__((aligned(64)));
        for (int64_t n = 0; n < keys; n++) {
            if (n + AHEAD < keys) soon(k, (n + AHEAD) * step + e0, dtype);
            EACH_PART(i) *(vf *)(columns[n] + i * LANES) = lanes_at_most(k, n * step + e0 + i * LANES, some - i * LANES, dtype);
        }
        memset(columns[keys], 0, (padded - keys) * sizeof(columns[0]));
        turn(columns[0], padded, some, packed + e0 * ld, ld);
        if (!checked) continue;
        double sums[16 / (2 * WIDE)][KINDS + 1][16];
        for (int i = 0; i < 16 / (2 * WIDE); i++)
            sums_over_keys(columns[0] + i * 2 * WIDE, 16, keys, g->weights, sixteens(g->width), sums[i]);
        for (int64_t e = 0; e < 16; e++) {
            double (*const mine)[16] = sums[e / (2 * WIDE)];
            const int64_t at = e % (2 * WIDE);
            double nu2 = mine[KINDS][at];
            for (int j = 0; j < PANEL && e < some; j++) packed[(e0 + e) * ld + padded + j] = j < KINDS ? (float)mine[j][at] : 0.0f;
            for (int j = 0; j < KINDS; j++) nu2 += mine[j][at] * mine[j][at] * g->share[j];
            nu[e0 + e] = (float)sqrt(nu2);
        }
    }
}

/* Values as they lie: packed (keys, ld) with each row's weighted sums and a one behind `padded` columns; nu (keys): the noise of each. */
INLINE void pack_values(const void *v, int64_t step, int64_t keys, int64_t depth, const abft_group *g, float *packed, int64_t padded,
                        int64_t ld, float *nu, int checked, int dtype) {
    for (int64_t t = 0; t < keys; t++) {
        float *to = packed + t * ld;
        for (int64_t d = 0; d < padded; d += 16) {
            if (t + AHEAD < keys) soon(v, (t + AHEAD) * step + d, dtype);
            EACH_PART(i) *(vf *)(to + d + i * LANES) = lanes_at_most(v, t * step + d + i * LANES, depth - d - i * LANES, dtype);
        }
        if (!checked) continue;
        /* Of the values themselves: their copy may be wrong. */
        double sums[KINDS] __attribute__((aligned(32))), nu2 = sums_of_group(v, t * step, depth, g->weights, dtype, NULL, sums);
        *(v16 *)(to + padded) = (v16){0};
        if (__builtin_expect(nu2 < TINY, 0)) nu2 = in_full(to, NULL, depth);
        for (int j = 0; j < KINDS; j++) {
            to[padded + j] = (float)sums[j];
            nu2 += sums[j] * sums[j] * g->share[j];
        }
        to[padded + COLUMN_OF_ONES] = 1.0f;
        nu[t] = (float)sqrt(nu2);
    }
}

/* --- the softmax of a row --------------------------------------------------------------------------------------- */

/* The keys [first, last) that a row sees. */
typedef struct {
    int64_t first, last;
    const char *mask; /* of the row */
} seen_keys;

/* Which of LANES bytes are not zero. */
INLINE mn not_zero(const char *bytes) {
#if defined(__AVX512F__)
    return (mn)(_mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)bytes))) != 0;
#elif defined(__AVX2__)
    return (mn)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)bytes)) != 0;
#else
    return __builtin_convertvector(*(const bn *)bytes, mn) != 0;
#endif
}

/* LANES of a row's logits, all of them keys that it may see. */
INLINE vf logits_inside(const float *s, int64_t n, const seen_keys *w, int mask_kind) {
    if (mask_kind == SEEN) return pick(not_zero(w->mask + n), at(s + n), -INFINITY - (vf){0});
    if (mask_kind == ADDED) return at(s + n) + at((const float *)w->mask + n);
    return at(s + n);
}

/* … of them some. */
INLINE vf logits(const float *s, int64_t n, const seen_keys *w, int64_t keys, int mask_kind) {
    if (n >= w->first && n + LANES <= w->last) return logits_inside(s, n, w, mask_kind);
    const mn key = *(const mn *)COUNTED + (int32_t)n;
    vf x = at(s + n);
    if (mask_kind == SEEN) {
        char bytes[LANES] = {0};
        if (n < keys) memcpy(bytes, w->mask + n, at_most(LANES, keys - n));
        x = pick(not_zero(bytes), x, -INFINITY - (vf){0});
    } else if (mask_kind == ADDED)
        x += first_numbers((const float *)w->mask + n, keys - n);
    return pick((key >= (int32_t)w->first) & (key < (int32_t)w->last), x, -INFINITY - (vf){0});
}

INLINE float maximum(const float *s, const seen_keys *w, int64_t keys, int mask_kind) {
    vf m[PARTS];
    EACH_PART(i) m[i] = -INFINITY - (vf){0};
    int64_t n = w->first / 16 * 16;
    for (; n < w->first; n += 16) EACH_PART(i) m[i] = larger(m[i], logits(s, n + i * LANES, w, keys, mask_kind));
    for (; n + 16 <= w->last; n += 16) EACH_PART(i) m[i] = larger(m[i], logits_inside(s, n + i * LANES, w, mask_kind));
    for (; n < w->last; n += 16) EACH_PART(i) m[i] = larger(m[i], logits(s, n + i * LANES, w, keys, mask_kind));
    const float found = largest_of(m);
    return found == -INFINITY ? 0.0f : found;
}

/* `count` vectors of a row, from key n on: p = exp(x - m), which is written to `p`; or, `again`, exp(½x - ½m)². Added to `sum`. */
INLINE void add_exponentials(const float *s, float m, float *p, int64_t n, const seen_keys *w, int64_t keys, int mask_kind, int again,
                             int inside, int count, vf *sum) {
    vf x[ABREAST];
    EACH(i, count) x[i] = inside ? logits_inside(s, n + i * LANES, w, mask_kind) : logits(s, n + i * LANES, w, keys, mask_kind);
    if (again) {
        EACH(i, count) x[i] = x[i] * 0.5f - m * 0.5f;
        root_of_exp(x, count);
        EACH(i, count) sum[i % PARTS] = fma_of(x[i], x[i], sum[i % PARTS]);
    } else {
        EACH(i, count) x[i] -= m;
        exp_of(x, count);
        EACH(i, count) *(vf *)(p + n + i * LANES) = x[i];
        EACH(i, count) sum[i % PARTS] += x[i];
    }
}

/* Their sum, of each CHUNK, then of these: l, of both kinds. */
INLINE float exponentials(const float *s, float m, float *p, const seen_keys *w, int64_t keys, int mask_kind, int again) {
    vf total[PARTS] = {{0}};
    for (int64_t c = w->first / CHUNK * CHUNK; c < w->last; c += CHUNK) {
        vf sum[PARTS];
        EACH_PART(i) sum[i] = (vf){0};
        const int64_t end = at_most(c + CHUNK, w->last);
        int64_t n = at_least(c, w->first / 16 * 16);
        for (; n < w->first; n += 16) add_exponentials(s, m, p, n, w, keys, mask_kind, again, 0, PARTS, sum);
        for (; n + STRIDE <= end; n += STRIDE) add_exponentials(s, m, p, n, w, keys, mask_kind, again, 1, ABREAST, sum);
        for (; n < end; n += 16) add_exponentials(s, m, p, n, w, keys, mask_kind, again, 0, PARTS, sum);
        EACH_PART(i) total[i] += sum[i];
    }
    return (float)total_of(total);
}

/* One function for each kind of mask. */
#define WITH_MASK(NAME, KIND)                                                                                              \
    static __attribute__((noinline)) float maximum_##NAME(const float *s, const seen_keys *w, int64_t keys) {              \
        return maximum(s, w, keys, KIND);                                                                                  \
    }                                                                                                                      \
    static __attribute__((noinline)) float sum_##NAME(const float *s, float m, float *p, const seen_keys *w, int64_t keys) { \
        return exponentials(s, m, p, w, keys, KIND, 0);                                                                    \
    }                                                                                                                      \
    static __attribute__((noinline)) float squares_##NAME(const float *s, float m, const seen_keys *w, int64_t keys) {     \
        return exponentials(s, m, NULL, w, keys, KIND, 1);                                                                 \
    }
WITH_MASK(plain, NO_MASK)
WITH_MASK(seen, SEEN)
WITH_MASK(added, ADDED)

typedef struct {
    float (*maximum)(const float *, const seen_keys *, int64_t);
    float (*sum)(const float *, float, float *, const seen_keys *, int64_t);
    float (*squares)(const float *, float, const seen_keys *, int64_t);
} softmax_of_row;
static const softmax_of_row SOFTMAX[] = {
    {maximum_plain, sum_plain, squares_plain}, {maximum_seen, sum_seen, squares_seen}, {maximum_added, sum_added, squares_added}};

/* (a b)² of `count` numbers of both, padded to sixteens, added to `sum`. */
INLINE void add_noise(const float *a, const float *b, int64_t count, vf *sum) {
    for (int64_t n = 0; n < count; n += 16)
        EACH_PART(i) {
            const vf z = at(a + n + i * LANES) * at(b + n + i * LANES);
            sum[i] = fma_of(z, z, sum[i]);
        }
}

/* --- the comparison ------------------------------------------------------------------------------------------------ */

static __attribute__((noinline, cold)) void suspect(abft_attended *x, int64_t row, int64_t what, double residual, double bound) {
#pragma omp critical(abft_attended_places)
    {
        x->places[x->count++] = (abft_place){row, what, residual, bound};
    }
}

INLINE int all_of(m4 true_) {
#ifdef __AVX__
    return _mm256_movemask_pd((__m256d)true_) == 15;
#else
    return (true_[0] & true_[1] & true_[2] & true_[3]) != 0;
#endif
}

INLINE double most_of(d4 x) {
#ifdef __AVX__
    const __m128d two = _mm_max_pd(_mm256_castpd256_pd128((__m256d)x), _mm256_extractf128_pd((__m256d)x, 1));
    return _mm_cvtsd_f64(_mm_max_sd(two, _mm_unpackhi_pd(two, two)));
#else
    double most = x[0];
    for (int j = 1; j < KINDS; j++) most = x[j] > most ? x[j] : most;
    return most;
#endif
}

/* Whether a row's sums are what is predicted of them. squares: its own, and its noise. */
INLINE int agrees(abft_attended *x, const abft_group *g, const double *actual, const float *predicted, double squares, int64_t row,
                  int what, double *worst2) {
    const d4 c = __builtin_convertvector(*(const v4 *)predicted, d4), residual = *(const d4 *)actual - c;
    const d4 tau2 = *(const d4 *)g->accumulate2 * (squares + c * c) + *(const d4 *)g->absolute2;
    const d4 ratio2 = residual * residual / tau2;
    if (__builtin_expect(!all_of((ratio2 <= 1.0) & (tau2 < x->largest2)), 0)) {
        int j = 0;
        for (int i = 1; i < KINDS; i++)
            if (!(ratio2[i] <= ratio2[j])) j = i;
        suspect(x, row, what, fabs(residual[j]), sqrt(tau2[j]));
        return 0;
    }
    const double most = most_of(ratio2);
    *worst2 = most > *worst2 ? most : *worst2;
    return 1;
}

/* Whether a chunk of a row of scores, or of dP, has the sums that are predicted. left: the row that multiplied. Behind its keys are zeros. */
INLINE int chunk_agrees(abft_attended *x, const abft_group *g, const float *row, const float *left, const float *nu, int64_t depth,
                        const float *predicted, int64_t number, int what, double *worst2) {
    double actual[KINDS] __attribute__((aligned(32)));
    vf noise[PARTS];
    EACH_PART(i) noise[i] = (vf){0};
    add_noise(left, nu, depth, noise);
    double squares = sums_of_group(row, 0, sixteens(g->width), g->weights, FP32, noise, actual);
    if (__builtin_expect(squares < TINY, 0)) squares = in_full(row, NULL, g->width) + in_full(left, nu, depth);
    return agrees(x, g, actual, predicted, squares, number, what, worst2);
}

/* Whether l is its other sum and in its range, and P sums to 1. */
INLINE int softmax_agrees(abft_attended *x, float l, float again, float total, int64_t row, double *worst2) {
    const double sum = l, other = again, scale = sum > other ? sum : other;
    const double first = fabs(other - sum) / (scale == 0 ? 1.0 : scale), second = fabs((double)total - (other > 0));
    const double residual = first > second ? first : second;
    const int range = (sum >= 1 - x->range && sum <= (double)x->keys * (1 + x->range)) || (other == 0 && sum == 0);
    if (__builtin_expect(!(first <= x->softmax_bound && second <= x->softmax_bound && range), 0)) {
        suspect(x, row, IN_PROBABILITIES, first == first && second == second ? residual : NAN, x->softmax_bound);
        return 0;
    }
    const double ratio = residual / x->softmax_bound;
    *worst2 = ratio * ratio > *worst2 ? ratio * ratio : *worst2;
    return 1;
}

/* --- where a row lies ---------------------------------------------------------------------------------------------- */

INLINE int64_t padded_width(const abft_attended *x) { return sixteens(x->width); }

INLINE seen_keys seen_by(const abft_attended *x, int64_t query, const char *mask) {
    const int64_t position = query + x->offset;
    const int64_t last = x->causal ? at_most(at_least(position + 1, 0), x->keys) : x->keys;
    const int64_t first = x->window ? at_most(at_least(position - x->window + 1, 0), last) : 0;
    return (seen_keys){first, last, mask};
}

INLINE void hit(const abft_attended *x, int place, int64_t row, float *values) {
    if (__builtin_expect(x->strike == place && row == x->strike_row, 0)) values[x->strike_column] = (float)x->strike_value;
}
#endif
