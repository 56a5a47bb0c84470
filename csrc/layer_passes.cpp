// The element-wise chains of a transformer layer, one pass over memory each:
//   rms_norm   y = round(x * rstd) * weight,  rstd = 1 / sqrt(mean(x^2) + eps), and its backward;
//   swiglu     y = round(silu(gate)) * up, and its backward from gate and up alone.
// Arithmetic is fp32; `round` is to the tensors' type, where transformers rounds too. A row (or a
// block of one) is widened into L1, worked on there and narrowed, so memory is read and written
// once. Every result is independent of the number of threads.
#include <cmath>
#include <vector>

#include "simd.h"

namespace fastpost {
namespace {

// Gradients of `weight` are summed over at most this many blocks of rows, then over the blocks.
constexpr int64_t kMaxBlocks = 128;
constexpr int64_t kMinBlockRows = 16;
// Elements of a swiglu row that are in L1 together; columns that one thread sums over the blocks.
constexpr int64_t kBlock = 1024;
constexpr int64_t kColumns = 256;

template <class T>
FASTPOST_INLINE void widen(const T* in, int64_t n, float* out) {
#pragma omp simd simdlen(32)
  for (int64_t j = 0; j < n; ++j) out[j] = load(in + j);
}

template <class T>
FASTPOST_INLINE void narrow(const float* in, int64_t n, T* out) {
#pragma omp simd simdlen(32)
  for (int64_t j = 0; j < n; ++j) store(out + j, in[j]);
}

// The value that T would hold, in fp32.
template <class T>
FASTPOST_INLINE float rounded(float x);
template <>
FASTPOST_INLINE float rounded<float>(float x) {
  return x;
}
template <>
FASTPOST_INLINE float rounded<bf16>(float x) {
  const uint32_t u = as_bits(x);
  return from_bits((u + 0x7fffu + ((u >> 16) & 1u)) & 0xffff0000u);
}

struct RmsNorm {
  const void *x, *grad;  // [rows, width], rows apart by their stride; grad only backward
  int64_t x_stride, grad_stride, rows, width;
  const float* weight;  // [width], widened
  float eps;
  void* out;        // y or dx [rows, width], contiguous; dx may be null
  float* rstd;      // [rows]
  float* partials;  // [blocks, width], zeros, or null
  int64_t block_rows;
};

template <class T>
FASTPOST_INLINE void rms_norm_forward_row(const RmsNorm& p, int64_t r, float* scratch) {
  const int64_t n = p.width;
  const float* weight = p.weight;
  widen(static_cast<const T*>(p.x) + r * p.x_stride, n, scratch);
  float squares = 0;
#pragma omp simd simdlen(64) reduction(+ : squares)
  for (int64_t j = 0; j < n; ++j) squares += scratch[j] * scratch[j];
  const float rstd = 1.0f / std::sqrt(squares / float(n) + p.eps);
#pragma omp simd simdlen(32)
  for (int64_t j = 0; j < n; ++j) scratch[j] = rounded<T>(scratch[j] * rstd) * weight[j];
  narrow(scratch, n, static_cast<T*>(p.out) + r * n);
  p.rstd[r] = rstd;
}

// dx = rstd (g - x rstd^2 mean(g x)) with g = grad * weight; d weight += grad x rstd.
template <class T>
FASTPOST_INLINE void rms_norm_backward_row(const RmsNorm& p, int64_t r, float* scratch) {
  const int64_t n = p.width;
  const float* weight = p.weight;
  const float rstd = p.rstd[r];
  float *x = scratch, *g = scratch + n;
  widen(static_cast<const T*>(p.x) + r * p.x_stride, n, x);
  widen(static_cast<const T*>(p.grad) + r * p.grad_stride, n, g);
#pragma omp simd simdlen(32)
  for (int64_t j = 0; j < n; ++j) x[j] *= rstd;
  if (p.partials) {
    float* sums = p.partials + r / p.block_rows * n;
#pragma omp simd simdlen(32)
    for (int64_t j = 0; j < n; ++j) sums[j] += g[j] * x[j];
  }
  if (!p.out) return;
  float dot = 0;
#pragma omp simd simdlen(64) reduction(+ : dot)
  for (int64_t j = 0; j < n; ++j) {
    g[j] *= weight[j];
    dot += g[j] * x[j];
  }
  const float mean = dot / float(n);
#pragma omp simd simdlen(32)
  for (int64_t j = 0; j < n; ++j) g[j] = rstd * (g[j] - x[j] * mean);
  narrow(g, n, static_cast<T*>(p.out) + r * n);
}

template <class T>
FASTPOST_INLINE void sum_blocks(const float* partials, int64_t blocks, int64_t width,
                                int64_t begin, int64_t end, T* out) {
  float sums[kColumns] = {0};
  for (int64_t b = 0; b < blocks; ++b) {
    const float* row = partials + b * width + begin;
#pragma omp simd simdlen(32)
    for (int64_t j = 0; j < end - begin; ++j) sums[j] += row[j];
  }
  narrow(sums, end - begin, out + begin);
}

struct Swiglu {
  const void *gate, *up, *grad;  // [rows, width], grad only backward
  int64_t gate_stride, up_stride, grad_stride, width;
  void *out, *d_gate, *d_up;  // [rows, width], contiguous; either gradient may be null
};

// sigma(x) and 1 - sigma(x). Below -88, where e^-x leaves fp32, sigma is 0; above 87, where
// exp_approx stays at e^-87, its complement is, for x times it must vanish. NaN gives NaN.
FASTPOST_INLINE void sigmoid(float x, float* value, float* complement) {
  const float e = exp_approx(x < -88.0f ? 88.0f : -x);
  const float inverse = 1.0f / (1.0f + e);
  *value = x < -88.0f ? 0.0f : inverse;
  *complement = x > 87.0f ? 0.0f : e * inverse;
}

template <class T>
FASTPOST_INLINE void swiglu_forward_row(const Swiglu& p, int64_t r) {
  const T* gate = static_cast<const T*>(p.gate) + r * p.gate_stride;
  const T* up = static_cast<const T*>(p.up) + r * p.up_stride;
  T* out = static_cast<T*>(p.out) + r * p.width;
  float g[kBlock], u[kBlock];
  for (int64_t start = 0; start < p.width; start += kBlock) {
    const int64_t n = p.width - start < kBlock ? p.width - start : kBlock;
    widen(gate + start, n, g);
    widen(up + start, n, u);
#pragma omp simd simdlen(32)
    for (int64_t j = 0; j < n; ++j) {
      float s, complement;
      sigmoid(g[j], &s, &complement);
      u[j] *= rounded<T>(g[j] * s);
    }
    narrow(u, n, out + start);
  }
}

// d up = grad silu(gate);  d gate = grad up sigma (1 + gate (1 - sigma)).
template <class T>
FASTPOST_INLINE void swiglu_backward_row(const Swiglu& p, int64_t r) {
  const T* gate = static_cast<const T*>(p.gate) + r * p.gate_stride;
  const T* up = static_cast<const T*>(p.up) + r * p.up_stride;
  const T* grad = static_cast<const T*>(p.grad) + r * p.grad_stride;
  float g[kBlock], u[kBlock], dy[kBlock];
  for (int64_t start = 0; start < p.width; start += kBlock) {
    const int64_t n = p.width - start < kBlock ? p.width - start : kBlock;
    widen(gate + start, n, g);
    widen(up + start, n, u);
    widen(grad + start, n, dy);
#pragma omp simd simdlen(32)
    for (int64_t j = 0; j < n; ++j) {
      float s, complement;
      sigmoid(g[j], &s, &complement);
      const float d_gate = dy[j] * u[j] * (s * (1.0f + g[j] * complement));
      dy[j] *= g[j] * s;
      g[j] = d_gate;
    }
    if (p.d_gate) narrow(g, n, static_cast<T*>(p.d_gate) + r * p.width + start);
    if (p.d_up) narrow(dy, n, static_cast<T*>(p.d_up) + r * p.width + start);
  }
}

// One copy of every row function per instruction set.
#define FASTPOST_LAYER_ROWS(SUFFIX, TARGET_ATTRIBUTE)                                              \
  template <class T>                                                                               \
  TARGET_ATTRIBUTE void norm_forward_##SUFFIX(const RmsNorm& p, int64_t r, float* scratch) {       \
    rms_norm_forward_row<T>(p, r, scratch);                                                        \
  }                                                                                                \
  template <class T>                                                                               \
  TARGET_ATTRIBUTE void norm_backward_##SUFFIX(const RmsNorm& p, int64_t r, float* scratch) {      \
    rms_norm_backward_row<T>(p, r, scratch);                                                       \
  }                                                                                                \
  template <class T>                                                                               \
  TARGET_ATTRIBUTE void swiglu_forward_##SUFFIX(const Swiglu& p, int64_t r) {                      \
    swiglu_forward_row<T>(p, r);                                                                   \
  }                                                                                                \
  template <class T>                                                                               \
  TARGET_ATTRIBUTE void swiglu_backward_##SUFFIX(const Swiglu& p, int64_t r) {                     \
    swiglu_backward_row<T>(p, r);                                                                  \
  }

#define FASTPOST_NO_TARGET
FASTPOST_LAYER_ROWS(portable, FASTPOST_NO_TARGET)
#if FASTPOST_X86
FASTPOST_LAYER_ROWS(avx2, FASTPOST_AVX2)
FASTPOST_LAYER_ROWS(avx512, FASTPOST_AVX512)
#endif

template <class T>
struct Functions {
  void (*norm_forward)(const RmsNorm&, int64_t, float*) = norm_forward_portable<T>;
  void (*norm_backward)(const RmsNorm&, int64_t, float*) = norm_backward_portable<T>;
  void (*swiglu_forward)(const Swiglu&, int64_t) = swiglu_forward_portable<T>;
  void (*swiglu_backward)(const Swiglu&, int64_t) = swiglu_backward_portable<T>;

  explicit Functions(int simd_limit) {
#if FASTPOST_X86
    const Simd best = best_simd();
    const Simd simd = simd_limit < 0 || simd_limit > int(best) ? best : Simd(simd_limit);
    if (simd == Simd::avx512) {
      norm_forward = norm_forward_avx512<T>;
      norm_backward = norm_backward_avx512<T>;
      swiglu_forward = swiglu_forward_avx512<T>;
      swiglu_backward = swiglu_backward_avx512<T>;
    } else if (simd == Simd::avx2) {
      norm_forward = norm_forward_avx2<T>;
      norm_backward = norm_backward_avx2<T>;
      swiglu_forward = swiglu_forward_avx2<T>;
      swiglu_backward = swiglu_backward_avx2<T>;
    }
#else
    (void)simd_limit;
#endif
  }
};

template <class T>
std::vector<float> widened_weight(const void* weight, int64_t width) {
  std::vector<float> wide(width);
  widen(static_cast<const T*>(weight), width, wide.data());
  return wide;
}

template <class T>
void rms_norm_forward(RmsNorm p, const void* weight, int simd_limit, int threads) {
  const std::vector<float> wide = widened_weight<T>(weight, p.width);
  p.weight = wide.data();
  const Functions<T> functions(simd_limit);
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> scratch(p.width);
#pragma omp for schedule(static)
    for (int64_t r = 0; r < p.rows; ++r) functions.norm_forward(p, r, scratch.data());
  }
}

template <class T>
void rms_norm_backward(RmsNorm p, const void* weight, void* d_weight, int simd_limit,
                       int threads) {
  const std::vector<float> wide = widened_weight<T>(weight, p.width);
  p.weight = wide.data();
  const int64_t even = (p.rows + kMaxBlocks - 1) / kMaxBlocks;
  p.block_rows = even < kMinBlockRows ? kMinBlockRows : even;
  const int64_t blocks = (p.rows + p.block_rows - 1) / p.block_rows;
  std::vector<float> partials(d_weight ? blocks * p.width : 0);
  p.partials = d_weight ? partials.data() : nullptr;
  const Functions<T> functions(simd_limit);
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> scratch(2 * p.width);
#pragma omp for schedule(static)
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t begin = b * p.block_rows;
      const int64_t end = begin + p.block_rows < p.rows ? begin + p.block_rows : p.rows;
      for (int64_t r = begin; r < end; ++r) functions.norm_backward(p, r, scratch.data());
    }
    if (d_weight) {
#pragma omp for schedule(static)
      for (int64_t begin = 0; begin < p.width; begin += kColumns) {
        const int64_t end = begin + kColumns < p.width ? begin + kColumns : p.width;
        sum_blocks(p.partials, blocks, p.width, begin, end, static_cast<T*>(d_weight));
      }
    }
  }
}

}  // namespace
}  // namespace fastpost

using namespace fastpost;

// y [rows, width] and rstd [rows] (fp32) of x, whose rows lie x_stride elements apart.
// `simd_limit` < 0 takes the best instruction set.
FASTPOST_EXPORT void fastpost_rms_norm_forward(int is_bf16, const void* x, int64_t x_stride,
                                               int64_t rows, int64_t width, const void* weight,
                                               float eps, void* y, float* rstd, int simd_limit,
                                               int threads) {
  RmsNorm p{};
  p.x = x, p.x_stride = x_stride, p.rows = rows, p.width = width;
  p.eps = eps, p.out = y, p.rstd = rstd;
  is_bf16 ? rms_norm_forward<bf16>(p, weight, simd_limit, threads)
          : rms_norm_forward<float>(p, weight, simd_limit, threads);
}
FASTPOST_ARGUMENTS(fastpost_rms_norm_forward)

// dx [rows, width] and d_weight [width]; either may be null.
FASTPOST_EXPORT void fastpost_rms_norm_backward(int is_bf16, const void* grad, int64_t grad_stride,
                                                const void* x, int64_t x_stride, int64_t rows,
                                                int64_t width, const void* weight,
                                                const float* rstd, void* dx, void* d_weight,
                                                int simd_limit, int threads) {
  RmsNorm p{};
  p.x = x, p.x_stride = x_stride, p.grad = grad, p.grad_stride = grad_stride;
  p.rows = rows, p.width = width, p.out = dx, p.rstd = const_cast<float*>(rstd);
  is_bf16 ? rms_norm_backward<bf16>(p, weight, d_weight, simd_limit, threads)
          : rms_norm_backward<float>(p, weight, d_weight, simd_limit, threads);
}
FASTPOST_ARGUMENTS(fastpost_rms_norm_backward)

// out [rows, width] = silu(gate) * up.
FASTPOST_EXPORT void fastpost_swiglu_forward(int is_bf16, const void* gate, int64_t gate_stride,
                                             const void* up, int64_t up_stride, int64_t rows,
                                             int64_t width, void* out, int simd_limit,
                                             int threads) {
  Swiglu p{};
  p.gate = gate, p.gate_stride = gate_stride, p.up = up, p.up_stride = up_stride;
  p.width = width, p.out = out;
  const auto function = is_bf16 ? Functions<bf16>(simd_limit).swiglu_forward
                                : Functions<float>(simd_limit).swiglu_forward;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; ++r) function(p, r);
}
FASTPOST_ARGUMENTS(fastpost_swiglu_forward)

// d_gate and d_up [rows, width]; either may be null.
FASTPOST_EXPORT void fastpost_swiglu_backward(int is_bf16, const void* grad, int64_t grad_stride,
                                              const void* gate, int64_t gate_stride,
                                              const void* up, int64_t up_stride, int64_t rows,
                                              int64_t width, void* d_gate, void* d_up,
                                              int simd_limit, int threads) {
  Swiglu p{};
  p.gate = gate, p.gate_stride = gate_stride, p.up = up, p.up_stride = up_stride;
  p.grad = grad, p.grad_stride = grad_stride, p.width = width;
  p.d_gate = d_gate, p.d_up = d_up;
  const auto function = is_bf16 ? Functions<bf16>(simd_limit).swiglu_backward
                                : Functions<float>(simd_limit).swiglu_backward;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; ++r) function(p, r);
}
FASTPOST_ARGUMENTS(fastpost_swiglu_backward)
