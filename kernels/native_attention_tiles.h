/* The same attention where the processor multiplies tiles of bf16 (AMX): products take bf16 and add up in fp32, the softmax
   between them is in fp32. Included by native_attention.c, for heads whose size is a multiple of 32.

   A tile product takes 16 rows of 32 numbers and 16 rows of pairs: b's rows 2 r and 2 r + 1 side by side, number by number.
   So keys for the scores, and values for their gradient, are transposed pair by pair; what is summed over tokens (values,
   keys for the gradient of queries, probabilities and their gradient for those of values and keys) has its rows paired. */
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#define SIDE 32 /* queries, keys and columns of two tiles side by side */

typedef struct {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
} __attribute__((aligned(64))) TileConfig;

/* Whether this process may use tiles: Linux gives their registers to those who ask. */
static int tiles_allowed(void) {
  static int known = -1;
  if (known < 0) known = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
  return known;
}

static void use_tiles(TileConfig *before) {
  TileConfig mine = {.palette = 1};
  for (int t = 0; t < 8; t++) {
    mine.bytes[t] = 64;
    mine.rows[t] = 16;
  }
  _tile_storeconfig(before); /* whoever uses them beside us may count on finding them as they were */
  _tile_loadconfig(&mine);
}

/* c[m][w] (+)= a[m][n] b[n][w] with b's rows paired: [n / 2][w] pairs. m, n and w multiples of 32; strides in bytes. */
static void tiles(const void *a, int64_t lda, const void *b, int64_t ldb, float *c, int64_t ldc, int64_t m, int64_t n,
                  int64_t w, int add) {
  for (int64_t i = 0; i < m; i += SIDE)
    for (int64_t j = 0; j < w; j += SIDE) {
      char *upper = (char *)c + i * ldc + j * 4, *lower = upper + 16 * ldc;
      if (add) {
        _tile_loadd(0, upper, ldc);
        _tile_loadd(1, upper + 64, ldc);
        _tile_loadd(2, lower, ldc);
        _tile_loadd(3, lower + 64, ldc);
      } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      }
      for (int64_t k = 0; k < n; k += SIDE) {
        const char *rows = (const char *)a + i * lda + k * 2, *pairs = (const char *)b + k / 2 * ldb + j * 4;
        _tile_loadd(4, rows, lda);
        _tile_loadd(5, rows + 16 * lda, lda);
        _tile_loadd(6, pairs, ldb);
        _tile_loadd(7, pairs + 64, ldb);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, upper, ldc);
      _tile_stored(1, upper + 64, ldc);
      _tile_stored(2, lower, ldc);
      _tile_stored(3, lower + 64, ldc);
    }
}

/* Rows 2 r and 2 r + 1 of n side by side, number by number: [padded / 2][d] pairs. What is beyond n is 0. */
static void paired(uint32_t *to, int64_t ldto, const uint16_t *from, int64_t stride, int64_t n, int64_t padded, int64_t d) {
  for (int64_t r = 0; r < padded; r += 2)
    for (int64_t j = 0; j < d; j += WIDE) {
      vu pair = splat_u(0);
      if (r < n) pair = __builtin_convertvector(*(const vh *)(from + r * stride + j), vu);
      if (r + 1 < n) pair |= __builtin_convertvector(*(const vh *)(from + (r + 1) * stride + j), vu) << 16;
      *(vu *)(to + r / 2 * ldto + j) = pair;
    }
}

/* Pairs along a row, transposed: [d / 2][wide] pairs. Moved as fp32, which no one calculates with. */
static void pairs_transposed(uint32_t *to, const void *base, int64_t from, int64_t stride, int64_t n, int64_t wide, int64_t d) {
  gather_transposed((float *)to, base, from / 2, stride / 2, n, wide, d / 2, 0);
}

/* SIDE rows of d numbers, as they are. */
static void rows_of(uint16_t *to, const void *base, int64_t from, int64_t stride, int64_t n, int64_t d) {
  for (int64_t i = 0; i < n; i++) memcpy(to + i * d, (const uint16_t *)base + from + i * stride, d * sizeof(uint16_t));
  memset(to + n * d, 0, (SIDE - n) * d * sizeof(uint16_t));
}

static inline void store8(uint16_t *to, v8 x) { _mm_storeu_si128((__m128i *)to, (__m128i)_mm256_cvtneps_pbh((__m256)x)); }

/* [SIDE][d] in bf16 -> [d][SIDE] in bf16. */
static void turned(uint16_t *to, const uint16_t *from, int64_t d) {
  for (int64_t i = 0; i < SIDE; i += SQUARE)
    for (int64_t c = 0; c < d; c += SQUARE) {
      v8 rows[SQUARE];
      for (int r = 0; r < SQUARE; r++) rows[r] = load8(from, (i + r) * d + c, 1);
      transpose(rows);
      for (int r = 0; r < SQUARE; r++) store8(to + (c + r) * SIDE + i, rows[r]);
    }
}

/* [d][wide] in fp32 -> n rows of d numbers in bf16. */
static void scatter_turned(uint16_t *base, int64_t to, int64_t stride, const float *from, int64_t wide, int64_t n, int64_t d) {
  for (int64_t i = 0; i < n; i += SQUARE)
    for (int64_t c = 0; c < d; c += SQUARE) {
      v8 rows[SQUARE];
      for (int r = 0; r < SQUARE; r++) rows[r] = *(const v8 *)(from + (c + r) * wide + i);
      transpose(rows);
      for (int r = 0; r < least(SQUARE, n - i); r++) store8(base + to + (i + r) * stride + c, rows[r]);
    }
}

typedef struct {
  uint32_t *k_along, *v_along, *k_paired, *v_paired, *s_paired, *slope_paired; /* along a row, or of two rows */
  uint16_t *q, *g, *q_turned, *g_turned, *p, *slope_rows;
  float *s, *slope, *keep, *out, *dk, *dv;
} Tiled;

/* Bytes for sequences of up to `wide` keys, a multiple of SIDE; `at` NULL: only counted. */
static int64_t divide_tiled(Tiled *t, char *at, int64_t wide, int64_t d) {
  const int64_t keys = wide * d * 2, queries = SIDE * d * 2, scores = SIDE * wide * 4;
  int64_t used = 0;
#define PART(name, bytes) t->name = (void *)(at + used), used += up(bytes, 64)
  PART(k_along, keys), PART(v_along, keys), PART(k_paired, keys), PART(v_paired, keys);
  PART(s_paired, scores / 2), PART(slope_paired, scores / 2), PART(p, scores / 2), PART(slope_rows, scores / 2);
  PART(q, queries), PART(g, queries), PART(q_turned, queries), PART(g_turned, queries), PART(out, 2 * queries);
  PART(s, scores), PART(slope, scores), PART(keep, wide * 4), PART(dk, 2 * keys), PART(dv, 2 * keys);
#undef PART
  return used;
}

static void forward_tiled(const Problem *p, Tiled w, int64_t b, int64_t h, uint16_t *out) {
  const int64_t d = p->d, m = p->cu_q[b + 1] - p->cu_q[b], n = p->cu_k[b + 1] - p->cu_k[b], wide = up(n, SIDE);
  const int64_t first = p->cu_q[b], row = p->heads * d, place = p->cu_k[b] * p->kv_stride + h * d;
  if (!m) return;
  pairs_transposed(w.k_along, p->k, place, p->kv_stride, n, wide, d);
  paired(w.v_paired, d, (const uint16_t *)p->v + place, p->kv_stride, n, wide, d);
  for (int64_t i0 = 0; i0 < m; i0 += SIDE) {
    int64_t rows = least(SIDE, m - i0), from, to, last;
    visible(i0, n, p->window, &from, &last);
    visible(i0 + rows - 1, n, p->window, &last, &to);
    const int64_t start = from / SIDE * SIDE, end = up(to, SIDE);
    rows_of(w.q, p->q, (first + i0) * p->q_stride + h * d, p->q_stride, rows, d);
    tiles(w.q, d * 2, w.k_along + start, wide * 4, w.s + start, wide * 4, SIDE, d, end - start, 0);
    for (int64_t i = 0; i < rows; i++) {
      float *s = w.s + i * wide;
      visible(i0 + i, n, p->window, &from, &to);
      const vf by = splat(1.0f / weigh(s, p->scale, from, to, start, end));
      const uint64_t key = row_key(p->seed, (uint64_t)(first + i0 + i) * p->heads + h);
      for (int64_t j = start; j < end; j += TILE) {
        vf left = by, right = by;
        if (p->threshold) {
          kept(key, j, p->threshold, p->factor, &left, &right);
          left *= by;
          right *= by;
        }
        store(w.p, i * wide + j, *(vf *)(s + j) * left, 1);
        store(w.p, i * wide + j + WIDE, *(vf *)(s + j + WIDE) * right, 1);
      }
    }
    for (int64_t i = rows; i < SIDE; i++) memset(w.p + i * wide + start, 0, (end - start) * 2);
    tiles(w.p + start, wide * 2, w.v_paired + start / 2 * d, d * 4, w.out, d * 4, SIDE, end - start, d, 0);
    scatter(out, (first + i0) * row + h * d, row, w.out, rows, d, 1);
  }
}

static void backward_tiled(const Problem *p, Tiled w, int64_t b, int64_t h, const uint16_t *grad, uint16_t *dq, uint16_t *dk,
                           uint16_t *dv) {
  const int64_t d = p->d, m = p->cu_q[b + 1] - p->cu_q[b], n = p->cu_k[b + 1] - p->cu_k[b], wide = up(n, SIDE);
  const int64_t first = p->cu_q[b], row = p->heads * d, place = p->cu_k[b] * p->kv_stride + h * d;
  const vf scale = splat(p->scale);
  pairs_transposed(w.k_along, p->k, place, p->kv_stride, n, wide, d);
  pairs_transposed(w.v_along, p->v, place, p->kv_stride, n, wide, d);
  paired(w.k_paired, d, (const uint16_t *)p->k + place, p->kv_stride, n, wide, d);
  memset(w.dk, 0, wide * d * sizeof(float));
  memset(w.dv, 0, wide * d * sizeof(float));
  for (int64_t i0 = 0; i0 < m; i0 += SIDE) {
    int64_t rows = least(SIDE, m - i0), from, to, last;
    visible(i0, n, p->window, &from, &last);
    visible(i0 + rows - 1, n, p->window, &last, &to);
    const int64_t start = from / SIDE * SIDE, end = up(to, SIDE), columns = end - start;
    rows_of(w.q, p->q, (first + i0) * p->q_stride + h * d, p->q_stride, rows, d);
    rows_of(w.g, grad, (first + i0) * row + h * d, row, rows, d);
    tiles(w.q, d * 2, w.k_along + start, wide * 4, w.s + start, wide * 4, SIDE, d, columns, 0);
    tiles(w.g, d * 2, w.v_along + start, wide * 4, w.slope + start, wide * 4, SIDE, d, columns, 0);
    for (int64_t i = 0; i < rows; i++) {
      float *s = w.s + i * wide, *slope = w.slope + i * wide;
      visible(i0 + i, n, p->window, &from, &to);
      const vf by = splat(1.0f / weigh(s, p->scale, from, to, start, end));
      const uint64_t key = row_key(p->seed, (uint64_t)(first + i0 + i) * p->heads + h);
      vf sum = splat(0.0f);
      for (int64_t j = start; j < end; j += TILE) {
        vf left = splat(1.0f), right = left, *a = (vf *)(s + j), *c = (vf *)(s + j + WIDE);
        vf *x = (vf *)(slope + j), *y = (vf *)(slope + j + WIDE);
        if (p->threshold) {
          kept(key, j, p->threshold, p->factor, &left, &right);
          *x *= left;
          *y *= right;
        }
        *a *= by;
        *c *= by;
        store(w.p, i * wide + j, *a * left, 1);
        store(w.p, i * wide + j + WIDE, *c * right, 1);
        sum += *a * *x + *c * *y;
      }
      const vf mean = splat(total(sum));
      for (int64_t j = start; j < end; j += WIDE)
        store(w.slope_rows, i * wide + j, *(vf *)(s + j) * (*(vf *)(slope + j) - mean) * scale, 1);
    }
    for (int64_t i = rows; i < SIDE; i++) memset(w.slope_rows + i * wide + start, 0, columns * 2);
    tiles(w.slope_rows + start, wide * 2, w.k_paired + start / 2 * d, d * 4, w.out, d * 4, SIDE, columns, d, 0);
    scatter(dq, (first + i0) * p->q_stride + h * d, p->q_stride, w.out, rows, d, 1);
    turned(w.q_turned, w.q, d);
    turned(w.g_turned, w.g, d);
    paired(w.slope_paired + start, wide, w.slope_rows + start, wide, rows, SIDE, columns);
    paired(w.s_paired + start, wide, w.p + start, wide, rows, SIDE, columns);
    tiles(w.q_turned, SIDE * 2, w.slope_paired + start, wide * 4, w.dk + start, wide * 4, d, SIDE, columns, 1);
    tiles(w.g_turned, SIDE * 2, w.s_paired + start, wide * 4, w.dv + start, wide * 4, d, SIDE, columns, 1);
  }
  scatter_turned(dk, place, p->kv_stride, w.dk, wide, n, d);
  scatter_turned(dv, place, p->kv_stride, w.dv, wide, n, d);
}

/* As regraft_attention, for bf16. */
static int attention_tiled(const Problem *p, const void *grad, void *out, void *dk, void *dv, int threads) {
  int failed = 0;
  const int64_t pieces = p->sequences * p->heads;
#pragma omp parallel num_threads(threads)
  {
    TileConfig before;
    Tiled w;
    char *memory = NULL;
    if (posix_memalign((void **)&memory, 64, divide_tiled(&w, NULL, up(p->longest, SIDE), p->d))) {
      memory = NULL;
#pragma omp atomic write
      failed = 1;
    }
    use_tiles(&before);
#pragma omp for schedule(dynamic, 1)
    for (int64_t piece = 0; piece < pieces; piece++) {
      if (!memory) continue;
      const int64_t b = piece / p->heads, h = piece % p->heads;
      divide_tiled(&w, memory, up(p->cu_k[b + 1] - p->cu_k[b], SIDE), p->d);
      if (grad)
        backward_tiled(p, w, b, h, grad, out, dk, dv);
      else
        forward_tiled(p, w, b, h, out);
    }
    _tile_loadconfig(&before);
    free(memory);
  }
  return failed;
}
