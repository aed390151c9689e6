/* Dropout, residual sum and LayerNorm on CPU in fp32, a row at a time in the nearest cache.

   z = dropout(x) + residual,   y = (z - mean(z)) / sqrt(var(z) + eps) * weight + bias

   The backward makes the dropout decisions again from the seed, and z from x and residual. Every thread sums the
   gradients of weight and bias over its own rows; they are added up in order: the same bits in every run. */
#include "native.h"
#include <math.h>

#define EACH(j, width) for (int64_t j = 0; j < (width); j += TILE)

typedef struct {
  const float *x, *residual, *weight, *bias; /* residual and bias may be NULL */
  int64_t rows, width;
  float eps, factor;
  uint32_t threshold; /* of 65536: the decisions below it are dropped */
  uint64_t seed;
} Problem;

/* z of one row into memory; returns its sum. */
static inline float summed(const Problem *p, int64_t row, float *z) {
  const float *x = p->x + row * p->width, *residual = p->residual ? p->residual + row * p->width : NULL;
  const uint64_t key = row_key(p->seed, (uint64_t)row);
  vf left_sum = splat(0.0f), right_sum = splat(0.0f);
  EACH(j, p->width) {
    vf left = *(const vf *)(x + j), right = *(const vf *)(x + j + WIDE), keep, too;
    if (p->threshold) {
      kept(key, j, p->threshold, p->factor, &keep, &too);
      left *= keep;
      right *= too;
    }
    if (residual) {
      left += *(const vf *)(residual + j);
      right += *(const vf *)(residual + j + WIDE);
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

void regraft_norm(const Problem *p, float *y, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < p->rows; row++) {
    float *to = y + row * p->width;
    const vf by = splat(centred(p, to, summed(p, row, to)));
    for (int64_t j = 0; j < p->width; j += WIDE) {
      vf value = *(vf *)(to + j) * by * *(const vf *)(p->weight + j);
      if (p->bias) value += *(const vf *)(p->bias + j);
      *(vf *)(to + j) = value;
    }
  }
}

static inline void backward_of(const Problem *p, int64_t row, const float *dy, float *z, float *dx, float *dresidual,
                               float *dweight, float *dbias) {
  const int64_t width = p->width;
  const float deviation = centred(p, z, summed(p, row, z));
  const vf by = splat(deviation);
  const uint64_t key = row_key(p->seed, (uint64_t)row);
  vf slope = splat(0.0f), along = splat(0.0f);
  for (int64_t j = 0; j < width; j += WIDE) {
    const vf up_ = *(const vf *)(dy + j), g = up_ * *(const vf *)(p->weight + j);
    vf *normal = (vf *)(z + j);
    *normal *= by;
    slope += g;
    along += g * *normal;
    *(vf *)(dweight + j) += up_ * *normal;
    *(vf *)(dbias + j) += up_;
  }
  const vf flat = splat(total(slope) / (float)width), tilt = splat(total(along) / (float)width);
  EACH(j, width) {
    vf keep = splat(1.0f), too = keep;
    vf left = *(const vf *)(dy + j) * *(const vf *)(p->weight + j), right =
        *(const vf *)(dy + j + WIDE) * *(const vf *)(p->weight + j + WIDE);
    left = (left - flat - *(vf *)(z + j) * tilt) * by;
    right = (right - flat - *(vf *)(z + j + WIDE) * tilt) * by;
    if (dresidual) {
      *(vf *)(dresidual + j) = left;
      *(vf *)(dresidual + j + WIDE) = right;
    }
    if (p->threshold) kept(key, j, p->threshold, p->factor, &keep, &too);
    *(vf *)(dx + j) = left * keep;
    *(vf *)(dx + j + WIDE) = right * too;
  }
}

/* Gradients: dx and, unless NULL, dresidual [rows, width]; sums [threads, 2, width], begun at 0, in whose first two rows
   those of weight and bias are at the end. `scratch`: [threads, 3, width]. */
void regraft_norm_backward(const Problem *p, const float *dy, float *dx, float *dresidual, float *sums, float *scratch,
                           int threads) {
  const int64_t width = p->width, share = (p->rows + threads - 1) / threads;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int64_t part = 0; part < threads; part++) {
    const int64_t last = least(p->rows, (part + 1) * share);
    float *z = scratch + part * 3 * width, *recent = z + width, *sum = sums + part * 2 * width;
    for (int64_t first = part * share; first < last; first += BLOCK) {
      memset(recent, 0, 2 * width * sizeof(float));
      for (int64_t row = first; row < least(last, first + BLOCK); row++)
        backward_of(p, row, dy + row * width, z, dx + row * width, dresidual ? dresidual + row * width : NULL,
                    recent, recent + width);
      for (int64_t j = 0; j < 2 * width; j++) sum[j] += recent[j];
    }
  }
  add_up(sums, threads, 2 * width);
}
