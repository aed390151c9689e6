/* Weights stored in 4 bits made whole, in fp32 or bf16:

   w_i = code[nibble_i] scale_(i / block),   scale_j = absmax_j, or where that is quantised again code2[absmax_j] absmax2_(j / block2) + offset

   Two values a byte, the earlier one in the high half. A vector of bytes gives two of values, which are looked up in registers. */
#define WANTS_LONG_VECTORS
#include "native.h"

typedef uint8_t vb VECTOR(WIDE, 1);

typedef struct {
  const uint8_t *packed;
  const float *code;                     /* [16] */
  const void *absmax;                    /* of each block: fp32, or a byte where there is `absmax2` */
  const float *absmax2, *code2, *offset; /* of each block of blocks, [256], [1]; or NULL */
  void *out;                             /* [count] */
  int64_t count, block, block2, half;
} Packed;

static inline float scale_of(const Packed *p, int64_t j) {
  if (!p->absmax2) return ((const float *)p->absmax)[j];
  return p->code2[((const uint8_t *)p->absmax)[j]] * p->absmax2[j / p->block2] + *p->offset;
}

#if WIDE == 16
#define LOOK_UP(index) __builtin_shuffle(*(const vf *)p->code, (vi)(index))
#define UPPER {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23}
#define LOWER {8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31}
#else
#define LOOK_UP(index) __builtin_shuffle(*(const vf *)p->code, *(const vf *)(p->code + WIDE), (vi)(index))
#define UPPER {0, 8, 1, 9, 2, 10, 3, 11}
#define LOWER {4, 12, 5, 13, 6, 14, 7, 15}
#endif

/* Values `from` to `to`, all of one block. */
INLINE void some_values(const Packed *p, int64_t from, int64_t to, float scale, const int half) {
  int64_t i = from;
  for (; i + TILE <= to; i += TILE) {
    const vu both = __builtin_convertvector(*(const vb *)(p->packed + i / 2), vu);
    const vf earlier = LOOK_UP(both >> 4) * splat(scale), later = LOOK_UP(both & splat_u(15)) * splat(scale);
    store(p->out, i, __builtin_shuffle(earlier, later, (vi)UPPER), half);
    store(p->out, i + WIDE, __builtin_shuffle(earlier, later, (vi)LOWER), half);
  }
  for (; i < to; i++) {
    const uint8_t both = p->packed[i / 2];
    float value[WIDE];
    store(value, 0, splat(p->code[i % 2 ? both & 15 : both >> 4] * scale), half);
    memcpy((char *)p->out + i * (half ? 2 : 4), value, half ? 2 : 4);
  }
}

int regraft_nf4(const Packed *p, int threads) {
  const int64_t blocks = up(p->count, p->block) / p->block;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t j = 0; j < blocks; j++) {
    const int64_t from = j * p->block, to = least(p->count, from + p->block);
    if (p->half)
      some_values(p, from, to, scale_of(p, j), 1);
    else
      some_values(p, from, to, scale_of(p, j), 0);
  }
  return 0;
}
