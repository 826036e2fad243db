// exp of a vector, in forms that a loop over a row of logits can afford.
//
// Formula: exp(x) = 2^n exp(r), where n is x / ln2 rounded (to a whole number, or with AVX-512 in float to a sixteenth)
// and r = x - n ln2 is what the rounding left.
//
// Layout: vectors in, vectors out; nothing is read from memory but a table of sixteen floats.
//
// Precision policy: within about 1 ulp of the compute type over the whole range; results below the normal range become
// 0. In float with AVX-512, r is below ln2 / 32 in size and a cubic beside a table of the sixteenths of a power is
// enough (0.9 ulp); elsewhere r is below ln2 / 2, and the polynomial has degree 6 in float (1.1 ulp, 1.4 without FMA)
// and 11 in double (1.2 ulp). All are fitted to the relative error. docs/kernels.md derives these bounds, and
// exp_error.cpp measures what they bound. Where a result will be rounded to 16 bits, a quadratic is enough, to 2^-21.
//
// Steps:
//   1. n: adding a large constant ("magic") to x / ln2 rounds it, because the sum has no bits for the rest.
//   2. r = x - n ln2. With FMA one product by the float nearest to ln2 is exact before the subtraction; what that float
//      is too large by, times n, is the "drift".
//   3. exp(r), by the polynomial, and by the table where there is one.
//   4. times 2^n, by adding n to the exponent's bits.
#pragma once

#include "simd/load_store.h"

namespace logitless::LL_ISA {

// Logits of larger magnitude than this take a path that first subtracts the row's maximum. Below it, exp(z) is split as
// 2^n exp(r) straight from z, so that no rounding of z - max enters.
inline constexpr double kHuge = 2e4;

inline constexpr double kLn2 = 0.6931471805599453;
inline constexpr double kLog2e = 1.4426950408889634;

// ln2 in two parts. The first has 32 bits, so that its product with a whole number is exact without FMA as well.
inline constexpr double kLn2High = 0x1.62e42feep-1;
inline constexpr double kLn2Low = 0x1.a39ef35793c76p-33;

// exp(x) before step 4: it is scale_by_power(fraction, power), with a fraction in [0.7, 2.1], for |x| <= 2 kHuge. A NaN
// gives a NaN fraction. A whole number may be added to the power: that changes the unit the result is in, at no cost.
template <class Real> struct Exponential {
  Vec<Real> fraction, power;
};

// By how much the float that step 2 multiplies n by is larger than ln2; 0 where the product is made of several parts
// that are exact. Where a function leaves the drift in, its result is exp(x) exp(-kDrift n): 2^-29 for each unit of n.
template <class Real> inline constexpr double kDrift = 0;
#if LL_HAS_FMA
template <> inline constexpr double kDrift<float> = 0x1.05c61p-29;
#endif

// Adding it to a number of at most 2^21 (2^50) in size rounds that to a whole number, which then stands in the low
// bits.
template <class Real> inline constexpr Real kRoundsToWhole = sizeof(Real) == 4 ? Real(0x1.8p23) : Real(0x1.8p52);
// The bits of that double: taking them off leaves the whole number, adding them to one makes the double of it.
inline constexpr int64_t kRoundsToWholeBits = 0x4338000000000000LL;

// Whether step 1 rounds floats to sixteenths of a power.
#if defined(__AVX512F__)
inline constexpr bool kSixteenthsOfPower = true;
#else
inline constexpr bool kSixteenthsOfPower = false;
#endif

// ---- float with AVX-512: a table of sixteenths and a cubic
// --------------------------------------------------------------

#if defined(__AVX512F__)
// s 2^(j / 16) for j = 0 to 15, where s = 0.988596979328077 is the one number near 1 with which all sixteen are within
// 0.13 ulp of a float. The polynomials are of exp(r) / s, so that s drops out.
inline constexpr double kTableScale = 0.988596979328077;
alignas(LL_BYTES) inline constexpr float kSixteenths[] = {
    0x1.fa2962p-1f, 0x1.084922p+0f, 0x1.13fc92p+0f, 0x1.2034ap+0f,  0x1.2cf72cp+0f, 0x1.3a4a58p+0f,
    0x1.48348ap+0f, 0x1.56bc72p+0f, 0x1.65e90cp+0f, 0x1.75c1a2p+0f, 0x1.864dd2p+0f, 0x1.97959p+0f,
    0x1.a9a128p+0f, 0x1.bc7948p+0f, 0x1.d026fcp+0f, 0x1.e4b3bap+0f};

// The coefficients of exp(r) / s for r below ln2 / 32 in size, the highest power first.
inline constexpr float kCubic[] = {0.16859305f, 0.5057825f, 1.0115346f};
inline constexpr float kQuadratic[] = {0.50575244f, 1.011594f};  // to 2^-21, for results that are rounded to 16 bits
inline constexpr float kOverScale = 0x1.02f3eep+0f;              // 1 / s, rounded: the constant term of both
inline constexpr float kOverScaleLessOne = 0.011534549f;         // 1 / s - 1, rounded: finer, as it is smaller

// exp(r) / s plus `constant` - 1 / s.
LL_INLINE Vec<float> exp_over_scale(Vec<float> r, float constant) {
  return ((r * kCubic[0] + kCubic[1]) * r + kCubic[2]) * r + constant;
}

// exp(r) / s of several r at once, in their place: one step of all before the next step of any, so that no step waits
// for the one before it. kRough: by the quadratic.
template <bool kRough, int K> LL_INLINE void exp_over_scale_of_all(Vec<float> (&r)[K]) {
  Vec<float> p[K];
  LL_UNROLL
  for (int k = 0; k < K; ++k) p[k] = kRough ? r[k] * kQuadratic[0] + kQuadratic[1] : r[k] * kCubic[0] + kCubic[1];
  LL_UNROLL
  for (int k = 0; k < K; ++k) p[k] = p[k] * r[k] + (kRough ? kOverScale : kCubic[2]);
  LL_UNROLL
  for (int k = 0; k < K; ++k) r[k] = kRough ? p[k] : p[k] * r[k] + kOverScale;
}

// Adding it to a number of at most 2^17 in size rounds that to sixteenths, whose count then stands in the low bits.
inline constexpr float kRoundsToSixteenths = 0x1.8p19f;

// The power is a number of sixteenths: scale_by_power takes its floor, and the table has had the rest.
template <bool kKeepsDrift> LL_INLINE Exponential<float> split_exp_of_float(Vec<float> x) {
  // 1.
  const Vec<float> y = x * 0x1.715476p+0f + kRoundsToSixteenths;
  const Vec<float> n = y - kRoundsToSixteenths;
  // 2.
  Vec<float> r = x - n * 0x1.62e43p-1f;
  if constexpr (!kKeepsDrift) r = r + n * static_cast<float>(kDrift<float>);
  // 3. The permutation reads the entry that the lowest four bits of y number.
  const Vec<float> entry = _mm512_permutexvar_ps(reinterpret_cast<__m512i>(y), load(kSixteenths));
  return {entry * exp_over_scale(r, kOverScaleLessOne) + entry, n};
}

#else

// ---- float elsewhere: a polynomial of degree 6
// --------------------------------------------------------------------------

template <bool kKeepsDrift> LL_INLINE Exponential<float> split_exp_of_float(Vec<float> x) {
  // 1.
  const Vec<float> n = (x * 0x1.715476p+0f + kRoundsToWhole<float>)-kRoundsToWhole<float>;
  // 2.
#if LL_HAS_FMA
  Vec<float> r = x - n * 0x1.62e43p-1f;
  if constexpr (!kKeepsDrift) r = r + n * static_cast<float>(kDrift<float>);
#else
  // ln2 in three parts. Each product but the last is exact for |n| < 2^15.
  Vec<float> r = x - n * 0.693359375f;
  r = r + n * 2.12192535400390625e-4f;
  r = r + n * 1.904654299957768e-9f;
#endif
  // 3.
  Vec<float> p = r * 0.00138143174418725423f + 0.008368851036416989644f;
  p = p * r + 0.04166840113396463114f;
  p = p * r + 0.1666651952453357788f;
  p = p * r + 0.4999999337294492659f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return {p, n};
}
#endif

// ---- every instruction set
// ----------------------------------------------------------------------------------------------

LL_INLINE Exponential<float> split_exp(Vec<float> x) { return split_exp_of_float<false>(x); }
// One operation less: the drift stays in. A sum of such terms may be corrected by the power of those that count.
LL_INLINE Exponential<float> split_exp_drifting(Vec<float> x) { return split_exp_of_float<true>(x); }

// Step 1 alone: the whole number nearest to x / ln2, for |x| <= 2 kHuge.
template <class Real> LL_INLINE Vec<Real> whole_power(Vec<Real> x) {
  constexpr Real magic = kRoundsToWhole<Real>;
  return (x * static_cast<Real>(kLog2e) + magic) - magic;
}

// Step 2 alone, in double.
LL_INLINE Vec<double> remainder(Vec<double> x, Vec<double> n) { return (x - n * kLn2High) - n * kLn2Low; }

// Step 3 alone, in double: exp(r) for r below ln2 / 2 in size. By Estrin's scheme, which multiplies independent pairs:
// in Horner's each step would wait for the one before.
LL_INLINE Vec<double> exp_of_remainder(Vec<double> r) {
  const Vec<double> r2 = r * r, r4 = r2 * r2;
  const Vec<double> low = r * 0.1666666666666640767 + 0.5000000000000010826;
  const Vec<double> middle = (r * 0.008333333333496926695 + 0.04166666666652810512) +
                             r2 * (r * 0.0001984126950273172393 + 0.001388888894424888626);
  const Vec<double> high = (r * 2.755758843126431582e-6 + 0.00002480149238855312254) +
                           r2 * (r * 2.499985468996973408e-8 + 2.763052339124291142e-7);
  return (r + (r2 * low + r4 * (middle + r4 * high))) + 1.0;
}

LL_INLINE Exponential<double> split_exp(Vec<double> x) {
  const Vec<double> n = whole_power<double>(x);
  return {exp_of_remainder(remainder(x, n)), n};
}
LL_INLINE Exponential<double> split_exp_drifting(Vec<double> x) { return split_exp(x); }

// Step 4: v 2^power for the power of an Exponential, or a whole number, of at most 127 (1023). 0 where the result would
// be below the normal range.
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
  // The low bits of power + magic are the integer: AVX2 cannot convert a double to a 64-bit integer.
  const Vec<double> n = maximum<double>(power, splat<double>(-1023.0)) + (kRoundsToWhole<double> + 1023.0);
  return v * as_real<double>(as_int<double>(n) << 52);
#endif
}

// exp(x) where the result is in range: x is cut to [-2 kHuge, 709 (88.3)], and small results become 0. NaN stays NaN.
template <class Real> LL_INLINE Vec<Real> exp(Vec<Real> x) {
  constexpr Real most = sizeof(Real) == 4 ? Real(88.3) : Real(709.0);
  x = minimum<Real>(splat<Real>(most), maximum<Real>(splat<Real>(static_cast<Real>(-2 * kHuge)), x));
  const Exponential<Real> e = split_exp(x);
  return scale_by_power(e.fraction, e.power);
}

// ---- UnitExp: terms of a sum
// --------------------------------------------------------------------------------------------
//
// exp(x) in units of 2^power, added to a sum. What all terms have in common is left in and taken out of the finished
// sum (without_drift of rows/row_unit.h): the drift, and kUnitExpBias. A term is at most 87 nats above the unit, and
// counts as `least` where it is below that.

// By what fraction every term is too large.
template <class Real> inline constexpr double kUnitExpBias = 0;

template <class Real> struct UnitExp {
  Vec<Real> power;
  Vec<Real> least = splat<Real>(static_cast<Real>(-2 * kHuge));
  LL_INLINE explicit UnitExp(Vec<Real> unit) : power(unit) {}
  LL_INLINE Vec<Real> add_to(Vec<Real> sum, Vec<Real> x) const {
    const Exponential<Real> e = split_exp_drifting(maximum<Real>(least, x));
    return sum + scale_by_power(e.fraction, e.power - power);
  }

  // Adds K terms to two sums and notes in `seen` what tells at the end, by in_range(seen), whether each term was in
  // range: not too large and, unless kClamps cut it, not below `least`.
  using Seen = Vec<Real>;
  template <bool kClamps> LL_INLINE static Seen none_seen() { return splat<Real>(-kInf<Real>); }
  template <bool kRough, bool kClamps, int K>
  LL_INLINE void add_all(Vec<Real> (&sum)[2], Seen& seen, const Vec<Real> (&x)[K]) const {
    LL_UNROLL
    for (int k = 0; k < K; ++k) {
      seen = maximum<Real>(x[k], seen);
      sum[k % 2] = add_to(sum[k % 2], x[k]);
    }
  }
  template <bool kClamps> LL_INLINE bool in_range(Seen seen) const {
    return max_of_lanes<Real>(seen) <= (power[0] + 127) * static_cast<Real>(kLn2);
  }
};

// ---- RowExp: probabilities of a row
// -------------------------------------------------------------------------------------
//
// exp(x) times a factor, in units of 2^power; 0 where the result would be below 2^-124 (in float). The factor is 0 or
// between 2^-100 and 2^100 in size. kRough: to 2^-21, for results that are rounded to 16 bits.

// The drift that split_row_exp leaves in; whoever makes the factor multiplies it out.
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
    const Vec<Real> cut = maximum<Real>(splat<Real>(static_cast<Real>(-2 * kHuge)), x);
    const Exponential<Real> e = split_row_exp<Real>(cut);
    return scale_by_power(e.fraction * factor, e.power - power);
  }
};

// ---- UnitExp and RowExp of float with AVX-512: step 4 within the table
// --------------------------------------------------

#if defined(__AVX512F__)
// The table times a factor, prepared so that step 4 is one addition of integers.
//
// The count of sixteenths that step 1 leaves in the low bits of y is 16 n + j. Moved up by 19 bits, n stands in the
// place of a float's exponent, and j below it, in the upper four bits of the fraction. So entry j has j << 19 taken off
// its bits beforehand, and adding y << 19 to them multiplies the entry by 2^n. The unit's power is part of the constant
// that rounds, and costs nothing.
struct ShiftedTable {
  IntVec<float> bits;
  Vec<float> magic;
  LL_INLINE ShiftedTable(Vec<float> power, Vec<float> factor)
      : bits(as_int<float>(load(kSixteenths) * factor) - (lane_index<float>() << 19)),
        magic(kRoundsToSixteenths - power) {}
  LL_INLINE Vec<float> power() const { return kRoundsToSixteenths - magic; }
  // 1. The count of sixteenths stands in the low bits.
  LL_INLINE Vec<float> count(Vec<float> x) const { return x * 0x1.715476p+0f + magic; }
  // 2. Below ln2 / 32 in size.
  LL_INLINE Vec<float> remainder(Vec<float> x, Vec<float> y) const { return x - (y - magic) * 0x1.62e43p-1f; }
  // 3 and 4. factor s 2^n for n with its sixteenths.
  LL_INLINE Vec<float> entry(Vec<float> y) const {
    const __m512i read = _mm512_permutexvar_epi32(reinterpret_cast<__m512i>(y), reinterpret_cast<__m512i>(bits));
    return as_real<float>(reinterpret_cast<IntVec<float>>(read) + (as_int<float>(y) << 19));
  }
};

// 1 / s is rounded in the polynomials that UnitExp uses.
template <> inline constexpr double kUnitExpBias<float> = static_cast<double>(kOverScale) * kTableScale - 1;

template <> struct UnitExp<float> {
  ShiftedTable table;
  Vec<float> least;
  LL_INLINE explicit UnitExp(Vec<float> power) : table(power, splat<float>(1)), least((power - 125) * 0x1.62e43p-1f) {}
  LL_INLINE Vec<float> add_to(Vec<float> sum, Vec<float> x) const {
    const Vec<float> cut = maximum<float>(least, x);
    const Vec<float> y = table.count(cut);
    const Vec<float> r = table.remainder(cut, y);
    return sum + table.entry(y) * exp_over_scale(r, kOverScale);
  }

  // Where x is not cut, its largest magnitude is noted: both bounds for one operation, which costs nothing beside the
  // multiplications. Where it is, its largest value.
  using Seen = Vec<float>;
  template <bool kClamps> LL_INLINE static Seen none_seen() { return splat<float>(kClamps ? -kInf<float> : 0.0f); }
  template <bool kRough, bool kClamps, int K>
  LL_INLINE void add_all(Vec<float> (&sum)[2], Seen& seen, const Vec<float> (&x)[K]) const {
    constexpr int kLargestMagnitude = 0b1011;  // of _mm512_range_ps: the larger one in size, without its sign
    // One step of all before the next step of any, as in exp_over_scale_of_all.
    Vec<float> cut[K], y[K], r[K], entry[K];
    LL_UNROLL
    for (int k = 0; k < K; ++k) cut[k] = kClamps ? maximum<float>(least, x[k]) : x[k];
    LL_UNROLL
    for (int k = 0; k < K; ++k) y[k] = table.count(cut[k]);
    LL_UNROLL
    for (int k = 0; k < K; ++k)
      seen = kClamps ? maximum<float>(cut[k], seen) : Vec<float>(_mm512_range_ps(seen, cut[k], kLargestMagnitude));
    LL_UNROLL
    for (int k = 0; k < K; ++k) r[k] = table.remainder(cut[k], y[k]);
    LL_UNROLL
    for (int k = 0; k < K; ++k) entry[k] = table.entry(y[k]);
    exp_over_scale_of_all<kRough>(r);
    LL_UNROLL
    for (int k = 0; k < K; ++k) sum[k % 2] = sum[k % 2] + entry[k] * r[k];
  }
  template <bool kClamps> LL_INLINE bool in_range(Seen seen) const {
    const Vec<float> most = (table.power() + 127) * 0x1.62e43p-1f;
    return reaching_bits(kClamps ? most : minimum<float>(most, -least), seen) == kAllBits<float>;
  }
};

template <bool kRough> struct RowExp<float, kRough> {
  ShiftedTable table;
  Vec<float> least;  // of x whose result is not 0
  LL_INLINE RowExp(Vec<float> power, Vec<float> factor)
      : table(power, factor), least((power - 125 - Vec<float>(_mm512_getexp_ps(factor))) * 0x1.62e43p-1f) {}
  LL_INLINE Vec<float> operator()(Vec<float> x) const {
    const __mmask16 counts = _mm512_cmp_ps_mask(x, least, _CMP_NLT_UQ);  // true of a NaN, which is to stay
    const Vec<float> y = table.count(x);
    const Vec<float> r = table.remainder(x, y);
    const Vec<float> entry = table.entry(y);
    if constexpr (kRough) {
      Vec<float> over[1] = {r};
      exp_over_scale_of_all<true>(over);
      return _mm512_maskz_mul_ps(counts, entry, over[0]);
    }
    return _mm512_maskz_fmadd_ps(counts, entry, exp_over_scale(r, kOverScaleLessOne), entry);
  }
};
#endif

}  // namespace logitless::LL_ISA
