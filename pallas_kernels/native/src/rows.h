// Operations that move or scan rows: the KV write and the arg max.
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

}  // namespace jengine
