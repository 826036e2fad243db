// Between memory and lanes: loads that widen a storage type to the compute type, and stores that round back to it.
//
// Precision policy: widening is exact. Rounding is to the nearest, ties to even, once (store_pair says where it is
// not). float16 and bfloat16 keep infinities, NaN and denormals on every instruction set, with and without hardware
// that converts them.
#pragma once

#include "simd/vec.h"

namespace logitless::LL_ISA {

template <class T> LL_INLINE Vec<Compute<T>> load(const T* p);
template <> LL_INLINE Vec<float> load<float>(const float* p) {
  Vec<float> v;
  memcpy(&v, p, LL_BYTES);
  return v;
}
template <> LL_INLINE Vec<double> load<double>(const double* p) {
  Vec<double> v;
  memcpy(&v, p, LL_BYTES);
  return v;
}

// As many 16-bit lanes as there are float lanes.
typedef uint16_t HalfVec __attribute__((vector_size(LL_BYTES / 2)));
LL_INLINE HalfVec load_bits(const void* p) {
  HalfVec v;
  memcpy(&v, p, LL_BYTES / 2);
  return v;
}

// A bfloat16 is the upper half of a float.
LL_INLINE Vec<float> widen_bfloat16(HalfVec h) {
  return as_real<float>(__builtin_convertvector(h, IntVec<float>) << 16);
}
// Rounded to nearest even, in the upper 16 bits of each lane; a NaN keeps its upper payload and is made quiet.
LL_INLINE IntVec<float> rounded_to_bfloat16(Vec<float> v) {
  const IntVec<float> bits = as_int<float>(v);
  const IntVec<float> rounded = bits + 0x7fff + ((bits >> 16) & 1);
  return v == v ? rounded : (bits | 0x400000);
}
LL_INLINE HalfVec narrow_bfloat16(Vec<float> v) {
  return __builtin_convertvector(rounded_to_bfloat16(v) >> 16, HalfVec);
}
LL_INLINE Vec<float> widen_float16(HalfVec h) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(reinterpret_cast<__m256i>(h));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(reinterpret_cast<__m128i>(h));
#else
  const IntVec<float> x = __builtin_convertvector(h, IntVec<float>);
  const IntVec<float> sign = (x & 0x8000) << 16, magnitude = x & 0x7fff;
  // Multiplying by 2^112 rebiases the exponent and makes half denormals normal.
  const Vec<float> scaled = as_real<float>(magnitude << 13) * 0x1p112f;
  const IntVec<float> finite = as_int<float>(scaled), special = (magnitude << 13) | 0x7f800000;
  return as_real<float>((magnitude >= 0x7c00 ? special : finite) | sign);
#endif
}
LL_INLINE HalfVec narrow_float16(Vec<float> v) {
#if defined(__AVX512F__)
  return reinterpret_cast<HalfVec>(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  return reinterpret_cast<HalfVec>(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
  const IntVec<float> bits = as_int<float>(v), sign = (bits >> 16) & 0x8000;
  const IntVec<float> magnitude = bits & 0x7fffffff;
  const IntVec<float> normal = (magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Adding 0.5 shifts a value below 2^-14 so that its last kept bit is the half denormal's, rounded by the adder.
  const IntVec<float> denormal = as_int<float>(as_real<float>(magnitude) + 0.5f) - 0x3f000000;
  IntVec<float> half = magnitude < (113 << 23) ? denormal : normal;
  half = magnitude >= 0x477ff000 ? IntVec<float>{} + 0x7c00 : half;
  half = magnitude > 0x7f800000 ? (0x7e00 | ((magnitude >> 13) & 0x3ff)) : half;
  return __builtin_convertvector(half | sign, HalfVec);
#endif
}
template <> LL_INLINE Vec<float> load<BFloat16>(const BFloat16* p) { return widen_bfloat16(load_bits(p)); }
template <> LL_INLINE Vec<float> load<Float16>(const Float16* p) { return widen_float16(load_bits(p)); }

template <class T> LL_INLINE HalfVec narrow_bits(Vec<float> v) {
  if constexpr (__is_same(T, BFloat16))
    return narrow_bfloat16(v);
  else
    return narrow_float16(v);
}
LL_INLINE void store(float* p, Vec<float> v) { memcpy(p, &v, LL_BYTES); }
LL_INLINE void store(double* p, Vec<double> v) { memcpy(p, &v, LL_BYTES); }
LL_INLINE void store(BFloat16* p, Vec<float> v) {
  const HalfVec h = narrow_bfloat16(v);
  memcpy(p, &h, LL_BYTES / 2);
}
LL_INLINE void store(Float16* p, Vec<float> v) {
  const HalfVec h = narrow_float16(v);
  memcpy(p, &h, LL_BYTES / 2);
}

// Two vectors of consecutive elements, in whatever order of lanes costs least: a sum or a maximum does not ask which
// lane an element is in. Of bfloat16, `a` gets the elements of even number and `b` those of odd number.
template <class T> LL_INLINE void load_pair(const T* p, Vec<Compute<T>>& a, Vec<Compute<T>>& b) {
  if constexpr (__is_same(T, BFloat16)) {
    IntVec<float> bits;
    memcpy(&bits, p, LL_BYTES);
    a = as_real<float>(bits << 16);
    b = as_real<float>(bits & static_cast<int32_t>(0xffff0000));
  } else {
    a = load(p);
    b = load(p + kLanes<Compute<T>>);
  }
}

// K vectors of consecutive elements, in whatever order of lanes costs least.
template <int K, class T> LL_INLINE void load_unordered(const T* p, Vec<Compute<T>> (&v)[K]) {
  if constexpr (__is_same(T, BFloat16) && K % 2 == 0) {
    for (int k = 0; k < K; k += 2) load_pair(p + k * kLanes<float>, v[k], v[k + 1]);
  } else {
    LL_UNROLL
    for (int k = 0; k < K; ++k) v[k] = load(p + k * kLanes<Compute<T>>);
  }
}

// What load_pair read, back in the order of its elements. To bfloat16 it rounds to the nearest in fewer steps than
// narrow_bfloat16 does: NaN is not kept, and of two neighbours that are as near the one of larger magnitude is taken.
template <class T> LL_INLINE void store_pair(T* p, Vec<Compute<T>> a, Vec<Compute<T>> b) {
  if constexpr (__is_same(T, BFloat16)) {
    const IntVec<float> even = as_int<float>(a) + 0x8000, odd = as_int<float>(b) + 0x8000;
    const IntVec<float> bits = ((even >> 16) & 0xffff) | (odd & static_cast<int32_t>(0xffff0000));
    memcpy(p, &bits, LL_BYTES);
  } else {
    store(p, a);
    store(p + kLanes<Compute<T>>, b);
  }
}

// The ends of rows: only the first `count` elements are touched, 0 <= count < lanes. The other lanes hold `fill`.
template <class T> LL_INLINE Vec<Compute<T>> load_partial(const T* p, int64_t count, Compute<T> fill) {
  using Real = Compute<T>;
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return _mm512_mask_loadu_ps(splat<float>(fill), static_cast<__mmask16>((1u << count) - 1), p);
  if constexpr (sizeof(T) == 8)
    return _mm512_mask_loadu_pd(splat<double>(fill), static_cast<__mmask8>((1u << count) - 1), p);
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  if constexpr (sizeof(T) == 2) {
    const auto mask = static_cast<__mmask16>((1u << count) - 1);
    const HalfVec h = reinterpret_cast<HalfVec>(_mm256_maskz_loadu_epi16(mask, p));
    Vec<float> v;
    if constexpr (__is_same(T, BFloat16))
      v = widen_bfloat16(h);
    else
      v = widen_float16(h);
    return _mm512_mask_blend_ps(mask, splat<float>(fill), v);
  }
#endif
#endif
  alignas(LL_BYTES) T buffer[kLanes<Real>] = {};
  for (int64_t i = 0; i < count; ++i) buffer[i] = p[i];
  const Vec<Real> v = load(buffer);
  return lane_index<Real>() < static_cast<IntOf<Real>>(count) ? v : splat<Real>(fill);
}
template <class T> LL_INLINE void store_partial(T* p, Vec<Compute<T>> v, int64_t count) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), v);
    return;
  }
  if constexpr (sizeof(T) == 8) {
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << count) - 1), v);
    return;
  }
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  if constexpr (sizeof(T) == 2) {
    _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << count) - 1),
                             reinterpret_cast<__m256i>(narrow_bits<T>(v)));
    return;
  }
#endif
#endif
  alignas(LL_BYTES) T buffer[kLanes<Compute<T>>];
  store(buffer, v);
  for (int64_t i = 0; i < count; ++i) p[i] = buffer[i];
}

// A vector of doubles from numbers of either type, and back.
LL_INLINE Vec<double> load_wide(const double* p) { return load(p); }
LL_INLINE Vec<double> load_wide(const float* p) {
  typedef float Half __attribute__((vector_size(LL_BYTES / 2)));
  Half h;
  memcpy(&h, p, LL_BYTES / 2);
  return __builtin_convertvector(h, Vec<double>);
}
LL_INLINE void store_narrow(double* p, Vec<double> v) { store(p, v); }
LL_INLINE void store_narrow(float* p, Vec<double> v) {
  typedef float Half __attribute__((vector_size(LL_BYTES / 2)));
  const Half h = __builtin_convertvector(v, Half);
  memcpy(p, &h, LL_BYTES / 2);
}

// A store that does not read the cache line first nor keep it in a cache: for outputs larger than the caches. `p` is
// aligned to a vector. `fence()` follows before another thread reads the memory.
template <class T> LL_INLINE void stream(T* p, Vec<Compute<T>> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    _mm512_stream_ps(p, v);
    return;
  }
  if constexpr (sizeof(T) == 8) {
    _mm512_stream_pd(p, v);
    return;
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    _mm256_stream_ps(p, v);
    return;
  }
  if constexpr (sizeof(T) == 8) {
    _mm256_stream_pd(p, v);
    return;
  }
#endif
  store(p, v);
}
// Copies n elements as `stream` stores them; `to` may have any alignment. `fence()` follows likewise.
template <class T> LL_INLINE void stream_copy(T* to, const T* from, int64_t n) {
#if defined(__AVX512F__) || defined(__AVX2__)
  constexpr int64_t kStep = LL_BYTES / sizeof(T);
  int64_t i = static_cast<int64_t>((LL_BYTES - reinterpret_cast<uintptr_t>(to) % LL_BYTES) % LL_BYTES / sizeof(T));
  if (i > n) i = n;
  memcpy(to, from, static_cast<size_t>(i) * sizeof(T));
  for (; i + kStep <= n; i += kStep) {
    Vec<float> v;
    memcpy(&v, from + i, LL_BYTES);
    stream(reinterpret_cast<float*>(to + i), v);
  }
  memcpy(to + i, from + i, static_cast<size_t>(n - i) * sizeof(T));
#else
  memcpy(to, from, static_cast<size_t>(n) * sizeof(T));
#endif
}
LL_INLINE void fence() {
#if defined(__AVX2__) || defined(__AVX512F__)
  _mm_sfence();
#endif
}

// Single elements, by the same conversions.
LL_INLINE float widen(float x) { return x; }
LL_INLINE double widen(double x) { return x; }
LL_INLINE float widen(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}
LL_INLINE float widen(Float16 x) {
  HalfVec h{};
  h[0] = x.bits;
  return widen_float16(h)[0];
}
template <class T> LL_INLINE T narrow(double x);
template <> LL_INLINE float narrow<float>(double x) { return static_cast<float>(x); }
template <> LL_INLINE double narrow<double>(double x) { return x; }
template <> LL_INLINE BFloat16 narrow<BFloat16>(double x) {
  return {narrow_bfloat16(splat<float>(static_cast<float>(x)))[0]};
}
template <> LL_INLINE Float16 narrow<Float16>(double x) {
  return {narrow_float16(splat<float>(static_cast<float>(x)))[0]};
}

}  // namespace logitless::LL_ISA
