/* The same attention where vectors have 16 numbers: a vector holds 16 queries, so that the softmax of each, and what is taken
   off its gradient, is worked out lane by lane, without a sum across. Included by native_attention.c.

   Up to 32 queries meet all their keys. Products are put together word by word: one number in fp32; in bf16, where the processor
   multiplies pairs of those, two along a head for scores, of two keys for results and the gradients of queries, of two queries for
   the gradients of keys and values. Keys j and j + 1, j even, share the random number that decides on both. */
#define KEYS 8 /* whose scores are added up at once */
#define SOME 8 /* rows of a result that are */
#define PARTIAL 64 /* terms whose part of a sum is added up first: rounding grows less */
#define WORDS 16   /* the same for a score's; heads have a multiple of them */

#ifdef __AVX512BF16__
#define MAKES_PAIRS 1
#else
#define MAKES_PAIRS 0
#define store_pairs(to, upper, lower) (void)0
#endif

/* Whether heads of this problem are attended so. */
static int is_by_query(const Problem *p) { return !p->half || (MAKES_PAIRS && p->d % 32 == 0); }

/* What one thread holds while it is at one head of one sequence, in words of 4 bytes; 16 * lanes queries a row. */
typedef struct {
  uint32_t *q_turned, *g_turned, *q_rows, *g_rows; /* queries and the result's gradient: transposed; in bf16 also two in a row */
  uint32_t *k_rows, *v_rows;                       /* in bf16: two keys in a row */
  uint32_t *weights;                               /* backward: of the values, a key a row */
  uint32_t *slope_rows, *slope_pairs;              /* backward in bf16: a key a row; two keys in a row */
  float *s, *slope, *dk, *dv;
} Long;

/* Bytes for sequences of up to n keys; `at` NULL: only counted. */
static int64_t divide_long(Long *w, char *at, int64_t n, int64_t d, int half, int backward) {
  const int64_t keys = up(n + 1, SOME), scores = keys * 32 * 4, turned = 32 * d * 4, paired_keys = keys * d * 2;
  int64_t used = 0;
#define PART(name, bytes) w->name = (void *)(at + used), used += up(bytes, 64)
  PART(q_turned, turned), PART(s, scores);
  if (half) PART(v_rows, paired_keys);
  if (backward) {
    PART(g_turned, turned), PART(slope, scores), PART(weights, scores);
    PART(dk, keys * d * 4), PART(dv, keys * d * 4);
    if (half) {
      PART(k_rows, paired_keys), PART(q_rows, turned / 2), PART(g_rows, turned / 2);
      PART(slope_rows, scores / 2), PART(slope_pairs, scores / 2);
    }
  }
#undef PART
  return used;
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
INLINE void scores_of(float *s, const uint32_t *turned, const char *k, int64_t apart, int64_t words, const int keys, const int lanes,
                      const int half) {
  for (int64_t start = 0; start < words; start += WORDS) {
    __m512 x[KEYS][2];
    for (int r = 0; r < keys; r++)
      for (int l = 0; l < lanes; l++) x[r][l] = _mm512_setzero_ps();
    for (int64_t c = start; c < start + WORDS; c++)
      for (int r = 0; r < keys; r++) {
        const __m512 word = _mm512_set1_ps(*(const float *)(k + r * apart + 4 * c));
        for (int l = 0; l < lanes; l++) x[r][l] = TIMES(x[r][l], word, _mm512_loadu_ps(turned + (c * lanes + l) * 16));
      }
    for (int r = 0; r < keys; r++)
      for (int l = 0; l < lanes; l++) {
        float *to = s + (r * lanes + l) * 16;
        _mm512_storeu_ps(to, start ? _mm512_add_ps(x[r][l], _mm512_loadu_ps(to)) : x[r][l]);
      }
  }
}

/* Of n keys; where KEYS do not divide them the last ones anew with some before them. */
INLINE void all_scores(float *s, const uint32_t *turned, const char *k, int64_t apart, int64_t words, int64_t n, const int lanes,
                       const int half) {
  for (int64_t j = 0; j < n && n >= KEYS; j += KEYS) {
    const int64_t at = least(j, n - KEYS);
    scores_of(s + at * 16 * lanes, turned, k + at * apart, apart, words, KEYS, lanes, half);
  }
  for (int64_t j = 0; j < n && n < KEYS; j++) scores_of(s + j * 16 * lanes, turned, k + j * apart, apart, words, 1, lanes, half);
}

/* x[r][v] = sum over t of a[t * along + r * across] b[t * ldb + 16 v]. */
INLINE void sums_of(vf x[SOME][2], const uint32_t *a, int64_t along, int64_t across, const uint32_t *b, int64_t ldb, int64_t terms,
                    const int vectors, const int half) {
  for (int r = 0; r < SOME; r++)
    for (int v = 0; v < vectors; v++) x[r][v] = splat(0.0f);
  for (int64_t start = 0; start < terms; start += PARTIAL) {
    __m512 part[SOME][2];
    for (int r = 0; r < SOME; r++)
      for (int v = 0; v < vectors; v++) part[r][v] = _mm512_setzero_ps();
    for (int64_t t = start; t < least(terms, start + PARTIAL); t++)
      for (int r = 0; r < SOME; r++) {
        const __m512 word = _mm512_set1_ps(*(const float *)(a + t * along + r * across));
        for (int v = 0; v < vectors; v++) part[r][v] = TIMES(part[r][v], word, _mm512_loadu_ps(b + t * ldb + 16 * v));
      }
    for (int r = 0; r < SOME; r++)
      for (int v = 0; v < vectors; v++) x[r][v] += (vf)part[r][v];
  }
}

/* Up to SOME of those sums times `by` (of each; NULL: 1) for columns c and on of d, to places `stride` apart; `add`: to fp32, on
   what is there. */
INLINE void some_sums(void *out, int64_t to, int64_t stride, const float *by, int64_t rows, const uint32_t *a, int64_t along,
                      int64_t across, const uint32_t *b, int64_t ldb, int64_t terms, int64_t d, const int add, const int half) {
  for (int64_t c = 0; c < d; c += 32) {
    const int vectors = half || d - c >= 32 ? 2 : 1;
    vf x[SOME][2];
    if (vectors == 2)
      sums_of(x, a, along, across, b + c, ldb, terms, 2, half);
    else
      sums_of(x, a, along, across, b + c, ldb, terms, 1, half);
    for (int64_t r = 0; r < rows; r++)
      for (int v = 0; v < vectors; v++) {
        const int64_t at = to + r * stride + c + 16 * v;
        const vf found = x[r][v] * splat(by ? by[r] : 1.0f);
        if (add)
          *(vf *)((float *)out + at) += found;
        else
          store(out, at, found, half);
      }
  }
}

/* Of 16 queries from the i-th on, which may see the j-th key. */
INLINE vi seeing(int64_t i, int64_t j, int64_t window) {
  const vi apart = (vi)COUNT + (int32_t)(i - j);
  return (apart <= (int32_t)window) & (apart >= (int32_t)-window);
}

/* Up to 32 queries of one head, what is known of them before their keys are looked at. `query`, `key`: the first one's rows;
   `i`, `first`: their places in the sequence. */
typedef struct {
  int64_t h, query, i, rows, key, first, n;
  uint32_t low[32], high[32]; /* of the keys of their random numbers */
} Asking;

/* Those from the i-th on. There may be no key that they see. */
static Asking queries_from(const Problem *p, int64_t b, int64_t h, int64_t i) {
  const int64_t m = p->cu_q[b + 1] - p->cu_q[b], n = p->cu_k[b + 1] - p->cu_k[b];
  Asking of = {.h = h, .query = p->cu_q[b] + i, .i = i, .rows = least(32, m - i)};
  int64_t to, other;
  visible(i, n, p->window, &of.first, &other);
  visible(i + of.rows - 1, n, p->window, &other, &to);
  of.first = of.first / 2 * 2;
  of.key = p->cu_k[b] + of.first;
  of.n = to - of.first;
  for (int r = 0; p->threshold && r < 32; r++) {
    const uint64_t key = row_key(p->seed, (uint64_t)(of.query + r) * p->heads + h);
    of.low[r] = (uint32_t)key, of.high[r] = (uint32_t)(key >> 32);
  }
  return of;
}

/* keep / (1 - p) of 16 queries from the r-th on for the keys j and j + 1 of those they see. */
INLINE void kept_of(const Problem *p, const Asking *of, int r, int64_t j, vf *upper, vf *lower) {
  const vu number = splat_u((uint32_t)((of->first + j) / 2));
  decided(hashed(number, *(const vu *)(of->low + r), *(const vu *)(of->high + r)), p->threshold, p->factor, upper, lower);
}

/* e^(scale (s - top)) of the scores s of the j-th key; 0 where it is not seen. */
INLINE vf power_of(const Problem *p, const Asking *of, int r, int64_t j, vf s, vf top, const int half) {
  const vf x = half ? two_to((s - top) * splat(p->scale * 1.44269504f)) : exponential((s - top) * splat(p->scale));
  return p->window < 0 ? x : (vf)((vi)x & seeing(of->i + r, of->first + j, p->window));
}

/* A row of nothing below an odd number of them. */
INLINE void one_more(float *s, int64_t n, float with, const int lanes) {
  for (int l = 0; n % 2 && l < lanes; l++) *(vf *)(s + (n * lanes + l) * 16) = splat(with);
}

/* Scores -> what each value counts for its query, in bf16 of two keys in a row; 1 / the sum of all to `inverse`. */
INLINE void powers_of(const Problem *p, const Asking *of, float *s, float *inverse, const int lanes, const int half) {
  const int pitch = 16 * lanes;
  vf top[2], sum[2], part[2];
  one_more(s, of->n, -INFINITY, lanes);
  for (int l = 0; l < lanes; l++) top[l] = splat(-INFINITY), sum[l] = part[l] = splat(0.0f);
  for (int64_t j = 0; j < of->n; j++)
    for (int l = 0; l < lanes; l++) {
      vf *x = (vf *)(s + j * pitch + 16 * l);
      if (p->window >= 0) {
        const vi seen = seeing(of->i + 16 * l, of->first + j, p->window);
        *x = (vf)(((vi)*x & seen) | ((vi)splat(-INFINITY) & ~seen));
      }
      top[l] = (vf)_mm512_max_ps((__m512)top[l], (__m512)*x); /* NaN may be lost here: its power is NaN in any case */
    }
  for (int64_t j = 0; j < of->n; j += 2) {
    for (int l = 0; l < lanes; l++) {
      vf *x = (vf *)(s + j * pitch + 16 * l), *y = (vf *)(s + (j + 1) * pitch + 16 * l), keep, too;
      vf upper = power_of(p, of, 16 * l, j, *x, top[l], half), lower = power_of(p, of, 16 * l, j + 1, *y, top[l], half);
      part[l] += upper + lower;
      if ((j + 2) % PARTIAL == 0 || j + 2 >= of->n) sum[l] += part[l], part[l] = splat(0.0f);
      if (p->threshold) {
        kept_of(p, of, 16 * l, j, &keep, &too);
        upper *= keep, lower *= too;
      }
      if (half)
        store_pairs((uint32_t *)s + j / 2 * pitch + 16 * l, upper, lower); /* over rows that have been read */
      else
        *x = upper, *y = lower;
    }
  }
  for (int l = 0; l < lanes; l++) {
    *(vf *)(inverse + 16 * l) = (vf)((vi)(splat(1.0f) / sum[l]) & ~(sum[l] == splat(0.0f)));
    for (int64_t r = 16 * l; !p->last && r < least(of->rows, 16 * l + 16); r++) {
      float *found = p->softmax + ((of->query + r) * p->heads + of->h) * 2;
      found[0] = top[l][r % 16], found[1] = inverse[r];
    }
  }
}

INLINE void some_answers(const Problem *p, Long w, const Asking *of, void *out, const int lanes, const int half) {
  const int64_t size = half ? 2 : 4, d = p->d, words = d * size / 4, row = p->heads * d, to = of->query * row + of->h * d;
  const int64_t key = of->key * p->kv_stride + of->h * d;
  float inverse[32];
  if (of->n <= 0) {
    for (int64_t r = 0; r < of->rows; r++) memset((char *)out + (to + r * row) * size, 0, d * size);
    return;
  }
  queries_of(w.q_turned, (const char *)p->q + (of->query * p->q_stride + of->h * d) * size, p->q_stride * size, of->rows, words, lanes);
  all_scores(w.s, w.q_turned, (const char *)p->k + key * size, p->kv_stride * size, words, of->n, lanes, half);
  powers_of(p, of, w.s, inverse, lanes, half);
  for (int64_t r = 0; r < of->rows; r += SOME) {
    const uint32_t *a = (const uint32_t *)w.s + r;
    const int64_t left = least(SOME, of->rows - r);
    if (half)
      some_sums(out, to + r * row, row, inverse + r, left, a, 16 * lanes, 1, w.v_rows + of->first / 2 * d, d, (of->n + 1) / 2, d, 0, 1);
    else
      some_sums(out, to + r * row, row, inverse + r, left, a, 16 * lanes, 1, (const uint32_t *)p->v + key, p->kv_stride, of->n, d, 0, 0);
  }
}

static void answers_of(const Problem *p, Long w, int64_t b, int64_t h, void *out) {
  const int64_t m = p->cu_q[b + 1] - p->cu_q[b], n = p->cu_k[b + 1] - p->cu_k[b];
  if (p->half)
    paired(w.v_rows, p->d, (const uint16_t *)p->v + p->cu_k[b] * p->kv_stride + h * p->d, p->kv_stride, n, up(n, 2), p->d);
  for (int64_t i = 0; i < m; i += 32) {
    const Asking of = queries_from(p, b, h, i);
    if (p->half && of.rows <= 16)
      some_answers(p, w, &of, out, 1, MAKES_PAIRS);
    else if (p->half)
      some_answers(p, w, &of, out, 2, MAKES_PAIRS);
    else if (of.rows <= 16)
      some_answers(p, w, &of, out, 1, 0);
    else
      some_answers(p, w, &of, out, 2, 0);
  }
}

/* Scores and products of values with the result's gradient -> probabilities in `s`, what they count for the values in `weights`,
   their gradients in `slope` or, in bf16, in its two other forms. */
INLINE void slopes_of(const Problem *p, Long w, const Asking *of, const int lanes, const int half) {
  const int pitch = 16 * lanes;
  float top[32], inverse[32];
  vf mean[2], part[2];
  for (int64_t r = 0; r < pitch; r++) {
    const float *found = p->softmax + ((of->query + least(r, of->rows - 1)) * p->heads + of->h) * 2;
    top[r] = found[0], inverse[r] = r < of->rows ? found[1] : 0.0f; /* nothing is left of what is no query */
  }
  one_more(w.s, of->n, -INFINITY, lanes);
  one_more(w.slope, of->n, 0.0f, lanes);
  for (int l = 0; l < lanes; l++) mean[l] = part[l] = splat(0.0f);
  for (int64_t j = 0; j < of->n; j += 2)
    for (int l = 0; l < lanes; l++) {
      const int64_t here = j * pitch + 16 * l, below = here + pitch;
      const vf highest = *(const vf *)(top + 16 * l), by = *(const vf *)(inverse + 16 * l);
      vf *a = (vf *)(w.s + here), *c = (vf *)(w.s + below), *x = (vf *)(w.slope + here), *y = (vf *)(w.slope + below);
      vf keep = splat(1.0f), too = keep;
      *a = power_of(p, of, 16 * l, j, *a, highest, half) * by;
      *c = power_of(p, of, 16 * l, j + 1, *c, highest, half) * by;
      if (p->threshold) {
        kept_of(p, of, 16 * l, j, &keep, &too);
        *x *= keep, *y *= too;
      }
      part[l] += *a * *x + *c * *y;
      if ((j + 2) % PARTIAL == 0 || j + 2 >= of->n) mean[l] += part[l], part[l] = splat(0.0f);
      store(w.weights, here, *a * keep, half);
      store(w.weights, below, *c * too, half);
    }
  /* what one key alone gives is nothing, to the last bit: the same numbers were summed that it is taken from */
  for (int64_t j = 0; j < of->n; j += 2)
    for (int l = 0; l < lanes; l++) {
      const int64_t here = j * pitch + 16 * l, below = here + pitch;
      vf *x = (vf *)(w.slope + here), *y = (vf *)(w.slope + below);
      const vf upper = *(const vf *)(w.s + here) * (*x - mean[l]) * splat(p->scale);
      const vf lower = *(const vf *)(w.s + below) * (*y - mean[l]) * splat(p->scale);
      if (half) {
        store(w.slope_rows, here, upper, 1);
        store(w.slope_rows, below, lower, 1);
        store_pairs(w.slope_pairs + j / 2 * pitch + 16 * l, upper, lower);
      } else {
        *x = upper, *y = lower;
      }
    }
}

/* `alone`: no other queries of the head add to the gradients of these keys and values. */
INLINE void some_gradients(const Problem *p, Long w, const Asking *of, const void *grad, void *dq, void *dk, void *dv, int alone,
                           const int lanes, const int half) {
  const int64_t size = half ? 2 : 4, d = p->d, words = d * size / 4, row = p->heads * d, n = of->n, pitch = 16 * lanes;
  const int64_t query = of->query * p->q_stride + of->h * d, key = of->key * p->kv_stride + of->h * d, g = of->query * row + of->h * d;
  const char *q = (const char *)p->q + query * size, *gradient = (const char *)grad + g * size;
  if (n <= 0) {
    for (int64_t r = 0; r < of->rows; r++) memset((char *)dq + (query + r * p->q_stride) * size, 0, d * size);
    return;
  }
  queries_of(w.q_turned, q, p->q_stride * size, of->rows, words, lanes);
  queries_of(w.g_turned, gradient, row * size, of->rows, words, lanes);
  all_scores(w.s, w.q_turned, (const char *)p->k + key * size, p->kv_stride * size, words, n, lanes, half);
  all_scores(w.slope, w.g_turned, (const char *)p->v + key * size, p->kv_stride * size, words, n, lanes, half);
  slopes_of(p, w, of, lanes, half);
  if (half) {
    paired(w.q_rows, d, (const uint16_t *)q, p->q_stride, of->rows, up(of->rows, 2), d);
    paired(w.g_rows, d, (const uint16_t *)gradient, row, of->rows, up(of->rows, 2), d);
  }
  for (int64_t r = 0; r < of->rows; r += SOME) {
    const int64_t left = least(SOME, of->rows - r), to = query + r * p->q_stride;
    if (half)
      some_sums(dq, to, p->q_stride, NULL, left, w.slope_pairs + r, pitch, 1, w.k_rows + of->first / 2 * d, d, (n + 1) / 2, d, 0, 1);
    else
      some_sums(dq, to, p->q_stride, NULL, left, (const uint32_t *)w.slope + r, pitch, 1, (const uint32_t *)p->k + key, p->kv_stride, n,
                d, 0, 0);
  }
  const int64_t across = pitch * size / 4, terms = half ? (of->rows + 1) / 2 : of->rows;
  const uint32_t *slopes = half ? w.slope_rows : (const uint32_t *)w.slope, *weights = w.weights;
  const uint32_t *queries = half ? w.q_rows : (const uint32_t *)q, *gradients = half ? w.g_rows : (const uint32_t *)gradient;
  const int64_t ldq = half ? d : p->q_stride, ldg = half ? d : row;
  for (int64_t j = 0; j < n; j += SOME) {
    const int64_t left = least(SOME, n - j), to = key + j * p->kv_stride, sum = (of->first + j) * d;
    if (alone) {
      some_sums(dk, to, p->kv_stride, NULL, left, slopes + j * across, 1, across, queries, ldq, terms, d, 0, half);
      some_sums(dv, to, p->kv_stride, NULL, left, weights + j * across, 1, across, gradients, ldg, terms, d, 0, half);
    } else {
      some_sums(w.dk, sum, d, NULL, left, slopes + j * across, 1, across, queries, ldq, terms, d, 1, half);
      some_sums(w.dv, sum, d, NULL, left, weights + j * across, 1, across, gradients, ldg, terms, d, 1, half);
    }
  }
}

static void gradients_of(const Problem *p, Long w, int64_t b, int64_t h, const void *grad, void *dq, void *dk, void *dv) {
  const int64_t d = p->d, m = p->cu_q[b + 1] - p->cu_q[b], n = p->cu_k[b + 1] - p->cu_k[b];
  const int64_t place = p->cu_k[b] * p->kv_stride + h * d;
  const int alone = m && m <= 32 && p->window < 0;
  if (p->half) paired(w.k_rows, d, (const uint16_t *)p->k + place, p->kv_stride, n, up(n, 2), d);
  if (!alone) {
    memset(w.dk, 0, n * d * sizeof(float));
    memset(w.dv, 0, n * d * sizeof(float));
  }
  for (int64_t i = 0; i < m; i += 32) {
    const Asking of = queries_from(p, b, h, i);
    if (p->half && of.rows <= 16)
      some_gradients(p, w, &of, grad, dq, dk, dv, alone, 1, MAKES_PAIRS);
    else if (p->half)
      some_gradients(p, w, &of, grad, dq, dk, dv, alone, 2, MAKES_PAIRS);
    else if (of.rows <= 16)
      some_gradients(p, w, &of, grad, dq, dk, dv, alone, 1, 0);
    else
      some_gradients(p, w, &of, grad, dq, dk, dv, alone, 2, 0);
  }
  if (!alone) {
    scatter(dk, place, p->kv_stride, w.dk, n, d, p->half);
    scatter(dv, place, p->kv_stride, w.dv, n, d, p->half);
  }
}
