/* The tile registers of a processor that multiplies bf16 by them (AMX): what every file that uses them needs.

   A tile product takes 16 rows of 32 numbers and 16 rows of pairs: b's rows 2 r and 2 r + 1 side by side, number by number. */
#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__AVX512VL__)
#define HAS_TILES
#include <sys/syscall.h>
#include <unistd.h>

#define SIDE 32 /* rows and columns of two tiles side by side, and numbers along a tile's row */

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

/* How a thread's tiles are set up when it comes to work with them: whoever uses them beside us may count on finding that again. */
typedef struct {
  TileConfig config;
  unsigned control;
} Before;

/* Tiles of 16 rows of 64 bytes; numbers too small for fp32's exponents are 0, as they are to tile products, instead of slow. */
static void use_tiles(Before *before) { /* the asm: gcc does not know that all of `mine` is read */
  TileConfig mine = {.palette = 1};
  for (int t = 0; t < 8; t++) {
    mine.bytes[t] = 64;
    mine.rows[t] = 16;
  }
  before->control = _mm_getcsr();
  _mm_setcsr(before->control | 0x8040);
  _tile_storeconfig(&before->config);
  __asm__ volatile("" : : "r"(&mine) : "memory");
  _tile_loadconfig(&mine);
}

static void leave_tiles(const Before *before) {
  _tile_loadconfig(&before->config);
  _mm_setcsr(before->control);
}

/* 16 rows of a tile on their way to the nearest cache: nothing else sees loads of tiles coming. */
INLINE void ahead(const char *tile, int64_t apart) {
  for (int r = 0; r < 16; r++) _mm_prefetch(tile + r * apart, _MM_HINT_T0);
}

/* c[SIDE][SIDE] (+)= a b over `steps` times SIDE terms. `upper` and `lower`: 16 rows of a each, `lda` bytes apart, SIDE terms on
   after `along` bytes; b: pairs of rows, `ldb` bytes apart. `far`: they come from a farther cache, and are called in time. */
INLINE void tile_block(const char *upper, const char *lower, int64_t lda, int64_t along, const char *b, int64_t ldb, char *c,
                       int64_t ldc, int64_t steps, int add, int far) {
  __asm__ volatile("" : : : "memory"); /* gcc does not know that tiles are read from memory */
  if (add) {
    _tile_loadd(0, c, ldc);
    _tile_loadd(1, c + 64, ldc);
    _tile_loadd(2, c + 16 * ldc, ldc);
    _tile_loadd(3, c + 16 * ldc + 64, ldc);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < steps; k++, upper += along, lower += along, b += 16 * ldb) {
    _tile_loadd(4, upper, lda);
    _tile_loadd(6, b, ldb);
    if (far) ahead(b + 32 * ldb, ldb);
    _tile_loadd(7, b + 64, ldb);
    _tile_dpbf16ps(0, 4, 6);
    if (far) ahead(b + 32 * ldb + 64, ldb);
    _tile_dpbf16ps(1, 4, 7);
    if (far) ahead(upper + along, lda);
    _tile_loadd(5, lower, lda);
    _tile_dpbf16ps(2, 5, 6);
    if (far) ahead(lower + along, lda);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, ldc);
  _tile_stored(1, c + 64, ldc);
  _tile_stored(2, c + 16 * ldc, ldc);
  _tile_stored(3, c + 16 * ldc + 64, ldc);
}
#endif
