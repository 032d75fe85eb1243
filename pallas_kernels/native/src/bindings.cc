// XLA FFI handlers: check arguments, pick the element types, call the kernels.
#include <sched.h>

#include <algorithm>
#include <string>

#include "attention.h"
#include "linear.h"
#include "rows.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace jengine {

void wait_a_moment(int round) {
  // The last unit of a loop ends within microseconds unless its thread lost its core: then leave the core to it.
  if (round >= 2000) {
    sched_yield();
    return;
  }
#ifdef __x86_64__
  __builtin_ia32_pause();
#endif
}

namespace {

class XlaPool final : public Pool {
 public:
  explicit XlaPool(ffi::ThreadPool& pool) : pool_(pool), num_threads_(static_cast<int>(pool.num_threads())) {}
  int num_threads() const override { return num_threads_ > 0 ? num_threads_ : 1; }
  void schedule(std::function<void()> task) override { pool_.Schedule(std::move(task)); }

 private:
  ffi::ThreadPool& pool_;
  const int num_threads_;
};

template <class T>
T* data(ffi::AnyBuffer buffer) {
  return static_cast<T*>(buffer.untyped_data());
}

bool is_bf16(const ffi::AnyBuffer& buffer) { return buffer.element_type() == ffi::BF16; }
bool is_float(const ffi::AnyBuffer& buffer) { return buffer.element_type() == ffi::F32; }

// Calls f with a null pointer of the buffer's element type, float32 or bfloat16.
template <class F>
ffi::Error with_type(const ffi::AnyBuffer& buffer, const F& f) {
  if (is_bf16(buffer)) return f(static_cast<bf16*>(nullptr));
  if (is_float(buffer)) return f(static_cast<float*>(nullptr));
  return ffi::Error::InvalidArgument("jengine: element type must be float32 or bfloat16");
}

int64_t clamp(int64_t x, int64_t high) { return std::min(std::max<int64_t>(x, 0), high); }

// The number of rows of y to compute; the padding rows after them become zero.
int64_t real_rows(ffi::Buffer<ffi::S32> num_tokens, ffi::AnyBuffer y) {
  const int64_t tokens = y.dimensions()[0], rows = clamp(num_tokens.typed_data()[0], tokens);
  const int64_t row_bytes = y.size_bytes() / std::max<int64_t>(tokens, 1);
  std::memset(static_cast<char*>(y.untyped_data()) + rows * row_bytes, 0, (tokens - rows) * row_bytes);
  return rows;
}

ffi::Error run_linear(ffi::ThreadPool xla_pool, ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::Buffer<ffi::F32> bias,
                      ffi::Buffer<ffi::S32> num_tokens, ffi::Result<ffi::AnyBuffer> y) {
  XlaPool pool(xla_pool);
  const int64_t depth = x.dimensions()[1], outputs = w.dimensions()[0];
  const int64_t rows = real_rows(num_tokens, *y);
  const float* b = bias.element_count() > 0 ? bias.typed_data() : nullptr;
  const Output out{y->untyped_data(), is_bf16(*y)};
  if (is_bf16(x) && is_bf16(w)) {
    linear(pool, data<bf16>(x), data<bf16>(w), b, out, rows, outputs, depth);
  } else if (is_float(x) && is_bf16(w)) {
    linear(pool, data<float>(x), data<bf16>(w), b, out, rows, outputs, depth);
  } else if (is_float(x) && is_float(w)) {
    linear(pool, data<float>(x), data<float>(w), b, out, rows, outputs, depth);
  } else {
    return ffi::Error::InvalidArgument("jengine_linear: unsupported element types");
  }
  return ffi::Error::Success();
}

ffi::Error run_kv_write(ffi::AnyBuffer pages, ffi::AnyBuffer k, ffi::AnyBuffer v, ffi::Buffer<ffi::S32> slots,
                        ffi::Buffer<ffi::S32> num_tokens, ffi::Result<ffi::AnyBuffer> out) {
  if (out->untyped_data() != pages.untyped_data()) {
    return ffi::Error::Internal("jengine_kv_write: the result is not the pages' own buffer");
  }
  const auto shape = pages.dimensions();  // [P, B, 2, K, H], or [P, B, E]: k and v are the halves of an entry
  const int64_t num_slots = shape[0] * shape[1], width = pages.element_count() / std::max<int64_t>(1, 2 * num_slots);
  const int64_t tokens = clamp(num_tokens.typed_data()[0], slots.element_count());
  return with_type(pages, [&](auto* page) {
    return with_type(k, [&](auto* entry) {
      using Page = std::remove_pointer_t<decltype(page)>;
      using New = std::remove_pointer_t<decltype(entry)>;
      kv_write(data<Page>(*out), data<New>(k), data<New>(v), slots.typed_data(), tokens, num_slots, width);
      return ffi::Error::Success();
    });
  });
}

ffi::Error run_attention(ffi::ThreadPool xla_pool, ffi::AnyBuffer q, ffi::AnyBuffer pages,
                         ffi::Buffer<ffi::S32> page_table, ffi::Buffer<ffi::S32> cu_q_lens,
                         ffi::Buffer<ffi::S32> kv_lens, ffi::Buffer<ffi::S32> num_seqs, ffi::Buffer<ffi::F32> sinks,
                         ffi::Result<ffi::AnyBuffer> out, float scale, int64_t window, float soft_cap) {
  XlaPool pool(xla_pool);
  const auto q_shape = q.dimensions(), page_shape = pages.dimensions(), table_shape = page_table.dimensions();
  return with_type(q, [&](auto* query) {
    return with_type(pages, [&](auto* page) {
      using Q = std::remove_pointer_t<decltype(query)>;
      using KV = std::remove_pointer_t<decltype(page)>;
      Attention<Q, KV> a;
      a.q = data<Q>(q);
      a.pages = data<KV>(pages);
      a.page_table = page_table.typed_data();
      a.cu_q_lens = cu_q_lens.typed_data();
      a.kv_lens = kv_lens.typed_data();
      a.sinks = sinks.element_count() > 0 ? sinks.typed_data() : nullptr;
      a.out = data<Q>(*out);
      a.tokens = q_shape[0];
      a.q_heads = q_shape[1];
      a.head_dim = q_shape[2];
      a.num_pages = page_shape[0];
      a.page_size = page_shape[1];
      a.kv_heads = page_shape[3];
      a.pages_per_seq = table_shape[1];
      a.num_seqs = clamp(num_seqs.typed_data()[0], table_shape[0]);
      a.scale = scale;
      a.window = window;
      a.soft_cap = soft_cap;
      attention(pool, a);
      return ffi::Error::Success();
    });
  });
}

ffi::Error run_argmax_rows(ffi::ThreadPool xla_pool, ffi::Buffer<ffi::F32> x, ffi::ResultBuffer<ffi::S32> out) {
  XlaPool pool(xla_pool);
  argmax_rows(pool, x.typed_data(), out->typed_data(), x.dimensions()[0], x.dimensions()[1]);
  return ffi::Error::Success();
}

ffi::Error run_rms_norm(ffi::ThreadPool xla_pool, ffi::AnyBuffer x, ffi::Buffer<ffi::F32> weight,
                        ffi::Buffer<ffi::S32> num_tokens, ffi::Result<ffi::AnyBuffer> y, float eps) {
  XlaPool pool(xla_pool);
  const int64_t width = weight.element_count();
  const int64_t rows = real_rows(num_tokens, *y);
  return with_type(x, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    rms_norm(pool, data<T>(x), weight.typed_data(), eps, data<T>(*y), rows, width);
    return ffi::Error::Success();
  });
}

ffi::Error run_silu_mul(ffi::ThreadPool xla_pool, ffi::AnyBuffer x, ffi::Buffer<ffi::S32> num_tokens,
                        ffi::Result<ffi::AnyBuffer> y) {
  XlaPool pool(xla_pool);
  const int64_t width = y->dimensions()[1];
  const int64_t rows = real_rows(num_tokens, *y);
  return with_type(x, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    silu_mul(pool, data<T>(x), data<T>(*y), rows, width);
    return ffi::Error::Success();
  });
}

}  // namespace
}  // namespace jengine

XLA_FFI_DEFINE_HANDLER_SYMBOL(jengine_linear, jengine::run_linear,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()             // x
                                  .Arg<ffi::AnyBuffer>()             // w
                                  .Arg<ffi::Buffer<ffi::F32>>()      // bias, or empty
                                  .Arg<ffi::Buffer<ffi::S32>>()      // num_tokens
                                  .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jengine_kv_write, jengine::run_kv_write,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()             // pages
                                  .Arg<ffi::AnyBuffer>()             // k
                                  .Arg<ffi::AnyBuffer>()             // v
                                  .Arg<ffi::Buffer<ffi::S32>>()      // slots
                                  .Arg<ffi::Buffer<ffi::S32>>()      // num_tokens
                                  .Ret<ffi::AnyBuffer>());           // pages, the same buffer

XLA_FFI_DEFINE_HANDLER_SYMBOL(jengine_ragged_paged_attention, jengine::run_attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()             // q
                                  .Arg<ffi::AnyBuffer>()             // pages
                                  .Arg<ffi::Buffer<ffi::S32>>()      // page_table
                                  .Arg<ffi::Buffer<ffi::S32>>()      // cu_q_lens
                                  .Arg<ffi::Buffer<ffi::S32>>()      // kv_lens
                                  .Arg<ffi::Buffer<ffi::S32>>()      // num_seqs
                                  .Arg<ffi::Buffer<ffi::F32>>()      // sinks, or empty
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<float>("scale")
                                  .Attr<int64_t>("window")
                                  .Attr<float>("soft_cap"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jengine_argmax_rows, jengine::run_argmax_rows,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jengine_rms_norm, jengine::run_rms_norm,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()             // x
                                  .Arg<ffi::Buffer<ffi::F32>>()      // weight
                                  .Arg<ffi::Buffer<ffi::S32>>()      // num_tokens
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<float>("eps"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jengine_silu_mul, jengine::run_silu_mul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()             // x
                                  .Arg<ffi::Buffer<ffi::S32>>()      // num_tokens
                                  .Ret<ffi::AnyBuffer>());
