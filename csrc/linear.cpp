// Transpose of a 16-bit matrix, for the weight gradient of a linear layer on CPUs.
//
//   d W = dy^T x: the left operand lies transposed in memory. A library GEMM then packs it element by
//   element and runs at less than half of its speed; given a transposed copy it does not. The copy
//   reads and writes dy once.
//
// A step moves 32 rows of 8 columns, so that each row of the result is written as one whole cache
// line: result rows are often a power of two apart and would evict each other half-written.
#include <algorithm>

#include "simd.h"

#if FASTPOST_X86
#include <emmintrin.h>
#endif

namespace fastpost {
namespace {

constexpr int64_t kStepRows = 32, kStepCols = 8;

void transpose_slow(const uint16_t* in, int64_t in_stride, int64_t rows, int64_t cols,
                    uint16_t* out, int64_t out_stride) {
  for (int64_t j = 0; j < cols; ++j) {
    for (int64_t i = 0; i < rows; ++i) out[j * out_stride + i] = in[i * in_stride + j];
  }
}

#if FASTPOST_X86
FASTPOST_INLINE __m128i load8(const uint16_t* p) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
}

// 8 x 8, by three rounds of interleaving: pairs of 16, 32 and 64 bits.
FASTPOST_INLINE void transpose_8x8(const uint16_t* in, int64_t in_stride, uint16_t* out,
                                   int64_t out_stride) {
  __m128i a[8], b[8];
  for (int i = 0; i < 8; ++i) a[i] = load8(in + i * in_stride);
  for (int i = 0; i < 4; ++i) {
    b[i] = _mm_unpacklo_epi16(a[2 * i], a[2 * i + 1]);      // columns 0-3 of rows 2i, 2i + 1
    b[i + 4] = _mm_unpackhi_epi16(a[2 * i], a[2 * i + 1]);  // columns 4-7
  }
  for (int half = 0; half < 2; ++half) {
    const __m128i* p = b + 4 * half;
    const __m128i low = _mm_unpacklo_epi32(p[0], p[1]), high = _mm_unpackhi_epi32(p[0], p[1]);
    const __m128i low2 = _mm_unpacklo_epi32(p[2], p[3]), high2 = _mm_unpackhi_epi32(p[2], p[3]);
    a[4 * half + 0] = _mm_unpacklo_epi64(low, low2);
    a[4 * half + 1] = _mm_unpackhi_epi64(low, low2);
    a[4 * half + 2] = _mm_unpacklo_epi64(high, high2);
    a[4 * half + 3] = _mm_unpackhi_epi64(high, high2);
  }
  for (int j = 0; j < 8; ++j) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + j * out_stride), a[j]);
  }
}
#endif

void transpose_strip(const uint16_t* in, int64_t in_stride, int64_t rows, int64_t cols,
                     uint16_t* out, int64_t out_stride) {
  int64_t j = 0;
#if FASTPOST_X86
  if (rows == kStepRows) {
    for (; j + kStepCols <= cols; j += kStepCols) {
      for (int64_t i = 0; i < kStepRows; i += 8) {
        transpose_8x8(in + i * in_stride + j, in_stride, out + j * out_stride + i, out_stride);
      }
    }
  }
#endif
  transpose_slow(in + j, in_stride, rows, cols - j, out + j * out_stride, out_stride);
}

}  // namespace
}  // namespace fastpost

// out[cols, rows] = in[rows, cols]^T, elements of 16 bits; strides in elements.
FASTPOST_EXPORT void fastpost_transpose_16(const uint16_t* in, int64_t in_stride, int64_t rows,
                                           int64_t cols, uint16_t* out, int64_t out_stride,
                                           int threads) {
  using namespace fastpost;
  const int64_t strips = (rows + kStepRows - 1) / kStepRows;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t s = 0; s < strips; ++s) {
    const int64_t first = s * kStepRows;
    transpose_strip(in + first * in_stride, in_stride, std::min(kStepRows, rows - first), cols,
                    out + first, out_stride);
  }
}
FASTPOST_ARGUMENTS(fastpost_transpose_16)
