// Prefix attention in bf16 on matrix tiles (AMX), forward and backward.
//
// A block is at most 32 tokens of one segment, padded to 32 with zeros. Depth-first order numbers the
// blocks: a path is the blocks of the ancestors and of the segment itself, a subtree one range. Every
// product is of 32 x 32 pieces, four fp32 tiles at a time:
//
//   forward:  task (query head, block): scores of the whole path, softmax, then P V.
//   dQ:       the same tasks; scores again, dS = P (dP - delta), then dS K.
//   dK, dV:   task (key head, block) over the blocks of the subtree and the heads of the group, with
//             the scores transposed; sums stay in fp32.
//
// P and dS are rounded to bf16 before they are multiplied, as flash attention does; row sums, scores
// and gradients add up in fp32. Each task writes its own rows in one order, so results do not depend
// on the number of threads.
#include "prefix_attention.h"

// Older compilers do not know the instructions; without them the other kernel serves.
#if defined(__clang__)
#define FASTPOST_KNOWS_AMX (__clang_major__ >= 12)
#else
#define FASTPOST_KNOWS_AMX (__GNUC__ >= 11)
#endif

#if FASTPOST_X86 && FASTPOST_KNOWS_AMX && defined(__linux__)

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cmath>
#include <limits>

#include "prefix_attention_tiles.h"

namespace fastpost {
namespace {

// Blocks of queries whose P and dS a task of dK and dV holds before it multiplies them.
constexpr int64_t kBatch = 16;
constexpr float kLog2e = 1.44269504088896341f;
constexpr float kMinusInf = -std::numeric_limits<float>::infinity();

struct Forest {
  std::vector<Block> blocks;
  std::vector<int64_t> parents, first_block;  // first_block has one entry behind the last segment
  int64_t longest_path = 0;                   // in blocks

  explicit Forest(const Problem& p) : parents(parents_of(p)) {
    std::vector<int64_t> depth(p.num_segments);
    for (int64_t s = 0; s < p.num_segments; ++s) {
      const int64_t end = p.segments[3 * s + 1];
      first_block.push_back(count());
      for (int64_t t = p.segments[3 * s]; t < end; t += kBlock) {
        blocks.push_back({s, t, std::min(t + kBlock, end)});
      }
      depth[s] = count() - first_block[s] + (parents[s] < 0 ? 0 : depth[parents[s]]);
      longest_path = std::max(longest_path, depth[s]);
    }
    first_block.push_back(count());
  }

  int64_t count() const { return int64_t(blocks.size()); }

  int64_t subtree_end(const Problem& p, int64_t segment) const {
    int64_t s = segment + 1;
    while (s < p.num_segments && p.segments[3 * s] < p.segments[3 * segment + 2]) ++s;
    return first_block[s];
  }
};

// What one thread works in. `path` is the path of a block, itself last; `valid` its real columns.
struct Scratch {
  std::vector<int64_t> path;
  std::vector<uint32_t> valid;
  int64_t ld_scores;  // one line of the cache more, so that rows do not fall into the same set
  Buffer<bf16> a, b, c, weights, other_weights;
  Buffer<float> scores, other, out, other_out;

  Scratch(const Problem& p, int64_t longest_path)
      : ld_scores(longest_path * kBlock + 16),
        a(kBlock * padded(p.query.size)),
        b(kBlock * padded(p.value.size)),
        c(kBlock * padded(p.value.size)),
        weights(std::max(longest_path, kBatch) * kPiece),
        other_weights(kBatch * kPiece),
        scores(kBlock * ld_scores),
        other(kPiece),
        out(kBlock * padded(p.query.size)),
        other_out(kBlock * padded(p.value.size)) {}

  void follow(const Forest& forest, int64_t block) {
    path.clear();
    for (int64_t s = forest.blocks[block].segment, end = block + 1; s >= 0; s = forest.parents[s]) {
      for (int64_t b = end; b-- > forest.first_block[s];) path.push_back(b);
      if (forest.parents[s] >= 0) end = forest.first_block[forest.parents[s] + 1];
    }
    std::reverse(path.begin(), path.end());
    valid.clear();
    for (int64_t b : path) {
      const Block& x = forest.blocks[b];
      valid.push_back(0xffffffffu >> (kBlock - (x.last - x.first)));
    }
  }
};

// Softmax of one row of scores over the path: weights e^(scale (z - top)) as bf16, their sum, top.
FASTPOST_AMX_INLINE void softmax_row(const float* z, const std::vector<uint32_t>& valid,
                                     float factor, bf16* weights, float* row_sum, float* row_top) {
  const int64_t count = int64_t(valid.size());
  const __m512 hidden = _mm512_set1_ps(kMinusInf), scale = _mm512_set1_ps(factor);
  __m512 top0 = hidden, top1 = hidden;
  for (int64_t i = 0; i < count; ++i) {
    const __mmask16 low = __mmask16(valid[i]), high = __mmask16(valid[i] >> 16);
    top0 = _mm512_max_ps(top0, _mm512_mask_loadu_ps(hidden, low, z + i * kBlock));
    top1 = _mm512_max_ps(top1, _mm512_mask_loadu_ps(hidden, high, z + i * kBlock + 16));
  }
  *row_top = _mm512_reduce_max_ps(_mm512_max_ps(top0, top1));
  const __m512 shift = _mm512_set1_ps(*row_top * factor);
  __m512 sum0 = _mm512_setzero_ps(), sum1 = sum0;
  for (int64_t i = 0; i < count; ++i) {
    const __mmask16 low = __mmask16(valid[i]), high = __mmask16(valid[i] >> 16);
    const __m512 z0 = _mm512_loadu_ps(z + i * kBlock), z1 = _mm512_loadu_ps(z + i * kBlock + 16);
    const __m512 p0 = _mm512_maskz_mov_ps(low, exp2_of(_mm512_fmsub_ps(z0, scale, shift)));
    const __m512 p1 = _mm512_maskz_mov_ps(high, exp2_of(_mm512_fmsub_ps(z1, scale, shift)));
    sum0 = _mm512_add_ps(sum0, p0);
    sum1 = _mm512_add_ps(sum1, p1);
    store_piece_row(weights + i * kPiece, p0, p1);
  }
  *row_sum = _mm512_reduce_add_ps(_mm512_add_ps(sum0, sum1));
}

// Operands of one or more heads, block after block: [heads, blocks, 32, padded size].
struct Packed {
  int64_t block_size, head_size;
  Buffer<bf16> data;

  Packed(int64_t heads, int64_t blocks, int64_t size)
      : block_size(kBlock * padded(size)),
        head_size(blocks * block_size),
        data(heads * head_size) {}
  bf16* at(int64_t head, int64_t block) const {
    return data.get() + head * head_size + block * block_size;
  }
};

FASTPOST_AMX void pack_forward(const Problem& p, const Forest& forest, int64_t block, int64_t head,
                               Packed& keys, Packed& values, Scratch& s) {
  const int64_t size = padded(p.key.size), size_out = padded(p.value.size);
  copy_rows(p.key, head, forest.blocks[block], s.a.get(), size);
  pack_columns(s.a.get(), size, keys.at(head, block));
  copy_rows(p.value, head, forest.blocks[block], s.b.get(), size_out);
  pack_rows(s.b.get(), size_out, values.at(head, block));
}

FASTPOST_AMX void forward_block(const Problem& p, const Forest& forest, const Packed& keys,
                                const Packed& values, int64_t index, int64_t head, Scratch& s) {
  const Block& block = forest.blocks[index];
  const int64_t rows = block.last - block.first, key_head = head * p.key_heads / p.query_heads;
  const int64_t size = padded(p.query.size), size_out = padded(p.value.size);
  s.follow(forest, index);
  const int64_t count = int64_t(s.path.size());
  copy_rows(p.query, head, block, s.a.get(), size);
  for (int64_t i = 0; i < count; ++i) {
    multiply_scores(s.a.get(), keys.at(key_head, s.path[i]), size, s.scores.get() + i * kBlock,
                    s.ld_scores);
  }
  float sums[kBlock], tops[kBlock];
  for (int64_t r = 0; r < rows; ++r) {
    s.valid.back() = (2u << r) - 1;
    softmax_row(s.scores.get() + r * s.ld_scores, s.valid, p.scale * kLog2e,
                s.weights.get() + r * kBlock, sums + r, tops + r);
  }
  multiply_path(s.weights.get(), values.at(key_head, 0), s.path.data(), count, size_out,
                s.other_out.get(), false);
  for (int64_t r = 0; r < rows; ++r) {
    p.lse[head * p.tokens + block.first + r] = tops[r] * p.scale + std::log(sums[r]);
    sums[r] = 1.0f / sums[r];
  }
  write_rows(p.out, head, block, s.other_out.get(), size_out, sums);
}

// One key head and the queries of its group, packed for the backward.
struct Group {
  Packed key_columns, key_rows, value_columns;
  Packed query_columns, query_rows, grad_columns, grad_rows;
  Buffer<float> lse, delta;  // [G, 32 blocks]; lse in powers of two

  Group(const Problem& p, int64_t ratio, int64_t blocks)
      : key_columns(1, blocks, p.key.size),
        key_rows(1, blocks, p.key.size),
        value_columns(1, blocks, p.value.size),
        query_columns(ratio, blocks, p.query.size),
        query_rows(ratio, blocks, p.query.size),
        grad_columns(ratio, blocks, p.value.size),
        grad_rows(ratio, blocks, p.value.size),
        lse(ratio * blocks * kBlock),
        delta(ratio * blocks * kBlock) {}
};

FASTPOST_AMX void pack_key(const Problem& p, const Forest& forest, int64_t block, int64_t head,
                           Group& group, Scratch& s) {
  const int64_t size = padded(p.key.size), size_out = padded(p.value.size);
  copy_rows(p.key, head, forest.blocks[block], s.a.get(), size);
  pack_columns(s.a.get(), size, group.key_columns.at(0, block));
  pack_rows(s.a.get(), size, group.key_rows.at(0, block));
  copy_rows(p.value, head, forest.blocks[block], s.b.get(), size_out);
  pack_columns(s.b.get(), size_out, group.value_columns.at(0, block));
}

// Queries of zeros with lse and delta 0 fill a block up: P = 1 meets dO = 0, and dS = 0.
FASTPOST_AMX void pack_query(const Problem& p, const Forest& forest, int64_t index, int64_t head,
                             int64_t g, Group& group, Scratch& s) {
  const Block& block = forest.blocks[index];
  const int64_t size = padded(p.query.size), size_out = padded(p.value.size);
  copy_rows(p.query, head, block, s.a.get(), size);
  pack_columns(s.a.get(), size, group.query_columns.at(g, index));
  pack_rows(s.a.get(), size, group.query_rows.at(g, index));
  copy_rows(p.grad_out, head, block, s.b.get(), size_out);
  pack_columns(s.b.get(), size_out, group.grad_columns.at(g, index));
  pack_rows(s.b.get(), size_out, group.grad_rows.at(g, index));
  copy_rows(p.out, head, block, s.c.get(), size_out);
  float* lse = group.lse.get() + (g * forest.count() + index) * kBlock;
  float* delta = group.delta.get() + (g * forest.count() + index) * kBlock;
  for (int64_t r = 0; r < kBlock; ++r) {
    const int64_t t = block.first + r;
    lse[r] = t < block.last ? p.lse[head * p.tokens + t] * kLog2e : 0.0f;
    __m512 sum = _mm512_setzero_ps();  // delta = dO . O
    for (int64_t d = 0; d < size_out; d += kBlock) {
      const __m512i x = _mm512_load_si512(s.b.get() + r * size_out + d);
      const __m512i y = _mm512_load_si512(s.c.get() + r * size_out + d);
      sum = _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)y);
    }
    delta[r] = _mm512_reduce_add_ps(sum);
  }
}

FASTPOST_AMX void grad_query_block(const Problem& p, const Forest& forest, const Group& group,
                                   int64_t index, int64_t head, int64_t g, Scratch& s) {
  const Block& block = forest.blocks[index];
  const int64_t rows = block.last - block.first;
  const int64_t size = padded(p.query.size), size_out = padded(p.value.size);
  const float* lse = group.lse.get() + (g * forest.count() + index) * kBlock;
  const float* delta = group.delta.get() + (g * forest.count() + index) * kBlock;
  const __m512 scale = _mm512_set1_ps(p.scale * kLog2e);
  s.follow(forest, index);
  const int64_t count = int64_t(s.path.size());
  copy_rows(p.query, head, block, s.a.get(), size);
  copy_rows(p.grad_out, head, block, s.b.get(), size_out);
  for (int64_t i = 0; i < count; ++i) {
    multiply_scores(s.a.get(), group.key_columns.at(0, s.path[i]), size, s.scores.get(), kBlock);
    multiply_scores(s.b.get(), group.value_columns.at(0, s.path[i]), size_out, s.other.get(),
                    kBlock);
    for (int64_t r = 0; r < rows; ++r) {
      const uint32_t valid = i + 1 < count ? s.valid[i] : (2u << r) - 1;
      const __m512 shift = _mm512_set1_ps(lse[r]), mean = _mm512_set1_ps(delta[r]);
      __m512 ds[2];
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        const __m512 z = _mm512_load_ps(s.scores.get() + r * kBlock + 16 * j);
        const __m512 dp = _mm512_load_ps(s.other.get() + r * kBlock + 16 * j);
        ds[j] = _mm512_maskz_mul_ps(__mmask16(valid >> (16 * j)),
                                    exp2_of(_mm512_fmsub_ps(z, scale, shift)),
                                    _mm512_sub_ps(dp, mean));
      }
      store_piece_row(s.weights.get() + i * kPiece + r * kBlock, ds[0], ds[1]);
    }
  }
  multiply_path(s.weights.get(), group.key_rows.at(0, 0), s.path.data(), count, size, s.out.get(),
                false);
  float factors[kBlock];
  std::fill(factors, factors + kBlock, p.scale);
  write_rows(p.grad_query, head, block, s.out.get(), size, factors);
}

FASTPOST_AMX void grad_key_block(const Problem& p, const Forest& forest, const Group& group,
                                 int64_t index, int64_t key_head, Scratch& s) {
  const Block& block = forest.blocks[index];
  const int64_t keys = block.last - block.first, ratio = p.query_heads / p.key_heads;
  const int64_t size = padded(p.query.size), size_out = padded(p.value.size);
  const int64_t end = forest.subtree_end(p, block.segment);
  const __m512 scale = _mm512_set1_ps(p.scale * kLog2e);
  copy_rows(p.key, key_head, block, s.a.get(), size);
  copy_rows(p.value, key_head, block, s.b.get(), size_out);
  for (int64_t g = 0; g < ratio; ++g) {
    for (int64_t first = index; first < end; first += kBatch) {
      const int64_t count = std::min(kBatch, end - first);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t at = (g * forest.count() + first + i) * kBlock;
        multiply_scores(s.a.get(), group.query_columns.at(g, first + i), size, s.scores.get(),
                        kBlock);
        multiply_scores(s.b.get(), group.grad_columns.at(g, first + i), size_out, s.other.get(),
                        kBlock);
        for (int64_t k = 0; k < keys; ++k) {
          const uint32_t seen = first + i == index ? 0xffffffffu << k : 0xffffffffu;
          __m512 weight[2], ds[2];
#pragma GCC unroll 2
          for (int j = 0; j < 2; ++j) {
            const __mmask16 mask = __mmask16(seen >> (16 * j));
            const __m512 z = _mm512_load_ps(s.scores.get() + k * kBlock + 16 * j);
            const __m512 dp = _mm512_load_ps(s.other.get() + k * kBlock + 16 * j);
            const __m512 shift = _mm512_load_ps(group.lse.get() + at + 16 * j);
            const __m512 mean = _mm512_load_ps(group.delta.get() + at + 16 * j);
            weight[j] = _mm512_maskz_mov_ps(mask, exp2_of(_mm512_fmsub_ps(z, scale, shift)));
            ds[j] = _mm512_maskz_mul_ps(mask, weight[j], _mm512_sub_ps(dp, mean));
          }
          store_piece_row(s.weights.get() + i * kPiece + k * kBlock, weight[0], weight[1]);
          store_piece_row(s.other_weights.get() + i * kPiece + k * kBlock, ds[0], ds[1]);
        }
      }
      const bool is_first = g == 0 && first == index;
      multiply_path(s.weights.get(), group.grad_rows.at(g, first), nullptr, count, size_out,
                    s.other_out.get(), !is_first);
      multiply_path(s.other_weights.get(), group.query_rows.at(g, first), nullptr, count, size,
                    s.out.get(), !is_first);
    }
  }
  float factors[kBlock];
  std::fill(factors, factors + kBlock, 1.0f);
  write_rows(p.grad_value, key_head, block, s.other_out.get(), size_out, factors);
  std::fill(factors, factors + kBlock, p.scale);
  write_rows(p.grad_key, key_head, block, s.out.get(), size, factors);
}

bool ask_for_tiles() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl(2)
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool has_tiles = (d >> 24 & 1) && (d >> 22 & 1);
  if (!has_tiles || !__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a >> 5 & 1)) return false;
  return best_simd() == Simd::avx512 &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace

bool has_amx() {
  static const bool granted = ask_for_tiles();
  return granted;
}

void forward_amx(const Problem& p, int threads) {
  const Forest forest(p);
  const int64_t blocks = forest.count();
  Packed keys(p.key_heads, blocks, p.key.size), values(p.key_heads, blocks, p.value.size);
#pragma omp parallel num_threads(threads)
  {
    Scratch scratch(p, forest.longest_path);
    open_tiles();
#pragma omp for collapse(2) schedule(static)
    for (int64_t h = 0; h < p.key_heads; ++h) {
      for (int64_t b = 0; b < blocks; ++b) pack_forward(p, forest, b, h, keys, values, scratch);
    }
#pragma omp for collapse(2) schedule(dynamic, 4)
    for (int64_t h = 0; h < p.query_heads; ++h) {
      for (int64_t b = 0; b < blocks; ++b) forward_block(p, forest, keys, values, b, h, scratch);
    }
    close_tiles();
  }
}

void backward_amx(const Problem& p, int threads) {
  const Forest forest(p);
  const int64_t blocks = forest.count(), ratio = p.query_heads / p.key_heads;
  Group group(p, ratio, blocks);
#pragma omp parallel num_threads(threads)
  {
    Scratch scratch(p, forest.longest_path);
    open_tiles();
    for (int64_t key_head = 0; key_head < p.key_heads; ++key_head) {
#pragma omp for schedule(static) nowait
      for (int64_t b = 0; b < blocks; ++b) pack_key(p, forest, b, key_head, group, scratch);
#pragma omp for collapse(2) schedule(static)
      for (int64_t g = 0; g < ratio; ++g) {
        for (int64_t b = 0; b < blocks; ++b) {
          pack_query(p, forest, b, key_head * ratio + g, g, group, scratch);
        }
      }
#pragma omp for collapse(2) schedule(dynamic, 4) nowait
      for (int64_t g = 0; g < ratio; ++g) {
        for (int64_t b = 0; b < blocks; ++b) {
          grad_query_block(p, forest, group, b, key_head * ratio + g, g, scratch);
        }
      }
#pragma omp for schedule(dynamic, 2)
      for (int64_t b = 0; b < blocks; ++b) {
        grad_key_block(p, forest, group, b, key_head, scratch);
      }
    }
    close_tiles();
  }
}

}  // namespace fastpost

#else

namespace fastpost {

bool has_amx() { return false; }
void forward_amx(const Problem&, int) {}
void backward_amx(const Problem&, int) {}

}  // namespace fastpost

#endif
