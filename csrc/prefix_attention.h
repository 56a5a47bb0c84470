// One call of prefix attention as its C++ kernels see it: tensors, forest, and who computes it.
#pragma once

#include <vector>

#include "simd.h"

namespace fastpost {

// One tensor [heads, tokens, size] as it lies in memory; the last dimension is contiguous.
struct View {
  void* data;
  int64_t head_stride, token_stride, size;

  template <class T>
  FASTPOST_INLINE T* row(int64_t head, int64_t token) const {
    return static_cast<T*>(data) + head * head_stride + token * token_stride;
  }
};

struct Problem {
  View query, key, value, out, grad_out, grad_query, grad_key, grad_value;
  float* lse;  // [Hq, N]
  int64_t query_heads, key_heads, tokens;
  const int64_t* segments;  // [S, 3]
  int64_t num_segments;
  float scale;
};

inline std::vector<int64_t> parents_of(const Problem& p) {
  std::vector<int64_t> parents(p.num_segments), open;
  for (int64_t s = 0; s < p.num_segments; ++s) {
    while (!open.empty() && p.segments[3 * open.back() + 2] <= p.segments[3 * s]) open.pop_back();
    parents[s] = open.empty() ? -1 : open.back();
    open.push_back(s);
  }
  return parents;
}

// bf16 on the matrix tiles of the CPU (AMX). `has_amx` asks the system for them once.
bool has_amx();
void forward_amx(const Problem& p, int threads);
void backward_amx(const Problem& p, int threads);

}  // namespace fastpost
