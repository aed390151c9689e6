/* The same attention where the processor multiplies tiles of bf16 (AMX): products take bf16 and add up in fp32, the softmax
   between them is in fp32. Included by native_attention.c, for heads whose size is a multiple of 32.

   What the softmax takes off a row of the gradient is the product of the row's result with its gradient (Dao et al. 2022), so
   that one pass over a block of probabilities does, while it is in the nearest cache. Keys for the scores, and values for their
   gradient, are transposed pair by pair; what is summed over tokens (values, keys for the gradient of queries, probabilities and
   their gradient for those of values and keys) has its rows paired. */

/* c[m][w] (+)= a[m][n] b[n][w] with b's rows paired: [n / 2][w] pairs. m, n and w multiples of SIDE; strides in bytes. */
static void tiles(const void *a, int64_t lda, const void *b, int64_t ldb, float *c, int64_t ldc, int64_t m, int64_t n,
                  int64_t w, int add) {
  for (int64_t i = 0; i < m; i += SIDE)
    for (int64_t j = 0; j < w; j += SIDE) {
      const char *rows = (const char *)a + i * lda;
      tile_block(rows, rows + 16 * lda, lda, 64, (const char *)b + j * 4, ldb, (char *)c + i * ldc + j * 4, ldc, n / SIDE, add, 0);
    }
}

/* Pairs along a row, transposed: [d / 2][wide] pairs. */
static void pairs_transposed(uint32_t *to, const uint16_t *from, int64_t stride, int64_t n, int64_t wide, int64_t d) {
  for (int64_t i = 0; i < wide; i += 16)
    for (int64_t c = 0; c < d / 2; c += 16) {
      vu rows[16];
      for (int r = 0; r < 16; r++) rows[r] = i + r < n ? *(const vu *)(from + (i + r) * stride + 2 * c) : splat_u(0);
      transpose16(rows);
      for (int r = 0; r < 16; r++) *(vu *)(to + (c + r) * wide + i) = rows[r];
    }
}

/* SIDE rows of d numbers, as they are. */
static void rows_of(uint16_t *to, const void *base, int64_t from, int64_t stride, int64_t n, int64_t d) {
  for (int64_t i = 0; i < n; i++) memcpy(to + i * d, (const uint16_t *)base + from + i * stride, d * sizeof(uint16_t));
  memset(to + n * d, 0, (SIDE - n) * d * sizeof(uint16_t));
}

/* Rows of the next queries on their way: each lies lines apart from the last, where nothing else sees it coming. */
static inline void rows_ahead(const uint16_t *base, int64_t from, int64_t stride, int64_t n, int64_t d) {
  for (int64_t i = 0; i < least(n, SIDE); i++)
    for (int64_t j = 0; j < d; j += 32) _mm_prefetch(base + from + i * stride + j, _MM_HINT_T0);
}

/* [SIDE][d] in bf16 -> [d][SIDE] in bf16. */
static void turned(uint16_t *to, const uint16_t *from, int64_t d) {
  for (int64_t c = 0; c < d; c += 16) {
    vu pairs[16];
    for (int r = 0; r < 16; r++) pairs[r] = pair_of(from + c, d, r, SIDE);
    transpose16(pairs);
    for (int r = 0; r < 16; r++) *(vu *)(to + (c + r) * SIDE) = pairs[r];
  }
}

/* [d][wide] in fp32, times `by` -> n rows of d numbers in bf16. */
static void scatter_turned(uint16_t *to, int64_t stride, const float *from, int64_t wide, int64_t n, int64_t d, float by) {
  for (int64_t i = 0; i < n; i += 16)
    for (int64_t c = 0; c < d; c += 16) {
      vu rows[16];
      for (int r = 0; r < 16; r++) rows[r] = *(const vu *)(from + (c + r) * wide + i);
      transpose16(rows);
      for (int r = 0; r < least(16, n - i); r++) store(to, (i + r) * stride + c, (vf)rows[r] * splat(by), 1);
    }
}

#define LOG2_E 1.44269504088896341f

/* The sum of a's and b's products, d numbers of bf16 each. */
static inline float inner(const uint16_t *a, int64_t from, const uint16_t *b, int64_t at, int64_t d) {
  vf sum = splat(0.0f);
  for (int64_t j = 0; j < d; j += 16) sum += load(a, from + j, 1) * load(b, at + j, 1);
  return total(sum);
}

typedef struct {
  uint32_t *k_along, *v_along, *k_paired, *v_paired, *p_paired, *slope_paired; /* along a row, or of two rows */
  uint16_t *q, *g, *q_turned, *g_turned, *p, *slope_rows;
  float *s, *slope, *out, *dk, *dv;
} Tiled;

/* Bytes for sequences of up to `wide` keys, a multiple of SIDE; `at` NULL: only counted. */
static int64_t divide_tiled(Tiled *t, char *at, int64_t wide, int64_t d, int backward) {
  const int64_t keys = wide * d * 2, queries = SIDE * d * 2, block = SIDE * SIDE * 4, scores = backward ? block : SIDE * wide * 4;
  int64_t used = 0;
#define PART(name, bytes) t->name = (void *)(at + used), used += up(bytes, 64)
  PART(k_along, keys), PART(q, queries), PART(out, 2 * queries), PART(s, scores);
  if (!backward) {
    PART(v_paired, keys), PART(p, scores / 2);
    return used;
  }
  PART(v_along, keys), PART(k_paired, keys), PART(g, queries), PART(q_turned, queries), PART(g_turned, queries);
  PART(p_paired, block / 2), PART(slope_paired, block / 2), PART(slope_rows, block / 2), PART(slope, block);
  PART(dk, 2 * keys), PART(dv, 2 * keys);
#undef PART
  return used;
}

/* The highest of a row's scores from `from` to `to`; one that is NaN may be passed over, and shows in the sum. */
static inline float peak(const float *s, int64_t from, int64_t to, int64_t start, int64_t end) {
  __m512 left = _mm512_set1_ps(-INFINITY), right = left;
  for (int64_t j = start; j < end; j += SIDE) {
    __m512 a = _mm512_loadu_ps(s + j), b = _mm512_loadu_ps(s + j + 16);
    if (j < from || j + SIDE > to) {
      const vi seen = inside(j, from, to), too = inside(j + 16, from, to), least_of_all = (vi)splat(-INFINITY);
      a = (__m512)(((vi)a & seen) | (least_of_all & ~seen));
      b = (__m512)(((vi)b & too) | (least_of_all & ~too));
    }
    left = _mm512_max_ps(a, left);
    right = _mm512_max_ps(b, right);
  }
  return _mm512_reduce_max_ps(_mm512_max_ps(left, right));
}

/* e^(scale s - less) of SIDE columns from j on, 0 outside [from, to); `scale` and `less` come times log2(e). */
INLINE void powers(const float *s, int64_t j, vf scale, vf less, int64_t from, int64_t to, vf *left, vf *right) {
  *left = two_to(*(const vf *)s * scale - less);
  *right = two_to(*(const vf *)(s + 16) * scale - less);
  if (j < from || j + SIDE > to) {
    *left = (vf)((vi)*left & inside(j, from, to));
    *right = (vf)((vi)*right & inside(j + 16, from, to));
  }
}

static void forward_tiled(const Problem *p, Tiled w, int64_t b, int64_t h, uint16_t *out) {
  const int64_t d = p->d, m = p->cu_q[b + 1] - p->cu_q[b], n = p->cu_k[b + 1] - p->cu_k[b], wide = up(n, SIDE);
  const int64_t first = p->cu_q[b], row = p->heads * d, place = p->cu_k[b] * p->kv_stride + h * d;
  const vf scale = splat(p->scale * LOG2_E);
  float by[SIDE];
  if (!m) return;
  pairs_transposed(w.k_along, (const uint16_t *)p->k + place, p->kv_stride, n, wide, d);
  paired(w.v_paired, d, (const uint16_t *)p->v + place, p->kv_stride, n, wide, d);
  for (int64_t i0 = 0; i0 < m; i0 += SIDE) {
    int64_t rows = least(SIDE, m - i0), from, to, last;
    visible(i0, n, p->window, &from, &last);
    visible(i0 + rows - 1, n, p->window, &last, &to);
    const int64_t start = from / SIDE * SIDE, end = most(start, up(to, SIDE));
    rows_of(w.q, p->q, (first + i0) * p->q_stride + h * d, p->q_stride, rows, d);
    rows_ahead(p->q, (first + i0 + SIDE) * p->q_stride + h * d, p->q_stride, m - i0 - SIDE, d);
    tiles(w.q, d * 2, w.k_along + start, wide * 4, w.s + start, wide * 4, SIDE, d, end - start, 0);
    for (int64_t i = 0; i < rows; i++) {
      const float *s = w.s + i * wide;
      const uint64_t place_of = (uint64_t)(first + i0 + i) * p->heads + h, key = row_key(p->seed, place_of);
      visible(i0 + i, n, p->window, &from, &to);
      const float top = peak(s, from, to, start, end) * p->scale * LOG2_E;
      const vf less = splat(top);
      vf sum = splat(0.0f), left, right, keep, too;
      for (int64_t j = start; j < end; j += SIDE) {
        powers(s + j, j, scale, less, from, to, &left, &right);
        sum += left + right;
        if (p->threshold) {
          kept(key, j, p->threshold, p->factor, &keep, &too);
          left *= keep;
          right *= too;
        }
        store_both(w.p + i * wide + j, left, right);
      }
      const float whole = total(sum);
      by[i] = whole == 0.0f ? 0.0f : 1.0f / whole; /* of no keys; NaN stays NaN */
      p->softmax[place_of * 2] = top + log2f(whole);
    }
    for (int64_t i = rows; i < SIDE; i++) memset(w.p + i * wide + start, 0, (end - start) * 2);
    tiles(w.p + start, wide * 2, w.v_paired + start / 2 * d, d * 4, w.out, d * 4, SIDE, end - start, d, 0);
    for (int64_t i = 0; i < rows; i++)
      for (int64_t j = 0; j < d; j += 16)
        store(out, (first + i0 + i) * row + h * d + j, *(const vf *)(w.out + i * d + j) * splat(by[i]), 1);
  }
}

/* What is known of a query before its keys are looked at. */
typedef struct {
  uint64_t key[SIDE];
  float less[SIDE], mean[SIDE]; /* log2 of its softmax's sum; what is taken off its gradient */
} Queries;

/* Probabilities and their gradients for the keys j to j + SIDE of two queries, i and i + 1: for the one above and the one below
   in pairs, and the gradients also as rows. */
INLINE void slopes_of_two(const Problem *p, Tiled w, const Queries *of, int64_t i, int64_t i0, int64_t j, int64_t n, int dropped) {
  vf weight[2][2], slope[2][2];
  for (int r = 0; r < 2; r++) {
    const float *s = w.s + (i + r) * SIDE, *up_ = w.slope + (i + r) * SIDE;
    int64_t from, to;
    visible(i0 + i + r, n, p->window, &from, &to);
    const vf mean = splat(of->mean[i + r]);
    vf keep = splat(1.0f), too = keep, left, right;
    powers(s, j, splat(p->scale * LOG2_E), splat(of->less[i + r]), from, to, &left, &right);
    if (dropped) kept(of->key[i + r], j, p->threshold, p->factor, &keep, &too);
    weight[r][0] = left * keep;
    weight[r][1] = right * too;
    slope[r][0] = left * (*(const vf *)up_ * keep - mean);
    slope[r][1] = right * (*(const vf *)(up_ + 16) * too - mean);
    store_both(w.slope_rows + (i + r) * SIDE, slope[r][0], slope[r][1]);
  }
  for (int half = 0; half < 2; half++) {
    store_pairs(w.p_paired + i / 2 * SIDE + half * 16, weight[0][half], weight[1][half]);
    store_pairs(w.slope_paired + i / 2 * SIDE + half * 16, slope[0][half], slope[1][half]);
  }
}

static void backward_tiled(const Problem *p, Tiled w, int64_t b, int64_t h, const uint16_t *grad, uint16_t *dq, uint16_t *dk,
                           uint16_t *dv) {
  const int64_t d = p->d, m = p->cu_q[b + 1] - p->cu_q[b], n = p->cu_k[b + 1] - p->cu_k[b], wide = up(n, SIDE);
  const int64_t first = p->cu_q[b], row = p->heads * d, place = p->cu_k[b] * p->kv_stride + h * d;
  Queries of;
  pairs_transposed(w.k_along, (const uint16_t *)p->k + place, p->kv_stride, n, wide, d);
  pairs_transposed(w.v_along, (const uint16_t *)p->v + place, p->kv_stride, n, wide, d);
  paired(w.k_paired, d, (const uint16_t *)p->k + place, p->kv_stride, n, wide, d);
  memset(w.dk, 0, wide * d * sizeof(float));
  memset(w.dv, 0, wide * d * sizeof(float));
  for (int64_t i0 = 0; i0 < m; i0 += SIDE) {
    int64_t rows = least(SIDE, m - i0), from, to, last;
    visible(i0, n, p->window, &from, &last);
    visible(i0 + rows - 1, n, p->window, &last, &to);
    const int64_t start = from / SIDE * SIDE, end = most(start, up(to, SIDE));
    rows_of(w.q, p->q, (first + i0) * p->q_stride + h * d, p->q_stride, rows, d);
    rows_of(w.g, grad, (first + i0) * row + h * d, row, rows, d);
    rows_ahead(p->q, (first + i0 + SIDE) * p->q_stride + h * d, p->q_stride, m - i0 - SIDE, d);
    rows_ahead(grad, (first + i0 + SIDE) * row + h * d, row, m - i0 - SIDE, d);
    rows_ahead(p->result, (first + i0 + SIDE) * row + h * d, row, m - i0 - SIDE, d);
    turned(w.q_turned, w.q, d);
    turned(w.g_turned, w.g, d);
    for (int64_t i = 0; i < SIDE; i++) {
      const int64_t t = first + i0 + i;
      of.key[i] = row_key(p->seed, (uint64_t)t * p->heads + h);
      of.less[i] = i < rows ? p->softmax[(t * p->heads + h) * 2] : 1e9f; /* no probability is left of what is no query */
      of.mean[i] = i < rows ? inner(p->result, t * row + h * d, w.g, i * d, d) : 0.0f;
    }
    if (start >= end) memset(w.out, 0, SIDE * d * sizeof(float)); /* no keys, and no gradient */
    for (int64_t j = start; j < end; j += SIDE) {
      tiles(w.q, d * 2, w.k_along + j, wide * 4, w.s, SIDE * 4, SIDE, d, SIDE, 0);
      tiles(w.g, d * 2, w.v_along + j, wide * 4, w.slope, SIDE * 4, SIDE, d, SIDE, 0);
      if (p->threshold)
        for (int64_t i = 0; i < SIDE; i += 2) slopes_of_two(p, w, &of, i, i0, j, n, 1);
      else
        for (int64_t i = 0; i < SIDE; i += 2) slopes_of_two(p, w, &of, i, i0, j, n, 0);
      tiles(w.slope_rows, SIDE * 2, w.k_paired + j / 2 * d, d * 4, w.out, d * 4, SIDE, SIDE, d, j > start);
      tiles(w.q_turned, SIDE * 2, w.slope_paired, SIDE * 4, w.dk + j, wide * 4, d, SIDE, SIDE, 1);
      tiles(w.g_turned, SIDE * 2, w.p_paired, SIDE * 4, w.dv + j, wide * 4, d, SIDE, SIDE, 1);
    }
    for (int64_t i = 0; i < rows; i++)
      for (int64_t c = 0; c < d; c += 16)
        store(dq, (first + i0 + i) * p->q_stride + h * d + c, *(const vf *)(w.out + i * d + c) * splat(p->scale), 1);
  }
  scatter_turned(dk + place, p->kv_stride, w.dk, wide, n, d, p->scale);
  scatter_turned(dv + place, p->kv_stride, w.dv, wide, n, d, 1.0f);
}

/* As regraft_attention, for bf16. */
static int attention_tiled(const Problem *p, const void *grad, void *out, void *dk, void *dv, int threads) {
  int failed = 0;
  const int64_t pieces = p->sequences * p->heads;
#pragma omp parallel num_threads(threads)
  {
    Before before;
    Tiled w;
    char *memory = NULL;
    if (posix_memalign((void **)&memory, 64, divide_tiled(&w, NULL, up(p->longest, SIDE), p->d, grad != NULL))) {
      memory = NULL;
#pragma omp atomic write
      failed = 1;
    }
    use_tiles(&before);
#pragma omp for schedule(dynamic, 4) /* heads side by side share lines of the cache */
    for (int64_t piece = 0; piece < pieces; piece++) {
      if (!memory) continue;
      const int64_t b = piece / p->heads, h = piece % p->heads;
      divide_tiled(&w, memory, up(p->cu_k[b + 1] - p->cu_k[b], SIDE), p->d, grad != NULL);
      if (grad)
        backward_tiled(p, w, b, h, grad, out, dk, dv);
      else
        forward_tiled(p, w, b, h, out);
    }
    leave_tiles(&before);
    free(memory);
  }
  return failed;
}
