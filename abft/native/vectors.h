/* Sixteen numbers at a time, of any floating type, in the vectors of GCC and clang: whatever the processor has. */
#ifndef ABFT_VECTORS_H
#define ABFT_VECTORS_H
#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__SSE3__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

typedef float v16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef float v8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef float v4 __attribute__((vector_size(16), aligned(4), may_alias));
typedef double d8 __attribute__((vector_size(64), aligned(8), may_alias));
typedef uint32_t u16x32 __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t u16x16 __attribute__((vector_size(32), aligned(2), may_alias));
typedef int64_t m8 __attribute__((vector_size(64)));

/* As many numbers as one register holds. GCC keeps wider vectors in memory, where every sum waits for its last store. */
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
typedef float vf __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef double vd __attribute__((vector_size(4 * LANES), aligned(8), may_alias)); /* half as many */
typedef float vh __attribute__((vector_size(2 * LANES), aligned(4), may_alias));   /* … in fp32 */
typedef uint32_t vu __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t vs __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

/* A vector that is used again and again stays in its register; GCC would rather read it once more each time. */
#if defined(__AVX512F__)
#define HOLD(v) __asm__ volatile("" : "+v"(v))
#elif defined(__SSE3__)
#define HOLD(v) __asm__ volatile("" : "+x"(v))
#else
#define HOLD(v) (void)0
#endif

enum { FP32, BF16, FP16 };
enum { E, ONE, HI, LO, KINDS };
enum { FRAGMENT = 16, PARTS = FRAGMENT / LANES, SKETCHES = 4 };

INLINE float one_of(const void *p, int64_t i, int dtype) {
    if (dtype == FP32) return ((const float *)p)[i];
    uint16_t h = ((const uint16_t *)p)[i];
    if (dtype == BF16) {
        uint32_t bits = (uint32_t)h << 16;
        float f;
        memcpy(&f, &bits, 4);
        return f;
    }
    _Float16 half;
    memcpy(&half, &h, 2);
    return (float)half;
}

INLINE v16 sixteen_of(const void *p, int64_t i, int dtype) {
    if (dtype == FP32) return *(const v16 *)((const float *)p + i);
    const uint16_t *h = (const uint16_t *)p + i;
    if (dtype == BF16) {
        u16x32 wide = __builtin_convertvector(*(const u16x16 *)h, u16x32) << 16;
        return (v16)wide;
    }
#if defined(__AVX512F__)
    return (v16)_mm512_cvtph_ps(_mm256_loadu_si256((const void *)h));
#elif defined(__F16C__)
    v16 out;
    ((v8 *)&out)[0] = (v8)_mm256_cvtph_ps(_mm_loadu_si128((const void *)h));
    ((v8 *)&out)[1] = (v8)_mm256_cvtph_ps(_mm_loadu_si128((const void *)(h + 8)));
    return out;
#else
    v16 out;
    for (int lane = 0; lane < 16; lane++) out[lane] = one_of(h, lane, FP16);
    return out;
#endif
}

INLINE v16 some_of(const void *p, int64_t i, int64_t count, int dtype) {
    v16 out = {0};
    for (int lane = 0; lane < count; lane++) out[lane] = one_of(p, i + lane, dtype);
    return out;
}

/* LANES of them, and the first `count` of those. */
INLINE vf lanes_of(const void *p, int64_t i, int dtype) {
    if (dtype == FP32) return *(const vf *)((const float *)p + i);
    const uint16_t *h = (const uint16_t *)p + i;
    if (dtype == BF16) {
        const vu wide = __builtin_convertvector(*(const vs *)h, vu) << 16;
        return (vf)wide;
    }
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const void *)h));
#elif defined(__AVX__) && defined(__F16C__)
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const void *)h));
#else
    vf out;
    for (int lane = 0; lane < LANES; lane++) out[lane] = one_of(h, lane, FP16);
    return out;
#endif
}

INLINE vf some_lanes(const void *p, int64_t i, int64_t count, int dtype) {
    float out[LANES] __attribute__((aligned(64))) = {0};
    for (int lane = 0; lane < LANES && lane < count; lane++) out[lane] = one_of(p, i + lane, dtype);
    return *(const vf *)out;
}

INLINE vf lanes_at_most(const void *p, int64_t i, int64_t count, int dtype) {
    return count >= LANES ? lanes_of(p, i, dtype) : some_lanes(p, i, count, dtype);
}

INLINE double sum16(v16 v) {
    v8 a = ((v8 *)&v)[0] + ((v8 *)&v)[1];
    v4 b = ((v4 *)&a)[0] + ((v4 *)&a)[1];
    return (double)((b[0] + b[2]) + (b[1] + b[3]));
}

typedef double d4 __attribute__((vector_size(32), aligned(8), may_alias));

INLINE v4 fold(v16 v) {
    v8 a = ((v8 *)&v)[0] + ((v8 *)&v)[1];
    return ((v4 *)&a)[0] + ((v4 *)&a)[1];
}

/* The sums of four vectors. */
INLINE v4 sums16(v16 a, v16 b, v16 c, v16 d) {
#ifdef __SSE3__
    return (v4)_mm_hadd_ps(_mm_hadd_ps((__m128)fold(a), (__m128)fold(b)), _mm_hadd_ps((__m128)fold(c), (__m128)fold(d)));
#else
    return (v4){(float)sum16(a), (float)sum16(b), (float)sum16(c), (float)sum16(d)};
#endif
}

/* The same of vectors as wide as registers. */
INLINE v4 four_of(vf v) {
#if LANES == 16
    return fold(v);
#elif LANES == 8
    return ((v4 *)&v)[0] + ((v4 *)&v)[1];
#else
    return v;
#endif
}

INLINE v4 sum_four(vf a, vf b, vf c, vf d) {
#if LANES == 8
    const __m256 sums = _mm256_hadd_ps(_mm256_hadd_ps((__m256)a, (__m256)b), _mm256_hadd_ps((__m256)c, (__m256)d));
    return (v4)_mm256_castps256_ps128(sums) + (v4)_mm256_extractf128_ps(sums, 1);
#elif defined(__SSE3__)
    const __m128 ab = _mm_hadd_ps((__m128)four_of(a), (__m128)four_of(b)), cd = _mm_hadd_ps((__m128)four_of(c), (__m128)four_of(d));
    return (v4)_mm_hadd_ps(ab, cd);
#else
    v4 out;
    const vf all[4] = {a, b, c, d};
    for (int i = 0; i < 4; i++) {
        const v4 v = four_of(all[i]);
        out[i] = (v[0] + v[2]) + (v[1] + v[3]);
    }
    return out;
#endif
}

INLINE double sum_lanes(vf v) {
    const v4 four = four_of(v);
    return (double)((four[0] + four[2]) + (four[1] + four[3]));
}

/* Memory of a thread that grows and stays until the thread ends: fresh pages at every call would cost more than the sums. */
enum { SLOTS = 3 };
typedef struct {
    float *kept[SLOTS];
    size_t size[SLOTS];
} slots;

static pthread_key_t slots_of_thread;
static pthread_once_t slots_once = PTHREAD_ONCE_INIT;
static __attribute__((unused)) void free_slots(void *all) {
    for (int i = 0; i < SLOTS; i++) free(((slots *)all)->kept[i]);
    free(all);
}
static __attribute__((unused)) void make_slots(void) { pthread_key_create(&slots_of_thread, free_slots); }

static __attribute__((unused)) float *scratch(int which, size_t floats) {
    pthread_once(&slots_once, make_slots);
    slots *mine = pthread_getspecific(slots_of_thread);
    if (!mine) {
        mine = calloc(1, sizeof(slots));
        if (!mine || pthread_setspecific(slots_of_thread, mine)) {
            free(mine);
            return NULL;
        }
    }
    if (mine->size[which] < floats) {
        free(mine->kept[which]);
        mine->size[which] = 0;
        mine->kept[which] = aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64);
        if (mine->kept[which]) mine->size[which] = floats;
    }
    return mine->kept[which];
}

INLINE int thread_number(void) {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

INLINE int thread_count(void) {
#ifdef _OPENMP
    return omp_get_num_threads();
#else
    return 1;
#endif
}
#endif
