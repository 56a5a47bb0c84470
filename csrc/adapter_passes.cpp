// The element-wise passes of adapted linear layers, one pass over memory each:
//   dropout        y = keep * x / (1 - p), keep drawn from a counter-based generator, never stored;
//   column_scale   y = z * scale + bias per column (DoRA's magnitude over its norm), and its backward
//                  dz = dy * scale, d scale = sum over rows of dy * z;
//   dora_norms     ‖w + s b A‖ of every row: sqrt(|w|^2 + 2 s (A w).b + s^2 (A A' b).b).
// Arithmetic is fp32. Every result is independent of the number of threads.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "philox.h"
#include "simd.h"

namespace fastpost {
namespace {

// d scale is summed over at most this many blocks of rows, then over the blocks.
constexpr int64_t kMaxBlocks = 64;
constexpr int64_t kMinBlockRows = 16;
constexpr int64_t kColumns = 256;
// Rows whose products are added before a sum is stored: their loads and stores bound the pass.
constexpr int kRowsAtOnce = 4;

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

// kRowsAtOnce rows from r on, of one block, or the one row r.
template <class T, bool four>
FASTPOST_INLINE void column_scale_backward_rows(const ColumnScale& p, int64_t r) {
  constexpr int kRows = four ? kRowsAtOnce : 1;
  const T* grad = static_cast<const T*>(p.grad) + r * p.grad_stride;
  const T* z = p.partials ? static_cast<const T*>(p.z) + r * p.z_stride : nullptr;
  T* out = p.out ? static_cast<T*>(p.out) + r * p.width : nullptr;
  const float* scale = p.scale;
  const int64_t grad_stride = p.grad_stride, z_stride = p.z_stride, width = p.width;
  if (!p.partials) {
    for (int i = 0; i < kRows; ++i) {
#pragma omp simd simdlen(32)
      for (int64_t j = 0; j < width; ++j) {
        store(out + i * width + j, load(grad + i * grad_stride + j) * scale[j]);
      }
    }
    return;
  }
  float* sums = p.partials + r / p.block_rows * width;
  if (p.out) {
#pragma omp simd simdlen(32)
    for (int64_t j = 0; j < width; ++j) {
      float sum = sums[j];
      for (int i = 0; i < kRows; ++i) {
        const float g = load(grad + i * grad_stride + j);
        sum += g * load(z + i * z_stride + j);
        store(out + i * width + j, g * scale[j]);
      }
      sums[j] = sum;
    }
  } else {
#pragma omp simd simdlen(32)
    for (int64_t j = 0; j < width; ++j) {
      float sum = sums[j];
      for (int i = 0; i < kRows; ++i) {
        sum += load(grad + i * grad_stride + j) * load(z + i * z_stride + j);
      }
      sums[j] = sum;
    }
  }
}

template <class T>
FASTPOST_INLINE void column_scale_backward_row(const ColumnScale& p, int64_t r) {
  column_scale_backward_rows<T, false>(p, r);
}

template <class T>
FASTPOST_INLINE void column_scale_backward_four(const ColumnScale& p, int64_t r) {
  column_scale_backward_rows<T, true>(p, r);
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

// Ranks up to this are summed in registers; a library's product serves larger ones.
constexpr int kMaxRank = 64;
constexpr int kLanes = 16;

struct DoraNorms {
  const void* cross;  // [rows, rank] w A'
  const float *b, *gram, *squares;  // [rows, rank], [rank, padded], [rows]
  int64_t rows, rank, padded;
  float scale, cancellation;
  float* out;  // [rows]
};

// Rows r to r + kRowsAtOnce of the matrix; those past its end are the last one again.
template <class T>
FASTPOST_INLINE void dora_norms_rows(const DoraNorms& p, int64_t r) {
  float b[kRowsAtOnce][kMaxRank] = {}, cross[kRowsAtOnce][kLanes] = {};
  float quadratic[kRowsAtOnce][kLanes] = {};
  for (int i = 0; i < kRowsAtOnce; ++i) {
    const int64_t row = std::min(r + i, p.rows - 1);
    std::memcpy(b[i], p.b + row * p.rank, p.rank * sizeof(float));
    const T* products = static_cast<const T*>(p.cross) + row * p.rank;
    int64_t k = 0;
    for (; k + kLanes <= p.rank; k += kLanes) {
#pragma omp simd simdlen(16)
      for (int j = 0; j < kLanes; ++j) cross[i][j] += load(products + k + j) * b[i][k + j];
    }
    for (; k < p.rank; ++k) cross[i][k % kLanes] += load(products + k) * b[i][k];
  }
  for (int64_t k = 0; k < p.padded; k += kLanes) {
    float sums[kRowsAtOnce][kLanes] = {};
    for (int64_t l = 0; l < p.rank; ++l) {
      const float* gram = p.gram + l * p.padded + k;
      for (int i = 0; i < kRowsAtOnce; ++i) {
#pragma omp simd simdlen(16)
        for (int j = 0; j < kLanes; ++j) sums[i][j] += b[i][l] * gram[j];
      }
    }
    for (int i = 0; i < kRowsAtOnce; ++i) {
#pragma omp simd simdlen(16)
      for (int j = 0; j < kLanes; ++j) quadratic[i][j] += sums[i][j] * b[i][k + j];
    }
  }
  for (int i = 0; i < kRowsAtOnce; ++i) {
    float linear = 0, square = 0;
    for (int j = 0; j < kLanes; ++j) linear += cross[i][j], square += quadratic[i][j];
    const int64_t row = std::min(r + i, p.rows - 1);
    const float terms = p.squares[row] + p.scale * p.scale * square;
    const float found = terms + 2 * p.scale * linear;
    p.out[row] = found < p.cancellation * terms ? -1.0f : std::sqrt(found);
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
FASTPOST_ROW_COPIES(column_scale_backward_four, ColumnScale)
FASTPOST_ROW_COPIES(dora_norms_rows, DoraNorms)

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

namespace {

// With a norm [width], `scale` is a magnitude that is divided by it; one of zero counts as this: what
// was multiplied by zero could not be found again.
constexpr float kLeastMagnitude = 1e-30f;

FASTPOST_INLINE float off_zero(float x) { return x == 0.0f ? kLeastMagnitude : x; }

std::vector<float> ratios(const float* magnitude, const float* norm, int64_t width) {
  std::vector<float> found(norm ? width : 0);
  for (int64_t j = 0; j < int64_t(found.size()); ++j) found[j] = off_zero(magnitude[j]) / norm[j];
  return found;
}

}  // namespace

FASTPOST_EXPORT void fastpost_column_scale_forward(int is_bf16, const void* z, int64_t z_stride,
                                                   int64_t rows, int64_t width, const float* scale,
                                                   const float* norm, const float* bias, void* out,
                                                   int simd_limit, int threads) {
  const std::vector<float> column = ratios(scale, norm, width);
  const float* by = norm ? column.data() : scale;
  const ColumnScale p{z, nullptr, z_stride, 0, rows, width, by, bias, out, nullptr, 1};
  const auto row = is_bf16 ? column_scale_forward_row_for<bf16>(simd_limit)
                           : column_scale_forward_row_for<float>(simd_limit);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; ++r) row(p, r);
}
FASTPOST_ARGUMENTS(fastpost_column_scale_forward)

// d_z [rows, width] and d_scale [width]; either may be null. With a norm, z is what it was scaled to,
// and d_scale is that of the magnitude.
FASTPOST_EXPORT void fastpost_column_scale_backward(int is_bf16, const void* grad,
                                                    int64_t grad_stride, const void* z,
                                                    int64_t z_stride, int64_t rows, int64_t width,
                                                    const float* scale, const float* norm, void* d_z,
                                                    float* d_scale, int simd_limit, int threads) {
  const int64_t block_rows = std::max(kMinBlockRows, (rows + kMaxBlocks - 1) / kMaxBlocks);
  const int64_t blocks = (rows + block_rows - 1) / block_rows;
  std::vector<float> partials(d_scale ? blocks * width : 0);
  const std::vector<float> column = ratios(scale, norm, width);
  const float* by = norm ? column.data() : scale;
  const ColumnScale p{z,     grad, z_stride, grad_stride, rows,
                      width, by,   nullptr,  d_z,         d_scale ? partials.data() : nullptr,
                      block_rows};
  const auto row = is_bf16 ? column_scale_backward_row_for<bf16>(simd_limit)
                           : column_scale_backward_row_for<float>(simd_limit);
  const auto four = is_bf16 ? column_scale_backward_four_for<bf16>(simd_limit)
                            : column_scale_backward_four_for<float>(simd_limit);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t end = std::min(rows, (b + 1) * block_rows);
    int64_t r = b * block_rows;
    for (; r + kRowsAtOnce <= end; r += kRowsAtOnce) four(p, r);
    for (; r < end; ++r) row(p, r);
  }
  if (!d_scale) return;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t j = 0; j < width; j += kColumns) {
    sum_blocks(partials.data(), blocks, width, j, std::min(width, j + kColumns), d_scale);
  }
  for (int64_t j = 0; norm && j < width; ++j) d_scale[j] /= off_zero(scale[j]);
}
FASTPOST_ARGUMENTS(fastpost_column_scale_backward)

// out [rows], -1 where a norm^2 is below `cancellation` of its positive terms. rank <= 64.
FASTPOST_EXPORT void fastpost_dora_norms(int is_bf16, const void* cross, const float* b,
                                         const float* gram, const float* squares, int64_t rows,
                                         int64_t rank, float scale, float cancellation, float* out,
                                         int simd_limit, int threads) {
  const int64_t padded = (rank + kLanes - 1) / kLanes * kLanes;
  std::vector<float> wide(rank * padded);
  for (int64_t k = 0; k < rank; ++k) std::copy_n(gram + k * rank, rank, wide.data() + k * padded);
  const DoraNorms p{cross, b, wide.data(), squares, rows, rank, padded, scale, cancellation, out};
  const auto some = is_bf16 ? dora_norms_rows_for<bf16>(simd_limit)
                            : dora_norms_rows_for<float>(simd_limit);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; r += kRowsAtOnce) some(p, r);
}
FASTPOST_ARGUMENTS(fastpost_dora_norms)
