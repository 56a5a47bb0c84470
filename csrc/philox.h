// Philox 4x32 with 7 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011,
// table 2): counter (column / 4, row low, row high, 0), key the seed; its four words belong to four
// adjacent columns. `_philox.py` is the same in torch, and Triton's tl.philox too.
#pragma once

#include "simd.h"

namespace fastpost {

constexpr int64_t kPhiloxCounters = 64;  // of one block: 256 columns

// Words of counters (first + i, row) for i in [0, kPhiloxCounters), word l of counter i at [4 i + l].
FASTPOST_INLINE void philox_words(uint64_t seed, uint64_t row, uint32_t first, uint32_t* words) {
#pragma omp simd simdlen(16)
  for (int64_t i = 0; i < kPhiloxCounters; ++i) {
    uint32_t c0 = first + uint32_t(i), c1 = uint32_t(row), c2 = uint32_t(row >> 32), c3 = 0;
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < 7; ++round) {
      const uint64_t a = uint64_t(0xD2511F53u) * c0, b = uint64_t(0xCD9E8D57u) * c2;
      c0 = uint32_t(b >> 32) ^ c1 ^ k0;
      c2 = uint32_t(a >> 32) ^ c3 ^ k1;
      c1 = uint32_t(b);
      c3 = uint32_t(a);
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    words[4 * i] = c0;
    words[4 * i + 1] = c1;
    words[4 * i + 2] = c2;
    words[4 * i + 3] = c3;
  }
}

}  // namespace fastpost
