// Attention over a forest of shared prefixes, forward and backward, for short paths on CPUs.
//
// A model's training step calls this once a layer with tens of segments of tens of tokens. Library
// attention kernels take one rectangle a call; at this size their packing costs more than the
// multiplication. Here a whole layer is one parallel loop: keys are widened to fp32 and transposed
// once, and a task is one block of rows of one head against its path.
//
//   forward:  task (query head, 36 rows of a segment): keys of the ancestors, then its own, causal.
//   dQ:       the same tasks.
//   dK, dV:   task (key head, 36 keys of a segment): depth-first order makes the queries that see a
//             key one range, [key, subtree_end); all heads of the group are summed in registers and
//             fp32 blocks, so results do not depend on the number of threads.
//
// bf16 on a CPU with matrix tiles goes to prefix_attention_amx.cpp instead.
//
// Everything is fp32 inside. Scores live as one [36, 64] block. Workspace: packed keys and values,
// Hk N (2 D + Dv) floats, and for dK, dV packed queries of one group, G N 2 (D + Dv) floats.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "prefix_attention.h"
#include "prefix_attention_registers.h"

namespace fastpost {
namespace {

constexpr int64_t kRows = 36, kCols = 64;
constexpr float kMinusInf = -std::numeric_limits<float>::infinity();

// How many rows and vectors of 16 the registers of an instruction set hold.
struct Wide {
  static constexpr int rows = 6, groups = 4;
};
struct Narrow {
  static constexpr int rows = 3, groups = 1;
};

// A block of at most 36 tokens of one segment.
struct Block {
  int64_t segment, first, last;
};

int64_t padded(int64_t size) { return (size + kLanes - 1) / kLanes * kLanes; }

std::vector<Block> blocks_of(const Problem& p) {
  std::vector<Block> blocks;
  for (int64_t s = 0; s < p.num_segments; ++s) {
    const int64_t end = p.segments[3 * s + 1];
    for (int64_t t = p.segments[3 * s]; t < end; t += kRows) {
      blocks.push_back({s, t, std::min(t + kRows, end)});
    }
  }
  return blocks;
}

// Tokens [first, last) of a head in fp32: rows[token, ld_rows], zero beyond `size`.
template <class T>
FASTPOST_INLINE void widen_rows(const View& view, int64_t head, int64_t first, int64_t last,
                                float factor, float* rows, int64_t ld) {
  for (int64_t t = first; t < last; ++t, rows += ld) {
    const T* source = view.row<T>(head, t);
#pragma omp simd
    for (int64_t d = 0; d < view.size; ++d) rows[d] = load(source + d) * factor;
    for (int64_t d = view.size; d < ld; ++d) rows[d] = 0.0f;
  }
}

// The same, transposed: columns[d, token] with `ld` tokens a line.
template <class T>
FASTPOST_INLINE void widen_columns(const View& view, int64_t head, int64_t first, int64_t last,
                                   float factor, float* columns, int64_t ld) {
  for (int64_t t = first; t < last; ++t) {
    const T* source = view.row<T>(head, t);
    for (int64_t d = 0; d < view.size; ++d) columns[d * ld + t] = load(source + d) * factor;
  }
}

template <class T>
FASTPOST_INLINE void narrow_rows(const View& view, int64_t head, int64_t first, int64_t last,
                                 const float* rows, int64_t ld) {
  for (int64_t t = first; t < last; ++t, rows += ld) {
    T* target = view.row<T>(head, t);
#pragma omp simd
    for (int64_t d = 0; d < view.size; ++d) store(target + d, rows[d]);
  }
}

// A tensor packed for all its heads. Lines have slack for a block of columns that ends behind them.
struct Packed {
  std::vector<float> data;
  int64_t head_size = 0, ld = 0;

  const float* head(int64_t h) const { return data.data() + h * head_size; }
  float* head(int64_t h) { return data.data() + h * head_size; }

  void resize_rows(int64_t heads, int64_t tokens, int64_t size) {
    ld = padded(size);
    head_size = tokens * ld;
    data.resize(heads * head_size);
  }
  void resize_columns(int64_t heads, int64_t tokens, int64_t size) {
    ld = padded(tokens) + kCols;
    head_size = size * ld;
    data.resize(heads * head_size);
  }
};

// Visits the path of a block in pieces of at most 64 keys: visit(first key, count).
template <class Visit>
FASTPOST_INLINE void for_path(const Problem& p, const int64_t* parents, const Block& block,
                              const Visit& visit) {
  for (int64_t s = block.segment; s >= 0; s = parents[s]) {
    const int64_t stop = s == block.segment ? block.last : p.segments[3 * s + 1];
    for (int64_t k = p.segments[3 * s]; k < stop; k += kCols) visit(k, std::min(kCols, stop - k));
  }
}

struct Scratch {
  std::vector<float> a, b, c, d, e;
  float scores[kRows * kCols], other[kRows * kCols], row_max[kRows], row_sum[kRows];
};

FASTPOST_INLINE bool is_hidden(const Block& block, int64_t query, int64_t key) {
  return key > query && key < block.last;
}

template <class T, class ISA>
FASTPOST_INLINE void forward_block(const Problem& p, const int64_t* parents, const Packed& keys,
                                   const Packed& values, const Block& block, int64_t head,
                                   Scratch& s) {
  const int64_t rows = block.last - block.first, key_head = head * p.key_heads / p.query_heads;
  const int64_t size = p.query.size, ld = padded(size), ld_out = values.ld;
  s.a.resize(kRows * ld);
  s.b.assign(kRows * ld_out, 0.0f);
  widen_rows<T>(p.query, head, block.first, block.last, p.scale, s.a.data(), ld);
  std::fill(s.row_max, s.row_max + rows, kMinusInf);
  std::fill(s.row_sum, s.row_sum + rows, 0.0f);
  for_path(p, parents, block, [&](int64_t first, int64_t count) __attribute__((always_inline)) {
    multiply<ISA>(s.a.data(), ld, keys.head(key_head) + first, keys.ld, s.scores, kCols, rows,
                  padded(count), size, false);
    for (int64_t r = 0; r < rows; ++r) {
      float* z = s.scores + r * kCols;
      for (int64_t j = 0; j < count; ++j) {
        if (is_hidden(block, block.first + r, first + j)) z[j] = kMinusInf;
      }
      float top = s.row_max[r];
#pragma omp simd reduction(max : top)
      for (int64_t j = 0; j < count; ++j) top = z[j] > top ? z[j] : top;
      float sum = 0.0f;
      const float shift = top == kMinusInf ? 0.0f : top;
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < count; ++j) {
        z[j] = z[j] == kMinusInf ? 0.0f : exp_approx(z[j] - shift);
        sum += z[j];
      }
      const float factor = s.row_max[r] == kMinusInf ? 0.0f : exp_approx(s.row_max[r] - shift);
      s.row_sum[r] = s.row_sum[r] * factor + sum;
      s.row_max[r] = top;
      float* o = s.b.data() + r * ld_out;
      if (factor != 1.0f) {
#pragma omp simd
        for (int64_t d = 0; d < ld_out; ++d) o[d] *= factor;
      }
    }
    multiply<ISA>(s.scores, kCols, values.head(key_head) + first * values.ld, values.ld,
                  s.b.data(), ld_out, rows, ld_out, count, true);
  });
  for (int64_t r = 0; r < rows; ++r) {
    float* o = s.b.data() + r * ld_out;
    const float inverse = 1.0f / s.row_sum[r];
#pragma omp simd
    for (int64_t d = 0; d < ld_out; ++d) o[d] *= inverse;
    p.lse[head * p.tokens + block.first + r] = s.row_max[r] + std::log(s.row_sum[r]);
  }
  narrow_rows<T>(p.out, head, block.first, block.last, s.b.data(), ld_out);
}

// delta_t = dO_t · O_t
template <class T>
FASTPOST_INLINE float delta_of(const Problem& p, int64_t head, int64_t token) {
  const T *d = p.grad_out.row<T>(head, token), *o = p.out.row<T>(head, token);
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < p.out.size; ++i) sum += load(d + i) * load(o + i);
  return sum;
}

template <class T, class ISA>
FASTPOST_INLINE void grad_query_block(const Problem& p, const int64_t* parents, const Packed& keys,
                                      const Packed& key_rows, const Packed& values,
                                      const Block& block, int64_t head, Scratch& s) {
  const int64_t rows = block.last - block.first, key_head = head * p.key_heads / p.query_heads;
  const int64_t ld = padded(p.query.size), ld_value = padded(p.value.size);
  s.a.resize(kRows * ld);
  s.b.resize(kRows * ld_value);
  s.c.assign(kRows * ld, 0.0f);
  widen_rows<T>(p.query, head, block.first, block.last, p.scale, s.a.data(), ld);
  widen_rows<T>(p.grad_out, head, block.first, block.last, 1.0f, s.b.data(), ld_value);
  const float* lse = p.lse + head * p.tokens + block.first;
  for (int64_t r = 0; r < rows; ++r) s.row_sum[r] = delta_of<T>(p, head, block.first + r);
  for_path(p, parents, block, [&](int64_t first, int64_t count) __attribute__((always_inline)) {
    multiply<ISA>(s.a.data(), ld, keys.head(key_head) + first, keys.ld, s.scores, kCols, rows,
                  padded(count), p.query.size, false);
    multiply<ISA>(s.b.data(), ld_value, values.head(key_head) + first, values.ld, s.other, kCols,
                  rows, padded(count), p.value.size, false);
    for (int64_t r = 0; r < rows; ++r) {
      float *z = s.scores + r * kCols, *dp = s.other + r * kCols;
      const float row_lse = lse[r], delta = s.row_sum[r];
#pragma omp simd
      for (int64_t j = 0; j < count; ++j) z[j] = exp_approx(z[j] - row_lse) * (dp[j] - delta);
      for (int64_t j = 0; j < count; ++j) {
        if (is_hidden(block, block.first + r, first + j)) z[j] = 0.0f;
      }
    }
    multiply<ISA>(s.scores, kCols, key_rows.head(key_head) + first * key_rows.ld, key_rows.ld,
                  s.c.data(), ld, rows, ld, count, true);
  });
  for (float& x : s.c) x *= p.scale;
  narrow_rows<T>(p.grad_query, head, block.first, block.last, s.c.data(), ld);
}

// Queries of one group, packed: what dK and dV of its key head are made from.
struct Group {
  Packed query_columns, query_rows, grad_columns, grad_rows;
  std::vector<float> delta;  // [G, N]
};

template <class T, class ISA>
FASTPOST_INLINE void grad_key_block(const Problem& p, const Group& group, const Block& block,
                                    int64_t key_head, Scratch& s) {
  const int64_t keys = block.last - block.first, ratio = p.query_heads / p.key_heads;
  const int64_t ld = padded(p.key.size), ld_value = padded(p.value.size);
  const int64_t subtree_end = p.segments[3 * block.segment + 2];
  s.a.resize(kRows * ld);
  s.b.resize(kRows * ld_value);
  s.c.assign(kRows * ld, 0.0f);
  s.d.assign(kRows * ld_value, 0.0f);
  widen_rows<T>(p.key, key_head, block.first, block.last, 1.0f, s.a.data(), ld);
  widen_rows<T>(p.value, key_head, block.first, block.last, 1.0f, s.b.data(), ld_value);
  for (int64_t g = 0; g < ratio; ++g) {
    const float* lse = p.lse + (key_head * ratio + g) * p.tokens;
    const float* delta = group.delta.data() + g * p.tokens;
    for (int64_t first = block.first; first < subtree_end; first += kCols) {
      const int64_t count = std::min(kCols, subtree_end - first);
      multiply<ISA>(s.a.data(), ld, group.query_columns.head(g) + first, group.query_columns.ld,
                    s.scores, kCols, keys, padded(count), p.key.size, false);
      multiply<ISA>(s.b.data(), ld_value, group.grad_columns.head(g) + first,
                    group.grad_columns.ld, s.other, kCols, keys, padded(count), p.value.size,
                    false);
      for (int64_t k = 0; k < keys; ++k) {
        float *z = s.scores + k * kCols, *dp = s.other + k * kCols;
        const int64_t hidden = std::max<int64_t>(0, std::min(count, block.first + k - first));
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) {
          z[j] = exp_approx(z[j] - lse[first + j]);
          dp[j] = z[j] * (dp[j] - delta[first + j]);
        }
        for (int64_t j = 0; j < hidden; ++j) z[j] = dp[j] = 0.0f;
      }
      multiply<ISA>(s.scores, kCols, group.grad_rows.head(g) + first * ld_value, ld_value,
                    s.d.data(), ld_value, keys, ld_value, count, true);
      multiply<ISA>(s.other, kCols, group.query_rows.head(g) + first * ld, ld, s.c.data(), ld,
                    keys, ld, count, true);
    }
  }
  narrow_rows<T>(p.grad_key, key_head, block.first, block.last, s.c.data(), ld);
  narrow_rows<T>(p.grad_value, key_head, block.first, block.last, s.d.data(), ld_value);
}

// One copy of every task for each element type and instruction set.
template <class T>
struct Tasks {
  void (*forward)(const Problem&, const int64_t*, const Packed&, const Packed&, const Block&,
                  int64_t, Scratch&);
  void (*grad_query)(const Problem&, const int64_t*, const Packed&, const Packed&, const Packed&,
                     const Block&, int64_t, Scratch&);
  void (*grad_key)(const Problem&, const Group&, const Block&, int64_t, Scratch&);
};

#define FASTPOST_TASKS(NAME, TARGET, ISA)                                                       \
  template <class T>                                                                            \
  TARGET void forward_##NAME(const Problem& p, const int64_t* parents, const Packed& keys,      \
                             const Packed& values, const Block& block, int64_t head,            \
                             Scratch& s) {                                                      \
    forward_block<T, ISA>(p, parents, keys, values, block, head, s);                            \
  }                                                                                             \
  template <class T>                                                                            \
  TARGET void grad_query_##NAME(const Problem& p, const int64_t* parents, const Packed& keys,   \
                                const Packed& key_rows, const Packed& values,                   \
                                const Block& block, int64_t head, Scratch& s) {                 \
    grad_query_block<T, ISA>(p, parents, keys, key_rows, values, block, head, s);               \
  }                                                                                             \
  template <class T>                                                                            \
  TARGET void grad_key_##NAME(const Problem& p, const Group& group, const Block& block,         \
                              int64_t head, Scratch& s) {                                       \
    grad_key_block<T, ISA>(p, group, block, head, s);                                           \
  }                                                                                             \
  template <class T>                                                                            \
  Tasks<T> tasks_##NAME() {                                                                     \
    return {forward_##NAME<T>, grad_query_##NAME<T>, grad_key_##NAME<T>};                       \
  }

FASTPOST_TASKS(portable, , Narrow)
#if FASTPOST_X86
FASTPOST_TASKS(avx2, FASTPOST_AVX2, Narrow)
FASTPOST_TASKS(avx512, FASTPOST_AVX512, Wide)
#endif

template <class T>
Tasks<T> choose_tasks(int limit) {
  const Simd best = best_simd();
  const Simd simd = limit < 0 || limit > int(best) ? best : Simd(limit);
#if FASTPOST_X86
  if (simd == Simd::avx512) return tasks_avx512<T>();
  if (simd == Simd::avx2) return tasks_avx2<T>();
#endif
  return tasks_portable<T>();
}

template <class T>
void run_forward(const Problem& p, int simd_limit, int threads) {
  const Tasks<T> tasks = choose_tasks<T>(simd_limit);
  const std::vector<Block> blocks = blocks_of(p);
  const std::vector<int64_t> parents = parents_of(p);
  const int64_t num_blocks = int64_t(blocks.size());
  Packed keys, values;
  keys.resize_columns(p.key_heads, p.tokens, p.key.size);
  values.resize_rows(p.key_heads, p.tokens, p.value.size);
#pragma omp parallel num_threads(threads)
  {
    Scratch scratch;
#pragma omp for collapse(2) schedule(static)
    for (int64_t h = 0; h < p.key_heads; ++h) {
      for (int64_t b = 0; b < num_blocks; ++b) {
        const Block block = blocks[b];
        widen_columns<T>(p.key, h, block.first, block.last, 1.0f, keys.head(h), keys.ld);
        widen_rows<T>(p.value, h, block.first, block.last, 1.0f,
                      values.head(h) + block.first * values.ld, values.ld);
      }
    }
#pragma omp for collapse(2) schedule(dynamic, 4)
    for (int64_t h = 0; h < p.query_heads; ++h) {
      for (int64_t b = 0; b < num_blocks; ++b) {
        tasks.forward(p, parents.data(), keys, values, blocks[b], h, scratch);
      }
    }
  }
}

template <class T>
void run_backward(const Problem& p, int simd_limit, int threads) {
  const Tasks<T> tasks = choose_tasks<T>(simd_limit);
  const std::vector<Block> blocks = blocks_of(p);
  const std::vector<int64_t> parents = parents_of(p);
  const int64_t num_blocks = int64_t(blocks.size()), ratio = p.query_heads / p.key_heads;
  Packed keys, key_rows, values;
  keys.resize_columns(p.key_heads, p.tokens, p.key.size);
  key_rows.resize_rows(p.key_heads, p.tokens, p.key.size);
  values.resize_columns(p.key_heads, p.tokens, p.value.size);
  Group group;
  group.query_columns.resize_columns(ratio, p.tokens, p.query.size);
  group.query_rows.resize_rows(ratio, p.tokens, p.query.size);
  group.grad_columns.resize_columns(ratio, p.tokens, p.value.size);
  group.grad_rows.resize_rows(ratio, p.tokens, p.value.size);
  group.delta.resize(ratio * p.tokens);
#pragma omp parallel num_threads(threads)
  {
    Scratch scratch;
#pragma omp for collapse(2) schedule(static)
    for (int64_t h = 0; h < p.key_heads; ++h) {
      for (int64_t b = 0; b < num_blocks; ++b) {
        const Block block = blocks[b];
        widen_columns<T>(p.key, h, block.first, block.last, 1.0f, keys.head(h), keys.ld);
        widen_rows<T>(p.key, h, block.first, block.last, 1.0f,
                      key_rows.head(h) + block.first * key_rows.ld, key_rows.ld);
        widen_columns<T>(p.value, h, block.first, block.last, 1.0f, values.head(h), values.ld);
      }
    }
#pragma omp for collapse(2) schedule(dynamic, 4)
    for (int64_t h = 0; h < p.query_heads; ++h) {
      for (int64_t b = 0; b < num_blocks; ++b) {
        tasks.grad_query(p, parents.data(), keys, key_rows, values, blocks[b], h, scratch);
      }
    }
    for (int64_t key_head = 0; key_head < p.key_heads; ++key_head) {
#pragma omp for collapse(2) schedule(static)
      for (int64_t g = 0; g < ratio; ++g) {
        for (int64_t b = 0; b < num_blocks; ++b) {
          const Block x = blocks[b];
          const int64_t h = key_head * ratio + g;
          widen_columns<T>(p.query, h, x.first, x.last, p.scale, group.query_columns.head(g),
                           group.query_columns.ld);
          widen_rows<T>(p.query, h, x.first, x.last, p.scale,
                        group.query_rows.head(g) + x.first * group.query_rows.ld,
                        group.query_rows.ld);
          widen_columns<T>(p.grad_out, h, x.first, x.last, 1.0f, group.grad_columns.head(g),
                           group.grad_columns.ld);
          widen_rows<T>(p.grad_out, h, x.first, x.last, 1.0f,
                        group.grad_rows.head(g) + x.first * group.grad_rows.ld,
                        group.grad_rows.ld);
          for (int64_t t = x.first; t < x.last; ++t) {
            group.delta[g * p.tokens + t] = delta_of<T>(p, h, t);
          }
        }
      }
#pragma omp for schedule(dynamic, 2)
      for (int64_t b = 0; b < num_blocks; ++b) {
        tasks.grad_key(p, group, blocks[b], key_head, scratch);
      }
    }
  }
}

View view_of(void* data, const int64_t* layout) { return {data, layout[0], layout[1], layout[2]}; }

}  // namespace
}  // namespace fastpost

using namespace fastpost;

// The most this CPU gives a kernel here: 0 portable, 1 AVX2, 2 AVX-512, 3 matrix tiles, which only
// bf16 attention takes.
FASTPOST_EXPORT int fastpost_simd() { return int(has_amx() ? Simd::amx : best_simd()); }
FASTPOST_ARGUMENTS(fastpost_simd)

// `tensors` and `layouts` describe query, key, value, out, and in the backward grad_out, grad_query,
// grad_key, grad_value: a data pointer and (head stride, token stride, size) each. `lse` [Hq, N] is
// written by the forward and read by the backward. `shape` is (Hq, Hk, N, S).
FASTPOST_EXPORT void fastpost_prefix_attention(int is_backward, int is_bf16, void* const* tensors,
                                               const int64_t* layouts, float* lse,
                                               const int64_t* shape, const int64_t* segments,
                                               float scale, int simd_limit, int threads) {
  Problem p{};
  p.query = view_of(tensors[0], layouts);
  p.key = view_of(tensors[1], layouts + 3);
  p.value = view_of(tensors[2], layouts + 6);
  p.out = view_of(tensors[3], layouts + 9);
  if (is_backward) {
    p.grad_out = view_of(tensors[4], layouts + 12);
    p.grad_query = view_of(tensors[5], layouts + 15);
    p.grad_key = view_of(tensors[6], layouts + 18);
    p.grad_value = view_of(tensors[7], layouts + 21);
  }
  p.lse = lse;
  p.query_heads = shape[0];
  p.key_heads = shape[1];
  p.tokens = shape[2];
  p.num_segments = shape[3];
  p.segments = segments;
  p.scale = scale;
  const bool may_use_amx = simd_limit < 0 || simd_limit >= int(Simd::amx);
  if (is_bf16 && may_use_amx && has_amx()) {
    is_backward ? backward_amx(p, threads) : forward_amx(p, threads);
  } else if (is_backward) {
    is_bf16 ? run_backward<bf16>(p, simd_limit, threads) : run_backward<float>(p, simd_limit, threads);
  } else {
    is_bf16 ? run_forward<bf16>(p, simd_limit, threads) : run_forward<float>(p, simd_limit, threads);
  }
}
FASTPOST_ARGUMENTS(fastpost_prefix_attention)
