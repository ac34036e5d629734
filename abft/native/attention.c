/* Attention's forward with its checks in one pass: what abft/attention/forward.py does in a dozen, while a block of scores is in the cache.
 *
 *     S = (scale · q) Kᵀ          Σ w_j S = q · (Σ w_j K), j of abft/checksum.py, per row and CHUNK of keys
 *     x = S (+ mask), m = max x, p = exp(x - m), l = Σ p        l = Σ exp(½x - ½m)², from S in memory again
 *     P = p / l                   Σ P = 1, P as it multiplies V: a column of ones beside V
 *     O = P V                     Σ w_j O = P · (Σ w_j V)
 *
 * The scale of the rounding noise, which panels estimate by sketches, is summed here itself: Σ_e q_e² ν_e² and Σ_t P_t² ν_t².
 * Every number of a result is one chain of fma over CHUNK products, the chains added in order: it does not depend on the block, the
 * thread or the function that computes it, so abft_multiply, abft_exponentials and abft_row_sums give the bits of the fused pass.
 */
#include "rowsums.h"

enum { CHUNK = 128, PANEL = 16, COLUMN_OF_ONES = KINDS, BLOCK = 64, BLOCK_SCORES = 96 * 1024, AHEAD = 16 };
enum { NO_MASK, SEEN, ADDED }; /* a mask: bool (true: seen), or fp32, added to the scores */
enum { IN_SCORES = 1, IN_PROBABILITIES, IN_SUM, IN_OUT };
#ifdef __AVX512F__
enum { TALL = 8, BROAD = 3 }; /* rows and vectors of an accumulator in registers */
#else
enum { TALL = 4, BROAD = 1 };
#endif

typedef int32_t m16 __attribute__((vector_size(64)));
typedef int64_t m4 __attribute__((vector_size(32)));
typedef uint8_t u16x8 __attribute__((vector_size(16), aligned(1), may_alias));

/* How sums over a group of columns are weighted and judged: bound² = accumulate2 · (Σ y² + c² + noise) + absolute2. */
typedef struct {
    int64_t width;
    const float *weights; /* (KINDS, padded width) */
    double accumulate2[KINDS], absolute2[KINDS], share[KINDS];
} abft_group;

typedef struct {
    int64_t row, product; /* product: IN_SCORES, IN_PROBABILITIES or IN_OUT */
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

INLINE v16 pick(m16 where, v16 a, v16 b) { return (v16)(((m16)a & where) | ((m16)b & ~where)); }

/* The larger number; b where one of them is none. */
INLINE v16 larger16(v16 a, v16 b) {
#ifdef __AVX512F__
    return (v16)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return pick(a > b, a, b);
#endif
}

INLINE float largest16(v16 v) {
    float m = v[0];
    for (int i = 1; i < 16; i++) m = v[i] > m ? v[i] : m;
    return m;
}

/* exp of what is at most 88, within 2 ulp; 0 below the smallest normal number. Range reduction and coefficients: Cephes' expf (S. Moshier). */
INLINE v16 exp16(v16 x) {
    const float magic = 12582912.0f; /* 1.5 · 2²³: adding it rounds to an integer, whose bits are the lowest */
    const v16 z = x * 1.44269504088896341f + magic, n = z - magic;
    const v16 r = x - n * 0.693359375f + n * 2.12194440e-4f;
    v16 y = r * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * (r * r) + r + 1.0f;
    const v16 power = (v16)(((u16x32)z << 23) + 0x3f800000u);
    return pick(x < -87.33654f, (v16){0}, y * power);
}

/* exp(y)² = exp(2y) of what is at most 0: another polynomial (fitted to 1.2 · 10⁻⁷ of exp on ±ln 2 / 2, 1 at 0), of
   another argument. Below exp(-87)² it is that: nothing beside a sum of 1. */
INLINE v16 square_of_exp16(v16 y) {
    const float magic = 12582912.0f;
    const v16 x = larger16(-87.0f - (v16){0}, y), z = x * 1.44269504088896341f + magic, r = x - (z - magic) * 0.69314718056f;
    v16 p = r * 8.3099640906e-3f + 4.1895508766e-2f;
    p = p * r + 1.6667307913e-1f;
    p = p * r + 4.9999168515e-1f;
    p = p * r + 9.9999982119e-1f;
    p = p * r + 1.0f;
    p *= (v16)(((u16x32)z << 23) + 0x3f800000u);
    return p * p;
}

/* --- products --------------------------------------------------------------------------------------------- */

/* c (TALL, N vectors) = a (TALL, depth) · b (depth, …), or added to what is there. */
#define MULTIPLY(NAME, V, N)                                                                                               \
    INLINE void NAME(const float *a, int64_t lda, const float *b, int64_t ldb, int64_t depth, float *c, int64_t ldc, int first) { \
        V sum[TALL][N];                                                                                                    \
        UNROLL for (int r = 0; r < TALL; r++) UNROLL for (int j = 0; j < N; j++) sum[r][j] = (V){0};                       \
        for (int64_t k = 0; k < depth; k++) {                                                                              \
            V p[N];                                                                                                        \
            UNROLL for (int j = 0; j < N; j++) p[j] = *(const V *)(b + k * ldb + j * (int64_t)(sizeof(V) / 4));            \
            UNROLL for (int r = 0; r < TALL; r++) UNROLL for (int j = 0; j < N; j++) sum[r][j] += a[r * lda + k] * p[j];   \
        }                                                                                                                  \
        UNROLL for (int r = 0; r < TALL; r++) UNROLL for (int j = 0; j < N; j++) {                                         \
            V *to = (V *)(c + r * ldc + j * (int64_t)(sizeof(V) / 4));                                                     \
            if (!first) sum[r][j] += *to;                                                                                  \
            *to = sum[r][j];                                                                                               \
        }                                                                                                                  \
    }
MULTIPLY(multiply_1, v16, 1)
MULTIPLY(multiply_2, v16, 2)
MULTIPLY(multiply_3, v16, 3)
MULTIPLY(multiply_panel, v8, 1)

/* c (rows, n) = a (rows, depth) · b (depth, n), and panel (rows, PANEL) = a · the PANEL columns behind b's n. rows: a multiple of TALL,
   n of 16. */
static __attribute__((noinline)) void product(const float *a, int64_t lda, int64_t rows, const float *b, int64_t ldb, int64_t n, int64_t depth,
                                              float *c, int64_t ldc, float *panel, int64_t ldp, int first) {
    for (int64_t k0 = 0; k0 < depth; k0 += CHUNK, first = 0) {
        const int64_t deep = depth - k0 < CHUNK ? depth - k0 : CHUNK;
        const float *right = b + k0 * ldb;
        for (int64_t r = 0; r < rows; r += TALL) {
            const float *left = a + r * lda + k0;
            float *to = c + r * ldc;
            int64_t j = 0;
            for (; BROAD >= 3 && j + 48 <= n; j += 48) multiply_3(left, lda, right + j, ldb, deep, to + j, ldc, first);
            for (; BROAD >= 2 && j + 32 <= n; j += 32) multiply_2(left, lda, right + j, ldb, deep, to + j, ldc, first);
            for (; j < n; j += 16) multiply_1(left, lda, right + j, ldb, deep, to + j, ldc, first);
            if (panel) multiply_panel(left, lda, right + n, ldb, deep, panel + r * ldp, ldp, first);
        }
    }
}

/* Rows of a head lie far apart, a page or more: nobody but us knows which is next. */
INLINE void soon(const void *p, int64_t i, int dtype) { __builtin_prefetch((const char *)p + i * (dtype == FP32 ? 4 : 2)); }

INLINE int64_t sixteens(int64_t n) { return (n + 15) / 16 * 16; }
INLINE int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }

/* --- what is multiplied by, packed with its panel ------------------------------------------------------------- */

/* Some keys, transposed: packed (width, ld) with their weighted sums behind `padded` keys; nu (padded width): the noise of each column. */
INLINE void pack_keys(const void *k, int64_t step, int64_t keys, int64_t width, const abft_group *g, float *packed, int64_t padded,
                      int64_t ld, float *nu, int checked, int dtype) {
    const int64_t table = sixteens(g->width);
    for (int64_t e0 = 0; e0 < width; e0 += 16) {
        const int64_t some = at_most(16, width - e0);
        d8 sums[KINDS + 1][2];
        for (int j = 0; j <= KINDS; j++) sums[j][0] = sums[j][1] = (d8){0};
        for (int64_t n0 = 0; n0 < padded; n0 += 16) {
            float square[16][16] __attribute__((aligned(64)));
            for (int64_t i = 0; i < 16; i++) {
                v16 x = {0};
                if (n0 + i + AHEAD < keys) soon(k, (n0 + i + AHEAD) * step + e0, dtype);
                if (n0 + i < keys) x = some < 16 ? some_of(k, (n0 + i) * step + e0, some, dtype) : sixteen_of(k, (n0 + i) * step + e0, dtype);
                *(v16 *)square[i] = x;
                if (!checked || n0 + i >= keys) continue;
                UNROLL for (int half = 0; half < 2; half++) {
                    const d8 wide = __builtin_convertvector(((v8 *)&x)[half], d8);
                    UNROLL for (int j = 0; j < KINDS; j++) sums[j][half] += (double)g->weights[j * table + n0 + i] * wide;
                    sums[KINDS][half] += wide * wide;
                }
            }
            for (int64_t e = 0; e < some; e++)
                for (int64_t i = 0; i < 16; i++) packed[(e0 + e) * ld + n0 + i] = square[i][e];
        }
        if (!checked) continue;
        for (int64_t e = 0; e < 16; e++) {
            double nu2 = sums[KINDS][e / 8][e % 8];
            for (int j = 0; j < PANEL && e < some; j++) packed[(e0 + e) * ld + padded + j] = j < KINDS ? (float)sums[j][e / 8][e % 8] : 0.0f;
            for (int j = 0; j < KINDS; j++) nu2 += sums[j][e / 8][e % 8] * sums[j][e / 8][e % 8] * g->share[j];
            nu[e0 + e] = sqrtf((float)nu2);
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
            *(v16 *)(to + d) = depth - d < 16 ? some_of(v, t * step + d, depth - d, dtype) : sixteen_of(v, t * step + d, dtype);
        }
        if (!checked) continue;
        /* Of the values themselves: their copy may be wrong. */
        double sums[KINDS] __attribute__((aligned(32))), nu2 = group_sums(v, t * step, depth, g->weights, dtype, 1, sums);
        *(v16 *)(to + padded) = (v16){0};
        for (int j = 0; j < KINDS; j++) {
            to[padded + j] = (float)sums[j];
            nu2 += sums[j] * sums[j] * g->share[j];
        }
        to[padded + COLUMN_OF_ONES] = 1.0f;
        nu[t] = sqrtf((float)nu2);
    }
}

/* --- the softmax of a row --------------------------------------------------------------------------------------- */

/* The keys [first, last) that a row sees. */
typedef struct {
    int64_t first, last;
    const char *mask; /* of the row */
} seen_keys;

INLINE v16 logits(const float *s, int64_t n, const seen_keys *w, int64_t keys, int mask_kind) {
    const float none = -INFINITY;
    v16 x = *(const v16 *)(s + n);
    if (mask_kind == SEEN) {
        u16x8 bytes = {0};
        if (n + 16 <= keys)
            bytes = *(const u16x8 *)(w->mask + n);
        else
            memcpy(&bytes, w->mask + n, keys - n);
        x = pick(__builtin_convertvector(bytes, m16) != 0, x, none - (v16){0});
    } else if (mask_kind == ADDED)
        x += n + 16 <= keys ? sixteen_of(w->mask, n, FP32) : some_of(w->mask, n, keys - n, FP32);
    if (__builtin_expect(n < w->first || n + 16 > w->last, 0)) {
        const m16 key = (m16){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} + (int32_t)n;
        x = pick((key >= (int32_t)w->first) & (key < (int32_t)w->last), x, none - (v16){0});
    }
    return x;
}

INLINE float maximum(const float *s, const seen_keys *w, int64_t keys, int mask_kind) {
    v16 m = -INFINITY - (v16){0};
    for (int64_t n = w->first / 16 * 16; n < w->last; n += 16) m = larger16(m, logits(s, n, w, keys, mask_kind));
    const float found = largest16(m);
    return found == -INFINITY ? 0.0f : found;
}

/* Σ p, of each CHUNK, then of these. p = exp(x - m) is written to `p`; or, if that is NULL, is exp(½x - ½m)², and l must be its sum. */
INLINE float exponentials(const float *s, float m, float *p, const seen_keys *w, int64_t keys, int mask_kind) {
    v16 total = {0};
    for (int64_t c = w->first / CHUNK * CHUNK; c < w->last; c += CHUNK) {
        v16 sum = {0};
        for (int64_t n = at_least(c, w->first / 16 * 16); n < at_most(c + CHUNK, w->last); n += 16) {
            const v16 x = logits(s, n, w, keys, mask_kind);
            if (p) {
                const v16 y = exp16(x - m);
                *(v16 *)(p + n) = y;
                sum += y;
            } else {
                sum += square_of_exp16(x * 0.5f - m * 0.5f);
            }
        }
        total += sum;
    }
    return (float)sum16(total);
}

/* One function for each kind of mask. */
#define WITH_MASK(NAME, KIND)                                                                                              \
    static __attribute__((noinline)) float maximum_##NAME(const float *s, const seen_keys *w, int64_t keys) {              \
        return maximum(s, w, keys, KIND);                                                                                  \
    }                                                                                                                      \
    static __attribute__((noinline)) float sum_##NAME(const float *s, float m, float *p, const seen_keys *w, int64_t keys) { \
        return exponentials(s, m, p, w, keys, KIND);                                                                       \
    }                                                                                                                      \
    static __attribute__((noinline)) float squares_##NAME(const float *s, float m, const seen_keys *w, int64_t keys) {     \
        return exponentials(s, m, NULL, w, keys, KIND);                                                                    \
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

/* --- the comparison ------------------------------------------------------------------------------------------------ */

static __attribute__((noinline, cold)) void suspect(abft_attended *x, int64_t row, int64_t what, double residual, double bound) {
#pragma omp critical(abft_attended_places)
    {
        x->places[x->count++] = (abft_place){row, what, residual, bound};
    }
}

/* Whether a row's sums are what is predicted of them. */
INLINE int agrees(abft_attended *x, const abft_group *g, const double *actual, const float *predicted, double squares, double noise,
                  int64_t row, int what, double *worst2) {
    const d4 c = __builtin_convertvector(*(const v4 *)predicted, d4), residual = *(const d4 *)actual - c;
    const d4 tau2 = *(const d4 *)g->accumulate2 * (squares + noise + c * c) + *(const d4 *)g->absolute2;
    const d4 ratio2 = residual * residual / tau2;
    const m4 fine = (ratio2 <= 1.0) & (tau2 < x->largest2);
    if (__builtin_expect(!(fine[0] & fine[1] & fine[2] & fine[3]), 0)) {
        int j = 0;
        for (int i = 1; i < KINDS; i++)
            if (!(ratio2[i] <= ratio2[j])) j = i;
        suspect(x, row, what, fabs(residual[j]), sqrt(tau2[j]));
        return 0;
    }
    for (int j = 0; j < KINDS; j++) *worst2 = ratio2[j] > *worst2 ? ratio2[j] : *worst2;
    return 1;
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

/* --- a block of queries -------------------------------------------------------------------------------------------- */

typedef struct {
    int64_t chunks, chunk_wide, ld_keys, padded_depth, ld_values, block, ld_scores;
    float *keys, *nu_keys, *values, *nu_values;             /* packed: of a head */
    float *q, *scores, *probabilities, *panel, *out, *sums; /* of a block */
} room;

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

static __attribute__((noinline)) void block_of_queries(abft_attended *x, const room *m, int64_t b, int64_t h, int64_t g, int64_t l0,
                                                       double *worst2) {
    const int dtype = (int)x->dtype, checked = (int)x->checked;
    const softmax_of_row *softmax = SOFTMAX + x->mask_kind;
    const int64_t rows = at_most(m->block, x->length - l0), tall = (rows + 7) / 8 * 8, width = x->width, wide = padded_width(x);
    const int64_t row0 = ((b * x->heads + h) * x->members + g) * x->length + l0;
    const int64_t size_of_mask = x->mask_kind == NO_MASK ? 0 : x->mask_kind == SEEN ? 1 : 4, step_of_mask = x->ms[3] * size_of_mask;
    const char *mask = (const char *)x->mask + (b * x->ms[0] + h * x->ms[1] + g * x->ms[2]) * size_of_mask;
    const seen_keys first = seen_by(x, l0, NULL), last = seen_by(x, l0 + rows - 1, NULL);
    const int64_t c0 = at_most(first.first / CHUNK, m->chunks - 1), c1 = at_least((last.last + CHUNK - 1) / CHUNK, c0 + 1);
    const float scale = (float)x->scale;
    for (int64_t r = 0; r < tall; r++)
        for (int64_t e = 0; e < width; e += 16) {
            v16 v = {0};
            const int64_t at = b * x->qs[0] + h * x->qs[1] + g * x->qs[2] + (l0 + r) * x->qs[3] + e;
            if (r + AHEAD < rows) soon(x->q, at + AHEAD * x->qs[3], dtype);
            if (r < rows) v = width - e < 16 ? some_of(x->q, at, width - e, dtype) : sixteen_of(x->q, at, dtype);
            *(v16 *)(m->q + r * wide + e) = v * scale;
        }
    for (int64_t c = c0; c < c1; c++)
        product(m->q, wide, tall, m->keys + c * width * m->ld_keys, m->ld_keys, sixteens(at_most(CHUNK, x->keys - c * CHUNK)), width,
                m->scores + c * CHUNK, m->ld_scores, checked ? m->panel + c * BLOCK * PANEL : NULL, PANEL, 1);
    unsigned char wrong[BLOCK] = {0};
    for (int64_t r = 0; r < rows; r++) {
        float *s = m->scores + r * m->ld_scores, *p = m->probabilities;
        const seen_keys w = seen_by(x, l0 + r, mask + (l0 + r) * step_of_mask);
        hit(x, IN_SCORES, row0 + r, s);
        const float most = softmax->maximum(s, &w, x->keys);
        float sum = softmax->sum(s, most, p, &w, x->keys);
        hit(x, IN_PROBABILITIES, row0 + r, p);
        hit(x, IN_SUM, row0 + r, &sum);
        x->maxima[row0 + r] = most;
        x->sums[row0 + r] = sum;
        if (checked) {
            m->sums[r] = softmax->squares(s, most, &w, x->keys);
            for (int64_t c = c0; c < c1; c++) {
                const abft_group *group = c == m->chunks - 1 ? &x->last_keys : &x->keys_group;
                double actual[KINDS] __attribute__((aligned(32)));
                const double squares = group_sums(s, c * CHUNK, group->width, group->weights, FP32, 1, actual);
                v16 noise = {0};
                for (int64_t e = 0; e < width; e += 16) {
                    const v16 n = *(const v16 *)(m->q + r * wide + e) * *(const v16 *)(m->nu_keys + c * wide + e);
                    noise += n * n;
                }
                if (!wrong[r])
                    wrong[r] = !agrees(x, group, actual, m->panel + (c * BLOCK + r) * PANEL, squares, sum16(noise), row0 + r, IN_SCORES, worst2);
            }
        }
        const float inverse = 1.0f / (sum == 0 ? 1.0f : sum);
        v16 noise = {0};
        const int64_t from = w.first / 16 * 16, to = at_least(sixteens(w.last), from), end = sixteens(at_most(c1 * CHUNK, x->keys));
        if (from > c0 * CHUNK) memset(s + c0 * CHUNK, 0, (from - c0 * CHUNK) * sizeof(float));
        for (int64_t n = from; n < to; n += 16) {
            const v16 y = *(const v16 *)(p + n) * inverse;
            *(v16 *)(s + n) = y;
            if (checked) {
                const v16 z = y * *(const v16 *)(m->nu_values + n);
                noise += z * z;
            }
        }
        if (end > to) memset(s + to, 0, (end - to) * sizeof(float));
        if (checked) m->sums[BLOCK + r] = (float)sum16(noise);
    }
    /* Rows that only fill a block up multiply what may be anything, and nobody reads what they give. */
    for (int64_t c = c0; c < c1; c++)
        product(m->scores + c * CHUNK, m->ld_scores, tall, m->values + c * CHUNK * m->ld_values, m->ld_values, m->padded_depth,
                at_most(CHUNK, x->keys - c * CHUNK), m->out, m->padded_depth, checked ? m->panel : NULL, PANEL, c == c0);
    for (int64_t r = 0; r < rows; r++) {
        float *o = m->out + r * m->padded_depth, *to = x->out + b * x->os[0] + h * x->os[1] + g * x->os[2] + (l0 + r) * x->os[3];
        hit(x, IN_OUT, row0 + r, o);
        memcpy(to, o, x->depth * sizeof(float));
        if (!checked || wrong[r]) continue;
        double actual[KINDS] __attribute__((aligned(32)));
        const float *predicted = m->panel + r * PANEL;
        if (!softmax_agrees(x, x->sums[row0 + r], m->sums[r], predicted[COLUMN_OF_ONES], row0 + r, worst2 + 1)) continue;
        const double squares = group_sums(to, 0, x->depth, x->columns.weights, FP32, 1, actual);
        agrees(x, &x->columns, actual, predicted, squares, m->sums[BLOCK + r], row0 + r, IN_OUT, worst2 + 1);
    }
}

/* --- all heads ------------------------------------------------------------------------------------------------------ */

static int make_room(const abft_attended *x, room *m) {
    const int64_t wide = padded_width(x);
    m->chunks = (x->keys + CHUNK - 1) / CHUNK;
    m->chunk_wide = at_most(CHUNK, sixteens(x->keys));
    m->ld_keys = m->chunk_wide + PANEL;
    m->padded_depth = sixteens(x->depth);
    m->ld_values = m->padded_depth + PANEL;
    m->ld_scores = sixteens(x->keys);
    m->block = at_most(at_least(BLOCK_SCORES / m->ld_scores / 8 * 8, 8), BLOCK);
    const int64_t keys = m->chunks * x->width * m->ld_keys, values = x->keys * m->ld_values;
    float *packed = scratch(0, keys + m->chunks * wide + values + m->ld_scores);
    float *mine = scratch(1, BLOCK * (wide + m->chunks * PANEL + m->padded_depth + 2) + m->block * m->ld_scores + m->ld_scores);
    if (!packed || !mine) return 0;
    m->keys = packed;
    m->nu_keys = m->keys + keys;
    m->values = m->nu_keys + m->chunks * wide;
    m->nu_values = m->values + values;
    m->q = mine;
    m->panel = m->q + BLOCK * wide;
    m->out = m->panel + BLOCK * m->chunks * PANEL;
    m->sums = m->out + BLOCK * m->padded_depth;
    m->scores = m->sums + BLOCK * 2;
    m->probabilities = m->scores + m->block * m->ld_scores;
    /* Blocks of fewer rows leave the last of them as they are: numbers, if not sums of any. */
    memset(m->scores, 0, m->block * m->ld_scores * sizeof(float));
    memset(m->nu_values + x->keys, 0, (m->ld_scores - x->keys) * sizeof(float));
    return 1;
}

/* A head's keys and values. One function for each type. */
#define PACK_HEAD(NAME, DTYPE)                                                                                             \
    static __attribute__((noinline)) void NAME(const abft_attended *x, const room *m, int64_t b, int64_t h) {              \
        const int64_t k0 = b * x->ks[0] + h * x->ks[1], v0 = b * x->vs[0] + h * x->vs[1], size = DTYPE == FP32 ? 4 : 2;    \
        const char *k = (const char *)x->k + k0 * size;                                                                    \
        for (int64_t c = 0; c < m->chunks; c++) {                                                                          \
            const int64_t keys = at_most(CHUNK, x->keys - c * CHUNK);                                                      \
            pack_keys(k + c * CHUNK * x->ks[2] * size, x->ks[2], keys, x->width, c == m->chunks - 1 ? &x->last_keys : &x->keys_group, \
                      m->keys + c * x->width * m->ld_keys, sixteens(keys), m->ld_keys, m->nu_keys + c * padded_width(x),   \
                      (int)x->checked, DTYPE);                                                                             \
        }                                                                                                                  \
        pack_values((const char *)x->v + v0 * size, x->vs[2], x->keys, x->depth, &x->columns, m->values, m->padded_depth,  \
                    m->ld_values, m->nu_values, (int)x->checked, DTYPE);                                                   \
    }
PACK_HEAD(pack_fp32, FP32)
PACK_HEAD(pack_bf16, BF16)
PACK_HEAD(pack_fp16, FP16)

static void one_head(abft_attended *x, const room *m, int64_t task, int64_t parts, double *worst2) {
    const int64_t head = task / parts, b = head / x->heads, h = head % x->heads, blocks = (x->length + m->block - 1) / m->block;
    x->dtype == FP32 ? pack_fp32(x, m, b, h) : x->dtype == BF16 ? pack_bf16(x, m, b, h) : pack_fp16(x, m, b, h);
    for (int64_t i = task % parts; i < x->members * blocks; i += parts) block_of_queries(x, m, b, h, i / blocks, i % blocks * m->block, worst2);
}

/* Fills out, maxima and sums, worst2, count and places; 0 if memory is short. */
int abft_attention(abft_attended *x, int threads) {
    const int64_t heads = x->batch * x->heads, parts = heads >= 2 * threads ? 1 : threads;
    int complete = 1;
    x->worst2[0] = x->worst2[1] = 0;
    x->count = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        double worst2[2] = {0, 0};
        room m;
        const int ready = make_room(x, &m);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < heads * parts; task++)
            if (ready) one_head(x, &m, task, parts, worst2);
#pragma omp critical(abft_attended_places)
        {
            complete &= ready;
            for (int i = 0; i < 2; i++) x->worst2[i] = worst2[i] > x->worst2[i] ? worst2[i] : x->worst2[i];
        }
    }
    return complete;
}

/* --- the same steps one at a time ------------------------------------------------------------------------------------ */

/* y (heads, rows, columns) = a (heads, rows, depth) · wᵀ, w (heads, columns, depth) of any strides; all fp32. */
typedef struct {
    int64_t heads, rows, columns, depth;
    int64_t as[3], ws[3], ys[2];
    const float *a, *w;
    float *y;
} abft_factors;

/* 0 if memory is short. */
int abft_multiply(const abft_factors *x, int threads) {
    const int64_t blocks = (x->rows + BLOCK - 1) / BLOCK, parts = x->heads >= 2 * threads ? 1 : at_most(blocks, threads);
    const int64_t strips = (x->columns + CHUNK - 1) / CHUNK, wide = at_most(CHUNK, sixteens(x->columns)), padded = sixteens(x->columns);
    int complete = 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *packed = scratch(0, strips * x->depth * wide), *mine = scratch(1, BLOCK * (x->depth + padded));
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < x->heads * parts; task++) {
            const int64_t h = task / parts;
            if (!packed || !mine) continue;
            const float *w = x->w + h * x->ws[0];
            for (int64_t j0 = 0; j0 < x->columns; j0 += CHUNK)
                for (int64_t k = 0; k < x->depth; k++) {
                    float *to = packed + (j0 / CHUNK * x->depth + k) * wide;
                    for (int64_t j = 0; j < wide; j++) to[j] = j0 + j < x->columns ? w[(j0 + j) * x->ws[1] + k * x->ws[2]] : 0.0f;
                }
            for (int64_t i = task % parts; i < blocks; i += parts) {
                const int64_t r0 = i * BLOCK, rows = at_most(BLOCK, x->rows - r0), tall = (rows + 7) / 8 * 8;
                float *c = mine + BLOCK * x->depth;
                for (int64_t r = 0; r < tall; r++)
                    for (int64_t k = 0; k < x->depth; k++)
                        mine[r * x->depth + k] = r < rows ? x->a[h * x->as[0] + (r0 + r) * x->as[1] + k * x->as[2]] : 0.0f;
                for (int64_t j0 = 0; j0 < x->columns; j0 += CHUNK)
                    product(mine, x->depth, tall, packed + j0 * x->depth / CHUNK * wide, wide, sixteens(at_most(CHUNK, x->columns - j0)), x->depth,
                            c + j0, padded, NULL, 0, 1);
                for (int64_t r = 0; r < rows; r++)
                    memcpy(x->y + h * x->ys[0] + (r0 + r) * x->ys[1], c + r * padded, x->columns * sizeof(float));
            }
        }
#pragma omp critical(abft_attended_places)
        complete &= packed && mine;
    }
    return complete;
}

/* x = exp(x), each number as in the fused pass. */
void abft_exponentials(float *x, int64_t count, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < count / 16 * 16; i += 16) *(v16 *)(x + i) = exp16(*(const v16 *)(x + i));
    const int64_t whole = count / 16 * 16;
    if (whole < count) {
        const v16 last = exp16(some_of(x, whole, count - whole, FP32));
        for (int64_t i = whole; i < count; i++) x[i] = last[i - whole];
    }
}

/* sums (rows) of p (rows, keys), in the order of the fused pass. */
void abft_row_sums(const float *p, int64_t rows, int64_t keys, float *sums, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t r = 0; r < rows; r++) {
        v16 total = {0};
        for (int64_t c = 0; c < keys; c += CHUNK) {
            v16 sum = {0};
            for (int64_t n = c; n < at_most(c + CHUNK, keys); n += 16)
                sum += keys - n < 16 ? some_of(p, r * keys + n, keys - n, FP32) : *(const v16 *)(p + r * keys + n);
            total += sum;
        }
        sums[r] = (float)sum16(total);
    }
}
