/* The judgement of a clean product in one pass: what abft/backends/quick.py asks of torch and numpy, fused.
 *
 *     predicted[m, c] = A[m, :] · panel[c, :]                    checksum columns, then sketches
 *     actual[m, g, j] = Σ_{n in g} w_j[n] Y[m, n]                w_j: e, one, hi, lo (abft/checksum.py)
 *     ratio²          = (actual - predicted)² / τ²,   τ² = a_j² (ΣY² + predicted² + sketch²) + ρ_j² ΣY² + b_j²
 *
 * τ² leaves out the cross products of the bound's three terms, so it is never above the square of the bound: but for the
 * rounding of the sums, which the bound is made of, what passes here passes in abft/threshold.py; what does not is judged
 * again there. Sums are fp32, as torch's are; the comparison is fp64, where no square of an fp32 number under- or overflows.
 *
 * Vectors are those of GCC and clang, 16 lanes wide, whatever the processor has. No library, no headers of torch.
 */
#include "rowsums.h"

/* A product's judgement, as far as it depends on shapes alone. Arrays of groups × kinds are repeated to fill LANES. */
typedef struct {
    int64_t n, k, width, groups, kinds, shared_sketch, dtype, padded;
    const float *signs;        /* of a group of `width`, padded by zeros to FRAGMENT */
    const float *last_signs;   /* of the last group, if it is narrower */
    const double *accumulate2; /* (padded) a_j² */
    const double *round2;      /* (padded) ρ_j² */
    const double *absolute2;   /* (padded) b_j² */
    double largest2;           /* a bound is below the root of this, or nothing can be judged */
} abft_plan;

/* What is multiplied, and by what it is judged. */
typedef struct {
    const float *panel;      /* (columns, k) */
    const float *bias;       /* (groups × kinds) or NULL: what the bias adds to the predictions */
    const float *bias_noise; /* … and to the squares of the noise: (1) with a shared sketch, else (groups); or NULL */
    const void *y, *a;
    int64_t ldy, rs, ks, rows; /* y (rows, n), its columns adjacent; a (rows, k) of any strides */
    struct abft_statistics *statistics; /* NULL: nobody keeps any */
} abft_product;

/* What is kept of x = residual / τ for the second detector (abft/statistics/accumulators.py), per kind of checksum. */
enum { COUNT, SUM, SQUARES, MOST, ABOVE, BLOCKS = ABOVE + 4, MAXIMA, MAXIMA2, FIELDS };
typedef struct abft_statistics {
    double level2[4][KINDS]; /* counted above these, x² */
    double cap2[KINDS];      /* one row weighs no more than this, x² */
    double kept[KINDS][FIELDS];
} abft_statistics;

/* --- what is predicted from the input ----------------------------------------------------------------------- */

/* raw (ROWS, ldr) += a (ROWS, depth) · packed (depth, ldp), for as many columns as V has lanes. Summed apart from what is there:
   short chains of additions round less than one long one. */
#define MULTIPLY(NAME, V)                                                                                                  \
    INLINE void NAME(const float *a, int64_t rs, int64_t ks, const float *packed, int64_t ldp, int64_t depth, float *raw,  \
                     int64_t ldr) {                                                                                        \
        V sum[ROWS] = {{0}};                                                                                               \
        for (int64_t k = 0; k < depth; k++) {                                                                              \
            const V p = *(const V *)(packed + k * ldp);                                                                    \
            UNROLL for (int r = 0; r < ROWS; r++) sum[r] += a[r * rs + k * ks] * p;                                        \
        }                                                                                                                  \
        UNROLL for (int r = 0; r < ROWS; r++) *(V *)(raw + r * ldr) += sum[r];                                             \
    }
MULTIPLY(multiply16, v16)
MULTIPLY(multiply8, v8)
MULTIPLY(multiply4, v4)

static int64_t columns_of(const abft_plan *p) { return p->groups * p->kinds + SKETCHES * (p->shared_sketch ? 1 : p->groups); }

/* All columns of a task's rows, in steps of ROWS. One function for each way that a lies: its steps are then constants. */
#define MULTIPLY_ROWS(NAME, ROW_STEP, K_STEP)                                                                              \
    static __attribute__((noinline)) void NAME(const float *a, int64_t rs, int64_t rows, const float *packed, int64_t wide,\
                                               int64_t depth, float *raw) {                                                \
        (void)rs;                                                                                                          \
        for (int64_t m = 0; m < rows; m += ROWS, a += ROWS * (ROW_STEP), raw += ROWS * wide) {                             \
            int64_t c = 0;                                                                                                 \
            for (; c + 16 <= wide; c += 16) multiply16(a, ROW_STEP, K_STEP, packed + c, wide, depth, raw + c, wide);       \
            for (; c + 8 <= wide; c += 8) multiply8(a, ROW_STEP, K_STEP, packed + c, wide, depth, raw + c, wide);          \
            for (; c < wide; c += 4) multiply4(a, ROW_STEP, K_STEP, packed + c, wide, depth, raw + c, wide);               \
        }                                                                                                                  \
    }
MULTIPLY_ROWS(multiply_as_it_lies, rs, 1)
MULTIPLY_ROWS(multiply_columns, 1, TASK)
MULTIPLY_ROWS(multiply_copied, DEPTH, 1)

/* raw (TASK, wide) = rows [m0, m0 + rows) of A · packed. Other types, other orders and what is left over are copied first. */
INLINE void predict(const abft_plan *p, const abft_product *x, int64_t m0, int64_t rows, const float *packed, int64_t wide, float *raw,
                    int dtype) {
    const void *a = x->a;
    const int64_t rs = x->rs, ks = x->ks;
    float block[TASK * DEPTH] __attribute__((aligned(64)));
    memset(raw, 0, TASK * wide * sizeof(float));
    for (int64_t k0 = 0; k0 < p->k; k0 += DEPTH) {
        const int64_t depth = p->k - k0 < DEPTH ? p->k - k0 : DEPTH;
        const float *here = packed + k0 * wide;
        if (dtype == FP32 && ks == 1 && rows == TASK) {
            multiply_as_it_lies((const float *)a + m0 * rs + k0, rs, rows, here, wide, depth, raw);
        } else if (rs == 1) {
            for (int64_t k = 0; k < depth; k++)
                for (int64_t m = 0; m < TASK; m += 16) {
                    const int64_t at = (k0 + k) * ks + m0 + m, left = rows - m;
                    *(v16 *)(block + k * TASK + m) = left >= 16 ? sixteen_of(a, at, dtype) : some_of(a, at, left, dtype);
                }
            multiply_columns(block, 1, rows, here, wide, depth, raw);
        } else {
            if (rows < TASK) memset(block, 0, sizeof(block));
            for (int64_t m = 0; m < rows; m++) {
                const int64_t at = (m0 + m) * rs + k0 * ks;
                int64_t k = 0;
                if (ks == 1)
                    for (; k + 16 <= depth; k += 16) *(v16 *)(block + m * DEPTH + k) = sixteen_of(a, at + k, dtype);
                for (; k < depth; k++) block[m * DEPTH + k] = one_of(a, at + k * ks, dtype);
            }
            multiply_copied(block, DEPTH, rows, here, wide, depth, raw);
        }
    }
}

/* --- bf16 on units that multiply pairs of them ------------------------------------------------------------------ */

/* AVX-512 BF16 adds two products of bf16 to each fp32 sum: twice the rate, if the panel is bf16, too. A checksum is the sum of two
   bf16 numbers to 2⁻¹⁷ of itself, and its result arrives rounded to 2⁻⁹; of a sketch one is enough. */
#if defined(__AVX512BF16__) && defined(__AVX512VL__)
#define PAIRS 1

INLINE uint32_t bf16_of(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16; /* to nearest; numbers that are not finite are judged by nobody here */
}

/* packed (k / 2, 2 · sums + sketches): of each column pairs along k, of a checksum's two parts one behind the other. */
static void pack_pairs(const abft_plan *p, const float *panel, uint32_t *packed, int64_t sums, int64_t sketches, int64_t from, int64_t to) {
    const int64_t slots = 2 * sums + sketches;
    for (int64_t c = 0; c < sums + sketches; c++) {
        const float *column = panel + c * p->k;
        for (int64_t i = from; i < to; i++) {
            const float x = column[2 * i], y = column[2 * i + 1];
            const uint32_t first = bf16_of(x), second = bf16_of(y);
            uint32_t *to_ = packed + i * slots + c;
            *to_ = second << 16 | first;
            if (c < sums) {
                const uint32_t wide[2] = {first << 16, second << 16};
                float rounded[2];
                memcpy(rounded, wide, 8);
                to_[sums + sketches] = bf16_of(y - rounded[1]) << 16 | bf16_of(x - rounded[0]);
            }
        }
    }
}

/* raw (ROWS, wide) += rows of a (ROWS, 2 · depth), `rs` pairs apart, times columns of V lanes; the second part lies `second` behind. */
#define MULTIPLY_PAIRS(NAME, V, REGISTER, SET, DOT)                                                                        \
    INLINE void NAME(const uint32_t *a, int64_t rs, const uint32_t *packed, int64_t slots, int64_t second, int64_t depth,  \
                     float *raw, int64_t ldr) {                                                                            \
        REGISTER sum[ROWS];                                                                                                \
        UNROLL for (int r = 0; r < ROWS; r++) sum[r] = (REGISTER)(V){0};                                                   \
        for (int64_t i = 0; i < depth; i++) {                                                                              \
            const V first = *(const V *)(packed + i * slots);                                                              \
            const V rest = second ? *(const V *)(packed + i * slots + second) : first;                                     \
            UNROLL for (int r = 0; r < ROWS; r++) {                                                                        \
                uint32_t pair;                                                                                             \
                memcpy(&pair, a + r * rs + i, 4);                                                                          \
                sum[r] = DOT(sum[r], SET(pair), first);                                                                    \
                if (second) sum[r] = DOT(sum[r], SET(pair), rest);                                                         \
            }                                                                                                              \
        }                                                                                                                  \
        UNROLL for (int r = 0; r < ROWS; r++) *(V *)(raw + r * ldr) += (V)sum[r];                                          \
    }
#define DOT16(s, a, b) _mm512_dpbf16_ps(s, (__m512bh)(a), (__m512bh)(b))
#define DOT8(s, a, b) _mm256_dpbf16_ps(s, (__m256bh)(a), (__m256bh)(b))
#define DOT4(s, a, b) _mm_dpbf16_ps(s, (__m128bh)(a), (__m128bh)(b))
MULTIPLY_PAIRS(pairs16, v16, __m512, _mm512_set1_epi32, DOT16)
MULTIPLY_PAIRS(pairs8, v8, __m256, _mm256_set1_epi32, DOT8)
MULTIPLY_PAIRS(pairs4, v4, __m128, _mm_set1_epi32, DOT4)

static __attribute__((noinline)) void multiply_pairs(const uint32_t *a, int64_t rs, int64_t rows, const uint32_t *packed, int64_t sums,
                                                     int64_t sketches, int64_t depth, float *raw, int64_t wide) {
    const int64_t slots = 2 * sums + sketches, second = sums + sketches;
    for (int64_t m = 0; m < rows; m += ROWS, a += ROWS * rs, raw += ROWS * wide) {
        int64_t c = 0;
        for (; c + 16 <= sums; c += 16) pairs16(a, rs, packed + c, slots, second, depth, raw + c, wide);
        for (; c + 8 <= sums; c += 8) pairs8(a, rs, packed + c, slots, second, depth, raw + c, wide);
        for (; c < sums; c += 4) pairs4(a, rs, packed + c, slots, second, depth, raw + c, wide);
        for (; c < second; c += 4) pairs4(a, rs, packed + c, slots, 0, depth, raw + c, wide);
    }
}

/* The predictions of a task's rows, as `predict`: what is left over, or begins at an odd address, is copied. */
static void predict_pairs(const abft_plan *p, const abft_product *x, int64_t m0, int64_t rows, const uint32_t *packed, int64_t sums,
                          int64_t sketches, int64_t wide, float *raw) {
    uint16_t block[TASK * DEPTH] __attribute__((aligned(64)));
    const uint16_t *a = (const uint16_t *)x->a;
    memset(raw, 0, TASK * wide * sizeof(float));
    for (int64_t k0 = 0; k0 < p->k; k0 += DEPTH) {
        const int64_t depth = p->k - k0 < DEPTH ? p->k - k0 : DEPTH;
        const uint32_t *here = packed + k0 / 2 * (2 * sums + sketches);
        if (rows == TASK && x->rs % 2 == 0) {
            multiply_pairs((const uint32_t *)(a + m0 * x->rs + k0), x->rs / 2, rows, here, sums, sketches, depth / 2, raw, wide);
        } else {
            if (rows < TASK) memset(block, 0, sizeof(block));
            for (int64_t m = 0; m < rows; m++) memcpy(block + m * DEPTH, a + (m0 + m) * x->rs + k0, depth * 2);
            multiply_pairs((const uint32_t *)block, DEPTH / 2, rows, here, sums, sketches, depth / 2, raw, wide);
        }
    }
}
#else
#define PAIRS 0
#endif

/* Few rows: the panel is read as it lies, once. raw (rows, wide) = a (rows, k) · panelᵀ for columns [c0, c1). */
static void predict_few(const abft_plan *p, const float *panel, const float *a, int64_t rows, int64_t c0, int64_t c1, float *raw, int64_t wide) {
    for (int64_t c = c0; c < c1; c++) {
        const float *column = panel + c * p->k;
        for (int64_t m = 0; m < rows; m++) {
            const float *row = a + m * p->k;
            v16 sum[4] = {{0}};
            int64_t k = 0;
            for (; k + 64 <= p->k; k += 64)
                UNROLL for (int i = 0; i < 4; i++) sum[i] += *(const v16 *)(row + k + 16 * i) * *(const v16 *)(column + k + 16 * i);
            for (; k + 16 <= p->k; k += 16) sum[0] += *(const v16 *)(row + k) * *(const v16 *)(column + k);
            float rest = 0;
            for (; k < p->k; k++) rest += row[k] * column[k];
            raw[m * wide + c] = (float)sum16((sum[0] + sum[1]) + (sum[2] + sum[3])) + rest;
        }
    }
}

/* --- the comparison ----------------------------------------------------------------------------------------- */

typedef struct {
    double worst2, largest2, poison; /* poison: 0, or NaN if anything was not finite */
    d8 sum, squares, most, block;    /* of x, of x², the largest x² of all and of the block, per lane; where statistics are kept */
    m8 above[4];
    int64_t rows;
    double kept[KINDS][FIELDS];
} abft_found;

INLINE d8 larger(d8 x, d8 y) {
    const m8 second = y > x;
    return (d8)(((m8)y & second) | ((m8)x & ~second));
}

/* Adds eight x² to what is kept. They are of one product that is clean, or nobody will read what is kept of it. */
static __attribute__((noinline)) void keep(const abft_statistics *s, abft_found *found, const d8 *ratio2, const d8 *residual, int kinds) {
    d8 cap, level[4];
    for (int lane = 0; lane < LANES; lane++) {
        const int kind = kinds == KINDS ? lane % KINDS : E;
        cap[lane] = s->cap2[kind];
        for (int i = 0; i < 4; i++) level[i][lane] = s->level2[i][kind];
    }
    const m8 over = *ratio2 > cap;
    const d8 capped = (d8)(((m8)cap & over) | ((m8)*ratio2 & ~over));
    d8 root;
    for (int lane = 0; lane < LANES; lane++) root[lane] = sqrt(capped[lane]);
    const m8 negative = *residual < (d8){0};
    found->sum += (d8)(((m8)-root & negative) | ((m8)root & ~negative));
    found->squares += capped;
    found->block = larger(found->block, *ratio2);
    for (int i = 0; i < 4; i++) found->above[i] -= *ratio2 > level[i];
}

/* A block of rows is complete: its maximum counts as one. */
static void close_block(abft_found *found, int kinds) {
    for (int kind = 0; kind < kinds; kind++) {
        double most = 0;
        for (int lane = kind; lane < LANES; lane += kinds) most = found->block[lane] > most ? found->block[lane] : most;
        found->kept[kind][BLOCKS] += 1;
        found->kept[kind][MAXIMA] += sqrt(most);
        found->kept[kind][MAXIMA2] += most;
    }
    found->most = larger(found->most, found->block);
    found->block = (d8){0};
}

static void add_statistics(abft_statistics *s, const abft_found *found, int64_t groups, int kinds) {
    for (int kind = 0; kind < kinds; kind++) {
        double *to = s->kept[kind];
        to[COUNT] += (double)(found->rows * groups);
        for (int lane = kind; lane < LANES; lane += kinds) {
            to[SUM] += found->sum[lane];
            to[SQUARES] += found->squares[lane];
            const double most = sqrt(found->most[lane]);
            to[MOST] = most > to[MOST] ? most : to[MOST];
            for (int i = 0; i < 4; i++) to[ABOVE + i] += (double)found->above[i][lane];
        }
        for (int i = BLOCKS; i < FIELDS; i++) to[i] += found->kept[kind][i];
    }
}

static void merge_statistics(abft_found *into, const abft_found *mine) {
    into->sum += mine->sum;
    into->squares += mine->squares;
    into->most = larger(into->most, mine->most);
    for (int i = 0; i < 4; i++) into->above[i] += mine->above[i];
    into->rows += mine->rows;
    for (int kind = 0; kind < KINDS; kind++)
        for (int i = BLOCKS; i < FIELDS; i++) into->kept[kind][i] += mine->kept[kind][i];
}

/* Up to ROWS rows of y, from m0, with their raw predictions; adds to what was found. `room`: 4 · ROWS · groups · kinds doubles. */
INLINE void judge(const abft_plan *p, const abft_product *x, int64_t m0, int64_t rows, const float *raw, int64_t wide, double *room,
                  abft_found *found, int dtype, int full) {
    const int64_t kinds = full ? KINDS : 1, each = p->groups * kinds, all = ROWS * each;
    double *actual = room, *predicted = room + all, *squares = room + 2 * all, *noise = room + 3 * all;
    if (rows < ROWS) memset(room, 0, 4 * all * sizeof(double));
    for (int64_t m = 0; m < rows; m++) {
        const float *c = raw + m * wide, *sketch = c + each;
        double shared = 0;
        for (int64_t g = 0; g < p->groups; g++) {
            const int64_t start = g * p->width, width = p->n - start < p->width ? p->n - start : p->width, at = m * each + g * kinds;
            const double square =
                group_sums(x->y, (m0 + m) * x->ldy + start, width, width < p->width ? p->last_signs : p->signs, dtype, full, actual + at);
            if (g == 0 || !p->shared_sketch) {
                shared = 0;
                for (int s = 0; s < SKETCHES; s++) {
                    const double h = (double)sketch[(p->shared_sketch ? 0 : g * SKETCHES) + s];
                    shared += h * h;
                }
                shared *= 1.0 / SKETCHES;
                if (x->bias_noise) shared += (double)x->bias_noise[p->shared_sketch ? 0 : g];
            }
            if (full) {
                const d4 none = {0};
                *(d4 *)(predicted + at) = __builtin_convertvector(*(const v4 *)(c + g * KINDS), d4);
                if (x->bias) *(d4 *)(predicted + at) += __builtin_convertvector(*(const v4 *)(x->bias + g * KINDS), d4);
                *(d4 *)(squares + at) = none + square;
                *(d4 *)(noise + at) = none + shared;
            } else {
                predicted[at] = (double)c[g] + (x->bias ? (double)x->bias[g] : 0.0);
                squares[at] = square;
                noise[at] = shared;
            }
        }
    }
    d8 worst = {0}, largest = {0}, poison = {0};
    for (int64_t i = 0, j = 0; i < all; i += LANES, j = j + LANES == p->padded ? 0 : j + LANES) {
        const d8 c = *(const d8 *)(predicted + i), seen = *(const d8 *)(squares + i);
        const d8 residual = *(const d8 *)(actual + i) - c;
        const d8 tau2 = *(const d8 *)(p->accumulate2 + j) * (seen + c * c + *(const d8 *)(noise + i)) +
                        *(const d8 *)(p->round2 + j) * seen + *(const d8 *)(p->absolute2 + j);
        const d8 ratio2 = residual * residual / tau2;
        poison += ratio2 * 0.0;
        worst = larger(worst, ratio2);
        largest = larger(largest, tau2);
        if (x->statistics) keep(x->statistics, found, &ratio2, &residual, (int)kinds);
    }
    found->rows += rows;
    /* Blocks of TASK rows, wherever threads begin; where there are fewer rows, whatever comes at once. */
    if (x->statistics && ((m0 + rows) % TASK == 0 || m0 + rows == x->rows || x->rows < FEW)) close_block(found, (int)kinds);
    for (int i = 0; i < LANES; i++) {
        if (worst[i] > found->worst2) found->worst2 = worst[i];
        if (largest[i] > found->largest2) found->largest2 = largest[i];
        found->poison += poison[i];
    }
}

/* --- all rows ----------------------------------------------------------------------------------------------- */

INLINE void rows_of_one_thread(const abft_plan *p, const abft_product *x, float *packed, int64_t wide, int thread, int threads,
                               abft_found *found, int dtype, int full) {
    const int64_t columns = columns_of(p), each = p->groups * (full ? KINDS : 1), rows = x->rows, k = p->k;
    float *mine = scratch(1, TASKS * TASK * wide + 8 * ROWS * each + 16);
    double *room = (double *)(mine + TASKS * TASK * wide);
    if (!mine) found->poison = NAN;
    if (rows < FEW) {
        float *raw = packed + rows * k;
        const int64_t c0 = columns * thread / threads, c1 = columns * (thread + 1) / threads;
        const float *left = (const float *)x->a;
        if (dtype != FP32 || x->ks != 1 || x->rs != k) {
            left = packed;
            for (int64_t m = thread; m < rows; m += threads)
                for (int64_t i = 0; i < k; i++) packed[m * k + i] = one_of(x->a, m * x->rs + i * x->ks, dtype);
#pragma omp barrier
        }
        predict_few(p, x->panel, left, rows, c0, c1, raw, wide);
#pragma omp barrier
        for (int64_t m = ROWS * thread; mine && m < rows; m += ROWS * threads)
            judge(p, x, m, rows - m < ROWS ? rows - m : ROWS, raw + m * wide, wide, room, found, dtype, full);
        return;
    }
#if PAIRS
    const int paired = dtype == BF16 && full && x->ks == 1 && k % 2 == 0;
    const int64_t from = k / 2 * thread / threads, to = k / 2 * (thread + 1) / threads;
    if (paired) pack_pairs(p, x->panel, (uint32_t *)packed, each, columns - each, from, to);
#else
    const int paired = 0;
#endif
    for (int64_t i = k * thread / threads; !paired && i < k * (thread + 1) / threads; i++)
        for (int64_t c = 0; c < wide; c++) packed[i * wide + c] = c < columns ? x->panel[c * k + i] : 0.0f;
#pragma omp barrier
    /* Some tasks' predictions, then their results: two long streams from memory instead of many short ones. */
    const int64_t tasks = (rows + TASK - 1) / TASK, last = tasks * (thread + 1) / threads;
    for (int64_t t0 = tasks * thread / threads; mine && t0 < last; t0 += TASKS) {
        const int64_t m0 = t0 * TASK, m1 = (t0 + TASKS < last ? t0 + TASKS : last) * TASK, stop = m1 < rows ? m1 : rows;
        for (int64_t m = m0; m < stop; m += TASK) {
            const int64_t count = stop - m < TASK ? stop - m : TASK;
#if PAIRS
            if (paired)
                predict_pairs(p, x, m, count, (const uint32_t *)packed, each, columns - each, wide, mine + (m - m0) * wide);
            else
#endif
                predict(p, x, m, count, packed, wide, mine + (m - m0) * wide, dtype);
        }
        for (int64_t m = m0; m < stop; m += ROWS)
            judge(p, x, m, stop - m < ROWS ? stop - m : ROWS, mine + (m - m0) * wide, wide, room, found, dtype, full);
    }
}

/* The largest |residual| / bound over all rows; NaN if anything is not finite, or memory is short. */
double abft_worst(const abft_plan *p, const abft_product *x, int threads) {
    const int64_t columns = columns_of(p), wide = (columns + 3) / 4 * 4;
    float *packed = scratch(0, x->rows < FEW ? x->rows * (p->k + wide) : p->k * wide);
    if (!packed) return NAN;
    abft_found found = {0};
    const int full = p->kinds == KINDS;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const int thread = thread_number(), team = thread_count();
        abft_found mine = {0};
#define WITH(DTYPE, FULL) rows_of_one_thread(p, x, packed, wide, thread, team, &mine, DTYPE, FULL)
        if (p->dtype == FP32)
            full ? WITH(FP32, 1) : WITH(FP32, 0);
        else if (p->dtype == BF16)
            full ? WITH(BF16, 1) : WITH(BF16, 0);
        else
            full ? WITH(FP16, 1) : WITH(FP16, 0);
#pragma omp critical(abft_found_of_all)
        {
            if (mine.worst2 > found.worst2) found.worst2 = mine.worst2;
            if (mine.largest2 > found.largest2) found.largest2 = mine.largest2;
            found.poison += mine.poison;
            if (x->statistics) merge_statistics(&found, &mine);
        }
    }
    if (found.poison != 0.0 || !(found.largest2 < p->largest2)) return NAN;
    /* Of a product that is not clean, whoever judges it next keeps the statistics. */
    if (x->statistics && found.worst2 <= 1.0) add_statistics(x->statistics, &found, p->groups, (int)p->kinds);
    return sqrt(found.worst2);
}
