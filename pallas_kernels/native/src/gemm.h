// The one dot product of this library: every output lane adds the products of the reduction axis in ascending order, in
// float32, whatever the number of rows and however they are tiled. So the bits of a row never depend on its batch.
//
// Both operands are read as 32-bit "words" along the reduction axis: one float, or two neighbouring bfloat16
// (AVX512-BF16, whose instruction adds the pair). The right operand is packed in panels of sixteen outputs:
// panel[word][16].
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>

#include "simd.h"

namespace jengine {

// Sums run over blocks of kBlock words, and the sums of blocks are added in order: rounding grows with the length of a
// chain of additions, and where inputs are float32 somebody counts on its digits.
struct FloatWords {
  using Element = float;
  static constexpr int kElements = 1;
  static constexpr int64_t kBlock = 32;
  static JENGINE_INLINE v16f step(v16f acc, const void* x, v16f w) {
    float value;
    std::memcpy(&value, x, 4);
    return fma(splat(value), w, acc);
  }
};

#ifdef JENGINE_AVX512_BF16
struct Bf16Words {
  using Element = bf16;
  static constexpr int kElements = 2;
  static constexpr int64_t kBlock = 288;
  static JENGINE_INLINE v16f step(v16f acc, const void* x, v16f w) {
    int32_t pair;
    std::memcpy(&pair, x, 4);
    return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)w);
  }
};
#else
using Bf16Words = FloatWords;  // bfloat16 is widened while packing
#endif

// Tiles of 6 rows x 4 panels: 24 of 32 registers accumulate, and 10 loads feed 24 multiply-adds.
constexpr int kTileRows = 6;
constexpr int kTilePanels = 4;

// Uninitialised, on cache-line boundaries: sixteen-lane accesses that straddle lines cost twice.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : data_(static_cast<T*>(::operator new(count * sizeof(T), kAlignment))) {}
  ~Buffer() { ::operator delete(data_, kAlignment); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  T* const data_;
};

// c[m][16 n ...] (+)= x[m] . panel[n] over `words` steps, for up to kTileRows rows and kTilePanels panels. Rows of x
// and c are x_stride words and c_stride floats apart, panels panel_stride words.
struct Tile {
  float* c;
  int64_t c_stride;
  const uint32_t* x;
  int64_t x_stride;
  const uint32_t* panels;
  int64_t panel_stride;
  int64_t words;
  bool accumulate;
  // Memory to prefetch meanwhile, line by line, one a step: in a burst they would fill the core's miss queue.
  const char* ahead = nullptr;
  int64_t ahead_lines = 0;
};

template <class Words>
void multiply(const Tile& tile, int rows, int panels);

#ifdef JENGINE_AVX512
// The block of words [k, k + 16) of sixteen rows, transposed; words past `words` are zero.
template <class Base>
JENGINE_INLINE void load_block(__m512i (&r)[kLanes], const Base& row, int64_t k, int64_t words) {
  if (k + kLanes <= words) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) r[i] = _mm512_loadu_si512(row(i) + k * 4);
  } else {
    const __mmask16 mask = static_cast<__mmask16>((1u << (words - k)) - 1);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) r[i] = _mm512_maskz_loadu_epi32(mask, row(i) + k * 4);
  }
  transpose(r);
}
#endif

// Packs up to sixteen rows of `count` elements (row(i) -> pointer) as one panel. The lanes of missing rows repeat the
// first row: ignore what they give.
template <class Words, class T, class Row>
inline void pack_rows(uint32_t* panel, int num_rows, int64_t count, const Row& row) {
  const int64_t words = count / Words::kElements;
#ifdef JENGINE_AVX512
  if constexpr (sizeof(T) == sizeof(typename Words::Element)) {
    const char* base[kLanes];
    for (int i = 0; i < kLanes; ++i) base[i] = reinterpret_cast<const char*>(row(i < num_rows ? i : 0));
    for (int64_t k = 0; k < words; k += kLanes) {
      __m512i r[kLanes];
      load_block(r, [&](int i) { return base[i]; }, k, words);
      const int64_t columns = std::min<int64_t>(kLanes, words - k);
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) {  // constant indices keep r in registers
        if (j < columns) _mm512_storeu_si512(panel + (k + j) * kLanes, r[j]);
      }
    }
    return;
  }
#endif
  using E = typename Words::Element;
  E* out = reinterpret_cast<E*>(panel);
  for (int i = 0; i < kLanes; ++i) {
    const T* source = row(i < num_rows ? i : 0);
    for (int64_t k = 0; k < count; ++k) {
      out[(k / Words::kElements * kLanes + i) * Words::kElements + k % Words::kElements] = convert<E>(source[k]);
    }
  }
}

// Packs the transpose: the reduction axis runs over `num_rows` rows, outputs over their elements [0, count), count a
// multiple of sixteen. `row(i)` is never null. Panels are `panel_stride` words apart.
template <class Words, class T, class Row>
inline void pack_columns(uint32_t* panels, int64_t panel_stride, int num_rows, int64_t count, const Row& row) {
  using E = typename Words::Element;
  constexpr int kE = Words::kElements;
  const int words = (num_rows + kE - 1) / kE;
  alignas(64) static constexpr uint8_t kZeros[1024] = {};
  for (int w = 0; w < words; ++w) {
    const T* source[kE];
    for (int e = 0; e < kE; ++e) {
      const T* p = w * kE + e < num_rows ? row(w * kE + e) : nullptr;
      source[e] = p ? p : reinterpret_cast<const T*>(kZeros);
    }
    for (int64_t n = 0; n < count; n += kLanes) {
      E* out = reinterpret_cast<E*>(panels + n / kLanes * panel_stride + w * kLanes);
#ifdef JENGINE_AVX512_BF16
      if constexpr (kE == 2 && sizeof(T) == 2) {
        const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source[0] + n));
        const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source[1] + n));
        const __m512i low = _mm512_cvtepu16_epi32(a), high = _mm512_cvtepu16_epi32(b);
        _mm512_storeu_si512(out, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        continue;
      }
#endif
      for (int i = 0; i < kLanes; ++i) {
        for (int e = 0; e < kE; ++e) out[i * kE + e] = convert<E>(source[e][n + i]);
      }
    }
  }
}

}  // namespace jengine
