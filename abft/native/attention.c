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
#include "attention.h"

/* --- a block of queries -------------------------------------------------------------------------------------------- */

typedef struct {
    int64_t chunks, chunk_wide, ld_keys, padded_depth, ld_values, block, ld_scores;
    float *keys, *nu_keys, *values, *nu_values;             /* packed: of a head */
    float *q, *scores, *probabilities, *panel, *out, *sums; /* of a block */
    vf *noise;
} room;

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
    const int64_t end = sixteens(at_most(c1 * CHUNK, x->keys));
    const float scale = (float)x->scale;
    for (int64_t r = 0; r < tall; r++)
        for (int64_t e = 0; e < width; e += 16) {
            const int64_t from = b * x->qs[0] + h * x->qs[1] + g * x->qs[2] + (l0 + r) * x->qs[3] + e;
            if (r + AHEAD < rows) soon(x->q, from + AHEAD * x->qs[3], dtype);
            EACH_PART(i) {
                vf v = {0};
                if (r < rows) v = lanes_at_most(x->q, from + i * LANES, width - e - i * LANES, dtype);
                *(vf *)(m->q + r * wide + e + i * LANES) = v * scale;
            }
        }
    for (int64_t c = c0; c < c1; c++)
        product(m->q, wide, tall, m->keys + c * width * m->ld_keys, m->ld_keys, sixteens(at_most(CHUNK, x->keys - c * CHUNK)), width,
                m->scores + c * CHUNK, m->ld_scores, checked ? m->panel + c * BLOCK * PANEL : NULL, 1);
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
            for (int64_t c = c0; c < c1 && !wrong[r]; c++)
                wrong[r] = !chunk_agrees(x, c == m->chunks - 1 ? &x->last_keys : &x->keys_group, s + c * CHUNK, m->q + r * wide,
                                         m->nu_keys + c * wide, width, m->panel + (c * BLOCK + r) * PANEL, row0 + r, IN_SCORES, worst2);
        }
        const float inverse = 1.0f / (sum == 0 ? 1.0f : sum);
        vf noise[PARTS];
        EACH_PART(i) noise[i] = (vf){0};
        const int64_t from = w.first / 16 * 16, to = at_least(sixteens(w.last), from);
        if (from > c0 * CHUNK) memset(s + c0 * CHUNK, 0, (from - c0 * CHUNK) * sizeof(float));
        for (int64_t n = from; n < to; n += 16)
            EACH_PART(i) {
                const vf y = at(p + n + i * LANES) * inverse;
                *(vf *)(s + n + i * LANES) = y;
                if (checked) {
                    const vf z = y * at(m->nu_values + n + i * LANES);
                    noise[i] = fma_of(z, z, noise[i]);
                }
            }
        if (end > to) memset(s + to, 0, (end - to) * sizeof(float));
        EACH_PART(i) m->noise[r * PARTS + i] = noise[i];
    }
    /* Rows that only fill a block up multiply what may be anything, and nobody reads what they give. */
    for (int64_t c = c0; c < c1; c++)
        product(m->scores + c * CHUNK, m->ld_scores, tall, m->values + c * CHUNK * m->ld_values, m->ld_values, m->padded_depth,
                at_most(CHUNK, x->keys - c * CHUNK), m->out, m->padded_depth, checked ? m->panel : NULL, c == c0);
    for (int64_t r = 0; r < rows; r++) {
        float *o = m->out + r * m->padded_depth, *to = x->out + b * x->os[0] + h * x->os[1] + g * x->os[2] + (l0 + r) * x->os[3];
        hit(x, IN_OUT, row0 + r, o);
        for (int64_t d = 0; d < x->depth; d += 16) {
            if (d + 16 <= x->depth)
                EACH_PART(i) *(vf *)(to + d + i * LANES) = at(o + d + i * LANES);
            else
                memcpy(to + d, o + d, (x->depth - d) * sizeof(float));
        }
        if (!checked || wrong[r]) continue;
        double actual[KINDS] __attribute__((aligned(32)));
        const float *predicted = m->panel + r * PANEL;
        if (!softmax_agrees(x, x->sums[row0 + r], m->sums[r], predicted[COLUMN_OF_ONES], row0 + r, worst2 + 1)) continue;
        double squares = sums_of_group(to, 0, x->depth, x->columns.weights, FP32, m->noise + r * PARTS, actual);
        if (__builtin_expect(squares < TINY, 0))
            squares = in_full(to, NULL, x->depth) +
                      in_full(m->scores + r * m->ld_scores + c0 * CHUNK, m->nu_values + c0 * CHUNK, at_most(c1 * CHUNK, x->keys) - c0 * CHUNK);
        agrees(x, &x->columns, actual, predicted, squares, row0 + r, IN_OUT, worst2 + 1);
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
    float *mine = scratch(1, BLOCK * (wide + m->chunks * PANEL + m->padded_depth + 1 + 16) + (m->block + 1) * m->ld_scores);
    if (!packed || !mine) return 0;
    m->keys = packed;
    m->nu_keys = m->keys + keys;
    m->values = m->nu_keys + m->chunks * wide;
    m->nu_values = m->values + values;
    m->q = mine;
    m->panel = m->q + BLOCK * wide;
    m->out = m->panel + BLOCK * m->chunks * PANEL;
    m->sums = m->out + BLOCK * m->padded_depth;
    m->noise = (vf *)(m->sums + BLOCK);
    m->scores = m->sums + BLOCK * (1 + 16);
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
                            c + j0, padded, NULL, 1);
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
    for (int64_t i = 0; i < count / STRIDE * STRIDE; i += STRIDE) {
        vf y[ABREAST];
        EACH(j, ABREAST) y[j] = at(x + i + j * LANES);
        exp_of(y, ABREAST);
        EACH(j, ABREAST) *(vf *)(x + i + j * LANES) = y[j];
    }
    for (int64_t i = count / STRIDE * STRIDE; i < count; i += LANES) {
        vf last = first_numbers(x + i, count - i);
        exp_of(&last, 1);
        for (int64_t j = i; j < at_most(count, i + LANES); j++) x[j] = last[j - i];
    }
}

/* sums (rows) of p (rows, keys) or, with a q like p, of p ∘ q: in the order of the passes. */
void abft_row_sums(const float *p, const float *q, int64_t rows, int64_t keys, float *sums, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t r = 0; r < rows; r++) {
        vf total[PARTS] = {{0}};
        for (int64_t c = 0; c < keys; c += CHUNK) {
            vf sum[PARTS] = {{0}};
            for (int64_t n = c; n < at_most(c + CHUNK, keys); n += 16)
                EACH_PART(i) {
                    const int64_t here = r * keys + n + i * LANES, left = keys - n - i * LANES;
                    const vf a = left < LANES ? first_numbers(p + here, left) : at(p + here);
                    if (q)
                        sum[i] = fma_of(a, left < LANES ? first_numbers(q + here, left) : at(q + here), sum[i]);
                    else
                        sum[i] += a;
                }
            EACH_PART(i) total[i] += sum[i];
        }
        sums[r] = (float)total_of(total);
    }
}
