// One vector of the instruction set that this translation unit is compiled for, and what is done with its lanes.
//
// A kernel is written once with GCC vector types, in which `a * b + c` works lane by lane, and compiled once for each
// instruction set (see CMakeLists.txt) inside `namespace logitless::LL_ISA`. Everything here lives in that namespace
// too: an inline function shared between the instruction sets would let the linker keep the wrong copy. For the same
// reason kernels use no std:: templates.
//
// Every kernel uses the same short names: `T` is the type that a tensor's elements are stored in, `Real` the type that
// is computed in (float, or double for double), `V` a vector of Real, `L` how many lanes a vector has and `K` how many
// vectors a step takes. `kAnything` is known when the code is compiled.
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

// A number that is a type: a generic lambda can take it as an argument and use it as a template argument.
template <auto N> struct Constant {
  static constexpr auto value = N;
};

// Storage types that are not arithmetic types in C++. Their elements are widened to float when they are read.
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
template <class Real> using Vec = typename VectorTypes<Real>::Vec;
// Integer lanes as wide as Real's. A comparison of two vectors gives one, each lane 0 (false) or -1 (true).
template <class Real> using IntVec = typename VectorTypes<Real>::Int;
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

// The same value in every lane. `0 + value` would be an addition, which makes +0 of -0.
template <class Real> LL_INLINE Vec<Real> splat(Real value) { return value - Vec<Real>{}; }
// 0, 1, 2, ... in the order of memory.
template <class Real> LL_INLINE IntVec<Real> lane_index() {
  IntVec<Real> index{};
  for (int i = 0; i < kLanes<Real>; ++i) index[i] = i;
  return index;
}
// The same bits, read as integers or as reals; to_real is the conversion of the numbers.
template <class Real> LL_INLINE IntVec<Real> as_int(Vec<Real> v) { return reinterpret_cast<IntVec<Real>>(v); }
template <class Real> LL_INLINE Vec<Real> as_real(IntVec<Real> v) { return reinterpret_cast<Vec<Real>>(v); }
template <class Real> LL_INLINE Vec<Real> to_real(IntVec<Real> v) { return __builtin_convertvector(v, Vec<Real>); }

// |v|, by clearing the sign bit.
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

// Bit i is set where lane i of a mask is true.
template <class Real> LL_INLINE uint32_t bits_of(IntVec<Real> mask) {
  uint32_t bits = 0;
  for (int i = 0; i < kLanes<Real>; ++i) bits |= static_cast<uint32_t>(mask[i] & 1) << i;
  return bits;
}
// Bit i is set where lane i of `a` is greater than (equal to, or reaching: at least) that of `b`; a NaN compares false.
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

// `b`, but for one lane, which is `a`'s: the lane of the lowest bit that is set. Without a bit, `b`.
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

// The bits of a comparison that is true in every lane.
template <class Real> inline constexpr uint32_t kAllBits = ~0u >> (32 - kLanes<Real>);

template <class Real> LL_INLINE Real max_of_lanes(Vec<Real> v) {
  Real top = v[0];
  for (int i = 1; i < kLanes<Real>; ++i) top = v[i] > top ? v[i] : top;
  return top;
}
#if defined(__AVX512F__)
template <> LL_INLINE float max_of_lanes<float>(Vec<float> v) { return _mm512_reduce_max_ps(v); }
template <> LL_INLINE double max_of_lanes<double>(Vec<double> v) { return _mm512_reduce_max_pd(v); }
#endif

// The lanes of a float vector as doubles, the lower and the upper half.
LL_INLINE void to_doubles(Vec<float> v, Vec<double>& lower, Vec<double>& upper) {
#if defined(__AVX512F__)
  lower = Vec<double>(_mm512_cvtps_pd(_mm512_castps512_ps256(v)));
  upper = Vec<double>(_mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1)));
#elif defined(__AVX2__)
  lower = Vec<double>(_mm256_cvtps_pd(_mm256_castps256_ps128(v)));
  upper = Vec<double>(_mm256_cvtps_pd(_mm256_extractf128_ps(v, 1)));
#else
  for (int i = 0; i < kLanes<double>; ++i) {
    lower[i] = v[i];
    upper[i] = v[i + kLanes<double>];
  }
#endif
}

// The sum of the lanes in double, always in the same order.
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
#if defined(__AVX512F__) || defined(__AVX2__)
  Vec<double> lower, upper;
  to_doubles(v, lower, upper);
  return sum_of_lanes(lower + upper);
#else
  double sum = v[0];
  for (int i = 1; i < kLanes<float>; ++i) sum += v[i];
  return sum;
#endif
}

// The sum of the lanes of both.
LL_INLINE double sum_of_lanes(Vec<double> a, Vec<double> b) { return sum_of_lanes(a + b); }
LL_INLINE double sum_of_lanes(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
  const auto half = [](Vec<float> v, auto index) {
    return Vec<double>(_mm512_cvtps_pd(_mm512_extractf32x8_ps(v, decltype(index)::value)));
  };
  const Vec<double> of_a = half(a, Constant<0>{}) + half(a, Constant<1>{});
  const Vec<double> of_b = half(b, Constant<0>{}) + half(b, Constant<1>{});
  return sum_of_lanes(of_a + of_b);
#else
  return sum_of_lanes(a) + sum_of_lanes(b);
#endif
}

// Every second lane of `a`, from lane `first` on, and then every second lane of `b`.
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

}  // namespace logitless::LL_ISA
