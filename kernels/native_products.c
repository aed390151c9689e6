/* Linear layers by vectors of 16 numbers, in fp32, or in bf16 where the processor multiplies pairs of those; sums are fp32:

   out = a b + more beside (+ bias, and gelu of it)   b = W^T forward, W for the gradient of inputs; a further, thin term of
                                                      few columns (low-rank updates) where thin is not 0
   dw = dy^T x,   db = sum of dy's rows               in fp32

   ROWS x PANEL sums are added up in registers, which are as many as there are. What is called a word has 32 bits: one number in
   fp32, two that follow each other along the sum in bf16; so both are worked through in the same way. Every sum has one order,
   whoever computes it: the same bits for any number of threads, and for a row whatever stands around it. */
#define WANTS_LONG_VECTORS
#include "native.h"
#include "native_long.h"

#ifdef HAS_LONG
#define ROWS 14           /* with PANEL: 28 vectors of sums, two of b and one of a, of 32 */
#define PANEL 32          /* columns; of the last ones there may be fewer, a multiple of eight, as along a sum */
#define STRIP (6 * ROWS)  /* rows that are worked on together */
#define STEPS 192         /* words along a sum that are added up before the whole: they stay in the nearest cache, and round less */
#define GROUP (512 << 10) /* bytes of b that stay in the next one */
#define MOST 64           /* panels of a group, whose sums are kept meanwhile */
#define DOWN 12           /* blocks of a weight's gradient, one below the other, and */
#define ACROSS 6          /* side by side: one piece of work */
#define NEAR 16           /* words along a sum whose rows are packed at a time: as many pages are at hand */
#define SHARE 128         /* rows that one thread packs, and */
#define THIN 8            /* outputs of a weight's gradient that are summed at once where there are but few, */
#define FEW (4 * THIN)    /* as many at most: to pack rows for them would take longer than their sums */
#define PART (6 * SHARE)  /* that are packed, to stay in the last cache, before they are summed; linear_native.py counts with both */

typedef struct {
  const void *a, *b, *bias; /* a [rows][inner]; b [wide][inner] where `turned`, else [inner][wide]; bias [wide] or NULL */
  void *out, *active;       /* [rows][wide]: the product, and its GELU; one of the two may be NULL */
  const void *more, *beside; /* [rows][thin]; as b with thin in place of inner; or NULL, with thin 0 */
  char *room;               /* (up(wide, PANEL) + PANEL) * (inner + thin) numbers */
  int64_t rows, inner, wide, thin, turned, half;
} Product;

/* sums[ROWS][PANEL] (+)= a b over `steps` words. a: ROWS rows `apart` bytes from each other, a step on after `along` bytes;
   b: PANEL words a step, of which the first 16 * `vectors` count. */
INLINE void block(float *sums, const char *a, int64_t apart, int64_t along, const char *b, int64_t steps, int add, const int vectors,
                  const int half) {
  __m512 s[ROWS][2];
  for (int i = 0; i < ROWS; i++) s[i][0] = s[i][1] = _mm512_setzero_ps();
  /* five addresses and a distance are what the processor's registers have room for */
  const char *p0 = a, *p3 = a + 3 * apart, *p6 = a + 6 * apart, *p9 = a + 9 * apart, *p12 = a + 12 * apart;
  for (int64_t k = 0; k < steps; k++) {
    const __m512 left = _mm512_loadu_ps(b), right = _mm512_loadu_ps(b + 64);
#define ROW(i, from)                                           \
  {                                                            \
    const __m512 x = _mm512_set1_ps(*(const float *)(from)); \
    s[i][0] = TIMES(s[i][0], x, left);                         \
    if (vectors == 2) s[i][1] = TIMES(s[i][1], x, right);      \
  }
    ROW(0, p0) ROW(1, p0 + apart) ROW(2, p0 + 2 * apart)
    ROW(3, p3) ROW(4, p3 + apart) ROW(5, p3 + 2 * apart)
    ROW(6, p6) ROW(7, p6 + apart) ROW(8, p6 + 2 * apart)
    ROW(9, p9) ROW(10, p9 + apart) ROW(11, p9 + 2 * apart)
    ROW(12, p12) ROW(13, p12 + apart)
#undef ROW
    b += 4 * PANEL;
    p0 += along, p3 += along, p6 += along, p9 += along, p12 += along;
  }
  for (int i = 0; i < ROWS; i++)
    for (int j = 0; j < vectors; j++) {
      float *to = sums + i * PANEL + 16 * j;
      _mm512_storeu_ps(to, add ? _mm512_add_ps(s[i][j], _mm512_loadu_ps(to)) : s[i][j]);
    }
}

/* The same with the ways that operands lie in written out: rows as they are, with few columns of b and with many, and packed ones. */
static void rows_by_panel(float *sums, const char *a, int64_t apart, const char *b, int64_t steps, int add, int64_t columns, int half) {
  if (half && columns > 16)
    block(sums, a, apart, 4, b, steps, add, 2, 1);
  else if (half)
    block(sums, a, apart, 4, b, steps, add, 1, 1);
  else if (columns > 16)
    block(sums, a, apart, 4, b, steps, add, 2, 0);
  else
    block(sums, a, apart, 4, b, steps, add, 1, 0);
}

static void packed_by_panel(float *sums, const char *a, const char *b, int64_t steps, int add, int half) {
  if (half)
    block(sums, a, 4, 4 * ROWS, b, steps, add, 2, 1);
  else
    block(sums, a, 4, 4 * ROWS, b, steps, add, 2, 0);
}

/* PANEL columns of b, or of what stands beside it, a step's side by side: [words][PANEL]; those that b does not have are 0.
   `numbers`: along the sum. */
static void panel_of(const Product *p, uint32_t *to, const void *b, int64_t numbers, int64_t column) {
  const int64_t words = p->half ? numbers / 2 : numbers, columns = least(PANEL, p->wide - column);
  if (columns < PANEL) memset(to, 0, words * PANEL * 4);
  if (!p->turned) {
    if (p->half)
      paired(to, PANEL, (const uint16_t *)b + column, p->wide, numbers, numbers, columns);
    else
      for (int64_t k = 0; k < words; k++) memcpy(to + k * PANEL, (const float *)b + k * p->wide + column, 4 * columns);
    return;
  }
  const uint32_t *from = (const uint32_t *)b + column * words;
  for (int64_t k = 0; k < words; k += 16)
    for (int64_t j = 0; j < columns; j += 16) {
      const int64_t steps = least(16, words - k);
      vu rows[16];
      for (int i = 0; i < 16; i++)
        rows[i] = j + i < columns ? (vu)_mm512_maskz_loadu_epi32(leading(steps), from + (j + i) * words + k) : splat_u(0);
      transpose16(rows);
      for (int i = 0; i < steps; i++) *(vu *)(to + (k + i) * PANEL + j) = rows[i];
    }
}

/* Sums of n rows for the last columns, fewer than a vector holds, as `finished`: by way of rows that are whole. */
static void few_finished(const Product *p, const float *sums, int64_t row, int64_t n, int64_t column, const int half) {
  const int64_t size = half ? 2 : 4, bytes = (p->wide - column) * size;
  float bias[16] = {0}, y[16], active[16]; /* bf16 takes half of each */
  if (p->bias) memcpy(bias, (const char *)p->bias + column * size, bytes);
  for (int64_t i = 0; i < n; i++) {
    const int64_t at = ((row + i) * p->wide + column) * size;
    store(y, 0, *(const vf *)(sums + i * PANEL) + load(bias, 0, half), half);
    store(active, 0, gelu(load(y, 0, half)), half);
    if (p->out) memcpy((char *)p->out + at, y, bytes);
    if (p->active) memcpy((char *)p->active + at, active, bytes);
  }
}

/* Sums of n rows, with bias and GELU where they are asked for, to where they belong. */
INLINE void finished(const Product *p, const float *sums, int64_t row, int64_t n, int64_t column, const int half) {
  for (int64_t j = 0; j < least(PANEL, p->wide - column); j += 16) {
    if (p->wide - column - j < 16) {
      few_finished(p, sums + j, row, n, column + j, half);
      return;
    }
    const vf bias = p->bias ? load(p->bias, column + j, half) : splat(0.0f);
    for (int64_t i = 0; i < n; i++) {
      const int64_t at = (row + i) * p->wide + column + j;
      void *y = p->out ? p->out : p->active;
      store(y, at, *(const vf *)(sums + i * PANEL + j) + bias, half);
      if (p->active) store(p->active, at, gelu(load(y, at, half)), half); /* of y as it was rounded */
    }
  }
}

static void finish(const Product *p, const float *sums, int64_t row, int64_t n, int64_t column) {
  if (p->half)
    finished(p, sums, row, n, column, 1);
  else
    finished(p, sums, row, n, column, 0);
}

/* ROWS rows from `row` on with panels `panel` to `end`. `sums`: as many blocks of sums. */
static void strip_of(const Product *p, const char *edge, float *sums, int64_t row, int64_t panel, int64_t end) {
  const int64_t size = p->half ? 2 : 4, n = least(ROWS, p->rows - row);
  const int64_t wide[2] = {p->inner * size, p->thin * size};
  const char *from[2] = {(const char *)p->a + row * wide[0], (const char *)p->more + row * wide[1]};
  if (n < ROWS) from[0] = edge, from[1] = edge + ROWS * wide[0];
  const int64_t panel_bytes = (wide[0] + wide[1]) * PANEL;
  for (int term = 0; term < 2; term++)
    for (int64_t at = 0; at < wide[term]; at += 4 * STEPS) {
      const int64_t bytes = least(4 * STEPS, wide[term] - at), before = term * wide[0] + at;
      const int last = before + bytes == wide[0] + wide[1];
      for (int64_t j = panel; j < end; j++) {
        float *own = sums + (j - panel) * ROWS * PANEL;
        const char *b = p->room + j * panel_bytes + before * PANEL;
        rows_by_panel(own, from[term] + at, wide[term], b, bytes / 4, before > 0, p->wide - j * PANEL, p->half);
        if (last) finish(p, own, row, n, j * PANEL);
      }
    }
}

/* The last rows, fewer than ROWS, and rows of 0 below them. */
static void last_rows(const Product *p, char *to, const char *from, int64_t bytes) {
  const int64_t n = p->rows % ROWS;
  memcpy(to, from + (p->rows - n) * bytes, n * bytes);
  memset(to + n * bytes, 0, (ROWS - n) * bytes);
}

int regraft_product(const Product *p, int threads) {
  const int64_t size = p->half ? 2 : 4, panels = up(p->wide, PANEL) / PANEL, panel_bytes = (p->inner + p->thin) * PANEL * size;
  char *edge = p->room + panels * panel_bytes;
  const int64_t strips = up(p->rows, STRIP) / STRIP, shared = up(panels, 2 * threads) / (2 * threads);
  const int64_t each = most(1, least(least(GROUP / panel_bytes, MOST), shared)), groups = up(panels, each) / each; /* panels of a group */
#pragma omp parallel num_threads(threads)
  {
    float sums[each * ROWS * PANEL] __attribute__((aligned(64)));
#pragma omp for schedule(static) nowait
    for (int64_t j = 0; j < panels; j++) {
      uint32_t *to = (uint32_t *)(p->room + j * panel_bytes);
      panel_of(p, to, p->b, p->inner, j * PANEL);
      if (p->thin) panel_of(p, to + p->inner * size / 4 * PANEL, p->beside, p->thin, j * PANEL);
    }
#pragma omp single
    {
      last_rows(p, edge, p->a, p->inner * size);
      if (p->thin) last_rows(p, edge + ROWS * p->inner * size, p->more, p->thin * size);
    }
#pragma omp for schedule(dynamic, 1) collapse(2)
    for (int64_t strip = 0; strip < strips; strip++)
      for (int64_t group = 0; group < groups; group++)
        for (int64_t row = strip * STRIP; row < least(p->rows, (strip + 1) * STRIP); row += ROWS)
          strip_of(p, edge, sums, row, group * each, least(panels, (group + 1) * each));
  }
  return 0;
}

typedef struct {
  const void *dy, *x; /* [rows][out], [rows][in] */
  float *dw, *db;     /* [out][in]; [out] or NULL */
  char *room;         /* words of a PART * (up(out, ROWS) + PANEL + in) * 4 bytes, and up(rows, SHARE) / SHARE * out * 4 */
  int64_t rows, out, in, half;
} Slopes;

/* Word k of 16 columns from `column` on, of which those from `columns` on are 0; and rows from n on too. */
INLINE vu word_of(const void *from, int64_t stride, int64_t k, int64_t n, int64_t column, int64_t columns, int half) {
  const __mmask16 some = leading(columns - column);
  if (!half) return (vu)_mm512_maskz_loadu_epi32(some, (const uint32_t *)from + k * stride + column);
  const uint16_t *row = (const uint16_t *)from + 2 * k * stride + column;
  vu pair = (vu)_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, row));
  if (2 * k + 1 < n) pair |= (vu)_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, row + stride)) << 16;
  return pair;
}

/* Rows `first` to `last`: packed by ROWS columns of dy and PANEL columns of x, the sums of dy's on the way. */
INLINE void packed(const Slopes *p, int64_t first, int64_t last, int64_t words, char *inputs, float *sums, const int half) {
  const int64_t step = half ? 2 : 1, end = up(last, step) / step;
  memset(sums, 0, p->out * sizeof(float));
  for (int64_t at = first / step; at < end; at += NEAR)
    for (int64_t o = 0; o < p->out; o += ROWS) {
      const __mmask16 some = p->out - o < ROWS ? (1 << (p->out - o)) - 1 : (1 << ROWS) - 1;
      vf sum = splat(0.0f), odd = splat(0.0f);
      uint32_t *to = (uint32_t *)p->room + o * words;
      for (int64_t k = at; k < least(at + NEAR, end); k++) {
        const vu word = word_of(p->dy, p->out, k, p->rows, o, p->out, half);
        sum += half ? (vf)(word << 16) : (vf)word;
        if (half) odd += (vf)(word & splat_u(0xFFFF0000u));
        _mm512_mask_storeu_epi32(to + k * ROWS, (1 << ROWS) - 1, (__m512i)word);
      }
      _mm512_mask_storeu_ps(sums + o, some, (__m512)(sum + odd + (vf)_mm512_maskz_loadu_ps(some, sums + o)));
    }
  for (int64_t at = first / step; at < end; at += NEAR)
    for (int64_t i = 0; i < p->in; i += 16) {
      uint32_t *to = (uint32_t *)inputs + i / PANEL * PANEL * words + i % PANEL;
      for (int64_t k = at; k < least(at + NEAR, end); k++)
        *(vu *)(to + k * PANEL) = word_of(p->x, p->in, k, p->rows, i, p->in, half);
    }
}

static void pack(const Slopes *p, int64_t first, int64_t last, int64_t words, char *inputs, float *sums) {
  if (p->half)
    packed(p, first, last, words, inputs, sums, 1);
  else
    packed(p, first, last, words, inputs, sums, 0);
}

/* One piece of a weight's gradient: bands of ROWS outputs from `band` on, panels of inputs from `panel` on; added where `add`. */
static void piece_of(const Slopes *p, const char *inputs, int64_t words, int64_t first_band, int64_t first_panel, int add) {
  const int64_t bands = least(first_band + DOWN, up(p->out, ROWS) / ROWS), panels = least(first_panel + ACROSS, p->in / PANEL);
  float own[ROWS * PANEL] __attribute__((aligned(64)));
  for (int64_t k = 0; k < words; k += STEPS)
    for (int64_t band = first_band; band < bands; band++)
      for (int64_t panel = first_panel; panel < panels; panel++) {
        const char *a = p->room + (band * words + k) * ROWS * 4, *b = inputs + (panel * words + k) * PANEL * 4;
        packed_by_panel(own, a, b, least(STEPS, words - k), 0, p->half);
        for (int64_t r = 0; r < least(ROWS, p->out - band * ROWS); r++)
          for (int64_t c = 0; c < PANEL; c += 16) {
            float *to = p->dw + (band * ROWS + r) * p->in + panel * PANEL + c;
            *(vf *)to = *(const vf *)(own + r * PANEL + c) + (add || k ? *(const vf *)to : splat(0.0f));
          }
      }
}

/* Columns `from` to `to` of a gradient of FEW rows at most, a multiple of THIN: x is read as it lies, once. `dy`: [words][out].
   Added where `add`. */
INLINE void few_outputs(const Slopes *p, const uint32_t *dy, int64_t from, int64_t to, int add, const int half) {
  const int64_t words = half ? up(p->rows, 2) / 2 : p->rows;
  for (int64_t at = 0; at < words; at += NEAR)
    for (int64_t c = from; c < to; c += PANEL)
      for (int64_t o = 0; o < p->out; o += THIN) {
        __m512 s[THIN][2];
        for (int r = 0; r < THIN; r++) s[r][0] = s[r][1] = _mm512_setzero_ps();
        for (int64_t k = at; k < least(words, at + NEAR); k++) {
          __m512 left, right;
          if (half) {
            left = (__m512)pair_of((const uint16_t *)p->x + c, p->in, k, p->rows);
            right = (__m512)pair_of((const uint16_t *)p->x + c + 16, p->in, k, p->rows);
          } else {
            left = _mm512_loadu_ps((const float *)p->x + k * p->in + c);
            right = _mm512_loadu_ps((const float *)p->x + k * p->in + c + 16);
          }
          for (int r = 0; r < THIN; r++) {
            const __m512 x = _mm512_set1_ps(*(const float *)(dy + k * p->out + o + r));
            s[r][0] = TIMES(s[r][0], x, left);
            s[r][1] = TIMES(s[r][1], x, right);
          }
        }
        for (int r = 0; r < THIN; r++)
          for (int v = 0; v < 2; v++) {
            vf *sum = (vf *)(p->dw + (o + r) * p->in + c + 16 * v);
            *sum = (vf)s[r][v] + (add || at ? *sum : splat(0.0f));
          }
      }
}

static void few_slopes(const Slopes *p, int add, int threads) {
  const int64_t panels = p->in / PANEL, each = up(panels, threads) / threads;
  const uint32_t *dy = p->dy;
  if (p->half) {
    paired((uint32_t *)p->room, p->out, p->dy, p->out, p->rows, up(p->rows, 2), p->out);
    dy = (const uint32_t *)p->room;
  }
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t part = 0; part < threads; part++) {
    const int64_t from = least(panels, part * each) * PANEL, to = least(panels, (part + 1) * each) * PANEL;
    if (p->half)
      few_outputs(p, dy, from, to, add, 1);
    else
      few_outputs(p, dy, from, to, add, 0);
  }
}

/* Rows from `row` on, PART of them at most. */
static Slopes part_of(const Slopes *p, int64_t row) {
  const int64_t size = p->half ? 2 : 4;
  Slopes part = *p;
  part.rows = least(PART, p->rows - row);
  part.dy = (const char *)p->dy + row * p->out * size;
  part.x = (const char *)p->x + row * p->in * size;
  return part;
}

int regraft_slopes(const Slopes *p, int threads) {
  const int64_t step = p->half ? 2 : 1, shares = up(p->rows, SHARE) / SHARE, most_words = up(least(p->rows, PART), step) / step;
  const int64_t bands = up(p->out, ROWS) / ROWS;
  char *inputs = p->room + up(bands * ROWS * most_words * 4, 64);
  float *sums = (float *)(inputs + p->in * most_words * 4); /* [shares][out] */
  const int64_t down = up(bands, DOWN) / DOWN, across = up(p->in / PANEL, ACROSS) / ACROSS;
  if (!p->rows) memset(p->dw, 0, p->out * p->in * sizeof(float));
  if (!p->db && p->out <= FEW && p->out % THIN == 0) {
    for (int64_t row = 0; row < p->rows; row += PART) {
      const Slopes part = part_of(p, row);
      few_slopes(&part, row > 0, threads);
    }
    return 0;
  }
#pragma omp parallel num_threads(threads)
  {
    for (int64_t row = 0; row < p->rows; row += PART) {
      const Slopes part = part_of(p, row);
      const int64_t words = up(part.rows, step) / step;
#pragma omp for schedule(dynamic, 1)
      for (int64_t from = 0; from < part.rows; from += SHARE)
        pack(&part, from, least(part.rows, from + SHARE), words, inputs, sums + (row + from) / SHARE * p->out);
#pragma omp for schedule(dynamic, 1) collapse(2)
      for (int64_t i = 0; i < down; i++)
        for (int64_t j = 0; j < across; j++) piece_of(&part, inputs, words, i * DOWN, j * ACROSS, row > 0);
    }
    if (p->db) {
#pragma omp for schedule(static)
      for (int64_t o = 0; o < p->out; o += 16) {
        vf whole = splat(0.0f);
        for (int64_t share = 0; share < shares; share++) whole += *(const vf *)(sums + share * p->out + o);
        *(vf *)(p->db + o) = whole;
      }
    }
  }
  return 0;
}
/* A frozen linear layer with a low-rank update of its weight W, and the gradients of the update's two factors:
   u = x A^T,  y = x W^T + u B^T + b,   v = dy B,  dx = dy W + v A,  dA = v^T x,  dB = scale dy^T u */
typedef struct {
  const void *x, *weight, *bias, *down, *up; /* [rows][inputs], W [outputs][inputs], b or NULL, A [rank][inputs], B [outputs][rank] */
  void *inner, *out, *active;                /* u [rows][rank]; y and its GELU, as of a product */
  const void *dy;                            /* [rows][outputs], of y or, where `slopes`, of its GELU */
  void *slopes, *back, *dx;                  /* dy times the GELU's slope, or NULL; v [rows][rank]; or NULL */
  float *d_down, *d_up;                      /* [rank][inputs], [outputs][rank] */
  char *room;                                /* as much as the largest of these products needs, and */
  float *d_turned;                           /* [rank][outputs] */
  int64_t rows, inputs, outputs, rank, half;
  float scale;
} Lora;

int regraft_lora(const Lora *p, int threads) {
  Product thin = {.a = p->x, .b = p->down, .out = p->inner, .room = p->room};
  Product whole = {.a = p->x, .b = p->weight, .bias = p->bias, .out = p->out, .active = p->active, .room = p->room};
  thin.rows = whole.rows = p->rows, thin.inner = whole.inner = p->inputs;
  thin.turned = whole.turned = 1, thin.half = whole.half = p->half;
  thin.wide = whole.thin = p->rank, whole.wide = p->outputs;
  whole.more = p->inner, whole.beside = p->up;
  regraft_product(&thin, threads);
  return regraft_product(&whole, threads);
}

int regraft_slopes_of_gelu(const void *dh, const void *y, void *dy, int64_t count, int64_t half, int threads);

int regraft_lora_slopes(const Lora *p, int threads) {
  const void *dy = p->slopes ? p->slopes : p->dy;
  Product thin = {.a = dy, .b = p->up, .out = p->back, .room = p->room};
  Product whole = {.a = dy, .b = p->weight, .more = p->back, .beside = p->down, .out = p->dx, .room = p->room};
  Slopes down = {.dy = p->back, .x = p->x, .dw = p->d_down, .room = p->room};
  Slopes up = {.dy = p->inner, .x = dy, .dw = p->d_turned, .room = p->room};
  thin.rows = whole.rows = down.rows = up.rows = p->rows, thin.half = whole.half = down.half = up.half = p->half;
  thin.inner = whole.inner = up.in = p->outputs, thin.wide = whole.thin = down.out = up.out = p->rank;
  whole.wide = down.in = p->inputs;
  if (p->slopes) regraft_slopes_of_gelu(p->dy, p->out, p->slopes, p->rows * p->outputs, p->half, threads);
  regraft_product(&thin, threads);
  if (p->dx) regraft_product(&whole, threads);
  regraft_slopes(&down, threads);
  regraft_slopes(&up, threads);
  for (int64_t o = 0; o < p->outputs; o++)
    for (int64_t r = 0; r < p->rank; r++) p->d_up[o * p->rank + r] = p->d_turned[r * p->outputs + o] * p->scale;
  return 0;
}

/* dy = dh gelu'(y), `count` numbers, a multiple of 16. */
int regraft_slopes_of_gelu(const void *dh, const void *y, void *dy, int64_t count, int64_t half, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < count; i += 16)
    if (half)
      store(dy, i, load(dh, i, 1) * gelu_slope(load(y, i, 1)), 1);
    else
      store(dy, i, load(dh, i, 0) * gelu_slope(load(y, i, 0)), 0);
  return 0;
}
#endif

/* Whether these are here: 0, 1 for fp32 alone, 2 for bf16 too. */
int regraft_products_here(int threads) {
  (void)threads;
#if defined(HAS_LONG) && defined(__AVX512BF16__)
  return 2;
#elif defined(HAS_LONG)
  return 1;
#else
  return 0;
#endif
}
