#include "rows.h"

#include <algorithm>
#include <cmath>

namespace jengine {

constexpr int64_t kRowUnit = 16;  // rows that a thread takes at a time

template <class Page, class New>
void kv_write(Page* pages, const New* k, const New* v, const int32_t* slots, int64_t tokens, int64_t num_slots,
              int64_t width) {
  for (int64_t t = 0; t < tokens; ++t) {
    if (slots[t] < 0 || slots[t] >= num_slots) continue;
    Page* out = pages + slots[t] * 2 * width;
    if constexpr (sizeof(Page) == sizeof(New)) {
      std::memcpy(out, k + t * width, width * sizeof(Page));
      std::memcpy(out + width, v + t * width, width * sizeof(Page));
    } else {
      for (int64_t i = 0; i < width; ++i) out[i] = convert<Page>(k[t * width + i]);
      for (int64_t i = 0; i < width; ++i) out[width + i] = convert<Page>(v[t * width + i]);
    }
  }
}

template void kv_write(bf16*, const bf16*, const bf16*, const int32_t*, int64_t, int64_t, int64_t);
template void kv_write(bf16*, const float*, const float*, const int32_t*, int64_t, int64_t, int64_t);
template void kv_write(float*, const bf16*, const bf16*, const int32_t*, int64_t, int64_t, int64_t);
template void kv_write(float*, const float*, const float*, const int32_t*, int64_t, int64_t, int64_t);

namespace {

// Four vectors at a time find the block that first holds the maximum; the index is then looked up in that block.
int32_t argmax(const float* x, int64_t n) {
  constexpr int64_t kBlock = 1024;
  float best = 0.0f;
  int64_t best_block = -1;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t count = std::min(kBlock, n - begin);
    const float* p = x + begin;
    int64_t i = 0;
    v16f high[4];
    v16i is_nan[4] = {};
    for (v16f& h : high) h = splat(p[0]);
    for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const v16f v = load(p + i + j * kLanes);
        is_nan[j] |= v != v;
        high[j] = max(high[j], v);
      }
    }
    const v16i any_nan = is_nan[0] | is_nan[1] | is_nan[2] | is_nan[3];
    bool has_nan = false;
    for (int lane = 0; lane < kLanes; ++lane) has_nan |= any_nan[lane] != 0;
    float block_best = max_lane(max(max(high[0], high[1]), max(high[2], high[3])));
    for (; i < count; ++i) {
      has_nan |= p[i] != p[i];
      block_best = p[i] > block_best ? p[i] : block_best;
    }
    if (has_nan) {
      for (i = 0; p[i] == p[i]; ++i) {
      }
      return static_cast<int32_t>(begin + i);
    }
    if (best_block < 0 || block_best > best) {
      best = block_best;
      best_block = begin;
    }
  }
  int64_t i = std::max<int64_t>(best_block, 0);
  while (i + 1 < n && x[i] != best) ++i;
  return static_cast<int32_t>(i);
}

}  // namespace

void argmax_rows(Pool& pool, const float* x, int32_t* out, int64_t rows, int64_t columns) {
  const int workers = rows * columns < (1 << 15) ? 1 : pool.num_threads();
  parallel_for(pool, rows, workers, [&](int64_t r) { out[r] = argmax(x + r * columns, columns); });
}

namespace {

// Four interleaved sums, then a fixed tree.
template <class T>
float sum_of_squares(const T* x, int64_t width) {
  v16f sum[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= width; i += 4 * kLanes) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const v16f v = load(x + i + j * kLanes);
      sum[j] = fma(v, v, sum[j]);
    }
  }
  for (int j = 0; i + kLanes <= width; i += kLanes, ++j) {
    const v16f v = load(x + i);
    sum[j] = fma(v, v, sum[j]);
  }
  float rest = 0.0f;
  for (; i < width; ++i) rest += to_float(x[i]) * to_float(x[i]);
  return sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3])) + rest;
}

}  // namespace

template <class T>
void rms_norm(Pool& pool, const T* x, const float* weight, float eps, T* y, int64_t rows, int64_t width) {
  const int workers = rows * width < (1 << 15) ? 1 : pool.num_threads();
  parallel_for(pool, (rows + kRowUnit - 1) / kRowUnit, workers, [&](int64_t unit) {
    for (int64_t r = unit * kRowUnit; r < std::min(rows, (unit + 1) * kRowUnit); ++r) {
      const T* in = x + r * width;
      T* out = y + r * width;
      const float factor = 1.0f / std::sqrt(sum_of_squares(in, width) / static_cast<float>(width) + eps);
      int64_t i = 0;
      for (; i + kLanes <= width; i += kLanes) {
        store_as(out + i, load(in + i) * splat(factor));
        store_as(out + i, load(out + i) * load(weight + i));
      }
      for (; i < width; ++i) out[i] = convert<T>(to_float(convert<T>(to_float(in[i]) * factor)) * weight[i]);
    }
  });
}

template void rms_norm(Pool&, const bf16*, const float*, float, bf16*, int64_t, int64_t);
template void rms_norm(Pool&, const float*, const float*, float, float*, int64_t, int64_t);

template <class T>
void silu_mul(Pool& pool, const T* x, T* y, int64_t rows, int64_t width) {
  const auto silu = [](v16f v) { return v / (splat(1.0f) + exp(-v)); };
  const int workers = rows * width < (1 << 15) ? 1 : pool.num_threads();
  parallel_for(pool, (rows + kRowUnit - 1) / kRowUnit, workers, [&](int64_t unit) {
    for (int64_t r = unit * kRowUnit; r < std::min(rows, (unit + 1) * kRowUnit); ++r) {
      const T *gate = x + r * 2 * width, *up = gate + width;
      T* out = y + r * width;
      int64_t i = 0;
      for (; i + kLanes <= width; i += kLanes) store_as(out + i, silu(load(gate + i)) * load(up + i));
      if (i < width) {
        T last[2][kLanes] = {};
        std::memcpy(last[0], gate + i, (width - i) * sizeof(T));
        std::memcpy(last[1], up + i, (width - i) * sizeof(T));
        store_first(out + i, silu(load(last[0])) * load(last[1]), static_cast<int>(width - i));
      }
    }
  });
}

template void silu_mul(Pool&, const bf16*, bf16*, int64_t, int64_t);
template void silu_mul(Pool&, const float*, float*, int64_t, int64_t);

}  // namespace jengine
