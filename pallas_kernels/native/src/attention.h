#pragma once

#include <cstdint>

#include "parallel.h"
#include "simd.h"

namespace jengine {

constexpr int64_t kMaxHeadDim = 256;

template <class Q, class KV>
struct Attention {
  // Arrays
  const Q* q;                 // [tokens][q_heads][head_dim]
  const KV* pages;            // [pages][page_size][2][kv_heads][head_dim]
  const int32_t* page_table;  // [seqs][pages_per_seq]
  const int32_t* cu_q_lens;   // [seqs + 1]
  const int32_t* kv_lens;     // [seqs]
  const float* sinks;         // [q_heads] or null
  Q* out;                     // [tokens][q_heads][head_dim]
  // Sizes
  int64_t tokens, q_heads, kv_heads, head_dim, num_pages, page_size, pages_per_seq, num_seqs;
  // Scores
  float scale;
  int64_t window;   // 0: none
  float soft_cap;   // 0: none
};

template <class Q, class KV>
void attention(Pool& pool, const Attention<Q, KV>& a);

}  // namespace jengine
