#pragma once

#include <cstdint>

#include "parallel.h"
#include "simd.h"

namespace jengine {

struct Output {
  void* data;
  bool is_bf16;  // else float
};

// y[m][n] = x[m] . w[n] + bias[n] for m < rows; w is [outputs][depth], bias may be null. bfloat16 x needs an even
// depth.
template <class X, class W>
void linear(Pool& pool, const X* x, const W* w, const float* bias, Output y, int64_t rows, int64_t outputs,
            int64_t depth);

}  // namespace jengine
