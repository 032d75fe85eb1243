#include "gemm.h"

#include <array>
#include <utility>

namespace jengine {
namespace {

template <class Words, int M, int N>
void multiply_tile(const Tile& t) {
  v16f acc[M][N];
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) acc[m][n] = v16f{};
  }
  prefetch(t.ahead + t.words * 64, std::max<int64_t>(0, t.ahead_lines - t.words) * 64);
  const uint32_t* x = t.x;
  const float* panel = reinterpret_cast<const float*>(t.panels);
  for (int64_t k = 0; k < t.words; ++k) {
    if (k < t.ahead_lines) prefetch(t.ahead + k * 64);
    v16f w[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) w[n] = load(panel + n * t.panel_stride + k * kLanes);
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[m][n] = Words::step(acc[m][n], x + m * t.x_stride + k, w[n]);
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) {
      float* c = t.c + m * t.c_stride + n * kLanes;
      store(c, t.accumulate ? load(c) + acc[m][n] : acc[m][n]);
    }
  }
}

template <class Words, int... I>
constexpr auto tile_table(std::integer_sequence<int, I...>) {
  return std::array<void (*)(const Tile&), sizeof...(I)>{
      &multiply_tile<Words, I / kTilePanels + 1, I % kTilePanels + 1>...};
}

}  // namespace

template <class Words>
void multiply(const Tile& tile, int rows, int panels) {
  static constexpr auto kTable = tile_table<Words>(std::make_integer_sequence<int, kTileRows * kTilePanels>{});
  kTable[(rows - 1) * kTilePanels + panels - 1](tile);
}

template void multiply<FloatWords>(const Tile&, int, int);
#ifdef JENGINE_AVX512_BF16
template void multiply<Bf16Words>(const Tile&, int, int);
#endif

}  // namespace jengine
