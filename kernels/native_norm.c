/* Dropout, residual sum and LayerNorm on CPU, a row at a time in the nearest cache: fp32, or with x in bf16 (and what is added,
   and y, in fp32 or bf16 too); all arithmetic is in fp32.

   z = dropout(x) + residual,   y = (z - mean(z)) / sqrt(var(z) + eps) * weight + bias

   The backward makes the dropout decisions again from the seed, and z from x and residual. Every thread sums the
   gradients of weight and bias over its own rows; they are added up in order: the same bits in every run. */
#include "native.h"
#include <math.h>

#define EACH(j, width) for (int64_t j = 0; j < (width); j += TILE)

typedef struct {
  const void *x, *residual; /* residual and bias may be NULL */
  const float *weight, *bias;
  int64_t rows, width;
  int64_t half_x, half_residual; /* in bf16; y is where both are */
  float eps, factor;
  uint32_t threshold; /* of 65536: the decisions below it are dropped */
  uint64_t seed;
} Problem;

/* z of one row into memory; returns its sum. */
INLINE float summed(const Problem *p, int64_t row, float *z) {
  const int64_t from = row * p->width;
  const uint64_t key = row_key(p->seed, (uint64_t)row);
  vf left_sum = splat(0.0f), right_sum = splat(0.0f);
  EACH(j, p->width) {
    vf left = load(p->x, from + j, p->half_x), right = load(p->x, from + j + WIDE, p->half_x), keep, too;
    if (p->threshold) {
      kept(key, j, p->threshold, p->factor, &keep, &too);
      left *= keep;
      right *= too;
    }
    if (p->residual) {
      left += load(p->residual, from + j, p->half_residual);
      right += load(p->residual, from + j + WIDE, p->half_residual);
    }
    *(vf *)(z + j) = left;
    *(vf *)(z + j + WIDE) = right;
    left_sum += left;
    right_sum += right;
  }
  return total(left_sum + right_sum);
}

/* Takes the mean off a row; returns 1 / its deviation. */
static inline float centred(const Problem *p, float *z, float sum) {
  const vf mean = splat(sum / (float)p->width);
  vf left_sum = splat(0.0f), right_sum = splat(0.0f);
  EACH(j, p->width) {
    vf *left = (vf *)(z + j), *right = (vf *)(z + j + WIDE);
    *left -= mean;
    *right -= mean;
    left_sum += *left * *left;
    right_sum += *right * *right;
  }
  return 1.0f / sqrtf(total(left_sum + right_sum) / (float)p->width + p->eps);
}

INLINE void forward_of(const Problem *p, int64_t row, float *z, void *y) {
  const int half = p->half_x && p->half_residual;
  const vf by = splat(centred(p, z, summed(p, row, z)));
  for (int64_t j = 0; j < p->width; j += WIDE) {
    vf value = *(vf *)(z + j) * by * *(const vf *)(p->weight + j);
    if (p->bias) value += *(const vf *)(p->bias + j);
    store(y, row * p->width + j, value, half);
  }
}

INLINE void backward_of(const Problem *p, int64_t row, const void *dy, float *z, void *dx, void *dresidual,
                               float *dweight, float *dbias) {
  const int64_t width = p->width, from = row * width;
  const int half_y = p->half_x && p->half_residual;
  const float deviation = centred(p, z, summed(p, row, z));
  const vf by = splat(deviation);
  const uint64_t key = row_key(p->seed, (uint64_t)row);
  vf slope = splat(0.0f), along = splat(0.0f);
  for (int64_t j = 0; j < width; j += WIDE) {
    const vf up_ = load(dy, from + j, half_y), g = up_ * *(const vf *)(p->weight + j);
    vf *normal = (vf *)(z + j);
    *normal *= by;
    slope += g;
    along += g * *normal;
    if (dweight) {
      *(vf *)(dweight + j) += up_ * *normal;
      *(vf *)(dbias + j) += up_;
    }
  }
  const vf flat = splat(total(slope) / (float)width), tilt = splat(total(along) / (float)width);
  EACH(j, width) {
    vf keep = splat(1.0f), too = keep;
    vf left = load(dy, from + j, half_y) * *(const vf *)(p->weight + j);
    vf right = load(dy, from + j + WIDE, half_y) * *(const vf *)(p->weight + j + WIDE);
    left = (left - flat - *(vf *)(z + j) * tilt) * by;
    right = (right - flat - *(vf *)(z + j + WIDE) * tilt) * by;
    if (dresidual) {
      store(dresidual, from + j, left, p->half_residual);
      store(dresidual, from + j + WIDE, right, p->half_residual);
    }
    if (p->threshold) kept(key, j, p->threshold, p->factor, &keep, &too);
    store(dx, from + j, left * keep, p->half_x);
    store(dx, from + j + WIDE, right * too, p->half_x);
  }
}

/* Where numbers are in bf16 as constants, so that no loop asks. */
#define KNOWN(p, of_x, of_residual, call)                                                                              \
  if (!(p)->half_x == !of_x && !(p)->half_residual == !of_residual) {                                                  \
    Problem known = *(p); known.half_x = of_x; known.half_residual = of_residual; const Problem *problem = &known; call; \
  }
#define WITH_HALVES(p, call) KNOWN(p, 0, 0, call) KNOWN(p, 1, 0, call) KNOWN(p, 0, 1, call) KNOWN(p, 1, 1, call)

/* y [rows, width]; `scratch`: [threads, width]. */
void regraft_norm(const Problem *p, void *y, float *scratch, int threads) {
  const int64_t share = (p->rows + threads - 1) / threads;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int64_t part = 0; part < threads; part++) {
    const int64_t last = least(p->rows, (part + 1) * share);
    float *z = scratch + part * p->width;
    WITH_HALVES(p, for (int64_t row = part * share; row < last; row++) forward_of(problem, row, z, y));
  }
}

INLINE void backward_of_rows(const Problem *p, int64_t first, int64_t last, const void *dy, void *dx, void *dresidual,
                                    float *sum, float *z) {
  const int64_t width = p->width;
  float *recent = z + width;
  for (int64_t row = first; !sum && row < last; row++) backward_of(p, row, dy, z, dx, dresidual, NULL, NULL);
  for (int64_t begin = first; sum && begin < last; begin += BLOCK) {
    memset(recent, 0, 2 * width * sizeof(float));
    for (int64_t row = begin; row < least(last, begin + BLOCK); row++)
      backward_of(p, row, dy, z, dx, dresidual, recent, recent + width);
    for (int64_t j = 0; j < 2 * width; j++) sum[j] += recent[j];
  }
}

/* Gradients: dx and, unless NULL, dresidual [rows, width]; unless NULL, sums [threads, 2, width], begun at 0, in whose first two
   rows those of weight and bias are at the end. `scratch`: [threads, 3, width]. */
void regraft_norm_backward(const Problem *p, const void *dy, void *dx, void *dresidual, float *sums, float *scratch,
                           int threads) {
  const int64_t width = p->width, share = (p->rows + threads - 1) / threads;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int64_t part = 0; part < threads; part++) {
    const int64_t last = least(p->rows, (part + 1) * share);
    float *z = scratch + part * 3 * width, *sum = sums ? sums + part * 2 * width : NULL;
    WITH_HALVES(p, backward_of_rows(problem, part * share, last, dy, dx, dresidual, sum, z));
  }
  if (sums) add_up(sums, threads, 2 * width);
}
