/* Attention's backward with its checks in one pass: what abft/attention/backward.py does in five products and a dozen sweeps.
 *
 *     S, P = exp(x - m) / l       the forward's chains and exponentials once more; Σ P = 1, m and l being the forward's
 *     dV = Pᵀ dO                  rows: Σ w_j dV = Pᵀ (Σ w_j dO); columns: 1ᵀ dV = Σ_i (Σ_t P_it) dO_i
 *     dP = dO Vᵀ                  Σ w_j dP = dO · (Σ w_j V), per row and CHUNK of keys
 *     δ = Σ P dP, dX = P (dP - δ) Σ dX = 0; Σ w dX = Σ w P dP - δ Σ w P
 *     dQ = scale · dX K           Σ w_j dQ = dX · (Σ w_j K)
 *     dK = dXᵀ (scale · q)        as dV
 *
 * A block of queries goes over its keys twice, CHUNK by CHUNK: to δ, and from it. Sums over queries are chains of fma over CHUNK of
 * them, counted from where a tile of the steps begins, added up over the tile, then over the tiles: the bits are those of the steps.
 */
#include "attention.h"

enum { SKETCHED = KINDS }; /* behind the weighted sums of dO's and q's rows: four random columns, for the noise of dV and dK */
enum { OF_S, OF_DP, OF_DQ, OF_DK, OF_DV, PRODUCTS };
enum { DELTA, OF_P, WEIGHTED_PRODUCT, WEIGHTED_P, ROW_SUMS };

typedef struct {
    abft_attended a; /* its out is dQ; maxima and sums are read */
    int64_t gs[4], dks[3], dvs[3];
    int64_t tile; /* queries of a tile of the steps */
    const void *d_out;
    float *dk, *dv;
    const float *weights, *sketches; /* (padded keys); (SKETCHES, members · length), rows sketch_step apart */
    int64_t sketch_step;
    double vanishing_bound, columns_bound;
    abft_group values_group, last_values, rows_of_q, rows_of_k, rows_of_v;
    double worst2[PRODUCTS];
} abft_gradients;

/* A sum over queries: the chain that is open, that of the tile, and the whole; (padded keys, ld), each with its panel. */
typedef struct {
    int64_t ld;
    float *chain, *tile, *total;
    double *columns, *reach; /* what 1ᵀ total must be, and Σ |…| of what was added up there */
} key_sum;

typedef struct {
    int64_t chunks, ld_chunk, wide, deep, ld_q, ld_g, ld, block;
    float *keys, *nu_keys, *values, *nu_values, *rows_of_k, *nu_rows; /* packed: of a head */
    key_sum k, v;
    float *q, *g, *p, *dx, *panel, *dq, *dq_panel, *noise, *deltas; /* of a block */
    vf *sums;
    int doubtful; /* rows of this head are suspect: then its columns prove nothing */
} gradient_room;

/* c (TALL, N vectors) += aᵀ · b, a (depth, TALL): the chains that c holds go on. */
#define MULTIPLY_TURNED(NAME, N)                                                                                           \
    INLINE void NAME(const float *a, int64_t lda, const float *b, int64_t ldb, int64_t depth, float *c, int64_t ldc) {     \
        vf sum[TALL][N];                                                                                                   \
        UNROLL for (int r = 0; r < TALL; r++) UNROLL for (int j = 0; j < N; j++) sum[r][j] = at(c + r * ldc + j * LANES);  \
        for (int64_t k = 0; k < depth; k++) {                                                                              \
            vf p[N];                                                                                                       \
            UNROLL for (int j = 0; j < N; j++) {                                                                           \
                p[j] = at(b + k * ldb + j * LANES);                                                                        \
                HOLD(p[j]);                                                                                                \
            }                                                                                                              \
            UNROLL for (int r = 0; r < TALL; r++) UNROLL for (int j = 0; j < N; j++) sum[r][j] += a[k * lda + r] * p[j];   \
        }                                                                                                                  \
        UNROLL for (int r = 0; r < TALL; r++) UNROLL for (int j = 0; j < N; j++) *(vf *)(c + r * ldc + j * LANES) = sum[r][j]; \
    }
MULTIPLY_TURNED(turned_1, 1)
MULTIPLY_TURNED(turned_2, 2)
MULTIPLY_TURNED(turned_3, 3)

/* c (rows, n + panel) += aᵀ · b: rows a multiple of 8, n of 16. */
static __attribute__((noinline)) void product_turned(const float *a, int64_t lda, int64_t rows, const float *b, int64_t ldb, int64_t n,
                                                     int64_t depth, float *c, int64_t ldc, int panel) {
    const int64_t all = n / LANES + (panel ? PANEL_VECTORS : 0);
    for (int64_t r = 0; r < rows; r += TALL)
        for (int64_t j = 0, tile; j < all; j += tile) {
            tile = tile_of(all - j);
            const float *right = b + j * LANES;
            float *to = c + r * ldc + j * LANES;
            if (tile == 3)
                turned_3(a + r, lda, right, ldb, depth, to, ldc);
            else if (tile == 2)
                turned_2(a + r, lda, right, ldb, depth, to, ldc);
            else
                turned_1(a + r, lda, right, ldb, depth, to, ldc);
        }
}

/* P of the keys [from, to) of a row. One function for each kind of mask. */
#define REMEMBER(NAME, KIND)                                                                                               \
    static __attribute__((noinline)) void remember_##NAME(const float *s, float m, float inverse, float *p, const seen_keys *w, \
                                                          int64_t keys, int64_t from, int64_t to) {                        \
        for (int64_t n = from; n < to;) {                                                                                  \
            vf x[ABREAST];                                                                                                 \
            if (n >= w->first && n + STRIDE <= at_most(to, w->last)) {                                                     \
                EACH(i, ABREAST) x[i] = logits_inside(s, n + i * LANES, w, KIND) - m;                                      \
                exp_of(x, ABREAST);                                                                                        \
                EACH(i, ABREAST) *(vf *)(p + n + i * LANES) = x[i] * inverse;                                              \
                n += STRIDE;                                                                                               \
            } else {                                                                                                       \
                x[0] = logits(s, n, w, keys, KIND) - m;                                                                    \
                exp_of(x, 1);                                                                                              \
                *(vf *)(p + n) = x[0] * inverse;                                                                           \
                n += LANES;                                                                                                \
            }                                                                                                              \
        }                                                                                                                  \
    }
REMEMBER(plain, NO_MASK)
REMEMBER(seen, SEEN)
REMEMBER(added, ADDED)
typedef void (*remember_row)(const float *, float, float, float *, const seen_keys *, int64_t, int64_t, int64_t);
static const remember_row REMEMBERED[] = {remember_plain, remember_seen, remember_added};

/* A row of q or dO, times scale, with its weighted sums and sketches behind `padded` columns: of the numbers themselves, whose copy may
   be wrong. */
INLINE void pack_row(const void *from, int64_t start, int64_t width, float scale, const abft_group *g, const float *sketches, int64_t step,
                     float *to, int64_t padded, int checked, int dtype) {
    for (int64_t e = 0; e < width; e += 16)
        EACH_PART(i) *(vf *)(to + e + i * LANES) = lanes_at_most(from, start + e + i * LANES, width - e - i * LANES, dtype) * scale;
    if (!checked) return;
    double sums[KINDS] __attribute__((aligned(32))), squares = sums_of_group(from, start, width, g->weights, dtype, NULL, sums) * scale * scale;
    double nu2 = __builtin_expect(squares < TINY, 0) ? in_full(to, NULL, width) : squares;
    for (int j = 0; j < KINDS; j++) {
        sums[j] *= scale;
        nu2 += sums[j] * sums[j] * g->share[j];
    }
    const double nu = sqrt(nu2);
    for (int j = 0; j < KINDS; j++) {
        to[padded + j] = (float)sums[j];
        to[padded + SKETCHED + j] = (float)(nu * sketches[j * step]);
    }
}

/* Σ numbers of a row of each kind, PARTS each; the first as abft_row_sums. */
INLINE void sums_of_row(const float *p, const float *dp, const float *w, int64_t from, int64_t to, vf *sums, int checked) {
    vf s[ROW_SUMS][PARTS];
    UNROLL for (int j = 0; j < ROW_SUMS; j++) EACH_PART(i) s[j][i] = (vf){0};
    for (int64_t n = from; n < to; n += 16)
        EACH_PART(i) {
            const vf a = at(p + n + i * LANES), b = at(dp + n + i * LANES);
            s[DELTA][i] = fma_of(a, b, s[DELTA][i]);
            if (!checked) continue;
            const vf weighted = a * at(w + n + i * LANES);
            s[OF_P][i] += a;
            s[WEIGHTED_PRODUCT][i] = fma_of(weighted, b, s[WEIGHTED_PRODUCT][i]);
            s[WEIGHTED_P][i] += weighted;
        }
    UNROLL for (int j = 0; j < ROW_SUMS; j++) EACH_PART(i) sums[j * PARTS + i] += s[j][i];
}

/* dX over dP; the noise of dQ. */
INLINE float gradient_of_row(const float *p, float *dx, float delta, const float *nu, int64_t from, int64_t to, int checked) {
    vf noise[PARTS];
    EACH_PART(i) noise[i] = (vf){0};
    for (int64_t n = from; n < to; n += 16)
        EACH_PART(i) {
            const vf y = (at(dx + n + i * LANES) - delta) * at(p + n + i * LANES);
            *(vf *)(dx + n + i * LANES) = y;
            if (!checked) continue;
            const vf z = y * at(nu + n + i * LANES);
            noise[i] = fma_of(z, z, noise[i]);
        }
    return (float)total_of(noise);
}

/* Whether Σ P = 1, l can be a sum, and dX has the sums that it must have; then ΣP, ΣdX, Σ|dX| are in `found`. */
INLINE int row_agrees(abft_gradients *y, float l, const vf *sums, const float *dx, float delta, int64_t from, int64_t to, int64_t row,
                      double *found, double *worst2) {
    abft_attended *x = &y->a;
    const double total = found[0] = total_of(sums + OF_P * PARTS), second = fabs(total - (l > 0));
    if (__builtin_expect(!(second <= x->softmax_bound && ((l >= 1 - x->range && l <= (double)x->keys * (1 + x->range)) || l == 0)), 0)) {
        suspect(x, row, IN_PROBABILITIES, second, x->softmax_bound);
        return 0;
    }
    vf plain[PARTS], weighted[PARTS], size[PARTS];
    EACH_PART(i) plain[i] = weighted[i] = size[i] = (vf){0};
    for (int64_t n = from; n < to; n += 16)
        EACH_PART(i) {
            const vf d = at(dx + n + i * LANES);
            plain[i] += d;
            weighted[i] = fma_of(d, at(y->weights + n + i * LANES), weighted[i]);
            size[i] += size_of_each(d);
        }
    found[1] = total_of(plain);
    found[2] = total_of(size);
    const double expected = total_of(sums + WEIGHTED_PRODUCT * PARTS) - (double)delta * total_of(sums + WEIGHTED_P * PARTS);
    const double first = fabs(found[1]), other = fabs(total_of(weighted) - expected);
    const double bound = y->vanishing_bound * (fabs((double)delta) + found[2]) + 0x1p-126, residual = first > other ? first : other;
    if (__builtin_expect(!(first <= bound && other <= bound && bound < INFINITY), 0)) {
        suspect(x, row, IN_DX, first == first && other == other ? residual : NAN, bound);
        return 0;
    }
    const double a = second / x->softmax_bound, b = residual / bound, larger = a > b ? a : b;
    worst2[OF_DP] = larger * larger > worst2[OF_DP] ? larger * larger : worst2[OF_DP];
    return 1;
}

INLINE void hit_in(const abft_attended *x, int place, int64_t row, int64_t chunk, float *values) {
    if (__builtin_expect(x->strike == place && x->strike_column >= 0 && x->strike_column / CHUNK == chunk, 0)) hit(x, place, row, values);
}

/* What a block's rows add to 1ᵀ total. */
INLINE void add_columns(const key_sum *s, const float *right, int64_t columns, double sum, double size) {
    for (int64_t e = 0; e < columns; e += 4) {
        const d4 wide = __builtin_convertvector(*(const v4 *)(right + e), d4), reach = size * wide;
        *(d4 *)(s->columns + e) += sum * wide;
        *(d4 *)(s->reach + e) += (d4)((m4)reach & 0x7fffffffffffffff);
    }
}

/* Some queries of a tile, `first` of its members' rows on. */
typedef struct {
    int64_t b, h, start, each, first, rows;
} some_queries;

INLINE int64_t member_of(const some_queries *s, int64_t r) { return (s->first + r) / s->each; }
INLINE int64_t query_of(const some_queries *s, int64_t r) { return s->start + (s->first + r) % s->each; }
INLINE int64_t number_of(const abft_attended *x, const some_queries *s, int64_t r) {
    return ((s->b * x->heads + s->h) * x->members + member_of(s, r)) * x->length + query_of(s, r);
}

static __attribute__((noinline)) void block_of_gradients(abft_gradients *y, gradient_room *m, const some_queries *s, double *worst2) {
    abft_attended *x = &y->a;
    const int dtype = (int)x->dtype, checked = (int)x->checked;
    const int64_t rows = s->rows, tall = (rows + 7) / 8 * 8, of_head = s->start * x->members + s->first;
    const int64_t size_of_mask = x->mask_kind == NO_MASK ? 0 : x->mask_kind == SEEN ? 1 : 4;
    const int crosses = member_of(s, 0) != member_of(s, rows - 1);
    const seen_keys first = seen_by(x, crosses ? s->start : query_of(s, 0), NULL);
    const seen_keys last = seen_by(x, crosses ? s->start + s->each - 1 : query_of(s, rows - 1), NULL);
    const int64_t c0 = at_most(first.first / CHUNK, m->chunks - 1), c1 = at_least((last.last + CHUNK - 1) / CHUNK, c0 + 1);
    seen_keys seen[BLOCK];
    int64_t number[BLOCK];
    unsigned char wrong[BLOCK] = {0};
    for (int64_t r = 0; r < rows; r++) {
        const int64_t g = member_of(s, r), l = query_of(s, r);
        const int64_t q_at = s->b * x->qs[0] + s->h * x->qs[1] + g * x->qs[2] + l * x->qs[3];
        const int64_t g_at = s->b * y->gs[0] + s->h * y->gs[1] + g * y->gs[2] + l * y->gs[3];
        if (r + AHEAD < rows)
            for (int64_t e = 0; e < at_least(x->width, x->depth); e += 16) {
                if (e < x->width) soon(x->q, q_at + AHEAD * x->qs[3] + e, dtype);
                if (e < x->depth) soon(y->d_out, g_at + AHEAD * y->gs[3] + e, dtype);
            }
        const float *sketches = y->sketches + of_head + r;
        pack_row(x->q, q_at, x->width, (float)x->scale, &y->rows_of_k, sketches, y->sketch_step, m->q + r * m->ld_q, m->wide, checked, dtype);
        pack_row(y->d_out, g_at, x->depth, 1.0f, &y->rows_of_v, sketches, y->sketch_step, m->g + r * m->ld_g, m->deep, checked, dtype);
        number[r] = number_of(x, s, r);
        seen[r] = seen_by(x, l, (const char *)x->mask + (s->b * x->ms[0] + s->h * x->ms[1] + g * x->ms[2] + l * x->ms[3]) * size_of_mask);
        memset(m->sums + r * ROW_SUMS * PARTS, 0, ROW_SUMS * 16 * sizeof(float));
        m->noise[r] = 0;
    }
    float *panel = checked ? m->panel : NULL;
    for (int64_t c = c0; c < c1; c++) {
        const int64_t at = c * CHUNK, n = sixteens(at_most(CHUNK, x->keys - at));
        float *scores = m->dx + at, *p = m->p + at;
        product(m->q, m->ld_q, tall, m->keys + c * x->width * m->ld_chunk, m->ld_chunk, n, x->width, scores, m->ld, panel, 1);
        for (int64_t r = 0; r < rows; r++) {
            float *row = m->dx + r * m->ld, *of_p = m->p + r * m->ld;
            const int64_t from = at_most(at_least(seen[r].first / 16 * 16, at), at + n), to = at_least(at_most(sixteens(seen[r].last), at + n), from);
            const float l = x->sums[number[r]];
            hit_in(x, IN_SCORES, number[r], c, row);
            REMEMBERED[x->mask_kind](row, x->maxima[number[r]], 1.0f / (l == 0 ? 1.0f : l), of_p, seen + r, x->keys, from, to);
            if (from > at) memset(of_p + at, 0, (from - at) * sizeof(float));
            if (to < at + n) memset(of_p + to, 0, (at + n - to) * sizeof(float));
            hit_in(x, IN_PROBABILITIES, number[r], c, of_p);
            if (checked && !wrong[r])
                wrong[r] = !chunk_agrees(x, c == m->chunks - 1 ? &x->last_keys : &x->keys_group, row + at, m->q + r * m->ld_q,
                                         m->nu_keys + c * m->wide, x->width, m->panel + r * PANEL, number[r], IN_SCORES, worst2 + OF_S);
        }
        product_turned(p, m->ld, n, m->g, m->ld_g, m->deep, rows, m->v.chain + at * m->v.ld, m->v.ld, checked);
        product(m->g, m->ld_g, tall, m->values + c * x->depth * m->ld_chunk, m->ld_chunk, n, x->depth, scores, m->ld, panel, 1);
        for (int64_t r = 0; r < rows; r++) {
            hit_in(x, IN_DP, number[r], c, m->dx + r * m->ld);
            sums_of_row(m->p + r * m->ld, m->dx + r * m->ld, y->weights, at, at + n, m->sums + r * ROW_SUMS * PARTS, checked);
            if (checked && !wrong[r])
                wrong[r] = !chunk_agrees(x, c == m->chunks - 1 ? &y->last_values : &y->values_group, scores + r * m->ld, m->g + r * m->ld_g,
                                         m->nu_values + c * m->deep, x->depth, m->panel + r * PANEL, number[r], IN_DP, worst2 + OF_DP);
        }
    }
    for (int64_t r = 0; r < rows; r++) {
        m->deltas[r] = (float)total_of(m->sums + (r * ROW_SUMS + DELTA) * PARTS);
        hit(x, IN_DELTA, number[r], m->deltas + r);
    }
    for (int64_t c = c0; c < c1; c++) {
        const int64_t at = c * CHUNK, keys = at_most(CHUNK, x->keys - at), n = sixteens(keys);
        for (int64_t r = 0; r < rows; r++) {
            m->noise[r] += gradient_of_row(m->p + r * m->ld, m->dx + r * m->ld, m->deltas[r], m->nu_rows, at, at + n, checked);
            hit_in(x, IN_DX, number[r], c, m->dx + r * m->ld);
            if (__builtin_expect(x->strike == IN_DX && x->strike_column < 0 && number[r] == x->strike_row, 0)) /* all of the row is lost */
                memset(m->dx + r * m->ld + at, 0, n * sizeof(float));
        }
        product(m->dx + at, m->ld, tall, m->rows_of_k + at * m->ld_q, m->ld_q, m->wide, keys, m->dq, m->wide, checked ? m->dq_panel : NULL,
                c == c0);
        product_turned(m->dx + at, m->ld, n, m->q, m->ld_q, m->wide, rows, m->k.chain + at * m->k.ld, m->k.ld, checked);
    }
    for (int64_t r = 0; r < rows; r++) {
        float *dq = m->dq + r * m->wide;
        float *to = x->out + s->b * x->os[0] + s->h * x->os[1] + member_of(s, r) * x->os[2] + query_of(s, r) * x->os[3];
        hit(x, IN_DQ, number[r], dq);
        for (int64_t e = 0; e < x->width; e++) to[e] = dq[e] * (float)x->scale;
        m->doubtful |= wrong[r];
        if (!checked || wrong[r]) continue;
        double actual[KINDS] __attribute__((aligned(32))), found[3];
        const int64_t end = at_most(c1 * CHUNK, m->ld);
        if (!row_agrees(y, x->sums[number[r]], m->sums + r * ROW_SUMS * PARTS, m->dx + r * m->ld, m->deltas[r], c0 * CHUNK, end, number[r], found, worst2)) {
            m->doubtful = 1;
            continue;
        }
        double squares = sums_of_group(dq, 0, x->width, y->rows_of_q.weights, FP32, NULL, actual) + m->noise[r];
        if (__builtin_expect(squares < TINY, 0))
            squares = in_full(dq, NULL, x->width) +
                      in_full(m->dx + r * m->ld + c0 * CHUNK, m->nu_rows + c0 * CHUNK, at_most(c1 * CHUNK, x->keys) - c0 * CHUNK);
        agrees(x, &y->rows_of_q, actual, m->dq_panel + r * PANEL, squares, number[r], IN_DQ, worst2 + OF_DQ);
        add_columns(&m->v, m->g + r * m->ld_g, m->deep, found[0], found[0]);
        add_columns(&m->k, m->q + r * m->ld_q, m->wide, found[1], found[2]);
    }
}

/* --- sums over queries ------------------------------------------------------------------------------------------------ */

static void add_up(float *to, const float *from, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES) *(vf *)(to + i) += at(from + i);
}

/* A chain over queries ends: it goes to the tile's sum, and that to the whole where the tile ends, too. Keys [from, to). */
static void end_chain(const key_sum *s, int64_t from, int64_t to, int begins, int ends) {
    const int64_t at = from * s->ld, count = (to - from) * s->ld;
    if (begins && ends)
        add_up(s->total + at, s->chain + at, count);
    else if (begins)
        memcpy(s->tile + at, s->chain + at, count * sizeof(float));
    else {
        add_up(s->tile + at, s->chain + at, count);
        if (ends) add_up(s->total + at, s->tile + at, count);
    }
}

static void tile_of_gradients(abft_gradients *y, gradient_room *m, int64_t b, int64_t h, int64_t start, double *worst2) {
    const abft_attended *x = &y->a;
    const int64_t each = at_most(y->tile, x->length - start), all = each * x->members;
    const int64_t from = at_most(seen_by(x, start, NULL).first, x->keys - 1) / CHUNK * CHUNK;
    const int64_t to = at_least(sixteens(seen_by(x, start + each - 1, NULL).last), at_most(from + CHUNK, m->ld));
    const int64_t end = at_most((to + CHUNK - 1) / CHUNK * CHUNK, m->ld);
    for (int64_t i = 0; i < all; i += m->block) {
        const some_queries s = {b, h, start, each, i, at_most(m->block, all - i)};
        if (i % CHUNK == 0) {
            memset(m->k.chain + from * m->k.ld, 0, (end - from) * m->k.ld * sizeof(float));
            memset(m->v.chain + from * m->v.ld, 0, (end - from) * m->v.ld * sizeof(float));
        }
        block_of_gradients(y, m, &s, worst2);
        const int ends = i + s.rows == all;
        if (!ends && (i + s.rows) % CHUNK) continue;
        end_chain(&m->k, from, end, i < CHUNK, ends);
        end_chain(&m->v, from, end, i < CHUNK, ends);
    }
}

/* The rows of a head's dK or dV: delivered, and judged; then its columns, where all rows agree (fine). */
static void deliver(abft_gradients *y, const key_sum *s, int fine, float *to, int64_t step, int64_t columns, const abft_group *g,
                    int64_t row0, int what, double *worst2) {
    abft_attended *x = &y->a;
    const int64_t padded = sixteens(columns);
    for (int64_t t = 0; t < x->keys; t++) {
        float *row = s->total + t * s->ld;
        hit(x, what, row0 + t, row);
        memcpy(to + t * step, row, columns * sizeof(float));
        if (!x->checked) continue;
        double actual[KINDS] __attribute__((aligned(32))), noise = 0;
        double squares = sums_of_group(row, 0, columns, g->weights, FP32, NULL, actual);
        if (__builtin_expect(squares < TINY, 0)) squares = in_full(row, NULL, columns);
        for (int j = 0; j < SKETCHES; j++) noise += (double)row[padded + SKETCHED + j] * row[padded + SKETCHED + j] / SKETCHES;
        fine &= agrees(x, g, actual, row + padded, squares + noise, row0 + t, what, worst2);
    }
    if (!x->checked || !fine) return;
    /* `tile` has served: the sums of the columns as they were delivered. */
    double *sums = (double *)s->tile, residual = 0, bound = 1;
    memset(sums, 0, padded * sizeof(double));
    for (int64_t t = 0; t < x->keys; t++)
        for (int64_t e = 0; e < padded; e += 4) *(d4 *)(sums + e) += __builtin_convertvector(*(const v4 *)(s->total + t * s->ld + e), d4);
    for (int64_t e = 0; e < columns; e++) {
        const double is = fabs(sums[e] - s->columns[e]), most = y->columns_bound * s->reach[e] + 0x1p-126;
        fine &= is <= most && most < INFINITY;
        if (!(is / most <= residual / bound)) residual = is, bound = most;
    }
    if (!fine) suspect(x, row0, what, residual, bound);
}

/* --- all heads ---------------------------------------------------------------------------------------------------------- */

static float *laid(float **at, int64_t count) {
    float *here = *at;
    *at += sixteens(count);
    return here;
}

static int make_gradient_room(const abft_gradients *y, gradient_room *m) {
    const abft_attended *x = &y->a;
    m->chunks = (x->keys + CHUNK - 1) / CHUNK;
    m->ld_chunk = at_most(CHUNK, sixteens(x->keys)) + PANEL;
    m->wide = sixteens(x->width);
    m->deep = sixteens(x->depth);
    m->ld_q = m->wide + PANEL;
    m->ld_g = m->deep + PANEL;
    m->ld = sixteens(x->keys);
    m->block = BLOCK; /* divides CHUNK */
    m->k.ld = m->ld_q;
    m->v.ld = m->ld_g;
    const int64_t keys = m->chunks * x->width * m->ld_chunk, values = m->chunks * x->depth * m->ld_chunk, k = m->ld * m->ld_q, v = m->ld * m->ld_g;
    float *at = scratch(0, keys + values + k * 4 + v * 3 + m->chunks * (m->wide + m->deep) + m->ld + 4 * 2 * (m->wide + m->deep) + 16 * 16);
    float *mine = scratch(1, BLOCK * (m->ld_q + m->ld_g + 2 * m->ld + 2 * PANEL + m->wide + 2 + 16 * ROW_SUMS) + 16 * 16);
    if (!at || !mine) return 0;
    m->keys = laid(&at, keys);
    m->nu_keys = laid(&at, m->chunks * m->wide);
    m->values = laid(&at, values);
    m->nu_values = laid(&at, m->chunks * m->deep);
    m->rows_of_k = laid(&at, k);
    m->nu_rows = laid(&at, m->ld);
    m->k.chain = laid(&at, k);
    m->k.tile = laid(&at, k);
    m->k.total = laid(&at, k);
    m->v.chain = laid(&at, v);
    m->v.tile = laid(&at, v);
    m->v.total = laid(&at, v);
    m->k.columns = (double *)laid(&at, 2 * m->wide);
    m->k.reach = (double *)laid(&at, 2 * m->wide);
    m->v.columns = (double *)laid(&at, 2 * m->deep);
    m->v.reach = (double *)laid(&at, 2 * m->deep);
    m->q = laid(&mine, BLOCK * m->ld_q);
    m->g = laid(&mine, BLOCK * m->ld_g);
    m->p = laid(&mine, BLOCK * m->ld);
    m->dx = laid(&mine, BLOCK * m->ld);
    m->panel = laid(&mine, BLOCK * PANEL);
    m->dq_panel = laid(&mine, BLOCK * PANEL);
    m->dq = laid(&mine, BLOCK * m->wide);
    m->noise = laid(&mine, BLOCK);
    m->deltas = laid(&mine, BLOCK);
    m->sums = (vf *)laid(&mine, BLOCK * 16 * ROW_SUMS);
    /* Rows that only fill a block up are multiplied, too, and nobody reads what they give: numbers they should be, for speed's sake. */
    memset(m->q, 0, BLOCK * m->ld_q * sizeof(float));
    memset(m->g, 0, BLOCK * m->ld_g * sizeof(float));
    memset(m->dx, 0, BLOCK * m->ld * sizeof(float));
    memset(m->nu_rows + x->keys, 0, (m->ld - x->keys) * sizeof(float));
    return 1;
}

#define PACK_OPERANDS(NAME, DTYPE)                                                                                         \
    static __attribute__((noinline)) void NAME(const abft_gradients *y, const gradient_room *m, int64_t b, int64_t h) {    \
        const abft_attended *x = &y->a;                                                                                    \
        const int64_t size = DTYPE == FP32 ? 4 : 2;                                                                        \
        const char *k = (const char *)x->k + (b * x->ks[0] + h * x->ks[1]) * size;                                         \
        const char *v = (const char *)x->v + (b * x->vs[0] + h * x->vs[1]) * size;                                         \
        for (int64_t c = 0; c < m->chunks; c++) {                                                                          \
            const int64_t keys = at_most(CHUNK, x->keys - c * CHUNK), last = c == m->chunks - 1;                           \
            pack_keys(k + c * CHUNK * x->ks[2] * size, x->ks[2], keys, x->width, last ? &x->last_keys : &x->keys_group,    \
                      m->keys + c * x->width * m->ld_chunk, sixteens(keys), m->ld_chunk, m->nu_keys + c * m->wide, (int)x->checked, DTYPE); \
            pack_keys(v + c * CHUNK * x->vs[2] * size, x->vs[2], keys, x->depth, last ? &y->last_values : &y->values_group, \
                      m->values + c * x->depth * m->ld_chunk, sixteens(keys), m->ld_chunk, m->nu_values + c * m->deep,     \
                      (int)x->checked, DTYPE);                                                                             \
        }                                                                                                                  \
        pack_values(k, x->ks[2], x->keys, x->width, &y->rows_of_q, m->rows_of_k, m->wide, m->ld_q, m->nu_rows, (int)x->checked, DTYPE); \
    }
PACK_OPERANDS(operands_fp32, FP32)
PACK_OPERANDS(operands_bf16, BF16)
PACK_OPERANDS(operands_fp16, FP16)

static void head_of_gradients(abft_gradients *y, gradient_room *m, int64_t head, double *worst2) {
    abft_attended *x = &y->a;
    const int64_t b = head / x->heads, h = head % x->heads;
    x->dtype == FP32 ? operands_fp32(y, m, b, h) : x->dtype == BF16 ? operands_bf16(y, m, b, h) : operands_fp16(y, m, b, h);
    m->doubtful = 0;
    memset(m->k.total, 0, m->ld * m->k.ld * sizeof(float));
    memset(m->v.total, 0, m->ld * m->v.ld * sizeof(float));
    memset(m->k.columns, 0, 2 * m->wide * sizeof(float));
    memset(m->k.reach, 0, 2 * m->wide * sizeof(float));
    memset(m->v.columns, 0, 2 * m->deep * sizeof(float));
    memset(m->v.reach, 0, 2 * m->deep * sizeof(float));
    for (int64_t start = 0; start < x->length; start += y->tile) tile_of_gradients(y, m, b, h, start, worst2);
    deliver(y, &m->k, !m->doubtful, y->dk + b * y->dks[0] + h * y->dks[1], y->dks[2], x->width, &y->rows_of_k, head * x->keys, IN_DK, worst2 + OF_DK);
    deliver(y, &m->v, !m->doubtful, y->dv + b * y->dvs[0] + h * y->dvs[1], y->dvs[2], x->depth, &y->rows_of_v, head * x->keys, IN_DV, worst2 + OF_DV);
}

/* Fills dQ, dK, dV, worst2, count and places; 0 if memory is short. A head is one thread's: its sums over queries have one order. */
int abft_attention_backward(abft_gradients *y, int threads) {
    abft_attended *x = &y->a;
    const int64_t heads = x->batch * x->heads;
    int complete = 1;
    threads = (int)at_most(threads, heads);
    for (int i = 0; i < PRODUCTS; i++) y->worst2[i] = 0;
    x->count = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        double worst2[PRODUCTS] = {0};
        gradient_room m;
        const int ready = make_gradient_room(y, &m);
#pragma omp for schedule(dynamic)
        for (int64_t head = 0; head < heads; head++)
            if (ready) head_of_gradients(y, &m, head, worst2);
#pragma omp critical(abft_attended_places)
        {
            complete &= ready;
            for (int i = 0; i < PRODUCTS; i++) y->worst2[i] = worst2[i] > y->worst2[i] ? worst2[i] : y->worst2[i];
        }
    }
    return complete;
}
