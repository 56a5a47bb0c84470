// Pieces of 32 x 32 on the matrix tiles of a CPU (AMX), and their operands: rows of bf16 are left
// sides as they lie; right sides are packed into tiles of pairs along the depth.
//
// Every function runs on the thread that called open_tiles, until close_tiles.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "prefix_attention.h"

// The intrinsics of GCC 12 start from registers that they leave undefined on purpose.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#define FASTPOST_AMX                                                                        \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16," \
                        "avx2,fma,prefer-vector-width=512")))
#define FASTPOST_AMX_INLINE FASTPOST_INLINE FASTPOST_AMX

namespace fastpost {

constexpr int64_t kBlock = 32;
constexpr int64_t kPiece = kBlock * kBlock;
constexpr int64_t kTile = 16 * kBlock;  // bf16 values of one tile: 16 rows of 64 bytes

inline int64_t padded(int64_t size) { return (size + kBlock - 1) / kBlock * kBlock; }

// Tiles want lines of the cache; fresh memory is not cleared, since every value read is written.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data_(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64))) {}
  T* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> data_;
};

struct Block {
  int64_t segment, first, last;
};

struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

FASTPOST_AMX inline void open_tiles() {
  alignas(64) const TileConfig config;
  asm volatile("" ::"r"(&config) : "memory");
  _tile_loadconfig(&config);
}

FASTPOST_AMX inline void close_tiles() { _tile_release(); }

// The compiler does not know that tile loads read memory: what they read must be stored by now.
FASTPOST_INLINE void finish_stores() { asm volatile("" ::: "memory"); }

FASTPOST_AMX_INLINE void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

FASTPOST_AMX_INLINE void store_sums(float* c, int64_t ld) {
  _tile_stored(0, c, ld * 4);
  _tile_stored(1, c + 16, ld * 4);
  _tile_stored(2, c + 16 * ld, ld * 4);
  _tile_stored(3, c + 16 * ld + 16, ld * 4);
}

// sums[32, 32] += a[32, 32] b[32, 32]; b is two tiles of pairs.
FASTPOST_AMX_INLINE void multiply_piece(const bf16* a, int64_t lda, const bf16* b) {
  _tile_loadd(4, a, lda * 2);
  _tile_loadd(6, b, 64);
  _tile_loadd(7, b + kTile, 64);
  _tile_dpbf16ps(0, 4, 6);
  _tile_loadd(5, a + 16 * lda, lda * 2);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

// c[32, 32] = rows[32, size] columns[size, 32]; `columns` comes from pack_columns.
FASTPOST_AMX_INLINE void multiply_scores(const bf16* rows, const bf16* columns, int64_t size,
                                         float* c, int64_t ldc) {
  finish_stores();
  zero_sums();
  for (int64_t d = 0; d < size; d += kBlock) multiply_piece(rows + d, size, columns + d * kBlock);
  store_sums(c, ldc);
}

// c[32, size] (+)= sum over i of weights_i[32, 32] rows_i[32, size], rows_i = the block path[i] of
// `rows` from pack_rows, or the i-th without a path.
FASTPOST_AMX_INLINE void multiply_path(const bf16* weights, const bf16* rows, const int64_t* path,
                                       int64_t count, int64_t size, float* c, bool accumulate) {
  finish_stores();
  for (int64_t d = 0; d < size; d += kBlock) {
    if (accumulate) {
      _tile_loadd(0, c + d, size * 4);
      _tile_loadd(1, c + d + 16, size * 4);
      _tile_loadd(2, c + d + 16 * size, size * 4);
      _tile_loadd(3, c + d + 16 * size + 16, size * 4);
    } else {
      zero_sums();
    }
    for (int64_t i = 0; i < count; ++i) {
      const int64_t block = path ? path[i] : i;
      multiply_piece(weights + i * kPiece, kBlock, rows + block * kBlock * size + d * kBlock);
    }
    store_sums(c + d, size);
  }
}

// Tokens of a block as rows[32, size], zeros beyond the block and beyond the head's size.
FASTPOST_AMX_INLINE void copy_rows(const View& view, int64_t head, const Block& block, bf16* rows,
                                   int64_t size) {
  const int64_t count = block.last - block.first;
  for (int64_t t = 0; t < kBlock; ++t) {
    const bf16* source = view.row<bf16>(head, block.first + std::min(t, count - 1));
    for (int64_t d = 0; d < size; d += kBlock) {
      const int64_t left = t < count ? std::min(kBlock, view.size - d) : 0;
      const __mmask32 mask = left > 0 ? 0xffffffffu >> (kBlock - left) : 0;
      _mm512_store_si512(rows + t * size + d, _mm512_maskz_loadu_epi16(mask, source + d));
    }
  }
}

// rows[32, size] as the right side of a product over `size`: tile (d / 32, token / 16) holds in its
// row i the values 2 i and 2 i + 1 of 16 tokens, that is a transposed 16 x 16 of pairs.
FASTPOST_AMX_INLINE void pack_columns(const bf16* rows, int64_t size, bf16* packed) {
  for (int64_t d = 0; d < size; d += kBlock) {
    for (int64_t half = 0; half < 2; ++half, packed += kTile) {
      __m512i x[16], y[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) x[i] = _mm512_load_si512(rows + (half * 16 + i) * size + d);
#pragma GCC unroll 8
      for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
      }
#pragma GCC unroll 4
      for (int i = 0; i < 16; i += 4) {
        x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
        x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
        x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
        x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        y[i] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88);
        y[i + 4] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xdd);
        y[i + 8] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88);
        y[i + 12] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xdd);
      }
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        _mm512_store_si512(packed + i * kBlock, _mm512_shuffle_i32x4(y[i], y[i + 8], 0x88));
        _mm512_store_si512(packed + (i + 8) * kBlock, _mm512_shuffle_i32x4(y[i], y[i + 8], 0xdd));
      }
    }
  }
}

// rows[32, size] as the right side of a product over tokens: tile (d / 16) holds in its row i the
// tokens 2 i and 2 i + 1 side by side.
FASTPOST_AMX_INLINE void pack_rows(const bf16* rows, int64_t size, bf16* packed) {
  for (int64_t d = 0; d < size; d += 16) {
    for (int64_t t = 0; t < kBlock; t += 2, packed += kBlock) {
      const auto* even = reinterpret_cast<const __m256i*>(rows + t * size + d);
      const auto* odd = reinterpret_cast<const __m256i*>(rows + (t + 1) * size + d);
      const __m512i low = _mm512_cvtepu16_epi32(_mm256_load_si256(even));
      const __m512i high = _mm512_cvtepu16_epi32(_mm256_load_si256(odd));
      _mm512_store_si512(packed, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
  }
}

// The rows [32, size] of fp32 sums times one factor each, rounded into a tensor.
FASTPOST_AMX_INLINE void write_rows(const View& view, int64_t head, const Block& block,
                                    const float* sums, int64_t size, const float* factors) {
  for (int64_t t = block.first; t < block.last; ++t, sums += size) {
    bf16* target = view.row<bf16>(head, t);
    const __m512 factor = _mm512_set1_ps(factors[t - block.first]);
    for (int64_t d = 0; d < view.size; d += kBlock) {
      const __m512 low = _mm512_mul_ps(_mm512_load_ps(sums + d), factor);
      const __m512 high = _mm512_mul_ps(_mm512_load_ps(sums + d + 16), factor);
      const int64_t left = std::min(kBlock, view.size - d);
      _mm512_mask_storeu_epi16(target + d, 0xffffffffu >> (kBlock - left),
                               (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
  }
}

// 2^x to 1e-7, a polynomial of the fraction; exactly 0 at minus infinity, NaN for NaN.
FASTPOST_AMX_INLINE __m512 exp2_of(__m512 x) {
  const __m512 r = _mm512_reduce_ps(x, 1);
  __m512 y = _mm512_set1_ps(1.8775766083e-3f);
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(8.9893402524e-3f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(5.5826317917e-2f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(2.4015361709e-1f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(6.9315307319e-1f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(9.9999992506e-1f));
  return _mm512_scalef_ps(y, x);
}

FASTPOST_AMX_INLINE void store_piece_row(bf16* target, __m512 low, __m512 high) {
  _mm512_store_si512(target, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

}  // namespace fastpost
