// The element-wise passes of adapted linear layers, one pass over memory each:
//   dropout        y = keep * x / (1 - p), keep drawn from a counter-based generator, never stored;
//   column_scale   y = z * scale + bias per column (DoRA's magnitude over its norm), and its backward
//                  dz = dy * scale, d scale = sum over rows of dy * z.
// Arithmetic is fp32. Every result is independent of the number of threads.
#include <algorithm>
#include <vector>

#include "philox.h"
#include "simd.h"

namespace fastpost {
namespace {

// d scale is summed over at most this many blocks of rows, then over the blocks.
constexpr int64_t kMaxBlocks = 64;
constexpr int64_t kMinBlockRows = 16;
constexpr int64_t kColumns = 256;

struct Dropout {
  const void* x;
  int64_t x_stride, rows, width;
  uint64_t seed;
  uint32_t threshold;  // kept where the word is at least this
  float scale;         // 1 / (1 - p)
  void* out;           // [rows, width], contiguous
};

template <class T>
FASTPOST_INLINE void dropout_row(const Dropout& p, int64_t r) {
  const T* x = static_cast<const T*>(p.x) + r * p.x_stride;
  T* out = static_cast<T*>(p.out) + r * p.width;
  uint32_t words[4 * kPhiloxCounters];
  for (int64_t begin = 0; begin < p.width; begin += 4 * kPhiloxCounters) {
    philox_words(p.seed, uint64_t(r), uint32_t(begin / 4), words);
    const int64_t n = std::min(4 * kPhiloxCounters, p.width - begin);
#pragma omp simd simdlen(32)
    for (int64_t j = 0; j < n; ++j) {
      const float value = load(x + begin + j) * p.scale;
      store(out + begin + j, words[j] >= p.threshold ? value : 0.0f);
    }
  }
}

struct ColumnScale {
  const void *z, *grad;  // [rows, width]; z may be null in a backward without d scale
  int64_t z_stride, grad_stride, rows, width;
  const float *scale, *bias;  // [width]; bias may be null
  void* out;                  // y or dz [rows, width], contiguous; dz may be null
  float* partials;            // [blocks, width] zeros, or null
  int64_t block_rows;
};

template <class T>
FASTPOST_INLINE void column_scale_forward_row(const ColumnScale& p, int64_t r) {
  const T* z = static_cast<const T*>(p.z) + r * p.z_stride;
  T* out = static_cast<T*>(p.out) + r * p.width;
  const float *scale = p.scale, *bias = p.bias;
  if (bias) {
#pragma omp simd simdlen(32)
    for (int64_t j = 0; j < p.width; ++j) store(out + j, load(z + j) * scale[j] + bias[j]);
  } else {
#pragma omp simd simdlen(32)
    for (int64_t j = 0; j < p.width; ++j) store(out + j, load(z + j) * scale[j]);
  }
}

template <class T>
FASTPOST_INLINE void column_scale_backward_row(const ColumnScale& p, int64_t r) {
  const T* grad = static_cast<const T*>(p.grad) + r * p.grad_stride;
  const float* scale = p.scale;
  if (p.partials) {
    const T* z = static_cast<const T*>(p.z) + r * p.z_stride;
    float* sums = p.partials + r / p.block_rows * p.width;
#pragma omp simd simdlen(32)
    for (int64_t j = 0; j < p.width; ++j) sums[j] += load(grad + j) * load(z + j);
  }
  if (p.out) {
    T* out = static_cast<T*>(p.out) + r * p.width;
#pragma omp simd simdlen(32)
    for (int64_t j = 0; j < p.width; ++j) store(out + j, load(grad + j) * scale[j]);
  }
}

FASTPOST_INLINE void sum_blocks(const float* partials, int64_t blocks, int64_t width, int64_t begin,
                                int64_t end, float* out) {
  for (int64_t j = begin; j < end; ++j) out[j] = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    const float* row = partials + b * width;
#pragma omp simd simdlen(16)
    for (int64_t j = begin; j < end; ++j) out[j] += row[j];
  }
}

// One copy of each row body per instruction set and type.
#define FASTPOST_ROW_COPIES(NAME, PARAMS)                                                       \
  template <class T>                                                                            \
  void NAME##_portable(const PARAMS& p, int64_t r) {                                            \
    NAME<T>(p, r);                                                                              \
  }                                                                                             \
  FASTPOST_ROW_X86(NAME, PARAMS)                                                                \
  template <class T>                                                                            \
  void (*NAME##_for(int simd_limit))(const PARAMS&, int64_t) {                                  \
    const int level = simd_limit < 0 ? int(best_simd()) : std::min(simd_limit, int(best_simd())); \
    FASTPOST_ROW_PICK(NAME)                                                                     \
    return NAME##_portable<T>;                                                                  \
  }
#if FASTPOST_X86
#define FASTPOST_ROW_X86(NAME, PARAMS)                            \
  template <class T>                                              \
  FASTPOST_AVX2 void NAME##_avx2(const PARAMS& p, int64_t r) {    \
    NAME<T>(p, r);                                                \
  }                                                               \
  template <class T>                                              \
  FASTPOST_AVX512 void NAME##_avx512(const PARAMS& p, int64_t r) { \
    NAME<T>(p, r);                                                \
  }
#define FASTPOST_ROW_PICK(NAME)                        \
  if (level >= int(Simd::avx512)) return NAME##_avx512<T>; \
  if (level >= int(Simd::avx2)) return NAME##_avx2<T>;
#else
#define FASTPOST_ROW_X86(NAME, PARAMS)
#define FASTPOST_ROW_PICK(NAME) (void)level;
#endif

FASTPOST_ROW_COPIES(dropout_row, Dropout)
FASTPOST_ROW_COPIES(column_scale_forward_row, ColumnScale)
FASTPOST_ROW_COPIES(column_scale_backward_row, ColumnScale)

}  // namespace
}  // namespace fastpost

using namespace fastpost;

FASTPOST_EXPORT void fastpost_dropout(int is_bf16, const void* x, int64_t x_stride, int64_t rows,
                                      int64_t width, int64_t seed, int64_t threshold, float scale,
                                      void* out, int simd_limit, int threads) {
  const Dropout p{x, x_stride, rows, width, uint64_t(seed), uint32_t(threshold), scale, out};
  const auto row = is_bf16 ? dropout_row_for<bf16>(simd_limit) : dropout_row_for<float>(simd_limit);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; ++r) row(p, r);
}
FASTPOST_ARGUMENTS(fastpost_dropout)

FASTPOST_EXPORT void fastpost_column_scale_forward(int is_bf16, const void* z, int64_t z_stride,
                                                   int64_t rows, int64_t width, const float* scale,
                                                   const float* bias, void* out, int simd_limit,
                                                   int threads) {
  const ColumnScale p{z, nullptr, z_stride, 0, rows, width, scale, bias, out, nullptr, 1};
  const auto row = is_bf16 ? column_scale_forward_row_for<bf16>(simd_limit)
                           : column_scale_forward_row_for<float>(simd_limit);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; ++r) row(p, r);
}
FASTPOST_ARGUMENTS(fastpost_column_scale_forward)

// d_z [rows, width] and d_scale [width]; either may be null.
FASTPOST_EXPORT void fastpost_column_scale_backward(int is_bf16, const void* grad,
                                                    int64_t grad_stride, const void* z,
                                                    int64_t z_stride, int64_t rows, int64_t width,
                                                    const float* scale, void* d_z, float* d_scale,
                                                    int simd_limit, int threads) {
  const int64_t block_rows = std::max(kMinBlockRows, (rows + kMaxBlocks - 1) / kMaxBlocks);
  const int64_t blocks = (rows + block_rows - 1) / block_rows;
  std::vector<float> partials(d_scale ? blocks * width : 0);
  const ColumnScale p{z,   grad,    z_stride, grad_stride, rows,
                      width, scale, nullptr,  d_z,         d_scale ? partials.data() : nullptr,
                      block_rows};
  const auto row = is_bf16 ? column_scale_backward_row_for<bf16>(simd_limit)
                           : column_scale_backward_row_for<float>(simd_limit);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t b = 0; b < blocks; ++b) {
    for (int64_t r = b * block_rows; r < std::min(rows, (b + 1) * block_rows); ++r) row(p, r);
  }
  if (!d_scale) return;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t j = 0; j < width; j += kColumns) {
    sum_blocks(partials.data(), blocks, width, j, std::min(width, j + kColumns), d_scale);
  }
}
FASTPOST_ARGUMENTS(fastpost_column_scale_backward)
