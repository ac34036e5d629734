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
 * Vectors are those of GCC and clang, as wide as the processor's registers. No library, no headers of torch.
 */
#include "rowsums.h"

/* A product's judgement, as far as it depends on shapes alone. Where a panel holds e alone, a² and ρ² of the others are 0, and b² is 1. */
typedef struct {
    int64_t n, k, width, groups, kinds, shared_sketch, dtype;
    const float *signs;      /* of a group of `width`, padded by zeros to FRAGMENT */
    const float *last_signs; /* of the last group, if it is narrower */
    double accumulate2[KINDS]; /* a_j² */
    double round2[KINDS];      /* ρ_j² */
    double absolute2[KINDS];   /* b_j² */
    double largest2;           /* a bound is below the root of this, or nothing can be judged */
} abft_plan;

/* TASK: rows of a block of statistics, and that one thread multiplies; TASKS: so many before their results are looked at. DEPTH: numbers
   of a row that are multiplied at a time, which with those of the panel stay in the nearest cache. Below FEW rows bf16 is widened. LINE:
   numbers of a line of the cache. ROWS_AHEAD: so many rows before they are multiplied their memory is asked for. */
enum { ROWS = 8, TASK = 32, TASKS = 4, DEPTH = 384, NARROW = 128, SOON = 16, QUAD = 4, TALL = 3, BROAD = 2, FEW = 16,
       LINE = 64 / 4, ROWS_AHEAD = 6 };

/* What is multiplied, and by what it is judged. */
typedef struct {
    const float *panel;      /* (columns, k) */
    const float *bias;       /* (groups × kinds) or NULL: what the bias adds to the predictions */
    const float *bias_noise; /* … and to the squares of the noise: (1) with a shared sketch, else (groups); or NULL */
    const void *y, *a;
    int64_t ldy, rs, ks, rows; /* y (rows, n), its columns adjacent; a (rows, k) of any strides */
    struct abft_statistics *statistics; /* NULL: nobody keeps any */
    const void *layout, *w;             /* not NULL: the panel is made here, of W as abft_encode has it, for this product alone */
    int64_t ldw, rows_adjacent, encoding_threads;
} abft_product;

int abft_encode(const void *layout, const void *w, int64_t ld, int rows_adjacent, float *out, int threads);

/* What is kept of x = residual / τ for the second detector (abft/statistics/accumulators.py), per kind of checksum. */
enum { COUNT, SUM, SQUARES, MOST, ABOVE, BLOCKS = ABOVE + 4, MAXIMA, MAXIMA2, FIELDS };
typedef struct abft_statistics {
    double level2[4][KINDS]; /* counted above these, x² */
    double cap2[KINDS];      /* one row weighs no more than this, x² */
    double kept[KINDS][FIELDS];
} abft_statistics;

/* --- what is predicted from the input ----------------------------------------------------------------------- */

static int64_t columns_of(const abft_plan *p) { return p->groups * p->kinds + SKETCHES * (p->shared_sketch ? 1 : p->groups); }

/* Some columns of the panel, which lie k apart, and where their products with a task's rows go: raw (TASK, wide). */
typedef struct {
    const float *panel;
    int64_t k, columns, wide;
    float *raw;
} abft_columns;

/* raw (rows, columns) += a (rows, depth) · panelᵀ, both as they lie, numbers adjacent. Summed apart from what is there: short chains of
   additions round less than one long one. rows: at most TALL; columns: QUAD, or one. */
INLINE void multiply_along(const float *a, int64_t rs, int rows, const float *panel, int64_t k, int columns, int64_t depth, float *raw,
                           int64_t wide) {
    vf sum[TALL][QUAD] = {{{0}}};
#define STEP(LOAD, ...)                                                                                                    \
    {                                                                                                                      \
        vf v[TALL];                                                                                                        \
        UNROLL for (int r = 0; r < rows; r++) {                                                                            \
            v[r] = LOAD(a, r * rs + i, ##__VA_ARGS__, FP32);                                                               \
            HOLD(v[r]);                                                                                                    \
        }                                                                                                                  \
        UNROLL for (int c = 0; c < columns; c++) {                                                                         \
            vf p = LOAD(panel, c * k + i, ##__VA_ARGS__, FP32);                                                            \
            HOLD(p);                                                                                                       \
            UNROLL for (int r = 0; r < rows; r++) {                                                                        \
                sum[r][c] += v[r] * p;                                                                                     \
                HOLD(sum[r][c]);                                                                                           \
            }                                                                                                              \
        }                                                                                                                  \
    }
    int64_t i = 0;
    for (; i + LANES <= depth; i += LANES) STEP(lanes_of)
    if (i < depth) STEP(some_lanes, depth - i)
#undef STEP
    UNROLL for (int r = 0; r < rows; r++) {
        const v4 sums = sum_four(sum[r][0], sum[r][1], sum[r][2], sum[r][3]);
        if (columns == QUAD)
            *(v4 *)(raw + r * wide) += sums;
        else
            raw[r * wide] += sums[0];
    }
}

/* ahead: numbers from a row to the one whose memory is asked for with it, a page or two further, which no unit of the processor foresees;
   0: rows are near. */
static __attribute__((noinline)) void multiply_rows(const float *a, int64_t rs, int64_t rows, const abft_columns *to, int64_t k0, int64_t depth,
                                                    int64_t ahead) {
    const float *panel = to->panel + k0;
    const int64_t k = to->k, wide = to->wide;
    for (int64_t m = 0; m < rows;) {
        const int tall = rows - m >= TALL;
        const float *here = a + m * rs;
        float *raw = to->raw + m * wide;
        for (int64_t i = 0; ahead && i < depth; i += LINE)
            for (int r = 0; r < (tall ? TALL : 1); r++) __builtin_prefetch(here + r * rs + ahead + i);
        int64_t c = 0;
        for (; c + QUAD <= to->columns; c += QUAD)
            tall ? multiply_along(here, rs, TALL, panel + c * k, k, QUAD, depth, raw + c, wide)
                 : multiply_along(here, rs, 1, panel + c * k, k, QUAD, depth, raw + c, wide);
        for (; c < to->columns; c++)
            for (int r = 0; r < (tall ? TALL : 1); r++)
                multiply_along(here + r * rs, rs, 1, panel + c * k, k, 1, depth, raw + r * wide + c, wide);
        m += tall ? TALL : 1;
    }
}

/* The same of a copy (depth, TASK), where rows are adjacent: sums (columns, TASK) += … of BROAD · LANES rows. */
INLINE void multiply_across(const float *a, const float *panel, int64_t k, int columns, int64_t depth, float *sums) {
    vf sum[QUAD][BROAD] = {{{0}}};
    for (int64_t i = 0; i < depth; i++) {
        vf v[BROAD];
        UNROLL for (int j = 0; j < BROAD; j++) {
            v[j] = *(const vf *)(a + i * TASK + j * LANES);
            HOLD(v[j]);
        }
        UNROLL for (int c = 0; c < columns; c++) {
            vf p = panel[c * k + i] - (vf){0};
            HOLD(p);
            UNROLL for (int j = 0; j < BROAD; j++) {
                sum[c][j] += v[j] * p;
                HOLD(sum[c][j]);
            }
        }
    }
    UNROLL for (int c = 0; c < columns; c++) UNROLL for (int j = 0; j < BROAD; j++) *(vf *)(sums + c * TASK + j * LANES) += sum[c][j];
}

static __attribute__((noinline)) void multiply_columns(const float *a, const abft_columns *to, int64_t k0, int64_t depth, float *sums) {
    for (int64_t m = 0; m < TASK; m += BROAD * LANES) {
        int64_t c = 0;
        for (; c + QUAD <= to->columns; c += QUAD)
            multiply_across(a + m, to->panel + c * to->k + k0, to->k, QUAD, depth, sums + c * TASK + m);
        for (; c < to->columns; c++) multiply_across(a + m, to->panel + c * to->k + k0, to->k, 1, depth, sums + c * TASK + m);
    }
}

INLINE void soon(const void *p, int64_t i, int dtype) { __builtin_prefetch((const char *)p + i * (dtype == FP32 ? 4 : 2)); }

/* Rows [m0, m0 + rows) of A times some columns. Other types, other orders and what is left over are copied first. `sums`: room for
   (columns, TASK) numbers. */
INLINE void predict(const abft_plan *p, const abft_product *x, int64_t m0, int64_t rows, const abft_columns *to, float *sums, int dtype) {
    const int64_t rs = x->rs, ks = x->ks;
    const int across = rs == 1 && ks != 1;
    float block[TASK * DEPTH] __attribute__((aligned(64)));
    if (across)
        memset(sums, 0, to->columns * TASK * sizeof(float));
    else
        for (int64_t m = 0; m < rows; m++) memset(to->raw + m * to->wide, 0, to->columns * sizeof(float));
    const int64_t most = across ? NARROW : DEPTH;
    for (int64_t k0 = 0; k0 < p->k; k0 += most) {
        const int64_t depth = p->k - k0 < most ? p->k - k0 : most;
        if (across) {
            /* Copied in any case: what lies a power of two apart has a few lines of the cache to itself. */
            for (int64_t k = 0; k < depth; k++) {
                const int64_t at = (k0 + k) * ks + m0;
                soon(x->a, at + SOON * ks, dtype), soon(x->a, at + SOON * ks + TASK - 1, dtype);
                if (rows == TASK)
                    UNROLL for (int m = 0; m < TASK; m += LANES) *(vf *)(block + k * TASK + m) = lanes_of(x->a, at + m, dtype);
                else
                    for (int m = 0; m < TASK; m += LANES) *(vf *)(block + k * TASK + m) = lanes_at_most(x->a, at + m, rows - m, dtype);
            }
            multiply_columns(block, to, k0, depth, sums);
        } else if (dtype == FP32 && ks == 1) {
            multiply_rows((const float *)x->a + m0 * rs + k0, rs, rows, to, k0, depth, x->rows > TASK ? ROWS_AHEAD * rs : 0);
        } else {
            for (int64_t m = 0; m < rows; m++) {
                const int64_t at = (m0 + m) * rs + k0 * ks;
                int64_t k = 0;
                for (; ks == 1 && k + LANES <= depth; k += LANES) *(vf *)(block + m * DEPTH + k) = lanes_of(x->a, at + k, dtype);
                for (; k < depth; k++) block[m * DEPTH + k] = one_of(x->a, at + k * ks, dtype);
            }
            multiply_rows(block, DEPTH, rows, to, k0, depth, 0);
        }
    }
    for (int64_t m = 0; across && m < rows; m++)
        for (int64_t c = 0; c < to->columns; c++) to->raw[m * to->wide + c] = sums[c * TASK + m];
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

/* --- the comparison ----------------------------------------------------------------------------------------- */

typedef struct {
    d4 worst2, largest2, poison;  /* per kind; poison: 0, or NaN if anything was not finite */
    d4 sum, squares, most, block; /* of x, of x², the largest x² of all and of the block; where statistics are kept */
    d4 above[4];
    int64_t rows;
    double kept[KINDS][FIELDS];
} abft_found;

typedef int64_t m4 __attribute__((vector_size(32)));

INLINE d4 pick(m4 where, d4 a, d4 b) { return (d4)(((m4)a & where) | ((m4)b & ~where)); }
INLINE d4 larger(d4 x, d4 y) { return pick(y > x, y, x); }

/* Adds a check's x² to what is kept. They are of one product that is clean, or nobody will read what is kept of it. */
static __attribute__((noinline)) void keep(const abft_statistics *s, abft_found *found, const d4 *ratio2, const d4 *residual) {
    const d4 none = {0}, one = none + 1.0, cap = *(const d4 *)s->cap2, capped = pick(*ratio2 > cap, cap, *ratio2);
    d4 root;
    for (int kind = 0; kind < KINDS; kind++) root[kind] = sqrt(capped[kind]);
    found->sum += pick(*residual < none, -root, root);
    found->squares += capped;
    found->block = larger(found->block, *ratio2);
    for (int i = 0; i < 4; i++) found->above[i] += pick(*ratio2 > *(const d4 *)s->level2[i], one, none);
}

/* A block of rows is complete: its maximum counts as one. */
static void close_block(abft_found *found) {
    for (int kind = 0; kind < KINDS; kind++) {
        found->kept[kind][BLOCKS] += 1;
        found->kept[kind][MAXIMA] += sqrt(found->block[kind]);
        found->kept[kind][MAXIMA2] += found->block[kind];
    }
    found->most = larger(found->most, found->block);
    found->block = (d4){0};
}

static void add_statistics(abft_statistics *s, const abft_found *found, int64_t groups, int64_t kinds) {
    for (int64_t kind = 0; kind < kinds; kind++) {
        double *to = s->kept[kind];
        const double most = sqrt(found->most[kind]);
        to[COUNT] += (double)(found->rows * groups);
        to[SUM] += found->sum[kind];
        to[SQUARES] += found->squares[kind];
        to[MOST] = most > to[MOST] ? most : to[MOST];
        for (int i = 0; i < 4; i++) to[ABOVE + i] += found->above[i][kind];
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

INLINE d4 widened(v4 v) { return __builtin_convertvector(v, d4); }

/* One row or two of y, from m0, with their raw predictions; adds to what was found. */
INLINE void judge_rows(const abft_plan *p, const abft_product *x, int64_t m0, int rows, const float *raw, int64_t wide, abft_found *found,
                       int dtype, int full) {
    const int64_t kinds = full ? KINDS : 1, each = p->groups * kinds;
    const d4 accumulate2 = *(const d4 *)p->accumulate2, round2 = *(const d4 *)p->round2, absolute2 = *(const d4 *)p->absolute2;
    double noise[2] = {0}, actual[2 * KINDS] __attribute__((aligned(32))) = {0}, square[2];
    for (int64_t g = 0; g < p->groups; g++) {
        const int64_t start = g * p->width, width = p->n - start < p->width ? p->n - start : p->width;
        sums_of_rows(x->y, m0 * x->ldy + start, x->ldy, rows, width, width < p->width ? p->last_signs : p->signs, dtype, full, actual, KINDS,
                     square);
        UNROLL for (int r = 0; r < rows; r++) {
            const float *c = raw + r * wide;
            if (g == 0 || !p->shared_sketch) {
                const d4 sketch = widened(*(const v4 *)(c + each + g * SKETCHES)), h = sketch * sketch;
                noise[r] = ((h[0] + h[1]) + (h[2] + h[3])) * (1.0 / SKETCHES);
                if (x->bias_noise) noise[r] += (double)x->bias_noise[g];
            }
            d4 predicted = {0};
            if (full) {
                predicted = widened(*(const v4 *)(c + g * KINDS));
                if (x->bias) predicted += widened(*(const v4 *)(x->bias + g * KINDS));
            } else
                predicted[E] = (double)c[g] + (x->bias ? (double)x->bias[g] : 0.0);
            const d4 residual = *(const d4 *)(actual + r * KINDS) - predicted;
            const d4 tau2 = accumulate2 * (predicted * predicted + (square[r] + noise[r])) + (round2 * square[r] + absolute2);
            const d4 ratio2 = residual * residual / tau2;
            found->poison += ratio2 * 0.0;
            found->worst2 = larger(found->worst2, ratio2);
            found->largest2 = larger(found->largest2, tau2);
            if (x->statistics) keep(x->statistics, found, &ratio2, &residual);
        }
    }
}

/* Rows [m0, m0 + rows) of y; blocks of TASK rows, wherever threads begin, and where there are fewer rows whatever comes at once. */
INLINE void judge(const abft_plan *p, const abft_product *x, int64_t m0, int64_t rows, const float *raw, int64_t wide, abft_found *found,
                  int dtype, int full) {
    int64_t m = 0;
    for (; m + 2 <= rows; m += 2) judge_rows(p, x, m0 + m, 2, raw + m * wide, wide, found, dtype, full);
    if (m < rows) judge_rows(p, x, m0 + m, 1, raw + m * wide, wide, found, dtype, full);
    found->rows += rows;
    if (x->statistics && ((m0 + rows) % TASK == 0 || m0 + rows == x->rows || x->rows < FEW)) close_block(found);
}

/* --- all rows ----------------------------------------------------------------------------------------------- */

/* `shared`: what all threads see, the products of few rows or, for pairs, the panel. */
INLINE void rows_of_one_thread(const abft_plan *p, const abft_product *x, float *shared, int64_t wide, int thread, int threads,
                               abft_found *found, int dtype, int full, int paired) {
    const int64_t columns = columns_of(p), rows = x->rows;
    float *mine = scratch(1, (TASKS + 1) * TASK * wide);
    if (!mine) found->poison += NAN;
    abft_columns to = {x->panel, p->k, columns, wide, shared};
    if (rows <= TASK && !paired) { /* by columns: what takes time is to read the panel */
        const int64_t c0 = columns / QUAD * thread / threads * QUAD, c1 = columns / QUAD * (thread + 1) / threads * QUAD;
        to.panel += c0 * p->k, to.raw += c0, to.columns = (thread + 1 < threads ? c1 : columns) - c0;
        if (mine) predict(p, x, 0, rows, &to, mine, dtype);
#pragma omp barrier
        for (int64_t m = ROWS * thread; mine && m < rows; m += ROWS * threads)
            judge(p, x, m, rows - m < ROWS ? rows - m : ROWS, shared + m * wide, wide, found, dtype, full);
        return;
    }
#if PAIRS
    const int64_t each = p->groups * KINDS, pairs = p->k / 2;
    if (paired) {
        pack_pairs(p, x->panel, (uint32_t *)shared, each, columns - each, pairs * thread / threads, pairs * (thread + 1) / threads);
#pragma omp barrier
    }
#endif
    /* Some tasks' predictions, then their results: two long streams from memory instead of many short ones. */
    const int64_t tasks = (rows + TASK - 1) / TASK, last = tasks * (thread + 1) / threads;
    for (int64_t t0 = tasks * thread / threads; mine && t0 < last; t0 += TASKS) {
        const int64_t m0 = t0 * TASK, m1 = (t0 + TASKS < last ? t0 + TASKS : last) * TASK, stop = m1 < rows ? m1 : rows;
        for (int64_t m = m0; m < stop; m += TASK) {
            const int64_t count = stop - m < TASK ? stop - m : TASK;
            to.raw = mine + (m - m0 + TASK) * wide;
#if PAIRS
            if (paired)
                predict_pairs(p, x, m, count, (const uint32_t *)shared, each, columns - each, wide, to.raw);
            else
#endif
                predict(p, x, m, count, &to, mine, dtype);
        }
        for (int64_t m = m0; m < stop; m += ROWS)
            judge(p, x, m, stop - m < ROWS ? stop - m : ROWS, mine + (m - m0 + TASK) * wide, wide, found, dtype, full);
    }
}

INLINE double largest_of(d4 v) {
    double most = v[0];
    for (int i = 1; i < KINDS; i++) most = v[i] > most ? v[i] : most;
    return most;
}

/* The largest |residual| / bound over all rows; NaN if anything is not finite, or memory is short. */
double abft_worst(const abft_plan *p, const abft_product *x, int threads) {
    const int64_t columns = columns_of(p), wide = (columns + 3) / 4 * 4;
    const int full = p->kinds == KINDS, paired = PAIRS && p->dtype == BF16 && full && x->ks == 1 && p->k % 2 == 0 && x->rows >= FEW;
    float *shared = scratch(0, paired ? p->k * wide : TASK * wide);
    if (!shared) return NAN;
    abft_product fresh = *x;
    if (x->layout) {
        float *panel = scratch(2, columns * p->k);
        if (!panel || abft_encode(x->layout, x->w, x->ldw, (int)x->rows_adjacent, panel, (int)x->encoding_threads)) return NAN;
        fresh.panel = panel, x = &fresh;
    }
    abft_found found = {{0}};
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const int thread = thread_number(), team = thread_count();
        abft_found mine = {{0}};
#define WITH(DTYPE, FULL) rows_of_one_thread(p, x, shared, wide, thread, team, &mine, DTYPE, FULL, paired)
        if (p->dtype == FP32)
            full ? WITH(FP32, 1) : WITH(FP32, 0);
        else if (p->dtype == BF16)
            full ? WITH(BF16, 1) : WITH(BF16, 0);
        else
            full ? WITH(FP16, 1) : WITH(FP16, 0);
#pragma omp critical(abft_found_of_all)
        {
            found.worst2 = larger(found.worst2, mine.worst2);
            found.largest2 = larger(found.largest2, mine.largest2);
            found.poison += mine.poison;
            if (x->statistics) merge_statistics(&found, &mine);
        }
    }
    const double poison = (found.poison[0] + found.poison[1]) + (found.poison[2] + found.poison[3]), worst2 = largest_of(found.worst2);
    if (poison != 0.0 || !(largest_of(found.largest2) < p->largest2)) return NAN;
    /* Of a product that is not clean, whoever judges it next keeps the statistics. */
    if (x->statistics && worst2 <= 1.0) add_statistics(x->statistics, &found, p->groups, p->kinds);
    return sqrt(worst2);
}
