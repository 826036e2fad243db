// Logarithms of a vector, expm1, and the parts of a floating-point number that they start from.
//
// Formula: log(x) = k ln2 + log(1 + f), where x = 2^k (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)); with s = f / (2 + f),
// log(1 + f) = 2 atanh(s) = f - f^2 / 2 + s (f^2 / 2 + R(s^2)).
//
// Precision policy: below 1 ulp in double, of tiny arguments of log1p and expm1 as well, where a result is about as
// large as its argument. In float, below 2 ulp. ln2 is taken in two parts, so that k times the first is exact.
//
// Steps of a logarithm: 1. k and f from the bits. 2. s. 3. The polynomial R, in two halves of every second power that
// do not wait for each other. 4. The sum, from the smallest term on.
#pragma once

#include "simd/exp.h"

namespace logitless::LL_ISA {

// x = 2^power mantissa with a mantissa in [sqrt(1/2), sqrt(2)), for normal x > 0. Taking the bits of sqrt(1/2) off
// first makes the exponent change there and not at 1.
template <class Real> struct Parts {
  Vec<Real> power, mantissa;
};
LL_INLINE Parts<float> parts_of(Vec<float> x) {
  const IntVec<float> shifted = as_int<float>(x) - 0x3f3504f3;
  return {__builtin_convertvector(shifted >> 23, Vec<float>), as_real<float>((shifted & 0x7fffff) + 0x3f3504f3)};
}
LL_INLINE Parts<double> parts_of(Vec<double> x) {
  const IntVec<double> shifted = as_int<double>(x) - 0x3fe6a09e667f3bcdLL;
  // |power| < 2^31: through the low bits of a double, since AVX2 cannot convert a 64-bit integer to a double.
  return {as_real<double>((shifted >> 52) + kRoundsToWholeBits) - kRoundsToWhole<double>,
          as_real<double>((shifted & 0xfffffffffffffLL) + 0x3fe6a09e667f3bcdLL)};
}

// n of x = 2^n f with f in [1, 2), for normal x > 0.
LL_INLINE Vec<double> exponent_of(Vec<double> x) {
  return as_real<double>(((as_int<double>(x) >> 52) - 1023) + kRoundsToWholeBits) - kRoundsToWhole<double>;
}

// exp(x) - 1 for x <= 0, below 1 ulp also of tiny x; -inf gives -1, NaN stays NaN. With x = n ln2 + r it is 2^n (exp(r)
// - 1) + (2^n - 1), and for n = 0 the second is 0.
LL_INLINE Vec<double> expm1(Vec<double> x) {
  x = maximum<double>(splat<double>(-60.0), x);
  const Vec<double> n = whole_power<double>(x);
  const Vec<double> r = remainder(x, n);
  // (exp(r) - 1 - r) / r^2, the highest power first.
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

// Steps 2 and 3, so that log(1 + f) = f - (half - s rest).
struct LogSeries {
  Vec<double> half, s, rest;
};
LL_INLINE LogSeries log_series(Vec<double> f) {
  const Vec<double> s = f / (f + 2.0), z = s * s, w = z * z, half = f * f * 0.5;
  const Vec<double> even = w * (w * (w * 0.1531383769920937332 + 0.2222219843214978396) + 0.3999999999940941908);
  const Vec<double> odd_inner = w * (w * 0.1479819860511658591 + 0.1818357216161805012) + 0.2857142874366239149;
  const Vec<double> odd = z * (w * odd_inner + 0.6666666666666735130);
  return {half, s, half + even + odd};
}
// ln2 in two parts, of which the first has few bits: its product with a power is exact.
inline constexpr double kLogHigh = 6.93147180369123816490e-01;
inline constexpr double kLogLow = 1.90821492927058770002e-10;

// log1p(x) for x >= 0; +inf and NaN are returned as they are. 1 + x is rounded, and what the rounding lost comes back
// as a correction of lost / (1 + x).
LL_INLINE Vec<double> log1p(Vec<double> x) {
  const Vec<double> u = x + 1.0;
  const Vec<double> lost = x < 1.0 ? x - (u - 1.0) : 1.0 - (u - x);
  const Parts<double> parts = parts_of(u);
  const Vec<double> k = parts.power, f = parts.mantissa - 1.0;
  const LogSeries series = log_series(f);
  const Vec<double> correction = lost / u + k * kLogLow;
  const Vec<double> y = k * kLogHigh + (f - (series.half - (series.s * series.rest + correction)));
  return x < __builtin_inf() ? y : x;
}

// log1p(x) for finite x >= 0, to 2^-39: for results that are rounded to float.
LL_INLINE Vec<double> short_log1p(Vec<double> x) {
  const Vec<double> u = x + 1.0;
  const Vec<double> lost = x < 1.0 ? x - (u - 1.0) : Vec<double>{};
  const Parts<double> parts = parts_of(u);
  const Vec<double> f = parts.mantissa - 1.0, s = f / (f + 2.0), z = s * s;
  // 2 atanh(s) = s (2 + z p(z)), p by the first terms of its series.
  const Vec<double> w = z * z;
  const Vec<double> p =
      ((z * (2.0 / 5) + 2.0 / 3) + w * (z * (2.0 / 9) + 2.0 / 7)) + w * w * (z * (2.0 / 13) + 2.0 / 11);
  return parts.power * kLn2 + ((s * z) * p + (s + s) + lost);
}

}  // namespace logitless::LL_ISA
