// The functions that a loss of one element is made of: exp over its whole range, logarithms of probabilities, and
// products in which 0 wins over infinity.
//
// Precision policy: a result below the normal range is rounded once, not cut to 0 as in the sums of simd/exp.h: an
// element's loss is a result itself. log(1 - p) loses nothing for small p, although 1 - p is rounded.
#pragma once

#include "simd/log.h"

namespace logitless::LL_ISA {

// v 2^power for whole-numbered `power`, rounded once where the result is below the normal range, inf above it: by two
// factors, either of which is in range.
LL_INLINE Vec<float> scale_gradually(Vec<float> v, Vec<float> power) {
#if defined(__AVX512F__)
  return _mm512_scalef_ps(v, power);
#else
  const IntVec<float> n = __builtin_convertvector(power, IntVec<float>), half = n >> 1;
  return v * as_real<float>((half + 127) << 23) * as_real<float>((n - half + 127) << 23);
#endif
}
LL_INLINE Vec<double> scale_gradually(Vec<double> v, Vec<double> power) {
#if defined(__AVX512F__)
  return _mm512_scalef_pd(v, power);
#else
  constexpr double magic = kRoundsToWhole<double>;
  const Vec<double> half = (power * 0.5 + magic) - magic, rest = power - half;
  const auto two_to = [](Vec<double> n) { return as_real<double>(as_int<double>(n + (magic + 1023.0)) << 52); };
  return v * two_to(half) * two_to(rest);
#endif
}

// factor * exp(x) over the whole range of exp, rounded once where the result is below the normal range.
template <class Real> LL_INLINE Vec<Real> scaled_exp(Vec<Real> x, Vec<Real> factor) {
  constexpr Real least = sizeof(Real) == 4 ? Real(-110) : Real(-760), most = sizeof(Real) == 4 ? Real(90) : Real(711);
  const Exponential<Real> e = split_exp(minimum<Real>(splat<Real>(most), maximum<Real>(splat<Real>(least), x)));
#if !defined(__AVX512F__)
  // A NaN power has no integer; the fraction carries the NaN.
  return scale_gradually(factor * e.fraction, e.power == e.power ? e.power : Vec<Real>{});
#else
  return scale_gradually(factor * e.fraction, e.power);
#endif
}
// exp(x) over its whole range.
template <class Real> LL_INLINE Vec<Real> whole_exp(Vec<Real> x) { return scaled_exp<Real>(x, splat<Real>(1)); }

// log1p(u) for 0 <= u <= 1, below 2 ulp.
LL_INLINE Vec<float> log1p_unit(Vec<float> u) {
  Vec<float> p = u * 0.0020729508250951767f - 0.013631496578454971f;
  p = p * u + 0.041981395334005356f;
  p = p * u - 0.08307410776615143f;
  p = p * u + 0.12467125058174133f;
  p = p * u - 0.1612933725118637f;
  p = p * u + 0.19897931814193726f;
  p = p * u - 0.24988579750061035f;
  p = p * u + 0.33332690596580505f;
  p = p * u - 0.49999988079071045f;
  return u * u * p + u;
}
LL_INLINE Vec<double> log1p_unit(Vec<double> u) { return log1p(u); }

// log(2^k (1 + f)) for f in [sqrt(1/2) - 1, sqrt(2) - 1].
LL_INLINE Vec<float> log_of_parts(Vec<float> k, Vec<float> f) {
  const Vec<float> z = f * f;
  Vec<float> p = f * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const Vec<float> low = (f * z * p - k * 2.12194440e-4f) - z * 0.5f;
  return k * 0.693359375f + (f + low);
}
LL_INLINE Vec<double> log_of_parts(Vec<double> k, Vec<double> f) {
  const LogSeries series = log_series(f);
  return k * kLogHigh + (f - (series.half - (series.s * series.rest + k * kLogLow)));
}

// log(x) for x > 0; below -100 for 0 of either sign.
template <class Real> LL_INLINE Vec<Real> log_positive(Vec<Real> x) {
  constexpr Real least = sizeof(Real) == 4 ? Real(0x1p-126) : Real(0x1p-1022),
                 up = sizeof(Real) == 4 ? Real(0x1p24) : Real(0x1p54);
  const IntVec<Real> small = x < least;
  const Parts<Real> p = parts_of(small ? magnitude<Real>(x) * up : x);
  return log_of_parts(small ? p.power - (sizeof(Real) == 4 ? Real(24) : Real(54)) : p.power, p.mantissa - Real(1));
}

// log(1 - p) for 0 <= p <= 1.
template <class Real> LL_INLINE Vec<Real> log_one_minus(Vec<Real> p) {
  const Parts<Real> q = parts_of(Real(1) - p);
  // 1 - p may round for p < 0.5; -p and 1 - 2p, which are mantissa - 1 there, do not lose anything.
  const Vec<Real> f = q.power == 0 ? -p : (q.power == -1 ? Real(1) - 2 * p : q.mantissa - Real(1));
  return p == 1 ? splat<Real>(-kInf<Real>) : log_of_parts(q.power, f);
}

// coefficient * value, where a zero coefficient wins over an infinite value.
template <class Real> LL_INLINE Vec<Real> times_zero_safe(Vec<Real> coefficient, Vec<Real> value) {
  return coefficient * ((coefficient == 0) & (magnitude<Real>(value) == kInf<Real>) ? Vec<Real>{} : value);
}

// Of a NaN as well.
template <class Real> LL_INLINE IntVec<Real> outside_unit(Vec<Real> x) { return ~((x >= 0) & (x <= 1)); }

}  // namespace logitless::LL_ISA
