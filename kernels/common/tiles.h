/* Small matrix products and exponentials for kernels on a CPU, in float or (-DDOUBLE) double.

   Vectors are those of gcc and clang, as wide as the machine's. Scratch matrices are row-major, their rows padded to
   whole vectors and aligned, with zeros in the padding; so products read and write whole vectors. */

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef DOUBLE
typedef double real;
typedef int64_t whole;
#else
typedef float real;
typedef int32_t whole;
#endif

#if defined(__AVX512F__)
#define BYTES 64
#define ROWS_AT_ONCE 4
#define VECTORS_AT_ONCE 4
#elif defined(__AVX__)
#define BYTES 32
#define ROWS_AT_ONCE 4
#define VECTORS_AT_ONCE 2
#else
#define BYTES 16
#define ROWS_AT_ONCE 4
#define VECTORS_AT_ONCE 4
#endif

typedef real vec __attribute__((vector_size(BYTES)));
typedef real vec_anywhere __attribute__((vector_size(BYTES), aligned(sizeof(real)), may_alias));
#define LANES ((int64_t)(BYTES / sizeof(real)))
#define INLINE static inline __attribute__((always_inline))

static inline int64_t min_i(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max_i(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

/* e^x for x <= 0; below -87 (-708) it is 0, which also keeps denormals out. No branches, so that loops vectorise. */
INLINE real exp_negative(real x) {
#ifdef DOUBLE
  return x < -708 ? 0 : exp(x);
#else
  float inside = x < -87.0f ? -87.0f : x;
  float power = rintf(inside * 1.442695041f);
  float rest = inside - power * 0.693359375f + power * 2.12194440e-4f;
  float series = 1.0f + rest * (1.0f + rest * (0.5f + rest * (0.166666667f + rest * (0.0416666667f
                 + rest * (0.00833333333f + rest * 0.00138888889f)))));
  int32_t scale_bits = (int32_t)((uint32_t)((int32_t)power + 127) << 23);
  float scale;
  memcpy(&scale, &scale_bits, 4);
  return x < -87.0f ? 0.0f : series * scale;
#endif
}

/* One block of rows x (vectors * LANES) of C = A B, or C += A B; A[i][k] is at a[i * a_row + k * a_k]. */
INLINE void block_product(const int rows, const int vectors, int64_t depth, const real *a, int64_t a_row, int64_t a_k,
                          const real *b, int64_t b_row, real *c, int64_t c_row, int add) {
  vec sum[ROWS_AT_ONCE][VECTORS_AT_ONCE];
#pragma GCC unroll 8
  for (int i = 0; i < rows; i++)
#pragma GCC unroll 8
    for (int j = 0; j < vectors; j++) {
      sum[i][j] = (vec){0};
      if (add) sum[i][j] = *(const vec_anywhere *)(c + i * c_row + j * LANES);
    }
  for (int64_t k = 0; k < depth; k++) {
    vec right[VECTORS_AT_ONCE];
#pragma GCC unroll 8
    for (int j = 0; j < vectors; j++) right[j] = *(const vec_anywhere *)(b + k * b_row + j * LANES);
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) {
      real left = a[i * a_row + k * a_k];
#pragma GCC unroll 8
      for (int j = 0; j < vectors; j++) sum[i][j] += left * right[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; i++)
#pragma GCC unroll 8
    for (int j = 0; j < vectors; j++) *(vec_anywhere *)(c + i * c_row + j * LANES) = sum[i][j];
}

#define COLUMNS(ROWS)                                                                                                  \
  for (int64_t j = 0; j < vectors;) {                                                                                  \
    const real *right = b + j * LANES;                                                                                 \
    real *out = c + j * LANES;                                                                                         \
    int64_t left = vectors - j;                                                                                        \
    if (VECTORS_AT_ONCE == 4 && left >= 4) {                                                                           \
      block_product(ROWS, VECTORS_AT_ONCE, depth, a, a_row, a_k, right, b_row, out, c_row, add);                       \
      j += 4;                                                                                                          \
    } else if (left >= 2) {                                                                                            \
      block_product(ROWS, 2, depth, a, a_row, a_k, right, b_row, out, c_row, add);                                     \
      j += 2;                                                                                                          \
    } else {                                                                                                           \
      block_product(ROWS, 1, depth, a, a_row, a_k, right, b_row, out, c_row, add);                                     \
      j += 1;                                                                                                          \
    }                                                                                                                  \
  }

/* A strip of ROWS_AT_ONCE rows of a product, as many vectors wide as asked. */
static __attribute__((noinline)) void strip(int64_t vectors, int64_t depth, const real *a, int64_t a_row, int64_t a_k,
                                            const real *b, int64_t b_row, real *c, int64_t c_row, int add) {
  COLUMNS(ROWS_AT_ONCE)
}

static __attribute__((noinline)) void one_row(int64_t vectors, int64_t depth, const real *a, int64_t a_row,
                                              int64_t a_k, const real *b, int64_t b_row, real *c, int64_t c_row,
                                              int add) {
  COLUMNS(1)
}

/* What a product may leave out, where A or the result is triangular with as many rows as columns. */
enum { ALL, RESULT_LOWER, A_LOWER, A_UPPER };

/* C = A B, or C += A B where add. A is rows x depth with A[i][k] at a[i * a_row + k * a_k], so either of A and its
   transpose will do; B is depth x columns, row-major. Columns are rounded up to whole vectors.

   RESULT_LOWER: only columns up to the diagonal are wanted, rounded up. A_LOWER, A_UPPER: A[i][k] is 0 beyond its
   diagonal, k > i or k < i, and those k are skipped. */
static void product(int64_t rows, int64_t columns, int64_t depth, const real *a, int64_t a_row, int64_t a_k,
                    const real *b, int64_t b_row, real *c, int64_t c_row, int add, int shape) {
  for (int64_t i = 0; i < rows;) {
    int64_t strip_rows = rows - i >= ROWS_AT_ONCE ? ROWS_AT_ONCE : 1;
    int64_t end = i + strip_rows;
    int64_t vectors = padded(shape == RESULT_LOWER ? min_i(columns, end) : columns) / LANES;
    int64_t from = shape == A_UPPER ? i : 0, to = shape == A_LOWER ? min_i(end, depth) : depth;
    const real *left = a + i * a_row + from * a_k, *right = b + from * b_row;
    (strip_rows == 1 ? one_row : strip)(vectors, max_i(to - from, 0), left, a_row, a_k, right, b_row, c + i * c_row,
                                        c_row, add);
    i = end;
  }
}

/* to[j][i] = from[i][j] for i < rows, j < columns, in blocks that stay in the first cache. */
static void transpose(int64_t rows, int64_t columns, const real *restrict from, int64_t from_ld, real *restrict to,
                      int64_t to_ld) {
  for (int64_t i0 = 0; i0 < rows; i0 += 16)
    for (int64_t j = 0; j < columns; j++)
      for (int64_t i = i0; i < min_i(i0 + 16, rows); i++) to[j * to_ld + i] = from[i * from_ld + j];
}

INLINE real dot(int64_t n, const real *a, const real *b) {
  real sum = 0;
  for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
  return sum;
}

/* Aligned scratch of `count` reals out of a block; *block moves on. */
static inline real *take(real **block, int64_t count) {
  real *taken = *block;
  *block += (count + 63) / 64 * 64;
  return taken;
}

static inline real *scratch(int64_t count) {
  return aligned_alloc(64 * sizeof(real), (size_t)((count + 63) / 64 * 64) * sizeof(real));
}
