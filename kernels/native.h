/* Vectors of fp32 numbers, their way from and to bf16, their exponential, and random decisions that can be made again. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX512BF16__) && defined(__AVX512VL__)
#include <immintrin.h>
#endif

/* Numbers of a vector. A file that wants long ones, where the processor has them, says so before it includes this. */
#if defined(WANTS_LONG_VECTORS) && defined(__AVX512F__)
#define WIDE 16
#define ALL(x) {x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}
#define COUNT {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}
#else
#define WIDE 8
#define ALL(x) {x, x, x, x, x, x, x, x}
#define COUNT {0, 1, 2, 3, 4, 5, 6, 7}
#endif
#define TILE (2 * WIDE) /* columns of a tile: two vectors */
#define BLOCK 16        /* rows whose gradients are summed before they join the sum of all */

/* gcc leaves alone what is long, and with it every constant that a caller hands down. */
#define INLINE static inline __attribute__((always_inline))

#define VECTOR(bytes, align) __attribute__((vector_size(bytes), aligned(align), may_alias))
typedef float vf VECTOR(4 * WIDE, 4);
typedef int32_t vi VECTOR(4 * WIDE, 4);
typedef uint32_t vu VECTOR(4 * WIDE, 4);
typedef uint16_t vh VECTOR(2 * WIDE, 2); /* bf16: the upper half of an fp32 */

static inline vf splat(float x) { return (vf)ALL(x); }
static inline vu splat_u(uint32_t x) { return (vu)ALL(x); }
static inline int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
static inline float total(vf x) {
  for (int apart = WIDE / 2; apart; apart /= 2)
    for (int i = 0; i < apart; i++) x[i] += x[i + apart];
  return x[0];
}

/* A vector from place `at` on of fp32 or, where `half`, of bf16. */
INLINE vf load(const void *from, int64_t at, int half) {
  if (!half) return *(const vf *)((const float *)from + at);
  return (vf)(__builtin_convertvector(*(const vh *)((const uint16_t *)from + at), vu) << 16);
}

/* The same back; to bf16 with ties to even, and NaN stays NaN. */
INLINE void store(void *to, int64_t at, vf x, int half) {
  if (!half) {
    *(vf *)((float *)to + at) = x;
    return;
  }
#if defined(__AVX512BF16__) && defined(__AVX512VL__)
#if WIDE == 16
  *(vh *)((uint16_t *)to + at) = (vh)_mm512_cvtneps_pbh((__m512)x);
#else
  *(vh *)((uint16_t *)to + at) = (vh)_mm256_cvtneps_pbh((__m256)x);
#endif
#else
  const vu bits = (vu)x, even = bits + splat_u(0x7FFF) + ((bits >> 16) & splat_u(1));
  const vu nan = (vu)(x != x), kept = (even & ~nan) | ((bits | splat_u(0x400000)) & nan);
  *(vh *)((uint16_t *)to + at) = __builtin_convertvector(kept >> 16, vh);
#endif
}

/* e^x for x <= 0: two to the whole part, Taylor for what is left of |r| <= ln(2) / 2; below -87 it is nothing. NaN stays NaN. */
static inline vf exponential(vf x) {
  const float magic = 12582912.0f;
  const vi some = ~(x <= splat(-87.0f));
  x = (vf)((vi)x & some);
  vf whole = x * splat(1.44269504088896341f) + splat(magic);
  vi shift = (vi)whole << 23;
  whole -= splat(magic);
  vf r = x - whole * splat(0.693359375f);
  r -= whole * splat(-2.12194440e-4f);
  vf y = splat(1.0f / 5040.0f);
  y = y * r + splat(1.0f / 720.0f);
  y = y * r + splat(1.0f / 120.0f);
  y = y * r + splat(1.0f / 24.0f);
  y = y * r + splat(1.0f / 6.0f);
  y = y * r + splat(0.5f);
  y = y * r + splat(1.0f);
  y = y * r + splat(1.0f);
  return (vf)(((vi)y + shift) & some) + (x - x);
}

/* The key of one row's random numbers (splitmix64 of seed and place). */
static inline uint64_t row_key(uint64_t seed, uint64_t place) {
  uint64_t z = seed + (place + 1) * 0x9E3779B97F4A7C15ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

/* 32 random bits for each number of a vector: a multiply-xorshift hash with a key, in two halves, before and amid it. */
static inline vu hashed(vu number, vu low, vu high) {
  vu x = number * splat_u(0x9E3779B9u) + low;
  x ^= x >> 16;
  x *= splat_u(0x7FEB352Du);
  x ^= x >> 15;
  x += high;
  x *= splat_u(0x846CA68Bu);
  return x ^ (x >> 16);
}

static inline vu random_bits(uint64_t key, vu number) { return hashed(number, splat_u((uint32_t)key), splat_u((uint32_t)(key >> 32))); }

/* Two vectors of keep / (1 - p) from one of bits: 16 decide, as everywhere. */
static inline void decided(vu bits, uint32_t threshold, float factor, vf *left, vf *right) {
  vi low = (vi)((bits & splat_u(0xFFFFu)) >= splat_u(threshold)), high = (vi)((bits >> 16) >= splat_u(threshold));
  *left = (vf)((vi)splat(factor) & low);
  *right = (vf)((vi)splat(factor) & high);
}

/* keep / (1 - p) for columns j to j + TILE - 1 of one row. */
static inline void kept(uint64_t key, int64_t j, uint32_t threshold, float factor, vf *left, vf *right) {
  decided(random_bits(key, splat_u((uint32_t)(j / 2)) + (vu)COUNT), threshold, factor, left, right);
}

/* sums[0] += sums[1] + ... of `count` parts of `width` numbers each, in order. */
static inline void add_up(float *sums, int64_t count, int64_t width) {
  for (int64_t part = 1; part < count; part++)
    for (int64_t j = 0; j < width; j++) sums[j] += sums[part * width + j];
}
