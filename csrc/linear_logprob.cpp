// The three passes over one tile of logits [rows, cols] that linear_logprob needs besides GEMMs:
//   fold       running max / sum-exp / entropy / sum of squares / mean / top-1 statistics per row,
//              optionally overwriting the tile with exp(z - ref) * slope for a second GEMM;
//   gradient   overwrite the tile with d loss / d (h W^T + b);
//   accumulate acc = acc * rescale[row] + part, in fp32.
// Same contract as _vocab_passes_torch.py and _vocab_passes_triton.py, which is where the row
// statistics are defined. Rows are independent: OpenMP splits them, one row stays in one core's L1.
#include <cmath>
#include <limits>
#include <vector>

#include "simd.h"

namespace fastpost {
namespace {

// Rows of the state matrix; keep equal to _vocab_passes.py.
enum State { REF, SUM, XSUM, SQUARES, ZSUM, TOP_SELF, TOP_BEFORE, TOP_AFTER, RESCALE };
// Rows of the coefficient matrix; keep equal to _vocab_passes.py.
enum Coef { LSE, CONST, LINEAR, UNIFORM, TARGET };

// The reference only follows the running maximum when it falls this far behind: exponentials stay
// below e^30, so fp32 sums of squares cannot overflow and accumulators are almost never rescaled.
constexpr float kLag = 30.0f;
constexpr int64_t kBlock = 2048;
constexpr float kMinusInf = -std::numeric_limits<float>::infinity();

struct Tile {
  void* data;
  int64_t stride, rows, cols;
  const int64_t* targets;
  int64_t first_col;
  const float* bias;
  float logit_scale, softcap, inv_temperature;
  float* table;  // state or coefficients, one matrix row per quantity
  int64_t table_stride;
};

// The scalars of a tile as locals: a store to a float tile could alias the struct and would force
// them to be read again in every iteration.
template <bool CAP>
struct Transform {
  float before, after;

  explicit Transform(const Tile& t)
      : before(CAP ? t.logit_scale / t.softcap : t.logit_scale * t.inv_temperature),
        after(t.softcap * t.inv_temperature) {}

  FASTPOST_INLINE void operator()(float y, float* z, float* slope) const {
    if (CAP) {
      float value;
      tanh_and_slope(y * before, &value, slope);
      *z = value * after;
    } else {
      *z = y * before;
      *slope = 1.0f;
    }
  }
};

// A row of logits in fp32 with its bias: separate loops to widen and narrow 16-bit rows are faster
// than conversions inside the arithmetic, and the arithmetic exists once.
template <class T>
FASTPOST_INLINE void widen(const T* row, const float* bias, int64_t n, float* out) {
  if (bias) {
#pragma omp simd simdlen(32)
    for (int64_t j = 0; j < n; ++j) out[j] = load(row + j) + bias[j];
  } else {
#pragma omp simd simdlen(32)
    for (int64_t j = 0; j < n; ++j) out[j] = load(row + j);
  }
}

template <class T>
FASTPOST_INLINE void narrow(const float* in, int64_t n, T* row) {
#pragma omp simd simdlen(32)
  for (int64_t j = 0; j < n; ++j) store(row + j, in[j]);
}

FASTPOST_INLINE float range_max(const float* y, int64_t begin, int64_t end) {
  float best = kMinusInf;
#pragma omp simd simdlen(64) reduction(max : best)
  for (int64_t j = begin; j < end; ++j) best = y[j] > best ? y[j] : best;
  return best;
}

struct Sums {
  double exp = 0, x_exp = 0, squares = 0, z = 0;
};

template <bool CAP, bool MOMENTS, bool STORE>
FASTPOST_INLINE void range_sums(const Transform<CAP> transform, float* y, int64_t begin,
                                int64_t end, float ref, Sums* sums) {
  for (int64_t start = begin; start < end; start += kBlock) {
    const int64_t stop = start + kBlock < end ? start + kBlock : end;
    float s = 0, xs = 0, sq = 0, zs = 0;
#pragma omp simd simdlen(32) reduction(+ : s, xs, sq, zs)
    for (int64_t j = start; j < stop; ++j) {
      float z, slope;
      transform(y[j], &z, &slope);
      const float d = z - ref;
      const float e = exp_approx(d);
      s += e;
      if (MOMENTS) {
        xs += e * (d < -87.0f ? -87.0f : d);
        sq += e * e;
        zs += z;
      }
      if (STORE) y[j] = CAP ? e * slope : e;
    }
    sums->exp += s;
    if (MOMENTS) {
      sums->x_exp += xs;
      sums->squares += sq;
      sums->z += zs;
    }
  }
}

// The target's own column is left out: its logit was computed in fp32 and is the initial state.
template <class T, bool CAP, bool MOMENTS, bool STORE>
FASTPOST_INLINE void fold_row(const Tile& t, int64_t r, float* y) {
  T* row = static_cast<T*>(t.data) + r * t.stride;
  const int64_t local = t.targets[r] - t.first_col;
  const bool inside = local >= 0 && local < t.cols;
  const int64_t before_end = local < 0 ? 0 : (local < t.cols ? local : t.cols);
  const int64_t after_begin = inside ? local + 1 : before_end;
  float* state = t.table + r;
  const int64_t k = t.table_stride;

  widen(row, t.bias, t.cols, y);
  const float before = range_max(y, 0, before_end);
  const float after = range_max(y, after_begin, t.cols);
  if (inside) state[TOP_SELF * k] = y[local];
  if (before > state[TOP_BEFORE * k]) state[TOP_BEFORE * k] = before;
  if (after > state[TOP_AFTER * k]) state[TOP_AFTER * k] = after;

  const Transform<CAP> transform(t);
  float zmax, slope;
  transform(before > after ? before : after, &zmax, &slope);
  const float old_ref = state[REF * k];
  const float ref = zmax - old_ref > kLag ? zmax : old_ref;
  const double rescale = ref == old_ref ? 1.0 : std::exp(double(old_ref) - ref);

  Sums sums;
  range_sums<CAP, MOMENTS, STORE>(transform, y, 0, before_end, ref, &sums);
  range_sums<CAP, MOMENTS, STORE>(transform, y, after_begin, t.cols, ref, &sums);
  if (STORE) {
    if (inside) y[local] = 0.0f;
    narrow(y, t.cols, row);
  }

  const double old_sum = state[SUM * k];
  if (MOMENTS) {
    const double moved = ref == old_ref ? 0.0 : (double(old_ref) - ref) * old_sum;
    state[XSUM * k] = float((state[XSUM * k] + moved) * rescale + sums.x_exp);
    state[SQUARES * k] = float(state[SQUARES * k] * rescale * rescale + sums.squares);
    state[ZSUM * k] = float(state[ZSUM * k] + sums.z);
  }
  state[SUM * k] = float(old_sum * rescale + sums.exp);
  state[REF * k] = ref;
  state[RESCALE * k] = float(rescale);
}

// tile_j = slope_j * (p_j * (CONST + LINEAR * z_j) + UNIFORM), and TARGET at the target's column.
template <class T, bool CAP>
FASTPOST_INLINE void gradient_row(const Tile& t, int64_t r, float* y) {
  T* row = static_cast<T*>(t.data) + r * t.stride;
  const float* coef = t.table + r;
  const int64_t k = t.table_stride, cols = t.cols;
  const float chain = t.logit_scale * t.inv_temperature;
  const float lse = coef[LSE * k];
  const float constant = coef[CONST * k] * chain;
  const float linear = coef[LINEAR * k] * chain;
  const float uniform = coef[UNIFORM * k] * chain;
  const Transform<CAP> transform(t);
  widen(row, t.bias, cols, y);
#pragma omp simd simdlen(32)
  for (int64_t j = 0; j < cols; ++j) {
    float z, slope;
    transform(y[j], &z, &slope);
    const float p = exp_approx(z - lse);
    const float g = p * (constant + linear * z) + uniform;
    y[j] = CAP ? g * slope : g;
  }
  const int64_t local = t.targets[r] - t.first_col;
  if (local >= 0 && local < cols) y[local] = coef[TARGET * k];
  narrow(y, cols, row);
}

struct Accumulate {
  float* acc;
  const bf16* part;
  int64_t cols;
  const float* rescale;
};

FASTPOST_INLINE void accumulate_row(const Accumulate& a, int64_t r) {
  float* acc = a.acc + r * a.cols;
  const bf16* part = a.part + r * a.cols;
  const float factor = a.rescale ? a.rescale[r] : 1.0f;
  const int64_t cols = a.cols;
#pragma omp simd simdlen(32)
  for (int64_t j = 0; j < cols; ++j) acc[j] = acc[j] * factor + load(part + j);
}

// One copy of every row function per instruction set.
#define FASTPOST_ROWS(SUFFIX, TARGET_ATTRIBUTE)                                                 \
  template <class T, bool CAP, bool MOMENTS, bool STORE>                                        \
  TARGET_ATTRIBUTE void fold_##SUFFIX(const Tile& t, int64_t r, float* scratch) {               \
    fold_row<T, CAP, MOMENTS, STORE>(t, r, scratch);                                            \
  }                                                                                             \
  template <class T, bool CAP>                                                                  \
  TARGET_ATTRIBUTE void gradient_##SUFFIX(const Tile& t, int64_t r, float* scratch) {           \
    gradient_row<T, CAP>(t, r, scratch);                                                        \
  }                                                                                             \
  TARGET_ATTRIBUTE void accumulate_##SUFFIX(const Accumulate& a, int64_t r) {                   \
    accumulate_row(a, r);                                                                       \
  }

#define FASTPOST_NO_TARGET
FASTPOST_ROWS(portable, FASTPOST_NO_TARGET)
#if FASTPOST_X86
FASTPOST_ROWS(avx2, FASTPOST_AVX2)
FASTPOST_ROWS(avx512, FASTPOST_AVX512)
#endif

using RowFunction = void (*)(const Tile&, int64_t, float*);

template <class T, bool CAP, bool MOMENTS, bool STORE>
RowFunction fold_function(Simd simd) {
#if FASTPOST_X86
  if (simd == Simd::avx512) return fold_avx512<T, CAP, MOMENTS, STORE>;
  if (simd == Simd::avx2) return fold_avx2<T, CAP, MOMENTS, STORE>;
#endif
  return fold_portable<T, CAP, MOMENTS, STORE>;
}

template <class T, bool CAP>
RowFunction gradient_function(Simd simd) {
#if FASTPOST_X86
  if (simd == Simd::avx512) return gradient_avx512<T, CAP>;
  if (simd == Simd::avx2) return gradient_avx2<T, CAP>;
#endif
  return gradient_portable<T, CAP>;
}

template <class T, bool CAP>
RowFunction choose_fold(Simd simd, bool moments, bool store_exp) {
  if (moments) {
    return store_exp ? fold_function<T, CAP, true, true>(simd)
                     : fold_function<T, CAP, true, false>(simd);
  }
  return store_exp ? fold_function<T, CAP, false, true>(simd)
                   : fold_function<T, CAP, false, false>(simd);
}

template <class T>
RowFunction choose(Simd simd, bool is_fold, bool cap, bool moments, bool store_exp) {
  if (!is_fold) return cap ? gradient_function<T, true>(simd) : gradient_function<T, false>(simd);
  return cap ? choose_fold<T, true>(simd, moments, store_exp)
             : choose_fold<T, false>(simd, moments, store_exp);
}

Simd limited_simd(int limit) {
  const Simd best = best_simd();
  return limit < 0 || limit > int(best) ? best : Simd(limit);
}

}  // namespace
}  // namespace fastpost

using namespace fastpost;

// The instruction set this CPU gets: 0 portable, 1 AVX2, 2 AVX-512.
FASTPOST_EXPORT int fastpost_simd() { return int(best_simd()); }

// `table` is the state [9, rows] (fold) or the coefficients [5, rows] (gradient), fp32, rows
// `table_stride` apart. `bias` is null or the fp32 bias of these columns. `simd_limit` < 0 takes
// the best instruction set.
FASTPOST_EXPORT void fastpost_logit_tile(int is_fold, int is_bf16, void* data, int64_t stride,
                                         int64_t rows, int64_t cols, const int64_t* targets,
                                         int64_t first_col, const float* bias, float logit_scale,
                                         float softcap, float inv_temperature, float* table,
                                         int64_t table_stride, int moments, int store_exp,
                                         int simd_limit, int threads) {
  const Tile tile{data,        stride,  rows,    cols,
                  targets,     first_col, bias,  logit_scale,
                  softcap,     inv_temperature, table, table_stride};
  const Simd simd = limited_simd(simd_limit);
  const bool cap = softcap > 0.0f;
  const RowFunction function =
      is_bf16 ? choose<bf16>(simd, is_fold, cap, moments, store_exp)
              : choose<float>(simd, is_fold, cap, moments, store_exp);
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> scratch(cols);
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; ++r) function(tile, r, scratch.data());
  }
}

// acc[rows, cols] (fp32) = acc * rescale[row] + part (bf16); `rescale` may be null.
FASTPOST_EXPORT void fastpost_accumulate(float* acc, const void* part, int64_t rows, int64_t cols,
                                         const float* rescale, int simd_limit, int threads) {
  const Accumulate a{acc, static_cast<const bf16*>(part), cols, rescale};
  void (*function)(const Accumulate&, int64_t) = accumulate_portable;
#if FASTPOST_X86
  const Simd simd = limited_simd(simd_limit);
  if (simd == Simd::avx512) function = accumulate_avx512;
  if (simd == Simd::avx2) function = accumulate_avx2;
#endif
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; ++r) function(a, r);
}
