// Elementary functions on vectors, and sums that do not lose what they add.
//
// Precision policy: `exp` is below 1 ulp of its compute type over its whole range (in float a cubic beside a table of
// the sixteenths of a power where a permutation reads it, else degree 6; in double degree 11; all fitted to the
// relative error; results below the normal range become 0). `log1p` runs in double, below 1 ulp. Sums over classes are
// pairs (high, low) by TwoSum, so their error does not grow with the number of classes; of at most 16 vectors they are
// sums by halves.
#pragma once

#include "simd/vec.h"

namespace logitless::LL_ISA {

// Logits of larger magnitude than this take a path that first subtracts the row's maximum. Below it, exp(z) is split
// as 2^n exp(r) straight from z, so that no rounding of z - max enters.
inline constexpr double kHuge = 2e4;

// exp(x) = scale_by_power(fraction, power) with fraction in [0.7, 2.1]; for |x| <= 2 * kHuge. NaN gives a NaN fraction.
// A whole number may be added to the power.
template <class Real> struct Exponential {
  Vec<Real> fraction, power;
};

// By how much ln2 falls short of the float next to it (0: where every product with it is kept whole).
template <class Real> inline constexpr double kDrift = 0;
#if LL_HAS_FMA
template <> inline constexpr double kDrift<float> = 0x1.05c61p-29;
#endif

#if defined(__AVX512F__)
// s 2^(j / 16), s = 0.988596979328077: of the numbers near 1 one with which all sixteen are within 0.13 ulp of a float.
alignas(LL_BYTES) inline constexpr float kRoots[] = {0x1.fa2962p-1f, 0x1.084922p+0f, 0x1.13fc92p+0f, 0x1.2034ap+0f,
                                                     0x1.2cf72cp+0f, 0x1.3a4a58p+0f, 0x1.48348ap+0f, 0x1.56bc72p+0f,
                                                     0x1.65e90cp+0f, 0x1.75c1a2p+0f, 0x1.864dd2p+0f, 0x1.97959p+0f,
                                                     0x1.a9a128p+0f, 0x1.bc7948p+0f, 0x1.d026fcp+0f, 0x1.e4b3bap+0f};

// exp(r) / s, less 1 with the default, for r below ln2 / 32 in size.
LL_INLINE Vec<float> over_root(Vec<float> r, float constant = 0.011534549f) {
  return ((r * 0.16859305f + 0.5057825f) * r + 1.0115346f) * r + constant;
}

// The power is a multiple of 1/16, of which scale_by_power takes the floor and the table the rest.
template <bool kDrifts> LL_INLINE Exponential<float> split_exp_of_float(Vec<float> x) {
  constexpr float magic = 0x1.8p19f;  // adding it rounds to sixteenths, whose count stands in the low bits
  const Vec<float> y = x * 0x1.715476p+0f + magic, n = y - magic;
  Vec<float> r = x - n * 0x1.62e43p-1f;
  if constexpr (!kDrifts) r = r + n * static_cast<float>(kDrift<float>);
  const Vec<float> root = _mm512_permutexvar_ps(reinterpret_cast<__m512i>(y), load(kRoots));
  return {root * over_root(r) + root, n};
}
// Of several r at once, in their place, the whole of exp(r) / s. kRough: to 2^-21.
inline constexpr float kOverRoot = 0x1.02f3eep+0f;  // 1 / s, rounded
template <bool kRough, int K> LL_INLINE void over_roots(Vec<float> (&r)[K]) {
  Vec<float> p[K];
  LL_UNROLL
  for (int k = 0; k < K; ++k) p[k] = kRough ? r[k] * 0.50575244f + 1.011594f : r[k] * 0.16859305f + 0.5057825f;
  LL_UNROLL
  for (int k = 0; k < K; ++k) p[k] = p[k] * r[k] + (kRough ? kOverRoot : 1.0115346f);
  LL_UNROLL
  for (int k = 0; k < K; ++k) r[k] = kRough ? p[k] : p[k] * r[k] + kOverRoot;
}
#else
template <bool kDrifts> LL_INLINE Exponential<float> split_exp_of_float(Vec<float> x) {
  constexpr float magic = 0x1.8p23f;  // adding it rounds to an integer
  const Vec<float> n = (x * 0x1.715476p+0f + magic) - magic;
#if LL_HAS_FMA
  Vec<float> r = x - n * 0x1.62e43p-1f;
  if constexpr (!kDrifts) r = r + n * static_cast<float>(kDrift<float>);
#else
  // Each product but the last is exact for |n| < 2^15.
  Vec<float> r = x - n * 0.693359375f;
  r = r + n * 2.12192535400390625e-4f;
  r = r + n * 1.904654299957768e-9f;
#endif
  Vec<float> p = r * 0.00138143174418725423f + 0.008368851036416989644f;
  p = p * r + 0.04166840113396463114f;
  p = p * r + 0.1666651952453357788f;
  p = p * r + 0.4999999337294492659f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return {p, n};
}
#endif

LL_INLINE Exponential<float> split_exp(Vec<float> x) { return split_exp_of_float<false>(x); }
// One operation less: exp(x) exp(-kDrift n), n the power. A sum of such terms may be corrected by the power that
// counts.
LL_INLINE Exponential<float> split_exp_drifting(Vec<float> x) { return split_exp_of_float<true>(x); }

// The whole number nearest to log2(exp(x)); for |x| <= 2 * kHuge.
template <class Real> LL_INLINE Vec<Real> whole_power(Vec<Real> x) {
  constexpr Real magic = sizeof(Real) == 4 ? Real(0x1.8p23) : Real(0x1.8p52);
  return (x * static_cast<Real>(1.4426950408889634) + magic) - magic;
}

// exp(r) for r below ln2 / 2 in size. By Estrin's scheme: a chain of products would be waited for.
LL_INLINE Vec<double> exp_of_remainder(Vec<double> r) {
  const Vec<double> r2 = r * r, r4 = r2 * r2;
  const Vec<double> low = r * 0.1666666666666640767 + 0.5000000000000010826;
  const Vec<double> middle = (r * 0.008333333333496926695 + 0.04166666666652810512) +
                             r2 * (r * 0.0001984126950273172393 + 0.001388888894424888626);
  const Vec<double> high = (r * 2.755758843126431582e-6 + 0.00002480149238855312254) +
                           r2 * (r * 2.499985468996973408e-8 + 2.763052339124291142e-7);
  return (r + (r2 * low + r4 * (middle + r4 * high))) + 1.0;
}
// What is left of x when n ln2 is taken off, n = whole_power(x).
LL_INLINE Vec<double> remainder(Vec<double> x, Vec<double> n) {
  return (x - n * 0x1.62e42feep-1) - n * 0x1.a39ef35793c76p-33;
}  // 32 bits: the first product is exact without FMA as well
LL_INLINE Exponential<double> split_exp(Vec<double> x) {
  const Vec<double> n = whole_power<double>(x);
  return {exp_of_remainder(remainder(x, n)), n};
}
LL_INLINE Exponential<double> split_exp_drifting(Vec<double> x) { return split_exp(x); }

// v * 2^power for a `power` of split_exp or a whole number, at most 127 (1023); 0 where the result would be below the
// normal range.
LL_INLINE Vec<float> scale_by_power(Vec<float> v, Vec<float> power) {
#if defined(__AVX512F__)
  return _mm512_scalef_ps(v, power);
#else
  const IntVec<float> n = __builtin_convertvector(maximum<float>(power, splat<float>(-127.0f)), IntVec<float>);
  return v * as_real<float>((n + 127) << 23);
#endif
}
LL_INLINE Vec<double> scale_by_power(Vec<double> v, Vec<double> power) {
#if defined(__AVX512F__)
  return _mm512_scalef_pd(v, power);
#else
  // The low bits of power + magic are the integer; AVX2 has no double -> int64 conversion.
  constexpr double magic = 0x1.8p52;
  const Vec<double> n = maximum<double>(power, splat<double>(-1023.0)) + (magic + 1023.0);
  return v * as_real<double>(as_int<double>(n) << 52);
#endif
}

// Two forms of exp for many x of one row. UnitExp: in units of 2^power, to be summed, with the drift of
// split_exp_drifting and a bias; x is at most 87 nats above the unit and counts as `least` where it is below that.
// RowExp: times a factor, with the drift of split_row_exp; 0 where the result would be below 2^-124 (float). The factor
// is 0 or between 2^-100 and 2^100 in size. kRough: to 2^-21, for results of 16 bits.
template <class Real> struct UnitExp {
  Vec<Real> power;
  Vec<Real> least = splat<Real>(static_cast<Real>(-2 * kHuge));
  LL_INLINE explicit UnitExp(Vec<Real> unit) : power(unit) {}
  LL_INLINE Vec<Real> add_to(Vec<Real> sum, Vec<Real> x) const {
    const Exponential<Real> e = split_exp_drifting(maximum<Real>(least, x));
    return sum + scale_by_power(e.fraction, e.power - power);
  }
  // Adds several, `seen` beside them. When all are added, fit() of it says whether each was in range: not too large
  // and, unless it is clamped, not below `least`.
  using Seen = Vec<Real>;
  template <bool kClamps> LL_INLINE static Seen none_seen() { return splat<Real>(-kInf<Real>); }
  template <bool kRough, bool kClamps, int K>
  LL_INLINE void add_all(Vec<Real> (&sum)[2], Seen& seen, const Vec<Real> (&x)[K]) const {
    LL_UNROLL
    for (int k = 0; k < K; ++k) seen = maximum<Real>(x[k], seen), sum[k % 2] = add_to(sum[k % 2], x[k]);
  }
  template <bool kClamps> LL_INLINE bool fit(Seen seen) const {
    return max_of_lanes<Real>(seen) <= (power[0] + 127) * Real(0.6931471805599453);
  }
};
template <class Real> inline constexpr double kUnitExpBias = 0;  // what UnitExp is too large by
#if defined(__AVX512F__)
template <class Real> inline constexpr double kRowDrift = kDrift<Real>;
template <class Real> LL_INLINE Exponential<Real> split_row_exp(Vec<Real> x) { return split_exp_drifting(x); }
#else
template <class Real> inline constexpr double kRowDrift = 0;
template <class Real> LL_INLINE Exponential<Real> split_row_exp(Vec<Real> x) { return split_exp(x); }
#endif
template <class Real, bool kRough> struct RowExp {
  Vec<Real> power, factor;
  LL_INLINE RowExp(Vec<Real> unit, Vec<Real> scale) : power(unit), factor(scale) {}
  LL_INLINE Vec<Real> operator()(Vec<Real> x) const {
    const Exponential<Real> e = split_row_exp<Real>(maximum<Real>(splat<Real>(static_cast<Real>(-2 * kHuge)), x));
    return scale_by_power(e.fraction * factor, e.power - power);
  }
};
#if defined(__AVX512F__)
// kRoots times a factor, from whose bits the shifted number of each root is taken off: where the count of sixteenths is
// moved up to be added, it is a whole power in the place of the exponent, and below it the root's number.
struct ShiftedRoots {
  IntVec<float> bits;
  Vec<float> shift;
  LL_INLINE ShiftedRoots(Vec<float> power, Vec<float> factor)
      : bits(as_int<float>(load(kRoots) * factor) - (lane_index<float>() << 19)), shift(0x1.8p19f - power) {}
  LL_INLINE Vec<float> power() const { return 0x1.8p19f - shift; }
  // x in sixteenths of ln2, rounded; their count stands in the low bits.
  LL_INLINE Vec<float> count(Vec<float> x) const { return x * 0x1.715476p+0f + shift; }
  // What they leave of x, below ln2 / 32 in size.
  LL_INLINE Vec<float> left(Vec<float> x, Vec<float> y) const { return x - (y - shift) * 0x1.62e43p-1f; }
  LL_INLINE Vec<float> root(Vec<float> y) const {
    return as_real<float>(reinterpret_cast<IntVec<float>>(
                              _mm512_permutexvar_epi32(reinterpret_cast<__m512i>(y), reinterpret_cast<__m512i>(bits))) +
                          (as_int<float>(y) << 19));
  }
  LL_INLINE void split(Vec<float> x, Vec<float>& whole, Vec<float>& r) const {
    const Vec<float> y = count(x);
    r = left(x, y), whole = root(y);
  }
};
template <> inline constexpr double kUnitExpBias<float> = static_cast<double>(kOverRoot) * 0.988596979328077 - 1;
template <> struct UnitExp<float> {
  static constexpr int kLargestMagnitude = 0b1011;  // of _mm512_range_ps: of the larger one, without its sign
  ShiftedRoots roots;
  Vec<float> least;
  LL_INLINE explicit UnitExp(Vec<float> power) : roots(power, splat<float>(1)), least((power - 125) * 0x1.62e43p-1f) {}
  LL_INLINE Vec<float> add_to(Vec<float> sum, Vec<float> x) const {
    Vec<float> root, r;
    roots.split(maximum<float>(least, x), root, r);
    return sum + root * over_root(r, kOverRoot);
  }
  // Where x is not clamped, its largest magnitude is seen: both bounds for one operation, which costs nothing beside
  // the products.
  using Seen = Vec<float>;
  template <bool kClamps> LL_INLINE static Seen none_seen() { return splat<float>(kClamps ? -kInf<float> : 0.0f); }
  template <bool kRough, bool kClamps, int K>
  LL_INLINE void add_all(Vec<float> (&sum)[2], Seen& seen, const Vec<float> (&x)[K]) const {
    // One step of all before the next step of any: fewer wait for what is before them.
    Vec<float> c[K], y[K], r[K], root[K];
    LL_UNROLL
    for (int k = 0; k < K; ++k) c[k] = kClamps ? maximum<float>(least, x[k]) : x[k];
    LL_UNROLL
    for (int k = 0; k < K; ++k) y[k] = roots.count(c[k]);
    LL_UNROLL
    for (int k = 0; k < K; ++k)
      seen = kClamps ? maximum<float>(c[k], seen) : Vec<float>(_mm512_range_ps(seen, c[k], kLargestMagnitude));
    LL_UNROLL
    for (int k = 0; k < K; ++k) r[k] = roots.left(c[k], y[k]);
    LL_UNROLL
    for (int k = 0; k < K; ++k) root[k] = roots.root(y[k]);
    over_roots<kRough>(r);
    LL_UNROLL
    for (int k = 0; k < K; ++k) sum[k % 2] = sum[k % 2] + root[k] * r[k];
  }
  template <bool kClamps> LL_INLINE bool fit(Seen seen) const {
    const Vec<float> most = (roots.power() + 127) * 0x1.62e43p-1f;
    return reaching_bits(kClamps ? most : minimum<float>(most, -least), seen) == kAllBits<float>;
  }
};
template <bool kRough> struct RowExp<float, kRough> {
  ShiftedRoots roots;
  Vec<float> least;
  LL_INLINE RowExp(Vec<float> power, Vec<float> factor)
      : roots(power, factor), least((power - 125 - Vec<float>(_mm512_getexp_ps(factor))) * 0x1.62e43p-1f) {}
  LL_INLINE Vec<float> operator()(Vec<float> x) const {
    const __mmask16 counts = _mm512_cmp_ps_mask(x, least, _CMP_NLT_UQ);
    Vec<float> root, r;
    roots.split(x, root, r);
    if constexpr (kRough) {
      Vec<float> over[1] = {r};
      over_roots<true>(over);
      return _mm512_maskz_mul_ps(counts, root, over[0]);
    }
    return _mm512_maskz_fmadd_ps(counts, root, over_root(r), root);
  }
};
#endif

// n of x = 2^n f with f in [1, 2), for normal x > 0.
LL_INLINE Vec<double> exponent_of(Vec<double> x) {
  // |n| < 2^31: through the low bits of a double, since AVX2 has no int64 -> double conversion.
  constexpr double magic = 0x1.8p52;
  return as_real<double>(((as_int<double>(x) >> 52) - 1023) + 0x4338000000000000LL) - magic;
}

// exp(x) where the result is in range; x is clamped to [-2 * kHuge, 709] and small results become 0. NaN stays NaN.
template <class Real> LL_INLINE Vec<Real> exp(Vec<Real> x) {
  constexpr Real most = sizeof(Real) == 4 ? Real(88.3) : Real(709.0);
  x = minimum<Real>(splat<Real>(most), maximum<Real>(splat<Real>(static_cast<Real>(-2 * kHuge)), x));
  const Exponential<Real> e = split_exp(x);
  return scale_by_power(e.fraction, e.power);
}

// exp(x) - 1 for x <= 0, relative error below 1 ulp also for tiny x; -inf gives -1, NaN stays NaN.
LL_INLINE Vec<double> expm1(Vec<double> x) {
  x = maximum<double>(splat<double>(-60.0), x);
  constexpr double magic = 0x1.8p52;
  const Vec<double> n = (x * 0x1.71547652b82fep+0 + magic) - magic;
  const Vec<double> r = (x - n * 0x1.62e42feep-1) - n * 0x1.a39ef35793c76p-33;
  Vec<double> q = r * 2.499985468996973408e-8 + 2.763052339124291142e-7;
  q = q * r + 2.755758843126431582e-6;
  q = q * r + 0.00002480149238855312254;
  q = q * r + 0.0001984126950273172393;
  q = q * r + 0.001388888894424888626;
  q = q * r + 0.008333333333496926695;
  q = q * r + 0.04166666666652810512;
  q = q * r + 0.1666666666666640767;
  q = q * r + 0.5000000000000010826;
  q = r + q * r * r;
  const Vec<double> scale = scale_by_power(splat<double>(1.0), n);
  return q * scale + (scale - 1.0);
}

// log1p(x) for x >= 0, relative error below 1 ulp also for tiny x; +inf and NaN are returned as they are.
LL_INLINE Vec<double> log1p(Vec<double> x) {
  const Vec<double> u = x + 1.0;
  const Vec<double> lost = x < 1.0 ? x - (u - 1.0) : 1.0 - (u - x);
  // u = 2^k m with m in [sqrt(1/2), sqrt(2))
  const IntVec<double> shifted = as_int<double>(u) - 0x3fe6a09e667f3bcdLL;
  const IntVec<double> k = shifted >> 52;
  const Vec<double> m = as_real<double>((shifted & 0xfffffffffffffLL) + 0x3fe6a09e667f3bcdLL);
  // |k| < 2^31: through the low bits of a double, since AVX2 has no int64 -> double conversion.
  constexpr double magic = 0x1.8p52;
  const Vec<double> kd = as_real<double>(k + 0x4338000000000000LL) - magic;
  const Vec<double> f = m - 1.0, s = f / (f + 2.0), z = s * s, w = z * z, half = f * f * 0.5;
  const Vec<double> even = w * (w * (w * 0.1531383769920937332 + 0.2222219843214978396) + 0.3999999999940941908);
  const Vec<double> odd = z * (w * (w * (w * 0.1479819860511658591 + 0.1818357216161805012) + 0.2857142874366239149) +
                               0.6666666666666735130);
  const Vec<double> correction = lost / u + kd * 1.90821492927058770002e-10;
  const Vec<double> y = kd * 6.93147180369123816490e-01 + (f - (half - (s * (half + even + odd) + correction)));
  return x < __builtin_inf() ? y : x;
}

// Likewise for finite x, to 2^-39: for results that are rounded to float.
LL_INLINE Vec<double> short_log1p(Vec<double> x) {
  const Vec<double> u = x + 1.0;
  const Vec<double> lost = x < 1.0 ? x - (u - 1.0) : Vec<double>{};
  const IntVec<double> shifted = as_int<double>(u) - 0x3fe6a09e667f3bcdLL;
  const Vec<double> m = as_real<double>((shifted & 0xfffffffffffffLL) + 0x3fe6a09e667f3bcdLL);
  constexpr double magic = 0x1.8p52;
  const Vec<double> k = as_real<double>((shifted >> 52) + 0x4338000000000000LL) - magic;
  const Vec<double> f = m - 1.0, s = f / (f + 2.0), z = s * s;
  // 2 atanh(s) = s (2 + z p(z))
  const Vec<double> w = z * z;
  const Vec<double> p =
      ((z * (2.0 / 5) + 2.0 / 3) + w * (z * (2.0 / 9) + 2.0 / 7)) + w * w * (z * (2.0 / 13) + 2.0 / 11);
  return k * 0.6931471805599453 + ((s * z) * p + (s + s) + lost);
}

// A running sum kept as high + low, exact to about twice the precision of Real.
template <class Real> struct PairSum {
  Vec<Real> high{}, low{};
  LL_INLINE void add(Vec<Real> x) {
    const Vec<Real> sum = high + x, back = sum - high;
    low += (high - (sum - back)) + (x - back);
    high = sum;
  }
  LL_INLINE void scale(Vec<Real> power) { high = scale_by_power(high, power), low = scale_by_power(low, power); }
  // An infinite term makes `low` NaN; the sum is then `high` alone.
  LL_INLINE double total() const {
    const double sum = sum_of_lanes(high);
    return sum - sum == 0 ? sum + sum_of_lanes(low) : sum;
  }
  LL_INLINE double total_of_lane(int lane) const {
    const double sum = high[lane];
    return sum - sum == 0 ? sum + low[lane] : sum;
  }
};

// Sum of K vectors by halves: rounding error of log2(K) additions.
template <int K, class V> LL_INLINE V tree_sum(const V* v) {
  if constexpr (K == 1)
    return v[0];
  else
    return tree_sum<K / 2>(v) + tree_sum<K - K / 2>(v + K / 2);
}

}  // namespace logitless::LL_ISA
