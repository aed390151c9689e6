/* Vectors of 16 numbers (AVX-512): what every file that works with them needs beside native.h. */
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define HAS_LONG
#include <immintrin.h>

/* sum + x y, word by word of 32 bits: one number in fp32, where `half` two in bf16. */
#ifdef __AVX512BF16__
#define TIMES(sum, x, y) (half ? _mm512_dpbf16_ps(sum, (__m512bh)(x), (__m512bh)(y)) : _mm512_fmadd_ps(x, y, sum))
#else
#define TIMES(sum, x, y) ((void)half, _mm512_fmadd_ps(x, y, sum))
#endif

/* The lines that rows, `apart` bytes from each other, are going to be written to, or read from. */
INLINE void lines_ahead(const void *from, int64_t apart, int64_t rows, const int written) {
  for (int64_t r = 0; r < rows; r++) __builtin_prefetch((const char *)from + r * apart, written, 3);
}

/* 16 x 16 numbers of 32 bits, transposed. */
INLINE void transpose16(vu row[16]) {
  vu other[16];
#define WEAVE(from, to, step, low, high)                          \
  for (int i = 0; i < 16; i++)                                    \
    if (!(i & step)) {                                            \
      to[i] = __builtin_shuffle(from[i], from[i + step], (vi)low);    \
      to[i + step] = __builtin_shuffle(from[i], from[i + step], (vi)high); \
    }
  WEAVE(row, other, 8, ((vi){0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23}),
        ((vi){8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31}))
  WEAVE(other, row, 4, ((vi){0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27}),
        ((vi){4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31}))
  WEAVE(row, other, 2, ((vi){0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29}),
        ((vi){2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31}))
  WEAVE(other, row, 1, ((vi){0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30}),
        ((vi){1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31}))
#undef WEAVE
}

/* The first of 16 lanes, as many as there are. */
INLINE __mmask16 leading(int64_t n) { return n < 16 ? (1u << most(0, n)) - 1 : 0xFFFF; }

/* Numbers 2 r and 2 r + 1 of `some` of 16 columns from rows `stride` apart, the first below the second; rows from `n` on are 0. */
INLINE vu some_pairs(const uint16_t *from, int64_t stride, int64_t r, int64_t n, __mmask16 some) {
  vu pair = splat_u(0);
  if (2 * r < n) pair = (vu)_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, from + 2 * r * stride));
  if (2 * r + 1 < n) pair |= (vu)_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, from + (2 * r + 1) * stride)) << 16;
  return pair;
}

/* The same of all 16. */
INLINE vu pair_of(const uint16_t *from, int64_t stride, int64_t r, int64_t n) { return some_pairs(from, stride, r, n, 0xFFFF); }

/* Rows 2 r and 2 r + 1 of n side by side, number by number: [padded / 2][d] pairs. What is beyond n is 0. */
static inline void paired(uint32_t *to, int64_t ldto, const uint16_t *from, int64_t stride, int64_t n, int64_t padded, int64_t d) {
  for (int64_t r = 0; r < padded / 2; r++)
    for (int64_t j = 0; j < d; j += 16) {
      const __mmask16 some = leading(d - j);
      _mm512_mask_storeu_epi32(to + r * ldto + j, some, (__m512i)some_pairs(from + j, stride, r, n, some));
    }
}

#ifdef __AVX512BF16__
/* Two vectors side by side, to bf16. */
INLINE void store_both(uint16_t *to, vf left, vf right) {
  _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh((__m512)right, (__m512)left));
}

/* Two vectors one below the other in pairs, to bf16. */
INLINE void store_pairs(uint32_t *to, vf upper, vf lower) {
  const __m512i woven = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4,
                                         19, 3, 18, 2, 17, 1, 16, 0);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi16(woven, (__m512i)_mm512_cvtne2ps_pbh((__m512)lower, (__m512)upper)));
}
#endif

/* 2^x: Taylor for what is left of |x| <= 1 / 2. NaN stays NaN. */
INLINE vf two_to(vf x) {
  const __m512 t = _mm512_max_ps(_mm512_set1_ps(-1000.0f), (__m512)x), whole = _mm512_roundscale_ps(t, 8);
  const vf r = (vf)_mm512_sub_ps(t, whole);
  vf y = r * splat(1.3333558e-3f) + splat(9.6181291e-3f);
  y = y * r + splat(5.5504109e-2f);
  y = y * r + splat(2.4022651e-1f);
  y = y * r + splat(6.9314718e-1f);
  y = y * r + splat(1.0f);
  return (vf)_mm512_scalef_ps((__m512)y, whole);
}

/* Phi(u) = (1 + erf(u / sqrt(2))) / 2, and e^(-u^2 / 2) on the way; off by at most some 1e-6 (Abramowitz and Stegun 7.1.26). */
INLINE vf normal_below(vf u, vf *bell) {
  const __m512 size = _mm512_min_ps(_mm512_set1_ps(100.0f), _mm512_abs_ps((__m512)u)); /* infinite u too is above all */
  const vf above_one = splat(1.0f) + (vf)size * splat(0.3275911f * 0.70710678f);
  vf t = (vf)_mm512_rcp14_ps((__m512)above_one);
  t *= splat(2.0f) - above_one * t;
  *bell = two_to(u * u * splat(-0.5f * 1.44269504f));
  vf tail = t * splat(0.5f * 1.061405429f) + splat(0.5f * -1.453152027f);
  tail = tail * t + splat(0.5f * 1.421413741f);
  tail = tail * t + splat(0.5f * -0.284496736f);
  tail = tail * t + splat(0.5f * 0.254829592f);
  tail *= t * *bell;
  const __mmask16 below = _mm512_cmp_ps_mask((__m512)u, _mm512_setzero_ps(), _CMP_LT_OQ);
  return (vf)_mm512_mask_mov_ps((__m512)(splat(1.0f) - tail), below, (__m512)tail);
}

/* u Phi(u) */
INLINE vf gelu(vf u) {
  vf bell;
  return u * normal_below(u, &bell);
}

/* Its derivative. */
INLINE vf gelu_slope(vf u) {
  vf bell;
  const vf below = normal_below(u, &bell);
  return below + u * bell * splat(0.3989422804f);
}
#endif
