// Sixteen-lane float vectors and bfloat16, for any machine: GCC/Clang vector extensions, and AVX-512 where it is there.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define JENGINE_AVX512 1
#include <immintrin.h>
#endif
#if defined(JENGINE_AVX512) && defined(__AVX512BF16__)
#define JENGINE_AVX512_BF16 1
#endif

#define JENGINE_INLINE inline __attribute__((always_inline))

namespace jengine {

constexpr int kLanes = 16;

typedef float v16f __attribute__((vector_size(64)));
typedef int32_t v16i __attribute__((vector_size(64)));

struct bf16 {
  uint16_t bits;
};

JENGINE_INLINE float to_float(float x) { return x; }
JENGINE_INLINE float to_float(bf16 x) {
  uint32_t bits = uint32_t{x.bits} << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

// Round to nearest even; a NaN stays a (quiet) NaN.
JENGINE_INLINE bf16 to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return {static_cast<uint16_t>((bits >> 16) | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

template <class To, class From>
JENGINE_INLINE To convert(From x) {
  if constexpr (sizeof(To) == sizeof(float)) {
    return to_float(x);
  } else {
    return to_bf16(to_float(x));
  }
}

// Into the L2 cache.
JENGINE_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }
JENGINE_INLINE void prefetch(const char* begin, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) prefetch(begin + i);
}

JENGINE_INLINE v16f splat(float x) { return v16f{} + x; }

JENGINE_INLINE v16f load(const float* p) {
  v16f out;
  std::memcpy(&out, p, sizeof(out));
  return out;
}
JENGINE_INLINE v16f load(const bf16* p) {
#ifdef JENGINE_AVX512
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
#else
  v16f out;
  for (int i = 0; i < kLanes; ++i) out[i] = to_float(p[i]);
  return out;
#endif
}
JENGINE_INLINE void store(float* p, v16f x) { std::memcpy(p, &x, sizeof(x)); }

JENGINE_INLINE v16f fma(v16f a, v16f b, v16f c) {
#ifdef JENGINE_AVX512
  return _mm512_fmadd_ps(a, b, c);
#else
  return a * b + c;  // contracted: the library is built with -ffp-contract=fast
#endif
}

JENGINE_INLINE v16f max(v16f a, v16f b) {
#ifdef JENGINE_AVX512
  return _mm512_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

JENGINE_INLINE float max_lane(v16f x) {
#ifdef JENGINE_AVX512
  return _mm512_reduce_max_ps(x);
#else
  float out = x[0];
  for (int i = 1; i < kLanes; ++i) out = out > x[i] ? out : x[i];
  return out;
#endif
}

// A fixed tree: halves, quarters, ...
JENGINE_INLINE float sum_lanes(v16f x) {
  float lane[kLanes];
  store(lane, x);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  }
  return lane[0];
}

JENGINE_INLINE void store_as(float* p, v16f x) { store(p, x); }
JENGINE_INLINE void store_as(bf16* p, v16f x) {
#ifdef JENGINE_AVX512_BF16
  const __m256bh packed = _mm512_cvtneps_pbh(x);
  std::memcpy(p, &packed, sizeof(packed));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = to_bf16(x[i]);
#endif
}

template <class T>
JENGINE_INLINE void store_first(T* p, v16f x, int count) {
  T lanes[kLanes];
  store_as(lanes, x);
  std::memcpy(p, lanes, count * sizeof(T));
}

// e^x within 2 ulp; 0 below -87.3 (so for -inf), never more than e^88.
JENGINE_INLINE v16f exp(v16f x) {
  const v16f lowest = splat(-87.3f), highest = splat(88.0f);
  const v16i is_zero = x < lowest;
  x = x < lowest ? lowest : x;
  x = x > highest ? highest : x;
  const v16f magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const v16f shifted = fma(x, splat(1.44269504088896341f), magic);
  const v16f n = shifted - magic;
  v16f r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  v16f p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r) + splat(1.0f);
  v16i bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  const v16i power_bits = (bits << 23) + 0x3f800000;  // the magic's own bits leave by the shift
  v16f power;
  std::memcpy(&power, &power_bits, sizeof(power));
  return is_zero ? v16f{} : p * power;
}

JENGINE_INLINE v16f tanh(v16f x) {
  const v16f e = exp(x + x);
  return splat(1.0f) - splat(2.0f) / (e + splat(1.0f));
}

#ifdef JENGINE_AVX512
// Rows of sixteen 32-bit words -> columns.
JENGINE_INLINE void transpose(__m512i (&r)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}
#endif

}  // namespace jengine
