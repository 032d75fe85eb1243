// Weights stay as stored, [out, in]; each block is transposed once, in registers or in the L2 cache, and meets all
// rows.
#include "linear.h"

#include "gemm.h"

namespace jengine {
namespace {

// Up to this many rows the step is bound by reading the weight: transpose in registers and use at once.
constexpr int kStreamRows = 8;
// `tiled` makes at least this many units a thread if it can with this many rows each: fewer would be mostly packing.
constexpr int64_t kMinUnits = 10;
constexpr int64_t kMinRows = 96;
// Below this much work per call a second thread costs more to wake than it saves.
constexpr int64_t kMinParallelBytes = 64 << 10;

template <class W>
struct Problem {
  const uint32_t* x;
  const W* w;
  const float* bias;  // or null
  Output y;
  int64_t rows, outputs, depth;
};

template <class W>
void put_part(const Problem<W>& p, int64_t m, int64_t n, v16f acc) {
  const int64_t at = m * p.outputs + n;
  const int count = static_cast<int>(p.outputs - n);
  float bias[kLanes] = {};
  if (p.bias) std::memcpy(bias, p.bias + n, count * sizeof(float));
  if (p.y.is_bf16) {
    store_first(static_cast<bf16*>(p.y.data) + at, acc + load(bias), count);
  } else {
    store_first(static_cast<float*>(p.y.data) + at, acc + load(bias), count);
  }
}

// Stores outputs [n, n + 16) of row m, as far as they exist.
template <class W>
JENGINE_INLINE void put(const Problem<W>& p, int64_t m, int64_t n, v16f acc) {
  if (n + kLanes > p.outputs) return put_part(p, m, n, acc);
  const int64_t at = m * p.outputs + n;
  if (p.bias) acc += load(p.bias + n);
  if (p.y.is_bf16) {
    store_as(static_cast<bf16*>(p.y.data) + at, acc);
  } else {
    store_as(static_cast<float*>(p.y.data) + at, acc);
  }
}

#ifdef JENGINE_AVX512
// Sixteen outputs at a time for M rows. The block of a later tile is prefetched line by line: the sixteen row streams
// are too many for the hardware's prefetcher, although together they are one contiguous stretch.
template <class Words, int M, class W>
void stream_panel(const Problem<W>& p, int64_t n0) {
  const int64_t bytes = p.depth * sizeof(*p.w), words = bytes / 4;
  const int valid = static_cast<int>(std::min<int64_t>(kLanes, p.outputs - n0));
  const char* base = reinterpret_cast<const char*>(p.w + n0 * p.depth);
  const char* ahead = base + kLanes * bytes;
  const uint32_t* x = p.x;
  static_assert(Words::kBlock % kLanes == 0);
  alignas(64) float sums[M][kLanes];
  v16f acc[M] = {};
  const auto row = [&](int i) { return base + std::min(i, valid - 1) * bytes; };
  int64_t k = 0;
  for (; k + kLanes <= words; k += kLanes) {
    __m512i r[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) prefetch(ahead + (k + i) * 64);
    load_block(r, row, k, words);
#pragma GCC unroll 16
    for (int j = 0; j < kLanes; ++j) {
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) acc[m] = Words::step(acc[m], x + m * words + k + j, (v16f)r[j]);
    }
    if ((k + kLanes) % Words::kBlock == 0) {  // as `multiply` does between blocks
      for (int m = 0; m < M; ++m) {
        store(sums[m], k < Words::kBlock ? acc[m] : load(sums[m]) + acc[m]);
        acc[m] = v16f{};
      }
    }
  }
  if (k < words) {
    alignas(64) uint32_t tail[kLanes * kLanes];
    pack_rows<Words, W>(tail, valid, (words - k) * Words::kElements,
                        [&](int i) { return reinterpret_cast<const W*>(row(i) + k * 4); });
    for (int64_t j = 0; k + j < words; ++j) {
      const v16f w = load(reinterpret_cast<const float*>(tail) + j * kLanes);
      for (int m = 0; m < M; ++m) acc[m] = Words::step(acc[m], x + m * words + k + j, w);
    }
  }
  for (int m = 0; m < M; ++m) {
    put(p, m, n0, words < Words::kBlock ? acc[m] : words % Words::kBlock ? load(sums[m]) + acc[m] : load(sums[m]));
  }
}

template <class Words, int M, class W>
void stream(Pool& pool, const Problem<W>& p, int workers) {
  if (p.rows < M) {
    if constexpr (M > 1) return stream<Words, M - 1>(pool, p, workers);
  }
  const int64_t panels = (p.outputs + kLanes - 1) / kLanes;
  const int64_t unit = std::max<int64_t>(1, std::min<int64_t>(8, panels / (4 * workers)));
  parallel_for(pool, (panels + unit - 1) / unit, workers, [&](int64_t u) {
    for (int64_t i = u * unit; i < std::min(panels, (u + 1) * unit); ++i) stream_panel<Words, M>(p, i * kLanes);
  });
}
#endif

// Many rows: pack a block of four panels, pass all rows over it in tiles, and fetch the next unit's weights meanwhile.
template <class Words, class W>
void tiled(Pool& pool, const Problem<W>& p, int workers) {
  constexpr int64_t kUnit = kTilePanels * kLanes;
  const int64_t words = p.depth / Words::kElements, row_bytes = p.depth * sizeof(W);
  const int64_t block = std::min(Words::kBlock, words);  // of four panels: 72 KB of the L2 cache at most
  // Units are 64 outputs times all rows, or a part of the rows where that would leave threads idle at the end.
  const int64_t num_columns = (p.outputs + kUnit - 1) / kUnit;
  const int64_t max_parts = std::max<int64_t>(1, p.rows / kMinRows);
  const int64_t num_parts = std::clamp<int64_t>(kMinUnits * workers / num_columns, 1, max_parts);
  const int64_t num_tiles = (p.rows + kTileRows - 1) / kTileRows, tile_rows = (p.rows + num_tiles - 1) / num_tiles;
  const int64_t part_tiles = (num_tiles + num_parts - 1) / num_parts, part_rows = part_tiles * tile_rows;
  const int64_t num_steps = part_tiles * ((words + block - 1) / block);
  parallel_claim(pool, num_columns * num_parts, workers, [&](int64_t u, const auto& claim, int64_t& finished) {
    Buffer<uint32_t> packed(kUnit * block);
    Buffer<float> sums((words > block ? part_rows : tile_rows) * kUnit);  // of more rows only if they wait for blocks
    while (u >= 0) {
      const int64_t next = claim();
      const int64_t n0 = u / num_parts * kUnit, count = std::min(kUnit, p.outputs - n0);
      const int64_t m0 = u % num_parts * part_rows, m1 = std::min(p.rows, m0 + part_rows);
      const int panels = static_cast<int>((count + kLanes - 1) / kLanes);
      const int64_t next_n0 = next / num_parts * kUnit;
      const bool is_ahead = next >= 0 && next_n0 != n0;
      const char* ahead = reinterpret_cast<const char*>(p.w + (is_ahead ? next_n0 * p.depth : 0));
      const int64_t ahead_bytes = is_ahead ? std::min(kUnit, p.outputs - next_n0) * row_bytes : 0;
      const int64_t slice = (ahead_bytes / num_steps + 63) / 64 * 64;
      int64_t fetched = 0;
      for (int64_t k = 0; k < words; k += block) {
        const int64_t depth = std::min(block, words - k);
        for (int i = 0; i < panels; ++i) {
          const W* first = p.w + (n0 + i * kLanes) * p.depth + k * Words::kElements;
          const int valid = static_cast<int>(std::min<int64_t>(kLanes, count - i * kLanes));
          pack_rows<Words, W>(packed.get() + i * block * kLanes, valid, depth * Words::kElements,
                              [&](int r) { return first + r * p.depth; });
        }
        for (int64_t m = m0; m < m1; m += tile_rows) {
          const int count_rows = static_cast<int>(std::min(tile_rows, m1 - m));
          float* c = &sums[words > block ? (m - m0) * kUnit : 0];
          Tile tile{c, kUnit, p.x + m * words + k, words, packed.get(), block * kLanes, depth, k > 0};
          tile.ahead = ahead + fetched;
          tile.ahead_lines = std::clamp<int64_t>((ahead_bytes - fetched + 63) / 64, 0, slice / 64);
          fetched += slice;
          multiply<Words>(tile, count_rows, panels);
          if (k + depth < words) continue;
          for (int i = 0; i < count_rows; ++i) {
            for (int n = 0; n < panels; ++n) put(p, m + i, n0 + n * kLanes, load(c + i * kUnit + n * kLanes));
          }
        }
      }
      ++finished;
      u = next;
    }
  });
}

template <class Words, class W>
void run(Pool& pool, const Problem<W>& p) {
  const int64_t bytes = p.outputs * p.depth * static_cast<int64_t>(sizeof(W));
  const int workers = bytes * (p.rows + 7) / 8 < kMinParallelBytes ? 1 : pool.num_threads();
#ifdef JENGINE_AVX512
  if constexpr (sizeof(W) == sizeof(typename Words::Element)) {
    if (p.rows <= kStreamRows) return stream<Words, kStreamRows>(pool, p, workers);
  }
#endif
  tiled<Words>(pool, p, workers);
}

}  // namespace

template <class X, class W>
void linear(Pool& pool, const X* x, const W* w, const float* bias, Output y, int64_t rows, int64_t outputs,
            int64_t depth) {
  if (rows <= 0 || outputs <= 0) return;
  Problem<W> p{reinterpret_cast<const uint32_t*>(x), w, bias, y, rows, outputs, depth};
  if constexpr (sizeof(X) == 4) {
    run<FloatWords>(pool, p);
  } else if constexpr (sizeof(W) == 2 && Bf16Words::kElements == 2) {
    run<Bf16Words>(pool, p);
  } else {
    Buffer<float> wide(rows * depth);
    for (int64_t i = 0; i < rows * depth; ++i) wide[i] = to_float(x[i]);
    p.x = reinterpret_cast<const uint32_t*>(wide.get());
    run<FloatWords>(pool, p);
  }
}

template void linear(Pool&, const bf16*, const bf16*, const float*, Output, int64_t, int64_t, int64_t);
template void linear(Pool&, const float*, const bf16*, const float*, Output, int64_t, int64_t, int64_t);
template void linear(Pool&, const float*, const float*, const float*, Output, int64_t, int64_t, int64_t);

}  // namespace jengine
