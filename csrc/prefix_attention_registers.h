// Products of small fp32 blocks whose sums stay in vector registers over the whole depth.
#pragma once

#include "simd.h"

namespace fastpost {

typedef float Vector __attribute__((vector_size(64), aligned(4), may_alias));
constexpr int64_t kLanes = 16;

// c[ROWS, 16 GROUPS] (+)= a[ROWS, depth] b[depth, 16 GROUPS], held in registers over the depth.
template <int ROWS, int GROUPS>
FASTPOST_INLINE void multiply_block(const float* a, int64_t lda, const float* b, int64_t ldb,
                                    float* c, int64_t ldc, int64_t depth, bool accumulate) {
  Vector sum[ROWS][GROUPS];
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < GROUPS; ++j) {
      sum[i][j] = accumulate ? *reinterpret_cast<const Vector*>(c + i * ldc + j * kLanes) : Vector{};
    }
  }
  for (int64_t d = 0; d < depth; ++d) {
    Vector right[GROUPS];
#pragma GCC unroll 4
    for (int j = 0; j < GROUPS; ++j) {
      right[j] = *reinterpret_cast<const Vector*>(b + d * ldb + j * kLanes);
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
      const float left = a[i * lda + d];
#pragma GCC unroll 4
      for (int j = 0; j < GROUPS; ++j) sum[i][j] += left * right[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < GROUPS; ++j) {
      *reinterpret_cast<Vector*>(c + i * ldc + j * kLanes) = sum[i][j];
    }
  }
}

template <int ROWS, int GROUPS>
FASTPOST_INLINE void multiply_rows(const float* a, int64_t lda, const float* b, int64_t ldb,
                                   float* c, int64_t ldc, int64_t cols, int64_t depth,
                                   bool accumulate) {
  int64_t j = 0;
  for (; j + GROUPS * kLanes <= cols; j += GROUPS * kLanes) {
    multiply_block<ROWS, GROUPS>(a, lda, b + j, ldb, c + j, ldc, depth, accumulate);
  }
  for (; j < cols; j += kLanes) {
    multiply_block<ROWS, 1>(a, lda, b + j, ldb, c + j, ldc, depth, accumulate);
  }
}

// c[rows, cols] (+)= a[rows, depth] b[depth, cols]; cols is a multiple of 16.
template <class ISA>
FASTPOST_INLINE void multiply(const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                              int64_t ldc, int64_t rows, int64_t cols, int64_t depth,
                              bool accumulate) {
  constexpr int R = ISA::rows, G = ISA::groups;
  int64_t i = 0;
  for (; i + R <= rows; i += R) {
    multiply_rows<R, G>(a + i * lda, lda, b, ldb, c + i * ldc, ldc, cols, depth, accumulate);
  }
  for (; i + R / 3 <= rows; i += R / 3) {
    multiply_rows<R / 3, G>(a + i * lda, lda, b, ldb, c + i * ldc, ldc, cols, depth, accumulate);
  }
  for (; i < rows; ++i) {
    multiply_rows<1, G>(a + i * lda, lda, b, ldb, c + i * ldc, ldc, cols, depth, accumulate);
  }
}

}  // namespace fastpost
