/* A new version of a weight (abft/backends/renewal.py): all that is remembered of it filled anew, in one call for what is four. */
#include <stdint.h>
#include <string.h>

int abft_encode(const void *layout, const void *w, int64_t ld, int rows_adjacent, float *out, int threads);
int abft_fingerprint(const void *w, int64_t n, int64_t k, int64_t ld, int rows_adjacent, int bytes, uint32_t *plain, uint32_t *weighted,
                     int threads);
int64_t abft_total(const int32_t *words, int64_t n);
void abft_bias(const void *layout, const void *bias, float *sums, float *noise2);

/* Of a weight W (n, k), whose rows (rows_adjacent: columns) are `ld` numbers of `bytes` apart, and of its bias. */
typedef struct {
    int64_t n, k, ld, rows_adjacent, bytes;
    const void *layout;
    float *panel;
    int64_t size; /* numbers of the panel */
    uint32_t *plain, *weighted;
    int64_t integrity; /* written: the sum of the panel's words */
    const void *bias_layout;
    void *bias_values;
    int64_t bias_bytes;
    float *sums, *noise2;
    float *noise; /* NULL, or the sum of noise2 (groups) */
    int64_t groups;
} abft_remembered;

/* weight, bias: NULL if that is what it was. 0, or 1 if memory is short. */
int abft_renew(abft_remembered *r, const void *weight, const void *bias, int encoding_threads, int fingerprint_threads) {
    if (weight) {
        if (abft_encode(r->layout, weight, r->ld, (int)r->rows_adjacent, r->panel, encoding_threads)) return 1;
        if (abft_fingerprint(weight, r->n, r->k, r->ld, (int)r->rows_adjacent, (int)r->bytes, r->plain, r->weighted, fingerprint_threads)) return 1;
        r->integrity = abft_total((const int32_t *)r->panel, r->size);
    }
    if (bias) {
        memcpy(r->bias_values, bias, r->bias_bytes);
        abft_bias(r->bias_layout, r->bias_values, r->sums, r->noise2);
        if (r->noise) {
            *r->noise = 0;
            for (int64_t g = 0; g < r->groups; g++) *r->noise += r->noise2[g];
        }
    }
    return 0;
}
