/* The recurrence of an LSTM over packed sequences in time-major order, and its way back, on CPU, in fp32.

   z_t += h_{t-1} U^T,   i, f, g, o = z_t in four parts,   c_t = sigmoid(f) c_{t-1} + sigmoid(i) tanh(g),   h_t = sigmoid(o) tanh(c_t)

   A few sequences are one piece of work, from their first step to their last: no thread waits for another between steps. U lies
   in panels of TILE columns, so that a step reads it front to back, once for all sequences of the piece. Every sum has one order,
   whoever computes it: the same bits for any number of threads, and for a sequence whatever stands beside it. */
#define WANTS_LONG_VECTORS
#include "native.h"

#if WIDE == 16
#define MOST 12 /* sequences of a piece: their sums, of TILE columns each, fill the registers */
#else
#define MOST 6
#endif

typedef struct {
  const float *panels;         /* forward: U^T, [4 wide / TILE][wide][TILE]; back: U, [up(wide, TILE) / TILE][4 wide][TILE] */
  float *gates;                /* [rows][4 wide]: x W^T + b, then what the four gates are */
  float *states, *cells, *curved; /* [rows][wide]: h, c, tanh(c) */
  const float *grad;           /* back: [rows][wide], of the states */
  float *slopes;               /* back: [rows][4 wide], of z */
  float *room;                 /* back: (up(wide, TILE) + wide) for every sequence */
  const int64_t *offsets, *sizes; /* of each step: its first row, and how many sequences come to it, longest first */
  int64_t steps, wide, each;   /* each: sequences of a piece, MOST at most */
} Recurrence;

/* c[n][columns] += a[n][inner] b, whose columns lie in panels. A constant n keeps the sums in registers. */
INLINE void rows_times(float *c, int64_t ldc, const float *a, int64_t lda, const float *b, int64_t inner, int64_t columns, const int n) {
  for (int64_t j = 0; j < columns; j += TILE, b += inner * TILE) {
    vf left[MOST], right[MOST];
    for (int r = 0; r < n; r++) left[r] = right[r] = splat(0.0f);
    for (int64_t k = 0; k < inner; k++) {
      const vf b0 = *(const vf *)(b + k * TILE), b1 = *(const vf *)(b + k * TILE + WIDE);
      for (int r = 0; r < n; r++) {
        const vf x = splat(a[r * lda + k]);
        left[r] += x * b0;
        right[r] += x * b1;
      }
    }
    for (int r = 0; r < n; r++) {
      *(vf *)(c + r * ldc + j) += left[r];
      *(vf *)(c + r * ldc + j + WIDE) += right[r];
    }
  }
}

static void product(float *c, int64_t ldc, const float *a, int64_t lda, const float *b, int64_t inner, int64_t columns, int64_t n) {
  switch (n) {
#define ROWS(count) \
  case count:       \
    rows_times(c, ldc, a, lda, b, inner, columns, count); \
    break;
    ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6)
#if MOST > 6
    ROWS(7) ROWS(8) ROWS(9) ROWS(10) ROWS(11) ROWS(12)
#endif
#undef ROWS
  }
}

INLINE vf either(vi where, vf yes, vf no) { return (vf)(((vi)yes & where) | ((vi)no & ~where)); }

INLINE vf size_of(vf x) { return (vf)((vi)x & 0x7FFFFFFF); }

/* 1 / (1 + e^-x), by the size of x: the exponent is never above 0. */
INLINE vf sigmoid(vf x) {
  const vf e = exponential(-size_of(x)), y = splat(1.0f) / (splat(1.0f) + e);
  return either((vi)(x < splat(0.0f)), e * y, y);
}

/* (1 - e^-2x) / (1 + e^-2x), by the size of x; near 0, where 1 - e has lost its last digits, the first terms of the series. */
INLINE vf tangent(vf x) {
  const vf size = size_of(x), e = exponential(size * splat(-2.0f)), y = (splat(1.0f) - e) / (splat(1.0f) + e);
  const vf square = x * x;
  const vf near = size - size * square * (splat(1.0f / 3.0f) - square * (splat(2.0f / 15.0f) - square * splat(17.0f / 315.0f)));
  return (vf)((vi)either((vi)(size < splat(0.1f)), near, y) | ((vi)x & INT32_MIN));
}

static void step_of(const Recurrence *p, int64_t row, int64_t before, int64_t n) {
  const int64_t wide = p->wide;
  if (before >= 0) product(p->gates + row * 4 * wide, 4 * wide, p->states + before * wide, wide, p->panels, wide, 4 * wide, n);
  for (int64_t r = 0; r < n; r++) {
    float *z = p->gates + (row + r) * 4 * wide, *cells = p->cells + (row + r) * wide;
    float *curved = p->curved + (row + r) * wide, *states = p->states + (row + r) * wide;
    for (int64_t j = 0; j < wide; j += WIDE) {
      vf *const i = (vf *)(z + j), *const f = (vf *)(z + wide + j), *const g = (vf *)(z + 2 * wide + j), *const o = (vf *)(z + 3 * wide + j);
      *i = sigmoid(*i);
      *f = sigmoid(*f);
      *g = tangent(*g);
      *o = sigmoid(*o);
      vf c = *i * *g;
      if (before >= 0) c += *f * *(const vf *)(p->cells + (before + r) * wide + j);
      const vf curve = tangent(c);
      *(vf *)(cells + j) = c;
      *(vf *)(curved + j) = curve;
      *(vf *)(states + j) = *o * curve;
    }
  }
}

/* Of `n` sequences at a step; of the first `later` of them the next step's slopes begin at row `after`. */
static void step_back(const Recurrence *p, float *states, float *cells, int64_t row, int64_t before, int64_t after, int64_t n, int64_t later) {
  const int64_t wide = p->wide, padded = up(wide, TILE);
  for (int64_t r = 0; r < n; r++) memcpy(states + r * padded, p->grad + (row + r) * wide, wide * sizeof(float));
  if (later) product(states, padded, p->slopes + after * 4 * wide, 4 * wide, p->panels, 4 * wide, padded, later);
  for (int64_t r = 0; r < n; r++) {
    const float *z = p->gates + (row + r) * 4 * wide, *curved = p->curved + (row + r) * wide;
    float *dz = p->slopes + (row + r) * 4 * wide;
    for (int64_t j = 0; j < wide; j += WIDE) {
      const vf one = splat(1.0f), i = *(const vf *)(z + j), f = *(const vf *)(z + wide + j), g = *(const vf *)(z + 2 * wide + j);
      const vf o = *(const vf *)(z + 3 * wide + j), curve = *(const vf *)(curved + j), dh = *(const vf *)(states + r * padded + j);
      vf dc = dh * o * (one - curve * curve), df = splat(0.0f);
      if (r < later) dc += *(const vf *)(cells + r * wide + j);
      if (before >= 0) df = dc * *(const vf *)(p->cells + (before + r) * wide + j) * f * (one - f);
      *(vf *)(dz + j) = dc * g * i * (one - i);
      *(vf *)(dz + wide + j) = df;
      *(vf *)(dz + 2 * wide + j) = dc * i * (one - g * g);
      *(vf *)(dz + 3 * wide + j) = dh * curve * o * (one - o);
      *(vf *)(cells + r * wide + j) = dc * f;
    }
  }
}

/* How many columns lie in a panel, and how many sequences are a piece at most: lstm_native.py prepares by them. */
int regraft_lstm_panel(int threads) {
  (void)threads;
  return TILE;
}

int regraft_lstm_most(int threads) {
  (void)threads;
  return MOST;
}

int regraft_lstm(const Recurrence *p, int threads) {
  const int64_t sequences = p->sizes[0];
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t s = 0; s < sequences; s += p->each)
    for (int64_t t = 0; t < p->steps && p->sizes[t] > s; t++)
      step_of(p, p->offsets[t] + s, t ? p->offsets[t - 1] + s : -1, least(p->each, p->sizes[t] - s));
  return 0;
}

int regraft_lstm_backward(const Recurrence *p, int threads) {
  const int64_t sequences = p->sizes[0], padded = up(p->wide, TILE);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t s = 0; s < sequences; s += p->each) {
    float *states = p->room + s * padded, *cells = p->room + sequences * padded + s * p->wide;
    int64_t later = 0;
    for (int64_t t = p->steps - 1; t >= 0; t--) {
      const int64_t n = least(p->each, p->sizes[t] - s);
      if (n <= 0) continue;
      step_back(p, states, cells, p->offsets[t] + s, t ? p->offsets[t - 1] + s : -1, later ? p->offsets[t + 1] + s : 0, n, later);
      later = n;
    }
  }
  return 0;
}
