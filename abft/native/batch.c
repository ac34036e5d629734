/* A batch of a lone unit's statistics that alarms nobody: what Monitor.add of abft/statistics/monitor.py does with it, and what its watch
 * does before and after. An alarm, and whatever else is unusual, is left to them: nothing has been changed then.
 *
 * In Python these are a few hundred calls on arrays of four numbers, which between two large products run with cold caches.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

enum { KINDS = 4, TESTED = 2, RATES = 2, LEVELS = 3 };
enum { COUNT, SUM, SQUARES, MOST, ABOVE, BLOCKS = ABOVE + 4, FIELDS = BLOCKS + 3 };

/* A sum of abft/statistics/cusum.py. */
typedef struct {
    double *level, *evidence;
    int64_t *left_zero, *batches;
} abft_chart;

typedef struct {
    const double (*kept)[FIELDS];                 /* by the judge: so far */
    double (*folded)[FIELDS];                     /* … when the last batch was complete */
    double (*total)[FIELDS], (*pooled)[FIELDS];   /* of the monitor: of all threads; a lone unit's are equal */
    double (*last)[FIELDS];
    double (*level2)[KINDS], *cap2;               /* what the judge counts from now on */
    const double *sigma, *soft, *mean, *mean_deviation, *noise_deviation;
    double *noise;                                /* a slow average: follows */
    abft_chart up[TESTED], down[TESTED], scatter[TESTED], rates[RATES];
    double mean_k[TESTED], noise_k[TESTED];       /* k of the two tests */
    double log_ratio[RATES], excess[RATES];       /* ln(suspected / expected) and suspected - expected, above 8 and 12 σ̂ */
    double levels[LEVELS], cap, tiny, memory, threshold, most;
} abft_lone;

/* A sum after one more batch. */
typedef struct {
    const abft_chart *chart;
    double level, evidence;
    int add;
} abft_next;

/* `ratio` is finite. Whether the sum stays below the threshold. */
static int next(abft_next *out, const abft_chart *chart, double ratio, double evidence, double threshold) {
    const double level = *chart->level + ratio;
    *out = (abft_next){chart, level > 0.0 ? level : 0.0, level > 0.0 ? *chart->evidence + evidence : 0.0, 1};
    return out->level < threshold;
}

static int shifted(abft_next *out, const abft_chart *chart, double u, double k, const abft_lone *w) {
    const double capped = u < k + w->most ? u : k + w->most;
    return next(out, chart, 2.0 * k * (capped - k), 2.0 * k * (u - k), w->threshold);
}

/* 1: done; 0: nothing was changed. */
int abft_batch(const abft_lone *w) {
    double batch[KINDS][FIELDS], u[KINDS], v[KINDS], noise[KINDS], now[KINDS];
    abft_next then[3 * TESTED + RATES] = {{0}};
    int quiet = 1, finite = 1;
    for (int kind = 0; kind < KINDS; kind++) {
        for (int i = 0; i < FIELDS; i++) {
            batch[kind][i] = w->kept[kind][i] - w->folded[kind][i];
            finite &= isfinite(batch[kind][i]) != 0;
        }
        batch[kind][MOST] = w->kept[kind][MOST];
    }
    if (!finite || !(batch[0][COUNT] > 0.0)) return 0;
    for (int kind = 0; kind < KINDS; kind++) {
        const double count = batch[kind][COUNT] > 1.0 ? batch[kind][COUNT] : 1.0, squares = batch[kind][SQUARES] / count;
        const double before = w->noise[kind], ln = log(squares > w->tiny ? squares : w->tiny);
        const double scale = exp((ln > before ? ln : before) / 2) / w->sigma[kind], by = ln - before, most = 3 * w->noise_deviation[kind];
        u[kind] = (batch[kind][SUM] / count / scale - w->mean[kind]) / w->mean_deviation[kind];
        v[kind] = by / w->noise_deviation[kind];
        noise[kind] = before + (by < most ? by : most) / w->memory;
        now[kind] = noise[kind] > log(w->tiny) ? exp(noise[kind] / 2) / w->sigma[kind] : 1.0;
        finite &= isfinite(u[kind]) && isfinite(v[kind]) && isfinite(noise[kind]) && isfinite(now[kind]);
    }
    if (!finite) return 0;
    for (int i = 0; i < TESTED; i++) {
        if (!(batch[i][COUNT] > 0.0)) continue;
        quiet &= shifted(&then[3 * i], &w->up[i], u[i], w->mean_k[i], w) & shifted(&then[3 * i + 1], &w->down[i], -u[i], w->mean_k[i], w) &
                 shifted(&then[3 * i + 2], &w->scatter[i], v[i], w->noise_k[i], w);
    }
    for (int i = 0; i < RATES; i++) {
        double events = 0.0;
        for (int kind = 0; kind < KINDS; kind++) events = batch[kind][ABOVE + 1 + i] > events ? batch[kind][ABOVE + 1 + i] : events;
        const double ratio = events * w->log_ratio[i] - batch[0][COUNT] * w->excess[i];
        quiet &= next(&then[3 * TESTED + i], &w->rates[i], ratio, ratio, w->threshold);
    }
    if (!quiet) return 0;
    for (int i = 0; i < 3 * TESTED + RATES; i++) {
        if (!then[i].add) continue;
        const abft_chart *chart = then[i].chart;
        if (!(*chart->level > 0.0)) *chart->left_zero = *chart->batches;
        *chart->batches += 1, *chart->level = then[i].level, *chart->evidence = then[i].evidence;
    }
    for (int kind = 0; kind < KINDS; kind++) {
        const double most = w->total[kind][MOST], here = batch[kind][MOST];
        for (int i = 0; i < FIELDS; i++) w->total[kind][i] += batch[kind][i], w->pooled[kind][i] += batch[kind][i];
        w->total[kind][MOST] = w->pooled[kind][MOST] = most > here ? most : here;
        w->noise[kind] = noise[kind];
        for (int i = 0; i < LEVELS; i++) {
            const double level = w->levels[i] * (w->sigma[kind] * now[kind]);
            w->level2[i][kind] = level * level;
        }
        const double soft = w->soft[kind] * now[kind], sigma = w->sigma[kind] * now[kind];
        w->level2[LEVELS][kind] = soft * soft, w->cap2[kind] = w->cap * (sigma * sigma);
    }
    memcpy(w->last, batch, sizeof(batch)), memcpy(w->folded, w->kept, sizeof(batch));
    return 1;
}
