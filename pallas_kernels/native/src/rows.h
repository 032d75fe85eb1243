// Operations on rows: the KV write, the arg max, the RMS norm, SwiGLU's product.
#pragma once

#include <cstdint>

#include "parallel.h"
#include "simd.h"

namespace jengine {

// pages[slots[t]] = (k[t], v[t]) for t < tokens; `width` = kv heads x head dim; negative slots are skipped.
template <class Page, class New>
void kv_write(Page* pages, const New* k, const New* v, const int32_t* slots, int64_t tokens, int64_t num_slots,
              int64_t width);

// First index of each row's largest value, or of its first NaN.
void argmax_rows(Pool& pool, const float* x, int32_t* out, int64_t rows, int64_t columns);

// y = round(x / sqrt(mean(x^2) + eps)) * weight, row by row, in float32; both results rounded to T.
template <class T>
void rms_norm(Pool& pool, const T* x, const float* weight, float eps, T* y, int64_t rows, int64_t width);

// y[r][i] = silu(x[r][i]) * x[r][width + i], in float32, rounded once; x has 2 * width columns.
template <class T>
void silu_mul(Pool& pool, const T* x, T* y, int64_t rows, int64_t width);

}  // namespace jengine
