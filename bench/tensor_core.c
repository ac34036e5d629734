/* A tensor core's products, by the published model of what it computes (MMA-Sim, "T-FDPA": docs/explanation/thresholds.md):

       d = RZ_fp32( Σ_k trunc(a_k b_k) + trunc(c) )

   Per instruction step `depth` products and the accumulator are aligned to the largest of their exponents (of products: the sum of the
   operands' exponents, not normalised), cut off `bits` binary places below it, added exactly, and cut off to fp32. Operands: finite, fp32
   that hold numbers of the operand type. Every intermediate is an integer below 2^53, so doubles hold it exactly. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define NOTHING (-4096) /* exponent of a zero */
#define LEAST (-300)    /* of a step of nothing but zeros */

static int32_t exponent(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    int32_t field = (int32_t)(u >> 23 & 255);
    if (field) return field - 127;
    return (u << 1) ? -126 : NOTHING; /* subnormal numbers are not normalised */
}

static double power(int32_t e) { /* 2^e of a normal double */
    uint64_t u = (uint64_t)(e + 1023) << 52;
    double d;
    memcpy(&d, &u, 8);
    return d;
}

static double cut(double x) { /* toward zero, to 24 significant bits */
    uint64_t u;
    memcpy(&u, &x, 8);
    u &= ~((UINT64_C(1) << 29) - 1);
    memcpy(&x, &u, 8);
    return x;
}

/* C (m, n) += X (m, k) W (k, n), all contiguous; k a multiple of depth. 0, or 1 without memory. */
int tensor_core(const float *x, const float *w, float *c, long m, long n, long k, int depth, int bits) {
    double *wide = malloc(sizeof(double) * (size_t)(k * n)), *acc = malloc(sizeof(double) * (size_t)(4 * n));
    int32_t *we = malloc(sizeof(int32_t) * (size_t)(k * n)), *most = malloc(sizeof(int32_t) * (size_t)n);
    if (!wide || !acc || !we || !most) {
        free(wide), free(acc), free(we), free(most);
        return 1;
    }
    double *scale = acc + n, *undo = acc + 2 * n, *sum = acc + 3 * n;
    for (long i = 0; i < k * n; i++) wide[i] = w[i], we[i] = exponent(w[i]);
    for (long row = 0; row < m; row++) {
        for (long j = 0; j < n; j++) acc[j] = c[row * n + j];
        for (long start = 0; start < k; start += depth) {
            for (long j = 0; j < n; j++) {
                int32_t e = exponent((float)acc[j]);
                most[j] = e > LEAST ? e : LEAST;
            }
            for (int i = 0; i < depth; i++) {
                const int32_t xe = exponent(x[row * k + start + i]), *e = we + (start + i) * n;
                for (long j = 0; j < n; j++) most[j] = xe + e[j] > most[j] ? xe + e[j] : most[j];
            }
            for (long j = 0; j < n; j++) {
                scale[j] = power(bits - most[j]), undo[j] = power(most[j] - bits);
                sum[j] = __builtin_trunc(acc[j] * scale[j]);
            }
            for (int i = 0; i < depth; i++) {
                const double xi = x[row * k + start + i], *wi = wide + (start + i) * n;
                for (long j = 0; j < n; j++) sum[j] += __builtin_trunc(xi * wi[j] * scale[j]);
            }
            for (long j = 0; j < n; j++) acc[j] = (float)cut(sum[j] * undo[j]);
        }
        for (long j = 0; j < n; j++) c[row * n + j] = (float)acc[j];
    }
    free(wide), free(acc), free(we), free(most);
    return 0;
}
