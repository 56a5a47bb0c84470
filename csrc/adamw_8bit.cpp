// One step of AdamW over many tensors, states in 8 bits or fp32, weights and gradients in fp32 or
// bf16: each block of 256 elements is read, updated in L1 and written back once. Arithmetic is fp32;
// every block is independent of the others, so results do not depend on the number of threads.
// The 8-bit format is that of `_dynamic_map.py`, the tables are those of `_adamw_8bit_tables.py`.
#include <algorithm>

#include "philox.h"

namespace fastpost {
namespace {

constexpr int64_t kBlock = 256;
constexpr int64_t kAddresses = 6, kSizes = 3;

struct Step {
  const int64_t* addresses;  // [T, 6]: weight, gradient, m, v, absmax of m, absmax of v
  const int64_t* sizes;      // [T, 3]: elements, first block, row of the random words
  const float* factors;      // b1, 1 - b1, b2, 1 - b2, eps, decay, step size, 1 / sqrt(c2)
  const float *signed_levels, *unsigned_levels;  // [256]
  float grad_scale;
  bool is_8bit, stochastic;
  uint64_t key;  // of the random words
};

// Index of the nearest level, see `_code` in `_adamw_8bit_triton.py`. Selects without branches, of
// 32 bits throughout: one vector width.
template <bool is_signed>
FASTPOST_INLINE int32_t nearest_level(float x) {
  float y = __builtin_fabsf(x), e = 6.0f;
  e = y < 1e-4f ? e - 4.0f : e;
  y = y < 1e-4f ? y * 1e4f : y;
  e = y < 1e-2f ? e - 2.0f : e;
  y = y < 1e-2f ? y * 1e2f : y;
  e = y < 1e-1f ? e - 1.0f : e;
  y = y < 1e-1f ? y * 1e1f : y;
  const int32_t exponent = int32_t(e < 0.0f ? 0.0f : e) + (is_signed ? 0 : 1);
  const float cells = from_bits(uint32_t(exponent + 127) << 23);
  const float cell = (y - 0.1f) * (cells * 1.1111111111f);
  const float lowest = is_signed ? 0.1944444444f : 0.1388888889f;
  const float border = e == 0.0f ? lowest : 0.2f;
  float whole = float(int32_t(cell));
  whole = whole < cells - 1.0f ? whole : cells - 1.0f;
  float u = cells + (cell < border ? -1.0f : whole);
  float top = cell >= cells - 0.25f ? 2.0f * cells : u;
  if (is_signed) top = x > 0.0f ? top : u;
  u = e == 6.0f ? top : u;
  if (is_signed) {
    u = e < 0.0f ? 0.0f : u;
    return int32_t(127.0f + (x < 0.0f ? -u : u));
  }
  u = e < 0.0f ? 1.0f : u;
  const float least = x > 0.0f ? 2.0f : 1.0f;
  return int32_t((u < least ? least : u) - 1.0f);
}

FASTPOST_INLINE float greatest(const float* x) {
  float found = 0.0f;
#pragma omp simd reduction(max : found) simdlen(16)
  for (int64_t j = 0; j < kBlock; ++j) {
    const float magnitude = x[j] < 0.0f ? -x[j] : x[j];
    found = magnitude > found ? magnitude : found;
  }
  return found;
}

template <bool is_signed>
FASTPOST_INLINE void encode(const float* x, int64_t n, uint8_t* codes, float* absmax) {
  const float largest = greatest(x);
  *absmax = largest;
  // a block below the normal numbers keeps a smaller quotient
  const float inverse = 1.0f / std::max(largest, 1.1754943508e-38f);
  int32_t wide[kBlock];
#pragma omp simd simdlen(16)
  for (int64_t j = 0; j < kBlock; ++j) wide[j] = nearest_level<is_signed>(x[j] * inverse);
  uint8_t found[kBlock];
  for (int64_t j = 0; j < kBlock; ++j) found[j] = uint8_t(wide[j]);
  std::memcpy(codes, found, n);
}

FASTPOST_INLINE void decode(const uint8_t* codes, int64_t n, const float* levels, float absmax,
                            float* x) {
  uint8_t given[kBlock] = {};
  std::memcpy(given, codes, n);
  int32_t wide[kBlock];
  for (int64_t j = 0; j < kBlock; ++j) wide[j] = given[j];
#pragma omp simd simdlen(16)
  for (int64_t j = 0; j < kBlock; ++j) x[j] = levels[wide[j]] * absmax;
}

FASTPOST_INLINE void store_stochastic(bf16* p, float x, uint32_t word) {
  const uint32_t u = as_bits(x);
  const uint32_t rounded = u + (x == x ? word >> 16 : 0u);
  p->bits = uint16_t(rounded >> 16);
}

FASTPOST_INLINE void store_stochastic(float* p, float x, uint32_t) { *p = x; }

// Block `b` of tensor `t`.
template <class Weight, class Gradient>
FASTPOST_INLINE void update_block(const Step& s, int64_t t, int64_t b) {
  const int64_t *address = s.addresses + t * kAddresses, *size = s.sizes + t * kSizes;
  const float* factor = s.factors;
  const int64_t begin = b * kBlock, n = std::min(kBlock, size[0] - begin);
  Weight* weight = reinterpret_cast<Weight*>(address[0]) + begin;
  const Gradient* gradient = reinterpret_cast<const Gradient*>(address[1]) + begin;
  uint8_t* m_codes = reinterpret_cast<uint8_t*>(address[2]) + begin;
  uint8_t* v_codes = reinterpret_cast<uint8_t*>(address[3]) + begin;
  float* m_absmax = reinterpret_cast<float*>(address[4]) + b;
  float* v_absmax = reinterpret_cast<float*>(address[5]) + b;
  float* m_state = reinterpret_cast<float*>(address[2]) + begin;
  float* v_state = reinterpret_cast<float*>(address[3]) + begin;
  float m[kBlock], v[kBlock];
  if (s.is_8bit) {
    decode(m_codes, n, s.signed_levels, *m_absmax, m);
    decode(v_codes, n, s.unsigned_levels, *v_absmax, v);
  } else {
    std::memcpy(m, m_state, n * sizeof(float));
    std::memcpy(v, v_state, n * sizeof(float));
  }
  for (int64_t j = n; j < kBlock; ++j) m[j] = v[j] = 0.0f;
  uint32_t words[kBlock];
  if (s.stochastic) philox_words(s.key, uint64_t(size[2]), uint32_t(begin / 4), words);
  const float beta1 = factor[0], rest1 = factor[1], beta2 = factor[2], rest2 = factor[3];
  const float eps = factor[4], decay = factor[5], step_size = factor[6], correction = factor[7];
  const float scale = s.grad_scale;
  float updated[kBlock];
#pragma omp simd simdlen(16)
  for (int64_t j = 0; j < n; ++j) {
    const float g = load(gradient + j) * scale;
    m[j] = beta1 * m[j] + rest1 * g;
    v[j] = beta2 * v[j] + rest2 * g * g;
    const float denominator = __builtin_sqrtf(v[j]) * correction + eps;
    updated[j] = load(weight + j) * decay - step_size * (m[j] / denominator);
  }
  if (s.stochastic) {
#pragma omp simd simdlen(16)
    for (int64_t j = 0; j < n; ++j) store_stochastic(weight + j, updated[j], words[j]);
  } else {
#pragma omp simd simdlen(16)
    for (int64_t j = 0; j < n; ++j) store(weight + j, updated[j]);
  }
  if (s.is_8bit) {
    encode<true>(m, n, m_codes, m_absmax);
    encode<false>(v, n, v_codes, v_absmax);
  } else {
    std::memcpy(m_state, m, n * sizeof(float));
    std::memcpy(v_state, v, n * sizeof(float));
  }
}

using Update = void (*)(const Step&, int64_t, int64_t);

template <class Weight, class Gradient>
void update_portable(const Step& s, int64_t t, int64_t b) {
  update_block<Weight, Gradient>(s, t, b);
}

#if FASTPOST_X86
template <class Weight, class Gradient>
FASTPOST_AVX2 void update_avx2(const Step& s, int64_t t, int64_t b) {
  update_block<Weight, Gradient>(s, t, b);
}

template <class Weight, class Gradient>
FASTPOST_AVX512 void update_avx512(const Step& s, int64_t t, int64_t b) {
  update_block<Weight, Gradient>(s, t, b);
}
#endif

template <class Weight, class Gradient>
Update update_for(int simd_limit) {
  const int level = simd_limit < 0 ? int(best_simd()) : std::min(simd_limit, int(best_simd()));
#if FASTPOST_X86
  if (level >= int(Simd::avx512)) return update_avx512<Weight, Gradient>;
  if (level >= int(Simd::avx2)) return update_avx2<Weight, Gradient>;
#endif
  (void)level;
  return update_portable<Weight, Gradient>;
}

}  // namespace
}  // namespace fastpost

using namespace fastpost;

FASTPOST_EXPORT void fastpost_adamw_8bit(int weight_is_bf16, int grad_is_bf16, int is_8bit,
                                         const int64_t* addresses, const int64_t* sizes,
                                         const float* factors, int64_t tensors, int64_t blocks,
                                         const float* signed_levels, const float* unsigned_levels,
                                         float grad_scale, int stochastic, int64_t key,
                                         int simd_limit, int threads) {
  const bool rounds_at_random = stochastic && weight_is_bf16;
  const Step s{addresses,  sizes,        factors,          signed_levels, unsigned_levels,
               grad_scale, is_8bit != 0, rounds_at_random, uint64_t(key)};
  Update update = update_for<float, float>(simd_limit);
  if (weight_is_bf16 && grad_is_bf16) update = update_for<bf16, bf16>(simd_limit);
  if (weight_is_bf16 && !grad_is_bf16) update = update_for<bf16, float>(simd_limit);
  if (!weight_is_bf16 && grad_is_bf16) update = update_for<float, bf16>(simd_limit);
#pragma omp parallel num_threads(threads)
  {
    int64_t t = 0;  // the last tensor whose first block is not after this one
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks; ++block) {
      while (t + 1 < tensors && sizes[(t + 1) * kSizes + 1] <= block) ++t;
      update(s, t, block - sizes[t * kSizes + 1]);
    }
  }
}
FASTPOST_ARGUMENTS(fastpost_adamw_8bit)
