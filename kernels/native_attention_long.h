/* The same attention where vectors have 16 numbers and no backward follows: a vector holds 16 queries, so that the softmax of
   each is worked out lane by lane, without a sum across. Included by native_attention.c, for no dropout.

   Scores are put together word by word: one number in fp32, two in bf16 where the processor multiplies pairs of those. */
#define KEYS 8 /* whose scores are added up at once */
#define SOME 8 /* queries whose values are */
#define PARTIAL 64 /* keys whose part of a sum is added up first: rounding grows less */

#ifdef __AVX512BF16__
#define MAKES_PAIRS 1
#define PLUS(sum, x, y) (half ? _mm512_dpbf16_ps(sum, (__m512bh)(x), (__m512bh)(y)) : _mm512_fmadd_ps(x, y, sum))
#else
#define MAKES_PAIRS 0
#define PLUS(sum, x, y) _mm512_fmadd_ps(x, y, sum)
#endif

/* Whether heads of this problem are attended so. */
static int is_short_cut(const Problem *p, int backward) {
  return !backward && p->last && !p->threshold && (!p->half || (MAKES_PAIRS && p->d % 32 == 0));
}

/* Words of 16 * lanes queries, those beyond n the last one's, transposed: [words][16 * lanes]. */
INLINE void queries_of(uint32_t *to, const char *q, int64_t apart, int64_t n, int64_t words, const int lanes) {
  for (int64_t i = 0; i < 16 * lanes; i += 16)
    for (int64_t c = 0; c < words; c += 16) {
      vu rows[16];
      for (int r = 0; r < 16; r++) rows[r] = *(const vu *)(q + least(i + r, n - 1) * apart + 4 * c);
      transpose16(rows);
      for (int r = 0; r < 16; r++) *(vu *)(to + (c + r) * 16 * lanes + i) = rows[r];
    }
}

/* s[keys][16 * lanes]: products of keys, `apart` bytes from each other, with the queries. */
INLINE void scores_of(float *s, const uint32_t *qt, const char *k, int64_t apart, int64_t words, const int keys, const int lanes,
                      const int half) {
  __m512 x[KEYS][2];
  for (int r = 0; r < keys; r++)
    for (int l = 0; l < lanes; l++) x[r][l] = _mm512_setzero_ps();
  for (int64_t c = 0; c < words; c++)
    for (int r = 0; r < keys; r++) {
      const __m512 word = _mm512_set1_ps(*(const float *)(k + r * apart + 4 * c));
      for (int l = 0; l < lanes; l++) x[r][l] = PLUS(x[r][l], word, _mm512_loadu_ps(qt + (c * lanes + l) * 16));
    }
  for (int r = 0; r < keys; r++)
    for (int l = 0; l < lanes; l++) _mm512_storeu_ps(s + (r * lanes + l) * 16, x[r][l]);
}

/* Of 16 queries from the i-th on, which may see the j-th key. */
INLINE vi seeing(int64_t i, int64_t j, int64_t window) {
  const vi apart = (vi)COUNT + (int32_t)(i - j);
  return (apart <= (int32_t)window) & (apart >= (int32_t)-window);
}

/* Scores of n keys from the first-th on -> e^(scale (s - highest)); 1 / their sums to `inverse`. */
INLINE void powers_of(float *s, float *inverse, int64_t i, int64_t first, int64_t n, const Problem *p, const int lanes, const int half,
                      const int windowed) {
  vf top[2], sum[2];
  for (int l = 0; l < lanes; l++) top[l] = splat(-INFINITY), sum[l] = splat(0.0f);
  for (int64_t j = 0; j < n; j++)
    for (int l = 0; l < lanes; l++) {
      vf *x = (vf *)(s + (j * lanes + l) * 16);
      if (windowed) {
        const vi seen = seeing(i + 16 * l, first + j, p->window);
        *x = (vf)(((vi)*x & seen) | ((vi)splat(-INFINITY) & ~seen));
      }
      top[l] = (vf)_mm512_max_ps((__m512)top[l], (__m512)*x); /* NaN may be lost here: its power is NaN in any case */
    }
  const vf by = splat(half ? p->scale * 1.44269504f : p->scale);
  vf part[2] = {splat(0.0f), splat(0.0f)};
  for (int64_t j = 0; j < n; j++)
    for (int l = 0; l < lanes; l++) {
      vf *x = (vf *)(s + (j * lanes + l) * 16);
      const vf below = (*x - top[l]) * by;
      *x = half ? two_to(below) : exponential(below);
      if (windowed) *x = (vf)((vi)*x & seeing(i + 16 * l, first + j, p->window));
      part[l] += *x;
      if ((j + 1) % PARTIAL == 0 || j + 1 == n) sum[l] += part[l], part[l] = splat(0.0f);
    }
  for (int l = 0; l < lanes; l++) *(vf *)(inverse + 16 * l) = (vf)((vi)(splat(1.0f) / sum[l]) & ~(sum[l] == splat(0.0f)));
}

/* SOME queries' sums of n values' `vectors`, from column c of the head on, as many as there are of `rows` to `out`. */
INLINE void values_of(const Problem *p, void *out, int64_t to, int64_t value, const float *s, const float *inverse, int64_t rows,
                      int64_t n, const int vectors, const int lanes, const int half) {
  vf x[SOME][2];
  for (int r = 0; r < SOME; r++)
    for (int v = 0; v < vectors; v++) x[r][v] = splat(0.0f);
  for (int64_t start = 0; start < n; start += PARTIAL) {
    vf part[SOME][2];
    for (int r = 0; r < SOME; r++)
      for (int v = 0; v < vectors; v++) part[r][v] = splat(0.0f);
    for (int64_t j = start; j < least(n, start + PARTIAL); j++) {
      vf own[2];
      for (int v = 0; v < vectors; v++) own[v] = load(p->v, value + j * p->kv_stride + 16 * v, half);
      for (int r = 0; r < SOME; r++)
        for (int v = 0; v < vectors; v++) part[r][v] += splat(s[j * 16 * lanes + r]) * own[v];
    }
    for (int r = 0; r < SOME; r++)
      for (int v = 0; v < vectors; v++) x[r][v] += part[r][v];
  }
  for (int64_t r = 0; r < rows; r++)
    for (int v = 0; v < vectors; v++) store(out, to + r * p->heads * p->d + 16 * v, x[r][v] * splat(inverse[r]), half);
}

/* Queries i to i + rows of a sequence, at most 16 * lanes. */
INLINE void some_answers(const Problem *p, Space w, int64_t b, int64_t h, int64_t i, int64_t rows, void *out, const int lanes,
                         const int half) {
  const int64_t size = half ? 2 : 4, d = p->d, words = d * size / 4, n = p->cu_k[b + 1] - p->cu_k[b], query = p->cu_q[b] + i;
  int64_t from, to, other;
  visible(i, n, p->window, &from, &other);
  visible(i + rows - 1, n, p->window, &other, &to);
  const int64_t seen = to - from, place = (p->cu_k[b] + from) * p->kv_stride + h * d, apart = p->kv_stride * size;
  if (seen <= 0) {
    for (int64_t r = 0; r < rows; r++) memset((char *)out + ((query + r) * p->heads + h) * d * size, 0, d * size);
    return;
  }
  uint32_t *qt = (uint32_t *)w.q;
  const char *k = (const char *)p->k + place * size;
  float inverse[32];
  queries_of(qt, (const char *)p->q + (query * p->q_stride + h * d) * size, p->q_stride * size, rows, words, lanes);
  /* the last keys anew with some before them, where KEYS do not divide what there is */
  for (int64_t j = 0; j < seen && seen >= KEYS; j += KEYS) {
    const int64_t at = least(j, seen - KEYS);
    scores_of(w.s + at * 16 * lanes, qt, k + at * apart, apart, words, KEYS, lanes, half);
  }
  for (int64_t j = 0; j < seen && seen < KEYS; j++) scores_of(w.s + j * 16 * lanes, qt, k + j * apart, apart, words, 1, lanes, half);
  if (p->window < 0)
    powers_of(w.s, inverse, i, from, seen, p, lanes, half, 0);
  else
    powers_of(w.s, inverse, i, from, seen, p, lanes, half, 1);
  for (int64_t r = 0; r < rows; r += SOME)
    for (int64_t c = 0; c < d; c += 32) {
      const int64_t left = least(SOME, rows - r), start = ((query + r) * p->heads + h) * d + c;
      if (d - c >= 32)
        values_of(p, out, start, place + c, w.s + r, inverse + r, left, seen, 2, lanes, half);
      else
        values_of(p, out, start, place + c, w.s + r, inverse + r, left, seen, 1, lanes, half);
    }
}

static void answers_of(const Problem *p, Space w, int64_t b, int64_t h, void *out) {
  const int64_t m = p->cu_q[b + 1] - p->cu_q[b];
  for (int64_t i = 0; i < m; i += 32) {
    const int64_t rows = least(32, m - i);
    if (p->half && rows <= 16)
      some_answers(p, w, b, h, i, rows, out, 1, MAKES_PAIRS);
    else if (p->half)
      some_answers(p, w, b, h, i, rows, out, 2, MAKES_PAIRS);
    else if (rows <= 16)
      some_answers(p, w, b, h, i, rows, out, 1, 0);
    else
      some_answers(p, w, b, h, i, rows, out, 2, 0);
  }
}
