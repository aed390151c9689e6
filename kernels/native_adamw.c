/* AdamW (Loshchilov & Hutter 2019) and the square of the gradients' norm on CPU, over all tensors at once, in fp32.

   p *= 1 - lr decay,   m += (1 - beta1) (g / scale - m),   v = beta2 v + (1 - beta2) (g / scale)^2
   p -= lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

   Each thread takes a run of chunks; a chunk begins at the same number of the same tensor whatever the number of threads, so
   the bits are the same too. */
#include "native.h"
#include <math.h>

#define CHUNK 16384 /* numbers; a multiple of the vectors that are summed side by side */
#define SIDES 4

typedef struct {
  float *p;
  const float *g;
  float *m, *v, *t; /* t: one number, the steps taken */
  void *half;       /* the weight's copy in bf16, or NULL */
  int64_t count;
  double lr, decay, beta1, beta2, eps;
} Weight;

static inline int64_t chunks_of(int64_t count) { return (count + CHUNK - 1) / CHUNK; }

static inline vf root(vf x) {
  vf y;
  for (int i = 0; i < WIDE; i++) y[i] = sqrtf(x[i]); /* one instruction in the end */
  return y;
}

typedef struct {
  vf keep, rate, slow1, beta2, slow2, by_root, eps, by;
} Factors;

static inline Factors factors_of(const Weight *w, float scale) {
  const double t = *w->t, rest1 = 1.0 - pow(w->beta1, t), rest2 = 1.0 - pow(w->beta2, t);
  return (Factors){splat((float)(1.0 - w->lr * w->decay)), splat((float)(w->lr / rest1)), splat((float)(1.0 - w->beta1)),
                   splat((float)w->beta2), splat((float)(1.0 - w->beta2)), splat((float)(1.0 / sqrt(rest2))),
                   splat((float)w->eps), splat(1.0f / scale)}; /* divisions are the slowest of it all */
}

/* Eight weights from `j` on. */
INLINE void eight(const Factors *f, float *p, const float *g, float *m, float *v, void *half_memory, int64_t j, int half) {
  const vf slope = load(g, j, 0) * f->by;
  vf first = load(m, j, 0);
  first += f->slow1 * (slope - first);
  const vf second = f->beta2 * load(v, j, 0) + f->slow2 * (slope * slope);
  const vf weight = f->keep * load(p, j, 0) - f->rate * first / (root(second) * f->by_root + f->eps);
  store(m, j, first, 0);
  store(v, j, second, 0);
  store(p, j, weight, 0);
  if (half) store(half_memory, j, weight, 1);
}

INLINE void chunk_of(const Weight *w, int64_t from, float scale, int half) {
  const Factors f = factors_of(w, scale);
  const int64_t last = least(w->count, from + CHUNK);
  int64_t j = from;
  for (; j + WIDE <= last; j += WIDE) eight(&f, w->p, w->g, w->m, w->v, w->half, j, half);
  if (j == last) return;
  float p[WIDE] = {0}, g[WIDE] = {0}, m[WIDE] = {0}, v[WIDE] = {0};
  uint16_t narrow[WIDE];
  const size_t bytes = (size_t)(last - j) * sizeof(float);
  memcpy(p, w->p + j, bytes);
  memcpy(g, w->g + j, bytes);
  memcpy(m, w->m + j, bytes);
  memcpy(v, w->v + j, bytes);
  eight(&f, p, g, m, v, narrow, 0, half);
  memcpy(w->p + j, p, bytes);
  memcpy(w->m + j, m, bytes);
  memcpy(w->v + j, v, bytes);
  if (half) memcpy((uint16_t *)w->half + j, narrow, bytes / 2);
}

/* One step of `count` weights; raises each one's t by 1. */
void regraft_adamw(const Weight *weights, int64_t count, float scale, int threads) {
  int64_t chunks = 0;
  for (int64_t i = 0; i < count; i++) {
    *weights[i].t += 1.0f;
    chunks += chunks_of(weights[i].count);
  }
  const int64_t share = (chunks + threads - 1) / threads;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int64_t part = 0; part < threads; part++) {
    const int64_t first = part * share, last = least(chunks, first + share);
    int64_t before = 0; /* chunks of the weights before this one */
    for (const Weight *w = weights; w < weights + count && before < last; before += chunks_of(w->count), w++) {
      const int64_t end = least(chunks_of(w->count), last - before);
      for (int64_t chunk = most(0, first - before); chunk < end; chunk++) {
        if (w->half)
          chunk_of(w, chunk * CHUNK, scale, 1);
        else
          chunk_of(w, chunk * CHUNK, scale, 0);
      }
    }
  }
}

/* Of `count` numbers from x[at] on, after those of the `n` others at the same place have been added. */
static double square_of_chunk(float *x, const float *const *others, int64_t n, int64_t at, int64_t count) {
  vf sums[SIDES] = {{0}};
  int64_t j = at;
  const int64_t last = at + count;
  for (; j + SIDES * WIDE <= last; j += SIDES * WIDE)
    for (int side = 0; side < SIDES; side++) {
      const int64_t i = j + side * WIDE;
      vf some = load(x, i, 0);
      for (int64_t k = 0; k < n; k++) some += load(others[k], i, 0);
      if (n) store(x, i, some, 0);
      sums[side] += some * some;
    }
  float rest = 0.0f;
  for (; j < last; j++) {
    for (int64_t k = 0; k < n; k++) x[j] += others[k][j];
    rest += x[j] * x[j];
  }
  return (double)total((sums[0] + sums[1]) + (sums[2] + sums[3])) + (double)rest;
}

/* The sum of squares of `count` tensors of sizes[i] numbers into sums[0]; `sums`: a number for each chunk. To each tensor those
   beside it are added first: others[i * n] to others[i * n + n - 1]. */
void regraft_square_sum(float *const *tensors, const float *const *others, int64_t n, const int64_t *sizes, int64_t count,
                        double *sums, int threads) {
  int64_t chunks = 0;
  for (int64_t i = 0; i < count; i++) chunks += chunks_of(sizes[i]);
  const int64_t share = (chunks + threads - 1) / threads;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int64_t part = 0; part < threads; part++) {
    const int64_t first = part * share, last = least(chunks, first + share);
    int64_t before = 0;
    for (int64_t i = 0; i < count && before < last; before += chunks_of(sizes[i]), i++) {
      const int64_t end = least(chunks_of(sizes[i]), last - before);
      for (int64_t chunk = most(0, first - before); chunk < end; chunk++)
        sums[before + chunk] =
            square_of_chunk(tensors[i], others + i * n, n, chunk * CHUNK, least(CHUNK, sizes[i] - chunk * CHUNK));
    }
  }
  for (int64_t chunk = 1; chunk < chunks; chunk++) sums[0] += sums[chunk];
}
