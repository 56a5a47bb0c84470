// Scalar building blocks that the compiler vectorises, and the choice of instruction set at run
// time. Bodies are written once as plain loops over `always_inline` functions; each instruction set
// gets its own copy through a function-level target attribute, so one object file serves every CPU.
#pragma once

#include <cstdint>
#include <cstring>

#include "arguments.h"

#define FASTPOST_EXPORT extern "C" __attribute__((visibility("default")))
#define FASTPOST_INLINE inline __attribute__((always_inline))

#if defined(__x86_64__)
#define FASTPOST_X86 1
#define FASTPOST_AVX512 \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")))
#define FASTPOST_AVX2 __attribute__((target("avx2,fma")))
#else
#define FASTPOST_X86 0
#endif

namespace fastpost {

// `best_simd` ends at avx512: `amx` only lifts a limit; the kernel that has tiles asks for them.
enum class Simd { portable = 0, avx2 = 1, avx512 = 2, amx = 3 };

inline Simd best_simd() {
#if FASTPOST_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return Simd::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Simd::avx2;
#endif
  return Simd::portable;
}

struct bf16 {
  uint16_t bits;
};

FASTPOST_INLINE uint32_t as_bits(float x) {
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  return u;
}

FASTPOST_INLINE float from_bits(uint32_t u) {
  float x;
  std::memcpy(&x, &u, sizeof x);
  return x;
}

FASTPOST_INLINE float load(const float* p) { return *p; }
FASTPOST_INLINE float load(const bf16* p) { return from_bits(uint32_t(p->bits) << 16); }
FASTPOST_INLINE void store(float* p, float x) { *p = x; }

// Round to nearest even. NaNs of arithmetic stay NaNs; only a NaN whose payload is all ones, which no
// operation produces, would carry over.
FASTPOST_INLINE void store(bf16* p, float x) {
  const uint32_t u = as_bits(x);
  p->bits = uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

// e^x to 2 ulp (with FMA) for x <= 88, as 2^n 2^r with n = round(x log2 e) and a degree-5 minimax polynomial of
// 2^r on [-1/2, 1/2]. Below -87 the result stays at 1.2e-38; NaN in gives NaN out. Adding 1.5 * 2^23
// rounds, and leaves n in the low bits, so no conversion (undefined for NaN) is needed.
FASTPOST_INLINE float exp_approx(float x) {
  const float magic = 12582912.0f, log2e = 1.44269504088896341f;
  const float clamped = x < -87.0f ? -87.0f : x;
  const float shifted = clamped * log2e + magic;
  float r = clamped * log2e - (shifted - magic);
  r = r + clamped * 1.92596303e-8f;  // what log2(e) loses in fp32
  float p = 1.3276471496e-3f;
  p = p * r + 9.6755413535e-3f;
  p = p * r + 5.5507132752e-2f;
  p = p * r + 2.4022119724e-1f;
  p = p * r + 6.9314696706e-1f;
  p = p * r + 1.0f;
  return from_bits(as_bits(p) + (as_bits(shifted) << 23));
}

// 2^x for -125 <= x <= 127, to 3e-6: a thousandth of the rounding to 16 bits that follows. NaN in
// gives NaN out. As above, with a polynomial of degree 4.
FASTPOST_INLINE float exp2_short(float x) {
  const float magic = 12582912.0f;
  const float shifted = x + magic;
  const float r = x - (shifted - magic);
  float p = 9.5701022074e-03f;
  p = p * r + 5.5917859077e-02f;
  p = p * r + 2.4024744332e-01f;
  p = p * r + 6.9312179089e-01f;
  p = p * r + 9.9999928474e-01f;
  return from_bits(as_bits(p) + (as_bits(shifted) << 23));
}

// Two neighbouring 16-bit elements as the halves of one word.
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the low half is the first element");

FASTPOST_INLINE uint32_t load_word(const bf16* p) {
  uint32_t word;
  std::memcpy(&word, p, sizeof word);
  return word;
}

FASTPOST_INLINE void store_word(bf16* p, uint32_t word) { std::memcpy(p, &word, sizeof word); }
FASTPOST_INLINE float low_half(uint32_t word) { return from_bits(word << 16); }
FASTPOST_INLINE float high_half(uint32_t word) { return from_bits(word & 0xffff0000u); }

// Both rounded to nearest, ties away from zero: three instructions less than to even, for results
// that sit on a tie once in 65,536 times.
FASTPOST_INLINE uint32_t round_halves(float low, float high) {
  return ((as_bits(low) + 0x8000u) >> 16) | ((as_bits(high) + 0x8000u) & 0xffff0000u);
}

// tanh(x) and 1 - tanh(x)^2. From u = e^(-2|x|): the slope 4u/(1+u)^2 never cancels; the value does
// below 0.3, where its Taylor series to x^11 takes over.
FASTPOST_INLINE void tanh_and_slope(float x, float* value, float* slope) {
  const float a = x < 0.0f ? -x : x;
  const float u = exp_approx(-2.0f * a);
  const float inv = 1.0f / (1.0f + u);
  const float far = (1.0f - u) * inv;
  const float s = x * x;
  float series = -8.863235530e-3f;
  series = series * s + 2.186948854e-2f;
  series = series * s - 5.396825397e-2f;
  series = series * s + 1.333333333e-1f;
  series = series * s - 3.333333333e-1f;
  const float near = x + x * (s * series);
  const float signed_far = x < 0.0f ? -far : far;
  *value = a < 0.3f ? near : signed_far;
  *slope = 4.0f * u * inv * inv;
}

}  // namespace fastpost
