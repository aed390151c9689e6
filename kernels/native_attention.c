/* Attention within each sequence of a packed row, on CPU: one pass a head, nothing of size length^2 in memory. Rows in memory
   are fp32 or bf16, arithmetic is in fp32.

   out_i = sum_j keep_ij / (1 - p) * softmax_j(scale * q_i k_j) * v_j,   j of i's own sequence, |i - j| <= window

   Every (sequence, head) is one piece of work. Its keys, transposed, and its values are gathered into memory of the
   thread's own; then ROWS queries at a time meet all their keys. The backward makes the probabilities again from q, k and what
   the forward left of each softmax (its highest score, and 1 / the sum), and the dropout decisions again from the seed (after
   Dao et al. 2022). Where tiles are multiplied, or vectors are long, native_attention_tiles.h and native_attention_long.h do it. */
#define WANTS_LONG_VECTORS
#include "native.h"
#include "native_long.h"
#include "native_tiles.h"
#include <math.h>

#ifdef __AVX512F__
#define LANES 16 /* numbers of a register */
#define MR 8     /* rows of a tile: as many sums at once as hide an addition's latency */
#else
#define LANES 8
#define MR 4
#endif
#define ROWS 32   /* queries that are at work together */
#define DEEP 8     /* terms of a sum in registers */
#define COLUMNS 16 /* of a product in registers */
#define SQUARE 8   /* rows and columns that are transposed together */

typedef float lanes VECTOR(4 * LANES, 4);
typedef float v8 VECTOR(32, 4);
typedef int32_t v8i VECTOR(32, 4);

/* c[MR][COLUMNS] (+)= a[MR][DEEP] b[DEEP][COLUMNS]; a's element (r, k) is a[r * ar + k * ak]. c is added last. */
INLINE void tile(const float *a, int64_t ar, int64_t ak, const float *b, int64_t ldb, float *c, int64_t ldc, int add) {
  lanes x[MR][COLUMNS / LANES];
  for (int k = 0; k < DEEP; k++)
    for (int l = 0; l < COLUMNS / LANES; l++) {
      const lanes row = *(const lanes *)(b + k * ldb + l * LANES);
      for (int r = 0; r < MR; r++) x[r][l] = k ? x[r][l] + a[r * ar + k * ak] * row : a[r * ar] * row;
    }
  for (int r = 0; r < MR; r++)
    for (int l = 0; l < COLUMNS / LANES; l++) {
      lanes *to = (lanes *)(c + r * ldc + l * LANES);
      if (add) x[r][l] += *to;
      *to = x[r][l];
    }
}

/* c[m][w] (+)= a[m][n] b[n][w]; m and n multiples of DEEP, w of COLUMNS. Sums of DEEP terms are summed: rounding grows less. */
static void product(const float *a, int64_t ar, int64_t ak, const float *b, int64_t ldb, float *c, int64_t ldc, int64_t m,
                    int64_t n, int64_t w, int add) {
  if (n <= 0 && !add)
    for (int64_t i = 0; i < m; i++) memset(c + i * ldc, 0, w * sizeof(float));
  for (int64_t k = 0; k < n; k += DEEP)
    for (int64_t j = 0; j < w; j += COLUMNS)
      for (int64_t i = 0; i < m; i += MR)
        if (ak == 1)
          tile(a + i * ar + k, ar, 1, b + k * ldb + j, ldb, c + i * ldc + j, ldc, add || k);
        else
          tile(a + i + k * ak, 1, ak, b + k * ldb + j, ldb, c + i * ldc + j, ldc, add || k);
}

/* Columns that a query at `i` may see: [from, to) of n. */
static inline void visible(int64_t i, int64_t n, int64_t window, int64_t *from, int64_t *to) {
  *from = window < 0 ? 0 : most(0, i - window);
  *to = window < 0 ? n : least(n, i + window + 1);
}

/* What one thread holds while it is at one head of one sequence; n keys, padded to `wide` columns. */
typedef struct {
  float *kt, *vt, *k, *v, *dk, *dv, *q, *g, *dq, *out, *s, *slope, *keep;
} Space;

/* Floats that a thread needs for sequences of up to `wide` keys. */
static int64_t room(int64_t wide, int64_t d, int backward) {
  return (backward ? 6 : 2) * wide * d + (backward ? 2 : 1) * ROWS * (2 * d + wide) + (backward ? wide : 0);
}

/* d and wide are multiples of 16, so that every part begins at a whole cache line. */
static Space divide(float *at, int64_t wide, int64_t d, int backward) {
  Space w = {0};
  float **per_key[] = {&w.kt, &w.v, &w.vt, &w.k, &w.dk, &w.dv}, **per_query[] = {&w.q, &w.out, &w.g, &w.dq};
  for (int i = 0; i < (backward ? 6 : 2); i++, at += wide * d) *per_key[i] = at;
  for (int i = 0; i < (backward ? 4 : 2); i++, at += ROWS * d) *per_query[i] = at;
  w.s = at;
  w.slope = backward ? at + ROWS * wide : NULL;
  w.keep = backward ? at + 2 * ROWS * wide : NULL;
  return w;
}

/* Rows of d numbers from place `from` of `base` on, `stride` apart, one below the other. */
static void gather(float *to, const void *base, int64_t from, int64_t stride, int64_t n, int64_t padded, int64_t d,
                          int half) {
  for (int64_t i = 0; i < n; i++)
    for (int64_t j = 0; j < d; j += WIDE) *(vf *)(to + i * d + j) = load(base, from + i * stride + j, half);
  memset(to + n * d, 0, (padded - n) * d * sizeof(float));
}

/* Eight rows of eight, transposed. */
static inline void transpose(v8 row[SQUARE]) {
  v8 a[SQUARE], b[SQUARE];
  for (int i = 0; i < 8; i += 2) {
    a[i] = __builtin_shuffle(row[i], row[i + 1], (v8i){0, 8, 2, 10, 4, 12, 6, 14});
    a[i + 1] = __builtin_shuffle(row[i], row[i + 1], (v8i){1, 9, 3, 11, 5, 13, 7, 15});
  }
  for (int i = 0; i < 8; i += 4)
    for (int k = 0; k < 2; k++) {
      b[i + k] = __builtin_shuffle(a[i + k], a[i + k + 2], (v8i){0, 1, 8, 9, 4, 5, 12, 13});
      b[i + k + 2] = __builtin_shuffle(a[i + k], a[i + k + 2], (v8i){2, 3, 10, 11, 6, 7, 14, 15});
    }
  for (int i = 0; i < 4; i++) {
    row[i] = __builtin_shuffle(b[i], b[i + 4], (v8i){0, 1, 2, 3, 8, 9, 10, 11});
    row[i + 4] = __builtin_shuffle(b[i], b[i + 4], (v8i){4, 5, 6, 7, 12, 13, 14, 15});
  }
}

static inline v8 load8(const void *from, int64_t at, int half) {
  if (!half) return *(const v8 *)((const float *)from + at);
  typedef uint16_t h8 VECTOR(16, 2);
  return (v8)(__builtin_convertvector(*(const h8 *)((const uint16_t *)from + at), v8i) << 16);
}

static void gather_transposed(float *to, const void *base, int64_t from, int64_t stride, int64_t n, int64_t wide,
                                     int64_t d, int half) {
  for (int64_t i = 0; i < wide; i += SQUARE)
    for (int64_t c = 0; c < d; c += SQUARE) {
      v8 rows[SQUARE];
      for (int r = 0; r < SQUARE; r++) rows[r] = i + r < n ? load8(base, from + (i + r) * stride + c, half) : (v8){0.0f};
      transpose(rows);
      for (int r = 0; r < SQUARE; r++) *(v8 *)(to + (c + r) * wide + i) = rows[r];
    }
}

static void scatter(void *base, int64_t to, int64_t stride, const float *from, int64_t n, int64_t d, int half) {
  for (int64_t i = 0; i < n; i++)
    for (int64_t j = 0; j < d; j += WIDE) store(base, to + i * stride + j, *(const vf *)(from + i * d + j), half);
}

/* 1 or 0 bits throughout for the columns of [from, to) among the next WIDE from j on. */
static inline vi inside(int64_t j, int64_t from, int64_t to) {
  const vi at = (vi)COUNT + (int32_t)j;
  return (at >= (int32_t)from) & (at < (int32_t)to);
}

static inline float highest(const float *s, int64_t from, int64_t to, int64_t start, int64_t end) {
  vf top = splat(-INFINITY);
  for (int64_t j = start; j < end; j += WIDE) {
    const vf x = *(const vf *)(s + j);
    const vi higher = ~(x <= top) & inside(j, from, to); /* NaN is higher than all, and stays */
    top = (vf)(((vi)x & higher) | ((vi)top & ~higher));
  }
  float found = top[0];
  for (int i = 1; i < WIDE; i++) found = top[i] <= found ? found : top[i];
  return found;
}

/* e^(scale (s - top)) of the scores from j on, nothing outside [from, to). */
static inline vf power(const float *s, int64_t j, float scale, float top, int64_t from, int64_t to) {
  const vi seen = inside(j, from, to);
  const vf x = (*(const vf *)(s + j) - splat(top)) * splat(scale);
  return (vf)((vi)exponential((vf)((vi)x & seen)) & seen);
}

typedef struct {
  const void *q, *k, *v;                 /* of one head: row t is at q + t * q_stride, k and v + t * kv_stride */
  const int32_t *cu_q, *cu_k;            /* [sequences + 1] */
  int64_t sequences, heads, d, q_stride, kv_stride, longest, window;
  int64_t half;                          /* these and all results in bf16 */
  float scale, factor;
  uint32_t threshold;                    /* of 65536: the decisions below it are dropped */
  uint64_t seed;
  float *softmax;                        /* of each query and head two: the highest score and 1 / the sum, or where tiles are
                                            multiplied log2 of the sum of e^(scale score), and nothing */
  const void *result;                    /* backward: what the forward gave; read where tiles are multiplied */
  int64_t last;                          /* forward: no backward follows, `softmax` may stay as it is */
} Problem;

static void forward_of(const Problem *p, Space w, int64_t b, int64_t h, void *out) {
  const int64_t d = p->d, m = p->cu_q[b + 1] - p->cu_q[b], n = p->cu_k[b + 1] - p->cu_k[b], wide = up(n, TILE);
  const int64_t first = p->cu_q[b], row = p->heads * d;
  if (!m) return;
  const int64_t place = p->cu_k[b] * p->kv_stride + h * d;
  gather_transposed(w.kt, p->k, place, p->kv_stride, n, wide, d, p->half);
  gather(w.v, p->v, place, p->kv_stride, n, wide, d, p->half);
  for (int64_t i0 = 0; i0 < m; i0 += ROWS) {
    int64_t rows = least(ROWS, m - i0), padded = up(rows, DEEP), from, to, last;
    visible(i0, n, p->window, &from, &last);
    visible(i0 + rows - 1, n, p->window, &last, &to);
    const int64_t start = from / TILE * TILE, end = most(start, up(to, TILE));
    gather(w.q, p->q, (first + i0) * p->q_stride + h * d, p->q_stride, rows, padded, d, p->half);
    product(w.q, d, 1, w.kt + start, wide, w.s + start, wide, padded, d, end - start, 0);
    for (int64_t i = 0; i < rows; i++) {
      float *s = w.s + i * wide, *found = p->softmax + ((first + i0 + i) * p->heads + h) * 2;
      visible(i0 + i, n, p->window, &from, &to);
      found[0] = highest(s, from, to, start, end);
      const uint64_t key = row_key(p->seed, (uint64_t)(first + i0 + i) * p->heads + h);
      vf sum = splat(0.0f), keep, too;
      for (int64_t j = start; j < end; j += TILE) {
        vf left = power(s, j, p->scale, found[0], from, to), right = power(s, j + WIDE, p->scale, found[0], from, to);
        sum += left + right;
        if (p->threshold) {
          kept(key, j, p->threshold, p->factor, &keep, &too);
          left *= keep;
          right *= too;
        }
        *(vf *)(s + j) = left;
        *(vf *)(s + j + WIDE) = right;
      }
      const float whole = total(sum);
      found[1] = whole == 0.0f ? 0.0f : 1.0f / whole; /* of no keys; NaN stays NaN */
    }
    for (int64_t i = rows; i < padded; i++) memset(w.s + i * wide + start, 0, (end - start) * sizeof(float));
    product(w.s + start, wide, 1, w.v + start * d, d, w.out, d, padded, end - start, d, 0);
    for (int64_t i = 0; i < rows; i++) {
      const vf by = splat(p->softmax[((first + i0 + i) * p->heads + h) * 2 + 1]);
      for (int64_t j = 0; j < d; j += WIDE) *(vf *)(w.out + i * d + j) *= by;
    }
    scatter(out, (first + i0) * row + h * d, row, w.out, rows, d, p->half);
  }
}

static void backward_of(const Problem *p, Space w, int64_t b, int64_t h, const void *grad, void *dq,
                               void *dk, void *dv) {
  const int64_t d = p->d, m = p->cu_q[b + 1] - p->cu_q[b], n = p->cu_k[b + 1] - p->cu_k[b], wide = up(n, TILE);
  const int64_t first = p->cu_q[b], row = p->heads * d, place = p->cu_k[b] * p->kv_stride + h * d;
  gather_transposed(w.kt, p->k, place, p->kv_stride, n, wide, d, p->half);
  gather_transposed(w.vt, p->v, place, p->kv_stride, n, wide, d, p->half);
  gather(w.k, p->k, place, p->kv_stride, n, wide, d, p->half);
  memset(w.dk, 0, wide * d * sizeof(float));
  memset(w.dv, 0, wide * d * sizeof(float));
  for (int64_t i0 = 0; i0 < m; i0 += ROWS) {
    int64_t rows = least(ROWS, m - i0), padded = up(rows, DEEP), from, to, last;
    visible(i0, n, p->window, &from, &last);
    visible(i0 + rows - 1, n, p->window, &last, &to);
    const int64_t start = from / TILE * TILE, end = most(start, up(to, TILE)), columns = end - start;
    gather(w.q, p->q, (first + i0) * p->q_stride + h * d, p->q_stride, rows, padded, d, p->half);
    gather(w.g, grad, (first + i0) * row + h * d, row, rows, padded, d, p->half);
    product(w.q, d, 1, w.kt + start, wide, w.s + start, wide, padded, d, columns, 0);
    product(w.g, d, 1, w.vt + start, wide, w.slope + start, wide, padded, d, columns, 0);
    for (int64_t i = 0; i < rows; i++) {
      const int64_t t = first + i0 + i;
      float *s = w.s + i * wide, *slope = w.slope + i * wide, *found = p->softmax + (t * p->heads + h) * 2;
      visible(i0 + i, n, p->window, &from, &to);
      const uint64_t key = row_key(p->seed, (uint64_t)t * p->heads + h);
      const vf by = splat(found[1]), scale = splat(p->scale);
      vf sum = splat(0.0f), keep = splat(1.0f), too = keep;
      for (int64_t j = start; j < end; j += TILE) {
        vf *a = (vf *)(s + j), *c = (vf *)(s + j + WIDE), *x = (vf *)(slope + j), *y = (vf *)(slope + j + WIDE);
        *a = power(s, j, p->scale, found[0], from, to) * by;
        *c = power(s, j + WIDE, p->scale, found[0], from, to) * by;
        if (p->threshold) {
          kept(key, j, p->threshold, p->factor, &keep, &too);
          *(vf *)(w.keep + j) = keep;
          *(vf *)(w.keep + j + WIDE) = too;
          *x *= keep;
          *y *= too;
        }
        sum += *a * *x + *c * *y;
      }
      /* what one key alone gives is nothing, to the last bit: the same numbers are summed that it is taken from */
      const vf mean = splat(total(sum));
      for (int64_t j = start; j < end; j += WIDE) {
        vf *a = (vf *)(s + j), *x = (vf *)(slope + j);
        *x = *a * (*x - mean) * scale;
        if (p->threshold) *a *= *(vf *)(w.keep + j);
      }
    }
    for (int64_t i = rows; i < padded; i++) {
      memset(w.s + i * wide + start, 0, columns * sizeof(float));
      memset(w.slope + i * wide + start, 0, columns * sizeof(float));
    }
    product(w.slope + start, wide, 1, w.k + start * d, d, w.dq, d, padded, columns, d, 0);
    scatter(dq, (first + i0) * p->q_stride + h * d, p->q_stride, w.dq, rows, d, p->half);
    product(w.slope + start, 1, wide, w.q, d, w.dk + start * d, d, columns, padded, d, 1);
    product(w.s + start, 1, wide, w.g, d, w.dv + start * d, d, columns, padded, d, 1);
  }
  scatter(dk, place, p->kv_stride, w.dk, n, d, p->half);
  scatter(dv, place, p->kv_stride, w.dv, n, d, p->half);
}

#ifdef HAS_TILES
#include "native_attention_tiles.h"
#endif
#ifdef HAS_LONG
#include "native_attention_long.h"
#endif

/* Without `grad`, attention into `out`; with it, the gradients for q (into `out`), k and v. All rows are written. Returns 0, or 1
   where there is no memory left for a thread to work in. */
int regraft_attention(const Problem *p, const void *grad, void *out, void *dk, void *dv, int threads) {
  int failed = 0;
  const int64_t pieces = p->sequences * p->heads, together = most(1, least(p->heads, pieces / (16 * threads)));
  int64_t bytes = room(up(p->longest, TILE), p->d, grad != NULL) * sizeof(float);
#ifdef HAS_TILES
  if (p->half && p->d % SIDE == 0 && tiles_allowed()) return attention_tiled(p, grad, out, dk, dv, threads);
#endif
#ifdef HAS_LONG
  Long parts;
  const int by_query = is_by_query(p);
  if (by_query) bytes = divide_long(&parts, NULL, p->longest, p->d, p->half, grad != NULL);
#endif
#pragma omp parallel num_threads(threads)
  {
    char *memory = NULL;
    if (posix_memalign((void **)&memory, 64, bytes)) {
      memory = NULL;
#pragma omp atomic write
      failed = 1;
    }
#pragma omp for schedule(dynamic, together)
    for (int64_t piece = 0; piece < pieces; piece++) {
      if (!memory) continue;
      const int64_t b = piece / p->heads, h = piece % p->heads, n = p->cu_k[b + 1] - p->cu_k[b];
#ifdef HAS_LONG
      if (by_query) {
        Long w;
        divide_long(&w, memory, n, p->d, p->half, grad != NULL);
        if (grad)
          gradients_of(p, w, b, h, grad, out, dk, dv);
        else
          answers_of(p, w, b, h, out);
        continue;
      }
#endif
      const Space w = divide((float *)memory, up(n, TILE), p->d, grad != NULL);
      if (grad)
        backward_of(p, w, b, h, grad, out, dk, dv);
      else
        forward_of(p, w, b, h, out);
    }
    free(memory);
  }
  return failed;
}
