/* Linear layers in bf16 where the processor multiplies tiles (AMX), fp32 sums:

   out = a b + more beside (+ bias, and gelu of it)   b = W^T forward, W for the gradient of inputs; a further, thin term of
                                                      few columns (low-rank updates) where thin is not 0
   dw = dy^T x,   db = sum of dy's rows               in fp32: as they were added up, nothing is rounded to bf16

   Operands are put into the order that tiles are loaded in as part of each call, by all threads; then blocks of SIDE x SIDE
   are added up in registers. Every sum has one order, whoever computes it: the same bits for any number of threads, and for a
   row whatever stands around it. */
#define WANTS_LONG_VECTORS
#include "native.h"
#include "native_long.h"
#include "native_tiles.h"

#ifdef HAS_TILES
#define STRIP 256         /* rows that are worked on together; linear_native.py counts with it and with SIDE */
#define GROUP (768 << 10) /* bytes of b that stay in a cache meanwhile: with a strip, one piece of work */
#define LARGE 192         /* rows and columns of a weight's gradient, one piece of work */
#define TILE_ROWS 16      /* of a tile; as many pairs are along each */

typedef struct {
  const uint16_t *a, *b, *bias; /* a [rows][inner]; b [wide][inner] where `turned`, else [inner][wide]; bias [wide] or NULL */
  uint16_t *out, *active;       /* [rows][wide]: the product, and its GELU; one of the two may be NULL */
  const uint16_t *more, *beside; /* [rows][thin]; as b with thin in place of inner; or NULL, with thin 0 */
  char *room;                   /* (wide + SIDE) * (inner + thin) * 2 bytes */
  int64_t rows, inner, wide, thin, turned;
} Product;

/* SIDE rows of `inner` numbers, which are columns of b, to pairs of its rows: [inner / 2][SIDE]. */
static void paired_turned(uint32_t *to, const uint16_t *from, int64_t inner) {
  for (int64_t k = 0; k < inner / 2; k += TILE_ROWS)
    for (int64_t j = 0; j < SIDE; j += 16) {
      vu rows[16];
      for (int i = 0; i < 16; i++) rows[i] = *(const vu *)(from + (j + i) * inner + 2 * k);
      transpose16(rows);
      for (int i = 0; i < 16; i++) *(vu *)(to + (k + i) * SIDE + j) = rows[i];
    }
}

/* SIDE rows of 16 columns, those from n on 0, to a tile whose rows the columns are; they are added to `sums` too. */
INLINE void tile_of_columns(uint32_t *to, float *sums, const uint16_t *from, int64_t stride, int64_t n) {
  vf even = *(const vf *)sums, odd = splat(0.0f);
  vu pairs[16];
  for (int i = 0; i < 16; i++) {
    pairs[i] = pair_of(from, stride, i, n);
    even += (vf)(pairs[i] << 16);
    odd += (vf)(pairs[i] & splat_u(0xFFFF0000u));
  }
  *(vf *)sums = even + odd;
  transpose16(pairs);
  for (int i = 0; i < 16; i++) *(vu *)(to + i * 16) = pairs[i];
}

/* SIDE rows of sums to bf16, with bias and GELU where they are asked for. */
static void finish(const Product *p, const float *sums, int64_t row, int64_t rows, int64_t column) {
  vf left = splat(0.0f), right = left;
  if (p->bias) {
    left = load(p->bias, column, 1);
    right = load(p->bias, column + 16, 1);
  }
  for (int64_t i = 0; i < rows; i++, sums += SIDE) {
    const int64_t at = (row + i) * p->wide + column;
    uint16_t *y = p->out ? p->out : p->active;
    store_both(y + at, *(const vf *)sums + left, *(const vf *)(sums + 16) + right);
    if (p->active) store_both(p->active + at, gelu(load(y, at, 1)), gelu(load(y, at + 16, 1))); /* of y as it was rounded */
  }
}

/* SIDE columns of b, or of what stands beside it, as tiles are loaded. */
static void panel_of(const Product *p, uint32_t *to, const uint16_t *b, int64_t inner, int64_t column) {
  if (p->turned)
    paired_turned(to, b + column * inner, inner);
  else
    paired(to, SIDE, b + column, p->wide, inner, inner, SIDE);
}

/* The last rows of a or `more`, fewer than SIDE, and rows of 0 below them. */
static void last_rows(const Product *p, uint16_t *to, const uint16_t *from, int64_t inner) {
  const int64_t n = p->rows % SIDE;
  memcpy(to, from + (p->rows - n) * inner, n * inner * 2);
  memset(to + n * inner, 0, (SIDE - n) * inner * 2);
}

/* Rows `first` to `last` of the product with panels `panel` to `end`, of SIDE columns each. */
static void strip_of(const Product *p, const uint16_t *edge, int64_t first, int64_t last, int64_t panel, int64_t end) {
  float sums[SIDE * SIDE] __attribute__((aligned(64)));
  const int64_t lda = p->inner * 2, ldm = p->thin * 2, panel_bytes = (p->inner + p->thin) * SIDE * 2;
  for (int64_t i = first; i < last; i += SIDE) {
    const int whole = i + SIDE <= p->rows;
    const char *rows = (const char *)(whole ? p->a + i * p->inner : edge);
    const char *more = (const char *)(whole ? p->more + i * p->thin : edge + SIDE * p->inner);
    const int64_t n = least(SIDE, p->rows - i);
    for (int64_t j = panel; j < end; j++) {
      if ((j - panel) % 2 == 0)
        for (int64_t column = j * SIDE; column < least(j + 2, end) * SIDE; column += SIDE) {
          if (p->out) lines_ahead(p->out + i * p->wide + column, p->wide * 2, n, 1);
          if (p->active) lines_ahead(p->active + i * p->wide + column, p->wide * 2, n, 1);
        }
      const char *b = p->room + j * panel_bytes;
      tile_block(rows, rows + 16 * lda, lda, 64, b, SIDE * 4, (char *)sums, SIDE * 4, p->inner / SIDE, 0, 1);
      if (p->thin)
        tile_block(more, more + 16 * ldm, ldm, 64, b + p->inner * SIDE * 2, SIDE * 4, (char *)sums, SIDE * 4, p->thin / SIDE, 1, 0);
      finish(p, sums, i, n, j * SIDE);
    }
  }
}
#endif

/* Whether linear layers are computed here. */
int regraft_linear_here(int threads) {
  (void)threads;
#ifdef HAS_TILES
  return tiles_allowed();
#else
  return 0;
#endif
}

#ifdef HAS_TILES
/* 0, or 1 where tiles may not be used; so the others. */
int regraft_linear(const Product *p, int threads) {
  if (!tiles_allowed()) return 1;
  const int64_t panels = p->wide / SIDE, panel_bytes = (p->inner + p->thin) * SIDE * 2;
  uint16_t *edge = (uint16_t *)(p->room + panels * panel_bytes);
  const int64_t strips = up(p->rows, STRIP) / STRIP, shared = up(panels, 2 * threads) / (2 * threads);
  const int64_t each = most(1, least(GROUP / panel_bytes, shared)), groups = up(panels, each) / each; /* panels of a group */
#pragma omp parallel num_threads(threads)
  {
    Before before;
#pragma omp for schedule(static) nowait
    for (int64_t j = 0; j < panels; j++) {
      uint32_t *to = (uint32_t *)(p->room + j * panel_bytes);
      panel_of(p, to, p->b, p->inner, j * SIDE);
      if (p->thin) panel_of(p, to + p->inner / 2 * SIDE, p->beside, p->thin, j * SIDE);
    }
#pragma omp single
    {
      last_rows(p, edge, p->a, p->inner);
      if (p->thin) last_rows(p, edge + SIDE * p->inner, p->more, p->thin);
    }
    use_tiles(&before);
#pragma omp for schedule(dynamic, 1) collapse(2)
    for (int64_t strip = 0; strip < strips; strip++)
      for (int64_t group = 0; group < groups; group++)
        strip_of(p, edge, strip * STRIP, least(p->rows, (strip + 1) * STRIP), group * each, least(panels, (group + 1) * each));
    leave_tiles(&before);
  }
  return 0;
}

typedef struct {
  const uint16_t *dy, *x; /* [rows][out], [rows][in] */
  float *dw, *db;         /* [out][in]; [out] or NULL */
  char *room;             /* up(rows, SIDE) * (out + in) * 2 bytes, and up(rows, STRIP) / STRIP * out * 4 */
  int64_t rows, out, in;
} Slopes;

int regraft_linear_slopes(const Slopes *p, int threads) {
  if (!tiles_allowed()) return 1;
  const int64_t padded = up(p->rows, SIDE), band = padded * 16 * 2, panel = padded * SIDE * 2, strips = up(p->rows, STRIP) / STRIP;
  char *inputs = p->room + p->out / 16 * band;
  float *sums = (float *)(inputs + p->in / SIDE * panel); /* [strips][out] */
  const int64_t down = up(p->out, LARGE) / LARGE, across = up(p->in, LARGE) / LARGE;
#pragma omp parallel num_threads(threads)
  {
    Before before;
#pragma omp for schedule(dynamic, 1)
    for (int64_t strip = 0; strip < strips; strip++) {
      float *sum = sums + strip * p->out;
      memset(sum, 0, p->out * sizeof(float));
      for (int64_t row = strip * STRIP; row < least(p->rows, (strip + 1) * STRIP); row += SIDE) {
        const int64_t n = p->rows - row, next = least(SIDE, n - SIDE);
        for (int64_t o = 0; o < p->out; o += 16) {
          if (o % SIDE == 0) lines_ahead(p->dy + (row + SIDE) * p->out + o, p->out * 2, next, 0);
          tile_of_columns((uint32_t *)(p->room + o / 16 * band + row * 32), sum + o, p->dy + row * p->out + o, p->out, n);
        }
        for (int64_t i = 0; i < p->in; i += SIDE) {
          lines_ahead(p->x + (row + SIDE) * p->in + i, p->in * 2, next, 0);
          uint32_t *to = (uint32_t *)(inputs + i / SIDE * panel + row * SIDE * 2);
          paired(to, SIDE, p->x + row * p->in + i, p->in, n, SIDE, SIDE);
        }
      }
    }
    if (p->db) {
#pragma omp for schedule(static) nowait
      for (int64_t o = 0; o < p->out; o += 16) {
        vf whole = splat(0.0f);
        for (int64_t strip = 0; strip < strips; strip++) whole += *(const vf *)(sums + strip * p->out + o);
        *(vf *)(p->db + o) = whole;
      }
    }
    use_tiles(&before);
#pragma omp for schedule(dynamic, 1) collapse(2)
    for (int64_t i = 0; i < down; i++)
      for (int64_t j = 0; j < across; j++)
        for (int64_t c = j * LARGE; c < least(p->in, (j + 1) * LARGE); c += SIDE)
          for (int64_t o = i * LARGE; o < least(p->out, (i + 1) * LARGE); o += SIDE) {
            const char *upper = p->room + o / 16 * band;
            lines_ahead(p->dw + o * p->in + c, p->in * 4, SIDE, 1);
            lines_ahead(p->dw + o * p->in + c + 16, p->in * 4, SIDE, 1);
            tile_block(upper, upper + band, 64, 1024, inputs + c / SIDE * panel, SIDE * 4, (char *)(p->dw + o * p->in + c),
                       p->in * 4, padded / SIDE, 0, 1);
          }
    leave_tiles(&before);
  }
  return 0;
}

/* dy = dh gelu'(y), `count` numbers in bf16, as `half` says. */
int regraft_gelu_slopes(const uint16_t *dh, const uint16_t *y, uint16_t *dy, int64_t count, int64_t half, int threads) {
  (void)half;
  if (!tiles_allowed()) return 1;
#pragma omp parallel num_threads(threads)
  {
    Before before;
    use_tiles(&before);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < count; i += SIDE)
      store_both(dy + i, load(dh, i, 1) * gelu_slope(load(y, i, 1)), load(dh, i + 16, 1) * gelu_slope(load(y, i + 16, 1)));
    leave_tiles(&before);
  }
  return 0;
}
#endif
