// What two rows of logits have to do with each other, one vector of classes at a time.
//
// Formula, with p = softmax(z), q = softmax(y) and d = log q - log p of a class: every divergence is a sum of terms
// that are >= 0 by themselves,
//   KL(p || q) = sum p phi(d),     phi(d) = exp(d) - 1 - d
//   KL(q || p) = sum q phi(-d)
//   JS(p, q)   = sum m h(d),       h(d) = d/2 tanh(d/2) - log cosh(d/2),     m = (p + q) / 2
// and with exp(d) = q / p the terms of the first are q - p (1 + d) as well, those of the second p - q (1 - d).
//
// Layout: vectors of classes. The numbers of a row (struct parameter S) are one number each, or vectors with a row a
// lane.
//
// Precision policy: phi, h and log cosh are evaluated without cancellation, near 0 by polynomials. The difference of
// two logits is exact (TwoSum), so d is right to an ulp even where the rows differ by 1e-7. Far from 0, exp(d) would
// magnify the rounding of d, and q itself is taken.
//
// Steps for a vector of classes: 1. p and q (RowScale). 2. d (LogRatio). 3. The terms (KlTerms, Mixture).
#pragma once

#include "pairs/pair_polynomials.h"
#include "simd/log.h"

namespace logitless::LL_ISA {

// x = power ln2 + rest, in double; both 0 for an x that is no logit of moderate size.
struct ReducedExponent {
  double power, rest;
  explicit ReducedExponent(double x)
      : power(__builtin_rint(x * kLog2e)), rest((x - power * kLn2High) - power * kLn2Low) {}
};

// 1. How to read one of the two rows: p = exp(z - base) (unit + unit_low) / 2^power = exp(z - lse). The rounding of
// `unit` alone would be an error that all terms share. `top` is the row's largest logit, and so is `base` of a row
// beyond kHuge.
template <class Real, class S = Real> struct RowScale {
  S unit, unit_low, power, base, top;

  static RowScale from(double max, double log_sum) {
    const bool huge = !(__builtin_fabs(max) <= kHuge);
    const ReducedExponent reduced(huge ? 0.0 : max);
    const double unit = exp<double>(splat<double>(-(reduced.rest + log_sum)))[0];
    const Real rounded = static_cast<Real>(unit);
    return {rounded, static_cast<Real>(unit - static_cast<double>(rounded)), static_cast<Real>(reduced.power),
            static_cast<Real>(huge ? max : 0.0), static_cast<Real>(max)};
  }
  LL_INLINE Vec<Real> probability(Vec<Real> z) const {
    const Exponential<Real> e = split_exp(maximum<Real>(splat<Real>(static_cast<Real>(-2 * kHuge)), z - base));
    return scale_by_power(e.fraction * unit + e.fraction * unit_low, e.power - power);
  }
};

// Of |d|: beyond kFar exp(-|d|) does not count beside 1; beyond kApart p exp(d) is better had as q, since exp magnifies
// the rounding of d; kBig stands for an infinite one where it is multiplied by a probability of 0.
template <class Real> inline constexpr Real kFar = sizeof(Real) == 4 ? Real(20) : Real(45);
template <class Real> inline constexpr Real kApart = Real(3);
template <class Real> inline constexpr Real kBig = Real(1e30);

template <class Real> LL_INLINE Vec<Real> clamp(Vec<Real> x, Real most) {
  return maximum<Real>(splat<Real>(-most), minimum<Real>(splat<Real>(most), x));
}

// 2. log q - log p = ((zq - zp) - (max_q - max_p)) - (log_sum_q - log_sum_p), each difference kept as high + low: where
// one class dominates both rows, the first is 0 and the ratio is the second, however small.
template <class Real, class S = Real> struct LogRatio {
  using V = Vec<Real>;
  S top_high, top_low, sum_high, sum_low;

  LogRatio() = default;
  LogRatio(double max_p, double max_q, double log_sum_gap) {
    const double top = max_q - max_p, back = top - max_q;
    const double lost = (max_q - (top - back)) + (-max_p - back);
    top_high = static_cast<Real>(top);
    top_low = static_cast<Real>((top - static_cast<double>(top_high)) + lost);
    sum_high = static_cast<Real>(log_sum_gap);
    sum_low = static_cast<Real>(log_sum_gap - static_cast<double>(sum_high));
  }
  // +-inf where one logit is -inf; 0 where both are, or where a row is NaN, which its probabilities carry.
  LL_INLINE V operator()(V zp, V zq) const {
    const V u = zq - zp, back = u - zq;
    const V lost = (zq - (u - back)) + (-zp - back);  // u + lost is the difference exactly
    const V d = ((u - top_high) + ((lost == lost ? lost : V{}) - top_low) - sum_high) - sum_low;
    return d == d ? d : V{};
  }
};

// 3. p phi(d) and q phi(-d). With d = n ln2 + r and phi(r) = r^2 P(r), phi(d) = 2^n r^2 P(r) + (2^n r + (2^n - 1 - d)):
// for n = 0 the second part is 0 exactly.
template <class Real> struct KlTerms {
  using V = Vec<Real>;
  V near, n, r, square;
  LL_INLINE explicit KlTerms(V d) : near(clamp<Real>(d, kFar<Real>)) {
    n = whole_power<Real>(near);
    if constexpr (sizeof(Real) == 4)
      r = (near - n * 0.693359375f) + n * 2.1219444e-4f;
    else
      r = (near - n * kLn2High) - n * kLn2Low;
    square = r * r;
  }
  LL_INLINE V phi() const {
    const V scale = scale_by_power(splat<Real>(1), n);
    return square * phi_over_square(r) * scale + (scale * r + ((scale - 1) - near));
  }
  LL_INLINE V phi_of_minus() const {
    const V scale = scale_by_power(splat<Real>(1), -n);
    return square * phi_over_square(-r) * scale + ((near + (scale - 1)) - scale * r);
  }
  // p phi(d), a term of KL(p || q); inf where q is 0 and p is not.
  LL_INLINE V forward(V p, V q, V d) const {
    V term = d < -kFar<Real> ? -1 - d : phi();
    term = d > kApart<Real> ? q - p * (1 + minimum<Real>(splat<Real>(kBig<Real>), d)) : p * term;
    return d == -kInf<Real> ? splat<Real>(kInf<Real>) : term;
  }
  // q phi(-d), a term of KL(q || p).
  LL_INLINE V reverse(V p, V q, V d) const {
    V term = d > kFar<Real> ? d - 1 : phi_of_minus();
    term = d < -kApart<Real> ? p - q * (1 - maximum<Real>(splat<Real>(-kBig<Real>), d)) : q * term;
    return d == kInf<Real> ? splat<Real>(kInf<Real>) : term;
  }
};

// 3. Against the mixture m = (p + q) / 2: h, log(m / p) and log(q / m), and the smaller of p / (p + q) and q / (p + q),
// which is how log(m / p) and log(q / m) change with d.
template <class Real> struct Mixture {
  using V = Vec<Real>;
  V h, log_m_p, log_q_m, smaller_share;
  LL_INLINE explicit Mixture(V d) {
    constexpr Real ln2 = static_cast<Real>(kLn2);
    const V y = d < 0 ? -d : d, y2 = y * y;
    const V far = minimum<Real>(splat<Real>(Real(700)), y), e = exp<Real>(-far);
    const V log1p_e = e * log1p_over_x(e);
    const V even = y2 * log_cosh_over_square(y2);
    smaller_share = e / (1 + e);
    const auto is_near = y <= 2;
    h = is_near ? y2 * shannon_over_square(y2) : (ln2 - log1p_e) - far * smaller_share;
    log_m_p = is_near ? d * Real(0.5) + even : (d > 0 ? d : V{}) - (ln2 - log1p_e);
    log_q_m = is_near ? d * Real(0.5) - even : (d < 0 ? d : V{}) + (ln2 - log1p_e);
  }
};

}  // namespace logitless::LL_ISA
