// One vector of the instruction set that this translation unit is compiled for.
//
// A kernel is written once with GCC vector types and compiled once per instruction set (see CMakeLists.txt), inside
// `namespace logitless::LL_ISA`. Everything here lives in that namespace too: an inline function shared between the
// instruction sets would let the linker keep the wrong copy. For the same reason kernels use no std:: templates.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LL_BYTES 64
#elif defined(__AVX2__)
#define LL_BYTES 32
#else
#define LL_BYTES 16
#endif

#if defined(__FMA__) || defined(__aarch64__)
#define LL_HAS_FMA 1
#else
#define LL_HAS_FMA 0
#endif

#define LL_INLINE inline __attribute__((always_inline))
// Before a loop over a few vectors, which are then registers: at -O2 it would stay a loop over a stack.
#define LL_UNROLL _Pragma("GCC unroll 16")

namespace logitless::LL_ISA {

template <auto N> struct Constant {
  static constexpr auto value = N;
};  // a number that is a type, for generic lambdas

// Storage types that are not arithmetic types in C++.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class Real> struct VectorTypes;
template <> struct VectorTypes<float> {
  typedef float Vec __attribute__((vector_size(LL_BYTES)));
  typedef int32_t Int __attribute__((vector_size(LL_BYTES)));
  typedef int32_t IntScalar;
};
template <> struct VectorTypes<double> {
  typedef double Vec __attribute__((vector_size(LL_BYTES)));
  typedef int64_t Int __attribute__((vector_size(LL_BYTES)));
  typedef int64_t IntScalar;
};
template <class Real> using Vec = typename VectorTypes<Real>::Vec;     // floating-point lanes
template <class Real> using IntVec = typename VectorTypes<Real>::Int;  // integer lanes, also comparison masks (0 or -1)
template <class Real> using IntOf = typename VectorTypes<Real>::IntScalar;
template <class Real> inline constexpr int kLanes = LL_BYTES / sizeof(Real);

// The type that arithmetic on a storage type is done in.
template <class T> struct ComputeType {
  using type = float;
};
template <> struct ComputeType<double> {
  using type = double;
};
template <class T> using Compute = typename ComputeType<T>::type;

template <class Real> inline constexpr Real kInf = static_cast<Real>(__builtin_inf());
template <class Real> inline constexpr Real kNaN = static_cast<Real>(__builtin_nan(""));

template <class Real> LL_INLINE Vec<Real> splat(Real value) {
  return value - Vec<Real>{};
}  // 0 + value would be an addition: -0
template <class Real> LL_INLINE IntVec<Real> lane_index() {
  IntVec<Real> index{};
  for (int i = 0; i < kLanes<Real>; ++i) index[i] = i;
  return index;
}
template <class Real> LL_INLINE IntVec<Real> as_int(Vec<Real> v) { return reinterpret_cast<IntVec<Real>>(v); }
template <class Real> LL_INLINE Vec<Real> as_real(IntVec<Real> v) { return reinterpret_cast<Vec<Real>>(v); }
template <class Real> LL_INLINE Vec<Real> to_real(IntVec<Real> v) { return __builtin_convertvector(v, Vec<Real>); }

template <class Real> LL_INLINE Vec<Real> magnitude(Vec<Real> v) {
  constexpr IntOf<Real> kSign = sizeof(Real) == 4 ? INT32_MIN : INT64_MIN;
  return as_real<Real>(as_int<Real>(v) & ~kSign);
}

// Both return the SECOND argument when either is NaN, as the x86 instructions do: the kernels rely on it to keep NaNs
// in a sum and out of a running maximum.
template <class Real> LL_INLINE Vec<Real> minimum(Vec<Real> a, Vec<Real> b) { return a < b ? a : b; }
template <class Real> LL_INLINE Vec<Real> maximum(Vec<Real> a, Vec<Real> b) { return a > b ? a : b; }
#if defined(__AVX512F__)
template <> LL_INLINE Vec<float> minimum<float>(Vec<float> a, Vec<float> b) { return _mm512_min_ps(a, b); }
template <> LL_INLINE Vec<float> maximum<float>(Vec<float> a, Vec<float> b) { return _mm512_max_ps(a, b); }
template <> LL_INLINE Vec<double> minimum<double>(Vec<double> a, Vec<double> b) { return _mm512_min_pd(a, b); }
template <> LL_INLINE Vec<double> maximum<double>(Vec<double> a, Vec<double> b) { return _mm512_max_pd(a, b); }
#elif defined(__AVX2__)
template <> LL_INLINE Vec<float> minimum<float>(Vec<float> a, Vec<float> b) { return _mm256_min_ps(a, b); }
template <> LL_INLINE Vec<float> maximum<float>(Vec<float> a, Vec<float> b) { return _mm256_max_ps(a, b); }
template <> LL_INLINE Vec<double> minimum<double>(Vec<double> a, Vec<double> b) { return _mm256_min_pd(a, b); }
template <> LL_INLINE Vec<double> maximum<double>(Vec<double> a, Vec<double> b) { return _mm256_max_pd(a, b); }
#endif

// Bit i is lane i of `a > b` (or `a == b`, `a >= b`); false where either is NaN.
template <class Real> LL_INLINE uint32_t bits_of(IntVec<Real> mask) {
  uint32_t bits = 0;
  for (int i = 0; i < kLanes<Real>; ++i) bits |= static_cast<uint32_t>(mask[i] & 1) << i;
  return bits;
}
#if defined(__AVX512F__)
LL_INLINE uint32_t greater_bits(Vec<float> a, Vec<float> b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
LL_INLINE uint32_t greater_bits(Vec<double> a, Vec<double> b) { return _mm512_cmp_pd_mask(a, b, _CMP_GT_OQ); }
LL_INLINE uint32_t equal_bits(Vec<float> a, Vec<float> b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
LL_INLINE uint32_t equal_bits(Vec<double> a, Vec<double> b) { return _mm512_cmp_pd_mask(a, b, _CMP_EQ_OQ); }
LL_INLINE uint32_t reaching_bits(Vec<float> a, Vec<float> b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
LL_INLINE uint32_t reaching_bits(Vec<double> a, Vec<double> b) { return _mm512_cmp_pd_mask(a, b, _CMP_GE_OQ); }
#elif defined(__AVX2__)
LL_INLINE uint32_t greater_bits(Vec<float> a, Vec<float> b) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ));
}
LL_INLINE uint32_t greater_bits(Vec<double> a, Vec<double> b) {
  return _mm256_movemask_pd(_mm256_cmp_pd(a, b, _CMP_GT_OQ));
}
LL_INLINE uint32_t equal_bits(Vec<float> a, Vec<float> b) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_EQ_OQ));
}
LL_INLINE uint32_t equal_bits(Vec<double> a, Vec<double> b) {
  return _mm256_movemask_pd(_mm256_cmp_pd(a, b, _CMP_EQ_OQ));
}
LL_INLINE uint32_t reaching_bits(Vec<float> a, Vec<float> b) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ));
}
LL_INLINE uint32_t reaching_bits(Vec<double> a, Vec<double> b) {
  return _mm256_movemask_pd(_mm256_cmp_pd(a, b, _CMP_GE_OQ));
}
#else
LL_INLINE uint32_t greater_bits(Vec<float> a, Vec<float> b) { return bits_of<float>(a > b); }
LL_INLINE uint32_t greater_bits(Vec<double> a, Vec<double> b) { return bits_of<double>(a > b); }
LL_INLINE uint32_t equal_bits(Vec<float> a, Vec<float> b) { return bits_of<float>(a == b); }
LL_INLINE uint32_t equal_bits(Vec<double> a, Vec<double> b) { return bits_of<double>(a == b); }
LL_INLINE uint32_t reaching_bits(Vec<float> a, Vec<float> b) { return bits_of<float>(a >= b); }
LL_INLINE uint32_t reaching_bits(Vec<double> a, Vec<double> b) { return bits_of<double>(a >= b); }
#endif

// `b`, with the lane of the lowest of the bits from `a`; without a bit, `b`.
template <class Real> LL_INLINE Vec<Real> where_first_of(uint32_t bits, Vec<Real> a, Vec<Real> b) {
  return lane_index<Real>() == static_cast<IntOf<Real>>(__builtin_ctz(bits | 1u << 31)) ? a : b;
}
#if defined(__AVX512F__)
LL_INLINE Vec<float> where_first(uint32_t bits, Vec<float> a, Vec<float> b) {
  return _mm512_mask_mov_ps(b, static_cast<__mmask16>(bits & -bits), a);
}
LL_INLINE Vec<double> where_first(uint32_t bits, Vec<double> a, Vec<double> b) {
  return _mm512_mask_mov_pd(b, static_cast<__mmask8>(bits & -bits), a);
}
#else
LL_INLINE Vec<float> where_first(uint32_t bits, Vec<float> a, Vec<float> b) {
  return where_first_of<float>(bits, a, b);
}
LL_INLINE Vec<double> where_first(uint32_t bits, Vec<double> a, Vec<double> b) {
  return where_first_of<double>(bits, a, b);
}
#endif

template <class Real> inline constexpr uint32_t kAllBits = kLanes<Real> == 32 ? ~0u : (1u << kLanes<Real>)-1;

template <class Real> LL_INLINE Real max_of_lanes(Vec<Real> v) {
  Real top = v[0];
  for (int i = 1; i < kLanes<Real>; ++i) top = v[i] > top ? v[i] : top;
  return top;
}
#if defined(__AVX512F__)
template <> LL_INLINE float max_of_lanes<float>(Vec<float> v) { return _mm512_reduce_max_ps(v); }
template <> LL_INLINE double max_of_lanes<double>(Vec<double> v) { return _mm512_reduce_max_pd(v); }
#endif

// Sum of the lanes in double, in a fixed order.
LL_INLINE double sum_of_lanes(Vec<double> v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_pd(v);
#else
  double sum = v[0];
  for (int i = 1; i < kLanes<double>; ++i) sum += v[i];
  return sum;
#endif
}
LL_INLINE double sum_of_lanes(Vec<float> v) {
#if defined(__AVX512F__)
  const __m256 low = _mm512_castps512_ps256(v), high = _mm512_extractf32x8_ps(v, 1);
  return sum_of_lanes(Vec<double>(_mm512_add_pd(_mm512_cvtps_pd(low), _mm512_cvtps_pd(high))));
#elif defined(__AVX2__)
  return sum_of_lanes(Vec<double>(
      _mm256_add_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(v)), _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1)))));
#else
  double sum = v[0];
  for (int i = 1; i < kLanes<float>; ++i) sum += v[i];
  return sum;
#endif
}

// Sum of the lanes of both.
LL_INLINE double sum_of_lanes(Vec<double> a, Vec<double> b) { return sum_of_lanes(a + b); }
LL_INLINE double sum_of_lanes(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
  const auto half = [](Vec<float> v, auto h) {
    return Vec<double>(_mm512_cvtps_pd(_mm512_extractf32x8_ps(v, decltype(h)::value)));
  };
  return sum_of_lanes((half(a, Constant<0>{}) + half(a, Constant<1>{})) +
                      (half(b, Constant<0>{}) + half(b, Constant<1>{})));
#else
  return sum_of_lanes(a) + sum_of_lanes(b);
#endif
}

// The lanes of even (odd) number of `a` and then those of `b`.
template <class Real> LL_INLINE Vec<Real> every_second_lane(Vec<Real> a, Vec<Real> b, int first) {
  const IntVec<Real> index = 2 * lane_index<Real>() + static_cast<IntOf<Real>>(first);
#if defined(__clang__)
  Vec<Real> v;
  for (int i = 0; i < kLanes<Real>; ++i) v[i] = index[i] < kLanes<Real> ? a[index[i]] : b[index[i] - kLanes<Real>];
  return v;
#else
  return __builtin_shuffle(a, b, index);
#endif
}
template <class Real> LL_INLINE Vec<Real> even_lanes(Vec<Real> a, Vec<Real> b) {
  return every_second_lane<Real>(a, b, 0);
}
template <class Real> LL_INLINE Vec<Real> odd_lanes(Vec<Real> a, Vec<Real> b) {
  return every_second_lane<Real>(a, b, 1);
}

// ---- loads and stores: storage type <-> compute lanes -------------------------------------------------------------

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

typedef uint16_t HalfVec __attribute__((vector_size(LL_BYTES / 2)));  // as many 16-bit lanes as there are float lanes
LL_INLINE HalfVec load_bits(const void* p) {
  HalfVec v;
  memcpy(&v, p, LL_BYTES / 2);
  return v;
}

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

// Two vectors of consecutive elements, in whatever order of lanes costs least.
template <class T> LL_INLINE void load_pair(const T* p, Vec<Compute<T>>& a, Vec<Compute<T>>& b) {
  if constexpr (__is_same(T, BFloat16)) {  // the two halves of each 32 bits
    IntVec<float> bits;
    memcpy(&bits, p, LL_BYTES);
    a = as_real<float>(bits << 16);
    b = as_real<float>(bits & static_cast<int32_t>(0xffff0000));
  } else {
    a = load(p), b = load(p + kLanes<Compute<T>>);
  }
}

// K vectors, likewise.
template <int K, class T> LL_INLINE void load_unordered(const T* p, Vec<Compute<T>> (&v)[K]) {
  if constexpr (__is_same(T, BFloat16) && K % 2 == 0) {
    for (int k = 0; k < K; k += 2) load_pair(p + k * kLanes<float>, v[k], v[k + 1]);
  } else {
    LL_UNROLL
    for (int k = 0; k < K; ++k) v[k] = load(p + k * kLanes<Compute<T>>);
  }
}

// What load_pair read, back in the order of its elements. Of BFloat16, no NaN, and of two neighbours as near the one of
// larger magnitude.
template <class T> LL_INLINE void store_pair(T* p, Vec<Compute<T>> a, Vec<Compute<T>> b) {
  if constexpr (__is_same(T, BFloat16)) {
    const IntVec<float> even = as_int<float>(a) + 0x8000, odd = as_int<float>(b) + 0x8000;
    const IntVec<float> bits = ((even >> 16) & 0xffff) | (odd & static_cast<int32_t>(0xffff0000));
    memcpy(p, &bits, LL_BYTES);
  } else {
    store(p, a), store(p + kLanes<Compute<T>>, b);
  }
}

// Only the first `count` elements are touched; the other lanes hold `fill`. 0 <= count < lanes.
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

// A store that does not read the line first nor keep it in a cache; `p` is aligned to the stored vector's size.
// Followed by `fence()` before another thread reads the memory.
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
// n elements to where they are not needed soon. Followed by `fence()`, as `stream`.
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
