// Unpacks 4-bit NormalFloat weights: value = level[nibble] * absmax[block], in fp32, rounded once.
//
// A call unpacks `runs` runs of `length` elements, run r from element first + r * stride: whole rows
// of the weight, or some of its columns. Runs begin at even elements, that is, at whole bytes.
// Two nibbles of a byte are neighbours, the first in the high half; so the two 16-bit results of a
// byte are one 32-bit store.
#include <algorithm>

#include "simd.h"

#if FASTPOST_X86
#include <immintrin.h>
#endif

namespace fastpost {
namespace {

constexpr int64_t kPiece = 4096;  // elements that one thread unpacks at a time

constexpr int64_t kNested = 256;  // blocks that share a nested absmax

struct Unpack {
  const uint8_t* packed;
  const float* absmax;    // of every block, or null:
  const uint8_t* coded;   // code[coded[block]] * nested[block / kNested] + offset
  const float *nested, *code, *offset, *levels;
  int64_t block_size;
  void* out;
};

FASTPOST_INLINE float absmax_of(const Unpack& p, int64_t block) {
  if (p.absmax) return p.absmax[block];
  const volatile float scaled = p.code[p.coded[block]] * p.nested[block / kNested];  // no FMA
  return scaled + *p.offset;
}

// Elements [first, first + n) of one block, first even; n may be odd at the very end.
template <class T>
FASTPOST_INLINE void unpack_slow(const uint8_t* bytes, int64_t n, float absmax,
                                 const float* levels, T* out) {
  for (int64_t i = 0; i < n / 2; ++i) {
    store(out + 2 * i, levels[bytes[i] >> 4] * absmax);
    store(out + 2 * i + 1, levels[bytes[i] & 15] * absmax);
  }
  if (n % 2) store(out + n - 1, levels[bytes[n / 2] >> 4] * absmax);
}

struct Portable {
  template <class T>
  static FASTPOST_INLINE void unpack(const uint8_t* bytes, int64_t n, float absmax,
                                     const float* levels, T* out) {
    unpack_slow(bytes, n, absmax, levels, out);
  }
};

#if FASTPOST_X86
struct Avx512 {
  FASTPOST_AVX512 static inline __m512i rounded(__m512 x) {
    const __m512i u = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  }

  FASTPOST_AVX512 static inline void write(__m512 first, __m512 second, float* out) {
    const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    _mm512_storeu_ps(out, _mm512_permutex2var_ps(first, low, second));
    _mm512_storeu_ps(out + 16, _mm512_permutex2var_ps(first, high, second));
  }

  // The 16 values of a block, rounded, are looked up as 16-bit words: 32 elements at a time.
  FASTPOST_AVX512 static inline void unpack(const uint8_t* bytes, int64_t n, float absmax,
                                     const float* levels, bf16* out) {
    const __m512 values = _mm512_mul_ps(_mm512_loadu_ps(levels), _mm512_set1_ps(absmax));
    const __m256i words = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded(values), 16));
    // twice: permutexvar reads five bits of an index, of which the highest is another nibble's
    const __m512i table = _mm512_inserti64x4(_mm512_castsi256_si512(words), words, 1);
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
      const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + i / 2));
      const __m512i wide = _mm512_cvtepu8_epi32(raw);
      const __m512i index =
          _mm512_or_si512(_mm512_srli_epi32(wide, 4), _mm512_slli_epi32(wide, 16));
      _mm512_storeu_si512(out + i, _mm512_permutexvar_epi16(index, table));
    }
    unpack_slow(bytes + i / 2, n - i, absmax, levels, out + i);
  }

  FASTPOST_AVX512 static inline void unpack(const uint8_t* bytes, int64_t n, float absmax,
                                     const float* levels, float* out) {
    const __m512 table = _mm512_mul_ps(_mm512_loadu_ps(levels), _mm512_set1_ps(absmax));
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
      const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + i / 2));
      const __m512i wide = _mm512_cvtepu8_epi32(raw);
      // permutexvar reads the low four bits of an index
      write(_mm512_permutexvar_ps(_mm512_srli_epi32(wide, 4), table),
            _mm512_permutexvar_ps(wide, table), out + i);
    }
    unpack_slow(bytes + i / 2, n - i, absmax, levels, out + i);
  }
};

struct Avx2 {
  FASTPOST_AVX2 static inline __m256 look_up(__m256i index, __m256 low, __m256 high) {
    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));  // bit 3 as the sign
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index),
                            _mm256_permutevar8x32_ps(high, index), upper);
  }

  FASTPOST_AVX2 static inline __m256i rounded(__m256 x) {
    const __m256i u = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  }

  FASTPOST_AVX2 static inline void write(__m256 first, __m256 second, bf16* out) {
    const __m256i low = _mm256_srli_epi32(rounded(first), 16);
    const __m256i high = _mm256_and_si256(rounded(second), _mm256_set1_epi32(int(0xffff0000u)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_or_si256(low, high));
  }

  FASTPOST_AVX2 static inline void write(__m256 first, __m256 second, float* out) {
    const __m256 low = _mm256_unpacklo_ps(first, second), high = _mm256_unpackhi_ps(first, second);
    _mm256_storeu_ps(out, _mm256_permute2f128_ps(low, high, 0x20));
    _mm256_storeu_ps(out + 8, _mm256_permute2f128_ps(low, high, 0x31));
  }

  template <class T>
  FASTPOST_AVX2 static inline void unpack(const uint8_t* bytes, int64_t n, float absmax,
                                   const float* levels, T* out) {
    const __m256 scale = _mm256_set1_ps(absmax);
    const __m256 low = _mm256_mul_ps(_mm256_loadu_ps(levels), scale);
    const __m256 high = _mm256_mul_ps(_mm256_loadu_ps(levels + 8), scale);
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
      const __m128i raw = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes + i / 2));
      const __m256i wide = _mm256_cvtepu8_epi32(raw);
      const __m256i second = _mm256_and_si256(wide, _mm256_set1_epi32(15));
      write(look_up(_mm256_srli_epi32(wide, 4), low, high), look_up(second, low, high), out + i);
    }
    unpack_slow(bytes + i / 2, n - i, absmax, levels, out + i);
  }
};
#endif

// Elements [first, first + n), cut at the borders of blocks. A copy for each instruction set, into
// which the set's own functions are inlined: a call a block would cost as much as its work.
#define FASTPOST_PIECE(TARGET, SET)                                                         \
  template <class T>                                                                        \
  TARGET void piece_of(SET, const Unpack& p, int64_t first, int64_t n, T* out) {            \
    const int shift = __builtin_ctzll(uint64_t(p.block_size));                              \
    for (int64_t i = 0; i < n;) {                                                           \
      const int64_t element = first + i, block = element >> shift;                          \
      const int64_t size = std::min(n - i, ((block + 1) << shift) - element);               \
      SET::unpack(p.packed + element / 2, size, absmax_of(p, block), p.levels, out + i);    \
      i += size;                                                                            \
    }                                                                                       \
  }
FASTPOST_PIECE(, Portable)
#if FASTPOST_X86
FASTPOST_PIECE(FASTPOST_AVX2, Avx2)
FASTPOST_PIECE(FASTPOST_AVX512, Avx512)
#endif

template <class Set, class T>
void unpack_piece(const Unpack& p, int64_t first, int64_t n, T* out) {
  piece_of(Set(), p, first, n, out);
}

template <class T>
auto piece_for(int simd_limit) -> void (*)(const Unpack&, int64_t, int64_t, T*) {
#if FASTPOST_X86
  const int best = int(best_simd()), level = simd_limit < 0 ? best : std::min(simd_limit, best);
  if (level >= int(Simd::avx512)) return unpack_piece<Avx512, T>;
  if (level >= int(Simd::avx2)) return unpack_piece<Avx2, T>;
#else
  (void)simd_limit;
#endif
  return unpack_piece<Portable, T>;
}

template <class T>
void unpack(const Unpack& p, int64_t first, int64_t stride, int64_t runs, int64_t length,
            int64_t out_stride, int simd_limit, int threads) {
  const auto piece = piece_for<T>(simd_limit);
  const int64_t pieces = (length + kPiece - 1) / kPiece;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < runs * pieces; ++i) {
    const int64_t run = i / pieces, begin = i % pieces * kPiece;
    piece(p, first + run * stride + begin, std::min(kPiece, length - begin),
          static_cast<T*>(p.out) + run * out_stride + begin);
  }
}

}  // namespace
}  // namespace fastpost

// absmax [blocks], or null and coded [blocks], nested [ceil(blocks / 256)], code [256], offset [1].
// `levels` [16]; out: bf16 or fp32, runs `out_stride` apart.
FASTPOST_EXPORT void fastpost_nf4_unpack(int is_bf16, const uint8_t* packed, const float* absmax,
                                         const uint8_t* coded, const float* nested,
                                         const float* code, const float* offset,
                                         const float* levels, int64_t block_size, int64_t first,
                                         int64_t stride, int64_t runs, int64_t length, void* out,
                                         int64_t out_stride, int simd_limit, int threads) {
  using namespace fastpost;
  const Unpack p{packed, absmax, coded, nested, code, offset, levels, block_size, out};
  if (is_bf16) {
    unpack<bf16>(p, first, stride, runs, length, out_stride, simd_limit, threads);
  } else {
    unpack<float>(p, first, stride, runs, length, out_stride, simd_limit, threads);
  }
}
FASTPOST_ARGUMENTS(fastpost_nf4_unpack)
