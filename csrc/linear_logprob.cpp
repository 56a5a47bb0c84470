// The three passes over one tile of logits [rows, cols] that linear_logprob needs besides GEMMs:
//   fold       running max / sum-exp / entropy / sum of squares / mean / top-1 statistics per row,
//              optionally overwriting the tile with exp(z - ref) * slope for a second GEMM;
//   gradient   overwrite the tile with d loss / d (h W^T + b);
//   accumulate acc = acc * rescale[row] + part, in fp32.
// Same contract as _vocab_passes_torch.py and _vocab_passes_triton.py, which is where the row
// statistics are defined. Rows are independent: OpenMP splits them, one row stays in one core's L1.
#include <cmath>
#include <limits>

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

// z = softcap tanh(logit_scale y / softcap) / temperature and dz/dy without its constant factor. The
// scalars of a tile as locals: a store to a float tile could alias the struct and would force them
// to be read again in every iteration.
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

// What the passes need of one logit; `distance` is z - ref in units of Exponential<T>::kUnit.
struct Term {
  float exp, slope, distance, z;
};

// exp(z - ref) for a tile of T, as precise as what T holds.
template <class T, bool CAP>
struct Exponential;

template <bool CAP>
struct Exponential<float, CAP> {
  static constexpr double kUnit = 1.0;
  Transform<CAP> transform;
  float ref;

  Exponential(const Tile& t, float reference) : transform(t), ref(reference) {}

  FASTPOST_INLINE Term operator()(float y) const {
    Term term;
    transform(y, &term.z, &term.slope);
    const float d = term.z - ref;
    term.distance = d < -87.0f ? -87.0f : d;
    term.exp = exp_approx(d);
    return term;
  }
};

// Works in powers of two: scaling, temperature and log2(e) are one multiplication, ref its addend.
template <bool CAP>
struct Exponential<bf16, CAP> {
  static constexpr double kUnit = 0.693147180559945309;
  Transform<CAP> transform;
  float scale, ref;

  Exponential(const Tile& t, float reference)
      : transform(t),
        scale(1.44269504088896341f * (CAP ? transform.after : transform.before)),
        ref(1.44269504088896341f * reference) {}

  FASTPOST_INLINE Term operator()(float y) const {
    Term term;
    float x = y;
    term.slope = 1.0f;
    if (CAP) tanh_and_slope(y * transform.before, &x, &term.slope);
    term.z = x * (CAP ? transform.after : transform.before);
    const float d = x * scale - ref;
    term.distance = d < -125.0f ? -125.0f : d;
    term.exp = exp2_short(term.distance);
    return term;
  }
};

// In the loops below 16-bit elements go in pairs, as the halves of one word: that needs no
// instruction that moves data across a register.
template <bool BIAS>
FASTPOST_INLINE float biased(float y, const float* bias, int64_t j) {
  return BIAS ? y + bias[j] : y;
}

template <class T, bool BIAS>
FASTPOST_INLINE float range_max(const T* row, const float* bias, int64_t begin, int64_t end) {
  // Four chains: with masks a maximum takes several cycles, and waits for the one before.
  float a = kMinusInf, b = kMinusInf, c = kMinusInf, d = kMinusInf;
  int64_t done = begin;
  if constexpr (sizeof(T) == 2) {
    const int64_t half = begin < end ? (end - begin) / 4 * 2 : 0;
#pragma omp simd simdlen(32) reduction(max : a, b, c, d)
    for (int64_t i = 0; i < half / 2; ++i) {
      const int64_t j = begin + 2 * i, k = j + half;
      const uint32_t near = load_word(row + j), far = load_word(row + k);
      const float p = biased<BIAS>(low_half(near), bias, j);
      const float q = biased<BIAS>(high_half(near), bias, j + 1);
      const float r = biased<BIAS>(low_half(far), bias, k);
      const float s = biased<BIAS>(high_half(far), bias, k + 1);
      a = p > a ? p : a;
      b = q > b ? q : b;
      c = r > c ? r : c;
      d = s > d ? s : d;
    }
    done += 2 * half;
  }
#pragma omp simd simdlen(64) reduction(max : a)
  for (int64_t j = done; j < end; ++j) {
    const float y = biased<BIAS>(load(row + j), bias, j);
    a = y > a ? y : a;
  }
  a = a > b ? a : b;
  c = c > d ? c : d;
  return a > c ? a : c;
}

struct Sums {
  double exp = 0, distance = 0, squares = 0, z = 0;
};

template <class T, bool CAP, bool MOMENTS, bool STORE, bool BIAS>
FASTPOST_INLINE void range_sums(const Exponential<T, CAP> exponential, T* row, const float* bias,
                                int64_t begin, int64_t end, Sums* sums) {
  for (int64_t start = begin; start < end; start += kBlock) {
    const int64_t stop = start + kBlock < end ? start + kBlock : end;
    float s = 0, ds = 0, sq = 0, zs = 0;
    int64_t done = start;
    if constexpr (sizeof(T) == 2) {
      const int64_t pairs = (stop - start) / 2;
#pragma omp simd simdlen(32) reduction(+ : s, ds, sq, zs)
      for (int64_t i = 0; i < pairs; ++i) {
        const int64_t j = start + 2 * i;
        const uint32_t word = load_word(row + j);
        const Term a = exponential(biased<BIAS>(low_half(word), bias, j));
        const Term b = exponential(biased<BIAS>(high_half(word), bias, j + 1));
        s += a.exp + b.exp;
        if (MOMENTS) {
          ds += a.exp * a.distance + b.exp * b.distance;
          sq += a.exp * a.exp + b.exp * b.exp;
          zs += a.z + b.z;
        }
        if (STORE) {
          store_word(row + j, CAP ? round_halves(a.exp * a.slope, b.exp * b.slope)
                                  : round_halves(a.exp, b.exp));
        }
      }
      done += 2 * pairs;
    }
#pragma omp simd simdlen(32) reduction(+ : s, ds, sq, zs)
    for (int64_t j = done; j < stop; ++j) {
      const Term a = exponential(biased<BIAS>(load(row + j), bias, j));
      s += a.exp;
      if (MOMENTS) {
        ds += a.exp * a.distance;
        sq += a.exp * a.exp;
        zs += a.z;
      }
      if (STORE) store(row + j, CAP ? a.exp * a.slope : a.exp);
    }
    sums->exp += s;
    if (MOMENTS) {
      sums->distance += ds;
      sums->squares += sq;
      sums->z += zs;
    }
  }
}

// The target's own column is left out: its logit was computed in fp32 and is the initial state.
template <class T, bool CAP, bool MOMENTS, bool STORE, bool BIAS>
FASTPOST_INLINE void fold_row(const Tile& t, int64_t r) {
  T* row = static_cast<T*>(t.data) + r * t.stride;
  const int64_t local = t.targets[r] - t.first_col;
  const bool inside = local >= 0 && local < t.cols;
  const int64_t before_end = local < 0 ? 0 : (local < t.cols ? local : t.cols);
  const int64_t after_begin = inside ? local + 1 : before_end;
  const int64_t begins[2] = {0, after_begin}, ends[2] = {before_end, t.cols};
  float* state = t.table + r;
  const int64_t k = t.table_stride;

  float top[2];
  for (int side = 0; side < 2; ++side) {
    top[side] = range_max<T, BIAS>(row, t.bias, begins[side], ends[side]);
  }
  if (inside) state[TOP_SELF * k] = biased<BIAS>(load(row + local), t.bias, local);
  if (top[0] > state[TOP_BEFORE * k]) state[TOP_BEFORE * k] = top[0];
  if (top[1] > state[TOP_AFTER * k]) state[TOP_AFTER * k] = top[1];

  float zmax, slope;
  Transform<CAP>{t}(top[0] > top[1] ? top[0] : top[1], &zmax, &slope);
  const float old_ref = state[REF * k];
  const float ref = zmax - old_ref > kLag ? zmax : old_ref;
  const double rescale = ref == old_ref ? 1.0 : std::exp(double(old_ref) - ref);

  Sums sums;
  const Exponential<T, CAP> exponential(t, ref);
  for (int side = 0; side < 2; ++side) {
    range_sums<T, CAP, MOMENTS, STORE, BIAS>(exponential, row, t.bias, begins[side], ends[side],
                                             &sums);
  }
  if (STORE && inside) store(row + local, 0.0f);

  const double old_sum = state[SUM * k];
  if (MOMENTS) {
    const double moved = ref == old_ref ? 0.0 : (double(old_ref) - ref) * old_sum;
    const double distances = sums.distance * Exponential<T, CAP>::kUnit;
    state[XSUM * k] = float((state[XSUM * k] + moved) * rescale + distances);
    state[SQUARES * k] = float(state[SQUARES * k] * rescale * rescale + sums.squares);
    state[ZSUM * k] = float(state[ZSUM * k] + sums.z);
  }
  state[SUM * k] = float(old_sum * rescale + sums.exp);
  state[REF * k] = ref;
  state[RESCALE * k] = float(rescale);
}

template <class T, bool CAP, bool SCALED>
struct Gradient {
  Exponential<T, CAP> probability;
  float constant, linear, uniform;

  FASTPOST_INLINE float operator()(float y) const {
    const Term a = probability(y);
    const float d = SCALED ? a.exp * constant : a.exp * (constant + linear * a.z) + uniform;
    return CAP ? d * a.slope : d;
  }
};

template <class T, bool CAP, bool SCALED, bool BIAS>
FASTPOST_INLINE void row_gradient(const Gradient<T, CAP, SCALED> gradient, T* row,
                                  const float* bias, int64_t cols) {
  int64_t done = 0;
  if constexpr (sizeof(T) == 2) {
    const int64_t pairs = cols / 2;
#pragma omp simd simdlen(32)
    for (int64_t i = 0; i < pairs; ++i) {
      const uint32_t word = load_word(row + 2 * i);
      const float a = gradient(biased<BIAS>(low_half(word), bias, 2 * i));
      const float b = gradient(biased<BIAS>(high_half(word), bias, 2 * i + 1));
      store_word(row + 2 * i, round_halves(a, b));
    }
    done = 2 * pairs;
  }
#pragma omp simd simdlen(32)
  for (int64_t j = done; j < cols; ++j) {
    store(row + j, gradient(biased<BIAS>(load(row + j), bias, j)));
  }
}

// tile_j = slope_j * (p_j * (CONST + LINEAR * z_j) + UNIFORM), and TARGET at the target's column.
template <class T, bool CAP, bool BIAS>
FASTPOST_INLINE void gradient_row(const Tile& t, int64_t r) {
  T* row = static_cast<T*>(t.data) + r * t.stride;
  const float* coef = t.table + r;
  const int64_t k = t.table_stride;
  const float chain = t.logit_scale * t.inv_temperature;
  const float constant = coef[CONST * k] * chain;
  const float linear = coef[LINEAR * k] * chain;
  const float uniform = coef[UNIFORM * k] * chain;
  const Exponential<T, CAP> probability(t, coef[LSE * k]);
  if (linear == 0.0f && uniform == 0.0f) {
    const Gradient<T, CAP, true> gradient{probability, constant, linear, uniform};
    row_gradient<T, CAP, true, BIAS>(gradient, row, t.bias, t.cols);
  } else {
    const Gradient<T, CAP, false> gradient{probability, constant, linear, uniform};
    row_gradient<T, CAP, false, BIAS>(gradient, row, t.bias, t.cols);
  }
  const int64_t local = t.targets[r] - t.first_col;
  if (local >= 0 && local < t.cols) store(row + local, coef[TARGET * k]);
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
  template <class T, bool CAP, bool MOMENTS, bool STORE, bool BIAS>                             \
  TARGET_ATTRIBUTE void fold_##SUFFIX(const Tile& t, int64_t r) {                               \
    fold_row<T, CAP, MOMENTS, STORE, BIAS>(t, r);                                               \
  }                                                                                             \
  template <class T, bool CAP, bool BIAS>                                                       \
  TARGET_ATTRIBUTE void gradient_##SUFFIX(const Tile& t, int64_t r) {                           \
    gradient_row<T, CAP, BIAS>(t, r);                                                           \
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

using RowFunction = void (*)(const Tile&, int64_t);

template <class T, bool CAP, bool MOMENTS, bool STORE, bool BIAS>
RowFunction fold_function(Simd simd) {
#if FASTPOST_X86
  if (simd == Simd::avx512) return fold_avx512<T, CAP, MOMENTS, STORE, BIAS>;
  if (simd == Simd::avx2) return fold_avx2<T, CAP, MOMENTS, STORE, BIAS>;
#endif
  return fold_portable<T, CAP, MOMENTS, STORE, BIAS>;
}

template <class T, bool CAP, bool BIAS>
RowFunction gradient_function(Simd simd) {
#if FASTPOST_X86
  if (simd == Simd::avx512) return gradient_avx512<T, CAP, BIAS>;
  if (simd == Simd::avx2) return gradient_avx2<T, CAP, BIAS>;
#endif
  return gradient_portable<T, CAP, BIAS>;
}

template <class T, bool CAP, bool BIAS>
RowFunction choose_fold(Simd simd, bool moments, bool store_exp) {
  if (moments) {
    return store_exp ? fold_function<T, CAP, true, true, BIAS>(simd)
                     : fold_function<T, CAP, true, false, BIAS>(simd);
  }
  return store_exp ? fold_function<T, CAP, false, true, BIAS>(simd)
                   : fold_function<T, CAP, false, false, BIAS>(simd);
}

template <class T, bool CAP, bool BIAS>
RowFunction choose_pass(Simd simd, bool is_fold, bool moments, bool store_exp) {
  return is_fold ? choose_fold<T, CAP, BIAS>(simd, moments, store_exp)
                 : gradient_function<T, CAP, BIAS>(simd);
}

template <class T>
RowFunction choose(Simd simd, const Tile& t, bool is_fold, bool moments, bool store_exp) {
  if (t.softcap > 0.0f) {
    return t.bias ? choose_pass<T, true, true>(simd, is_fold, moments, store_exp)
                  : choose_pass<T, true, false>(simd, is_fold, moments, store_exp);
  }
  return t.bias ? choose_pass<T, false, true>(simd, is_fold, moments, store_exp)
                : choose_pass<T, false, false>(simd, is_fold, moments, store_exp);
}

Simd limited_simd(int limit) {
  const Simd best = best_simd();
  return limit < 0 || limit > int(best) ? best : Simd(limit);
}

}  // namespace
}  // namespace fastpost

using namespace fastpost;

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
  const RowFunction function = is_bf16 ? choose<bf16>(simd, tile, is_fold, moments, store_exp)
                                       : choose<float>(simd, tile, is_fold, moments, store_exp);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; ++r) function(tile, r);
}
FASTPOST_ARGUMENTS(fastpost_logit_tile)

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
FASTPOST_ARGUMENTS(fastpost_accumulate)
